//! I1, I2, I3: memory that is no plain memfd: guests that are saved while their memory stays in a file (mode cpr-reboot), as if the host was restarted: archive and
//! memory belong together, once, and whatever else is tried with one of them is refused.

use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::cli::vmferry;
use crate::harness::{Accel, Chance, Launch, Machine, Vm, turn, until};
use crate::listener::Listener;
use crate::qmp::Qmp;

on_both_accelerators!(
    a_guest_goes_on_in_the_memory_that_it_was_saved_with,
    memory_and_archive_that_do_not_belong_together_are_refused,
    a_save_that_fails_leaves_the_guest_running_and_its_memory_unmarked,
    memory_in_a_file_goes_along_with_an_upgrade_and_is_saved_afterwards,
    a_process_whose_archive_was_broken_at_its_end_takes_the_whole_one,
    a_guest_that_cannot_have_its_disk_is_loaded_a_second_time,
    a_process_killed_while_it_saves_leaves_a_whole_guest_or_none,
    huge_pages_that_are_not_there_are_missed_by_name,
);

/// How often a process is killed.
const KILLS: u32 = 5;

/// Where the memory and the archives of a test are.
struct Place {
    machine: Machine,
    folder: TempDir,
}

impl Place {
    fn new(accel: Accel) -> Self {
        Self::in_folder(accel, TempDir::with_prefix("vmferry-reboot-").unwrap())
    }

    /// On a tmpfs, where one is.
    fn in_memory(accel: Accel) -> Self {
        match TempDir::with_prefix_in("vmferry-reboot-", "/dev/shm") {
            Ok(folder) => Self::in_folder(accel, folder),
            Err(_) => Self::new(accel),
        }
    }

