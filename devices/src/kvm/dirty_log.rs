//! KVM's dirty log as a [`DirtyLog`]: reports what vCPUs, and KVM on their behalf, have written.
//!
//! With [`DirtyLogMode::ManualClear`] the log begins with every bit set and nothing protected. Clearing a page's bit is what
//! write-protects it; from then on a set bit means a write. Pages are cleared by the [`WriteProtector`] just before they are read: a
//! page that the guest writes between the fetch and its turn is sent once, not twice, and the vCPUs meet the MMU lock in small helpings.
//! `fetch` only copies the bitmap.
//!
//! Holes of the file behind a block are left out: clearing them costs as much as clearing memory (10 ms/GiB where KVM shadows page
//! tables), though there is nothing to protect. A piece of memory is *armed* once the bits of its holes have been cleared, so that its
//! set bits mean memory that is to be sent. A piece that is not armed was all holes when last looked at, its bits mean nothing, and a
//! page of it has been written only if it exists by now: `fetch` asks the file. What it finds it arms, first clearing and then listing,
//! so that a page is in the list or its bit is set again.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use rustix::fs::{SeekFrom, seek};
use vmferry_transport::memory::extents::Extents;
use vmferry_transport::memory::{DirtyLog, DirtyLogError, DirtyMap, PageBitmap, WriteProtector};
use vmferry_transport::units::{BlockId, PAGE_SIZE, PageCount, PageIndex, PageRun};

use super::ioctl::{clear_dirty_log, get_dirty_log};
use super::slots::{DirtyLogMode, MemorySlots};

const NAME: &str = "kvm";
/// Words of the bitmap per KVM_CLEAR_DIRTY_LOG: 64 pages each, so 64 MiB of guest memory. Bounds how long KVM holds its MMU lock.
const WORDS_PER_CLEAR: usize = 256;
/// Words per piece that is armed at a time: 16 MiB of guest memory.
const WORDS_PER_PIECE: usize = 64;
const PIECE_PAGES: u64 = WORDS_PER_PIECE as u64 * 64;
const PIECE_BYTES: u64 = PIECE_PAGES * PAGE_SIZE;

/// KVM's log over all memory slots of a VM. Slot n is block n.
#[derive(Debug)]
pub struct KvmDirtyLog {
    slots: Arc<MemorySlots>,
    /// One per slot, kept from fetch to fetch.
    logs: Vec<SlotLog>,
    /// What existed at the start, until somebody takes it.
    extents: Option<Extents>,
}

#[derive(Debug)]
struct SlotLog {
    pages: u64,
    words: Vec<u64>,
    /// Which pieces are armed.
    armed: Vec<bool>,
}

impl KvmDirtyLog {
    /// A log over `slots`, not started. Only one may be started per VM at a time.
    pub fn new(slots: Arc<MemorySlots>) -> Self {
        let logs = slots
            .pages()
            .map(|pages| {
                let words = usize::try_from(pages.div_ceil(64)).unwrap_or(usize::MAX);
                SlotLog {
                    pages,
                    words: vec![0; words],
                    armed: vec![false; words.div_ceil(WORDS_PER_PIECE)],
                }
            })
            .collect();
        Self {
            slots,
            logs,
            extents: None,
        }
    }

    /// Arms every piece that has memory; all of them where the block has no file that could tell. A page that comes into being between
    /// the look at the file and the clearing has lost its bit, but the caller looks which pages exist after this returns.
    fn arm_everything(&mut self) -> io::Result<()> {
        let mut extents = Extents::default();
        for (slot, log) in (0_u16..).zip(&mut self.logs) {
            let Some(block) = self.slots.block(slot.into()) else {
                continue;
            };
            let mut present = PageBitmap::new(PageCount(log.pages));
            let found = Extents::of_block(BlockId(slot), block)?;
            for run in &found.data {
                present.set_range(run.start, run.count);
            }
            extents.data.extend(found.data);
            extents.holes.extend(found.holes);
            for (word, present) in log.words.iter_mut().zip(present.words()) {
                *word = !present;
            }
            for (piece, armed) in log.armed.iter_mut().enumerate() {
                let words = piece_words(piece, log.words.len());
                *armed = present.words()[words].iter().any(|present| *present != 0);
            }
            for range in log.armed_ranges() {
                if log.words[range.clone()].iter().any(|holes| *holes != 0) {
                    log.clear(&self.slots, slot.into(), range)?;
                }
            }
        }
        self.extents = Some(extents);
        Ok(())
    }

