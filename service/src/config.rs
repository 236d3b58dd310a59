//! What `vmferry run` is told, checked once and then believed.

use std::path::PathBuf;

use vmferry_transport::control::Address;
use vmferry_transport::limits::Deadlines;
use vmferry_transport::units::Uuid;

pub use crate::machine::AccelChoice;
pub use crate::machine::disk::DiskConfig;
use crate::machine::failover::Primaries;
pub use crate::machine::notify::NotifyConfig;
use crate::machine::workload::layout::{RAM_MAX, RAM_MIN};
use crate::machine::{MachineConfig, MachineError};
pub use crate::observe::ObserveConfig;

/// Longest name of a VM.
pub const NAME_CHARS_MAX: usize = 64;

/// How the guest gets into this process, if not by being started here.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Incoming {
    /// `migrate-incoming` will say where to listen.
    Defer,
    /// Listen here at once.
    Listen(Address),
    /// From the program that this process was before.
    Exec,
}

/// Where the process whose guest is to be taken over, in place, is to be found.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum CprOrigin {
    /// At the socket that this process was started with in the place of its standard input, connected or listening.
    Inherited,
    /// It will connect here.
    Listen(PathBuf),
}

/// A VM process.
#[derive(Clone, Debug)]
pub struct RunConfig {
    /// For people and `query-name`.
    pub name: Option<String>,
    /// What tells this VM from others, for `query-uuid` and the capability `validate-uuid`.
    pub uuid: Option<Uuid>,
    /// Accelerator.
    pub accel: AccelChoice,
    /// The machine. Its `incoming` is set exactly if [`incoming`](Self::incoming) is.
    pub machine: MachineConfig,
    /// Its disks, each with a name of its own.
    pub disks: Vec<DiskConfig>,
    /// Servers that hear of its migrations.
    pub notify: Vec<NotifyConfig>,
    /// Ids of stand-ins for passed-through network cards; see [`Primaries`].
    pub failover_primaries: Vec<String>,
    /// Path of the QMP socket.
    pub qmp: PathBuf,
    /// Do not start the guest; `cont` does. With `incoming`: leave it stopped on arrival.
    pub paused: bool,
    /// Wait for a guest instead of starting one.
    pub incoming: Option<Incoming>,
    /// Take the guest's memory over from a process on this host, before anything is built. With `incoming` only.
    pub incoming_cpr: Option<CprOrigin>,
    /// How long a migration waits for what.
    pub deadlines: Deadlines,
    /// Metrics and records.
    pub observe: ObserveConfig,
}

impl RunConfig {
    /// Checks everything that can be known without the host.
    ///
    /// # Errors
    /// The value that does not fit, and what would.
    pub fn check(&self) -> Result<(), MachineError> {
        let refuse = |text: String| Err(MachineError::Config(text));
        let mem = self.machine.mem_bytes;
        if !mem.is_multiple_of(4096) {
            return refuse(format!("memory of {mem} bytes: must be a multiple of 4096"));
        }
        if !(RAM_MIN..=RAM_MAX).contains(&mem) {
            let (min, max) = (RAM_MIN >> 20, RAM_MAX >> 30);
            return refuse(format!(
                "memory of {mem} bytes: must be from {min}M to {max}G"
            ));
        }
        self.machine.workload.check(mem, self.machine.vcpus)?;
        if let Some(name) = &self.name
            && (name.is_empty() || name.chars().count() > NAME_CHARS_MAX)
        {
            return refuse(format!(
                "the name must have 1 to {NAME_CHARS_MAX} characters"
            ));
        }
        match (&self.incoming_cpr, &self.incoming) {
            (None, _) | (Some(_), Some(Incoming::Listen(Address::Unix { .. }))) => {}
            _ => {
                return refuse(
                    "a guest that is taken over in place comes by --incoming unix:PATH".to_owned(),
                );
            }
        }
        Primaries::new(&self.failover_primaries, self.incoming.is_some())?;
        if let Err(error) = Address::unix(&self.qmp) {
            return refuse(format!("QMP socket: {}", error.reason));
        }
        Ok(())
    }
}
