//! One back end in the kernel: who owns it, how it is set up, started and stopped.
//!
//! | Call | What the kernel is asked, in this order |
//! | --- | --- |
//! | [`own`](VhostDevice::own) | SET_OWNER |
//! | [`take_back`](VhostDevice::take_back) | SET_OWNER; of a network device that has a dead owner, on a new descriptor |
//! | [`prepare`](VhostDevice::prepare) | SET_OWNER if need be, SET_FEATURES, SET_MEM_TABLE, SET_LOG_BASE and F_LOG_ALL if a log runs; for each ring SET_VRING_NUM, BASE, ADDR, CALL, KICK |
//! | [`go`](VhostDevice::go) | it works: NET_SET_BACKEND, VSOCK_SET_RUNNING or, of vDPA, SET_VRING_ENABLE and SET_STATUS |
//! | [`stop`](VhostDevice::stop) | stands still; for each ring GET_VRING_BASE |
//! | [`release`](VhostDevice::release) | RESET_OWNER, which forgets all of the above |
//!
//! A step that fails leaves the device as the steps before made it; `stop` and `start` may be tried again.

mod logs;
mod owner;

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use vhost::VhostBackend;
use vhost::vdpa::VhostVdpa;
use vhost::vhost_kern::vdpa::VhostKernVdpa;
use vhost::vhost_kern::{VhostKernBackend, VhostKernFeatures};
use vmferry_transport::wire::{DeviceSchema, Section};
use vmm_sys_util::eventfd::EventFd;

use super::check_features;
use super::ioctl;
use super::log::LogPages;
use super::memory::{Memory, VhostMemory};
use super::ring::{Queue, Ring, RingV1, VhostV1};
use crate::saved::{decode, encode, schema_of};
use crate::{Device, DeviceError};

/// VHOST_F_LOG_ALL: marks what it writes.
pub const F_LOG_ALL: u64 = 1 << 26;
/// VIRTIO_F_RING_PACKED. The position in a packed ring is more than a number.
const F_RING_PACKED: u64 = 1 << 34;
/// VHOST_BACKEND_F_IOTLB_MSG_V2 and VHOST_BACKEND_F_SUSPEND.
const BACKEND_F_IOTLB_V2: u64 = 1 << 1;
const BACKEND_F_SUSPEND: u64 = 1 << 4;
/// Device status: acknowledged, has a driver, features agreed on, driver ready.
const STATUS_FEATURES_OK: u8 = 1 | 2 | 8;
const STATUS_DRIVER_OK: u8 = STATUS_FEATURES_OK | 4;

/// What kind of back end it is, with what belongs to that kind alone.
enum Kind {
    Net {
        tap: File,
    },
    Vsock {
        cid: u64,
    },
    Vdpa {
        vdpa: VhostKernVdpa<Arc<Memory>>,
        suspends: bool,
        mapped: bool,
    },
}

/// A descriptor that crate vhost's requests go to.
struct Requests {
    fd: File,
    memory: Arc<Memory>,
}

impl AsRawFd for Requests {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl VhostKernBackend for Requests {
    type AS = Arc<Memory>;

    fn mem(&self) -> &Self::AS {
        &self.memory
    }
}

/// A back end in the kernel, by a descriptor that the VMM has opened or was given.
pub struct VhostDevice {
    name: String,
    requests: Requests,
    memory: VhostMemory,
    kind: Kind,
    /// What the kernel offers, as it says it.
    offered: u64,
    /// What the driver has accepted.
    features: u64,
    queues: Vec<Queue>,
    owned: bool,
    /// The kernel cannot give it to another process.
    stays: bool,
    running: bool,
    /// The kernel knows all but that it is to begin.
    prepared: bool,
    log: Option<Arc<LogPages>>,
}

impl VhostDevice {
    /// A pair of queues of a network interface, the first to the guest: `vhost` is of /dev/vhost-net, `tap` one queue of a tap.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn net(
        name: impl Into<String>,
        vhost: File,
        tap: File,
        memory: VhostMemory,
        queues: [Queue; 2],
    ) -> Result<Self, DeviceError> {
        Self::new(name.into(), vhost, Kind::Net { tap }, memory, queues.into())
    }

