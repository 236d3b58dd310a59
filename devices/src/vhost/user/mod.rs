//! Back ends in other processes: the VMM's side of vhost-user, such as for disks of `qemu-storage-daemon`.
//!
//! A back end may die and come back at any time. What it knew is kept here: [`UserDevice::reconnect`] tells it to the next one, which
//! goes on where the last one was. Which requests that one had begun is in the region of requests under way, where the back end keeps
//! one; where it does not, see [`Lost`].
//!
//! ```no_run
//! use std::path::Path;
//!
//! use vmferry_devices::DeviceError;
//! use vmferry_devices::vhost::user::{Lost, Requests, UserDevice};
//! use vmferry_devices::vhost::{Queue, Ring, VhostMemory};
//!
//! fn disk(memory: VhostMemory, queue: Queue, ring: Ring) -> Result<UserDevice, DeviceError> {
//!     let path = Path::new("/run/disk.sock");
//!     let mut disk = UserDevice::connect("blk/0", path, memory, vec![queue], Requests::Answered)?;
//!     println!("{} sectors", u64::from_le_bytes(disk.config(0, 8)?.try_into().unwrap_or_default()));
//!     // When the guest's driver is ready:
//!     disk.set_features(disk.offered())?;
//!     disk.set_rings(&[Some(ring)])?;
//!     disk.start()?;
//!     // When disk.socket() says that the back end has gone, and again until it is back:
//!     disk.reconnect(Lost::Refuse)?;
//!     Ok(disk)
//! }
//! # fn main() {}
//! ```

mod inflight;
mod logs;
mod session;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use rustix::event::{Timespec, poll};
use serde::{Deserialize, Serialize};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vmferry_transport::wire::{DeviceSchema, Section};
use vmm_sys_util::eventfd::EventFd;

use super::check_features;
use super::kernel::F_LOG_ALL;
use super::log::LogPages;
use super::memory::VhostMemory;
use super::ring::{Queue, Ring, RingV1, VhostV1};
use crate::saved::{SavedState, decode, encode, schema_of};
use crate::{Device, DeviceError};
use inflight::Inflight;
use session::Session;

pub use session::ANSWER_DEADLINE;

/// VIRTIO_F_RING_PACKED, and VIRTIO_F_IN_ORDER.
const F_RING_PACKED: u64 = 1 << 34;
const F_IN_ORDER: u64 = 1 << 35;

/// How often used rings are looked at while the last answers are due.
const LOOK_EVERY: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 100_000,
};

/// What to do about requests that a back end had begun when it died, if it kept no region of requests under way.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Lost {
    /// Nothing: the device does not start again if there are any.
    Refuse,
    /// Give all that were not answered to the next one. Right only if the back end answers in the order of the requests, or the driver
    /// makes one at a time; otherwise an answered one is done twice and another one never.
    InOrder,
}

/// What becomes of the requests that the guest's driver has made.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Requests {
    /// All are answered in a short time, as those to a disk. To stop waits until all are: back ends should end what they have begun before
    /// they say where they are, and those of QEMU have not, and lose the answers.
    Answered,
    /// Some wait for things to come, as buffers for packets do. To stop leaves them where they are.
    Waiting,
}

/// A back end in another process.
pub struct UserDevice {
    name: String,
    path: PathBuf,
    memory: VhostMemory,
    /// What the first back end offered; the next ones must offer what the driver has accepted of it.
    offered: u64,
    features: u64,
    queues: Vec<Queue>,
    requests: Requests,
    session: Option<Session>,
    running: bool,
    /// The back end knows all but that it is to begin.
    prepared: bool,
    /// A back end may have taken requests since it was certain for the last time which were done.
    begun: bool,
    log: Option<Arc<LogPages>>,
    inflight: Option<Inflight>,
    inflight_queue_size: u16,
}

impl UserDevice {
    /// Connects to the back end that listens at `path`. `name` is unique within the VM and the same on both sides, such as `blk/0`.
    ///
    /// # Errors
    /// When nobody listens, or it is no back end for that many queues.
    pub fn connect(
        name: impl Into<String>,
        path: &Path,
        memory: VhostMemory,
        queues: Vec<Queue>,
        requests: Requests,
    ) -> Result<Self, DeviceError> {
        let name = name.into();
        let session = Session::connect(path, queues.len())
            .map_err(|error| refused(&name, &format!("connecting to {}", path.display()), error))?;
        Ok(Self::new(name, path, session, memory, queues, requests))
    }

