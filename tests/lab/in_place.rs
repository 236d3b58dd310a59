//! Taps and the kernel's vhost in an upgrade in place: the tap is never opened again, the back end has one owner at a time, no packet is
//! lost or doubled, and whatever goes wrong the guest goes on at the old process with its network.

use std::fs::{self, File};
use std::io::Read;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::process::{
    Pid, PidfdFlags, PidfdGetfdFlags, Signal, kill_process, pidfd_getfd, pidfd_open,
};
use serde_json::{Value, json};
use socket2::{Domain, Protocol, Socket, Type};
use vmferry::machine::heirloom::DeviceFd;
use vmferry::machine::ram::MachineRam;
use vmferry::machine::virtio::OutsideConfig;
use vmferry_cpr::manifest::{FdEntry, FdKind, FileId, Stage};
use vmferry_devices::Before;
use vmferry_devices::notifier::{Mode, Notifier, Setup};
use vmferry_devices::vhost::{VhostMemory, VhostNotifier};
use vmferry_transport::units::MigrationId;

use crate::command::run;
use crate::harness::{Accel, Launch, Machine, until};
use crate::linux::{Guest, Network};
use crate::modules::{load, load_for};
use crate::net::Tap;
use crate::qmp::Qmp;
use crate::successor::{Orphan, Waiting, new_pid, upgrade};
use crate::trace::{Request, Trace, Traced};
use crate::upgrades::upgrade_again_and_again;
use crate::vhost::{Guest as Driven, Host, PAGES, received, vsock_host};

const VHOST_NET: &str = "/dev/vhost-net";

/// A VM at a path, whichever process it is in.
struct At(PathBuf);

impl At {
    fn qmp(&self) -> Qmp {
        until("somebody answers", || Qmp::connect(&self.0))
    }

    fn ask(&self, command: &str, arguments: Value) -> Value {
        self.qmp().execute(command, arguments).unwrap()
    }

    fn status(&self) -> String {
        let info = self.ask("query-migrate", json!({}));
        info["status"].as_str().unwrap_or("none").to_owned()
    }

    fn assert_runs(&self) {
        assert_eq!(self.ask("query-status", json!({}))["status"], "running");
    }

    fn upgrade(&self) -> Orphan {
        let report = upgrade(&self.0, "transfer");
        println!("upgrade: {report}");
        Orphan(new_pid(&report))
    }
}

fn pid(number: u32) -> Pid {
    Pid::from_raw(number.cast_signed()).unwrap()
}

fn signal(process: &Waiting, signal: Signal) {
    kill_process(pid(process.pid()), signal).unwrap();
}

/// Begins to hand the VM over to `waiting`, up to the moment before the guest is stopped; the new process is frozen then.
fn begin(at: &At, waiting: &Waiting) -> Qmp {
    let mut qmp = at.qmp();
    let mut execute = |command: &str, arguments: Value| qmp.execute(command, arguments).unwrap();
    let pause = json!([{"capability": "pause-before-switchover", "state": true}]);
    execute("migrate-set-capabilities", json!({ "capabilities": pause }));
    execute("migrate-set-parameters", json!({"mode": "cpr-transfer"}));
    execute("migrate", json!({"channels": waiting.channels()}));
    until("it waits before the switchover", || {
        (at.status() == "pre-switchover").then_some(())
    });
    signal(waiting, Signal::STOP);
    execute("migrate-continue", json!({"state": "pre-switchover"}));
    qmp
}

/// The attempt has failed, for a reason that contains `part`, and the guest goes on. The next one is an ordinary one.
fn failed(at: &At, mut qmp: Qmp, status: &str, part: &str) {
    let info = until("the attempt ends", || {
        let info = at.ask("query-migrate", json!({}));
        let ends = ["completed", "failed", "cancelled"];
        let ended = ends.into_iter().any(|end| info["status"] == end);
        ended.then_some(info)
    });
    assert_eq!(info["status"], status, "{info}");
    let reason = info["error-desc"].as_str().unwrap_or_default();
    println!("{status}: {reason}");
    assert!(reason.contains(part), "{reason}");
    let no_pause = json!([{"capability": "pause-before-switchover", "state": false}]);
    let arguments = json!({ "capabilities": no_pause });
    until("the guest goes on", || {
        let status = at.ask("query-status", json!({}));
        (status["status"] == "running").then_some(())
    });
    qmp.execute("migrate-set-capabilities", arguments).unwrap();
}

/// Waits until process `number` has made `request`.
fn until_asked(trace: &Trace, number: u32, request: Request) {
    until(format_args!("{request:?} by {number}"), || {
        let asked = trace.so_far();
        let is_it = |one: &Traced| one.process == number && one.request == request;
        asked.iter().any(is_it).then_some(())
    });
}

