//! KVM state on real KVM, on VMs without memory whose vCPUs never run. Where /dev/kvm is missing each test says so loudly.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_MAX_CPUID_ENTRIES, KVM_MP_STATE_INIT_RECEIVED, kvm_irqchip,
    kvm_pit_config,
};
use kvm_ioctls::{Kvm, VmFd};

use super::bytes::{from_bytes, to_bytes};
use super::ioctl::XsaveArea;
use super::msrs::set_msrs;
use super::saved::{ClockV1, IrqchipV1, VcpuV2};
use super::*;
use crate::DeviceError;
use crate::saved::{decode, encode};

/// A VM with one vCPU; with interrupt controllers in the kernel, and a PIT, if `irqchip`.
fn vm_with_vcpu(irqchip: bool) -> Option<(VmFd, KvmVcpu, VcpuProfile)> {
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => {
            eprintln!("SKIPPED: no /dev/kvm here ({error}); nothing was tested");
            return None;
        }
    };
    let vm = kvm.create_vm().unwrap();
    if irqchip {
        vm.create_irq_chip().unwrap();
        vm.create_pit2(kvm_pit_config::default()).unwrap();
    }
    let mut supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
    for leaf in supported.as_mut_slice() {
        // KVM has TSC deadlines wherever it has the local APIC, and leaves it to the VMM to say so.
        if leaf.function == 1 {
            leaf.ecx |= CPUID_1_ECX_TSC_DEADLINE;
        }
    }
    let vcpu = KvmVcpu::new(&vm, 0, &supported).unwrap();
    let profile = VcpuProfile::probe(&kvm, &vm, &vcpu, irqchip).unwrap();
    Some((vm, vcpu, profile))
}

const CPUID_1_ECX_TSC_DEADLINE: u32 = 1 << 24;

/// Gives registers of every kind a value of their own.
fn make_distinctive(vcpu: &KvmVcpu, profile: &VcpuProfile) {
    let fd = vcpu.fd();
    let mut regs = fd.get_regs().unwrap();
    (regs.rax, regs.r15, regs.rip) = (0x1111, 0x2222, 0x3333);
    fd.set_regs(&regs).unwrap();
    let mut sregs = fd.get_sregs().unwrap();
    (sregs.cr2, sregs.gdt.base) = (0x5000, 0x6000);
    fd.set_sregs(&sregs).unwrap();
    let mut debug = fd.get_debug_regs().unwrap();
    debug.db[1] = 0x7000;
    fd.set_debug_regs(&debug).unwrap();
    let mut bytes = vcpu.save(profile).unwrap().xsave;
    bytes[XMM3].fill(9);
    bytes[YMM3_UPPER].fill(8);
    bytes[XSTATE_BV_FIRST] |= XSTATE_SSE | XSTATE_AVX;
    let mut xsave = XsaveArea::new(bytes.len());
    xsave.fill(&bytes);
    xsave.set(fd).unwrap();
    set_msrs(fd, "vcpu/0", &[(0x174, 0x10), (0xc000_0102, 0x1234_5000)]).unwrap();
}

/// Where the XSAVE area holds XMM3.
const XMM3: std::ops::Range<usize> = 208..224;
/// And the upper half of YMM3, a component beyond what every CPU has.
const YMM3_UPPER: std::ops::Range<usize> = 624..640;
/// Low byte of the field that says which components are in use.
const XSTATE_BV_FIRST: usize = 512;
const XSTATE_SSE: u8 = 2;
const XSTATE_AVX: u8 = 4;

#[test]
fn all_of_a_vcpus_state_arrives_in_a_second_vm() {
    for irqchip in [false, true] {
        let Some((_vm, source, profile)) = vm_with_vcpu(irqchip) else {
            return;
        };
        make_distinctive(&source, &profile);
        let saved = source.save(&profile).unwrap();
        assert_eq!(saved.lapic.is_some(), irqchip);
        let saved: VcpuV2 = decode(&encode("vcpu/0", &saved).unwrap()).unwrap();

        let (_target_vm, mut target, target_profile) = vm_with_vcpu(irqchip).unwrap();
        assert!(
            !saved
                .differences(&target.save(&target_profile).unwrap())
                .is_empty()
        );
        target.restore(&target_profile, &saved, None).unwrap();
        let loaded = target.save(&target_profile).unwrap();
        assert_eq!(saved.differences(&loaded), Vec::<String>::new());
        assert_eq!(loaded.xsave[XMM3], [9; 16]);
        assert_eq!(loaded.xsave[YMM3_UPPER], [8; 16]);

        // The TSC goes on; it does not start anew.
        assert!(
            loaded.tsc.value >= saved.tsc.value,
            "{:?} then {:?}",
            saved.tsc,
            loaded.tsc
        );
    }
}

