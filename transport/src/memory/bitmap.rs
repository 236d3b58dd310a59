//! Dirty bitmaps: one bit per 4 KiB page, one bitmap per RAM block.

use crate::units::{BlockId, PageCount, PageIndex, PageRun};

/// One bit per page of one block, in 64-bit words, least significant bit first: the layout of `KVM_GET_DIRTY_LOG`.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct PageBitmap {
    words: Vec<u64>,
    pages: u64,
}

impl PageBitmap {
    /// All pages clean.
    pub fn new(pages: PageCount) -> Self {
        Self {
            words: vec![0; usize_of(pages.0.div_ceil(64))],
            pages: pages.0,
        }
    }

    /// Number of pages the bitmap covers.
    pub fn len(&self) -> PageCount {
        PageCount(self.pages)
    }

    /// Whether the bitmap covers no page at all.
    pub fn is_empty(&self) -> bool {
        self.pages == 0
    }

    /// The words; bits past the last page are zero.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Marks one page. Pages past the end are ignored.
    pub fn set(&mut self, page: PageIndex) {
        if page.0 < self.pages {
            self.words[usize_of(page.0 / 64)] |= 1 << (page.0 % 64);
        }
    }

    /// Whether `page` is marked.
    pub fn contains(&self, page: PageIndex) -> bool {
        page.0 < self.pages && self.words[usize_of(page.0 / 64)] >> (page.0 % 64) & 1 == 1
    }

    /// Marks `count` pages from `start` on; what lies past the end is ignored.
    pub fn set_range(&mut self, start: PageIndex, count: PageCount) {
        let end = start.0.saturating_add(count.0).min(self.pages);
        let mut page = start.0;
        while page < end {
            let bit = page % 64;
            let in_word = (64 - bit).min(end - page);
            let mask = if in_word == 64 {
                u64::MAX
            } else {
                ((1 << in_word) - 1) << bit
            };
            self.words[usize_of(page / 64)] |= mask;
            page += in_word;
        }
    }

    /// Marks all pages whose bit is set in `words`, which starts at page `first` (a multiple of 64).
    ///
    /// # Panics
    /// If `first` is not a multiple of 64.
    pub fn union_words(&mut self, first: PageIndex, words: &[u64]) {
        assert_eq!(first.0 % 64, 0, "a union of words starts at a word");
        let at = usize_of(first.0 / 64);
        let Some(ours) = self.words.get_mut(at..) else {
            return;
        };
        for (our, their) in ours.iter_mut().zip(words) {
            *our |= their;
        }
        self.trim();
    }

    /// Marks all pages that are marked in `other`.
    pub fn union(&mut self, other: &Self) {
        self.union_words(PageIndex(0), &other.words);
    }

    /// Unmarks everything.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// Number of marked pages.
    pub fn count(&self) -> PageCount {
        PageCount(
            self.words
                .iter()
                .map(|word| u64::from(word.count_ones()))
                .sum(),
        )
    }

    /// The marked pages as maximal runs, in ascending order. Works on whole words, so long runs cost one step per 64 pages.
    pub fn runs(&self, block: BlockId) -> Runs<'_> {
        Runs {
            bitmap: self,
            block,
            page: 0,
        }
    }

    fn trim(&mut self) {
        let used = self.pages % 64;
        if used != 0
            && let Some(last) = self.words.last_mut()
        {
            *last &= (1 << used) - 1;
        }
    }

    /// First page at or after `from` whose bit equals `marked`; the length if there is none.
    fn next(&self, from: u64, marked: bool) -> u64 {
        let mut index = usize_of(from / 64);
        let mut mask = u64::MAX << (from % 64);
        while let Some(&word) = self.words.get(index) {
            let found = if marked { word } else { !word } & mask;
            if found != 0 {
                return (index as u64 * 64 + u64::from(found.trailing_zeros())).min(self.pages);
            }
            mask = u64::MAX;
            index += 1;
        }
        self.pages
    }
}

/// Iterator of [`PageBitmap::runs`].
#[derive(Debug)]
pub struct Runs<'a> {
    bitmap: &'a PageBitmap,
    block: BlockId,
    page: u64,
}

