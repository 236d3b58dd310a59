//! A device in memory that follows the kernel's rules, for tests: the real sample device has no state that changes in PRE_COPY, has
//! every feature, and fails in one way. What it can show is shown with it in the kernel lab.

use std::collections::{BTreeSet, VecDeque};
use std::fs::File;
use std::io;
use std::os::linux::fs::MetadataExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{MemfdFlags, memfd_create};

use super::device::VfioDevice;
use super::face::{Iova, PrecopyInfo, VfioFace};
use super::set::VfioSet;
use super::states::{self, DeviceState, Support};

/// What goes wrong.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Fault {
    /// The request is refused and changes nothing.
    Refused,
    /// A transition fails after its first step.
    Halfway,
    /// The request is done, and reported as failed.
    After,
    /// A transition fails and leaves the device in ERROR.
    Broken,
}

impl Fault {
    pub(super) const ALL: [Self; 4] = [Self::Refused, Self::Halfway, Self::After, Self::Broken];
}

/// All devices of a VM.
#[derive(Default)]
pub(super) struct World {
    pub(super) devices: Vec<ModelState>,
    /// Requests so far.
    pub(super) requests: usize,
    /// Which request fails, and how.
    pub(super) fault: Option<(usize, Fault)>,
    /// Which one did.
    pub(super) failed: Option<String>,
    pub(super) resets_fail: bool,
    /// The kernel does not say which state a device is in.
    pub(super) mute: bool,
}

pub(super) struct ModelState {
    pub(super) support: Support,
    pub(super) state: DeviceState,
    /// What the guest knows of the device; empty after a reset.
    pub(super) content: Vec<u8>,
    /// Whether it was in a state in which it is active.
    pub(super) was_active: bool,
    pub(super) resets: usize,
    /// Bytes of state that change with each byte read in PRE_COPY.
    pub(super) dirties: u64,
    /// The temporary end of a stream is a read of 0, and not ENOMSG.
    pub(super) ends_with_0: bool,
    pub(super) reinit: bool,
    pub(super) dma: Dma,
    knows_reinit: bool,
    session: Option<Session>,
}

/// What a device notes of its own writes.
#[derive(Clone, Debug)]
pub(super) struct Dma {
    /// Whether it can.
    pub(super) logs: bool,
    /// Whether it can say what.
    pub(super) reports: bool,
    /// Ranges it has room for.
    pub(super) ranges_max: usize,
    /// Its own page size, at least 4 KiB.
    pub(super) page_bytes: u64,
    /// The ranges, while it logs.
    pub(super) logging: Option<Vec<Iova>>,
    /// Numbers of its own pages.
    written: BTreeSet<u64>,
}

impl Dma {
    /// The device writes a byte.
    pub(super) fn write(&mut self, iova: u64) {
        let ranges = self.logging.iter().flatten();
        let mut ranges = ranges.map(|range| range.start..range.start + range.bytes);
        if ranges.any(|range| range.contains(&iova)) {
            self.written.insert(iova / self.page_bytes);
        }
    }
}

#[derive(Default)]
struct Session {
    inode: u64,
    /// Written to the device, or still to be read from it.
    bytes: VecDeque<u8>,
    /// Of `bytes`.
    initial: u64,
    sum: u64,
}

/// One device of a world.
#[derive(Clone)]
pub(super) struct Model {
    world: Arc<Mutex<World>>,
    index: usize,
}

pub(super) type SharedWorld = Arc<Mutex<World>>;

pub(super) fn lock(world: &Mutex<World>) -> MutexGuard<'_, World> {
    world.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A VM with devices called `vfio/0` and so on, which run.
pub(super) fn vm(supports: &[Support]) -> (SharedWorld, VfioSet) {
    let world = SharedWorld::default();
    for (index, support) in supports.iter().enumerate() {
        lock(&world).devices.push(ModelState {
            support: *support,
            state: DeviceState::Running,
            content: (0..200 + index).map(|at| (at * 7 + index) as u8).collect(),
            was_active: true,
            resets: 0,
            dirties: 0,
            ends_with_0: index % 2 == 1,
            reinit: false,
            dma: Dma {
                logs: false,
                reports: true,
                ranges_max: 256,
                page_bytes: 4096,
                logging: None,
                written: BTreeSet::new(),
            },
            knows_reinit: false,
            session: None,
        });
    }
    let devices = (0..supports.len()).map(|index| {
        let world = Arc::clone(&world);
        VfioDevice::new(format!("vfio/{index}"), Model { world, index })
    });
    let set = VfioSet::new(devices.collect());
    lock(&world).requests = 0;
    (world, set)
}

impl World {
    pub(super) fn states(&self) -> Vec<DeviceState> {
        self.devices.iter().map(|device| device.state).collect()
    }

