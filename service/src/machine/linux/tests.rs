//! What is put into memory, with files that are shaped like kernels. Real ones boot in the lab.

use std::path::PathBuf;

use tempfile::TempDir;

use super::*;
use crate::machine::ram::MachineRam;
use crate::machine::virtio::{Bus, backends};

const MEM_BYTES: u64 = 64 << 20;
const KERNEL: &[u8] = b"code of the kernel";

struct Files(TempDir);

impl Files {
    fn new() -> Self {
        Self(TempDir::with_prefix("vmferry-linux-").unwrap())
    }

    fn put(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    fn config(&self, kernel: &[u8]) -> LinuxConfig {
        LinuxConfig {
            kernel: self.put("kernel", kernel),
            initrd: None,
            cmdline: "quiet".to_owned(),
        }
    }
}

/// The parts of a bzImage that a loader looks at.
fn bzimage() -> Vec<u8> {
    let mut image = vec![0; 1024];
    let mut set = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    set(0x1f1, &[1]);
    set(0x202, b"HdrS");
    set(0x206, &0x20c_u16.to_le_bytes());
    set(0x211, &[1]);
    set(0x214, &0x10_0000_u32.to_le_bytes());
    set(0x236, &HAS_ENTRY64.to_le_bytes());
    image.extend_from_slice(KERNEL);
    image
}

fn load_into(
    ram: &MachineRam,
    config: &LinuxConfig,
    windows: &[Window],
) -> Result<Entry, MachineError> {
    load(config, ram.memory(), MEM_BYTES, 2, windows)
}

fn bytes<const N: usize>(ram: &MachineRam, gpa: u64) -> [u8; N] {
    let mut bytes = [0; N];
    ram.memory()
        .read_slice(&mut bytes, GuestAddress(gpa))
        .unwrap();
    bytes
}

fn word(ram: &MachineRam, gpa: u64) -> u32 {
    u32::from_le_bytes(bytes(ram, gpa))
}

#[test]
fn the_kernel_is_told_of_its_memory_its_initial_disk_and_its_devices() {
    let files = Files::new();
    let ram = MachineRam::create(MEM_BYTES).unwrap();
    let image = files.put("disk", &[0; 4096]);
    let mut disks = [image.to_str().unwrap().parse().unwrap()];
    crate::machine::disk::name_disks(&mut disks).unwrap();
    let disks = crate::machine::disk::Disks::open(&disks).unwrap();
    let bus = Bus::new(backends(&disks), &ram).unwrap();
    let mut config = files.config(&bzimage());
    config.initrd = Some(files.put("initrd", &[7; 5000]));
    let entry = load_into(&ram, &config, &bus.windows()).unwrap();
    let acpi: [u8; 4096] = bytes(&ram, ACPI_GPA);
    let devices = acpi.windows(8).filter(|name| *name == b"LNRO0005");
    assert_eq!(devices.count(), 1);
    assert_eq!(entry.rip, 0x10_0200);
    assert_eq!(&bytes::<18>(&ram, 0x10_0000), KERNEL);

    let initrd = word(&ram, BOOT_PARAMS_GPA + 0x218);
    assert_eq!(u64::from(initrd), MEM_BYTES - 8192);
    assert_eq!(word(&ram, BOOT_PARAMS_GPA + 0x21c), 5000);
    assert_eq!(bytes::<2>(&ram, u64::from(initrd) + 4999), [7, 0]);
    assert_eq!(u64::from(word(&ram, BOOT_PARAMS_GPA + 0x228)), CMDLINE_GPA);
    assert_eq!(&bytes::<6>(&ram, CMDLINE_GPA), b"quiet\0");

    assert_eq!(bytes::<1>(&ram, BOOT_PARAMS_GPA + 0x1e8), [3], "ranges");
    let third = BOOT_PARAMS_GPA + 0x2d0 + 40;
    assert_eq!(u64::from_le_bytes(bytes(&ram, third)), KERNEL_GPA);
    assert_eq!(
        u64::from_le_bytes(bytes(&ram, third + 8)),
        MEM_BYTES - KERNEL_GPA
    );
    assert_eq!(u64::from(word(&ram, BOOT_PARAMS_GPA + 0x70)), ACPI_GPA);
    assert_eq!(&bytes::<8>(&ram, ACPI_GPA), b"RSD PTR ");
}

#[test]
fn what_cannot_be_loaded_is_refused_with_the_reason() {
    let files = Files::new();
    let ram = MachineRam::create(MEM_BYTES).unwrap();
    let good = files.config(&bzimage());
    let refusal = |change: &dyn Fn(&mut LinuxConfig)| {
        let mut config = good.clone();
        change(&mut config);
        let error = load_into(&ram, &config, &[]).unwrap_err();
        format!("{error}")
    };
    let none = files.0.path().join("none");
    assert!(refusal(&|config| config.kernel = none.clone()).contains("none"));
    let text = files.put("text", &[b'x'; 4096]);
    assert!(refusal(&|config| config.kernel = text.clone()).contains("not a kernel"));
    let mut old = bzimage();
    old[0x236] = 0;
    let old = files.put("old", &old);
    assert!(refusal(&|config| config.kernel = old.clone()).contains("64-bit"));
    let short = files.put("short", b"\x7fELF");
    assert!(refusal(&|config| config.kernel = short.clone()).contains("not a kernel"));
    let large = files.put("large", b"");
    File::options()
        .write(true)
        .open(&large)
        .unwrap()
        .set_len(MEM_BYTES)
        .unwrap();
    assert!(refusal(&|config| config.initrd = Some(large.clone())).contains("do not fit"));
    assert!(refusal(&|config| config.cmdline = "x".repeat(2048)).contains("at most"));
    assert!(refusal(&|config| config.cmdline = "a\0b".to_owned()).contains("ASCII"));
    let error = load(&good, ram.memory(), 16 << 20, 1, &[]).unwrap_err();
    assert!(error.to_string().contains("at least"), "{error}");
}

/// The table at an address, after its sum was checked.
fn table_at(tables: &[u8], gpa: u64) -> &[u8] {
    let from = usize::try_from(gpa - ACPI_GPA).unwrap();
    let bytes = u32::from_le_bytes(tables[from + 4..from + 8].try_into().unwrap());
    let table = &tables[from..from + usize::try_from(bytes).unwrap()];
    assert_eq!(sum(table), 0, "{}", table[..4].escape_ascii());
    table
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte))
}

