//! The machine's RAM: one shared mapping of a file per block, seen in two ways. The file is a memfd unless the operator has asked for
//! another one.
//!
//! Device models and the loader go through [`MachineRam::memory`], whose bitmap notes every page they write. Migration goes through
//! [`MachineRam::blocks`], which is the same mappings by name.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};
use vmferry_cpr::memfd::{self, HugePages};
use vmferry_cpr::{CprError, mark, shared};
use vmferry_transport::memory::{GuestRam, RamBlock};
use vmferry_transport::units::MigrationId;

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

/// `f_type` of hugetlbfs, which memfds of huge pages are of too.
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;

/// What RAM is made of.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub enum RamBacking {
    /// A memfd per block.
    #[default]
    Memfd,
    /// The same in huge pages of the host's pool.
    Huge(HugePages),
    /// A file with a name, which outlives the process. The block from 4 GiB on is in a second one, whose name ends with `.ram1`.
    File(PathBuf),
}

impl RamBacking {
    /// The files with a name, in the order of the blocks of `mem_bytes` of RAM; none if they have none.
    pub fn paths(&self, mem_bytes: u64) -> Vec<PathBuf> {
        let Self::File(path) = self else {
            return Vec::new();
        };
        let mut paths = vec![path.clone()];
        if mem_bytes > low_bytes(mem_bytes) {
            let mut high = OsString::from(path);
            high.push(format!(".{HIGH_BLOCK}"));
            paths.push(high.into());
        }
        paths
    }
}

/// The saved guest that the memory in these files belongs to, if it is of one.
///
/// # Errors
/// The files are of different guests, or cannot be asked.
pub fn saved_guest(paths: &[PathBuf]) -> Result<Option<MigrationId>, MachineError> {
    let marks = paths.iter().map(|path| mark::read(path));
    let marks = marks.collect::<Result<Vec<_>, _>>().map_err(of_cpr)?;
    let first = marks.first().copied().flatten();
    if marks.iter().any(|mark| *mark != first) {
        return Err(MachineError::Config(format!(
            "the files of memory {paths:?} do not belong together: they are marked as of {marks:?}"
        )));
    }
    Ok(first)
}

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
        Self::with_backing(mem_bytes, &RamBacking::Memfd, false)
    }

    /// The same with another backing. A file that exists is emptied, unless it belongs to a saved guest: for one that is `incoming` it is
    /// kept as it is, and any other guest is refused it.
    ///
    /// # Errors
    /// As [`create`](Self::create), and [`MachineError::Config`] if the backing is of no use.
    pub fn with_backing(
        mem_bytes: u64,
        backing: &RamBacking,
        incoming: bool,
    ) -> Result<Self, MachineError> {
        let sizes = block_sizes(mem_bytes)?;
        let paths = backing.paths(mem_bytes);
        let files = match backing {
            RamBacking::File(_) => return Self::open(mem_bytes, &paths, incoming),
            RamBacking::Memfd => sizes
                .into_iter()
                .map(|(name, bytes)| memfd::create_ram(name, bytes))
                .collect::<Result<Vec<_>, _>>(),
            RamBacking::Huge(pages) => sizes
                .into_iter()
                .map(|(name, bytes)| memfd::create_ram_huge(name, bytes, *pages))
                .collect(),
        };
        Self::from_files(mem_bytes, files.map_err(of_cpr)?)
    }

    fn open(mem_bytes: u64, paths: &[PathBuf], incoming: bool) -> Result<Self, MachineError> {
        let sizes = block_sizes(mem_bytes)?;
        let mut files = Vec::new();
        for (path, (_, bytes)) in paths.iter().zip(&sizes) {
            files.push(shared::open(path, *bytes).map_err(of_cpr)?);
        }
        // The files are locked from here on: nobody else sets or removes a mark.
        match saved_guest(paths)? {
            Some(id) if !incoming => return Err(refuse_saved(paths, id)),
            Some(id) if files.iter().any(|(_, is_new)| *is_new) => {
                return Err(MachineError::Config(format!(
                    "the memory of the saved guest is gone: {paths:?} did not all exist; its mark {:?} is left",
                    marks(paths, id)
                )));
            }
            Some(_) => {}
            None => {
                for ((file, is_new), (_, bytes)) in files.iter().zip(&sizes) {
                    // Only here, where no mark says that a guest was in them: after a refusal they are as new as before.
                    match is_new {
                        true => shared::lengthen(file, *bytes),
                        false => shared::empty(file),
                    }
                    .map_err(of_cpr)?;
                }
            }
        }
        Self::from_files(mem_bytes, files.into_iter().map(|(file, _)| file).collect())
    }

    /// Maps files that another process made for a machine of the same size, in the order of [`files`](Self::files).
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

    /// Whether any of it is in huge pages of the host's pool.
    pub fn is_huge(&self) -> bool {
        self.files().any(|file| huge_page_bytes(file).is_some())
    }

    /// The files, in the order of the blocks.
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
    let huge_bytes = huge_page_bytes(&file);
    // Huge pages are reserved now: if there are too few, this is refused, rather than the guest killed when it wants one.
    let reserve = match huge_bytes {
        Some(_) => 0,
        None => libc::MAP_NORESERVE,
    };
    let (access, flags) = (
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_SHARED | reserve,
    );
    let mapping = MmapRegion::build(Some(FileOffset::new(file, 0)), len, access, flags);
    let mapping = mapping.map_err(|error| match huge_bytes {
        Some(huge_bytes) => too_few_huge_pages(name, bytes, huge_bytes, &error),
        None => host_error(
            format!("map {bytes} bytes of {name}"),
            io::Error::other(error),
        ),
    })?;
    RamRegion::new(mapping, GuestAddress(gpa))
        .ok_or_else(|| MachineError::Config(format!("{name} does not fit the address space")))
}

