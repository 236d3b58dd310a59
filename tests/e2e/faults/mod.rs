//! Every fault in every phase: what becomes of the guest, and that nothing hangs, leaks, or runs twice. The table of it is printed,
//! written beside the other results of the build, and what it may say at all is in `tests/FAULTS.md`.

mod cell;
mod fault;
mod phase;

use self::cell::{Seen, Side};
use self::fault::{Fault, Outcome};
use self::phase::Phase;
use crate::grid::{self, Fate, Grid};
use crate::harness::{Accel, kvm_is_here, number_from_env, whole_machine};
use crate::proxy::{Line, Way};

/// Cells under way at the same time: most of them wait for a deadline.
const WORKERS: usize = 12;

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
target directory). Where a deadline has to pass all of them are shorter than usual, and a source on a busy host may ask what it need not
ask: \"moves, asked\" is as good as \"moves\" there. After each cell the source must be as it was: the guest works, descriptors and
threads are those of before, and a migration to another target succeeds; never do two guests run, and whoever was told SETUP hears the
end before a vCPU runs.

This file is written by the tests (`VMFERRY_WRITE_FAULTS=1`), and a test keeps it true.
";

/// One square of the table.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Cell {
    phase: Phase,
    fault: Fault,
}

fn grid() -> Grid<Cell> {
    let columns: Vec<_> = Fault::ALL.iter().map(|fault| fault.name()).collect();
    let square = |phase, fault: Fault| fault.fits(phase).then_some(Cell { phase, fault });
    let row = |phase: Phase| Fault::ALL.map(|fault| square(phase, fault)).to_vec();
    let rows = Phase::ALL.map(|phase| (phase.name(), row(phase)));
    Grid::new("Phase", &columns, rows.to_vec())
}

fn run_cell(accel: Accel, cell: Cell, guest: &mut Option<Side>) -> grid::Result<Seen> {
    let Cell { phase, fault } = cell;
    let hurries = fault.waits_for_a_deadline(phase);
    // The guest must be able to let go of something.
    let own = phase == Phase::WaitUnplug;
    let had = if own { None } else { guest.take() };
    let alike = had.filter(|side| side.hurries == hurries);
    let source = alike.unwrap_or_else(|| Side::source(accel, phase, hurries));
    let (seen, next) = cell::run(accel, phase, fault, source);
    if !own {
        *guest = next;
    }
    if !fault.allows(phase, seen.outcome) || !fault.explains(phase, &seen) {
        return Err(format!("{seen:?}"));
    }
    Ok(seen)
}

/// Runs `wanted`. A worker's guest goes from cell to cell, first through those that wait for deadlines.
fn assert_all_as_designed(accel: Accel, mut wanted: Vec<Cell>) {
    wanted.sort_by_key(|cell| !cell.fault.waits_for_a_deadline(cell.phase));
    let file = format!("faults-{}.md", accel.name());
    grid().assert_all(&file, WORKERS, wanted, |cell, guest| {
        run_cell(accel, cell, guest)
    });
}

#[test]
fn every_fault_in_every_phase_ends_as_designed() {
    let _turn = whole_machine();
    assert_all_as_designed(Accel::Soft, grid().squares());
}

/// The same program runs below; these are the phases in which the accelerator has a part.
#[test]
fn faults_end_as_designed_on_kvm_too() {
    if !kvm_is_here() {
        return;
    }
    let _turn = whole_machine();
    let mut wanted = grid().squares();
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
    let text = format!(
        "{FOREWORD}\n{}\n## Outcomes\n\n{}",
        grid().table(names),
        grid::legend::<Outcome>()
    );
    grid::assert_written("FAULTS.md", &text);
}
