//! What every virtio-net on a tap has, whoever moves its packets: name, address, configuration, and how it announces the guest.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use vmferry_cpr::manifest::FdKind;
use vmferry_devices::announce::Announce;
use vmferry_devices::vhost::NET_HEADER_BYTES;

use super::outside::NetConfig;
use crate::machine::heirloom::DeviceFd;

/// Device type of network interfaces.
pub const TYPE_NET: u32 = 1;
/// Role of the tap.
pub(super) const TAP: &str = "tap";
/// Queues: to the guest, from it.
pub(super) const QUEUES: usize = 2;
/// Largest size of each.
pub(super) const QUEUE_SIZE: u16 = 256;
/// The address is the device's, and it says whether the link is up: between the driver and the VMM, whoever moves packets.
pub(super) const F_OF_VMM: u64 = 1 << 5 | 1 << 16;
/// A packet to the guest may fill several chains.
pub(super) const F_MRG_RXBUF: u64 = 1 << 15;
/// Descriptors may be in tables of their own.
pub(super) const F_INDIRECT: u64 = 1 << 28;
/// Before each packet.
pub(super) const HEADER_BYTES: usize = NET_HEADER_BYTES as usize;
/// The longest that a tap can have, header included, with some room.
pub(super) const PACKET_BYTES_MAX: usize = HEADER_BYTES + 65535 + 64;
/// An Ethernet header: less is no frame.
pub(super) const FRAME_BYTES_MIN: usize = 14;
/// Link is up.
const STATUS_UP: [u8; 2] = 1_u16.to_le_bytes();

/// Whether `packet` of saved state may be one, header included; why not.
pub(super) fn check_packet(packet: &[u8]) -> Result<(), String> {
    if (HEADER_BYTES + FRAME_BYTES_MIN..=PACKET_BYTES_MAX).contains(&packet.len()) {
        return Ok(());
    }
    Err(format!("a packet of {} bytes", packet.len()))
}

/// A network interface, without what moves its packets.
#[derive(Debug)]
pub(super) struct Card {
    name: String,
    announcer: Arc<TapAnnouncer>,
}

impl Card {
    pub(super) fn new(config: &NetConfig) -> Self {
        Self {
            name: config.device_name(),
            announcer: Arc::new(TapAnnouncer {
                name: config.id.clone(),
                tap: OnceLock::new(),
                mac: Mutex::new(config.mac.unwrap_or_else(|| mac_of(&config.id))),
            }),
        }
    }

    /// Name of the device.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Announces the guest through `tap` from now on, if it did through none.
    pub(super) fn attach(&self, tap: Arc<File>) {
        let _ = self.announcer.tap.set(tap);
    }

    pub(super) fn announcer(&self) -> Arc<dyn Announce> {
        self.announcer.clone()
    }

    pub(super) fn config(&self) -> Vec<u8> {
        let mut config = self.announcer.mac().to_vec();
        config.extend_from_slice(&STATUS_UP);
        config
    }

    /// The guest that was shown `saved` keeps its address.
    ///
    /// # Errors
    /// Why that is no interface like this one.
    pub(super) fn accept_config(&self, saved: &[u8]) -> Result<(), String> {
        match <[u8; 8]>::try_from(saved) {
            Ok([a, b, c, d, e, f, _, _]) => {
                self.announcer.set_mac([a, b, c, d, e, f]);
                Ok(())
            }
            Err(_) => Err(format!(
                "the guest knows a network interface with {} bytes of configuration, this one has 8",
                saved.len()
            )),
        }
    }

    /// A descriptor of it for a process that takes the guest over in place.
    ///
    /// # Errors
    /// When the host has no more of them.
    pub(super) fn heirloom(
        &self,
        role: &str,
        kind: FdKind,
        value: u64,
        fd: impl AsFd,
    ) -> io::Result<DeviceFd> {
        Ok(DeviceFd {
            device: self.name.clone(),
            role: role.to_owned(),
            kind,
            value,
            fd: fd.as_fd().try_clone_to_owned()?,
        })
    }
}

/// An address of QEMU's range, which differs where ids do.
fn mac_of(id: &str) -> [u8; 6] {
    let mut sum = 0_u32;
    for byte in id.bytes() {
        sum = sum.wrapping_mul(31).wrapping_add(byte.into());
    }
    let [a, b, c, _] = sum.to_le_bytes();
    [0x52, 0x54, 0, c, b, a]
}

/// Tells the tap's network where the guest is.
#[derive(Debug)]
struct TapAnnouncer {
    name: String,
    tap: OnceLock<Arc<File>>,
    mac: Mutex<[u8; 6]>,
}

impl TapAnnouncer {
    fn mac(&self) -> [u8; 6] {
        *self.mac.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_mac(&self, mac: [u8; 6]) {
        *self.mac.lock().unwrap_or_else(PoisonError::into_inner) = mac;
    }
}

/// A packet that asks nobody for the guest's own address (RARP), as switches know it from other VMMs, behind an empty header.
fn announcement(mac: [u8; 6]) -> Vec<u8> {
    let mut packet = vec![0; NET_HEADER_BYTES.into()];
    packet.extend_from_slice(&[0xff; 6]);
    packet.extend_from_slice(&mac);
    // RARP; Ethernet, IPv4, lengths, and the request.
    packet.extend_from_slice(&[0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
    for _ in 0..2 {
        packet.extend_from_slice(&mac);
        packet.extend_from_slice(&[0; 4]);
    }
    // The shortest that Ethernet knows.
    packet.resize(usize::from(NET_HEADER_BYTES) + 60, 0);
    packet
}

impl Announce for TapAnnouncer {
    fn name(&self) -> &str {
        &self.name
    }

    fn announce(&self) {
        let Some(mut tap) = self.tap.get().map(|tap| &**tap) else {
            return;
        };
        if let Err(error) = tap.write_all(&announcement(self.mac())) {
            let error = &error as &dyn std::error::Error;
            tracing::debug!(error, interface = self.name, "an announcement is lost");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_announcement_is_a_broadcast_from_the_guest() {
        let mac = [0x52, 0x54, 0, 1, 2, 3];
        let packet = announcement(mac);
        let frame = &packet[12..];
        assert_eq!(frame.len(), 60);
        assert_eq!((&frame[..6], &frame[6..12]), (&[0xff; 6][..], &mac[..]));
        assert_eq!(&frame[12..14], [0x80, 0x35]);
        assert_eq!(&frame[22..28], mac);
        assert_eq!(&frame[32..38], mac);
    }

    #[test]
    fn addresses_differ_where_names_do() {
        assert_ne!(mac_of("0"), mac_of("1"));
        assert_eq!(
            mac_of("lan")[0] & 3,
            2,
            "of one interface, not from a factory"
        );
    }
}
