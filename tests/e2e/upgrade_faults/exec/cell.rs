//! One cell of the table of execs: an upgrade, one fault at one step of it, and a look at everything that must hold afterwards.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, prlimit};
use serde_json::{Value, json};
use tempfile::TempDir;
use vmferry::machine::disk::{Disk, DiskConfig};

use crate::grid;
use crate::harness::{Accel, Launch, Machine, Vm, until};
use crate::line::Line;
use crate::listener::Listener;
use crate::proc::Holdings;
use crate::qmp::{Failure, Qmp};
use crate::stand_in::{StandIn, command, processes_with};
use crate::upgrade::At;

use super::step::{Fault, Outcome, Step};

pub(super) type Seen = grid::Seen<Outcome>;

/// Deadlines where one of them has to pass, in percent. Elsewhere none is shortened: a busy host would be taken for a fault.
const SOONER: [&str; 2] = ["--x-deadline-scale", "30"];

/// As `nohup` starts it: the signal stays ignored, whatever the process becomes.
const WITHOUT_HANGUP: [&str; 4] = ["sh", "-c", "trap '' HUP; exec \"$@\"", "sh"];

/// What a busy host may need.
const SLACK: Duration = Duration::from_secs(40);

/// A VM with a disk, a serial port and a server that is told, and what it is to become.
pub(super) struct Scene {
    pub(super) vm: Vm,
    pub(super) listener: Listener,
    pub(super) stand_in: StandIn,
    /// Of the guest.
    pub(super) image: PathBuf,
    /// Of nobody.
    pub(super) another: PathBuf,
    /// What the VM refused at once.
    pub(super) refusal: Option<String>,
    /// Who has a disk that the VM needs.
    third_party: Option<Disk>,
    /// It may open no more descriptors than it has.
    limited: bool,
    line: Line,
    before: Holdings,
    signals: Vec<String>,
    _folder: TempDir,
}

/// What is left after the fault.
enum Left {
    /// The process, and whether it was another program meanwhile.
    Process { returned: bool, info: Value },
    /// It has ended.
    Nothing(std::process::ExitStatus),
}

/// Runs one cell. `next` is how the upgrade after it is made: `exec` or `transfer`.
pub(super) fn run(accel: Accel, step: Step, fault: Fault, next: &str) -> Seen {
    let mut scene = Scene::new(accel, step, fault);
    super::fault::happens(&mut scene, step, fault);
    look(scene, fault, next)
}

/// The same, where the process is told to end at some time after it has begun to become the new program.
pub(super) fn run_told(accel: Accel, after: Duration) -> Seen {
    let mut scene = Scene::new(accel, Step::Exec, Fault::Term);
    super::fault::told_after(&mut scene, after);
    look(scene, Fault::Term, "exec")
}

/// What has become of it.
fn look(mut scene: Scene, fault: Fault, next: &str) -> Seen {
    let began = Instant::now();
    let left = match fault {
        // Whatever it says until it has gone.
        Fault::Kill | Fault::Term => Left::Nothing(scene.vm.wait_exit()),
        _ => scene.left(),
    };
    let took = began.elapsed();
    let (outcome, error) = match left {
        Left::Nothing(status) => scene.judge_end(status),
        Left::Process { returned, info } => scene.judge(returned, &info, next),
    };
    Seen {
        outcome,
        took,
        error,
    }
}

/// Somebody else who wants an image.
fn third_party(image: &Path) -> Disk {
    let config = DiskConfig {
        path: image.to_owned(),
        id: "third-party".to_owned(),
        read_only: false,
    };
    Disk::open(config).unwrap()
}

/// What a process holds, without what the serial port leaves for the next one: made at the first attempt, and kept.
fn held(pid: u32) -> Holdings {
    let mut holdings = Holdings::settled(pid).counted();
    let of_port = |name: &str| name.contains("vmferry-serial");
    holdings.fds.retain(|name, _| !of_port(name));
    holdings
}

