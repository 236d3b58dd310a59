//! Dirty log of the VMM's own writes to guest memory: device models, loaders, and everything else that goes through vm-memory.
//!
//! KVM's log sees what vCPUs write and nothing else. A VMM that maps its RAM as `GuestRegionMmap<AtomicBitmap>` gets the rest for
//! free: vm-memory marks a page after each write through the mapping. The mark comes after the write, so a fetch between the two
//! reports the page in the next round, never not at all. Before the *last* fetch the VMM must therefore have finished its writes,
//! which is what pausing a machine promises.
//!
//! Not seen are writes that bypass vm-memory, such as a system call that is given the mapping's address.

use std::io;
use std::sync::Arc;

use vm_memory::GuestRegionMmap;
use vm_memory::bitmap::AtomicBitmap;
use vmferry_transport::memory::extents::Extents;
use vmferry_transport::memory::{DirtyLog, DirtyLogError, DirtyMap, WriteProtector};
use vmferry_transport::units::{BlockId, PAGE_SIZE, PageIndex};

const NAME: &str = "vmm-writes";

/// The bitmaps of all RAM regions as one dirty log.
///
/// The bitmaps cannot be switched off: vm-memory marks pages whether or not a log is started. Only one log per VM makes sense,
/// because fetching empties the bitmaps.
#[derive(Debug)]
pub struct VmmWriteLog {
    regions: Vec<Arc<GuestRegionMmap<AtomicBitmap>>>,
}

impl VmmWriteLog {
    /// A log over `regions`, which are the RAM blocks in the order of the block list.
    ///
    /// # Errors
    /// When a bitmap counts in pages of another size than 4 KiB, as it does on a host with larger pages.
    pub fn new(regions: Vec<Arc<GuestRegionMmap<AtomicBitmap>>>) -> Result<Self, DirtyLogError> {
        for (index, region) in regions.iter().enumerate() {
            let bitmap = (***region).bitmap();
            let pages = (bitmap.byte_size() as u64).div_ceil(PAGE_SIZE);
            if bitmap.byte_size() != region.size() || bitmap.len() as u64 != pages {
                return Err(DirtyLogError {
                    log: NAME,
                    op: "counting in pages of 4 KiB",
                    source: io::Error::new(
                        io::ErrorKind::Unsupported,
                        format!(
                            "the bitmap of RAM block {index} has {} pages for {} bytes",
                            bitmap.len(),
                            region.size()
                        ),
                    ),
                });
            }
        }
        Ok(Self { regions })
    }

    fn bitmaps(&self) -> impl Iterator<Item = (BlockId, &AtomicBitmap)> {
        (0..)
            .map(BlockId)
            .zip(self.regions.iter().map(|region| (***region).bitmap()))
    }
}

