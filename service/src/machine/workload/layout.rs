//! Where things lie in the workload guest's memory. Both machines and the guest program share it; all addresses are guest-physical.
//!
//! ```text
//! 0x0000_0000  unused
//! 0x0001_0000  parameters (one page, written once by the loader)
//! 0x0002_0000  program
//! 0x0004_0000  GDT, IDT, TSS
//! 0x0008_0000  mailboxes, one page per vCPU
//! 0x0010_0000  page tables
//! 0x0020_0000  (unused)
//! 0x0040_0000  working set, then fill; both jump over the device hole below 4 GiB
//! ```

/// Most vCPUs a machine may have: one mailbox page each below the page tables.
pub const VCPUS_MAX: u32 = 64;
/// Parameters for the guest program.
pub const PARAMS_GPA: u64 = 0x1_0000;
/// The guest program.
pub const PROGRAM_GPA: u64 = 0x2_0000;
/// Descriptor tables.
pub const TABLES_GPA: u64 = 0x4_0000;
/// First mailbox; vCPU n has the page at `MAILBOX_GPA + n * 4096`.
pub const MAILBOX_GPA: u64 = 0x8_0000;
/// PML4, then the lower levels.
pub const PAGE_TABLES_GPA: u64 = 0x10_0000;
/// First page of the working set.
pub const WORKING_SET_GPA: u64 = 0x40_0000;
/// Smallest RAM that holds the program and a working set of one MiB.
pub const RAM_MIN: u64 = 8 << 20;
/// RAM below this address is block `ram0`; the rest, block `ram1`, starts at [`HIGH_RAM_GPA`]: the device hole of a PC.
pub const LOW_RAM_END: u64 = 3 << 30;
/// Guest-physical address of the first byte of `ram1`.
pub const HIGH_RAM_GPA: u64 = 4 << 30;
