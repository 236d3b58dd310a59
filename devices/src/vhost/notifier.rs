//! What an in-place upgrade means for a back end in the kernel, told by the registry of notifiers.
//!
//! A back end belongs to one process: who asks to own it while somebody else does is told EBUSY. So before its descriptor goes to the
//! new process the old one must have released it.
//!
//! | Event | Mode `normal` | Modes `cpr-transfer` and `cpr-exec` |
//! | --- | --- | --- |
//! | SETUP | vetoes if the back end keeps no log | the back end, which the VMM has stopped, is released; vetoes if it still works, or the kernel will not |
//! | DONE | nothing | nothing: it is somebody else's |
//! | FAILED | nothing | this process owns it again, were it by a new descriptor; to start it is left to the resume |
//! | INCOMING_FAILED | nothing | stopped and released, before the old process hears of the failure and wants it back |

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use vmferry_transport::units::MigrationId;

use super::kernel::VhostDevice;
use crate::notifier::{Mode, Notifier, Setup};
use crate::{Device, DeviceError};

/// Looks after who owns a back end. Registered for all modes, at `Priority::DEVICE`.
#[derive(Debug)]
pub struct VhostNotifier {
    name: String,
    device: Arc<OnceLock<Arc<Mutex<VhostDevice>>>>,
    released: bool,
}

impl VhostNotifier {
    /// For `device`.
    pub fn new(device: Arc<Mutex<VhostDevice>>) -> Self {
        let name = lock(&device).name().to_owned();
        Self::waiting(name, Arc::new(OnceLock::from(device)))
    }

    /// For a device called `name` whose descriptors another process will hand over; it hears of nothing before.
    pub fn waiting(
        name: impl Into<String>,
        device: Arc<OnceLock<Arc<Mutex<VhostDevice>>>>,
    ) -> Self {
        Self {
            name: name.into(),
            device,
            released: false,
        }
    }
}

/// A panic elsewhere that left it half-way is what FAILED is for.
fn lock(device: &Mutex<VhostDevice>) -> MutexGuard<'_, VhostDevice> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Notifier for VhostNotifier {
    fn name(&self) -> &str {
        &self.name
    }

    fn setup(&mut self, setup: &Setup) -> Result<(), DeviceError> {
        let Some(device) = self.device.get() else {
            return Ok(());
        };
        let mut device = lock(device);
        let vetoed = |reason| DeviceError::Vetoed {
            device: self.name.clone(),
            reason,
        };
        match setup.mode {
            Mode::Normal => device
                .blocker()
                .map_or(Ok(()), |reason| Err(vetoed(reason))),
            Mode::CprReboot => Ok(()),
            Mode::CprTransfer | Mode::CprExec => {
                if let Some(reason) = device.blocker_in_place() {
                    return Err(vetoed(reason));
                }
                device.release()?;
                self.released = true;
                Ok(())
            }
        }
    }

    fn done(&mut self) {
        self.released = false;
    }

    fn failed(&mut self) {
        if std::mem::take(&mut self.released)
            && let Some(device) = self.device.get()
            && let Err(error) = lock(device).take_back()
        {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, "a back end is not ours again; its start will say so");
        }
    }

    fn incoming_failed(&mut self, _: MigrationId) {
        let Some(device) = self.device.get() else {
            return;
        };
        let mut device = lock(device);
        let given_back = device.stop().and_then(|()| device.release());
        if let Err(error) = given_back {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, "a back end could not be given back");
        }
    }
}
