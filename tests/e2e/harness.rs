//! VM processes under test: started in a directory of their own, asked over QMP, and gone when the test ends, however it ends.

use std::cell::Cell;
use std::fmt;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::proc::Holdings;
use crate::qmp::{Failure, Qmp};

/// Far longer than anything here takes, deadlines of the program included.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// What runs the guests of a case.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Accel {
    Kvm,
    Soft,
}

impl Accel {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Soft => "soft",
        }
    }
}

/// Whether KVM can be used; says so if not.
pub(crate) fn kvm_is_here() -> bool {
    match File::options().read(true).write(true).open("/dev/kvm") {
        Ok(_) => true,
        Err(error) => {
            println!("SKIPPED: no /dev/kvm here ({error})");
            false
        }
    }
}

/// How many cases may work the machine at a time.
const PLACES: usize = 2;
static TURNS: Turns = Turns {
    taken: Mutex::new(Taken {
        places: 0,
        wanted_whole: 0,
    }),
    changed: Condvar::new(),
};

struct Turns {
    taken: Mutex<Taken>,
    changed: Condvar,
}

struct Taken {
    places: usize,
    /// Cases that wait until they are alone; nobody passes them.
    wanted_whole: usize,
}

/// What [`turn`] and [`whole_machine`] give; the end of it is the end of the turn.
pub(crate) struct Turn {
    places: usize,
}

/// Held by a case that works the machine: two at a time.
pub(crate) fn turn() -> Turn {
    let taken = lock(&TURNS.taken);
    let is_full = |taken: &mut Taken| taken.places == PLACES || taken.wanted_whole > 0;
    let mut taken = TURNS
        .changed
        .wait_while(taken, is_full)
        .unwrap_or_else(PoisonError::into_inner);
    taken.places += 1;
    Turn { places: 1 }
}

/// Held by a case that works the machine hard, or has only one of something: none beside it that takes turns.
pub(crate) fn whole_machine() -> Turn {
    let mut taken = lock(&TURNS.taken);
    taken.wanted_whole += 1;
    let mut taken = TURNS
        .changed
        .wait_while(taken, |taken| taken.places > 0)
        .unwrap_or_else(PoisonError::into_inner);
    taken.wanted_whole -= 1;
    taken.places = PLACES;
    Turn { places: PLACES }
}

impl Drop for Turn {
    fn drop(&mut self) {
        lock(&TURNS.taken).places -= self.places;
        TURNS.changed.notify_all();
    }
}

/// A case that failed has not spoilt it for the others.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Looks again and again until there is something to see. Fails the test with `what` when patience ends.
pub(crate) fn until<T>(what: impl fmt::Display, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(seen) = look() {
            return seen;
        }
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        thread::sleep(LOOK_EVERY);
    }
}

/// Random numbers that a printed seed repeats.
pub(crate) struct Chance(Cell<u64>);

impl Chance {
    /// Seeded by `VMFERRY_SEED`, or by the time; prints the seed.
    pub(crate) fn new() -> Self {
        let seed = number_from_env("VMFERRY_SEED").unwrap_or_else(|| {
            let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
            u64::try_from(since.as_micros()).unwrap()
        });
        println!("seed: VMFERRY_SEED={seed}");
        Self(Cell::new(seed))
    }

    /// Whose seed another one has chosen.
    pub(crate) fn seeded(seed: u64) -> Self {
        Self(Cell::new(seed))
    }

    /// A number below `end`.
    pub(crate) fn below(&self, end: u64) -> u64 {
        // SplitMix64.
        let state = self.0.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
        self.0.set(state);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % end
    }

    /// One of `choices`.
    pub(crate) fn of<T: Copy>(&self, choices: &[T]) -> T {
        choices[usize::try_from(self.below(choices.len() as u64)).unwrap()]
    }
}

/// A number that the caller of the tests may set.
pub(crate) fn number_from_env(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text}")))
}

/// The program.
pub(crate) fn program() -> Command {
    Command::new(env!("CARGO_BIN_EXE_vmferry-under-test"))
}

/// How the two VMs of a migration are made.
#[derive(Clone, Debug)]
pub(crate) struct Machine {
    pub(crate) accel: Accel,
    pub(crate) mem: &'static str,
    pub(crate) vcpus: u32,
    pub(crate) working_set: &'static str,
    pub(crate) dirty_rate: &'static str,
    pub(crate) fill: &'static str,
}

impl Machine {
    /// A small guest that makes ten passes per second over its memory.
    pub(crate) fn small(accel: Accel) -> Self {
        Self {
            accel,
            mem: "64M",
            vcpus: 1,
            working_set: "4M",
            dirty_rate: "10000",
            fill: "8M",
        }
    }

