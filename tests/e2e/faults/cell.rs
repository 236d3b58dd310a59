//! One cell of the table: a migration, one fault in one phase of it, and a look at everything that must hold afterwards.

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketType, bind, getsockname, listen, socket};
use serde_json::json;
use vmferry_transport::limits::Deadlines;
use vmferry_transport::wire::frame::SourceFrame;

use crate::grid;
use crate::harness::{Accel, Launch, Machine, PATIENCE, Vm, until};
use crate::listener::Listener;
use crate::proc::Holdings;
use crate::proxy::{Line, Passing, Proxy, Verdict, Way};
use crate::qmp::Qmp;
use crate::watch::Watch;

use super::fault::{Fault, Outcome};
use super::phase::Phase;

/// Deadlines where one of them has to pass, in percent of the usual ones. Elsewhere none is shortened: a busy host would be taken for a
/// fault.
const SOON: u32 = 40;
/// A device that the guest must let go of.
const PRIMARY: &str = "net0";
/// What a busy host may add to deadlines.
const SLACK: Duration = Duration::from_secs(40);
/// How often the watch looks.
const WATCH_EVERY: Duration = Duration::from_millis(25);

/// A VM and who hears of its migrations.
pub(super) struct Side {
    pub(super) vm: Vm,
    listener: Listener,
    /// Its deadlines are short.
    pub(super) hurries: bool,
}

pub(super) type Seen = grid::Seen<Outcome>;

impl Side {
    /// With a guest.
    pub(super) fn source(accel: Accel, phase: Phase, hurries: bool) -> Self {
        let mut side = Self::start(hurries, |launch| {
            let launch = match phase {
                Phase::WaitUnplug => launch.with(&["--x-failover-primary", PRIMARY]),
                _ => launch,
            };
            Machine::tiny(accel).start_source(launch)
        });
        side.vm.warm_up();
        side
    }

    /// That waits for the guest of this one.
    fn target(&self, accel: Accel) -> Self {
        Self::start(self.hurries, |launch| {
            Machine::tiny(accel).start_target("tcp:127.0.0.1:0", launch)
        })
    }

    fn start(hurries: bool, start: impl FnOnce(Launch) -> Vm) -> Self {
        let listener = Listener::new();
        let mut launch = Launch::default();
        if hurries {
            launch = launch.with(&["--x-deadline-scale", &SOON.to_string()]);
        }
        let vm = start(listener.attend(launch));
        listener.knows(&vm);
        Self {
            vm,
            listener,
            hurries,
        }
    }
}

/// Longest time that a fault may keep either side undecided.
fn bound(hurries: bool) -> Duration {
    if !hurries {
        // No deadline has to pass.
        return SLACK;
    }
    let Deadlines {
        hello_us,
        connect_us,
        stall_us,
        keepalive_us: _,
        ready_us,
        running_us,
        resolve_retry_us,
        resolve_us,
        unplug_us,
        linger_us: _,
    } = Deadlines::scaled(SOON);
    // One after the other, which no migration manages.
    let micros = hello_us
        + connect_us
        + stall_us
        + ready_us
        + running_us
        + resolve_retry_us
        + resolve_us
        + unplug_us;
    Duration::from_micros(micros) + SLACK
}

/// A link that stops at the frame that `phase` begins with, says so, and waits for what is to be done with it.
struct Held {
    proxy: Proxy,
    arrived: Receiver<()>,
    go: Sender<Verdict>,
    asked: Arc<AtomicBool>,
}

impl Held {
    fn new(phase: Phase, target: &mut Vm) -> Self {
        let (tell, arrived) = channel();
        let (go, wait) = channel();
        let asked = Arc::new(AtomicBool::new(false));
        let asks = Arc::clone(&asked);
        let mut held = false;
        let proxy = Proxy::new(&target.address(), move |passing| {
            if matches!(passing, Passing::Source(SourceFrame::Resolve(_))) {
                asks.store(true, Ordering::SeqCst);
            }
            if held || !phase.begins_with(passing) {
                return Verdict::Pass;
            }
            held = true;
            // Whoever waited may have given up; then the frame passes.
            let _ = tell.send(());
            match wait.recv() {
                Ok(Verdict::Replace(_)) => Verdict::Replace(corrupted(passing)),
                Ok(verdict) => verdict,
                Err(_) => Verdict::Pass,
            }
        });
        Self {
            proxy,
            arrived,
            go,
            asked,
        }
    }
}