    fn fetch_slot(
        slots: &MemorySlots,
        slot: u32,
        log: &mut SlotLog,
        into: &mut PageBitmap,
    ) -> Result<(), DirtyLogError> {
        get_dirty_log(slots.vm(), slot, log.pages, &mut log.words).map_err(failed("reading"))?;
        if slots.mode() == DirtyLogMode::ManualClear
            && let Some((file, offset)) = slots.file(slot)
        {
            log.arm_new_pieces(slots, slot, file, offset, into)
                .map_err(failed("looking at new memory"))?;
        }
        into.union_words(PageIndex(0), &log.words);
        Ok(())
    }
}

impl DirtyLog for KvmDirtyLog {
    fn name(&self) -> &'static str {
        NAME
    }

    fn start(&mut self) -> Result<(), DirtyLogError> {
        let started = self
            .slots
            .set_logging(true)
            .map_err(failed("switching it on"));
        let started = started.and_then(|()| match self.slots.mode() {
            DirtyLogMode::ManualClear => self.arm_everything().map_err(failed("first clearing")),
            DirtyLogMode::GetClears => Ok(()),
        });
        if started.is_err() {
            // The first error is the one to report; what cannot be switched off only slows the guest.
            let _ = self.slots.set_logging(false);
        }
        started
    }

    /// # Panics
    /// If `into` has fewer blocks than the VM has slots.
    fn fetch(&mut self, into: &mut DirtyMap) -> Result<(), DirtyLogError> {
        for (slot, log) in (0_u16..).zip(&mut self.logs) {
            let into = into.block_mut(BlockId(slot));
            Self::fetch_slot(&self.slots, slot.into(), log, into)?;
        }
        Ok(())
    }

    fn take_extents(&mut self) -> Option<Extents> {
        self.extents.take()
    }

    fn protector(&self) -> Option<Arc<dyn WriteProtector>> {
        (self.slots.mode() == DirtyLogMode::ManualClear).then(|| {
            Arc::new(KvmProtector {
                slots: Arc::clone(&self.slots),
            }) as Arc<dyn WriteProtector>
        })
    }

    fn stop(&mut self) -> Result<(), DirtyLogError> {
        self.slots
            .set_logging(false)
            .map_err(failed("switching it off"))
    }
}

/// Clears the bits of pages, which write-protects them.
struct KvmProtector {
    slots: Arc<MemorySlots>,
}

impl WriteProtector for KvmProtector {
    fn protect(&self, runs: &[PageRun]) -> Result<(), DirtyLogError> {
        let mut rest = runs;
        while let Some(first) = rest.first() {
            let pages = self.slots.pages().nth(first.block.index()).unwrap_or(0);
            let (span, count) = clear_span(rest);
            let mut words = vec![0; span.len()];
            for run in &rest[..count] {
                set_bits(
                    &mut words,
                    run.start.0 - span.start as u64 * 64,
                    run.count.0,
                );
            }
            let first_page = span.start as u64 * 64;
            // The last word may end with the slot.
            let span_pages = (span.len() as u64 * 64).min(pages.saturating_sub(first_page));
            let span_pages = u32::try_from(span_pages)
                .map_err(|error| failed("clearing")(io::Error::other(error)))?;
            clear_dirty_log(
                self.slots.vm(),
                first.block.0.into(),
                first_page,
                span_pages,
                &words,
            )
            .map_err(failed("clearing"))?;
            rest = &rest[count..];
        }
        Ok(())
    }
}

