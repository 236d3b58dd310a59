//! Who owns the guest's disks, and who hears of a migration (I1, I3, I7): an image that both sides could write has one owner at a time,
//! a guest runs only with its disks, and everybody who was told SETUP hears how it ended before the guest goes on.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread;

use serde_json::{Value, json};
use tempfile::TempDir;
use vmferry::machine::disk::{Disk, DiskConfig, DiskError};
use vmferry_transport::wire::frame::TargetFrame;

use crate::harness::{Accel, Launch, Machine, Vm, turn, until};
use crate::listener::Listener;
use crate::proxy::{Passing, Proxy, Verdict};
use crate::qmp::Qmp;
use crate::upgrade::At;

on_both_accelerators!(
    a_shared_image_belongs_to_the_source_then_to_nobody_then_to_the_target,
    a_target_that_cannot_have_the_image_leaves_guest_and_image_at_the_source,
    a_guest_whose_image_was_taken_by_a_third_party_stays_stopped_until_it_is_back,
    an_operators_pause_does_not_lose_the_image_to_a_failed_migration,
    a_guest_that_arrives_paused_takes_its_image_only_when_it_starts,
    a_veto_half_way_fails_the_migration_and_everybody_told_hears_it,
    a_source_that_is_told_to_end_at_once_ends_when_everybody_knows_that_it_is_done,
    a_program_after_an_exec_that_is_told_to_end_at_once_ends_when_everybody_knows,
    failed_is_told_before_the_guest_runs_again,
    a_target_hands_back_what_it_took_over_before_the_source_hears_of_the_failure,
    a_migration_waits_until_the_guest_has_let_go_of_its_card,
    a_cancelled_wait_gives_the_card_back,
    a_guest_that_does_not_let_go_in_time_keeps_its_card_and_stays,
);

/// An image in a folder of its own.
struct Image(TempDir);

impl Image {
    fn new() -> Self {
        let folder = TempDir::with_prefix("vmferry-disk-").unwrap();
        let file = File::create(folder.path().join("disk.raw")).unwrap();
        file.set_len(1 << 20).unwrap();
        Self(folder)
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("disk.raw")
    }

    fn launch(&self) -> Launch {
        Launch::default().with(&["--disk", self.path().to_str().unwrap()])
    }

    /// This process as one more party that wants the image.
    fn third_party(&self) -> Disk {
        Disk::open(DiskConfig {
            path: self.path(),
            id: "third-party".to_owned(),
            read_only: false,
        })
        .unwrap()
    }

    /// Whether a process has it open: only an owner has. Unlike a try of the lock, looking is in nobody's way.
    fn is_open_in(&self, pid: u32) -> bool {
        fs::read_dir(format!("/proc/{pid}/fd"))
            .unwrap()
            .flatten()
            .any(|entry| fs::read_link(entry.path()).is_ok_and(|file| file == self.path()))
    }

    /// The process that has the image; none if it could be had.
    fn owner(&self) -> Option<u32> {
        let disk = self.third_party();
        until("it is clear who has the image", || match disk.activate() {
            Ok(_) => {
                disk.inactivate().unwrap();
                Some(None)
            }
            // It may have been given back before its owner was looked for.
            Err(DiskError::Locked { holder, .. }) => holder.map(|holder| Some(holder.pid)),
            Err(error) => panic!("{error}"),
        })
    }
}

fn source_with(machine: &Machine, launch: Launch) -> Vm {
    let mut source = machine.start_source(launch);
    source.warm_up();
    source
}

fn target_with(machine: &Machine, launch: Launch) -> Vm {
    machine.start_target("tcp:127.0.0.1:0", launch)
}

/// A link that calls `at` when READY passes: the source has given its disks back, and the target has not taken them.
fn link_with_ready(target: &mut Vm, at: impl FnOnce() + Send + 'static) -> Proxy {
    let mut at = Some(at);
    Proxy::new(&target.address(), move |passing| {
        if matches!(passing, Passing::Target(TargetFrame::Ready(_)))
            && let Some(at) = at.take()
        {
            at();
        }
        Verdict::Pass
    })
}

