//! The machine on real KVM. Where /dev/kvm is missing each test says so loudly and does nothing.

use std::sync::mpsc::{Receiver, channel};
use std::time::Instant;

use vmferry_transport::memory::DirtyMap;
use vmferry_transport::units::{PageCount, PageIndex};

use super::*;
use crate::machine::SerialSink;
use crate::machine::workload::layout::{self, mailbox, mailbox_gpa};
use crate::machine::workload::pattern;

const MIB: u64 = 1 << 20;
/// How long the guest may take for what it does in milliseconds.
const PATIENCE: Duration = Duration::from_secs(30);

/// Leaves the test, loudly, where there is no KVM.
macro_rules! need_kvm {
    () => {
        if let Err(error) = Kvm::new() {
            eprintln!("SKIPPED: no /dev/kvm here ({error}); nothing was tested");
            return;
        }
    };
}

fn config(mem_bytes: u64, vcpus: u32, working_set_bytes: u64) -> MachineConfig {
    MachineConfig {
        mem_bytes,
        vcpus,
        workload: WorkloadConfig {
            working_set_bytes,
            dirty_pages_per_sec: None,
            fill_bytes: 0,
        },
        serial: SerialSink::Null,
        incoming: false,
    }
}

fn machine(config: &MachineConfig) -> KvmMachine {
    KvmMachine::new(config, Arc::new(|event| eprintln!("event: {event:?}"))).unwrap()
}

fn machine_with_events(
    config: &MachineConfig,
    options: &KvmOptions,
) -> (KvmMachine, Receiver<MachineEvent>) {
    let (sender, events) = channel();
    let ram = MachineRam::create(config.mem_bytes).unwrap();
    let sink = Arc::new(move |event| {
        let _ = sender.send(event);
    });
    (
        KvmMachine::with_ram(config, ram, options, sink).unwrap(),
        events,
    )
}

fn start(machine: &KvmMachine) {
    let proof = machine.pause().unwrap();
    machine.resume(proof).unwrap();
}

fn stats(machine: &KvmMachine) -> WorkloadStats {
    machine.workload_stats().unwrap()
}

/// Waits until the guest's statistics are as wanted.
fn wait_until(machine: &KvmMachine, wanted: impl Fn(&WorkloadStats) -> bool) -> WorkloadStats {
    let start = Instant::now();
    loop {
        let now = stats(machine);
        if wanted(&now) {
            return now;
        }
        assert!(
            start.elapsed() < PATIENCE,
            "the guest does not get there: {now:?}"
        );
        thread::sleep(Duration::from_millis(2));
    }
}

fn passes_from_now(machine: &KvmMachine, more: u64) -> WorkloadStats {
    let before = stats(machine).passes;
    wait_until(machine, |now| now.passes >= before + more)
}

/// Copies all RAM that exists from one machine to another, as a migration does.
fn copy_ram(source: &KvmMachine, target: &KvmMachine) {
    let mut page = [0; 4096];
    for region in source.ram.regions() {
        for at in (0..GuestMemoryRegion::len(region.as_ref())).step_by(4096) {
            let address = GuestAddress(region.start_addr().0 + at);
            source.ram.memory().read_slice(&mut page, address).unwrap();
            if page.iter().any(|byte| *byte != 0) {
                target.ram.memory().write_slice(&page, address).unwrap();
            }
        }
    }
}

fn incoming(config: &MachineConfig) -> MachineConfig {
    MachineConfig {
        incoming: true,
        ..config.clone()
    }
}

#[test]
fn workload_runs_on_all_vcpus_without_errors() {
    need_kvm!();
    for vcpus in [1, 3] {
        let machine = machine(&config(32 * MIB, vcpus, 4 * MIB));
        assert_eq!(
            stats(&machine).pages_written,
            0,
            "built with its vCPUs parked"
        );
        start(&machine);
        let now = wait_until(&machine, |now| now.passes >= 20);
        assert_eq!((now.errors, now.first_error_gpa), (0, None));
        assert!(now.pages_written >= 20 * 1024);
        assert!(now.longest_gap_us > 0);
    }
}

