//! What operators can say beside "migrate" and "cancel": each does what it says, and nothing else is harmed.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::thread;

use serde_json::{Value, json};

use crate::harness::{Accel, Launch, Machine, Vm, turn, until};
use crate::peer::FakeTarget;
use crate::qmp::Failure;

on_both_accelerators!(
    a_stuck_migration_is_yanked_and_the_next_one_works,
    a_target_can_be_yanked_while_pages_arrive,
    a_blocker_refuses_migrations_and_says_why,
    the_dirty_rate_is_measured_in_both_ways,
    a_migration_ends_a_measurement_and_not_the_other_way_round,
    only_what_steers_may_change_under_way,
    a_target_that_stays_takes_the_next_migration,
    a_guest_is_saved_through_descriptors_that_were_passed_in,
    what_is_not_there_yet_is_refused_with_the_rule,
    figures_appear_as_they_come_to_be_known,
);

fn yank(vm: &mut Vm) {
    vm.execute("yank", json!({ "instances": [{ "type": "migration" }] }));
}

fn a_stuck_migration_is_yanked_and_the_next_one_works(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let mut source = machine.source();
    let nothing = json!({ "instances": [{ "type": "migration" }] });
    let refusal = source.refusal("yank", nothing);
    assert!(refusal.contains("no migration"), "{refusal}");
    assert_eq!(source.query("query-yank"), json!([]));

    let fake = FakeTarget::new();
    // Silent before the hello, after it, and with pages on their way: each holds its connections open and says nothing.
    for step in 0..3 {
        source.migrate(&fake.address());
        let mut held = Vec::new();
        match step {
            0 => held.push(fake.accept()),
            1 => held.push(fake.accept_hello().0),
            _ => {
                let (control, data) = fake.accept_migration();
                held.push(control);
                held.extend(data);
            }
        }
        assert_eq!(source.query("query-yank"), json!([{ "type": "migration" }]));
        yank(&mut source);
        let info = source.wait_migration();
        source.assert_failed(&info, "yanked");
        until("nothing is left to yank", || {
            (source.query("query-yank") == json!([])).then_some(())
        });
        // Both directions are down on every connection.
        for peer in &mut held {
            while peer
                .socket
                .read(&mut [0; 4096])
                .is_ok_and(|count| count > 0)
            {}
        }
    }
    source.move_to(&mut machine.target());
}

fn a_target_can_be_yanked_while_pages_arrive(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let mut source = machine.source();
    let mut target = machine.target();
    source.set(json!({ "max-bandwidth": 4 << 20 }));
    source.migrate(&target.address());
    target.wait_status("active");
    assert_eq!(target.query("query-yank"), json!([{ "type": "migration" }]));
    yank(&mut target);
    target.assert_gave_up("yanked");
    let info = source.wait_migration();
    source.assert_failed(&info, "");
    source.set(json!({ "max-bandwidth": 0 }));
    source.move_to(&mut machine.target());
}

fn a_blocker_refuses_migrations_and_says_why(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let mut source = machine.source();
    let mut target = machine.target();
    let block = |reason: &str, modes: Value| json!({ "reason": reason, "modes": modes });
    let all = json!({ "reason": "the passthrough disk cannot move" });
    let disk = source.execute("x-add-blocker", all)["id"].clone();
    let other = block("only for exec", json!(["cpr-exec"]));
    source.execute("x-add-blocker", other);
    let reasons = json!(["the passthrough disk cannot move"]);
    assert_eq!(source.query("query-migrate")["blocked-reasons"], reasons);
    let uri = json!({ "uri": target.address() });
    let refusal = source.refusal("migrate", uri);
    assert!(refusal.contains("passthrough disk"), "{refusal}");
    assert_eq!(source.status(), "none");

    source.execute("x-remove-blocker", json!({ "id": disk }));
    let refusal = source.refusal("x-remove-blocker", json!({ "id": disk }));
    assert!(refusal.contains("no blocker"), "{refusal}");
    source.set(json!({ "max-bandwidth": 4 << 20 }));
    source.migrate(&target.address());
    source.wait_status("active");
    let late = source.refusal("x-add-blocker", block("late", json!(["normal"])));
    assert!(late.contains("too late"), "{late}");
    source.set(json!({ "max-bandwidth": 0 }));
    let info = source.wait_migration();
    assert_eq!(info["status"], "completed", "{info}");
    assert_eq!(info.get("blocked-reasons"), None);
    target.assert_guest_works();
}

