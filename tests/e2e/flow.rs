//! The main job over every transport: the guest goes on where it was, with every page it wrote, and stands still at the source.

use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::harness::{Accel, Launch, Machine, program, turn, until};

on_both_accelerators!(
    a_running_guest_moves_over_every_transport,
    any_number_of_data_connections_moves_a_guest,
    a_guest_with_many_vcpus_moves,
    a_paused_guest_stays_paused_and_its_memory_the_same,
    a_target_started_paused_keeps_the_guest_stopped,
    a_deferred_target_listens_where_it_is_told,
    either_side_can_do_without_io_uring,
    pages_can_travel_with_checksums,
    the_operator_may_stop_the_guest_on_its_way,
    statuses_and_events_come_in_order,
    the_command_line_moves_a_guest_and_says_so,
);

fn a_running_guest_moves_over_every_transport(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let sockets = tempfile::tempdir().unwrap();
    let path = format!("unix:{}/target", sockets.path().display());
    for address in ["tcp:127.0.0.1:0", "tcp:[::1]:0", "tcp:localhost:0", &path] {
        let (mut source, mut target) = (machine.source(), machine.target_at(address));
        let info = source.move_to(&mut target);
        assert_eq!(info["x-connections"], 2, "{info}");
        // The guest is gone for good from the source: what is left there is what was handed over.
        let left = source.query("x-ram-hash")["hash"].clone();
        assert_eq!(left, info["x-verification"]["ram-hash-target"]);
        let refusal = source.refusal("cont", json!({}));
        assert!(refusal.contains("handed over"), "{refusal}");
        let refusal = source.refusal("migrate", json!({ "uri": "tcp:127.0.0.1:1" }));
        assert!(refusal.contains("handed over"), "{refusal}");
    }
}

fn any_number_of_data_connections_moves_a_guest(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let sockets = tempfile::tempdir().unwrap();
    let path = format!("unix:{}/target", sockets.path().display());
    let mut source = machine.source();
    for (connections, address) in [
        (1, "tcp:127.0.0.1:0"),
        (2, &path),
        (4, "tcp:[::1]:0"),
        (8, "tcp:127.0.0.1:0"),
        (16, &path),
        (1, &path),
        (255, "tcp:127.0.0.1:0"),
    ] {
        let mut target = machine.target_at(address);
        source.set(json!({ "multifd-channels": connections }));
        let info = source.move_to(&mut target);
        assert_eq!(info["x-connections"], connections);
        assert!(info["ram"]["normal"].as_u64() >= Some(3072), "{info}");
        source = target;
    }
}

fn a_guest_with_many_vcpus_moves(accel: Accel) {
    let _turn = turn();
    for vcpus in [2, 5] {
        let machine = Machine {
            vcpus,
            ..Machine::small(accel)
        };
        let (mut source, mut target) = (machine.source(), machine.target());
        source.move_to(&mut target);
    }
}

fn a_paused_guest_stays_paused_and_its_memory_the_same(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let (mut source, mut target) = (machine.source(), machine.target());
    source.query("stop");
    let before = source.query("x-ram-hash");
    let address = target.address();
    source.migrate(&address);
    let info = source.wait_migration();
    assert_eq!(info["status"], "completed", "{info}");
    assert_eq!(source.runstate(), "postmigrate");
    target.wait_runstate("paused");
    target.assert_guest_stopped();
    assert_eq!(target.query("x-ram-hash"), before);
    target.query("cont");
    target.assert_guest_works();
    source.assert_guest_stopped();
}

fn a_target_started_paused_keeps_the_guest_stopped(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let mut source = machine.source();
    let mut target = machine.start_target("tcp:127.0.0.1:0", Launch::default().with(&["--paused"]));
    let address = target.address();
    source.migrate(&address);
    assert_eq!(source.wait_migration()["status"], "completed");
    target.wait_runstate("paused");
    target.assert_guest_stopped();
    source.assert_guest_stopped();
    assert_eq!(
        target.query("x-ram-hash"),
        source.query("x-ram-hash"),
        "memory differs"
    );
    target.query("cont");
    target.assert_guest_works();
}

fn a_deferred_target_listens_where_it_is_told(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let (mut source, mut target) = (machine.source(), machine.target_at("defer"));
    assert_eq!(target.query("query-migrate"), json!({}));
    target.execute("migrate-incoming", json!({ "uri": "tcp:127.0.0.1:0" }));
    let refusal = target.refusal("migrate-incoming", json!({ "uri": "tcp:127.0.0.1:0" }));
    assert!(refusal.contains("listens"), "{refusal}");
    source.move_to(&mut target);
}