    /// No device stops while another might write to it, and none begins to write while another is stopped. For devices which can all
    /// be told so, and as long as nothing has failed.
    fn check_lockstep(&self, moved: usize) {
        let together = self.devices.iter().all(|device| device.support.p2p);
        if self.failed.is_some() || !together {
            return;
        }
        let loud = |state| matches!(state, DeviceState::Running | DeviceState::PreCopy);
        let stopped = |state| matches!(state, DeviceState::Stop | DeviceState::StopCopy);
        let state = self.devices[moved].state;
        for (index, other) in self.devices.iter().enumerate() {
            let together =
                stopped(state) && loud(other.state) || loud(state) && stopped(other.state);
            assert!(
                index == moved || !together,
                "vfio/{moved} came to {state} with vfio/{index} in {}",
                other.state
            );
        }
    }
}

impl ModelState {
    fn step(&mut self, to: DeviceState) -> io::Result<Option<File>> {
        let from = std::mem::replace(&mut self.state, to);
        if from == DeviceState::Resuming {
            let session = self.session.take().unwrap_or_default();
            let written = Vec::from(session.bytes);
            let Some((body, sum)) = written.split_last_chunk::<8>() else {
                self.state = from;
                return Err(io::Error::from_raw_os_error(libc::EINVAL));
            };
            if sum_of(body) != u64::from_le_bytes(*sum) {
                self.state = from;
                return Err(io::Error::from_raw_os_error(libc::EINVAL));
            }
            self.content = body.to_vec();
        }
        if !to.is_saving() {
            self.session = None;
        }
        self.was_active |= to.is_active();
        let stream = states::opens_stream(from, to).then(|| {
            let stream = File::from(memfd_create("stream", MemfdFlags::CLOEXEC).unwrap());
            self.session = Some(Session {
                inode: stream.metadata().unwrap().st_ino(),
                ..Session::default()
            });
            stream
        });
        if let Some(session) = &mut self.session {
            match (stream.is_some(), to) {
                (true, DeviceState::PreCopy | DeviceState::PreCopyP2p) => {
                    session.give(&self.content[..50.min(self.content.len())]);
                    session.initial = session.bytes.len() as u64;
                }
                (_, DeviceState::StopCopy) => {
                    let content = self.content.clone();
                    session.give(&content);
                    let sum = session.sum.to_le_bytes();
                    session.bytes.extend(sum);
                }
                _ => {}
            }
        }
        Ok(stream)
    }
}

impl Session {
    fn give(&mut self, bytes: &[u8]) {
        self.sum = self.sum.wrapping_add(sum_of(bytes));
        self.bytes.extend(bytes);
    }
}

/// Wrong for a byte that is changed, and for one that is missing unless it is 255.
fn sum_of(bytes: &[u8]) -> u64 {
    bytes.iter().map(|byte| u64::from(*byte) + 1).sum()
}

impl Model {
    /// Counts a request; says whether it is to fail.
    fn request(&self, what: &str) -> (MutexGuard<'_, World>, Option<Fault>) {
        let mut world = lock(&self.world);
        world.requests += 1;
        let fault = match world.fault {
            Some((at, fault)) if at == world.requests => {
                world.failed = Some(format!("{what} of vfio/{}", self.index));
                Some(fault)
            }
            _ => None,
        };
        (world, fault)
    }

    fn plain(&self, what: &str) -> io::Result<MutexGuard<'_, World>> {
        match self.request(what) {
            (world, None) => Ok(world),
            (_, Some(_)) => Err(refusal()),
        }
    }

    /// The session behind `stream`, or what a device says to a stream of before.
    fn session<'a>(&self, world: &'a mut World, stream: &File) -> io::Result<&'a mut Session> {
        let inode = stream.metadata()?.st_ino();
        let session = world.devices[self.index].session.as_mut();
        session
            .filter(|session| session.inode == inode)
            .ok_or_else(|| io::Error::from_raw_os_error(libc::ENODEV))
    }
}

/// What an injected failure looks like.
pub(super) fn refusal() -> io::Error {
    io::Error::from_raw_os_error(libc::EIO)
}

impl VfioFace for Model {
    fn support(&self) -> io::Result<Option<Support>> {
        let support = self.plain("support")?.devices[self.index].support;
        Ok(Some(support))
    }

    fn state(&self) -> io::Result<DeviceState> {
        let world = self.plain("state")?;
        if world.mute {
            return Err(refusal());
        }
        if !world.devices[self.index].support.stop_copy {
            return Err(io::Error::from_raw_os_error(libc::ENOTTY));
        }
        Ok(world.devices[self.index].state)
    }

    fn set_state(&self, to: DeviceState) -> io::Result<Option<File>> {
        let (mut world, fault) = self.request(&format!("the way to {to}"));
        let device = &mut world.devices[self.index];
        let hangs = matches!(to, DeviceState::PreCopy | DeviceState::PreCopyP2p);
        assert!(
            !hangs || device.state != DeviceState::StopCopy,
            "a real kernel would never answer"
        );
        let Some(steps) = states::path(device.support, device.state, to) else {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        };
        match fault {
            Some(Fault::Refused) => return Err(refusal()),
            Some(Fault::Halfway) => {
                if let [first, _, ..] = steps[..] {
                    device.step(first)?;
                }
                return Err(refusal());
            }
            Some(Fault::Broken) => {
                device.state = DeviceState::Error;
                device.session = None;
                return Err(refusal());
            }
            Some(Fault::After) | None => {}
        }
        let mut stream = None;
        for step in steps {
            stream = world.devices[self.index].step(step)?;
            world.check_lockstep(self.index);
        }
        match fault {
            Some(_) => Err(refusal()),
            None => Ok(stream),
        }
    }

