//! Descriptors of devices that are used on by the process which takes the guest over in place: connections to back ends, taps, devices
//! of the kernel. A device may have several, told apart by their roles.
//!
//! ```text
//! source  Machine::heirlooms (before the guest is stopped) --> sent when it is stopped and every device has let go
//! target  Given::devices (what will come, before the machine is built) ... Machine::take_over (what has come, before state is loaded)
//! ```
//!
//! VFIO devices and their groups leave earlier ([`stage`]): the new process builds its machine around them, while the guest uses them in the
//! old one.

use std::os::fd::OwnedFd;

use vmferry_cpr::manifest::{FdEntry, FdKind, Stage};
use vmferry_devices::DeviceError;

/// A descriptor of a device: a copy, which leaves with the guest, or has come with it.
#[derive(Debug)]
pub struct DeviceFd {
    /// Name of the device, as in sections.
    pub device: String,
    /// Which one of the device's.
    pub role: String,
    /// What it is.
    pub kind: FdKind,
    /// What the device of the other process must know of it before it comes.
    pub value: u64,
    /// The descriptor.
    pub fd: OwnedFd,
}

/// When such a descriptor leaves.
pub fn stage(kind: FdKind) -> Stage {
    match kind {
        FdKind::VfioGroup | FdKind::VfioDevice => Stage::Prepare,
        _ => Stage::HandOver,
    }
}

/// What is said of the descriptor of `device` in this role, among those that will come.
pub fn promised<'a>(entries: &'a [FdEntry], device: &str, role: &str) -> Option<&'a FdEntry> {
    entries
        .iter()
        .find(|entry| entry.name == device && entry.role == role)
}

/// Takes the descriptor of `device` in this role out of those that have come.
///
/// # Errors
/// [`DeviceError::BadState`] if it has not come, or is of another kind.
pub fn claim(
    fds: &mut Vec<DeviceFd>,
    device: &str,
    role: &str,
    kind: FdKind,
) -> Result<OwnedFd, DeviceError> {
    let is_it = |fd: &DeviceFd| fd.device == device && fd.role == role && fd.kind == kind;
    match fds.iter().position(is_it) {
        Some(at) => Ok(fds.swap_remove(at).fd),
        None => Err(DeviceError::BadState {
            device: device.to_owned(),
            reason: format!("its {} ({role}) has not come", kind.name()),
        }),
    }
}

/// Says so if one of those that have come is nobody's.
///
/// # Errors
/// [`DeviceError::Unknown`], naming its device.
pub(super) fn all_claimed(fds: &[DeviceFd]) -> Result<(), DeviceError> {
    match fds.first() {
        Some(left) => Err(DeviceError::Unknown {
            device: left.device.clone(),
        }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fd(device: &str, role: &str, kind: FdKind) -> DeviceFd {
        DeviceFd {
            device: device.to_owned(),
            role: role.to_owned(),
            kind,
            value: 0,
            fd: rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap(),
        }
    }

    #[test]
    fn each_descriptor_is_claimed_once_by_device_role_and_kind() {
        let mut fds = vec![
            fd("net/0", "tap", FdKind::Tap),
            fd("net/0", "vhost", FdKind::Vhost),
        ];
        assert!(claim(&mut fds, "net/1", "tap", FdKind::Tap).is_err());
        let wrong = claim(&mut fds, "net/0", "tap", FdKind::Vhost).unwrap_err();
        assert!(wrong.to_string().contains("net/0"), "{wrong}");
        claim(&mut fds, "net/0", "tap", FdKind::Tap).unwrap();
        assert!(claim(&mut fds, "net/0", "tap", FdKind::Tap).is_err());
        let left = all_claimed(&fds).unwrap_err();
        assert!(left.to_string().contains("net/0"), "{left}");
        claim(&mut fds, "net/0", "vhost", FdKind::Vhost).unwrap();
        all_claimed(&fds).unwrap();
    }
}