    /// Over a connection that another process had, whose rings stand: the back end does not notice that its VMM is a new one. `path` is
    /// for [`reconnect`](Self::reconnect).
    ///
    /// # Errors
    /// When the other end is no back end for that many queues.
    pub fn over(
        name: impl Into<String>,
        connection: UnixStream,
        path: &Path,
        memory: VhostMemory,
        queues: Vec<Queue>,
        requests: Requests,
    ) -> Result<Self, DeviceError> {
        let name = name.into();
        let session = Session::over(connection, queues.len())
            .map_err(|error| refused(&name, "taking over a connection", error))?;
        Ok(Self::new(name, path, session, memory, queues, requests))
    }

    fn new(
        name: String,
        path: &Path,
        session: Session,
        memory: VhostMemory,
        queues: Vec<Queue>,
        requests: Requests,
    ) -> Self {
        Self {
            name,
            path: path.to_owned(),
            memory,
            offered: session.offered,
            features: 0,
            queues,
            requests,
            session: Some(session),
            running: false,
            prepared: false,
            begun: false,
            log: None,
            inflight: None,
            inflight_queue_size: 0,
        }
    }

    /// Features that the guest's driver may accept.
    pub fn offered(&self) -> u64 {
        let ours = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() | F_LOG_ALL | F_RING_PACKED;
        self.offered & !ours
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
        self.take_over(VhostV1 {
            features: self.features,
            rings: rings.iter().map(|ring| ring.map(RingV1::from)).collect(),
        })
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

    /// Whether the back end has state of its own to move, so that there is more to it than its rings.
    pub fn has_own_state(&self) -> bool {
        self.has(VhostUserProtocolFeatures::DEVICE_STATE)
    }

    /// The queues. Their bases are current while the device stands.
    pub fn queues(&self) -> &[Queue] {
        &self.queues
    }

    /// Whether it works, as far as is known.
    pub fn is_running(&self) -> bool {
        self.running
    }

    /// Whether there is a back end.
    pub fn is_alive(&self) -> bool {
        self.session.as_ref().is_some_and(Session::is_alive)
    }

    /// The connection, to wait for its end (POLLRDHUP); `None` after that.
    pub fn socket(&self) -> Option<BorrowedFd<'_>> {
        self.session.as_ref().map(Session::socket)
    }

    /// Whether the back end notes the requests it works on, so that none is lost or done twice when it dies.
    pub fn keeps_inflight(&self) -> bool {
        self.has(VhostUserProtocolFeatures::INFLIGHT_SHMFD)
    }

    /// Why the guest cannot move while it runs; `None` if it can.
    pub fn blocker(&self) -> Option<String> {
        let logs = self.offered & F_LOG_ALL != 0 && self.has(VhostUserProtocolFeatures::LOG_SHMFD);
        (!logs).then(|| {
            "its back end keeps no log of what it writes (VHOST_F_LOG_ALL, LOG_SHMFD), or has gone"
                .to_owned()
        })
    }

    /// `bytes` of the device's configuration space, from `offset` on.
    ///
    /// # Errors
    /// The back end's answer.
    pub fn config(&self, offset: u32, bytes: u32) -> Result<Vec<u8>, DeviceError> {
        let space = vec![0; bytes as usize];
        let flags = VhostUserConfigFlags::empty();
        let answer = self.ask("reading its configuration", |session| {
            session.ask(|frontend| frontend.get_config(offset, bytes, flags, &space))
        })?;
        Ok(answer.1)
    }

    /// Writes to the device's configuration space.
    ///
    /// # Errors
    /// The back end's answer.
    pub fn set_config(&self, offset: u32, bytes: &[u8]) -> Result<(), DeviceError> {
        let flags = VhostUserConfigFlags::WRITABLE;
        self.ask("writing its configuration", |session| {
            session.ask(|frontend| frontend.set_config(offset, flags, bytes))
        })
    }

    /// [`prepare`](Self::prepare) and [`go`](Self::go).
    ///
    /// # Errors
    /// As these.
    pub fn start(&mut self) -> Result<(), DeviceError> {
        self.prepare()?;
        self.go()
    }

