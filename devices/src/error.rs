//! Why a device could not be saved or restored, or stands in the way of a migration. Every variant names the device.

use std::any::Any;
use std::io;

/// Why a device could not be saved or restored, or stands in the way of a migration.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// The saved state is damaged, or not of this device. The stream or the source is at fault; a retry meets the same state.
    #[error("device {device}: saved state refused: {reason}")]
    BadState {
        /// Name of the device.
        device: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The saved state has a schema or version that this build does not know. Upgrade the target.
    #[error("device {device}: state is {schema} version {version}, this side loads {supported}")]
    Version {
        /// Name of the device.
        device: String,
        /// Schema of the state.
        schema: String,
        /// Version of the state.
        version: u32,
        /// What would have been accepted.
        supported: String,
    },
    /// The stream has state for a device that this VM does not have. The two VMs are configured differently.
    #[error("device {device}: this VM has no such device")]
    Unknown {
        /// Name in the stream.
        device: String,
    },
    /// The stream has no state for a device of this VM. The two VMs are configured differently.
    #[error("device {device}: the stream holds no state for it")]
    Missing {
        /// Name of the device.
        device: String,
    },
    /// The kernel refused. The host is at fault.
    #[error("device {device}: {op} failed")]
    Kernel {
        /// Name of the device.
        device: String,
        /// The call.
        op: String,
        /// Its error.
        #[source]
        source: io::Error,
    },
    /// The device objects to a migration now. It says what would have to change.
    #[error("device {device} vetoes the migration: {reason}")]
    Vetoed {
        /// Name of the device.
        device: String,
        /// Why.
        reason: String,
    },
    /// What the migration waited for will not happen.
    #[error("device {device} cannot go on: {reason}")]
    Stuck {
        /// Name of the device.
        device: String,
        /// Why.
        reason: String,
    },
    /// The device's code panicked. It is at fault; the log has the place.
    #[error("device {device} is broken: panic during {during}: {text}")]
    Panicked {
        /// Name of the device.
        device: String,
        /// What it was told or asked.
        during: String,
        /// What it said.
        text: String,
    },
}

impl DeviceError {
    /// Of `panic`, caught when the device called `device` was told or asked `during`.
    pub fn panicked(device: &str, during: &str, panic: &(dyn Any + Send)) -> Self {
        let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
        Self::Panicked {
            device: device.to_owned(),
            during: during.to_owned(),
            text: text.unwrap_or_else(|| "no text".to_owned()),
        }
    }
}