    fn stop_copy_bytes(&self) -> io::Result<Option<u64>> {
        let world = self.plain("stop_copy_bytes")?;
        Ok(Some(world.devices[self.index].content.len() as u64))
    }

    fn enable_reinit(&self) -> io::Result<bool> {
        self.plain("enable_reinit")?.devices[self.index].knows_reinit = true;
        Ok(true)
    }

    fn precopy_info(&self, stream: &File) -> io::Result<PrecopyInfo> {
        let mut world = self.plain("precopy_info")?;
        let state = world.devices[self.index].state;
        if !matches!(state, DeviceState::PreCopy | DeviceState::PreCopyP2p) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let session = self.session(&mut world, stream)?;
        let left = session.bytes.len() as u64;
        let initial_bytes = session.initial.min(left);
        let device = &mut world.devices[self.index];
        Ok(PrecopyInfo {
            initial_bytes,
            dirty_bytes: left - initial_bytes,
            // Once, as a flag that the kernel clears.
            reinit: std::mem::take(&mut device.reinit) && device.knows_reinit,
        })
    }

    fn reset(&self) -> io::Result<()> {
        let mut world = self.plain("reset")?;
        if world.resets_fail {
            return Err(refusal());
        }
        let device = &mut world.devices[self.index];
        device.state = DeviceState::Running;
        device.session = None;
        device.content.clear();
        device.resets += 1;
        Ok(())
    }

    fn logs_dma(&self) -> io::Result<bool> {
        Ok(self.plain("logs_dma")?.devices[self.index].dma.logs)
    }

    fn start_dma_logging(&self, page_bytes: u64, ranges: &[Iova]) -> io::Result<u64> {
        let mut world = self.plain("start_dma_logging")?;
        let dma = &mut world.devices[self.index].dma;
        let aligned = |range: &Iova| (range.start | range.bytes).is_multiple_of(page_bytes);
        let errno = match () {
            () if !dma.logs => libc::ENOTTY,
            () if dma.logging.is_some() => libc::EBUSY,
            () if ranges.len() > dma.ranges_max => libc::E2BIG,
            () if ranges.is_empty() || !ranges.iter().all(aligned) => libc::EINVAL,
            () => {
                dma.logging = Some(ranges.to_vec());
                dma.written.clear();
                return Ok(dma.page_bytes);
            }
        };
        Err(io::Error::from_raw_os_error(errno))
    }

    fn stop_dma_logging(&self) -> io::Result<()> {
        let mut world = self.plain("stop_dma_logging")?;
        let stopped = world.devices[self.index].dma.logging.take();
        stopped.map(drop).ok_or_else(refusal)
    }

    fn report_dma(&self, range: Iova, page_bytes: u64, words: &mut [u64]) -> io::Result<()> {
        let mut world = self.plain("report_dma")?;
        let dma = &mut world.devices[self.index].dma;
        if dma.logging.is_none() {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        if !dma.reports {
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        }
        for page in 0..range.bytes / page_bytes {
            let own = (range.start + page * page_bytes) / dma.page_bytes;
            if dma.written.contains(&own) {
                words[usize::try_from(page / 64).unwrap()] |= 1 << (page % 64);
            }
        }
        // Only pages that were reported whole are forgotten.
        let end = range.start + range.bytes;
        let page = dma.page_bytes;
        dma.written
            .retain(|own| own * page < range.start || (own + 1) * page > end);
        Ok(())
    }

    fn read_stream(&self, stream: &File, buffer: &mut [u8]) -> io::Result<usize> {
        let mut world = self.plain("read")?;
        let stopped = world.devices[self.index].state == DeviceState::StopCopy;
        let ends_with_0 = world.devices[self.index].ends_with_0;
        let dirties = world.devices[self.index].dirties;
        let session = self.session(&mut world, stream)?;
        // Devices like to give less than they are asked for.
        let count = buffer.len().min(session.bytes.len()).min(33);
        for (place, byte) in buffer.iter_mut().zip(session.bytes.drain(..count)) {
            *place = byte;
        }
        session.initial = session.initial.saturating_sub(count as u64);
        if count == 0 && !stopped && !ends_with_0 {
            return Err(io::Error::from_raw_os_error(libc::ENOMSG));
        }
        if !stopped {
            session.give(&vec![9; count * usize::try_from(dirties).unwrap()]);
        }
        Ok(count)
    }

    fn write_stream(&self, stream: &File, bytes: &[u8]) -> io::Result<usize> {
        let mut world = self.plain("write")?;
        let count = bytes.len().min(61);
        self.session(&mut world, stream)?
            .bytes
            .extend(&bytes[..count]);
        Ok(count)
    }
}
