//! State that moves to another machine, and state that is refused.

use vm_memory::GuestMemoryRegion;

use super::*;

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

#[test]
fn a_machine_that_was_begun_ahead_goes_on_like_any_other() {
    need_kvm!();
    let config = config(32 * MIB, 2, 2 * MIB);
    let source = machine(&config);
    start(&source);
    wait_until(&source, |now| now.passes >= 3);
    let stopped = source.pause().unwrap();
    let sections = source.save(&stopped).unwrap();
    let files = source.ram.files().map(|file| file.try_clone().unwrap());
    let begun = HeadStart::begin(Shape::of(&config), files.collect()).unwrap();
    let larger = Shape {
        mem_bytes: 64 * MIB,
        ..Shape::of(&config)
    };
    assert!(begun.fits(source.shape().unwrap()) && !begun.fits(larger));
    let target = KvmMachine::with_head_start(
        &incoming(&config),
        begun.finish().unwrap(),
        Vec::new(),
        Passed::FromHost,
        Arc::new(|event| eprintln!("event: {event:?}")),
    );
    let target = target.unwrap();
    let proof = target.pause().unwrap();
    target.load(&proof, &sections).unwrap();
    target.resume(proof).unwrap();
    let after = passes_from_now(&target, 3);
    assert_eq!((after.errors, after.first_error_gpa), (0, None));
}

#[test]
fn what_makes_no_machine_is_not_begun_or_found_out_at_its_end() {
    need_kvm!();
    let shape = Shape::of(&config(32 * MIB, 1, 2 * MIB));
    for vcpus in [0, layout::VCPUS_MAX + 1] {
        let error = HeadStart::begin(Shape { vcpus, ..shape }, Vec::new()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
    let begun = HeadStart::begin(shape, Vec::new()).unwrap();
    let error = begun.finish().unwrap_err().to_string();
    assert!(error.contains("0 files were given"), "{error}");
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
    let good: VcpuV2 = decode(&sections[at]).unwrap();
    let refuse = |change: &dyn Fn(&mut VcpuV2), reason: &str| {
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

/// Tells the guest's clock of KVM where its page is, as the guest would.
fn use_kvm_clock(machine: &KvmMachine, gpa: u64) {
    const MSR_KVM_SYSTEM_TIME_NEW: u32 = 0x4b56_4d01;
    let entry = kvm_bindings::kvm_msr_entry {
        index: MSR_KVM_SYSTEM_TIME_NEW,
        data: gpa | 1,
        ..Default::default()
    };
    let msrs = kvm_bindings::Msrs::from_entries(&[entry]).unwrap();
    assert_eq!(
        machine.board.vcpus[0].lock().fd().set_msrs(&msrs).unwrap(),
        1
    );
}

#[test]
fn a_guest_is_told_of_each_pause_at_the_source_and_at_the_target() {
    need_kvm!();
    // Of KVM's clock page: the flags, and the one that says "the host stopped you".
    const FLAGS: u64 = 29;
    const STOPPED: u8 = 2;
    let config = config(32 * MIB, 1, MIB);
    let page = GuestAddress(config.mem_bytes - 4096 + FLAGS);
    // The guest would clear the flag when it has seen it; this one has other things to do.
    let told = |machine: &KvmMachine| {
        passes_from_now(machine, 2);
        let memory = machine.ram.memory();
        let flags: u8 = memory.read_obj(page).unwrap();
        memory.write_obj(flags & !STOPPED, page).unwrap();
        flags & STOPPED != 0
    };
    let source = machine(&config);
    let proof = source.pause().unwrap();
    use_kvm_clock(&source, config.mem_bytes - 4096);
    source.resume(proof).unwrap();
    assert!(told(&source));
    assert!(!told(&source), "once for each pause");
    let proof = source.pause().unwrap();
    source.resume(proof).unwrap();
    assert!(told(&source), "as after a migration that failed");

    let stopped = source.pause().unwrap();
    let sections = source.save(&stopped).unwrap();
    let target = machine(&incoming(&config));
    copy_ram(&source, &target);
    let target_stopped = target.pause().unwrap();
    target.load(&target_stopped, &sections).unwrap();
    target.resume(target_stopped).unwrap();
    assert!(told(&target));
}