/// The frame with another checksum.
fn corrupted(passing: &Passing<'_>) -> Vec<u8> {
    let mut bytes = match passing {
        Passing::Source(frame) => frame.encode(),
        Passing::Target(frame) => frame.encode(),
        Passing::Data(frame) => frame.bytes.to_vec(),
    };
    bytes[12] ^= 1;
    bytes
}

/// Runs one cell with the guest of `source`. Returns what was seen, and the guest where it is now, if it is anywhere.
pub(super) fn run(
    accel: Accel,
    phase: Phase,
    fault: Fault,
    mut source: Side,
) -> (Seen, Option<Side>) {
    let before = source.settled();
    source.vm.qmp.events.clear();
    prepare(&mut source.vm, phase);
    if phase == Phase::Connecting {
        return connecting(accel, fault, source, &before);
    }
    let mut target = source.target(accel);
    let bound = bound(source.hurries);
    let held = Held::new(phase, &mut target.vm);
    let watch = Watch::every(WATCH_EVERY, source.vm.qmp_path(), target.vm.qmp_path());
    source.vm.migrate(&held.proxy.address());
    match phase.status() {
        Some(status) => source.vm.wait_status(status),
        None => {
            let arrived = held.arrived.recv_timeout(PATIENCE);
            assert!(
                arrived.is_ok(),
                "the phase does not come: {}",
                source.vm.said()
            );
        }
    }
    let began = Instant::now();
    strike(phase, fault, &held, &mut source.vm, &mut target.vm);
    if fault != Fault::KillSource {
        go_on(phase, fault, &mut source.vm);
    }
    let (outcome, error) = decide(fault, &held, &mut source, &mut target);
    let took = began.elapsed();
    assert!(took < bound, "took {took:?}");
    watch.end();
    // Nothing may arrive late and change what was decided.
    drop(held);
    source
        .listener
        .assert_order_unless(fault == Fault::KillSource, "source");
    target
        .listener
        .assert_order_unless(fault == Fault::KillTarget, "target");
    let seen = Seen {
        outcome,
        took,
        error,
    };
    let guest = match outcome {
        Outcome::Stays | Outcome::StaysAsked | Outcome::StaysLater | Outcome::Decided => {
            let next = stays(accel, phase, source, target, &before);
            Some(next)
        }
        Outcome::Moves | Outcome::MovesAsked | Outcome::MovesLater => {
            if source.vm.lives() {
                assert_eq!(source.vm.runstate(), "postmigrate");
                source.vm.assert_guest_stopped();
            }
            target.vm.assert_guest_works();
            Some(target)
        }
        Outcome::Ends => None,
    };
    (seen, guest)
}

/// Settings that let the migration come to the phase.
fn prepare(source: &mut Vm, phase: Phase) {
    let forever = phase == Phase::LaterRound;
    source.set(json!({
        "multifd-channels": 2,
        "downtime-limit": if forever { 0 } else { 300 },
        "x-verify": false,
    }));
    let pause = phase == Phase::PreSwitchover;
    set_pause(source, pause);
}

fn set_pause(source: &mut Vm, pause: bool) {
    let capability = json!({ "capability": "pause-before-switchover", "state": pause });
    source.execute(
        "migrate-set-capabilities",
        json!({ "capabilities": [capability] }),
    );
}

/// Lets the fault happen, and the frame that was held go its way.
fn strike(phase: Phase, fault: Fault, held: &Held, source: &mut Vm, target: &mut Vm) {
    let proxy = &held.proxy;
    if matches!(phase, Phase::Setup | Phase::WaitUnplug) {
        // Data connections come in any order.
        until("both data connections are there", || {
            [0, 1]
                .map(Line::Data)
                .iter()
                .all(|line| proxy.knows(*line))
                .then_some(())
        });
    }
    let mut verdict = Verdict::Pass;
    match fault {
        // What the victim has said goes with it.
        Fault::KillSource => {
            source.kill();
            if phase.held().is_some_and(|(_, way)| way == Way::ToTarget) {
                verdict = Verdict::Cut;
            }
        }
        Fault::KillTarget => {
            target.kill();
            if phase.held().is_some_and(|(_, way)| way == Way::ToSource) {
                verdict = Verdict::Cut;
            }
        }
        Fault::Cut(line) => proxy.cut(line),
        Fault::LinkDown => {
            proxy.shut_door();
            proxy.cut(Line::All);
        }
        Fault::Stall(line, None) => proxy.stall(line, &[Way::ToTarget, Way::ToSource]),
        Fault::Stall(line, Some(way)) => proxy.stall(line, &[way]),
        Fault::Corrupt(line, way) if phase.held() == Some((line, way)) => {
            verdict = Verdict::Replace(Vec::new());
        }
        Fault::Corrupt(line, way) => proxy.garble(line, way),
    }
    // Nobody waits in phases that no frame begins.
    let _ = held.go.send(verdict);
}

