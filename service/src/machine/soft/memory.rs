//! Guest memory as the soft vCPUs see it: a mapping of their own of the same files.
//!
//! A real guest's writes are seen by KVM and not by vm-memory's bitmap. Here it is the same: what vCPUs write goes through this
//! mapping, whose page tables are the dirty log; what the VMM writes goes through the other one, which has the bitmap. It also
//! spares the vCPUs an atomic operation per word.

use std::io;
use std::sync::Arc;

use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress, MmapRegion,
    VolatileArrayRef, VolatileMemory,
};
use vmferry_transport::memory::{GuestRam, RamBlock};

use crate::machine::MachineError;
use crate::machine::ram::MachineRam;
use crate::machine::workload::layout::PAGE_BYTES;

/// 64-bit words in a page.
pub(super) const PAGE_WORDS: u64 = PAGE_BYTES / 8;

/// A page of guest memory as 64-bit words.
pub(super) type Page<'a> = VolatileArrayRef<'a, u64, ()>;

/// Guest memory for vCPUs. Cheap to clone; clones share the mappings.
#[derive(Clone, Debug)]
pub(super) struct VcpuMemory {
    regions: Arc<[Arc<GuestRegionMmap<()>>]>,
    blocks: GuestRam,
}

impl VcpuMemory {
    /// Maps the files of `ram` once more, at the same guest-physical addresses. Touches nothing.
    pub(super) fn new(ram: &MachineRam) -> Result<Self, MachineError> {
        let regions = ram
            .regions()
            .iter()
            .map(|region| {
                let file = GuestMemoryRegion::file_offset(&**region)
                    .ok_or_else(|| MachineError::Config("RAM without a file".to_owned()))?;
                let file = FileOffset::from_arc(file.arc().clone(), file.start());
                let mapping = MmapRegion::from_file(file, region.size()).map_err(|error| {
                    MachineError::Host {
                        op: format!("map {} bytes for the vCPUs", region.size()),
                        source: io::Error::other(error),
                    }
                })?;
                GuestRegionMmap::new(mapping, region.start_addr())
                    .map(Arc::new)
                    .ok_or_else(|| {
                        MachineError::Config("RAM does not fit the address space".to_owned())
                    })
            })
            .collect::<Result<Arc<[_]>, _>>()?;
        let blocks = ram
            .blocks()
            .blocks()
            .iter()
            .zip(&*regions)
            .map(|(block, region)| RamBlock::new(block.name(), region.clone()))
            .collect::<Result<_, _>>()
            .map_err(|error| MachineError::Config(error.to_string()))?;
        Ok(Self {
            regions,
            blocks: GuestRam::new(blocks),
        })
    }

    /// The vCPUs' mappings by block, for their dirty log.
    pub(super) fn blocks(&self) -> &GuestRam {
        &self.blocks
    }

    /// The page at `gpa`, which is a multiple of 4096; `None` if there is no RAM.
    pub(super) fn page(&self, gpa: u64) -> Option<Page<'_>> {
        self.regions.iter().find_map(|region| {
            let MemoryRegionAddress(offset) = region.to_region_addr(GuestAddress(gpa))?;
            region
                .get_array_ref(usize::try_from(offset).ok()?, PAGE_WORDS as usize)
                .ok()
        })
    }
}