/// Which signals are blocked and ignored there, as the kernel says.
fn signals(pid: u32) -> Vec<String> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let lines = status
        .lines()
        .filter(|line| line.starts_with("SigBlk:") || line.starts_with("SigIgn:"));
    let lines: Vec<_> = lines.map(ToOwned::to_owned).collect();
    assert!(lines.len() == 2 && lines[1].ends_with('1'), "{lines:?}");
    lines
}

impl Scene {
    fn new(accel: Accel, step: Step, fault: Fault) -> Self {
        let folder = TempDir::with_prefix("vmferry-exec-").unwrap();
        let [image, another] = ["image", "another"].map(|name| folder.path().join(name));
        for path in [&image, &another] {
            File::create(path).unwrap().set_len(1 << 20).unwrap();
        }
        let line = Line::new(folder.path());
        let listener = Listener::new();
        let scale: &[&str] = match step.needs_short_deadline(fault) {
            true => &SOONER,
            false => &[],
        };
        let disk = format!("{},id=disk0", image.display());
        let launch = listener.attend(Launch::default().with(scale));
        let launch = launch.with(&["--disk", &disk, "--workload-disk"]).with(&[
            "--serial",
            line.path(),
            "--workload-serial",
        ]);
        let launch = launch.through(&WITHOUT_HANGUP);
        let mut vm = Machine::tiny(accel).start_source(launch);
        vm.warm_up();
        let (before, signals) = (held(vm.pid()), signals(vm.pid()));
        vm.qmp.events.clear();
        Self {
            vm,
            listener,
            stand_in: StandIn::new(),
            image,
            another,
            refusal: None,
            third_party: None,
            limited: false,
            line,
            before,
            signals,
            _folder: folder,
        }
    }

    /// Begins an upgrade to `program`.
    pub(super) fn begin(&mut self, program: &Path) {
        let command = command(&self.vm, program);
        self.vm
            .set(json!({"mode": "cpr-exec", "cpr-exec-command": command}));
        match self.vm.qmp.execute("migrate", json!({})) {
            Ok(_) => {}
            Err(Failure::Refused(reason)) => self.refusal = Some(reason),
            Err(Failure::Gone) => panic!("the VM is gone: {}", self.vm.said()),
        }
    }

    pub(super) fn pause(&mut self, on: bool) {
        let pause = json!([{"capability": "pause-before-switchover", "state": on}]);
        self.vm
            .execute("migrate-set-capabilities", json!({ "capabilities": pause }));
    }

    pub(super) fn go_on(&mut self) {
        self.vm
            .execute("migrate-continue", json!({"state": "pre-switchover"}));
    }

    /// The same, without waiting for anything.
    pub(super) fn leave_to_go_on(&mut self) {
        let arguments = json!({"state": "pre-switchover"});
        self.vm.qmp.leave("migrate-continue", &arguments);
    }

    /// The image is somebody else's as soon as it is free.
    pub(super) fn take_disk(&mut self, image: &Path) {
        let disk = third_party(image);
        until("the disk is free", || disk.activate().ok());
        self.third_party = Some(disk);
    }

    /// The VM's process can open nothing more.
    pub(super) fn leave_no_room(&mut self) {
        let pid = self.vm.pid();
        let free = |number: &u64| fs::symlink_metadata(format!("/proc/{pid}/fd/{number}")).is_err();
        self.limit((0..).find(free));
        self.limited = true;
    }

    fn limit(&self, current: Option<u64>) {
        let limit = Rlimit {
            current,
            ..getrlimit(Resource::Nofile)
        };
        prlimit(Some(self.pid()), Resource::Nofile, limit).unwrap();
    }