/// Waits for the end of a measurement.
fn measured(vm: &mut Vm) -> Value {
    until("the dirty rate is measured", || {
        let info = vm.query("query-dirty-rate");
        (info["status"] != "measuring").then_some(info)
    })
}

fn the_dirty_rate_is_measured_in_both_ways(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let mut source = machine.source();
    assert_eq!(source.query("query-dirty-rate")["status"], "unstarted");
    for (mode, pages) in [("dirty-bitmap", 0), ("page-sampling", 16_384)] {
        let mut wanted = json!({ "calc-time": 1, "mode": mode });
        if pages > 0 {
            wanted["sample-pages"] = json!(pages);
        }
        // It lasts a second, in which a busy host may leave this process out.
        until("another one is refused while this one is under way", || {
            measured(&mut source);
            source.execute("calc-dirty-rate", wanted.clone());
            match source.qmp.execute("calc-dirty-rate", wanted.clone()) {
                Err(Failure::Refused(reason)) => {
                    assert!(reason.contains("already"), "{reason}");
                    let info = source.query("query-dirty-rate");
                    (info["status"] == "measuring").then_some(())
                }
                answer => {
                    assert_eq!(answer, Ok(json!({})));
                    None
                }
            }
        });
        until("what the guest writes is found", || {
            let info = measured(&mut source);
            assert_eq!(info["status"], "measured", "{info}");
            assert_eq!(info["mode"], mode);
            assert_eq!(info["sample-pages"], pages);
            assert_eq!(info["calc-time"], 1);
            // It writes 4 MiB over and over: more is never found, however long it took.
            let rate = info["dirty-rate"].as_u64().unwrap();
            assert!(rate <= 5, "{info}");
            if rate == 0 {
                source.execute("calc-dirty-rate", wanted.clone());
            }
            (rate > 0).then_some(())
        });
    }
    source.query("stop");
    source.execute(
        "calc-dirty-rate",
        json!({ "calc-time": 50, "calc-time-unit": "millisecond", "mode": "dirty-bitmap" }),
    );
    assert_eq!(measured(&mut source)["dirty-rate"], 0, "a stopped guest");
    source.query("cont");
    source.move_to(&mut machine.target());
}

fn a_migration_ends_a_measurement_and_not_the_other_way_round(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let mut source = machine.source();
    let long = json!({ "calc-time": 60, "mode": "dirty-bitmap" });
    // At once, when the log may not have been started yet, and later.
    for wait in [false, true] {
        source.execute("calc-dirty-rate", long.clone());
        if wait {
            let passes = source.passes();
            until("the guest goes on", || {
                (source.passes() > passes).then_some(())
            });
        }
        let fake = FakeTarget::new();
        source.migrate(&fake.address());
        let (_control, _data) = fake.accept_migration();
        let info = source.query("query-dirty-rate");
        assert_eq!(info["status"], "unstarted");
        let why = info["x-error"].as_str().unwrap().to_owned();
        assert!(why.contains("migration"), "{why}");
        let refusal = source.refusal("calc-dirty-rate", long.clone());
        assert!(refusal.contains("during a migration"), "{refusal}");
        source.query("migrate_cancel");
        assert_eq!(source.wait_migration()["status"], "cancelled");
        source.assert_guest_works();
    }
    source.execute("calc-dirty-rate", long);
    source.move_to(&mut machine.target());
}

