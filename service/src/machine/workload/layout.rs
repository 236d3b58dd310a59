//! Where things lie in the workload guest's memory. Both machines and the guest program share it; all addresses are guest-physical.
//!
//! ```text
//! 0x0000_0000  unused
//! 0x0001_0000  parameters (one page, written once by the loader)
//! 0x0002_0000  program
//! 0x0004_0000  GDT, TSS
//! 0x0006_0000  queue, buffer and generations of the disk, if the program works on one
//! 0x0007_8000  queues and buffers of the network interface, if the program answers on one
//! 0x0008_0000  mailboxes, one page per vCPU
//! 0x0010_0000  page tables: PML4, PDPT, then one page directory per GiB
//! 0x0040_0000  data pages: the working set, then the fill; both jump over the device hole below 4 GiB
//! ```
//!
//! Parameters and mailboxes are arrays of little-endian u64; the modules [`params`] and [`mailbox`] give the byte offset of each
//! field. The guest program knows the same offsets: they are handed to the assembler from here.

use super::WorkloadConfig;

/// Bytes per page.
pub const PAGE_BYTES: u64 = 4096;
/// Most vCPUs a machine may have: one mailbox page each below the page tables.
pub const VCPUS_MAX: u32 = 64;
/// Parameters for the guest program.
pub const PARAMS_GPA: u64 = 0x1_0000;
/// The guest program.
pub const PROGRAM_GPA: u64 = 0x2_0000;
/// Most bytes the program may have.
pub const PROGRAM_BYTES_MAX: u64 = TABLES_GPA - PROGRAM_GPA;
/// Descriptor tables.
pub const TABLES_GPA: u64 = 0x4_0000;
/// Task state segment; only its place counts, the program runs at IOPL 3 and takes no interrupts.
pub const TSS_GPA: u64 = TABLES_GPA + PAGE_BYTES;
/// What the program needs for its disk; the module [`disk`] says where what lies.
pub const DISK_GPA: u64 = 0x6_0000;
/// What the program needs for its network interface; the module [`net`] says where what lies.
pub const NET_GPA: u64 = 0x7_8000;
/// First mailbox; vCPU n has the page at `MAILBOX_GPA + n * 4096`.
pub const MAILBOX_GPA: u64 = 0x8_0000;
/// PML4, then the lower levels.
pub const PAGE_TABLES_GPA: u64 = 0x10_0000;
/// First data page: the start of the working set.
pub const WORKING_SET_GPA: u64 = 0x40_0000;
/// Smallest RAM that holds the program and a working set of one MiB.
pub const RAM_MIN: u64 = 8 << 20;
/// Largest RAM that the page tables between [`PAGE_TABLES_GPA`] and the data can map.
pub const RAM_MAX: u64 = 256 << 30;
/// RAM below this address is block `ram0`; the rest, block `ram1`, starts at [`HIGH_RAM_GPA`]: the device hole of a PC.
pub const LOW_RAM_END: u64 = 3 << 30;
/// Guest-physical address of the first byte of `ram1`.
pub const HIGH_RAM_GPA: u64 = 4 << 30;

/// Flag of an available ring of a virtqueue: the program polls, and wants no interrupts.
pub const NO_INTERRUPT: u64 = 1;

/// Byte offsets of the parameters, from [`PARAMS_GPA`].
pub mod params {
    /// [`MAGIC`] once the parameters are complete.
    pub const MAGIC_AT: u64 = 0x00;
    /// Number of vCPUs.
    pub const VCPUS: u64 = 0x08;
    /// Pages of the working set, all vCPUs together.
    pub const WORKING_SET_PAGES: u64 = 0x10;
    /// Pages of the fill, all vCPUs together.
    pub const FILL_PAGES: u64 = 0x18;
    /// TSC ticks per millisecond.
    pub const TSC_KHZ: u64 = 0x20;
    /// Page writes per second of all vCPUs together, 0 for no limit. For the reader; the guest uses the next two.
    pub const PAGES_PER_SEC: u64 = 0x28;
    /// With a limit: page writes of one vCPU between two looks at the clock. 0 without a limit.
    pub const BATCH_PAGES: u64 = 0x30;
    /// With a limit: TSC ticks that such a batch takes.
    pub const BATCH_TICKS: u64 = 0x38;
    /// Page number (address / 4096) where low RAM ends.
    pub const LOW_END_PAGE: u64 = 0x40;
    /// Pages of address space between low and high RAM, added to the page number of a data page that lies in high RAM.
    pub const HOLE_PAGES: u64 = 0x48;
    /// One page of the fill is checked after this many page writes.
    pub const FILL_CHECK_EVERY: u64 = 0x50;
    /// Passes after which vCPU 0 writes the exit port; 0 for never.
    pub const EXIT_AFTER_PASSES: u64 = 0x58;
    /// One bit for each VFIO device: its first region is a 16550 that echoes. In each pass vCPU 0 sends the pass's number there.
    pub const ECHOES: u64 = 0x60;
    /// Window of the virtio-blk device that vCPU 0 writes and checks; 0 for none.
    pub const DISK_WINDOW: u64 = 0x68;
    /// With each pass vCPU 0 writes the last digit of the pass's number to the serial port; 0 for not.
    pub const SERIAL_PASSES: u64 = 0x70;
    /// Window of the virtio-net device that vCPU 0 answers on; 0 for none.
    pub const NET_WINDOW: u64 = 0x78;
    /// So many digits there are, a power of 2, all of them printable.
    pub const SERIAL_DIGITS: u64 = 64;
    /// The first of them; the others follow in ASCII.
    pub const SERIAL_DIGIT_0: u64 = b'0' as u64;
    /// After so many passes the number must come back; so many bytes are always in the device.
    pub const ECHO_DEPTH: u64 = 8;
    /// Value of [`MAGIC_AT`]: "VMFWORK1".
    pub const MAGIC: u64 = u64::from_le_bytes(*b"VMFWORK1");
}

