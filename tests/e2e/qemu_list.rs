//! Paths of QEMU's list of migration tests that no other module covers. A case has the name of its path, with `/` and `-` written as
//! `_`; `tests/QEMU_TESTS.md` has the whole list.

use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::harness::{Accel, Launch, Machine, Vm, turn, until, whole_machine};
use crate::proc::processor_time;

on_both_accelerators!(
    precopy_unix_plain,
    precopy_tcp_plain,
    precopy_tcp_plain_switchover_ack,
    precopy_unix_suspend_live,
    precopy_unix_suspend_notlive,
    auto_converge,
    multifd_tcp_uri_plain_none,
    multifd_tcp_channels_plain_none,
    multifd_tcp_plain_cancel,
    multifd_tcp_plain_zero_page_none,
    validate_uuid,
    validate_uuid_error,
    validate_uuid_src_not_set,
    validate_uuid_dst_not_set,
    bad_dest,
);

const UUID: &str = "11111111-1111-1111-1111-111111111111";
const OTHER_UUID: &str = "22222222-2222-2222-2222-222222222222";

fn set_capability(vm: &mut Vm, name: &str) {
    let capability = json!({ "capability": name, "state": true });
    vm.execute(
        "migrate-set-capabilities",
        json!({ "capabilities": [capability] }),
    );
}

/// As QEMU's tests do: first it cannot converge, then it may.
fn move_after_a_while(source: &mut Vm, target: &mut Vm) {
    source.set(json!({ "downtime-limit": 0, "x-verify": true }));
    let address = target.address();
    source.migrate(&address);
    let pass = source.qmp.event(|event| {
        event["event"] == "MIGRATION_PASS" && event["data"]["pass"].as_u64() >= Some(3)
    });
    assert!(pass.is_some());
    assert_eq!(source.status(), "active");
    source.set(json!({ "downtime-limit": 30_000 }));
    assert_moved(source, target);
}

fn assert_moved(source: &mut Vm, target: &mut Vm) -> Value {
    let info = source.wait_migration();
    assert_eq!(info["status"], "completed", "{info}\n{}", source.said());
    let verification = &info["x-verification"];
    assert_eq!(
        verification["ram-hash-source"],
        verification["ram-hash-target"]
    );
    assert_eq!(target.wait_migration()["status"], "completed");
    info
}

fn precopy_unix_plain(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let sockets = tempfile::tempdir().unwrap();
    let address = format!("unix:{}/target", sockets.path().display());
    let (mut source, mut target) = (machine.source(), machine.target_at(&address));
    move_after_a_while(&mut source, &mut target);
    target.assert_guest_works();
    source.assert_guest_stopped();
}

fn precopy_tcp_plain(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let (mut source, mut target) = (machine.source(), machine.target());
    move_after_a_while(&mut source, &mut target);
    target.assert_guest_works();
    source.assert_guest_stopped();
}

fn precopy_tcp_plain_switchover_ack(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let (mut source, mut target) = (machine.source(), machine.target());
    for side in [&mut source, &mut target] {
        set_capability(side, "return-path");
        set_capability(side, "switchover-ack");
    }
    move_after_a_while(&mut source, &mut target);
    target.assert_guest_works();
}

/// The machine has no sleep state; its guest is stopped by the operator, in the middle.
fn precopy_unix_suspend_live(accel: Accel) {
    suspend(accel, true);
}

/// The same before the migration begins.
fn precopy_unix_suspend_notlive(accel: Accel) {
    suspend(accel, false);
}

fn suspend(accel: Accel, live: bool) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let sockets = tempfile::tempdir().unwrap();
    let address = format!("unix:{}/target", sockets.path().display());
    let (mut source, mut target) = (machine.source(), machine.target_at(&address));
    source.set(json!({ "downtime-limit": 0, "x-verify": true }));
    if live {
        source.migrate(&address);
        source.wait_status("active");
        source.query("stop");
        source.set(json!({ "downtime-limit": 300 }));
    } else {
        source.query("stop");
        source.set(json!({ "downtime-limit": 300 }));
        source.migrate(&address);
    }
    assert_moved(&mut source, &mut target);
    assert_eq!(target.runstate(), "paused");
    target.assert_guest_stopped();
    // Whoever wakes it up there finds it as it was.
    target.query("cont");
    target.assert_guest_works();
    source.assert_guest_stopped();
}

