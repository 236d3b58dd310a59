//! One guest with all that it can have here, through many processes: nothing is lost, and the last process holds what the first new one
//! held.

use std::fs::File;
use std::path::Path;

use serde_json::json;

use crate::harness::{Accel, Launch, Machine, until};
use crate::line::Line;
use crate::proc::Holdings;
use crate::qmp::Qmp;
use crate::storage::Daemon;
use crate::successor::{Orphan, new_pid, upgrade};
use crate::tap::{Bridge, Echo};

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

/// Takes one guest through `count` processes, in the modes by turns, while packets go to it and come back. The lab has no storage daemon;
/// elsewhere there may be no right to make a tap.
pub(crate) fn upgrade_again_and_again(accel: Accel, count: u64, in_lab: bool) {
    let folder = tempfile::tempdir().unwrap();
    let image = File::create(folder.path().join("image")).unwrap();
    image.set_len(1 << 20).unwrap();
    let (daemon, network) = match in_lab {
        false => (Daemon::start(folder.path(), "daemon"), Bridge::new(1)),
        true => (None, Some(Bridge::new(1).unwrap())),
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
    if let Some(network) = &network {
        // Only the first process is where the tap is.
        launch = network.launch(launch, 0);
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
    let echo = network.as_ref().map(Echo::start);
    let mut announced = 0;
    for number in 0..count {
        let mode = modes[usize::try_from(number).unwrap() % modes.len()];
        of_modes[mode as usize] += 1;
        let before = work(&qmp);
        let answers_before = echo.as_ref().map_or(0, Echo::answers);
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
            let on_tap = echo
                .as_ref()
                .is_none_or(|echo| echo.answers() >= answers_before + 5);
            (now.passes >= before.passes + 2 && on_disk && on_tap).then_some(())
        });
        if network.is_some() {
            let mut monitor = until("somebody answers", || Qmp::connect(&qmp));
            let once = json!({"rounds": 1, "initial": 50, "max": 550, "step": 50});
            monitor.execute("announce-self", once).unwrap();
            announced += 1;
        }
        match first.iter().find(|(of, _)| *of == mode) {
            None => first.push((mode, Holdings::settled(pid))),
            Some((_, first)) => {
                // What is only on its way out may take a while on a busy host.
                let holds = until(
                    format_args!("upgrade {number} holds no more than {first:?}"),
                    || {
                        let holds = Holdings::settled(pid);
                        holds.is_within(first).then_some(holds)
                    },
                );
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
    if let (Some(network), Some(echo)) = (&network, echo) {
        let sent = echo.finish();
        // Besides the answers there is nothing but what was announced.
        until("the last announcement", || {
            (network.received(0) >= sent + announced).then_some(())
        });
        assert_eq!(network.received(0), sent + announced);
        println!("{sent} packets to the guest and back, each once; {announced} announcements");
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
