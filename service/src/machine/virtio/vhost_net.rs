//! virtio-net on a tap, whose packets the kernel moves (vhost-net): `--net tap=NAME,vhost=on`, and without that word where there is a
//! vhost-net.

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use vmferry_cpr::manifest::FdKind;
use vmferry_devices::Before;
use vmferry_devices::announce::Announce;
use vmferry_devices::vhost::{
    Queue, VhostDevice, VhostLog, VhostMemory, VhostNotifier, check_features, open_tap,
};
use vmferry_devices::{DeviceError, Notifier};
use vmferry_transport::memory::DirtyLog;
use vmferry_transport::wire::{DeviceSchema, Section};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::backend::{Backend, QueueBase, Start};
use super::net::{
    Card, F_INDIRECT, F_MRG_RXBUF, F_OF_VMM, QUEUE_SIZE, QUEUES, TAP, TYPE_NET, check_packet,
};
use super::outside::{NetConfig, host};
use super::ring::F_EVENT_IDX;
use super::vhost_user::{bases, events, rings};
use crate::machine::MachineError;
use crate::machine::heirloom::{DeviceFd, claim};
use crate::machine::ram::MachineRam;

/// The kernel's back end.
const VHOST_NET: &str = "/dev/vhost-net";
/// Role of the kernel's back end. Its value: the features that are offered to the driver.
pub(super) const VHOST: &str = "vhost";

type Shared = Arc<Mutex<VhostDevice>>;

/// Opens the kernel's back end.
///
/// # Errors
/// When the kernel lacks it, or does not let this process have it.
pub fn open_vhost() -> io::Result<File> {
    File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(VHOST_NET)
}

/// A network interface.
#[derive(Debug)]
pub struct VhostNet {
    card: Card,
    /// Empty until the descriptors of another process were taken over.
    device: Arc<OnceLock<Shared>>,
    memory: VhostMemory,
    features: u64,
    before: Before,
    /// What came with the guest: the kernel takes no packet but from the tap. Part of what was loaded until the guest has run.
    undelivered: Option<Vec<u8>>,
}

impl VhostNet {
    /// Opens the tap, for packets that `vhost` of [`open_vhost`] moves.
    ///
    /// # Errors
    /// When the kernel lacks it, or somebody else has the tap.
    pub fn open(config: &NetConfig, ram: &MachineRam, vhost: File) -> Result<Self, MachineError> {
        let mut this = Self::waiting(config, ram, 0, Before::Process)?;
        let tap = open_tap(&config.tap);
        let op = format!("open tap {} for {}", config.tap, this.card.name());
        this.features = this.adopt(tap.map_err(|source| host(op, source))?, vhost)?;
        Ok(this)
    }

    /// Waits for the descriptors of whoever had them `before`, whose driver was offered `features`.
    ///
    /// # Errors
    /// When memory cannot be shared with the kernel.
    pub fn waiting(
        config: &NetConfig,
        ram: &MachineRam,
        features: u64,
        before: Before,
    ) -> Result<Self, MachineError> {
        let card = Card::new(config);
        let memory = VhostMemory::new(ram.regions().to_vec());
        let failed = |error| host(format!("share memory for {}", card.name()), error);
        Ok(Self {
            memory: memory.map_err(failed)?,
            card,
            device: Arc::default(),
            features,
            before,
            undelivered: None,
        })
    }

