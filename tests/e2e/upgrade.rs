//! I1, I3, I4: a VM moves into a new process on the same host, under the running guest; and whatever goes wrong on the way leaves it where
//! it was.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::cli::says;
use crate::harness::{Accel, Launch, Machine, Vm, turn, until};
use crate::listener::Listener;
use crate::proc::Holdings;
use crate::qmp::Qmp;
use crate::storage::Daemon;
use crate::successor::{Orphan, Waiting, new_pid, upgrade};

on_both_accelerators!(
    the_guest_its_sockets_and_its_output_move_to_the_new_process,
    a_new_program_that_cannot_take_over_leaves_the_guest_where_it_is,
    a_new_process_that_dies_before_the_commit_leaves_the_guest_where_it_is,
    an_old_process_that_dies_before_the_commit_takes_the_new_one_with_it,
    a_disk_of_another_process_keeps_its_connection,
    a_veto_leaves_the_guest_where_it_is_and_nothing_with_an_owner_leaves,
    a_cancelled_upgrade_leaves_the_guest_where_it_is,
    a_new_process_killed_at_any_moment_never_leaves_a_guest_in_two_places,
);

/// Ends a doubt that nobody can end after some seconds.
pub(crate) const SOON: [&str; 2] = ["--x-deadline-scale", "40"];
/// Moments at which the new process is killed.
const KILLS: u32 = 12;

/// A VM at a path, whichever process it is in.
pub(crate) struct At(pub(crate) PathBuf);

impl At {
    pub(crate) fn ask(&self, command: &str) -> Value {
        let mut qmp = until("somebody answers", || Qmp::connect(&self.0));
        qmp.execute(command, json!({})).unwrap()
    }

    pub(crate) fn assert_guest_works(&self) {
        assert_eq!(self.ask("query-status")["status"], "running");
        let passes = || {
            let workload = self.ask("x-query-workload");
            assert_eq!(workload["errors"], 0, "{workload}");
            if let Some(errors) = workload.get("disk-errors") {
                assert_eq!(errors, 0, "{workload}");
            }
            workload["passes"].as_u64().unwrap()
        };
        let before = passes();
        until("the guest makes passes", || {
            (passes() >= before + 2).then_some(())
        });
    }

    pub(crate) fn upgrade(&self) -> (Orphan, Value) {
        let report = self.upgrade_by("transfer");
        (Orphan(new_pid(&report)), report)
    }

    /// Upgrades with this mode.
    pub(crate) fn upgrade_by(&self, mode: &str) -> Value {
        let report = upgrade(&self.0, mode);
        assert_eq!(report["mode"], mode);
        let parts = report["blackout-parts"].as_object().unwrap();
        let sum: u64 = parts.values().map(|part| part.as_u64().unwrap()).sum();
        assert_eq!(Some(sum), report["blackout-us"].as_u64(), "{report}");
        report
    }
}

pub(crate) fn scrape(path: &Path) -> String {
    let mut stream = UnixStream::connect(path).unwrap();
    stream
        .write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

fn the_guest_its_sockets_and_its_output_move_to_the_new_process(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let folder = tempfile::tempdir().unwrap();
    let metrics = folder.path().join("metrics");
    let disk = folder.path().join("disk.raw");
    File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    let launch = Launch::default()
        .with(&["--metrics", &format!("unix:{}", metrics.display())])
        .with(&["--disk", disk.to_str().unwrap(), "--workload-disk"]);
    let mut vm = machine.start_source(launch);
    vm.warm_up();
    let at = At(vm.qmp_path());
    let populated = vm.holdings().populated_bytes;
    let (first, _) = at.upgrade();
    assert_eq!(vm.wait_exit().code(), Some(0), "{}", vm.said());
    at.assert_guest_works();
    assert_eq!(
        Holdings::of(first.0).populated_bytes,
        populated,
        "memory was copied or touched"
    );
    let held = Holdings::settled(first.0);
    assert!(scrape(&metrics).starts_with("HTTP/1.1 200"));
    // A process that was upgraded to is upgraded from like any other, and nothing grows.
    let mut last = first;
    for _ in 0..3 {
        let (next, _) = at.upgrade();
        until("the old process ends", || (!last.lives()).then_some(()));
        at.assert_guest_works();
        last = next;
    }
    held.await_at(last.0);
    assert!(scrape(&metrics).starts_with("HTTP/1.1 200"));
    let said = vm.said();
    assert_eq!(said.matches("took the guest over").count(), 4, "{said}");
    // It removes what it has inherited.
    Qmp::connect(&at.0)
        .unwrap()
        .execute("quit", json!({}))
        .unwrap();
    until("the last process ends", || (!last.lives()).then_some(()));
    assert!(!at.0.exists() && !metrics.exists(), "paths are left behind");
}

/// The sockets that a process has open, by their numbers in the kernel.
fn sockets(pid: u32) -> Vec<String> {
    let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let links = fds.filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok());
    let mut sockets: Vec<_> = links
        .map(|link| link.to_string_lossy().into_owned())
        .filter(|link| link.starts_with("socket:"))
        .collect();
    sockets.sort();
    sockets
}

