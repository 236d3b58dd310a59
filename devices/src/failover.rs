//! virtio-net failover: a passed-through network card that cannot move, and a virtio-net device that stands by for it.
//!
//! ```text
//! SETUP    the guest is asked to let go of the primary; event UNPLUG_PRIMARY     status wait-unplug
//! waiting  until the guest has let go; the time is limited by the caller
//! DONE     the primary is the past; the target plugs one of its own
//! FAILED   the primary is plugged again, or the request is taken back
//! ```
//!
//! The guest's traffic goes through the standby device meanwhile. A guest that has not negotiated the feature would lose its network,
//! and so SETUP vetoes while its primary is plugged.

use crate::DeviceError;
use crate::notifier::{Notifier, Setup};

/// The primary device of a failover pair.
pub trait Primary: Send {
    /// The device's id, as operators know it; must not change.
    fn id(&self) -> &str;

    /// Whether the guest has negotiated VIRTIO_NET_F_STANDBY on the virtio-net device.
    fn standby_is_negotiated(&self) -> bool;

    /// Whether the guest has the device. One that waits for the feature to be negotiated is hidden, not plugged.
    fn is_plugged(&self) -> bool;

    /// Asks the guest to let go of the device. Returns at once.
    ///
    /// # Errors
    /// When the guest cannot be asked. Nothing has changed.
    fn request_unplug(&mut self) -> Result<(), DeviceError>;

    /// Whether the guest has let go since [`request_unplug`](Self::request_unplug).
    ///
    /// # Errors
    /// When it refuses, or will never answer.
    fn is_gone(&mut self) -> Result<bool, DeviceError>;

    /// Gives the device back to a guest that was asked to let go, whether or not it has.
    ///
    /// # Errors
    /// When the device cannot be plugged. The guest goes on with the standby device.
    fn plug(&mut self) -> Result<(), DeviceError>;
}

/// Called with the id of a primary that the guest was just asked to let go of: the event UNPLUG_PRIMARY.
pub type UnplugSink = Box<dyn Fn(&str) + Send>;

/// Keeps a primary out of migrations. Registered for mode `normal`, at `Priority::GUEST`.
pub struct FailoverNotifier {
    name: String,
    primary: Box<dyn Primary>,
    unplugging: UnplugSink,
    /// The guest was asked in this attempt.
    asked: bool,
}

impl FailoverNotifier {
    /// For `primary`; `unplugging` must not block.
    pub fn new(primary: Box<dyn Primary>, unplugging: UnplugSink) -> Self {
        Self {
            name: primary.id().to_owned(),
            primary,
            unplugging,
            asked: false,
        }
    }
}

impl Notifier for FailoverNotifier {
    fn name(&self) -> &str {
        &self.name
    }

    fn setup(&mut self, _: &Setup) -> Result<(), DeviceError> {
        if !self.primary.is_plugged() {
            return Ok(());
        }
        if !self.primary.standby_is_negotiated() {
            return Err(DeviceError::Vetoed {
                device: self.name.clone(),
                reason: "it cannot move, and the guest has not negotiated the standby feature \
                         of its virtio-net device; unplug it first"
                    .to_owned(),
            });
        }
        self.primary.request_unplug()?;
        self.asked = true;
        (self.unplugging)(&self.name);
        Ok(())
    }

    fn pending(&mut self) -> Result<Option<String>, DeviceError> {
        if !self.asked || self.primary.is_gone()? {
            return Ok(None);
        }
        Ok(Some(self.name.clone()))
    }

    fn done(&mut self) {
        self.asked = false;
    }

    fn failed(&mut self) {
        if !std::mem::take(&mut self.asked) {
            return;
        }
        if let Err(error) = self.primary.plug() {
            tracing::error!(
                device = self.name,
                error = &error as &dyn std::error::Error,
                "the primary could not be plugged again; the guest goes on with its standby device"
            );
        }
    }
}

