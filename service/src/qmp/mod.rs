//! QMP: the control interface, shaped as QEMU's so that its clients work.
//!
//! ```text
//!  client ──> codec ──> session ──> dispatch ──> Command ──> engine
//!         bytes    objects     envelope     table      EngineRequest
//!  client <── outbox <── replies (in order), events (to those who negotiated)
//! ```
//!
//! - [`schema`]: what commands return; [`Command`]: what they take; [`QmpEvent`]; [`QmpError`]
//! - [`QmpServer`]: the unix socket and its clients
//! - [`EngineHandle`]: how requests reach the engine and events come back. The engine never waits for a client: its events go into
//!   a bounded channel, and a client that does not keep up is disconnected.

mod catalog;
pub(crate) mod channels;
pub mod codec;
mod command;
mod dispatch;
mod error;
mod event;
#[cfg(any(test, feature = "testkit"))]
pub mod fuzz;
mod introspect;
mod passed_fds;
pub mod schema;
mod server;
mod session;
#[cfg(test)]
mod tests;
mod types;

use std::os::fd::OwnedFd;

use serde_json::Value;
use tokio::sync::{broadcast, mpsc, oneshot};

use crate::migration::params::MigrationMode;
pub use command::{
    AnnounceSelf, CalcDirtyRate, Command, DirtyRateMode, ResolveOutcome, TimeUnit, YankInstance,
};
pub use error::{ErrorClass, QmpError};
pub use event::{QmpEvent, ShutdownReason, Timestamp};
pub use server::{CLIENTS_MAX, QmpServer};

/// Events that may wait for one client's task. Far more than a migration has; only a task that is stuck falls behind.
const EVENTS_QUEUED_MAX: usize = 1024;
/// Requests that may wait for the engine: at most two of each client are under way, one of them out of band, plus those of the
/// process itself.
const REQUESTS_QUEUED_MAX: usize = 128;

/// The clients' side of the engine. Cheap to clone.
#[derive(Clone, Debug)]
pub struct EngineHandle {
    requests: mpsc::Sender<EngineRequest>,
    events: broadcast::Sender<QmpEvent>,
}

/// A command on its way to the engine, with the way back.
#[derive(Debug)]
pub struct EngineRequest {
    /// What to do.
    pub command: Command,
    /// The file descriptor that came along, for a command that [takes](Command::takes_fd) one.
    pub fd: Option<OwnedFd>,
    /// Where the answer goes. The client may be gone; then it is dropped.
    pub reply: oneshot::Sender<Result<Value, QmpError>>,
}

/// The engine's side.
#[derive(Debug)]
pub struct EngineInbox {
    /// Commands in the order in which they came.
    pub requests: mpsc::Receiver<EngineRequest>,
    /// Where events go. Sending never waits; with no client it fails, which means nothing.
    pub events: broadcast::Sender<QmpEvent>,
}

impl EngineHandle {
    /// A handle and the inbox it leads to.
    pub fn channel() -> (Self, EngineInbox) {
        let (request_sender, requests) = mpsc::channel(REQUESTS_QUEUED_MAX);
        let (events, _) = broadcast::channel(EVENTS_QUEUED_MAX);
        let handle = Self {
            requests: request_sender,
            events: events.clone(),
        };
        (handle, EngineInbox { requests, events })
    }

    /// Has the engine execute `command`.
    ///
    /// # Errors
    /// The engine's, or that there is none any more.
    pub async fn execute(&self, command: Command) -> Result<Value, QmpError> {
        self.execute_with(command, None).await
    }

    /// The same for a command that takes a file descriptor.
    ///
    /// # Errors
    /// As [`execute`](Self::execute).
    pub async fn execute_with(
        &self,
        command: Command,
        fd: Option<OwnedFd>,
    ) -> Result<Value, QmpError> {
        let ended = || QmpError::generic("the VM process is ending");
        let (reply, answer) = oneshot::channel();
        let request = EngineRequest { command, fd, reply };
        self.requests.send(request).await.map_err(|_| ended())?;
        answer.await.unwrap_or_else(|_| Err(ended()))
    }

    /// Has migrations of these kinds refused for `reason` until [`remove_blocker`](Self::remove_blocker): for parts of a VMM that
    /// cannot be moved now. Refused while a migration is under way. Returns the number of the blocker.
    ///
    /// # Errors
    /// The engine's.
    pub async fn add_blocker(
        &self,
        reason: impl Into<String>,
        modes: Vec<MigrationMode>,
    ) -> Result<u64, QmpError> {
        let command = Command::XAddBlocker {
            reason: reason.into(),
            modes,
        };
        let answer = self.execute(command).await?;
        serde_json::from_value(answer)
            .map(|schema::BlockerInfo { id }| id)
            .map_err(|error| QmpError::from_chain(&error))
    }

    /// Removes a blocker.
    ///
    /// # Errors
    /// The engine's: there is no such blocker.
    pub async fn remove_blocker(&self, id: u64) -> Result<(), QmpError> {
        self.execute(Command::XRemoveBlocker { id })
            .await
            .map(|_| ())
    }

    /// All events from now on.
    pub fn subscribe(&self) -> broadcast::Receiver<QmpEvent> {
        self.events.subscribe()
    }
}
