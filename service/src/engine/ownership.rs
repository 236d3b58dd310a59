//! Which process may run the guest and write its disks. Both move together: a guest runs only with all disks active, and the disks of a
//! guest that was given away, or may have been, are inactive.

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::machine::disk::Disks;
use crate::machine::{Machine, MachineError, ResumeError};

use super::guest::StoppedGuest;
use super::jobs::panicked;
use super::passthrough;

/// Activates the disks and, only if that worked, lets the devices work and the vCPUs run. The one way to start a guest: at the start of the
/// process, on `cont`, after a migration that failed, and on arrival at a target. Blocks.
///
/// Who is told that an arrived guest was not started has it go on from the state that was loaded here, in place on the same memory. So
/// everything that can fail comes before the first thing that works for the guest: a virtio device that was a moment ahead would have served
/// requests and packets that are served again. VFIO devices work before the vCPUs do, and whatever becomes of one, the guest is here.
///
/// # Errors
/// The guest is still stopped, and nothing has touched its memory. The disks may be active: nobody else had them.
pub(super) fn start_guest(
    machine: &dyn Machine,
    disks: &Disks,
    stopped: StoppedGuest,
) -> Result<(), ResumeError> {
    let proof = stopped.into_proof();
    if let Err(error) = disks.activate() {
        let source = MachineError::Disk(error);
        return Err(ResumeError { proof, source });
    }
    let prepared = machine.prepare(proof)?;
    if let Err(error) = passthrough::run(machine) {
        // None of them works more than it did.
        let proof = machine.stand_down(prepared);
        let source = MachineError::Device(error);
        return Err(ResumeError { proof, source });
    }
    machine.go(prepared);
    Ok(())
}

/// Stops the guest: its vCPUs, then its devices. Blocks.
///
/// # Errors
/// The guest runs as before, or as [`StopError`] says.
pub(super) fn stop_guest(machine: &dyn Machine) -> Result<StoppedGuest, StopError> {
    let proof = machine.pause().map_err(|source| StopError {
        source,
        stopped: None,
    })?;
    let Err(error) = passthrough::pause(machine) else {
        return Ok(StoppedGuest::new(proof));
    };
    let stopped = machine.resume(proof).err().map(|error| {
        let source = &error.source as &dyn std::error::Error;
        tracing::error!(
            error = source,
            "the vCPUs stay stopped although a device works on"
        );
        StoppedGuest::new(error.proof)
    });
    let source = MachineError::Device(error);
    Err(StopError { source, stopped })
}

/// After a job has panicked that had the proof: whatever the guest did, it is stopped then, and there is a new one. Does not panic, though it
/// may have been this that did. Blocks.
///
/// # Errors
/// The guest runs, or cannot be used any more.
pub(super) fn stop_again(machine: &dyn Machine) -> Result<StoppedGuest, MachineError> {
    let paused = catch_unwind(AssertUnwindSafe(|| machine.pause()));
    let paused = paused.unwrap_or_else(|_| Err(panicked()));
    paused.map(StoppedGuest::new).inspect_err(|error| {
        let error = error as &dyn std::error::Error;
        tracing::error!(
            error,
            "the guest cannot be stopped after a job has panicked"
        );
    })
}

/// The same after a job that was to resume the guest of this process: an error with the proof, unless the guest runs and cannot be stopped.
/// Blocks.
///
/// # Errors
/// The guest is stopped, because a job has panicked.
pub(super) fn resumed_perhaps(machine: &dyn Machine) -> Result<(), ResumeError> {
    match stop_again(machine) {
        Ok(stopped) => Err(ResumeError {
            proof: stopped.into_proof(),
            source: panicked(),
        }),
        Err(_) => Ok(()),
    }
}

/// The guest could not be stopped.
#[derive(Debug, thiserror::Error)]
#[error("the guest could not be stopped")]
pub(super) struct StopError {
    /// Why.
    #[source]
    pub(super) source: MachineError,
    /// A device would not stop, and the vCPUs would not run again.
    pub(super) stopped: Option<StoppedGuest>,
}

/// The same at a target. If the guest cannot run, the disks go back: the source is about to hear that it still owns them.
pub(super) fn start_arrived_guest(
    machine: &dyn Machine,
    disks: &Disks,
    stopped: StoppedGuest,
) -> Result<(), ResumeError> {
    start_guest(machine, disks, stopped).inspect_err(|_| {
        if let Err(error) = disks.inactivate() {
            let error = &error as &dyn std::error::Error;
            tracing::error!(
                error,
                "a disk is still locked here; the source cannot have it before this process ends"
            );
        }
    })
}

/// A stopped guest stays here after all: takes its disks back, so that nobody else has them before `cont`, which tries again if this
/// fails. Blocks.
pub(super) fn take_back(disks: &Disks) {
    if let Err(error) = disks.activate() {
        let error = &error as &dyn std::error::Error;
        tracing::warn!(
            error,
            "the stopped guest has not got its disks back; cont tries again"
        );
    }
}
