//! Guest RAM as back ends see it: one table of regions, and which page of which RAM block an address belongs to.

use std::io;
use std::sync::Arc;

use vhost::VhostUserMemoryRegionInfo;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};
use vmferry_transport::memory::DirtyMap;
use vmferry_transport::units::{BlockId, PAGE_SIZE, PageCount, PageIndex};

/// Where guest-physical address 0 is in the "user addresses" that back ends in other processes get. Not 0, which some take for "not set".
const USER_BASE: u64 = 1 << 44;

/// One RAM block's mapping.
pub type Region = GuestRegionMmap<AtomicBitmap>;
/// All RAM by guest-physical address.
pub type Memory = GuestMemoryMmap<AtomicBitmap>;

/// All RAM of a VM that its back ends may reach. Cheap to clone; clones share the mappings.
#[derive(Clone, Debug)]
pub struct VhostMemory {
    /// In the order of the block list.
    regions: Vec<Arc<Region>>,
    memory: Memory,
}

impl VhostMemory {
    /// RAM made of `regions`, which are the RAM blocks in the order of the block list.
    ///
    /// # Errors
    /// `InvalidInput` if regions overlap, or are not whole pages at page addresses.
    pub fn new(regions: Vec<Arc<Region>>) -> io::Result<Self> {
        let whole = |value: u64| value.is_multiple_of(PAGE_SIZE);
        if !regions
            .iter()
            .all(|region| whole(region.start_addr().0) && whole(region.len()))
        {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "RAM must be whole pages at page addresses",
            ));
        }
        let mut sorted = regions.clone();
        sorted.sort_by_key(|region| region.start_addr());
        let memory = Memory::from_arc_regions(sorted)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        Ok(Self { regions, memory })
    }

    /// RAM by guest-physical address.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// The mappings, in the order of the block list.
    pub fn regions(&self) -> &[Arc<Region>] {
        &self.regions
    }

    /// The table that the kernel gets, with the addresses that RAM has in this process.
    ///
    /// # Errors
    /// `Unsupported` for RAM that is not backed by a file: a process outside could not map it.
    pub(super) fn table(&self) -> io::Result<Vec<VhostUserMemoryRegionInfo>> {
        let entry = |region: &Arc<Region>| {
            VhostUserMemoryRegionInfo::from_guest_region(region)
                .map_err(|error| io::Error::new(io::ErrorKind::Unsupported, error))
        };
        self.regions.iter().map(entry).collect()
    }

    /// The table that back ends in other processes get. Its "user addresses" are names only, by which rings are found again: the same in
    /// every process that has this RAM, because a back end may outlive its VMM and looks for the rings that it knows.
    ///
    /// # Errors
    /// As [`table`](Self::table).
    pub(super) fn table_by_name(&self) -> io::Result<Vec<VhostUserMemoryRegionInfo>> {
        let mut table = self.table()?;
        for region in &mut table {
            region.userspace_addr = USER_BASE + region.guest_phys_addr;
        }
        Ok(table)
    }

    /// Whether `bytes` from `address` on are RAM, in one piece.
    pub(super) fn holds(&self, address: u64, bytes: u64) -> bool {
        self.memory
            .find_region(GuestAddress(address))
            .is_some_and(|region| bytes <= region.len() - (address - region.start_addr().0))
    }

    /// Pages from address 0 to the end of RAM: what a log has bits for.
    pub(super) fn pages_to_end(&self) -> PageCount {
        PageCount(self.memory.last_addr().0 / PAGE_SIZE + 1)
    }

    /// Marks the pages whose bits are set in `word`; bit 0 is the page at guest-physical page number `first`, a multiple of 64. What is
    /// not RAM is ignored.
    ///
    /// # Panics
    /// If `into` has fewer blocks than the RAM.
    pub(super) fn mark(&self, first: u64, word: u64, into: &mut DirtyMap) {
        for (block, region) in (0..).map(BlockId).zip(&self.regions) {
            let start = region.start_addr().0 / PAGE_SIZE;
            let end = start + region.len() / PAGE_SIZE;
            if first + 64 <= start || first >= end {
                continue;
            }
            let into = into.block_mut(block);
            if first >= start && (first - start).is_multiple_of(64) {
                into.union_words(PageIndex(first - start), &[word]);
                continue;
            }
            for page in (0..64).filter(|bit| word >> bit & 1 == 1) {
                if let Some(page) = (first + page).checked_sub(start) {
                    into.set(PageIndex(page));
                }
            }
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Anonymous RAM: `(address, pages)` per block.
    pub(in crate::vhost) fn anonymous(blocks: &[(u64, u64)]) -> VhostMemory {
        let region = |(address, pages): &(u64, u64)| {
            let bytes = usize::try_from(pages * PAGE_SIZE).unwrap();
            Arc::new(Region::from_range(GuestAddress(*address), bytes, None).unwrap())
        };
        VhostMemory::new(blocks.iter().map(region).collect()).unwrap()
    }

    #[test]
    fn bits_become_pages_of_their_blocks_wherever_these_lie() {
        // The second block lies lower, and neither begins at a multiple of 64 pages.
        let memory = anonymous(&[(100 * PAGE_SIZE, 40), (3 * PAGE_SIZE, 62)]);
        let mut map = DirtyMap::new([PageCount(40), PageCount(62)]);
        for first in [0, 64, 128] {
            memory.mark(first, !0, &mut map);
        }
        assert_eq!(map.count(), PageCount(102), "all RAM, and nothing else");
        map.clear();
        memory.mark(64, 1 | 1 << 36, &mut map);
        assert!(map.block(BlockId(1)).contains(PageIndex(61)));
        assert!(map.block(BlockId(0)).contains(PageIndex(0)));
        assert_eq!(map.count(), PageCount(2));
    }

    #[test]
    fn a_ring_must_lie_in_one_piece_of_ram() {
        let memory = anonymous(&[(0, 4), (8 * PAGE_SIZE, 4)]);
        assert!(memory.holds(0, 4 * PAGE_SIZE));
        assert!(!memory.holds(1, 4 * PAGE_SIZE));
        assert!(!memory.holds(5 * PAGE_SIZE, 1));
        assert!(!memory.holds(u64::MAX, 2));
        assert_eq!(memory.pages_to_end(), PageCount(12));
    }
}
