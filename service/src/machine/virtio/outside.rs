//! What `--blk` and `--net` say: devices with something outside of this process, a back end or a tap.

use std::io;
use std::path::PathBuf;
use std::str::FromStr;

use vmferry_cpr::manifest::{FdEntry, FdKind};
use vmferry_devices::Before;

use super::backend::Backend;
use super::blk::blk_name;
use super::net::TAP;
use super::tap_net::TapNet;
use super::vhost_net::{self, VhostNet, open_vhost};
use super::vhost_user::{self, VhostUserBlk};
use crate::machine::MachineError;
use crate::machine::disk::{is_id, split_path};
use crate::machine::heirloom::promised;
use crate::machine::ram::MachineRam;

/// Devices with a back end or a tap outside, all with names of their own.
#[derive(Clone, Debug, Default)]
pub struct OutsideConfig {
    /// Disks.
    pub blks: Vec<BlkConfig>,
    /// Network interfaces.
    pub nets: Vec<NetConfig>,
}

/// A disk as the operator describes it: `vhost-user:PATH[,id=NAME]`. A comma in the path is written twice.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct BlkConfig {
    /// Socket that its back end listens at.
    pub socket: PathBuf,
    /// Name; unique within the VM, and the same on both sides of a migration. Empty until it is given one.
    pub id: String,
}

/// A network interface as the operator describes it: `tap=NAME[,vhost=on|off][,mac=..][,id=NAME]`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct NetConfig {
    /// The tap, which only this process may have.
    pub tap: String,
    /// Whether the kernel moves its packets (vhost-net), or this process; `None` for the kernel where it can.
    pub vhost: Option<bool>,
    /// Its address; `None` for one made of the id. A guest that comes here keeps the one it has.
    pub mac: Option<[u8; 6]>,
    /// Name; unique within the VM, and the same on both sides of a migration. Empty until it is given one.
    pub id: String,
}

fn wrong(what: &str, text: &str, reason: &str) -> MachineError {
    MachineError::Config(format!("{what} {text:?}: {reason}"))
}

impl FromStr for BlkConfig {
    type Err = MachineError;

    fn from_str(text: &str) -> Result<Self, MachineError> {
        let wrong = |reason| wrong("disk", text, reason);
        let (socket, options) = split_path(text);
        let socket = socket
            .strip_prefix("vhost-user:")
            .filter(|path| !path.is_empty());
        let Some(socket) = socket else {
            return Err(wrong(
                "write vhost-user:PATH, with the socket of its back end; images are for --disk",
            ));
        };
        let mut id = String::new();
        for option in options.into_iter().flatten() {
            match option.split_once('=') {
                Some(("id", name)) if is_id(name) => name.clone_into(&mut id),
                Some(("id", _)) => {
                    return Err(wrong("an id has letters, digits, '.', '_' and '-'"));
                }
                _ => {
                    return Err(wrong(
                        "after the path only id=NAME may follow; write a comma in a path twice",
                    ));
                }
            }
        }
        Ok(Self {
            socket: socket.into(),
            id,
        })
    }
}

impl FromStr for NetConfig {
    type Err = MachineError;

    fn from_str(text: &str) -> Result<Self, MachineError> {
        let wrong = |reason| wrong("network interface", text, reason);
        let (mut tap, mut id) = (String::new(), String::new());
        let (mut vhost, mut mac) = (None, None);
        for option in text.split(',') {
            match option.split_once('=') {
                Some(("tap", name)) if !name.is_empty() => name.clone_into(&mut tap),
                Some(("mac", address)) => {
                    let address = parse_mac(address);
                    mac = Some(address.ok_or_else(|| {
                        wrong("a mac is like 52:54:00:12:34:56, and of one interface")
                    })?);
                }
                Some(("vhost", "on")) => vhost = Some(true),
                Some(("vhost", "off")) => vhost = Some(false),
                Some(("vhost", _)) => {
                    return Err(wrong(
                        "vhost=on has the kernel's vhost-net move packets, vhost=off this process",
                    ));
                }
                Some(("id", name)) if is_id(name) => name.clone_into(&mut id),
                Some(("id", _)) => {
                    return Err(wrong("an id has letters, digits, '.', '_' and '-'"));
                }
                _ => return Err(wrong("write tap=NAME[,vhost=on|off][,mac=MAC][,id=NAME]")),
            }
        }
        if tap.is_empty() {
            return Err(wrong("name its tap: tap=NAME"));
        }
        Ok(Self {
            tap,
            vhost,
            mac,
            id,
        })
    }
}

