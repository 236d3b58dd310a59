//! Every fault in every phase: what becomes of the guest, and that nothing hangs, leaks, or runs twice. The table of it is printed,
//! written beside the other results of the build, and what it may say at all is in `tests/FAULTS.md`.

mod cell;
mod fault;
mod phase;

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Mutex;
use std::thread;
use std::time::Instant;

use self::cell::{Seen, Side};
use self::fault::{Fault, Outcome};
use self::phase::Phase;
use crate::harness::{Accel, kvm_is_here, number_from_env, turn};
use crate::proxy::{Line, Way};

/// Cells under way at the same time: most of them wait for a deadline.
const WORKERS: usize = 8;

/// Writes the table of what is allowed.
const WRITE: &str = "VMFERRY_WRITE_FAULTS";
/// Runs all cells on KVM.
const ALL: &str = "VMFERRY_FAULTS_ALL";

/// Where a guest of KVM is stopped, handed over and resumed.
const KVM_PHASES: [Phase; 5] = [
    Phase::FirstRound,
    Phase::LastRound,
    Phase::Ready,
    Phase::Commit,
    Phase::Running,
];
const KVM_FAULTS: [Fault; 5] = [
    Fault::KillSource,
    Fault::KillTarget,
    Fault::Cut(Line::All),
    Fault::Stall(Line::Control, Some(Way::ToTarget)),
    Fault::Corrupt(Line::Control, Way::ToSource),
];

const FOREWORD: &str = "\
# Faults

What becomes of a guest when something happens to its migration, by phase and fault. In every phase the frame that begins it is held
while the fault happens. `every_fault_in_every_phase_ends_as_designed` runs each cell with real processes, demands what is said here,
and writes what it saw, how long that took and what the source said beside the other results of the build (`tmp/faults-soft.md` in the
target directory). Deadlines are a tenth of the usual ones there. After each cell the source must be as it was: the guest works, descriptors
and threads are those of before, and a migration to another target succeeds; never do two guests run, and whoever was told SETUP
hears the end before a vCPU runs.

This file is written by the tests (`VMFERRY_WRITE_FAULTS=1`), and a test keeps it true.
";

/// One square of the table.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Cell {
    phase: Phase,
    fault: Fault,
}

fn cells() -> Vec<Cell> {
    let phases = Phase::ALL.iter();
    phases
        .flat_map(|&phase| Fault::ALL.iter().map(move |&fault| Cell { phase, fault }))
        .filter(|cell| cell.fault.fits(cell.phase))
        .collect()
}

/// What came of a cell: what was seen, or why the test failed.
type Result = std::result::Result<Seen, String>;

/// Runs `wanted` cells, several at a time. A worker's guest goes from cell to cell.
fn run_cells(accel: Accel, wanted: Vec<Cell>) -> Vec<(Cell, Result)> {
    let workers = WORKERS.min(wanted.len());
    let queue = Mutex::new(VecDeque::from(wanted));
    let results = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                let mut guest = None;
                loop {
                    let Some(cell) = queue.lock().unwrap().pop_front() else {
                        return;
                    };
                    let result = run_cell(accel, cell, &mut guest);
                    results.lock().unwrap().push((cell, result));
                }
            });
        }
    });
    results.into_inner().unwrap()
}

fn run_cell(accel: Accel, cell: Cell, guest: &mut Option<Side>) -> Result {
    let Cell { phase, fault } = cell;
    // The guest must be able to let go of something.
    let own = phase == Phase::WaitUnplug;
    let had = if own { None } else { guest.take() };
    let run = AssertUnwindSafe(|| {
        let source = had.unwrap_or_else(|| Side::source(accel, phase));
        cell::run(accel, phase, fault, source)
    });
    let (seen, next) = catch_unwind(run).map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        text.unwrap_or_else(|| "panicked".to_owned())
    })?;
    if !own {
        *guest = next;
    }
    if !fault.allowed(phase).contains(&seen.outcome) || !fault.explains(phase, &seen) {
        return Err(format!("{seen:?}"));
    }
    Ok(seen)
}

/// A table of what `of` says of each cell.
fn table(of: impl Fn(Cell) -> String) -> String {
    let mut text = String::from("| Phase |");
    for fault in Fault::ALL {
        write!(text, " {} |", fault.name()).unwrap();
    }
    text.push_str("\n| --- |");
    text.push_str(&" --- |".repeat(Fault::ALL.len()));
    text.push('\n');
    for phase in Phase::ALL {
        write!(text, "| {} |", phase.name()).unwrap();
        for fault in Fault::ALL {
            let words = if fault.fits(phase) {
                of(Cell { phase, fault })
            } else {
                "-".to_owned()
            };
            write!(text, " {words} |").unwrap();
        }
        text.push('\n');
    }
    text
}

fn assert_all_as_designed(accel: Accel, wanted: Vec<Cell>) {
    let began = Instant::now();
    let count = wanted.len();
    let results = run_cells(accel, wanted);
    let seen = |cell: Cell| results.iter().find(|(of, _)| *of == cell);
    let report = table(|cell| match seen(cell) {
        None => "not run".to_owned(),
        Some((_, Ok(seen))) => {
            format!("{} ({:.1} s)", seen.outcome.name(), seen.took.as_secs_f64())
        }
        Some((_, Err(_))) => "WRONG".to_owned(),
    });
    let mut errors = String::from("\n## What the source said\n\n");
    for (cell, result) in &results {
        let Cell { phase, fault } = cell;
        if let Ok(Seen { error, .. }) = result
            && !error.is_empty()
        {
            writeln!(errors, "- {}, {}: {error}", phase.name(), fault.name()).unwrap();
        }
    }
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("faults-{}.md", accel.name()));
    fs::write(&path, format!("{report}{errors}")).unwrap();
    println!("{report}{errors}");
    println!(
        "{count} cells in {:.0} s, written to {}",
        began.elapsed().as_secs_f64(),
        path.display()
    );
    let wrong: Vec<_> = results
        .iter()
        .filter_map(|(cell, result)| result.as_ref().err().map(|why| (cell, why)))
        .collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn every_fault_in_every_phase_ends_as_designed() {
    let _turn = turn();
    assert_all_as_designed(Accel::Soft, cells());
}

/// The same program runs below; these are the phases in which the accelerator has a part.
#[test]
fn faults_end_as_designed_on_kvm_too() {
    if !kvm_is_here() {
        return;
    }
    let _turn = turn();
    let mut wanted = cells();
    // All of them on demand.
    if number_from_env(ALL).is_none() {
        wanted.retain(|cell| KVM_PHASES.contains(&cell.phase) && KVM_FAULTS.contains(&cell.fault));
    }
    assert_all_as_designed(Accel::Kvm, wanted);
}

#[test]
fn the_written_table_of_faults_says_what_the_tests_demand() {
    let names = |cell: Cell| {
        let allowed = cell.fault.allowed(cell.phase).iter();
        let names: Vec<_> = allowed.map(|outcome| outcome.name()).collect();
        names.join(" or ")
    };
    let mut text = format!("{FOREWORD}\n{}\n## Outcomes\n\n", table(names));
    for outcome in Outcome::ALL {
        writeln!(text, "- **{}**: {}", outcome.name(), outcome.meaning()).unwrap();
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("FAULTS.md");
    if std::env::var_os(WRITE).is_some() {
        fs::write(&path, &text).unwrap();
    }
    let written = fs::read_to_string(&path).unwrap();
    assert!(
        written == text,
        "tests/FAULTS.md is out of date: write it again with {WRITE}=1"
    );
}