#[test]
fn acpi_tables_lead_to_each_other_and_name_every_processor() {
    for vcpus in [1, 2, 64] {
        let tables = acpi::tables(ACPI_GPA, vcpus, &[]);
        assert!(tables.len() as u64 <= KERNEL_GPA - ACPI_GPA);
        assert_eq!((sum(&tables[..20]), sum(&tables[..36])), (0, 0));
        let quad =
            |table: &[u8], at: usize| u64::from_le_bytes(table[at..at + 8].try_into().unwrap());
        let xsdt = table_at(&tables, quad(&tables, 24));
        assert_eq!((&xsdt[..4], xsdt.len()), (&b"XSDT"[..], 52));
        let fadt = table_at(&tables, quad(xsdt, 36));
        assert_eq!((&fadt[..4], fadt.len()), (&b"FACP"[..], 276));
        let madt = table_at(&tables, quad(xsdt, 44));
        assert_eq!(&madt[..4], b"APIC");
        assert_eq!(madt.len(), 44 + 8 * vcpus as usize + 12);
        let dsdt = table_at(&tables, quad(fadt, 140));
        assert_eq!(&dsdt[..4], b"DSDT");
        assert_eq!(dsdt.windows(4).filter(|name| *name == b"COM1").count(), 1);
    }
}
