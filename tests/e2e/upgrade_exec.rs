//! I1, I3, I4, I7: a VM goes on in the same process, which becomes a new program under the stopped guest; and whatever is wrong with that
//! program leaves it in the old one.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::thread;
use std::time::Duration;

use serde_json::json;

use crate::cli::says;
use crate::harness::{Accel, Chance, Launch, Machine, Vm, program, turn, until};
use crate::listener::Listener;
use crate::proc::Holdings;
use crate::qmp::Qmp;
use crate::storage::Daemon;
use crate::successor::{liar, program_path, script};
use crate::upgrade::{At, scrape};

on_both_accelerators!(
    the_same_process_goes_on_as_the_new_program_with_all_it_had,
    execs_and_transfers_in_turns_leave_nothing_behind,
    a_stopped_guest_stays_stopped_and_its_memory_is_the_same,
    a_disk_of_another_process_keeps_its_connection_through_an_exec,
    what_is_no_new_program_is_refused_before_the_guest_is_stopped,
    a_new_program_that_cannot_go_on_becomes_the_old_one_again,
    a_program_that_was_replaced_after_it_was_asked_is_not_executed,
    a_veto_or_a_cancel_leaves_the_guest_in_the_old_program,
    a_process_killed_at_any_moment_leaves_no_guest_and_no_second_one,
);

/// Rounds of execs and transfers in turns.
const ROUNDS: u32 = 5;
/// Moments at which the process is killed.
const KILLS: u64 = 6;

/// A VM that was upgraded, to be spoken to again.
fn reconnect(vm: &mut Vm) {
    let path = vm.qmp_path();
    vm.qmp = until("somebody answers", || Qmp::connect(&path));
    let events = json!({ "capabilities": [{ "capability": "events", "state": true }] });
    vm.execute("migrate-set-capabilities", events);
}

fn inode(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().ino()
}

fn the_same_process_goes_on_as_the_new_program_with_all_it_had(accel: Accel) {
    let _turn = turn();
    let folder = tempfile::tempdir().unwrap();
    let metrics = folder.path().join("metrics");
    let disk = folder.path().join("disk.raw");
    File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    let launch = Launch::default()
        .with(&["--metrics", &format!("unix:{}", metrics.display())])
        .with(&["--disk", disk.to_str().unwrap(), "--workload-disk"]);
    let mut vm = Machine::small(accel).start_source(launch);
    vm.warm_up();
    let at = At(vm.qmp_path());
    let (pid, path) = (vm.pid(), inode(&at.0));
    let before = Holdings::settled(pid);
    for _ in 0..3 {
        let report = at.upgrade_by("exec");
        assert_eq!(
            (&report["old-pid"], &report["new-pid"]),
            (&json!(pid), &json!(pid))
        );
        for part in ["starting-the-new-program-us", "building-the-machine-us"] {
            assert!(
                report["blackout-parts"][part].as_u64() > Some(0),
                "{report}"
            );
        }
        at.assert_guest_works();
        assert_eq!(inode(&at.0), path, "clients find another socket");
        assert!(scrape(&metrics).starts_with("HTTP/1.1 200"));
        let info = at.ask("query-migrate");
        assert_eq!(info["status"], "completed", "{info}");
        assert!(info["x-blackout"]["total-us"].as_u64() > Some(0), "{info}");
    }
    assert!(vm.lives(), "the process has ended: {}", vm.said());
    let after = Holdings::settled(pid);
    assert_eq!(
        after.populated_bytes, before.populated_bytes,
        "memory was copied or touched"
    );
    let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap();
    assert!(
        environment
            .windows(16)
            .any(|name| name == b"VMFERRY_CPR_EXEC")
    );
    // What the kernel shows is of the exec; the program itself passes the variable on to nobody.
    reconnect(&mut vm);
    vm.execute("quit", json!({}));
    assert_eq!(vm.wait_exit().code(), Some(0), "{}", vm.said());
    assert!(!at.0.exists() && !metrics.exists(), "paths are left behind");
}

