//! I2, I3: of two devices the second cannot begin to work, for want of a descriptor. The guest was not started then, and that is meant: the
//! first one has not touched what the guest had asked of it, and both go on where they were.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;

use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
use serde_json::{Value, json};
use tempfile::TempDir;
use vmferry::machine::workload::layout::{DISK_GPA, NO_INTERRUPT, disk};
use vmferry_tests::stand_in::Deed as Orders;

use crate::harness::{Accel, Launch, Machine, PATIENCE, Vm, turn, until};
use crate::listener::Listener;
use crate::proc::Holdings;
use crate::qmp::{Failure, Qmp};
use crate::stand_in::{StandIn, command, program_path};
use crate::storage::Daemon;
use crate::successor::Waiting;
use crate::tap::{Bridge, Echo};
use crate::upgrade::{At, SOON};

use super::link::{Deed, Link};
use super::step::Step;

on_both_accelerators!(
    a_process_whose_second_device_cannot_work_has_done_nothing_for_the_first,
    a_program_whose_second_device_cannot_work_has_done_nothing_for_the_first,
);

/// Of [`Machine::tiny`].
const MEM_BYTES: u64 = 16 << 20;
/// Descriptors that are more than enough for whatever is opened while the guest is stopped.
const ROOM_MAX: usize = 16;
/// The same for all that a program opens that begins.
const ROOM_OF_PROGRAM: usize = 40;
/// Tries with it: each ends when the room is too little for something.
const SCENES: usize = 8;
/// A process in which so many looks have found the same waits.
const LOOKS: u32 = 30;
/// What is said of the second device, if the first one was ready.
const SECOND: &str = "let virtio-net/0 work failed: Too many open files";

/// A VM whose guest writes and checks a disk, and answers packets.
struct Scene {
    vm: Vm,
    machine: Machine,
    options: Launch,
    echo: Echo,
    /// How far the disk was, each time the failure of an upgrade was told.
    seen: Arc<Mutex<Vec<u16>>>,
    _listener: Listener,
    _daemon: Daemon,
    _bridge: Bridge,
    _folder: TempDir,
}

/// Guest memory, whoever runs the guest.
struct Memory(File);

impl Memory {
    fn of(pid: u32) -> Self {
        let fds = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
        let is_ram = |path: &Path| {
            let name = fs::read_link(path).unwrap_or_default();
            let bytes = fs::metadata(path).map_or(0, |meta| meta.len());
            name.to_string_lossy().starts_with("/memfd:") && bytes == MEM_BYTES
        };
        let mut paths = fds.map(|fd| fd.unwrap().path());
        let ram = paths.find(|path| is_ram(path)).unwrap();
        Self(File::options().read(true).write(true).open(ram).unwrap())
    }

    fn get(&self, at: u64) -> u64 {
        let mut bytes = [0; 8];
        self.0.read_exact_at(&mut bytes, DISK_GPA + at).unwrap();
        u64::from_le_bytes(bytes)
    }

    fn set(&self, at: u64, value: u64) {
        let bytes = value.to_le_bytes();
        self.0.write_all_at(&bytes, DISK_GPA + at).unwrap();
    }

    /// How many requests the disk has answered.
    fn used(&self) -> u16 {
        (self.get(disk::USED) >> 16) as u16
    }

    /// Has the stopped guest ask for what it asked for last, if nothing of it is open.
    fn ask(&self) {
        let submitted = self.get(disk::SUBMITTED);
        if self.used() == submitted as u16 {
            let next = submitted.wrapping_add(1);
            self.set(disk::STATUS, 0xff);
            self.set(disk::SUBMITTED, next);
            self.set(disk::AVAIL, (next & 0xffff) << 16 | NO_INTERRUPT);
        }
    }
}

/// Leaves a process that waits room for so many more descriptors. What it is about to close would be room as well.
fn leave_room(pid: u32, count: usize) {
    let (mut seen, mut looks) = (Holdings::of(pid).fds, 0);
    until("the process has closed what it does not need", || {
        let now = Holdings::of(pid).fds;
        looks = if now == seen { looks + 1 } else { 0 };
        seen = now;
        (looks >= LOOKS).then_some(())
    });
    let free = |number: &u64| fs::symlink_metadata(format!("/proc/{pid}/fd/{number}")).is_err();
    limit(pid, (0..).filter(free).nth(count).unwrap());
}