fn print_trace(asked: &[Traced]) {
    println!("the kernel was asked, in this order:");
    for one in asked {
        println!("  {one}");
    }
}

/// The order in an upgrade that works: the old process gives its `count` back ends away, then the new one takes them. Nobody else asks.
fn assert_order(asked: &[Traced], old: u32, new: u32, count: usize) {
    print_trace(asked);
    let of_owner = asked
        .iter()
        .filter(|one| one.request != Request::SetBackend)
        .map(|one| (one.process, one.request))
        .collect::<Vec<_>>();
    let given = [(old, Request::ResetOwner)].repeat(count);
    let taken = [(new, Request::SetOwner)].repeat(count);
    assert_eq!(of_owner, [given, taken].concat());
    // The rings stand before, and work after.
    let mut backends = asked
        .iter()
        .zip(0..)
        .filter(|(one, _)| one.request == Request::SetBackend);
    let given = asked
        .iter()
        .position(|one| one.request == Request::ResetOwner)
        .unwrap();
    assert!(backends.all(|(one, at)| one.process == if at < given { old } else { new }));
}

/// A process's descriptor of the file at `path`, in our hands; the last if there are several.
fn steal(process: u32, path: &str) -> File {
    let handle = pidfd_open(pid(process), PidfdFlags::empty()).unwrap();
    let fds = fs::read_dir(format!("/proc/{process}/fd")).unwrap();
    let ours = fds
        .flatten()
        .filter(|fd| fs::read_link(fd.path()).is_ok_and(|link| link == Path::new(path)));
    let number = ours.map(|fd| fd.file_name().into_string().unwrap().parse().unwrap());
    let number = number.max().unwrap();
    File::from(pidfd_getfd(handle, number, PidfdGetfdFlags::empty()).unwrap())
}

/// Owns what the VM's process gives away before the new one can.
fn take_too_early(process: u32) -> Host {
    let vhost = steal(process, VHOST_NET);
    let (memory, _ram): (VhostMemory, _) = vmferry_tests::virtqueue::ram(16);
    let nothing = File::open("/dev/null").unwrap();
    let host = Host::net(vhost, &nothing, &memory);
    let refused = host.device.lock().unwrap().own().unwrap_err();
    let reason = std::error::Error::source(&refused).unwrap().to_string();
    println!("SET_OWNER before RESET_OWNER: {reason}");
    assert!(reason.contains("busy"), "{reason}");
    host
}

#[test]
fn a_back_end_changes_its_owner_in_order_and_the_network_hears_nothing() {
    load_for("/dev/vhost-net", "vhost_net");
    let taps = [11, 12].map(|number| Tap::new(&format!("10.98.{number}.1/24")));
    let tap = &taps[0];
    let words = taps.each_ref().map(|tap| format!("tap={}", tap.name()));
    let words = ["--net", &words[0], "--net", &words[1]];
    let machine = Machine::emulated(Accel::Soft);
    let mut vm = machine.start_source(Launch::default().with(&words));
    vm.warm_up();
    let at = At(vm.qmp_path());
    let first = at.upgrade();
    assert_eq!(vm.wait_exit().code(), Some(0), "{}", vm.said());
    // The first process had no driver, and owned nothing. This one does.
    let trace = Trace::start();
    let second = at.upgrade();
    assert_order(&trace.take(), first.0, second.0, 2);

    // The new process finds that it was given something that somebody else owns: it gives back what it has taken before it says so, the
    // guest goes on, and its next process gets all.
    let words = [&["--accel", "soft", "--mem", "16M"][..], &words].concat();
    let waiting = Waiting::start(&at.0, &words);
    let rival = take_too_early(second.0);
    let qmp = begin(&at, &waiting);
    until("the owner has let go", || {
        rival.device.lock().unwrap().own().ok()
    });
    signal(&waiting, Signal::CONT);
    failed(&at, qmp, "failed", "VHOST_SET_OWNER");
    at.assert_runs();
    let asked = trace.take();
    print_trace(&asked);
    let by = |process: u32| {
        let its = asked
            .iter()
            .zip(0..)
            .filter(move |(one, _)| one.process == process);
        its.map(|(one, at)| (one.request, at)).collect::<Vec<_>>()
    };
    let (new, old) = (by(waiting.pid()), by(second.0));
    let requests: Vec<_> = new.iter().map(|(request, _)| *request).collect();
    let (set, reset) = (Request::SetOwner, Request::ResetOwner);
    assert_eq!(requests, [set, set, reset]);
    let taken_back = old.iter().find(|(request, _)| *request == set).unwrap();
    assert!(new[2].1 < taken_back.1, "it had not given back what it had");
    drop((waiting, rival, trace));

    let before = received(tap);
    let _third = at.upgrade();
    at.assert_runs();
    at.ask("announce-self", announcement());
    until("what was announced", || {
        (received(tap) > before).then_some(())
    });
    assert_eq!(received(tap), before + 1, "it was announced by itself");
}