    /// The two queues for data of a socket device, the first to the guest: `vhost` is of /dev/vhost-vsock. The queue for events stays
    /// with the VMM, which tells the guest through it that its connections are gone after a move to another host. The host knows the
    /// guest by `cid` from the first start on.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn vsock(
        name: impl Into<String>,
        vhost: File,
        cid: u64,
        memory: VhostMemory,
        queues: [Queue; 2],
    ) -> Result<Self, DeviceError> {
        let kind = Kind::Vsock { cid };
        let mut device = Self::new(name.into(), vhost, kind, memory, queues.into())?;
        device.try_to_give();
        Ok(device)
    }

    /// A vDPA device: `vhost` is of /dev/vhost-vdpa-N.
    ///
    /// # Errors
    /// The kernel's answer, or that the device has another number of queues.
    pub fn vdpa(
        name: impl Into<String>,
        vhost: File,
        memory: VhostMemory,
        queues: Vec<Queue>,
    ) -> Result<Self, DeviceError> {
        let name = name.into();
        let refused = |op: &str, source| refused(&name, op, source);
        let file = vhost
            .try_clone()
            .map_err(|source| refused("copying a descriptor", source))?;
        let known = Arc::new(memory.memory().clone());
        let mut vdpa = VhostKernVdpa::with(file, known, 0);
        let mut stays = true;
        let backend = (|| {
            // Features of a vDPA back end are asked of, and given to, its owner only.
            match vdpa.set_owner() {
                Err(vhost::Error::IoctlError(e)) if e.raw_os_error() == Some(libc::EBUSY) => {}
                answer => answer?,
            }
            // Nothing was told it yet that this would make it forget.
            if vdpa.reset_owner().is_ok() {
                stays = false;
                vdpa.set_owner()?;
            }
            let backend = vdpa.get_backend_features()?;
            vdpa.set_backend_features(backend & (BACKEND_F_IOTLB_V2 | BACKEND_F_SUSPEND))?;
            Ok((backend, vdpa.get_vqs_count()?))
        })();
        let (backend, count) =
            backend.map_err(|error| refused("asking a vDPA device what it is", to_io(error)))?;
        if count as usize != queues.len() {
            let reason = format!("it has {count} queues, and {} were given", queues.len());
            return Err(refused("setting it up", io::Error::other(reason)));
        }
        let kind = Kind::Vdpa {
            vdpa,
            suspends: backend & BACKEND_F_SUSPEND != 0,
            mapped: false,
        };
        let mut device = Self::new(name, vhost, kind, memory, queues)?;
        (device.owned, device.stays) = (true, stays);
        Ok(device)
    }

    fn new(
        name: String,
        vhost: File,
        kind: Kind,
        memory: VhostMemory,
        queues: Vec<Queue>,
    ) -> Result<Self, DeviceError> {
        let requests = Requests {
            fd: vhost,
            memory: Arc::new(memory.memory().clone()),
        };
        let offered = requests
            .get_features()
            .map_err(|error| refused(&name, "VHOST_GET_FEATURES", to_io(error)))?;
        Ok(Self {
            name,
            requests,
            memory,
            kind,
            offered,
            features: 0,
            queues,
            owned: false,
            stays: false,
            running: false,
            prepared: false,
            log: None,
        })
    }

    /// Features that the guest's driver may accept.
    pub fn offered(&self) -> u64 {
        self.offered & !(F_LOG_ALL | F_RING_PACKED)
    }

    /// What the guest's driver has accepted. Counts from the next start on.
    ///
    /// # Errors
    /// [`DeviceError::BadState`] if that was not offered.
    pub fn set_features(&mut self, features: u64) -> Result<(), DeviceError> {
        check_features(&self.name, features, self.offered())?;
        (self.features, self.prepared) = (features, false);
        Ok(())
    }

    /// The rings as the guest's driver has set them up, one entry per queue. Counts from the next start on.
    ///
    /// # Errors
    /// [`DeviceError::BadState`] if a ring is not in RAM, or there is another number of queues.
    pub fn set_rings(&mut self, rings: &[Option<Ring>]) -> Result<(), DeviceError> {
        let state = VhostV1 {
            features: self.features,
            rings: rings.iter().map(|ring| ring.map(RingV1::from)).collect(),
        };
        self.take_over(state)
    }

    fn take_over(&mut self, state: VhostV1) -> Result<(), DeviceError> {
        let (features, rings) =
            state.check(&self.name, self.offered(), self.queues.len(), &self.memory)?;
        (self.features, self.prepared) = (features, false);
        for (queue, ring) in self.queues.iter_mut().zip(rings) {
            queue.ring = ring;
        }
        Ok(())
    }

    /// Other events for the queues, one of each per queue. Counts from the next start on.
    pub fn set_events(&mut self, events: Vec<(EventFd, EventFd)>) {
        self.prepared = false;
        for (queue, (kick, call)) in self.queues.iter_mut().zip(events) {
            (queue.kick, queue.call) = (kick, call);
        }
    }

    /// The queues. Their bases are current while the device stands.
    pub fn queues(&self) -> &[Queue] {
        &self.queues
    }

    /// Whether it works.
    pub fn is_running(&self) -> bool {
        self.running
    }

    /// Whether the log of this back end has all that it writes. The kernel's vsock notes its used rings only, not the buffers.
    pub fn logs_all_writes(&self) -> bool {
        match self.kind {
            Kind::Net { .. } => self.offered & F_LOG_ALL != 0,
            Kind::Vsock { .. } | Kind::Vdpa { .. } => false,
        }
    }

    /// Why the guest cannot move while it runs; `None` if it can.
    pub fn blocker(&self) -> Option<String> {
        match &self.kind {
            Kind::Vdpa { .. } => Some(
                "vDPA devices write to guest memory without telling anybody; unplug it first"
                    .to_owned(),
            ),
            _ if self.offered & F_LOG_ALL == 0 => Some(
                "its driver in the kernel keeps no log of what it writes (VHOST_F_LOG_ALL)"
                    .to_owned(),
            ),
            _ => None,
        }
    }

    /// [`prepare`](Self::prepare) and [`go`](Self::go).
    ///
    /// # Errors
    /// As these.
    pub fn start(&mut self) -> Result<(), DeviceError> {
        self.prepare()?;
        self.go()
    }

    /// Tells the back end all that it must know to work on the rings, from their bases on. It does nothing yet: neither rings nor packets
    /// are touched. Harmless if it works already.
    ///
    /// # Errors
    /// The kernel's answer, or what is wrong with the rings.
    pub fn prepare(&mut self) -> Result<(), DeviceError> {
        if self.running {
            return Ok(());
        }
        self.own()?;
        self.prepared = false;
        self.set_up()?;
        self.prepared = true;
        Ok(())
    }

    /// Lets the back end work on what it was prepared for; if that is not so any more it is prepared first. Harmless if it works. Both sides
    /// of each ring are woken: events do not move, and one that was under way is lost.
    ///
    /// # Errors
    /// The kernel's answer. The device stands then.
    pub fn go(&mut self) -> Result<(), DeviceError> {
        if self.running {
            return Ok(());
        }
        if !self.prepared {
            self.prepare()?;
        }
        self.prepared = false;
        let started = self.begin().and_then(|()| {
            let woken = self.queues.iter().try_for_each(Queue::wake);
            self.answered("waking it", woken)
        });
        if started.is_err()
            && let Err(error) = self.halt()
        {
            // The first error is the one to report.
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, "a back end that did not start does not stop either");
        }
        self.running = started.is_ok();
        started
    }

    /// Has the back end finish what is under way, makes it stand still, and takes its position in the rings. Nothing is written to
    /// guest memory afterwards. Harmless if it stands.
    ///
    /// # Errors
    /// The kernel's answer. The device may then work or stand; try again.
    pub fn stop(&mut self) -> Result<(), DeviceError> {
        self.prepared = false;
        if !self.running {
            return Ok(());
        }
        self.halt()?;
        for index in 0..self.queues.len() {
            if self.queues[index].ring.is_none() {
                continue;
            }
            let answer = self.requests.get_vring_base(index);
            let base = self.asked("VHOST_GET_VRING_BASE", answer)?;
            if let Some(ring) = &mut self.queues[index].ring {
                // Of a split ring the position is sixteen bits.
                ring.base = (base & 0xffff) as u16;
            }
        }
        if let Kind::Vdpa { vdpa, .. } = &self.kind {
            // Forgets the rings; the position is ours now.
            let answer = vdpa.set_status(0);
            self.asked("VHOST_VDPA_SET_STATUS", answer)?;
        }
        self.running = false;
        Ok(())
    }

    /// What the kernel must know before the device goes.
    fn set_up(&mut self) -> Result<(), DeviceError> {
        let failed = |error: io::Error| refused(&self.name, "preparing it", error);
        for (index, queue) in self.queues.iter().enumerate() {
            match (&queue.ring, &self.kind) {
                (Some(ring), _) => ring.waiting(&self.memory).map(drop).map_err(failed)?,
                // A vDPA device may have queues that the driver does not use.
                (None, Kind::Vdpa { .. }) => {}
                (None, _) => {
                    let reason = format!("queue {index} is not set up");
                    return Err(failed(io::Error::other(reason)));
                }
            }
        }
        if let Kind::Vdpa { vdpa, mapped, .. } = &mut self.kind {
            let answer = Self::set_up_vdpa(vdpa, mapped, self.features, &self.memory);
            self.asked("setting up vDPA", answer)?;
        } else {
            let table = self.memory.table().map_err(failed)?;
            let answer = self.requests.set_features(self.features);
            self.asked("VHOST_SET_FEATURES", answer)?;
            let answer = self.requests.set_mem_table(&table);
            self.asked("VHOST_SET_MEM_TABLE", answer)?;
            self.tell_log_base()?;
        }
        self.set_up_rings()
    }

    fn set_up_vdpa(
        vdpa: &VhostKernVdpa<Arc<Memory>>,
        mapped: &mut bool,
        features: u64,
        memory: &VhostMemory,
    ) -> vhost::Result<()> {
        vdpa.set_status(0)?;
        vdpa.set_status(STATUS_FEATURES_OK & !8)?;
        vdpa.set_features(features)?;
        vdpa.set_status(STATUS_FEATURES_OK)?;
        if vdpa.get_status()? & 8 == 0 {
            return Err(vhost::Error::InvalidOperation);
        }
        if !*mapped {
            for region in memory.table().map_err(vhost::Error::IOError)? {
                let from = region.userspace_addr as *const u8;
                vdpa.dma_map(region.guest_phys_addr, region.memory_size, from, false)?;
            }
            *mapped = true;
        }
        Ok(())
    }

    fn set_up_rings(&self) -> Result<(), DeviceError> {
        for (index, queue) in self.queues.iter().enumerate() {
            let Some(ring) = &queue.ring else { continue };
            let requests = &self.requests;
            self.asked(
                "VHOST_SET_VRING_NUM",
                requests.set_vring_num(index, ring.size),
            )?;
            self.asked(
                "VHOST_SET_VRING_BASE",
                requests.set_vring_base(index, ring.base),
            )?;
            self.tell_ring(index, ring)?;
            self.asked(
                "VHOST_SET_VRING_CALL",
                requests.set_vring_call(index, &queue.call),
            )?;
            self.asked(
                "VHOST_SET_VRING_KICK",
                requests.set_vring_kick(index, &queue.kick),
            )?;
        }
        Ok(())
    }

    fn tell_ring(&self, index: usize, ring: &Ring) -> Result<(), DeviceError> {
        let config = ring.config(self.log.is_some());
        let answer = match &self.kind {
            Kind::Vdpa { vdpa, .. } => vdpa.set_vring_addr(index, &config),
            _ => self.requests.set_vring_addr(index, &config),
        };
        self.asked("VHOST_SET_VRING_ADDR", answer)
    }

    /// The log comes before the feature: the kernel checks that it can be written.
    fn tell_log_base(&self) -> Result<(), DeviceError> {
        if let Some(log) = &self.log {
            let answer = self.requests.set_log_base(log.address(), None);
            self.asked("VHOST_SET_LOG_BASE", answer)?;
            let answer = self.requests.set_features(self.features | F_LOG_ALL);
            self.asked("VHOST_SET_FEATURES", answer)?;
        }
        Ok(())
    }

    fn begin(&self) -> Result<(), DeviceError> {
        match &self.kind {
            Kind::Net { tap } => {
                for index in 0..self.ring_count() {
                    let answer = ioctl::net_set_backend(&self.requests.fd, index, Some(tap));
                    self.answered("VHOST_NET_SET_BACKEND", answer)?;
                }
                Ok(())
            }
            Kind::Vsock { cid } => {
                let answer = ioctl::vsock_set_cid(&self.requests.fd, *cid);
                self.answered("VHOST_VSOCK_SET_GUEST_CID", answer)?;
                let answer = ioctl::vsock_set_running(&self.requests.fd, true);
                self.answered("VHOST_VSOCK_SET_RUNNING", answer)
            }
            Kind::Vdpa { vdpa, .. } => {
                for (index, queue) in self.queues.iter().enumerate() {
                    if queue.ring.is_some() {
                        let answer = vdpa.set_vring_enable(index, true);
                        self.asked("VHOST_VDPA_SET_VRING_ENABLE", answer)?;
                    }
                }
                self.asked("VHOST_VDPA_SET_STATUS", vdpa.set_status(STATUS_DRIVER_OK))
            }
        }
    }

    fn halt(&self) -> Result<(), DeviceError> {
        match &self.kind {
            Kind::Net { .. } => {
                let mut result = Ok(());
                for index in 0..self.ring_count() {
                    // Every queue is stopped, whatever the others say.
                    let answer = ioctl::net_set_backend(&self.requests.fd, index, None);
                    let halted = self.answered("VHOST_NET_SET_BACKEND", answer);
                    result = result.and(halted);
                }
                result
            }
            Kind::Vsock { .. } => {
                let answer = ioctl::vsock_set_running(&self.requests.fd, false);
                self.answered("VHOST_VSOCK_SET_RUNNING", answer)
            }
            Kind::Vdpa { vdpa, suspends, .. } => {
                if *suspends {
                    self.asked("VHOST_VDPA_SUSPEND", vdpa.suspend())
                } else {
                    let reason = "the device cannot be suspended (VHOST_BACKEND_F_SUSPEND)";
                    let error = io::Error::new(io::ErrorKind::Unsupported, reason);
                    self.answered("stopping it", Err(error))
                }
            }
        }
    }

    fn ring_count(&self) -> u32 {
        // Two, of a network interface.
        u32::try_from(self.queues.len()).unwrap_or(u32::MAX)
    }

    fn asked<T>(&self, op: &str, answer: vhost::Result<T>) -> Result<T, DeviceError> {
        self.answered(op, answer.map_err(to_io))
    }

    fn answered<T>(&self, op: &str, answer: io::Result<T>) -> Result<T, DeviceError> {
        answer.map_err(|source| refused(&self.name, op, source))
    }
}