fn limit(pid: u32, current: u64) {
    let limit = Rlimit {
        current: Some(current),
        ..getrlimit(Resource::Nofile)
    };
    let pid = Pid::from_raw(pid.cast_signed());
    prlimit(pid, Resource::Nofile, limit).unwrap();
}

impl Scene {
    /// `None`, and a reason on the output, where there can be no tap.
    fn new(accel: Accel) -> Option<Self> {
        let bridge = Bridge::new(1)?;
        let folder = TempDir::with_prefix("vmferry-gates-").unwrap();
        let image = folder.path().join("image");
        File::create(&image).unwrap().set_len(1 << 20).unwrap();
        // It answers all that it was asked before it stops, so nothing depends on how soon it is stopped.
        let daemon = Daemon::start(folder.path(), "daemon")?;
        let disk = format!("vhost-user:{}", daemon.socket().display());
        let listener = Listener::new();
        let options = Launch::default().with(&SOON);
        let options = options.with(&["--blk", &disk, "--workload-disk"]);
        let options = bridge.launch(options, 0);
        let machine = Machine::tiny(accel);
        let mut vm = machine.start_source(listener.attend(options.clone()));
        vm.warm_up();
        let memory = Memory::of(vm.pid());
        let seen = Arc::new(Mutex::new(Vec::new()));
        let sees = Arc::clone(&seen);
        listener.on_failure(move || sees.lock().unwrap().push(memory.used()));
        let echo = Echo::start(&bridge);
        Some(Self {
            vm,
            machine,
            options,
            echo,
            seen,
            _listener: listener,
            _daemon: daemon,
            _bridge: bridge,
            _folder: folder,
        })
    }

    /// Begins, up to the moment at which the guest is stopped, and has it asked for something. How far the disk is.
    fn begin(&mut self, how: Value) -> u16 {
        self.pause(true);
        self.vm.execute("migrate", how);
        until("the guest is stopped", || {
            let info = self.vm.query("query-migrate");
            (info["status"] == "pre-switchover").then_some(())
        });
        let memory = Memory::of(self.vm.pid());
        memory.ask();
        memory.used()
    }

    fn pause(&mut self, on: bool) {
        let pause = json!([{"capability": "pause-before-switchover", "state": on}]);
        self.vm
            .execute("migrate-set-capabilities", json!({ "capabilities": pause }));
    }

    fn go_on(&mut self) {
        let state = json!({"state": "pre-switchover"});
        // It may have become another program before it has answered.
        if let Err(Failure::Refused(reason)) = self.vm.qmp.execute("migrate-continue", state) {
            panic!("{reason}");
        }
    }

    /// The end of the upgrade: what is said of it, nothing if it has succeeded. If it has not, the disk was not further than `before` when
    /// that was told.
    fn end(&mut self, before: u16) -> Option<String> {
        let path = self.vm.qmp_path();
        let info = until("the upgrade ends", || {
            if let Ok(info) = self.vm.qmp.execute("query-migrate", json!({})) {
                let status = info["status"].as_str().unwrap_or_default();
                return ["completed", "failed"].contains(&status).then_some(info);
            }
            self.vm.qmp = Qmp::connect(&path)?;
            None
        });
        let error = info["error-desc"].as_str();
        assert_eq!(error.is_some(), info["status"] == "failed", "{info}");
        let seen = std::mem::take(&mut *self.seen.lock().unwrap());
        let expected = error.map(|_| before);
        assert_eq!(seen, expected.into_iter().collect::<Vec<_>>(), "{error:?}");
        error.map(str::to_owned)
    }

    /// The guest is content with its memory and its disk, and answers.
    fn assert_works(&self) {
        let at = At(self.vm.qmp_path());
        at.assert_guest_works();
        let checked = || at.ask("x-query-workload")["disk-blocks-checked"].as_u64();
        let (blocks, answers) = (checked(), self.echo.answers());
        until("the guest works on its disk and answers", || {
            (checked() > blocks.map(|blocks| blocks + 8) && self.echo.answers() > answers + 8)
                .then_some(())
        });
        at.assert_guest_works();
    }
}

/// The upgrade to a process that has this much room: what is said of it, nothing if it has succeeded.
fn transfer(scene: &mut Scene, words: &[&str], room: usize) -> Option<String> {
    scene.vm.set(json!({"mode": "cpr-transfer"}));
    let new = Waiting::start(&scene.vm.qmp_path(), words);
    let link = Link::new(new.folder(), Step::Commit);
    let before = scene.begin(json!({"channels": link.channels()}));
    scene.go_on();
    assert!(link.wait(PATIENCE), "{}", scene.vm.said());
    leave_room(new.pid(), room);
    link.go(Deed::Pass);
    scene.end(before)
}

