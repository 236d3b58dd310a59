//! Every fault at every step of an upgrade in place: the guest runs in exactly one process afterwards, and the next upgrade works. The
//! table of what was seen is printed and written beside the other results of the build; `tests/FAULTS-IN-PLACE.md` says what it may be.

mod cases;
mod cell;
mod link;
mod step;

use std::fmt::Write as _;

use self::step::{Fault, Outcome, Step};
use crate::grid::{self, Grid};
use crate::harness::{Accel, kvm_is_here, turn};

/// Cells under way at the same time: many of them wait for a deadline.
const WORKERS: usize = 6;

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

fn grid() -> Grid<Cell> {
    let columns = Fault::ALL.map(|fault| fault.name().to_owned());
    let square = |step, fault: Fault| fault.fits(step).then_some(Cell { step, fault });
    let row = |step: Step| Fault::ALL.map(|fault| square(step, fault)).to_vec();
    let rows = Step::ALL.map(|step| (step.name(), row(step)));
    Grid::new("Step", &columns, rows.to_vec())
}

fn assert_all_as_designed(accel: Accel, wanted: Vec<Cell>) {
    let file = format!("faults-in-place-{}.md", accel.name());
    grid().assert_all(&file, WORKERS, wanted, |cell, (): &mut ()| {
        let seen = cell::run(accel, cell.step, cell.fault);
        match seen.outcome == cell.fault.allowed(cell.step) {
            true => Ok(seen),
            false => Err(format!("{seen:?}")),
        }
    });
}

#[test]
fn every_fault_at_every_step_leaves_one_guest() {
    let _turn = turn();
    assert_all_as_designed(Accel::Soft, grid().squares());
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
    let mut wanted = grid().squares();
    wanted
        .retain(|cell| steps.contains(&cell.step) && cell.fault != Fault::Frame(link::Deed::Keep));
    assert_all_as_designed(Accel::Kvm, wanted);
}

#[test]
fn the_written_table_of_faults_in_place_says_what_the_tests_demand() {
    let name = |cell: Cell| cell.fault.allowed(cell.step).name().to_owned();
    let mut text = format!("{FOREWORD}\n{}\n## Outcomes\n\n", grid().table(name));
    for outcome in Outcome::ALL {
        writeln!(text, "- **{}**: {}", outcome.name(), outcome.meaning()).unwrap();
    }
    text.push_str("\n## Other reasons why an upgrade fails\n\nThe guest stays, and the next upgrade works.\n\n");
    for (what, reason) in cases::ALL.map(|case| case.name_and_reason()) {
        writeln!(text, "- {what}: `{reason}`").unwrap();
    }
    grid::assert_written("FAULTS-IN-PLACE.md", &text);
}
