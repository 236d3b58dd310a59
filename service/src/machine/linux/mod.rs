//! A Linux guest: what has to be in memory before the kernel's first instruction, by the 64-bit boot protocol.
//!
//! ```text
//! 0x0000_0500  GDT
//! 0x0000_7000  boot parameters ("zero page")
//! 0x0000_9000  page tables: the first GiB, one to one
//! 0x0002_0000  command line
//! 0x000e_0000  ACPI tables: processors, serial port, virtio devices
//! 0x0010_0000  kernel: a bzImage is loaded here, an ELF file where it says
//! ...          initial RAM disk, at the end of low RAM
//! ```
//!
//! The kernel finds its devices by the tables; its console is the first serial port. Interrupt controllers are in KVM. There
//! is no PCI. A kernel that resets the machine ends the guest.
//!
//! Linux runs in kernel mode, which a KVM without hardware for it (kvm-pvm) emulates an instruction at a time, if at all.

mod acpi;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::{BzImage, Elf, KernelLoader, KernelLoaderResult};
use vm_memory::{Bytes, GuestAddress, ReadVolatile};

use super::MachineError;
use super::ram::RamMemory;
use super::virtio::Window;
use super::workload::layout::{HIGH_RAM_GPA, low_bytes};

/// Where the GDT lies.
pub const GDT_GPA: u64 = 0x500;
/// Boot parameters.
pub const BOOT_PARAMS_GPA: u64 = 0x7000;
/// Page tables.
pub const PAGE_TABLES_GPA: u64 = 0x9000;
/// Selector of the code segment.
pub const CODE: u16 = 0x10;
/// Selector of the data segment.
pub const DATA: u16 = 0x18;
/// Entries of the GDT: two that are empty, code, data.
pub const GDT: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
/// Interrupt line of the first serial port.
pub const SERIAL_GSI: u32 = 4;

const CMDLINE_GPA: u64 = 0x2_0000;
/// Most bytes of a command line, with its end: what kernels take.
const CMDLINE_BYTES_MAX: usize = 2048;
const ACPI_GPA: u64 = 0xe_0000;
const KERNEL_GPA: u64 = 0x10_0000;
/// RAM below this is the kernel's; then comes what a PC has there.
const BASE_RAM_END: u64 = 0x9_fc00;
/// Smallest RAM that a kernel of today can boot in, with a small initial RAM disk.
const RAM_MIN: u64 = 32 << 20;
/// Where the 64-bit entry lies in a bzImage.
const ENTRY64: u64 = 0x200;
/// xloadflags of a kernel that has a 64-bit entry.
const HAS_ENTRY64: u16 = 1;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
const BOOT_FLAG: u16 = 0xaa55;
const HEADER: u32 = u32::from_le_bytes(*b"HdrS");
const LOADER_OTHER: u8 = 0xff;
const PAGE_BYTES: u64 = 4096;
const LARGE_PAGE_BYTES: u64 = 2 << 20;
/// Present, writable.
const TABLE_ENTRY: u64 = 3;
/// The same, a large page.
const LARGE_PAGE_ENTRY: u64 = 0x83;

/// What `--kernel` and its companions say.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct LinuxConfig {
    /// A bzImage, or an ELF file (`vmlinux`).
    pub kernel: PathBuf,
    /// An initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// What is said to the kernel.
    pub cmdline: String,
}

/// Where the first vCPU begins.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Entry {
    /// Address of the first instruction.
    pub rip: u64,
}

/// Loads the kernel and all that it wants to know into `memory` of a machine with `mem_bytes` of RAM and `vcpus` vCPUs.
///
/// # Errors
/// [`MachineError::Config`] for files that are no kernel or do not fit, [`MachineError::Host`] for files that cannot be read.
pub fn load(
    config: &LinuxConfig,
    memory: &RamMemory,
    mem_bytes: u64,
    vcpus: u32,
    windows: &[Window],
) -> Result<Entry, MachineError> {
    if mem_bytes < RAM_MIN {
        return Err(MachineError::Config(format!(
            "RAM of {mem_bytes} bytes: a kernel needs at least {RAM_MIN}"
        )));
    }
    let low_end = low_bytes(mem_bytes);
    let (loaded, entry) = load_kernel(&config.kernel, memory)?;
    let initrd = match &config.initrd {
        Some(path) => Some(load_initrd(path, memory, loaded.kernel_end, low_end)?),
        None => None,
    };
    let cmdline = cmdline(config)?;
    put(memory, CMDLINE_GPA, cmdline.as_bytes())?;
    let header = header(loaded.setup_header, initrd, cmdline.len());
    put_boot_params(memory, header, mem_bytes)?;
    put(memory, ACPI_GPA, &acpi::tables(ACPI_GPA, vcpus, windows))?;
    put_words(memory, GDT_GPA, &GDT)?;
    put_page_tables(memory)?;
    Ok(entry)
}

fn load_kernel(
    path: &Path,
    memory: &RamMemory,
) -> Result<(KernelLoaderResult, Entry), MachineError> {
    let mut file = open(path)?;
    let mut magic = [0; 4];
    file.read_exact(&mut magic)
        .and_then(|()| file.seek(SeekFrom::Start(0)))
        .map_err(host(path, "read"))?;
    let refuse = |reason: String| {
        MachineError::Config(format!(
            "{}: not a kernel that can be loaded: {reason}",
            path.display()
        ))
    };
    let start = Some(GuestAddress(KERNEL_GPA));
    if magic == *b"\x7fELF" {
        let loaded =
            Elf::load(memory, None, &mut file, start).map_err(|error| refuse(error.to_string()))?;
        let rip = loaded.kernel_load.0;
        return Ok((loaded, Entry { rip }));
    }
    let loaded = BzImage::load(memory, start, &mut file, start)
        .map_err(|error| refuse(error.to_string()))?;
    let flags = loaded.setup_header.map_or(0, |header| header.xloadflags);
    if flags & HAS_ENTRY64 == 0 {
        return Err(refuse("it has no 64-bit entry".to_owned()));
    }
    let rip = loaded.kernel_load.0 + ENTRY64;
    Ok((loaded, Entry { rip }))
}

