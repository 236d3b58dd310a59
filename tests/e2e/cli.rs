//! The command line without a terminal, as scripts use it: every command, its exit status, and what it says when something is wrong.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Output, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::harness::{Accel, Machine, PATIENCE, Vm, program, until};

/// Sends a signal to a process of ours.
pub(crate) fn send(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(pid.cast_signed()).unwrap();
    kill_process(pid, signal).unwrap();
}

/// Runs a command on the VM behind `path`.
pub(crate) fn vmferry(path: &Path, command: &[&str]) -> Output {
    let (name, rest) = command.split_first().unwrap();
    let mut with = program();
    with.arg(name).arg("--qmp").arg(path).args(rest);
    with.stdin(Stdio::null()).output().unwrap()
}

/// The same; it must end with `code`. Returns both outputs together.
pub(crate) fn says(path: &Path, command: &[&str], code: i32) -> String {
    let output = vmferry(path, command);
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8(said).unwrap();
    assert_eq!(output.status.code(), Some(code), "{command:?}: {said}");
    said
}

/// The same for commands that print JSON.
pub(crate) fn json_of(path: &Path, command: &[&str]) -> Value {
    let said = says(path, command, 0);
    serde_json::from_str(&said).unwrap_or_else(|_| panic!("{command:?}: {said}"))
}

/// A source whose migration goes on until something is done about it, and who follows it. Kept together with the target.
struct Followed {
    source: Vm,
    _target: Vm,
    follower: Child,
}

impl Followed {
    fn new(more: &[&str]) -> Self {
        let machine = Machine::small(Accel::Soft);
        let (mut source, mut target) = (machine.source(), machine.target());
        source.set(json!({ "max-bandwidth": 1 << 20 }));
        let mut follower = follower(&source.qmp_path(), &target.address(), more);
        wait_for_line(&mut follower, "round 1");
        Self {
            source,
            _target: target,
            follower,
        }
    }

    /// How the follower ends.
    fn end(&mut self) -> i32 {
        let status = until("the follower ends", || self.follower.try_wait().unwrap());
        status.code().unwrap()
    }

    /// What it has said since it began to follow.
    fn said(&mut self) -> String {
        let mut said = String::new();
        let mut errors = self.follower.stderr.take().unwrap();
        errors.read_to_string(&mut said).unwrap();
        said
    }
}

impl Drop for Followed {
    fn drop(&mut self) {
        // Both fail only if it has gone already.
        let _ = self.follower.kill();
        let _ = self.follower.wait();
    }
}

fn follower(path: &Path, address: &str, more: &[&str]) -> Child {
    let mut command = program();
    command.arg("migrate").arg("--qmp").arg(path).arg(address);
    command
        .args(more)
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    command.stderr(Stdio::piped()).spawn().unwrap()
}

/// Reads what a process says until a line begins with `part`. One byte at a time, so that nothing after it is taken.
fn wait_for_line(child: &mut Child, part: &str) {
    let (mut line, mut byte) = (String::new(), [0]);
    let said = child.stderr.as_mut().unwrap();
    let deadline = Instant::now() + PATIENCE;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).unwrap();
        let ready = poll(&mut [PollFd::new(&*said, PollFlags::IN)], Some(&left)).unwrap();
        assert!(ready > 0, "waited in vain for {part:?}, after {line:?}");
        if said.read(&mut byte).unwrap() == 0 {
            break;
        }
        match byte[0] {
            b'\n' if line.starts_with(part) => return,
            b'\n' => line.clear(),
            other => line.push(char::from(other)),
        }
    }
    panic!("it ended without {part:?}, and with {line:?}");
}

