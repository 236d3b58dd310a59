//! The soft machine as a whole. Waiting is for events, with a generous end; no duration is asserted.

use super::*;
use crate::machine::{AccelChoice, SerialSink, build as build_machine};

use std::hash::{DefaultHasher, Hasher};
use std::os::unix::fs::MetadataExt;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use serde::Serialize;
use vmferry_devices::saved::SavedState;
use vmferry_transport::memory::DirtyMap;

use crate::machine::ram::RamBacking;
use crate::machine::virtio::OutsideConfig;
use crate::machine::workload::WorkloadConfig;
use crate::machine::workload::layout::{
    HIGH_RAM_GPA, LOW_RAM_END, PARAMS_GPA, RAM_MIN, WORKING_SET_GPA, mailbox, mailbox_gpa, params,
};

/// End of every wait.
const PATIENCE: Duration = Duration::from_secs(60);

fn config(vcpus: u32) -> MachineConfig {
    MachineConfig {
        mem_bytes: 16 << 20,
        backing: RamBacking::default(),
        vcpus,
        workload: WorkloadConfig {
            working_set_bytes: 2 << 20,
            dirty_pages_per_sec: None,
            fill_bytes: 1 << 20,
        },
        serial: SerialSink::Null,
        vfio: Vec::new(),
        linux: None,
        workload_disk: false,
        workload_net: false,
        workload_serial: false,
        outside: OutsideConfig::default(),
        incoming: false,
    }
}

fn build(config: &MachineConfig) -> (SoftMachine, Receiver<MachineEvent>) {
    let (events, seen) = channel();
    // Nobody has to listen.
    let events = Arc::new(move |event| drop(events.send(event)));
    (SoftMachine::new(config.clone(), events).unwrap(), seen)
}

fn started(config: &MachineConfig) -> SoftMachine {
    let (machine, _) = build(config);
    let proof = machine.pause().unwrap();
    machine.resume(proof).unwrap();
    machine
}

fn stats(machine: &SoftMachine) -> WorkloadStats {
    machine.workload_stats().unwrap()
}

