//! Processes that a VM goes on in, after an upgrade in place or in the middle of one.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};

use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use serde_json::{Value, json};

use crate::harness::{Machine, program, until};

/// A process that nobody is the parent of any more. Dropping it kills it.
pub(crate) struct Orphan(pub(crate) u32);

impl Orphan {
    fn pid(&self) -> Pid {
        Pid::from_raw(self.0.cast_signed()).unwrap()
    }

    pub(crate) fn lives(&self) -> bool {
        test_kill_process(self.pid()).is_ok()
    }
}

impl Drop for Orphan {
    fn drop(&mut self) {
        // Fails if it has ended.
        let _ = kill_process(self.pid(), Signal::KILL);
        until("the process ends", || (!self.lives()).then_some(()));
    }
}

/// Upgrades the VM behind `qmp`, by `transfer` or `exec`; the report.
pub(crate) fn upgrade(qmp: &Path, mode: &str) -> Value {
    let mut command = program();
    command.args(["upgrade", "--json", "--mode", mode, "--qmp"]);
    let output = command.arg(qmp).stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The process that a report names.
pub(crate) fn new_pid(report: &Value) -> u32 {
    u32::try_from(report["new-pid"].as_u64().unwrap()).unwrap()
}

/// A process that waits for a VM in place, and where. Dropping it kills it.
pub(crate) struct Waiting {
    child: Child,
    folder: tempfile::TempDir,
}

impl Waiting {
    /// For the VM behind `qmp`, which was started with `words`.
    pub(crate) fn start(qmp: &Path, words: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let output = File::create(folder.path().join("log")).unwrap();
        let address = |name: &str| format!("unix:{}", folder.path().join(name).display());
        let child = program()
            .arg("run")
            .args(words)
            .args(["--incoming", &address("main")])
            .args(["--incoming-cpr", &address("cpr"), "--qmp"])
            .arg(qmp)
            .args(["--end-with-parent", &std::process::id().to_string()])
            .stdin(Stdio::null())
            .stdout(output.try_clone().unwrap())
            .stderr(output)
            .spawn()
            .unwrap();
        let this = Self { child, folder };
        until("the new process waits", || {
            this.path("cpr").exists().then_some(())
        });
        this
    }

    /// For a VM on such a machine, with `more` options.
    pub(crate) fn on(qmp: &Path, machine: &Machine, more: &[&str]) -> Self {
        let words = ["--mem", machine.mem, "--accel", machine.accel.name()];
        Self::start(qmp, &[&words, more].concat())
    }

    pub(crate) fn channels(&self) -> Value {
        channels(self.folder())
    }

    /// Where its sockets are: `main` and `cpr`.
    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has printed.
    pub(crate) fn said(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    pub(crate) fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    pub(crate) fn kill(&mut self) {
        // Fails if it has ended.
        let _ = self.child.kill();
        self.child.wait().unwrap();
    }

    pub(crate) fn wait_exit(&mut self) -> ExitStatus {
        until("the new process ends", || self.child.try_wait().unwrap())
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            println!("the new process said: {}", self.said());
        }
    }
}

/// The channels of an upgrade, at sockets in `folder`.
pub(crate) fn channels(folder: &Path) -> Value {
    let channel = |kind: &str| json!({"channel-type": kind, "addr": {"transport": "socket", "type": "unix", "path": folder.join(kind)}});
    json!([channel("main"), channel("cpr")])
}
