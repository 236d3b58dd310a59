//! How much memory really stands behind guest RAM.

use std::collections::BTreeSet;
use std::io;

use rustix::fs::{FallocateFlags, fallocate};

use super::GuestRam;
use crate::units::PAGE_SIZE;

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::extents::tests::memfd_ram;
    use crate::memory::zero::{GuestPage, PAGE_BYTES};
    use crate::units::{BlockId, PageIndex};

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
