//! KVM's dirty log as a [`DirtyLog`]: reports what vCPUs, and KVM on their behalf, have written.
//!
//! With [`DirtyLogMode::ManualClear`] the log begins with every bit set and nothing protected. `start` clears all of it, which
//! write-protects what the guest has mapped, in pieces so that vCPUs that fault meanwhile are not kept waiting for all memory. From
//! then on a set bit means a write after `start`. `fetch` copies the bitmap and clears just the words that have bits; a write that
//! comes between the two is in the copy already, and a write after the clear sets its bit anew, so the caller may read the pages
//! once `fetch` has returned.

use std::io;
use std::sync::Arc;

use vmferry_transport::memory::{DirtyLog, DirtyLogError, DirtyMap};
use vmferry_transport::units::{BlockId, PageIndex};

use super::ioctl::{clear_dirty_log, get_dirty_log};
use super::slots::{DirtyLogMode, MemorySlots};

const NAME: &str = "kvm";
/// Words of the bitmap per KVM_CLEAR_DIRTY_LOG: 64 pages each, so 64 MiB of guest memory. Bounds how long KVM holds its MMU lock.
const WORDS_PER_CLEAR: usize = 256;

/// KVM's log over all memory slots of a VM. Slot n is block n.
#[derive(Debug)]
pub struct KvmDirtyLog {
    slots: Arc<MemorySlots>,
    /// One bitmap per slot, kept from fetch to fetch.
    words: Vec<Vec<u64>>,
}

impl KvmDirtyLog {
    /// A log over `slots`, not started. Only one may be started per VM at a time.
    pub fn new(slots: Arc<MemorySlots>) -> Self {
        let words = slots
            .pages()
            .map(|pages| vec![0; usize::try_from(pages.div_ceil(64)).unwrap_or(usize::MAX)])
            .collect();
        Self { slots, words }
    }

    fn clear_everything(&mut self) -> io::Result<()> {
        for ((slot, words), pages) in (0..).zip(&mut self.words).zip(self.slots.pages()) {
            words.fill(u64::MAX);
            for at in (0..words.len()).step_by(WORDS_PER_CLEAR) {
                let end = words.len().min(at + WORDS_PER_CLEAR);
                clear_words(&self.slots, slot, pages, words, at..end)?;
            }
        }
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
            DirtyLogMode::ManualClear => self.clear_everything().map_err(failed("first clearing")),
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
        for ((slot, words), pages) in (0_u16..).zip(&mut self.words).zip(self.slots.pages()) {
            get_dirty_log(self.slots.vm(), slot.into(), pages, words).map_err(failed("reading"))?;
            if self.slots.mode() == DirtyLogMode::ManualClear {
                for range in dirty_ranges(words) {
                    clear_words(&self.slots, slot.into(), pages, words, range)
                        .map_err(failed("clearing"))?;
                }
            }
            into.block_mut(BlockId(slot))
                .union_words(PageIndex(0), words);
        }
        Ok(())
    }

    fn stop(&mut self) -> Result<(), DirtyLogError> {
        self.slots
            .set_logging(false)
            .map_err(failed("switching it off"))
    }
}

/// Clears the pages whose bits are set in `words[range]`.
fn clear_words(
    slots: &MemorySlots,
    slot: u32,
    pages: u64,
    words: &[u64],
    range: std::ops::Range<usize>,
) -> io::Result<()> {
    let first = range.start as u64 * 64;
    // The last piece ends with the slot, which need not be a whole word.
    let count = (range.len() as u64 * 64).min(pages.saturating_sub(first));
    let count = u32::try_from(count).map_err(io::Error::other)?;
    clear_dirty_log(slots.vm(), slot, first, count, &words[range])
}

/// Ranges of words to clear: none longer than [`WORDS_PER_CLEAR`], each from its first word with bits to its last.
fn dirty_ranges(words: &[u64]) -> impl Iterator<Item = std::ops::Range<usize>> {
    words
        .chunks(WORDS_PER_CLEAR)
        .enumerate()
        .filter_map(|(index, chunk)| {
            let first = chunk.iter().position(|word| *word != 0)?;
            let last = chunk.iter().rposition(|word| *word != 0)?;
            let base = index * WORDS_PER_CLEAR;
            Some(base + first..base + last + 1)
        })
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

    #[test]
    fn ranges_cover_all_set_words_and_stay_within_their_piece() {
        let mut words = vec![0; 1000];
        for at in [3, 200, 255, 256, 999] {
            words[at] = 1;
        }
        let ranges: Vec<_> = dirty_ranges(&words).collect();
        assert_eq!(ranges, [3..256, 256..257, 999..1000]);
        assert_eq!(dirty_ranges(&[0; 300]).count(), 0);
    }
}
