//! The thread of a device that is served by this process.
//!
//! It takes one request at a time from the rings, has it served, and puts it into the used ring before it takes the next or looks whether
//! it shall stop. So a stopped thread owes nothing. It begins at a gate, which it passes when the guest runs here for certain: until then it
//! has everything that it needs and touches nothing. A ring that makes no sense is left alone from then on, and the driver told to reset
//! the device; the thread neither panics nor goes round in it.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::backend::{Interrupt, QueueBase, Start};
use super::ring::{Broken, Ring};
use crate::machine::ram::RamMemory;

/// Longest time that a request may take to end once the thread shall stop. Healthy storage answers in milliseconds.
pub const STOP_MAX: Duration = Duration::from_secs(10);
/// Requests of one queue that are served before another queue gets its turn.
const TURN: u32 = 256;
/// What epoll says when the thread shall stop; queues are their place.
const STOP_TOKEN: u64 = u64::MAX;
/// What it says of the device's own descriptor.
const SOURCE_TOKEN: u64 = u64::MAX - 1;

/// A device's own part: serves requests.
pub trait Serve: Send + 'static {
    /// What else may give it something to do, besides the driver. The thread looks at all queues when it becomes readable or writable.
    fn source(&self) -> Option<BorrowedFd<'_>>;

    /// The gate is open: the guest runs here from now on. Comes once, before anything else.
    fn opened(&mut self);

    /// [`source`](Self::source) has become readable or writable, or is at its end.
    fn source_is_ready(&mut self);

    /// Serves the next request of `ring`. Whatever is taken from the ring is given back or put back before this returns. What it holds is
    /// the guest's: nothing of it is believed.
    ///
    /// # Errors
    /// The ring makes no sense.
    fn serve(&mut self, ring: &mut Ring, memory: &RamMemory) -> Result<Step, Broken>;
}

/// What has become of a request.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Step {
    /// Served; there may be another one.
    Done,
    /// There is none: the driver has to make one available.
    Empty,
    /// Nothing is to be done before [`Serve::source`] is ready.
    Waiting,
}

/// A thread, before its gate or behind it. Dropping it stops it as well, for lack of a better moment.
#[derive(Debug)]
pub struct Worker {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Vec<QueueBase>>>,
}

#[derive(Debug)]
struct Shared {
    phase: Mutex<Phase>,
    changed: Condvar,
    /// Copy of `phase != Serving` that is cheap to look at after every request.
    stop: AtomicBool,
    wake: EventFd,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Phase {
    /// The gate is shut.
    Waiting,
    Serving,
    Stopping,
    Stopped,
}

impl Worker {
    /// Starts the thread, called `name`, which waits before the queues of `start`.
    ///
    /// # Errors
    /// When the host refuses a thread or a descriptor.
    pub fn prepare(name: &str, start: Start, serve: impl Serve) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            phase: Mutex::new(Phase::Waiting),
            changed: Condvar::new(),
            stop: AtomicBool::new(true),
            wake: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
        });
        let Start {
            ram,
            features,
            queues,
            interrupt,
        } = start;
        let queues = queues
            .into_iter()
            .map(|queue| Ring::new(queue, features))
            .collect::<Result<Vec<_>, _>>()?;
        let epoll = watch(&shared.wake, &queues, serve.source())?;
        let mut rings = Rings {
            memory: ram.memory().clone(),
            queues,
            interrupt,
            serve,
        };
        let of_thread = shared.clone();
        // Names of threads are cut after 15 bytes; the kernel shows them so.
        let thread = thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                // Also if it panics, so that nobody waits for it.
                let _ended = Ended(&of_thread);
                if of_thread.pass_gate() {
                    rings.serve.opened();
                    rings.run(&of_thread, &epoll);
                }
                rings.bases()
            })?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Lets the thread serve. Does nothing to one that does, or that is to end.
    pub fn open(&self) {
        self.shared.open();
    }

    /// Stops the thread after the request that it serves, and says how far it has come: nowhere, if it was not let serve.
    ///
    /// # Errors
    /// When the request does not end within [`STOP_MAX`]; the thread goes on then.
    pub fn stop(&mut self) -> io::Result<Vec<QueueBase>> {
        self.shared.stop_within(STOP_MAX)?;
        let Some(thread) = self.thread.take() else {
            return Ok(Vec::new());
        };
        thread
            .join()
            .map_err(|_| io::Error::other("the device's thread has panicked"))
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if self.thread.is_some()
            && let Err(error) = self.stop()
        {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, "a device's thread is left behind");
        }
    }
}

/// Tells whoever waits that the thread is at its end.
struct Ended<'a>(&'a Shared);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.set(&mut self.0.lock(), Phase::Stopped);
        self.0.changed.notify_all();
    }
}

impl Shared {
    fn open(&self) {
        let mut phase = self.lock();
        if *phase == Phase::Waiting {
            self.set(&mut phase, Phase::Serving);
            self.changed.notify_all();
        }
    }

    /// For the thread: waits until the gate is opened; false if it has to end instead.
    fn pass_gate(&self) -> bool {
        let mut phase = self.lock();
        loop {
            match *phase {
                Phase::Waiting => {
                    let changed = self.changed.wait(phase);
                    phase = changed.unwrap_or_else(PoisonError::into_inner);
                }
                Phase::Serving => return true,
                // Whoever stops it hears of the end of the thread.
                Phase::Stopping | Phase::Stopped => {
                    self.set(&mut phase, Phase::Stopped);
                    return false;
                }
            }
        }
    }

