//! Raw image files of the built-in machine, and who may touch them.
//!
//! A disk is inactive when it is made: nothing is locked, and no request is served. [`Disk::activate`] locks the image and opens it for
//! requests; [`Disk::inactivate`] lets running requests end, writes everything to stable storage and gives the lock back. During a
//! migration the source inactivates before the last state leaves, and the target activates only when its guest is about to start, so
//! at no time may both write. Nobody but the holder of the lock touches the image, and a VM runs only with all disks active.
//!
//! The file is opened anew by each activation, never kept open between: a network file system then shows what the other side wrote. It
//! must be the file that it was at first, by inode and size; a path that leads elsewhere now is refused. What the lock cannot do: keep
//! out programs that do not ask for it, or hosts that see the image through a file system without locks between hosts. Images that are
//! block devices are refused, because a lock on a device node says nothing about other nodes of the same device.
//!
//! Sizes are compared within each side only. Source and target open the same image, or images that an operator keeps alike.

mod config;
mod error;
mod holder;
mod lock;
mod set;
#[cfg(test)]
mod tests;

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

pub use config::{DiskConfig, ID_BYTES_MAX, name_disks};
pub(in crate::machine) use config::{is_id, split_path};
pub use error::DiskError;
pub use holder::Holder;
pub use set::Disks;

/// Longest time that running requests may take to end, in seconds. Healthy storage answers in milliseconds; the guest is stopped
/// meanwhile, and stays at the source if they do not end.
const DRAIN_SECONDS_MAX: u64 = 10;

/// A raw image file.
#[derive(Debug)]
pub struct Disk {
    config: DiskConfig,
    first_seen: Identity,
    state: Mutex<State>,
    /// A request has ended.
    drained: Condvar,
    /// Held by whoever activates or inactivates.
    changing: Mutex<()>,
}

/// What a disk is like now.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct DiskInfo {
    /// What the operator said.
    pub config: DiskConfig,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Whether this process holds the lock and serves requests.
    pub active: bool,
}

/// Which file it is, and how large.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Identity {
    device: u64,
    inode: u64,
    bytes: u64,
}

impl Identity {
    fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            bytes: metadata.len(),
        }
    }
}

#[derive(Debug, Default)]
struct State {
    /// Locked and open; None while inactive.
    file: Option<Arc<File>>,
    /// Refuse new requests: the disk is being inactivated.
    closing: bool,
    running: usize,
    /// The host failed to store what was written. Linux reports this once and then believes that all is well; we do not.
    lost_writes: bool,
}

impl Disk {
    /// A disk on the image that `config` names, inactive. Looks whether the image is there and may be used, and keeps nothing open.
    ///
    /// # Errors
    /// When the image is missing, no regular file, or must not be opened as `config` says.
    pub fn open(config: DiskConfig) -> Result<Self, DiskError> {
        config::check_names(std::slice::from_ref(&config))?;
        let metadata = open_file(&config)?
            .metadata()
            .map_err(host(&config, "looking at the file"))?;
        if !metadata.is_file() {
            return Err(DiskError::Config {
                reason: format!("{} is not a regular file", config.path.display()),
                disk: config.id,
            });
        }
        Ok(Self {
            first_seen: Identity::of(&metadata),
            config,
            state: Mutex::default(),
            drained: Condvar::new(),
            changing: Mutex::new(()),
        })
    }

    /// What the operator said.
    pub fn config(&self) -> &DiskConfig {
        &self.config
    }

    /// What the disk is like now.
    pub fn info(&self) -> DiskInfo {
        DiskInfo {
            config: self.config.clone(),
            size_bytes: self.first_seen.bytes,
            active: self.is_active(),
        }
    }

    /// Whether this process holds the lock and serves requests.
    pub fn is_active(&self) -> bool {
        let state = self.state();
        state.file.is_some() && !state.closing
    }

