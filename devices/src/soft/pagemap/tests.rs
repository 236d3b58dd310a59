//! The log against the running kernel: exactness, holes, concurrency, restarts.

use super::*;

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress,
};
use vmferry_transport::memory::RamBlock;

type Region = GuestRegionMmap<()>;

struct Memory {
    regions: Vec<Arc<Region>>,
    ram: GuestRam,
}

impl Memory {
    /// Fresh blocks of so many pages, all holes.
    fn new(pages: &[u64]) -> Self {
        let regions: Vec<_> = pages
            .iter()
            .map(|pages| {
                let flags = rustix::fs::MemfdFlags::CLOEXEC;
                let file = File::from(rustix::fs::memfd_create("pagemap-test", flags).unwrap());
                file.set_len(pages * PAGE_SIZE).unwrap();
                map(file)
            })
            .collect();
        let blocks = regions
            .iter()
            .enumerate()
            .map(|(n, region)| RamBlock::new(&format!("ram{n}"), region.clone()).unwrap());
        Self {
            ram: GuestRam::new(blocks.collect()),
            regions,
        }
    }

    fn log(&self) -> PagemapLog {
        PagemapLog::new(self.ram.clone()).unwrap()
    }

    fn write(&self, block: usize, page: u64, value: u64) {
        write(&self.regions[block], page, value);
    }

    /// 512-byte blocks that the files of all RAM blocks have.
    fn allocated(&self) -> u64 {
        self.regions
            .iter()
            .map(|region| {
                let offset = GuestMemoryRegion::file_offset(&**region).unwrap();
                offset.file().metadata().unwrap().blocks()
            })
            .sum()
    }
}

fn map(file: File) -> Arc<Region> {
    let bytes = usize::try_from(file.metadata().unwrap().len()).unwrap();
    Arc::new(Region::from_range(GuestAddress(0), bytes, Some(FileOffset::new(file, 0))).unwrap())
}

fn write(region: &Region, page: u64, value: u64) {
    region
        .write_obj(value, MemoryRegionAddress(page * PAGE_SIZE + 16))
        .unwrap();
}

fn read(region: &Region, page: u64) -> u64 {
    region
        .read_obj(MemoryRegionAddress(page * PAGE_SIZE + 16))
        .unwrap()
}

fn fetch(log: &mut PagemapLog) -> DirtyMap {
    let mut map = log.ram.empty_map();
    log.fetch(&mut map).unwrap();
    map
}

fn pages(map: &DirtyMap, block: u16) -> Vec<u64> {
    map.block(BlockId(block))
        .runs(BlockId(block))
        .flat_map(|run| run.start.0..run.end().0)
        .collect()
}

#[test]
fn exactly_the_written_pages_are_reported_once_and_in_their_block() {
    let memory = Memory::new(&[1000, 70]);
    // Some pages exist before the log, written or only read; some do not.
    for page in (0..1000).step_by(3) {
        memory.write(0, page, 1);
    }
    read(&memory.regions[0], 1);
    let mut log = memory.log();
    log.start().unwrap();
    assert_eq!(fetch(&mut log).count(), PageCount(0));

    for page in [0, 1, 2, 3, 500, 999] {
        memory.write(0, page, 2);
    }
    memory.write(1, 69, 2);
    let map = fetch(&mut log);
    assert_eq!(pages(&map, 0), [0, 1, 2, 3, 500, 999]);
    assert_eq!(pages(&map, 1), [69]);
    assert_eq!(fetch(&mut log).count(), PageCount(0));

    memory.write(0, 500, 3);
    assert_eq!(pages(&fetch(&mut log), 0), [500]);
    log.stop().unwrap();
}

#[test]
fn a_fetch_keeps_marks_that_are_there() {
    let memory = Memory::new(&[10]);
    let mut log = memory.log();
    log.start().unwrap();
    memory.write(0, 4, 1);
    let mut map = log.ram.empty_map();
    map.block_mut(BlockId(0)).set(PageIndex(7));
    log.fetch(&mut map).unwrap();
    assert_eq!(pages(&map, 0), [4, 7]);
}

#[test]
fn holes_stay_holes_and_reading_is_not_writing() {
    // More than one page table, so that there are tables missing, too.
    let memory = Memory::new(&[3 * 512 + 5]);
    let region = memory.regions[0].clone();
    let mut log = memory.log();
    log.start().unwrap();
    assert_eq!(fetch(&mut log).count(), PageCount(0));
    assert_eq!(
        memory.allocated(),
        0,
        "neither starting nor fetching allocates"
    );

    memory.write(0, 600, 1);
    assert_eq!(memory.allocated(), 8);
    assert_eq!(pages(&fetch(&mut log), 0), [600]);
    // Reads of an existing page and of a hole; the latter allocates, as shared memory does, but is no write.
    assert_eq!((read(&region, 600), read(&region, 601)), (1, 0));
    assert_eq!(fetch(&mut log).count(), PageCount(0));
    memory.write(0, 601, 1);
    assert_eq!(pages(&fetch(&mut log), 0), [601]);
}

