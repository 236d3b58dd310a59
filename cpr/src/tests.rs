//! Both halves of a hand-over over real sockets, with real descriptors, and with either side gone at every step.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use vmferry_transport::units::MigrationId;

use crate::give::GiverDeadlines;
use crate::handout::{Handout, Prepared};
use crate::manifest::{FdKind, Stage};
use crate::memfd;
use crate::message::{GiverMessage, HandOverError};
use crate::socket::CprSocket;
use crate::take::TakerDeadlines;
use crate::takeover::{Offered, Ready};

const RAM_BYTES: u64 = 1 << 20;
const ID: MigrationId = MigrationId([3; 16]);

fn sockets() -> (CprSocket, CprSocket) {
    let (one, other) = CprSocket::pair().unwrap();
    (one, CprSocket::new(other).unwrap())
}

struct Vm {
    ram: File,
    kicks: Vec<OwnedFd>,
    log: File,
}

impl Vm {
    fn new(kicks: usize) -> Self {
        Self {
            ram: memfd::create_ram("ram0", RAM_BYTES).unwrap(),
            kicks: (0..kicks)
                .map(|_| eventfd(0, EventfdFlags::CLOEXEC).unwrap())
                .collect(),
            log: tempfile::tempfile().unwrap(),
        }
    }

    fn handout(&self) -> Handout<'_> {
        let mut handout = Handout::new();
        handout.add_ram("ram0", RAM_BYTES, &self.ram).unwrap();
        for (at, kick) in self.kicks.iter().enumerate() {
            let role = format!("kick{at}");
            handout
                .add(
                    ("net0", role.as_str()),
                    FdKind::IoEventFd,
                    Stage::HandOver,
                    0,
                    kick,
                )
                .unwrap();
        }
        handout
            .add(
                ("serial", "log"),
                FdKind::Log,
                Stage::HandOver,
                0,
                &self.log,
            )
            .unwrap();
        handout
    }

    fn offer(&self, socket: CprSocket) -> Result<Prepared<'_>, HandOverError> {
        self.handout()
            .offer(socket, ID, "old 1", GiverDeadlines::default())
    }
}

fn receive(socket: CprSocket) -> Result<Offered, HandOverError> {
    Offered::receive(socket, "new 2", TakerDeadlines::default())
}

/// Claims everything of the second stage.
fn take_rest(ready: Ready, kicks: usize) -> Result<(Vec<OwnedFd>, Ready), HandOverError> {
    let mut rest = ready.wait()?;
    let mut fds = vec![rest.claim("serial", "log", FdKind::Log)?];
    for at in 0..kicks {
        fds.push(rest.claim("net0", &format!("kick{at}"), FdKind::IoEventFd)?);
    }
    Ok((fds, rest.taken()?))
}

fn prepare(socket: CprSocket) -> Result<(File, Ready), HandOverError> {
    let offered = receive(socket)?;
    assert_eq!((offered.peer_software(), offered.id()), ("old 1", ID));
    let mut first = offered.accept()?;
    let ram = first.claim("ram0", "ram", FdKind::RamMemfd)?;
    let ram = memfd::reattach("ram0", ram, RAM_BYTES).unwrap();
    Ok((ram, first.taken()?))
}

#[test]
fn a_vm_of_hundreds_of_descriptors_changes_hands_and_they_are_the_same_ones() {
    const KICKS: usize = 600;
    let (ours, theirs) = sockets();
    let vm = Vm::new(KICKS);
    vm.ram.write_all_at(b"guest", 4096).unwrap();
    thread::scope(|scope| {
        let new = scope.spawn(move || {
            let (ram, ready) = prepare(theirs).unwrap();
            let (fds, done) = take_rest(ready, KICKS).unwrap();
            assert!(done.is_done());
            let accounts = done.accounts();
            assert_eq!(
                (accounts.arrived, accounts.claimed, accounts.closed),
                (KICKS + 2, KICKS + 2, 0)
            );
            (ram, fds)
        });
        let prepared = vm.offer(ours).unwrap();
        assert_eq!(prepared.peer_software(), "new 2");
        prepared.hand_over().unwrap();
        let (ram, fds) = new.join().unwrap();
        let mut seen = [0; 5];
        ram.read_exact_at(&mut seen, 4096).unwrap();
        assert_eq!(&seen, b"guest");
        // An eventfd counts in whichever process it is written: the last one is the last one.
        rustix::io::write(&vm.kicks[KICKS - 1], &7_u64.to_ne_bytes()).unwrap();
        let mut count = [0; 8];
        rustix::io::read(&fds[KICKS], &mut count).unwrap();
        assert_eq!(u64::from_ne_bytes(count), 7);
    });
}

