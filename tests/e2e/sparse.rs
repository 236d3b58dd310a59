//! Memory that the guest never touched stays out of both processes.

use serde_json::json;

use crate::harness::{Accel, Machine, Vm, whole_machine};

on_both_accelerators!(
    a_large_vm_that_touched_little_stays_small_on_both_sides,
    a_vm_that_never_ran_is_moved_without_making_memory,
);

const MIB: u64 = 1 << 20;
/// What the program, its tables and everything else may need beyond the pages that the guest was told to touch.
const SLACK: u64 = 16 * MIB;

/// Guest memory that exists, as the kernel counts it; the VM's own figure must be the same.
fn populated(vm: &mut Vm, member: &str) -> u64 {
    let kernel = vm.holdings().populated_bytes;
    let info = vm.query("query-migrate");
    assert_eq!(info[member], kernel, "{info}");
    kernel
}

fn a_large_vm_that_touched_little_stays_small_on_both_sides(accel: Accel) {
    let _turn = whole_machine();
    let machine = Machine {
        mem: "8G",
        working_set: "64M",
        fill: "0",
        dirty_rate: "max",
        ..Machine::small(accel)
    };
    let touched = 64 * MIB;
    let mut source = machine.source();
    for connections in [1, 4] {
        let mut target = machine.target();
        assert!(target.holdings().populated_bytes <= SLACK);
        // A busy host may be slow, and the guest is not.
        source.set(json!({ "multifd-channels": connections, "downtime-limit": 5000 }));
        source.migrate(&target.address());
        let info = source.wait_migration();
        assert_eq!(info["status"], "completed", "{info}");
        target.assert_guest_works();
        for (side, member) in [
            (&mut source, "x-populated-source"),
            (&mut target, "x-populated-target"),
        ] {
            let populated = populated(side, member);
            assert!(
                (touched..=touched + SLACK).contains(&populated),
                "{member} {populated}: {info}"
            );
        }
        source = target;
    }
}

fn a_vm_that_never_ran_is_moved_without_making_memory(accel: Accel) {
    let _turn = whole_machine();
    let machine = Machine {
        mem: "8G",
        working_set: "64M",
        fill: "1G",
        ..Machine::small(accel)
    };
    let mut source = machine.start_source(crate::harness::Launch::default().with(&["--paused"]));
    let mut target = machine.target();
    assert_eq!(source.runstate(), "prelaunch");
    let before = source.holdings().populated_bytes;
    assert!(before <= SLACK, "{before}");
    source.migrate(&target.address());
    assert_eq!(source.wait_migration()["status"], "completed");
    target.wait_runstate("paused");
    assert_eq!(populated(&mut source, "x-populated-source"), before);
    let populated = populated(&mut target, "x-populated-target");
    assert!(populated <= SLACK, "{populated}");
    target.query("cont");
    target.assert_guest_works();
}
