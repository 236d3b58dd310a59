//! Invariant I7, with notifiers that write down what they hear.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::*;

/// What a notifier heard.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Heard {
    Began,
    Done,
    Failed,
    IncomingFailed,
}

/// What a notifier does when it is told SETUP.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Behaviour {
    Agree,
    Veto,
    Panic,
    /// Panics at every later event.
    PanicLater,
    /// Registers another notifier and unregisters the one with this number among all that ever were.
    Meddle(usize),
}

use Heard::{Began, Done, Failed, IncomingFailed};

type Log = Arc<Mutex<Vec<(usize, Heard)>>>;

/// Who is registered, for notifiers that meddle, and the number that the next one gets.
#[derive(Clone, Default)]
struct World {
    notifiers: Notifiers,
    log: Log,
    ids: Arc<Mutex<Vec<NotifierId>>>,
}

impl World {
    /// Registers a notifier; its number is its place among all that ever were.
    fn add(&self, modes: impl Into<Modes>, priority: i16, behaviour: Behaviour) -> usize {
        let mut ids = self.ids.lock().unwrap();
        let number = ids.len();
        let recorder = Recorder {
            number,
            name: format!("recorder/{number}"),
            behaviour,
            world: self.clone(),
        };
        ids.push(
            self.notifiers
                .register(modes, Priority(priority), Box::new(recorder)),
        );
        number
    }

    fn remove(&self, number: usize) -> bool {
        let id = self.ids.lock().unwrap().get(number).copied();
        id.is_some_and(|id| self.notifiers.unregister(id))
    }

    fn setup(&self, mode: Mode) -> Result<Told, Vetoed> {
        self.notifiers.setup(&Setup {
            mode,
            migration: MigrationId([1; 16]),
        })
    }

    /// What was heard since the last call.
    fn heard(&self) -> Vec<(usize, Heard)> {
        std::mem::take(&mut *self.log.lock().unwrap())
    }
}

struct Recorder {
    number: usize,
    name: String,
    behaviour: Behaviour,
    world: World,
}

impl Recorder {
    fn hears(&self, heard: Heard) {
        self.world.log.lock().unwrap().push((self.number, heard));
        if heard != Began && self.behaviour == Behaviour::PanicLater {
            panic!("notifier {} is broken", self.number);
        }
    }
}

impl Notifier for Recorder {
    fn name(&self) -> &str {
        &self.name
    }

    fn setup(&mut self, _: &Setup) -> Result<(), DeviceError> {
        self.hears(Began);
        match self.behaviour {
            Behaviour::Agree | Behaviour::PanicLater => {}
            Behaviour::Veto => {
                return Err(DeviceError::Vetoed {
                    device: self.name.clone(),
                    reason: "its door is open".to_owned(),
                });
            }
            Behaviour::Panic => panic!("notifier {} is broken", self.number),
            Behaviour::Meddle(number) => {
                self.world.add(Modes::ALL, 0, Behaviour::Agree);
                self.world.remove(number);
            }
        }
        Ok(())
    }

    fn done(&mut self) {
        self.hears(Done);
    }

    fn failed(&mut self) {
        self.hears(Failed);
    }

    fn incoming_failed(&mut self, _: MigrationId) {
        self.hears(IncomingFailed);
    }
}

#[test]
fn setup_and_done_follow_the_priorities_and_failed_comes_in_reverse() {
    let world = World::default();
    let late = world.add(Mode::Normal, 7, Behaviour::Agree);
    let first = world.add(Mode::Normal, -3, Behaviour::Agree);
    let second = world.add(Mode::Normal, -3, Behaviour::Agree);

    let told = world.setup(Mode::Normal).unwrap();
    assert_eq!(told.names(), ["recorder/1", "recorder/2", "recorder/0"]);
    world.notifiers.done(told);
    let order = [first, second, late];
    let expected: Vec<_> = [Began, Done]
        .into_iter()
        .flat_map(|heard| order.map(|number| (number, heard)))
        .collect();
    assert_eq!(world.heard(), expected);

    let told = world.setup(Mode::Normal).unwrap();
    world.heard();
    world.notifiers.failed(told);
    assert_eq!(
        world.heard(),
        [(late, Failed), (second, Failed), (first, Failed)]
    );
}

