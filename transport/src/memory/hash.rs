//! One number for the content of all guest RAM, to compare source and target after a migration.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use xxhash_rust::xxh3::xxh3_128;

use super::GuestRam;
use super::extents::{Extents, RunSequence};
use super::populate::populated_bytes;
use super::zero::{GuestPage, PAGE_BYTES};
use crate::units::{BlockId, PageIndex};

/// Threads that hash: more only help where memory is faster than two cores, and the machine has other work.
const THREADS: usize = 2;
/// Pages taken by a thread at a time: 2 MiB.
const CLAIM_PAGES: u64 = 512;

/// Content of all guest RAM, and how much memory holds it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct RamHash {
    /// Depends on the content and place of every page that is not zero; zero pages and holes do not count. XXH3, so good against
    /// accidents, not against intent.
    pub hash: u128,
    /// Bytes of memory behind the RAM files. Differs between two sides with equal content when one of them is sparser.
    pub populated_bytes: u64,
}

/// Hashes the RAM without allocating holes. Blocks the caller for 0.1 to 0.2 s per GiB; meaningful only while nothing writes.
///
/// # Errors
/// When the files behind the blocks cannot be asked for their holes.
pub fn ram_hash(ram: &GuestRam) -> io::Result<RamHash> {
    let populated_bytes = populated_bytes(ram)?;
    let pages = RunSequence::new(Extents::of(ram)?.data);
    let cursor = AtomicU64::new(0);
    let hash = thread::scope(|scope| {
        let others: Vec<_> = (1..THREADS)
            .map(|_| scope.spawn(|| hash_claimed(ram, &pages, &cursor)))
            .collect();
        let own = hash_claimed(ram, &pages, &cursor);
        others.into_iter().fold(own, |sum, thread| {
            sum.wrapping_add(thread.join().expect("hashing does not panic"))
        })
    });
    Ok(RamHash {
        hash,
        populated_bytes,
    })
}

fn hash_claimed(ram: &GuestRam, pages: &RunSequence, cursor: &AtomicU64) -> u128 {
    let mut sum: u128 = 0;
    let mut content = [0; PAGE_BYTES];
    loop {
        // Relaxed: the addition alone decides who has which pages; nothing else is published through it.
        let start = cursor.fetch_add(CLAIM_PAGES, Ordering::Relaxed);
        if start >= pages.pages().0 {
            return sum;
        }
        for run in pages.slice(start, start + CLAIM_PAGES) {
            let Some(block) = ram.block(run.block) else {
                continue;
            };
            for index in run.start.0..run.end().0 {
                let Some(page) = GuestPage::of(block, PageIndex(index)) else {
                    continue;
                };
                if !page.is_zero() {
                    page.copy_to(&mut content);
                    sum = sum.wrapping_add(at_place(xxh3_128(&content), run.block, index));
                }
            }
        }
    }
}

/// Ties the hash of a page to its place; a plain sum would not notice two pages that changed places.
fn at_place(hash: u128, block: BlockId, index: u64) -> u128 {
    let mut bytes = [0; 26];
    bytes[..16].copy_from_slice(&hash.to_le_bytes());
    bytes[16..24].copy_from_slice(&index.to_le_bytes());
    bytes[24..].copy_from_slice(&block.0.to_le_bytes());
    xxh3_128(&bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::extents::tests::memfd_ram;

    fn write(ram: &GuestRam, block: u16, page: u64, value: u8) {
        let block = ram.block(BlockId(block)).unwrap();
        let page = GuestPage::of(block, PageIndex(page)).unwrap();
        page.copy_from(&[value; PAGE_BYTES]);
    }

    fn hash(ram: &GuestRam) -> u128 {
        ram_hash(ram).unwrap().hash
    }

    #[test]
    fn zero_pages_and_holes_hash_alike() {
        let (sparse, full) = (memfd_ram(&[1500, 7]), memfd_ram(&[1500, 7]));
        for page in 0..1500 {
            write(&full, 0, page, 0);
        }
        for ram in [&sparse, &full] {
            write(ram, 0, 1400, 5);
            write(ram, 1, 6, 9);
        }
        assert_eq!(hash(&sparse), hash(&full));
        assert_eq!(ram_hash(&sparse).unwrap().populated_bytes, 2 * 4096);
        assert_eq!(ram_hash(&full).unwrap().populated_bytes, 1501 * 4096);
    }

    #[test]
    fn content_and_place_of_a_page_change_the_hash() {
        let seen: Vec<u128> = [(0, 3, 7), (0, 4, 7), (1, 3, 7), (0, 3, 8)]
            .into_iter()
            .map(|(block, page, value)| {
                let ram = memfd_ram(&[8, 8]);
                write(&ram, block, page, value);
                hash(&ram)
            })
            .collect();
        for (at, hash) in seen.iter().enumerate() {
            assert!(!seen[at + 1..].contains(hash) && *hash != 0);
        }
    }
}