/// The most that a user of QEMU has been seen with, as far as this process may have so many: each counts twice here.
#[test]
fn thousands_of_descriptors_change_hands() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).unwrap();
    let room = limit.current.map_or(1 << 20, |most| most / 2);
    let kicks = usize::try_from(room)
        .unwrap()
        .saturating_sub(500)
        .min(7_530);
    let (ours, theirs) = sockets();
    let vm = Vm::new(kicks);
    thread::scope(|scope| {
        let new = scope.spawn(move || {
            let (_ram, ready) = prepare(theirs).unwrap();
            take_rest(ready, kicks).unwrap().1.accounts()
        });
        vm.offer(ours).unwrap().hand_over().unwrap();
        let accounts = new.join().unwrap();
        assert_eq!((accounts.claimed, accounts.closed), (kicks + 2, 0));
    });
}

#[test]
fn a_new_process_that_dies_at_any_step_leaves_everything_with_the_old_one() {
    for step in 0..4 {
        let (ours, theirs) = sockets();
        let vm = Vm::new(3);
        thread::scope(|scope| {
            scope.spawn(move || {
                let mut socket = theirs;
                if step == 0 {
                    return drop(socket);
                }
                if step == 1 {
                    // It dies with the offer unanswered.
                    socket
                        .recv::<GiverMessage>(Some(Duration::from_secs(5)))
                        .unwrap();
                    return;
                }
                let (_ram, ready) = prepare(socket).unwrap();
                if step == 3 {
                    drop(ready.wait());
                }
            });
            let error = match vm.offer(ours) {
                Ok(prepared) => prepared.hand_over().unwrap_err(),
                Err(error) => error,
            };
            assert!(
                matches!(error, HandOverError::Link(_)),
                "step {step}: {error}"
            );
        });
        vm.handout().manifest().unwrap();
    }
}

#[test]
fn an_old_process_that_dies_or_gives_up_is_noticed_by_one_that_waits() {
    for gives_up in [false, true] {
        let (ours, theirs) = sockets();
        let vm = Vm::new(1);
        thread::scope(|scope| {
            let new = scope.spawn(move || {
                let (_ram, ready) = prepare(theirs).unwrap();
                ready.wait().map(drop).unwrap_err()
            });
            let prepared = vm.offer(ours).unwrap();
            if gives_up {
                prepared.give_up("a notifier vetoed");
            } else {
                drop(prepared);
            }
            let error = new.join().unwrap();
            let peer = matches!(&error, HandOverError::Peer(why) if why == "a notifier vetoed");
            assert_eq!(peer, gives_up, "{error}");
            assert_eq!(
                matches!(error, HandOverError::Link(_)),
                !gives_up,
                "{error}"
            );
        });
    }
}

#[test]
fn an_offer_that_is_refused_tells_the_old_process_why() {
    let (ours, theirs) = sockets();
    let vm = Vm::new(0);
    thread::scope(|scope| {
        scope.spawn(move || receive(theirs).unwrap().refuse("no huge pages here"));
        let error = vm.offer(ours).map(drop).unwrap_err();
        assert_eq!(error, HandOverError::Peer("no huge pages here".to_owned()));
    });
}

