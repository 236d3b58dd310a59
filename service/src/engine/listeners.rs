//! Who hears of this machine's migrations: the machine itself, the servers that the operator named, and its failover primaries.

use serde_json::{Value, json};
use vmferry_devices::DeviceError;
use vmferry_devices::notifier::{Mode, Modes, Notifiers, Priority};
use vmferry_devices::vfio::VfioNotifier;

use super::Engine;
use super::event::{Event, Events};
use crate::config::RunConfig;
use crate::machine::failover::Primaries;
use crate::machine::{Machine, MachineError};
use crate::qmp::QmpError;

/// Registers everybody. A guest that is asked to let go of a primary becomes [`Event::Unplugging`].
///
/// # Errors
/// What the configuration says that cannot be.
pub(super) fn register(
    config: &RunConfig,
    machine: &dyn Machine,
    events: &Events,
) -> Result<(Notifiers, Primaries), RegisterError> {
    let notifiers = Notifiers::new();
    if let Some(notifier) = machine.notifier() {
        notifiers.register(Modes::ALL, Priority::CHECK, notifier);
    }
    for notifier in machine.device_notifiers() {
        notifiers.register(Modes::ALL, Priority::DEVICE, notifier);
    }
    for notifier in machine.in_place_notifiers() {
        let in_place = Mode::CprTransfer | Mode::CprExec;
        notifiers.register(in_place, Priority::DEVICE, notifier);
    }
    for server in &config.notify {
        notifiers.register(Modes::ALL, Priority::SERVER, server.notifier()?);
    }
    notifiers.register(
        Mode::Normal,
        Priority::DEVICE,
        Box::new(VfioNotifier::new(machine.vfio())),
    );
    let primaries = Primaries::new(&config.failover_primaries, config.incoming.is_some())?;
    let events = events.clone();
    let unplugging = move |id: &str| {
        // The engine ends only with the process.
        let _ = events.send(Event::Unplugging(id.to_owned()));
    };
    for notifier in primaries.notifiers(unplugging) {
        notifiers.register(Mode::Normal, Priority::GUEST, Box::new(notifier));
    }
    Ok((notifiers, primaries))
}

impl Engine {
    /// `x-confirm-unplug`.
    pub(super) fn confirm_unplug(&self, id: &str) -> Result<Value, QmpError> {
        match self.primaries.confirm_unplug(id) {
            Ok(()) => Ok(json!({})),
            Err(error) => Err(QmpError::generic(error.to_string())),
        }
    }
}

/// Why somebody could not be registered.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub(super) enum RegisterError {
    /// A primary.
    Machine(#[from] MachineError),
    /// A server.
    Device(#[from] DeviceError),
}
