//! The same commands against QEMU: they work on its monitor, and what that lacks is said plainly.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::cli::{json_of, says};
use crate::harness::{program, until};
use crate::qmp::Qmp;

const QEMU: &str = "qemu-system-x86_64";

/// A QEMU without a machine, which migrates all the same. Dropping it kills it.
struct Qemu {
    child: Child,
    path: PathBuf,
    _dir: TempDir,
}

impl Qemu {
    /// `None` where there is no QEMU; says so.
    fn start(more: &[&str]) -> Option<Self> {
        let dir = TempDir::with_prefix("vmferry-e2e-").unwrap();
        let path = dir.path().join("qmp");
        let log = File::create(dir.path().join("log")).unwrap();
        let monitor = format!("unix:{},server=on,wait=off", path.display());
        let started = Command::new(QEMU)
            .args([
                "-machine",
                "none",
                "-nodefaults",
                "-nographic",
                "-qmp",
                &monitor,
            ])
            .args(more)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn();
        let child = match started {
            Ok(child) => child,
            Err(error) => {
                println!("SKIPPED: no QEMU here ({error}); .ci/packages installs it");
                return None;
            }
        };
        let qemu = Self {
            child,
            path,
            _dir: dir,
        };
        until("QEMU answers", || Qmp::connect(&qemu.path));
        Some(qemu)
    }

    /// Source and target.
    fn pair() -> Option<(Self, Self)> {
        Some((Self::start(&[])?, Self::start(&["-incoming", "defer"])?))
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // Both fail only if it has gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Has the target listen; where.
fn listen(target: &Path) -> String {
    let said = says(target, &["incoming", "tcp:127.0.0.1:0"], 0);
    let address = said.trim().strip_prefix("waiting for a guest at ");
    address.unwrap_or_else(|| panic!("{said}")).to_owned()
}

#[test]
fn settings_of_qemu_are_shown_and_changed() {
    let Some(qemu) = Qemu::start(&[]) else { return };
    let path = &qemu.path;
    let said = says(
        path,
        &[
            "set",
            "max-bandwidth=1G",
            "downtime-limit=1s",
            "multifd-channels=3",
        ],
        0,
    );
    assert!(
        said.contains("max-bandwidth = 1 GiB/s (was 128 MiB/s)"),
        "{said}"
    );
    let now = json_of(path, &["set", "--json"]);
    assert_eq!(
        (&now["max-bandwidth"], &now["downtime-limit"]),
        (&json!(1 << 30), &json!(1000))
    );
    let said = says(path, &["set", "x-verify=on"], 1);
    assert!(
        said.contains("(QEMU ") && said.contains("has no migration parameter `x-verify`"),
        "{said}"
    );
    assert_eq!(
        says(path, &["capabilities", "events=on"], 0).trim(),
        "on   events"
    );
    let said = says(path, &["capabilities", "x-nonsense=on"], 1);
    assert!(
        said.contains("has no migration capability `x-nonsense`"),
        "{said}"
    );
}

#[test]
fn what_qemu_lacks_or_refuses_is_said_plainly() {
    let Some(qemu) = Qemu::start(&[]) else { return };
    let path = &qemu.path;
    let said = says(path, &["resolve", "target-runs"], 1);
    assert!(
        said.contains("the monitor of this VM has no `x-resolve`: it is QEMU "),
        "{said}"
    );
    let said = says(path, &["status"], 0);
    assert!(
        said.starts_with("QEMU ") && said.contains("no x-query-workload here"),
        "{said}"
    );
    assert!(said.contains("none so far"), "{said}");
    let status = json_of(path, &["status", "--json"]);
    assert_eq!(
        (&status["workload"], &status["migration"]),
        (&Value::Null, &json!({}))
    );
    let said = says(path, &["pause"], 1);
    assert!(said.contains("refused `migrate-pause`"), "{said}");
    let said = says(path, &["continue"], 1);
    assert!(said.contains("refused `migrate-continue`"), "{said}");
    let said = says(path, &["incoming", "tcp:127.0.0.1:0"], 1);
    assert!(said.contains("refused `migrate-incoming`"), "{said}");
    assert!(says(path, &["yank"], 0).contains("no migration to yank"));
    assert!(says(path, &["cancel"], 0).contains("no migration under way"));
    let said = says(path, &["migrate", "tcp:127.0.0.1:1"], 1);
    assert!(said.contains("migration failed: "), "{said}");
    assert!(said.contains("goes on running at the source"), "{said}");
}

#[test]
fn qemu_is_migrated_followed_and_asked() {
    let Some((source, target)) = Qemu::pair() else {
        return;
    };
    let address = listen(&target.path);
    let said = says(&target.path, &["status"], 0);
    assert!(
        said.contains(&format!("waiting for one at {address}")),
        "{said}"
    );
    let said = says(&source.path, &["migrate", "--watch", &address], 0);
    assert!(said.contains("completed in "), "{said}");
    assert!(said.contains("this VM does not tell its parts"), "{said}");
    // QEMU completes a migration before it changes the state of the VM, and the target says so a moment later.
    until("the source is done", || {
        let said = says(&source.path, &["status"], 0);
        said.contains("postmigrate (stopped)").then_some(())
    });
    let said = says(&target.path, &["status", "--watch"], 0);
    assert!(said.contains("completed"), "{said}");
}

#[test]
fn qemu_waits_before_its_switchover_and_is_continued() {
    let Some((source, target)) = Qemu::pair() else {
        return;
    };
    for (last, code) in [("cancel", 0), ("continue", 0)] {
        // QEMU's target of a cancelled migration has ended.
        let second;
        let target = match last {
            "cancel" => &target,
            _ => {
                second = Qemu::start(&["-incoming", "defer"]).unwrap();
                &second
            }
        };
        says(
            &source.path,
            &["capabilities", "pause-before-switchover=on"],
            0,
        );
        let address = listen(&target.path);
        says(&source.path, &["migrate", "--detach", &address], 0);
        until("QEMU waits for us", || {
            let status = json_of(&source.path, &["status", "--json"]);
            (status["migration"]["status"] == "pre-switchover").then_some(())
        });
        says(&source.path, &[last], code);
    }
    let said = says(&source.path, &["status", "--watch"], 0);
    assert!(said.contains("completed in "), "{said}");
}

#[test]
fn a_monitor_that_serves_somebody_else_is_named() {
    let Some(qemu) = Qemu::start(&[]) else { return };
    let held = until("a connection", || Qmp::connect(&qemu.path));
    let mut command = program();
    command.args(["status", "--qmp"]).arg(&qemu.path);
    let output = command.output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(said.contains("Is another client connected?"), "{said}");
    drop(held);
    says(&qemu.path, &["status"], 0);
}
