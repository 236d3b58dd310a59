//! VMs that change their process: the command that does it, and a new process that dies when it has everything and has said so.

use std::path::PathBuf;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::harness::{PATIENCE, Vm, until};
use crate::link::{Deed, Link};
use crate::qmp::Qmp;
use crate::step::Step;
use crate::successor::{Waiting, new_pid, upgrade};

/// A VM in a process that is nobody's child any more. Dropping it kills it.
pub(crate) struct Moved {
    pub(crate) pid: u32,
    path: PathBuf,
}

impl Moved {
    /// Upgrades the VM that answers at `path`.
    pub(crate) fn from(path: PathBuf) -> Self {
        Self::by("transfer", path)
    }

    /// The same in one of the two modes.
    pub(crate) fn by(mode: &str, path: PathBuf) -> Self {
        let pid = new_pid(&upgrade(&path, mode));
        Self { pid, path }
    }

    /// Upgrades it once more; the process that had it has ended.
    pub(crate) fn again(self) -> Self {
        let next = Self::from(self.path.clone());
        let gone = PathBuf::from(format!("/proc/{}/fd", self.pid));
        until("the old process ends", || {
            // Nobody may have waited for it yet.
            let left = std::fs::read_dir(&gone).map(Iterator::count);
            left.map_or(true, |left| left == 0).then_some(())
        });
        next
    }

    /// Upgrades it without a new process.
    pub(crate) fn execs(self) -> Self {
        let program = Self::by("exec", self.path.clone());
        assert_eq!(program.pid, self.pid);
        std::mem::forget(self);
        program
    }

    pub(crate) fn query(&self, command: &str) -> Value {
        let mut qmp = until("somebody answers", || Qmp::connect(&self.path));
        qmp.execute(command, json!({})).unwrap()
    }

    /// Waits until the guest has made so many more passes, without an error.
    #[track_caller]
    pub(crate) fn assert_passes(&self, more: u64) {
        let passes = || {
            let workload = self.query("x-query-workload");
            assert_eq!(workload["errors"], 0, "{workload}");
            workload["passes"].as_u64().unwrap()
        };
        let before = passes();
        until("the guest makes passes", || {
            (passes() > before + more).then_some(())
        });
    }
}

impl Drop for Moved {
    fn drop(&mut self) {
        let pid = Pid::from_raw(self.pid.cast_signed()).unwrap();
        // Fails if it has ended.
        let _ = kill_process(pid, Signal::KILL);
    }
}

/// Hands `vm` over to whoever waits at these channels.
fn begin(vm: &mut Vm, channels: &Value) {
    vm.set(json!({"mode": "cpr-transfer"}));
    vm.execute("migrate", json!({ "channels": channels }));
}

impl Waiting {
    /// It refuses; what it says reaches the old process.
    pub(crate) fn assert_refuses(&self, vm: &mut Vm, part: &str) {
        begin(vm, &self.channels());
        let info = vm.wait_migration();
        assert_eq!(info["status"], "failed", "{info}");
        let error = info["error-desc"].as_str().unwrap();
        assert!(error.contains(part), "{error}");
    }

    /// The old process refuses to hand anything over, at once.
    pub(crate) fn assert_refused(&self, vm: &mut Vm, part: &str) {
        vm.set(json!({"mode": "cpr-transfer"}));
        let refusal = vm.refusal("migrate", json!({ "channels": self.channels() }));
        assert!(refusal.contains(part), "{refusal}");
    }

    /// Kills it when it has taken everything over and says READY, which the old process never hears. `then` may look at the new process
    /// before.
    pub(crate) fn dies_when_ready(&mut self, vm: &mut Vm, then: impl FnOnce(u32)) {
        let link = Link::new(self.folder(), Step::Ready);
        begin(vm, &link.channels());
        assert!(link.wait(PATIENCE), "{}", self.said());
        then(self.pid());
        self.kill();
        link.go(Deed::Cut);
        let info = vm.wait_migration();
        assert_eq!(info["status"], "failed", "{info}");
    }
}
