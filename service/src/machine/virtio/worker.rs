//! The thread of a device that is served by this process.
//!
//! It takes one request at a time from the rings, has it served, and puts it into the used ring before it takes the next or looks whether
//! it shall stop. So a stopped thread owes nothing. A ring that makes no sense is left alone from then on, and the driver told to reset
//! the device; the thread neither panics nor goes round in it.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::backend::{Interrupt, QueueBase, QueueStart, Start};
use crate::machine::ram::RamMemory;

/// Longest time that a request may take to end once the thread shall stop. Healthy storage answers in milliseconds.
pub const STOP_MAX: Duration = Duration::from_secs(10);
/// The driver wants no interrupts: a flag of the available ring.
const NO_INTERRUPT: u16 = 1;
/// What epoll says when the thread shall stop; queues are their place.
const STOP_TOKEN: u64 = u64::MAX;

/// A chain of descriptors as a device sees it.
pub type Chain<'a> = DescriptorChain<&'a RamMemory>;

/// A device's own part: serves requests.
pub trait Serve: Send + 'static {
    /// Serves the request in `chain` of queue `queue`. Returns how many bytes were written to its buffers. What the chain holds is the
    /// guest's: nothing of it is believed.
    fn serve(&mut self, queue: u16, chain: Chain<'_>, memory: &RamMemory) -> u32;
}

/// A running thread. Dropping it stops it as well, for lack of a better moment.
#[derive(Debug)]
pub struct Worker {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Vec<QueueBase>>>,
}

#[derive(Debug)]
struct Shared {
    phase: Mutex<Phase>,
    stopped: Condvar,
    /// Copy of `phase != Serving` that is cheap to look at after every request.
    stop: AtomicBool,
    wake: EventFd,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Phase {
    Serving,
    Stopping,
    Stopped,
}

impl Worker {
    /// Starts the thread, called `name`, on the queues of `start`.
    ///
    /// # Errors
    /// When the host refuses a thread or a descriptor.
    pub fn start(name: &str, start: Start, serve: impl Serve) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            phase: Mutex::new(Phase::Serving),
            stopped: Condvar::new(),
            stop: AtomicBool::new(false),
            wake: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
        });
        let Start {
            ram,
            features: _,
            queues,
            interrupt,
        } = start;
        let queues = queues
            .into_iter()
            .map(Served::new)
            .collect::<Result<Vec<_>, _>>()?;
        let epoll = watch(&shared.wake, &queues)?;
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
                rings.run(&of_thread, &epoll);
                rings.bases()
            })?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Stops the thread after the request that it serves, and says how far it has come.
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
        self.0.stopped.notify_all();
    }
}

impl Shared {
    fn stop_within(&self, most: Duration) -> io::Result<()> {
        let mut phase = self.lock();
        if *phase == Phase::Serving {
            self.set(&mut phase, Phase::Stopping);
        }
        self.wake.write(1)?;
        let (mut phase, _) = self
            .stopped
            .wait_timeout_while(phase, most, |phase| *phase == Phase::Stopping)
            .unwrap_or_else(PoisonError::into_inner);
        if *phase == Phase::Stopped {
            return Ok(());
        }
        self.set(&mut phase, Phase::Serving);
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

fn watch(wake: &EventFd, queues: &[Served]) -> io::Result<Epoll> {
    let epoll = Epoll::new()?;
    let add = |fd: &EventFd, token: u64| {
        epoll.ctl(
            ControlOperation::Add,
            fd.as_raw_fd(),
            EpollEvent::new(EventSet::IN, token),
        )
    };
    add(wake, STOP_TOKEN)?;
    for (token, queue) in (0..).zip(queues) {
        add(&queue.kick, token)?;
    }
    Ok(epoll)
}

/// A queue that is served.
#[derive(Debug)]
struct Served {
    index: u16,
    queue: Queue,
    kick: Arc<EventFd>,
    broken: bool,
}

impl Served {
    fn new(start: QueueStart) -> io::Result<Self> {
        let QueueStart { index, state, kick } = start;
        Ok(Self {
            index,
            queue: Queue::try_from(state).map_err(io::Error::other)?,
            kick,
            broken: false,
        })
    }
}

/// What the thread works on.
struct Rings<S> {
    memory: RamMemory,
    queues: Vec<Served>,
    interrupt: Interrupt,
    serve: S,
}

impl<S: Serve> Rings<S> {
    fn run(&mut self, shared: &Shared, epoll: &Epoll) {
        let mut events = [EpollEvent::default(); super::QUEUES_MAX + 1];
        loop {
            for place in 0..self.queues.len() {
                self.serve_queue(place, shared);
            }
            if shared.must_end() {
                return;
            }
            let ready = match epoll.wait(-1, &mut events) {
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
                let queue = usize::try_from(event.data())
                    .ok()
                    .and_then(|place| self.queues.get(place));
                let readable = queue.map_or(&shared.wake, |queue| &*queue.kick);
                // Emptied before the ring is looked at, so that no kick is lost.
                let _ = readable.read();
            }
        }
    }

    /// Serves what the ring at `place` holds, until it is empty or the thread shall stop.
    fn serve_queue(&mut self, place: usize, shared: &Shared) {
        let Some(served) = self.queues.get_mut(place) else {
            return;
        };
        while !served.broken && !shared.stop.load(Ordering::SeqCst) {
            match served.one(&self.memory, &mut self.serve) {
                Ok(false) => return,
                Ok(true) => {
                    if served.wants_interrupt(&self.memory) {
                        self.interrupt.raise();
                    }
                }
                Err(error) => {
                    let error = &error as &dyn std::error::Error;
                    tracing::debug!(error, queue = served.index, "the driver's ring is broken");
                    served.broken = true;
                    self.interrupt.break_device();
                }
            }
        }
    }

    fn bases(&self) -> Vec<QueueBase> {
        self.queues
            .iter()
            .map(|served| QueueBase {
                index: served.index,
                next_avail: served.queue.next_avail(),
                next_used: served.queue.next_used(),
            })
            .collect()
    }
}

impl Served {
    /// Serves one request; false if there is none.
    fn one(
        &mut self,
        memory: &RamMemory,
        serve: &mut impl Serve,
    ) -> Result<bool, virtio_queue::Error> {
        let Some(chain) = self.queue.iter(memory)?.next() else {
            return Ok(false);
        };
        let head = chain.head_index();
        let written = serve.serve(self.index, chain, memory);
        self.queue.add_used(memory, head, written)?;
        Ok(true)
    }

    fn wants_interrupt(&self, memory: &RamMemory) -> bool {
        let flags = memory.read_obj::<u16>(GuestAddress(self.queue.avail_ring()));
        flags.is_ok_and(|flags| u16::from_le(flags) & NO_INTERRUPT == 0)
    }
}
