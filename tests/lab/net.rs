//! Several hosts in one kernel: network namespaces with cables between them that delay, lose and cut, and tap devices.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::command::{attempt, run};
use crate::harness::Launch;
use crate::modules::load;

/// Two hosts with a cable between them, 10.99.0.1 and 10.99.0.2. Gone on drop.
pub(crate) struct Hosts {
    names: [String; 2],
}

/// What the cable is called at either end.
const CABLE: &str = "cable";

impl Hosts {
    pub(crate) fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(1);
        load("veth");
        load("sch_netem");
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let hosts = Self {
            names: ["a", "b"].map(|side| format!("host{number}{side}")),
        };
        let [a, b] = &hosts.names;
        ip(&format!("netns add {a}"));
        ip(&format!("netns add {b}"));
        ip(&format!(
            "link add {CABLE} netns {a} type veth peer name {CABLE} netns {b}"
        ));
        for (side, name) in hosts.names.iter().enumerate() {
            let address = hosts.address(side);
            ip(&format!("-n {name} addr add {address}/24 dev {CABLE}"));
            ip(&format!("-n {name} link set {CABLE} up"));
            ip(&format!("-n {name} link set lo up"));
        }
        hosts
    }

    /// Address of host 0 or 1.
    pub(crate) fn address(&self, side: usize) -> String {
        format!("10.99.0.{}", side + 1)
    }

    /// Starts a program of ours at host 0 or 1.
    pub(crate) fn launch(&self, side: usize) -> Launch {
        Launch::default().through(&["ip", "netns", "exec", &self.names[side]])
    }

    /// Runs a program at host 0 or 1; what it complained of if it failed.
    pub(crate) fn run_at(&self, side: usize, command: &str) -> Result<String, String> {
        let arguments = format!("netns exec {} {command}", self.names[side]);
        let arguments: Vec<_> = arguments.split(' ').collect();
        attempt("ip", &arguments)
    }

    /// What happens to packets that leave host 0 or 1, as `tc` says it: `delay 10ms loss 1%`, `loss 100%`. Replaces what was said before.
    pub(crate) fn disturb(&self, side: usize, how: &str) {
        let arguments = format!(
            "-n {} qdisc replace dev {CABLE} root netem {how}",
            self.names[side]
        );
        let arguments: Vec<_> = arguments.split(' ').collect();
        run("tc", &arguments);
    }

    /// Plugs the cable in or out.
    pub(crate) fn plug(&self, plugged: bool) {
        let state = if plugged { "up" } else { "down" };
        ip(&format!("-n {} link set {CABLE} {state}", self.names[0]));
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for name in &self.names {
            let _ = attempt("ip", &["netns", "del", name]);
        }
    }
}

/// A tap device, which a VMM opens by its name. Gone on drop.
pub(crate) struct Tap {
    name: String,
}

impl Tap {
    /// One that is up and has an address at our end, such as `10.98.0.1/24`.
    pub(crate) fn new(address: &str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(1);
        load("tun");
        let name = format!("tap{}", COUNT.fetch_add(1, Ordering::Relaxed));
        ip(&format!("tuntap add {name} mode tap vnet_hdr"));
        let tap = Self { name };
        ip(&format!("addr add {address} dev {}", tap.name));
        ip(&format!("link set {} up", tap.name));
        tap
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let _ = attempt("ip", &["link", "del", &self.name]);
    }
}

fn ip(arguments: &str) {
    let arguments: Vec<_> = arguments.split(' ').collect();
    run("ip", &arguments);
}
