//! What has to be in memory before the workload's first instruction: parameters, program, descriptor tables, mailboxes, page tables.
//!
//! The same pieces are written into the built-in machine's RAM and, as segments of an ELF file, handed to other VMMs.

use std::ops::Range;

use super::layout::{
    self, HIGH_RAM_GPA, LOW_RAM_END, PAGE_BYTES, PAGE_TABLES_GPA, PARAMS_GPA, PROGRAM_GPA,
    TABLES_GPA, mailbox, mailbox_gpa, params, slices,
};
use super::{WorkloadConfig, image};
use crate::machine::MachineError;
use crate::machine::vfio::window::{WINDOWS_END, WINDOWS_GPA};
use crate::machine::virtio::{DEVICES_MAX, WINDOW_BYTES, WINDOWS_GPA as VIRTIO_GPA};

/// Selector of the flat 32-bit code segment.
pub const CODE32: u16 = 0x08;
/// Selector of the 64-bit code segment at CPL 0.
pub const CODE64: u16 = 0x10;
/// Selector of the flat data segment at CPL 3.
pub const USER_DATA: u16 = 0x18 | 3;
/// Selector of the 64-bit code segment at CPL 3.
pub const USER_CODE64: u16 = 0x20 | 3;
/// Selector of the TSS.
pub const TSS: u16 = 0x28;
/// Bytes of the TSS with its I/O permission bitmap, less one.
pub const TSS_LIMIT: u16 = TSS_IO_BITMAP_AT + TSS_IO_PORTS / 8;
/// Bytes of the GDT, less one.
pub const GDT_LIMIT: u16 = 0x37;
/// Where the pseudo-descriptor for `lgdt` lies.
pub const GDT_POINTER_GPA: u64 = TABLES_GPA + 0x100;
/// Stack of the PVH entry; grows down from here.
pub const STUB_STACK_GPA: u64 = TABLES_GPA + PAGE_BYTES;

/// Where the I/O permission bitmap begins in the TSS.
const TSS_IO_BITMAP_AT: u16 = 104;
/// Ports that the bitmap allows, from 0 on.
const TSS_IO_PORTS: u16 = 0x400;

/// Present, writable, user, accessed: an upper-level entry. Accessed and dirty bits are set beforehand so that no CPU writes the
/// page tables: they are sent once and stay clean.
const TABLE_ENTRY: u64 = 0x27;
/// The same with dirty, for a 2 MiB page.
const LARGE_PAGE_ENTRY: u64 = 0xe7;
const LARGE_PAGE_BYTES: u64 = 2 << 20;
const DIRECTORY_BYTES: u64 = 1 << 30;
const ENTRIES: u64 = 512;
/// Without a rate limit one page of the fill is checked per so many page writes.
const FILL_CHECK_EVERY_UNLIMITED: u64 = 64;
/// With a rate limit.
const FILL_CHECK_EVERY_LIMITED: u64 = 8;
/// Longest piece of the schedule that is written without a look at the clock.
const BATCH_US: u64 = 1000;

/// Bytes that belong at an address.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Piece {
    /// Guest-physical address of the first byte.
    pub gpa: u64,
    /// The bytes.
    pub bytes: Vec<u8>,
}

/// What the loader needs to know.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct LoadOptions {
    /// RAM size in bytes.
    pub mem_bytes: u64,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// TSC ticks per millisecond, as the guest sees them.
    pub tsc_khz: u32,
    /// Passes after which the guest writes the exit port; `None` for never.
    pub exit_after_passes: Option<u64>,
    /// Which VFIO devices are serial ports that echo, one bit each; see [`params::ECHOES`].
    pub echoes: u16,
    /// Window of the virtio-blk device that the guest writes and checks; see [`params::DISK_WINDOW`].
    pub disk_window: Option<u64>,
    /// Window of the virtio-net device that the guest answers on; see [`params::NET_WINDOW`].
    pub net_window: Option<u64>,
    /// Whether the guest writes to its serial port with each pass; see [`params::SERIAL_PASSES`].
    pub serial: bool,
}

/// All pieces, in ascending order of address and without overlap.
///
/// # Errors
/// [`MachineError::Config`] when the workload does not fit the machine.
pub fn pieces(config: &WorkloadConfig, options: LoadOptions) -> Result<Vec<Piece>, MachineError> {
    config.check(options.mem_bytes, options.vcpus)?;
    if options.tsc_khz == 0 {
        return Err(MachineError::Config(
            "the TSC frequency is unknown".to_owned(),
        ));
    }
    let mut pieces = vec![
        parameters(config, options),
        Piece {
            gpa: PROGRAM_GPA,
            bytes: image::program().to_vec(),
        },
        descriptor_tables(),
    ];
    pieces.extend((0..options.vcpus).map(|vcpu| mailbox_page(config, options.vcpus, vcpu)));
    pieces.push(page_tables(options.mem_bytes, &windows(options)));
    Ok(pieces)
}

