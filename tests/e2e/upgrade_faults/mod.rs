//! Every fault at every step of an upgrade in place: the guest runs in exactly one process afterwards, and the next upgrade works. The
//! table of what was seen is printed and written beside the other results of the build; `tests/FAULTS-IN-PLACE.md` says what it may be.

mod cases;
mod cell;
mod exec;
mod fault;
mod gates;
mod link;
mod step;
mod told_to_end;

use std::fmt::Write as _;

use self::fault::{Fault, Outcome};
use self::step::Step;
use crate::grid::{self, Fate, Grid};
use crate::harness::{Accel, kvm_is_here, whole_machine};

/// Cells under way at the same time: many of them wait for a deadline.
const WORKERS: usize = 6;
/// Those on KVM do not: they work, and must keep deadlines while they do.
const KVM_WORKERS: usize = 3;

const FOREWORD: &str = "\
# Faults of an upgrade in place

What becomes of a guest when something happens while it is handed to a new process or program on the same host, by step and fault. Real
processes run each cell, which demands what is said here; what it saw, how long that took and what was said of it is written beside the
other results of the build (`tmp/faults-in-place-*.md` in the target directory). `VMFERRY_FAULTS_ONLY='step: Ready'` runs a part.

This file is written by the tests (`VMFERRY_WRITE_FAULTS=1`), and a test keeps it true.

## By transfer

A new process takes the guest over (`cpr-transfer`). Each step is a word of one process to the other, held on its way while the fault
happens; from \"other descriptors\" on the guest is stopped. `every_fault_at_every_step_leaves_one_guest` runs this table.
";

const REASONS: &str = "
### Other reasons why a transfer fails

They show in no word that could be held. `every_other_reason_leaves_the_guest_where_it_is` runs this table. Of what the kernel refuses,
VHOST_SET_OWNER with EBUSY (somebody else owns the device that was handed over: the guest stays, and the next upgrade works) takes a
vhost device and runs in the lab, `a_back_end_changes_its_owner_in_order_and_the_network_hears_nothing` in `tests/lab/in_place.rs`.
";

const EXEC: &str = "
## By exec

The process stays and becomes the new program (`cpr-exec`). The guest is stopped from \"guest is stopped\" on, and \"new program has begun\"
is the first step after the execve. The guest has a disk, a serial port, and a server that is told (`--notify`). What is missing, changed
and so on is what the step names: the program, its answer, the letter, a descriptor, the disk or the state. Most of it is made by a
program that stands in for the new one (`tests/src/stand_in.rs`), as no honest program would do it: the kernel keeps descriptors through an
exec, and letter and state are sealed. Where neither program can go on after that the process says so; it cannot be helped.
After each cell the guest's memory, disk and serial port are as they should be, the process holds what it held before, one process has
the guest, the disk's lock is taken, and an upgrade works, by exec or by transfer in turns; or, if the process has ended, nobody
runs the guest, answers in its place, or has its disk.
`every_fault_at_every_step_of_an_exec_leaves_one_guest_or_says_why_there_is_none` runs this table.
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
    let workers = match accel {
        Accel::Soft => WORKERS,
        Accel::Kvm => KVM_WORKERS,
    };
    grid().assert_all(&file, workers, wanted, |cell, (): &mut ()| {
        let seen = cell::run(accel, cell.step, cell.fault);
        match seen.outcome == cell.fault.allowed(cell.step) {
            true => Ok(seen),
            false => Err(format!("{seen:?}")),
        }
    });
}

#[test]
fn every_fault_at_every_step_leaves_one_guest() {
    let _turn = whole_machine();
    assert_all_as_designed(Accel::Soft, grid().squares());
}

/// Where a guest of KVM is stopped, handed over and resumed.
#[test]
fn faults_at_the_hand_over_leave_one_guest_on_kvm_too() {
    if !kvm_is_here() {
        return;
    }
    let _turn = whole_machine();
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
    let mut text = format!("{FOREWORD}\n{}\n", grid().table(name));
    text.push_str(&grid::legend::<Outcome>());
    let reason = |case: cases::Case| {
        let (_, reason) = case.name_and_reason();
        format!("{}: `{reason}`", case.outcome().name())
    };
    write!(text, "{REASONS}\n{}", cases::grid().table(reason)).unwrap();
    write!(text, "{EXEC}\n{}", exec::written()).unwrap();
    grid::assert_written("FAULTS-IN-PLACE.md", &text);
}