    /// Makes the device of its descriptors; what it may offer to a driver.
    fn adopt(&self, tap: File, vhost: File) -> Result<u64, DeviceError> {
        let failed = |op: &str| {
            let (device, op) = (self.name().to_owned(), op.to_owned());
            move |source| DeviceError::Kernel { device, op, source }
        };
        // Until the first start.
        let event = || EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(failed("making an event"));
        let queues = [
            Queue::new(event()?, event()?),
            Queue::new(event()?, event()?),
        ];
        let copy = tap.try_clone().map_err(failed("copying a descriptor"))?;
        let device = VhostDevice::net(self.name(), vhost, tap, self.memory.clone(), queues)?;
        let ours = F_MRG_RXBUF | F_INDIRECT | F_EVENT_IDX;
        let features = device.offered() & ours | F_OF_VMM;
        self.card.attach(Arc::new(copy));
        // It is empty: this is called once.
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

impl Backend for VhostNet {
    fn name(&self) -> &str {
        self.card.name()
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
        self.card.config()
    }

    fn write_config(&mut self, _: u64, _: &[u8]) {}

    fn accept_config(&mut self, saved: &[u8]) -> Result<(), String> {
        self.card.accept_config(saved)
    }

    fn prepare(&mut self, start: Start) -> io::Result<()> {
        let mut device = self.device()?;
        device.set_events(events(&start.queues, &start.interrupt, QUEUES)?);
        // The address and the link are between the driver and us.
        let prepared = device
            .set_features(start.features & !F_OF_VMM)
            .and_then(|()| device.set_rings(&rings(&start.queues, QUEUES)))
            .and_then(|()| device.prepare());
        prepared.map_err(io::Error::other)
    }

    // The kernel looks at the rings when it is given the tap, and not before. It could be given that before the vCPUs run, when a refusal
    // would still be "not started"; but a ring that it has then is one that it has worked on. What it may refuse is what it was told when it
    // was prepared, and it did not.
    fn open(&mut self) -> io::Result<()> {
        // The guest runs without it.
        self.undelivered = None;
        self.device()?.go().map_err(io::Error::other)
    }

    fn stop(&mut self) -> io::Result<Vec<QueueBase>> {
        let Some(device) = self.device.get() else {
            return Ok(Vec::new());
        };
        let mut device = lock(device);
        device.stop().map_err(io::Error::other)?;
        Ok(bases(device.queues()))
    }

    fn reset(&mut self) {
        self.undelivered = None;
    }

    fn schemas(&self) -> Vec<DeviceSchema> {
        Vec::new()
    }

    fn save(&mut self) -> Result<Vec<Section>, DeviceError> {
        Ok(Vec::new())
    }

    fn load(&mut self, _: &[&Section]) -> Result<(), DeviceError> {
        Ok(())
    }

    fn undelivered(&self) -> Option<Vec<u8>> {
        self.undelivered.clone()
    }

    fn set_undelivered(&mut self, packet: Option<Vec<u8>>) -> Result<(), String> {
        packet.as_deref().map_or(Ok(()), check_packet)?;
        if packet.is_some() {
            tracing::info!(
                device = self.name(),
                "a packet that came with the guest is lost: vhost-net takes none"
            );
        }
        self.undelivered = packet;
        Ok(())
    }

    fn dirty_log(&self) -> io::Result<Option<Box<dyn DirtyLog>>> {
        let devices = self.device.get().into_iter();
        let devices = devices.map(|device| Arc::clone(device) as _).collect();
        Ok(Some(Box::new(VhostLog::new(self.memory.clone(), devices))))
    }

    fn notifier(&self) -> Option<Box<dyn Notifier>> {
        let device = Arc::clone(&self.device);
        Some(Box::new(VhostNotifier::waiting(self.name(), device)))
    }

    fn announcer(&self) -> Option<Arc<dyn Announce>> {
        Some(self.card.announcer())
    }

    fn heirlooms(&self) -> io::Result<Vec<DeviceFd>> {
        let device = self.device()?;
        let tap = device.tap().into_iter();
        let tap = tap.map(|tap| self.card.heirloom(TAP, FdKind::Tap, 0, tap));
        let vhost = device.descriptor();
        let vhost = self
            .card
            .heirloom(VHOST, FdKind::Vhost, self.features, vhost);
        tap.chain([vhost]).collect()
    }

    fn take_over(&mut self, fds: &mut Vec<DeviceFd>) -> Result<(), DeviceError> {
        if self.device.get().is_some() {
            return Ok(());
        }
        let tap = claim(fds, self.name(), TAP, FdKind::Tap)?;
        let vhost = claim(fds, self.name(), VHOST, FdKind::Vhost)?;
        let offered = self.adopt(tap.into(), vhost.into())?;
        // What this build or kernel offers beyond that is not shown to the driver.
        check_features(self.name(), self.features, offered)?;
        // Whatever speaks against it is to be known before the commit. The rings come with the start.
        let mut device = self.device().map_err(|source| DeviceError::Kernel {
            device: self.name().to_owned(),
            op: "taking it over".to_owned(),
            source,
        })?;
        match self.before {
            Before::Process => device.own(),
            // Nobody else is left. A program that died after it took the back end is to the kernel its owner still.
            Before::Program => device.take_back(),
        }
    }
}
