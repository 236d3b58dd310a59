//! Which guest memory exists, asked of the files behind it, and runs of pages as one sequence that threads take pieces from.
//!
//! A hole of a memfd is never read: reading it through a mapping allocates it, which inflates a sparse VM until the host is out of
//! memory.

use std::fs::File;
use std::io;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::{GuestRam, RamBlock};
use crate::units::{BlockId, PAGE_SIZE, PageCount, PageIndex, PageRun};

/// `f_type` of tmpfs, where memfds live.
const TMPFS_MAGIC: i64 = 0x0102_1994;
/// Unit of `st_blocks`, whatever the file system.
const STAT_BLOCK_BYTES: i64 = 512;

/// All pages of the RAM, sorted by whether memory exists for them. Each page is in exactly one of both lists.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Extents {
    /// Pages that exist, whatever they contain. Pages of a block without a file count as existing.
    pub data: Vec<PageRun>,
    /// Pages that do not exist and read as zero.
    pub holes: Vec<PageRun>,
}

impl Extents {
    /// Asks the files behind the blocks. Nothing is read or allocated. Pages that the guest touches meanwhile may be in either list;
    /// the dirty log has them.
    ///
    /// # Errors
    /// When a file cannot be asked.
    pub fn of(ram: &GuestRam) -> io::Result<Self> {
        let mut extents = Self::default();
        for (id, block) in (0..).map(BlockId).zip(ram.blocks()) {
            extents.add_block(id, block)?;
        }
        Ok(extents)
    }

    /// Pages that exist.
    pub fn data_pages(&self) -> PageCount {
        PageCount(self.data.iter().map(|run| run.count.0).sum())
    }

    /// The same for one block.
    ///
    /// # Errors
    /// When its file cannot be asked.
    pub fn of_block(id: BlockId, block: &RamBlock) -> io::Result<Self> {
        let mut extents = Self::default();
        extents.add_block(id, block)?;
        Ok(extents)
    }

    /// Looks at the holes again: pages that have come into being since become data. Costs little where nothing has, unlike looking at
    /// everything: the kernel walks data page by page, and skips holes.
    ///
    /// # Errors
    /// When a file cannot be asked.
    pub fn look_again(&mut self, ram: &GuestRam) -> io::Result<()> {
        for hole in std::mem::take(&mut self.holes) {
            match ram.block(hole.block).and_then(RamBlock::file) {
                Some((file, start)) => self.add_range(hole, file, start)?,
                None => self.holes.push(hole),
            }
        }
        Ok(())
    }

    fn add_block(&mut self, id: BlockId, block: &RamBlock) -> io::Result<()> {
        let all = PageRun {
            block: id,
            start: PageIndex(0),
            count: block.pages(),
        };
        match block.file() {
            Some((file, start)) if !is_full(file, start + all.count.to_bytes())? => {
                self.add_range(all, file, start)
            }
            _ => {
                self.data.push(all);
                Ok(())
            }
        }
    }

    /// Sorts the pages of `range`, whose block begins at `file_start` of `file`.
    fn add_range(&mut self, range: PageRun, file: &File, file_start: u64) -> io::Result<()> {
        let run = |start, end| PageRun {
            block: range.block,
            start: PageIndex(start),
            count: PageCount(end - start),
        };
        let (mut page, pages) = (range.start.0, range.end().0);
        while page < pages {
            // Outwards to whole pages: a page that exists in part exists.
            let data = match seek(file, SeekFrom::Data(file_start + page * PAGE_SIZE))? {
                Some(offset) => (offset.saturating_sub(file_start) / PAGE_SIZE).clamp(page, pages),
                None => pages,
            };
            if data > page {
                self.holes.push(run(page, data));
            }
            if data == pages {
                break;
            }
            let hole = match seek(file, SeekFrom::Hole(file_start + data * PAGE_SIZE))? {
                Some(offset) => offset
                    .saturating_sub(file_start)
                    .div_ceil(PAGE_SIZE)
                    .clamp(data + 1, pages),
                None => pages,
            };
            self.data.push(run(data, hole));
            page = hole;
        }
        Ok(())
    }
}