/// What the operator does next, where the migration would not go on without.
fn go_on(phase: Phase, fault: Fault, source: &mut Vm) {
    match phase {
        // Either is refused if the fault has been noticed already.
        Phase::LaterRound => {
            let _ = source
                .qmp
                .execute("migrate-set-parameters", json!({ "downtime-limit": 300 }));
        }
        Phase::WaitUnplug if fault.only_data() => {
            let _ = source
                .qmp
                .execute("x-confirm-unplug", json!({ "id": PRIMARY }));
        }
        Phase::PreSwitchover if fault.only_data() => {
            let _ = source
                .qmp
                .execute("migrate-continue", json!({ "state": "pre-switchover" }));
        }
        _ => {}
    }
}

/// What became of the target.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Fate {
    Killed,
    /// It waits for a guest as before.
    Waits,
    /// The guest will never run there.
    GaveUp,
    Runs,
}

/// Waits until both sides have decided.
fn decide(fault: Fault, held: &Held, source: &mut Side, target: &mut Side) -> (Outcome, String) {
    if fault == Fault::KillSource {
        return match fate(&mut target.vm, false) {
            Fate::Runs => (Outcome::Moves, String::new()),
            Fate::Waits | Fate::GaveUp => (Outcome::Ends, String::new()),
            Fate::Killed => unreachable!("one side is killed"),
        };
    }
    let (mut later, mut decided) = (false, false);
    let killed = fault == Fault::KillTarget;
    let info = until("the source decides", || {
        let info = source.vm.query("query-migrate");
        let status = info["status"].as_str().unwrap();
        if ["completed", "failed"].contains(&status) {
            return Some(info);
        }
        let mut events = source.vm.qmp.events.iter();
        if !later && !decided && events.any(|event| event["event"] == "x-MIGRATION_UNRESOLVED") {
            source.vm.assert_guest_stopped();
            if killed {
                decided = true;
                let outcome = json!({ "outcome": "source-runs" });
                source.vm.execute("x-resolve", outcome);
            } else {
                later = true;
                held.proxy.repair();
            }
        }
        None
    });
    let error = info["error-desc"].as_str().unwrap_or_default().to_owned();
    let completed = info["status"] == "completed";
    let asked = held.asked.load(Ordering::SeqCst);
    let fate = match killed {
        true => Fate::Killed,
        false => fate(&mut target.vm, completed),
    };
    let outcome = match (completed, fate) {
        (true, Fate::Killed) => Outcome::Ends,
        (true, Fate::Runs) if later => Outcome::MovesLater,
        (true, Fate::Runs) if asked => Outcome::MovesAsked,
        (true, Fate::Runs) => Outcome::Moves,
        (false, Fate::Killed) if decided => Outcome::Decided,
        (false, Fate::Killed) => Outcome::Stays,
        (false, Fate::GaveUp | Fate::Waits) if later => Outcome::StaysLater,
        (false, Fate::GaveUp | Fate::Waits) if asked => Outcome::StaysAsked,
        (false, Fate::GaveUp | Fate::Waits) => Outcome::Stays,
        (completed, fate) => panic!("completed {completed}, and the target {fate:?}: {info}"),
    };
    (outcome, error)
}

fn fate(target: &mut Vm, must_come: bool) -> Fate {
    until("the target decides", || {
        if !target.lives() {
            return Some(Fate::GaveUp);
        }
        let status = target.qmp.execute("query-status", json!({})).ok()?;
        let info = target.qmp.execute("query-migrate", json!({})).ok()?;
        match info["status"].as_str() {
            Some("failed") => {
                assert_ne!(status["running"], true, "{status}");
                Some(Fate::GaveUp)
            }
            Some("completed") => (status["running"] == true).then_some(Fate::Runs),
            // Nothing has come, and nothing is on its way any more.
            None if !must_come => Some(Fate::Waits),
            _ => None,
        }
    })
}

