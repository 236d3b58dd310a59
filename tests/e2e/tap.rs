//! Taps for VMs, on a bridge in a network namespace, and packets that a guest sends back (`--workload-net`).

use std::fs::File;
use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::Value;

use crate::harness::{Launch, until};

const HOST: &str = "10.96.0.1";
const GUEST: &str = "10.96.0.2";
const GUEST_MAC: &str = "52:54:00:00:96:02";

/// A bridge with taps for VMs, in a network namespace of its own. Gone on drop.
pub(crate) struct Bridge {
    namespace: String,
}

impl Bridge {
    /// With so many taps. `None`, and a reason on the output, where this process may not make one.
    pub(crate) fn new(taps: usize) -> Option<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let bridge = Self {
            namespace: format!("vmftap{}x{number}", std::process::id()),
        };
        match bridge.set_up(taps) {
            Ok(()) => Some(bridge),
            Err(reason) => {
                println!("SKIPPED: no tap: {reason}");
                None
            }
        }
    }

    fn set_up(&self, taps: usize) -> Result<(), String> {
        ip(&format!("netns add {}", self.namespace))?;
        self.ip("link set lo up")?;
        // One tap needs no bridge: it is the interface of the host.
        let host = if taps == 1 {
            tap(0)
        } else {
            "bridge".to_owned()
        };
        if taps > 1 {
            self.ip("link add bridge type bridge")?;
        }
        for number in 0..taps {
            let tap = tap(number);
            self.ip(&format!("tuntap add {tap} mode tap vnet_hdr"))?;
            if taps > 1 {
                self.ip(&format!("link set {tap} master bridge"))?;
            }
            self.ip(&format!("link set {tap} up"))?;
        }
        self.ip(&format!("addr add {HOST}/24 dev {host}"))?;
        self.ip(&format!("link set {host} up"))?;
        // The guest answers no other question than those of the test.
        let neighbour =
            format!("neigh replace {GUEST} lladdr {GUEST_MAC} dev {host} nud permanent");
        self.ip(&neighbour).map(drop)
    }

    fn ip(&self, words: &str) -> Result<String, String> {
        ip(&format!("-n {} {words}", self.namespace))
    }

    /// Adds that the process is started where the taps are, with one of them, and has its guest answer there.
    pub(crate) fn launch(&self, launch: Launch, number: usize) -> Launch {
        let net = format!("tap={},mac={GUEST_MAC}", tap(number));
        let there = ["ip", "netns", "exec", self.namespace.as_str()];
        let launch = launch.through(&there).with(&["--net", &net]);
        launch.with(&["--workload-net"])
    }

    /// Packets that have come out of the VM on a tap.
    pub(crate) fn received(&self, number: usize) -> u64 {
        let words = format!("-s -j link show {}", tap(number));
        let shown: Value = serde_json::from_str(&self.ip(&words).unwrap()).unwrap();
        shown[0]["stats64"]["rx"]["packets"].as_u64().unwrap()
    }
}

/// A socket to the guest. Must be called from a thread of its own, which is in the namespace afterwards.
fn socket(namespace: &str) -> UdpSocket {
    let namespace = File::open(format!("/run/netns/{namespace}")).unwrap();
    let kind = Some(LinkNameSpaceType::Network);
    move_into_link_name_space(namespace.as_fd(), kind).unwrap();
    let socket = UdpSocket::bind((HOST, 0)).unwrap();
    socket.connect((GUEST, 7)).unwrap();
    socket.set_read_timeout(Some(SEND_EVERY)).unwrap();
    socket
}

impl Drop for Bridge {
    fn drop(&mut self) {
        // With all that is in it.
        let _ = ip(&format!("netns del {}", self.namespace));
    }
}

fn tap(number: usize) -> String {
    format!("guest{number}")
}

fn ip(words: &str) -> Result<String, String> {
    let output = Command::new("ip").args(words.split(' ')).output();
    let output = output.map_err(|error| format!("ip: {error}"))?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
    }
}

const SEND_EVERY: Duration = Duration::from_millis(4);
/// Where packets may be lost the next one is sent when there was an answer, or after so long: a tap keeps what comes while a guest stands,
/// if it is not too much.
const SEND_AT_LAST: Duration = Duration::from_millis(100);
/// So many may be without an answer: fewer than a tap keeps.
const OPEN_MAX: u64 = 200;

/// Sends numbered packets to the guest, over and over, and counts what comes back.
pub(crate) struct Echo {
    shared: Arc<Shared>,
    thread: JoinHandle<Vec<u32>>,
}

