//! The guest as the simulation sees it: a number per page, a number for its vCPUs, and a proof that it stands still.

use std::cell::Cell;
use std::rc::Rc;

use vmferry_transport::units::{PageCount, PageIndex};

use super::rng::Rng;

/// Contents of memory: one number per page, per block. 0 is a page of zeros.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(super) struct Memory(pub(super) Vec<Vec<u64>>);

impl Memory {
    pub(super) fn zeroed(blocks: &[u64]) -> Self {
        Self(
            blocks
                .iter()
                .map(|pages| vec![0; *pages as usize])
                .collect(),
        )
    }

    pub(super) fn get(&self, page: Page) -> u64 {
        self.0[page.block][page.index.0 as usize]
    }

    pub(super) fn set(&mut self, page: Page, content: u64) {
        self.0[page.block][page.index.0 as usize] = content;
    }

    /// Stands for the hash of all RAM.
    pub(super) fn hash(&self) -> u128 {
        let pages = self.0.iter().flatten();
        let mixed = pages.fold(0x9e37_79b9_7f4a_7c15_u64, |hash, page| {
            (hash ^ page)
                .wrapping_mul(0xff51_afd7_ed55_8ccd)
                .rotate_left(29)
        });
        u128::from(mixed)
    }
}

/// Which page.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Page {
    pub(super) block: usize,
    pub(super) index: PageIndex,
}

/// A set of pages.
#[derive(Clone, Debug, Default)]
pub(super) struct PageSet(Vec<Vec<bool>>);

impl PageSet {
    pub(super) fn empty(blocks: &[u64]) -> Self {
        Self(
            blocks
                .iter()
                .map(|pages| vec![false; *pages as usize])
                .collect(),
        )
    }

    pub(super) fn insert(&mut self, page: Page) {
        self.0[page.block][page.index.0 as usize] = true;
    }

    pub(super) fn contains(&self, page: Page) -> bool {
        self.0[page.block][page.index.0 as usize]
    }

    pub(super) fn unite(&mut self, other: &Self) {
        for (mine, theirs) in self.0.iter_mut().flatten().zip(other.0.iter().flatten()) {
            *mine |= theirs;
        }
    }

    pub(super) fn clear(&mut self) {
        self.0.iter_mut().flatten().for_each(|bit| *bit = false);
    }

    pub(super) fn pages(&self) -> Vec<Page> {
        let blocks = self.0.iter().enumerate();
        blocks
            .flat_map(|(block, bits)| {
                let set = bits.iter().enumerate().filter(|(_, bit)| **bit);
                set.map(move |(index, _)| Page {
                    block,
                    index: PageIndex(index as u64),
                })
            })
            .collect()
    }

    pub(super) fn count(&self) -> PageCount {
        PageCount(self.0.iter().flatten().filter(|bit| **bit).count() as u64)
    }
}

/// The guest at the instant it was stopped.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Snapshot {
    pub(super) memory: Memory,
    pub(super) vcpus: u64,
}

/// How many proofs there are.
#[derive(Clone, Debug, Default)]
pub(super) struct ProofCount(Rc<Cell<u32>>);

impl ProofCount {
    pub(super) fn get(&self) -> u32 {
        self.0.get()
    }

    /// Whoever has stopped the guest may make one.
    pub(super) fn make(&self) -> SimProof {
        self.0.set(self.0.get() + 1);
        SimProof(self.clone())
    }
}

/// Proof that the guest is stopped at the source. Neither copied nor forged: the world counts them.
#[derive(Debug)]
pub(super) struct SimProof(ProofCount);

impl Drop for SimProof {
    fn drop(&mut self) {
        self.0.0.set(self.0.0.get() - 1);
    }
}

/// How the guest writes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Dirtier {
    /// Pages per second of virtual time.
    pub(super) pages_per_sec: u64,
    /// Share of the pages that most writes go to, per mille.
    pub(super) hot: u64,
    /// Fraction of a page that the last step left over, in millionths.
    pub(super) left_over: u64,
    /// The next content: every write is unlike all others.
    pub(super) next: u64,
}

/// Most pages written between two steps: what happens in between is seen only as the sum of it.
const WRITES_PER_STEP_MAX: u64 = 24;

impl Dirtier {
    /// What the guest writes in `elapsed_us`: pages and their contents.
    pub(super) fn write(
        &mut self,
        rng: &mut Rng,
        blocks: &[u64],
        elapsed_us: u64,
    ) -> Vec<(Page, u64)> {
        let millionths = self
            .pages_per_sec
            .saturating_mul(elapsed_us.min(10_000_000))
            + self.left_over;
        self.left_over = millionths % 1_000_000;
        let count = (millionths / 1_000_000).min(WRITES_PER_STEP_MAX);
        (0..count)
            .map(|_| {
                let block = rng.index(blocks.len());
                let pages = blocks[block];
                let bound = if rng.chance(900) {
                    (pages * self.hot / 1000).max(1)
                } else {
                    pages
                };
                let index = PageIndex(rng.below(bound));
                self.next += 1;
                let content = if rng.chance(50) { 0 } else { self.next };
                (Page { block, index }, content)
            })
            .collect()
    }
}