impl DirtyLog for VmmWriteLog {
    fn name(&self) -> &'static str {
        NAME
    }

    fn start(&mut self) -> Result<(), DirtyLogError> {
        self.bitmaps().for_each(|(_, bitmap)| bitmap.reset());
        Ok(())
    }

    /// # Panics
    /// If `into` has fewer blocks than this log.
    fn fetch(&mut self, into: &mut DirtyMap) -> Result<(), DirtyLogError> {
        for (block, bitmap) in self.bitmaps() {
            // Each word is read and emptied in one atomic step, so a mark that races with it is in this fetch or the next.
            into.block_mut(block)
                .union_words(PageIndex(0), &bitmap.get_and_reset());
        }
        Ok(())
    }

    fn take_extents(&mut self) -> Option<Extents> {
        None
    }

    fn protector(&self) -> Option<Arc<dyn WriteProtector>> {
        None
    }

    fn stop(&mut self) -> Result<(), DirtyLogError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::num::NonZeroUsize;
    use std::sync::atomic::{AtomicBool, Ordering};
    use vm_memory::mmap::MmapRegionBuilder;
    use vm_memory::{Bytes, GuestAddress, MemoryRegionAddress};
    use vmferry_transport::units::PageCount;

    const PAGES: u64 = 300;

    fn region() -> Arc<GuestRegionMmap<AtomicBitmap>> {
        let bytes = usize::try_from(PAGES * PAGE_SIZE).unwrap();
        Arc::new(GuestRegionMmap::from_range(GuestAddress(0), bytes, None).unwrap())
    }

    fn write(region: &GuestRegionMmap<AtomicBitmap>, page: u64, value: u64) {
        region
            .write_obj(value, MemoryRegionAddress(page * PAGE_SIZE + 8))
            .unwrap();
    }

    fn empty_map(log: &VmmWriteLog) -> DirtyMap {
        DirtyMap::new(log.regions.iter().map(|_| PageCount(PAGES)))
    }

    fn pages(map: &DirtyMap, block: u16) -> Vec<u64> {
        (0..PAGES)
            .filter(|page| map.block(BlockId(block)).contains(PageIndex(*page)))
            .collect()
    }

    #[test]
    fn a_fetch_reports_writes_since_the_last_one_in_their_block_and_keeps_other_marks() {
        let (low, high) = (region(), region());
        let mut log = VmmWriteLog::new(vec![low.clone(), high.clone()]).unwrap();
        write(&low, 7, 1);
        log.start().unwrap();
        write(&low, 0, 1);
        write(&high, PAGES - 1, 1);
        low.write_slice(&[1; 8192], MemoryRegionAddress(64 * PAGE_SIZE - 1))
            .unwrap();
        let mut map = empty_map(&log);
        map.block_mut(BlockId(1)).set(PageIndex(5));
        log.fetch(&mut map).unwrap();
        assert_eq!(pages(&map, 0), [0, 63, 64, 65]);
        assert_eq!(pages(&map, 1), [5, PAGES - 1]);

        let mut map = empty_map(&log);
        log.fetch(&mut map).unwrap();
        assert_eq!(map.count(), PageCount(0), "each write is reported once");
        log.stop().unwrap();
    }

    #[test]
    fn reading_is_not_writing() {
        let low = region();
        let mut log = VmmWriteLog::new(vec![low.clone()]).unwrap();
        log.start().unwrap();
        let _value: u64 = low.read_obj(MemoryRegionAddress(4096)).unwrap();
        let mut map = empty_map(&log);
        log.fetch(&mut map).unwrap();
        assert_eq!(map.count(), PageCount(0));
    }

    #[test]
    fn a_copy_that_follows_the_log_ends_up_equal_under_concurrent_writers() {
        let low = region();
        let mut log = VmmWriteLog::new(vec![low.clone()]).unwrap();
        let mut copy = vec![0_u64; usize::try_from(PAGES).unwrap()];
        let done = AtomicBool::new(false);
        let mut follow = |log: &mut VmmWriteLog| {
            let mut map = empty_map(log);
            log.fetch(&mut map).unwrap();
            for page in pages(&map, 0) {
                copy[usize::try_from(page).unwrap()] = low
                    .read_obj(MemoryRegionAddress(page * PAGE_SIZE + 8))
                    .unwrap();
            }
        };
        log.start().unwrap();
        std::thread::scope(|scope| {
            let writers: Vec<_> = (0..3_u64)
                .map(|writer| {
                    let low = &low;
                    // All writers share words of the bitmap, none shares a page.
                    scope.spawn(move || {
                        for turn in 0..30_000_u64 {
                            write(low, turn * 7 % 100 * 3 + writer, turn + 1);
                        }
                    })
                })
                .collect();
            let finisher = scope.spawn({
                let done = &done;
                move || {
                    writers.into_iter().for_each(|w| w.join().unwrap());
                    done.store(true, Ordering::Release);
                }
            });
            while !done.load(Ordering::Acquire) {
                follow(&mut log);
            }
            finisher.join().unwrap();
        });
        follow(&mut log);
        for page in 0..PAGES {
            let now: u64 = low
                .read_obj(MemoryRegionAddress(page * PAGE_SIZE + 8))
                .unwrap();
            assert_ne!(now, 0);
            assert_eq!(copy[usize::try_from(page).unwrap()], now, "page {page}");
        }
    }

    #[test]
    fn a_bitmap_of_other_pages_is_refused_by_block() {
        let bytes = 1 << 20;
        let coarse = AtomicBitmap::new(bytes, NonZeroUsize::new(65536).unwrap());
        let mapping = MmapRegionBuilder::new_with_bitmap(bytes, coarse)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_ANONYMOUS | libc::MAP_PRIVATE)
            .build()
            .unwrap();
        let region = Arc::new(GuestRegionMmap::new(mapping, GuestAddress(0)).unwrap());
        let error = VmmWriteLog::new(vec![self::region(), region]).unwrap_err();
        assert!(error.source.to_string().contains("block 1"), "{error:?}");
    }
}
