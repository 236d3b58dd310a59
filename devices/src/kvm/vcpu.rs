//! State of a vCPU, saved and loaded in the order that KVM needs.
//!
//! Loading: CPUID first, because it decides what the rest may contain; SREGS before REGS; the extended state; the local APIC before
//! the MSRs, whose TSC deadline is dropped unless the APIC's timer mode is set; the TSC; pending events; and last the MP state.

use std::io;

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_MP_STATE_RUNNABLE, kvm_cpuid_entry2, kvm_debugregs,
    kvm_lapic_state, kvm_mp_state, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use super::bytes::{bad_state, from_bytes, kernel, to_bytes};
use super::clock::ClockMove;
use super::cpuid::{cpuid_from_bytes, cpuid_to_bytes, guest_cpuid, missing_features};
use super::ioctl::{XSAVE_BYTES_MIN, XsaveArea, has_tsc_offset, xsave_bytes};
use super::msrs::{IA32_TSC_DEADLINE, get_msrs, readable_msrs, set_msrs};
use super::saved::VcpuV2;
use super::tsc::{restore_tsc, restore_tsc_khz, save_tsc};
use crate::DeviceError;

/// Offset and length of XSTATE_BV in the XSAVE area: which components are not in their initial state. The CPU may keep or drop the bit
/// of a component that is.
const XSTATE_BV: std::ops::Range<usize> = 512..520;
/// Current count of the local APIC's timer, and the priority that follows from what waits.
const LAPIC_MOVING: [std::ops::Range<usize>; 2] = [0x390..0x394, 0xa0..0xa4];
/// The timer's entry of the local APIC, whose first byte is its vector; and the first 32 of the vectors that wait, 16 bytes for each 32.
const LAPIC_TIMER: usize = 0x320;
const LAPIC_WAITING: usize = 0x200;
/// Stack and entry of SYSENTER. Processors of AMD have 32 bits of them, wherever the rest was seen before.
const SYSENTER_MSRS: [u32; 2] = [0x175, 0x176];
/// MSRs that count by themselves: the TSC deadline is cleared when it passes, the Hyper-V ones are clocks.
const MOVING_MSRS: [u32; 3] = [IA32_TSC_DEADLINE, 0x4000_0010, 0x4000_0020];

/// What saving and loading needs to know of a VM's vCPUs. Found out once, before anything is in a hurry.
#[derive(Debug)]
pub struct VcpuProfile {
    msrs: Vec<u32>,
    xsave_bytes: usize,
    has_tsc_offset: bool,
    has_lapic: bool,
    /// What a guest of this host could be shown.
    offered_cpuid: CpuId,
}

impl VcpuProfile {
    /// Looks at `vcpu`, the first of `vm`, made with all that KVM supports. `has_lapic`: the VM has its interrupt controller in the
    /// kernel.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn probe(kvm: &Kvm, vm: &VmFd, vcpu: &KvmVcpu, has_lapic: bool) -> io::Result<Self> {
        let listed = kvm.get_msr_index_list()?;
        Ok(Self {
            msrs: readable_msrs(&vcpu.fd, listed.as_slice())?,
            xsave_bytes: xsave_bytes(vm),
            has_tsc_offset: has_tsc_offset(&vcpu.fd),
            has_lapic,
            offered_cpuid: vcpu.fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES)?,
        })
    }

    /// Whether the TSC can be moved by its offset.
    pub fn has_tsc_offset(&self) -> bool {
        self.has_tsc_offset
    }

    /// The MSRs that are saved, besides the TSC.
    pub fn msrs(&self) -> &[u32] {
        &self.msrs
    }
}

/// A vCPU with what it was told to be.
#[derive(Debug)]
pub struct KvmVcpu {
    fd: VcpuFd,
    name: String,
    cpuid: CpuId,
}