/// The size of the huge pages that a file is of, if it is.
fn huge_page_bytes(file: &File) -> Option<u64> {
    let stat = rustix::fs::fstatfs(file).ok()?;
    let is_huge = stat.f_type == HUGETLBFS_MAGIC;
    is_huge.then(|| u64::try_from(stat.f_bsize).ok()).flatten()
}

fn too_few_huge_pages(
    name: &str,
    bytes: u64,
    huge_bytes: u64,
    error: &dyn std::error::Error,
) -> MachineError {
    let pool = format!("/sys/kernel/mm/hugepages/hugepages-{}kB", huge_bytes / 1024);
    let free = std::fs::read_to_string(Path::new(&pool).join("free_hugepages"));
    let free = free.as_deref().map_or("unknown", str::trim);
    MachineError::Config(format!(
        "{name} needs {} huge pages of {} MiB, and the host has {free} free ones ({error}); make more: `echo N > {pool}/nr_hugepages`",
        bytes / huge_bytes,
        huge_bytes >> 20
    ))
}

fn marks(paths: &[PathBuf], id: MigrationId) -> Vec<PathBuf> {
    paths.iter().map(|path| mark::path(path, id)).collect()
}

fn refuse_saved(paths: &[PathBuf], id: MigrationId) -> MachineError {
    MachineError::Config(format!(
        "{paths:?} is the memory of a guest that was saved; load it with --incoming file:PATH, or remove {:?} to give that guest up",
        marks(paths, id)
    ))
}