#[test]
fn parameters_are_set_and_shown_in_units_of_people() {
    let mut source = Machine::small(Accel::Soft).start_source(Default::default());
    let path = source.qmp_path();
    let said = says(
        &path,
        &[
            "set",
            "max-bandwidth=100M",
            "downtime-limit=2s",
            "x-verify=on",
        ],
        0,
    );
    assert!(
        said.contains("max-bandwidth = 100 MiB/s (was 0 (no limit))"),
        "{said}"
    );
    assert!(
        said.contains("downtime-limit = 2000 ms (was 300 ms)"),
        "{said}"
    );
    let now = source.query("query-migrate-parameters");
    assert_eq!(now["max-bandwidth"], 100 << 20);
    assert_eq!(
        (&now["downtime-limit"], &now["x-verify"]),
        (&json!(2000), &json!(true))
    );
    assert_eq!(json_of(&path, &["set", "--json"]), now);
    let said = says(&path, &["set"], 0);
    assert!(
        said.lines()
            .any(|l| l.starts_with("multifd-channels ") && l.ends_with(" 2")),
        "{said}"
    );
    // One bad value, and nothing is set.
    for (bad, part) in [
        ("multifd-channels=0", "multifd-channels"),
        (
            "nonsense=1",
            "has no migration parameter `nonsense`; it has ",
        ),
        ("multifd-channels=many", "a whole number"),
        ("max-bandwidth=quick", "like 512M"),
    ] {
        let said = says(&path, &["set", "downtime-limit=5", bad], 1);
        assert!(said.contains(part), "{said}");
        assert_eq!(source.query("query-migrate-parameters"), now);
    }
    assert!(says(&path, &["set", "downtime-limit"], 2).contains("NAME=VALUE"));
}

#[test]
fn capabilities_are_switched_and_shown() {
    let mut source = Machine::small(Accel::Soft).start_source(Default::default());
    let path = source.qmp_path();
    let said = says(&path, &["capabilities", "events=on", "xbzrle=off"], 0);
    assert_eq!(said.trim(), "on   events\noff  xbzrle");
    let known = json_of(&path, &["capabilities", "--json"]);
    assert_eq!(known, source.query("query-migrate-capabilities"));
    let all = says(&path, &["capabilities"], 0);
    assert!(all.contains("on   return-path"), "{all}");
    for (bad, part) in [
        (
            "nonsense=on",
            "has no migration capability `nonsense`; it has ",
        ),
        ("multifd=off", "multifd"),
    ] {
        let said = says(&path, &["capabilities", "events=off", bad], 1);
        assert!(said.contains(part), "{said}");
        assert_eq!(source.query("query-migrate-capabilities"), known);
    }
    assert!(says(&path, &["capabilities", "events"], 2).contains("NAME=on"));
}

#[test]
fn a_deferred_target_is_told_where_to_listen() {
    let machine = Machine::small(Accel::Soft);
    let (mut source, mut target) = (machine.source(), machine.target_at("defer"));
    let path = target.qmp_path();
    let said = says(&path, &["incoming", "tcp:127.0.0.1:0"], 0);
    let address = said.trim().strip_prefix("waiting for a guest at ").unwrap();
    assert_eq!(address, target.address());
    let said = says(&path, &["incoming", "tcp:127.0.0.1:0"], 1);
    assert!(said.contains("refused `migrate-incoming`"), "{said}");
    source.migrate(address);
    assert_eq!(source.wait_migration()["status"], "completed");
    assert!(says(&path, &["status"], 0).contains("completed"));
}

#[test]
fn a_migration_that_waits_before_its_switchover_is_continued_or_cancelled() {
    let machine = Machine::small(Accel::Soft);
    let (mut source, target) = (machine.source(), machine.target());
    let path = source.qmp_path();
    says(&path, &["capabilities", "pause-before-switchover=on"], 0);
    let mut target = target;
    says(&path, &["migrate", "--detach", &target.address()], 0);
    source.wait_status("pre-switchover");
    let record = json_of(&path, &["cancel", "--json"]);
    assert_eq!(record["status"], "cancelled", "{record}");
    source.assert_guest_works();
    let said = says(&path, &["continue"], 1);
    assert!(said.contains("refused `migrate-continue`"), "{said}");

    let mut target = machine.target();
    source.qmp.events.clear();
    let record = json_of(&path, &["migrate", "--detach", "--json", &target.address()]);
    assert!(record["status"].is_string(), "{record}");
    source.wait_status("pre-switchover");
    says(&path, &["continue", "--state", "device"], 1);
    assert_eq!(source.status(), "pre-switchover");
    assert!(says(&path, &["continue"], 0).contains("goes on"));
    assert_eq!(source.wait_migration()["status"], "completed");
    target.assert_guest_works();
}