    /// Tells the back end all that it must know to work on the rings, from their bases on, but not that anything waits there: its rings stay
    /// stopped, and it touches nothing. Harmless if it works already.
    ///
    /// # Errors
    /// The back end's answer, or what is wrong with the rings. The device stands then.
    pub fn prepare(&mut self) -> Result<(), DeviceError> {
        if self.running {
            return Ok(());
        }
        for queue in &self.queues {
            if let Some(ring) = &queue.ring {
                let waiting = ring.waiting(&self.memory);
                waiting.map_err(|error| refused(&self.name, "preparing it", error))?;
            }
        }
        self.tell_all()?;
        self.prepared = true;
        Ok(())
    }

    /// Lets the back end work on what it was prepared for; one that has taken the place of that is prepared first. Harmless if it works.
    /// Both sides of each ring are woken: events do not move, and one that was under way is lost.
    ///
    /// # Errors
    /// The back end's answer. It is given up then, and the device counts as working with a back end that has died:
    /// [`reconnect`](Self::reconnect).
    pub fn go(&mut self) -> Result<(), DeviceError> {
        if self.running {
            return Ok(());
        }
        self.begun = false;
        let ready = match self.prepared {
            true => Ok(()),
            false => self.prepare(),
        };
        let begun = ready.and_then(|()| self.tell_begin());
        (self.prepared, self.running) = (false, true);
        if begun.is_err() {
            // Whoever waits for its end sees one.
            if let Some(session) = self.session.take() {
                session.shut();
            }
            return begun;
        }
        self.wake()
    }

    fn wake(&self) -> Result<(), DeviceError> {
        let woken = self.queues.iter().try_for_each(Queue::wake);
        woken.map_err(|error| refused(&self.name, "waking it", error))
    }

    fn tell_all(&mut self) -> Result<(), DeviceError> {
        let table = self.memory.table_by_name();
        let table = table.map_err(|error| refused(&self.name, "sharing memory", error))?;
        self.ask("setting features and memory", |session| {
            self.tell_features(session)?;
            session.ask(|frontend| frontend.set_mem_table(&table))?;
            self.log
                .as_deref()
                .map_or(Ok(()), |log| session.set_log_base(log))
        })?;
        self.tell_inflight()?;
        self.ask("setting up rings", |session| {
            let rings = self.queues.iter().enumerate();
            for (index, queue) in rings.filter(|(_, queue)| queue.ring.is_some()) {
                self.tell_ring(session, index, queue)?;
            }
            Ok(())
        })
    }

    /// A back end begins with the event that says that something waits, enabled or not as it likes, so it is given that last. After an error
    /// nobody knows how far it has come, unless it had gone before.
    fn tell_begin(&mut self) -> Result<(), DeviceError> {
        const OP: &str = "starting rings";
        if !self.is_alive() {
            return Err(refused(&self.name, OP, gone()));
        }
        self.begun = true;
        self.ask(OP, |session| {
            let rings = self.queues.iter().enumerate();
            for (index, queue) in rings.filter(|(_, queue)| queue.ring.is_some()) {
                session.ask(|frontend| frontend.set_vring_kick(index, &queue.kick))?;
                session.ask(|frontend| frontend.set_vring_enable(index, true))?;
            }
            Ok(())
        })
    }

    fn tell_features(&self, session: &Session) -> io::Result<()> {
        let log = if self.log.is_some() { F_LOG_ALL } else { 0 };
        let ours = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() | log;
        session.ask(|frontend| frontend.set_features(self.features | ours))
    }

    fn tell_inflight(&mut self) -> Result<(), DeviceError> {
        if !self.keeps_inflight() {
            return Ok(());
        }
        let sizes = self.queues.iter().filter_map(|queue| queue.ring);
        let largest = sizes.map(|ring| ring.size).max().unwrap_or(0);
        if largest == 0 {
            return Ok(());
        }
        if self.inflight.is_none() || self.inflight_queue_size != largest {
            // Rings that are set up anew have nothing under way.
            let queues = u16::try_from(self.queues.len()).unwrap_or(u16::MAX);
            let region = self.ask("getting the region of requests under way", |session| {
                Inflight::ask(session, queues, largest)
            })?;
            self.inflight = Some(region);
            self.inflight_queue_size = largest;
        }
        self.ask("giving the region of requests under way", |session| {
            self.inflight
                .as_ref()
                .map_or(Ok(()), |inflight| inflight.give(session))
        })
    }

    fn tell_ring(&self, session: &Session, index: usize, queue: &Queue) -> io::Result<()> {
        let Some(ring) = &queue.ring else {
            return Ok(());
        };
        session.ask(|frontend| frontend.set_vring_num(index, ring.size))?;
        session.ask(|frontend| frontend.set_vring_base(index, ring.base))?;
        self.tell_ring_address(session, index, ring)?;
        session.ask(|frontend| frontend.set_vring_call(index, &queue.call))
    }