#[test]
fn a_timer_with_a_deadline_keeps_it() {
    let Some((_vm, source, profile)) = vm_with_vcpu(true) else {
        return;
    };
    // The timer of the local APIC fires vector 0x40 when the TSC reaches the deadline. The APIC has to be on, and in that mode, before
    // it takes one.
    let mut lapic = source.fd().get_lapic().unwrap();
    for (register, value) in [(0xf0, 0x1ff), (0x320, 2 << 17 | 0x40)] {
        for (byte, part) in u32::to_le_bytes(value).into_iter().enumerate() {
            lapic.regs[register + byte] = part.cast_signed();
        }
    }
    source.fd().set_lapic(&lapic).unwrap();
    let deadline = source.save(&profile).unwrap().tsc.value + (1 << 45);
    set_msrs(source.fd(), "vcpu/0", &[(TSC_DEADLINE, deadline)]).unwrap();

    let saved = source.save(&profile).unwrap();
    assert!(saved.msrs.contains(&(TSC_DEADLINE, deadline)));
    let (_target_vm, mut target, target_profile) = vm_with_vcpu(true).unwrap();
    target.restore(&target_profile, &saved, None).unwrap();
    let loaded = target.save(&target_profile).unwrap();
    assert!(
        loaded.msrs.contains(&(TSC_DEADLINE, deadline)),
        "{:x?}",
        loaded.msrs
    );
    assert_eq!(saved.differences(&loaded), Vec::<String>::new());
}

const TSC_DEADLINE: u32 = 0x6e0;

/// Something done to a saved state.
type Change<'a> = &'a dyn Fn(&mut VcpuV2);

#[test]
fn every_field_counts_as_a_difference() {
    let Some((_vm, vcpu, profile)) = vm_with_vcpu(true) else {
        return;
    };
    let saved = vcpu.save(&profile).unwrap();
    let changes: [(&str, Change<'_>); 10] = [
        ("cpuid", &|state| state.cpuid[8] ^= 1),
        ("regs", &|state| state.regs[0] ^= 1),
        ("sregs", &|state| state.sregs[0] ^= 1),
        ("xcrs", &|state| state.xcrs[0] ^= 1),
        ("xsave", &|state| state.xsave[600] ^= 1),
        ("lapic", &|state| state.lapic = None),
        ("events", &|state| state.events[0] ^= 1),
        ("debug_regs", &|state| state.debug_regs[0] ^= 1),
        ("MSR", &|state| state.msrs[0].1 ^= 1),
        ("mp_state", &|state| state.mp_state ^= 1),
    ];
    for (field, change) in changes {
        let mut other = saved.clone();
        change(&mut other);
        let found = saved.differences(&other);
        assert!(
            found.len() == 1 && found[0].starts_with(field),
            "{field}: {found:?}"
        );
    }
    let mut moved = saved.clone();
    moved.tsc.value += 1000;
    // The timer of the local APIC has run out; then, what another vector's bit would be.
    let lapic = moved.lapic.as_mut().unwrap();
    let vector = usize::from(lapic[0x320]);
    lapic[0x390] ^= 1;
    lapic[0x200 + vector / 32 * 16 + vector % 32 / 8] ^= 1 << (vector % 8);
    assert_eq!(saved.differences(&moved), Vec::<String>::new());
    let lapic = moved.lapic.as_mut().unwrap();
    lapic[0x200 + 0x60 + 1] ^= 1;
    assert_eq!(saved.differences(&moved).len(), 1);
}

#[test]
fn a_local_apic_on_one_side_only_is_refused() {
    let Some((_vm, with, with_profile)) = vm_with_vcpu(true) else {
        return;
    };
    let (_other_vm, mut without, without_profile) = vm_with_vcpu(false).unwrap();
    let saved = with.save(&with_profile).unwrap();
    let error = without
        .restore(&without_profile, &saved, None)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("vcpu/0") && error.contains("local APIC"),
        "{error}"
    );
}

