//! The target's half of the data path.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;

use super::barrier::RoundBarrier;
use super::config::ReceiverConfig;
use super::device::{DeviceSink, StreamedDevice, Streams};
use super::page_set::PageSet;
use super::placement::Placement;
use super::sockets::Sockets;
use super::{DataError, receiving};
use crate::memory::{GuestRam, RamBlock};
use crate::units::{PageCount, PageRun, RoundId};
use crate::wire::WireError;
use crate::wire::ram::{RoundCounts, RoundEnd};

/// What a receiver tells the engine. Called on a data thread: hand it over and return.
#[derive(Debug)]
#[non_exhaustive]
pub enum ReceiverEvent {
    /// All connections have ended the round and all its pages are in place.
    RoundReceived {
        /// Which round.
        round: RoundId,
        /// No other follows.
        last: bool,
        /// Pages and frames of the round on all connections.
        counts: RoundCounts,
    },
    /// A connection failed and all of them were ended. Comes at most once, and not after `abort`.
    Failed {
        /// Which connection failed first.
        connection: usize,
        /// Why.
        error: DataError,
    },
}

/// How far a receiver is.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct ReceiverProgress {
    /// Bytes that came on each connection so far, headers included.
    pub connection_bytes: Vec<u64>,
    /// Rounds that are complete.
    pub rounds: u64,
    /// What was in them.
    pub counts: RoundCounts,
}

/// What a receiver did in its life.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct ReceiverTotals {
    /// Pages and frames of all complete rounds.
    pub counts: RoundCounts,
    /// Bytes on the wire, headers included.
    pub wire_bytes: u64,
    /// Rounds that are complete.
    pub rounds: u64,
}

/// Receives rounds over connected sockets into guest RAM, one thread each. Dropping it aborts.
pub struct DataReceiver {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

/// What the engine and all threads see.
pub(super) struct Shared {
    pub(super) sockets: Sockets,
    pub(super) ram: GuestRam,
    pub(super) devices: Streams<dyn DeviceSink>,
    pub(super) block_pages: Vec<PageCount>,
    pub(super) config: ReceiverConfig,
    pub(super) barrier: RoundBarrier,
    events: Arc<dyn Fn(ReceiverEvent) + Send + Sync>,
    /// Made by the first thread, because looking through large RAM takes its time.
    placement: OnceLock<io::Result<Placement>>,
    /// Pages that came in this round.
    covered: Vec<PageSet>,
    covered_pages: AtomicU64,
    totals: Mutex<ReceiverTotals>,
}

impl DataReceiver {
    /// Starts one thread per socket. The sockets must be connected and past their hello. Nothing else may touch the RAM or the `devices`
    /// until the last round is in.
    ///
    /// # Errors
    /// When there is no socket, a socket cannot be set up, or a thread cannot be started.
    pub fn start(
        sockets: Vec<OwnedFd>,
        ram: GuestRam,
        devices: Vec<StreamedDevice<dyn DeviceSink>>,
        config: ReceiverConfig,
        events: Arc<dyn Fn(ReceiverEvent) + Send + Sync>,
    ) -> io::Result<Self> {
        let sockets = Sockets::new(sockets)?;
        let block_pages: Vec<_> = ram.blocks().iter().map(RamBlock::pages).collect();
        let shared = Arc::new(Shared {
            barrier: RoundBarrier::new(sockets.len()),
            sockets,
            covered: block_pages.iter().copied().map(PageSet::new).collect(),
            covered_pages: AtomicU64::new(0),
            block_pages,
            ram,
            devices: Streams::new(devices),
            config,
            events,
            placement: OnceLock::new(),
            totals: Mutex::default(),
        });
        let mut receiver = Self {
            shared,
            threads: Vec::new(),
        };
        for connection in 0..receiver.shared.sockets.len() {
            let shared = Arc::clone(&receiver.shared);
            let thread = std::thread::Builder::new()
                .name(format!("receive-{connection}"))
                .spawn(move || receiving::run(&shared, connection))?;
            receiver.threads.push(thread);
        }
        Ok(receiver)
    }