/// The guest is at the source, which is as it was before and migrates again. Returns the guest where it is then.
fn stays(
    accel: Accel,
    phase: Phase,
    mut source: Side,
    mut target: Side,
    before: &Holdings,
) -> Side {
    if phase.guest_is_stopped() {
        let heard = source.listener.heard();
        let last = heard.last().unwrap();
        assert_eq!((last.event.as_str(), last.guest_ran), ("failed", false));
    }
    source.vm.assert_guest_works();
    source.assert_same(before);
    if phase == Phase::WaitUnplug {
        // Until it has let go of the device once more the second migration would wait.
        let confirmer = Confirmer::of(&source.vm);
        let mut fresh = source.target(accel);
        source.vm.move_to(&mut fresh.vm);
        confirmer.end();
        return fresh;
    }
    // A target that has not been touched is as good as new.
    if target.vm.status_if_it_lives().as_deref() != Some("none") {
        target = source.target(accel);
    }
    again(source, target)
}

/// Migrates again, with nothing in the way.
fn again(mut source: Side, mut target: Side) -> Side {
    source.vm.set(json!({ "downtime-limit": 300 }));
    set_pause(&mut source.vm, false);
    source.vm.move_to(&mut target.vm);
    source.listener.assert_order("source, second migration");
    target
}

/// Plays a guest that lets go of its device when it is asked to.
struct Confirmer(thread::JoinHandle<()>);

impl Confirmer {
    fn of(vm: &Vm) -> Self {
        let mut qmp = Qmp::connect(&vm.qmp_path()).unwrap();
        Self(thread::spawn(move || {
            qmp.event(|event| event["event"] == "UNPLUG_PRIMARY");
            qmp.execute("x-confirm-unplug", json!({ "id": PRIMARY }))
                .unwrap();
        }))
    }

    fn end(self) {
        self.0.join().unwrap();
    }
}

/// Faults before anybody speaks.
fn connecting(
    accel: Accel,
    fault: Fault,
    mut source: Side,
    before: &Holdings,
) -> (Seen, Option<Side>) {
    let began;
    match fault {
        Fault::KillTarget => {
            let mut target = source.target(accel);
            let address = target.vm.address();
            target.vm.kill();
            began = Instant::now();
            source.vm.migrate(&address);
        }
        Fault::KillSource | Fault::Stall(..) => {
            let deaf = Deaf::new();
            began = Instant::now();
            source.vm.migrate(&deaf.address);
            assert_eq!(source.vm.status(), "setup");
            if fault == Fault::KillSource {
                source.vm.kill();
                let seen = Seen {
                    outcome: Outcome::Ends,
                    took: began.elapsed(),
                    error: String::new(),
                };
                return (seen, None);
            }
            source.vm.wait_migration();
        }
        _ => {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            began = Instant::now();
            source
                .vm
                .migrate(&format!("tcp:{}", listener.local_addr().unwrap()));
            let (mut socket, _) = listener.accept().unwrap();
            if matches!(fault, Fault::Corrupt(..)) {
                socket.write_all(&[0xa5; 64]).unwrap();
                // Open, so that it is the bytes that count.
                source.vm.wait_migration();
            }
        }
    }
    let info = source.vm.wait_migration();
    let took = began.elapsed();
    assert!(took < bound(source.hurries), "took {took:?}");
    let error = source.vm.assert_failed(&info, "");
    source.assert_same(before);
    let seen = Seen {
        outcome: Outcome::Stays,
        took,
        error,
    };
    let target = source.target(accel);
    (seen, Some(again(source, target)))
}

/// A port where connections are not answered at all: its queue is full.
struct Deaf {
    address: String,
    _listener: std::os::fd::OwnedFd,
    _queue: Vec<TcpStream>,
}

impl Deaf {
    fn new() -> Self {
        let listener = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
        bind(&listener, &std::net::SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        listen(&listener, 0).unwrap();
        let at: std::net::SocketAddr = getsockname(&listener).unwrap().try_into().unwrap();
        let mut queue = Vec::new();
        let patience = Duration::from_millis(200);
        while let Ok(place) = TcpStream::connect_timeout(&at, patience) {
            queue.push(place);
        }
        Self {
            address: format!("tcp:{at}"),
            _listener: listener,
            _queue: queue,
        }
    }
}

impl Side {
    /// What the process holds when it has changed nothing for a while, without connections to the listener.
    fn settled(&self) -> Holdings {
        Holdings::settled(self.vm.pid()).without_sockets(self.listener.connections())
    }

    /// It holds what it held before.
    fn assert_same(&self, before: &Holdings) {
        let began = Instant::now();
        loop {
            let now = self.settled();
            if now == *before {
                return;
            }
            assert!(began.elapsed() < SLACK, "before {before:?}\nnow {now:?}");
        }
    }
}
