//! Who holds the guest: the proof that it is stopped moves between the engine, the migration core and the jobs, and there is never
//! more than one owner.

use std::sync::Arc;

use crate::machine::VcpusStopped;

/// The proof of [`VcpusStopped`] on its way through the engine. A job may look at it while the owner keeps it; it can be taken out again
/// only when no job does.
#[derive(Debug)]
pub(super) struct StoppedGuest(Arc<VcpusStopped>);

impl StoppedGuest {
    pub(super) fn new(proof: VcpusStopped) -> Self {
        Self(Arc::new(proof))
    }

    /// For a job that reads the state of the stopped guest.
    pub(super) fn lend(&self) -> Arc<VcpusStopped> {
        Arc::clone(&self.0)
    }

    /// The proof itself, to resume with.
    ///
    /// # Panics
    /// If a job still looks at it: the core waits for its jobs before it gives the proof back.
    pub(super) fn into_proof(self) -> VcpusStopped {
        Arc::into_inner(self.0)
            .expect("no job reads the state of a guest that is about to be resumed")
    }
}

/// Where the guest is, as far as this process knows.
#[derive(Debug)]
pub(super) enum Guest {
    /// Its vCPUs run.
    Running,
    /// It is stopped, and the engine holds the proof.
    Stopped(StoppedGuest),
    /// A job or the migration core holds the proof, or is about to get it.
    Away,
}