/// The words that hold the first runs of `runs`, and how many runs these are: runs of one block, in ascending order, whose words lie
/// within one bounded clear.
fn clear_span(runs: &[PageRun]) -> (Range<usize>, usize) {
    let word = |page: u64| usize::try_from(page / 64).unwrap_or(usize::MAX);
    let first = runs[0];
    let mut span = word(first.start.0)..word(first.end().0 - 1) + 1;
    let mut count = 1;
    for run in &runs[1..] {
        let end = word(run.end().0 - 1) + 1;
        if run.block != first.block
            || run.start.0 < first.start.0
            || end - span.start > WORDS_PER_CLEAR
        {
            break;
        }
        span.end = span.end.max(end);
        count += 1;
    }
    (span, count)
}

/// Sets `count` bits from bit `start` on.
fn set_bits(words: &mut [u64], start: u64, count: u64) {
    for bit in start..start + count {
        if let Some(word) = usize::try_from(bit / 64)
            .ok()
            .and_then(|index| words.get_mut(index))
        {
            *word |= 1 << (bit % 64);
        }
    }
}

impl SlotLog {
    /// Arms the pieces that got their first memory since the last look, and marks that memory in `into`. Zeroes the words of all
    /// pieces that were not armed before: what KVM says of them means nothing.
    fn arm_new_pieces(
        &mut self,
        slots: &MemorySlots,
        slot: u32,
        file: &File,
        offset: u64,
        into: &mut PageBitmap,
    ) -> io::Result<()> {
        if self.armed.iter().all(|armed| *armed) {
            return Ok(());
        }
        let was_armed = self.armed.clone();
        mark_pieces_with_data(file, offset, &mut self.armed)?;
        for piece in (0..was_armed.len()).filter(|piece| !was_armed[*piece]) {
            let words = piece_words(piece, self.words.len());
            if self.armed[piece] {
                self.words[words.clone()].fill(u64::MAX);
                self.clear(slots, slot, words.clone())?;
            }
            self.words[words].fill(0);
        }
        // Neighbours together: the file finds the end of data by walking all of it.
        let mut piece = 0;
        while piece < was_armed.len() {
            let new = |piece: &usize| !was_armed[*piece] && self.armed[*piece];
            let end = (piece..was_armed.len())
                .find(|piece| !new(piece))
                .unwrap_or(was_armed.len());
            if piece < end {
                let pages = piece as u64 * PIECE_PAGES..(end as u64 * PIECE_PAGES).min(self.pages);
                mark_data(file, offset, pages, into)?;
            }
            piece = end + 1;
        }
        Ok(())
    }

    /// Armed pieces as ranges of words, none longer than [`WORDS_PER_CLEAR`].
    fn armed_ranges(&self) -> Vec<Range<usize>> {
        let mut ranges: Vec<Range<usize>> = Vec::new();
        for piece in (0..self.armed.len()).filter(|piece| self.armed[*piece]) {
            let words = piece_words(piece, self.words.len());
            match ranges.last_mut() {
                Some(last)
                    if last.end == words.start && words.end - last.start <= WORDS_PER_CLEAR =>
                {
                    last.end = words.end;
                }
                _ => ranges.push(words),
            }
        }
        ranges
    }

    /// Clears the pages whose bits are set in `self.words[range]`.
    fn clear(&self, slots: &MemorySlots, slot: u32, range: Range<usize>) -> io::Result<()> {
        let first = range.start as u64 * 64;
        // The last piece ends with the slot, which need not be a whole word.
        let count = (range.len() as u64 * 64).min(self.pages.saturating_sub(first));
        let count = u32::try_from(count).map_err(io::Error::other)?;
        clear_dirty_log(slots.vm(), slot, first, count, &self.words[range])
    }
}

/// Words of `piece` in a bitmap of `words` words.
fn piece_words(piece: usize, words: usize) -> Range<usize> {
    let start = piece * WORDS_PER_PIECE;
    start..words.min(start + WORDS_PER_PIECE)
}

/// Sets the flag of every piece that has memory, among those whose flag is not set. The block begins at `offset` of `file`.
fn mark_pieces_with_data(file: &File, offset: u64, pieces: &mut [bool]) -> io::Result<()> {
    let mut piece = 0;
    while let Some(unmarked) = pieces[piece..].iter().position(|marked| !marked) {
        let from = offset + (piece + unmarked) as u64 * PIECE_BYTES;
        let Some(data) = next_data(file, from)? else {
            return Ok(());
        };
        let found = usize::try_from((data - offset) / PIECE_BYTES).unwrap_or(usize::MAX);
        let Some(marked) = pieces.get_mut(found) else {
            return Ok(());
        };
        *marked = true;
        piece = found + 1;
    }
    Ok(())
}

