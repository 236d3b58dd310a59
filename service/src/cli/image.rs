//! `vmferry workload-image`: the built-in guest as a file, so that other VMMs can be measured on the same work.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Args;

use super::output;
use super::run::GuestArgs;
use super::size::Size;
use crate::machine::workload::{elf, loader::LoadOptions};

#[derive(Args, Debug)]
#[command(after_help = "Example:\n  \
    vmferry workload-image --mem 1G --dirty-rate max -o workload.elf\n  \
    qemu-system-x86_64 -M microvm,acpi=off,pit=off,pic=off,rtc=off,isa-serial=on \\\n    \
    -accel kvm -m 1G -kernel workload.elf -nodefaults -display none -serial null")]
pub(super) struct ImageArgs {
    /// RAM of the machine that will run it; the program has to know
    #[arg(long, value_name = "SIZE")]
    mem: Size,
    #[command(flatten)]
    guest: GuestArgs,
    /// Frequency of the TSC in kHz, by which the guest measures time [default: this host's]
    #[arg(long, value_name = "KHZ")]
    tsc_khz: Option<u32>,
    /// File to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
}

impl ImageArgs {
    pub(super) fn execute(self) -> anyhow::Result<ExitCode> {
        let tsc_khz = match self.tsc_khz {
            Some(khz) => khz,
            None => {
                host_tsc_khz().context("cannot learn the TSC frequency from KVM; give --tsc-khz")?
            }
        };
        let options = LoadOptions {
            mem_bytes: self.mem.0,
            vcpus: 1,
            tsc_khz,
            exit_after_passes: None,
            serial: false,
            echoes: 0,
            disk_window: None,
            net_window: None,
        };
        let image = elf::pvh_elf(&self.guest.workload(self.mem), options)
            .context("no image can be made so")?;
        std::fs::write(&self.output, &image)
            .with_context(|| format!("cannot write {}", self.output.display()))?;
        output::line(format_args!(
            "{}: {}",
            self.output.display(),
            Size(image.len() as u64)
        ))?;
        Ok(ExitCode::SUCCESS)
    }
}

/// What KVM gives a vCPU unless told otherwise: the host's frequency.
fn host_tsc_khz() -> anyhow::Result<u32> {
    let vcpu = kvm_ioctls::Kvm::new()?.create_vm()?.create_vcpu(0)?;
    Ok(vcpu.get_tsc_khz()?)
}
