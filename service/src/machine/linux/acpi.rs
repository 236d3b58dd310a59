//! ACPI tables (version 6, "hardware-reduced"): processors, interrupt controllers, serial port and virtio devices. They are how a kernel
//! finds devices that are on no bus; Debian's takes none from its command line.

use super::SERIAL_GSI;
use crate::machine::virtio::{WINDOW_BYTES, Window};
use crate::machine::workload::layout::port;

const LAPIC_GPA: u32 = 0xfee0_0000;
const IO_APIC_GPA: u32 = 0xfec0_0000;
const HEADER_BYTES: usize = 36;
const FADT_BYTES: usize = 276;
const RSDP_BYTES: usize = 36;
/// Port and value that reset the machine, see the vCPUs' threads.
const RESET: (u64, u8) = (0x64, 0xfe);

/// Flags of the FADT: it tells how to reset; there is no hardware of ACPI.
const FADT_FLAGS: u32 = 1 << 10 | 1 << 20;
/// What a PC would have and this machine lacks: VGA, a real-time clock.
const FADT_BOOT_FLAGS: u16 = 1 << 2 | 1 << 5;

/// The tables, to lie at `gpa`. The first is the root pointer.
pub(super) fn tables(gpa: u64, vcpus: u32, windows: &[Window]) -> Vec<u8> {
    let mut tables = vec![0; RSDP_BYTES];
    let mut add = |table: Vec<u8>| {
        tables.resize(tables.len().next_multiple_of(8), 0);
        let at = gpa + tables.len() as u64;
        tables.extend_from_slice(&table);
        at
    };
    let dsdt = add(table(b"DSDT", 2, &namespace(windows)));
    let fadt = add(table(b"FACP", 6, &fadt(dsdt)));
    let madt = add(table(b"APIC", 5, &madt(vcpus)));
    let xsdt = add(table(
        b"XSDT",
        1,
        &[fadt.to_le_bytes(), madt.to_le_bytes()].concat(),
    ));
    tables[..RSDP_BYTES].copy_from_slice(&root_pointer(xsdt));
    tables
}

fn root_pointer(xsdt: u64) -> Vec<u8> {
    let mut root = b"RSD PTR \0VMFERY\x02".to_vec();
    root.extend_from_slice(&0_u32.to_le_bytes());
    root.extend_from_slice(&(RSDP_BYTES as u32).to_le_bytes());
    root.extend_from_slice(&xsdt.to_le_bytes());
    root.resize(RSDP_BYTES, 0);
    root[8] = checksum(&root[..20]);
    root[32] = checksum(&root);
    root
}

