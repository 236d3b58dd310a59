//! virtio-net on a tap, whose packets the kernel moves (vhost-net): `--net tap=NAME`.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmferry_devices::announce::Announce;
use vmferry_devices::vhost::{
    NET_HEADER_BYTES, Queue, VhostDevice, VhostLog, VhostMemory, VhostNotifier, open_tap,
};
use vmferry_devices::{DeviceError, Notifier};
use vmferry_transport::memory::DirtyLog;
use vmferry_transport::wire::{DeviceSchema, Section};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::backend::{Backend, QueueBase, Start};
use super::outside::{NetConfig, host};
use super::vhost_user::{bases, events, rings};
use crate::machine::MachineError;
use crate::machine::ram::MachineRam;

/// Device type of network interfaces.
pub const TYPE_NET: u32 = 1;
const QUEUES: usize = 2;
const QUEUE_SIZE: u16 = 256;
const F_MAC: u64 = 1 << 5;
const F_MRG_RXBUF: u64 = 1 << 15;
const F_STATUS: u64 = 1 << 16;
const F_INDIRECT: u64 = 1 << 28;
const F_EVENT_IDX: u64 = 1 << 29;
/// Link is up.
const STATUS_UP: [u8; 2] = 1_u16.to_le_bytes();

type Shared = Arc<Mutex<VhostDevice>>;

/// A network interface.
#[derive(Debug)]
pub struct VhostNet {
    name: String,
    device: Shared,
    memory: VhostMemory,
    features: u64,
    announcer: Arc<TapAnnouncer>,
}

impl VhostNet {
    /// Opens the tap and the kernel's back end.
    ///
    /// # Errors
    /// When the kernel lacks either, or somebody else has the tap.
    pub fn open(config: &NetConfig, ram: &MachineRam) -> Result<Self, MachineError> {
        let name = format!("virtio-net/{}", config.id);
        let failed = |what: &str| {
            let op = format!("{what} for {name}");
            move |source| host(op, source)
        };
        let tap = open_tap(&config.tap).map_err(failed(&format!("open tap {}", config.tap)))?;
        let vhost = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/vhost-net")
            .map_err(failed("open /dev/vhost-net"))?;
        let memory = VhostMemory::new(ram.regions().to_vec()).map_err(failed("share memory"))?;
        // Until the first start.
        let event = || EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(failed("make an event"));
        let queues = [
            Queue::new(event()?, event()?),
            Queue::new(event()?, event()?),
        ];
        let announcer = TapAnnouncer {
            name: config.id.clone(),
            tap: tap.try_clone().map_err(failed("copy a descriptor"))?,
            mac: Mutex::new(config.mac.unwrap_or_else(|| mac_of(&config.id))),
        };
        let device = VhostDevice::net(name.clone(), vhost, tap, memory.clone(), queues)?;
        let ours = F_MRG_RXBUF | F_INDIRECT | F_EVENT_IDX;
        Ok(Self {
            features: device.offered() & ours | F_MAC | F_STATUS,
            name,
            device: Arc::new(Mutex::new(device)),
            memory,
            announcer: Arc::new(announcer),
        })
    }
}

fn lock(device: &Shared) -> MutexGuard<'_, VhostDevice> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
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

impl Backend for VhostNet {
    fn name(&self) -> &str {
        &self.name
    }

    fn device_type(&self) -> u32 {
        TYPE_NET
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; QUEUES]
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn config(&self) -> Vec<u8> {
        let mut config = self.announcer.mac().to_vec();
        config.extend_from_slice(&STATUS_UP);
        config
    }

    fn write_config(&mut self, _: u64, _: &[u8]) {}

    fn accept_config(&mut self, saved: &[u8]) -> Result<(), String> {
        match <[u8; 8]>::try_from(saved) {
            Ok([a, b, c, d, e, f, _, _]) => {
                // The guest keeps its address.
                self.announcer.set_mac([a, b, c, d, e, f]);
                Ok(())
            }
            Err(_) => Err(format!(
                "the guest knows a network interface with {} bytes of configuration, this one has 8",
                saved.len()
            )),
        }
    }

    fn start(&mut self, start: Start) -> io::Result<()> {
        let mut device = lock(&self.device);
        device.set_events(events(&start.queues, &start.interrupt, QUEUES)?);
        // The address and the link are between the driver and us.
        let started = device
            .set_features(start.features & !(F_MAC | F_STATUS))
            .and_then(|()| device.set_rings(&rings(&start.queues, QUEUES)))
            .and_then(|()| device.start());
        started.map_err(io::Error::other)
    }

    fn stop(&mut self) -> io::Result<Vec<QueueBase>> {
        let mut device = lock(&self.device);
        device.stop().map_err(io::Error::other)?;
        Ok(bases(device.queues()))
    }

    fn reset(&mut self) {}

    fn schemas(&self) -> Vec<DeviceSchema> {
        Vec::new()
    }

    fn save(&mut self) -> Result<Vec<Section>, DeviceError> {
        Ok(Vec::new())
    }

    fn load(&mut self, _: &[&Section]) -> Result<(), DeviceError> {
        Ok(())
    }

    fn dirty_log(&self) -> io::Result<Option<Box<dyn DirtyLog>>> {
        let devices = vec![Arc::clone(&self.device) as _];
        Ok(Some(Box::new(VhostLog::new(self.memory.clone(), devices))))
    }

    fn notifier(&self) -> Option<Box<dyn Notifier>> {
        Some(Box::new(VhostNotifier::new(Arc::clone(&self.device))))
    }

    fn announcer(&self) -> Option<Arc<dyn Announce>> {
        Some(self.announcer.clone())
    }
}

/// Tells the tap's network where the guest is.
#[derive(Debug)]
struct TapAnnouncer {
    name: String,
    tap: File,
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
        let mut tap = &self.tap;
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
