//! Back ends of virtio devices outside of the VMM: in the kernel (vhost: net, vsock, vDPA), and in other processes (vhost-user).
//!
//! - [`VhostDevice`] owns a back end in the kernel: it sets it up, starts and stops it, and moves its position in the rings.
//! - [`user`] is the same for back ends in other processes.
//! - [`VhostLog`] is the dirty log of what back ends write.
//! - [`VhostNotifier`] gives a back end away for an in-place upgrade, and takes it back when that fails.
//!
//! # In a VMM
//!
//! ```no_run
//! use std::fs::File;
//! use std::sync::{Arc, Mutex};
//!
//! use vmferry_devices::notifier::{Modes, Notifiers, Priority};
//! use vmferry_devices::vhost::{Queue, Ring, VhostDevice, VhostMemory, VhostNotifier, dirty_logs};
//! use vmferry_devices::{Device, DeviceError};
//! use vmferry_transport::memory::{DirtyLog, DirtyLogError, GuestRam};
//! use vmferry_transport::wire::Section;
//!
//! type Shared = Arc<Mutex<VhostDevice>>;
//!
//! /// When the VM is built. The queues have the events that KVM knows as ioeventfd and irqfd.
//! fn build(
//!     vhost: File,
//!     tap: File,
//!     memory: VhostMemory,
//!     queues: [Queue; 2],
//!     notifiers: &Notifiers,
//! ) -> Result<Shared, DeviceError> {
//!     let device = Arc::new(Mutex::new(VhostDevice::net("net/0", vhost, tap, memory, queues)?));
//!     let notifier = Box::new(VhostNotifier::new(Arc::clone(&device)));
//!     notifiers.register(Modes::ALL, Priority::DEVICE, notifier);
//!     Ok(device)
//! }
//!
//! /// When the guest's driver is ready (DRIVER_OK).
//! fn driver_ready(device: &mut VhostDevice, features: u64, rings: [Ring; 2]) -> Result<(), DeviceError> {
//!     device.set_features(features)?;
//!     device.set_rings(&rings.map(Some))?;
//!     device.start()
//! }
//!
//! /// United with the logs of KVM and of the VMM itself.
//! fn logs(
//!     device: Shared,
//!     memory: VhostMemory,
//!     ram: &GuestRam,
//! ) -> Result<Vec<Box<dyn DirtyLog>>, DirtyLogError> {
//!     dirty_logs(&[device], memory, ram)
//! }
//!
//! /// Source: when the vCPUs have stopped, before the last fetch. `start` is the way back.
//! fn last(device: &mut VhostDevice) -> Result<Section, DeviceError> {
//!     device.stop()?;
//!     device.save()
//! }
//!
//! /// Target: `load` before READY, `run` after COMMIT.
//! fn load(device: &mut VhostDevice, section: &Section) -> Result<(), DeviceError> {
//!     device.restore(section)
//! }
//! fn run(device: &mut VhostDevice) -> Result<(), DeviceError> {
//!     device.start()
//! }
//! # fn main() {}
//! ```
//!
//! # In place
//!
//! Another process on the same host goes on with the same descriptors ([`VhostDevice::descriptor`], [`VhostDevice::tap`]). Ask
//! [`blocker_in_place`](VhostDevice::blocker_in_place) before the guest is stopped for it: kernels up to 6.12 at least cannot give a
//! vhost-vsock device away. The notifier's SETUP does give it away. The new process registers [`VhostNotifier::waiting`] when it builds its
//! machine, makes the device when the descriptors come, calls [`own`](VhostDevice::own) before it says READY, so that what speaks against it
//! is known before the commit, and [`start`](VhostDevice::start) after COMMIT.
//!
//! # What is not there
//!
//! VHOST_SET_LOG_FD is not used: it would signal every write to a log that is only looked at once per round. Packed rings are not
//! offered to drivers. vDPA devices keep no log, so they block a migration of a running guest; one that is stopped can be saved.

mod ioctl;
mod kernel;
mod log;
mod memory;
mod notifier;
mod ring;
pub mod user;

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Arc, Mutex, PoisonError};

use vmferry_transport::memory::{DirtyLog, DirtyLogError, GuestRam};

pub use kernel::{F_LOG_ALL, VhostDevice};
pub use log::{LogPages, Logs, VhostLog};
pub use memory::{Memory, Region, VhostMemory};
pub use notifier::VhostNotifier;
pub use ring::{Queue, RING_SIZE_MAX, Ring, RingV1, VhostV1};

use crate::DeviceError;
use crate::soft::PagemapLog;

/// Bytes of the header before each packet of a device of today (VIRTIO_F_VERSION_1).
pub const NET_HEADER_BYTES: u8 = 12;

/// Whether the back end of `device`, which offers `offered`, has all of `features`: what its driver has accepted, or was offered before.
/// It may have more.
///
/// # Errors
/// [`DeviceError::BadState`] with those that are missing.
pub fn check_features(device: &str, features: u64, offered: u64) -> Result<(), DeviceError> {
    match features & !offered {
        0 => Ok(()),
        missing => Err(DeviceError::BadState {
            device: device.to_owned(),
            reason: format!(
                "the guest knows features {missing:#x}, which the back end here does not offer"
            ),
        }),
    }
}

/// Attaches to the tap called `name`, which exists or is made, with headers of [`NET_HEADER_BYTES`] and without offloads. It goes with the
/// file, unless it was made to stay.
///
/// # Errors
/// The kernel's answer; EBUSY if another process has it.
pub fn open_tap(name: &str) -> io::Result<File> {
    let tun = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")?;
    ioctl::attach_tap(&tun, name, NET_HEADER_BYTES)?;
    Ok(tun)
}

/// The dirty logs that together see what `devices` write to `memory`, which is `ram`: their own, and where that has not all, that of
/// this process's page tables, through which the kernel writes too. The latter costs each written page a fault per round.
///
/// # Errors
/// When the host lacks an interface.
pub fn dirty_logs(
    devices: &[Arc<Mutex<VhostDevice>>],
    memory: VhostMemory,
    ram: &GuestRam,
) -> Result<Vec<Box<dyn DirtyLog>>, DirtyLogError> {
    let all = devices.iter().all(|device| {
        let device = device.lock().unwrap_or_else(PoisonError::into_inner);
        device.logs_all_writes()
    });
    let shared = devices.iter().map(|device| Arc::clone(device) as _);
    let mut logs: Vec<Box<dyn DirtyLog>> = vec![Box::new(VhostLog::new(memory, shared.collect()))];
    if !all {
        logs.push(Box::new(PagemapLog::new(ram.clone())?));
    }
    Ok(logs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_back_end_may_offer_more_than_the_guest_knows_and_is_refused_with_what_it_lacks() {
        check_features("net/0", 0b0110, 0b0110).unwrap();
        check_features("net/0", 0b0110, 0b1111).unwrap();
        let error = check_features("net/0", 0b0110, 0b1011).unwrap_err();
        let error = error.to_string();
        assert!(error.contains("net/0") && error.contains("0x4"), "{error}");
    }
}