struct Shared {
    stop: AtomicBool,
    sent: AtomicU64,
    answers: AtomicU64,
    /// Goes on although answers are missing.
    may_lose: AtomicBool,
    /// Where packets may be lost these and later ones may not.
    must_answer_from: AtomicU64,
}

impl Shared {
    fn new() -> Self {
        Self {
            stop: AtomicBool::new(false),
            sent: AtomicU64::new(0),
            answers: AtomicU64::new(0),
            may_lose: AtomicBool::new(false),
            must_answer_from: AtomicU64::new(u64::MAX),
        }
    }
}

impl Echo {
    /// Begins, and waits for the first answer.
    pub(crate) fn start(bridge: &Bridge) -> Self {
        let shared = Arc::new(Shared::new());
        let of_thread = Arc::clone(&shared);
        let namespace = bridge.namespace.clone();
        let thread = std::thread::spawn(move || run(&socket(&namespace), &of_thread));
        let this = Self { shared, thread };
        until("a first answer", || (this.answers() > 0).then_some(()));
        this
    }

    /// Answers so far.
    pub(crate) fn answers(&self) -> u64 {
        self.shared.answers.load(Ordering::SeqCst)
    }

    /// Packets sent so far.
    pub(crate) fn sent(&self) -> u64 {
        self.shared.sent.load(Ordering::SeqCst)
    }

    /// From now on packets may be lost.
    pub(crate) fn may_lose(&self) {
        self.shared.may_lose.store(true, Ordering::SeqCst);
    }

    /// From this number on none may: the end waits for their answers.
    pub(crate) fn must_answer_from(&self, number: u64) {
        self.shared.must_answer_from.store(number, Ordering::SeqCst);
    }

    /// Each packet has had one answer. Returns how many there were.
    pub(crate) fn finish(self) -> u64 {
        let answers = self.end();
        let wrong: Vec<_> = (0..)
            .zip(&answers)
            .filter(|(_, count)| **count != 1)
            .collect();
        assert!(wrong.is_empty(), "number and answers: {wrong:?}");
        answers.len() as u64
    }

    /// Ends; how many answers each packet has had.
    pub(crate) fn end(self) -> Vec<u32> {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.thread.join().unwrap()
    }
}

/// A packet that says its number, and is of another length than the one before.
fn packet(number: u32) -> Vec<u8> {
    let mut packet = number.to_le_bytes().to_vec();
    packet.extend((0..number % 1400).map(|at| (at ^ number) as u8));
    packet
}

fn run(socket: &UdpSocket, shared: &Shared) -> Vec<u32> {
    let mut answers: Vec<u32> = Vec::new();
    let mut room = [0; 2048];
    let mut take = |answers: &mut Vec<u32>| {
        let Ok(bytes) = socket.recv(&mut room) else {
            return false;
        };
        let number = u32::from_le_bytes(room[..4].try_into().unwrap());
        assert_eq!(room[..bytes], packet(number), "packet {number}");
        answers[number as usize] += 1;
        shared.answers.fetch_add(1, Ordering::SeqCst);
        true
    };
    let (mut last, mut answered) = (Instant::now(), 0);
    while !shared.stop.load(Ordering::SeqCst) {
        let had = shared.answers.load(Ordering::SeqCst);
        let due = if shared.may_lose.load(Ordering::SeqCst) {
            had > answered || last.elapsed() >= SEND_AT_LAST
        } else {
            answers.len() as u64 - had < OPEN_MAX
        };
        if due {
            (last, answered) = (Instant::now(), had);
            let number = u32::try_from(answers.len()).unwrap();
            answers.push(0);
            let sent = socket.send(&packet(number)).unwrap();
            assert!(sent >= 4);
            shared.sent.fetch_add(1, Ordering::SeqCst);
        }
        // Until it waits in vain for as long as there is between two packets.
        while take(&mut answers) {}
    }
    let from = match shared.may_lose.load(Ordering::SeqCst) {
        true => shared.must_answer_from.load(Ordering::SeqCst),
        false => 0,
    };
    let from = usize::try_from(from).unwrap();
    until("every answer", || {
        while take(&mut answers) {}
        let mut wanted = answers.iter().skip(from);
        wanted.all(|count| *count > 0).then_some(())
    });
    // One that is late or doubled comes behind the others.
    let mut quiet = 0;
    while quiet < 50 {
        quiet = if take(&mut answers) { 0 } else { quiet + 1 };
    }
    answers
}
