//! The source's half of the data path.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, mpsc};
use std::thread::JoinHandle;

use super::DataError;
use super::config::SenderConfig;
use super::device::{DeviceSource, StreamedDevice, Streams};
use super::link::ZeroCopyCounts;
use super::sending;
use super::sockets::Sockets;
use super::work::{Round, RoundWork};
use crate::memory::{GuestRam, WriteProtector};
use crate::units::RoundId;
use crate::wire::ram::RoundCounts;

/// What a sender tells the engine. Called on a data thread: hand it over and return.
#[derive(Debug)]
#[non_exhaustive]
pub enum SenderEvent {
    /// The kernel has taken all bytes of the round, on all connections.
    RoundSent {
        /// Which round.
        round: RoundId,
        /// What it contained.
        stats: RoundStats,
    },
    /// A connection failed and all of them were ended. Comes at most once, and not after `abort`.
    Failed {
        /// Which connection failed first.
        connection: usize,
        /// Why.
        error: DataError,
    },
}

/// A round that has been sent.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct RoundStats {
    /// Pages and frames of all connections.
    pub counts: RoundCounts,
    /// Bytes on the wire, headers included.
    pub wire_bytes: u64,
    /// From `send_round` to the last byte, in microseconds.
    pub duration_us: u64,
}

/// How far a sender is.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct SenderProgress {
    /// Bytes that each connection put on the wire so far, headers included.
    pub connection_bytes: Vec<u64>,
    /// The round queued last.
    pub round: RoundId,
    /// Pages of this round that have been dealt with, as data or as zero.
    pub round_pages_done: u64,
    /// Pages of this round in all. Holes are not counted.
    pub round_pages: u64,
    /// Bytes of device streams, in complete rounds of each connection.
    pub device_bytes: u64,
    /// Zero-copy sends, and those for which it was in vain.
    pub zero_copy: ZeroCopyCounts,
}

impl SenderProgress {
    /// Bytes on the wire on all connections.
    pub fn wire_bytes(&self) -> u64 {
        self.connection_bytes.iter().sum()
    }

    /// Pages of this round that have not been dealt with.
    pub fn round_pages_remaining(&self) -> u64 {
        self.round_pages.saturating_sub(self.round_pages_done)
    }
}

/// What a sender did in its life.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct SenderTotals {
    /// Pages and frames.
    pub counts: RoundCounts,
    /// Bytes on the wire, headers included.
    pub wire_bytes: u64,
    /// Zero-copy sends, and those for which it was in vain.
    pub zero_copy: ZeroCopyCounts,
}

/// Sends rounds over connected sockets, one thread each. Dropping it aborts.
pub struct DataSender {
    shared: Arc<Shared>,
    commands: Vec<mpsc::Sender<Command>>,
    threads: Vec<JoinHandle<()>>,
    /// The round queued last. Only the engine's calls lock it, never a data thread.
    newest: Mutex<Option<Arc<Round>>>,
    protector: Mutex<Option<Arc<dyn WriteProtector>>>,
}

/// What the engine and all threads see.
pub(super) struct Shared {
    pub(super) sockets: Sockets,
    pub(super) ram: GuestRam,
    /// Set before the first round or not at all.
    devices: OnceLock<Streams<dyn DeviceSource>>,
    pub(super) config: SenderConfig,
    pub(super) events: Arc<dyn Fn(SenderEvent) + Send + Sync>,
    pub(super) progress: Counters,
}

/// Counters behind [`SenderProgress`] and [`SenderTotals`]; relaxed, because nothing depends on their order.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) frames: AtomicU64,
    pub(super) data_pages: AtomicU64,
    pub(super) zero_pages: AtomicU64,
    pub(super) hole_pages: AtomicU64,
    pub(super) device_bytes: AtomicU64,
    pub(super) zero_copy_sends: AtomicU64,
    pub(super) zero_copy_fallbacks: AtomicU64,
}

/// What a thread is told.
pub(super) enum Command {
    Send(Arc<Round>),
    Stop,
}

impl DataSender {
    /// Starts one thread per socket. The sockets must be connected and past their hello; the first round must be 0.
    ///
    /// # Errors
    /// When there is no socket, a socket cannot be set up, or a thread cannot be started.
    pub fn start(
        sockets: Vec<OwnedFd>,
        ram: GuestRam,
        config: SenderConfig,
        events: Arc<dyn Fn(SenderEvent) + Send + Sync>,
    ) -> io::Result<Self> {
        let mut sender = Self {
            shared: Arc::new(Shared {
                sockets: Sockets::new(sockets)?,
                ram,
                devices: OnceLock::new(),
                config,
                events,
                progress: Counters::default(),
            }),
            commands: Vec::new(),
            threads: Vec::new(),
            newest: Mutex::new(None),
            protector: Mutex::new(None),
        };
        for connection in 0..sender.shared.sockets.len() {
            let (commands, received) = mpsc::channel();
            let shared = Arc::clone(&sender.shared);
            let thread = std::thread::Builder::new()
                .name(format!("send-{connection}"))
                .spawn(move || sending::run(&shared, connection, &received))?;
            sender.commands.push(commands);
            sender.threads.push(thread);
        }
        Ok(sender)
    }

