//! What a guest notices of upgrades in place, and what they cost: VMs of vmferry and, beside them, VMs of QEMU with the same guest take
//! turns, each handed over again and again by `vmferry upgrade`: to a new process, or, with mode exec, to a new program of the same
//! process, whose gap is also shown as a multiple of the other's. Against the size of memory, the number of vCPUs and of disks; and
//! what one descriptor costs, between two processes that have nothing else.
//!
//! The gap is what the guest itself saw: the longest time between two of its writes, read from its memory. It is back when it writes at
//! 90 % of its rate again. No memory may come into being and nothing in it may be wrong. Medians go to standard error as a table and,
//! with every sample, to standard output as JSON.

mod fds;
mod rate;
mod vm;

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use serde_json::{Value, json};

use vm::{BE_VMFERRY, Sample, Shape, Vm};

/// Measures upgrades in place.
#[derive(Clone, Debug, Parser)]
struct Options {
    /// Sizes of memory in MiB, each with one vCPU and no disk.
    #[arg(long, value_delimiter = ',', default_values_t = [256, 1024, 4096, 16384])]
    mem: Vec<u64>,
    /// Numbers of vCPUs, each with the first size of memory. vmferry only.
    #[arg(long, value_delimiter = ',', default_values_t = [2, 4, 8])]
    vcpus: Vec<u32>,
    /// Numbers of virtio disks, each with the first size of memory. vmferry only.
    #[arg(long, value_delimiter = ',', default_values_t = [4, 8])]
    disks: Vec<usize>,
    /// Numbers of descriptors that a process hands to another.
    #[arg(long, value_delimiter = ',', default_values_t = [10, 100, 1000, 7500])]
    fds: Vec<usize>,
    /// Memory that the guest keeps writing, in MiB.
    #[arg(long, default_value_t = 64)]
    working_set: u64,
    /// Ways of vmferry.
    #[arg(long, value_delimiter = ',', default_values_t = ["transfer".to_owned(), "exec".to_owned()], value_parser = ["transfer", "exec"])]
    mode: Vec<String>,
    /// Upgrades of each VM.
    #[arg(long, default_value_t = 20)]
    runs: usize,
    /// Without QEMU.
    #[arg(long)]
    no_qemu: bool,
    /// QEMU, 10 or newer.
    #[arg(long, default_value = "qemu-system-x86_64")]
    qemu: String,
    /// A small run that proves that everything works and measures nothing.
    #[arg(long)]
    smoke: bool,
}

fn main() -> ExitCode {
    // The VMs and their upgrades are this program too, so that they are never older than what is measured.
    if std::env::var_os(BE_VMFERRY).is_some() {
        return vmferry::cli::main();
    }
    if std::env::var_os(fds::BE_TAKER).is_some() {
        return fds::take();
    }
    let mut options = Options::parse();
    if options.smoke {
        (options.mem, options.working_set, options.runs) = (vec![64], 4, 1);
        (options.vcpus, options.disks, options.fds) = (vec![2], vec![1], vec![10, 600]);
    }
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("upgrade: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    let fds = fds::measure(&options.fds, options.runs)?;
    let mut vms = start(options)?;
    let mut samples = vec![Vec::new(); vms.len()];
    // All in turns, so that what else the host does hits all alike.
    for _ in 0..options.runs {
        for (vm, samples) in vms.iter_mut().zip(&mut samples) {
            // One guest at a time: each takes a processor of its own.
            vm.tell("cont")?;
            samples.push(vm.upgrade()?);
            vm.tell("stop")?;
        }
    }
    let gaps: Vec<_> = samples
        .iter()
        .map(|samples| median(samples.iter().map(|s| s.gap_ms).collect()))
        .collect();
    // Of the VM like this one that goes into new processes.
    let transfer = |vm: &Vm| {
        let mut others = vms.iter().zip(&gaps);
        let like = |other: &Vm| (other.name, other.shape) == (vm.name, vm.shape);
        let found = others.find(|(other, _)| like(other) && other.mode == "transfer");
        found.map(|(_, gap)| *gap)
    };
    let cases: Vec<_> = vms
        .iter()
        .zip(&samples)
        .map(|(vm, samples)| report(vm, samples, transfer(vm)))
        .collect();
    let report = json!({ "benchmark": "upgrade", "cases": cases, "fds": fds });
    println!("{report:#}");
    Ok(())
}

fn start(options: &Options) -> Result<Vec<Vm>> {
    let small = Shape {
        mem: options.mem.first().copied().unwrap_or(256),
        working_set: options.working_set,
        vcpus: 1,
        disks: 0,
    };
    let mut vms = Vec::new();
    let mut add = |vm: Vm| -> Result<()> {
        // The next comes up alone.
        vm.tell("stop")?;
        vms.push(vm);
        Ok(())
    };
    for &mem in &options.mem {
        let shape = Shape { mem, ..small };
        for mode in &options.mode {
            add(Vm::vmferry(shape, mode)?)?;
        }
        if !options.no_qemu {
            add(Vm::qemu(&options.qemu, shape)?)?;
        }
    }
    for &vcpus in &options.vcpus {
        for mode in &options.mode {
            add(Vm::vmferry(Shape { vcpus, ..small }, mode)?)?;
        }
    }
    for &disks in &options.disks {
        for mode in &options.mode {
            add(Vm::vmferry(Shape { disks, ..small }, mode)?)?;
        }
    }
    Ok(vms)
}

/// Prints a line of the table.
fn report(vm: &Vm, samples: &[Sample], transfer_gap: Option<f64>) -> Value {
    let median = |what: fn(&Sample) -> f64| median(samples.iter().map(what).collect());
    let (gap, blackout) = (median(|s| s.gap_ms), median(|s| s.blackout_ms));
    let (back, total) = (median(|s| s.back_ms), median(|s| s.total_ms));
    let ratio = transfer_gap.map_or(f64::NAN, |transfer| gap / transfer);
    let worst = samples.iter().map(|s| s.gap_ms).fold(0.0, f64::max);
    let Shape {
        mem, vcpus, disks, ..
    } = vm.shape;
    eprintln!(
        "{:8} {:8} {mem:6} MiB, {vcpus} vCPUs, {disks:2} disks: gap {gap:6.2} ms (max {worst:6.2}, {ratio:5.2} of transfer), blackout {blackout:6.2} ms, back at 90 % after \
         {back:7.1} ms, in all {total:7.1} ms",
        vm.name, vm.mode
    );
    json!({
        "vmm": vm.name,
        "mode": vm.mode,
        "gap-of-transfer": ratio,
        "mem-mib": mem,
        "vcpus": vcpus,
        "disks": disks,
        "gap-ms": gap,
        "blackout-ms": blackout,
        "back-ms": back,
        "total-ms": total,
        "samples": samples.iter().map(Sample::report).collect::<Vec<_>>(),
    })
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
