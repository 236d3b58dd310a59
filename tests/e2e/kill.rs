//! Either side is killed with SIGKILL at a random moment: there are never two guests, and a target that dies before the commit leaves
//! the guest running at the source, which can migrate again at once.

use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::harness::{Accel, Chance, Machine, Vm, number_from_env, until, whole_machine};
use crate::qmp::Failure;
use crate::watch::Watch;

on_both_accelerators!(killing_either_side_never_makes_two_guests);

/// How often a side is killed, both accelerators together, unless `VMFERRY_KILLS` says otherwise.
const KILLS: u64 = 50;

/// What became of the trials.
#[derive(Debug, Default)]
struct Tally {
    went_on_at_source: u64,
    completed_before: u64,
    in_doubt: u64,
    never_came: u64,
    went_on_at_target: u64,
}

impl Tally {
    /// Either side has died before the guest was on its way.
    fn has_both(&self) -> bool {
        self.went_on_at_source > 0 && self.never_came > 0
    }
}

fn killing_either_side_never_makes_two_guests(accel: Accel) {
    let _turn = whole_machine();
    let chance = Chance::new();
    let machine = Machine {
        fill: "24M",
        dirty_rate: "50000",
        ..Machine::small(accel)
    };
    let kills = number_from_env("VMFERRY_KILLS")
        .unwrap_or(KILLS)
        .div_ceil(2);
    // The first one may be slow for many reasons.
    let usual = usual_time(&machine).min(usual_time(&machine));
    let mut tally = Tally::default();
    let mut source = machine.source();
    // Some outcomes are chance.
    for trial in 0..8 * kills {
        if trial >= kills && (kills < 20 || tally.has_both()) {
            break;
        }
        let connections = chance.of(&[1, 2, 4]);
        source.set(json!({ "multifd-channels": connections }));
        let mut target = machine.target();
        let watch = Watch::over(source.qmp_path(), target.qmp_path());
        source.migrate(&target.address());
        // Half of the kills aim at the switchover, which is short.
        let aim = chance.below(2) == 0;
        let delay = if aim {
            source.wait_status("device");
            Duration::from_micros(chance.below(4000))
        } else {
            Duration::from_micros(chance.below(u64::try_from(usual.as_micros()).unwrap()))
        };
        thread::sleep(delay);
        let kill_source = chance.below(2) == 0;
        let victim = if kill_source { "source" } else { "target" };
        println!("trial {trial}: aimed {aim}, kills the {victim} after {delay:?}");
        if kill_source {
            source.kill();
            see_target(&mut target, &machine, &mut tally);
            source = machine.source();
        } else {
            target.kill();
            if !see_source(&mut source, &machine, &mut tally) {
                source = machine.source();
            }
        }
        watch.end();
    }
    println!("{tally:?}");
    assert!(kills < 20 || tally.has_both());
}

/// How long a migration takes that nobody disturbs.
fn usual_time(machine: &Machine) -> Duration {
    let (mut source, mut target) = (machine.source(), machine.target());
    let watch = Watch::over(source.qmp_path(), target.qmp_path());
    let began = Instant::now();
    source.migrate(&target.address());
    assert_eq!(source.wait_migration()["status"], "completed");
    let usual = began.elapsed();
    target.assert_guest_works();
    until("the watch looks", || (watch.looks() > 10).then_some(()));
    watch.end();
    usual
}

/// The source was killed: the guest has come, or it never will.
fn see_target(target: &mut Vm, machine: &Machine, tally: &mut Tally) {
    let mut nothing = 0;
    let state = until("the target decides", || {
        match target.qmp.execute("query-status", json!({})) {
            Ok(status) => (status["status"] != "inmigrate").then_some("runs"),
            // It gave up and has ended.
            Err(_) => Some("ended"),
        }
        .or_else(|| of_no_guest(target))
        .filter(|state| {
            // What the source said last may still be on its way.
            nothing += u32::from(*state == "waits");
            *state != "waits" || nothing >= 100
        })
    });
    match state {
        "runs" => {
            target.wait_runstate("running");
            target.assert_guest_works();
            tally.went_on_at_target += 1;
        }
        "lingers" => {
            target.assert_guest_stopped();
            let refusal = target.refusal("cont", json!({}));
            assert!(refusal.contains("never run here"), "{refusal}");
            tally.never_came += 1;
        }
        "waits" => {
            machine.source().move_to(target);
            tally.never_came += 1;
        }
        _ => {
            target.assert_gave_up("incoming migration failed");
            tally.never_came += 1;
        }
    }
}

/// The incoming migration has failed, or none has begun.
fn of_no_guest(target: &mut Vm) -> Option<&'static str> {
    let info = target.qmp.execute("query-migrate", json!({})).ok()?;
    match info["status"].as_str() {
        None => Some("waits"),
        Some("failed") => Some("lingers"),
        Some(_) => None,
    }
}

/// The target was killed. Returns whether the source has the guest.
fn see_source(source: &mut Vm, machine: &Machine, tally: &mut Tally) -> bool {
    let info = until("the source decides", || {
        let info = source.query("query-migrate");
        let ends = ["completed", "failed", "cancelled"];
        let over = ends.contains(&info["status"].as_str().unwrap());
        (over || in_doubt(source, &info)).then_some(info)
    });
    match info["status"].as_str().unwrap() {
        "failed" | "cancelled" => {
            source.assert_guest_works();
            // At once, and to a good end.
            let mut other = machine.target();
            source.move_to(&mut other);
            *source = other;
            tally.went_on_at_source += 1;
            true
        }
        "completed" => {
            source.assert_guest_stopped();
            tally.completed_before += 1;
            false
        }
        _ => {
            source.assert_guest_stopped();
            let refusal = source.refusal("cont", json!({}));
            assert!(!refusal.is_empty());
            tally.in_doubt += 1;
            false
        }
    }
}

/// COMMIT was sent, and nobody answers. Anything else that was under way ends soon when the target is dead.
fn in_doubt(source: &mut Vm, info: &Value) -> bool {
    if info["status"] != "device" {
        return false;
    }
    // So many looks, however long the host may stand still between two of them.
    for _ in 0..100 {
        if source.status() != "device" {
            return false;
        }
        thread::sleep(Duration::from_millis(20));
    }
    match source.qmp.execute("migrate_cancel", json!({})) {
        Err(Failure::Refused(reason)) => {
            assert!(reason.contains("handed over"), "{reason}");
            true
        }
        // It was not as far as that after all, and ends now.
        answer => {
            assert_eq!(answer, Ok(json!({})));
            false
        }
    }
}