    fn in_folder(accel: Accel, folder: TempDir) -> Self {
        let machine = Machine::small(accel);
        Self { machine, folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn launch(&self) -> Launch {
        Launch::default().with(&["--mem-path", self.path("ram").to_str().unwrap()])
    }

    fn source(&self) -> Vm {
        let mut vm = self.machine.start_source(self.launch());
        vm.warm_up();
        vm
    }

    fn is_marked(&self) -> bool {
        let entries = fs::read_dir(self.folder.path()).unwrap();
        let mut names = entries.map(|entry| entry.unwrap().file_name());
        names.any(|name| name.to_string_lossy().starts_with("ram.saved-"))
    }

    fn archive(&self, name: &str) -> String {
        format!("file:{}", self.path(name).display())
    }

    /// Saves the guest, and ends its process.
    fn save(&self, mut vm: Vm, name: &str) -> Value {
        vm.set(json!({"mode": "cpr-reboot", "x-verify": true}));
        vm.migrate(&self.archive(name));
        let info = vm.wait_migration();
        assert_eq!(info["status"], "completed", "{info}\n{}", vm.said());
        vm.assert_guest_stopped();
        assert!(self.is_marked());
        info
    }

    fn load(&self, name: &str) -> Vm {
        let mut vm = self.machine.start_target("defer", self.launch());
        vm.execute("migrate-incoming", json!({ "uri": self.archive(name) }));
        let info = vm.wait_migration();
        assert_eq!(info["status"], "completed", "{info}\n{}", vm.said());
        vm
    }

    fn load_fails(&self, name: &str, part: &str) {
        let mut vm = self.machine.start_target("defer", self.launch());
        vm.execute("migrate-incoming", json!({ "uri": self.archive(name) }));
        vm.assert_gave_up(part);
    }

    /// No VM can be started on the memory, for the reason given.
    fn start_fails(&self, launch: Launch, part: &str) {
        let launch = launch.with(&["--accel", self.machine.accel.name(), "--mem", "64M"]);
        let said = Vm::try_start("refused", &launch).err().unwrap();
        assert!(said.contains(part), "{said}");
    }
}

fn a_guest_goes_on_in_the_memory_that_it_was_saved_with(accel: Accel) {
    let _turn = turn();
    let place = Place::in_memory(accel);
    let mut source = place.source();
    let passes = source.passes();
    place.save(source, "vm");
    let bytes = fs::metadata(place.path("vm")).unwrap().len();
    assert!(bytes < 1 << 20, "memory is in the archive: {bytes} bytes");
    let mut vm = place.load("vm");
    assert!(!place.is_marked(), "it could be loaded again");
    vm.assert_guest_works();
    assert!(vm.passes() > passes);
    // Stopped, and with the command line.
    vm.query("stop");
    let address = place.archive("again");
    let words = ["migrate", &address, "--mode", "cpr-reboot", "--quiet"];
    let output = vmferry(&vm.qmp_path(), &words);
    assert!(output.status.success(), "{output:?}");
    drop(vm);
    let mut vm = place.load("again");
    assert_eq!(vm.runstate(), "paused");
    vm.query("cont");
    vm.assert_guest_works();
    // What was loaded from a file moves on like any other guest, and to memory in a file as well.
    let mut target = place.machine.target();
    vm.move_to(&mut target);
    drop(vm);
    let address = "tcp:127.0.0.1:0";
    let mut back = place.machine.start_target(address, place.launch());
    target.move_to(&mut back);
    back.assert_guest_works();
}

fn memory_and_archive_that_do_not_belong_together_are_refused(accel: Accel) {
    let _turn = turn();
    let place = Place::new(accel);
    let mut source = place.source();
    source.set(json!({"mode": "cpr-reboot"}));
    source.migrate(&place.archive("first"));
    assert_eq!(source.wait_migration()["status"], "completed");
    let incoming = |place: &Place| place.launch().with(&["--incoming", "defer"]);
    place.start_fails(incoming(&place), "another process uses it");
    drop(source);
    place.start_fails(place.launch(), "guest that was saved");
    // Pages would destroy it.
    let mut source = place.machine.source();
    let address = "tcp:127.0.0.1:0";
    let mut target = place.machine.start_target(address, place.launch());
    source.assert_migration_fails(&target.address(), "takes no pages");
    source.assert_guest_works();
    drop((source, target));
    // An archive that is cut is not loaded, and may be mended.
    let good = fs::read(place.path("first")).unwrap();
    fs::write(place.path("first"), &good[..good.len() - 1]).unwrap();
    place.load_fails("first", "incomplete");
    fs::write(place.path("first"), &good).unwrap();
    let mut vm = place.load("first");
    vm.assert_guest_works();
    drop(vm);
    // The memory is of nobody now, and then of another guest.
    place.load_fails("first", "not given the RAM");
    place.save(place.source(), "second");
    place.load_fails("first", "belongs to another");
    place.load("second").assert_guest_works();
    // Memory that is gone.
    place.save(place.source(), "third");
    fs::remove_file(place.path("ram")).unwrap();
    place.start_fails(incoming(&place), "is gone");
    place.start_fails(place.launch(), "guest that was saved");
    place.start_fails(incoming(&place), "is gone");
}

fn a_save_that_fails_leaves_the_guest_running_and_its_memory_unmarked(accel: Accel) {
    let _turn = turn();
    let place = Place::new(accel);
    let listener = Listener::new();
    let mut vm = place.machine.start_source(listener.attend(place.launch()));
    vm.warm_up();
    vm.set(json!({"mode": "cpr-reboot"}));
    let refused = |vm: &mut Vm, address: &str, part: &str| {
        let reason = vm.refusal("migrate", json!({ "uri": address }));
        assert!(reason.contains(part), "{reason}");
    };
    refused(&mut vm, "tcp:127.0.0.1:1", "use file:PATH");
    for (address, part) in [
        ("file:/nowhere/vm", "cannot be opened"),
        ("file:/dev/full", "No space left"),
    ] {
        vm.migrate(address);
        let info = vm.wait_migration();
        vm.assert_failed(&info, part);
        assert!(!place.is_marked(), "{address}");
    }
    listener.veto(true);
    vm.migrate(&place.archive("vetoed"));
    let info = vm.wait_migration();
    vm.assert_failed(&info, "veto");
    assert!(!place.is_marked());
    listener.veto(false);
    place.save(vm, "vm");
    place.load("vm").assert_guest_works();

    let mut vm = place.machine.source();
    vm.set(json!({"mode": "cpr-reboot"}));
    refused(&mut vm, "file:/tmp/vm", "--mem-path");
    vm.assert_guest_works();
}

/// The process dies at any moment of a save; the host lives, so that memory is what the guest has written. An archive that can be loaded
/// has the hash of the memory that it belongs to.
fn a_process_killed_while_it_saves_leaves_a_whole_guest_or_none(accel: Accel) {
    let _turn = turn();
    let place = Place::in_memory(accel);
    let chance = Chance::new();
    let (mut loaded, mut started) = (0, Some(place.source()));
    for _ in 0..KILLS {
        let mut vm = started.take().unwrap_or_else(|| place.source());
        vm.set(json!({"mode": "cpr-reboot", "x-verify": true}));
        vm.migrate(&place.archive("vm"));
        // Saving takes some 10 ms.
        thread::sleep(Duration::from_micros(chance.below(20_000)));
        vm.kill();
        drop(vm);
        let mut target = place.machine.start_target("defer", place.launch());
        let archive = json!({ "uri": place.archive("vm") });
        // There may be no file yet.
        let begun = target.qmp.execute("migrate-incoming", archive).is_ok();
        let complete = begun
            && until("it is loaded or not", || {
                // One that has failed ends, and answers to that effect or not at all.
                let info = target.qmp.execute("query-migrate", json!({}));
                match info.as_ref().map(|info| &info["status"]) {
                    Ok(status) if status == "completed" => Some(true),
                    Ok(status) if status != "failed" => None,
                    Ok(_) | Err(_) => Some(false),
                }
            });
        if complete {
            target.assert_guest_works();
            (loaded, started) = (loaded + 1, Some(target));
        } else {
            drop(target);
            // The guest was lost with its process, and gives way to another.
            for entry in fs::read_dir(place.folder.path()).unwrap() {
                fs::remove_file(entry.unwrap().path()).unwrap();
            }
        }
    }
    println!("{loaded} of {KILLS} archives were complete");
    // Chance may never wait for the end; an archive whose end was waited for is complete.
    let mut vm = started.take().unwrap_or_else(|| place.source());
    vm.set(json!({"mode": "cpr-reboot", "x-verify": true}));
    vm.migrate(&place.archive("vm"));
    assert_eq!(vm.wait_migration()["status"], "completed");
    vm.kill();
    drop(vm);
    place.load("vm").assert_guest_works();
}

fn ask(path: &Path, command: &str) -> Value {
    let mut qmp = until("somebody answers", || Qmp::connect(path));
    qmp.execute(command, json!({})).unwrap()
}

fn memory_in_a_file_goes_along_with_an_upgrade_and_is_saved_afterwards(accel: Accel) {
    let _turn = turn();
    let place = Place::in_memory(accel);
    let mut vm = place.source();
    let path = vm.qmp_path();
    let output = vmferry(&path, &["upgrade", "--json", "--mode", "exec"]);
    assert!(output.status.success(), "{output:?}");
    let output = vmferry(&path, &["upgrade", "--json"]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(vm.wait_exit().code(), Some(0));
    // The lock has gone along.
    let incoming = place.launch().with(&["--incoming", "defer"]);
    place.start_fails(incoming, "another process uses it");
    let words = ["migrate", &place.archive("vm"), "--mode", "cpr-reboot"];
    let output = vmferry(&path, &words);
    assert!(output.status.success(), "{output:?}");
    ask(&path, "quit");
    let ram = fs::File::open(place.path("ram")).unwrap();
    until("the memory is free", || {
        flock(ram.as_fd(), FlockOperation::NonBlockingLockExclusive).ok()
    });
    drop(ram);
    place.load("vm").assert_guest_works();
}

fn a_process_whose_archive_was_broken_at_its_end_takes_the_whole_one(accel: Accel) {
    let _turn = turn();
    let place = Place::new(accel);
    place.save(place.source(), "vm");
    let good = fs::read(place.path("vm")).unwrap();
    let mut broken = good.clone();
    broken[good.len() - 1] ^= 1;
    fs::write(place.path("vm"), broken).unwrap();
    let mut vm = place.machine.start_target("defer", place.launch());
    let arguments = json!({ "uri": place.archive("vm"), "exit-on-error": false });
    vm.execute("migrate-incoming", arguments.clone());
    let info = vm.wait_migration();
    let reason = info["error-desc"].as_str().unwrap();
    assert!(reason.contains("corrupt"), "{info}");
    assert!(place.is_marked(), "the guest is lost");
    fs::write(place.path("vm"), good).unwrap();
    vm.execute("migrate-incoming", arguments);
    until("it is loaded", || {
        (vm.status() == "completed").then_some(())
    });
    assert!(!place.is_marked());
    vm.assert_guest_works();
}

fn a_guest_that_cannot_have_its_disk_is_loaded_a_second_time(accel: Accel) {
    let _turn = turn();
    let place = Place::new(accel);
    let disk = place.path("disk");
    fs::File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    let with_disk = |launch: Launch| launch.with(&["--disk", disk.to_str().unwrap()]);
    let mut vm = place.machine.start_source(with_disk(place.launch()));
    vm.warm_up();
    place.save(vm, "vm");
    // Somebody else has its disk.
    let thief = place.machine.start_source(with_disk(Launch::default()));
    let load = || {
        let mut vm = place
            .machine
            .start_target("defer", with_disk(place.launch()));
        vm.execute("migrate-incoming", json!({ "uri": place.archive("vm") }));
        vm
    };
    load().assert_gave_up("disk");
    assert!(place.is_marked(), "the guest is lost");
    drop(thief);
    let mut vm = load();
    assert_eq!(vm.wait_migration()["status"], "completed");
    vm.assert_guest_works();
}

/// What becomes of a guest in huge pages is tested where the pool is the test's own to set: `tests/lab/huge.rs`.
fn huge_pages_that_are_not_there_are_missed_by_name(accel: Accel) {
    let free = fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    let free: u64 = free.map_or(0, |text| text.trim().parse().unwrap());
    let mem = format!("{}M", 2 * (free + 32));
    let words = ["--huge-pages", "2M", "--accel", accel.name(), "--mem", &mem];
    let launch = Launch::default().with(&words);
    let said = Vm::try_start("refused", &launch).err().unwrap();
    assert!(said.contains("nr_hugepages"), "{said}");
}
