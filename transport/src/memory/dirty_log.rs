//! Who reports writes to guest memory. Implementations live in `vmferry-devices`; several are united per round.

use std::sync::Arc;

use super::DirtyMap;
#[cfg(feature = "uring")]
use super::extents::Extents;
use crate::units::PageRun;

/// A dirty log failed. The migration fails, the guest goes on: nothing was lost at the source.
#[derive(Debug, thiserror::Error)]
#[error("dirty log {log}: {op} failed")]
pub struct DirtyLogError {
    /// Which log, as [`DirtyLog::name`] says.
    pub log: &'static str,
    /// What was asked of it.
    pub op: &'static str,
    /// The kernel's answer.
    #[source]
    pub source: std::io::Error,
}

/// One source of dirty pages: KVM's log, the VMM's own writes, vhost, VFIO, or the page tables of the host.
///
/// Order of calls: `start`, then any number of `fetch`, then `stop`; and again from the start for a second migration. A log is
/// driven by one thread at a time, never by the thread that runs a vCPU.
pub trait DirtyLog: Send {
    /// Short name for messages and statistics.
    fn name(&self) -> &'static str;

    /// Begins to log. Every write that happens after the return is reported by a later [`fetch`](Self::fetch); earlier ones may be.
    ///
    /// # Errors
    /// When the kernel refuses; then nothing is logged, and `stop` need not be called.
    fn start(&mut self) -> Result<(), DirtyLogError>;

    /// What existed when the log started, for a log that had to look; taken once. Pages may have come into being since.
    #[cfg(feature = "uring")]
    fn take_extents(&mut self) -> Option<Extents>;

    /// Marks in `into` every page written since the last fetch (or since `start`) and forgets it, so that a write that comes later is
    /// reported again. Bits already set in `into` stay. A log with a [`protector`](Self::protector) does not forget here.
    ///
    /// # Errors
    /// When the kernel refuses. Pages may then have been forgotten: the attempt must fail, and the next one starts with all pages.
    fn fetch(&mut self, into: &mut DirtyMap) -> Result<(), DirtyLogError>;

    /// For a log that forgets a page only when it is told that the page is about to be read. Until then the page is reported by every
    /// fetch, and what the guest writes to it meanwhile costs neither the guest a fault nor the migration another transfer.
    ///
    /// `None` for a log that forgets when it is fetched.
    fn protector(&self) -> Option<Arc<dyn WriteProtector>>;

    /// Ends logging and frees what it cost the guest. Harmless when not started.
    ///
    /// # Errors
    /// When the kernel refuses; the guest is unharmed, but slower than it should be.
    fn stop(&mut self) -> Result<(), DirtyLogError>;
}

/// Makes a dirty log forget pages just before they are read: see [`DirtyLog::protector`]. Called by the data threads, several at a
/// time.
pub trait WriteProtector: Send + Sync {
    /// Forgets `runs`. A write after the return is reported by the next fetch; so the order is protect, then read.
    ///
    /// # Errors
    /// When the kernel refuses. The pages may then have been forgotten: the attempt must fail.
    fn protect(&self, runs: &[PageRun]) -> Result<(), DirtyLogError>;
}

/// All protectors of a united log.
struct UnitedProtector(Vec<Arc<dyn WriteProtector>>);

impl WriteProtector for UnitedProtector {
    fn protect(&self, runs: &[PageRun]) -> Result<(), DirtyLogError> {
        self.0
            .iter()
            .try_for_each(|protector| protector.protect(runs))
    }
}

/// Several logs as one: a page is dirty if any of them says so.
pub struct UnitedLog {
    logs: Vec<Box<dyn DirtyLog>>,
}

impl UnitedLog {
    /// Unites `logs`.
    pub fn new(logs: Vec<Box<dyn DirtyLog>>) -> Self {
        Self { logs }
    }
}

impl std::fmt::Debug for UnitedLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list()
            .entries(self.logs.iter().map(|log| log.name()))
            .finish()
    }
}

impl DirtyLog for UnitedLog {
    fn name(&self) -> &'static str {
        "united"
    }

    fn start(&mut self) -> Result<(), DirtyLogError> {
        for started in 0..self.logs.len() {
            if let Err(error) = self.logs[started].start() {
                for log in &mut self.logs[..started] {
                    // The first error is the one to report; a log that cannot stop only slows the guest.
                    if let Err(stop) = log.stop() {
                        tracing::warn!(
                            error = &stop as &dyn std::error::Error,
                            "dirty log left running"
                        );
                    }
                }
                return Err(error);
            }
        }
        Ok(())
    }

    fn fetch(&mut self, into: &mut DirtyMap) -> Result<(), DirtyLogError> {
        self.logs.iter_mut().try_for_each(|log| log.fetch(into))
    }

    #[cfg(feature = "uring")]
    fn take_extents(&mut self) -> Option<Extents> {
        self.logs.iter_mut().find_map(|log| log.take_extents())
    }

    fn protector(&self) -> Option<Arc<dyn WriteProtector>> {
        let protectors: Vec<_> = self.logs.iter().filter_map(|log| log.protector()).collect();
        (!protectors.is_empty())
            .then(|| Arc::new(UnitedProtector(protectors)) as Arc<dyn WriteProtector>)
    }

    fn stop(&mut self) -> Result<(), DirtyLogError> {
        let mut result = Ok(());
        for log in &mut self.logs {
            // Every log is stopped, whatever the others say; the first error is reported.
            let stopped = log.stop();
            result = result.and(stopped);
        }
        result
    }
}
