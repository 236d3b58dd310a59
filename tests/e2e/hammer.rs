//! Clients that react to the first sign of an error by changing settings and migrating again, while one migration after the other
//! fails in all sorts of ways: nothing crashes, hangs, leaks or is cleaned up by half (I3, I4, I6, I7). What is refused has a reason.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketType};
use serde_json::{Value, json};
use vmferry_transport::proto::MigrationStatus;
use vmferry_transport::wire::frame::{Abort, AbortCode, Ready, SourceFrame, TargetFrame};

use crate::harness::{
    Accel, Chance, Launch, Machine, PATIENCE, Vm, number_from_env, until, whole_machine,
};
use crate::listener::Listener;
use crate::peer::{Peer, reply};
use crate::proc::Holdings;
use crate::proxy::{Passing, Proxy, Verdict};
use crate::qmp::{Failure, Qmp};

/// Failed migrations, unless `VMFERRY_HAMMER` says otherwise.
const FAILURES: u64 = 1000;
/// Clients that hammer.
const CLIENTS: usize = 4;
/// How often one of them may be too slow.
const BEHIND_MAX: u64 = 3;

#[test]
fn clients_that_hammer_while_migrations_fail_break_nothing() {
    let _turn = whole_machine();
    let chance = Chance::new();
    let wanted = number_from_env("VMFERRY_HAMMER").unwrap_or(FAILURES);
    let machine = Machine {
        mem: "16M",
        working_set: "1M",
        fill: "2M",
        ..Machine::small(Accel::Soft)
    };
    let listener = Listener::new();
    let mut source = machine.start_source(listener.attend(Launch::default()));
    listener.knows(&source);
    source.warm_up();
    let villain = Villain::new();
    let dead_end = DeadEnds::new(&machine);
    let deaf = Deaf::new();
    let addresses = [villain.address(), dead_end.address(), deaf.address.clone()];

    // Warms up what is made once: the connection to the listener, helper threads.
    source.migrate(&addresses[2]);
    source.wait_migration();
    until("the listener hears of a migration", || {
        source.migrate(&addresses[0]);
        source.wait_migration();
        (!listener.heard().is_empty()).then_some(())
    });
    source.assert_guest_works();
    let before = Holdings::settled(source.pid());

    let began = Instant::now();
    let shared = Arc::new(Shared::default());
    let clients: Vec<_> = (0..CLIENTS)
        .map(|_| {
            let client = Client {
                qmp: Qmp::connect(&source.qmp_path()).unwrap(),
                path: source.qmp_path(),
                shared: Arc::clone(&shared),
                addresses: addresses.to_vec(),
                seed: chance.below(u64::MAX),
            };
            thread::spawn(move || client.hammer())
        })
        .collect();
    let observer = observe(&source.qmp_path(), &shared);
    // The first blow.
    let _ = source
        .qmp
        .execute("migrate", json!({ "uri": addresses[0] }));
    let mut seen = 0;
    while seen < wanted {
        let deadline = Instant::now() + PATIENCE;
        let last = seen;
        while seen == last {
            assert!(
                Instant::now() < deadline,
                "nothing fails any more: {}",
                source.said()
            );
            thread::sleep(Duration::from_millis(20));
            seen = shared.failed.load(Ordering::SeqCst);
        }
        listener.veto(chance.below(5) == 0);
        shared.listens(&mut source);
        source.passes();
        source.qmp.events.clear();
    }
    let took = began.elapsed();
    listener.veto(false);
    shared.over.store(true, Ordering::SeqCst);
    stop(&mut source, clients, &addresses[2]);
    shared.observed.store(true, Ordering::SeqCst);
    shared.listens(&mut source);
    source.wait_migration();
    let _ = source
        .qmp
        .execute("migrate", json!({ "uri": addresses[2] }));
    observer.join().unwrap();
    shared.listens(&mut source);
    source.wait_migration();

    println!("{seen} failures in {took:?}: {shared:?}");
    assert!(
        shared.refused.load(Ordering::SeqCst) > 0,
        "nobody was early"
    );
    let failed_in = shared.failed_in.lock().unwrap().clone();
    for status in ["setup", "active"] {
        assert!(failed_in.contains_key(status), "{failed_in:?}");
    }
    drop((villain, dead_end));
    source.assert_guest_works();
    listener.assert_order("the hammered source");
    let deadline = Instant::now() + PATIENCE;
    while source.holdings().counted() != before.counted() {
        let now = source.holdings();
        assert!(Instant::now() < deadline, "before {before:?}\nnow {now:?}");
        thread::sleep(Duration::from_millis(50));
    }
    let grown = source
        .holdings()
        .anon_bytes
        .saturating_sub(before.anon_bytes);
    assert!(grown < 16 << 20, "the heap has grown by {grown} bytes");
    source.move_to(&mut machine.target());
    listener.assert_order("the hammered source, after its last migration");
}

