//! virtio-blk whose back end is another process: `--blk vhost-user:PATH`.
//!
//! The back end may die. A thread waits for that and for the next one, which goes on where the last one was. If the last one had begun
//! requests, and kept no region of requests under way, nobody knows which were done: the guest's driver is told to reset the device.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use vmferry_cpr::manifest::FdKind;
use vmferry_devices::announce::Announce;
use vmferry_devices::vhost::user::{Lost, Requests, UserDevice};
use vmferry_devices::vhost::{Queue, Ring, VhostLog, VhostMemory, check_features};
use vmferry_devices::{Device, DeviceError, Notifier};
use vmferry_transport::memory::DirtyLog;
use vmferry_transport::wire::{DeviceSchema, Section};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::backend::{Backend, Interrupt, QueueBase, QueueStart, Start};
use super::blk::TYPE_BLOCK;
use super::outside::{BlkConfig, host};
use crate::machine::MachineError;
use crate::machine::heirloom::{DeviceFd, claim};
use crate::machine::ram::MachineRam;

/// Role of the connection to the back end. Its value: the features that are offered to the driver.
pub(super) const ROLE: &str = "vhost-user";
const QUEUE_SIZE: u16 = 128;
/// Bytes of a disk's configuration space that every back end has: up to the number of queues, which stays 1.
const CONFIG_BYTES: u32 = 32;
/// VIRTIO_BLK_F_CONFIG_WCE and VIRTIO_BLK_F_MQ: the cache mode would be written through us, and there is one queue.
const F_NOT_OFFERED: u64 = 1 << 11 | 1 << 12;
/// How often a back end that has gone is looked for.
const LOOK_EVERY: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 50_000_000,
};

type Shared = Arc<Mutex<UserDevice>>;

/// A disk of another process.
#[derive(Debug)]
pub struct VhostUserBlk {
    name: String,
    described: BlkConfig,
    /// Absent until the connection of another process was taken over.
    device: Option<Shared>,
    memory: VhostMemory,
    features: u64,
    config: Vec<u8>,
    own_state: bool,
    watcher: Option<Watcher>,
}

impl VhostUserBlk {
    /// Connects to the back end.
    ///
    /// # Errors
    /// When it is not there, or is no disk.
    pub fn connect(config: &BlkConfig, ram: &MachineRam) -> Result<Self, MachineError> {
        let name = config.device_name();
        let failed = |source| host(format!("prepare {name}"), source);
        let memory = VhostMemory::new(ram.regions().to_vec()).map_err(failed)?;
        // Until the first start.
        let event = || EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(failed);
        let queue = Queue::new(event()?, event()?);
        let device = UserDevice::connect(
            format!("vhost-user/{}", config.id),
            &config.socket,
            memory.clone(),
            vec![queue],
            Requests::Answered,
        )?;
        Ok(Self {
            features: device.offered() & !F_NOT_OFFERED,
            config: device.config(0, CONFIG_BYTES)?,
            own_state: device.has_own_state(),
            device: Some(Arc::new(Mutex::new(device))),
            described: config.clone(),
            name,
            memory,
            watcher: None,
        })
    }

    /// Waits for the connection of another process, whose back end offers `features`.
    ///
    /// # Errors
    /// When memory cannot be shared with it.
    pub fn waiting(
        config: &BlkConfig,
        ram: &MachineRam,
        features: u64,
    ) -> Result<Self, MachineError> {
        let name = config.device_name();
        let failed = |source| host(format!("prepare {name}"), source);
        Ok(Self {
            memory: VhostMemory::new(ram.regions().to_vec()).map_err(failed)?,
            features,
            config: Vec::new(),
            own_state: false,
            device: None,
            described: config.clone(),
            name,
            watcher: None,
        })
    }

    fn device(&self) -> io::Result<&Shared> {
        let missing = || io::Error::other("the connection to its back end has not come");
        self.device.as_ref().ok_or_else(missing)
    }
}

fn lock(device: &Shared) -> MutexGuard<'_, UserDevice> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

fn set_up(device: &mut UserDevice, start: &Start) -> Result<(), DeviceError> {
    device
        .set_features(start.features)
        .and_then(|()| device.set_rings(&rings(&start.queues, 1)))
        .and_then(|()| device.prepare())
}

/// One entry per queue of a device that has `count` of them.
pub(super) fn rings(queues: &[QueueStart], count: usize) -> Vec<Option<Ring>> {
    let ring = |index: usize| {
        let queue = queues
            .iter()
            .find(|queue| usize::from(queue.index) == index)?;
        Some(Ring {
            size: queue.state.size,
            desc: queue.state.desc_table,
            avail: queue.state.avail_ring,
            used: queue.state.used_ring,
            base: queue.state.next_avail,
        })
    };
    (0..count).map(ring).collect()
}