    /// The back end knows memory by the names in the table, the log by addresses of the guest.
    fn tell_ring_address(&self, session: &Session, index: usize, ring: &Ring) -> io::Result<()> {
        let table = self.memory.table_by_name()?;
        let ours = |address: u64| {
            let holds = |region: &&VhostUserMemoryRegionInfo| {
                address
                    .checked_sub(region.guest_phys_addr)
                    .is_some_and(|offset| offset < region.memory_size)
            };
            let region = table.iter().find(holds);
            region.map(|region| address - region.guest_phys_addr + region.userspace_addr)
        };
        let mut config = ring.config(self.log.is_some());
        for address in [
            &mut config.desc_table_addr,
            &mut config.avail_ring_addr,
            &mut config.used_ring_addr,
        ] {
            *address = ours(*address).ok_or(io::ErrorKind::InvalidInput)?;
        }
        session.ask(|frontend| frontend.set_vring_addr(index, &config))
    }

    /// Has the back end finish what is under way, and takes its position in the rings. Nothing is written to guest memory afterwards.
    /// The vCPUs must stand. Harmless if it stands.
    ///
    /// # Errors
    /// The back end's answer. If it has gone ([`is_alive`](Self::is_alive)), [`reconnect`](Self::reconnect) first.
    pub fn stop(&mut self) -> Result<(), DeviceError> {
        self.prepared = false;
        if !self.running {
            return Ok(());
        }
        if self.requests == Requests::Answered {
            self.wait_for_answers()?;
        }
        for index in 0..self.queues.len() {
            if self.queues[index].ring.is_none() {
                continue;
            }
            let base = self.ask("GET_VRING_BASE", |session| {
                session.ask(|frontend| frontend.get_vring_base(index))
            })?;
            if let Some(ring) = &mut self.queues[index].ring {
                // Of a split ring the position is sixteen bits.
                ring.base = (base & 0xffff) as u16;
            }
        }
        (self.running, self.begun) = (false, false);
        Ok(())
    }

    /// Waits until the driver, which makes no more, has an answer to each request. There is no message for that, but the rings are in sight.
    fn wait_for_answers(&self) -> Result<(), DeviceError> {
        let deadline = Instant::now() + ANSWER_DEADLINE;
        for ring in self.queues.iter().filter_map(|queue| queue.ring) {
            loop {
                let failed = |error| refused(&self.name, "waiting for the last answers", error);
                let base = ring.used_index(&self.memory).map_err(failed)?;
                let answered = Ring { base, ..ring };
                let open = answered.waiting(&self.memory).map_err(failed)?;
                if open == 0 {
                    break;
                }
                if Instant::now() > deadline || !self.is_alive() {
                    let reason = format!("{open} requests are not answered");
                    return Err(failed(io::Error::new(io::ErrorKind::TimedOut, reason)));
                }
                // Nothing to wait for but time.
                let _elapsed = poll(&mut [], Some(&LOOK_EVERY));
            }
        }
        Ok(())
    }

    /// Connects to the back end that has taken the place of the one that died, and has it go on if the device worked. `lost` is about
    /// requests that the dead one had begun, if it kept no region of requests under way.
    ///
    /// # Errors
    /// When there is none yet, or it offers less than the one before: try again. [`DeviceError::Stuck`] when requests are lost, and `lost`
    /// says that this must not be: the device then stands, and works again when the guest's driver has set it up anew.
    pub fn reconnect(&mut self, lost: Lost) -> Result<(), DeviceError> {
        self.session = None;
        self.prepared = false;
        let session = Session::connect(&self.path, self.queues.len())
            .map_err(|error| refused(&self.name, "connecting again", error))?;
        let missing = self.features & !session.offered;
        if missing != 0 {
            let reason = format!("the back end does not offer features {missing:#x} any more");
            return Err(refused(
                &self.name,
                "connecting again",
                io::Error::other(reason),
            ));
        }
        if !std::mem::take(&mut self.running) {
            self.session = Some(session);
            return Ok(());
        }
        // What is in doubt is what the last one had taken and not answered. Where it kept a region, that says which; the next one goes on
        // from what was answered in any case. What was made since the last one that began is not in doubt.
        let open = match std::mem::take(&mut self.begun) {
            true => self.go_back_to_answered()?,
            false => 0,
        };
        self.session = Some(session);
        let exact = self.inflight.is_some() || self.features & F_IN_ORDER != 0;
        if open > 0 && !exact && lost == Lost::Refuse {
            return Err(DeviceError::Stuck {
                device: self.name.clone(),
                reason: format!(
                    "its back end has died, and which of {open} requests it had begun is not known"
                ),
            });
        }
        let again = self.tell_all().and_then(|()| self.tell_begin());
        // It is to work, whether or not this one does.
        self.running = true;
        if again.is_err() {
            self.session = None;
            return again;
        }
        self.wake()
    }

