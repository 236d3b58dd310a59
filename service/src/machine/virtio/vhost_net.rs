//! virtio-net on a tap, whose packets the kernel moves (vhost-net): `--net tap=NAME`.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::BorrowedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use vmferry_cpr::manifest::FdKind;
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
use crate::machine::heirloom::{DeviceFd, claim};
use crate::machine::ram::MachineRam;

/// Device type of network interfaces.
pub const TYPE_NET: u32 = 1;
/// Role of the kernel's back end. Its value: the features that are offered to the driver.
pub(super) const VHOST: &str = "vhost";
/// Role of the tap.
pub(super) const TAP: &str = "tap";
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
    /// Empty until the descriptors of another process were taken over.
    device: Arc<OnceLock<Shared>>,
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
        let mut this = Self::waiting(config, ram, 0)?;
        let failed = |what: &str| {
            let op = format!("{what} for {}", this.name);
            move |source| host(op, source)
        };
        let tap = open_tap(&config.tap).map_err(failed(&format!("open tap {}", config.tap)))?;
        let vhost = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/vhost-net")
            .map_err(failed("open /dev/vhost-net"))?;
        this.features = this.adopt(tap, vhost)?;
        Ok(this)
    }

    /// Waits for the descriptors of another process, whose driver was offered `features`.
    ///
    /// # Errors
    /// When memory cannot be shared with the kernel.
    pub fn waiting(
        config: &NetConfig,
        ram: &MachineRam,
        features: u64,
    ) -> Result<Self, MachineError> {
        let name = format!("virtio-net/{}", config.id);
        let memory = VhostMemory::new(ram.regions().to_vec());
        let memory = memory.map_err(|error| host(format!("share memory for {name}"), error))?;
        let announcer = TapAnnouncer {
            name: config.id.clone(),
            tap: OnceLock::new(),
            mac: Mutex::new(config.mac.unwrap_or_else(|| mac_of(&config.id))),
        };
        Ok(Self {
            name,
            device: Arc::default(),
            memory,
            features,
            announcer: Arc::new(announcer),
        })
    }

    /// Makes the device of its descriptors; what it may offer to a driver.
    fn adopt(&self, tap: File, vhost: File) -> Result<u64, DeviceError> {
        let failed = |op: &str| {
            let (device, op) = (self.name.clone(), op.to_owned());
            move |source| DeviceError::Kernel { device, op, source }
        };
        // Until the first start.
        let event = || EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(failed("making an event"));
        let queues = [
            Queue::new(event()?, event()?),
            Queue::new(event()?, event()?),
        ];
        let copy = tap.try_clone().map_err(failed("copying a descriptor"))?;
        let device = VhostDevice::net(self.name.clone(), vhost, tap, self.memory.clone(), queues)?;
        let ours = F_MRG_RXBUF | F_INDIRECT | F_EVENT_IDX;
        let features = device.offered() & ours | F_MAC | F_STATUS;
        // Both are empty: this is called once.
        let _ = self.announcer.tap.set(copy);
        let _ = self.device.set(Arc::new(Mutex::new(device)));
        Ok(features)
    }

    fn device(&self) -> io::Result<MutexGuard<'_, VhostDevice>> {
        let missing = || io::Error::other("its tap has not come");
        self.device.get().map(lock).ok_or_else(missing)
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
        let mut device = self.device()?;
        device.set_events(events(&start.queues, &start.interrupt, QUEUES)?);
        // The address and the link are between the driver and us.
        let started = device
            .set_features(start.features & !(F_MAC | F_STATUS))
            .and_then(|()| device.set_rings(&rings(&start.queues, QUEUES)))
            .and_then(|()| device.start());
        started.map_err(io::Error::other)
    }

    fn stop(&mut self) -> io::Result<Vec<QueueBase>> {
        let Some(device) = self.device.get() else {
            return Ok(Vec::new());
        };
        let mut device = lock(device);
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
        let devices = self.device.get().into_iter();
        let devices = devices.map(|device| Arc::clone(device) as _).collect();
        Ok(Some(Box::new(VhostLog::new(self.memory.clone(), devices))))
    }

    fn notifier(&self) -> Option<Box<dyn Notifier>> {
        let device = Arc::clone(&self.device);
        Some(Box::new(VhostNotifier::waiting(self.name.clone(), device)))
    }

    fn announcer(&self) -> Option<Arc<dyn Announce>> {
        Some(self.announcer.clone())
    }

    fn heirlooms(&self) -> io::Result<Vec<DeviceFd>> {
        let device = self.device()?;
        let heirloom = |role: &str, kind, value, fd: BorrowedFd<'_>| {
            Ok::<_, io::Error>(DeviceFd {
                device: self.name.clone(),
                role: role.to_owned(),
                kind,
                value,
                fd: fd.try_clone_to_owned()?,
            })
        };
        let tap = device.tap().into_iter();
        let tap = tap.map(|tap| heirloom(TAP, FdKind::Tap, 0, tap));
        let vhost = heirloom(VHOST, FdKind::Vhost, self.features, device.descriptor());
        tap.chain([vhost]).collect()
    }

    fn take_over(&mut self, fds: &mut Vec<DeviceFd>) -> Result<(), DeviceError> {
        if self.device.get().is_some() {
            return Ok(());
        }
        let tap = claim(fds, &self.name, TAP, FdKind::Tap)?;
        let vhost = claim(fds, &self.name, VHOST, FdKind::Vhost)?;
        if self.adopt(tap.into(), vhost.into())? != self.features {
            return Err(DeviceError::BadState {
                device: self.name.clone(),
                reason: "its back end is not what it was".to_owned(),
            });
        }
        // Whatever speaks against it is to be known before the commit. The rings come with the start.
        let mut device = self.device().map_err(|source| DeviceError::Kernel {
            device: self.name.clone(),
            op: "taking it over".to_owned(),
            source,
        })?;
        device.own()
    }
}

/// Tells the tap's network where the guest is.
#[derive(Debug)]
struct TapAnnouncer {
    name: String,
    tap: OnceLock<File>,
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
        let Some(mut tap) = self.tap.get() else {
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
