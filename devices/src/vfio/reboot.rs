//! VFIO devices and mode `cpr-reboot`: the host may restart while a guest is saved in this way, and a device then knows nothing of what it
//! did. Only a guest that has suspended itself expects that: its drivers set their devices up anew when it wakes.

use crate::DeviceError;
use crate::notifier::{Notifier, Setup};

/// Why a guest with VFIO devices cannot be saved in mode `cpr-reboot`.
pub const NOT_SUSPENDED: &str = "a VFIO device would lose its state in mode cpr-reboot, unless the guest is suspended first (S3), so that its driver sets the \
                                 device up anew";

/// Lets mode `cpr-reboot` begin only with a guest that is suspended, if the VM has VFIO devices. Registered for that mode, at
/// `Priority::CHECK`.
#[derive(Debug)]
pub struct VfioReboot<F> {
    device: Option<String>,
    is_suspended: F,
}

impl<F: FnMut() -> bool + Send> VfioReboot<F> {
    /// For a VM with these VFIO devices, by name. `is_suspended` is asked at SETUP, when the guest is stopped.
    pub fn new(devices: impl IntoIterator<Item = String>, is_suspended: F) -> Self {
        Self {
            device: devices.into_iter().next(),
            is_suspended,
        }
    }
}

impl<F: FnMut() -> bool + Send> Notifier for VfioReboot<F> {
    fn name(&self) -> &str {
        "vfio-reboot"
    }

    fn setup(&mut self, _: &Setup) -> Result<(), DeviceError> {
        match &self.device {
            Some(device) if !(self.is_suspended)() => Err(DeviceError::Vetoed {
                device: device.clone(),
                reason: NOT_SUSPENDED.to_owned(),
            }),
            _ => Ok(()),
        }
    }

    fn done(&mut self) {}

    fn failed(&mut self) {}
}

#[cfg(test)]
mod tests {
    use vmferry_transport::units::MigrationId;

    use super::*;
    use crate::notifier::{Mode, Notifiers, Priority};

    #[test]
    fn a_device_lets_only_a_suspended_guest_be_saved_for_a_restart_of_the_host() {
        let setup = |devices: &[&str], suspended: bool| {
            let devices: Vec<_> = devices.iter().map(ToString::to_string).collect();
            let notifiers = Notifiers::new();
            let notifier = VfioReboot::new(devices, move || suspended);
            notifiers.register(Mode::CprReboot, Priority::CHECK, Box::new(notifier));
            let (mode, migration) = (Mode::CprReboot, MigrationId([1; 16]));
            let vetoed = match notifiers.setup(&Setup { mode, migration }) {
                Ok(told) => {
                    notifiers.failed(told);
                    return None;
                }
                Err(vetoed) => vetoed,
            };
            notifiers.failed(vetoed.told);
            Some(vetoed.error.to_string())
        };
        let error = setup(&["vfio/0"], false).unwrap();
        assert!(
            error.contains("vfio/0") && error.contains("suspended"),
            "{error}"
        );
        assert_eq!(setup(&["vfio/0"], true), None);
        assert_eq!(setup(&[], false), None);
    }
}
