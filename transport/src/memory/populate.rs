//! How much memory really stands behind guest RAM.

use std::collections::BTreeSet;
use std::io;

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