/// Byte offsets within a vCPU's mailbox, from [`mailbox_gpa`]. Unless said otherwise the guest writes and the VMM reads.
pub mod mailbox {
    /// One of the `PHASE_` values.
    pub const PHASE: u64 = 0x00;
    /// Complete passes over this vCPU's slice.
    pub const PASSES: u64 = 0x08;
    /// Page writes, fill not included.
    pub const PAGES_WRITTEN: u64 = 0x10;
    /// Pages found wrong, in the working set or the fill, and bytes that a device gave back wrong. A page counts once per look.
    pub const ERRORS: u64 = 0x18;
    /// Address of the first wrong word; 0 if there is none.
    pub const FIRST_ERROR_GPA: u64 = 0x20;
    /// What should have been there.
    pub const FIRST_ERROR_EXPECTED: u64 = 0x28;
    /// What was there.
    pub const FIRST_ERROR_FOUND: u64 = 0x30;
    /// TSC after the last page write.
    pub const HEARTBEAT_TSC: u64 = 0x38;
    /// Longest gap between two page writes, in TSC ticks.
    pub const LONGEST_GAP_TICKS: u64 = 0x40;
    /// Counted up by the VMM to make the guest forget the longest gap.
    pub const RESET_REQUESTED: u64 = 0x48;
    /// Value of [`RESET_REQUESTED`] that the guest has obeyed last.
    pub const RESET_DONE: u64 = 0x50;
    /// Pages of the fill written so far.
    pub const FILLED_PAGES: u64 = 0x58;
    /// Pages of the fill checked since.
    pub const FILL_CHECKED: u64 = 0x60;

    /// Blocks written to the disk.
    pub const DISK_WRITTEN: u64 = 0x68;
    /// Blocks read back from the disk and compared.
    pub const DISK_CHECKED: u64 = 0x70;
    /// Blocks of the disk that were wrong, and requests that failed. They count in [`ERRORS`] too.
    pub const DISK_ERRORS: u64 = 0x78;

    /// Written by the loader: index of the first data page of this vCPU's slice of the working set.
    pub const SLICE_FIRST: u64 = 0x800;
    /// Written by the loader: index of the page after the slice.
    pub const SLICE_END: u64 = 0x808;
    /// Written by the loader: index of the first data page of this vCPU's part of the fill.
    pub const FILL_FIRST: u64 = 0x810;
    /// Written by the loader: index of the page after that part.
    pub const FILL_END: u64 = 0x818;

    /// Not started.
    pub const PHASE_IDLE: u64 = 0;
    /// Writing the fill.
    pub const PHASE_FILL: u64 = 1;
    /// First pass over the working set; gaps do not count yet.
    pub const PHASE_FIRST_PASS: u64 = 2;
    /// Later passes: every page is verified before it is written, and gaps count.
    pub const PHASE_STEADY: u64 = 3;
}