impl Device for VhostDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn schema(&self) -> DeviceSchema {
        schema_of::<VhostV1>(&self.name)
    }

    fn save(&mut self) -> Result<Section, DeviceError> {
        if self.running {
            return Err(DeviceError::Vetoed {
                device: self.name.clone(),
                reason: "it still works; stop it before it is saved".to_owned(),
            });
        }
        encode(&self.name, &VhostV1::new(self.features, &self.queues))
    }

    fn restore(&mut self, section: &Section) -> Result<(), DeviceError> {
        if self.running {
            return Err(DeviceError::Vetoed {
                device: self.name.clone(),
                reason: "it works; state is loaded into one that stands".to_owned(),
            });
        }
        self.take_over(decode(section)?)
    }
}

impl Drop for VhostDevice {
    fn drop(&mut self) {
        // Others may hold the same descriptor: without us it must not go on writing into our memory.
        if self.running
            && let Err(error) = self.halt()
        {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, "a back end goes on until its descriptor is closed");
        }
    }
}

impl std::fmt::Debug for VhostDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VhostDevice")
            .field("name", &self.name)
            .field("features", &self.features)
            .field("queues", &self.queues)
            .field("owned", &self.owned)
            .field("running", &self.running)
            .finish_non_exhaustive()
    }
}

fn refused(device: &str, op: &str, source: io::Error) -> DeviceError {
    DeviceError::Kernel {
        device: device.to_owned(),
        op: op.to_owned(),
        source,
    }
}

/// The kernel's own error where there is one.
pub(super) fn to_io(error: vhost::Error) -> io::Error {
    match error {
        vhost::Error::IoctlError(error) | vhost::Error::IOError(error) => error,
        vhost::Error::VhostOpen(error) => error,
        other => io::Error::other(other),
    }
}
