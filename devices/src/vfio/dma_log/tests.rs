//! Logs of what devices write: every page, in the right block, once; and what they are asked where they cannot do everything.

use std::sync::Mutex;

use super::*;
use crate::vfio::model::{SharedWorld, lock, vm};
use crate::vfio::states::Support;

const PAGES: u64 = 1000;
const GIB: u64 = 1 << 30;
const SUPPORT: Support = Support {
    stop_copy: true,
    p2p: true,
    pre_copy: true,
};

/// RAM below and above a hole, the second mapped in two parts, none at a multiple of 64 pages.
fn mapped() -> Vec<Mapped> {
    let part = |iova, block, start, count| Mapped {
        iova,
        block: BlockId(block),
        start: PageIndex(start),
        count: PageCount(count),
    };
    vec![
        part(0, 0, 0, PAGES),
        part(4 * GIB, 1, 0, 300),
        part(4 * GIB + 300 * PAGE_SIZE, 1, 300, PAGES - 300),
        part(8 * GIB, 2, 17, 100),
    ]
}

fn empty_map() -> DirtyMap {
    DirtyMap::new([PageCount(PAGES); 3])
}

/// Block and page of all marks.
fn marks(map: &DirtyMap) -> Vec<(u16, u64)> {
    let pages = map
        .runs()
        .flat_map(|run| (run.start.0..run.end().0).map(move |page| (run.block.0, page)));
    pages.collect()
}

fn fetch(log: &mut dyn DirtyLog) -> Vec<(u16, u64)> {
    let mut map = empty_map();
    log.fetch(&mut map).unwrap();
    marks(&map)
}

/// A device that logs, and its log.
fn device(ranges_max: usize, page_bytes: u64) -> (SharedWorld, Box<dyn DirtyLog>) {
    let (world, set) = vm(&[SUPPORT]);
    {
        let dma = &mut lock(&world).devices[0].dma;
        (dma.logs, dma.ranges_max, dma.page_bytes) = (true, ranges_max, page_bytes);
    }
    let mut logs = dirty_logs(&set, None, &mapped()).unwrap();
    assert_eq!(logs.len(), 1);
    (world, logs.remove(0))
}

fn write(world: &SharedWorld, addresses: &[u64]) {
    let mut world = lock(world);
    addresses
        .iter()
        .for_each(|address| world.devices[0].dma.write(*address));
}

#[test]
fn every_page_that_a_device_writes_is_reported_once_in_its_block() {
    let (world, mut log) = device(256, 4096);
    write(&world, &[0]);
    log.start().unwrap();
    let at = |page: u64| 4 * GIB + page * PAGE_SIZE;
    write(
        &world,
        &[
            4095,
            PAGES * PAGE_SIZE - 1,
            PAGES * PAGE_SIZE,
            at(299),
            at(300),
            at(999) + 7,
            8 * GIB,
            8 * GIB + 99 * PAGE_SIZE,
        ],
    );
    let expected = [
        (0, 0),
        (0, 999),
        (1, 299),
        (1, 300),
        (1, 999),
        (2, 17),
        (2, 116),
    ];
    assert_eq!(fetch(log.as_mut()), expected);
    assert_eq!(fetch(log.as_mut()), []);
    write(&world, &[at(1)]);
    let mut map = empty_map();
    map.block_mut(BlockId(1)).set(PageIndex(5));
    log.fetch(&mut map).unwrap();
    assert_eq!(marks(&map), [(1, 1), (1, 5)], "other marks stay");
    log.stop().unwrap();
    log.stop().unwrap();
    assert!(lock(&world).devices[0].dma.logging.is_none());
}

#[test]
fn every_single_page_of_every_mapping_is_marked_where_it_is() {
    let (world, mut log) = device(256, 4096);
    log.start().unwrap();
    for mapping in mapped() {
        for page in 0..mapping.count.0 {
            write(&world, &[mapping.iova + page * PAGE_SIZE]);
            let expected = (mapping.block.0, mapping.start.0 + page);
            assert_eq!(fetch(log.as_mut()), [expected]);
        }
    }
}

#[test]
fn a_device_with_larger_pages_marks_all_that_may_have_been_written_and_nothing_outside() {
    let (world, mut log) = device(256, 65536);
    log.start().unwrap();
    write(&world, &[5 * PAGE_SIZE, 8 * GIB + 98 * PAGE_SIZE]);
    let mut expected: Vec<_> = (0..16).map(|page| (0, page)).collect();
    // The device's page goes beyond the mapping.
    expected.extend((96..100).map(|page| (2, 17 + page)));
    assert_eq!(fetch(log.as_mut()), expected);
}

