//! The machine on real KVM. Where /dev/kvm is missing each test says so loudly and does nothing.

/// Leaves the test, loudly, where there is no KVM.
macro_rules! need_kvm {
    () => {
        if let Err(error) = Kvm::new() {
            eprintln!("SKIPPED: no /dev/kvm here ({error}); nothing was tested");
            return;
        }
    };
}

mod dirty_log;
mod moves;

use std::sync::mpsc::{Receiver, channel};
use std::time::Instant;

use kvm_ioctls::Kvm;

use super::*;
use crate::machine::SerialSink;
use crate::machine::ram::RamBacking;
use crate::machine::virtio::OutsideConfig;
use crate::machine::workload::layout::{self, mailbox, mailbox_gpa};
use crate::machine::workload::pattern;

const MIB: u64 = 1 << 20;
/// How long the guest may take for what it does in milliseconds.
const PATIENCE: Duration = Duration::from_secs(60);

fn config(mem_bytes: u64, vcpus: u32, working_set_bytes: u64) -> MachineConfig {
    MachineConfig {
        mem_bytes,
        backing: RamBacking::default(),
        vcpus,
        workload: WorkloadConfig {
            working_set_bytes,
            dirty_pages_per_sec: None,
            fill_bytes: 0,
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
    // In this order: a busy host may keep us waiting between the two.
    let then = Instant::now();
    let before = stats(&machine).pages_written;
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
    // A busy host makes gaps of its own: one try in which it does not is enough.
    let forgotten = (0..100).any(|_| {
        machine.reset_workload_gap();
        stats(&machine).longest_gap_us < with_pause
            && passes_from_now(&machine, 2).longest_gap_us < with_pause
    });
    assert!(forgotten, "the gap of {with_pause} us stays");
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
