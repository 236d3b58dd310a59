//! The work of one round, from which the sender threads take pieces.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use super::DataError;
use crate::memory::extents::{Extents, RunSequence};
use crate::memory::zero::GuestPage;
use crate::memory::{GuestRam, WriteProtector};
use crate::units::{PAGE_SIZE, PageCount, PageIndex, PageRun, RoundId};
use crate::wire::ram::{
    PAYLOAD_BYTES_MAX, RUNS_PER_FRAME_MAX, RamRun, RamRuns, RoundCounts, RunKind,
};

/// Most pages claimed at a time, 1 MiB: larger messages gain nothing, smaller ones cost a system call each.
const CHUNK_PAGES_MAX: u64 = 256;
/// Fewest pages claimed at a time, 64 KiB, unless the bandwidth limit asks for less.
const CHUNK_PAGES_MIN: u64 = 16;
/// Chunks per connection that a round is cut into when it is small, so that all connections end at about the same time.
const CHUNKS_PER_CONNECTION: u64 = 4;
/// Most pages looked at for one frame. Bounds the time a thread spends in a region of zeros before it shows progress, and the length
/// of a zero run.
const SCANNED_PAGES_MAX: u64 = 1 << 16;
/// Under a bandwidth limit a message takes about this part of a second.
const MESSAGES_PER_SEC: u64 = 100;

// A frame ends at half a chunk of data or more, and one chunk may come on top.
const _: () = assert!(CHUNK_PAGES_MAX * 3 / 2 * PAGE_SIZE <= PAYLOAD_BYTES_MAX as u64);
const _: () = assert!(CHUNK_PAGES_MAX <= RUNS_PER_FRAME_MAX as u64);

/// What a round has to send. A page must not appear twice.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct RoundWork {
    /// Pages whose content is sent; those that turn out to be zero go without payload.
    pub runs: Vec<PageRun>,
    /// Pages that are known not to exist. They are never read.
    pub holes: Vec<PageRun>,
    /// Do not look for zero pages, send them as they are: for a guest that is known to have none.
    pub zeros_as_data: bool,
}

impl RoundWork {
    /// The work of round 0: all memory, holes as holes.
    pub fn all(extents: Extents) -> Self {
        Self {
            runs: extents.data,
            holes: extents.holes,
            zeros_as_data: false,
        }
    }
}

/// A round under way, shared by all sender threads.
pub(crate) struct Round {
    pub(crate) id: RoundId,
    pub(crate) last: bool,
    pub(crate) began: Instant,
    /// Pages that have been dealt with, holes not counted.
    pub(crate) pages_done: AtomicU64,
    protector: Option<Arc<dyn WriteProtector>>,
    runs: RunSequence,
    holes: Vec<PageRun>,
    zeros_as_data: bool,
    next_page: AtomicU64,
    next_hole: AtomicUsize,
    next_device: AtomicUsize,
    chunk_pages: u64,
    connections: u64,
    unfinished: Mutex<(usize, RoundCounts, u64)>,
}

impl Round {
    /// `protector` makes the dirty log forget each page before it is read; `None` if it has forgotten them all, or when the guest is
    /// stopped.
    pub(crate) fn new(
        id: RoundId,
        work: RoundWork,
        last: bool,
        connections: usize,
        protector: Option<Arc<dyn WriteProtector>>,
    ) -> Self {
        let runs = RunSequence::new(work.runs);
        let pieces = connections as u64 * CHUNKS_PER_CONNECTION;
        let chunk_pages = runs.pages().0.div_ceil(pieces);
        Self {
            id,
            last,
            began: Instant::now(),
            pages_done: AtomicU64::new(0),
            chunk_pages: chunk_pages.clamp(CHUNK_PAGES_MIN, CHUNK_PAGES_MAX),
            protector,
            runs,
            holes: work.holes.into_iter().flat_map(wire_sized).collect(),
            zeros_as_data: work.zeros_as_data,
            next_page: AtomicU64::new(0),
            next_hole: AtomicUsize::new(0),
            next_device: AtomicUsize::new(0),
            connections: connections as u64,
            unfinished: Mutex::new((connections, RoundCounts::default(), 0)),
        }
    }

    /// Pages to look at in this round, without holes.
    pub(crate) fn pages(&self) -> PageCount {
        self.runs.pages()
    }

