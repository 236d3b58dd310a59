//! I1, I3, I4, I7: every fault at every step of an upgrade by exec. The guest runs in its process, which is the old program or the new
//! one, or the process has ended and nobody runs it.

mod cell;
mod fault;
mod step;

use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use self::step::{Fault, Outcome, Step};
use crate::grid::{self, Fate, Grid};
use crate::harness::{Accel, kvm_is_here, whole_machine};

/// Cells under way at the same time.
const WORKERS: usize = 6;

/// How often a process is told to end on its way, and how much later each time.
const TELLS: u32 = 20;
const TELL_EVERY: Duration = Duration::from_micros(150);

/// One square of the table.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Cell {
    step: Step,
    fault: Fault,
}

impl Cell {
    fn allowed(self) -> (Outcome, &'static str) {
        self.fault.allowed(self.step).unwrap()
    }

    /// How the upgrade after it is made: in turns.
    fn next(self) -> &'static str {
        match (self.step as u32 + self.fault as u32).is_multiple_of(2) {
            true => "exec",
            false => "transfer",
        }
    }
}

pub(super) fn grid() -> Grid<Cell> {
    let columns = Fault::ALL.map(|fault| fault.name().to_owned());
    let square = |step, fault: Fault| fault.allowed(step).map(|_| Cell { step, fault });
    let row = |step: Step| Fault::ALL.map(|fault| square(step, fault)).to_vec();
    let rows = Step::ALL.map(|step| (step.name(), row(step)));
    Grid::new("Step", &columns, rows.to_vec())
}

/// What it may say, and what that means.
pub(super) fn written() -> String {
    let name = |cell: Cell| cell.allowed().0.name().to_owned();
    format!("{}\n{}", grid().table(name), grid::legend::<Outcome>())
}

fn assert_all_as_designed(accel: Accel, mut wanted: Vec<Cell>) {
    // Those that wait for a deadline begin first.
    wanted.sort_by_key(|cell| !cell.step.needs_short_deadline(cell.fault));
    let file = format!("faults-in-place-exec-{}.md", accel.name());
    grid().assert_all(&file, WORKERS, wanted, |cell, (): &mut ()| {
        let seen = cell::run(accel, cell.step, cell.fault, cell.next());
        let (outcome, part) = cell.allowed();
        match seen.outcome == outcome && seen.error.contains(part) {
            true => Ok(seen),
            false => Err(format!("{seen:?}")),
        }
    });
}

#[test]
fn every_fault_at_every_step_of_an_exec_leaves_one_guest_or_says_why_there_is_none() {
    let _turn = whole_machine();
    assert_all_as_designed(Accel::Soft, grid().squares());
}

/// A signal that comes while the engine is busy with the exec waits behind it, and would end nobody after it.
#[test]
fn a_process_that_is_told_to_end_on_its_way_to_another_program_ends_wherever_it_is() {
    let _turn = whole_machine();
    // From the command to the exec it takes about a millisecond.
    let delays = (0..TELLS).map(|count| TELL_EVERY * count);
    let queue = Mutex::new(delays);
    thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                loop {
                    let Some(delay) = queue.lock().unwrap().next() else {
                        return;
                    };
                    let seen = cell::run_told(Accel::Soft, delay);
                    println!("after {delay:?}: {seen:?}");
                    assert_eq!(seen.outcome, Outcome::Ends, "after {delay:?}: {seen:?}");
                }
            });
        }
    });
}

/// Where a guest of KVM is stopped, loaded and resumed.
#[test]
fn faults_of_an_exec_leave_one_guest_on_kvm_too() {
    if !kvm_is_here() {
        return;
    }
    let _turn = whole_machine();
    let steps = [Step::Exec, Step::Build, Step::Load, Step::Start];
    let mut wanted = grid().squares();
    wanted.retain(|cell| steps.contains(&cell.step));
    assert_all_as_designed(Accel::Kvm, wanted);
}