#[test]
fn a_veto_half_way_fails_those_before_it_and_itself_and_nobody_else() {
    for behaviour in [Behaviour::Veto, Behaviour::Panic] {
        let world = World::default();
        let before = world.add(Mode::Normal, 1, Behaviour::Agree);
        let objects = world.add(Mode::Normal, 2, behaviour);
        world.add(Mode::Normal, 3, Behaviour::Agree);

        let Vetoed { error, told } = world.setup(Mode::Normal).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("recorder/1"), "{text}");
        let why = match behaviour {
            Behaviour::Veto => "its door is open",
            _ => "notifier 1 is broken",
        };
        assert!(text.contains(why), "{text}");
        world.notifiers.failed(told);
        assert_eq!(
            world.heard(),
            [
                (before, Began),
                (objects, Began),
                (objects, Failed),
                (before, Failed)
            ]
        );
    }
}

#[test]
fn only_those_who_listen_to_the_mode_are_told() {
    let world = World::default();
    let everywhere = world.add(Modes::ALL, 1, Behaviour::Agree);
    let upgrade = world.add(Mode::CprTransfer | Mode::CprExec, 2, Behaviour::Agree);
    for (mode, who) in [
        (Mode::Normal, vec![everywhere]),
        (Mode::CprReboot, vec![everywhere]),
        (Mode::CprTransfer, vec![everywhere, upgrade]),
        (Mode::CprExec, vec![everywhere, upgrade]),
    ] {
        let told = world.setup(mode).unwrap();
        let heard: Vec<_> = world.heard().into_iter().map(|(who, _)| who).collect();
        assert_eq!(heard, who, "{mode}");
        world.notifiers.done(told);
        world.heard();
    }
    world
        .notifiers
        .incoming_failed(Mode::CprExec, MigrationId([2; 16]));
    assert_eq!(
        world.heard(),
        [(upgrade, IncomingFailed), (everywhere, IncomingFailed)]
    );
}

#[test]
fn one_that_leaves_during_an_attempt_still_hears_its_end() {
    let world = World::default();
    let stays = world.add(Mode::Normal, 1, Behaviour::Agree);
    let leaves = world.add(Mode::Normal, 2, Behaviour::Agree);
    let told = world.setup(Mode::Normal).unwrap();
    assert!(world.remove(leaves));
    assert!(!world.remove(leaves), "it can leave only once");
    let comes = world.add(Mode::Normal, 3, Behaviour::Agree);
    world.heard();
    world.notifiers.done(told);
    assert_eq!(world.heard(), [(stays, Done), (leaves, Done)]);

    let told = world.setup(Mode::Normal).unwrap();
    world.notifiers.failed(told);
    assert_eq!(
        world.heard(),
        [
            (stays, Began),
            (comes, Began),
            (comes, Failed),
            (stays, Failed)
        ]
    );
}

#[test]
fn a_second_attempt_is_refused_while_the_first_is_under_way() {
    let world = World::default();
    let one = world.add(Mode::Normal, 1, Behaviour::Agree);
    let told = world.setup(Mode::Normal).unwrap();
    let second = world.setup(Mode::Normal).unwrap_err();
    assert!(
        second.error.to_string().contains("attempt"),
        "{}",
        second.error
    );
    world.notifiers.failed(second.told);
    assert_eq!(world.heard(), [(one, Began)]);
    // The refused one did not end the first.
    let third = world.setup(Mode::Normal).unwrap_err();
    world.notifiers.failed(third.told);
    world.notifiers.done(told);
    assert_eq!(world.heard(), [(one, Done)]);
    let told = world.setup(Mode::Normal).unwrap();
    world.notifiers.done(told);
}

#[test]
fn a_dropped_told_is_noticed_and_its_notifiers_hear_failed_before_the_next_setup() {
    let world = World::default();
    let one = world.add(Mode::Normal, 1, Behaviour::Agree);
    let told = world.setup(Mode::Normal).unwrap();
    let dropped = catch_unwind(AssertUnwindSafe(|| drop(told)));
    assert_eq!(dropped.is_err(), cfg!(debug_assertions));
    assert_eq!(
        world.heard(),
        [(one, Began)],
        "dropping must not tell anybody anything"
    );
    let told = world.setup(Mode::Normal).unwrap();
    world.notifiers.done(told);
    assert_eq!(world.heard(), [(one, Failed), (one, Began), (one, Done)]);
}