/// A page of u64 fields under construction.
struct Fields(Vec<u8>);

impl Fields {
    fn new(bytes: u64) -> Self {
        Self(vec![0; usize::try_from(bytes).unwrap_or(usize::MAX)])
    }

    fn set(&mut self, at: u64, value: u64) {
        let at = usize::try_from(at).unwrap_or(usize::MAX);
        self.0[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }
}

fn parameters(config: &WorkloadConfig, options: LoadOptions) -> Piece {
    let low_end = layout::low_bytes(options.mem_bytes) / PAGE_BYTES;
    let (batch_pages, batch_ticks) = batch(config.dirty_pages_per_sec, options);
    let mut page = Fields::new(PAGE_BYTES);
    page.set(params::MAGIC_AT, params::MAGIC);
    page.set(params::VCPUS, options.vcpus.into());
    page.set(
        params::WORKING_SET_PAGES,
        config.working_set_bytes / PAGE_BYTES,
    );
    page.set(params::FILL_PAGES, config.fill_bytes / PAGE_BYTES);
    page.set(params::TSC_KHZ, options.tsc_khz.into());
    page.set(
        params::PAGES_PER_SEC,
        config.dirty_pages_per_sec.unwrap_or(0),
    );
    page.set(params::BATCH_PAGES, batch_pages);
    page.set(params::BATCH_TICKS, batch_ticks);
    page.set(params::LOW_END_PAGE, low_end);
    page.set(params::HOLE_PAGES, HIGH_RAM_GPA / PAGE_BYTES - low_end);
    page.set(
        params::FILL_CHECK_EVERY,
        if config.dirty_pages_per_sec.is_some() {
            FILL_CHECK_EVERY_LIMITED
        } else {
            FILL_CHECK_EVERY_UNLIMITED
        },
    );
    page.set(
        params::EXIT_AFTER_PASSES,
        options.exit_after_passes.unwrap_or(0),
    );
    page.set(params::ECHOES, options.echoes.into());
    page.set(params::DISK_WINDOW, options.disk_window.unwrap_or(0));
    page.set(params::NET_WINDOW, options.net_window.unwrap_or(0));
    page.set(params::SERIAL_PASSES, options.serial.into());
    Piece {
        gpa: PARAMS_GPA,
        bytes: page.0,
    }
}

/// Pages that one vCPU writes between two looks at the clock, and the TSC ticks they take; zeros without a limit.
fn batch(pages_per_sec: Option<u64>, options: LoadOptions) -> (u64, u64) {
    let Some(pages_per_sec) = pages_per_sec else {
        return (0, 0);
    };
    let all_vcpus_per_batch = u128::from(pages_per_sec) * u128::from(BATCH_US) / 1_000_000;
    let pages = (all_vcpus_per_batch / u128::from(options.vcpus)).max(1);
    let ticks = pages * u128::from(options.vcpus) * u128::from(options.tsc_khz) * 1000
        / u128::from(pages_per_sec);
    let narrow = |value: u128| u64::try_from(value).unwrap_or(u64::MAX);
    (narrow(pages), narrow(ticks.max(1)))
}

fn mailbox_page(config: &WorkloadConfig, vcpus: u32, vcpu: u32) -> Piece {
    let slices = slices(config, vcpus, vcpu);
    let mut page = Fields::new(PAGE_BYTES);
    page.set(mailbox::SLICE_FIRST, slices.working_set.start);
    page.set(mailbox::SLICE_END, slices.working_set.end);
    page.set(mailbox::FILL_FIRST, slices.fill.start);
    page.set(mailbox::FILL_END, slices.fill.end);
    Piece {
        gpa: mailbox_gpa(vcpu),
        bytes: page.0,
    }
}

/// GDT and its pseudo-descriptor in the first page, the TSS in the second. The TSS allows the ports that the program uses: KVM flavours
/// that run CPL 3 with the real flags lose IOPL on the way.
fn descriptor_tables() -> Piece {
    let mut page = Fields::new(2 * PAGE_BYTES);
    let tss_base = layout::TSS_GPA;
    page.set(u64::from(CODE32), 0x00cf_9b00_0000_ffff);
    page.set(u64::from(CODE64), 0x00af_9b00_0000_ffff);
    page.set(u64::from(USER_DATA & !3), 0x00cf_f300_0000_ffff);
    page.set(u64::from(USER_CODE64 & !3), 0x00af_fb00_0000_ffff);
    // 64-bit TSS, available; its base is split over the descriptor.
    page.set(
        u64::from(TSS),
        0x0000_8900_0000_0000
            | u64::from(TSS_LIMIT)
            | (tss_base & 0x00ff_ffff) << 16
            | (tss_base >> 24 & 0xff) << 56,
    );
    page.set(u64::from(TSS) + 8, tss_base >> 32);
    // The bitmap's place is the upper half of the TSS's last word; its end is marked by a byte of ones.
    let tss = layout::TSS_GPA - TABLES_GPA;
    page.set(tss + 96, u64::from(TSS_IO_BITMAP_AT) << 48);
    page.set(tss + u64::from(TSS_IO_BITMAP_AT + TSS_IO_PORTS / 8), 0xff);
    page.set(
        GDT_POINTER_GPA - TABLES_GPA,
        TABLES_GPA << 16 | u64::from(GDT_LIMIT),
    );
    Piece {
        gpa: TABLES_GPA,
        bytes: page.0,
    }
}

/// What of the device hole the program uses, in large pages.
fn windows(options: LoadOptions) -> Vec<Range<u64>> {
    let mut windows = Vec::new();
    if options.disk_window.or(options.net_window).is_some() {
        windows.push(VIRTIO_GPA..VIRTIO_GPA + LARGE_PAGE_BYTES);
    }
    if options.echoes != 0 {
        windows.push(WINDOWS_GPA..WINDOWS_END);
    }
    windows
}

/// Identity mapping of all RAM in 2 MiB pages, for the user. The device hole stays unmapped, but for `windows`.
fn page_tables(mem_bytes: u64, windows: &[Range<u64>]) -> Piece {
    let low = layout::low_bytes(mem_bytes);
    let high = mem_bytes - low;
    let ranges = [(0, low), (HIGH_RAM_GPA, high)];
    let directories: u64 = ranges
        .iter()
        .map(|(_, len)| len.div_ceil(DIRECTORY_BYTES))
        .sum();
    let mut tables = Fields::new((2 + directories + u64::from(!windows.is_empty())) * PAGE_BYTES);
    tables.set(0, (PAGE_TABLES_GPA + PAGE_BYTES) | TABLE_ENTRY);
    let mut directory_at = 2 * PAGE_BYTES;
    for (start, len) in ranges {
        for gib in 0..len.div_ceil(DIRECTORY_BYTES) {
            let base = start + gib * DIRECTORY_BYTES;
            tables.set(
                PAGE_BYTES + base / DIRECTORY_BYTES * 8,
                (PAGE_TABLES_GPA + directory_at) | TABLE_ENTRY,
            );
            let mapped = (len - gib * DIRECTORY_BYTES).min(DIRECTORY_BYTES);
            for page in 0..mapped.div_ceil(LARGE_PAGE_BYTES) {
                tables.set(
                    directory_at + page * 8,
                    (base + page * LARGE_PAGE_BYTES) | LARGE_PAGE_ENTRY,
                );
            }
            directory_at += PAGE_BYTES;
        }
    }
    if !windows.is_empty() {
        tables.set(
            PAGE_BYTES + WINDOWS_GPA / DIRECTORY_BYTES * 8,
            (PAGE_TABLES_GPA + directory_at) | TABLE_ENTRY,
        );
        let pages = windows
            .iter()
            .flat_map(|window| window.start / LARGE_PAGE_BYTES..window.end / LARGE_PAGE_BYTES);
        for page in pages {
            tables.set(
                directory_at + page % ENTRIES * 8,
                (page * LARGE_PAGE_BYTES) | LARGE_PAGE_ENTRY,
            );
        }
    }
    Piece {
        gpa: PAGE_TABLES_GPA,
        bytes: tables.0,
    }
}

// The directories of the largest RAM end below the data.
const _: () = assert!(
    PAGE_TABLES_GPA + (3 + layout::RAM_MAX / DIRECTORY_BYTES) * PAGE_BYTES
        <= layout::WORKING_SET_GPA
);
const _: () = assert!(LOW_RAM_END.is_multiple_of(DIRECTORY_BYTES));
// The windows have a directory to themselves, in whole pages.
const _: () = assert!(
    WINDOWS_GPA / DIRECTORY_BYTES == LOW_RAM_END / DIRECTORY_BYTES
        && (WINDOWS_END - 1) / DIRECTORY_BYTES == WINDOWS_GPA / DIRECTORY_BYTES
        && VIRTIO_GPA / DIRECTORY_BYTES == WINDOWS_GPA / DIRECTORY_BYTES
        && DEVICES_MAX as u64 * WINDOW_BYTES <= LARGE_PAGE_BYTES
        && VIRTIO_GPA.is_multiple_of(LARGE_PAGE_BYTES)
        && WINDOWS_GPA.is_multiple_of(LARGE_PAGE_BYTES)
        && WINDOWS_END.is_multiple_of(LARGE_PAGE_BYTES)
);

#[cfg(test)]
mod tests {
    use super::*;