#[test]
fn fill_is_written_as_the_pattern_says_and_reported() {
    need_kvm!();
    let mut config = config(64 * MIB, 2, MIB);
    config.workload.fill_bytes = 40 * MIB;
    let machine = machine(&config);
    start(&machine);
    let now = wait_until(&machine, |now| now.passes >= 30);
    assert_eq!(
        (now.filled_pages, now.fill_pages, now.errors),
        (10_240, 10_240, 0)
    );
    let proof = machine.pause().unwrap();
    let memory = machine.ram.memory();
    for index in [256, 5000, 10_495] {
        let gpa = layout::data_page_gpa(index, config.mem_bytes);
        for word in [0, 1, 300, 511] {
            let found: u64 = memory.read_obj(GuestAddress(gpa + word * 8)).unwrap();
            assert_eq!(found, pattern::fill_word(gpa / 4096, word));
        }
    }
    let checked: u64 = memory
        .read_obj(GuestAddress(mailbox_gpa(0) + mailbox::FILL_CHECKED))
        .unwrap();
    assert!(checked > 0);
    machine.resume(proof).unwrap();
}

#[test]
fn working_set_carries_the_stamps_of_its_last_pass() {
    need_kvm!();
    let config = config(32 * MIB, 1, MIB);
    let machine = machine(&config);
    start(&machine);
    wait_until(&machine, |now| now.passes >= 3);
    let _proof = machine.pause().unwrap();
    let memory = machine.ram.memory();
    let passes = stats(&machine).passes;
    for index in 0..256 {
        let gpa = layout::data_page_gpa(index, config.mem_bytes);
        let first: u64 = memory.read_obj(GuestAddress(gpa)).unwrap();
        let stamped = [passes, passes + 1]
            .into_iter()
            .find(|pass| pattern::stamp(gpa / 4096, *pass, 0) == first);
        assert!(
            stamped.is_some(),
            "page {index} carries neither pass {passes} nor the next"
        );
    }
}

#[test]
fn rate_limit_holds_and_leaves_the_core_idle() {
    need_kvm!();
    let mut config = config(32 * MIB, 2, 4 * MIB);
    config.workload.dirty_pages_per_sec = Some(4000);
    let machine = machine(&config);
    start(&machine);
    wait_until(&machine, |now| now.pages_written >= 400);
    let (before, then) = (stats(&machine).pages_written, Instant::now());
    let now = wait_until(&machine, |now| now.pages_written >= before + 4000);
    // However loaded the host, the guest may be slower than asked for but not faster.
    let rate = (now.pages_written - before) as f64 / then.elapsed().as_secs_f64();
    assert!(rate < 4000.0 * 1.1, "{rate} pages/s");
    assert_eq!(now.errors, 0);
}

#[test]
fn pause_stops_all_writes_and_resume_continues_them() {
    need_kvm!();
    for rate in [None, Some(20_000)] {
        let mut config = config(32 * MIB, 2, 2 * MIB);
        config.workload.dirty_pages_per_sec = rate;
        let machine = machine(&config);
        start(&machine);
        wait_until(&machine, |now| now.passes >= 2);
        for _ in 0..20 {
            let proof = machine.pause().unwrap();
            let before = stats(&machine);
            thread::sleep(Duration::from_millis(3));
            assert_eq!(stats(&machine), before, "a paused guest wrote");
            machine.resume(proof).unwrap();
            wait_until(&machine, |now| now.pages_written > before.pages_written);
        }
        assert_eq!(stats(&machine).errors, 0);
    }
}

#[test]
fn a_page_corrupted_behind_its_back_is_found_by_the_guest() {
    need_kvm!();
    let mut config = config(32 * MIB, 1, 2 * MIB);
    config.workload.fill_bytes = 2 * MIB;
    let machine = machine(&config);
    start(&machine);
    wait_until(&machine, |now| now.passes >= 3);
    let proof = machine.pause().unwrap();
    // The last stamp of a page in the middle, as a torn page would have it.
    let gpa = layout::data_page_gpa(77, config.mem_bytes) + 63 * 64;
    machine
        .ram
        .memory()
        .write_obj(0x1234_u64, GuestAddress(gpa))
        .unwrap();
    machine.resume(proof).unwrap();
    let now = passes_from_now(&machine, 3);
    assert_eq!((now.errors, now.first_error_gpa), (1, Some(gpa)));

    let proof = machine.pause().unwrap();
    let gpa = layout::data_page_gpa(512 + 100, config.mem_bytes);
    machine
        .ram
        .memory()
        .write_obj(0x1234_u64, GuestAddress(gpa))
        .unwrap();
    machine.resume(proof).unwrap();
    // A damaged page of the fill is found again every time round.
    wait_until(&machine, |now| now.errors >= 2);
}

