//! Notifiers of both sides in the registry that the engine uses, and what they have heard (I7).

use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmferry_devices::DeviceError;
use vmferry_devices::notifier::{Mode, Modes, Notifier, Notifiers, Priority, Setup, Told};
use vmferry_transport::units::MigrationId;

/// What a notifier may hear.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum News {
    Setup,
    Done,
    Failed,
    IncomingFailed(MigrationId),
}

#[derive(Debug, Default)]
struct Shared {
    /// By notifier, since the attempt began.
    heard: Vec<Vec<News>>,
    /// Who objects to the next SETUP.
    vetoes: Option<usize>,
}

/// All notifiers of one side.
#[derive(Debug)]
pub(super) struct Audience {
    registry: Notifiers,
    shared: Arc<Mutex<Shared>>,
    told: Option<Told>,
}

#[derive(Debug)]
struct Listener {
    number: usize,
    name: String,
    shared: Arc<Mutex<Shared>>,
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    // A world that has failed has a panic behind it; what was heard before is as it was.
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Listener {
    fn hears(&self, news: News) {
        lock(&self.shared).heard[self.number].push(news);
    }
}

impl Notifier for Listener {
    fn name(&self) -> &str {
        &self.name
    }

    fn setup(&mut self, _setup: &Setup) -> Result<(), DeviceError> {
        self.hears(News::Setup);
        if lock(&self.shared).vetoes != Some(self.number) {
            return Ok(());
        }
        Err(DeviceError::Vetoed {
            device: self.name.clone(),
            reason: "not today".to_owned(),
        })
    }

    fn done(&mut self) {
        self.hears(News::Done);
    }

    fn failed(&mut self) {
        self.hears(News::Failed);
    }

    fn incoming_failed(&mut self, migration: MigrationId) {
        self.hears(News::IncomingFailed(migration));
    }
}

impl Audience {
    /// `count` notifiers, of all priorities.
    pub(super) fn new(count: usize) -> Self {
        let registry = Notifiers::new();
        let shared = Arc::new(Mutex::new(Shared {
            heard: vec![Vec::new(); count],
            vetoes: None,
        }));
        let priorities = [
            Priority::CHECK,
            Priority::SERVER,
            Priority::DEVICE,
            Priority::GUEST,
        ];
        for number in 0..count {
            let listener = Listener {
                number,
                name: format!("notifier/{number}"),
                shared: Arc::clone(&shared),
            };
            let priority = priorities[number % priorities.len()];
            registry.register(Modes::ALL, priority, Box::new(listener));
        }
        Self {
            registry,
            shared,
            told: None,
        }
    }

    pub(super) fn count(&self) -> usize {
        lock(&self.shared).heard.len()
    }

    /// A new attempt; whoever was told of the last one has heard its end.
    pub(super) fn begin_again(&mut self) {
        assert!(self.told.is_none(), "I7: nobody was told how it ended");
        lock(&self.shared).heard.iter_mut().for_each(Vec::clear);
    }

    /// SETUP; returns whether nobody objects.
    pub(super) fn set_up(&mut self, migration: MigrationId, vetoes: Option<usize>) -> bool {
        lock(&self.shared).vetoes = vetoes;
        let mode = Mode::Normal;
        let (told, agreed) = match self.registry.setup(&Setup { mode, migration }) {
            Ok(told) => (told, true),
            Err(vetoed) => (vetoed.told, false),
        };
        assert!(
            self.told.replace(told).is_none(),
            "I7: SETUP comes in the middle of an attempt"
        );
        agreed
    }

    /// Somebody was told SETUP and has not heard the end.
    pub(super) fn waits_for_the_end(&self) -> bool {
        self.told.is_some()
    }

    pub(super) fn done(&mut self) {
        let told = self.told.take().expect("I7: DONE without SETUP");
        self.registry.done(told);
    }

    pub(super) fn failed(&mut self) {
        let told = self.told.take().expect("I7: FAILED without SETUP");
        self.registry.failed(told);
    }

    pub(super) fn incoming_failed(&self, migration: MigrationId) {
        self.registry.incoming_failed(Mode::Normal, migration);
    }

    /// I7 at the end of an attempt: everybody has heard nothing, or SETUP and then the one right end.
    pub(super) fn check_end(&self, completed: bool) {
        assert!(
            self.told.is_none(),
            "I7: the attempt is over without an end"
        );
        let end = if completed { News::Done } else { News::Failed };
        for heard in &lock(&self.shared).heard {
            assert!(
                heard.is_empty() && !completed || *heard == [News::Setup, end],
                "I7: completed: {completed}, heard {heard:?}"
            );
        }
    }

    /// I7 at the target: everybody has heard once that this migration failed.
    pub(super) fn check_incoming_failed(&self, migration: MigrationId) {
        for heard in &lock(&self.shared).heard {
            let count = heard
                .iter()
                .filter(|news| **news == News::IncomingFailed(migration));
            assert_eq!(
                count.count(),
                1,
                "I7: failure is published, heard {heard:?}"
            );
        }
    }
}

impl Drop for Audience {
    /// A process that dies in the middle of an attempt tells nobody anything.
    fn drop(&mut self) {
        if let Some(told) = mem::take(&mut self.told) {
            self.registry.abandon(told);
        }
    }
}