#[test]
fn a_page_of_a_device_across_two_mappings_is_marked_in_both() {
    let (world, mut log) = device(256, 65536);
    log.start().unwrap();
    // Pages 288 to 303 of what the device sees; the first mapping ends with page 299.
    write(&world, &[4 * GIB + 303 * PAGE_SIZE]);
    let expected: Vec<_> = (288..304).map(|page| (1, page)).collect();
    assert_eq!(fetch(log.as_mut()), expected);
    assert_eq!(fetch(log.as_mut()), []);
}

#[test]
fn reports_meet_at_multiples_of_their_size() {
    let of = |start, bytes| {
        let pieces: Vec<_> = pieces(Iova { start, bytes }).collect();
        assert!(pieces.iter().all(|piece| piece.bytes <= BYTES_PER_REPORT));
        pieces
            .iter()
            .map(|piece| (piece.start, piece.bytes))
            .collect::<Vec<_>>()
    };
    assert_eq!(of(0, 4096), [(0, 4096)]);
    assert_eq!(
        of(GIB - 4096, GIB + 8192),
        [(GIB - 4096, 4096), (GIB, GIB), (2 * GIB, 4096)]
    );
    assert_eq!(of(GIB, 0), []);
    let end = u64::MAX - 4095;
    assert_eq!(of(end - 4096, 4096), [(end - 4096, 4096)]);
}

#[test]
fn bits_of_a_neighbour_in_the_same_word_are_not_taken_for_ones_own() {
    // The first two mappings of block 1, whose bits share word 4.
    let mappings = mapped();
    let range = Iova {
        start: 4 * GIB,
        bytes: PAGES * PAGE_SIZE,
    };
    let words = vec![u64::MAX; words_for(range, PAGE_SIZE)];
    for (mapping, pages) in [(1, 0..300), (2, 300..PAGES)] {
        let mut map = empty_map();
        mappings[mapping].mark(range, PAGE_SIZE, &words, &mut map);
        let expected: Vec<_> = pages.map(|page| (1, page)).collect();
        assert_eq!(marks(&map), expected);
    }
}

#[test]
fn neighbours_are_one_range_and_a_device_with_room_for_few_gets_one_over_all() {
    let (world, mut log) = device(256, 4096);
    log.start().unwrap();
    let logging = |world: &SharedWorld| lock(world).devices[0].dma.logging.clone();
    let range = |start, bytes| Iova { start, bytes };
    let joined = vec![
        range(0, PAGES * PAGE_SIZE),
        range(4 * GIB, PAGES * PAGE_SIZE),
        range(8 * GIB, 100 * PAGE_SIZE),
    ];
    assert_eq!(logging(&world), Some(joined));
    // Started again without a stop: the attempt before may have ended badly.
    log.start().unwrap();

    let (world, mut log) = device(2, 4096);
    log.start().unwrap();
    let all = range(0, 8 * GIB + 100 * PAGE_SIZE);
    assert_eq!(logging(&world), Some(vec![all]));
    write(&world, &[8 * GIB + PAGE_SIZE, 5 * GIB]);
    assert_eq!(
        fetch(log.as_mut()),
        [(2, 18)],
        "what is not mapped is not marked"
    );
}

#[test]
fn a_device_that_refuses_is_named() {
    let (world, mut log) = device(256, 4096);
    log.start().unwrap();
    lock(&world).devices[0].dma.logging = None;
    let error = log.fetch(&mut empty_map()).unwrap_err();
    assert_eq!(error.to_string(), "dirty log vfio-dma: reading failed");
    assert!(error.source.to_string().contains("vfio/0"), "{error:?}");
    log.stop().unwrap_err();

    let (world, mut log) = device(256, 4096);
    lock(&world).devices[0].dma.ranges_max = 0;
    let error = log.start().unwrap_err();
    assert!(error.source.to_string().contains("vfio/0"), "{error:?}");
    log.stop().unwrap();
    assert!(lock(&world).devices[0].dma.logging.is_none());
}

#[test]
fn a_device_that_logs_but_cannot_be_asked_counts_as_one_that_does_not_log() {
    let (world, set) = vm(&[SUPPORT]);
    for (logs, reports, ranges_max, expected) in [
        (true, true, 1, "vfio-dma"),
        (true, false, 1, "vfio-mapped"),
        (true, true, 0, "vfio-mapped"),
        (false, true, 1, "vfio-mapped"),
    ] {
        {
            let dma = &mut lock(&world).devices[0].dma;
            (dma.logs, dma.reports, dma.ranges_max) = (logs, reports, ranges_max);
        }
        let found = dirty_logs(&set, None, &mapped()).unwrap();
        assert_eq!(found[0].name(), expected);
        let logging = lock(&world).devices[0].dma.logging.clone();
        assert_eq!(logging, None, "nothing is left running");
    }
}