#[test]
fn reset_makes_the_guest_forget_its_longest_gap() {
    need_kvm!();
    let machine = machine(&config(32 * MIB, 1, MIB));
    start(&machine);
    wait_until(&machine, |now| now.passes >= 5);
    let proof = machine.pause().unwrap();
    thread::sleep(Duration::from_millis(200));
    machine.resume(proof).unwrap();
    let with_pause = passes_from_now(&machine, 2).longest_gap_us;
    assert!(with_pause >= 200_000, "the guest saw the pause");
    machine.reset_workload_gap();
    assert!(
        stats(&machine).longest_gap_us < with_pause,
        "forgotten as soon as asked for"
    );
    assert!(passes_from_now(&machine, 2).longest_gap_us < with_pause);
}

#[test]
fn guest_that_writes_the_exit_port_ends_with_all_vcpus_parked() {
    need_kvm!();
    let options = KvmOptions {
        exit_after_passes: Some(5),
        ..KvmOptions::default()
    };
    let (machine, events) = machine_with_events(&config(32 * MIB, 2, MIB), &options);
    start(&machine);
    assert_eq!(
        events.recv_timeout(PATIENCE).unwrap(),
        MachineEvent::GuestExit(0)
    );
    let before = stats(&machine);
    thread::sleep(Duration::from_millis(3));
    assert_eq!(stats(&machine), before);
    let proof = machine.pause().unwrap();
    let error = machine.resume(proof).unwrap_err();
    assert!(matches!(error.source, MachineError::Ended(_)), "{error:?}");
}

#[test]
fn vcpu_that_cannot_go_on_is_reported_with_its_reason() {
    need_kvm!();
    let config = config(32 * MIB, 2, MIB);
    let (machine, events) = machine_with_events(&config, &KvmOptions::default());
    // Zeros are `add [rax], al`; rax points nowhere that is mapped, and there is no handler: a triple fault.
    let program = layout::PROGRAM_GPA;
    machine
        .ram
        .memory()
        .write_slice(&[0x0f, 0x0b].repeat(2000), GuestAddress(program))
        .unwrap();
    start(&machine);
    let MachineEvent::VcpuFailed(text) = events.recv_timeout(PATIENCE).unwrap() else {
        panic!("another event");
    };
    assert!(text.contains("vCPU"), "{text}");
}

#[test]
fn state_moves_to_a_second_vm_and_back_and_the_guest_notices_nothing() {
    need_kvm!();
    let mut config = config(32 * MIB, 2, 2 * MIB);
    config.workload.dirty_pages_per_sec = Some(50_000);
    let mut source = machine(&config);
    start(&source);
    wait_until(&source, |now| now.passes >= 3);
    for _ in 0..4 {
        let stopped = source.pause().unwrap();
        let before = stats(&source);
        let sections = source.save(&stopped).unwrap();
        assert_eq!(
            source.save(&stopped).unwrap().len(),
            sections.len(),
            "saving changes nothing"
        );
        let target = machine(&incoming(&config));
        assert_eq!(target.workload_stats(), None);
        copy_ram(&source, &target);
        let target_stopped = target.pause().unwrap();
        target.load(&target_stopped, &sections).unwrap();
        assert_eq!(target.workload(), Some(config.workload));
        assert_eq!(stats(&target), before);
        drop(source);
        target.resume(target_stopped).unwrap();
        let after = passes_from_now(&target, 3);
        assert_eq!((after.errors, after.first_error_gpa), (0, None));
        source = target;
    }
}

/// Bytes of memory behind the machine's RAM.
fn allocated_bytes(machine: &KvmMachine) -> u64 {
    use std::os::unix::fs::MetadataExt;
    machine
        .ram
        .files()
        .map(|file| file.metadata().unwrap().blocks() * 512)
        .sum()
}