/// Whether every page of a memfd (or other file of tmpfs) exists up to `block_end`, which spares the search: 10 ms per GiB. Other file systems count
/// blocks that hold no data, so there the search decides.
fn is_full(file: &File, block_end: u64) -> io::Result<bool> {
    let stat = rustix::fs::fstat(file)?;
    let covers = u64::try_from(stat.st_size).is_ok_and(|size| size >= block_end);
    let full = stat.st_blocks.saturating_mul(STAT_BLOCK_BYTES) >= stat.st_size;
    Ok(covers && full && is_tmpfs(file)?)
}

/// Whether what a file has is memory, and on no disk.
pub(super) fn is_tmpfs(file: &File) -> io::Result<bool> {
    Ok(rustix::fs::fstatfs(file)?.f_type == TMPFS_MAGIC)
}

/// `None` when there is nothing of the kind up to the end of the file.
fn seek(file: &File, to: SeekFrom) -> io::Result<Option<u64>> {
    match rustix::fs::seek(file, to) {
        Ok(offset) => Ok(Some(offset)),
        Err(Errno::NXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Runs of pages, addressable as one sequence: position 0 is the first page of the first run. Threads that share the work claim
/// ranges of positions with one atomic addition.
#[derive(Clone, Debug, Default)]
pub struct RunSequence {
    runs: Vec<PageRun>,
    /// Position after the last page of each run.
    ends: Vec<u64>,
}

impl RunSequence {
    /// The runs in their order. Empty runs are dropped.
    pub fn new(mut runs: Vec<PageRun>) -> Self {
        runs.retain(|run| run.count.0 > 0);
        let ends = runs
            .iter()
            .scan(0, |position, run| {
                *position += run.count.0;
                Some(*position)
            })
            .collect();
        Self { runs, ends }
    }

    /// Number of pages in all runs.
    pub fn pages(&self) -> PageCount {
        PageCount(self.ends.last().copied().unwrap_or(0))
    }

    /// The pages at positions `start` to `end`, as parts of runs, in order. Positions past the end do not exist.
    pub fn slice(&self, start: u64, end: u64) -> impl Iterator<Item = PageRun> {
        let first = self.ends.partition_point(|&run_end| run_end <= start);
        self.runs[first..]
            .iter()
            .zip(&self.ends[first..])
            .map_while(move |(run, &run_end)| {
                let run_start = run_end - run.count.0;
                let from = start.max(run_start);
                let to = end.min(run_end);
                (from < to).then(|| PageRun {
                    block: run.block,
                    start: PageIndex(run.start.0 + from - run_start),
                    count: PageCount(to - from),
                })
            })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;
    use vm_memory::{FileOffset, GuestAddress, GuestRegionMmap};

    use super::*;
    use crate::memory::zero::GuestPage;

    /// RAM of one memfd per block, all holes; sizes in pages.
    pub(crate) fn memfd_ram(pages: &[u64]) -> GuestRam {
        let blocks = pages.iter().enumerate().map(|(index, &pages)| {
            let fd = rustix::fs::memfd_create(
                "ram",
                rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::ALLOW_SEALING,
            )
            .unwrap();
            let file = File::from(fd);
            file.set_len(pages * PAGE_SIZE).unwrap();
            block(&format!("ram{index}"), pages, Some(file))
        });
        GuestRam::new(blocks.collect())
    }

    /// A block of anonymous memory.
    pub(crate) fn anonymous_block(name: &str, pages: u64) -> RamBlock {
        block(name, pages, None)
    }

    fn block(name: &str, pages: u64, file: Option<File>) -> RamBlock {
        let len = usize::try_from(pages * PAGE_SIZE).unwrap();
        let file = file.map(|file| FileOffset::new(file, 0));
        let region = GuestRegionMmap::<()>::from_range(GuestAddress(0), len, file).unwrap();
        RamBlock::new(name, Arc::new(region)).unwrap()
    }

    pub(crate) fn run(block: u16, start: u64, count: u64) -> PageRun {
        PageRun {
            block: BlockId(block),
            start: PageIndex(start),
            count: PageCount(count),
        }
    }

    #[test]
    fn existing_pages_and_holes_are_told_apart_without_reading() {
        let ram = memfd_ram(&[10, 4]);
        for page in [2, 3, 9] {
            let page = GuestPage::of(&ram.blocks()[0], PageIndex(page)).unwrap();
            page.copy_from(&[1; 4096]);
        }
        let expected = Extents {
            data: vec![run(0, 2, 2), run(0, 9, 1)],
            holes: vec![run(0, 0, 2), run(0, 4, 5), run(1, 0, 4)],
        };
        assert_eq!(Extents::of(&ram).unwrap(), expected);
        assert_eq!(
            Extents::of(&ram).unwrap(),
            expected,
            "looking changes nothing"
        );
    }

    #[test]
    fn a_second_look_finds_what_has_come_into_being_in_holes() {
        let ram = memfd_ram(&[10, 4]);
        let write = |block: usize, page| {
            let page = GuestPage::of(&ram.blocks()[block], PageIndex(page)).unwrap();
            page.copy_from(&[1; 4096]);
        };
        write(0, 2);
        let mut extents = Extents::of(&ram).unwrap();
        for (block, page) in [(0, 0), (0, 3), (0, 9), (1, 1)] {
            write(block, page);
        }
        extents.look_again(&ram).unwrap();
        let sorted = |mut runs: Vec<PageRun>| {
            runs.sort_by_key(|run| (run.block, run.start));
            runs.into_iter()
                .flat_map(|run| (run.start.0..run.end().0).map(move |page| (run.block, page)))
                .collect::<Vec<_>>()
        };
        let expected = Extents::of(&ram).unwrap();
        assert_eq!(sorted(extents.data), sorted(expected.data));
        assert_eq!(sorted(extents.holes), sorted(expected.holes));
    }

    #[test]
    fn a_full_file_is_recognised_and_one_missing_page_too() {
        let ram = memfd_ram(&[10]);
        for page in 0..10 {
            assert!(!Extents::of(&ram).unwrap().holes.is_empty());
            let page = GuestPage::of(&ram.blocks()[0], PageIndex(page)).unwrap();
            page.copy_from(&[1; 4096]);
        }
        let all = Extents::of(&ram).unwrap();
        assert_eq!((all.data, all.holes), (vec![run(0, 0, 10)], vec![]));
    }

    #[test]
    fn memory_without_a_file_counts_as_existing() {
        let ram = GuestRam::new(vec![anonymous_block("anonymous", 3)]);
        assert_eq!(Extents::of(&ram).unwrap().data, [run(0, 0, 3)]);
    }

    proptest! {
        #[test]
        fn slices_of_a_sequence_hold_every_page_once(
            lengths in prop::collection::vec(0_u64..20, 0..20), piece in 1_u64..30,
        ) {
            let runs: Vec<_> = lengths.iter().zip(0_u64..).map(|(&len, at)| run(0, at * 100, len)).collect();
            let all: Vec<u64> = runs.iter().flat_map(|run| run.start.0..run.end().0).collect();
            let sequence = RunSequence::new(runs);
            prop_assert_eq!(sequence.pages().0, all.len() as u64);
            let sliced: Vec<u64> = (0..all.len() as u64 + 5)
                .step_by(usize::try_from(piece).unwrap())
                .flat_map(|start| sequence.slice(start, start + piece))
                .flat_map(|run| run.start.0..run.end().0)
                .collect();
            prop_assert_eq!(sliced, all);
        }
    }
}