    /// Puts the position in each ring to what was answered. Returns how many requests were not.
    fn go_back_to_answered(&mut self) -> Result<u32, DeviceError> {
        let mut open = 0;
        for queue in &mut self.queues {
            let Some(ring) = &mut queue.ring else {
                continue;
            };
            let failed = |error| refused(&self.name, "finding what was answered", error);
            ring.base = ring.used_index(&self.memory).map_err(failed)?;
            open += u32::from(ring.waiting(&self.memory).map_err(failed)?);
        }
        Ok(open)
    }

    fn has(&self, feature: VhostUserProtocolFeatures) -> bool {
        self.session
            .as_ref()
            .is_some_and(|session| session.has(feature))
    }

    fn ask<T>(
        &self,
        op: &str,
        request: impl FnOnce(&Session) -> io::Result<T>,
    ) -> Result<T, DeviceError> {
        let answer = match &self.session {
            Some(session) => request(session),
            None => Err(gone()),
        };
        answer.map_err(|error| refused(&self.name, op, error))
    }
}

/// State of a vhost-user device, as it is saved. Version 1, frozen.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct VhostUserV1 {
    /// What the VMM knows.
    pub vhost: VhostV1,
    /// What the back end alone knows; absent if it keeps nothing that is not in guest memory.
    #[serde(default, with = "serde_bytes")]
    pub back_end: Option<Vec<u8>>,
}

impl SavedState for VhostUserV1 {
    const SCHEMA: &'static str = "vhost-user";
    const VERSION: u32 = 1;
}

impl Device for UserDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn schema(&self) -> DeviceSchema {
        schema_of::<VhostUserV1>(&self.name)
    }

    fn save(&mut self) -> Result<Section, DeviceError> {
        if self.running {
            return Err(DeviceError::Vetoed {
                device: self.name.clone(),
                reason: "it still works; stop it before it is saved".to_owned(),
            });
        }
        let back_end = if self.has(VhostUserProtocolFeatures::DEVICE_STATE) {
            Some(self.ask("saving the back end's state", inflight::save)?)
        } else {
            None
        };
        let vhost = VhostV1::new(self.features, &self.queues);
        encode(&self.name, &VhostUserV1 { vhost, back_end })
    }

    fn restore(&mut self, section: &Section) -> Result<(), DeviceError> {
        if self.running {
            return Err(DeviceError::Vetoed {
                device: self.name.clone(),
                reason: "it works; state is loaded into one that stands".to_owned(),
            });
        }
        let VhostUserV1 { vhost, back_end } = decode(section)?;
        if back_end.is_some() && !self.has(VhostUserProtocolFeatures::DEVICE_STATE) {
            return Err(DeviceError::BadState {
                device: self.name.clone(),
                reason: "it comes with state of its back end, and the back end here takes none"
                    .to_owned(),
            });
        }
        self.take_over(vhost)?;
        // What is under way is nothing: the source has stopped.
        self.inflight = None;
        match back_end {
            // Here, so that one who refuses does so while the source can still run.
            Some(state) => self.ask("loading the back end's state", |session| {
                inflight::load(session, &state)
            }),
            None => Ok(()),
        }
    }
}

impl std::fmt::Debug for UserDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("UserDevice")
            .field("name", &self.name)
            .field("path", &self.path)
            .field("socket", &self.socket().map(|fd| fd.as_raw_fd()))
            .field("features", &self.features)
            .field("queues", &self.queues)
            .field("running", &self.running)
            .finish_non_exhaustive()
    }
}

fn gone() -> io::Error {
    io::Error::new(io::ErrorKind::NotConnected, "its back end has gone")
}

fn refused(device: &str, op: &str, source: io::Error) -> DeviceError {
    DeviceError::Kernel {
        device: device.to_owned(),
        op: op.to_owned(),
        source,
    }
}
