//! Both halves of a hand-over against each other, with either side killed, giving up or cut off at every message, and at random.
//!
//! What must hold in every run:
//!
//! - no descriptor of the second stage is sent before the guest was stopped, or after the giver gave up
//! - the giver is done only if the taker is, and then every descriptor was claimed once
//! - whatever the taker does not end up with is closed; the giver keeps all it had
//! - both sides come to an end

use std::collections::VecDeque;
use std::rc::Rc;

use vmferry_transport::units::{MigrationId, Moment};

use crate::give::{Giver, GiverAction, GiverDeadlines};
use crate::manifest::{FdEntry, FdKind, FileId, Manifest, Stage};
use crate::message::{BATCH_MAX, GiverMessage, HandOverError, TakerMessage};
use crate::take::{Taker, TakerAction, TakerDeadlines};

/// A descriptor: the number of its entry, and how many copies of it are open.
type Fd = Rc<usize>;

/// What goes wrong, and when: before the step with this number.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Mishap {
    Nothing,
    GiverDies,
    TakerDies,
    GiverGivesUp,
    TakerRefuses,
    LinkCut,
    /// Nothing arrives any more in either direction.
    Silence,
    /// A descriptor is lost on the way.
    FdLost,
    /// The guest could not be stopped, or a notifier vetoed.
    StopFails,
}

const MISHAPS: [Mishap; 9] = [
    Mishap::Nothing,
    Mishap::GiverDies,
    Mishap::TakerDies,
    Mishap::GiverGivesUp,
    Mishap::TakerRefuses,
    Mishap::LinkCut,
    Mishap::Silence,
    Mishap::FdLost,
    Mishap::StopFails,
];

#[derive(Debug, Default)]
struct Ends {
    giver_done: bool,
    giver_failed: Option<HandOverError>,
    taker_failed: Option<HandOverError>,
}

struct World {
    now: Moment,
    giver: Option<Giver>,
    taker: Option<Taker<Fd>>,
    /// How many descriptors may leave while the guest runs.
    prepare: usize,
    fds: Vec<Fd>,
    to_taker: VecDeque<(GiverMessage, Vec<Fd>)>,
    to_giver: VecDeque<TakerMessage>,
    claimed: Vec<Fd>,
    stopped: bool,
    stop_fails: bool,
    lose_fd: bool,
    cut: bool,
    silent: bool,
    steps: usize,
    ends: Ends,
}

fn manifest(prepare: usize, hand_over: usize) -> Manifest {
    let entry = |at: usize, stage, kind| FdEntry {
        name: format!("dev{at}"),
        role: "fd".to_owned(),
        kind,
        stage,
        value: at as u64,
        file: FileId::default(),
    };
    let first = (0..prepare).map(|at| entry(at, Stage::Prepare, FdKind::RamMemfd));
    let second = (prepare..prepare + hand_over).map(|at| entry(at, Stage::HandOver, FdKind::Vhost));
    Manifest::new(first.chain(second).collect()).unwrap()
}

impl World {
    fn new(prepare: usize, hand_over: usize) -> Self {
        let manifest = manifest(prepare, hand_over);
        let now = Moment(1000);
        let id = MigrationId([7; 16]);
        Self {
            now,
            prepare,
            fds: (0..prepare + hand_over).map(Rc::new).collect(),
            giver: Some(Giver::start(
                now,
                id,
                "old".to_owned(),
                manifest,
                GiverDeadlines::default(),
            )),
            taker: Some(Taker::start(
                now,
                "new".to_owned(),
                TakerDeadlines::default(),
            )),
            to_taker: VecDeque::new(),
            to_giver: VecDeque::new(),
            claimed: Vec::new(),
            stopped: false,
            stop_fails: false,
            lose_fd: false,
            cut: false,
            silent: false,
            steps: 0,
            ends: Ends::default(),
        }
    }

    fn strike(&mut self, mishap: Mishap) {
        match mishap {
            Mishap::Nothing => {}
            Mishap::GiverDies => {
                self.giver = None;
                self.cut = true;
            }
            Mishap::TakerDies => {
                self.taker = None;
                self.claimed.clear();
                self.cut = true;
            }
            Mishap::GiverGivesUp => {
                if let Some(giver) = &mut self.giver {
                    giver.give_up("cancelled");
                }
            }
            Mishap::TakerRefuses => {
                if let Some(taker) = &mut self.taker {
                    taker.refuse("no memory");
                }
            }
            Mishap::LinkCut => {
                self.cut = true;
                self.to_taker.clear();
                self.to_giver.clear();
            }
            Mishap::Silence => self.silent = true,
            Mishap::FdLost => self.lose_fd = true,
            Mishap::StopFails => self.stop_fails = true,
        }
    }

