//! Primaries of failover pairs for the built-in machine, which has no network: stand-ins whose guest is played from outside.
//!
//! They go through all that a passed-through network card goes through in a migration (`vmferry_devices::failover`), so that waiting
//! for the guest, its answer, and the time limit can be tried with real processes. What the guest would say, somebody says with
//! [`Primaries::confirm_unplug`].

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmferry_devices::DeviceError;
use vmferry_devices::failover::{FailoverNotifier, Primary};

use super::MachineError;
use super::disk::is_id;

/// Most primaries of a machine.
pub const PRIMARIES_MAX: usize = 8;

/// The primaries of a machine. Clones are handles of the same ones.
#[derive(Clone, Debug, Default)]
pub struct Primaries(Vec<StandIn>);

/// Where a primary is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Plug {
    /// The guest has it.
    Plugged,
    /// The guest has it, and was asked to let go.
    Unplugging,
    /// The guest does not have it.
    Unplugged,
}

#[derive(Clone, Debug)]
struct StandIn {
    id: String,
    plug: Arc<Mutex<Plug>>,
}

impl Primaries {
    /// Primaries with these ids. The guest has them, unless the machine waits for an `incoming` one.
    ///
    /// # Errors
    /// When an id cannot be one, is there twice, or there are too many.
    pub fn new(ids: &[String], incoming: bool) -> Result<Self, MachineError> {
        let refuse = |text: String| Err(MachineError::Config(text));
        if ids.len() > PRIMARIES_MAX {
            return refuse(format!(
                "{} failover primaries; at most {PRIMARIES_MAX} are possible",
                ids.len()
            ));
        }
        for (number, id) in ids.iter().enumerate() {
            if !is_id(id) {
                return refuse(format!("failover primary {id:?}: not usable as an id"));
            }
            if ids[..number].contains(id) {
                return refuse(format!("failover primary {id}: it is there twice"));
            }
        }
        let plug = if incoming {
            Plug::Unplugged
        } else {
            Plug::Plugged
        };
        let stand_in = |id: &String| StandIn {
            id: id.clone(),
            plug: Arc::new(Mutex::new(plug)),
        };
        Ok(Self(ids.iter().map(stand_in).collect()))
    }

    /// One notifier for each, to be registered for mode `normal` at `Priority::GUEST`. `unplugging` hears the id of each that the guest
    /// is asked to let go of; it must not block.
    pub fn notifiers(
        &self,
        unplugging: impl Fn(&str) + Clone + Send + 'static,
    ) -> Vec<FailoverNotifier> {
        self.0
            .iter()
            .map(|primary| {
                FailoverNotifier::new(Box::new(primary.clone()), Box::new(unplugging.clone()))
            })
            .collect()
    }

    /// Says for the guest that it has let go of a primary that it was asked to let go of.
    ///
    /// # Errors
    /// When there is no such primary, or the guest was not asked.
    pub fn confirm_unplug(&self, id: &str) -> Result<(), MachineError> {
        let refuse = |text: String| Err(MachineError::Config(text));
        let Some(primary) = self.0.iter().find(|primary| primary.id == id) else {
            return refuse(format!("there is no failover primary {id:?}"));
        };
        let mut plug = primary.state();
        if *plug != Plug::Unplugging {
            return refuse(format!(
                "the guest was not asked to let go of {id}, which is {plug:?}"
            ));
        }
        *plug = Plug::Unplugged;
        Ok(())
    }

    /// A guest has arrived and runs here: it gets the primaries of this side.
    pub fn guest_arrived(&self) {
        for primary in &self.0 {
            *primary.state() = Plug::Plugged;
        }
    }

    /// Where each primary is.
    pub fn infos(&self) -> Vec<(String, Plug)> {
        let info = |primary: &StandIn| (primary.id.clone(), *primary.state());
        self.0.iter().map(info).collect()
    }
}

impl StandIn {
    fn state(&self) -> MutexGuard<'_, Plug> {
        self.plug.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Primary for StandIn {
    fn id(&self) -> &str {
        &self.id
    }

    /// There is no driver that could lack it.
    fn standby_is_negotiated(&self) -> bool {
        true
    }

    fn is_plugged(&self) -> bool {
        *self.state() != Plug::Unplugged
    }

    fn request_unplug(&mut self) -> Result<(), DeviceError> {
        *self.state() = Plug::Unplugging;
        Ok(())
    }

    fn is_gone(&mut self) -> Result<bool, DeviceError> {
        Ok(*self.state() == Plug::Unplugged)
    }

    fn plug(&mut self) -> Result<(), DeviceError> {
        *self.state() = Plug::Plugged;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use vmferry_devices::Notifiers;
    use vmferry_devices::notifier::{Mode, Priority, Setup};
    use vmferry_transport::units::MigrationId;

    use super::*;

    fn ids(ids: &[&str]) -> Vec<String> {
        ids.iter().map(|id| (*id).to_owned()).collect()
    }

    #[test]
    fn an_unplug_is_confirmed_from_outside_and_only_when_asked_for() {
        let primaries = Primaries::new(&ids(&["net0", "net1"]), false).unwrap();
        let (sender, asked) = mpsc::channel();
        let notifiers = Notifiers::new();
        for notifier in primaries.notifiers(move |id| sender.send(id.to_owned()).unwrap()) {
            notifiers.register(Mode::Normal, Priority::GUEST, Box::new(notifier));
        }
        assert!(primaries.confirm_unplug("net0").is_err());
        let setup = Setup {
            mode: Mode::Normal,
            migration: MigrationId([1; 16]),
        };
        let told = notifiers.setup(&setup).unwrap();
        assert_eq!(asked.try_iter().collect::<Vec<_>>(), ["net0", "net1"]);
        primaries.confirm_unplug("net1").unwrap();
        assert!(primaries.confirm_unplug("net1").is_err());
        assert!(primaries.confirm_unplug("net2").is_err());
        let waiting = notifiers.pending(&told).unwrap().unwrap();
        assert!(waiting.contains("net0"), "{waiting}");
        primaries.confirm_unplug("net0").unwrap();
        assert_eq!(notifiers.pending(&told).unwrap(), None);
        notifiers.failed(told);
        assert!(
            primaries
                .infos()
                .iter()
                .all(|(_, plug)| *plug == Plug::Plugged)
        );
    }

    #[test]
    fn an_incoming_machine_has_its_primaries_for_the_guest_that_arrives() {
        let primaries = Primaries::new(&ids(&["net0"]), true).unwrap();
        assert_eq!(primaries.infos(), [("net0".to_owned(), Plug::Unplugged)]);
        primaries.guest_arrived();
        assert_eq!(primaries.infos(), [("net0".to_owned(), Plug::Plugged)]);
    }

    #[test]
    fn ids_that_are_no_ids_are_refused() {
        for wrong in [&["a", "a"][..], &[""], &["a b"], &["a"; PRIMARIES_MAX + 1]] {
            assert!(Primaries::new(&ids(wrong), false).is_err(), "{wrong:?}");
        }
    }
}