fn a_shared_image_belongs_to_the_source_then_to_nobody_then_to_the_target(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let image = Arc::new(Image::new());
    let mut source = source_with(&machine, image.launch());
    let mut target = target_with(&machine, image.launch());
    assert_eq!(image.owner(), Some(source.pid()));
    // While pages move, the source's guest may still write.
    let (tell, seen) = channel();
    let during = Arc::clone(&image);
    let proxy = Proxy::new(&target.address(), move |passing| {
        let moment = match passing {
            Passing::Target(TargetFrame::RoundPlaced(_)) => "round",
            Passing::Target(TargetFrame::Ready(_)) => "ready",
            Passing::Target(TargetFrame::Running { .. }) => "running",
            _ => return Verdict::Pass,
        };
        tell.send((moment, during.owner())).unwrap();
        Verdict::Pass
    });
    source.move_to_at(&mut target, &proxy.address());
    drop(proxy);
    let seen: Vec<_> = seen.iter().collect();
    assert_eq!(seen[0], ("round", Some(source.pid())));
    assert!(seen.contains(&("ready", None)), "{seen:?}");
    assert_eq!(seen.last(), Some(&("running", Some(target.pid()))));
    assert_eq!(image.owner(), Some(target.pid()));
    // A source that has handed its guest over wants nothing back, even when the target has gone.
    target.kill();
    source.refusal("cont", json!({}));
    assert_eq!(image.owner(), None);
}

fn a_target_that_cannot_have_the_image_leaves_guest_and_image_at_the_source(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let image = Image::new();
    let mut source = source_with(&machine, image.launch());
    // The target was given another image, and somebody has it.
    let other = Image::new();
    let third_party = other.third_party();
    third_party.activate().unwrap();
    let mut target = target_with(&machine, other.launch());
    let error = source.assert_migration_fails(&target.address(), "another process holds the lock");
    assert!(error.contains("disk disk0"), "{error}");
    assert_eq!(image.owner(), Some(source.pid()));
    target.assert_guest_stopped();
    target.kill();
    third_party.inactivate().unwrap();
    source.move_to(&mut target_with(&machine, image.launch()));
}

fn a_guest_whose_image_was_taken_by_a_third_party_stays_stopped_until_it_is_back(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let image = Image::new();
    let mut source = source_with(&machine, image.launch());
    let mut target = target_with(&machine, image.launch());
    let third_party = Arc::new(image.third_party());
    let thief = Arc::clone(&third_party);
    let proxy = link_with_ready(&mut target, move || {
        thief.activate().unwrap();
    });
    source.migrate(&proxy.address());
    let info = source.wait_migration();
    assert_eq!(info["status"], "failed", "{info}");
    let error = info["error-desc"].as_str().unwrap();
    for part in ["could not be resumed", "another process holds the lock"] {
        assert!(error.contains(part), "{error}");
    }
    source.assert_guest_stopped();
    target.assert_guest_stopped();
    // Trying again is harmless, and says why it is in vain.
    for _ in 0..3 {
        let refusal = source.refusal("cont", json!({}));
        assert!(
            refusal.contains("another process holds the lock"),
            "{refusal}"
        );
        source.assert_guest_stopped();
    }
    third_party.inactivate().unwrap();
    source.query("cont");
    source.assert_guest_works();
    assert_eq!(image.owner(), Some(source.pid()));
    drop(proxy);
    target.kill();
    source.move_to(&mut target_with(&machine, image.launch()));
}

fn an_operators_pause_does_not_lose_the_image_to_a_failed_migration(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let image = Image::new();
    let mut source = source_with(&machine, image.launch());
    source.query("stop");
    let mut target = target_with(&machine, image.launch());
    let proxy = Proxy::new(&target.address(), |passing| match passing {
        Passing::Target(TargetFrame::Ready(_)) => Verdict::CutAndShut,
        _ => Verdict::Pass,
    });
    source.migrate(&proxy.address());
    assert_eq!(source.wait_migration()["status"], "failed");
    assert_eq!(source.runstate(), "paused");
    until("the stopped guest has its image back", || {
        image.is_open_in(source.pid()).then_some(())
    });
    assert_eq!(image.owner(), Some(source.pid()));
    source.query("cont");
    source.assert_guest_works();
    source.move_to(&mut target_with(&machine, image.launch()));
}