impl std::fmt::Debug for FailoverNotifier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FailoverNotifier")
            .field("name", &self.name)
            .field("asked", &self.asked)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use vmferry_transport::units::MigrationId;

    use super::*;
    use crate::notifier::{Mode, Notifiers, Priority, Told, Vetoed};

    /// A network card without a network, and the guest that has it.
    #[derive(Clone, Debug, Default)]
    struct Card(Arc<Mutex<State>>);

    #[derive(Debug, Default)]
    struct State {
        standby: bool,
        plugged: bool,
        asked: bool,
        refuses: bool,
    }

    impl Card {
        fn change(&self, change: impl FnOnce(&mut State)) {
            change(&mut self.0.lock().unwrap());
        }

        fn is(&self, what: impl FnOnce(&State) -> bool) -> bool {
            what(&self.0.lock().unwrap())
        }
    }

    impl Primary for Card {
        fn id(&self) -> &str {
            "net0"
        }
        fn standby_is_negotiated(&self) -> bool {
            self.is(|state| state.standby)
        }
        fn is_plugged(&self) -> bool {
            self.is(|state| state.plugged)
        }
        fn request_unplug(&mut self) -> Result<(), DeviceError> {
            self.change(|state| state.asked = true);
            Ok(())
        }
        fn is_gone(&mut self) -> Result<bool, DeviceError> {
            if self.is(|state| state.refuses) {
                return Err(DeviceError::Stuck {
                    device: "net0".to_owned(),
                    reason: "the guest refuses".to_owned(),
                });
            }
            Ok(self.is(|state| !state.plugged))
        }
        fn plug(&mut self) -> Result<(), DeviceError> {
            self.change(|state| (state.plugged, state.asked) = (true, false));
            Ok(())
        }
    }

    /// A registry with a card, which is plugged, and the events.
    fn vm(standby: bool) -> (Notifiers, Card, Arc<Mutex<Vec<String>>>) {
        let card = Card::default();
        card.change(|state| (state.plugged, state.standby) = (true, standby));
        let events: Arc<Mutex<Vec<String>>> = Arc::default();
        let sink = Arc::clone(&events);
        let notifier = FailoverNotifier::new(
            Box::new(card.clone()),
            Box::new(move |id| sink.lock().unwrap().push(id.to_owned())),
        );
        let notifiers = Notifiers::new();
        notifiers.register(Mode::Normal, Priority::GUEST, Box::new(notifier));
        (notifiers, card, events)
    }

    fn setup(notifiers: &Notifiers) -> Result<Told, Vetoed> {
        notifiers.setup(&Setup {
            mode: Mode::Normal,
            migration: MigrationId([3; 16]),
        })
    }

    #[test]
    fn the_migration_waits_until_the_guest_has_let_go_of_its_primary() {
        let (notifiers, card, events) = vm(true);
        let told = setup(&notifiers).unwrap();
        assert!(card.is(|state| state.asked));
        assert_eq!(*events.lock().unwrap(), ["net0"]);
        let waiting = notifiers.pending(&told).unwrap().unwrap();
        assert!(waiting.contains("net0"), "{waiting}");
        card.change(|state| state.plugged = false);
        assert_eq!(notifiers.pending(&told).unwrap(), None);
        notifiers.done(told);
        assert!(!card.is_plugged(), "the guest has moved away from it");

        // Without a primary there is nothing to ask for.
        let told = setup(&notifiers).unwrap();
        assert_eq!(notifiers.pending(&told).unwrap(), None);
        assert_eq!(events.lock().unwrap().len(), 1);
        notifiers.failed(told);
        assert!(!card.is_plugged(), "this attempt did not unplug it");
    }

    #[test]
    fn a_failed_migration_gives_the_primary_back_gone_or_not() {
        for gone in [false, true] {
            let (notifiers, card, events) = vm(true);
            for attempt in 1..=3 {
                let told = setup(&notifiers).unwrap();
                card.change(|state| state.plugged = !gone);
                assert_eq!(notifiers.pending(&told).unwrap().is_none(), gone);
                notifiers.failed(told);
                assert!(card.is(|state| state.plugged && !state.asked));
                assert_eq!(events.lock().unwrap().len(), attempt);
            }
        }
    }

    #[test]
    fn a_guest_without_the_standby_feature_keeps_its_primary_and_stays() {
        let (notifiers, card, events) = vm(false);
        let Vetoed { error, told } = setup(&notifiers).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("net0") && text.contains("standby feature"),
            "{text}"
        );
        notifiers.failed(told);
        assert!(card.is(|state| state.plugged && !state.asked));
        assert!(events.lock().unwrap().is_empty());
    }

    #[test]
    fn a_guest_that_refuses_ends_the_waiting() {
        let (notifiers, card, _) = vm(true);
        let told = setup(&notifiers).unwrap();
        card.change(|state| state.refuses = true);
        let error = notifiers.pending(&told).unwrap_err().to_string();
        assert!(error.contains("the guest refuses"), "{error}");
        notifiers.failed(told);
        assert!(card.is_plugged());
    }
}
