//! VMs that change their process: the command that does it, and a new process that dies when it has everything and has said so.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::mpsc;
use std::thread;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use vmferry_transport::wire::frame::{FrameBuffer, TargetFrame};

use crate::harness::{Vm, until};
use crate::qmp::Qmp;
use crate::successor::{Waiting, channels_at, new_pid, upgrade};

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

impl Waiting {
    /// Hands `vm` over to it, by way of `main` for the link.
    fn begin(&self, vm: &mut Vm, main: &str) {
        vm.set(json!({"mode": "cpr-transfer"}));
        let channels = channels_at(&self.path(main), &self.path("cpr"));
        vm.execute("migrate", json!({ "channels": channels }));
    }

    /// It refuses; what it says reaches the old process.
    pub(crate) fn assert_refuses(&self, vm: &mut Vm, part: &str) {
        self.begin(vm, "main");
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
        let listener = UnixListener::bind(self.path("link")).unwrap();
        let main = self.path("main");
        let (is_ready, ready) = mpsc::channel();
        let (go, may_go) = mpsc::channel::<()>();
        let relay = thread::spawn(move || {
            let source = listener.accept().unwrap().0;
            let target = UnixStream::connect(main).unwrap();
            let (from, to) = (source.try_clone().unwrap(), target.try_clone().unwrap());
            let forth = thread::spawn(move || pass(from, to, |_| true));
            let mut frames = FrameBuffer::default();
            pass(target, source, |bytes| {
                frames.push(bytes);
                while let Some(frame) = frames.poll_frame::<TargetFrame>().unwrap() {
                    if matches!(frame, TargetFrame::Ready(_)) {
                        is_ready.send(()).unwrap();
                        // Until it is dead.
                        let _ = may_go.recv();
                        return false;
                    }
                }
                true
            });
            forth.join().unwrap();
        });
        self.begin(vm, "link");
        ready.recv().unwrap_or_else(|_| panic!("{}", self.said()));
        then(self.pid());
        self.kill();
        go.send(()).unwrap();
        let info = vm.wait_migration();
        assert_eq!(info["status"], "failed", "{info}");
        relay.join().unwrap();
    }
}

/// Passes bytes on until they end, or `look` says so; then nothing passes either way.
fn pass(mut from: UnixStream, mut to: UnixStream, mut look: impl FnMut(&[u8]) -> bool) {
    let mut bytes = [0; 4096];
    while let Ok(count @ 1..) = from.read(&mut bytes) {
        if !look(&bytes[..count]) || to.write_all(&bytes[..count]).is_err() {
            break;
        }
    }
    for end in [from, to] {
        // Fails if it has gone already.
        let _ = end.shutdown(std::net::Shutdown::Both);
    }
}
