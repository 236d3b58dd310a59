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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::workload::layout::{mailbox, mailbox_gpa};
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::net::UnixStream;
    use std::path::Path;
    use std::process::{Child, Command, Stdio};
    use std::thread::sleep;
    use std::time::{Duration, Instant};

    const PATIENCE: Duration = Duration::from_secs(60);

    /// A QEMU that is ended with the test.
    struct Qemu(Child);

    impl Drop for Qemu {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    fn elf(rate: Option<u64>) -> Vec<u8> {
        let config = WorkloadConfig {
            working_set_bytes: 8 << 20,
            dirty_pages_per_sec: rate,
            fill_bytes: 16 << 20,
        };
        let options = LoadOptions {
            mem_bytes: 256 << 20,
            vcpus: 1,
            tsc_khz: 2_000_000,
            exit_after_passes: None,
            serial: false,
            echoes: 0,
            disk_window: None,
            net_window: None,
        };
        pvh_elf(&config, options).unwrap()
    }

    #[test]
    fn every_piece_lies_in_the_file_where_its_header_says() {
        let file = elf(None);
        let word = |at: usize, bytes: usize| {
            let mut value = [0; 8];
            value[..bytes].copy_from_slice(&file[at..at + bytes]);
            u64::from_le_bytes(value)
        };
        assert_eq!(&file[..4], b"\x7fELF");
        let headers = usize::try_from(word(56, 2)).unwrap();
        let program = image::program();
        let mut found = false;
        for header in 0..headers {
            let at = 64 + header * 56;
            let (offset, gpa, len) = (word(at + 8, 8), word(at + 24, 8), word(at + 32, 8));
            let range = usize::try_from(offset).unwrap()..usize::try_from(offset + len).unwrap();
            assert!(range.end <= file.len());
            if word(at, 4) == u64::from(PT_NOTE) {
                assert_eq!(word(range.start + 8, 4), u64::from(PHYS32_ENTRY));
                assert_eq!(word(range.start + 16, 4), image::entry32_gpa());
            } else if gpa == image::entry32_gpa() {
                assert_eq!(&file[range], program);
                found = true;
            }
        }
        assert!(found);
    }

    /// Goal: the same program runs in another VMM. Method: boot the file in QEMU's microvm and read the mailbox through QMP.
    #[test]
    fn workload_runs_in_qemu() {
        for (accel, rate) in [("kvm", None), ("kvm", Some(20_000)), ("tcg", None)] {
            if accel == "kvm" && !Path::new("/dev/kvm").exists() {
                eprintln!("SKIPPED: no /dev/kvm here; QEMU with KVM was not tested");
                continue;
            }
            let folder = tempfile::tempdir().unwrap();
            let kernel = folder.path().join("workload.elf");
            std::fs::write(&kernel, elf(rate)).unwrap();
            let socket = folder.path().join("qmp");
            let serial = folder.path().join("serial");
            let started = Command::new("qemu-system-x86_64")
                .args([
                    "-M",
                    "microvm,acpi=off,pit=off,pic=off,rtc=off,isa-serial=on",
                    "-cpu",
                    "qemu64",
                ])
                .args([
                    "-accel",
                    accel,
                    "-nodefaults",
                    "-nographic",
                    "-no-reboot",
                    "-m",
                    "256",
                ])
                .arg("-kernel")
                .arg(&kernel)
                .arg("-serial")
                .arg(format!("file:{}", serial.display()))
                .arg("-qmp")
                .arg(format!("unix:{},server=on,wait=off", socket.display()))
                .stdin(Stdio::null())
                .spawn();
            let _qemu = match started {
                Ok(child) => Qemu(child),
                Err(error) => {
                    eprintln!("SKIPPED: no QEMU here ({error}); the ELF file was not booted");
                    return;
                }
            };
            let mut qmp = Qmp::connect(&socket);
            let dump = folder.path().join("mailbox");
            let start = Instant::now();
            loop {
                let page = qmp.read_page(mailbox_gpa(0), &dump);
                let field = |at: u64| {
                    let at = usize::try_from(at).unwrap();
                    u64::from_le_bytes(page[at..at + 8].try_into().unwrap())
                };
                assert_eq!(field(mailbox::ERRORS), 0, "{accel}");
                if field(mailbox::PASSES) >= 10 && field(mailbox::FILL_CHECKED) > 0 {
                    assert_eq!(field(mailbox::FILLED_PAGES), 4096, "{accel}");
                    break;
                }
                assert!(
                    start.elapsed() < PATIENCE,
                    "{accel}: {} passes",
                    field(mailbox::PASSES)
                );
                sleep(Duration::from_millis(50));
            }
            let said = std::fs::read_to_string(&serial).unwrap();
            assert!(
                said.contains("vmferry workload started"),
                "{accel}: {said:?}"
            );
        }
    }

    /// Just enough of a QMP client.
    struct Qmp(BufReader<UnixStream>);

    impl Qmp {
        fn connect(socket: &Path) -> Self {
            let start = Instant::now();
            let stream = loop {
                match UnixStream::connect(socket) {
                    Ok(stream) => break stream,
                    Err(error) => assert!(start.elapsed() < PATIENCE, "QMP: {error}"),
                }
                sleep(Duration::from_millis(20));
            };
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            let mut qmp = Self(BufReader::new(stream));
            qmp.0.read_line(&mut String::new()).unwrap();
            qmp.execute(r#"{"execute": "qmp_capabilities"}"#);
            qmp
        }

        fn execute(&mut self, command: &str) {
            self.0.get_mut().write_all(command.as_bytes()).unwrap();
            loop {
                let mut line = String::new();
                assert_ne!(self.0.read_line(&mut line).unwrap(), 0, "QEMU has ended");
                assert!(!line.contains("\"error\""), "{command}: {line}");
                if line.contains("\"return\"") {
                    return;
                }
            }
        }

        fn read_page(&mut self, gpa: u64, dump: &Path) -> Vec<u8> {
            self.execute(&format!(
                r#"{{"execute": "pmemsave", "arguments": {{"val": {gpa}, "size": 4096, "filename": "{}"}}}}"#,
                dump.display()
            ));
            std::fs::read(dump).unwrap()
        }
    }
}
