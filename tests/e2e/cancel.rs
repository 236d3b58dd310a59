//! An operator who changes his mind: the guest goes on at the source, and the next migration works.

use serde_json::json;
use vmferry_transport::wire::frame::{SourceFrame, TargetFrame};

use crate::harness::{Accel, Machine, Vm, turn};
use crate::peer::FakeTarget;
use crate::proxy::{Passing, Proxy, Verdict};

on_both_accelerators!(
    a_migration_can_be_cancelled_before_it_has_begun_to_send,
    a_migration_can_be_cancelled_while_pages_move,
    a_migration_can_be_cancelled_while_the_guest_is_stopped,
    a_migration_that_never_converges_can_be_cancelled_or_allowed_to_end,
    a_paused_guest_stays_paused_when_its_migration_is_cancelled,
    a_source_that_is_told_to_quit_takes_its_migration_back_first,
    a_target_that_is_told_to_quit_says_so_to_the_source_first,
);

/// Cancels, and sees the guest go on.
fn assert_cancelled(source: &mut Vm) {
    source.query("migrate_cancel");
    let info = source.wait_migration();
    assert_eq!(info["status"], "cancelled", "{info}");
    let statuses = source.statuses();
    assert!(
        statuses.ends_with(&["cancelling".to_owned(), "cancelled".to_owned()]),
        "{statuses:?}"
    );
    source.assert_guest_works();
    // Once more is no error.
    source.query("migrate_cancel");
    assert_eq!(source.status(), "cancelled");
}

fn a_migration_can_be_cancelled_before_it_has_begun_to_send(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let mut source = machine.source();
    source.query("migrate_cancel");
    assert_eq!(source.status(), "none");
    let fake = FakeTarget::new();

    // Nobody has accepted the connection yet.
    source.migrate(&fake.address());
    assert_cancelled(&mut source);
    // The hello is not answered.
    let _early = fake.accept();
    source.migrate(&fake.address());
    let (mut control, _) = fake.accept_hello();
    assert_cancelled(&mut source);
    match control.hear::<SourceFrame>() {
        Some(SourceFrame::Abort(abort)) => assert!(abort.reason.contains("cancelled")),
        other => panic!("{other:?}"),
    }
    // Data connections are up and the target is not ready.
    source.migrate(&fake.address());
    let (_control, _data) = fake.accept_migration();
    assert_cancelled(&mut source);
    source.move_to(&mut machine.target());
}

fn a_migration_can_be_cancelled_while_pages_move(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let mut source = machine.source();
    for connections in [1, 4] {
        let mut target = machine.target();
        source.set(json!({ "max-bandwidth": 4 << 20, "multifd-channels": connections }));
        let address = target.address();
        source.migrate(&address);
        source.wait_status("active");
        let refusal = source.refusal("migrate", json!({ "uri": address }));
        assert!(refusal.contains("under way"), "{refusal}");
        let events = json!({ "capabilities": [{ "capability": "events", "state": true }] });
        let refusal = source.refusal("migrate-set-capabilities", events);
        assert!(refusal.contains("under way"), "{refusal}");
        assert_cancelled(&mut source);
        target.assert_gave_up("the source gave up: cancelled by the operator");
    }
    source.set(json!({ "max-bandwidth": 0 }));
    source.move_to(&mut machine.target());
}

fn a_migration_can_be_cancelled_while_the_guest_is_stopped(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let mut source = machine.source();
    let mut target = machine.target();
    // READY never comes.
    let proxy = Proxy::new(&target.address(), |passing| match passing {
        Passing::Target(TargetFrame::Ready(_)) => Verdict::Drop,
        Passing::Source(SourceFrame::Commit) => panic!("COMMIT without READY"),
        _ => Verdict::Pass,
    });
    source.migrate(&proxy.address());
    source.wait_status("device");
    source.wait_runstate("finish-migrate");
    source.assert_guest_stopped();
    let refusal = source.refusal("cont", json!({}));
    assert!(refusal.contains("switching over"), "{refusal}");
    assert_cancelled(&mut source);
    target.assert_gave_up("the source gave up: cancelled by the operator");
    source.move_to(&mut machine.target());
}

fn a_migration_that_never_converges_can_be_cancelled_or_allowed_to_end(accel: Accel) {
    let _turn = turn();
    let machine = Machine {
        dirty_rate: "max",
        ..Machine::small(accel)
    };
    let mut source = machine.source();
    let mut target = machine.target();
    source.set(json!({ "downtime-limit": 0 }));
    source.migrate(&target.address());
    let pass = |source: &mut Vm, number: u64| {
        let event = source.qmp.event(|event| {
            event["event"] == "MIGRATION_PASS" && event["data"]["pass"].as_u64() >= Some(number)
        });
        assert!(event.is_some(), "{}", source.said());
    };
    pass(&mut source, 5);
    assert_eq!(source.status(), "active");
    assert_cancelled(&mut source);
    target.assert_gave_up("cancelled");

    let mut target = machine.target();
    source.set(json!({ "x-verify": true }));
    source.migrate(&target.address());
    pass(&mut source, 5);
    source.set(json!({ "downtime-limit": 2000 }));
    assert_eq!(source.wait_migration()["status"], "completed");
    target.assert_guest_works();
    source.assert_guest_stopped();
}

fn a_paused_guest_stays_paused_when_its_migration_is_cancelled(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let (mut source, mut target) = (machine.source(), machine.target());
    source.query("stop");
    let proxy = Proxy::new(&target.address(), |passing| match passing {
        Passing::Target(TargetFrame::Ready(_)) => Verdict::Drop,
        _ => Verdict::Pass,
    });
    source.migrate(&proxy.address());
    source.wait_status("device");
    source.query("migrate_cancel");
    assert_eq!(source.wait_migration()["status"], "cancelled");
    assert_eq!(source.runstate(), "paused");
    source.assert_guest_stopped();
    source.query("cont");
    source.assert_guest_works();
    source.move_to(&mut machine.target());
}

fn a_source_that_is_told_to_quit_takes_its_migration_back_first(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let (mut source, mut target) = (machine.source(), machine.target());
    source.set(json!({ "max-bandwidth": 1 << 20 }));
    source.migrate(&target.address());
    source.wait_status("active");
    source.query("quit");
    assert_eq!(source.wait_exit().code(), Some(0), "{}", source.said());
    target.assert_gave_up("the source gave up: cancelled by the operator");
}

fn a_target_that_is_told_to_quit_says_so_to_the_source_first(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let (mut source, mut target) = (machine.source(), machine.target());
    source.set(json!({ "max-bandwidth": 1 << 20 }));
    source.migrate(&target.address());
    source.wait_status("active");
    target.query("quit");
    assert_eq!(target.wait_exit().code(), Some(0), "{}", target.said());
    let info = source.wait_migration();
    source.assert_failed(&info, "the target refused: cancelled at the target");
    source.set(json!({ "max-bandwidth": 0 }));
    source.move_to(&mut machine.target());
}