/// Wakes clients with one more failure until all of them have ended.
fn stop(source: &mut Vm, clients: Vec<JoinHandle<()>>, nowhere: &str) {
    for client in clients {
        until("a client ends", || {
            let _ = source.qmp.execute("migrate", json!({ "uri": nowhere }));
            source.qmp.events.clear();
            thread::sleep(Duration::from_millis(20));
            client.is_finished().then_some(())
        });
        client.join().unwrap();
    }
}

/// A port at which nobody listens, and that nobody else can get.
struct Deaf {
    address: String,
    _socket: OwnedFd,
}

impl Deaf {
    fn new() -> Self {
        let socket = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
        rustix::net::bind(&socket, &SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0)).unwrap();
        let bound = rustix::net::getsockname(&socket).unwrap();
        let bound = SocketAddrV4::try_from(bound).unwrap();
        Self {
            address: format!("tcp:{bound}"),
            _socket: socket,
        }
    }
}

#[derive(Debug, Default)]
struct Shared {
    /// The clients may end.
    over: AtomicBool,
    /// The observer may end.
    observed: AtomicBool,
    failed: AtomicU64,
    /// Clients that were hung up on: a thread that a busy host keeps from reading for long enough cannot be told from one that never reads.
    behind: AtomicU64,
    refused: AtomicU64,
    refused_while_failing: AtomicU64,
    accepted: AtomicU64,
    /// How often each status came before `failing`.
    failed_in: Mutex<BTreeMap<&'static str, u64>>,
}

impl Shared {
    /// A new connection for one that was hung up on.
    fn reconnect(&self, path: &Path) -> Qmp {
        let behind = self.behind.fetch_add(1, Ordering::SeqCst) + 1;
        assert!(behind <= BEHIND_MAX, "the VM hangs up on everybody");
        Qmp::connect(path).expect("the VM is gone")
    }

    /// The same for the connection of the test itself.
    fn listens(&self, vm: &mut Vm) {
        if vm.qmp.execute("query-status", json!({})) == Err(Failure::Gone) {
            vm.qmp = self.reconnect(&vm.qmp_path());
        }
    }
}

/// Looks whether one status follows the other as the table of statuses says, and counts failures.
fn observe(path: &Path, shared: &Arc<Shared>) -> JoinHandle<()> {
    let mut qmp = Qmp::connect(path).unwrap();
    let (path, shared) = (path.to_owned(), Arc::clone(shared));
    thread::spawn(move || {
        let mut last: Option<MigrationStatus> = None;
        while !shared.observed.load(Ordering::SeqCst) {
            let Some(event) = qmp.next_event(|event| event["event"] == "MIGRATION") else {
                // What it missed is not known.
                (qmp, last) = (shared.reconnect(&path), None);
                continue;
            };
            let name = event["data"]["status"].as_str().unwrap();
            let status = MigrationStatus::ALL
                .into_iter()
                .find(|status| status.name() == name)
                .unwrap();
            if let Some(last) = last {
                if status == MigrationStatus::Failing {
                    let mut failed_in = shared.failed_in.lock().unwrap();
                    *failed_in.entry(last.name()).or_default() += 1;
                }
                assert!(last.may_become(status), "{last} became {status}");
            }
            if status == MigrationStatus::Failed {
                shared.failed.fetch_add(1, Ordering::SeqCst);
            }
            last = Some(status);
        }
    })
}

