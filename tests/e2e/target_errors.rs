//! What the target has to complain about reaches the source and its operators in the target's words, at once, and the target can be
//! asked all the while.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use serde_json::json;
use vmferry_transport::wire::frame::{SourceFrame, TargetFrame};

use crate::harness::{Accel, Machine, program, turn};
use crate::proxy::{Passing, Proxy, Verdict};
use crate::qmp::Qmp;

on_both_accelerators!(
    an_error_at_the_target_ends_the_migration_at_once_while_pages_move,
    a_device_that_refuses_its_state_is_quoted_on_the_command_line,
    a_target_answers_while_it_loads,
);

fn an_error_at_the_target_ends_the_migration_at_once_while_pages_move(accel: Accel) {
    let _turn = turn();
    let machine = Machine {
        fill: "32M",
        ..Machine::small(accel)
    };
    let mut source = machine.source();
    let mut target = machine.target();
    // Some pages arrive, then one that the target cannot take.
    let mut frames = 0;
    let proxy = Proxy::new(&target.address(), move |passing| match passing {
        Passing::Data(frame) if frame.has_pages() => {
            frames += 1;
            if frames != 3 {
                return Verdict::Pass;
            }
            let mut bytes = frame.bytes.to_vec();
            bytes[12] ^= 1;
            Verdict::Replace(bytes)
        }
        _ => Verdict::Pass,
    });
    // All of it would take minutes.
    source.set(json!({ "max-bandwidth": 256 << 10 }));
    source.migrate(&proxy.address());
    let info = source.wait_migration();
    let error = source.assert_failed(&info, "bad checksum of a frame of type 40");
    assert!(error.starts_with("the target refused: "), "{error}");
    let statuses = source.statuses();
    assert_eq!(statuses, ["setup", "active", "failing", "failed"]);
    let sent = info["ram"]["transferred"].as_u64().unwrap();
    assert!(sent < 16 << 20, "{sent} bytes were sent all the same");
    target.assert_gave_up("bad checksum of a frame of type 40");
    source.set(json!({ "max-bandwidth": 0 }));
    source.move_to(&mut machine.target());
}

fn a_device_that_refuses_its_state_is_quoted_on_the_command_line(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let mut source = machine.source();
    let mut target = machine.target();
    let proxy = Proxy::new(&target.address(), |passing| match passing {
        Passing::Source(SourceFrame::Section(section)) if section.name == "vcpu/0" => {
            let mut section = section.clone();
            section.bytes = section.bytes.slice(..section.bytes.len() / 2);
            Verdict::Replace(SourceFrame::Section(section).encode())
        }
        _ => Verdict::Pass,
    });
    let output = program()
        .args(["migrate", "--qmp"])
        .arg(source.qmp_path())
        .arg(proxy.address())
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success(), "{said}");
    let info = source.query("query-migrate");
    let error = source.assert_failed(&info, "vcpu/0");
    assert!(error.starts_with("the target refused: "), "{error}");
    // The same words on the command line and at the target.
    let words = error.trim_start_matches("the target refused: ").to_owned();
    assert!(said.contains(&words), "{said:?} does not quote {words:?}");
    target.assert_gave_up(&words);
    source.move_to(&mut machine.target());
}

fn a_target_answers_while_it_loads(accel: Accel) {
    let _turn = turn();
    let machine = Machine {
        mem: "1G",
        fill: "512M",
        ..Machine::small(accel)
    };
    // A busy host may leave out the one who asks.
    let mut seen = Vec::new();
    let answered = (0..10).any(|_| {
        seen.push(answers_while_active(&machine));
        seen.last().unwrap().iter().all(|count| *count >= 3)
    });
    assert!(answered, "{seen:?}");
}

/// Migrates. Returns how many answers came before the target had all of the state, and how many while it loaded.
fn answers_while_active(machine: &Machine) -> [u64; 2] {
    let mut source = machine.source();
    let mut target = machine.target();
    // Loading goes from the last byte of state to READY, and hashes all memory here.
    let (loading, loaded) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicBool::new(false)),
    );
    let (begins, ends) = (Arc::clone(&loading), Arc::clone(&loaded));
    let proxy = Proxy::new(&target.address(), move |passing| {
        match passing {
            Passing::Source(SourceFrame::StateEnd(_)) => begins.store(true, Ordering::SeqCst),
            Passing::Target(TargetFrame::Ready(_)) => ends.store(true, Ordering::SeqCst),
            _ => {}
        }
        Verdict::Pass
    });
    let answers = [0, 1].map(|_| Arc::new(AtomicU64::new(0)));
    let (before, during) = (Arc::clone(&answers[0]), Arc::clone(&answers[1]));
    let mut asked = Qmp::connect(&target.qmp_path()).unwrap();
    let asker = thread::spawn(move || {
        while !loaded.load(Ordering::SeqCst) {
            let began = loading.load(Ordering::SeqCst);
            let info = asked.execute("query-migrate", json!({})).unwrap();
            // An answer counts if it came and went within the phase.
            if began && !loaded.load(Ordering::SeqCst) {
                assert_eq!(info["status"], "active", "{info}");
                during.fetch_add(1, Ordering::SeqCst);
            } else if info["status"] == "active" {
                before.fetch_add(1, Ordering::SeqCst);
            }
        }
    });
    source.move_to_at(&mut target, &proxy.address());
    asker.join().unwrap();
    answers.map(|count| count.load(Ordering::SeqCst))
}
