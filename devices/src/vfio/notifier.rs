//! What a migration means for VFIO devices, told by the registry of notifiers.
//!
//! | Event | What happens |
//! | --- | --- |
//! | SETUP | vetoes if a device cannot migrate |
//! | DONE | the devices of a guest that left are stopped for good, their streams closed |
//! | FAILED | all devices go back to where they were, before any vCPU runs; one that cannot is reset |
//! | INCOMING_FAILED | devices that were being loaded are reset |
//!
//! The steps between are for whoever leads the migration: see [`VfioSet`].

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmferry_transport::units::MigrationId;

use super::set::{Blocker, VfioSet};
use crate::DeviceError;
use crate::notifier::{Notifier, Setup};

/// Looks after the VFIO devices of a VM. Registered for mode `normal`, at `Priority::DEVICE`.
#[derive(Debug)]
pub struct VfioNotifier {
    set: Arc<Mutex<VfioSet>>,
}

impl VfioNotifier {
    /// For the devices in `set`, which the leader of migrations shares.
    pub fn new(set: Arc<Mutex<VfioSet>>) -> Self {
        Self { set }
    }

    /// A panic that left the devices half-way is what FAILED is for.
    fn lock(&self) -> MutexGuard<'_, VfioSet> {
        self.set.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Notifier for VfioNotifier {
    fn name(&self) -> &str {
        "vfio"
    }

    fn setup(&mut self, _: &Setup) -> Result<(), DeviceError> {
        match self.lock().blockers().into_iter().next() {
            Some(Blocker { device, reason }) => Err(DeviceError::Vetoed { device, reason }),
            None => Ok(()),
        }
    }

    fn done(&mut self) {
        for error in self.lock().end() {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, "a device of a guest that left stays half-way");
        }
    }

    fn failed(&mut self) {
        for stands in self.lock().roll_back() {
            stands.log("a migration that failed");
        }
    }

    fn incoming_failed(&mut self, _: MigrationId) {
        for stands in self.lock().abandon_load() {
            stands.log("a migration to here that failed");
        }
    }
}