/// Byte offsets from [`DISK_GPA`] of what the program needs for its disk. It works on the disk from beginning to end, over and over: a
/// block is read and compared with what its generation says, then written with the next.
pub mod disk {
    /// Descriptor table: header, data, status.
    pub const DESC: u64 = 0x000;
    /// Available ring. All entries are 0, so it is one word that the program writes: flags and index.
    pub const AVAIL: u64 = 0x100;
    /// Used ring.
    pub const USED: u64 = 0x200;
    /// Header of the request.
    pub const HEADER: u64 = 0x300;
    /// Its status, in the first byte of a word.
    pub const STATUS: u64 = 0x310;
    /// How many blocks the program works on; 0 until the disk is set up.
    pub const BLOCKS: u64 = 0x1000;
    /// The block that it works on.
    pub const BLOCK: u64 = 0x1008;
    /// What it waits for: one of the `STEP_` values.
    pub const STEP: u64 = 0x1010;
    /// Requests submitted.
    pub const SUBMITTED: u64 = 0x1018;
    /// Data of the request.
    pub const DATA: u64 = 0x2000;
    /// Generation of each block, from 1; 0 for one whose content is not known.
    pub const GENERATIONS: u64 = 0x4000;

    /// Nothing; the next request is a read.
    pub const STEP_IDLE: u64 = 0;
    /// The end of a read.
    pub const STEP_READ: u64 = 1;
    /// The end of a write.
    pub const STEP_WRITE: u64 = 2;

    /// Bytes of a block.
    pub const BLOCK_BYTES: u64 = 4096;
    /// 512-byte sectors of a block.
    pub const BLOCK_SECTORS: u64 = 8;
    /// Most blocks that the program works on; a larger disk is left alone from there on.
    pub const BLOCKS_MAX: u64 = 8192;
    /// Entries of the queue.
    pub const QUEUE_SIZE: u64 = 8;
    /// The descriptors of header and status, and that of the data without its direction: length, flags, next.
    pub const DESC_HEADER: u64 = 16 | 1 << 32 | 1 << 48;
    /// As [`DESC_HEADER`].
    pub const DESC_DATA: u64 = BLOCK_BYTES | 1 << 32 | 2 << 48;
    /// As [`DESC_HEADER`].
    pub const DESC_STATUS: u64 = 1 | 2 << 32;
    /// Bit of a descriptor that the device writes.
    pub const DESC_WRITE: u64 = 2 << 32;
    /// Requests: read, write.
    pub const REQUEST_READ: u64 = 0;
    /// As [`REQUEST_READ`].
    pub const REQUEST_WRITE: u64 = 1;
}

const _: () = assert!(DISK_GPA + disk::GENERATIONS + 8 * disk::BLOCKS_MAX <= NET_GPA);

/// Byte offsets of what the program needs for its network interface, from [`NET_GPA`], and values that go there. Both queues have
/// [`QUEUE_SIZE`](net::QUEUE_SIZE) entries.
pub mod net {
    /// Of the queue to the guest: descriptors, one buffer each.
    pub const TO_DESC: u64 = 0x000;
    /// Its available ring: entry n is always descriptor n.
    pub const TO_AVAIL: u64 = 0x100;
    /// Its used ring, whose entries are whole words.
    pub const TO_USED: u64 = 0x204;
    /// Of the queue from the guest: descriptors, of which the first is used.
    pub const FROM_DESC: u64 = 0x300;
    /// Its available ring.
    pub const FROM_AVAIL: u64 = 0x400;
    /// Its used ring.
    pub const FROM_USED: u64 = 0x500;
    /// 1 when the device is set up.
    pub const READY: u64 = 0x600;
    /// Packets that have come.
    pub const SEEN: u64 = 0x608;
    /// Buffers that were offered.
    pub const OFFERED: u64 = 0x610;
    /// Packets that were sent back.
    pub const SENT: u64 = 0x618;
    /// 1 while the last one is under way.
    pub const HELD: u64 = 0x620;
    /// The buffers.
    pub const BUFFERS: u64 = 0x1000;

    /// Entries of either queue.
    pub const QUEUE_SIZE: u64 = 8;
    /// Bytes of a buffer.
    pub const BUFFER_BYTES: u64 = 1 << BUFFER_SHIFT;
    /// The power of 2 that they are.
    pub const BUFFER_SHIFT: u64 = 11;
    /// A descriptor of a buffer behind its address: length, and that the device writes it.
    pub const TO_DESC_REST: u64 = BUFFER_BYTES | 2 << 32;
    /// First word of the available ring but for the index: no interrupts, entries 0 and 1.
    pub const TO_AVAIL_0: u64 = super::NO_INTERRUPT | 1 << 48;
    /// Its second word.
    pub const TO_AVAIL_1: u64 = 2 | 3 << 16 | 4 << 32 | 5 << 48;
    /// Its third.
    pub const TO_AVAIL_2: u64 = 6 | 7 << 16;