/// Where the rings of a device that stands are. What was taken is answered, so both positions are the same.
pub(super) fn bases(queues: &[Queue]) -> Vec<QueueBase> {
    (0..)
        .zip(queues)
        .filter_map(|(index, queue)| {
            let base = queue.ring?.base;
            Some(QueueBase {
                index,
                next_avail: base,
                next_used: base,
            })
        })
        .collect()
}

/// Kick and call for each of `count` queues; those that the driver does not use are never signalled.
pub(super) fn events(
    queues: &[QueueStart],
    interrupt: &Interrupt,
    count: usize,
) -> io::Result<Vec<(EventFd, EventFd)>> {
    let pair = |index: usize| {
        let queue = queues
            .iter()
            .find(|queue| usize::from(queue.index) == index);
        let kick = match queue {
            Some(queue) => queue.kick.try_clone()?,
            None => EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
        };
        Ok((kick, interrupt.eventfd().try_clone()?))
    };
    (0..count).map(pair).collect()
}

impl Backend for VhostUserBlk {
    fn name(&self) -> &str {
        &self.name
    }

    fn device_type(&self) -> u32 {
        TYPE_BLOCK
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn config(&self) -> Vec<u8> {
        self.config.clone()
    }

    fn write_config(&mut self, _: u64, _: &[u8]) {}

    fn accept_config(&mut self, saved: &[u8]) -> Result<(), String> {
        let sectors = |config: &[u8]| {
            config
                .first_chunk()
                .map_or(0, |bytes| u64::from_le_bytes(*bytes))
        };
        if sectors(saved) == sectors(&self.config) && saved.len() == self.config.len() {
            // Limits and block size are as the guest knows them; the back end may have other favourites.
            saved.clone_into(&mut self.config);
            return Ok(());
        }
        Err(format!(
            "the guest knows a disk of {} sectors, the back end here has one of {}",
            sectors(saved),
            sectors(&self.config)
        ))
    }

    fn prepare(&mut self, start: Start) -> io::Result<()> {
        let shared = Arc::clone(self.device()?);
        {
            let mut device = lock(&shared);
            // No other connection helps if there is no descriptor.
            device.set_events(events(&start.queues, &start.interrupt, 1)?);
            if !device.is_alive() {
                // It went while the guest stood; the next one may be there.
                device.reconnect(Lost::Refuse).map_err(io::Error::other)?;
            }
            if let Err(error) = set_up(&mut device, &start) {
                // A process that was to take the connection over may have died in the middle of a word. A new connection begins afresh,
                // and nothing is under way: the device stands.
                let error = &error as &dyn std::error::Error;
                tracing::warn!(error, device = device.name(), "connecting again");
                device.reconnect(Lost::Refuse).map_err(io::Error::other)?;
                set_up(&mut device, &start).map_err(io::Error::other)?;
            }
        }
        self.watcher = Some(Watcher::start(&shared, start.interrupt)?);
        Ok(())
    }

    // A back end that does not take the last word is one that has died, as it may at any time: the watcher has the next one go on.
    fn open(&mut self) -> io::Result<()> {
        let mut device = lock(self.device()?);
        if let Err(error) = device.go() {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, device = device.name(), "a back end does not begin");
        }
        Ok(())
    }

    fn stop(&mut self) -> io::Result<Vec<QueueBase>> {
        let Some(device) = &self.device else {
            return Ok(Vec::new());
        };
        let mut device = lock(device);
        device.stop().map_err(io::Error::other)?;
        let bases = bases(device.queues());
        drop(device);
        self.watcher = None;
        Ok(bases)
    }

    fn reset(&mut self) {}

    fn schemas(&self) -> Vec<DeviceSchema> {
        let own_state = self.device.iter().filter(|_| self.own_state);
        own_state.map(|device| lock(device).schema()).collect()
    }

    fn save(&mut self) -> Result<Vec<Section>, DeviceError> {
        let own_state = self.device.iter().filter(|_| self.own_state);
        own_state.map(|device| lock(device).save()).collect()
    }

    fn load(&mut self, sections: &[&Section]) -> Result<(), DeviceError> {
        let Some(device) = &self.device else {
            return Ok(());
        };
        let mut device = lock(device);
        sections
            .iter()
            .try_for_each(|section| device.restore(section))
    }