#[test]
fn commands_with_nothing_to_do_say_so() {
    let mut source = Machine::small(Accel::Soft).start_source(Default::default());
    let path = source.qmp_path();
    assert!(says(&path, &["cancel"], 0).contains("no migration under way"));
    assert_eq!(
        json_of(&path, &["cancel", "--json"]),
        source.query("query-migrate")
    );
    let said = says(&path, &["resolve", "source-runs"], 1);
    assert!(said.contains("in doubt"), "{said}");
    assert!(says(&path, &["resolve", "both-run"], 2).contains("source-runs"));
    let said = says(Path::new("/nowhere/qmp"), &["cancel"], 1);
    assert!(
        said.contains("no VM can be reached at /nowhere/qmp"),
        "{said}"
    );
}

#[test]
fn somebody_else_may_cancel_what_is_followed() {
    let mut followed = Followed::new(&[]);
    let path = followed.source.qmp_path();
    assert_eq!(says(&path, &["cancel"], 0).trim(), "cancelled");
    assert_eq!(followed.end(), 3);
    followed.source.assert_guest_works();
}

#[test]
fn a_migration_that_hangs_is_yanked_and_the_guest_goes_on() {
    let mut followed = Followed::new(&[]);
    let path = followed.source.qmp_path();
    let said = says(&path, &["yank"], 0);
    assert!(
        said.contains("connections of the migration are shut"),
        "{said}"
    );
    assert_eq!(followed.end(), 1);
    let said = followed.said();
    assert!(said.contains("migration failed: "), "{said}");
    assert!(said.contains("goes on running at the source"), "{said}");
    followed.source.assert_guest_works();
    assert!(says(&path, &["yank"], 0).contains("no migration to yank"));
}

#[test]
fn only_post_copy_is_paused() {
    let mut followed = Followed::new(&[]);
    let path = followed.source.qmp_path();
    let said = says(&path, &["pause"], 1);
    assert!(said.contains("refused `migrate-pause`"), "{said}");
    assert_eq!(followed.source.status(), "active");
}

#[test]
fn without_a_terminal_signals_detach_and_the_migration_goes_on() {
    for (signal, code) in [(Signal::INT, 130), (Signal::TERM, 143), (Signal::HUP, 129)] {
        let mut followed = Followed::new(&[]);
        send(followed.follower.id(), signal);
        assert_eq!(followed.end(), code);
        let said = followed.said();
        assert!(said.contains("detached; the migration goes on"), "{said}");
        assert_eq!(followed.source.status(), "active");
    }
}

#[test]
fn a_script_may_have_an_interrupt_cancel() {
    let mut followed = Followed::new(&["--on-interrupt", "cancel"]);
    send(followed.follower.id(), Signal::INT);
    assert_eq!(followed.end(), 3);
    assert_eq!(followed.source.status(), "cancelled");
    followed.source.assert_guest_works();
}

#[test]
fn a_vm_that_dies_under_its_follower_is_told_apart_from_a_failure() {
    let mut followed = Followed::new(&[]);
    followed.source.kill();
    assert_eq!(followed.end(), 4);
    let said = followed.said();
    assert!(said.contains("hung up"), "{said}");
    assert!(
        said.contains("Before starting the guest anywhere"),
        "{said}"
    );
}

#[test]
fn a_vm_that_is_slow_to_answer_is_waited_for() {
    let mut followed = Followed::new(&[]);
    send(followed.source.pid(), Signal::STOP);
    wait_for_line(
        &mut followed.follower,
        "vmferry: the VM has not answered for",
    );
    // It can still be left.
    send(followed.source.pid(), Signal::CONT);
    followed.source.execute("migrate_cancel", json!({}));
    assert_eq!(followed.end(), 3);

    let mut followed = Followed::new(&[]);
    send(followed.source.pid(), Signal::STOP);
    wait_for_line(
        &mut followed.follower,
        "vmferry: the VM has not answered for",
    );
    send(followed.follower.id(), Signal::INT);
    assert_eq!(followed.end(), 130);
    send(followed.source.pid(), Signal::CONT);
}

