//! How much memory really stands behind guest RAM.

use std::collections::BTreeSet;
use std::io;

use rustix::fs::{FallocateFlags, fallocate};

use super::GuestRam;
use super::extents::{Extents, is_tmpfs};
use crate::units::{BlockId, PAGE_SIZE, PageCount};

/// Unit of `st_blocks`, whatever the file system.
const STAT_BLOCK_BYTES: u64 = 512;

/// Bytes of memory behind the files of all blocks, each file counted once. Blocks without a file count with their whole length,
/// because nobody can be asked cheaply.
///
/// # Errors
/// When a file cannot be asked.
pub fn populated_bytes(ram: &GuestRam) -> io::Result<u64> {
    let mut seen = BTreeSet::new();
    let mut bytes = 0;
    for block in ram.blocks() {
        let Some((file, _)) = block.file() else {
            bytes += block.pages().0 * PAGE_SIZE;
            continue;
        };
        let stat = rustix::fs::fstat(file)?;
        if seen.insert((stat.st_dev, stat.st_ino)) {
            bytes += u64::try_from(stat.st_blocks).unwrap_or(0) * STAT_BLOCK_BYTES;
        }
    }
    Ok(bytes)
}

/// Gives the memory behind all blocks back, so that every page reads as zero and none exists. Blocks the caller for some 50 ms per GiB
/// that existed.
///
/// # Errors
/// A block has no file of its own, or the kernel refuses. Some blocks may then be empty.
pub fn empty(ram: &GuestRam) -> io::Result<()> {
    for block in ram.blocks() {
        let (file, offset) = block.file().ok_or(io::ErrorKind::Unsupported)?;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(file, flags, offset, block.pages().to_bytes())?;
    }
    Ok(())
}

/// Has the kernel map all memory that exists into this process, so that nobody has to wait for that page by page later: a guest that comes
/// here with its memory in place, for one. Only of memfds and other files of tmpfs. No memory comes into being. Some 50 ms per GiB that exists.
///
/// Returns how many pages that were. What cannot be mapped now is mapped when it is used.
///
/// # Errors
/// A file cannot be asked, or the kernel has no such request (before Linux 5.14).
pub fn map_existing(ram: &GuestRam) -> io::Result<PageCount> {
    let mut pages = 0;
    for (id, block) in (0..).map(BlockId).zip(ram.blocks()) {
        // What a file on a disk has may not be in memory, and of memory without a file nobody knows what exists.
        let in_memory = block.file().map_or(Ok(false), |(file, _)| is_tmpfs(file))?;
        if !in_memory {
            continue;
        }
        for run in Extents::of_block(id, block)?.data {
            block.fill_page_tables(run.start, run.count)?;
            pages += run.count.0;
        }
    }
    Ok(PageCount(pages))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::memory::extents::tests::memfd_ram;
    use crate::memory::zero::{GuestPage, PAGE_BYTES};
    use crate::units::PageIndex;

    /// Whether a page is in the page tables of this process.
    fn is_mapped(ram: &GuestRam, block: u16, page: u64) -> bool {
        let block = ram.block(BlockId(block)).unwrap();
        let (address, _) = block.host_range(PageIndex(page), PageCount(1)).unwrap();
        let mut entry = [0; 8];
        let entries = File::open("/proc/self/pagemap").unwrap();
        let at = address.addr() as u64 / PAGE_SIZE * 8;
        entries.read_exact_at(&mut entry, at).unwrap();
        u64::from_ne_bytes(entry) >> 63 == 1
    }

    #[test]
    fn memory_that_exists_is_mapped_and_none_comes_into_being() {
        let ram = memfd_ram(&[100, 3]);
        let exists = |block, page| match block {
            0 => (7..20).contains(&page) || page == 99,
            _ => page == 2,
        };
        let pages = (0..100)
            .map(|page| (0, page))
            .chain((0..3).map(|page| (1, page)));
        let pages: Vec<(u16, u64)> = pages.collect();
        for (block, page) in pages.iter().filter(|(block, page)| exists(*block, *page)) {
            let (file, _) = ram.block(BlockId(*block)).unwrap().file().unwrap();
            file.write_all_at(&[1], page * PAGE_SIZE).unwrap();
        }
        let before = populated_bytes(&ram).unwrap();
        assert!(!is_mapped(&ram, 0, 7));
        assert_eq!(map_existing(&ram).unwrap(), PageCount(15));
        for (block, page) in pages {
            assert_eq!(
                is_mapped(&ram, block, page),
                exists(block, page),
                "{block} {page}"
            );
        }
        assert_eq!(populated_bytes(&ram).unwrap(), before);
        assert_eq!(before, 15 * PAGE_SIZE);
    }

    #[test]
    fn emptied_memory_is_zero_and_gone() {
        let ram = memfd_ram(&[100, 3]);
        for (block, page) in [(0, 7), (0, 99), (1, 2)] {
            let block = ram.block(BlockId(block)).unwrap();
            let page = GuestPage::of(block, PageIndex(page)).unwrap();
            page.copy_from(&[5; PAGE_BYTES]);
        }
        assert_eq!(populated_bytes(&ram).unwrap(), 3 * PAGE_SIZE);
        empty(&ram).unwrap();
        assert_eq!(populated_bytes(&ram).unwrap(), 0);
        let block = ram.block(BlockId(0)).unwrap();
        assert!(GuestPage::of(block, PageIndex(7)).unwrap().is_zero());
    }
}