    fn options(mem_bytes: u64, vcpus: u32) -> LoadOptions {
        LoadOptions {
            mem_bytes,
            vcpus,
            tsc_khz: 2_000_000,
            exit_after_passes: None,
            serial: false,
            echoes: 0,
            disk_window: None,
            net_window: None,
        }
    }

    fn config(dirty_pages_per_sec: Option<u64>) -> WorkloadConfig {
        WorkloadConfig {
            working_set_bytes: 4 << 20,
            dirty_pages_per_sec,
            fill_bytes: 0,
        }
    }

    #[test]
    fn pieces_do_not_overlap_whatever_the_size() {
        for mem in [
            layout::RAM_MIN,
            LOW_RAM_END,
            (8 << 30) + 4096,
            layout::RAM_MAX,
        ] {
            let pieces = pieces(&config(None), options(mem, layout::VCPUS_MAX)).unwrap();
            for pair in pieces.windows(2) {
                assert!(pair[0].gpa + pair[0].bytes.len() as u64 <= pair[1].gpa);
            }
            let last = pieces.last().unwrap();
            assert!(last.gpa + last.bytes.len() as u64 <= layout::WORKING_SET_GPA);
        }
    }

    #[test]
    fn page_tables_map_all_ram_and_of_the_hole_only_windows_that_are_used() {
        let mem = (4 << 30) + (4 << 20);
        for (echoes, disk_window) in [(0, None), (1, None), (0, Some(VIRTIO_GPA)), (1, Some(1))] {
            check_page_tables(LoadOptions {
                echoes,
                disk_window,
                ..options(mem, 1)
            });
        }
    }

