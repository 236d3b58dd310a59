//! Sets of pages that several threads change at once.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::units::{PageCount, PageIndex, PageRun};

/// One bit per page of one block. Threads may change different pages at the same time, also within a word.
///
/// All accesses are relaxed: a page belongs to one thread within a round, and between rounds the barrier orders everything.
#[derive(Debug)]
pub(crate) struct PageSet {
    words: Box<[AtomicU64]>,
}

impl PageSet {
    /// No page of a block with `pages` pages.
    pub(crate) fn new(pages: PageCount) -> Self {
        let words = index(pages.0.div_ceil(64));
        Self {
            words: (0..words).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// Adds a run and returns how many of its pages were there before.
    pub(crate) fn insert(&self, run: PageRun) -> u64 {
        masks(run)
            .map(|(word, mask)| {
                let before = self.words[word].fetch_or(mask, Ordering::Relaxed);
                u64::from((before & mask).count_ones())
            })
            .sum()
    }

    /// Removes a run.
    pub(crate) fn remove(&self, run: PageRun) {
        for (word, mask) in masks(run) {
            self.words[word].fetch_and(!mask, Ordering::Relaxed);
        }
    }

    /// Removes all pages.
    pub(crate) fn clear(&self) {
        for word in &self.words {
            word.store(0, Ordering::Relaxed);
        }
    }

    /// The longest start of `run` whose pages are all in the set, or all not; and which of both.
    ///
    /// # Panics
    /// If the run is empty or outside of the block.
    pub(crate) fn first_part(&self, run: PageRun) -> (PageRun, bool) {
        let inside = self.word(run.start.0) >> (run.start.0 % 64) & 1 == 1;
        let end = self.next(run.start.0, run.end().0, !inside);
        let part = PageRun {
            count: PageCount(end - run.start.0),
            ..run
        };
        (part, inside)
    }

    /// First page in `from..end` whose membership is `inside`, or `end`.
    fn next(&self, from: u64, end: u64, inside: bool) -> u64 {
        let mut page = from;
        while page < end {
            let word = self.word(page);
            let found = (if inside { word } else { !word }) >> (page % 64);
            if found != 0 {
                return (page + u64::from(found.trailing_zeros())).min(end);
            }
            page = (page / 64 + 1) * 64;
        }
        end
    }

    fn word(&self, page: u64) -> u64 {
        self.words[index(page / 64)].load(Ordering::Relaxed)
    }
}

/// What is left of `run` after its first part; `None` if nothing is.
pub(crate) fn rest_of(run: PageRun, first: PageRun) -> Option<PageRun> {
    let count = run.count.0 - first.count.0;
    (count > 0).then(|| PageRun {
        block: run.block,
        start: PageIndex(run.start.0 + first.count.0),
        count: PageCount(count),
    })
}

/// The words that hold the run's bits, with the bits.
fn masks(run: PageRun) -> impl Iterator<Item = (usize, u64)> {
    let (start, end) = (run.start.0, run.end().0);
    (start / 64..end.div_ceil(64)).map(move |word| {
        let first = start.max(word * 64) - word * 64;
        let last = end.min((word + 1) * 64) - word * 64;
        let below = |bit: u64| if bit == 64 { u64::MAX } else { (1 << bit) - 1 };
        (index(word), below(last) & !below(first))
    })
}

/// Bitmap indices fit `usize`: the block is mapped into this process.
fn index(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::memory::extents::tests::run;

    proptest! {
        #[test]
        fn a_set_agrees_with_a_list_of_flags(
            steps in prop::collection::vec((0_u64..300, 1_u64..150, any::<bool>()), 0..30),
        ) {
            let set = PageSet::new(PageCount(450));
            let mut model = [false; 450];
            for (start, count, insert) in steps {
                let pages = &mut model[index(start)..index(start + count)];
                let before = pages.iter().filter(|&&inside| inside).count() as u64;
                pages.fill(insert);
                if insert {
                    prop_assert_eq!(set.insert(run(0, start, count)), before);
                } else {
                    set.remove(run(0, start, count));
                }
            }
            let mut left = Some(run(0, 0, 450));
            let mut last = None;
            while let Some(all) = left {
                let (part, inside) = set.first_part(all);
                prop_assert!(last != Some(inside), "parts are maximal");
                prop_assert!(model[index(part.start.0)..index(part.end().0)].iter().all(|&is| is == inside));
                last = Some(inside);
                left = rest_of(all, part);
            }
            set.clear();
            prop_assert_eq!(set.first_part(run(0, 0, 450)), (run(0, 0, 450), false));
        }
    }
}
