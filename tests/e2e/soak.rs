//! Many migrations of running guests, back and forth over changing links: no page is lost, and nothing is leaked, neither in processes
//! that take part in one migration nor in one that tries many.

use serde_json::json;
use vmferry_transport::wire::frame::{SourceFrame, TargetFrame};

use crate::harness::{Accel, Chance, Machine, Vm, number_from_env, until, whole_machine};
use crate::proc::Holdings;
use crate::proxy::{Passing, Proxy, Verdict};

on_both_accelerators!(
    a_guest_survives_many_migrations_and_nothing_is_leaked,
    attempts_that_fail_leave_nothing_behind,
);

/// Migrations, both accelerators together, unless `VMFERRY_SOAK` says otherwise.
const MIGRATIONS: u64 = 30;
/// Migrations of one guest before the next, of another size, takes its place.
const CHAIN: u64 = 10;
/// Failed attempts of one process.
const ATTEMPTS: u64 = 12;
/// What a heap may grow by without being suspicious: allocators keep what they had, per thread.
const HEAP_NOISE: u64 = 8 << 20;

fn a_guest_survives_many_migrations_and_nothing_is_leaked(accel: Accel) {
    let _turn = whole_machine();
    let chance = Chance::new();
    let migrations = number_from_env("VMFERRY_SOAK")
        .unwrap_or(MIGRATIONS)
        .div_ceil(2);
    let mut left = migrations;
    while left > 0 {
        let length = left.min(CHAIN);
        chain(accel, &chance, length);
        left -= length;
    }
}

/// One guest, `length` migrations.
fn chain(accel: Accel, chance: &Chance, length: u64) {
    let (mem, working_set, fill) = chance.of(&[
        ("64M", "16M", "24M"),
        ("128M", "64M", "16M"),
        ("256M", "32M", "128M"),
        ("512M", "64M", "64M"),
        ("1G", "64M", "256M"),
        ("2G", "128M", "512M"),
    ]);
    let machine = Machine {
        mem,
        working_set,
        fill,
        vcpus: chance.of(&[1, 1, 2]),
        dirty_rate: chance.of(&["100", "1000", "10000", "100000", "max"]),
        accel,
    };
    println!("{machine:?}");
    let sockets = tempfile::tempdir().unwrap();
    let mut source = machine.start_source(Default::default());
    if is_slow(&machine) {
        wait_pages(&mut source);
    } else {
        source.warm_up();
    }
    let mut first = None;
    for number in 0..length {
        let connections = 1 + chance.below(16);
        let checksum = chance.below(4) == 0;
        let path = format!("unix:{}/{number}", sockets.path().display());
        let address = chance.of(&["tcp:127.0.0.1:0", "tcp:[::1]:0", &path]);
        println!("migration {number}: {connections} connections, {address}, checksum {checksum}");
        let mut target = machine.target_at(address);
        source.set(json!({
            "multifd-channels": connections,
            "x-checksum": checksum,
            "x-verify": true,
            // Whatever the guest does: the soak is about pages, not about convergence.
            "downtime-limit": 5000,
        }));
        source.migrate(&target.address());
        let info = source.wait_migration();
        assert_eq!(info["status"], "completed", "{info}\n{}", source.said());
        let verification = &info["x-verification"];
        assert_eq!(
            verification["ram-hash-source"],
            verification["ram-hash-target"]
        );
        assert_eq!(verification["vcpus-equal"], true, "{info}");
        source.assert_guest_stopped();
        if is_slow(&machine) {
            wait_pages(&mut target);
        } else {
            target.assert_guest_works();
        }
        let now = [
            Holdings::settled(source.pid()),
            Holdings::settled(target.pid()),
        ];
        for side in &now {
            // The guest touches no more than it was told to.
            let most = mib(working_set) + mib(fill) + 16;
            assert!(side.populated_bytes >> 20 <= most, "{side:?}");
        }
        // The first source was started with a guest, the others got theirs: only the targets of all migrations are alike.
        assert_alike(&mut first, target.pid());
        source = target;
    }
}

/// A size of the tables above in MiB.
fn mib(size: &str) -> u64 {
    size.trim_end_matches('M').parse().unwrap()
}

/// Whether the guest needs long for a pass over its working set.
fn is_slow(machine: &Machine) -> bool {
    ["100", "1000"].contains(&machine.dirty_rate)
}

/// Waits until the guest, which checks every page before it writes it, has written some.
fn wait_pages(vm: &mut Vm) {
    vm.wait_runstate("running");
    let mut pages = || vm.query("x-query-workload")["pages-written"].as_u64();
    let before = pages();
    until("the guest writes", || (pages() > before).then_some(()));
    // And has found none of them wrong.
    vm.passes();
}

/// Processes that did the same hold the same as the first of them.
fn assert_alike(first: &mut Option<Holdings>, pid: u32) {
    let now = Holdings::await_at_first(first, pid);
    let grown = first
        .as_ref()
        .is_some_and(|first| now.anon_bytes > first.anon_bytes + HEAP_NOISE);
    assert!(!grown, "{first:?} {now:?}");
}

fn attempts_that_fail_leave_nothing_behind(accel: Accel) {
    let _turn = whole_machine();
    let chance = Chance::new();
    let machine = Machine::small(accel);
    let mut source = machine.source();
    let mut first = None;
    for number in 0..ATTEMPTS {
        let mut target = machine.target();
        let kind = number % 4;
        let proxy = Proxy::new(&target.address(), move |passing| match (kind, passing) {
            (0, Passing::Target(TargetFrame::Ready(_))) => Verdict::Cut,
            (1, Passing::Data(frame)) if frame.ends_round() => Verdict::Cut,
            (2, Passing::Source(SourceFrame::DataHello(_))) => Verdict::Cut,
            _ => Verdict::Pass,
        });
        source.set(json!({ "multifd-channels": 1 + chance.below(8), "max-bandwidth": if kind == 3 { 1 << 20 } else { 0 } }));
        source.migrate(&proxy.address());
        if kind == 3 {
            source.wait_status("active");
            source.query("migrate_cancel");
        }
        let info = source.wait_migration();
        let wanted = if kind == 3 { "cancelled" } else { "failed" };
        assert_eq!(info["status"], wanted, "{info}");
        source.assert_guest_works();
        target.kill();
        drop(proxy);
        // The first few attempts warm up what is made once: helper threads, caches of the allocator.
        if number < 4 {
            first = None;
        }
        assert_alike(&mut first, source.pid());
    }
    source.set(json!({ "max-bandwidth": 0 }));
    source.move_to(&mut machine.target());
}