impl KvmVcpu {
    /// Makes vCPU `number` of `vm`, which shows its guest all that `supported` has, save what cannot be migrated. Its state is saved
    /// under the name `vcpu/number`.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn new(vm: &VmFd, number: u32, supported: &CpuId) -> io::Result<Self> {
        let fd = vm.create_vcpu(number.into())?;
        let cpuid = guest_cpuid(supported, number);
        fd.set_cpuid2(&cpuid)?;
        Ok(Self {
            fd,
            name: vcpu_name(number),
            cpuid,
        })
    }

    /// The vCPU's descriptor.
    pub fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    /// The vCPU's descriptor, to run it. CPUID is to be left alone.
    pub fn fd_mut(&mut self) -> &mut VcpuFd {
        &mut self.fd
    }

    /// Reads all state. The vCPU must not be running, and owes no completion of an exit.
    ///
    /// # Errors
    /// The call that failed; the vCPU is unchanged.
    pub fn save(&self, profile: &VcpuProfile) -> Result<VcpuV2, DeviceError> {
        let Self {
            fd: vcpu,
            name: device,
            cpuid,
        } = self;
        // MP state first: asking for it makes KVM accept pending INIT and SIPI, which changes other state.
        let mp_state = vcpu
            .get_mp_state()
            .map_err(kernel(device, "KVM_GET_MP_STATE"))?;
        let mut xsave = XsaveArea::new(profile.xsave_bytes);
        xsave.get(vcpu).map_err(kernel(device, "KVM_GET_XSAVE2"))?;
        let lapic = profile
            .has_lapic
            .then(|| vcpu.get_lapic().map_err(kernel(device, "KVM_GET_LAPIC")))
            .transpose()?;
        let visible = vcpu
            .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
            .map_err(kernel(device, "KVM_GET_CPUID2"))?;
        Ok(VcpuV2 {
            cpuid: cpuid_to_bytes(cpuid),
            visible_cpuid: (visible != *cpuid).then(|| cpuid_to_bytes(&visible)),
            regs: to_bytes(&vcpu.get_regs().map_err(kernel(device, "KVM_GET_REGS"))?),
            sregs: to_bytes(&vcpu.get_sregs().map_err(kernel(device, "KVM_GET_SREGS"))?),
            xcrs: to_bytes(&vcpu.get_xcrs().map_err(kernel(device, "KVM_GET_XCRS"))?),
            xsave: xsave.to_bytes(),
            lapic: lapic.map(|lapic| to_bytes(&lapic)),
            msrs: get_msrs(vcpu, device, &profile.msrs)?,
            tsc: save_tsc(vcpu, device, profile.has_tsc_offset)?,
            events: to_bytes(
                &vcpu
                    .get_vcpu_events()
                    .map_err(kernel(device, "KVM_GET_VCPU_EVENTS"))?,
            ),
            debug_regs: to_bytes(
                &vcpu
                    .get_debug_regs()
                    .map_err(kernel(device, "KVM_GET_DEBUGREGS"))?,
            ),
            mp_state: mp_state.mp_state,
        })
    }

    /// Loads `state`. The vCPU has not run yet, or ran with the same CPUID. `clock` is what moving the VM's clock gave, if there is one.
    ///
    /// # Errors
    /// What was refused. The vCPU is then half-loaded and must not run.
    pub fn restore(
        &mut self,
        profile: &VcpuProfile,
        state: &VcpuV2,
        clock: Option<&ClockMove>,
    ) -> Result<(), DeviceError> {
        let Self {
            fd: vcpu,
            name: device,
            cpuid: own_cpuid,
        } = self;
        let Decoded {
            cpuid,
            regs,
            sregs,
            xcrs,
            xsave,
            lapic,
            msrs,
            deadline,
            events,
            debug_regs,
            mp_state,
        } = Decoded::new(device, state, profile)?;
        let tsc = &state.tsc;

        vcpu.set_cpuid2(&cpuid)
            .map_err(kernel(device, "KVM_SET_CPUID2"))?;
        *own_cpuid = cpuid;
        restore_tsc_khz(vcpu, device, tsc)?;
        vcpu.set_sregs(&sregs)
            .map_err(kernel(device, "KVM_SET_SREGS"))?;
        vcpu.set_xcrs(&xcrs)
            .map_err(kernel(device, "KVM_SET_XCRS"))?;
        xsave.set(vcpu).map_err(kernel(device, "KVM_SET_XSAVE"))?;
        vcpu.set_regs(&regs)
            .map_err(kernel(device, "KVM_SET_REGS"))?;
        if let Some(lapic) = lapic {
            vcpu.set_lapic(&lapic)
                .map_err(kernel(device, "KVM_SET_LAPIC"))?;
        }
        set_msrs(vcpu, device, &msrs)?;
        restore_tsc(vcpu, device, profile.has_tsc_offset, tsc, clock)?;
        set_msrs(vcpu, device, &deadline)?;
        vcpu.set_vcpu_events(&events)
            .map_err(kernel(device, "KVM_SET_VCPU_EVENTS"))?;
        vcpu.set_debug_regs(&debug_regs)
            .map_err(kernel(device, "KVM_SET_DEBUGREGS"))?;
        vcpu.set_mp_state(mp_state)
            .map_err(kernel(device, "KVM_SET_MP_STATE"))
    }
}

