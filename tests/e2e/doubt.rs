//! The link is lost at the commit: only the target knows who owns the guest. The source stays stopped, asks, and if it cannot learn the
//! answer says so and waits for the operator. There are never two guests.

use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use vmferry_transport::wire::frame::{SourceFrame, TargetFrame};

use crate::harness::{Accel, Launch, Machine, PATIENCE, Vm, turn};
use crate::listener::Listener;
use crate::proxy::{Passing, Proxy, Verdict};

on_both_accelerators!(
    a_commit_that_arrived_is_found_out,
    a_commit_that_did_not_arrive_is_found_out,
    a_source_that_cannot_ask_yet_asks_again,
    a_commit_that_was_swallowed_is_found_out,
    a_target_that_is_told_to_end_at_the_commit_leaves_no_doubt,
    a_source_that_is_told_to_end_in_doubt_hears_first_what_became_of_its_guest,
    a_target_that_waits_for_a_source_in_doubt_ends_when_it_is_told_to,
    a_target_killed_at_any_step_before_the_commit_leaves_the_guest_running,
);

/// In which a frame comes from one end of a socket to the other, if nothing is in its way.
const A_MOMENT: Duration = Duration::from_millis(20);

fn is_commit(passing: &Passing<'_>) -> bool {
    matches!(passing, Passing::Source(SourceFrame::Commit))
}

fn is_running(passing: &Passing<'_>) -> bool {
    matches!(passing, Passing::Target(TargetFrame::Running { .. }))
}