fn only_what_steers_may_change_under_way(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let mut source = machine.source();
    let mut target = machine.target();
    source.set(json!({ "max-bandwidth": 4 << 20, "downtime-limit": 1 }));
    source.migrate(&target.address());
    source.wait_status("active");
    let set = "migrate-set-parameters";
    let before = source.query("query-migrate-parameters");
    for change in [
        json!({ "multifd-channels": 4 }),
        json!({ "x-verify": true, "downtime-limit": 5 }),
        json!({ "zero-page-detection": "none" }),
    ] {
        let refusal = source.refusal(set, change);
        assert!(refusal.contains("status active"), "{refusal}");
    }
    let refusal = source.refusal("migrate-set-capabilities", json!({ "capabilities": [] }));
    assert!(refusal.contains("status active"), "{refusal}");
    assert_eq!(source.query("query-migrate-parameters"), before);
    let refusal = source.refusal("migrate-continue", json!({ "state": "pre-switchover" }));
    assert!(refusal.contains("it is in active"), "{refusal}");
    let refusal = source.refusal("migrate-continue", json!({ "state": "active" }));
    assert!(refusal.contains("nothing waits"), "{refusal}");
    source.set(json!({ "max-bandwidth": 0, "downtime-limit": 2000, "cpu-throttle-initial": 30 }));
    assert_eq!(source.wait_migration()["status"], "completed");
    target.assert_guest_works();
    // All is over: everything may change again.
    source.set(json!({ "multifd-channels": 4 }));
}

fn a_target_that_stays_takes_the_next_migration(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let mut source = machine.source();
    let mut target = machine.start_target("defer", Launch::default());
    let incoming = "migrate-incoming";
    let stay = json!({ "uri": "tcp:127.0.0.1:0", "exit-on-error": false });
    let channels = json!({ "exit-on-error": false, "channels": [{ "channel-type": "main", "addr":
        { "transport": "socket", "type": "inet", "host": "127.0.0.1", "port": "0" } }] });
    target.execute(incoming, stay.clone());
    for round in 0..3 {
        let refusal = target.refusal(incoming, stay.clone());
        assert!(refusal.contains("already"), "{refusal}");
        source.set(json!({ "max-bandwidth": 4 << 20 }));
        source.migrate(&target.address());
        target.wait_status("active");
        // Some pages have to be there, to be gone afterwards.
        until("pages arrive", || {
            let info = target.query("query-migrate");
            (info["ram"]["transferred"].as_u64() > Some(1 << 20)).then_some(())
        });
        source.query("migrate_cancel");
        assert_eq!(source.wait_migration()["status"], "cancelled");
        target.wait_status("failed");
        let info = target.query("query-migrate");
        let error = info["error-desc"].as_str().unwrap();
        assert!(error.contains("cancelled"), "{error}");
        assert_eq!(target.runstate(), "inmigrate");
        let refusal = target.refusal("cont", json!({}));
        assert!(refusal.contains("failed"), "{refusal}");
        let again = if round == 1 { &channels } else { &stay };
        until("the target may listen again", || {
            target.qmp.execute(incoming, again.clone()).ok()
        });
        let info = target.query("query-migrate");
        assert_eq!(info.get("error-desc"), None, "{info}");
        assert_eq!(info["x-populated-target"], 0, "{info}");
        target.qmp.events.clear();
    }
    source.set(json!({ "max-bandwidth": 0 }));
    let info = source.move_to(&mut target);
    // Nothing of the attempts before is left behind.
    let populated = |side: &str| info[side].as_u64().unwrap();
    assert!(populated("x-populated-target") <= populated("x-populated-source"));
}

