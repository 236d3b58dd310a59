//! Dirty log from the host's page tables: userfaultfd write protection in asynchronous mode, read with `PAGEMAP_SCAN`.
//!
//! Every page of the mapping is write-protected. The first write to it faults, and the kernel lifts the protection and lets the
//! write go on without asking anybody. A scan reports the unprotected pages and protects them again, page by page in one step, so
//! that a write is in this fetch or in the next. A write that is still under way through a stale TLB entry when its page is
//! reported has ended when the scan returns, because the scan flushes; whoever reads the page afterwards sees it.
//!
//! What it sees, and what not:
//! - Writes through *this process's mapping*, by any thread and by system calls that are given its addresses. Another mapping of
//!   the same file, here or in another process, has page tables of its own and is not seen: make a log for each.
//! - Not DMA, nor other writes through pages that were pinned for long before the protection (VFIO, fixed io_uring buffers).
//! - With 4 KiB pages it is exact. Where the kernel maps huge pages, neighbours of a written page may be reported too.
//!
//! Nothing is populated: a page that does not exist is protected by a marker in the page table, which costs 2 MiB per GiB for
//! tables that were not there, and stays a hole until it is touched.
//!
//! Needs Linux 6.7; no privilege. One userfaultfd may watch a mapping at a time, so this log and post-copy exclude each other.

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vmferry_transport::memory::extents::Extents;
use vmferry_transport::memory::{
    DirtyLog, DirtyLogError, DirtyMap, GuestRam, PageBitmap, WriteProtector,
};
use vmferry_transport::units::{BlockId, PAGE_SIZE, PageCount, PageIndex};

use super::ioctl::{self, PageRegion};

const NAME: &str = "pagemap";

/// Runs of pages that one scan may report: 48 KiB of buffer. When more are there, the scan goes on where it stopped.
const RUNS_PER_SCAN: usize = 2048;

/// Dirty log of all writes through the mappings of a [`GuestRam`].
pub struct PagemapLog {
    /// Keeps the mappings where they are.
    ram: GuestRam,
    /// Addresses of all blocks in this process.
    ranges: Vec<Range<u64>>,
    uffd: OwnedFd,
    pagemap: File,
    found: Vec<PageRegion>,
    /// Number of blocks that are registered, from the first one on.
    registered: usize,
}

impl PagemapLog {
    /// A log over `ram`, not started.
    ///
    /// # Errors
    /// When the kernel lacks the interface or denies it; the operation tells which part.
    pub fn new(ram: GuestRam) -> Result<Self, DirtyLogError> {
        let ranges = ram.blocks().iter().map(|block| {
            let start = block.mapping().host_address().addr() as u64;
            start..start + block.pages().to_bytes()
        });
        Ok(Self {
            ranges: ranges.collect(),
            ram,
            uffd: ioctl::open().map_err(|source| failed("opening a userfaultfd", source))?,
            pagemap: ioctl::open_pagemap()
                .map_err(|source| failed("opening /proc/self/pagemap", source))?,
            found: vec![PageRegion::default(); RUNS_PER_SCAN],
            registered: 0,
        })
    }

    fn start_block(&mut self, index: usize) -> Result<(), DirtyLogError> {
        let range = &self.ranges[index];
        ioctl::register(&self.uffd, range)
            .map_err(|source| failed("registering guest memory", source))?;
        self.registered += 1;
        ioctl::protect(&self.uffd, range)
            .map_err(|source| failed("write-protecting guest memory", source))?;
        // Proves that this kernel has the scan, before anything depends on it.
        scan(
            &self.pagemap,
            &(range.start..range.start + PAGE_SIZE),
            &mut self.found,
            &mut PageBitmap::new(PageCount(1)),
        )
    }
}

impl DirtyLog for PagemapLog {
    fn name(&self) -> &'static str {
        NAME
    }

    fn start(&mut self) -> Result<(), DirtyLogError> {
        self.stop()?;
        for index in 0..self.ranges.len() {
            if let Err(error) = self.start_block(index) {
                // The first error is the one to report. What cannot be unregistered ends when the userfaultfd is closed.
                let _already_failed = self.stop();
                return Err(error);
            }
        }
        Ok(())
    }

    /// # Panics
    /// If `into` has fewer blocks than the RAM.
    fn fetch(&mut self, into: &mut DirtyMap) -> Result<(), DirtyLogError> {
        if self.registered < self.ranges.len() {
            return Err(failed(
                "fetching before a start",
                io::ErrorKind::InvalidInput.into(),
            ));
        }
        for (block, range) in (0..).map(BlockId).zip(&self.ranges) {
            scan(&self.pagemap, range, &mut self.found, into.block_mut(block))?;
        }
        Ok(())
    }

    fn take_extents(&mut self) -> Option<Extents> {
        None
    }

    fn protector(&self) -> Option<Arc<dyn WriteProtector>> {
        None
    }

    fn stop(&mut self) -> Result<(), DirtyLogError> {
        let mut result = Ok(());
        for range in self.ranges.iter().take(self.registered) {
            let answer = ioctl::unregister(&self.uffd, range)
                .map_err(|source| failed("unregistering guest memory", source));
            result = result.and(answer);
        }
        self.registered = 0;
        result
    }
}

impl fmt::Debug for PagemapLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PagemapLog")
            .field("ram", &self.ram)
            .field("registered", &self.registered)
            .finish_non_exhaustive()
    }
}

/// Marks the written pages of `range` in `into`, whose first page is the first of `range`, and protects them again.
fn scan(
    pagemap: &File,
    range: &Range<u64>,
    found: &mut [PageRegion],
    into: &mut PageBitmap,
) -> Result<(), DirtyLogError> {
    let mut rest = range.clone();
    while !rest.is_empty() {
        let (runs, walk_end) = ioctl::scan_written(pagemap, &rest, found)
            .map_err(|source| failed("scanning page tables", source))?;
        for run in &found[..runs] {
            if run.start < rest.start || run.end > rest.end || run.start >= run.end {
                return Err(failed(
                    "scanning page tables",
                    io::Error::other("the kernel reported pages that were not asked for"),
                ));
            }
            into.set_range(
                PageIndex((run.start - range.start) / PAGE_SIZE),
                PageCount::from_bytes_ceil(run.end - run.start),
            );
        }
        if walk_end <= rest.start || walk_end > rest.end {
            return Err(failed(
                "scanning page tables",
                io::Error::other("the kernel made no progress"),
            ));
        }
        rest.start = walk_end;
    }
    Ok(())
}

fn failed(op: &'static str, source: io::Error) -> DirtyLogError {
    DirtyLogError {
        log: NAME,
        op,
        source,
    }
}

#[cfg(test)]
mod tests;