/// A link that does `verdict` with the first frame that `wanted` likes.
fn link(target: &mut Vm, wanted: fn(&Passing<'_>) -> bool, verdict: Verdict) -> Proxy {
    let mut verdict = Some(verdict);
    Proxy::new(&target.address(), move |passing| {
        if wanted(passing) {
            verdict.take().unwrap_or(Verdict::Pass)
        } else {
            Verdict::Pass
        }
    })
}

fn a_commit_that_arrived_is_found_out(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    for (wanted, verdict) in [
        (is_commit as fn(&Passing<'_>) -> bool, Verdict::PassAndCut),
        (is_running, Verdict::Cut),
    ] {
        let (mut source, mut target) = (machine.source(), machine.target());
        let proxy = link(&mut target, wanted, verdict);
        source.migrate(&proxy.address());
        let info = source.wait_migration();
        assert_eq!(info["status"], "completed", "{info}\n{}", source.said());
        assert_eq!(source.runstate(), "postmigrate");
        target.wait_runstate("running");
        target.assert_guest_works();
        source.assert_guest_stopped();
    }
}

fn a_commit_that_did_not_arrive_is_found_out(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let (mut source, mut target) = (machine.source(), machine.target());
    let proxy = link(&mut target, is_commit, Verdict::Cut);
    source.assert_migration_fails(
        &proxy.address(),
        "the target confirms that it does not own the guest",
    );
    assert_eq!(target.runstate(), "inmigrate");
    target.assert_guest_stopped();
    assert_eq!(target.status(), "failed");
    let refusal = target.refusal("cont", json!({}));
    assert!(refusal.contains("never run here"), "{refusal}");
    // Nor will it take anybody else: its memory is not empty.
    source.assert_migration_fails(
        &target.address(),
        "busy with another migration, or has had one",
    );
    source.move_to(&mut machine.target());
}

fn a_source_that_cannot_ask_yet_asks_again(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let (mut source, mut target) = (machine.source(), machine.target());
    let proxy = link(&mut target, is_commit, Verdict::PassCutAndShut);
    source.migrate(&proxy.address());
    target.wait_runstate("running");
    // The source cannot know, and says neither yes nor no.
    assert_eq!(source.status(), "device");
    source.assert_guest_stopped();
    for command in ["cont", "migrate_cancel"] {
        let refusal = source.refusal(command, json!({}));
        assert!(!refusal.is_empty(), "{command}");
    }
    let refusal = source.refusal("migrate", json!({ "uri": "tcp:127.0.0.1:1" }));
    assert!(refusal.contains("under way"), "{refusal}");
    let refusal = source.refusal("x-resolve", json!({ "outcome": "source-runs" }));
    assert!(refusal.contains("in doubt"), "{refusal}");
    proxy.open_door();
    assert_eq!(source.wait_migration()["status"], "completed");
    target.assert_guest_works();
    source.assert_guest_stopped();
}

fn a_commit_that_was_swallowed_is_found_out(accel: Accel) {
    // Waits for a deadline, and takes no turn.
    let machine = Machine::small(accel);
    let (mut source, mut target) = (machine.source(), machine.target());
    // COMMIT is lost and the link is not: the target gives up when the source stops talking to it.
    let proxy = link(&mut target, is_commit, Verdict::Drop);
    source.assert_migration_fails(
        &proxy.address(),
        "the target confirms that it does not own the guest",
    );
    target.assert_guest_stopped();
    source.move_to(&mut machine.target());
}

fn signal(vm: &Vm, signal: Signal) {
    let pid = Pid::from_raw(vm.pid().cast_signed()).unwrap();
    kill_process(pid, signal).unwrap();
}

fn a_target_that_is_told_to_end_at_the_commit_leaves_no_doubt(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let (mut source, mut target) = (machine.source(), machine.target());
    let pid = Pid::from_raw(target.pid().cast_signed()).unwrap();
    let (tell, stopped) = channel();
    let proxy = Proxy::new(&target.address(), move |passing| {
        if is_commit(passing) {
            kill_process(pid, Signal::STOP).unwrap();
            tell.send(()).unwrap();
        }
        Verdict::Pass
    });
    source.migrate(&proxy.address());
    stopped.recv_timeout(PATIENCE).unwrap();
    // Most likely COMMIT is there by then; if not it comes too late, and the source hears that.
    thread::sleep(A_MOMENT);
    signal(&target, Signal::TERM);
    signal(&target, Signal::CONT);
    let status = target.wait_exit();
    assert!(status.code().is_some(), "{status}");
    let info = source.wait_migration();
    match info["status"].as_str() {
        Some("completed") => source.assert_guest_stopped(),
        _ => source.assert_guest_works(),
    }
}

fn a_source_that_is_told_to_end_in_doubt_hears_first_what_became_of_its_guest(accel: Accel) {
    let _turn = turn();
    let (machine, listener) = (Machine::small(accel), Listener::new());
    let mut source = machine.start_source(listener.attend(Launch::default()));
    source.warm_up();
    let mut target = machine.target();
    let proxy = link(&mut target, is_commit, Verdict::PassCutAndShut);
    source.migrate(&proxy.address());
    target.wait_runstate("running");
    source.query("quit");
    proxy.open_door();
    assert_eq!(source.wait_exit().code(), Some(0), "{}", source.said());
    listener.assert_order("the source");
    assert_eq!(listener.heard().last().unwrap().event, "done");
    target.assert_guest_works();
}

fn a_target_that_waits_for_a_source_in_doubt_ends_when_it_is_told_to(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    // Left alone it would wait for ten minutes.
    let patient = Launch::default().with(&["--x-deadline-scale", "1000"]);
    let mut source = machine.source();
    let mut target = machine.start_target("tcp:127.0.0.1:0", patient);
    let proxy = link(&mut target, is_commit, Verdict::Cut);
    source.assert_migration_fails(&proxy.address(), "the target confirms");
    target.query("quit");
    assert_eq!(target.wait_exit().code(), Some(1), "{}", target.said());
}

fn a_target_killed_at_any_step_before_the_commit_leaves_the_guest_running(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let mut source = machine.source();
    type Step = fn(&Passing<'_>) -> bool;
    let steps: [(&str, Step); 10] = [
        ("HELLO", |p| {
            matches!(p, Passing::Source(SourceFrame::Hello(_)))
        }),
        ("answer", |p| {
            matches!(p, Passing::Target(TargetFrame::HelloReply(_)))
        }),
        ("DATA_HELLO", |p| {
            matches!(p, Passing::Source(SourceFrame::DataHello(_)))
        }),
        ("DATA_READY", |p| {
            matches!(p, Passing::Target(TargetFrame::DataReady))
        }),
        ("pages", |p| matches!(p, Passing::Data(_))),
        ("ROUND_PLACED", |p| {
            matches!(p, Passing::Target(TargetFrame::RoundPlaced(_)))
        }),
        ("SWITCHOVER", |p| {
            matches!(p, Passing::Source(SourceFrame::Switchover(_)))
        }),
        ("device state", |p| {
            matches!(p, Passing::Source(SourceFrame::Section(_)))
        }),
        ("STATE_END", |p| {
            matches!(p, Passing::Source(SourceFrame::StateEnd(_)))
        }),
        ("READY", |p| {
            matches!(p, Passing::Target(TargetFrame::Ready(_)))
        }),
    ];
    for (name, step) in steps {
        println!("{name}");
        let mut target = machine.target();
        let (proxy, arrived, go) = stop_at(&mut target, step);
        source.migrate(&proxy.address());
        arrived.recv().unwrap();
        target.kill();
        go.send(Verdict::Cut).unwrap();
        let info = source.wait_migration();
        source.assert_failed(&info, "");
    }
    source.move_to(&mut machine.target());
}

/// A link that stops at the first frame that `step` likes, says so, and waits for what is to be done with it.
fn stop_at(
    target: &mut Vm,
    step: fn(&Passing<'_>) -> bool,
) -> (Proxy, std::sync::mpsc::Receiver<()>, Sender<Verdict>) {
    let (tell, arrived) = channel();
    let (go, wait) = channel();
    let mut done = false;
    let proxy = Proxy::new(&target.address(), move |passing| {
        if done || !step(passing) {
            return Verdict::Pass;
        }
        done = true;
        tell.send(()).unwrap();
        wait.recv().unwrap()
    });
    (proxy, arrived, go)
}

// These wait until the source tells the operator that it cannot learn the outcome, and take no turn.

/// A source whose target was killed when the commit was on its way.
pub(crate) fn in_doubt(machine: &Machine, source: &mut Vm) {
    let mut target = machine.target();
    let (proxy, arrived, go) = stop_at(&mut target, is_commit);
    source.migrate(&proxy.address());
    arrived.recv().unwrap();
    target.kill();
    go.send(Verdict::CutAndShut).unwrap();
    let event = source
        .qmp
        .event(|event| event["event"] == "x-MIGRATION_UNRESOLVED")
        .unwrap();
    let text = event["data"]["desc"].as_str().unwrap();
    assert!(text.contains("x-resolve"), "{text}");
    // Who comes later and has not heard the event is told too.
    let info = source.query("query-migrate");
    assert_eq!(
        (&info["status"], &info["error-desc"]),
        (&json!("device"), &json!(text))
    );
    source.assert_guest_stopped();
    let refusal = source.refusal("cont", json!({}));
    assert!(refusal.contains("x-resolve"), "{refusal}");
    let refusal = source.refusal("migrate_cancel", json!({}));
    assert!(refusal.contains("handed over"), "{refusal}");
}

#[test]
fn an_operator_who_knows_that_the_target_is_dead_gets_the_guest_back() {
    let machine = Machine::small(Accel::Soft);
    let mut source = machine.source();
    in_doubt(&machine, &mut source);
    source.execute("x-resolve", json!({ "outcome": "source-runs" }));
    let info = source.wait_migration();
    source.assert_failed(
        &info,
        "the operator decided that the guest stays at the source",
    );
    let refusal = source.refusal("x-resolve", json!({ "outcome": "source-runs" }));
    assert!(refusal.contains("in doubt"), "{refusal}");
    source.move_to(&mut machine.target());
}

#[test]
fn an_operator_who_knows_that_the_target_runs_keeps_the_source_stopped() {
    let machine = Machine::small(Accel::Soft);
    let mut source = machine.source();
    in_doubt(&machine, &mut source);
    source.execute("x-resolve", json!({ "outcome": "target-runs" }));
    let info = source.wait_migration();
    assert_eq!(info["status"], "completed", "{info}");
    assert_eq!(source.runstate(), "postmigrate");
    source.assert_guest_stopped();
    let refusal = source.refusal("cont", json!({}));
    assert!(refusal.contains("handed over"), "{refusal}");
}
