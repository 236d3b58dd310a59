//! I3: a guest that could not go on in a new program goes on in the old one, however it had come there.

use std::path::Path;

use serde_json::json;

use crate::cli::says;
use crate::harness::{Accel, Launch, Machine, Vm, turn, until};
use crate::line::Line;
use crate::observe::{recording, records};
use crate::qmp::Qmp;
use crate::stand_in::{liar, program_path};
use crate::successor::{Orphan, new_pid, upgrade};
use crate::upgrade::At;

on_both_accelerators!(
    a_guest_that_had_arrived_over_the_network_comes_back,
    a_guest_that_was_upgraded_before_comes_back_with_what_it_says,
    a_guest_whose_program_was_started_paused_comes_back_as_it_stood,
    what_became_of_execs_is_told_and_recorded,
);

/// An upgrade to a program that says yes and then loses its command line.
fn fail(qmp: &Path) {
    let folder = tempfile::tempdir().unwrap();
    let then = format!("exec {} \"$@\" --no-such-option", program_path().display());
    let liar = liar(folder.path(), &then);
    let words = ["upgrade", "--mode", "exec", "--binary"];
    let said = says(qmp, &[&words[..], &[liar.to_str().unwrap()]].concat(), 1);
    assert!(
        said.contains("--no-such-option") && said.contains("old program"),
        "{said}"
    );
}

fn assert_goes_on(at: &At) {
    assert_eq!(at.ask("query-migrate")["status"], "failed");
    at.assert_guest_works();
    at.upgrade_by("exec");
    at.assert_guest_works();
}

fn a_guest_that_had_arrived_over_the_network_comes_back(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let (mut source, mut target) = (machine.source(), machine.target());
    source.move_to(&mut target);
    source.kill();
    let at = At(target.qmp_path());
    fail(&at.0);
    assert_goes_on(&at);
    assert!(target.lives(), "{}", target.said());
}

fn a_guest_that_was_upgraded_before_comes_back_with_what_it_says(accel: Accel) {
    let _turn = turn();
    let folder = tempfile::tempdir().unwrap();
    let mut line = Line::new(folder.path());
    let launch = Launch::default().with(&["--serial", line.path(), "--workload-serial"]);
    let mut vm = Machine::small(accel).start_source(launch);
    line.remove();
    vm.warm_up();
    let at = At(vm.qmp_path());
    let _new = Orphan(new_pid(&upgrade(&at.0, "transfer")));
    assert_eq!(vm.wait_exit().code(), Some(0), "{}", vm.said());
    fail(&at.0);
    assert_goes_on(&at);
    line.hear_more(2);
}

fn a_guest_whose_program_was_started_paused_comes_back_as_it_stood(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let mut vm = machine.start_source(Launch::default().with(&["--paused"]));
    let at = At(vm.qmp_path());
    let go_on = |vm: &mut Vm| {
        vm.qmp = until("somebody answers", || Qmp::connect(&at.0));
        vm.execute("cont", json!({}));
    };
    fail(&at.0);
    go_on(&mut vm);
    vm.warm_up();
    fail(&at.0);
    assert_goes_on(&at);
}

fn what_became_of_execs_is_told_and_recorded(accel: Accel) {
    let _turn = turn();
    let folder = tempfile::tempdir().unwrap();
    let mut vm = Machine::small(accel).start_source(recording(folder.path()));
    vm.warm_up();
    let at = At(vm.qmp_path());
    fail(&at.0);
    let figures = || {
        let info = at.ask("query-migrate");
        ["total-time", "downtime", "x-blackout"].map(|name| info[name].clone())
    };
    let told = figures();
    let [total, down, parts] = &told;
    assert!(
        total.as_u64() >= down.as_u64() && down.as_u64().is_some(),
        "{told:?}"
    );
    assert!(parts["total-us"].as_u64() > Some(0), "{told:?}");
    at.assert_guest_works();
    assert_eq!(figures(), told, "it is over");
    let report = at.upgrade_by("exec");
    let records = records(folder.path(), 2);
    let outcomes = [&records[0].1, &records[1].1].map(|record| {
        let parts = record["blackout"].as_array().unwrap().iter();
        let blackout: u64 = parts
            .map(|part| part["duration-us"].as_u64().unwrap())
            .sum();
        (record["outcome"].as_str().unwrap(), blackout)
    });
    let whole = |value: &serde_json::Value| value.as_u64().unwrap();
    assert_eq!(
        outcomes,
        [
            ("failed", whole(&parts["total-us"])),
            ("completed", whole(&report["blackout-us"]))
        ]
    );
    let error = records[0].1["error"].as_str().unwrap();
    assert!(error.contains("--no-such-option"), "{error}");
}