/// Waits until the statistics are as asked for, and returns them.
fn wait_for(machine: &SoftMachine, what: impl Fn(&WorkloadStats) -> bool) -> WorkloadStats {
    let end = Instant::now() + PATIENCE;
    loop {
        let stats = stats(machine);
        if what(&stats) {
            return stats;
        }
        assert!(Instant::now() < end, "still {stats:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn wait_passes(machine: &SoftMachine, more: u64) -> WorkloadStats {
    let before = stats(machine).passes;
    wait_for(machine, |now| now.passes >= before + more)
}

/// A hash of all RAM, holes read as zeros.
fn ram_hash(machine: &SoftMachine) -> u64 {
    let mut hasher = DefaultHasher::new();
    for_each_page(machine, |_, page| hasher.write(page));
    hasher.finish()
}

fn for_each_page(machine: &SoftMachine, mut visit: impl FnMut(u64, &[u8; 4096])) {
    let mut page = [0; 4096];
    for gpa in (0..machine.config.mem_bytes).step_by(4096) {
        let memory = machine.ram.memory();
        memory.read_slice(&mut page, GuestAddress(gpa)).unwrap();
        visit(gpa, &page);
    }
}

/// Copies pages of RAM from one machine to another, as a migration does.
fn copy_ram(from: &SoftMachine, to: &SoftMachine, only: Option<&DirtyMap>) {
    for_each_page(from, |gpa, page| {
        let wanted = only.is_none_or(|map| {
            map.runs()
                .any(|run| (run.start.0..run.end().0).contains(&(gpa / 4096)))
        });
        if wanted {
            let memory = to.ram.memory();
            memory.write_slice(page, GuestAddress(gpa)).unwrap();
        }
    });
}

fn incoming(config: &MachineConfig) -> SoftMachine {
    let config = MachineConfig {
        incoming: true,
        ..config.clone()
    };
    build(&config).0
}

#[test]
fn the_workload_fills_then_passes_over_its_working_set_without_errors() {
    for vcpus in [1, 3] {
        let machine = started(&config(vcpus));
        let stats = wait_for(&machine, |now| now.passes >= 20);
        assert_eq!((stats.errors, stats.first_error_gpa), (0, None));
        assert_eq!((stats.filled_pages, stats.fill_pages), (256, 256));
        assert!(stats.pages_written >= 20 * 512, "{stats:?}");
        assert!(stats.longest_gap_us < PATIENCE.as_micros().try_into().unwrap());
    }
}

#[test]
fn a_rate_limit_is_kept_on_average() {
    let mut config = config(2);
    config.workload.dirty_pages_per_sec = Some(4000);
    let machine = started(&config);
    // From a state where the first batches are over. A slow host only makes the time longer; written pages never exceed the
    // schedule by more than what may be caught up.
    wait_for(&machine, |now| now.passes >= 1);
    let began = Instant::now();
    let first = stats(&machine);
    let last = wait_for(&machine, |now| {
        now.pages_written >= first.pages_written + 2000
    });
    let seconds = began.elapsed().as_secs_f64();
    let written = (last.pages_written - first.pages_written) as f64;
    let catching_up = f64::from(LATE_PAGES);
    assert!(
        written <= 4000.0 * seconds + catching_up,
        "{written} pages in {seconds} s"
    );
    assert_eq!(last.errors, 0);
}

/// Two vCPUs, each at most 17 batches of 2 pages early, and as many while looking.
const LATE_PAGES: u16 = 2 * 2 * 17 * 2;

#[test]
fn a_paused_machine_writes_nothing_and_goes_on_when_resumed() {
    let machine = started(&config(2));
    for _ in 0..20 {
        wait_passes(&machine, 1);
        let proof = machine.pause().unwrap();
        let hash = ram_hash(&machine);
        let before = stats(&machine);
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(ram_hash(&machine), hash);
        assert_eq!(stats(&machine), before);
        machine.resume(proof).unwrap();
    }
    assert_eq!(wait_passes(&machine, 1).errors, 0);
}

#[test]
fn a_machine_that_waits_for_its_rate_limit_pauses_all_the_same() {
    let mut config = config(1);
    // One page per vCPU in 64 seconds, far more than a pause may take.
    config.workload.dirty_pages_per_sec = Some(1);
    config.vcpus = 64;
    let machine = started(&config);
    wait_for(&machine, |now| now.pages_written >= 64);
    let proof = machine.pause().unwrap();
    machine.resume(proof).unwrap();
}

#[test]
fn a_dropped_proof_leaves_the_guest_stopped() {
    let machine = started(&config(1));
    wait_passes(&machine, 1);
    drop(machine.pause().unwrap());
    let hash = ram_hash(&machine);
    std::thread::sleep(Duration::from_millis(5));
    assert_eq!(ram_hash(&machine), hash);
}

#[test]
fn a_second_machine_continues_where_the_first_was_saved() {
    let config = config(2);
    let source = started(&config);
    wait_passes(&source, 3);
    let stopped = source.pause().unwrap();
    let sections = source.save(&stopped).unwrap();
    assert_eq!(
        source.save(&stopped).unwrap(),
        sections,
        "saving changes nothing"
    );

    let target = incoming(&config);
    let target_stopped = target.pause().unwrap();
    copy_ram(&source, &target, None);
    target.load(&target_stopped, &sections).unwrap();
    assert_eq!(target.save(&target_stopped).unwrap(), sections);
    assert_eq!(stats(&target), stats(&source));
    let paused_at = stats(&source);
    std::thread::sleep(Duration::from_millis(20));
    target.resume(target_stopped).unwrap();
    let now = wait_passes(&target, 5);
    assert_eq!(now.errors, 0);
    assert!(now.pages_written > paused_at.pages_written);
    assert!(
        now.longest_gap_us >= 20_000,
        "the gap spans the move: {now:?}"
    );

    // Stopped, so that no gap after the reset is seen.
    let _stopped = target.pause().unwrap();
    target.reset_workload_gap();
    assert_eq!(stats(&target).longest_gap_us, 0);
    // The source still has what it had, and may go on as if nothing had been.
    source.resume(stopped).unwrap();
    assert_eq!(wait_passes(&source, 3).errors, 0);
}

#[test]
fn a_copy_kept_up_to_date_by_the_dirty_log_is_complete() {
    let config = config(2);
    let source = started(&config);
    wait_passes(&source, 1);
    let target = incoming(&config);
    let mut log = source.dirty_log().unwrap();
    // Twice: a failed migration must not spoil the next one.
    for attempt in 0..2 {
        log.start().unwrap();
        copy_ram(&source, &target, None);
        for _ in 0..3 {
            source.reset_workload_gap();
            let mut dirty = source.ram().empty_map();
            log.fetch(&mut dirty).unwrap();
            copy_ram(&source, &target, Some(&dirty));
        }
        let stopped = source.pause().unwrap();
        let mut dirty = source.ram().empty_map();
        log.fetch(&mut dirty).unwrap();
        assert!(dirty.count().0 > 0);
        copy_ram(&source, &target, Some(&dirty));
        assert_eq!(ram_hash(&source), ram_hash(&target), "attempt {attempt}");
        let mut dirty = source.ram().empty_map();
        log.fetch(&mut dirty).unwrap();
        assert_eq!(dirty.count().0, 0, "nobody writes while paused");
        log.stop().unwrap();
        let target_stopped = target.pause().unwrap();
        let sections = source.save(&stopped).unwrap();
        target.load(&target_stopped, &sections).unwrap();
        target.resume(target_stopped).unwrap();
        assert_eq!(wait_passes(&target, 2).errors, 0);
        let _stays_stopped = target.pause().unwrap();
        source.resume(stopped).unwrap();
        assert_eq!(wait_passes(&source, 2).errors, 0);
    }
}

#[test]
fn a_guest_in_huge_pages_is_told_only_what_it_can_do_and_others_can_move() {
    use vmferry_cpr::memfd::HugePages;
    let (machine, _) = build(&config(1));
    assert_eq!(machine.blocker(), None);
    let file = stays_in_huge_pages(&RamBacking::File("/nowhere".into()));
    assert!(file.contains("cpr-reboot"), "{file}");
    let none = stays_in_huge_pages(&RamBacking::Huge(HugePages::Size2M));
    assert!(
        none.contains("KVM") && !none.contains("cpr-reboot"),
        "{none}"
    );
}

#[test]
fn the_vmms_own_writes_are_in_the_dirty_log() {
    let (machine, _) = build(&config(1));
    let mut log = machine.dirty_log().unwrap();
    log.start().unwrap();
    machine.reset_workload_gap();
    let mut dirty = machine.ram().empty_map();
    log.fetch(&mut dirty).unwrap();
    let pages: Vec<_> = dirty.runs().map(|run| (run.start.0, run.count.0)).collect();
    assert_eq!(pages, [(mailbox_gpa(0) / 4096, 1)]);
}

#[test]
fn a_page_changed_from_outside_is_reported_with_its_address() {
    let config = config(1);
    for gpa in [
        WORKING_SET_GPA + 77 * 4096 + 64 * 63,
        // The last word of a page of the fill: only the full check sees it.
        WORKING_SET_GPA + (2 << 20) + 16 * 4096 + 4088,
    ] {
        let machine = started(&config);
        wait_passes(&machine, 1);
        let stopped = machine.pause().unwrap();
        let memory = machine.ram.memory();
        let word: u64 = memory.read_obj(GuestAddress(gpa)).unwrap();
        memory.write_obj(word ^ 1 << 40, GuestAddress(gpa)).unwrap();
        machine.resume(stopped).unwrap();
        let stats = wait_for(&machine, |now| now.errors > 0);
        assert_eq!(stats.first_error_gpa, Some(gpa));
    }
}

#[test]
fn a_mailbox_older_than_the_registers_is_reported() {
    let machine = started(&config(1));
    wait_passes(&machine, 1);
    let stopped = machine.pause().unwrap();
    let at = GuestAddress(mailbox_gpa(0) + mailbox::PAGES_WRITTEN);
    let written: u64 = machine.ram.memory().read_obj(at).unwrap();
    machine.ram.memory().write_obj(written - 1, at).unwrap();
    machine.resume(stopped).unwrap();
    let stats = wait_for(&machine, |now| now.errors > 0);
    assert_eq!(stats.first_error_gpa, Some(at.0));
    assert_eq!(wait_passes(&machine, 2).errors, 1);
}

#[test]
fn ram_above_the_device_hole_is_used_and_logged_as_the_second_block() {
    let mut config = config(2);
    config.mem_bytes = LOW_RAM_END + (8 << 20);
    // All data pages from the last MiB of low RAM on are working set.
    config.workload.fill_bytes = 0;
    config.workload.working_set_bytes = (8 << 20) + (1 << 20);
    let (machine, _) = build(&config);
    // Starting late in RAM would need as much fill: move the slices instead.
    let first = (LOW_RAM_END - (1 << 20) - WORKING_SET_GPA) / 4096;
    for vcpu in 0..2 {
        for field in [mailbox::SLICE_FIRST, mailbox::SLICE_END] {
            let at = GuestAddress(mailbox_gpa(vcpu) + field);
            let index: u64 = machine.ram.memory().read_obj(at).unwrap();
            machine.ram.memory().write_obj(index + first, at).unwrap();
        }
    }
    let mut log = machine.dirty_log().unwrap();
    log.start().unwrap();
    let proof = machine.pause().unwrap();
    machine.resume(proof).unwrap();
    assert_eq!(wait_for(&machine, |now| now.passes >= 2).errors, 0);
    let _stays_stopped = machine.pause().unwrap();
    let mut dirty = machine.ram().empty_map();
    log.fetch(&mut dirty).unwrap();
    let counts: Vec<_> = dirty.blocks().map(|(_, block)| block.count().0).collect();
    assert_eq!(counts, [256 + 2, 2048]);
    let in_high: u64 = machine
        .ram
        .memory()
        .read_obj(GuestAddress(HIGH_RAM_GPA))
        .unwrap();
    assert_ne!(in_high, 0);
}

#[test]
fn the_greeting_is_said_at_the_start_and_not_after_a_move() {
    let dir = tempfile::tempdir().unwrap();
    let serial_to = |name| MachineConfig {
        serial: SerialSink::File(dir.path().join(name)),
        ..config(2)
    };
    let said = |name| std::fs::read_to_string(dir.path().join(name)).unwrap();
    let source = started(&serial_to("source"));
    wait_for(&source, |now| {
        now.passes > 0 && said("source") == "vmferry workload started\r\n"
    });
    let stopped = source.pause().unwrap();
    let target = incoming(&serial_to("target"));
    let target_stopped = target.pause().unwrap();
    copy_ram(&source, &target, None);
    let sections = source.save(&stopped).unwrap();
    target.load(&target_stopped, &sections).unwrap();
    target.resume(target_stopped).unwrap();
    wait_passes(&target, 20);
    assert_eq!(said("target"), "");
}

#[test]
fn the_exit_port_ends_the_guest_and_parks_everybody() {
    let (machine, events) = build(&config(2));
    let at = GuestAddress(PARAMS_GPA + params::EXIT_AFTER_PASSES);
    machine.ram.memory().write_obj(3_u64, at).unwrap();
    let proof = machine.pause().unwrap();
    machine.resume(proof).unwrap();
    let event = events.recv_timeout(PATIENCE).unwrap();
    assert_eq!(event, MachineEvent::GuestExit(0));
    let hash = ram_hash(&machine);
    let proof = machine.pause().unwrap();
    assert_eq!(ram_hash(&machine), hash);
    let refused = machine.resume(proof).unwrap_err();
    assert!(matches!(refused.source, MachineError::Ended(_)));
    assert!(events.try_recv().is_err(), "one end, one event");
}

#[test]
fn an_empty_machine_stays_empty_and_does_not_run_until_a_guest_is_loaded() {
    let target = incoming(&config(2));
    assert!(target.workload_stats().is_none());
    target.reset_workload_gap();
    let stopped = target.pause().unwrap();
    let refused = target.resume(stopped).unwrap_err();
    assert!(matches!(refused.source, MachineError::Config(_)));
    let mut files = target.ram.files();
    assert!(files.all(|file| file.metadata().unwrap().blocks() == 0));

    let (source, _) = build(&config(2));
    let sections = source.save(&source.pause().unwrap()).unwrap();
    copy_ram(&source, &target, None);
    target.load(&refused.proof, &sections).unwrap();
    target.resume(refused.proof).unwrap();
    assert_eq!(wait_passes(&target, 1).errors, 0);
}

#[test]
fn memory_without_a_workload_fails_the_vcpu() {
    let (target, events) = build(&MachineConfig {
        incoming: true,
        ..config(2)
    });
    let (source, _) = build(&config(2));
    let sections = source.save(&source.pause().unwrap()).unwrap();
    let stopped = target.pause().unwrap();
    target.load(&stopped, &sections).unwrap();
    target.resume(stopped).unwrap();
    match events.recv_timeout(PATIENCE).unwrap() {
        MachineEvent::VcpuFailed(reason) => assert!(reason.contains("no workload"), "{reason}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn slices_outside_ram_fail_the_vcpu_and_nothing_else() {
    for (field, value) in [
        (mailbox::SLICE_END, u64::MAX),
        (mailbox::SLICE_FIRST, u64::MAX),
        (mailbox::FILL_END, 1 << 40),
        (mailbox::SLICE_END, 0),
    ] {
        let (machine, events) = build(&config(1));
        let at = GuestAddress(mailbox_gpa(0) + field);
        machine.ram.memory().write_obj(value, at).unwrap();
        let proof = machine.pause().unwrap();
        machine.resume(proof).unwrap();
        match events.recv_timeout(PATIENCE).unwrap() {
            MachineEvent::VcpuFailed(reason) => assert!(reason.contains("RAM"), "{reason}"),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn hostile_registers_are_refused_or_harmless() {
    let config = config(1);
    let machine = started(&config);
    wait_passes(&machine, 1);
    let stopped = machine.pause().unwrap();
    let sections = machine.save(&stopped).unwrap();
    let good: SoftVcpuV1 = decode(&sections[2]).unwrap();
    let with = |change: &dyn Fn(&mut SoftVcpuV1)| {
        let mut saved = good.clone();
        change(&mut saved);
        let vcpu = encode("vcpu/0", &saved).unwrap();
        machine.load(&stopped, &[sections[0].clone(), sections[1].clone(), vcpu])
    };
    assert!(with(&|saved| saved.phase = 99).is_err());
    assert!(with(&|saved| saved.pass = 0).is_err());
    with(&|saved| {
        saved.next_page = u64::MAX;
        saved.pass = u64::MAX;
        saved.pages_written = u64::MAX;
        saved.filled_pages = u64::MAX;
        saved.fill_check_next = u64::MAX;
        saved.fill_check_in = u64::MAX;
        saved.fill_checked = u64::MAX;
        saved.errors = u64::MAX;
        saved.heartbeat_ns = Some(u64::MAX);
        saved.batch_left = u64::MAX;
        saved.batch_due_ns = u64::MAX;
        saved.batch_waiting = true;
    })
    .unwrap();
    machine.resume(stopped).unwrap();
    let before = stats(&machine).pages_written;
    wait_for(&machine, |now| {
        now.pages_written != before && now.errors > 0
    });
}

#[test]
fn soft_and_kvm_machines_refuse_each_others_state() {
    if let Err(error) = kvm_ioctls::Kvm::new() {
        eprintln!("SKIPPED: no /dev/kvm here ({error}); nothing was tested");
        return;
    }
    let config = config(1);
    let build =
        |choice| build_machine(&config, None, Vec::new(), choice, Arc::new(|_| ())).unwrap();
    let (kvm, soft) = (build(AccelChoice::Kvm), build(AccelChoice::Soft));
    assert_eq!(build(AccelChoice::Auto).accel(), Accel::Kvm);
    assert_eq!((kvm.accel(), soft.accel()), (Accel::Kvm, Accel::Soft));
    let (kvm_stopped, soft_stopped) = (kvm.pause().unwrap(), soft.pause().unwrap());
    let of_kvm = kvm.save(&kvm_stopped).unwrap();
    let text = soft.load(&soft_stopped, &of_kvm).unwrap_err().to_string();
    assert_eq!(
        text,
        "device machine: state is machine-kvm version 1, this side loads machine-soft version 1"
    );
    let of_soft = soft.save(&soft_stopped).unwrap();
    let text = kvm.load(&kvm_stopped, &of_soft).unwrap_err().to_string();
    assert!(text.contains("soft"), "{text}");
}

/// What a section of a KVM machine looks like from here.
#[derive(Serialize, serde::Deserialize)]
struct KvmLike {
    regs: Vec<u64>,
}

impl SavedState for KvmLike {
    const SCHEMA: &'static str = "machine-kvm";
    const VERSION: u32 = 1;
}

#[test]
fn sections_of_another_machine_are_refused_by_name() {
    let config = config(1);
    let (machine, _) = build(&config);
    let stopped = machine.pause().unwrap();
    let good = machine.save(&stopped).unwrap();
    let refuse = |sections: &[Section], words: &[&str]| {
        let text = machine.load(&stopped, sections).unwrap_err().to_string();
        assert!(words.iter().all(|word| text.contains(word)), "{text}");
    };
    let kvm = KvmLike { regs: vec![1, 2] };
    let with = |at: usize, section: Section| {
        let mut sections = good.clone();
        sections[at] = section;
        sections
    };
    refuse(
        &with(0, encode(MACHINE, &kvm).unwrap()),
        &["machine", "machine-kvm", "machine-soft"],
    );
    refuse(
        &with(1, encode(SERIAL, &kvm).unwrap()),
        &["serial/0", "machine-kvm", "serial-16550"],
    );
    refuse(
        &with(2, encode("vcpu/0", &kvm).unwrap()),
        &["vcpu/0", "machine-kvm", "soft-vcpu"],
    );
    refuse(
        &with(2, encode("kvm-clock", &kvm).unwrap()),
        &["kvm-clock", "no such device"],
    );
    for missing in 0..good.len() {
        let mut sections = good.clone();
        let name = sections.remove(missing).name;
        refuse(&sections, &[&name]);
    }
    let mut doubled = good.clone();
    doubled.push(good[2].clone());
    refuse(&doubled, &["vcpu/0", "twice"]);
    machine.load(&stopped, &good).unwrap();

    let mut other = config;
    other.mem_bytes += RAM_MIN;
    let (other, _) = build(&other);
    let stopped = other.pause().unwrap();
    let text = other.load(&stopped, &good).unwrap_err().to_string();
    assert!(
        text.contains("16777216") && text.contains("25165824"),
        "{text}"
    );
}

#[test]
fn times_of_another_boot_are_forgotten() {
    let mut config = config(1);
    config.workload.dirty_pages_per_sec = Some(100_000);
    let source = started(&config);
    wait_passes(&source, 2);
    let stopped = source.pause().unwrap();
    let mut sections = source.save(&stopped).unwrap();
    let mut machine: SoftMachineV1 = decode(&sections[0]).unwrap();
    machine.boot_id = "another".to_owned();
    sections[0] = encode(MACHINE, &machine).unwrap();
    let mut vcpu: SoftVcpuV1 = decode(&sections[2]).unwrap();
    vcpu.heartbeat_ns = Some(0);
    vcpu.batch_due_ns = u64::MAX;
    sections[2] = encode("vcpu/0", &vcpu).unwrap();

    let target = incoming(&config);
    let target_stopped = target.pause().unwrap();
    copy_ram(&source, &target, None);
    target.load(&target_stopped, &sections).unwrap();
    target.resume(target_stopped).unwrap();
    let now = wait_passes(&target, 2);
    assert_eq!(now.errors, 0);
    assert!(now.longest_gap_us < PATIENCE.as_micros().try_into().unwrap());
}
