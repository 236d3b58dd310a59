//! Saved state of KVM's own parts. Frozen.
//!
//! Structures of the kernel's stable x86-64 interface travel as byte strings in the kernel's own layout; loading checks the length
//! of each. Their meaning is the kernel's, and it validates what it is given.

use serde::{Deserialize, Serialize};

use super::msrs::is_wall_clock;
use crate::saved::{SavedState, read};

/// State of one vCPU, schema `kvm-vcpu`, version 2. Version 1 had the same fields, and the MSRs with which a guest asks for the wall clock
/// among the others: setting them makes KVM write into memory.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct VcpuV2 {
    /// What CPUID shall tell the guest: an array of `struct kvm_cpuid_entry2`.
    #[serde(with = "serde_bytes")]
    pub cpuid: Vec<u8>,
    /// What CPUID really tells the guest, in the same form; absent if that is `cpuid`. Some flavours of KVM cannot hide the host's CPU.
    #[serde(default, with = "serde_bytes")]
    pub visible_cpuid: Option<Vec<u8>>,
    /// `struct kvm_regs`.
    #[serde(with = "serde_bytes")]
    pub regs: Vec<u8>,
    /// `struct kvm_sregs`.
    #[serde(with = "serde_bytes")]
    pub sregs: Vec<u8>,
    /// `struct kvm_xcrs`.
    #[serde(with = "serde_bytes")]
    pub xcrs: Vec<u8>,
    /// XSAVE area in standard format, as long as the source's KVM made it: at least 4096 bytes.
    #[serde(with = "serde_bytes")]
    pub xsave: Vec<u8>,
    /// `struct kvm_lapic_state`; absent if the VM has no interrupt controller in the kernel.
    #[serde(default, with = "serde_bytes")]
    pub lapic: Option<Vec<u8>>,
    /// Index and value of every MSR that the source's KVM lists and can read, except the TSC.
    pub msrs: Vec<(u32, u64)>,
    /// Time stamp counter.
    pub tsc: TscV1,
    /// `struct kvm_vcpu_events`.
    #[serde(with = "serde_bytes")]
    pub events: Vec<u8>,
    /// `struct kvm_debugregs`.
    #[serde(with = "serde_bytes")]
    pub debug_regs: Vec<u8>,
    /// `KVM_MP_STATE_*`.
    pub mp_state: u32,
}

impl SavedState for VcpuV2 {
    const SCHEMA: &'static str = "kvm-vcpu";
    const VERSION: u32 = 2;

    fn upgrade(_: u32, bytes: &[u8]) -> Result<Self, String> {
        let mut saved: Self = read(bytes)?;
        saved.msrs.retain(|(index, _)| !is_wall_clock(*index));
        Ok(saved)
    }
}

/// Time stamp counter of one vCPU.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct TscV1 {
    /// Ticks per millisecond, as the guest sees them. 0 if the source's KVM does not know.
    pub khz: u32,
    /// IA32_TSC at `realtime_ns`.
    pub value: u64,
    /// Wall clock in nanoseconds since 1970 when `value` was read.
    pub realtime_ns: u64,
    /// Guest TSC less host TSC, modulo 2^64; absent if the source's KVM does not tell.
    #[serde(default)]
    pub offset: Option<u64>,
}

/// State of the VM's paravirtual clock.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct ClockV1 {
    /// The guest's clock in nanoseconds.
    pub clock_ns: u64,
    /// Wall clock in nanoseconds since 1970 at that moment.
    pub realtime_ns: u64,
    /// TSC of the source host at that moment; absent if its KVM does not tell.
    #[serde(default)]
    pub host_tsc: Option<u64>,
}

impl SavedState for ClockV1 {
    const SCHEMA: &'static str = "kvm-clock";
    const VERSION: u32 = 1;
}

/// State of the interrupt controllers in the kernel, and of the timer if there is one.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct IrqchipV1 {
    /// First PIC: `struct kvm_irqchip`.
    #[serde(with = "serde_bytes")]
    pub pic_master: Vec<u8>,
    /// Second PIC: `struct kvm_irqchip`.
    #[serde(with = "serde_bytes")]
    pub pic_slave: Vec<u8>,
    /// I/O APIC: `struct kvm_irqchip`.
    #[serde(with = "serde_bytes")]
    pub ioapic: Vec<u8>,
    /// `struct kvm_pit_state2`; absent if the VM has no timer in the kernel.
    #[serde(default, with = "serde_bytes")]
    pub pit: Option<Vec<u8>>,
}

impl SavedState for IrqchipV1 {
    const SCHEMA: &'static str = "kvm-irqchip";
    const VERSION: u32 = 1;
}