/// A VM whose guest works on a disk of another process.
pub(crate) struct WithDaemon {
    pub(crate) vm: Vm,
    daemon: Daemon,
    _folder: tempfile::TempDir,
}

impl WithDaemon {
    /// `None` if there is no such program here, which it says.
    pub(crate) fn start(accel: Accel) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let image = File::create(folder.path().join("image")).unwrap();
        image.set_len(1 << 20).unwrap();
        let daemon = Daemon::start(folder.path(), "daemon")?;
        let disk = format!("vhost-user:{}", daemon.socket().display());
        let launch = Launch::default().with(&["--blk", &disk, "--workload-disk"]);
        let mut vm = Machine::small(accel).start_source(launch);
        vm.warm_up();
        Some(Self {
            vm,
            daemon,
            _folder: folder,
        })
    }

    pub(crate) fn at(&self) -> At {
        At(self.vm.qmp_path())
    }

    /// The guest goes over its disk and finds what it wrote.
    pub(crate) fn check_disk(&self) {
        let at = self.at();
        let blocks = || {
            let workload = at.ask("x-query-workload");
            assert_eq!(workload["disk-errors"], 0, "{workload}");
            workload["disk-blocks-checked"].as_u64().unwrap()
        };
        let before = blocks();
        until("the guest has been over its disk", || {
            (blocks() >= before + 512).then_some(())
        });
    }
}

fn a_disk_of_another_process_keeps_its_connection(accel: Accel) {
    let _turn = turn();
    let Some(with) = WithDaemon::start(accel) else {
        return;
    };
    let at = with.at();
    with.check_disk();
    let connected = sockets(with.daemon.pid());
    says(&at.0, &["upgrade", "--binary", "/bin/false"], 1);
    with.check_disk();
    let mut last = None;
    for _ in 0..4 {
        let (next, _) = at.upgrade();
        with.check_disk();
        last = Some(next);
    }
    at.assert_guest_works();
    assert_eq!(
        sockets(with.daemon.pid()),
        connected,
        "the back end saw another connection"
    );
    drop(last);
}

fn a_new_program_that_cannot_take_over_leaves_the_guest_where_it_is(accel: Accel) {
    let mut vm = Machine::small(accel).source();
    let path = vm.qmp_path();
    for binary in ["/nowhere/vmferry", "/bin/false", "/bin/true"] {
        says(&path, &["upgrade", "--binary", binary], 1);
        vm.assert_guest_works();
    }
    let blocker = json!({"reason": "a backup runs", "modes": ["cpr-transfer"]});
    let id = vm.execute("x-add-blocker", blocker)["id"].clone();
    let said = says(&path, &["upgrade"], 1);
    assert!(said.contains("a backup runs"), "{said}");
    vm.execute("x-remove-blocker", json!({ "id": id }));
    vm.assert_guest_works();
    let (_new, _) = At(path).upgrade();
}