fn a_process_whose_second_device_cannot_work_has_done_nothing_for_the_first(accel: Accel) {
    let _turn = turn();
    for _ in 0..SCENES {
        let Some(mut scene) = Scene::new(accel) else {
            return;
        };
        let options = scene.options.clone();
        let of_machine = ["--mem", scene.machine.mem, "--accel", accel.name()];
        let words = [&of_machine, &options.words()[..]].concat();
        // None is enough for no device.
        let came = (0..ROOM_MAX).find_map(|room| {
            let Some(error) = transfer(&mut scene, &words, room) else {
                return Some(Came::Well);
            };
            scene.assert_works();
            error.contains(SECOND).then_some(Came::Back(error))
        });
        if let Some(Came::Back(_)) = came {
            scene.pause(false);
            let (_new, _) = At(scene.vm.qmp_path()).upgrade();
            scene.assert_works();
            scene.echo.finish();
            return;
        }
        // It closed something after all, and the guest has gone with the new process.
        scene.echo.may_lose();
        scene.echo.end();
    }
    panic!("no room was too little for the second device alone");
}

/// What came of an upgrade to another program.
enum Came {
    /// The guest is there.
    Well,
    /// It is in the old program, for this reason.
    Back(String),
    /// There was no room to go back either.
    Lost,
}

/// The upgrade to a program that has this much room, whose place `stand_in` takes until then.
fn exec(scene: &mut Scene, stand_in: &StandIn, room: usize) -> Came {
    let pid = scene.vm.pid();
    let words = command(&scene.vm, &stand_in.path());
    scene
        .vm
        .set(json!({"mode": "cpr-exec", "cpr-exec-command": words}));
    let itself = Orders {
        program: Some(program_path()),
        ..Orders::default()
    };
    let before = thread::scope(|scope| {
        let asked = scope.spawn(|| {
            let arrived = stand_in.arrives();
            assert!(arrived.arrival.asked);
            arrived.go(&itself);
        });
        let before = scene.begin(json!({}));
        asked.join().unwrap();
        before
    });
    scene.go_on();
    let arrived = stand_in.arrives();
    assert!(!arrived.arrival.asked);
    leave_room(pid, room);
    let arrivals = |vm: &Vm| vm.said().matches("took the guest over").count();
    let so_far = arrivals(&scene.vm);
    arrived.go(&itself);
    let lives = until("a program has the guest, or none", || {
        match scene.vm.lives() {
            false => Some(false),
            true => (arrivals(&scene.vm) > so_far).then_some(true),
        }
    });
    if !lives {
        return Came::Lost;
    }
    // A client needs one, too.
    limit(pid, getrlimit(Resource::Nofile).current.unwrap());
    let error = scene.end(before);
    // The old program had no more room than the new one.
    scene.vm.query("cont");
    error.map_or(Came::Well, Came::Back)
}

fn a_program_whose_second_device_cannot_work_has_done_nothing_for_the_first(accel: Accel) {
    let _turn = turn();
    let mut rooms = (0..ROOM_OF_PROGRAM).rev();
    for _ in 0..SCENES {
        let Some(mut scene) = Scene::new(accel) else {
            return;
        };
        let stand_in = StandIn::new();
        let mut least = ROOM_OF_PROGRAM;
        // What a program has open when its devices begin is not the same to the last one each time.
        let came = rooms.find_map(|room| {
            least = room;
            match exec(&mut scene, &stand_in, room) {
                Came::Well => None,
                came => Some(came),
            }
        });
        match came.expect("there is always room") {
            Came::Back(error) if error.starts_with(SECOND) => {
                scene.assert_works();
                scene.pause(false);
                At(scene.vm.qmp_path()).upgrade_by("exec");
                scene.assert_works();
                scene.echo.finish();
                return;
            }
            Came::Back(_) => scene.assert_works(),
            Came::Lost => {
                // It could not even keep what leads back.
                let said = scene.vm.said();
                assert!(said.contains("no way back is kept"), "{said}");
                scene.echo.may_lose();
            }
            Came::Well => unreachable!("looked for another one"),
        }
        scene.echo.end();
        rooms = (0..least + 4).rev();
    }
    panic!("no room was too little for the second device alone");
}
