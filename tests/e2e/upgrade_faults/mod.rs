//! Every fault at every step of an upgrade in place: the guest runs in exactly one process afterwards, and the next upgrade works. The
//! table of what was seen is printed and written beside the other results of the build; `tests/FAULTS-IN-PLACE.md` says what it may be.

mod cases;
mod cell;
mod link;
mod step;

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::fs;
use std::panic::catch_unwind;
use std::path::Path;
use std::sync::Mutex;
use std::thread;
use std::time::Instant;

use self::cell::Seen;
use self::step::{Fault, Outcome, Step};
use crate::harness::{Accel, kvm_is_here, turn};

/// Cells under way at the same time: many of them wait for a deadline.
const WORKERS: usize = 6;

/// Writes the table of what is allowed.
const WRITE: &str = "VMFERRY_WRITE_FAULTS";

const FOREWORD: &str = "\
# Faults of an upgrade in place

What becomes of a guest when something happens while it is handed to a new process on the same host (`cpr-transfer`), by step and fault.
Each step is a word of one process to the other, held on its way while the fault happens; from \"other descriptors\" on the guest is
stopped. `every_fault_at_every_step_leaves_one_guest` runs each cell with real processes, demands what is said here, and writes what it saw, how
long that took and what the old process said beside the other results of the build (`tmp/faults-in-place-soft.md` in the target directory).

This file is written by the tests (`VMFERRY_WRITE_FAULTS=1`), and a test keeps it true.
";

/// One square of the table.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Cell {
    step: Step,
    fault: Fault,
}

fn cells() -> Vec<Cell> {
    let of = |step| Fault::ALL.map(|fault| Cell { step, fault });
    let all = Step::ALL.into_iter().flat_map(of);
    all.filter(|cell| cell.fault.fits(cell.step)).collect()
}

/// What came of a cell: what was seen, or why the test failed.
type Result = std::result::Result<Seen, String>;

fn run_cells(accel: Accel, wanted: Vec<Cell>) -> Vec<(Cell, Result)> {
    let queue = Mutex::new(VecDeque::from(wanted));
    let results = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                loop {
                    let Some(cell) = queue.lock().unwrap().pop_front() else {
                        return;
                    };
                    let result = run_cell(accel, cell);
                    results.lock().unwrap().push((cell, result));
                }
            });
        }
    });
    results.into_inner().unwrap()
}

fn run_cell(accel: Accel, cell: Cell) -> Result {
    let seen = catch_unwind(|| cell::run(accel, cell.step, cell.fault)).map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        text.unwrap_or_else(|| "panicked".to_owned())
    })?;
    if seen.outcome != cell.fault.allowed(cell.step) {
        return Err(format!("{seen:?}"));
    }
    Ok(seen)
}

/// A table of what `of` says of each cell.
fn table(of: impl Fn(Cell) -> String) -> String {
    let mut text = String::from("| Step |");
    for fault in Fault::ALL {
        write!(text, " {} |", fault.name()).unwrap();
    }
    text.push_str("\n| --- |");
    text.push_str(&" --- |".repeat(Fault::ALL.len()));
    text.push('\n');
    for step in Step::ALL {
        write!(text, "| {} |", step.name()).unwrap();
        for fault in Fault::ALL {
            let words = match fault.fits(step) {
                true => of(Cell { step, fault }),
                false => "-".to_owned(),
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
    let report = table(|cell| {
        let found = results.iter().find(|(of, _)| *of == cell);
        match found {
            None => "not run".to_owned(),
            Some((_, Ok(seen))) => {
                format!("{} ({:.1} s)", seen.outcome.name(), seen.took.as_secs_f64())
            }
            Some((_, Err(_))) => "WRONG".to_owned(),
        }
    });
    let mut errors = String::from("\n## What the old process said\n\n");
    let mut wrong = Vec::new();
    for (Cell { step, fault }, result) in &results {
        match result {
            Ok(Seen { error, .. }) if error.is_empty() => {}
            Ok(Seen { error, .. }) => {
                writeln!(errors, "- {}, {}: {error}", step.name(), fault.name()).unwrap();
            }
            Err(why) => wrong.push((step, fault, why)),
        }
    }
    let path = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let path = path.join(format!("faults-in-place-{}.md", accel.name()));
    fs::write(&path, format!("{report}{errors}")).unwrap();
    println!("{report}{errors}");
    println!(
        "{count} cells in {:.0} s, written to {}",
        began.elapsed().as_secs_f64(),
        path.display()
    );
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn every_fault_at_every_step_leaves_one_guest() {
    let _turn = turn();
    assert_all_as_designed(Accel::Soft, cells());
}

/// Where a guest of KVM is stopped, handed over and resumed.
#[test]
fn faults_at_the_hand_over_leave_one_guest_on_kvm_too() {
    if !kvm_is_here() {
        return;
    }
    let _turn = turn();
    let steps = [
        Step::RamFds,
        Step::OtherFds,
        Step::Ready,
        Step::Commit,
        Step::Running,
    ];
    let mut wanted = cells();
    wanted
        .retain(|cell| steps.contains(&cell.step) && cell.fault != Fault::Frame(link::Deed::Keep));
    assert_all_as_designed(Accel::Kvm, wanted);
}

#[test]
fn the_written_table_of_faults_in_place_says_what_the_tests_demand() {
    let name = |cell: Cell| cell.fault.allowed(cell.step).name().to_owned();
    let mut text = format!("{FOREWORD}\n{}\n## Outcomes\n\n", table(name));
    for outcome in Outcome::ALL {
        writeln!(text, "- **{}**: {}", outcome.name(), outcome.meaning()).unwrap();
    }
    text.push_str("\n## Other reasons why an upgrade fails\n\nThe guest stays, and the next upgrade works.\n\n");
    for (what, reason) in cases::ALL.map(|case| case.name_and_reason()) {
        writeln!(text, "- {what}: `{reason}`").unwrap();
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("FAULTS-IN-PLACE.md");
    if std::env::var_os(WRITE).is_some() {
        fs::write(&path, &text).unwrap();
    }
    let written = fs::read_to_string(&path).unwrap();
    assert!(
        written == text,
        "tests/FAULTS-IN-PLACE.md is out of date: write it again with {WRITE}=1"
    );
}