    /// One for tables of faults, which make hundreds of them.
    pub(crate) fn tiny(accel: Accel) -> Self {
        Self {
            mem: "16M",
            working_set: "512K",
            dirty_rate: "2000",
            fill: "2M",
            ..Self::small(accel)
        }
    }

    /// A VM with a running guest that has filled its memory.
    pub(crate) fn source(&self) -> Vm {
        let mut vm = self.start_source(Launch::default());
        vm.warm_up();
        vm
    }

    /// A VM with a guest, not waited for.
    pub(crate) fn start_source(&self, launch: Launch) -> Vm {
        let guest = [
            "--working-set",
            self.working_set,
            "--dirty-rate",
            self.dirty_rate,
            "--fill",
            self.fill,
        ];
        self.start("source", launch.with(&guest))
    }

    /// A VM that waits for a guest at a port of its own.
    pub(crate) fn target(&self) -> Vm {
        self.target_at("tcp:127.0.0.1:0")
    }

    /// A VM that waits for a guest at `address`.
    pub(crate) fn target_at(&self, address: &str) -> Vm {
        self.start_target(address, Launch::default())
    }

    /// The same with more options.
    pub(crate) fn start_target(&self, address: &str, launch: Launch) -> Vm {
        self.start("target", launch.with(&["--incoming", address]))
    }

    fn start(&self, role: &'static str, launch: Launch) -> Vm {
        let vcpus = self.vcpus.to_string();
        let common = [
            "--accel",
            self.accel.name(),
            "--mem",
            self.mem,
            "--vcpus",
            &vcpus,
        ];
        Vm::start(role, launch.with(&common))
    }
}

/// How a process is started, beyond what the machine says.
#[derive(Clone, Debug, Default)]
pub(crate) struct Launch {
    arguments: Vec<String>,
    environment: Vec<(&'static str, &'static str)>,
    /// A command that starts the program, such as `ip netns exec NAME`.
    wrapper: Vec<String>,
}

impl Launch {
    pub(crate) fn with(mut self, arguments: &[&str]) -> Self {
        self.arguments
            .extend(arguments.iter().map(|text| (*text).to_owned()));
        self
    }

    /// Its options.
    pub(crate) fn words(&self) -> Vec<&str> {
        self.arguments.iter().map(String::as_str).collect()
    }

    pub(crate) fn env(mut self, name: &'static str, value: &'static str) -> Self {
        self.environment.push((name, value));
        self
    }

    pub(crate) fn through(mut self, wrapper: &[&str]) -> Self {
        self.wrapper = wrapper.iter().map(|text| (*text).to_owned()).collect();
        self
    }

    fn command(&self, qmp: &Path) -> Command {
        let mut command = match self.wrapper.split_first() {
            Some((wrapper, rest)) => {
                let mut command = Command::new(wrapper);
                command.args(rest).arg(program().get_program());
                command
            }
            None => program(),
        };
        let us = std::process::id().to_string();
        command
            .arg("run")
            .args(&self.arguments)
            .args(["--end-with-parent", &us])
            .arg("--qmp")
            .arg(qmp)
            .envs(self.environment.iter().copied())
            .stdin(Stdio::null());
        command
    }
}

/// A `vmferry run`. Dropping it kills it.
pub(crate) struct Vm {
    role: &'static str,
    child: Child,
    dir: TempDir,
    /// Commands and events.
    pub(crate) qmp: Qmp,
}

impl Vm {
    fn start(role: &'static str, launch: Launch) -> Self {
        match Self::try_start(role, &launch) {
            Ok(vm) => vm,
            Err(said) => panic!("the {role} did not start: {said}"),
        }
    }