    /// The next frame, from pages that nobody else has; `None` when nothing is left. `bytes_per_sec` is the bandwidth limit or 0.
    /// Also says how many pages were looked at.
    ///
    /// # Errors
    /// When the dirty log cannot be made to forget the pages.
    pub(crate) fn next_frame(
        &self,
        ram: &GuestRam,
        bytes_per_sec: u64,
    ) -> Result<Option<(RamRuns, u64)>, DataError> {
        if let Some(holes) = self.claim_holes() {
            return Ok(Some((self.frame(holes), 0)));
        }
        let mut chunk_pages = self.chunk_pages;
        if bytes_per_sec > 0 {
            let per_message = bytes_per_sec / MESSAGES_PER_SEC / self.connections / PAGE_SIZE;
            chunk_pages = chunk_pages.min(per_message.max(1));
        }
        let mut sorted = Sorted::default();
        let mut looked_at = 0;
        while sorted.data_pages < chunk_pages.div_ceil(2)
            && sorted.runs.len() as u64 + chunk_pages <= RUNS_PER_FRAME_MAX as u64
            && looked_at < SCANNED_PAGES_MAX
        {
            // Relaxed: the addition alone decides who has which pages.
            let start = self.next_page.fetch_add(chunk_pages, Ordering::Relaxed);
            if start >= self.runs.pages().0 {
                break;
            }
            let claimed: Vec<PageRun> = self.runs.slice(start, start + chunk_pages).collect();
            if let Some(protector) = &self.protector {
                protector.protect(&claimed)?;
            }
            for run in claimed {
                sorted.add(ram, run, self.zeros_as_data);
                looked_at += run.count.0;
            }
        }
        Ok((!sorted.runs.is_empty()).then(|| (self.frame(sorted.runs), looked_at)))
    }

    /// One connection has sent its end of the round. Returns the totals to the last one.
    pub(crate) fn finish(&self, counts: &RoundCounts, bytes: u64) -> Option<(RoundCounts, u64)> {
        let mut unfinished = self
            .unfinished
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let (connections, total, total_bytes) = &mut *unfinished;
        *connections -= 1;
        total.add(counts);
        *total_bytes += bytes;
        (*connections == 0).then_some((*total, *total_bytes))
    }

    /// A position in the list of devices that nobody else gets in this round; it may be beyond the end.
    pub(crate) fn claim_device(&self) -> usize {
        self.next_device.fetch_add(1, Ordering::Relaxed)
    }

    fn claim_holes(&self) -> Option<Vec<RamRun>> {
        // Looked at first, so that the counter cannot wrap however often this is called.
        if self.next_hole.load(Ordering::Relaxed) >= self.holes.len() {
            return None;
        }
        let start = self
            .next_hole
            .fetch_add(RUNS_PER_FRAME_MAX, Ordering::Relaxed);
        let end = self.holes.len().min(start + RUNS_PER_FRAME_MAX);
        let holes = self.holes.get(start..end)?.iter().map(|&pages| RamRun {
            pages,
            kind: RunKind::Hole,
        });
        (start < end).then(|| holes.collect())
    }

    fn frame(&self, runs: Vec<RamRun>) -> RamRuns {
        RamRuns {
            round: self.id,
            payload_crc: None,
            runs,
        }
    }
}

/// Pages sorted into data and zero runs.
#[derive(Debug, Default)]
struct Sorted {
    runs: Vec<RamRun>,
    data_pages: u64,
}

impl Sorted {
    fn add(&mut self, ram: &GuestRam, run: PageRun, zeros_as_data: bool) {
        let block = ram.block(run.block);
        for index in (run.start.0..run.end().0).map(PageIndex) {
            let page = block.and_then(|block| GuestPage::of(block, index));
            let kind = match page {
                Some(page) if !zeros_as_data && page.is_zero() => RunKind::Zero,
                Some(_) => RunKind::Data,
                None => panic!("{run:?} is outside of the RAM"),
            };
            self.data_pages += u64::from(kind == RunKind::Data);
            match self.runs.last_mut() {
                Some(last)
                    if last.kind == kind
                        && last.pages.block == run.block
                        && last.pages.end() == index =>
                {
                    last.pages.count.0 += 1;
                }
                _ => self.runs.push(RamRun {
                    pages: PageRun {
                        block: run.block,
                        start: index,
                        count: PageCount(1),
                    },
                    kind,
                }),
            }
        }
    }
}

/// The run in parts whose count fits the wire. Empty for an empty run.
fn wire_sized(run: PageRun) -> impl Iterator<Item = PageRun> {
    let part_max = u64::from(u32::MAX);
    (0..run.count.0.div_ceil(part_max)).map(move |part| PageRun {
        block: run.block,
        start: PageIndex(run.start.0 + part * part_max),
        count: PageCount(part_max.min(run.count.0 - part * part_max)),
    })
}