fn execs_and_transfers_in_turns_leave_nothing_behind(accel: Accel) {
    let _turn = turn();
    let mut vm = Machine::small(accel).source();
    let at = At(vm.qmp_path());
    let (mut last, _) = at.upgrade();
    vm.wait_exit();
    let mut held = None;
    for _ in 0..ROUNDS {
        let report = at.upgrade_by("exec");
        assert_eq!(report["new-pid"], last.0);
        at.assert_guest_works();
        let (next, _) = at.upgrade();
        until("the old process ends", || (!last.lives()).then_some(()));
        at.assert_guest_works();
        last = next;
        let now = Holdings::settled(last.0).counted();
        assert_eq!(held.get_or_insert_with(|| now.clone()), &now);
    }
    at.upgrade_by("exec");
    let after_exec = Holdings::settled(last.0).counted();
    at.upgrade_by("exec");
    assert_eq!(Holdings::settled(last.0).counted(), after_exec);
}

fn a_stopped_guest_stays_stopped_and_its_memory_is_the_same(accel: Accel) {
    let mut vm = Machine::small(accel).source();
    vm.execute("stop", json!({}));
    let hash = vm.query("x-ram-hash");
    At(vm.qmp_path()).upgrade_by("exec");
    reconnect(&mut vm);
    assert_eq!(vm.runstate(), "paused");
    vm.assert_guest_stopped();
    assert_eq!(vm.query("x-ram-hash"), hash);
    vm.execute("cont", json!({}));
    vm.assert_guest_works();
    // The hash is compared inside the blackout if that is asked for.
    vm.set(json!({"x-verify": true, "mode": "cpr-exec", "cpr-exec-command": command(&vm, &program_path())}));
    vm.execute("migrate", json!({}));
    until("the new program has the guest", || {
        let mut qmp = Qmp::connect(&vm.qmp_path())?;
        let info = qmp.execute("query-migrate", json!({})).ok()?;
        (info["status"] == "completed").then_some(())
    });
    reconnect(&mut vm);
    vm.assert_guest_works();
}

fn a_disk_of_another_process_keeps_its_connection_through_an_exec(accel: Accel) {
    let _turn = turn();
    let folder = tempfile::tempdir().unwrap();
    let image = File::create(folder.path().join("image")).unwrap();
    image.set_len(1 << 20).unwrap();
    let Some(daemon) = Daemon::start(folder.path(), "daemon") else {
        return;
    };
    let disk = format!("vhost-user:{}", daemon.socket().display());
    let launch = Launch::default().with(&["--blk", &disk, "--workload-disk"]);
    let mut vm = Machine::small(accel).start_source(launch);
    vm.warm_up();
    let at = At(vm.qmp_path());
    let blocks = || {
        at.ask("x-query-workload")["disk-blocks-checked"]
            .as_u64()
            .unwrap()
    };
    for _ in 0..3 {
        let before = blocks();
        until("the guest has been over its disk", || {
            (blocks() >= before + 512).then_some(())
        });
        at.upgrade_by("exec");
        at.assert_guest_works();
    }
    assert!(vm.lives());
}

/// The command line of the VM, with another program.
fn command(vm: &Vm, program: &Path) -> Vec<String> {
    let cmdline = std::fs::read(format!("/proc/{}/cmdline", vm.pid())).unwrap();
    let words = cmdline
        .strip_suffix(b"\0")
        .unwrap()
        .split(|byte| *byte == 0);
    let words = words
        .map(|word| String::from_utf8(word.to_vec()).unwrap())
        .skip(1);
    [program.display().to_string()]
        .into_iter()
        .chain(words)
        .collect()
}