/// What a program finds on the way back from one that died with everything in its hands: the kernel remembers that one.
#[test]
fn a_program_goes_on_with_a_back_end_that_the_one_before_died_with() {
    load_for(VHOST_NET, "vhost_net");
    let tap = Tap::new("10.98.13.1/24");
    let word = format!("tap={},vhost=on", tap.name());
    let machine = Machine {
        mem: "16M",
        working_set: "256K",
        dirty_rate: "640",
        fill: "512K",
        ..Machine::small(Accel::Soft)
    };
    let mut vm = machine.start_source(Launch::default().with(&["--net", &word]));
    vm.warm_up();
    // This one owns what it was given.
    let owner = At(vm.qmp_path()).upgrade();
    let stolen = [
        (FdKind::Tap, "tap", steal(owner.0, "/dev/net/tun")),
        (FdKind::Vhost, "vhost", steal(owner.0, VHOST_NET)),
    ];
    drop(owner);

    let mut outside = OutsideConfig {
        nets: vec![word.parse().unwrap()],
        ..OutsideConfig::default()
    };
    outside.name().unwrap();
    let ram = MachineRam::create(16 << 20).unwrap();
    let take = |before, features| {
        let promised = stolen.each_ref().map(|(kind, role, _)| FdEntry {
            name: "virtio-net/0".to_owned(),
            role: (*role).to_owned(),
            kind: *kind,
            stage: Stage::HandOver,
            value: features,
            file: FileId::default(),
        });
        let fds = stolen.each_ref().map(|(kind, role, fd)| DeviceFd {
            device: "virtio-net/0".to_owned(),
            role: (*role).to_owned(),
            kind: *kind,
            value: features,
            fd: fd.try_clone().unwrap().into(),
        });
        let backends = outside.backends(&ram, Some((before, &promised)));
        let mut backend = backends.unwrap().remove(0);
        let taken = backend.take_over(&mut Vec::from(fds));
        taken
            .map(|()| backend.features())
            .map_err(|error| error.to_string())
    };
    let known = 1 << 5;
    let busy = take(Before::Process, known).unwrap_err();
    assert!(busy.contains("VHOST_SET_OWNER"), "{busy}");
    let lacks = take(Before::Program, known | 1 << 40).unwrap_err();
    assert!(lacks.contains("0x10000000000"), "{lacks}");
    // What the kernel offers beyond that the driver has never seen.
    assert_eq!(take(Before::Program, known), Ok(known));
}

/// Many enough to see what grows.
const UPGRADES: u64 = 8;

#[test]
fn a_guest_keeps_its_tap_and_its_serial_port_through_many_processes() {
    load_for("/dev/vhost-net", "vhost_net");
    load("tun");
    upgrade_again_and_again(Accel::Soft, UPGRADES, true);
}

/// Arguments of `announce-self` for one packet.
fn announcement() -> Value {
    json!({"initial": 50, "max": 550, "rounds": 1, "step": 50})
}

/// Sends a numbered request for an echo to the guest again and again, and counts what comes back.
struct Pinger {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Vec<u32>>,
}

const PING_EVERY: Duration = Duration::from_millis(40);
const PING_ID: [u8; 2] = [0x76, 0x66];

/// The number in an answer, with its IP header, if it is one of ours.
fn answered(packet: &[u8]) -> Option<u16> {
    let icmp = packet.get(20..28)?;
    let ours = icmp[0] == 0 && icmp[4..6] == PING_ID;
    ours.then(|| u16::from_be_bytes([icmp[6], icmp[7]]))
}

fn ping(number: u16) -> Vec<u8> {
    let [high, low] = number.to_be_bytes();
    let mut packet = vec![8, 0, 0, 0, PING_ID[0], PING_ID[1], high, low];
    let sum: u32 = packet
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]))
        .sum();
    let sum = !u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
    packet[2..4].copy_from_slice(&sum.to_be_bytes());
    packet
}