/// A table with its header.
fn table(signature: &[u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    let mut table = signature.to_vec();
    let bytes = u32::try_from(HEADER_BYTES + body.len()).unwrap_or(u32::MAX);
    table.extend_from_slice(&bytes.to_le_bytes());
    table.extend_from_slice(&[revision, 0]);
    table.extend_from_slice(b"VMFERYVMFERRY \x01\0\0\0VMFY\x01\0\0\0");
    table.extend_from_slice(body);
    table[9] = checksum(&table);
    table
}

fn fadt(dsdt: u64) -> Vec<u8> {
    let mut fadt = vec![0; FADT_BYTES - HEADER_BYTES];
    let mut set = |at: usize, bytes: &[u8]| {
        fadt[at - HEADER_BYTES..at - HEADER_BYTES + bytes.len()].copy_from_slice(bytes);
    };
    set(40, &u32::try_from(dsdt).unwrap_or(0).to_le_bytes());
    set(109, &FADT_BOOT_FLAGS.to_le_bytes());
    set(112, &FADT_FLAGS.to_le_bytes());
    // The register that resets: a port of 8 bits, written as a byte.
    set(116, &[1, 8, 0, 1]);
    set(120, &RESET.0.to_le_bytes());
    set(128, &[RESET.1]);
    // Minor version.
    set(131, &[3]);
    set(140, &dsdt.to_le_bytes());
    fadt
}

fn madt(vcpus: u32) -> Vec<u8> {
    let mut madt = LAPIC_GPA.to_le_bytes().to_vec();
    madt.extend_from_slice(&0_u32.to_le_bytes());
    for vcpu in 0..vcpus as u8 {
        // Enabled.
        madt.extend_from_slice(&[0, 8, vcpu, vcpu, 1, 0, 0, 0]);
    }
    madt.extend_from_slice(&[1, 12, vcpus as u8, 0]);
    madt.extend_from_slice(&IO_APIC_GPA.to_le_bytes());
    madt.extend_from_slice(&0_u32.to_le_bytes());
    madt
}

/// `\_SB` with all devices, in ACPI's byte code.
fn namespace(windows: &[Window]) -> Vec<u8> {
    let mut devices = Vec::new();
    // PNP0501, a 16550.
    let id = [0x0c, 0x41, 0xd0, 0x05, 0x01];
    devices.extend(device(
        "COM1",
        &id,
        0,
        &[ports(port::SERIAL, 8), line(SERIAL_GSI)],
    ));
    for (number, window) in (0_u8..).zip(windows) {
        let name = format!("VIO{number:X}");
        let id = b"\x0dLNRO0005\0";
        let resources = [memory(window.gpa), line(window.gsi)];
        devices.extend(device(&name, id, number, &resources));
    }
    with_length(&[0x10], &[b"\\_SB_", &devices[..]].concat())
}

/// A device with what it is and what it uses.
fn device(name: &str, id: &[u8], uid: u8, resources: &[Vec<u8>]) -> Vec<u8> {
    let mut used = resources.concat();
    // End, without checksum.
    used.extend_from_slice(&[0x79, 0]);
    let bytes = u8::try_from(used.len()).unwrap_or(u8::MAX);
    let buffer = with_length(&[0x11], &[&[0x0a, bytes], &used[..]].concat());
    let content = [
        name.as_bytes(),
        b"\x08_HID",
        id,
        b"\x08_UID\x0a",
        &[uid],
        b"\x08_CRS",
        &buffer,
    ]
    .concat();
    with_length(&[0x5b, 0x82], &content)
}

fn memory(gpa: u64) -> Vec<u8> {
    // Fixed, 32 bits, may be written.
    let mut resource = vec![0x86, 9, 0, 1];
    resource.extend_from_slice(&(gpa as u32).to_le_bytes());
    resource.extend_from_slice(&(WINDOW_BYTES as u32).to_le_bytes());
    resource
}

fn line(gsi: u32) -> Vec<u8> {
    // Of this device alone, edges, active high; one.
    let mut resource = vec![0x89, 6, 0, 3, 1];
    resource.extend_from_slice(&gsi.to_le_bytes());
    resource
}

fn ports(first: u16, count: u8) -> Vec<u8> {
    let [low, high] = first.to_le_bytes();
    vec![0x47, 1, low, high, low, high, 1, count]
}

/// An operator whose content is preceded by its length, which counts itself.
fn with_length(operator: &[u8], content: &[u8]) -> Vec<u8> {
    let length = if content.len() + 1 < 64 {
        vec![content.len() as u8 + 1]
    } else if content.len() + 2 < 1 << 12 {
        let bytes = content.len() + 2;
        vec![0x40 | (bytes & 0xf) as u8, (bytes >> 4) as u8]
    } else {
        let bytes = content.len() + 3;
        vec![
            0x80 | (bytes & 0xf) as u8,
            (bytes >> 4) as u8,
            (bytes >> 12) as u8,
        ]
    };
    [operator, &length, content].concat()
}

/// What makes the sum of all bytes 0.
fn checksum(bytes: &[u8]) -> u8 {
    bytes
        .iter()
        .fold(0_u8, |sum, byte| sum.wrapping_add(*byte))
        .wrapping_neg()
}