#[test]
fn a_vcpu_that_waits_for_its_start_keeps_waiting() {
    let Some((_vm, source, profile)) = vm_with_vcpu(true) else {
        return;
    };
    let mut saved = source.save(&profile).unwrap();
    saved.mp_state = KVM_MP_STATE_INIT_RECEIVED;
    let (_target_vm, mut target, target_profile) = vm_with_vcpu(true).unwrap();
    target.restore(&target_profile, &saved, None).unwrap();
    assert_eq!(
        target.save(&target_profile).unwrap().mp_state,
        KVM_MP_STATE_INIT_RECEIVED
    );
}

#[test]
fn a_feature_that_this_host_lacks_is_named() {
    let Some((_vm, mut vcpu, profile)) = vm_with_vcpu(false) else {
        return;
    };
    let mut saved = vcpu.save(&profile).unwrap();
    let mut cpuid = cpuid::cpuid_from_bytes(
        "vcpu/0",
        saved.visible_cpuid.as_ref().unwrap_or(&saved.cpuid),
    )
    .unwrap();
    // Leaf 7.0 ECX bit 31 is PKS, which KVM does not give to guests.
    for entry in cpuid.as_mut_slice() {
        if (entry.function, entry.index) == (7, 0) {
            entry.ecx |= 1 << 31;
        }
    }
    saved.visible_cpuid = Some(cpuid::cpuid_to_bytes(&cpuid));
    let error = vcpu
        .restore(&profile, &saved, None)
        .unwrap_err()
        .to_string();
    assert!(error.contains("leaf 0x7.0 ecx bits 0x80000000"), "{error}");
}

#[test]
fn interrupt_controllers_and_timer_arrive_in_a_second_vm() {
    let Some((source, ..)) = vm_with_vcpu(true) else {
        return;
    };
    let mut ioapic = kvm_irqchip {
        chip_id: KVM_IRQCHIP_IOAPIC,
        ..Default::default()
    };
    source.get_irqchip(&mut ioapic).unwrap();
    let mut bytes = to_bytes(&ioapic);
    // The ID of the I/O APIC, after chip id, padding and base address and select register.
    bytes[20..24].copy_from_slice(&5_u32.to_le_bytes());
    source
        .set_irqchip(&from_bytes("irqchip", "ioapic", &bytes).unwrap())
        .unwrap();
    let mut pit = source.get_pit2().unwrap();
    pit.channels[1].count = 77;
    source.set_pit2(&pit).unwrap();

    let section = save_irqchip(&source, "irqchip", true).unwrap();
    let (target, ..) = vm_with_vcpu(true).unwrap();
    restore_irqchip(&target, &section, true).unwrap();
    let loaded: IrqchipV1 = decode(&save_irqchip(&target, "irqchip", true).unwrap()).unwrap();
    let saved: IrqchipV1 = decode(&section).unwrap();
    assert_eq!(loaded.ioapic, saved.ioapic);
    assert_eq!(
        (loaded.pic_master, loaded.pic_slave),
        (saved.pic_master.clone(), saved.pic_slave.clone())
    );
    assert_eq!(target.get_pit2().unwrap().channels[1].count, 77);

    let refuse = |state: &IrqchipV1, reason: &str| {
        let section = encode("irqchip", state).unwrap();
        let error = restore_irqchip(&target, &section, true)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("irqchip") && error.contains(reason),
            "{error}"
        );
    };
    let swapped = IrqchipV1 {
        pic_master: saved.pic_slave.clone(),
        ..saved.clone()
    };
    refuse(&swapped, "pic_master holds chip 1");
    let without_pit = IrqchipV1 {
        pit: None,
        ..saved.clone()
    };
    refuse(&without_pit, "PIT");
    let short = IrqchipV1 {
        ioapic: saved.ioapic[1..].to_vec(),
        ..saved
    };
    refuse(&short, "ioapic has");
}