fn what_is_no_new_program_is_refused_before_the_guest_is_stopped(accel: Accel) {
    let machine = Machine::small(accel);
    let mut vm = machine.source();
    let path = vm.qmp_path();
    let folder = tempfile::tempdir().unwrap();
    let ours = program_path().display().to_string();
    let silent = script(folder.path(), "silent", "exit 0");
    for (binary, part) in [
        ("/nowhere/vmferry", "/nowhere/vmferry cannot be executed"),
        ("/bin/true", "does not answer"),
        ("/bin/false", "/bin/false"),
        (silent.to_str().unwrap(), "does not answer"),
    ] {
        let said = says(&path, &["upgrade", "--mode", "exec", "--binary", binary], 1);
        assert!(said.contains(part), "{binary}: {said}");
        reconnect(&mut vm);
        vm.assert_guest_works();
    }
    vm.qmp.events.clear();
    for (words, part) in [
        (vec![], "cpr-exec-command"),
        (vec!["run", "--mem", "32M"], "bytes of memory"),
        (vec!["run", "--mem", machine.mem, "--vcpus", "2"], "vcpu/1"),
        (vec!["run", "--no-such-option"], "--no-such-option"),
        (vec!["status"], "--x-cpr-exec-asked"),
    ] {
        let mut command: Vec<_> = words.iter().map(ToString::to_string).collect();
        if !command.is_empty() {
            command.insert(0, ours.clone());
        }
        if command.contains(&"--mem".to_owned()) {
            let more = [
                "--accel",
                machine.accel.name(),
                "--qmp",
                path.to_str().unwrap(),
            ];
            command.extend(more.map(str::to_owned));
        }
        vm.set(json!({"mode": "cpr-exec", "cpr-exec-command": command}));
        let reason = match vm.qmp.execute("migrate", json!({})) {
            Err(refused) => format!("{refused:?}"),
            Ok(_) => vm.wait_migration()["error-desc"].to_string(),
        };
        assert!(reason.contains(part), "{words:?}: {reason}");
    }
    assert!(!vm.qmp.events.iter().any(|event| event["event"] == "STOP"));
    vm.set(json!({"cpr-exec-command": command(&vm, &program_path())}));
    let with_uri = vm.refusal("migrate", json!({"uri": "file:/nowhere/state"}));
    assert!(
        with_uri.contains("leave `uri` and `channels` out"),
        "{with_uri}"
    );
    vm.set(json!({"mode": "normal"}));
    let nowhere = vm.refusal("migrate", json!({}));
    assert!(nowhere.contains("must say where"), "{nowhere}");
    vm.assert_guest_works();
}

fn a_new_program_that_cannot_go_on_becomes_the_old_one_again(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let listener = Listener::new();
    let mut vm = machine.start_source(listener.attend(Launch::default()));
    vm.warm_up();
    let (pid, path) = (vm.pid(), vm.qmp_path());
    let folder = tempfile::tempdir().unwrap();
    let ours = program_path();
    let like = format!(
        "{} run --accel {} --qmp {}",
        ours.display(),
        accel.name(),
        path.display()
    );
    let mut held = None;
    for (then, part) in [
        // Its command line, what was left, the guest's state: each is looked at by another part of the new program.
        (
            format!("exec {} \"$@\" --no-such-option", ours.display()),
            "--no-such-option",
        ),
        (
            format!("exec {} status --qmp {}", ours.display(), path.display()),
            "vmferry run",
        ),
        (
            format!("exec {} \"$@\" --incoming defer", ours.display()),
            "--incoming",
        ),
        (format!("exec {like} --mem 32M"), "bytes of memory"),
        (
            format!("exec {like} --mem {} --vcpus 2", machine.mem),
            "vcpu",
        ),
    ] {
        let liar = liar(folder.path(), &then);
        let heard = listener.heard().len();
        let binary = [
            "upgrade",
            "--mode",
            "exec",
            "--binary",
            liar.to_str().unwrap(),
        ];
        let said = says(&path, &binary, 1);
        assert!(
            said.contains(part) && said.contains("old program"),
            "{then}: {said}"
        );
        let info = At(path.clone()).ask("query-migrate");
        assert_eq!(info["status"], "failed", "{then}: {info}");
        At(path.clone()).assert_guest_works();
        until("the server has heard of it", || {
            let events: Vec<_> = listener.heard()[heard..]
                .iter()
                .map(|one| one.event.clone())
                .filter(|event| event != "incoming-failed")
                .collect();
            (events == ["setup", "failed"]).then_some(())
        });
        let now = Holdings::settled(pid).counted();
        assert_eq!(held.get_or_insert_with(|| now.clone()), &now);
    }
    assert!(vm.lives());
    At(path.clone()).upgrade_by("exec");
    At(path).assert_guest_works();
    listener.assert_order("after upgrades that came back and one that did not");
}

fn pause_before_switchover(vm: &mut Vm, on: bool) {
    let pause = json!([{"capability": "pause-before-switchover", "state": on}]);
    vm.execute("migrate-set-capabilities", json!({ "capabilities": pause }));
}