fn a_guest_that_arrives_paused_takes_its_image_only_when_it_starts(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let image = Image::new();
    let mut source = source_with(&machine, image.launch());
    let mut target = target_with(&machine, image.launch().with(&["--paused"]));
    source.migrate(&target.address());
    assert_eq!(source.wait_migration()["status"], "completed");
    target.wait_runstate("paused");
    assert_eq!(image.owner(), None);
    let third_party = image.third_party();
    third_party.activate().unwrap();
    let refusal = target.refusal("cont", json!({}));
    assert!(
        refusal.contains("another process holds the lock"),
        "{refusal}"
    );
    third_party.inactivate().unwrap();
    target.query("cont");
    target.assert_guest_works();
    assert_eq!(image.owner(), Some(target.pid()));
}

/// What a server says to `setup`.
type Opinion = Arc<Mutex<Option<&'static str>>>;
/// Called with each event before it is answered.
type Look = Box<dyn FnMut(&str) + Send>;

/// A server that hears of migrations.
struct Server {
    folder: TempDir,
    heard: Receiver<String>,
    veto: Opinion,
}

impl Server {
    fn new() -> Self {
        Self::looking(Box::new(|_| {}))
    }

    fn looking(mut look: Look) -> Self {
        let folder = TempDir::with_prefix("vmferry-server-").unwrap();
        let listener = UnixListener::bind(folder.path().join("s")).unwrap();
        let veto = Opinion::default();
        let opinion = Arc::clone(&veto);
        let (tell, heard) = channel();
        // Ends with the test process at the latest; its VM is killed before.
        thread::spawn(move || {
            for connection in listener.incoming() {
                let connection = connection.unwrap();
                for line in BufReader::new(&connection).lines().map_while(Result::ok) {
                    let line: Value = serde_json::from_str(&line).unwrap();
                    let event = line["event"].as_str().unwrap().to_owned();
                    look(&event);
                    let answer = match *opinion.lock().unwrap() {
                        Some(reason) if event == "setup" => json!({ "veto": reason }),
                        _ => json!({ "ok": true }),
                    };
                    if tell.send(event).is_err()
                        || (&connection)
                            .write_all(format!("{answer}\n").as_bytes())
                            .is_err()
                    {
                        return;
                    }
                }
            }
        });
        Self {
            folder,
            heard,
            veto,
        }
    }

    fn option(&self, id: &str) -> String {
        let path = self.folder.path().join("s");
        // As long as a busy host may keep it from answering.
        format!("unix:{},id={id},timeout=60", path.to_str().unwrap())
    }

    fn objects(&self, reason: Option<&'static str>) {
        *self.veto.lock().unwrap() = reason;
    }

    /// What it has heard since the last call.
    fn heard(&self) -> Vec<String> {
        self.heard.try_iter().collect()
    }
}

fn a_veto_half_way_fails_the_migration_and_everybody_told_hears_it(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let servers = [Server::new(), Server::new(), Server::new()];
    let mut launch = Launch::default();
    for (server, id) in servers.iter().zip(["first", "second", "third"]) {
        launch = launch.with(&["--notify", &server.option(id)]);
    }
    let mut source = source_with(&machine, launch);
    servers[1].objects(Some("a client is copying a file"));
    for _ in 0..3 {
        let mut target = machine.target();
        let error = source.assert_migration_fails(&target.address(), "a client is copying a file");
        assert!(error.contains("device second vetoes"), "{error}");
        assert_eq!(servers[0].heard(), ["setup", "failed"]);
        assert_eq!(servers[1].heard(), ["setup", "failed"]);
        assert!(servers[2].heard().is_empty());
        target.kill();
    }
    servers[1].objects(None);
    source.move_to(&mut machine.target());
    for server in &servers {
        // DONE follows the end that the operator sees.
        let end = server.heard();
        assert_eq!(end.first().map(String::as_str), Some("setup"));
        match end.get(1) {
            Some(event) => assert_eq!(event, "done"),
            None => assert_eq!(server.heard.recv().unwrap(), "done"),
        }
    }
}

/// Two servers of a VM; the first does not answer DONE, so that the second is still to hear it when the VM is told to end, and hears it
/// when the VM does not wait for the first any more.
struct Slow([Listener; 2]);

impl Slow {
    fn new() -> Self {
        let servers = [Listener::new(), Listener::new()];
        servers[0].hold("done");
        Self(servers)
    }

