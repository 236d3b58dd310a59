//! One cell of the table: an upgrade, one fault at one step of it, and a look at everything that must hold afterwards.

use std::time::Instant;

use serde_json::json;

use crate::grid;
use crate::harness::{Accel, Launch, Machine, PATIENCE, Vm, until};
use crate::qmp::Qmp;
use crate::successor::Waiting;
use crate::upgrade::{At, SOON, assert_upgrades, waiting};

use super::fault::{Fault, Outcome};
use super::link::{Deed, Link};
use super::step::Step;

pub(super) type Seen = grid::Seen<Outcome>;

pub(super) fn machine(accel: Accel, fault: Fault) -> Machine {
    let tiny = Machine::tiny(accel);
    Machine {
        // Two blocks of RAM, where they are to change places.
        mem: match fault {
            Fault::Frame(Deed::SwapFds) => "4G",
            _ => tiny.mem,
        },
        ..tiny
    }
}

/// Runs one cell.
pub(super) fn run(accel: Accel, step: Step, fault: Fault) -> Seen {
    let machine = machine(accel, fault);
    // Where no deadline has to pass none is shortened: a busy host would be taken for a fault.
    let scale: &[&str] = match fault.waits_for_a_deadline(step) {
        true => &SOON,
        false => &[],
    };
    let mut old = machine.start_source(Launch::default().with(scale));
    old.warm_up();
    old.set(json!({"mode": "cpr-transfer"}));
    let mut new = waiting(&old, &machine, scale);
    let link = Link::new(new.folder(), step);
    old.execute("migrate", json!({"channels": link.channels()}));
    assert!(
        link.wait(PATIENCE),
        "process {} does not come to the step: {}",
        new.pid(),
        old.said()
    );
    match fault {
        Fault::KillOld => old.kill(),
        Fault::KillNew => new.kill(),
        Fault::Frame(_) => {}
    }
    let began = Instant::now();
    link.go(fault.deed(step));
    if fault == Fault::KillOld {
        return without_old(old, &mut new, link, began);
    }
    let (status, error) = decided(&mut old);
    let took = began.elapsed();
    let asked = link.asked();
    // Nothing may arrive late and change what was decided.
    drop(link);
    let outcome = match (status.as_str(), asked) {
        ("failed", asked) => {
            // It has ended, or ends now: a guest that may start here as well never will.
            assert_ne!(new.wait_exit().code(), Some(0), "{error}");
            assert!(!error.is_empty());
            assert_upgrades(old);
            if asked {
                Outcome::StaysAsked
            } else {
                Outcome::Stays
            }
        }
        ("completed", _) if fault == Fault::KillNew => {
            old.assert_guest_stopped();
            Outcome::Ends
        }
        ("completed", asked) => {
            // What the guest writes is seen there too.
            assert_eq!(old.runstate(), "postmigrate");
            moved(&old, &mut new);
            if asked {
                Outcome::MovesAsked
            } else {
                Outcome::Moves
            }
        }
        (_, _) => {
            assert_eq!(
                fault,
                Fault::KillNew,
                "nobody answers, and nobody was killed"
            );
            old.assert_guest_stopped();
            let refused = old.refusal("x-resolve", json!({"outcome": "source-runs"}));
            assert!(!refused.is_empty());
            old.refusal("cont", json!({}));
            old.assert_guest_stopped();
            Outcome::Lost
        }
    };
    Seen {
        outcome,
        took,
        error,
    }
}

/// Waits until the old process has decided, or says that it cannot. The status of its migration, and what it says.
fn decided(old: &mut Vm) -> (String, String) {
    until("it is clear what became of the guest", || {
        let info = old.query("query-migrate");
        let status = info["status"].as_str().unwrap().to_owned();
        let mut events = old.qmp.events.iter();
        let doubt = events.any(|event| event["event"] == "x-MIGRATION_UNRESOLVED");
        let over = ["completed", "failed"].contains(&status.as_str());
        let error = info["error-desc"].as_str().unwrap_or_default().to_owned();
        (over || doubt).then_some((status, error))
    })
}

/// The old process was killed: the new one has the guest, or ends.
fn without_old(old: Vm, new: &mut Waiting, link: Link, began: Instant) -> Seen {
    drop(link);
    let path = old.qmp_path();
    let runs = until("the new process decides", || {
        if new.has_ended() {
            return Some(false);
        }
        let mut qmp = Qmp::connect(&path)?;
        let status = qmp.execute("query-status", json!({})).ok()?;
        (status["running"] == true).then_some(true)
    });
    let took = began.elapsed();
    if runs {
        moved(&old, new);
    }
    Seen {
        outcome: if runs { Outcome::Moves } else { Outcome::Ends },
        took,
        error: String::new(),
    }
}

/// The guest is in the new process, from which the next upgrade works.
pub(super) fn moved(old: &Vm, new: &mut Waiting) {
    let at = At(old.qmp_path());
    at.assert_guest_works();
    assert!(!new.has_ended());
    let (_next, _) = at.upgrade();
    assert_eq!(new.wait_exit().code(), Some(0));
    at.assert_guest_works();
}