/// Share of the time that the guest's vCPU works, in percent. A busy host makes it less, and never more.
fn vcpu_share(vm: &mut Vm) -> u64 {
    vm.passes();
    let pid = vm.pid();
    let time = || processor_time(pid, "vcpu");
    let (before, began) = (time(), Instant::now());
    while began.elapsed() < Duration::from_secs(1) {
        // Who does not read its events is hung up on, and rounds without a page are many.
        vm.query("query-status");
        thread::sleep(Duration::from_millis(5));
    }
    let centis = u64::try_from(began.elapsed().as_millis()).unwrap() / 10;
    (time() - before) * 100 / centis
}

fn auto_converge(accel: Accel) {
    let _turn = whole_machine();
    let machine = Machine {
        mem: "128M",
        working_set: "64M",
        fill: "0",
        dirty_rate: "max",
        ..Machine::small(accel)
    };
    let (mut source, mut target) = (machine.start_source(Launch::default()), machine.target());
    source.wait_runstate("running");
    let free = vcpu_share(&mut source);
    // A link that needs far longer for the working set than the guest needs to write it.
    source.set(json!({
        "max-bandwidth": 256 << 20,
        "downtime-limit": 0,
        "cpu-throttle-initial": 30,
        "cpu-throttle-increment": 30,
        "x-verify": true,
    }));
    set_capability(&mut source, "auto-converge");
    source.migrate(&target.address());
    let mut seen = Vec::new();
    let mut note = |info: &Value| {
        let percent = info["cpu-throttle-percentage"].as_u64();
        if let Some(percent) = percent
            && seen.last() != Some(&percent)
        {
            seen.push(percent);
        }
        percent
    };
    until("the guest is slowed down", || {
        (note(&source.query("query-migrate")) >= Some(90)).then_some(())
    });
    let slowed = vcpu_share(&mut source);
    assert_eq!(source.status(), "active");
    assert!(slowed < 50, "it works {slowed} % of the time");
    source.set(json!({ "downtime-limit": 50 }));
    until("the migration converges", || {
        let info = source.query("query-migrate");
        note(&info);
        (info["status"] != "active").then_some(())
    });
    assert_moved(&mut source, &mut target);
    println!("works {free} % of the time, throttled by {seen:?} %, then {slowed} %");
    // A busy host may keep us from seeing each.
    let in_order = seen.is_sorted_by(|one, next| one < next);
    let steps = seen
        .iter()
        .all(|percent| [30, 60, 90, 99].contains(percent));
    assert!(in_order && steps, "{seen:?}");
    // Nothing of it is left where the guest runs now.
    until("the guest is as fast as the host lets it be", || {
        (vcpu_share(&mut target) >= 50).then_some(())
    });
}

fn multifd_tcp_uri_plain_none(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let (mut source, mut target) = (machine.source(), machine.target_at("defer"));
    for side in [&mut source, &mut target] {
        set_capability(side, "multifd");
        side.set(json!({ "multifd-channels": 16 }));
    }
    target.execute("migrate-incoming", json!({ "uri": "tcp:127.0.0.1:0" }));
    let info = source.move_to(&mut target);
    assert_eq!(info["x-connections"], 16);
}

/// The list of channels that leads to `address`.
fn channels(address: &str) -> Value {
    let (host, port) = address
        .strip_prefix("tcp:")
        .and_then(|text| text.rsplit_once(':'))
        .unwrap();
    let addr = json!({ "transport": "socket", "type": "inet", "host": host, "port": port });
    json!([{ "channel-type": "main", "addr": addr }])
}

fn multifd_tcp_channels_plain_none(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let (mut source, mut target) = (machine.source(), machine.target_at("defer"));
    for side in [&mut source, &mut target] {
        side.set(json!({ "multifd-channels": 16, "x-verify": true }));
    }
    let anywhere = channels("tcp:127.0.0.1:0");
    target.execute("migrate-incoming", json!({ "channels": anywhere }));
    let there = channels(&target.address());
    source.execute("migrate", json!({ "channels": there }));
    let info = assert_moved(&mut source, &mut target);
    assert_eq!(info["x-connections"], 16);
    target.assert_guest_works();
}

fn multifd_tcp_plain_cancel(accel: Accel) {
    let _turn = turn();
    let machine = Machine {
        dirty_rate: "max",
        ..Machine::small(accel)
    };
    let (mut source, mut target) = (machine.source(), machine.target());
    source.set(json!({ "multifd-channels": 16, "downtime-limit": 0 }));
    source.migrate(&target.address());
    let pass = source
        .qmp
        .event(|event| event["event"] == "MIGRATION_PASS" && event["data"]["pass"] == 3);
    assert!(pass.is_some());
    source.query("migrate_cancel");
    target.assert_gave_up("the source gave up: cancelled by the operator");
    assert_eq!(source.wait_migration()["status"], "cancelled");
    source.assert_guest_works();
    let mut target = machine.target();
    source.set(json!({ "downtime-limit": 2000 }));
    source.move_to(&mut target);
}