/// Six bytes in hexadecimal with colons, not of a group.
fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut bytes = text.split(':');
    for byte in &mut mac {
        let digits = bytes.next().filter(|digits| digits.len() == 2)?;
        *byte = u8::from_str_radix(digits, 16).ok()?;
    }
    (bytes.next().is_none() && mac[0] & 1 == 0).then_some(mac)
}

impl OutsideConfig {
    /// Names those that have no name after their places, and checks that no two of a kind have the same.
    ///
    /// # Errors
    /// The name that is there twice.
    pub fn name(&mut self) -> Result<(), MachineError> {
        name_all("disk", self.blks.iter_mut().map(|blk| &mut blk.id))?;
        name_all(
            "network interface",
            self.nets.iter_mut().map(|net| &mut net.id),
        )
    }

    /// Whether a device described here waits for this descriptor of another process.
    pub fn expects(&self, entry: &FdEntry) -> bool {
        let (mut blks, mut nets) = (self.blks.iter(), self.nets.iter());
        match (entry.kind, entry.role.as_str()) {
            (FdKind::VhostUser, vhost_user::ROLE) => {
                blks.any(|blk| blk.device_name() == entry.name)
            }
            (FdKind::Tap, TAP) | (FdKind::Vhost, vhost_net::VHOST) => {
                nets.any(|net| net.device_name() == entry.name)
            }
            _ => false,
        }
    }

    /// Connects to all back ends; the devices in the order of their windows. With `given`, which another process or program has promised,
    /// nothing is connected: they get the descriptors later.
    ///
    /// # Errors
    /// The back end that is not there, or not promised.
    pub fn backends(
        &self,
        ram: &MachineRam,
        given: Option<(Before, &[FdEntry])>,
    ) -> Result<Vec<Box<dyn Backend>>, MachineError> {
        let mut backends: Vec<Box<dyn Backend>> = Vec::new();
        for blk in &self.blks {
            let Some((_, given)) = given else {
                backends.push(Box::new(VhostUserBlk::connect(blk, ram)?));
                continue;
            };
            let entry = promised(given, &blk.device_name(), vhost_user::ROLE)
                .ok_or_else(|| wrong("disk", &blk.id, NOT_PROMISED))?;
            backends.push(Box::new(VhostUserBlk::waiting(blk, ram, entry.value)?));
        }
        for net in &self.nets {
            backends.push(match given {
                Some((before, given)) => net.waiting(ram, before, given)?,
                None => net.open(ram)?,
            });
        }
        Ok(backends)
    }
}

impl BlkConfig {
    /// What migrations call it, such as `virtio-blk/0`.
    pub fn device_name(&self) -> String {
        blk_name(&self.id)
    }
}

impl NetConfig {
    /// What migrations call it, such as `virtio-net/0`.
    pub fn device_name(&self) -> String {
        format!("virtio-net/{}", self.id)
    }