    /// Carries out what both cores ask for.
    fn act(&mut self) {
        while let Some(action) = self.giver.as_mut().and_then(Giver::poll_action) {
            match action {
                GiverAction::Send(message) => self.send_to_taker(message),
                GiverAction::Prepared => {
                    if self.stop_fails {
                        self.giver.as_mut().unwrap().give_up("a notifier vetoed");
                    } else {
                        self.stopped = true;
                        self.giver.as_mut().unwrap().hand_over(self.now).unwrap();
                    }
                }
                GiverAction::Done => self.ends.giver_done = true,
                GiverAction::Failed(error) => {
                    self.ends.giver_failed = Some(error);
                    self.cut_after_words();
                }
            }
        }
        while let Some(action) = self.taker.as_mut().and_then(Taker::poll_action) {
            let now = self.now;
            let taker = self.taker.as_mut().unwrap();
            match action {
                TakerAction::Send(message) => {
                    if !self.cut {
                        self.to_giver.push_back(message);
                    }
                }
                TakerAction::Judge => taker.accept(now),
                TakerAction::Arrived(stage) => {
                    let range = taker.manifest().range(stage);
                    let entries = taker.manifest().entries()[range].to_vec();
                    for entry in entries {
                        let fd = taker.table().claim(&entry.name, &entry.role, entry.kind);
                        self.claimed.push(fd.unwrap());
                    }
                    taker.taken(now).unwrap();
                }
                TakerAction::Failed(error) => {
                    self.ends.taker_failed = Some(error);
                    // What was claimed belongs to a machine that is given up.
                    self.claimed.clear();
                    self.cut_after_words();
                }
            }
        }
    }

    fn send_to_taker(&mut self, message: GiverMessage) {
        let mut fds = Vec::new();
        if let GiverMessage::Fds { first, count } = message {
            let (first, count) = (first as usize, count as usize);
            assert!((1..=BATCH_MAX).contains(&count));
            fds.extend(self.fds[first..first + count].iter().cloned());
            assert!(
                self.stopped || first + count <= self.prepare,
                "a descriptor with an owner left while the guest ran"
            );
            if std::mem::take(&mut self.lose_fd) {
                fds.pop();
            }
        }
        if !self.cut {
            self.to_taker.push_back((message, fds));
        }
    }

    /// A side that has failed closes its end when its last words have left.
    fn cut_after_words(&mut self) {
        if self.to_taker.is_empty() && self.to_giver.is_empty() {
            self.cut = true;
        }
    }

    /// One message arrives, or somebody notices that none ever will. False when nothing can happen any more.
    fn step(&mut self) -> bool {
        self.act();
        self.steps += 1;
        self.now = self.now.plus_micros(10);
        if !self.silent {
            if let Some((message, fds)) = self.to_taker.pop_front() {
                if let Some(taker) = &mut self.taker {
                    taker.handle_message(self.now, message, fds);
                }
                return true;
            }
            if let Some(message) = self.to_giver.pop_front() {
                if let Some(giver) = &mut self.giver {
                    giver.handle_message(self.now, message);
                }
                return true;
            }
        }
        let someone_failed = self.ends.giver_failed.is_some() || self.ends.taker_failed.is_some();
        if self.cut || someone_failed {
            let mut moved = false;
            for over in [
                self.giver.as_ref().is_none_or(Giver::is_over),
                self.taker.as_ref().is_none_or(Taker::is_over),
            ] {
                moved |= !over;
            }
            if let Some(giver) = &mut self.giver {
                giver.handle_lost("closed");
            }
            if let Some(taker) = &mut self.taker {
                taker.handle_lost("closed");
            }
            self.act();
            return moved;
        }
        let due = [
            self.giver.as_ref().and_then(Giver::poll_timeout),
            self.taker.as_ref().and_then(Taker::poll_timeout),
        ];
        let Some(due) = due.into_iter().flatten().min() else {
            return false;
        };
        self.now = due;
        if let Some(giver) = &mut self.giver {
            giver.handle_timeout(due);
        }
        if let Some(taker) = &mut self.taker {
            taker.handle_timeout(due);
        }
        true
    }

    fn run(mut self, mishaps: &[(usize, Mishap)]) -> Self {
        loop {
            self.act();
            for (at, mishap) in mishaps {
                if *at == self.steps {
                    self.strike(*mishap);
                }
            }
            if !self.step() {
                break;
            }
            assert!(self.steps < 10_000, "no end: {:?}", self.ends);
        }
        self.to_taker.clear();
        self.check(mishaps);
        self
    }

