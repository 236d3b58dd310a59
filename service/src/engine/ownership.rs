//! Which process may run the guest and write its disks. Both move together: a guest runs only with all disks active, and the disks of a
//! guest that was given away, or may have been, are inactive.

use crate::machine::disk::Disks;
use crate::machine::{Machine, MachineError, ResumeError};

use super::guest::StoppedGuest;

/// Activates the disks and, only if that worked, lets the guest run. The one way to start a guest: at the start of the process, on
/// `cont`, after a migration that failed, and on arrival at a target. Blocks.
///
/// # Errors
/// The guest is still stopped. The disks may be active: nobody else had them.
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
    machine.resume(proof)
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