    /// Locks the image, exclusively unless the disk is read-only, and serves requests from now on. Returns whether it did: an active
    /// disk is left as it is. Never waits for the lock.
    ///
    /// # Errors
    /// When somebody else has the lock, when the file is not the one it was, or when the host refuses. The disk is then inactive and
    /// holds nothing; trying again is harmless.
    pub fn activate(&self) -> Result<bool, DiskError> {
        let _one_at_a_time = self.changing();
        if self.state().file.is_some() {
            return Ok(false);
        }
        let config = &self.config;
        let file = open_file(config)?;
        self.check_identity(&file)?;
        let kind = if config.read_only {
            lock::Kind::Shared
        } else {
            lock::Kind::Exclusive
        };
        if !lock::try_lock(&file, kind).map_err(host(config, "locking"))? {
            return Err(DiskError::Locked {
                disk: config.id.clone(),
                path: config.path.clone(),
                holder: holder::find(&file),
            });
        }
        // The size again: whoever had the lock until now may have changed it meanwhile.
        if let Err(error) = self.check_identity(&file) {
            lock::unlock(&file).map_err(host(config, "unlocking"))?;
            return Err(error);
        }
        let mut state = self.state();
        state.file = Some(Arc::new(file));
        tracing::debug!(disk = config.id, "active");
        Ok(true)
    }

    /// Refuses new requests, waits for running ones, writes everything to stable storage, and gives the lock back. From then on
    /// another process may write the image. Returns whether it did: an inactive disk is left as it is.
    ///
    /// # Errors
    /// When requests do not end, or the data cannot be written. The disk then stays active, and this process keeps the lock.
    pub fn inactivate(&self) -> Result<bool, DiskError> {
        self.release(|file| self.sync(file))
    }

    /// Like [`inactivate`](Self::inactivate), for the next program of this process. What was written may be lost in a crash of the host,
    /// as before: the next program finds it where this one would, in the memory of the same kernel.
    ///
    /// # Errors
    /// When requests do not end, or writes were lost before. The disk then stays active, and this process keeps the lock.
    pub fn pass_on(&self) -> Result<bool, DiskError> {
        self.release(|_| self.check_writes())
    }

    fn release(
        &self,
        finish: impl FnOnce(&File) -> Result<(), DiskError>,
    ) -> Result<bool, DiskError> {
        let _one_at_a_time = self.changing();
        let Some(file) = self.drain()? else {
            return Ok(false);
        };
        let config = &self.config;
        let released =
            finish(&file).and_then(|()| lock::unlock(&file).map_err(host(config, "unlocking")));
        let mut state = self.state();
        state.closing = false;
        released?;
        state.file = None;
        tracing::debug!(disk = config.id, "inactive");
        Ok(true)
    }

