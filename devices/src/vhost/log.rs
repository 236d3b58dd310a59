//! Dirty log of back ends: a bitmap in shared memory, a bit for each 4 KiB of guest-physical address space, in which they mark what they
//! write: buffers, and used rings.
//!
//! A back end marks a page after it has written it, so a fetch between the two reports the page in the next round, never not at all.
//! Before the *last* fetch the back ends must have stopped; to stop waits for what is under way.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};
use vmferry_transport::memory::extents::Extents;
use vmferry_transport::memory::{DirtyLog, DirtyLogError, DirtyMap, WriteProtector};

use super::memory::VhostMemory;
use crate::DeviceError;

const NAME: &str = "vhost";

/// Bytes of one word.
const WORD_BYTES: usize = size_of::<u64>();

/// The bitmap, shared with all back ends of a VM. Lives as long as one of them may write to it.
pub struct LogPages {
    file: File,
    mapping: MmapRegion<()>,
}

impl LogPages {
    /// A bitmap for all of `memory`, no bit set. Nothing is populated.
    ///
    /// # Errors
    /// When the host has no memory or descriptor to give.
    pub fn new(memory: &VhostMemory) -> io::Result<Arc<Self>> {
        let words = memory.pages_to_end().0.div_ceil(64);
        let bytes = usize::try_from(words).map_err(io::Error::other)? * WORD_BYTES;
        let file = File::from(memfd_create("vhost-log", MemfdFlags::CLOEXEC)?);
        ftruncate(&file, bytes as u64)?;
        let offset = FileOffset::new(file.try_clone()?, 0);
        let mapping = MmapRegion::from_file(offset, bytes).map_err(io::Error::other)?;
        Ok(Arc::new(Self { file, mapping }))
    }

    /// Where the bitmap is in this process, for the kernel's back ends.
    pub(super) fn address(&self) -> u64 {
        self.mapping.as_ptr().addr() as u64
    }

    /// Length in bytes.
    pub fn bytes(&self) -> u64 {
        self.mapping.size() as u64
    }

    /// The file, for back ends in other processes.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Takes every word that is not empty, with the number of its first page, and leaves it empty. Each word is read and emptied in one
    /// atomic step, so a mark that races with it is in this call or in the next.
    fn take(&self, mut each: impl FnMut(u64, u64)) -> io::Result<()> {
        let bitmap = self.mapping.as_volatile_slice();
        for number in 0..self.mapping.size() / WORD_BYTES {
            let word = bitmap
                .get_atomic_ref::<AtomicU64>(number * WORD_BYTES)
                .map_err(io::Error::other)?;
            // To look first keeps what was never written a hole.
            if word.load(Ordering::Relaxed) != 0 {
                // Back ends count in bytes; that is the order of little-endian words.
                let bits = u64::from_le(word.swap(0, Ordering::AcqRel));
                each(number as u64 * 64, bits);
            }
        }
        Ok(())
    }
}

impl fmt::Debug for LogPages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogPages")
            .field("fd", &self.file.as_fd())
            .field("bytes", &self.bytes())
            .finish()
    }
}

/// A back end that marks what it writes.
pub trait Logs: Send {
    /// Marks from now on, in `pages`, also after a stop and another start, or if it stands and begins to work only later.
    ///
    /// # Errors
    /// When the back end cannot or will not; it then marks nothing.
    fn start_log(&mut self, pages: &Arc<LogPages>) -> Result<(), DeviceError>;

    /// Ends it. Harmless when not started.
    ///
    /// # Errors
    /// When the back end refuses; it may go on marking, and keeps the bitmap for that.
    fn stop_log(&mut self) -> Result<(), DeviceError>;
}

/// Whether a back end is to be asked at all, of which `blocker` says why the guest cannot move while it runs.
///
/// # Errors
/// [`DeviceError::Vetoed`] with that reason.
pub(super) fn may_log(device: &str, blocker: Option<String>) -> Result<(), DeviceError> {
    let device = device.to_owned();
    blocker.map_or(Ok(()), |reason| Err(DeviceError::Vetoed { device, reason }))
}

/// The dirty log of all back ends of a VM: one bitmap that all of them mark.
pub struct VhostLog {
    memory: VhostMemory,
    devices: Vec<Arc<Mutex<dyn Logs>>>,
    pages: Option<Arc<LogPages>>,
}

impl VhostLog {
    /// For `devices`, all of which work on `memory`.
    pub fn new(memory: VhostMemory, devices: Vec<Arc<Mutex<dyn Logs>>>) -> Self {
        Self {
            memory,
            devices,
            pages: None,
        }
    }
}

fn lock(device: &Mutex<dyn Logs>) -> MutexGuard<'_, dyn Logs + 'static> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

fn failed(op: &'static str) -> impl Fn(io::Error) -> DirtyLogError {
    move |source| DirtyLogError {
        log: NAME,
        op,
        source,
    }
}