/// A saved state as the kernel takes it, all lengths checked: a damaged section is refused before anything changes.
struct Decoded {
    cpuid: CpuId,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xcrs: kvm_xcrs,
    xsave: XsaveArea,
    lapic: Option<kvm_lapic_state>,
    /// All MSRs but the TSC deadline.
    msrs: Vec<(u32, u64)>,
    /// The TSC deadline, which has to come last.
    deadline: Vec<(u32, u64)>,
    events: kvm_vcpu_events,
    debug_regs: kvm_debugregs,
    mp_state: kvm_mp_state,
}

impl Decoded {
    fn new(device: &str, state: &VcpuV2, profile: &VcpuProfile) -> Result<Self, DeviceError> {
        let VcpuV2 {
            cpuid,
            visible_cpuid,
            regs,
            sregs,
            xcrs,
            xsave,
            lapic,
            msrs,
            // Used as it is.
            tsc: _,
            events,
            debug_regs,
            mp_state,
        } = state;
        check_features(device, visible_cpuid.as_ref().unwrap_or(cpuid), profile)?;
        let (deadline, msrs) = msrs
            .iter()
            .copied()
            .partition(|(index, _)| *index == IA32_TSC_DEADLINE);
        Ok(Self {
            cpuid: cpuid_from_bytes(device, cpuid)?,
            regs: from_bytes(device, "regs", regs)?,
            sregs: from_bytes(device, "sregs", sregs)?,
            xcrs: from_bytes(device, "xcrs", xcrs)?,
            xsave: xsave_from_bytes(device, xsave, profile)?,
            lapic: lapic_from_bytes(device, lapic.as_deref(), profile)?,
            msrs,
            deadline,
            events: from_bytes(device, "events", events)?,
            debug_regs: from_bytes(device, "debug_regs", debug_regs)?,
            mp_state: kvm_mp_state {
                mp_state: *mp_state,
            },
        })
    }
}

/// Name of a vCPU's section.
pub fn vcpu_name(number: u32) -> String {
    format!("vcpu/{number}")
}

fn check_features(device: &str, visible: &[u8], profile: &VcpuProfile) -> Result<(), DeviceError> {
    let visible = cpuid_from_bytes(device, visible)?;
    let missing = missing_features(&visible, &profile.offered_cpuid);
    if missing.is_empty() {
        return Ok(());
    }
    Err(bad_state(
        device,
        format!(
            "its CPU has features that this host lacks: {}",
            missing.join(", ")
        ),
    ))
}

fn xsave_from_bytes(
    device: &str,
    bytes: &[u8],
    profile: &VcpuProfile,
) -> Result<XsaveArea, DeviceError> {
    if !(XSAVE_BYTES_MIN..=profile.xsave_bytes).contains(&bytes.len()) {
        return Err(bad_state(
            device,
            format!(
                "xsave has {} bytes, this host takes {XSAVE_BYTES_MIN} to {}",
                bytes.len(),
                profile.xsave_bytes
            ),
        ));
    }
    let mut area = XsaveArea::new(profile.xsave_bytes);
    area.fill(bytes);
    Ok(area)
}

fn lapic_from_bytes(
    device: &str,
    bytes: Option<&[u8]>,
    profile: &VcpuProfile,
) -> Result<Option<kvm_lapic_state>, DeviceError> {
    match (bytes, profile.has_lapic) {
        (Some(bytes), true) => from_bytes(device, "lapic", bytes).map(Some),
        (None, false) => Ok(None),
        (Some(_), false) => Err(bad_state(
            device,
            "it has a local APIC, this VM has none in the kernel".to_owned(),
        )),
        (None, true) => Err(bad_state(
            device,
            "it has no local APIC, this VM has one in the kernel".to_owned(),
        )),
    }
}

