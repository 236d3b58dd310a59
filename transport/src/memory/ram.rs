//! The VM's RAM as a list of named blocks, each one shared mapping of a file (usually a memfd).

#![expect(
    unsafe_code,
    reason = "vouches for the addresses of vm-memory's mappings, and asks the kernel to map pages there"
)]

use std::fmt;
use std::fs::File;
use std::io;
use std::sync::Arc;

use rustix::mm::{Advice, madvise};
use vm_memory::bitmap::Bitmap;
use vm_memory::{FileOffset, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress};

use super::DirtyMap;
use crate::units::{BlockId, PAGE_SIZE, PageCount, PageIndex};

/// What the data path needs to know of a mapping: where it lies, and that it stays there while we hold it.
///
/// Implemented for vm-memory's mmap regions. A VMM with another kind of region implements it for its own type.
///
/// # Safety
/// The data path reads and writes the mapping by address, and lends it to the kernel. An implementation vouches that as long as the
/// value lives, [`host_address`](Self::host_address) returns the same address, and the [`len`](Self::len) bytes there are mapped,
/// readable and writable, and never accessed through Rust references.
pub unsafe trait HostMapping: Send + Sync {
    /// Address of the first byte in this process. Valid for [`len`](Self::len) bytes as long as `self` lives.
    fn host_address(&self) -> *mut u8;
    /// Length in bytes.
    fn len(&self) -> u64;
    /// Whether the mapping is empty.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// The file behind the mapping, if it is a shared one.
    fn file_offset(&self) -> Option<&FileOffset>;
}

// SAFETY: a region owns its mmap until it is dropped and never moves it; vm-memory accesses it through volatile pointers only.
unsafe impl<B: Bitmap + Send + Sync> HostMapping for GuestRegionMmap<B> {
    fn host_address(&self) -> *mut u8 {
        // An mmap region always knows the address of its first byte; null would be a bug of the region type.
        self.get_host_address(MemoryRegionAddress(0))
            .unwrap_or(std::ptr::null_mut())
    }

    fn len(&self) -> u64 {
        GuestMemoryRegion::len(self)
    }

    fn file_offset(&self) -> Option<&FileOffset> {
        // What a private mapping holds is not in its file, and the file must not be changed.
        let shared = self.flags() & libc::MAP_SHARED != 0;
        GuestMemoryRegion::file_offset(self).filter(|_| shared)
    }
}

/// One block of guest RAM: a name that both sides know, and a mapping.
#[derive(Clone)]
pub struct RamBlock {
    name: Arc<str>,
    mapping: Arc<dyn HostMapping>,
}

impl RamBlock {
    /// A block called `name`. The length must be a multiple of 4 KiB.
    ///
    /// # Errors
    /// [`RamError`] when the mapping cannot be migrated.
    pub fn new(name: &str, mapping: Arc<dyn HostMapping>) -> Result<Self, RamError> {
        let len = mapping.len();
        if len == 0 || !len.is_multiple_of(PAGE_SIZE) {
            return Err(RamError::Length {
                block: name.to_owned(),
                len,
            });
        }
        if mapping.host_address().is_null()
            || !(mapping.host_address() as u64).is_multiple_of(PAGE_SIZE)
        {
            return Err(RamError::Alignment {
                block: name.to_owned(),
            });
        }
        Ok(Self {
            name: name.into(),
            mapping,
        })
    }

    /// The name both sides know the block by.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Number of pages.
    pub fn pages(&self) -> PageCount {
        PageCount(self.mapping.len() / PAGE_SIZE)
    }

    /// The mapping.
    pub fn mapping(&self) -> &Arc<dyn HostMapping> {
        &self.mapping
    }

    /// Address and length in bytes of a run of pages; `None` if it is not inside the block. The address is valid as long as the
    /// block lives.
    pub(crate) fn host_range(
        &self,
        start: PageIndex,
        count: PageCount,
    ) -> Option<(*mut u8, usize)> {
        let end = start.0.checked_add(count.0)?;
        if end > self.pages().0 {
            return None;
        }
        // Inside a mapping of this process, so both fit.
        let offset = usize::try_from(start.to_offset()).ok()?;
        let len = usize::try_from(count.to_bytes()).ok()?;
        Some((self.mapping.host_address().wrapping_add(offset), len))
    }

    /// Has the kernel map a run of pages into this process, as reading them all would. Pages that do not exist come into being.
    ///
    /// # Errors
    /// The run is not inside the block, or the kernel's answer: EINVAL before Linux 5.14.
    pub(crate) fn fill_page_tables(&self, start: PageIndex, count: PageCount) -> io::Result<()> {
        let range = self.host_range(start, count);
        let (address, bytes) = range.ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: the range is inside of a mapping that lives as long as `self`, and what is mapped there does not change by this.
        let done = unsafe { madvise(address.cast(), bytes, Advice::LinuxPopulateRead) };
        Ok(done?)
    }

    /// File behind the block and the offset of the block's first byte in it; `None` for anonymous memory.
    pub fn file(&self) -> Option<(&File, u64)> {
        self.mapping
            .file_offset()
            .map(|offset| (offset.file(), offset.start()))
    }
}

impl fmt::Debug for RamBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RamBlock")
            .field("name", &self.name)
            .field("pages", &self.pages().0)
            .finish()
    }
}

/// All RAM of a VM. Cheap to clone; clones share the mappings.
#[derive(Clone, Debug)]
pub struct GuestRam {
    blocks: Arc<[RamBlock]>,
}

impl GuestRam {
    /// The VM's RAM, in the order that both sides agree on in the hello.
    pub fn new(blocks: Vec<RamBlock>) -> Self {
        Self {
            blocks: blocks.into(),
        }
    }

    /// All blocks; the position is the [`BlockId`].
    pub fn blocks(&self) -> &[RamBlock] {
        &self.blocks
    }

    /// One block.
    pub fn block(&self, id: BlockId) -> Option<&RamBlock> {
        self.blocks.get(id.index())
    }

    /// A dirty map of the right shape with no page marked.
    pub fn empty_map(&self) -> DirtyMap {
        DirtyMap::new(self.blocks.iter().map(RamBlock::pages))
    }

    /// Size of all blocks together.
    pub fn pages(&self) -> PageCount {
        PageCount(self.blocks.iter().map(|block| block.pages().0).sum())
    }
}

/// Why a mapping cannot be a RAM block. The caller built the VM wrongly.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RamError {
    /// Empty, or not whole pages.
    #[error("RAM block {block:?} has {len} bytes, which is not a positive multiple of 4096")]
    Length {
        /// Name of the block.
        block: String,
        /// Its length.
        len: u64,
    },
    /// The mapping does not start at a page.
    #[error("RAM block {block:?} is not mapped at a page boundary")]
    Alignment {
        /// Name of the block.
        block: String,
    },
}