#[test]
fn an_empty_machine_touches_no_memory_and_does_not_run() {
    need_kvm!();
    let config = config(4 << 30, 2, 2 * MIB);
    let source = machine(&config);
    let stopped = source.pause().unwrap();
    let sections = source.save(&stopped).unwrap();

    let target = machine(&incoming(&config));
    let target_stopped = target.pause().unwrap();
    let error = target.resume(target_stopped).unwrap_err();
    assert!(error.source.to_string().contains("no guest"), "{error:?}");
    // Post-copy loads the state before the memory is there.
    target.load(&error.proof, &sections).unwrap();
    assert_eq!(allocated_bytes(&target), 0);

    let mut damaged = sections.clone();
    damaged.pop();
    target.load(&error.proof, &damaged).unwrap_err();
    target.resume(error.proof).unwrap();
}

#[test]
fn a_machine_that_failed_to_load_does_not_run_until_it_has_loaded() {
    need_kvm!();
    let config = config(32 * MIB, 1, MIB);
    let source = machine(&config);
    let stopped = source.pause().unwrap();
    let sections = source.save(&stopped).unwrap();
    let mut damaged = sections.clone();
    let at = sections
        .iter()
        .position(|section| section.name == "vcpu/0")
        .unwrap();
    damaged[at].bytes = damaged[at].bytes.slice(1..);

    let target = machine(&incoming(&config));
    copy_ram(&source, &target);
    let target_stopped = target.pause().unwrap();
    target.load(&target_stopped, &damaged).unwrap_err();
    let error = target.resume(target_stopped).unwrap_err();
    target.load(&error.proof, &sections).unwrap();
    target.resume(error.proof).unwrap();
    assert_eq!(passes_from_now(&target, 3).errors, 0);
}

#[test]
fn the_guests_clock_counts_the_time_of_the_move() {
    need_kvm!();
    let config = config(32 * MIB, 1, MIB);
    let source = machine(&config);
    let before_all_writes = Instant::now();
    start(&source);
    wait_until(&source, |now| now.passes >= 3);
    let stopped = source.pause().unwrap();
    source.reset_workload_gap();
    let sections = source.save(&stopped).unwrap();
    let target = machine(&incoming(&config));
    // The guest forgets its gaps at its next write, which is before the move ends in what it sees; so clear what it would forget.
    let memory = source.ram.memory();
    let requested: u64 = memory
        .read_obj(GuestAddress(mailbox_gpa(0) + mailbox::RESET_REQUESTED))
        .unwrap();
    for (field, value) in [
        (mailbox::RESET_DONE, requested),
        (mailbox::LONGEST_GAP_TICKS, 0),
    ] {
        memory
            .write_obj(value, GuestAddress(mailbox_gpa(0) + field))
            .unwrap();
    }
    copy_ram(&source, &target);
    thread::sleep(Duration::from_millis(100));
    let target_stopped = target.pause().unwrap();
    target.load(&target_stopped, &sections).unwrap();
    target.resume(target_stopped).unwrap();
    let gap_us = passes_from_now(&target, 2).longest_gap_us;
    let most_us = u64::try_from(before_all_writes.elapsed().as_micros()).unwrap();
    assert!(
        (100_000..=most_us + most_us / 1000).contains(&gap_us),
        "a gap of {gap_us} us of {most_us} us in all"
    );
}

#[test]
fn source_goes_on_after_its_state_was_saved_and_loaded_elsewhere() {
    need_kvm!();
    let config = config(32 * MIB, 1, MIB);
    let source = machine(&config);
    start(&source);
    wait_until(&source, |now| now.passes >= 3);
    let stopped = source.pause().unwrap();
    let sections = source.save(&stopped).unwrap();
    let target = machine(&incoming(&config));
    let target_stopped = target.pause().unwrap();
    target.load(&target_stopped, &sections).unwrap();
    // Loading a second time is as good as once.
    target.load(&target_stopped, &sections).unwrap();
    source.resume(stopped).unwrap();
    assert_eq!(passes_from_now(&source, 3).errors, 0);
}