    /// The device, on a tap that this process opens.
    fn open(&self, ram: &MachineRam) -> Result<Box<dyn Backend>, MachineError> {
        if self.vhost == Some(false) {
            return Ok(Box::new(TapNet::open(self)?));
        }
        let (interface, tap) = (&self.id, &self.tap);
        match open_vhost() {
            Ok(vhost) => {
                tracing::info!(interface, tap, "the kernel moves its packets (vhost-net)");
                Ok(Box::new(VhostNet::open(self, ram, vhost)?))
            }
            Err(source) if self.vhost == Some(true) => {
                let op = format!(
                    "open /dev/vhost-net for {} (vhost=off does without)",
                    self.device_name()
                );
                Err(host(op, source))
            }
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::info!(
                    error,
                    interface,
                    tap,
                    "this process moves its packets: no vhost-net"
                );
                Ok(Box::new(TapNet::open(self)?))
            }
        }
    }

    /// The device, on the tap of another process, whose packets are moved on by whom they were moved.
    fn waiting(
        &self,
        ram: &MachineRam,
        before: Before,
        given: &[FdEntry],
    ) -> Result<Box<dyn Backend>, MachineError> {
        let wrong = |reason| Err(wrong("network interface", &self.id, reason));
        let name = self.device_name();
        let tap = promised(given, &name, TAP);
        let vhost = promised(given, &name, vhost_net::VHOST);
        match (tap, vhost, self.vhost) {
            (None, _, _) => wrong(NOT_PROMISED),
            (_, Some(_), Some(false)) => wrong(
                "vhost=off, and the kernel moves its packets at the process that is taken over from",
            ),
            (_, None, Some(true)) => {
                wrong("vhost=on, and the process that is taken over from moves its packets itself")
            }
            (_, Some(vhost), _) => {
                let device = VhostNet::waiting(self, ram, vhost.value, before)?;
                Ok(Box::new(device))
            }
            (_, None, _) => Ok(Box::new(TapNet::waiting(self))),
        }
    }
}

/// Of a device that the other process does not hand over.
const NOT_PROMISED: &str = "the process that is taken over from does not have it";

fn name_all<'a>(what: &str, ids: impl Iterator<Item = &'a mut String>) -> Result<(), MachineError> {
    let mut names: Vec<String> = Vec::new();
    for (number, id) in ids.enumerate() {
        if id.is_empty() {
            *id = number.to_string();
        }
        if names.contains(id) {
            return Err(wrong(what, id, "this id is there twice"));
        }
        names.push(id.clone());
    }
    Ok(())
}

/// Names what was asked of the host in its error.
pub(super) fn host(op: String, source: io::Error) -> MachineError {
    MachineError::Host { op, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_described_by_their_back_end_and_a_name() {
        let blk: BlkConfig = "vhost-user:/run/a,,b.sock,id=root".parse().unwrap();
        assert_eq!(
            (blk.socket, blk.id.as_str()),
            ("/run/a,b.sock".into(), "root")
        );
        let net: NetConfig = "tap=tap0,vhost=on,mac=52:54:00:12:34:5f".parse().unwrap();
        assert_eq!(net.mac, Some([0x52, 0x54, 0, 0x12, 0x34, 0x5f]));
        let vhost = ["tap=a", "tap=a,vhost=on", "tap=a,vhost=off"];
        let vhost = vhost.map(|text| text.parse::<NetConfig>().unwrap().vhost);
        assert_eq!(vhost, [None, Some(true), Some(false)]);
        let mut all = OutsideConfig {
            blks: vec![
                "vhost-user:a".parse().unwrap(),
                "vhost-user:b".parse().unwrap(),
            ],
            nets: vec![net.clone(), net],
        };
        all.name().unwrap();
        assert_eq!(
            (all.blks[1].id.as_str(), all.nets[0].id.as_str()),
            ("1", "0")
        );
        all.blks[0].id = "1".to_owned();
        assert!(all.name().unwrap_err().to_string().contains("twice"));
    }

    #[test]
    fn what_describes_none_is_refused_with_what_would() {
        for (text, part) in [
            ("", "vhost-user:PATH"),
            ("disk.raw", "vhost-user:PATH"),
            ("vhost-user:", "vhost-user:PATH"),
            ("vhost-user:a,ro", "only id=NAME"),
            ("vhost-user:a,id=/", "letters"),
        ] {
            let error = BlkConfig::from_str(text).unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
        for (text, part) in [
            ("", "tap=NAME"),
            ("vhost=on", "name its tap"),
            ("tap=a,vhost=maybe", "vhost=off this process"),
            ("tap=a,mac=52:54:00:12:34", "a mac is"),
            ("tap=a,mac=53:54:00:12:34:56", "a mac is"),
            ("tap=a,mac=52:54:00:12:34:5x", "a mac is"),
            ("tap=a,id=", "letters"),
        ] {
            let error = NetConfig::from_str(text).unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
