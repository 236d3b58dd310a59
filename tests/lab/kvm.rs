//! KVM with page tables of the hardware, as most hosts have it: whole migrations, and the tests of our KVM code once more.

use std::process::Command;

use serde_json::json;

use crate::harness::{Accel, Machine};
use crate::modules::load_kvm;
use crate::net::Hosts;

/// Small and slow: every first touch of a page goes through two emulations.
fn small() -> Machine {
    load_kvm();
    Machine {
        mem: "16M",
        working_set: "512K",
        dirty_rate: "500",
        fill: "2M",
        ..Machine::small(Accel::Kvm)
    }
}

#[test]
fn a_running_guest_moves_and_moves_back() {
    let machine = small();
    let mut source = machine.source();
    for connections in [1, 4] {
        let mut target = machine.target();
        source.set(json!({ "multifd-channels": connections }));
        let info = source.move_to(&mut target);
        assert_eq!(info["x-connections"], connections, "{info}");
        source = target;
    }
}

#[test]
fn a_guest_with_two_vcpus_moves() {
    let machine = Machine {
        vcpus: 2,
        ..small()
    };
    let (mut source, mut target) = (machine.source(), machine.target());
    source.move_to(&mut target);
}

#[test]
fn a_running_guest_moves_over_a_link_that_delays_and_loses() {
    let machine = small();
    let hosts = Hosts::new();
    for side in [0, 1] {
        hosts.disturb(side, "delay 5ms 2ms loss 1%");
    }
    let mut source = machine.start_source(hosts.launch(0));
    source.warm_up();
    let address = format!("tcp:{}:0", hosts.address(1));
    let mut target = machine.start_target(&address, hosts.launch(1));
    source.set(json!({ "multifd-channels": 3 }));
    source.move_to(&mut target);
}

#[test]
fn a_guest_stays_where_it_is_when_the_cable_is_pulled() {
    let machine = small();
    let hosts = Hosts::new();
    let mut source = machine.start_source(hosts.launch(0));
    source.warm_up();
    let address = format!("tcp:{}:0", hosts.address(1));
    let mut target = machine.start_target(&address, hosts.launch(1));
    source.set(json!({ "max-bandwidth": 512 << 10 }));
    source.migrate(&target.address());
    source.wait_status("active");
    hosts.plug(false);
    source.query("migrate_cancel");
    assert_eq!(source.wait_migration()["status"], "cancelled");
    source.assert_guest_works();
    target.kill();

    hosts.plug(true);
    let mut target = machine.start_target(&address, hosts.launch(1));
    source.set(json!({ "max-bandwidth": 0 }));
    source.move_to(&mut target);
}

/// Runs unit tests that `tests/lab/run` has packed.
fn unit_tests(program: &str, filter: &str, at_least: usize) {
    load_kvm();
    let output = Command::new(program)
        .args([filter, "--test-threads=1", "--show-output"])
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    println!("{said}");
    assert!(output.status.success());
    assert!(!said.contains("SKIPPED"));
    let passed = said.lines().filter(|line| line.ends_with("... ok")).count();
    assert!(passed >= at_least, "only {passed} tests ran");
}

#[test]
fn unit_tests_of_kvm_state_pass() {
    unit_tests("/bin/unit-tests-vmferry_devices", "kvm::tests::", 10);
}

#[test]
fn unit_tests_of_the_machine_pass() {
    unit_tests("/bin/unit-tests-vmferry", "machine::kvm::tests::", 15);
}