impl Pinger {
    fn start(guest: &str) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stops = Arc::clone(&stop);
        let to: SocketAddr = format!("{guest}:0").parse().unwrap();
        let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4)).unwrap();
        socket.set_nonblocking(true).unwrap();
        let thread = std::thread::spawn(move || {
            let mut answers: Vec<u32> = Vec::new();
            let take = |answers: &mut Vec<u32>| {
                let mut packet = [0; 256];
                while let Ok(bytes) = (&socket).read(&mut packet) {
                    if let Some(number) = answered(&packet[..bytes]) {
                        answers[usize::from(number)] += 1;
                    }
                }
            };
            while !stops.load(Ordering::SeqCst) {
                let number = u16::try_from(answers.len()).unwrap();
                answers.push(0);
                socket.send_to(&ping(number), &to.into()).unwrap();
                std::thread::sleep(PING_EVERY);
                take(&mut answers);
            }
            until("every answer", || {
                take(&mut answers);
                answers.iter().all(|count| *count > 0).then_some(())
            });
            // One that is doubled comes behind the others.
            std::thread::sleep(10 * PING_EVERY);
            take(&mut answers);
            answers
        });
        Self { stop, thread }
    }

    /// Every request that was sent has had one answer.
    fn finish(self) {
        self.stop.store(true, Ordering::SeqCst);
        let answers = self.thread.join().unwrap();
        println!("{} packets to the guest and back", answers.len());
        let wrong: Vec<_> = (0..)
            .zip(&answers)
            .filter(|(_, count)| **count != 1)
            .collect();
        assert!(wrong.is_empty(), "number and answers: {wrong:?}");
    }
}

#[test]
fn no_packet_is_lost_or_doubled_when_the_process_changes_or_cannot() {
    let guest = Guest::new();
    let network = Network::new();
    let launch = network.launch(0, guest.launch("console", "guest.net"));
    let words: Vec<String> = launch.words().into_iter().map(str::to_owned).collect();
    let mut vm = guest.machine.start_source(launch);
    guest.wait_round(&mut vm, "console", 1);
    let at = At(vm.qmp_path());
    // Nobody need ask for the guest's address while it cannot answer.
    let known = "neigh replace 10.97.0.2 lladdr 52:54:00:00:97:02 dev guests nud permanent";
    run("ip", &known.split(' ').collect::<Vec<_>>());
    let pinger = Pinger::start("10.97.0.2");
    let round = guest.round("console");
    let goes_on = |after: u64| {
        until("the guest goes on", || {
            at.assert_runs();
            (guest.round("console") > after).then_some(())
        });
    };
    let trace = Trace::start();
    let first = at.upgrade();
    assert_order(&trace.take(), vm.pid(), first.0, 1);
    goes_on(round);
    assert_eq!(vm.wait_exit().code(), Some(0), "{}", vm.said());

    let mut same: Vec<&str> = words.iter().map(String::as_str).collect();
    same.extend(["--accel", "kvm", "--mem", guest.machine.mem]);
    let begin_another = || {
        let waiting = Waiting::start(&at.0, &same);
        at.ask("migrate-set-parameters", json!({"x-verify": true}));
        let qmp = begin(&at, &waiting);
        until_asked(&trace, first.0, Request::ResetOwner);
        (waiting, qmp)
    };
    // Given away, and taken back before anybody took it.
    let (waiting, mut qmp) = begin_another();
    qmp.execute("migrate_cancel", json!({})).unwrap();
    until_asked(&trace, first.0, Request::SetOwner);
    failed(&at, qmp, "cancelled", "");
    drop(waiting);
    trace.take();
    let round = guest.round("console");
    goes_on(round);

    // Given away, and the new process dies with it.
    let (waiting, qmp) = begin_another();
    signal(&waiting, Signal::CONT);
    until_asked(&trace, waiting.pid(), Request::SetOwner);
    signal(&waiting, Signal::KILL);
    failed(&at, qmp, "failed", "");
    drop(waiting);
    let round = guest.round("console");
    goes_on(round);

    trace.take();
    let second = at.upgrade();
    assert_order(&trace.take(), first.0, second.0, 1);
    let round = guest.round("console");
    goes_on(round);
    pinger.finish();
}

#[test]
fn a_socket_device_is_given_away_or_it_is_known_before_anything_is_stopped_that_it_cannot_be() {
    load("vhost_vsock");
    let (memory, _ram) = vmferry_tests::virtqueue::ram(PAGES);
    let guest = Driven::new(&memory);
    let host = vsock_host(&memory);
    host.start_anew(&guest);
    let blocker = host.device.lock().unwrap().blocker_in_place();
    let mut notifier = VhostNotifier::new(host.device.clone());
    let vetoed = notifier.setup(&Setup {
        mode: Mode::CprTransfer,
        migration: MigrationId::default(),
    });
    let vetoed = vetoed.unwrap_err().to_string();
    notifier.failed();
    println!("vhost-vsock in place: {vetoed}");
    let why = blocker.as_deref().unwrap_or("still works");
    assert!(
        vetoed.contains("vsock/0") && vetoed.contains(why),
        "{vetoed}"
    );
    let mut device = host.device.lock().unwrap();
    assert!(device.is_running(), "it was not touched");
    device.stop().unwrap();
    // What was known agrees with what the kernel does.
    let released = device.release();
    assert_eq!(released.is_ok(), blocker.is_none(), "{released:?}");
    device.start().unwrap();
}
