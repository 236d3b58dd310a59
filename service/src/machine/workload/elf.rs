//! The workload as an ELF file with a PVH entry, for VMMs that boot such kernels directly: QEMU's microvm, Cloud Hypervisor.

use super::loader::{self, LoadOptions, Piece};
use super::{WorkloadConfig, image};
use crate::machine::MachineError;

const ELF_HEADER_BYTES: u64 = 64;
const PROGRAM_HEADER_BYTES: u64 = 56;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// Type of the note that holds the 32-bit entry point; its owner is "Xen".
const PHYS32_ENTRY: u32 = 18;

/// An ELF file that boots the workload on a VM with `options.mem_bytes` of RAM and as many vCPUs as `options` says. Others than the
/// first are not started by a PVH boot, so `options.vcpus` should be 1.
///
/// # Errors
/// [`MachineError::Config`] when the workload does not fit the machine.
pub fn pvh_elf(config: &WorkloadConfig, options: LoadOptions) -> Result<Vec<u8>, MachineError> {
    let pieces = loader::pieces(config, options)?;
    let headers = pieces.len() as u64 + 1;
    let note = entry_note();
    let note_at = ELF_HEADER_BYTES + headers * PROGRAM_HEADER_BYTES;
    let mut next_at = note_at + note.len() as u64;
    let mut file = elf_header(headers);
    program_header(&mut file, PT_NOTE, note_at, 0, note.len() as u64);
    for Piece { gpa, bytes } in &pieces {
        next_at = next_at.next_multiple_of(4096);
        program_header(&mut file, PT_LOAD, next_at, *gpa, bytes.len() as u64);
        next_at += bytes.len() as u64;
    }
    file.extend_from_slice(&note);
    for piece in &pieces {
        file.resize(file.len().next_multiple_of(4096), 0);
        file.extend_from_slice(&piece.bytes);
    }
    Ok(file)
}

fn elf_header(program_headers: u64) -> Vec<u8> {
    let mut header = Vec::new();
    // Magic, 64-bit, little-endian, version 1, System V.
    header.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    header.extend_from_slice(&2_u16.to_le_bytes()); // executable
    header.extend_from_slice(&62_u16.to_le_bytes()); // x86-64
    header.extend_from_slice(&1_u32.to_le_bytes());
    header.extend_from_slice(&image::entry32_gpa().to_le_bytes());
    header.extend_from_slice(&ELF_HEADER_BYTES.to_le_bytes());
    header.extend_from_slice(&0_u64.to_le_bytes()); // no section headers
    header.extend_from_slice(&0_u32.to_le_bytes());
    for value in [
        ELF_HEADER_BYTES,
        PROGRAM_HEADER_BYTES,
        program_headers,
        0,
        0,
        0,
    ] {
        let value = u16::try_from(value).unwrap_or(u16::MAX);
        header.extend_from_slice(&value.to_le_bytes());
    }
    header
}

fn program_header(file: &mut Vec<u8>, kind: u32, at: u64, gpa: u64, len: u64) {
    file.extend_from_slice(&kind.to_le_bytes());
    file.extend_from_slice(&7_u32.to_le_bytes()); // read, write, execute
    for value in [
        at,
        gpa,
        gpa,
        len,
        len,
        if kind == PT_LOAD { 4096 } else { 4 },
    ] {
        file.extend_from_slice(&value.to_le_bytes());
    }
}

fn entry_note() -> Vec<u8> {
    let entry = u32::try_from(image::entry32_gpa()).unwrap_or(u32::MAX);
    let mut note = Vec::new();
    for value in [4_u32, 4, PHYS32_ENTRY] {
        note.extend_from_slice(&value.to_le_bytes());
    }
    note.extend_from_slice(b"Xen\0");
    note.extend_from_slice(&entry.to_le_bytes());
    note
}