    fn undelivered(&self) -> Option<Vec<u8>> {
        None
    }

    fn set_undelivered(&mut self, packet: Option<Vec<u8>>) -> Result<(), String> {
        packet.map_or(Ok(()), |_| Err("a packet for a disk".to_owned()))
    }

    fn dirty_log(&self) -> io::Result<Option<Box<dyn DirtyLog>>> {
        let devices = vec![Arc::clone(self.device()?) as _];
        Ok(Some(Box::new(VhostLog::new(self.memory.clone(), devices))))
    }

    fn notifier(&self) -> Option<Box<dyn Notifier>> {
        None
    }

    fn announcer(&self) -> Option<Arc<dyn Announce>> {
        None
    }

    fn heirlooms(&self) -> io::Result<Vec<DeviceFd>> {
        if self.own_state {
            let text = format!("{}: its back end has state of its own", self.name);
            return Err(io::Error::other(text));
        }
        let device = lock(self.device()?);
        let gone = || io::Error::other(format!("{}: its back end has gone", self.name));
        let socket = device.socket().ok_or_else(gone)?.try_clone_to_owned()?;
        Ok(vec![DeviceFd {
            device: self.name.clone(),
            role: ROLE.to_owned(),
            kind: FdKind::VhostUser,
            value: self.features,
            fd: socket,
        }])
    }

    fn take_over(&mut self, fds: &mut Vec<DeviceFd>) -> Result<(), DeviceError> {
        if self.device.is_some() {
            return Ok(());
        }
        let connection = claim(fds, &self.name, ROLE, FdKind::VhostUser)?;
        let refuse = |reason: String| DeviceError::BadState {
            device: self.name.clone(),
            reason,
        };
        let event = || EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK);
        // Until the first start.
        let (Ok(kick), Ok(call)) = (event(), event()) else {
            return Err(refuse("no event can be made".to_owned()));
        };
        let device = UserDevice::over(
            format!("vhost-user/{}", self.described.id),
            UnixStream::from(connection),
            &self.described.socket,
            self.memory.clone(),
            vec![Queue::new(kick, call)],
            Requests::Answered,
        )?;
        let offered = device.offered() & !F_NOT_OFFERED;
        if device.has_own_state() {
            return Err(refuse("its back end is not what it was".to_owned()));
        }
        // What it offers beyond that is not shown to the driver.
        check_features(&self.name, self.features, offered)?;
        self.config = device.config(0, CONFIG_BYTES)?;
        self.device = Some(Arc::new(Mutex::new(device)));
        Ok(())
    }
}

/// The thread that waits for the end of a back end. Ends on drop.
#[derive(Debug)]
struct Watcher {
    quit: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Watcher {
    fn start(device: &Shared, interrupt: Interrupt) -> io::Result<Self> {
        let quit = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let (quits, device) = (Arc::clone(&quit), Arc::clone(device));
        let thread = std::thread::Builder::new()
            .name("vhost-user-blk".to_owned())
            .spawn(move || watch(&device, &interrupt, &quits))?;
        Ok(Self {
            quit,
            thread: Some(thread),
        })
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        // It fails only after 2^64 of them.
        let _ = rustix::io::write(&*self.quit, &1_u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            // A panic has been reported by itself.
            let _ = thread.join();
        }
    }
}

fn watch(device: &Shared, interrupt: &Interrupt, quit: &OwnedFd) {
    loop {
        let socket = lock(device)
            .socket()
            .and_then(|socket| socket.try_clone_to_owned().ok());
        let mut fds = vec![PollFd::new(quit, PollFlags::IN)];
        if let Some(socket) = &socket {
            fds.push(PollFd::new(socket, PollFlags::RDHUP));
        }
        // While it is there, for as long as it is.
        let limit = socket.is_none().then_some(&LOOK_EVERY);
        // Interrupted: looks again.
        let _ready = poll(&mut fds, limit);
        if !fds[0].revents().is_empty() {
            return;
        }
        let mut device = lock(device);
        if device.is_alive() {
            continue;
        }
        if socket.is_some() {
            tracing::warn!(
                device = device.name(),
                "a back end has gone; waiting for the next"
            );
        }
        match device.reconnect(Lost::Refuse) {
            Ok(()) => tracing::warn!(device = device.name(), "a back end is there again"),
            Err(error @ DeviceError::Stuck { .. }) => {
                let error = &error as &dyn std::error::Error;
                tracing::error!(error, "the guest's driver has to reset it");
                interrupt.break_device();
            }
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::debug!(error, "no back end yet");
            }
        }
    }
}