    fn check_page_tables(options: LoadOptions) {
        let tables = page_tables(options.mem_bytes, &windows(options));
        let word = |gpa: u64| {
            let at = usize::try_from(gpa - PAGE_TABLES_GPA).unwrap();
            u64::from_le_bytes(tables.bytes[at..at + 8].try_into().unwrap())
        };
        let translate = |address: u64| {
            let pdpt = word(PAGE_TABLES_GPA + (address >> 39) * 8) & !0xfff;
            let entry = word(pdpt + (address >> 30 & 511) * 8);
            if entry & 1 == 0 {
                return None;
            }
            let page = word((entry & !0xfff) + (address >> 21 & 511) * 8);
            (page & 1 == 1).then_some((page & !0x1f_ffff) + (address & 0x1f_ffff))
        };
        for mapped in [
            0,
            0x1_2345,
            LOW_RAM_END - 1,
            HIGH_RAM_GPA,
            HIGH_RAM_GPA + (1 << 30) + (4 << 20) - 1,
        ] {
            assert_eq!(translate(mapped), Some(mapped));
        }
        for hole in [
            LOW_RAM_END,
            VIRTIO_GPA - 1,
            VIRTIO_GPA + LARGE_PAGE_BYTES,
            WINDOWS_GPA - 1,
            WINDOWS_END,
            HIGH_RAM_GPA - 1,
            HIGH_RAM_GPA + (1 << 30) + (4 << 20),
        ] {
            assert_eq!(translate(hole), None, "{hole:#x}");
        }
        for window in [WINDOWS_GPA, WINDOWS_END - 1] {
            assert_eq!(translate(window), (options.echoes != 0).then_some(window));
        }
        let mapped = options.disk_window.map(|_| VIRTIO_GPA);
        assert_eq!(translate(VIRTIO_GPA), mapped);
    }

    #[test]
    fn batches_keep_the_rate_and_are_about_a_millisecond() {
        for rate in [1, 7, 999, 1000, 50_000, 10_000_000] {
            for vcpus in [1, 3, 64] {
                let (pages, ticks) = batch(Some(rate), options(1 << 30, vcpus));
                let per_sec = pages as f64 * f64::from(vcpus) * 2e9 / ticks as f64;
                assert!(
                    (per_sec / rate as f64 - 1.0).abs() < 1e-3,
                    "{rate} on {vcpus}: {per_sec}"
                );
                assert!(
                    pages == 1 || ticks <= 2_000_000 + 1,
                    "{rate} on {vcpus}: {ticks}"
                );
            }
        }
    }
}
