//! Mode `cpr-reboot`: guest memory stays in its file while the guest is saved, and whoever loads the guest takes the file up again, in
//! another process and perhaps after a restart of the host.
//!
//! The archive holds no memory, and a mark beside the file says which archive the memory belongs to (`vmferry_cpr::mark`). The order is
//! what keeps both halves together:
//!
//! ```text
//! save  guest stops | memory to the disk, mark set | state to the disk | COMMIT: end of the archive to the disk | completed
//! load  mark read, memory mapped | state loaded | COMMIT: mark removed | guest runs
//! ```
//!
//! A save that fails removes its mark before the guest runs again; if it cannot, the mark names an archive without an end, which nobody
//! loads.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use vmferry_cpr::mark;
use vmferry_transport::memory::GuestRam;
use vmferry_transport::proto::SourceJob;
use vmferry_transport::units::MigrationId;

use super::event::SourceEvent;
use super::outgoing::chain;
use crate::machine::MachineConfig;
use crate::machine::ram::saved_guest;

/// Guest memory in files with a name, in the order of the blocks.
#[derive(Clone, Debug)]
pub(super) struct NamedMemory {
    paths: Arc<[PathBuf]>,
}

impl NamedMemory {
    /// If the machine's memory has a name.
    pub(super) fn of(machine: &MachineConfig) -> Option<Self> {
        let paths = machine.backing.paths(machine.mem_bytes);
        (!paths.is_empty()).then(|| Self {
            paths: paths.into(),
        })
    }

    /// The saved guest that it belongs to. The files are open, and so locked against others.
    ///
    /// # Errors
    /// The marks cannot be read.
    pub(super) fn saved_guest(&self) -> anyhow::Result<Option<MigrationId>> {
        Ok(saved_guest(&self.paths)?)
    }

    /// From now on it belongs to no saved guest. Blocks.
    ///
    /// # Errors
    /// For the operator: a mark may be left.
    pub(super) fn forget(&self) -> Result<(), String> {
        let removed = self.paths.iter().try_for_each(|path| mark::remove(path));
        removed.map_err(|error| chain(&error))
    }

    /// From now on it belongs to the saved guest `id`. Blocks.
    ///
    /// # Errors
    /// For the operator: only some may be marked.
    pub(super) fn remember(&self, id: MigrationId) -> Result<(), String> {
        let set = self.paths.iter().try_for_each(|path| mark::set(path, id));
        set.map_err(|error| chain(&error))
    }
}

/// The part of an attempt that concerns memory which stays.
#[derive(Debug)]
pub(super) struct Keep {
    memory: NamedMemory,
    ram: GuestRam,
    /// The attempt is over, and no mark may be set any more. Held while one is set.
    over: Arc<Mutex<bool>>,
}

impl Keep {
    pub(super) fn new(memory: NamedMemory, ram: GuestRam) -> Self {
        Self {
            memory,
            ram,
            over: Arc::default(),
        }
    }

    /// While the guest runs: writes most of its memory to the disk, so that little is left when it is stopped. Ends in
    /// [`SourceEvent::FdsOffered`] or a failed job.
    pub(super) fn write_ahead(&self, report: impl Fn(SourceEvent) + Clone + Send + 'static) {
        let ram = self.ram.clone();
        on_thread(SourceJob::OfferFds, report, move || {
            sync(&ram).map(|()| SourceEvent::FdsOffered)
        });
    }

    /// The guest is stopped: memory goes to the disk, and is marked as that of `id`. Ends in [`SourceEvent::FdsHandedOver`] or a failed job.
    pub(super) fn seal(
        &self,
        id: MigrationId,
        report: impl Fn(SourceEvent) + Clone + Send + 'static,
    ) {
        let (ram, memory, over) = (self.ram.clone(), self.memory.clone(), self.over.clone());
        on_thread(SourceJob::HandOverFds, report, move || {
            sync(&ram)?;
            let over = over.lock().unwrap_or_else(PoisonError::into_inner);
            if *over {
                return Err("the migration is over".to_owned());
            }
            memory.remember(id).map(|()| SourceEvent::FdsHandedOver)
        });
    }

    /// What ends an attempt that has failed; blocks. No mark is set any more when it returns, and none is left if that is possible.
    pub(super) fn undo(&self) -> impl FnOnce() + Send + 'static {
        let (memory, over) = (self.memory.clone(), self.over.clone());
        move || {
            *over.lock().unwrap_or_else(PoisonError::into_inner) = true;
            if let Err(error) = memory.forget() {
                tracing::warn!(
                    error,
                    "the memory is still marked as that of a guest which was not saved"
                );
            }
        }
    }
}

/// What guest memory holds survives a loss of power, as far as its file system does.
fn sync(ram: &GuestRam) -> Result<(), String> {
    for block in ram.blocks() {
        let Some((file, _)) = block.file() else {
            return Err(format!("RAM block {:?} has no file", block.name()));
        };
        match file.sync_all() {
            // A file system without anything to wait for.
            Err(error) if error.kind() == std::io::ErrorKind::InvalidInput => {}
            synced => synced.map_err(|error| {
                format!(
                    "RAM block {:?} cannot be written to the disk: {error}",
                    block.name()
                )
            })?,
        }
    }
    Ok(())
}

fn on_thread(
    job: SourceJob,
    report: impl Fn(SourceEvent) + Clone + Send + 'static,
    work: impl FnOnce() -> Result<SourceEvent, String> + Send + 'static,
) {
    let without_thread = report.clone();
    let body = move || {
        report(work().unwrap_or_else(|error| SourceEvent::JobFailed(job, error)));
    };
    if let Err(error) = std::thread::Builder::new()
        .name("vm-keep".into())
        .spawn(body)
    {
        let text = format!("no thread to write memory to the disk: {error}");
        without_thread(SourceEvent::JobFailed(job, text));
    }
}