impl Iterator for Runs<'_> {
    type Item = PageRun;

    fn next(&mut self) -> Option<PageRun> {
        let start = self.bitmap.next(self.page, true);
        if start >= self.bitmap.pages {
            return None;
        }
        let end = self.bitmap.next(start, false);
        self.page = end;
        Some(PageRun {
            block: self.block,
            start: PageIndex(start),
            count: PageCount(end - start),
        })
    }
}

/// One bitmap per RAM block, in the order of the block list.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct DirtyMap {
    blocks: Vec<PageBitmap>,
}

impl DirtyMap {
    /// All pages of all blocks clean; `pages` gives the size of each block.
    pub fn new(pages: impl IntoIterator<Item = PageCount>) -> Self {
        Self {
            blocks: pages.into_iter().map(PageBitmap::new).collect(),
        }
    }

    /// The bitmap of one block.
    ///
    /// # Panics
    /// If there is no such block: block ids are checked where they enter.
    pub fn block(&self, block: BlockId) -> &PageBitmap {
        &self.blocks[block.index()]
    }

    /// The bitmap of one block, to mark pages in.
    ///
    /// # Panics
    /// If there is no such block.
    pub fn block_mut(&mut self, block: BlockId) -> &mut PageBitmap {
        &mut self.blocks[block.index()]
    }

    /// All blocks with their ids.
    pub fn blocks(&self) -> impl Iterator<Item = (BlockId, &PageBitmap)> {
        (0..).map(BlockId).zip(&self.blocks)
    }

    /// Marks all pages that are marked in `other`.
    pub fn union(&mut self, other: &Self) {
        self.blocks
            .iter_mut()
            .zip(&other.blocks)
            .for_each(|(ours, theirs)| ours.union(theirs));
    }

    /// Unmarks everything.
    pub fn clear(&mut self) {
        self.blocks.iter_mut().for_each(PageBitmap::clear);
    }

    /// Number of marked pages in all blocks.
    pub fn count(&self) -> PageCount {
        PageCount(self.blocks.iter().map(|block| block.count().0).sum())
    }

    /// The marked pages of all blocks as maximal runs.
    pub fn runs(&self) -> impl Iterator<Item = PageRun> {
        self.blocks().flat_map(|(id, bitmap)| bitmap.runs(id))
    }
}

/// Bitmap indices fit `usize`: the VMM runs on 64-bit hosts, and a bitmap that does not fit could not have been allocated.
fn usize_of(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn runs_of(bitmap: &PageBitmap) -> Vec<(u64, u64)> {
        bitmap
            .runs(BlockId(0))
            .map(|run| (run.start.0, run.count.0))
            .collect()
    }

    #[test]
    fn a_run_may_cross_words_and_end_at_the_last_page() {
        let mut bitmap = PageBitmap::new(PageCount(130));
        bitmap.set_range(PageIndex(60), PageCount(10));
        bitmap.set_range(PageIndex(128), PageCount(100));
        assert_eq!(runs_of(&bitmap), [(60, 10), (128, 2)]);
        assert_eq!(bitmap.count(), PageCount(12));
    }

    #[test]
    fn bits_past_the_end_never_appear() {
        let mut bitmap = PageBitmap::new(PageCount(3));
        bitmap.union_words(PageIndex(0), &[u64::MAX, u64::MAX]);
        assert_eq!(runs_of(&bitmap), [(0, 3)]);
        bitmap.set(PageIndex(3));
        assert_eq!(bitmap.words(), [0b111]);
    }

    proptest! {
        #[test]
        fn runs_agree_with_single_bits(pages in 1_u64..300, marks in prop::collection::vec((0_u64..300, 0_u64..80), 0..20)) {
            let mut bitmap = PageBitmap::new(PageCount(pages));
            let mut model = vec![false; usize::try_from(pages).unwrap()];
            for (start, count) in marks {
                bitmap.set_range(PageIndex(start), PageCount(count));
                for page in start..(start + count).min(pages) {
                    model[usize::try_from(page).unwrap()] = true;
                }
            }
            let mut from_runs = vec![false; model.len()];
            let mut last_end = None;
            for run in bitmap.runs(BlockId(0)) {
                prop_assert!(run.count.0 > 0);
                prop_assert!(last_end.is_none_or(|end| run.start.0 > end), "runs are maximal");
                last_end = Some(run.end().0);
                for page in run.start.0..run.end().0 {
                    from_runs[usize::try_from(page).unwrap()] = true;
                }
            }
            prop_assert_eq!(from_runs, model);
        }
    }
}
