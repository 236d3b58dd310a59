//! How long whole migrations take and what the guest notices of them, between real vmferry processes on this machine: the figures that
//! the project promises.
//!
//! - **sparse**: a large VM whose guest touched little
//! - **full**: a VM full of incompressible data, beside a raw copy over as many connections
//! - **gap**: the longest time between two writes of a guest that writes at full speed, over a migration
//!
//! The cases take turns, so that whatever disturbs the machine disturbs all of them. Medians go to standard error as a table and, with
//! every sample, to standard output as JSON.

mod raw;
mod vm;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, ValueEnum};
use serde_json::{Value, json};

use raw::RawPeer;
use vm::{Moved, Sort, Vm};

/// Measures migrations between real processes.
#[derive(Clone, Debug, Parser)]
struct Options {
    /// Which figures.
    #[arg(long, value_delimiter = ',', value_enum, default_values_t = [Figure::Sparse, Figure::Full, Figure::Gap])]
    figure: Vec<Figure>,
    /// What runs the guests: kvm, soft or auto.
    #[arg(long, default_value = "auto")]
    accel: String,
    /// Data connections.
    #[arg(long, default_value_t = 2)]
    connections: u8,
    /// Repetitions of each case.
    #[arg(long, default_value_t = 10)]
    runs: usize,
    /// A small run that proves that everything works and measures nothing.
    #[arg(long)]
    smoke: bool,
    /// Be the other end of the raw copy; for the program itself.
    #[arg(long, hide = true)]
    raw_target: Option<u64>,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum Figure {
    Sparse,
    Full,
    Gap,
}

fn main() -> ExitCode {
    // The VMs are this program too, so that they are never older than what is measured.
    if std::env::var_os(vm::BE_A_VM).is_some() {
        return vmferry::cli::main();
    }
    let options = Options::parse();
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("accept: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    if let Some(mib) = options.raw_target {
        return raw::target(mib);
    }
    let sizes = Sizes::of(options);
    let mut report = Vec::new();
    for figure in &options.figure {
        let cases = match figure {
            Figure::Sparse => sparse(options, &sizes)?,
            Figure::Full => full(options, &sizes)?,
            Figure::Gap => gap(options, &sizes)?,
        };
        report.extend(cases);
    }
    let report = json!({ "benchmark": "accept", "accel": options.accel, "connections": options.connections, "cases": report });
    println!("{report:#}");
    Ok(())
}

/// Sizes of the VMs in MiB.
struct Sizes {
    runs: usize,
    large: u64,
    full: u64,
    touched: u64,
    raw: u64,
}

impl Sizes {
    fn of(options: &Options) -> Self {
        if options.smoke {
            Self {
                runs: 1,
                large: 256,
                full: 128,
                touched: 16,
                raw: 64,
            }
        } else {
            Self {
                runs: options.runs,
                large: 8192,
                full: 4096,
                touched: 64,
                raw: 2048,
            }
        }
    }

    /// A guest that touched a little of a large memory and keeps writing a part of that, calmly.
    fn sparse(&self) -> Sort {
        let calm = self.touched / 16;
        Sort {
            mem_mib: self.large,
            working_set_mib: calm,
            fill_mib: self.touched - calm,
            dirty_rate: "1000",
        }
    }

    /// A guest that keeps writing all it has touched of a large memory as fast as it can.
    fn busy_sparse(&self) -> Sort {
        Sort {
            mem_mib: self.large,
            working_set_mib: self.touched,
            fill_mib: 0,
            dirty_rate: "max",
        }
    }

    /// A guest that has filled all memory and keeps writing a part of it.
    fn full(&self, dirty_rate: &'static str) -> Sort {
        Sort {
            mem_mib: self.full,
            working_set_mib: self.touched,
            // The program and its tables lie below 4 MiB.
            fill_mib: self.full - self.touched - 4,
            dirty_rate,
        }
    }
}

/// Moves a guest from process to process.
struct Chain<'a> {
    options: &'a Options,
    sort: Sort,
    source: Vm,
}

impl<'a> Chain<'a> {
    fn start(options: &'a Options, sort: Sort) -> Result<Self> {
        let mut source = Vm::source(&options.accel, &sort)?;
        source.warm_up()?;
        source.stop()?;
        Ok(Self {
            options,
            sort,
            source,
        })
    }