/// A process that waits for the VM.
pub(crate) fn waiting(vm: &Vm, machine: &Machine, more: &[&str]) -> Waiting {
    Waiting::on(&vm.qmp_path(), machine, more)
}

/// A VM that is handed over up to the moment before anything has left that has one owner.
fn paused_half_way(machine: &Machine) -> (Vm, Waiting) {
    let mut vm = machine.source();
    let waiting = waiting(&vm, machine, &[]);
    let pause = json!([{"capability": "pause-before-switchover", "state": true}]);
    vm.execute("migrate-set-capabilities", json!({ "capabilities": pause }));
    vm.set(json!({"mode": "cpr-transfer"}));
    vm.execute("migrate", json!({"channels": waiting.channels()}));
    vm.wait_status("pre-switchover");
    (vm, waiting)
}

/// The next upgrade works.
pub(crate) fn assert_upgrades(mut vm: Vm) {
    vm.assert_guest_works();
    let no_pause = json!([{"capability": "pause-before-switchover", "state": false}]);
    vm.execute(
        "migrate-set-capabilities",
        json!({ "capabilities": no_pause }),
    );
    let at = At(vm.qmp_path());
    let (_new, _) = at.upgrade();
    at.assert_guest_works();
}

fn a_new_process_that_dies_before_the_commit_leaves_the_guest_where_it_is(accel: Accel) {
    let (mut vm, mut waiting) = paused_half_way(&Machine::small(accel));
    waiting.kill();
    let info = vm.wait_migration();
    assert_eq!(info["status"], "failed", "{info}");
    assert_upgrades(vm);
}

fn an_old_process_that_dies_before_the_commit_takes_the_new_one_with_it(accel: Accel) {
    let (mut vm, mut waiting) = paused_half_way(&Machine::small(accel));
    vm.kill();
    assert_eq!(waiting.wait_exit().code(), Some(1));
}

fn a_veto_leaves_the_guest_where_it_is_and_nothing_with_an_owner_leaves(accel: Accel) {
    let listener = Listener::new();
    let mut vm = Machine::small(accel).start_source(listener.attend(Launch::default()));
    vm.warm_up();
    listener.knows(&vm);
    listener.veto(true);
    let path = vm.qmp_path();
    let said = says(&path, &["upgrade"], 1);
    assert!(said.contains("not now"), "{said}");
    vm.assert_guest_works();
    let heard = listener.heard();
    let events: Vec<_> = heard.iter().map(|one| one.event.as_str()).collect();
    assert_eq!(
        events,
        ["setup", "failed"],
        "told when the guest was stopped, and once each"
    );
    assert!(
        !heard[1].guest_ran,
        "FAILED comes before the guest runs again"
    );
    listener.veto(false);
    let at = At(path);
    let (_new, _) = at.upgrade();
    at.assert_guest_works();
    listener.assert_order("after the upgrade");
}

fn a_cancelled_upgrade_leaves_the_guest_where_it_is(accel: Accel) {
    let (mut vm, mut waiting) = paused_half_way(&Machine::small(accel));
    vm.execute("migrate_cancel", json!({}));
    let info = vm.wait_migration();
    assert_eq!(info["status"], "cancelled", "{info}");
    assert_eq!(waiting.wait_exit().code(), Some(1));
    assert_upgrades(vm);
}