#[test]
fn bad_sections_are_refused_with_the_devices_name() {
    need_kvm!();
    let config = config(32 * MIB, 1, MIB);
    let source = machine(&config);
    let stopped = source.pause().unwrap();
    let sections = source.save(&stopped).unwrap();
    let target = machine(&incoming(&config));
    let target_stopped = target.pause().unwrap();
    let refuse = |sections: &[Section], device: &str, reason: &str| {
        let error = target
            .load(&target_stopped, sections)
            .unwrap_err()
            .to_string();
        assert!(error.contains(device) && error.contains(reason), "{error}");
    };
    let index = |name: &str| {
        sections
            .iter()
            .position(|section| section.name == name)
            .unwrap()
    };

    for name in ["machine", "kvm-clock", "vcpu/0", "serial/0"] {
        let mut missing = sections.clone();
        missing.remove(index(name));
        refuse(&missing, name, "no state");
        let mut doubled = sections.clone();
        doubled.push(sections[index(name)].clone());
        refuse(&doubled, name, "twice");
        let mut cut = sections.clone();
        let bytes = &sections[index(name)].bytes;
        cut[index(name)].bytes = bytes.slice(..bytes.len() - 1);
        refuse(&cut, name, "refused");
        let mut newer = sections.clone();
        newer[index(name)].version += 1;
        refuse(&newer, name, "version");
        let mut soft = sections.clone();
        soft[index(name)].schema = "machine-soft".to_owned();
        refuse(&soft, name, "machine-soft");
    }
    let mut unknown = sections.clone();
    unknown[0].name = "vcpu/1".to_owned();
    refuse(&unknown, "vcpu/1", "no such device");

    let other = state::save_machine(64 * MIB, 1, None).unwrap();
    let mut other_size = sections.clone();
    other_size[index("machine")] = other;
    refuse(&other_size, "machine", "bytes of RAM");

    target.load(&target_stopped, &sections).unwrap();
}

#[test]
fn vcpu_state_with_wrong_content_is_refused() {
    need_kvm!();
    let config = config(32 * MIB, 1, MIB);
    let source = machine(&config);
    let stopped = source.pause().unwrap();
    let sections = source.save(&stopped).unwrap();
    let at = sections
        .iter()
        .position(|section| section.name == "vcpu/0")
        .unwrap();
    let good: VcpuV1 = decode(&sections[at]).unwrap();
    let refuse = |change: &dyn Fn(&mut VcpuV1), reason: &str| {
        let target = machine(&incoming(&config));
        let target_stopped = target.pause().unwrap();
        let mut bad = good.clone();
        change(&mut bad);
        let mut sections = sections.clone();
        sections[at] = encode("vcpu/0", &bad).unwrap();
        let error = target
            .load(&target_stopped, &sections)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("vcpu/0") && error.contains(reason),
            "{error}"
        );
    };
    refuse(&|state| state.regs.truncate(10), "regs has 10 bytes");
    refuse(&|state| state.xsave.truncate(100), "xsave has 100 bytes");
    refuse(&|state| state.lapic = Some(vec![0; 1024]), "local APIC");
    refuse(&|state| state.cpuid.truncate(39), "cpuid");
    refuse(&|state| state.msrs.push((0xdead_beef, 7)), "MSR 0xdeadbeef");
    refuse(
        &|state| state.msrs.insert(3, (0xdead_beef, 7)),
        "MSR 0xdeadbeef",
    );
    refuse(&|state| state.msrs = vec![(0x174, 0); 1025], "1025 MSRs");
    refuse(&|state| state.tsc.realtime_ns = 1, "clock");
    refuse(&|state| state.tsc.khz = u32::MAX, "kHz");
}

/// Pages of block 0 that `map` holds.
fn pages(map: &DirtyMap) -> Vec<u64> {
    map.runs()
        .flat_map(|run| run.start.0..run.end().0)
        .collect()
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
        // reads for the first time here are allowed.
        let only_read = [layout::PARAMS_GPA / 4096, layout::PROGRAM_GPA / 4096];
        let mut reported = pages(&map);
        reported.retain(|page| !only_read.contains(page));
        assert_eq!(reported, written_by_guest(&config), "{mode:?}");

        map.clear();
        log.fetch(&mut map).unwrap();
        assert_eq!(map.count(), PageCount(0), "{mode:?}: reported once");

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
        let refresh = |map: &DirtyMap| {
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
            map.block_mut(vmferry_transport::units::BlockId(0))
                .set_range(PageIndex(0), PageCount(config.mem_bytes / 4096));
            for _round in 0..12 {
                refresh(&map);
                map.clear();
                log.fetch(&mut map).unwrap();
            }
            let proof = machine.pause().unwrap();
            log.fetch(&mut map).unwrap();
            refresh(&map);
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