    fn attend(&self) -> Launch {
        let [first, second] = &self.0;
        // Time enough for the answers that the first gives.
        second.attend(first.attend_within(6, Launch::default()))
    }

    fn assert_told_before(&self, vm: &mut Vm) {
        vm.query("quit");
        let [first, second] = &self.0;
        assert_eq!(vm.wait_exit().code(), Some(0), "{}", vm.said());
        first.assert_order("the first");
        second.assert_order("the second");
    }
}

fn a_source_that_is_told_to_end_at_once_ends_when_everybody_knows_that_it_is_done(accel: Accel) {
    let _turn = turn();
    let (machine, servers) = (Machine::small(accel), Slow::new());
    let mut source = source_with(&machine, servers.attend());
    source.move_to(&mut machine.target());
    servers.assert_told_before(&mut source);
}

fn a_program_after_an_exec_that_is_told_to_end_at_once_ends_when_everybody_knows(accel: Accel) {
    let _turn = turn();
    let (machine, servers) = (Machine::small(accel), Slow::new());
    let mut vm = source_with(&machine, servers.attend());
    let at = At(vm.qmp_path());
    at.upgrade_by("exec");
    vm.qmp = until("the new program answers", || Qmp::connect(&at.0));
    servers.assert_told_before(&mut vm);
}

/// State of the VM at `path`, and what its guest has written.
fn at_this_moment(path: &Path) -> Option<(Value, Value)> {
    let mut qmp = Qmp::connect(path)?;
    let status = qmp.execute("query-status", json!({})).ok()?;
    let workload = qmp.execute("x-query-workload", json!({})).ok()?;
    Some((status["status"].clone(), workload["pages-written"].clone()))
}

fn failed_is_told_before_the_guest_runs_again(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let path: Arc<Mutex<PathBuf>> = Arc::default();
    let moments: Arc<Mutex<Vec<(Value, Value)>>> = Arc::default();
    let (at, seen) = (Arc::clone(&path), Arc::clone(&moments));
    let server = Server::looking(Box::new(move |event| {
        if event == "failed" {
            let path = at.lock().unwrap().clone();
            // Twice, with all the time between that the guest needs to write something.
            for _ in 0..2 {
                seen.lock().unwrap().extend(at_this_moment(&path));
                thread::sleep(std::time::Duration::from_millis(50));
            }
        }
    }));
    let launch = Launch::default().with(&["--notify", &server.option("display")]);
    let mut source = source_with(&machine, launch);
    *path.lock().unwrap() = source.qmp_path();
    let mut target = machine.target();
    let proxy = Proxy::new(&target.address(), |passing| match passing {
        Passing::Target(TargetFrame::Ready(_)) => Verdict::CutAndShut,
        _ => Verdict::Pass,
    });
    source.migrate(&proxy.address());
    let info = source.wait_migration();
    source.assert_failed(&info, "");
    assert_eq!(server.heard(), ["setup", "failed"]);
    let moments = moments.lock().unwrap();
    let [first, second] = moments.as_slice() else {
        panic!("{moments:?}");
    };
    assert_eq!(first.0, "finish-migrate");
    assert_eq!(first, second, "the guest ran while FAILED was told");
}

fn a_target_hands_back_what_it_took_over_before_the_source_hears_of_the_failure(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let path: Arc<Mutex<PathBuf>> = Arc::default();
    let moments: Arc<Mutex<Vec<Value>>> = Arc::default();
    let (at, seen) = (Arc::clone(&path), Arc::clone(&moments));
    let server = Server::looking(Box::new(move |event| {
        assert_eq!(event, "incoming-failed");
        let mut qmp = Qmp::connect(&at.lock().unwrap()).unwrap();
        let info = qmp.execute("query-migrate", json!({})).unwrap();
        seen.lock().unwrap().push(info["status"].clone());
    }));
    // A disk that is alike, so that only the target's cannot be had.
    let alike = Image::new();
    let mut source = source_with(&machine, alike.launch());
    *path.lock().unwrap() = source.qmp_path();
    let image = Image::new();
    let third_party = image.third_party();
    third_party.activate().unwrap();
    let launch = image
        .launch()
        .with(&["--notify", &server.option("display")]);
    let mut target = target_with(&machine, launch);
    source.assert_migration_fails(&target.address(), "another process holds the lock");
    assert_eq!(server.heard(), ["incoming-failed"]);
    assert_eq!(*moments.lock().unwrap(), ["device"]);
    until("the target gives up", || {
        (target.status() == "failed").then_some(())
    });
}