#[test]
fn what_the_new_process_does_not_know_ends_the_hand_over_before_anything_with_an_owner_left() {
    let (ours, theirs) = sockets();
    let vm = Vm::new(1);
    thread::scope(|scope| {
        let new = scope.spawn(move || receive(theirs).unwrap().accept().unwrap().taken().map(drop));
        let error = vm.offer(ours).map(drop).unwrap_err();
        assert!(
            matches!(&error, HandOverError::Peer(why) if why.contains("wants it")),
            "{error}"
        );
        let error = new.join().unwrap().unwrap_err();
        assert!(
            matches!(&error, HandOverError::Descriptor { name, .. } if name == "ram0"),
            "{error}"
        );
    });
}

#[test]
fn swapped_descriptors_are_refused_by_name() {
    let (mut ours, theirs) = sockets();
    let vm = Vm::new(0);
    let other = memfd::create_ram("other", RAM_BYTES).unwrap();
    thread::scope(|scope| {
        let new = scope.spawn(move || receive(theirs)?.accept().map(drop));
        let manifest = vm.handout().manifest().unwrap();
        let soon = Duration::from_secs(5);
        let offer = crate::message::Offer {
            versions: crate::message::VERSIONS,
            id: ID,
            software: String::new(),
            manifest: Ok(manifest),
        };
        ours.send(&GiverMessage::Offer(offer).encode(), &[], soon)
            .unwrap();
        let fds = GiverMessage::Fds { first: 0, count: 1 };
        ours.send(&fds.encode(), &[other.as_fd()], soon).unwrap();
        let error = new.join().unwrap().unwrap_err();
        assert!(
            matches!(&error, HandOverError::Descriptor { name, reason, .. } if name == "ram0" && reason.contains("announced")),
            "{error}"
        );
    });
}

#[test]
fn silence_ends_at_the_deadline() {
    let (ours, theirs) = sockets();
    let vm = Vm::new(0);
    let deadlines = GiverDeadlines {
        accept_us: 1000,
        ..GiverDeadlines::default()
    };
    let error = vm
        .handout()
        .offer(ours, ID, "", deadlines)
        .map(drop)
        .unwrap_err();
    assert!(matches!(error, HandOverError::Deadline { .. }), "{error}");
    let deadlines = TakerDeadlines {
        offer_us: 1000,
        ..TakerDeadlines::default()
    };
    let (_silent, socket) = sockets();
    let error = Offered::receive(socket, "", deadlines)
        .map(drop)
        .unwrap_err();
    assert!(matches!(error, HandOverError::Deadline { .. }), "{error}");
    drop(theirs);
}

/// Stands for the new binary; does nothing in an ordinary run.
#[test]
fn stand_in_for_a_new_binary() {
    if std::env::var_os(NEW_BINARY).is_none() {
        return;
    }
    let socket = CprSocket::new(crate::spawn::inherited_socket().unwrap()).unwrap();
    let (ram, ready) = prepare(socket).unwrap();
    let (fds, _done) = take_rest(ready, 1).unwrap();
    ram.write_all_at(b"new process", 0).unwrap();
    rustix::io::write(&fds[1], &1_u64.to_ne_bytes()).unwrap();
}

const NEW_BINARY: &str = "VMFERRY_TEST_NEW_BINARY";

#[test]
fn a_new_binary_inherits_one_socket_and_gets_the_rest_through_it() {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args([
            "tests::stand_in_for_a_new_binary",
            "--exact",
            "--test-threads=1",
        ])
        .env(NEW_BINARY, "1")
        .stdout(Stdio::null());
    let (mut child, socket) = crate::spawn::spawn(&mut command).unwrap();
    let vm = Vm::new(1);
    vm.offer(socket).unwrap().hand_over().unwrap();
    assert!(child.wait().unwrap().success());
    let mut seen = [0; 11];
    vm.ram.read_exact_at(&mut seen, 0).unwrap();
    assert_eq!(&seen, b"new process");
}

#[test]
fn a_missing_binary_is_an_error_that_names_it() {
    let error = crate::spawn::spawn(&mut Command::new("/nowhere/vmm"))
        .map(drop)
        .unwrap_err();
    assert!(error.to_string().contains("/nowhere/vmm"), "{error}");
}
