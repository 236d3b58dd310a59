//! Between two network namespaces, as between two hosts: over a virtual Ethernet pair, by address.

use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::json;

use crate::harness::{Accel, Launch, Machine, Vm, turn};

on_both_accelerators!(a_guest_moves_between_two_network_namespaces);

/// Two namespaces with a cable between them; gone on drop.
struct Network {
    names: [String; 2],
}

impl Network {
    /// `None`, and a reason on the output, where this process may not make one.
    fn new() -> Option<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let id = format!(
            "vmf{}n{}",
            std::process::id(),
            COUNT.fetch_add(1, Ordering::Relaxed)
        );
        let network = Self {
            names: [format!("{id}a"), format!("{id}b")],
        };
        match network.build() {
            Ok(()) => Some(network),
            Err(error) => {
                println!("SKIPPED: no network namespaces here ({error})");
                None
            }
        }
    }

    fn build(&self) -> Result<(), String> {
        let [a, b] = &self.names;
        // A device of a namespace that goes away goes with it.
        ip(&format!("netns add {a}"))?;
        ip(&format!("netns add {b}"))?;
        ip(&format!(
            "link add cable netns {a} type veth peer name cable netns {b}"
        ))?;
        for (name, number) in [(a, 1), (b, 2)] {
            ip(&format!("-n {name} addr add 10.88.0.{number}/24 dev cable"))?;
            ip(&format!(
                "-n {name} addr add fd88::{number}/64 dev cable nodad"
            ))?;
            ip(&format!("-n {name} link set cable up"))?;
            ip(&format!("-n {name} link set lo up"))?;
        }
        Ok(())
    }

    fn launch(&self, side: usize) -> Launch {
        Launch::default().through(&["ip", "netns", "exec", &self.names[side]])
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for name in &self.names {
            // Whatever was built.
            let _ = ip(&format!("netns del {name}"));
        }
    }
}

fn ip(arguments: &str) -> Result<(), String> {
    let output = Command::new("ip")
        .args(arguments.split(' '))
        .output()
        .map_err(|error| format!("ip: {error}"))?;
    if output.status.success() {
        Ok(())
    } else {
        let said = String::from_utf8_lossy(&output.stderr);
        Err(format!("ip {arguments}: {}", said.trim()))
    }
}

fn a_guest_moves_between_two_network_namespaces(accel: Accel) {
    let _turn = turn();
    let Some(network) = Network::new() else {
        return;
    };
    let machine = Machine::small(accel);
    let mut source = machine.start_source(network.launch(0));
    source.warm_up();
    // Back and forth, over either protocol.
    for (side, address) in [
        (1, "tcp:10.88.0.2:0"),
        (0, "tcp:10.88.0.1:0"),
        (1, "tcp:[fd88::2]:0"),
        (0, "tcp:[fd88::1]:0"),
    ] {
        let mut target = machine.start_target(address, network.launch(side));
        source.set(json!({ "multifd-channels": 4 }));
        source.move_to(&mut target);
        source = target;
    }

    // The cable is pulled in the middle: whatever the target thinks, the guest goes on at the source.
    let mut target = machine.start_target("tcp:10.88.0.2:0", network.launch(1));
    source.set(json!({ "max-bandwidth": 2 << 20 }));
    source.migrate(&target.address());
    source.wait_status("active");
    ip(&format!("-n {} link set cable down", network.names[1])).unwrap();
    source.query("migrate_cancel");
    assert_eq!(source.wait_migration()["status"], "cancelled");
    source.assert_guest_works();
    assert_still_waits(&mut target);
}

fn assert_still_waits(target: &mut Vm) {
    assert_eq!(target.runstate(), "inmigrate");
    target.kill();
}