    /// How far it is. Does not wait for the data threads, except for the moment in which one adds a round to the totals.
    pub fn progress(&self) -> ReceiverProgress {
        let totals = self.shared.totals();
        ReceiverProgress {
            connection_bytes: self.shared.sockets.bytes(),
            rounds: totals.rounds,
            counts: totals.counts,
        }
    }

    /// Ends all connections at once, whatever they do. No event comes from now on, except one that is being delivered.
    pub fn abort(&self) {
        self.shared.stop();
    }

    /// Waits until the last round is in, or until all threads have ended after a failure or an abort. Blocks.
    pub fn join(mut self) -> ReceiverTotals {
        self.end()
    }

    fn end(&mut self) -> ReceiverTotals {
        for thread in self.threads.drain(..) {
            // Threads catch their panics, so there is nothing to learn here.
            let _ = thread.join();
        }
        ReceiverTotals {
            wire_bytes: self.shared.sockets.bytes().iter().sum(),
            ..self.shared.totals()
        }
    }
}

impl Drop for DataReceiver {
    fn drop(&mut self) {
        if !self.threads.is_empty() {
            self.abort();
            self.end();
        }
    }
}

impl std::fmt::Debug for DataReceiver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DataReceiver")
            .field("progress", &self.progress())
            .finish_non_exhaustive()
    }
}

impl Shared {
    /// Where pages go. The first thread to ask finds out; the others wait for it.
    pub(super) fn placement(&self) -> Result<&Placement, DataError> {
        let placement = self
            .placement
            .get_or_init(|| Placement::new(self.ram.clone()));
        placement.as_ref().map_err(|error| DataError::Memory {
            op: "looking for populated pages",
            source: io::Error::new(error.kind(), error.to_string()),
        })
    }

    /// Notes that a run came in this round.
    ///
    /// # Errors
    /// When some of it came before.
    pub(super) fn cover(&self, run: PageRun) -> Result<(), WireError> {
        if self.covered[run.block.index()].insert(run) > 0 {
            return Err(WireError::PagesTwice {
                block: run.block.0,
                start: run.start.0,
                count: run.count.0,
            });
        }
        self.covered_pages.fetch_add(run.count.0, Ordering::Relaxed);
        Ok(())
    }

    /// All connections have ended the round: checks that nothing is missing, tells the engine, and prepares for the next.
    pub(super) fn complete(&self, end: &RoundEnd, counts: RoundCounts) -> Result<(), DataError> {
        // The barrier's lock orders the other threads' additions before this.
        let covered = self.covered_pages.swap(0, Ordering::Relaxed);
        let all = self.ram.pages().0;
        if end.round.0 == 0 && covered != all {
            return Err(DataError::Peer(WireError::PagesMissing {
                count: all - covered,
            }));
        }
        if end.last {
            self.devices.check_ended()?;
        }
        self.covered.iter().for_each(PageSet::clear);
        let mut totals = self.totals.lock().unwrap_or_else(PoisonError::into_inner);
        totals.counts.add(&counts);
        totals.rounds += 1;
        drop(totals);
        if !self.sockets.is_stopped() {
            (self.events)(ReceiverEvent::RoundReceived {
                round: end.round,
                last: end.last,
                counts,
            });
        }
        Ok(())
    }

    /// A connection failed: ends all, and tells the engine if nobody did before.
    pub(super) fn fail(&self, connection: usize, error: DataError) {
        if self.stop() {
            (self.events)(ReceiverEvent::Failed { connection, error });
        }
    }

    fn stop(&self) -> bool {
        let first = self.sockets.stop();
        self.barrier.stop();
        first
    }

    fn totals(&self) -> ReceiverTotals {
        *self.totals.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