fn a_guest_is_saved_through_descriptors_that_were_passed_in(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let mut source = machine.source();
    let getfd = |name: &str| json!({ "fdname": name });
    let refusal = source.refusal("getfd", getfd("none"));
    assert!(refusal.contains("SCM_RIGHTS"), "{refusal}");

    // A pipe, by name. It is gone after its use.
    let (mut reader, writer) = std::io::pipe().unwrap();
    source.qmp.pass(writer.as_fd());
    drop(writer);
    source.execute("getfd", getfd("pipe"));
    let size = thread::spawn(move || {
        let mut archive = Vec::new();
        reader.read_to_end(&mut archive).unwrap();
        archive.len()
    });
    source.migrate("fd:pipe");
    assert_eq!(source.wait_migration()["status"], "completed");
    assert!(size.join().unwrap() > 4 << 20);
    let refusal = source.refusal("closefd", getfd("pipe"));
    assert!(refusal.contains("`pipe`"), "{refusal}");

    // A file, in a set.
    let mut source = machine.source();
    let path = source.dir().join("archive");
    let file = File::create(&path).unwrap();
    source.qmp.pass(file.as_fd());
    let added = source.execute("add-fd", json!({ "fdset-id": 7, "opaque": "rw" }));
    assert_eq!(added["fdset-id"], 7);
    let sets = source.query("query-fdsets");
    assert_eq!(
        sets[0]["fds"][0],
        json!({ "fd": added["fd"], "opaque": "rw" })
    );
    source.migrate("file:/dev/fdset/7");
    assert_eq!(source.wait_migration()["status"], "completed");
    source.execute("remove-fd", json!({ "fdset-id": 7 }));
    assert_eq!(source.query("query-fdsets"), json!([]));

    // What was saved runs.
    let mut target = machine.start_target("defer", Launch::default());
    target.qmp.pass(File::open(&path).unwrap().as_fd());
    target.execute("add-fd", json!({ "fdset-id": 1 }));
    target.execute("migrate-incoming", json!({ "uri": "file:/dev/fdset/1" }));
    target.wait_runstate("running");
    target.assert_guest_works();
}

fn what_is_not_there_yet_is_refused_with_the_rule(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let mut source = machine.source();
    for (command, arguments, part) in [
        ("migrate-start-postcopy", json!({}), "`postcopy-ram`"),
        ("migrate-pause", json!({}), "the status is none"),
        (
            "migrate-recover",
            json!({ "uri": "unix:/x" }),
            "postcopy-paused",
        ),
        (
            "migrate",
            json!({ "uri": "unix:/x", "resume": true }),
            "postcopy-paused",
        ),
        (
            "migrate-incoming",
            json!({ "uri": "unix:/x" }),
            "--incoming",
        ),
        ("migrate", json!({}), "`channels`"),
    ] {
        let refusal = source.refusal(command, arguments);
        assert!(refusal.contains(part), "{command}: {refusal}");
    }
    source.execute("announce-self", json!({ "rounds": 3, "id": "x" }));
    let refusal = source.refusal("announce-self", json!({ "rounds": 1001 }));
    assert!(refusal.contains("announce-rounds"), "{refusal}");
    assert_eq!(source.status(), "none");
    source.assert_guest_works();
}

fn figures_appear_as_they_come_to_be_known(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let mut source = machine.source();
    let fake = FakeTarget::new();
    source.migrate(&fake.address());
    let (_control, _) = fake.accept_hello();
    let info = source.query("query-migrate");
    assert_eq!(info["status"], "setup");
    for absent in ["ram", "remaining", "total-time", "error-desc", "downtime"] {
        assert_eq!(info.get(absent), None, "{info}");
    }
    yank(&mut source);
    source.wait_migration();

    let mut target = machine.target();
    source.set(json!({ "max-bandwidth": 4 << 20 }));
    source.migrate(&target.address());
    source.wait_status("active");
    let info = source.query("query-migrate");
    for present in ["ram", "remaining", "total-time", "expected-downtime"] {
        assert!(info.get(present).is_some(), "{present}: {info}");
    }
    source.set(json!({ "max-bandwidth": 0 }));
    let info = source.wait_migration();
    assert_eq!(info["status"], "completed");
    for present in ["downtime", "x-blackout", "x-guest-stall-us", "setup-time"] {
        assert!(info.get(present).is_some(), "{present}: {info}");
    }
    for absent in ["remaining", "expected-downtime", "error-desc"] {
        assert_eq!(info.get(absent), None, "{absent}: {info}");
    }
    target.assert_guest_works();
}