#[test]
fn the_clock_goes_on_from_where_it_was_and_counts_the_time_between() {
    let Some((source, ..)) = vm_with_vcpu(false) else {
        return;
    };
    // An hour more than the target's clock could have by itself.
    let ahead = kvm_bindings::kvm_clock_data {
        clock: 3_600_000_000_000,
        ..Default::default()
    };
    source.set_clock(&ahead).unwrap();
    let mut section = save_clock(&source, "kvm-clock").unwrap();
    let mut saved: ClockV1 = decode(&section).unwrap();
    saved.realtime_ns -= 5_000_000_000;
    section = encode("kvm-clock", &saved).unwrap();
    let (target, ..) = vm_with_vcpu(false).unwrap();
    let ClockMove { source: _, target } = restore_clock(&target, &section).unwrap();
    let passed_ns = target.clock_ns - saved.clock_ns;
    assert!(
        (5_000_000_000..65_000_000_000).contains(&passed_ns),
        "{passed_ns}"
    );
}

#[test]
fn a_clock_from_another_age_is_refused() {
    let Some((vm, ..)) = vm_with_vcpu(false) else {
        return;
    };
    let mut saved: ClockV1 = decode(&save_clock(&vm, "kvm-clock").unwrap()).unwrap();
    saved.realtime_ns = 0;
    let error = restore_clock(&vm, &encode("kvm-clock", &saved).unwrap()).unwrap_err();
    assert!(matches!(error, DeviceError::BadState { .. }), "{error}");
    assert!(error.to_string().contains("kvm-clock"), "{error}");
}

#[test]
fn a_guest_that_left_gets_no_more_interrupts_and_one_that_stayed_gets_them_as_before() {
    use std::sync::Arc;

    use vmferry_transport::units::MigrationId;

    use crate::notifier::{Mode, Modes, Notifiers, Priority, Setup};

    let Some((vm, ..)) = vm_with_vcpu(true) else {
        return;
    };
    let vm = Arc::new(vm);
    let mut pit = vm.get_pit2().unwrap();
    // A timer that ticks.
    (pit.channels[0].mode, pit.channels[0].count) = (2, 1193);
    vm.set_pit2(&pit).unwrap();
    let mut ioapic = kvm_irqchip {
        chip_id: KVM_IRQCHIP_IOAPIC,
        ..Default::default()
    };
    vm.get_irqchip(&mut ioapic).unwrap();
    let mut bytes = to_bytes(&ioapic);
    // Input 4 is a device's: vector 0x31, not masked.
    bytes[32 + 4 * 8..][..8].copy_from_slice(&0x31_u64.to_le_bytes());
    vm.set_irqchip(&from_bytes("irqchip", "ioapic", &bytes).unwrap())
        .unwrap();
    let state = || -> IrqchipV1 { decode(&save_irqchip(&vm, "irqchip", true).unwrap()).unwrap() };
    let entry = |state: &IrqchipV1| state.ioapic[32 + 4 * 8..][..8].to_vec();

    let notifiers = Notifiers::new();
    let notifier = KvmNotifier::new(vm.clone(), true, true);
    notifiers.register(Modes::ALL, Priority::CHECK, Box::new(notifier));
    let setup = Setup {
        mode: Mode::Normal,
        migration: MigrationId([1; 16]),
    };
    let told = notifiers.setup(&setup).unwrap();
    notifiers.failed(told);
    assert_eq!(entry(&state()), 0x31_u64.to_le_bytes());
    assert_eq!(vm.get_pit2().unwrap().channels[0].mode, 2);
    assert_ne!(state().pic_master[10], 0xff);

    let told = notifiers.setup(&setup).unwrap();
    notifiers.done(told);
    let silent = state();
    assert_eq!(entry(&silent), 0x1_0031_u64.to_le_bytes());
    assert!(
        silent.ioapic[32..224]
            .chunks(8)
            .all(|entry| entry[2] & 1 == 1)
    );
    assert_eq!((silent.pic_master[10], silent.pic_slave[10]), (0xff, 0xff));
    let modes = vm.get_pit2().unwrap().channels.map(|channel| channel.mode);
    assert_eq!(modes, [5; 3]);
}

#[test]
fn only_a_guest_with_kvms_clock_can_be_told_of_a_pause() {
    let Some((_vm, vcpu, _)) = vm_with_vcpu(false) else {
        return;
    };
    assert!(!tell_paused(vcpu.fd()).unwrap());
}