    /// What keeps the guest from running goes away.
    fn relieve(&mut self) {
        drop(self.third_party.take());
        if std::mem::take(&mut self.limited) {
            self.limit(getrlimit(Resource::Nofile).current);
        }
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.vm.pid().cast_signed()).unwrap()
    }

    pub(super) fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    /// Waits until it is clear what became of the process.
    fn left(&mut self) -> Left {
        if let Some(refusal) = &self.refusal {
            return Left::Process {
                returned: false,
                info: json!({"status": "failed", "error-desc": refusal}),
            };
        }
        let path = self.vm.qmp_path();
        let (vm, mut returned) = (&mut self.vm, false);
        until("it is clear what became of the guest", || {
            if !vm.lives() {
                return Some(Left::Nothing(vm.wait_exit()));
            }
            if let Ok(info) = vm.qmp.execute("query-migrate", json!({})) {
                let status = info["status"].as_str().unwrap_or_default();
                let over = ["completed", "failed", "cancelled"].contains(&status);
                return over.then_some(Left::Process { returned, info });
            }
            vm.qmp = Qmp::connect(&path)?;
            returned = true;
            None
        })
    }

    /// The process has ended: nobody runs the guest, and nobody has what belongs to it.
    fn judge_end(mut self, status: std::process::ExitStatus) -> (Outcome, String) {
        let path = self.vm.qmp_path();
        until("nobody is left", || {
            processes_with(&path).is_empty().then_some(())
        });
        assert!(Qmp::connect(&path).is_none(), "somebody answers");
        self.take_disk(&self.image.clone());
        let said = self.vm.said();
        let last = said.lines().last().unwrap_or_default().to_owned();
        match status.code() {
            Some(1) => (Outcome::Lost, last),
            _ => (Outcome::Ends, format!("({status})")),
        }
    }

    /// The process lives: it has the guest and all that belongs to it, nobody else does, and the next upgrade works.
    fn judge(mut self, returned: bool, info: &Value, next: &str) -> (Outcome, String) {
        let path = self.vm.qmp_path();
        let (pid, at) = (self.vm.pid(), At(path.clone()));
        let status = info["status"].as_str().unwrap();
        let mut error = info["error-desc"].as_str().unwrap_or_default().to_owned();
        assert_eq!(error.is_empty(), status == "completed", "{info}");
        let runs = self.vm.query("query-status")["running"] == true;
        let stopped = self
            .vm
            .qmp
            .events
            .iter()
            .any(|event| event["event"] == "STOP");
        let outcome = match (returned, runs, stopped) {
            (true, true, _) if status == "completed" => Outcome::GoesOn,
            _ if status == "completed" => panic!("{info}"),
            (false, true, false) => Outcome::RunsOn,
            (false, true, true) => Outcome::Stays,
            (true, true, _) => Outcome::Returns,
            (_, false, _) => Outcome::Waits,
        };
        if outcome == Outcome::Waits {
            self.vm.assert_guest_stopped();
            let refused = self.vm.refusal("cont", json!({}));
            error = format!("{error}; cont: {refused}");
            self.relieve();
            self.vm.query("cont");
        }
        self.relieve();
        at.assert_guest_works();
        self.line.hear_more(2);
        let refused = third_party(&self.image).activate();
        assert!(refused.is_err(), "the guest's disk is anybody's");
        let only_one = || (processes_with(&path) == [pid]).then_some(());
        until("no other process is left", only_one);
        self.assert_same();
        if !returned {
            self.pause(false);
        }
        self.upgrade(&at, next);
        self.listener.assert_order("after the upgrades");
        (outcome, error)
    }

    fn upgrade(&mut self, at: &At, how: &str) {
        if how == "exec" {
            let report = at.upgrade_by("exec");
            assert_eq!(report["new-pid"], self.vm.pid());
            at.assert_guest_works();
            self.line.hear_more(2);
            return;
        }
        let (_new, _) = at.upgrade();
        assert_eq!(self.vm.wait_exit().code(), Some(0), "{}", self.vm.said());
        at.assert_guest_works();
        self.line.hear_more(2);
    }

    /// It holds what it held before, but for the connection to the listener, and signals reach it as before.
    fn assert_same(&self) {
        assert_eq!(signals(self.vm.pid()), self.signals);
        let began = Instant::now();
        loop {
            let now = held(self.vm.pid()).without_sockets(self.listener.connections());
            if now == self.before {
                return;
            }
            // A busy host lets go late.
            assert!(
                began.elapsed() < SLACK,
                "now {now:?}\nbefore {:?}",
                self.before
            );
        }
    }
}
