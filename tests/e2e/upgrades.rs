//! One guest with all that it can have here, through many processes: nothing is lost, and the last process holds what the first new one
//! held.

use std::fs::File;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::harness::{Accel, Launch, Machine, until};
use crate::line::Line;
use crate::proc::Holdings;
use crate::qmp::Qmp;
use crate::storage::Daemon;
use crate::successor::{Orphan, new_pid, upgrade};

/// What the heap of a process may grow by, in all.
const HEAP_NOISE: u64 = 8 << 20;

/// How a guest changes its process.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Mode {
    Transfer,
    Exec,
}

impl Mode {
    fn name(self) -> &'static str {
        match self {
            Self::Transfer => "transfer",
            Self::Exec => "exec",
        }
    }
}

/// A tap in a network namespace, where this process may make one and the kernel moves packets. Gone on drop.
struct Tap {
    namespace: String,
}

impl Tap {
    const NAME: &'static str = "guest";

    fn new() -> Result<Self, String> {
        File::open("/dev/vhost-net").map_err(|error| format!("/dev/vhost-net: {error}"))?;
        let tap = Self {
            namespace: format!("vmfup{}", std::process::id()),
        };
        tap.ip(&format!("netns add {}", tap.namespace))?;
        let tuntap = format!("tuntap add {} mode tap vnet_hdr", Self::NAME);
        tap.ip(&format!("-n {} {tuntap}", tap.namespace))?;
        tap.ip(&format!("-n {} link set {} up", tap.namespace, Self::NAME))?;
        Ok(tap)
    }

    fn ip(&self, words: &str) -> Result<String, String> {
        let output = Command::new("ip").args(words.split(' ')).output();
        let output = output.map_err(|error| format!("ip: {error}"))?;
        match output.status.success() {
            true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
            false => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
        }
    }

    /// Packets that the host has received from the guest's side.
    fn received(&self) -> u64 {
        let words = format!("-n {} -s -j link show {}", self.namespace, Self::NAME);
        let shown: Value = serde_json::from_str(&self.ip(&words).unwrap()).unwrap();
        shown[0]["stats64"]["rx"]["packets"].as_u64().unwrap()
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        // With all that is in it.
        let _ = self.ip(&format!("netns del {}", self.namespace));
    }
}

/// What the guest has done so far, by its own account.
#[derive(Clone, Copy, Debug)]
struct Work {
    passes: u64,
    blocks: u64,
}

fn work(qmp: &Path) -> Work {
    let mut qmp = until("somebody answers", || Qmp::connect(qmp));
    let status = qmp.execute("query-status", json!({})).unwrap();
    assert_eq!(status["status"], "running", "{status}");
    let said = qmp.execute("x-query-workload", json!({})).unwrap();
    assert_eq!(said["errors"], 0, "{said}");
    assert_eq!(said["disk-errors"].as_u64().unwrap_or(0), 0, "{said}");
    Work {
        passes: said["passes"].as_u64().unwrap(),
        blocks: said["disk-blocks-checked"].as_u64().unwrap_or(0),
    }
}