/// One that hammers.
struct Client {
    qmp: Qmp,
    path: PathBuf,
    shared: Arc<Shared>,
    addresses: Vec<String>,
    seed: u64,
}

impl Client {
    fn hammer(mut self) {
        let chance = Chance::seeded(self.seed);
        while !self.shared.over.load(Ordering::SeqCst) {
            // One after the other, also those that came while it spoke: if every client missed the last failure, nobody would go on.
            let event = self.qmp.next_event(|event| {
                let status = &event["data"]["status"];
                event["event"] == "MIGRATION" && (status == "failing" || status == "failed")
            });
            if event.is_none() {
                self.qmp = self.shared.reconnect(&self.path);
            }
            for _ in 0..1 + chance.below(3) {
                let ack = json!({ "capability": "switchover-ack", "state": chance.below(2) == 0 });
                self.say("migrate-set-capabilities", json!({ "capabilities": [ack] }));
                let connections = json!({ "multifd-channels": 1 + chance.below(4) });
                self.say("migrate-set-parameters", connections);
                if self.shared.over.load(Ordering::SeqCst) {
                    return;
                }
                let at = usize::try_from(chance.below(self.addresses.len() as u64)).unwrap();
                self.say("migrate", json!({ "uri": self.addresses[at] }));
                if chance.below(20) == 0 {
                    self.say("query-migrate", json!({}));
                }
            }
        }
    }

    /// Says something, which is done or refused with the reason.
    fn say(&mut self, command: &str, arguments: Value) {
        match self.qmp.execute(command, arguments) {
            Ok(_) => self.shared.accepted.fetch_add(1, Ordering::SeqCst),
            Err(Failure::Refused(reason)) => {
                assert!(
                    reason.contains("(status ") || reason.contains("just now"),
                    "{command}: {reason}"
                );
                if reason.contains("(status failing)") {
                    self.shared
                        .refused_while_failing
                        .fetch_add(1, Ordering::SeqCst);
                }
                self.shared.refused.fetch_add(1, Ordering::SeqCst)
            }
            Err(Failure::Gone) => {
                self.qmp = self.shared.reconnect(&self.path);
                0
            }
        };
    }
}

/// A target that fails every migration, in a way that depends on which one it is.
struct Villain {
    address: String,
    over: Arc<AtomicBool>,
}

impl Villain {
    fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("tcp:{}", listener.local_addr().unwrap());
        let over = Arc::new(AtomicBool::new(false));
        let end = Arc::clone(&over);
        thread::spawn(move || {
            let mut number = 0;
            // Data connections of the migration under way, open as long as it is.
            let data: Arc<Mutex<Vec<Peer>>> = Arc::default();
            for socket in listener.incoming() {
                if end.load(Ordering::SeqCst) {
                    return;
                }
                let mut peer = Peer::new(socket.unwrap());
                let data = Arc::clone(&data);
                // Taken in order: the hello of a data connection follows that of its migration.
                match peer.hear::<SourceFrame>() {
                    Some(SourceFrame::Hello(_)) => {
                        number += 1;
                        data.lock().unwrap().clear();
                        thread::spawn(move || be_nasty(number, peer, &data));
                    }
                    Some(SourceFrame::DataHello(_)) => data.lock().unwrap().push(peer),
                    _ => {}
                }
            }
        });
        Self { address, over }
    }

    fn address(&self) -> String {
        self.address.clone()
    }
}

impl Drop for Villain {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
        // Wakes it.
        let _ = TcpStream::connect(self.address.strip_prefix("tcp:").unwrap());
    }
}