#[test]
fn many_may_follow_at_once_and_all_see_the_end() {
    let mut followed = Followed::new(&[]);
    let path = followed.source.qmp_path();
    let watch = |path: &Path| {
        let mut command = program();
        command
            .args(["status", "--watch", "--json", "--qmp"])
            .arg(path);
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        command.spawn().unwrap()
    };
    let mut others: Vec<_> = (0..4).map(|_| watch(&path)).collect();
    let mut lines: Vec<_> = others
        .iter_mut()
        .map(|child| BufReader::new(child.stdout.take().unwrap()).lines())
        .collect();
    for lines in &mut lines {
        let first: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
        assert_eq!(first["migration"]["status"], "active", "{first}");
        assert_eq!(first["status"]["running"], true, "{first}");
    }
    followed.source.set(json!({ "max-bandwidth": 0 }));
    for (mut child, lines) in others.into_iter().zip(lines) {
        let last: Value = serde_json::from_str(&lines.last().unwrap().unwrap()).unwrap();
        assert_eq!(last["migration"]["status"], "completed", "{last}");
        assert_eq!(child.wait().unwrap().code(), Some(0));
    }
    assert_eq!(followed.end(), 0);
}

/// A QMP socket before a VM's, which breaks its connections whenever it is told to.
fn monitor_before(vm: &Path, here: &Path) -> Sender<()> {
    let listener = UnixListener::bind(here).unwrap();
    let (cut, cuts) = channel();
    let vm = vm.to_owned();
    thread::spawn(move || {
        for client in listener.incoming() {
            let (client, server) = (client.unwrap(), UnixStream::connect(&vm).unwrap());
            for (mut from, mut to) in [(&client, &server), (&server, &client)]
                .map(|(a, b)| (a.try_clone().unwrap(), b.try_clone().unwrap()))
            {
                thread::spawn(move || {
                    let mut bytes = [0; 4096];
                    while let Ok(count @ 1..) = from.read(&mut bytes) {
                        if to.write_all(&bytes[..count]).is_err() {
                            break;
                        }
                    }
                });
            }
            if cuts.recv().is_err() {
                return;
            }
            for stream in [client, server] {
                // Fails only if the other end has gone.
                let _ = stream.shutdown(std::net::Shutdown::Both);
            }
        }
    });
    cut
}

#[test]
fn a_follower_whose_monitor_is_cut_comes_back() {
    let machine = Machine::small(Accel::Soft);
    let (mut source, mut target) = (machine.source(), machine.target());
    source.set(json!({ "max-bandwidth": 1 << 20 }));
    let here = source.dir().join("before");
    let cut = monitor_before(&source.qmp_path(), &here);
    let mut child = follower(&here, &target.address(), &[]);
    for _ in 0..3 {
        wait_for_line(&mut child, "round ");
        cut.send(()).unwrap();
    }
    wait_for_line(&mut child, "round ");
    source.set(json!({ "max-bandwidth": 0 }));
    let status = until("the follower ends", || child.try_wait().unwrap());
    assert_eq!(status.code(), Some(0));
    target.assert_guest_works();
}

#[test]
fn what_a_peer_says_cannot_write_on_the_terminal() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let listener = UnixListener::bind(&path).unwrap();
    let server = thread::spawn(move || {
        let (mut client, _) = listener.accept().unwrap();
        client
            .write_all(b"{\"QMP\": {\"version\": {\"qemu\": {\"major\": 10, \"minor\": 0, \"micro\": 2}, \"package\": \"\"}, \"capabilities\": []}}\n")
            .unwrap();
        let mut lines = BufReader::new(client.try_clone().unwrap()).lines();
        for number in 0.. {
            let Some(Ok(line)) = lines.next() else { return };
            let asked: Value = serde_json::from_str(&line).unwrap();
            let answer = match asked["execute"].as_str().unwrap() {
                "query-migrate" => {
                    json!({"status": "failed", "error-desc": "no\u{1b}[2Jroom\u{202e}"})
                }
                _ => json!({"status": "run\u{1b}]0;x\u{7}ning", "running": true}),
            };
            let answer = json!({ "return": answer, "id": number });
            if client.write_all(format!("{answer}\n").as_bytes()).is_err() {
                return;
            }
        }
    });
    let said = says(&path, &["status"], 0);
    assert!(said.contains("no [2Jroom"), "{said}");
    assert!(!said.contains(['\u{1b}', '\u{7}', '\u{202e}']), "{said:?}");
    server.join().unwrap();
}