fn either_side_can_do_without_io_uring(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let without = Launch::default().env("VMFERRY_NO_URING", "1");
    let cases = [
        (without.clone(), Launch::default(), "plain"),
        (Launch::default(), without.clone(), "io_uring"),
        (without.clone(), without, "plain"),
    ];
    for (at_source, at_target, backend) in cases {
        let mut source = machine.start_source(at_source);
        source.warm_up();
        let mut target = machine.start_target("tcp:127.0.0.1:0", at_target);
        let info = source.move_to(&mut target);
        if info["x-backend"] != backend {
            // The kernel may refuse io_uring altogether.
            println!("SKIPPED: no io_uring here, {backend} was wanted: {info}");
        }
    }
}

fn pages_can_travel_with_checksums(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let (mut source, mut target) = (machine.source(), machine.target());
    source.set(json!({ "x-checksum": true, "multifd-channels": 3 }));
    source.move_to(&mut target);
}

fn the_operator_may_stop_the_guest_on_its_way(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let (mut source, mut target) = (machine.source(), machine.target());
    // Slow enough to do something in between.
    source.set(json!({ "max-bandwidth": 4 << 20 }));
    let address = target.address();
    source.migrate(&address);
    source.wait_status("active");
    source.query("stop");
    assert_eq!(source.runstate(), "paused");
    let before = source.query("x-ram-hash");
    source.set(json!({ "max-bandwidth": 0 }));
    assert_eq!(source.wait_migration()["status"], "completed");
    target.wait_runstate("paused");
    assert_eq!(target.query("x-ram-hash"), before);
    target.query("cont");
    target.assert_guest_works();
}

#[test]
fn a_process_that_stood_still_does_not_blame_the_other() {
    let machine = Machine::small(Accel::Soft);
    // The source expects a word each 12 s.
    let launch = Launch::default().with(&["--x-deadline-scale", "40"]);
    let (mut source, mut target) = (machine.start_source(launch), machine.target());
    source.set(json!({ "downtime-limit": 0 }));
    source.migrate(&target.address());
    source.wait_status("active");
    let pid = Pid::from_raw(source.pid().cast_signed()).unwrap();
    for _ in 0..2 {
        kill_process(pid, Signal::STOP).unwrap();
        thread::sleep(Duration::from_secs(13));
        kill_process(pid, Signal::CONT).unwrap();
        let before = source.query("query-migrate")["ram"]["dirty-sync-count"].clone();
        until("rounds go on", || {
            let info = source.query("query-migrate");
            assert_eq!(info["status"], "active", "{info}");
            (info["ram"]["dirty-sync-count"] != before).then_some(())
        });
    }
    source.set(json!({ "downtime-limit": 300 }));
    assert_eq!(source.wait_migration()["status"], "completed");
    target.assert_guest_works();
}

fn statuses_and_events_come_in_order(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let (mut source, mut target) = (machine.source(), machine.target());
    source.move_to(&mut target);
    let names = |events: &[Value]| -> Vec<String> {
        events
            .iter()
            .filter(|event| event["event"] != "MIGRATION_PASS")
            .map(|event| match event["data"]["status"].as_str() {
                Some(status) => status.to_owned(),
                None => event["event"].as_str().unwrap().to_owned(),
            })
            .collect()
    };
    let at_source = names(&source.qmp.events);
    assert_eq!(
        at_source,
        ["setup", "active", "device", "STOP", "completed"]
    );
    let passes = source.qmp.events.iter();
    let passes: Vec<_> = passes
        .filter(|event| event["event"] == "MIGRATION_PASS")
        .map(|event| event["data"]["pass"].as_u64().unwrap())
        .collect();
    assert!(!passes.is_empty() && passes.is_sorted(), "{passes:?}");
    target.query("query-status");
    let at_target = names(&target.qmp.events);
    assert_eq!(at_target, ["setup", "active", "RESUME", "completed"]);
}

fn the_command_line_moves_a_guest_and_says_so(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let (mut source, mut target) = (machine.source(), machine.target());
    let path = source.qmp_path();
    let migrate = |address: &str| {
        program()
            .args(["migrate", "--json", "--quiet", "--streams", "3", "--qmp"])
            .arg(&path)
            .arg(address)
            .output()
            .unwrap()
    };
    let refused = migrate("tcp:127.0.0.1:1");
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(!refused.status.success());
    assert!(said.contains("cannot connect to tcp:127.0.0.1:1"), "{said}");
    assert!(said.contains("goes on running at the source"), "{said}");
    source.assert_guest_works();

    let moved = migrate(&target.address());
    let record: Value = serde_json::from_slice(&moved.stdout).unwrap();
    assert!(moved.status.success(), "{record}");
    assert_eq!(record["status"], "completed");
    assert_eq!(record["x-connections"], 3);
    target.assert_guest_works();

    for (vm, word) in [(&source, "postmigrate"), (&target, "running")] {
        let status = program()
            .args(["status", "--qmp"])
            .arg(vm.qmp_path())
            .output()
            .unwrap();
        let said = String::from_utf8(status.stdout).unwrap();
        assert!(status.status.success() && said.contains(word), "{said}");
    }
}