    /// Fills `buffer` from `offset` on.
    ///
    /// # Errors
    /// When the disk is inactive, the request reaches beyond its end, or the host refuses.
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), DiskError> {
        let request = self.begin()?;
        self.check_range(buffer.len(), offset)?;
        request
            .file
            .read_exact_at(buffer, offset)
            .map_err(host(&self.config, "reading"))
    }

    /// Writes `buffer` to `offset`. It may be lost in a crash of the host until [`flush`](Self::flush).
    ///
    /// # Errors
    /// When the disk is inactive or read-only, the request reaches beyond its end, or the host refuses.
    pub fn write_at(&self, buffer: &[u8], offset: u64) -> Result<(), DiskError> {
        let request = self.begin()?;
        if self.config.read_only {
            return Err(DiskError::ReadOnly {
                disk: self.config.id.clone(),
            });
        }
        self.check_range(buffer.len(), offset)?;
        request
            .file
            .write_all_at(buffer, offset)
            .map_err(host(&self.config, "writing"))
    }

    /// Writes to stable storage what was written before.
    ///
    /// # Errors
    /// When the disk is inactive, or the host refuses.
    pub fn flush(&self) -> Result<(), DiskError> {
        let request = self.begin()?;
        self.sync(&request.file)
    }

    /// Once this has failed it fails for ever: what the guest wrote is not on the disk, and nobody must be told that it is.
    fn sync(&self, file: &File) -> Result<(), DiskError> {
        if self.config.read_only {
            return Ok(());
        }
        self.check_writes()?;
        file.sync_data()
            .inspect_err(|_| self.state().lost_writes = true)
            .map_err(host(&self.config, "writing to stable storage"))
    }

    fn check_writes(&self) -> Result<(), DiskError> {
        if !self.state().lost_writes {
            return Ok(());
        }
        Err(DiskError::LostWrites {
            disk: self.config.id.clone(),
            path: self.config.path.clone(),
        })
    }

    /// A request begins: the disk stays active until it ends.
    fn begin(&self) -> Result<Request<'_>, DiskError> {
        let mut state = self.state();
        let open = state.file.clone().filter(|_| !state.closing);
        let file = open.ok_or_else(|| DiskError::Inactive {
            disk: self.config.id.clone(),
        })?;
        state.running += 1;
        Ok(Request { disk: self, file })
    }

    /// Refuses new requests and waits for the running ones. None if the disk is inactive. On success `closing` stays set.
    fn drain(&self) -> Result<Option<Arc<File>>, DiskError> {
        let mut state = self.state();
        let Some(file) = state.file.clone() else {
            return Ok(None);
        };
        state.closing = true;
        let start = Instant::now();
        let most = Duration::from_secs(DRAIN_SECONDS_MAX);
        while state.running > 0 {
            let Some(left) = most.checked_sub(start.elapsed()) else {
                state.closing = false;
                return Err(DiskError::Busy {
                    disk: self.config.id.clone(),
                    path: self.config.path.clone(),
                    requests: state.running,
                    seconds: DRAIN_SECONDS_MAX,
                });
            };
            state = self
                .drained
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        Ok(Some(file))
    }

    fn check_range(&self, bytes: usize, offset: u64) -> Result<(), DiskError> {
        let size = self.first_seen.bytes;
        let end = u64::try_from(bytes)
            .ok()
            .and_then(|bytes| offset.checked_add(bytes));
        if end.is_some_and(|end| end <= size) {
            return Ok(());
        }
        Err(DiskError::Beyond {
            disk: self.config.id.clone(),
            offset,
            bytes,
            size,
        })
    }

    fn check_identity(&self, file: &File) -> Result<(), DiskError> {
        let metadata = file
            .metadata()
            .map_err(host(&self.config, "looking at the file"))?;
        let (was, is) = (self.first_seen, Identity::of(&metadata));
        let change = if (was.device, was.inode) != (is.device, is.inode) {
            "was replaced by another file".to_owned()
        } else if was.bytes != is.bytes {
            format!("was changed from {} to {} bytes", was.bytes, is.bytes)
        } else {
            return Ok(());
        };
        Err(DiskError::Changed {
            disk: self.config.id.clone(),
            path: self.config.path.clone(),
            change,
        })
    }

    /// A thread that panicked left nothing half-made: every change is one assignment.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn changing(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Disk {
    /// Closing alone would give the lock back only once no child process between fork and exec has the description any more.
    fn drop(&mut self) {
        if let Some(file) = self.state().file.take()
            && let Err(error) = lock::unlock(&file)
        {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, disk = self.config.id, "the lock ends with the file");
        }
    }
}

/// A request that is running.
struct Request<'a> {
    disk: &'a Disk,
    file: Arc<File>,
}

impl Drop for Request<'_> {
    fn drop(&mut self) {
        let mut state = self.disk.state();
        state.running -= 1;
        if state.running == 0 {
            self.disk.drained.notify_all();
        }
    }
}

/// Close-on-exec, as the standard library opens everything.
fn open_file(config: &DiskConfig) -> Result<File, DiskError> {
    OpenOptions::new()
        .read(true)
        .write(!config.read_only)
        // A named pipe or a terminal must not make us wait, or become ours.
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(&config.path)
        .map_err(host(config, "opening"))
}

/// Names the disk, the image and the operation in an error of the host.
fn host(config: &DiskConfig, op: &'static str) -> impl FnOnce(io::Error) -> DiskError {
    let (disk, path) = (config.id.clone(), config.path.clone());
    move |source| DiskError::Host {
        disk,
        path,
        op,
        source,
    }
}