/// A source with a stand-in for a passed-through network card, and a server that hears how its migrations go.
fn source_with_primary(machine: &Machine, server: &Server, launch: Launch) -> Vm {
    let launch = launch.with(&[
        "--x-failover-primary",
        "net0",
        "--notify",
        &server.option("display"),
    ]);
    source_with(machine, launch)
}

/// Starts a migration and waits until the guest is asked to let go of its card.
fn migrate_until_asked(source: &mut Vm, address: &str) {
    source.migrate(address);
    let event = source.qmp.event(|event| event["event"] == "UNPLUG_PRIMARY");
    assert_eq!(event.unwrap()["data"]["device-id"], "net0");
    source.wait_status("wait-unplug");
    assert_eq!(source.status(), "wait-unplug");
}

fn confirm(source: &mut Vm) {
    source.execute("x-confirm-unplug", json!({ "id": "net0" }));
}

/// The card is plugged: a guest that was not asked has nothing to confirm.
fn assert_plugged(vm: &mut Vm) {
    let refusal = vm.refusal("x-confirm-unplug", json!({ "id": "net0" }));
    assert!(refusal.contains("Plugged"), "{refusal}");
}

fn a_migration_waits_until_the_guest_has_let_go_of_its_card(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let server = Server::new();
    let mut source = source_with_primary(&machine, &server, Launch::default());
    assert_plugged(&mut source);
    let launch = Launch::default().with(&["--x-failover-primary", "net0"]);
    let mut target = target_with(&machine, launch);
    migrate_until_asked(&mut source, &target.address());
    // The guest runs on while it is waited for, and its settings are fixed.
    source.assert_guest_works();
    let refusal = source.refusal("migrate", json!({ "uri": "tcp:127.0.0.1:1" }));
    assert!(refusal.contains("under way"), "{refusal}");
    assert_eq!(source.status(), "wait-unplug");
    confirm(&mut source);
    let info = source.wait_migration();
    assert_eq!(info["status"], "completed", "{info}");
    let statuses = source.statuses();
    assert_eq!(
        statuses,
        ["setup", "wait-unplug", "active", "device", "completed"]
    );
    target.assert_guest_works();
    // The guest has the card of its new side.
    assert_plugged(&mut target);
}

fn a_cancelled_wait_gives_the_card_back(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let server = Server::new();
    let mut source = source_with_primary(&machine, &server, Launch::default());
    for confirmed in [false, true] {
        let mut target = machine.target();
        if confirmed {
            // Cancelled later, with the card gone.
            source.set(json!({ "max-bandwidth": 1 << 20 }));
        }
        migrate_until_asked(&mut source, &target.address());
        if confirmed {
            confirm(&mut source);
            source.wait_status("active");
        }
        source.query("migrate_cancel");
        assert_eq!(source.wait_migration()["status"], "cancelled");
        assert_plugged(&mut source);
        assert_eq!(server.heard(), ["setup", "failed"]);
        source.assert_guest_works();
        target.kill();
    }
    source.set(json!({ "max-bandwidth": 0 }));
    let mut target = machine.target();
    migrate_until_asked(&mut source, &target.address());
    confirm(&mut source);
    assert_eq!(source.wait_migration()["status"], "completed");
    target.assert_guest_works();
}

fn a_guest_that_does_not_let_go_in_time_keeps_its_card_and_stays(accel: Accel) {
    let machine = Machine::small(accel);
    let server = Server::new();
    // In percent of the usual deadlines.
    let sooner = Launch::default().with(&["--x-deadline-scale", "40"]);
    let mut source = source_with_primary(&machine, &server, sooner);
    let mut target = machine.target();
    migrate_until_asked(&mut source, &target.address());
    let info = source.wait_migration();
    source.assert_failed(&info, "did not let go of device \"net0\" within 12 s");
    assert_plugged(&mut source);
    assert_eq!(server.heard(), ["setup", "failed"]);
    target.assert_gave_up("the source gave up");
    let mut target = machine.target();
    migrate_until_asked(&mut source, &target.address());
    confirm(&mut source);
    assert_eq!(source.wait_migration()["status"], "completed");
    target.assert_guest_works();
}