    /// These devices are read in every round. Counts before the first round, and once: they have no stream before the dirty log runs,
    /// which may be later than the connections.
    pub fn set_devices(&self, devices: Vec<StreamedDevice<dyn DeviceSource>>) {
        let unset = self.shared.devices.set(Streams::new(devices));
        debug_assert!(unset.is_ok(), "devices are set once");
    }

    /// From now on pages are protected with `protector` just before they are read, see
    /// [`DirtyLog::protector`](crate::memory::DirtyLog::protector).
    pub fn set_protector(&self, protector: Option<Arc<dyn WriteProtector>>) {
        *self
            .protector
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = protector;
    }

    /// Queues a round and returns at once. Rounds count up from 0; none may follow the `last` one. [`SenderEvent::RoundSent`] tells
    /// when it is out.
    ///
    /// # Panics
    /// Not here, but the threads fail with [`DataError::Panic`] if a run lies outside of the RAM.
    pub fn send_round(&self, round: RoundId, work: RoundWork, last: bool) {
        // A guest that is stopped for the last round writes nothing that would have to be noticed.
        let protector = self
            .protector
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let protector = protector.clone().filter(|_| !last);
        let round = Arc::new(Round::new(
            round,
            work,
            last,
            self.commands.len(),
            protector,
        ));
        *self.newest.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&round));
        for commands in &self.commands {
            // A thread that has ended has reported why, or was told to.
            let _ = commands.send(Command::Send(Arc::clone(&round)));
        }
    }

    /// How far it is. Does not wait for the data threads.
    pub fn progress(&self) -> SenderProgress {
        let newest = self.newest.lock().unwrap_or_else(PoisonError::into_inner);
        let newest = newest.as_deref();
        SenderProgress {
            connection_bytes: self.shared.sockets.bytes(),
            round: newest.map(|round| round.id).unwrap_or_default(),
            round_pages_done: newest.map_or(0, |round| round.pages_done.load(Ordering::Relaxed)),
            round_pages: newest.map_or(0, |round| round.pages().0),
            device_bytes: self.shared.progress.device_bytes.load(Ordering::Relaxed),
            zero_copy: self.shared.progress.zero_copy(),
        }
    }

    /// Ends all connections at once, whatever they do. No event comes from now on, except one that is being delivered.
    pub fn abort(&self) {
        self.shared.sockets.stop();
        self.shared.config.bandwidth.wake();
        for commands in &self.commands {
            let _ = commands.send(Command::Stop);
        }
    }

    /// Waits until all queued rounds are out, or until all threads have ended after a failure or an abort. Blocks.
    pub fn join(mut self) -> SenderTotals {
        self.end()
    }

    fn end(&mut self) -> SenderTotals {
        // Without a sender the threads end when their queue is empty.
        self.commands.clear();
        for thread in self.threads.drain(..) {
            // Threads catch their panics, so there is nothing to learn here.
            let _ = thread.join();
        }
        let counters = &self.shared.progress;
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        SenderTotals {
            counts: RoundCounts {
                frames: load(&counters.frames),
                data_pages: load(&counters.data_pages),
                zero_pages: load(&counters.zero_pages),
                hole_pages: load(&counters.hole_pages),
                device_bytes: load(&counters.device_bytes),
            },
            wire_bytes: self.shared.sockets.bytes().iter().sum(),
            zero_copy: counters.zero_copy(),
        }
    }
}

impl Drop for DataSender {
    fn drop(&mut self) {
        if !self.threads.is_empty() {
            self.abort();
            self.end();
        }
    }
}

impl std::fmt::Debug for DataSender {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DataSender")
            .field("progress", &self.progress())
            .finish_non_exhaustive()
    }
}

impl Shared {
    /// The device streams, if there are any.
    pub(super) fn devices(&self) -> Option<&Streams<dyn DeviceSource>> {
        self.devices.get()
    }

    /// A connection failed: ends all, and tells the engine if nobody did before.
    pub(super) fn fail(&self, connection: usize, error: DataError) {
        if self.sockets.stop() {
            self.config.bandwidth.wake();
            (self.events)(SenderEvent::Failed { connection, error });
        }
    }
}

impl Counters {
    fn zero_copy(&self) -> ZeroCopyCounts {
        ZeroCopyCounts {
            sends: self.zero_copy_sends.load(Ordering::Relaxed),
            fallbacks: self.zero_copy_fallbacks.load(Ordering::Relaxed),
        }
    }
}