    /// Of a packet behind its header of 12 bytes: what it carries.
    pub const ETHER_TYPE: u64 = 12 + 12;
    /// IPv4, as a little-endian number.
    pub const ETHER_IPV4: u64 = 0x0008;
    /// Addresses of sender and receiver.
    pub const IP_ADDRESSES: u64 = 12 + 14 + 12;
    /// Ports of both.
    pub const UDP_PORTS: u64 = 12 + 14 + 20;
    /// Header, Ethernet, IPv4, UDP: less is not sent back.
    pub const ANSWER_BYTES_MIN: u64 = UDP_PORTS + 8;
}

const _: () = assert!(NET_GPA + net::BUFFERS + net::QUEUE_SIZE * net::BUFFER_BYTES <= MAILBOX_GPA);

/// Ports that the guest uses.
pub mod port {
    /// First of the eight ports of the 16550 serial port.
    pub const SERIAL: u16 = 0x3f8;
    /// A byte written here ends the guest.
    pub const EXIT: u16 = 0xf4;
    /// Writing n (32 bits) sleeps about n microseconds, or less. Reading gives [`SLEEP_PRESENT`]: elsewhere a guest has to spin.
    pub const SLEEP: u16 = 0xf8;
    /// What the sleep port reads as: "SLEP".
    pub const SLEEP_PRESENT: u32 = u32::from_le_bytes(*b"SLEP");
}

/// Address of the mailbox of a vCPU.
pub fn mailbox_gpa(vcpu: u32) -> u64 {
    MAILBOX_GPA + u64::from(vcpu) * PAGE_BYTES
}

/// Bytes of block `ram0` in a machine with `mem_bytes` of RAM.
pub fn low_bytes(mem_bytes: u64) -> u64 {
    mem_bytes.min(LOW_RAM_END)
}

/// Number of data pages that a machine with `mem_bytes` of RAM has for the working set and the fill.
pub fn data_pages(mem_bytes: u64) -> u64 {
    mem_bytes.saturating_sub(WORKING_SET_GPA) / PAGE_BYTES
}

/// Guest-physical address of data page `index`: counts up from [`WORKING_SET_GPA`] and jumps over the device hole.
pub fn data_page_gpa(index: u64, mem_bytes: u64) -> u64 {
    let straight = WORKING_SET_GPA + index * PAGE_BYTES;
    let low_end = low_bytes(mem_bytes);
    if straight < low_end {
        straight
    } else {
        straight - low_end + HIGH_RAM_GPA
    }
}

/// What each vCPU works on: data page indices, end not included.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Slices {
    /// Slice of the working set.
    pub working_set: std::ops::Range<u64>,
    /// Part of the fill.
    pub fill: std::ops::Range<u64>,
}

/// Splits the working set and the fill evenly over `vcpus`, in order.
pub fn slices(config: &WorkloadConfig, vcpus: u32, vcpu: u32) -> Slices {
    let part = |pages: u64, n: u32| {
        // Through u128: no page count that fits the checks of `WorkloadConfig::check` can overflow it.
        u64::try_from(u128::from(pages) * u128::from(n) / u128::from(vcpus.max(1)))
            .unwrap_or(u64::MAX)
    };
    let working_set_pages = config.working_set_bytes / PAGE_BYTES;
    let fill_pages = config.fill_bytes / PAGE_BYTES;
    Slices {
        working_set: part(working_set_pages, vcpu)..part(working_set_pages, vcpu + 1),
        fill: working_set_pages + part(fill_pages, vcpu)
            ..working_set_pages + part(fill_pages, vcpu + 1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_pages_jump_over_the_device_hole() {
        let mem = 5 << 30;
        let last_low = (LOW_RAM_END - WORKING_SET_GPA) / PAGE_BYTES - 1;
        assert_eq!(data_page_gpa(0, mem), WORKING_SET_GPA);
        assert_eq!(data_page_gpa(last_low, mem), LOW_RAM_END - PAGE_BYTES);
        assert_eq!(data_page_gpa(last_low + 1, mem), HIGH_RAM_GPA);
        assert_eq!(
            data_page_gpa(data_pages(mem) - 1, mem),
            HIGH_RAM_GPA + (2 << 30) - PAGE_BYTES
        );
    }

    #[test]
    fn slices_cover_everything_once() {
        let config = WorkloadConfig {
            working_set_bytes: 1001 * PAGE_BYTES,
            dirty_pages_per_sec: None,
            fill_bytes: 7 * PAGE_BYTES,
        };
        let mut next = (0, 1001);
        for vcpu in 0..3 {
            let Slices { working_set, fill } = slices(&config, 3, vcpu);
            assert_eq!((working_set.start, fill.start), next);
            next = (working_set.end, fill.end);
        }
        assert_eq!(next, (1001, 1008));
    }
}