/// A container that follows the kernel's rules.
struct Container {
    page_bytes: u64,
    bitmap_bytes_max: u64,
    /// Bytes written, while it notes them.
    state: Mutex<Option<Vec<u64>>>,
}

impl ContainerFace for Container {
    fn tracking(&self) -> io::Result<Option<Tracking>> {
        Ok(Some(Tracking {
            page_bytes: self.page_bytes,
            bitmap_bytes_max: self.bitmap_bytes_max,
        }))
    }

    fn start_dirty_pages(&self) -> io::Result<()> {
        *self.state.lock().unwrap() = Some(Vec::new());
        Ok(())
    }

    fn stop_dirty_pages(&self) -> io::Result<()> {
        self.state.lock().unwrap().take();
        Ok(())
    }

    fn get_dirty_pages(&self, range: Iova, page_bytes: u64, words: &mut [u64]) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        let bisects = !mapped().iter().any(|mapped| mapped.range() == range);
        let Some(written) = state.as_mut().filter(|_| !bisects) else {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        };
        written.retain(|address| {
            let Some(offset) = address.checked_sub(range.start) else {
                return true;
            };
            if offset >= range.bytes {
                return true;
            }
            let bit = usize::try_from(offset / page_bytes).unwrap();
            words[bit / 64] |= 1 << (bit % 64);
            false
        });
        Ok(())
    }
}

fn container(page_bytes: u64, bitmap_bytes_max: u64) -> Arc<Container> {
    Arc::new(Container {
        page_bytes,
        bitmap_bytes_max,
        state: Mutex::new(None),
    })
}

fn container_log(container: &Arc<Container>) -> Box<dyn DirtyLog> {
    let (_, set) = vm(&[SUPPORT, SUPPORT]);
    let face: Arc<dyn ContainerFace> = Arc::<Container>::clone(container);
    let mut logs = dirty_logs(&set, Some(face), &mapped()).unwrap();
    assert_eq!(logs.len(), 1);
    logs.remove(0)
}

#[test]
fn a_container_is_asked_mapping_by_mapping_in_its_own_pages() {
    let written = |container: &Container, address: u64| {
        let mut state = container.state.lock().unwrap();
        state.as_mut().unwrap().push(address);
    };
    let small = container(4096, 1 << 28);
    let mut log = container_log(&small);
    assert_eq!(log.name(), "vfio-container");
    log.start().unwrap();
    written(&small, 4 * GIB + 301 * PAGE_SIZE);
    written(&small, 8 * GIB + 99 * PAGE_SIZE);
    assert_eq!(fetch(log.as_mut()), [(1, 301), (2, 116)]);
    assert_eq!(fetch(log.as_mut()), []);
    log.stop().unwrap();
    assert!(small.state.lock().unwrap().is_none());

    let large = container(65536, 1 << 28);
    let mut log = container_log(&large);
    log.start().unwrap();
    written(&large, 8 * GIB + 99 * PAGE_SIZE);
    let expected: Vec<_> = (96..100).map(|page| (2, 17 + page)).collect();
    assert_eq!(fetch(log.as_mut()), expected);
}

#[test]
fn a_mapping_larger_than_the_container_answers_for_fails_before_it_is_asked() {
    let short = container(4096, 8);
    let mut log = container_log(&short);
    log.start().unwrap();
    let error = log.fetch(&mut empty_map()).unwrap_err();
    assert!(error.source.to_string().contains("8 bytes"), "{error:?}");
}

#[test]
fn where_nobody_notes_writes_everything_mapped_counts_as_written_every_time() {
    let (world, set) = vm(&[SUPPORT, SUPPORT]);
    // One device that logs is not enough: the other writes too.
    lock(&world).devices[0].dma.logs = true;
    let mut logs = dirty_logs(&set, None, &mapped()).unwrap();
    assert_eq!(logs.len(), 1);
    let log = logs[0].as_mut();
    assert_eq!(log.name(), "vfio-mapped");
    log.start().unwrap();
    let expected: Vec<_> = (0..PAGES)
        .map(|page| (0, page))
        .chain((0..PAGES).map(|page| (1, page)))
        .chain((17..117).map(|page| (2, page)))
        .collect();
    assert_eq!(fetch(log), expected);
    assert_eq!(fetch(log), expected);
    log.stop().unwrap();

    // Pages that are no multiple of ours cannot be told apart.
    let odd: Arc<dyn ContainerFace> = container(1024, 1 << 28);
    let logs = dirty_logs(&set, Some(odd), &mapped()).unwrap();
    assert_eq!(logs[0].name(), "vfio-mapped");

    lock(&world).devices[1].dma.logs = true;
    let logs = dirty_logs(&set, None, &mapped()).unwrap();
    let names: Vec<_> = logs.iter().map(|log| log.name()).collect();
    assert_eq!(names, ["vfio-dma", "vfio-dma"]);
}