fn multifd_tcp_plain_zero_page_none(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let (mut source, mut target) = (machine.source(), machine.target());
    source.set(json!({ "zero-page-detection": "none" }));
    let info = source.move_to(&mut target);
    // What the guest has never touched does not exist and needs no look.
    assert!(info["ram"]["normal"].as_u64() >= Some(2048), "{info}");
}

fn uuids(accel: Accel, source: Option<&str>, target: Option<&str>) -> (Vm, Vm) {
    let machine = Machine::small(accel);
    let launch = |uuid: Option<&str>| match uuid {
        Some(uuid) => Launch::default().with(&["--uuid", uuid]),
        None => Launch::default(),
    };
    let mut vms = (
        machine.start_source(launch(source)),
        machine.start_target("tcp:127.0.0.1:0", launch(target)),
    );
    vms.0.warm_up();
    set_capability(&mut vms.0, "validate-uuid");
    set_capability(&mut vms.1, "validate-uuid");
    vms
}

fn validate_uuid(accel: Accel) {
    let _turn = turn();
    let (mut source, mut target) = uuids(accel, Some(UUID), Some(UUID));
    source.move_to(&mut target);
}

fn validate_uuid_error(accel: Accel) {
    let _turn = turn();
    let (mut source, mut target) = uuids(accel, Some(UUID), Some(OTHER_UUID));
    let error = source.assert_migration_fails(&target.address(), "the target refused: ");
    for uuid in [UUID, OTHER_UUID] {
        assert!(error.contains(uuid), "{error}");
    }
    // Its own VM is still welcome there.
    let launch = Launch::default().with(&["--uuid", OTHER_UUID]);
    let mut own = Machine::small(accel).start_source(launch);
    own.warm_up();
    set_capability(&mut own, "validate-uuid");
    own.move_to(&mut target);
}

fn validate_uuid_src_not_set(accel: Accel) {
    let _turn = turn();
    let (mut source, mut target) = uuids(accel, None, Some(UUID));
    source.move_to(&mut target);
}

fn validate_uuid_dst_not_set(accel: Accel) {
    let _turn = turn();
    let (mut source, mut target) = uuids(accel, Some(UUID), None);
    source.move_to(&mut target);
}

fn bad_dest(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let mut source = machine.source();
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let dead = format!("tcp:{}", free.local_addr().unwrap());
    drop(free);
    source.assert_migration_fails(&dead, "Connection refused");
    source.move_to(&mut machine.target());
}

#[test]
fn validate_uri_channels_both_set() {
    validate_uri(Some("tcp:127.0.0.1:1"), Some(channels("tcp:127.0.0.1:1")));
}

#[test]
fn validate_uri_channels_none_set() {
    validate_uri(None, None);
}

/// Neither side takes these arguments, and neither has lost anything by them.
fn validate_uri(uri: Option<&str>, channels: Option<Value>) {
    let _turn = turn();
    let machine = Machine::small(Accel::Soft);
    let (mut source, mut target) = (machine.source(), machine.target_at("defer"));
    let mut arguments = json!({});
    if let Some(uri) = uri {
        arguments["uri"] = json!(uri);
    }
    if let Some(channels) = channels {
        arguments["channels"] = channels;
    }
    for (side, command) in [(&mut source, "migrate"), (&mut target, "migrate-incoming")] {
        let refusal = side.refusal(command, arguments.clone());
        assert!(refusal.contains("either `uri` or `channels`"), "{refusal}");
        assert_eq!(side.status(), "none");
    }
    target.execute("migrate-incoming", json!({ "uri": "tcp:127.0.0.1:0" }));
    source.move_to(&mut target);
}

#[test]
fn validate_caps_mapped_ram_postcopy() {
    let mut source = Machine::small(Accel::Soft).target_at("defer");
    let before = source.query("query-migrate-capabilities");
    // Neither exists yet, so that no order of them can be set, and what is asked for beside them is not done either.
    for order in [
        ["mapped-ram", "postcopy-ram"],
        ["postcopy-ram", "mapped-ram"],
    ] {
        let wanted: Vec<_> = ["auto-converge"]
            .iter()
            .chain(&order)
            .map(|name| json!({ "capability": name, "state": true }))
            .collect();
        let refusal = source.refusal(
            "migrate-set-capabilities",
            json!({ "capabilities": wanted }),
        );
        assert!(refusal.contains(order[0]), "{refusal}");
        assert_eq!(source.query("query-migrate-capabilities"), before);
    }
}