#[test]
fn waiting_ends_when_nobody_waits_any_more() {
    struct Slow(u32);
    impl Notifier for Slow {
        fn name(&self) -> &str {
            "slow"
        }
        fn setup(&mut self, _: &Setup) -> Result<(), DeviceError> {
            Ok(())
        }
        fn pending(&mut self) -> Result<Option<String>, DeviceError> {
            self.0 -= 1;
            match self.0 {
                0 => Ok(None),
                100 => panic!("lost count"),
                left => Ok(Some(format!("{left} more"))),
            }
        }
        fn done(&mut self) {}
        fn failed(&mut self) {}
    }
    let notifiers = Notifiers::new();
    notifiers.register(Mode::Normal, Priority(1), Box::new(Slow(2)));
    let setup = Setup {
        mode: Mode::Normal,
        migration: MigrationId([1; 16]),
    };
    let told = notifiers.setup(&setup).unwrap();
    assert_eq!(notifiers.pending(&told).unwrap().as_deref(), Some("1 more"));
    assert_eq!(notifiers.pending(&told).unwrap(), None);
    notifiers.done(told);

    notifiers.register(Mode::Normal, Priority(0), Box::new(Slow(101)));
    let told = notifiers.setup(&setup).unwrap();
    let error = notifiers.pending(&told).unwrap_err().to_string();
    assert!(
        error.contains("slow") && error.contains("lost count"),
        "{error}"
    );
    notifiers.failed(told);
}

/// Something that may happen to a registry.
#[derive(Clone, Debug)]
enum Step {
    Add(u8, i16, Behaviour),
    Remove(usize),
    /// An attempt in this mode, with these changes of the registry before it ends, well if true.
    Attempt(Mode, Vec<Step>, bool),
}

fn change() -> impl Strategy<Value = Step> {
    let behaviour = prop_oneof![
        6 => Just(Behaviour::Agree),
        1 => Just(Behaviour::Veto),
        1 => Just(Behaviour::Panic),
        1 => Just(Behaviour::PanicLater),
        1 => (0_usize..12).prop_map(Behaviour::Meddle),
    ];
    prop_oneof![
        3 => (1_u8..16, -2_i16..3, behaviour).prop_map(|(m, p, b)| Step::Add(m, p, b)),
        1 => (0_usize..12).prop_map(Step::Remove),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let mode = prop_oneof![
        Just(Mode::Normal),
        Just(Mode::CprReboot),
        Just(Mode::CprTransfer),
        Just(Mode::CprExec)
    ];
    prop_oneof![
        change(),
        (mode, prop::collection::vec(change(), 0..3), any::<bool>())
            .prop_map(|(mode, changes, well)| Step::Attempt(mode, changes, well)),
    ]
}

fn apply(world: &World, step: &Step) {
    match step {
        Step::Add(modes, priority, behaviour) => {
            world.add(Modes(*modes), *priority, *behaviour);
        }
        Step::Remove(number) => {
            world.remove(*number);
        }
        Step::Attempt(..) => unreachable!("attempts do not contain attempts"),
    }
}

/// One attempt, and what everybody must have heard.
fn attempt(world: &World, mode: Mode, changes: &[Step], well: bool) {
    world.heard();
    let result = world.setup(mode);
    let began: Vec<usize> = world
        .heard()
        .into_iter()
        .map(|(who, heard)| {
            assert_eq!(heard, Began, "something else than SETUP came first");
            who
        })
        .collect();
    changes.iter().for_each(|change| apply(world, change));
    let (told, well) = match result {
        Ok(told) => (told, well),
        Err(Vetoed { told, .. }) => (told, false),
    };
    assert_eq!(told.names().len(), began.len());
    if well {
        world.notifiers.done(told);
    } else {
        world.notifiers.failed(told);
    }
    let mut expected: Vec<_> = began
        .into_iter()
        .map(|who| (who, if well { Done } else { Failed }))
        .collect();
    if !well {
        expected.reverse();
    }
    assert_eq!(world.heard(), expected);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(256) })]

    #[test]
    fn whatever_happens_setup_is_followed_by_exactly_one_of_done_and_failed(
        steps in prop::collection::vec(step(), 1..20)
    ) {
        let world = World::default();
        for step in &steps {
            match step {
                Step::Attempt(mode, changes, well) => attempt(&world, *mode, changes, *well),
                change => apply(&world, change),
            }
        }
    }
}