    /// Starts one and waits until it answers; what it says if it ends instead.
    pub(crate) fn try_start(role: &'static str, launch: &Launch) -> Result<Self, String> {
        let dir = TempDir::with_prefix("vmferry-e2e-").unwrap();
        let (path, log) = (dir.path().join("qmp"), log_of(&dir));
        let output = File::create(&log).unwrap();
        let mut child = launch
            .command(&path)
            .stdout(output.try_clone().unwrap())
            .stderr(output)
            .spawn()
            .unwrap();
        let qmp = until(
            format_args!("{role} {launch:?} answers"),
            || match Qmp::connect(&path) {
                Some(qmp) => Some(Some(qmp)),
                None => child.try_wait().unwrap().map(|_| None),
            },
        );
        let Some(qmp) = qmp else {
            return Err(fs::read_to_string(&log).unwrap());
        };
        let mut vm = Self {
            role,
            child,
            dir,
            qmp,
        };
        let events = json!({ "capabilities": [{ "capability": "events", "state": true }] });
        match vm.qmp.execute("migrate-set-capabilities", events) {
            Ok(_) => Ok(vm),
            Err(Failure::Gone) => {
                vm.wait_exit();
                Err(vm.said())
            }
            Err(Failure::Refused(reason)) => panic!("no events: {reason}"),
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has printed.
    pub(crate) fn said(&self) -> String {
        fs::read_to_string(log_of(&self.dir)).unwrap()
    }

    /// A directory that goes with it.
    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Path of its QMP socket.
    pub(crate) fn qmp_path(&self) -> PathBuf {
        self.dir.path().join("qmp")
    }

    /// Executes a command that must succeed.
    pub(crate) fn execute(&mut self, command: &str, arguments: Value) -> Value {
        match self.qmp.execute(command, arguments) {
            Ok(answer) => answer,
            Err(failure) => panic!(
                "{command} at the {}: {failure:?}\n{}",
                self.role,
                self.said()
            ),
        }
    }

    /// Executes a command that must be refused; returns the reason.
    pub(crate) fn refusal(&mut self, command: &str, arguments: Value) -> String {
        match self.qmp.execute(command, arguments) {
            Err(Failure::Refused(reason)) => reason,
            other => panic!("{command} at the {}: {other:?}\n{}", self.role, self.said()),
        }
    }

    pub(crate) fn query(&mut self, command: &str) -> Value {
        self.execute(command, json!({}))
    }

    /// State of the VM, such as `running`.
    pub(crate) fn runstate(&mut self) -> String {
        let status = self.query("query-status");
        let state = status["status"].as_str().unwrap();
        assert_eq!(status["running"], state == "running", "{status}");
        state.to_owned()
    }

    /// Waits for a state.
    pub(crate) fn wait_runstate(&mut self, wanted: &str) {
        let role = self.role;
        until(format_args!("{role} is {wanted}"), || {
            (self.runstate() == wanted).then_some(())
        });
    }

    /// Passes that the guest has made; it must have found no wrong page.
    pub(crate) fn passes(&mut self) -> u64 {
        let workload = self.query("x-query-workload");
        assert_eq!(workload["errors"], 0, "{}: {workload}", self.role);
        workload["passes"].as_u64().unwrap()
    }

    /// The guest runs, and after now it has found every page of its working set as it wrote it.
    pub(crate) fn assert_guest_works(&mut self) {
        assert_eq!(self.runstate(), "running", "{}", self.said());
        let before = self.passes();
        let role = self.role;
        until(format_args!("the guest makes passes at the {role}"), || {
            // One pass was under way, the next is a whole one.
            (self.passes() >= before + 2).then_some(())
        });
    }

    /// The guest stands still.
    pub(crate) fn assert_guest_stopped(&mut self) {
        assert_ne!(self.runstate(), "running", "{}", self.said());
        let pages = self.query("x-query-workload")["pages-written"].clone();
        thread::sleep(Duration::from_millis(50));
        assert_eq!(self.query("x-query-workload")["pages-written"], pages);
    }

    /// Waits until the guest has filled its memory and checks what it writes.
    pub(crate) fn warm_up(&mut self) {
        until("the guest fills its memory", || {
            let workload = self.query("x-query-workload");
            let filled = workload["filled-pages"] == workload["fill-pages"];
            (filled && workload["passes"].as_u64() >= Some(2)).then_some(())
        });
    }

    /// Where it listens, as a URI.
    pub(crate) fn address(&mut self) -> String {
        let info = self.query("query-migrate");
        let address = &info["socket-address"][0];
        let part = |name: &str| address[name].as_str().unwrap().to_owned();
        match part("type").as_str() {
            "unix" => format!("unix:{}", part("path")),
            _ if part("host").contains(':') => format!("tcp:[{}]:{}", part("host"), part("port")),
            _ => format!("tcp:{}:{}", part("host"), part("port")),
        }
    }

    pub(crate) fn set(&mut self, parameters: Value) {
        self.execute("migrate-set-parameters", parameters);
    }

    /// Starts a migration.
    pub(crate) fn migrate(&mut self, address: &str) {
        self.qmp.events.clear();
        self.execute("migrate", json!({ "uri": address }));
    }

    /// Status of the migration, if there is or was one.
    pub(crate) fn status(&mut self) -> String {
        let info = self.query("query-migrate");
        info["status"].as_str().unwrap_or("none").to_owned()
    }

    /// The same of a VM that may end any moment; `None` if it has.
    pub(crate) fn status_if_it_lives(&mut self) -> Option<String> {
        match self.qmp.execute("query-migrate", json!({})) {
            Ok(info) => Some(info["status"].as_str().unwrap_or("none").to_owned()),
            Err(Failure::Gone) => None,
            Err(Failure::Refused(reason)) => panic!("query-migrate: {reason}"),
        }
    }

    /// Waits for the end of the migration; the final record.
    pub(crate) fn wait_migration(&mut self) -> Value {
        until("the migration ends", || {
            let info = self.query("query-migrate");
            let status = info["status"].as_str().unwrap_or("none");
            ["completed", "failed", "cancelled"]
                .contains(&status)
                .then_some(info)
        })
    }

    /// Waits until the migration has a certain status, as its events say.
    pub(crate) fn wait_status(&mut self, wanted: &str) {
        let event = self
            .qmp
            .event(|event| event["event"] == "MIGRATION" && event["data"]["status"] == wanted);
        assert!(event.is_some(), "{wanted}: {}", self.said());
    }

    /// Statuses of the migration so far, as the events tell them.
    pub(crate) fn statuses(&mut self) -> Vec<String> {
        // Brings in the events that came before its answer.
        self.query("query-status");
        let events = self.qmp.events.iter();
        events
            .filter(|event| event["event"] == "MIGRATION")
            .map(|event| event["data"]["status"].as_str().unwrap().to_owned())
            .collect()
    }

    /// Migrates to `target` with both sides verified, and looks whether the guest is there and here no more.
    pub(crate) fn move_to(&mut self, target: &mut Self) -> Value {
        let address = target.address();
        self.move_to_at(target, &address)
    }

    /// The same, to an address that leads to `target`.
    pub(crate) fn move_to_at(&mut self, target: &mut Self, address: &str) -> Value {
        self.set(json!({ "x-verify": true }));
        self.migrate(address);
        let info = self.wait_migration();
        assert_eq!(
            info["status"],
            "completed",
            "{info}\nsource: {}\ntarget: {}",
            self.said(),
            target.said()
        );
        let verification = &info["x-verification"];
        assert_eq!(
            verification["ram-hash-source"],
            verification["ram-hash-target"]
        );
        assert_eq!(verification["vcpus-equal"], true, "{info}");
        assert_eq!(self.runstate(), "postmigrate");
        target.assert_guest_works();
        self.assert_guest_stopped();
        info
    }

    /// Migrates to where it cannot work: the error names the fault, and the guest goes on here. Returns the error.
    pub(crate) fn assert_migration_fails(&mut self, address: &str, part: &str) -> String {
        self.migrate(address);
        let info = self.wait_migration();
        self.assert_failed(&info, part)
    }

    /// The migration that ended with `info` failed as it should.
    pub(crate) fn assert_failed(&mut self, info: &Value, part: &str) -> String {
        let error = info["error-desc"].as_str().unwrap_or_default().to_owned();
        assert_eq!(info["status"], "failed", "{info}\n{}", self.said());
        assert!(error.contains(part), "{error:?} does not name {part:?}");
        let statuses = self.statuses();
        assert!(
            statuses.ends_with(&["failing".to_owned(), "failed".to_owned()]),
            "{statuses:?}"
        );
        self.assert_guest_works();
        error
    }

    /// What it holds of the kernel.
    pub(crate) fn holdings(&self) -> Holdings {
        Holdings::of(self.pid())
    }

    /// Ends it with SIGKILL, and waits until it is gone.
    pub(crate) fn kill(&mut self) {
        // Fails only if it has gone already.
        let _ = self.child.kill();
        self.child.wait().unwrap();
    }

    /// Waits until it has ended by itself.
    pub(crate) fn wait_exit(&mut self) -> ExitStatus {
        let role = self.role;
        until(format_args!("the {role} ends"), || {
            self.child.try_wait().unwrap()
        })
    }

    /// Whether it still lives.
    pub(crate) fn lives(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// The target gave up: says so and ends.
    pub(crate) fn assert_gave_up(&mut self, part: &str) {
        let status = self.wait_exit();
        let said = self.said();
        assert_eq!(status.code(), Some(1), "{said}");
        assert!(said.contains(part), "{said:?} does not name {part:?}");
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if let Ok(Some(status)) = self.child.try_wait()
            && thread::panicking()
        {
            println!("the {} had ended: {status}", self.role);
        }
        self.kill();
        if thread::panicking() {
            println!("the {} said: {}", self.role, self.said());
        }
    }
}

fn log_of(dir: &TempDir) -> PathBuf {
    dir.path().join("log")
}
