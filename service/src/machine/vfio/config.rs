//! What `--vfio` says.

use std::path::PathBuf;
use std::str::FromStr;

use super::window::DEVICES_MAX;
use crate::machine::MachineError;
use crate::machine::disk::{is_id, split_path};

/// A VFIO device as the operator describes it: `PATH[,id=NAME]`, with PATH its folder in sysfs. A comma in the path is written twice.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct VfioConfig {
    /// Its folder in sysfs, such as `/sys/bus/pci/devices/0000:01:00.0` or `/sys/bus/mdev/devices/UUID`.
    pub path: PathBuf,
    /// Name; must be unique within the VM, and the same on both sides of a migration. Empty until [`name_vfio`] has given it one.
    pub id: String,
    /// The workload talks to it as to a 16550 that echoes, and checks what comes back. For tests with the kernel's sample device.
    pub echo: bool,
}

impl VfioConfig {
    /// What migrations call it, such as `vfio/0`.
    pub fn device_name(&self) -> String {
        format!("vfio/{}", self.id)
    }

    pub(super) fn wrong(&self, reason: &str) -> MachineError {
        MachineError::Config(format!("VFIO device {}: {reason}", self.path.display()))
    }
}

impl FromStr for VfioConfig {
    type Err = MachineError;

    fn from_str(text: &str) -> Result<Self, MachineError> {
        let wrong = |reason: &str| MachineError::Config(format!("VFIO device {text:?}: {reason}"));
        let (path, options) = split_path(text);
        if path.is_empty() {
            return Err(wrong(
                "name its folder in sysfs first, such as /sys/bus/mdev/devices/UUID",
            ));
        }
        let (mut id, mut echo) = (String::new(), false);
        for option in options.into_iter().flatten() {
            match option.split_once('=') {
                Some(("id", name)) if is_id(name) => name.clone_into(&mut id),
                Some(("id", _)) => {
                    return Err(wrong("an id has letters, digits, '.', '_' and '-'"));
                }
                None if option == "x-echo" => echo = true,
                _ => {
                    return Err(wrong(
                        "after the path only id=NAME may follow; write a comma in a path twice",
                    ));
                }
            }
        }
        Ok(Self {
            path: path.into(),
            id,
            echo,
        })
    }
}

/// Names the devices that have no name after their places, `0` and so on, and checks that no two have the same and that there are not
/// too many.
///
/// # Errors
/// [`MachineError::Config`] with what is there twice, or how many there may be.
pub fn name_vfio(devices: &mut [VfioConfig]) -> Result<(), MachineError> {
    if devices.len() > DEVICES_MAX {
        return Err(MachineError::Config(format!(
            "{} VFIO devices: a machine has at most {DEVICES_MAX}",
            devices.len()
        )));
    }
    for (number, device) in devices.iter_mut().enumerate() {
        if device.id.is_empty() {
            device.id = number.to_string();
        }
    }
    for (number, device) in devices.iter().enumerate() {
        let before = &devices[..number];
        if before.iter().any(|other| other.id == device.id) {
            return Err(device.wrong(&format!("another has the id {} already", device.id)));
        }
        if before.iter().any(|other| other.path == device.path) {
            return Err(device.wrong("it is there twice"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> VfioConfig {
        text.parse().unwrap()
    }

    #[test]
    fn a_vfio_device_is_described_by_its_folder_and_a_name() {
        let plain = parsed("/sys/bus/pci/devices/0000:01:00.0");
        assert_eq!(
            plain.path,
            PathBuf::from("/sys/bus/pci/devices/0000:01:00.0")
        );
        assert!(plain.id.is_empty() && !plain.echo);
        let full = parsed("/a,,b,id=net.0,x-echo");
        assert_eq!(full.path, PathBuf::from("/a,b"));
        assert_eq!(full.device_name(), "vfio/net.0");
        assert!(full.echo);
    }

    #[test]
    fn what_describes_no_vfio_device_is_refused_with_what_would() {
        for (text, part) in [
            ("", "folder in sysfs"),
            (",id=a", "folder in sysfs"),
            ("/a,id=", "letters"),
            ("/a,id=b c", "letters"),
            ("/a,ro", "id=NAME"),
            ("/a,", "id=NAME"),
        ] {
            let error = VfioConfig::from_str(text).unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn vfio_devices_are_named_after_their_places_and_never_alike() {
        let mut devices = [parsed("a"), parsed("b,id=net"), parsed("c")];
        name_vfio(&mut devices).unwrap();
        assert_eq!(devices.map(|device| device.id), ["0", "net", "2"]);
        for (twice, part) in [
            (["a", "b,id=0"], "id 0 already"),
            (["a", "a"], "there twice"),
        ] {
            let error = name_vfio(&mut twice.map(parsed)).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
        let mut many: Vec<_> = (0..=DEVICES_MAX).map(|n| parsed(&n.to_string())).collect();
        let error = name_vfio(&mut many).unwrap_err().to_string();
        assert!(error.contains("at most"), "{error}");
    }
}