/// Puts the initial RAM disk to the end of low RAM. Returns address and length.
fn load_initrd(
    path: &Path,
    memory: &RamMemory,
    kernel_end: u64,
    low_end: u64,
) -> Result<(u32, u32), MachineError> {
    let mut file = open(path)?;
    let bytes = file
        .seek(SeekFrom::End(0))
        .and_then(|bytes| file.seek(SeekFrom::Start(0)).map(|_| bytes))
        .map_err(host(path, "measure"))?;
    let at = low_end
        .checked_sub(bytes)
        .map(|at| at & !(PAGE_BYTES - 1))
        .filter(|at| *at >= kernel_end);
    let (Some(at), Ok(len)) = (at, usize::try_from(bytes)) else {
        return Err(MachineError::Config(format!(
            "{}: {bytes} bytes do not fit into RAM behind the kernel",
            path.display()
        )));
    };
    read_exactly(memory, at, &mut file, len).map_err(host(path, "read"))?;
    let narrow =
        |value: u64| u32::try_from(value).map_err(|error| MachineError::Config(error.to_string()));
    Ok((narrow(at)?, narrow(bytes)?))
}

fn read_exactly(
    memory: &RamMemory,
    at: u64,
    file: &mut impl ReadVolatile,
    len: usize,
) -> io::Result<()> {
    memory
        .read_exact_volatile_from(GuestAddress(at), file, len)
        .map_err(io::Error::other)
}

fn cmdline(config: &LinuxConfig) -> Result<String, MachineError> {
    let mut cmdline = config.cmdline.clone();
    cmdline.push('\0');
    let plain = config
        .cmdline
        .bytes()
        .all(|byte| (b' '..0x7f).contains(&byte));
    if !plain || cmdline.len() > CMDLINE_BYTES_MAX {
        return Err(MachineError::Config(format!(
            "a command line of {} bytes: at most {CMDLINE_BYTES_MAX}, in plain ASCII",
            cmdline.len()
        )));
    }
    Ok(cmdline)
}

fn header(
    of_kernel: Option<setup_header>,
    initrd: Option<(u32, u32)>,
    cmdline_bytes: usize,
) -> setup_header {
    // An ELF file brings none.
    let mut header = of_kernel.unwrap_or_else(|| setup_header {
        boot_flag: BOOT_FLAG,
        header: HEADER,
        kernel_alignment: 0x0100_0000,
        ..Default::default()
    });
    header.type_of_loader = LOADER_OTHER;
    header.cmd_line_ptr = CMDLINE_GPA as u32;
    header.cmdline_size = cmdline_bytes as u32;
    if let Some((at, bytes)) = initrd {
        header.ramdisk_image = at;
        header.ramdisk_size = bytes;
    }
    header
}

fn put_boot_params(
    memory: &RamMemory,
    header: setup_header,
    mem_bytes: u64,
) -> Result<(), MachineError> {
    let low = low_bytes(mem_bytes);
    let ranges = [
        (0, BASE_RAM_END, E820_RAM),
        (ACPI_GPA, KERNEL_GPA - ACPI_GPA, E820_RESERVED),
        (KERNEL_GPA, low - KERNEL_GPA, E820_RAM),
        (HIGH_RAM_GPA, mem_bytes - low, E820_RAM),
    ];
    let mut params = boot_params {
        hdr: header,
        acpi_rsdp_addr: ACPI_GPA,
        ..Default::default()
    };
    let ranges = ranges.into_iter().filter(|(_, size, _)| *size > 0);
    let mut entries = 0;
    for (slot, (addr, size, kind)) in params.e820_table.iter_mut().zip(ranges) {
        *slot = boot_e820_entry {
            addr,
            size,
            r#type: kind,
        };
        entries += 1;
    }
    params.e820_entries = entries;
    let params = BootParams::new(&params, GuestAddress(BOOT_PARAMS_GPA));
    LinuxBootConfigurator::write_bootparams(&params, memory)
        .map_err(|error| MachineError::Config(error.to_string()))
}

/// The first GiB, one to one, in large pages.
fn put_page_tables(memory: &RamMemory) -> Result<(), MachineError> {
    let [top, middle, bottom] = [0, 1, 2].map(|level| PAGE_TABLES_GPA + level * PAGE_BYTES);
    put_words(memory, top, &[middle | TABLE_ENTRY])?;
    put_words(memory, middle, &[bottom | TABLE_ENTRY])?;
    let pages: Vec<_> = (0..512)
        .map(|page| (page * LARGE_PAGE_BYTES) | LARGE_PAGE_ENTRY)
        .collect();
    put_words(memory, bottom, &pages)
}

fn put_words(memory: &RamMemory, gpa: u64, words: &[u64]) -> Result<(), MachineError> {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    put(memory, gpa, &bytes)
}

fn put(memory: &RamMemory, gpa: u64, bytes: &[u8]) -> Result<(), MachineError> {
    memory
        .write_slice(bytes, GuestAddress(gpa))
        .map_err(|error| MachineError::Config(error.to_string()))
}

fn open(path: &Path) -> Result<File, MachineError> {
    File::open(path).map_err(host(path, "open"))
}

fn host(path: &Path, op: &str) -> impl FnOnce(io::Error) -> MachineError {
    let op = format!("{op} {}", path.display());
    move |source| MachineError::Host { op, source }
}