/// Takes one guest through `count` processes, in the modes by turns. The lab has a tap and no storage daemon; elsewhere it is the other way
/// round, and a tap too where the kernel has vhost-net.
pub(crate) fn upgrade_again_and_again(accel: Accel, count: u64, in_lab: bool) {
    let folder = tempfile::tempdir().unwrap();
    let image = File::create(folder.path().join("image")).unwrap();
    image.set_len(1 << 20).unwrap();
    let (daemon, tap) = match in_lab {
        false => {
            let tap = Tap::new().inspect_err(|error| println!("no tap, the lab has one: {error}"));
            (Daemon::start(folder.path(), "daemon"), tap.ok())
        }
        true => (None, Some(Tap::new().unwrap())),
    };
    let mut line = Line::new(folder.path());
    let machine = Machine {
        vcpus: 2,
        ..Machine::small(accel)
    };
    let mut launch = Launch::default().with(&["--serial", line.path(), "--workload-serial"]);
    if let Some(daemon) = &daemon {
        let disk = format!("vhost-user:{}", daemon.socket().display());
        launch = launch.with(&["--blk", &disk, "--workload-disk"]);
    }
    if let Some(tap) = &tap {
        let net = format!("tap={}", Tap::NAME);
        // Only the first process is where the tap is.
        let there = ["ip", "netns", "exec", tap.namespace.as_str()];
        launch = launch.through(&there).with(&["--net", &net]);
    }
    let mut vm = machine.start_source(launch);
    line.remove();
    let heard_until_warm = std::thread::scope(|scope| {
        let warm = scope.spawn(|| vm.warm_up());
        until("the guest is warm", || {
            line.heard();
            warm.is_finished().then_some(())
        });
        warm.join().unwrap();
        line.heard()
    });
    println!("{heard_until_warm} digits while it warmed up");
    let qmp = vm.qmp_path();
    let modes = [Mode::Transfer, Mode::Exec];
    let mut of_modes = [0, 0];
    let mut last: Option<Orphan> = None;
    let mut first: Vec<(Mode, Holdings)> = Vec::new();
    let mut blackouts = Vec::new();
    let mut announced = tap.as_ref().map_or(0, Tap::received);
    for number in 0..count {
        let mode = modes[usize::try_from(number).unwrap() % modes.len()];
        of_modes[mode as usize] += 1;
        let before = work(&qmp);
        let report = upgrade(&qmp, mode.name());
        blackouts.push(report["blackout-us"].as_u64().unwrap());
        let pid = new_pid(&report);
        match &last {
            // It is the same process.
            Some(same) if same.0 == pid => assert_eq!(mode, Mode::Exec),
            Some(old) => {
                until("the old process ends", || (!old.lives()).then_some(()));
                last = Some(Orphan(pid));
            }
            None => {
                if mode == Mode::Transfer {
                    assert_eq!(vm.wait_exit().code(), Some(0), "{}", vm.said());
                }
                last = Some(Orphan(pid));
            }
        }
        line.hear_more(2);
        until("the guest goes on", || {
            line.heard();
            let now = work(&qmp);
            let on_disk = daemon.is_none() || now.blocks > before.blocks;
            (now.passes >= before.passes + 2 && on_disk).then_some(())
        });
        if let Some(tap) = &tap {
            let mut monitor = until("somebody answers", || Qmp::connect(&qmp));
            let once = json!({"rounds": 1, "initial": 50, "max": 550, "step": 50});
            monitor.execute("announce-self", once).unwrap();
            announced += 1;
            until("the announcement", || {
                (tap.received() >= announced).then_some(())
            });
            assert_eq!(tap.received(), announced, "the network heard more");
        }
        let holds = Holdings::settled(pid);
        match first.iter().find(|(of, _)| *of == mode) {
            None => first.push((mode, holds)),
            Some((_, first)) => {
                assert_eq!(first.counted(), holds.counted(), "upgrade {number}");
                assert!(
                    holds.anon_bytes <= first.anon_bytes + HEAP_NOISE,
                    "upgrade {number}: {first:?} {holds:?}"
                );
                assert_eq!(
                    first.populated_bytes, holds.populated_bytes,
                    "upgrade {number}"
                );
            }
        }
    }
    blackouts.sort_unstable();
    let at = |part: usize| blackouts[(blackouts.len() - 1) * part / 100];
    println!(
        "{} transfers, {} execs: blackout {} us (median), {} us (99 %), {} us (longest); {} digits",
        of_modes[0],
        of_modes[1],
        at(50),
        at(99),
        at(100),
        line.heard()
    );
    println!(
        "the last process: {:?}",
        last.as_ref().map(|last| Holdings::of(last.0))
    );
    println!("the first: {first:?}");
}
