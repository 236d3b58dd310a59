//! A few pages of guest RAM, looked at twice: how many of them have changed says how fast the guest writes. Costs the guest nothing.

use std::io;

use super::extents::{Extents, RunSequence};
use super::zero::{GuestPage, PAGE_BYTES};
use super::{DirtyMap, GuestRam};
use crate::units::{BlockId, PageIndex};

/// Pages chosen at random, with what was in them.
#[derive(Debug)]
pub struct PageSamples {
    pages: Vec<(BlockId, PageIndex, Content)>,
}

/// What a page held.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Content {
    /// Nothing was ever written to it.
    Hole,
    /// A hash of it.
    Hash(u128),
}

impl PageSamples {
    /// Looks at `count` pages chosen by `seed`, without allocating holes.
    ///
    /// # Errors
    /// When the files behind the blocks cannot be asked for their holes.
    pub fn take(ram: &GuestRam, count: u64, mut seed: u64) -> io::Result<Self> {
        let existing = existing(ram)?;
        let total = ram.pages().0;
        let pages = (0..count)
            .filter_map(|_| {
                // Modulo prefers low pages by less than one in a million million.
                let (block, index) = page_at(ram, next(&mut seed).checked_rem(total)?)?;
                Some((block, index, content(ram, &existing, block, index)?))
            })
            .collect();
        Ok(Self { pages })
    }

    /// How many pages there are.
    pub fn count(&self) -> u64 {
        self.pages.len() as u64
    }

    /// How many of them have another content now.
    ///
    /// # Errors
    /// As [`take`](Self::take).
    pub fn changed(&self, ram: &GuestRam) -> io::Result<u64> {
        let existing = existing(ram)?;
        let changed = self.pages.iter().filter(|(block, index, before)| {
            content(ram, &existing, *block, *index).is_some_and(|now| now != *before)
        });
        Ok(changed.count() as u64)
    }
}

fn existing(ram: &GuestRam) -> io::Result<DirtyMap> {
    let mut map = ram.empty_map();
    let data = RunSequence::new(Extents::of(ram)?.data);
    for run in data.slice(0, data.pages().0) {
        map.block_mut(run.block).set_range(run.start, run.count);
    }
    Ok(map)
}

fn content(
    ram: &GuestRam,
    existing: &DirtyMap,
    block: BlockId,
    index: PageIndex,
) -> Option<Content> {
    if !existing.block(block).contains(index) {
        return Some(Content::Hole);
    }
    let mut bytes = [0; PAGE_BYTES];
    GuestPage::of(ram.block(block)?, index)?.copy_to(&mut bytes);
    Some(Content::Hash(xxhash_rust::xxh3::xxh3_128(&bytes)))
}

/// The page at a position in all of RAM.
fn page_at(ram: &GuestRam, mut position: u64) -> Option<(BlockId, PageIndex)> {
    for (block, id) in ram.blocks().iter().zip(0..) {
        let pages = block.pages().0;
        if position < pages {
            return Some((BlockId(id), PageIndex(position)));
        }
        position -= pages;
    }
    None
}

/// SplitMix64: good enough to choose pages, and a seed is all its state.
fn next(seed: &mut u64) -> u64 {
    *seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *seed;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::extents::tests::memfd_ram;
    use crate::memory::populate::populated_bytes;

    fn write(ram: &GuestRam, block: u16, page: u64, value: u8) {
        let block = ram.block(BlockId(block)).unwrap();
        let page = GuestPage::of(block, PageIndex(page)).unwrap();
        page.copy_from(&[value; PAGE_BYTES]);
    }

    #[test]
    fn changed_pages_are_counted_and_holes_stay_holes() {
        let ram = memfd_ram(&[1000, 1000]);
        for page in 0..100 {
            write(&ram, 0, page, 1);
        }
        let populated = populated_bytes(&ram).unwrap();
        let samples = PageSamples::take(&ram, 20_000, 7).unwrap();
        assert_eq!(samples.count(), 20_000);
        assert_eq!(samples.changed(&ram).unwrap(), 0);
        assert_eq!(populated_bytes(&ram).unwrap(), populated);
        // A tenth of all pages: existing ones, and holes.
        for page in 0..100 {
            write(&ram, 0, page, 2);
            write(&ram, 1, 500 + page, 3);
        }
        let changed = samples.changed(&ram).unwrap();
        assert!((1800..2200).contains(&changed), "{changed}");
    }

    #[test]
    fn every_page_can_be_chosen() {
        let ram = memfd_ram(&[3, 2]);
        let samples = PageSamples::take(&ram, 200, 1).unwrap();
        for (block, page) in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)] {
            let before = samples.changed(&ram).unwrap();
            write(&ram, block, page, 9);
            assert!(samples.changed(&ram).unwrap() > before);
        }
        assert_eq!(samples.changed(&ram).unwrap(), 200);
    }
}