    /// One migration; the guest runs only as long as it takes, to be in no other's way. `populate`: the target's memory exists before it.
    fn step(&mut self, populate: bool) -> Result<Moved> {
        let mut target = Vm::target(&self.options.accel, &self.sort)?;
        if populate {
            target.populate()?;
        }
        self.source.cont()?;
        let moved = self.source.move_to(&mut target, self.options.connections)?;
        target.stop()?;
        self.source = target;
        Ok(moved)
    }
}

fn sparse(options: &Options, sizes: &Sizes) -> Result<Vec<Value>> {
    let mut calm = Chain::start(options, sizes.sparse())?;
    let mut busy = Chain::start(options, sizes.busy_sparse())?;
    let (mut calm_samples, mut busy_samples) = (Vec::new(), Vec::new());
    for _ in 0..sizes.runs {
        calm_samples.push(calm.step(false)?);
        busy_samples.push(busy.step(false)?);
    }
    let (large, touched) = (sizes.large, sizes.touched);
    Ok(vec![
        show(
            &format!("sparse, {large} MiB, {touched} MiB touched"),
            &calm_samples,
        ),
        show(
            &format!("sparse, {large} MiB, {touched} MiB at full speed"),
            &busy_samples,
        ),
    ])
}

fn full(options: &Options, sizes: &Sizes) -> Result<Vec<Value>> {
    let mut raw = RawPeer::start(sizes.raw)?;
    let mut chain = Chain::start(options, sizes.full("1000"))?;
    let mut samples = [(Vec::new(), Vec::new()), (Vec::new(), Vec::new())];
    for _ in 0..sizes.runs {
        for (fresh, (copies, moves)) in [false, true].into_iter().zip(&mut samples) {
            if !fresh {
                // Mapped again after it was emptied; this one does not count.
                raw.copy(options.connections, false)?;
            }
            copies.push(raw.copy(options.connections, fresh)?);
            moves.push(chain.step(!fresh)?);
        }
    }
    let mut cases = Vec::new();
    for (name, (copies, moves)) in ["populated", "fresh"].into_iter().zip(samples) {
        let mut case = show(&format!("full, {} MiB, {name} target", sizes.full), &moves);
        let (copy, rate) = (
            median(copies.iter().copied()),
            median(moves.iter().map(Moved::gib_per_s)),
        );
        eprintln!(
            "    {rate:.3} GiB/s, {:.2} of a raw copy to {name} memory with {copy:.3} GiB/s",
            rate / copy
        );
        case["gib_per_s"] = json!(rate);
        case["raw_gib_per_s"] = json!(copies);
        cases.push(case);
    }
    Ok(cases)
}

fn gap(options: &Options, sizes: &Sizes) -> Result<Vec<Value>> {
    let mut sparse = Chain::start(options, sizes.busy_sparse())?;
    let mut full = Chain::start(options, sizes.full("max"))?;
    let (mut sparse_samples, mut full_samples) = (Vec::new(), Vec::new());
    for _ in 0..sizes.runs {
        sparse_samples.push(sparse.step(false)?);
        full_samples.push(full.step(false)?);
    }
    let touched = sizes.touched;
    Ok(vec![
        show(
            &format!(
                "gap, sparse {} MiB, {touched} MiB at full speed",
                sizes.large
            ),
            &sparse_samples,
        ),
        show(
            &format!("gap, full {} MiB, {touched} MiB at full speed", sizes.full),
            &full_samples,
        ),
    ])
}

/// Prints the medians of a case and returns all of it.
fn show(name: &str, samples: &[Moved]) -> Value {
    let of = |field: fn(&Moved) -> f64| median(samples.iter().map(field));
    let (total, gap, blackout) = (
        of(|moved| moved.total_ms),
        of(|moved| moved.gap_ms),
        of(|moved| moved.blackout_ms),
    );
    let worst = samples.iter().map(|moved| moved.gap_ms).fold(0.0, f64::max);
    let populated = samples
        .iter()
        .map(|moved| moved.populated_mib.0.max(moved.populated_mib.1))
        .max();
    eprintln!(
        "{name}: {total:.1} ms in all, gap {gap:.2} ms (worst {worst:.2}), blackout {blackout:.2} ms, {} rounds, at most {} MiB populated",
        of(|moved| moved.rounds),
        populated.unwrap_or(0)
    );
    json!({
        "case": name,
        "total_ms": total,
        "gap_ms": gap,
        "blackout_ms": blackout,
        "populated_mib_max": populated,
        "samples": samples.iter().map(Moved::report).collect::<Vec<_>>(),
    })
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => f64::NAN,
        len if len % 2 == 0 => f64::midpoint(values[middle - 1], values[middle]),
        _ => values[middle],
    }
}