/// A VM that is about to exec `new`, with its guest stopped.
fn paused_half_way(vm: &mut Vm, new: &Path) {
    pause_before_switchover(vm, true);
    let command = command(vm, new);
    vm.set(json!({"mode": "cpr-exec", "cpr-exec-command": command}));
    vm.execute("migrate", json!({}));
    vm.wait_status("pre-switchover");
}

fn assert_next_works(mut vm: Vm) {
    vm.assert_guest_works();
    pause_before_switchover(&mut vm, false);
    let at = At(vm.qmp_path());
    at.upgrade_by("exec");
    at.assert_guest_works();
}

fn a_program_that_was_replaced_after_it_was_asked_is_not_executed(accel: Accel) {
    let listener = Listener::new();
    let mut vm = Machine::small(accel).start_source(listener.attend(Launch::default()));
    vm.warm_up();
    listener.knows(&vm);
    let folder = tempfile::tempdir().unwrap();
    let new = liar(folder.path(), "exit 9");
    paused_half_way(&mut vm, &new);
    script(folder.path(), "liar", "exit 7");
    vm.execute("migrate-continue", json!({"state": "pre-switchover"}));
    let info = vm.wait_migration();
    vm.assert_failed(&info, "changed since it was asked");
    let heard = listener.heard();
    let events: Vec<_> = heard.iter().map(|one| one.event.as_str()).collect();
    assert_eq!(events, ["setup", "failed"]);
    assert!(
        !heard[1].guest_ran,
        "FAILED comes before the guest runs again"
    );
    assert_next_works(vm);
    listener.assert_order("after the upgrade");
}

fn a_veto_or_a_cancel_leaves_the_guest_in_the_old_program(accel: Accel) {
    let listener = Listener::new();
    let mut vm = Machine::small(accel).start_source(listener.attend(Launch::default()));
    vm.warm_up();
    listener.knows(&vm);
    listener.veto(true);
    let path = vm.qmp_path();
    let said = says(&path, &["upgrade", "--mode", "exec"], 1);
    assert!(said.contains("not now"), "{said}");
    vm.assert_guest_works();
    listener.veto(false);
    paused_half_way(&mut vm, &program_path());
    vm.execute("migrate_cancel", json!({}));
    let info = vm.wait_migration();
    assert_eq!(info["status"], "cancelled", "{info}");
    // While it is being asked.
    let folder = tempfile::tempdir().unwrap();
    let slow = script(folder.path(), "slow", "exec sleep 1000");
    let command = command(&vm, &slow);
    vm.set(json!({"cpr-exec-command": command}));
    vm.execute("migrate", json!({}));
    vm.wait_status("setup");
    vm.execute("migrate_cancel", json!({}));
    let info = vm.wait_migration();
    assert_eq!(info["status"], "cancelled", "{info}");
    assert_next_works(vm);
    listener.assert_order("after the upgrade");
}

/// Processes that were started with this word.
fn processes_with(word: &Path) -> Vec<u32> {
    let word = word.to_str().unwrap().as_bytes();
    let all = std::fs::read_dir("/proc").unwrap().filter_map(Result::ok);
    let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid: &u32| {
        let cmdline = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        cmdline.split(|byte| *byte == 0).any(|found| found == word)
    })
    .collect()
}

fn a_process_killed_at_any_moment_leaves_no_guest_and_no_second_one(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let chance = Chance::new();
    for kill in 0..KILLS {
        let mut vm = machine.source();
        let path = vm.qmp_path();
        let command = command(&vm, &program_path());
        vm.set(json!({"mode": "cpr-exec", "cpr-exec-command": command}));
        vm.execute("migrate", json!({}));
        // From before the question to after the arrival.
        thread::sleep(Duration::from_micros(kill * 4000 + chance.below(4000)));
        vm.kill();
        until("nobody is left", || {
            processes_with(&path).is_empty().then_some(())
        });
        assert!(Qmp::connect(&path).is_none(), "somebody answers");
    }
}

#[test]
fn a_letter_for_another_process_or_none_at_all_is_refused() {
    for (value, part) in [
        ("x", "is no descriptor"),
        ("77", "descriptor 77"),
        ("1", "memfd"),
    ] {
        let output = program()
            .args(["run", "--mem", "8M", "--qmp", "/nowhere/qmp"])
            .env("VMFERRY_CPR_EXEC", value)
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(1));
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.contains(part), "{value}: {said}");
    }
}