#[test]
fn more_runs_than_a_scan_can_report_are_all_reported() {
    let memory = Memory::new(&[3 * RUNS_PER_SCAN as u64 * 2 + 1]);
    let mut log = memory.log();
    log.start().unwrap();
    let written: Vec<_> = (0..3 * RUNS_PER_SCAN as u64 * 2 + 1).step_by(2).collect();
    for page in &written {
        memory.write(0, *page, 1);
    }
    assert_eq!(pages(&fetch(&mut log), 0), written);
    assert_eq!(fetch(&mut log).count(), PageCount(0));
}

#[test]
fn writes_by_system_calls_are_seen() {
    let memory = Memory::new(&[100]);
    let source = tempfile_with(&[0x55; 8192]);
    memory.write(0, 20, 1);
    let mut log = memory.log();
    log.start().unwrap();
    // The kernel copies straight into the mapping: a page that exists, and one that does not.
    let mut file = &source;
    memory.regions[0]
        .as_volatile_slice()
        .unwrap()
        .subslice(20 * 4096, 8192)
        .map(|mut slice| {
            vm_memory::ReadVolatile::read_exact_volatile(&mut file, &mut slice).unwrap();
        })
        .unwrap();
    assert_eq!(pages(&fetch(&mut log), 0), [20, 21]);
    assert_eq!(read(&memory.regions[0], 21), 0x5555_5555_5555_5555);
}

fn tempfile_with(bytes: &[u8]) -> File {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let file = File::from(rustix::fs::memfd_create("pagemap-source", flags).unwrap());
    file.write_all_at(bytes, 0).unwrap();
    file
}

#[test]
fn another_mapping_of_the_same_file_is_not_seen() {
    let memory = Memory::new(&[100]);
    let offset = GuestMemoryRegion::file_offset(&*memory.regions[0]).unwrap();
    let other = map(offset.file().try_clone().unwrap());
    let mut log = memory.log();
    log.start().unwrap();
    write(&other, 5, 1);
    assert_eq!(fetch(&mut log).count(), PageCount(0), "as documented");
    assert_eq!(read(&memory.regions[0], 5), 1);
    assert_eq!(fetch(&mut log).count(), PageCount(0));
}

#[test]
fn a_log_can_be_started_again_and_forgets_what_was_before() {
    let memory = Memory::new(&[100]);
    let mut log = memory.log();
    log.stop().unwrap();
    for turn in 0..3 {
        memory.write(0, 50, turn);
        log.start().unwrap();
        memory.write(0, 10 + turn, turn);
        assert_eq!(pages(&fetch(&mut log), 0), [10 + turn]);
        memory.write(0, 60, turn);
        log.stop().unwrap();
        let error = log.fetch(&mut memory.ram.empty_map()).unwrap_err();
        assert!(error.op.contains("before a start"), "{error}");
    }
    // Dropped while running: another one may watch the mapping then.
    log.start().unwrap();
    let mut second = memory.log();
    let busy = second.start().unwrap_err();
    assert_eq!(busy.source.raw_os_error(), Some(libc::EBUSY));
    drop(log);
    second.start().unwrap();
    memory.write(0, 70, 1);
    assert_eq!(pages(&fetch(&mut second), 0), [70]);
}

#[test]
fn a_start_that_fails_half_way_leaves_nothing_registered() {
    let memory = Memory::new(&[10, 10]);
    let only_second = GuestRam::new(vec![memory.ram.blocks()[1].clone()]);
    let mut holder = PagemapLog::new(only_second.clone()).unwrap();
    holder.start().unwrap();
    let mut log = memory.log();
    log.start().unwrap_err();
    let only_first = GuestRam::new(vec![memory.ram.blocks()[0].clone()]);
    PagemapLog::new(only_first).unwrap().start().unwrap();
    holder.stop().unwrap();
    log.start().unwrap();
}

#[test]
fn a_copy_that_follows_the_log_ends_up_equal_under_concurrent_writers() {
    const PAGES: u64 = 2000;
    const WRITERS: u64 = 3;
    let memory = Memory::new(&[PAGES]);
    let mut log = memory.log();
    let mut copy = vec![0; usize::try_from(PAGES).unwrap()];
    let mut reported = 0;
    let mut follow = |log: &mut PagemapLog| {
        let map = fetch(log);
        for page in pages(&map, 0) {
            assert!(page < PAGES / 2, "page {page} was never written");
            copy[usize::try_from(page).unwrap()] = read(&memory.regions[0], page);
            reported += 1;
        }
    };
    log.start().unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| {
                let memory = &memory;
                // All pages of the first half, each by one writer, in an order that keeps runs short.
                scope.spawn(move || {
                    for turn in 0..60_000 {
                        let page = (turn * 7 + writer) * WRITERS % (PAGES / 2 / WRITERS * WRITERS);
                        memory.write(0, page + writer, (turn + 1) << 2 | writer);
                    }
                })
            })
            .collect();
        let done = &done;
        let finisher = scope.spawn(move || {
            writers.into_iter().for_each(|w| w.join().unwrap());
            done.store(true, Ordering::Release);
        });
        while !done.load(Ordering::Acquire) {
            follow(&mut log);
        }
        finisher.join().unwrap();
    });
    follow(&mut log);
    assert!(reported > 0);
    for page in 0..PAGES {
        let now = read(&memory.regions[0], page);
        assert_eq!(copy[usize::try_from(page).unwrap()], now, "page {page}");
    }
    assert_eq!(fetch(&mut log).count(), PageCount(0));
}