impl VcpuV2 {
    /// What differs between two states of a vCPU that has not run in between, one text per field; empty if nothing does. Left out is
    /// what moves on by itself: the TSC, its deadline, clocks.
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let Self {
            cpuid,
            // Shows the host's CPU, which need not be the same; its features are checked when loading.
            visible_cpuid: _,
            regs,
            sregs,
            xcrs,
            xsave,
            lapic,
            msrs,
            tsc,
            events,
            debug_regs,
            mp_state,
        } = self;
        let mut found = Vec::new();
        let mut bytes =
            |field: &str, ours: &[u8], theirs: &[u8], ignored: std::ops::Range<usize>| {
                if let Some(text) = first_difference(ours, theirs, &ignored) {
                    found.push(format!("{field}: {text}"));
                }
            };
        bytes("cpuid", cpuid, &other.cpuid, 0..0);
        bytes("regs", regs, &other.regs, 0..0);
        bytes("sregs", sregs, &other.sregs, 0..0);
        bytes("xcrs", xcrs, &other.xcrs, 0..0);
        bytes("xsave", xsave, &other.xsave, XSTATE_BV);
        bytes(
            "lapic",
            &steady_lapic(lapic.as_deref()),
            &steady_lapic(other.lapic.as_deref()),
            0..0,
        );
        bytes("events", events, &other.events, 0..0);
        bytes("debug_regs", debug_regs, &other.debug_regs, 0..0);
        found.extend(msr_differences(msrs, &other.msrs, is_intel(cpuid)));
        if tsc.khz != other.tsc.khz {
            found.push(format!("tsc: {} kHz, then {} kHz", tsc.khz, other.tsc.khz));
        }
        if *mp_state != other.mp_state {
            found.push(format!("mp_state: {mp_state}, then {}", other.mp_state));
        }
        found
    }

    /// Whether the vCPU would execute instructions if it were run.
    pub fn is_runnable(&self) -> bool {
        self.mp_state == KVM_MP_STATE_RUNNABLE
    }
}

fn first_difference(
    ours: &[u8],
    theirs: &[u8],
    ignored: &std::ops::Range<usize>,
) -> Option<String> {
    if ours.len() != theirs.len() {
        return Some(format!("{} bytes, then {}", ours.len(), theirs.len()));
    }
    let at = (0..ours.len()).find(|at| !ignored.contains(at) && ours[*at] != theirs[*at])?;
    Some(format!(
        "byte {at} is {:#04x}, then {:#04x}",
        ours[at], theirs[at]
    ))
}

/// State of a local APIC without what moves on by itself. Its timer counts, and may have run out since.
fn steady_lapic(lapic: Option<&[u8]>) -> Vec<u8> {
    let mut lapic = lapic.unwrap_or_default().to_vec();
    for range in LAPIC_MOVING {
        if let Some(bytes) = lapic.get_mut(range) {
            bytes.fill(0);
        }
    }
    let vector = lapic.get(LAPIC_TIMER).copied().map(usize::from);
    if let Some(vector) = vector
        && let Some(byte) = lapic.get_mut(LAPIC_WAITING + vector / 32 * 16 + vector % 32 / 8)
    {
        *byte &= !(1 << (vector % 8));
    }
    lapic
}

/// Whether a CPUID, as it is saved, names a processor of Intel: in leaf 0, whose first word of the name is EBX.
fn is_intel(cpuid: &[u8]) -> bool {
    let mut entries = cpuid.chunks_exact(size_of::<kvm_cpuid_entry2>());
    let leaf = entries.find(|entry| entry.starts_with(&[0; 4]));
    leaf.is_some_and(|entry| entry[16..].starts_with(b"Genu"))
}

fn msr_differences(ours: &[(u32, u64)], theirs: &[(u32, u64)], intel: bool) -> Vec<String> {
    let known = |index: u32, value: u64| {
        if !intel && SYSENTER_MSRS.contains(&index) {
            value & u64::from(u32::MAX)
        } else {
            value
        }
    };
    let value_in = |list: &[(u32, u64)], index: u32| {
        list.iter()
            .find(|(other, _)| *other == index)
            .map(|(_, value)| *value)
    };
    let mut found: Vec<_> = ours
        .iter()
        .filter(|(index, _)| !MOVING_MSRS.contains(index))
        .filter_map(|&(index, value)| match value_in(theirs, index) {
            Some(other) if known(index, other) == known(index, value) => None,
            Some(other) => Some(format!("MSR {index:#x}: {value:#x}, then {other:#x}")),
            None => Some(format!("MSR {index:#x}: {value:#x}, then missing")),
        })
        .collect();
    found.extend(
        theirs
            .iter()
            .filter(|(index, _)| value_in(ours, *index).is_none())
            .map(|(index, value)| format!("MSR {index:#x}: missing, then {value:#x}")),
    );
    found
}
