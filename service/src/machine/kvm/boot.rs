//! The first state of a vCPU. For the workload: long mode at CPL 3 with IOPL 3, at its first instruction. At CPL 3 the program runs
//! natively on every flavour of KVM, including those that emulate the guest's kernel mode. For Linux: long mode at CPL 0, as its boot
//! protocol has it, for the first vCPU; the others wait to be started by it.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;

use crate::machine::linux;
use crate::machine::workload::image::{self, RFLAGS};
use crate::machine::workload::layout::{
    PAGE_BYTES, PAGE_TABLES_GPA, TABLES_GPA, TSS_GPA, mailbox_gpa,
};
use crate::machine::workload::loader::{GDT_LIMIT, TSS, TSS_LIMIT, USER_CODE64, USER_DATA};

/// PG, WP, NE, ET, MP, PE.
const CR0: u64 = 0x8001_0033;
/// OSXMMEXCPT, OSFXSR, PAE.
const CR4: u64 = 0x620;
const CR4_PAE: u64 = 0x20;
/// LMA, LME.
const EFER: u64 = 0x500;

/// Puts `vcpu` there. Its CPUID must be set.
pub(super) fn enter_workload(vcpu: &VcpuFd, number: u32) -> Result<(), kvm_ioctls::Error> {
    let mut sregs = vcpu.get_sregs()?;
    let data = segment(USER_DATA, 3, false);
    sregs.cs = segment(USER_CODE64, 0xb, true);
    sregs.ds = data;
    sregs.es = data;
    sregs.fs = data;
    sregs.gs = data;
    sregs.ss = data;
    sregs.tr = kvm_segment {
        base: TSS_GPA,
        limit: TSS_LIMIT.into(),
        selector: TSS,
        type_: 0xb,
        present: 1,
        ..Default::default()
    };
    sregs.ldt = kvm_segment {
        unusable: 1,
        ..Default::default()
    };
    sregs.gdt = kvm_dtable {
        base: TABLES_GPA,
        limit: GDT_LIMIT,
        ..Default::default()
    };
    // No IDT: the program takes no interrupts, and an exception of it is a bug that shall stop the guest.
    sregs.idt = kvm_dtable::default();
    sregs.cr0 = CR0;
    sregs.cr3 = PAGE_TABLES_GPA;
    sregs.cr4 = CR4;
    sregs.efer = EFER;
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_regs {
        rip: image::entry64_gpa(),
        rsp: mailbox_gpa(number) + PAGE_BYTES,
        rdi: number.into(),
        rflags: RFLAGS,
        ..Default::default()
    })
}

/// Puts the first vCPU to the entry of a kernel. Its CPUID must be set.
pub(super) fn enter_linux(vcpu: &VcpuFd, entry: linux::Entry) -> Result<(), kvm_ioctls::Error> {
    let mut sregs = vcpu.get_sregs()?;
    let data = kernel_segment(linux::DATA, 3, false);
    sregs.cs = kernel_segment(linux::CODE, 0xb, true);
    sregs.ds = data;
    sregs.es = data;
    sregs.fs = data;
    sregs.gs = data;
    sregs.ss = data;
    sregs.gdt = kvm_dtable {
        base: linux::GDT_GPA,
        limit: (size_of_val(&linux::GDT) - 1) as u16,
        ..Default::default()
    };
    sregs.idt = kvm_dtable::default();
    sregs.cr0 = CR0;
    sregs.cr3 = linux::PAGE_TABLES_GPA;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER;
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_regs {
        rip: entry.rip,
        rsi: linux::BOOT_PARAMS_GPA,
        rsp: linux::PAGE_TABLES_GPA,
        rflags: 2,
        ..Default::default()
    })
}

fn kernel_segment(selector: u16, kind: u8, long: bool) -> kvm_segment {
    kvm_segment {
        dpl: 0,
        ..segment(selector, kind, long)
    }
}

/// A flat segment at CPL 3.
fn segment(selector: u16, kind: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        dpl: 3,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}