    fn check(&mut self, mishaps: &[(usize, Mishap)]) {
        let context = format!("{mishaps:?} {:?}", self.ends);
        let all = self.fds.len();
        if let Some(giver) = &self.giver {
            let waits = giver.is_prepared() && self.ends.giver_failed.is_none();
            assert!(giver.is_over() || waits, "the giver has no end: {context}");
        }
        let taker_done = self.taker.as_ref().is_some_and(Taker::is_done);
        if self.ends.giver_done && self.taker.is_some() {
            assert!(taker_done, "only one side is done: {context}");
        }
        if taker_done {
            assert_eq!(self.claimed.len(), all, "{context}");
            let accounts = self.taker.as_ref().unwrap().accounts();
            assert_eq!((accounts.claimed, accounts.closed), (all, 0), "{context}");
        } else {
            assert!(self.claimed.is_empty() || self.taker_waits(), "{context}");
        }
        if let Some(taker) = &self.taker {
            let accounts = taker.accounts();
            let held = accounts.arrived - accounts.claimed - accounts.closed;
            assert!(held == 0 || !taker.is_over(), "descriptors leak: {context}");
        }
        // The giver has all it had, and there are no copies but those that the taker uses.
        let copies: usize = self.fds.iter().map(|fd| Rc::strong_count(fd) - 1).sum();
        let held = self.taker.as_ref().map_or(0, |taker| {
            let accounts = taker.accounts();
            accounts.arrived - accounts.claimed - accounts.closed
        });
        assert_eq!(copies, self.claimed.len() + held, "{context}");
    }

    fn taker_waits(&self) -> bool {
        self.taker.as_ref().is_some_and(|taker| !taker.is_over())
    }
}

#[test]
fn every_mishap_at_every_message_leaves_each_descriptor_with_its_owner() {
    for (prepare, hand_over) in [(2, 3), (0, 0), (0, 2), (300, 0), (254, 507)] {
        let whole = World::new(prepare, hand_over).run(&[]);
        assert!(whole.ends.giver_done, "{:?}", whole.ends);
        for at in 0..=whole.steps {
            for mishap in MISHAPS {
                World::new(prepare, hand_over).run(&[(at, mishap)]);
            }
        }
    }
}

#[test]
fn two_mishaps_at_random_messages_leave_each_descriptor_with_its_owner() {
    let mut seed: u64 = 0x5eed;
    let mut below = |bound: usize| {
        seed = seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as usize % bound
    };
    let mut done = 0;
    for _ in 0..20_000 {
        let (prepare, hand_over) = (below(4), below(4));
        let mishaps = [
            (below(14), MISHAPS[below(MISHAPS.len())]),
            (below(14), MISHAPS[below(MISHAPS.len())]),
        ];
        let world = World::new(prepare, hand_over).run(&mishaps);
        done += usize::from(world.ends.giver_done);
    }
    assert!(
        (1000..19_000).contains(&done),
        "{done} hand-overs went well"
    );
}

#[test]
fn a_veto_after_the_preparation_keeps_everything_with_an_owner_here() {
    let world = World::new(2, 3).run(&[(0, Mishap::StopFails)]);
    assert!(!world.stopped);
    let taker = world.taker.as_ref().unwrap();
    assert_eq!(taker.accounts().arrived, 2);
    assert_eq!(
        world.ends.taker_failed,
        Some(HandOverError::Peer("a notifier vetoed".to_owned()))
    );
}

#[test]
fn what_nobody_wants_ends_the_hand_over_and_is_closed() {
    let mut world = World::new(2, 0);
    while world.taker.as_ref().unwrap().accounts().arrived < 2 {
        assert!(world.step());
    }
    let taker = world.taker.as_mut().unwrap();
    taker.handle_message(world.now, GiverMessage::Stage(Stage::Prepare), Vec::new());
    drop(taker.table().claim("dev0", "fd", FdKind::RamMemfd).unwrap());
    let error = taker.taken(world.now).unwrap_err();
    assert!(
        matches!(&error, HandOverError::Descriptor { name, .. } if name == "dev1"),
        "{error}"
    );
    assert_eq!((taker.accounts().claimed, taker.accounts().closed), (1, 1));
    assert!(world.fds.iter().all(|fd| Rc::strong_count(fd) == 1));
}

#[test]
fn a_giver_that_lies_is_refused_with_what_it_did() {
    let lies: [(&str, GiverMessage, usize); 5] = [
        (
            "expected was 0",
            GiverMessage::Fds { first: 1, count: 1 },
            1,
        ),
        ("1 came", GiverMessage::Fds { first: 0, count: 2 }, 1),
        (
            "are left in the stage",
            GiverMessage::Fds { first: 0, count: 3 },
            3,
        ),
        ("complete after 0", GiverMessage::Stage(Stage::Prepare), 0),
        (
            "with another message",
            GiverMessage::Stage(Stage::Prepare),
            1,
        ),
    ];
    for (part, lie, fds) in lies {
        let mut world = World::new(2, 1);
        while world.giver.as_ref().unwrap().peer_software().is_empty() {
            assert!(world.step());
        }
        let fds = (0..fds).map(Rc::new).collect();
        let taker = world.taker.as_mut().unwrap();
        taker.handle_message(world.now, lie, fds);
        let said: Vec<_> = std::iter::from_fn(|| taker.poll_action()).collect();
        let Some(TakerAction::Failed(HandOverError::Protocol(text))) = said.last() else {
            panic!("{said:?}");
        };
        assert!(text.contains(part), "{text}");
    }
}