/// Marks all pages of `pages` that exist. The block begins at `offset` of `file`.
fn mark_data(file: &File, offset: u64, pages: Range<u64>, into: &mut PageBitmap) -> io::Result<()> {
    let mut at = offset + pages.start * PAGE_SIZE;
    let end = offset + pages.end * PAGE_SIZE;
    while let Some(data) = next_data(file, at)?.filter(|data| *data < end) {
        let hole = seek(file, SeekFrom::Hole(data))?.clamp(data + 1, end);
        let first = (data - offset) / PAGE_SIZE;
        let pages = (hole - offset).div_ceil(PAGE_SIZE) - first;
        into.set_range(PageIndex(first), PageCount(pages));
        at = hole;
    }
    Ok(())
}

/// First byte at or after `from` that the file has memory for. The file's position moves, which nobody uses.
fn next_data(file: &File, from: u64) -> io::Result<Option<u64>> {
    match seek(file, SeekFrom::Data(from)) {
        Ok(at) => Ok(Some(at)),
        Err(rustix::io::Errno::NXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn failed(op: &'static str) -> impl Fn(io::Error) -> DirtyLogError {
    move |source| DirtyLogError {
        log: NAME,
        op,
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, memfd_create};
    use std::os::unix::fs::FileExt;

    fn run(block: u16, start: u64, count: u64) -> PageRun {
        PageRun {
            block: BlockId(block),
            start: PageIndex(start),
            count: PageCount(count),
        }
    }

    #[test]
    fn runs_are_cleared_together_within_a_block_and_a_bounded_span() {
        let far = WORDS_PER_CLEAR as u64 * 64;
        let runs = [
            run(0, 70, 3),
            run(0, 200, 60),
            run(0, 64 + far, 1),
            run(1, 64 + far, 1),
        ];
        assert_eq!(clear_span(&runs), (1..5, 2));
        assert_eq!(
            clear_span(&runs[2..]),
            (1 + WORDS_PER_CLEAR..2 + WORDS_PER_CLEAR, 1)
        );
        let mut words = [0; 4];
        set_bits(&mut words, 6, 3);
        set_bits(&mut words, 136, 60);
        assert_eq!(words, [0b111 << 6, 0, !0xff, 0b1111]);
    }

    #[test]
    fn armed_pieces_are_cleared_in_bounded_ranges() {
        let mut log = SlotLog {
            pages: 0,
            words: vec![0; 10 * WORDS_PER_PIECE - 5],
            armed: vec![true; 10],
        };
        log.armed[1] = false;
        let end = log.words.len();
        assert_eq!(log.armed_ranges(), [0..64, 128..384, 384..end]);
    }

    #[test]
    fn pieces_and_pages_with_memory_are_found_and_holes_are_not() {
        let file = File::from(memfd_create("pieces", MemfdFlags::CLOEXEC).unwrap());
        let offset = 2 * PIECE_BYTES;
        file.set_len(offset + 6 * PIECE_BYTES).unwrap();
        let write = |piece: u64, page: u64| {
            file.write_all_at(&[1], offset + piece * PIECE_BYTES + page * PAGE_SIZE)
                .unwrap();
        };
        write(1, 7);
        write(4, 0);
        write(4, 1);
        write(4, 4095);
        let mut pieces = [false, false, false, true, false, false];
        mark_pieces_with_data(&file, offset, &mut pieces).unwrap();
        assert_eq!(pieces, [false, true, false, true, true, false]);

        let mut map = PageBitmap::new(PageCount(6 * 4096));
        mark_data(&file, offset, 4 * PIECE_PAGES..5 * PIECE_PAGES, &mut map).unwrap();
        let found: Vec<_> = map
            .runs(BlockId(0))
            .map(|run| (run.start.0, run.count.0))
            .collect();
        assert_eq!(found, [(4 * 4096, 2), (5 * 4096 - 1, 1)]);
    }
}