impl DirtyLog for VhostLog {
    fn name(&self) -> &'static str {
        NAME
    }

    fn start(&mut self) -> Result<(), DirtyLogError> {
        let pages = LogPages::new(&self.memory).map_err(failed("making the bitmap"))?;
        for (number, device) in self.devices.iter().enumerate() {
            if let Err(error) = lock(device).start_log(&pages) {
                for started in &self.devices[..number] {
                    // The first error is the one to report; a back end that goes on marking keeps the bitmap.
                    if let Err(stop) = lock(started).stop_log() {
                        let error = &stop as &dyn std::error::Error;
                        tracing::warn!(error, "a back end goes on logging");
                    }
                }
                return Err(failed("starting")(io::Error::other(error)));
            }
        }
        self.pages = Some(pages);
        Ok(())
    }

    /// # Panics
    /// If `into` has fewer blocks than the RAM.
    fn fetch(&mut self, into: &mut DirtyMap) -> Result<(), DirtyLogError> {
        let Some(pages) = &self.pages else {
            return Err(failed("fetching")(io::Error::other("it is not started")));
        };
        pages
            .take(|first, word| self.memory.mark(first, word, into))
            .map_err(failed("fetching"))
    }

    fn take_extents(&mut self) -> Option<Extents> {
        None
    }

    fn protector(&self) -> Option<Arc<dyn WriteProtector>> {
        None
    }

    fn stop(&mut self) -> Result<(), DirtyLogError> {
        if self.pages.take().is_none() {
            return Ok(());
        }
        let mut result = Ok(());
        for device in &self.devices {
            // Every one is stopped, whatever the others say; the first error is reported.
            let stopped = lock(device).stop_log().map_err(io::Error::other);
            let stopped = stopped.map_err(failed("stopping"));
            result = result.and(stopped);
        }
        result
    }
}

impl fmt::Debug for VhostLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VhostLog")
            .field("devices", &self.devices.len())
            .field("pages", &self.pages)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vhost::memory::tests::anonymous;
    use std::os::unix::fs::FileExt;
    use vmferry_transport::units::{BlockId, PAGE_SIZE, PageCount, PageIndex};

    /// Marks as a process does that has the file.
    #[derive(Default)]
    struct Marks {
        pages: Option<Arc<LogPages>>,
        refuses: bool,
    }

    impl Logs for Marks {
        fn start_log(&mut self, pages: &Arc<LogPages>) -> Result<(), DeviceError> {
            if self.refuses {
                return Err(DeviceError::Vetoed {
                    device: "marks".into(),
                    reason: "it will not".into(),
                });
            }
            self.pages = Some(Arc::clone(pages));
            Ok(())
        }

        fn stop_log(&mut self) -> Result<(), DeviceError> {
            self.pages = None;
            Ok(())
        }
    }

    fn mark(device: &Mutex<Marks>, page: u64) {
        let device = device.lock().unwrap();
        let file = device.pages.as_ref().unwrap().file();
        let mut byte = [0];
        file.read_exact_at(&mut byte, page / 8).unwrap();
        byte[0] |= 1 << (page % 8);
        file.write_all_at(&byte, page / 8).unwrap();
    }

    #[test]
    fn each_mark_is_reported_once_in_the_block_of_its_address() {
        let memory = anonymous(&[(0, 100), (1 << 20, 77)]);
        let devices: Vec<_> = (0..2)
            .map(|_| Arc::new(Mutex::new(Marks::default())))
            .collect();
        let logs = devices.iter().map(|d| Arc::clone(d) as _).collect();
        let mut log = VhostLog::new(memory, logs);
        let mut map = DirtyMap::new([PageCount(100), PageCount(77)]);
        log.start().unwrap();
        mark(&devices[0], 99);
        mark(&devices[1], (1 << 20) / PAGE_SIZE + 76);
        mark(&devices[1], 200);
        log.fetch(&mut map).unwrap();
        assert!(map.block(BlockId(0)).contains(PageIndex(99)));
        assert!(map.block(BlockId(1)).contains(PageIndex(76)));
        assert_eq!(
            map.count(),
            PageCount(2),
            "what is not RAM does not count: {map:?}"
        );
        map.clear();
        log.fetch(&mut map).unwrap();
        assert_eq!(map.count(), PageCount(0));
        log.stop().unwrap();
        assert!(devices[0].lock().unwrap().pages.is_none());
    }

    #[test]
    fn marks_that_race_with_fetches_are_never_lost() {
        let memory = anonymous(&[(0, 64)]);
        let pages = LogPages::new(&memory).unwrap();
        let mut seen = 0_u64;
        std::thread::scope(|scope| {
            let marker = scope.spawn(|| {
                let bitmap = pages.mapping.as_volatile_slice();
                let word = bitmap.get_atomic_ref::<AtomicU64>(0).unwrap();
                (0..100_000_u64)
                    .filter(|turn| word.fetch_or(1 << (turn % 64), Ordering::AcqRel) == 0)
                    .count() as u64
            });
            while !marker.is_finished() {
                pages.take(|_, _| seen += 1).unwrap();
            }
            let became_dirty = marker.join().unwrap();
            pages.take(|_, _| seen += 1).unwrap();
            assert_eq!(seen, became_dirty);
        });
    }

    #[test]
    fn one_that_refuses_leaves_no_other_logging() {
        let first = Arc::new(Mutex::new(Marks::default()));
        let second = Arc::new(Mutex::new(Marks {
            refuses: true,
            ..Marks::default()
        }));
        let mut log = VhostLog::new(anonymous(&[(0, 1)]), vec![first.clone(), second]);
        assert!(log.start().is_err());
        assert!(first.lock().unwrap().pages.is_none());
        log.stop().unwrap();
    }
}