    fn stop_within(&self, most: Duration) -> io::Result<()> {
        let mut phase = self.lock();
        let before = *phase;
        if matches!(before, Phase::Waiting | Phase::Serving) {
            self.set(&mut phase, Phase::Stopping);
        }
        self.changed.notify_all();
        self.wake.write(1)?;
        let (mut phase, _) = self
            .changed
            .wait_timeout_while(phase, most, |phase| *phase == Phase::Stopping)
            .unwrap_or_else(PoisonError::into_inner);
        if *phase == Phase::Stopped {
            return Ok(());
        }
        self.set(&mut phase, before);
        self.changed.notify_all();
        Err(io::Error::new(
            io::ErrorKind::TimedOut,
            format!("a request has not ended for {most:?}"),
        ))
    }

    /// For the thread: whether it has to end. Nobody changes their mind after that.
    fn must_end(&self) -> bool {
        if !self.stop.load(Ordering::SeqCst) {
            return false;
        }
        let mut phase = self.lock();
        if *phase == Phase::Stopping {
            self.set(&mut phase, Phase::Stopped);
        }
        *phase == Phase::Stopped
    }

    fn set(&self, phase: &mut Phase, to: Phase) {
        *phase = to;
        self.stop.store(to != Phase::Serving, Ordering::SeqCst);
    }

    /// Only assignments are made under it.
    fn lock(&self) -> MutexGuard<'_, Phase> {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn watch(wake: &EventFd, queues: &[Ring], source: Option<BorrowedFd<'_>>) -> io::Result<Epoll> {
    let epoll = Epoll::new()?;
    let add = |fd: &dyn AsRawFd, events: EventSet, token: u64| {
        let event = EpollEvent::new(events, token);
        epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), event)
    };
    add(wake, EventSet::IN, STOP_TOKEN)?;
    for (token, queue) in (0..).zip(queues) {
        add(queue.kick(), EventSet::IN, token)?;
    }
    if let Some(source) = source {
        // Only when something changes: it may stay readable for long, with nobody to take what it has.
        let changes = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
        add(&source, changes, SOURCE_TOKEN)?;
    }
    Ok(epoll)
}

/// What the thread works on.
struct Rings<S> {
    memory: RamMemory,
    queues: Vec<Ring>,
    interrupt: Interrupt,
    serve: S,
}

impl<S: Serve> Rings<S> {
    fn run(&mut self, shared: &Shared, epoll: &Epoll) {
        let mut events = [EpollEvent::default(); super::QUEUES_MAX + 2];
        loop {
            let mut more = false;
            for place in 0..self.queues.len() {
                more |= self.serve_queue(place, shared);
            }
            if shared.must_end() {
                return;
            }
            let ready = match epoll.wait(if more { 0 } else { -1 }, &mut events) {
                Ok(ready) => ready,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                Err(error) => {
                    let error = &error as &dyn std::error::Error;
                    tracing::error!(error, "a device cannot wait for its driver");
                    self.interrupt.break_device();
                    // Whoever stops it finds it so.
                    while !shared.must_end() {
                        thread::sleep(Duration::from_millis(10));
                    }
                    return;
                }
            };
            for event in &events[..ready] {
                if event.data() == SOURCE_TOKEN {
                    self.serve.source_is_ready();
                    continue;
                }
                let queue = usize::try_from(event.data())
                    .ok()
                    .and_then(|place| self.queues.get(place));
                let readable = queue.map_or(&shared.wake, Ring::kick);
                // Emptied before the ring is looked at, so that no kick is lost.
                let _ = readable.read();
            }
        }
    }

    /// Serves what the ring at `place` holds, until there is nothing to do, its turn is over, or the thread shall stop. True if its turn is
    /// over.
    fn serve_queue(&mut self, place: usize, shared: &Shared) -> bool {
        for _ in 0..TURN {
            let Some(ring) = self.queues.get_mut(place) else {
                return false;
            };
            if ring.is_broken() || shared.stop.load(Ordering::SeqCst) {
                return false;
            }
            match step(ring, &mut self.serve, &self.memory, &self.interrupt) {
                Ok(true) => {}
                Ok(false) => return false,
                Err(error) => {
                    let error = &error as &dyn std::error::Error;
                    tracing::debug!(error, queue = ring.index(), "the driver's ring is broken");
                    ring.set_broken();
                    self.interrupt.break_device();
                }
            }
        }
        true
    }

    fn bases(&self) -> Vec<QueueBase> {
        self.queues.iter().map(Ring::base).collect()
    }
}

/// Serves one request; false if there is nothing to do.
fn step(
    ring: &mut Ring,
    serve: &mut impl Serve,
    memory: &RamMemory,
    interrupt: &Interrupt,
) -> Result<bool, Broken> {
    let step = serve.serve(ring, memory)?;
    if ring.wants_interrupt(memory)? {
        interrupt.raise();
    }
    match step {
        Step::Done => Ok(true),
        Step::Empty => ring.wants_kick(memory),
        Step::Waiting => Ok(false),
    }
}