fn a_new_process_killed_at_any_moment_never_leaves_a_guest_in_two_places(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    // With a disk whose back end must not be confused by a process that dies while it takes it over.
    let folder = tempfile::tempdir().unwrap();
    let image = File::create(folder.path().join("image")).unwrap();
    image.set_len(1 << 20).unwrap();
    let mut daemon = Daemon::start(folder.path(), "daemon");
    let socket = folder.path().join("daemon");
    let disk = format!("vhost-user:{}", socket.display());
    let disk = match &daemon {
        Some(_) => vec!["--blk", &disk, "--workload-disk"],
        None => Vec::new(),
    };
    let start = || {
        let mut vm = machine.start_source(Launch::default().with(&SOON).with(&disk));
        vm.warm_up();
        vm.set(json!({"mode": "cpr-transfer"}));
        vm
    };
    let mut vm = start();
    let mut went_on = 0;
    for kill in 0..KILLS {
        let mut waiting = waiting(&vm, &machine, &[&SOON, &disk[..]].concat());
        vm.qmp.events.clear();
        vm.execute("migrate", json!({"channels": waiting.channels()}));
        // From before the descriptors leave to after the commit.
        if kill >= KILLS / 2 {
            // It may be over already.
            until("the guest is on its way", || {
                ["device", "failed"].contains(&&*vm.status()).then_some(())
            });
        }
        for _ in 0..(kill % (KILLS / 2)) {
            vm.query("query-status");
        }
        waiting.kill();
        let ended = until("it is clear what became of it", || {
            let status = vm.status();
            let events = &vm.qmp.events;
            // COMMIT was sent, and nobody will ever answer.
            let doubt = events
                .iter()
                .any(|event| event["event"] == "x-MIGRATION_UNRESOLVED");
            let over = ["completed", "failed"].contains(&status.as_str());
            (over || doubt).then_some(status)
        });
        if ended != "failed" {
            vm.assert_guest_stopped();
            let refused = vm
                .qmp
                .execute("x-resolve", json!({"outcome": "source-runs"}));
            assert!(
                refused.is_err(),
                "a guest goes on with memory that another process may have used"
            );
            vm.kill();
            if daemon.take().is_some() {
                daemon = Daemon::start(folder.path(), "daemon");
            }
            vm = start();
            continue;
        }
        went_on += 1;
        vm.assert_guest_works();
        if daemon.is_some() {
            let checked = |vm: &mut Vm| {
                let workload = vm.query("x-query-workload");
                assert_eq!(workload["disk-errors"], 0, "{workload}");
                workload["disk-blocks-checked"].as_u64().unwrap()
            };
            let before = checked(&mut vm);
            until("the guest goes on with its disk", || {
                (checked(&mut vm) > before + 8).then_some(())
            });
        }
    }
    assert!(went_on > 0, "every kill came too late");
}

#[test]
fn what_is_no_upgrade_is_refused_before_anything_happens() {
    let machine = Machine::small(Accel::Soft);
    let mut vm = machine.source();
    vm.set(json!({"mode": "cpr-transfer"}));
    let unix = |name: &str| json!({"transport": "socket", "type": "unix", "path": name});
    let tcp = json!({"transport": "socket", "type": "inet", "host": "127.0.0.1", "port": "1"});
    let channel = |kind: &str, addr: &Value| json!({"channel-type": kind, "addr": addr});
    for (channels, part) in [
        (json!([channel("main", &unix("/nowhere/m"))]), "type `cpr`"),
        (
            json!([channel("main", &tcp), channel("cpr", &unix("/nowhere/c"))]),
            "unix socket",
        ),
        (
            json!([channel("main", &unix("/nowhere/m")), channel("cpr", &tcp)]),
            "unix socket",
        ),
    ] {
        let reason = vm.refusal("migrate", json!({ "channels": channels }));
        assert!(reason.contains(part), "{reason}");
    }
    let channels = json!([
        channel("main", &unix("/nowhere/m")),
        channel("cpr", &unix("/nowhere/c"))
    ]);
    vm.qmp.events.clear();
    vm.execute("migrate", json!({ "channels": channels }));
    let info = vm.wait_migration();
    vm.assert_failed(&info, "/nowhere/c");
    // A process for a VM of another size says so, and the guest was not stopped for it.
    let mut waiting = waiting(
        &vm,
        &Machine {
            mem: "32M",
            ..machine
        },
        &[],
    );
    vm.qmp.events.clear();
    vm.execute("migrate", json!({"channels": waiting.channels()}));
    let info = vm.wait_migration();
    vm.assert_failed(&info, "bytes of memory");
    assert!(!vm.qmp.events.iter().any(|event| event["event"] == "STOP"));
    assert_eq!(waiting.wait_exit().code(), Some(1));
}
