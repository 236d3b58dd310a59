//! Servers outside of this process that must know how a migration goes: a display server that hands its clients over, a switch that
//! expects the guest at another port.
//!
//! | Event | When | The server |
//! | --- | --- | --- |
//! | SETUP | before anything else | may veto; one that is dead vetoes, because it could not prepare |
//! | DONE | the target runs the guest | forgets it |
//! | FAILED | before any vCPU runs again | goes on as before |
//! | INCOMING_FAILED | at the target, before the source can know | gives back what it took over |
//!
//! After SETUP a dead or silent server is logged and nothing else: it is no reason to lose a guest.

mod json;

use std::fmt;

use vmferry_transport::units::MigrationId;

use crate::DeviceError;
use crate::notifier::{Mode, Notifier, Setup};

pub use json::{ANSWER_TIMEOUT, JsonServer, LINE_BYTES_MAX};

/// What a server is told.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ServerEvent {
    /// The guest is about to move so.
    Setup(Mode),
    /// It has moved.
    Done,
    /// It stays here.
    Failed,
    /// It will not come here.
    IncomingFailed,
}

impl fmt::Display for ServerEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Setup(_) => "setup",
            Self::Done => "done",
            Self::Failed => "failed",
            Self::IncomingFailed => "incoming-failed",
        })
    }
}

/// A server outside of this process.
pub trait Server: Send {
    /// Name for errors and the log; must not change.
    fn name(&self) -> &str;

    /// Tells the server about `migration` and waits, within a deadline of the implementation, until it has taken note.
    ///
    /// # Errors
    /// When it objects, or cannot be reached. The error names the server.
    fn tell(&mut self, event: ServerEvent, migration: MigrationId) -> Result<(), DeviceError>;
}

/// Tells a server how migrations go. Registered for all modes, at `Priority::SERVER`.
pub struct ServerNotifier {
    name: String,
    server: Box<dyn Server>,
    /// The attempt that it was told of.
    migration: Option<MigrationId>,
}

impl ServerNotifier {
    /// For `server`.
    pub fn new(server: Box<dyn Server>) -> Self {
        Self {
            name: server.name().to_owned(),
            server,
            migration: None,
        }
    }

    fn end(&mut self, event: ServerEvent) {
        if let Some(migration) = self.migration.take() {
            self.tell(event, migration);
        }
    }

    fn tell(&mut self, event: ServerEvent, migration: MigrationId) {
        if let Err(error) = self.server.tell(event, migration) {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, %event, "a server was not told; the guest goes on without it");
        }
    }
}

impl Notifier for ServerNotifier {
    fn name(&self) -> &str {
        &self.name
    }

    fn setup(&mut self, setup: &Setup) -> Result<(), DeviceError> {
        // First: a server that does not answer in time may have heard it, and must hear the end.
        self.migration = Some(setup.migration);
        self.server
            .tell(ServerEvent::Setup(setup.mode), setup.migration)
    }

    fn done(&mut self) {
        self.end(ServerEvent::Done);
    }

    fn failed(&mut self) {
        self.end(ServerEvent::Failed);
    }

    fn incoming_failed(&mut self, migration: MigrationId) {
        self.tell(ServerEvent::IncomingFailed, migration);
    }

    fn after_exec(&mut self, migration: MigrationId, done: bool) {
        let event = match done {
            true => ServerEvent::Done,
            false => ServerEvent::Failed,
        };
        self.tell(event, migration);
    }
}

impl fmt::Debug for ServerNotifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerNotifier")
            .field("name", &self.name)
            .field("migration", &self.migration)
            .finish_non_exhaustive()
    }
}
