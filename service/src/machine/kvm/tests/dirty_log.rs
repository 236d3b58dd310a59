//! The dirty log against a guest whose writes are known.

use vmferry_transport::memory::extents::Extents;
use vmferry_transport::memory::{DirtyLog, DirtyMap};
use vmferry_transport::units::{BlockId, PageCount, PageIndex, PageRun};

use super::*;

/// Pages of block 0 that `map` holds.
fn pages(map: &DirtyMap) -> Vec<u64> {
    map.runs()
        .flat_map(|run| run.start.0..run.end().0)
        .collect()
}

/// Does what the data threads do before they read pages.
fn protect(log: &dyn DirtyLog, runs: impl IntoIterator<Item = PageRun>) {
    if let Some(protector) = log.protector() {
        protector
            .protect(&runs.into_iter().collect::<Vec<_>>())
            .unwrap();
    }
}

/// Data pages and mailboxes, as pages of block 0: all that the guest writes.
fn written_by_guest(config: &MachineConfig) -> Vec<u64> {
    let mailboxes = (0..config.vcpus).map(|vcpu| mailbox_gpa(vcpu) / 4096);
    let data = (0..config.workload.working_set_bytes / 4096)
        .map(|index| layout::data_page_gpa(index, config.mem_bytes) / 4096);
    mailboxes.chain(data).collect()
}

#[test]
fn dirty_log_reports_just_the_pages_written_between_fetches() {
    need_kvm!();
    for mode in [DirtyLogMode::ManualClear, DirtyLogMode::GetClears] {
        // The guest runs exactly once over its working set and then ends: what it writes is known.
        // Some of it lies where there is memory already when the log starts, some where there is none for many MiB.
        let config = config(256 * MIB, 1, 20 * MIB + 12 * 4096);
        let options = KvmOptions {
            dirty_log: Some(mode),
            exit_after_passes: Some(1),
        };
        let (machine, events) = machine_with_events(&config, &options);
        let mut log = machine.dirty_log().unwrap();
        log.start().unwrap();
        protect(&*log, Extents::of(machine.ram()).unwrap().data);
        let mut map = machine.ram().empty_map();
        log.fetch(&mut map).unwrap();
        assert_eq!(
            map.count(),
            PageCount(0),
            "{mode:?}: holes and old writes are not reported"
        );

        start(&machine);
        events.recv_timeout(PATIENCE).unwrap();
        log.fetch(&mut map).unwrap();
        // KVM maps a page that the guest may write for writing at its first touch, and then reports it: so the two pages that the guest
        // reads for the first time here are allowed, and so are the page tables, where hardware notes which entries it has used.
        let allowed = |page: u64| {
            let tables = layout::PAGE_TABLES_GPA..layout::WORKING_SET_GPA;
            [layout::PARAMS_GPA, layout::PROGRAM_GPA].contains(&(page * 4096))
                || tables.contains(&(page * 4096))
        };
        let mut reported = pages(&map);
        reported.retain(|page| !allowed(*page));
        assert_eq!(reported, written_by_guest(&config), "{mode:?}");

        protect(&*log, map.runs());
        map.clear();
        log.fetch(&mut map).unwrap();
        assert_eq!(
            map.count(),
            PageCount(0),
            "{mode:?}: not reported again once protected"
        );

        let page = PageIndex(50_000);
        machine
            .ram
            .memory()
            .write_obj(1_u8, GuestAddress(page.to_offset()))
            .unwrap();
        log.fetch(&mut map).unwrap();
        assert_eq!(pages(&map), [page.0], "{mode:?}: the VMM's own write");
        map.clear();
        log.fetch(&mut map).unwrap();
        assert_eq!(map.count(), PageCount(0), "{mode:?}: reported once");
        log.stop().unwrap();
    }
}

#[test]
fn no_write_is_lost_by_fetching_while_the_guest_runs() {
    need_kvm!();
    // Goal: whatever the guest writes while the log is fetched again and again, a copy that is refreshed with the reported pages only
    // equals the guest's memory in the end. Method: rounds of pre-copy between two RAMs by hand, the last one paused.
    for mode in [DirtyLogMode::ManualClear, DirtyLogMode::GetClears] {
        let config = config(64 * MIB, 2, 24 * MIB);
        let options = KvmOptions {
            dirty_log: Some(mode),
            exit_after_passes: None,
        };
        let (machine, _events) = machine_with_events(&config, &options);
        let copy = MachineRam::create(config.mem_bytes).unwrap();
        let refresh = |log: &dyn DirtyLog, map: &DirtyMap| {
            protect(log, map.runs());
            let mut page = [0; 4096];
            for number in pages(map) {
                let address = GuestAddress(number * 4096);
                machine.ram.memory().read_slice(&mut page, address).unwrap();
                copy.memory().write_slice(&page, address).unwrap();
            }
        };
        // The first attempt starts with memory that does not exist yet, the second with all of it.
        for attempt in 0..2 {
            let mut log = machine.dirty_log().unwrap();
            log.start().unwrap();
            if attempt == 0 {
                start(&machine);
            }
            let mut map = machine.ram().empty_map();
            map.block_mut(BlockId(0))
                .set_range(PageIndex(0), PageCount(config.mem_bytes / 4096));
            for _round in 0..12 {
                refresh(&*log, &map);
                map.clear();
                log.fetch(&mut map).unwrap();
            }
            let proof = machine.pause().unwrap();
            log.fetch(&mut map).unwrap();
            refresh(&*log, &map);
            let (mut ours, mut theirs) = ([0; 4096], [0; 4096]);
            for number in 0..config.mem_bytes / 4096 {
                let address = GuestAddress(number * 4096);
                machine.ram.memory().read_slice(&mut ours, address).unwrap();
                copy.memory().read_slice(&mut theirs, address).unwrap();
                assert!(ours == theirs, "{mode:?}: page {number} differs");
            }
            log.stop().unwrap();
            machine.resume(proof).unwrap();
        }
        assert_eq!(stats(&machine).errors, 0);
    }
}
