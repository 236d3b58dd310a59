//! The machine's RAM: one shared mapping of a memfd per block, seen in two ways.
//!
//! Device models and the loader go through [`MachineRam::memory`], whose bitmap notes every page they write. Migration goes through
//! [`MachineRam::blocks`], which is the same mappings by name.

use std::fs::File;
use std::io;
use std::sync::Arc;

use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};
use vmferry_transport::memory::{GuestRam, RamBlock};

use super::MachineError;
use super::workload::layout::{HIGH_RAM_GPA, PAGE_BYTES, RAM_MAX, RAM_MIN, low_bytes};

/// Name of the block below the device hole.
pub const LOW_BLOCK: &str = "ram0";
/// Name of the block from 4 GiB on.
pub const HIGH_BLOCK: &str = "ram1";

/// One block's mapping, with a bitmap of what the VMM itself wrote.
pub type RamRegion = GuestRegionMmap<AtomicBitmap>;
/// All RAM by guest-physical address.
pub type RamMemory = GuestMemoryMmap<AtomicBitmap>;

/// All RAM of a built-in machine. Cheap to clone; clones share the mappings.
#[derive(Clone, Debug)]
pub struct MachineRam {
    regions: Vec<Arc<RamRegion>>,
    memory: RamMemory,
    blocks: GuestRam,
}

impl MachineRam {
    /// Makes new memfds for `mem_bytes` of RAM and maps them. No page is touched.
    ///
    /// # Errors
    /// [`MachineError::Config`] for a size that makes no machine, [`MachineError::Host`] when the host refuses.
    pub fn create(mem_bytes: u64) -> Result<Self, MachineError> {
        let files = block_sizes(mem_bytes)?
            .into_iter()
            .map(|(name, bytes)| {
                vmferry_cpr::memfd::create_ram(name, bytes).map_err(|error| {
                    host_error(
                        format!("create a memfd of {bytes} bytes"),
                        io::Error::other(error),
                    )
                })
            })
            .collect::<Result<Vec<_>, _>>()?;
        Self::from_files(mem_bytes, files)
    }

    /// Maps memfds that another process made for a machine of the same size, in the order of [`files`](Self::files).
    ///
    /// # Errors
    /// [`MachineError::Config`] when number or sizes of the files do not fit, [`MachineError::Host`] when the host refuses.
    pub fn from_files(mem_bytes: u64, files: Vec<File>) -> Result<Self, MachineError> {
        let sizes = block_sizes(mem_bytes)?;
        if sizes.len() != files.len() {
            return Err(MachineError::Config(format!(
                "{} bytes of RAM are {} blocks, {} files were given",
                mem_bytes,
                sizes.len(),
                files.len()
            )));
        }
        let mut regions = Vec::with_capacity(sizes.len());
        let mut blocks = Vec::with_capacity(sizes.len());
        for ((name, bytes), file) in sizes.into_iter().zip(files) {
            let gpa = if name == LOW_BLOCK { 0 } else { HIGH_RAM_GPA };
            let region = Arc::new(map_block(name, gpa, bytes, file)?);
            blocks.push(
                RamBlock::new(name, region.clone())
                    .map_err(|error| MachineError::Config(error.to_string()))?,
            );
            regions.push(region);
        }
        let memory = RamMemory::from_arc_regions(regions.clone())
            .map_err(|error| MachineError::Config(error.to_string()))?;
        Ok(Self {
            regions,
            memory,
            blocks: GuestRam::new(blocks),
        })
    }

    /// RAM by guest-physical address, for everything that the VMM itself reads and writes.
    pub fn memory(&self) -> &RamMemory {
        &self.memory
    }

    /// RAM by block, for migration.
    pub fn blocks(&self) -> &GuestRam {
        &self.blocks
    }

    /// The mappings, in the order of the blocks.
    pub fn regions(&self) -> &[Arc<RamRegion>] {
        &self.regions
    }

    /// The memfds, in the order of the blocks.
    pub fn files(&self) -> impl Iterator<Item = &Arc<File>> {
        self.regions
            .iter()
            .filter_map(|region| region.file_offset().map(FileOffset::arc))
    }
}

/// Names and sizes of the blocks.
fn block_sizes(mem_bytes: u64) -> Result<Vec<(&'static str, u64)>, MachineError> {
    if !(RAM_MIN..=RAM_MAX).contains(&mem_bytes) || !mem_bytes.is_multiple_of(PAGE_BYTES) {
        return Err(MachineError::Config(format!(
            "RAM of {mem_bytes} bytes: must be a multiple of 4096 from {RAM_MIN} to {RAM_MAX}"
        )));
    }
    let low = low_bytes(mem_bytes);
    let mut sizes = vec![(LOW_BLOCK, low)];
    if mem_bytes > low {
        sizes.push((HIGH_BLOCK, mem_bytes - low));
    }
    Ok(sizes)
}

fn map_block(name: &str, gpa: u64, bytes: u64, file: File) -> Result<RamRegion, MachineError> {
    let file_bytes = file
        .metadata()
        .map_err(|source| host_error(format!("stat the file of {name}"), source))?
        .len();
    if file_bytes != bytes {
        return Err(MachineError::Config(format!(
            "the file of {name} has {file_bytes} bytes, the block has {bytes}"
        )));
    }
    let len = usize::try_from(bytes).map_err(|error| MachineError::Config(error.to_string()))?;
    let mapping = MmapRegion::from_file(FileOffset::new(file, 0), len).map_err(|error| {
        host_error(
            format!("map {bytes} bytes of {name}"),
            io::Error::other(error),
        )
    })?;
    RamRegion::new(mapping, GuestAddress(gpa))
        .ok_or_else(|| MachineError::Config(format!("{name} does not fit the address space")))
}

fn host_error(op: String, source: io::Error) -> MachineError {
    MachineError::Host { op, source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestMemoryBackend};

    #[test]
    fn ram_above_three_gib_becomes_a_second_block_at_four_gib() {
        let ram = MachineRam::create((3 << 30) + (16 << 20)).unwrap();
        let names: Vec<_> = ram.blocks().blocks().iter().map(RamBlock::name).collect();
        assert_eq!(names, [LOW_BLOCK, HIGH_BLOCK]);
        assert!(ram.memory().check_address(GuestAddress(3 << 30)).is_none());
        ram.memory()
            .write_obj(7_u64, GuestAddress(HIGH_RAM_GPA))
            .unwrap();
        let again = MachineRam::from_files(
            (3 << 30) + (16 << 20),
            ram.files().map(|file| file.try_clone().unwrap()).collect(),
        )
        .unwrap();
        assert_eq!(
            again
                .memory()
                .read_obj::<u64>(GuestAddress(HIGH_RAM_GPA))
                .unwrap(),
            7
        );
    }

    #[test]
    fn files_of_another_size_are_refused() {
        let ram = MachineRam::create(16 << 20).unwrap();
        let files = ram.files().map(|file| file.try_clone().unwrap()).collect();
        let error = MachineRam::from_files(32 << 20, files).unwrap_err();
        assert!(error.to_string().contains("ram0"), "{error}");
    }
}
