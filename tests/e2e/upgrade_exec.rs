//! I1, I3, I4: a VM goes on in the same process, which becomes a new program under the stopped guest. What happens if something is wrong
//! with that program, or happens meanwhile, is in the table of `upgrade_faults/exec`.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde_json::json;

use crate::cli::says;
use crate::harness::{Accel, Launch, Machine, Vm, program, turn, until};
use crate::proc::Holdings;
use crate::qmp::Qmp;
use crate::stand_in::{command, liar, program_path};
use crate::upgrade::{At, WithDaemon, scrape};

on_both_accelerators!(
    the_same_process_goes_on_as_the_new_program_with_all_it_had,
    execs_and_transfers_in_turns_leave_nothing_behind,
    a_stopped_guest_stays_stopped_and_its_memory_is_the_same,
    a_disk_of_another_process_keeps_its_connection_through_an_exec,
    a_command_that_would_not_go_on_says_why_before_the_guest_is_stopped,
    a_program_that_lied_and_is_another_command_becomes_the_old_one_again,
);

/// Rounds of execs and transfers in turns.
const ROUNDS: u32 = 5;

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
        Holdings::await_at_first(&mut held, last.0);
    }
    at.upgrade_by("exec");
    let after_exec = Holdings::settled(last.0);
    at.upgrade_by("exec");
    after_exec.await_at(last.0);
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
    let Some(mut with) = WithDaemon::start(accel) else {
        return;
    };
    let at = with.at();
    for _ in 0..3 {
        with.check_disk();
        at.upgrade_by("exec");
        at.assert_guest_works();
    }
    assert!(with.vm.lives());
}

fn a_command_that_would_not_go_on_says_why_before_the_guest_is_stopped(accel: Accel) {
    let machine = Machine::small(accel);
    let mut vm = machine.source();
    let path = vm.qmp_path();
    let ours = program_path().display().to_string();
    vm.qmp.events.clear();
    for (words, part) in [
        (vec![], "cpr-exec-command"),
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

fn a_program_that_lied_and_is_another_command_becomes_the_old_one_again(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let mut vm = machine.source();
    let (pid, path) = (vm.pid(), vm.qmp_path());
    let folder = tempfile::tempdir().unwrap();
    let ours = program_path();
    let mut held = None;
    for (then, part) in [
        (
            format!("exec {} status --qmp {}", ours.display(), path.display()),
            "vmferry run",
        ),
        (
            format!("exec {} \"$@\" --incoming defer", ours.display()),
            "--incoming",
        ),
    ] {
        let new = liar(folder.path(), &then);
        let new = new.to_str().unwrap();
        let said = says(&path, &["upgrade", "--mode", "exec", "--binary", new], 1);
        assert!(
            said.contains(part) && said.contains("old program"),
            "{then}: {said}"
        );
        let at = At(path.clone());
        assert_eq!(at.ask("query-migrate")["status"], "failed");
        at.assert_guest_works();
        Holdings::await_at_first(&mut held, pid);
    }
    assert!(vm.lives());
    At(path.clone()).upgrade_by("exec");
    At(path).assert_guest_works();
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