fn of_cpr(error: CprError) -> MachineError {
    match error {
        CprError::Host { op, source } => host_error(op, source),
        other => MachineError::Config(other.to_string()),
    }
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
    fn a_file_is_emptied_unless_it_belongs_to_a_saved_guest() {
        let folder = tempfile::tempdir().unwrap();
        let backing = RamBacking::File(folder.path().join("ram"));
        let paths = backing.paths(16 << 20);
        let open = |incoming| MachineRam::with_backing(16 << 20, &backing, incoming);
        let look = |ram: MachineRam| ram.memory().read_obj::<u64>(GuestAddress(4096)).unwrap();
        let write = |ram: MachineRam| ram.memory().write_obj(7_u64, GuestAddress(4096)).unwrap();
        write(open(false).unwrap());
        assert_eq!(look(open(true).unwrap()), 0);
        write(open(true).unwrap());
        assert_eq!(look(open(false).unwrap()), 0);
        write(open(false).unwrap());
        mark::set(&paths[0], MigrationId([1; 16])).unwrap();
        let error = open(false).unwrap_err().to_string();
        assert!(error.contains("that was saved"), "{error}");
        assert_eq!(look(open(true).unwrap()), 7);
        std::fs::remove_file(&paths[0]).unwrap();
        // However often, and whoever was refused before.
        for incoming in [true, true, false, true] {
            let error = open(incoming).unwrap_err().to_string();
            let part = if incoming {
                "is gone"
            } else {
                "that was saved"
            };
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn a_start_that_fails_at_the_second_file_leaves_no_memory_in_the_first() {
        let folder = tempfile::tempdir().unwrap();
        let backing = RamBacking::File(folder.path().join("ram"));
        let mem_bytes = (3 << 30) + (16 << 20);
        let paths = backing.paths(mem_bytes);
        for path in &paths {
            mark::set(path, MigrationId([1; 16])).unwrap();
        }
        std::fs::write(&paths[1], b"cut").unwrap();
        let open = || MachineRam::with_backing(mem_bytes, &backing, true).unwrap_err();
        let error = open().to_string();
        assert!(error.contains("it has 3 bytes"), "{error}");
        // The second one is mended; the first never was there.
        let second = File::options().write(true).open(&paths[1]).unwrap();
        second.set_len(16 << 20).unwrap();
        for _ in 0..2 {
            let error = open().to_string();
            assert!(error.contains("is gone"), "{error}");
        }
    }

    #[test]
    fn files_of_different_guests_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let backing = RamBacking::File(folder.path().join("ram"));
        let mem_bytes = (3 << 30) + (16 << 20);
        let paths = backing.paths(mem_bytes);
        assert_eq!(paths[1], folder.path().join("ram.ram1"));
        for path in &paths {
            mark::set(path, MigrationId([1; 16])).unwrap();
        }
        assert_eq!(saved_guest(&paths).unwrap(), Some(MigrationId([1; 16])));
        mark::set(&paths[1], MigrationId([2; 16])).unwrap();
        assert!(saved_guest(&paths).is_err());
        mark::remove(&paths[1]).unwrap();
        let error = saved_guest(&paths).unwrap_err().to_string();
        assert!(error.contains("do not belong together"), "{error}");
        assert_eq!(saved_guest(&[]).unwrap(), None);
    }

    /// With a pool of huge pages it works, without one the error says how to make it.
    #[test]
    fn huge_pages_are_reserved_or_missed_at_once() {
        let backing = RamBacking::Huge(HugePages::Size2M);
        let free =
            std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
        let free: u64 = free.map_or(0, |text| text.trim().parse().unwrap());
        match MachineRam::with_backing(16 << 20, &backing, false) {
            Ok(ram) => {
                let size = ram
                    .files()
                    .next()
                    .map(|file| huge_page_bytes(file).unwrap());
                assert_eq!(size, Some(2 << 20));
                // The last one is there too.
                let last = GuestAddress((16 << 20) - 8);
                ram.memory().write_obj(7_u64, last).unwrap();
            }
            Err(error) => {
                let text = error.to_string();
                assert!(free < 8 && text.contains("nr_hugepages"), "{free}: {text}");
            }
        }
    }

    #[test]
    fn files_of_another_size_are_refused() {
        let ram = MachineRam::create(16 << 20).unwrap();
        let files = ram.files().map(|file| file.try_clone().unwrap()).collect();
        let error = MachineRam::from_files(32 << 20, files).unwrap_err();
        assert!(error.to_string().contains("ram0"), "{error}");
    }
}