/// Lets one migration fail.
fn be_nasty(number: u64, mut control: Peer, data: &Mutex<Vec<Peer>>) {
    let abort = TargetFrame::Abort(Abort::new(AbortCode::Resources, "out of memory"));
    let ready = TargetFrame::Ready(Ready {
        load_us: 1,
        populated_bytes: 1,
        verification: None,
    });
    match number % 8 {
        0 => {}
        1 => control.say(&abort.encode()),
        2 => control.say(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
        way => {
            control.say(&reply().encode());
            if way > 3 {
                thread::sleep(Duration::from_millis(5));
                control.say(&TargetFrame::DataReady.encode());
            }
            // In the middle of whatever it is at then.
            thread::sleep(Duration::from_millis(number % 5));
            match way {
                4 => control.say(&abort.encode()),
                // A success that cannot be.
                5 => control.say(&ready.encode()),
                6 => data.lock().unwrap().clear(),
                _ => {}
            }
        }
    }
    if number % 8 == 6 {
        // The control connection lasts a little longer than the others.
        thread::sleep(Duration::from_millis(20));
    }
    control.hang_up();
}

/// Real targets, one after the other, behind a link that never lets a migration come to its end.
struct DeadEnds {
    address: String,
    over: Arc<AtomicBool>,
    supplier: Option<JoinHandle<()>>,
}

impl DeadEnds {
    fn new(machine: &Machine) -> Self {
        let first = DeadEnd::new(machine, 0);
        // The source needs one address for all of them.
        let gate = Gate::new(first.link.address());
        let (address, over) = (gate.address.clone(), Arc::new(AtomicBool::new(false)));
        let (end, machine) = (Arc::clone(&over), machine.clone());
        let supplier = thread::spawn(move || {
            let (mut dead_end, mut number) = (first, 0);
            while !end.load(Ordering::SeqCst) {
                if !dead_end.target.lives() {
                    number += 1;
                    dead_end = DeadEnd::new(&machine, number);
                    *gate.leads_to.lock().unwrap() = dead_end.link.address();
                }
                thread::sleep(Duration::from_millis(20));
            }
            gate.over.store(true, Ordering::SeqCst);
            // Wakes it.
            let _ = TcpStream::connect(gate.address.strip_prefix("tcp:").unwrap());
        });
        Self {
            address,
            over,
            supplier: Some(supplier),
        }
    }

    fn address(&self) -> String {
        self.address.clone()
    }
}

impl Drop for DeadEnds {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
        if let Some(supplier) = self.supplier.take() {
            let ended = supplier.join();
            assert!(ended.is_ok() || thread::panicking());
        }
    }
}

/// A real target, and a link that is cut at some frame, READY at the latest.
struct DeadEnd {
    target: Vm,
    link: Proxy,
}

impl DeadEnd {
    fn new(machine: &Machine, number: u64) -> Self {
        let launch = Launch::default().with(&["--x-deadline-scale", "10"]);
        let mut target = machine.start_target("tcp:127.0.0.1:0", launch);
        let mut frames = 3 + number * 7 % 40;
        let link = Proxy::new(&target.address(), move |passing| {
            frames = frames.saturating_sub(1);
            let ready = matches!(passing, Passing::Target(TargetFrame::Ready(_)));
            if frames == 0 || ready {
                Verdict::Cut
            } else {
                Verdict::Pass
            }
        });
        Self { target, link }
    }
}

/// A port that leads to another one.
struct Gate {
    address: String,
    leads_to: Arc<Mutex<String>>,
    over: Arc<AtomicBool>,
}

impl Gate {
    fn new(leads_to: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let this = Self {
            address: format!("tcp:{}", listener.local_addr().unwrap()),
            leads_to: Arc::new(Mutex::new(leads_to)),
            over: Arc::default(),
        };
        let (leads_to, over) = (Arc::clone(&this.leads_to), Arc::clone(&this.over));
        thread::spawn(move || {
            for socket in listener.incoming() {
                if over.load(Ordering::SeqCst) {
                    return;
                }
                let to = leads_to.lock().unwrap().clone();
                // Refused between two targets: the source learns it by the end of its connection.
                if let Ok(partner) = TcpStream::connect(to.strip_prefix("tcp:").unwrap()) {
                    let socket = socket.unwrap();
                    pass_on(&socket, &partner);
                    pass_on(&partner, &socket);
                }
            }
        });
        this
    }
}

/// Copies on a thread of its own until one side ends.
fn pass_on(from: &TcpStream, to: &TcpStream) {
    let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
    thread::spawn(move || {
        // The sides end as they like.
        let _ = std::io::copy(&mut from, &mut to);
        for socket in [&from, &to] {
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
    });
}
