//! Touching guest pages ourselves: is it zero, copy it out, fill it, map it.
//!
//! Everything else leaves guest bytes to the kernel. Reads and writes are volatile accesses through raw pointers, because the guest
//! may write at the same moment: what is read may be torn, which is harmless, since a page written meanwhile is dirty again.

#![expect(
    unsafe_code,
    reason = "volatile access to guest pages; `GuestPage` holds the block that keeps them mapped"
)]

use std::marker::PhantomData;

use super::RamBlock;
use crate::units::{PAGE_SIZE, PageCount, PageIndex};

/// [`PAGE_SIZE`] as a length in memory.
pub const PAGE_BYTES: usize = PAGE_SIZE as usize;

/// 64-bit words of a page.
const WORDS: usize = PAGE_BYTES / 8;
/// Words looked at between two decisions: two cache lines, enough for the compiler to keep several loads in flight.
const STEP_WORDS: usize = 16;
/// Words that are looked at before the whole page is: pages in use differ from zero at their start, end or middle nearly always.
const SAMPLES: [usize; 4] = [0, WORDS - 1, WORDS / 2, WORDS / 4 + 1];

/// Pages that the kernel enters into the page tables with one fault, aligned: its default for `fault_around_bytes`, 64 KiB.
const FAULT_AROUND_PAGES: u64 = 16;

/// Enters pages that exist into this process's page tables, so that receiving into them does not fault for each. Reading one page in 16
/// is enough, and takes no lock that the threads would fight over, unlike MADV_POPULATE_READ. A page that does not exist would be
/// allocated: the caller knows that all of them do.
pub fn map_present(block: &RamBlock, start: PageIndex, count: PageCount) {
    let mut index = start.0;
    let end = start.0 + count.0;
    while index < end {
        if let Some(page) = GuestPage::of(block, PageIndex(index)) {
            std::hint::black_box(page.read(0));
        }
        index = (index + 1).next_multiple_of(FAULT_AROUND_PAGES);
    }
}

/// One page of a block, mapped as long as the block lives.
#[derive(Clone, Copy, Debug)]
pub struct GuestPage<'a> {
    words: *mut u64,
    block: PhantomData<&'a RamBlock>,
}

impl<'a> GuestPage<'a> {
    /// Page `index` of `block`; `None` past its end.
    pub fn of(block: &'a RamBlock, index: PageIndex) -> Option<Self> {
        let (address, _) = block.host_range(index, PageCount(1))?;
        Some(Self {
            words: address.cast(),
            block: PhantomData,
        })
    }

    /// Whether all bytes are zero. Reads four words, and all of them only if those are zero.
    pub fn is_zero(self) -> bool {
        SAMPLES.iter().all(|&at| self.read(at) == 0)
            && (0..WORDS).step_by(STEP_WORDS).all(|start| {
                (start..start + STEP_WORDS).fold(0, |all, at| all | self.read(at)) == 0
            })
    }

    /// Copies the content out.
    pub fn copy_to(self, into: &mut [u8; PAGE_BYTES]) {
        for (at, bytes) in into.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            *bytes = self.read(at).to_ne_bytes();
        }
    }

    /// Replaces the content.
    pub fn copy_from(self, from: &[u8; PAGE_BYTES]) {
        for (at, bytes) in from.as_chunks::<8>().0.iter().enumerate() {
            self.write(at, u64::from_ne_bytes(*bytes));
        }
    }

    /// Makes the page zero. Does not write a page that is zero already, so that no memory is allocated for it.
    pub fn clear(self) {
        if !self.is_zero() {
            (0..WORDS).for_each(|at| self.write(at, 0));
        }
    }

    fn read(self, at: usize) -> u64 {
        debug_assert!(at < WORDS);
        // SAFETY: `of` got the page from `host_range`, which checked it against the length of the mapping; all callers stay below
        // WORDS, so the result is inside that page.
        let word = unsafe { self.words.add(at) };
        // SAFETY: the mapping is readable and lives as long as the borrowed block; pages are aligned for u64 because mappings start
        // at a page (checked in `RamBlock::new`). Concurrent writes by the guest are outside of the program; volatile keeps the
        // compiler from assuming that the value is stable.
        unsafe { word.read_volatile() }
    }

    fn write(self, at: usize, value: u64) {
        debug_assert!(at < WORDS);
        // SAFETY: as in `read`.
        let word = unsafe { self.words.add(at) };
        // SAFETY: as in `read`, and guest RAM is mapped writable. No Rust reference to guest memory exists that this could
        // invalidate.
        unsafe { word.write_volatile(value) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::GuestRam;
    use crate::memory::extents::tests::memfd_ram;

    fn page(ram: &GuestRam, index: u64) -> GuestPage<'_> {
        GuestPage::of(&ram.blocks()[0], PageIndex(index)).unwrap()
    }

    #[test]
    fn a_single_set_bit_anywhere_makes_a_page_not_zero() {
        let ram = memfd_ram(&[2]);
        for at in 0..PAGE_BYTES {
            let mut content = [0; PAGE_BYTES];
            content[at] = 0x80;
            page(&ram, 1).copy_from(&content);
            assert!(!page(&ram, 1).is_zero(), "byte {at}");
            page(&ram, 1).clear();
            assert!(page(&ram, 1).is_zero());
        }
        assert!(page(&ram, 0).is_zero());
    }

    #[test]
    fn what_is_copied_in_is_copied_out() {
        let ram = memfd_ram(&[2]);
        let content = std::array::from_fn(|at| (at % 251).to_le_bytes()[0]);
        page(&ram, 1).copy_from(&content);
        let mut read = [0; PAGE_BYTES];
        page(&ram, 1).copy_to(&mut read);
        assert_eq!(read, content);
        assert!(page(&ram, 0).is_zero(), "the neighbour is untouched");
    }

    #[test]
    fn there_is_no_page_past_the_end() {
        let ram = memfd_ram(&[2]);
        assert!(GuestPage::of(&ram.blocks()[0], PageIndex(2)).is_none());
        assert!(GuestPage::of(&ram.blocks()[0], PageIndex(u64::MAX)).is_none());
    }
}
