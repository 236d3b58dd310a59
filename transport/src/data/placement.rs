//! Where arriving pages go.
//!
//! Touching a page of a memfd for the first time through a mapping costs about twice as much as writing it through the file, because
//! the kernel zeroes the page and takes a fault for each. So pages that do not exist yet are written with `pwrite` from a small buffer
//! that stays in the cache, and pages that exist are received where they belong. Pages that are zero and do not exist stay so.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{FallocateFlags, fallocate};

use super::DataError;
use super::page_set::{PageSet, rest_of};
use crate::memory::extents::Extents;
use crate::memory::zero::{GuestPage, PAGE_BYTES, map_present};
use crate::memory::{GuestRam, RamBlock};
use crate::units::{PAGE_SIZE, PageIndex, PageRun};
use crate::wire::ram::RunKind;

/// Zero runs of at least this many pages that exist are given back to the system (64 KiB); shorter ones are overwritten, which is
/// cheaper than a system call and the fault that follows when they are used again.
const PUNCH_PAGES_MIN: u64 = 16;
/// Shorter runs are left to fault: the kernel enters about as many neighbours with each fault anyway.
const MAP_PAGES_MIN: u64 = 16;
/// `f_type` of hugetlbfs, which does not support `write`.
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;

/// The guest's RAM at the target, with what is known of its pages.
#[derive(Debug)]
pub(crate) struct Placement {
    ram: GuestRam,
    blocks: Vec<Block>,
}

#[derive(Debug)]
struct Block {
    /// Pages are written through the file as long as they do not exist. False without a file, or when it cannot be written.
    writes: AtomicBool,
    /// Pages that exist. Meaningless when `writes` has never been true.
    present: PageSet,
    /// Pages that were entered into the page tables, see [`Placement::prepare`].
    mapped: PageSet,
}

impl Placement {
    /// Looks which pages exist already.
    ///
    /// # Errors
    /// When the files behind the RAM cannot be asked.
    pub(crate) fn new(ram: GuestRam) -> io::Result<Self> {
        let blocks: Vec<_> = ram
            .blocks()
            .iter()
            .map(|block| Block {
                writes: AtomicBool::new(block.file().is_some_and(|(file, _)| accepts_writes(file))),
                present: PageSet::new(block.pages()),
                mapped: PageSet::new(block.pages()),
            })
            .collect();
        for run in Extents::of(&ram)?.data {
            blocks[run.block.index()].present.insert(run);
        }
        Ok(Self { ram, blocks })
    }

    /// The longest start of `run` that goes the same way, and whether that way is straight into the mapping (else through
    /// [`write`](Self::write)).
    pub(crate) fn first_part(&self, run: PageRun) -> (PageRun, bool) {
        let block = &self.blocks[run.block.index()];
        if block.writes.load(Ordering::Relaxed) {
            block.present.first_part(run)
        } else {
            (run, true)
        }
    }

    /// Makes receiving straight into `run`, which exists, cheap: pages that were written through the file, or by another process, are
    /// in no page table yet, and a fault for each costs more than the copy.
    pub(crate) fn prepare(&self, run: PageRun) {
        let block = &self.blocks[run.block.index()];
        if run.count.0 < MAP_PAGES_MIN || !block.writes.load(Ordering::Relaxed) {
            return;
        }
        let (part, mapped) = block.mapped.first_part(run);
        if !mapped || part != run {
            map_present(self.block(run), run.start, run.count);
            block.mapped.insert(run);
        }
    }

    /// Whether `run`'s block is written through its file.
    pub(crate) fn writes(&self, run: PageRun) -> bool {
        self.blocks[run.block.index()]
            .writes
            .load(Ordering::Relaxed)
    }

    /// Writes pages through the file.
    ///
    /// # Errors
    /// [`DataError::Memory`] when there is no memory for them.
    pub(crate) fn write(&self, run: PageRun, content: &[u8]) -> Result<(), DataError> {
        let block = &self.blocks[run.block.index()];
        if let Some((file, start)) = self.block(run).file() {
            match file.write_all_at(content, start + run.start.to_offset()) {
                Ok(()) => {
                    block.present.insert(run);
                    return Ok(());
                }
                Err(error) if is_refusal(&error) => {}
                Err(error) => return Err(DataError::from_kernel("writing guest pages", error)),
            }
        }
        // The file is sealed or opened for reading only: from now on through the mapping, which was made before.
        block.writes.store(false, Ordering::Relaxed);
        let pages = (run.start.0..run.end().0).filter_map(|index| self.page(run, index));
        for (page, content) in pages.zip(content.as_chunks::<PAGE_BYTES>().0) {
            page.copy_from(content);
        }
        Ok(())
    }

    /// Makes pages read as zero without allocating memory for them.
    pub(crate) fn clear(&self, run: PageRun, kind: RunKind) {
        let block = &self.blocks[run.block.index()];
        if !block.writes.load(Ordering::Relaxed) {
            self.overwrite(run);
            return;
        }
        let mut left = Some(run);
        while let Some(all) = left {
            let (part, present) = block.present.first_part(all);
            left = rest_of(all, part);
            if !present {
                continue;
            }
            let punch = kind == RunKind::Hole || part.count.0 >= PUNCH_PAGES_MIN;
            if punch && self.punch(part) {
                block.present.remove(part);
                block.mapped.remove(part);
            } else {
                self.overwrite(part);
            }
        }
    }

    /// A page of the block that `run` is in.
    pub(crate) fn page(&self, run: PageRun, index: u64) -> Option<GuestPage<'_>> {
        GuestPage::of(self.block(run), PageIndex(index))
    }

    /// Gives the memory back; false if the file does not support it.
    fn punch(&self, run: PageRun) -> bool {
        let Some((file, start)) = self.block(run).file() else {
            return false;
        };
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let offset = start + run.start.to_offset();
        fallocate(file, flags, offset, run.count.to_bytes()).is_ok()
    }

    fn overwrite(&self, run: PageRun) {
        for index in run.start.0..run.end().0 {
            if let Some(page) = self.page(run, index) {
                page.clear();
            }
        }
    }

    fn block(&self, run: PageRun) -> &RamBlock {
        &self.ram.blocks()[run.block.index()]
    }
}

fn accepts_writes(file: &File) -> bool {
    // Unknown file systems are tried; `write` finds out.
    rustix::fs::fstatfs(file).is_ok_and(|stat| stat.f_type != HUGETLBFS_MAGIC)
}

fn is_refusal(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EPERM | libc::EBADF | libc::EINVAL | libc::EOPNOTSUPP)
    )
}

const _: () = assert!(PAGE_BYTES as u64 == PAGE_SIZE);
