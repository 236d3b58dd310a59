//! The figures that scrapers see. The engine puts a new version up, a scraper takes the one that hangs there: nobody waits for
//! anybody longer than it takes to copy a pointer.

use std::sync::{Arc, Mutex, PoisonError};

use super::record::{BlackoutPart, MigrationRecord, Outcome, Side};
use super::watch::Live;
use crate::migration::status::MigrationStatus;
use crate::qmp::schema::RunState;

/// All figures at one moment.
#[derive(Clone, Debug, Default)]
pub(crate) struct Figures {
    pub(crate) runstate: Option<RunState>,
    pub(crate) outgoing: SideFigures,
    pub(crate) incoming: SideFigures,
}

impl Figures {
    pub(crate) fn side(&mut self, side: Side) -> &mut SideFigures {
        match side {
            Side::Source => &mut self.outgoing,
            Side::Target => &mut self.incoming,
        }
    }
}

/// Of migrations in one direction.
#[derive(Clone, Debug, Default)]
pub(crate) struct SideFigures {
    pub(crate) status: MigrationStatus,
    pub(crate) completed: u64,
    pub(crate) failed: u64,
    pub(crate) cancelled: u64,
    /// Of all migrations that have ended.
    past: Sums,
    /// Of the migration under way, none of it in `past`; or of the last one.
    pub(crate) live: Live,
    /// `live` is in `past` already.
    counted: bool,
    /// Of the last migration that completed.
    pub(crate) blackout: Vec<BlackoutPart>,
}

/// What only grows, over all migrations.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Sums {
    pub(crate) bytes: u64,
    pub(crate) blackout_bytes: u64,
    pub(crate) data_pages: u64,
    pub(crate) zero_pages: u64,
    pub(crate) hole_pages: u64,
    pub(crate) rounds: u64,
    pub(crate) zero_copy_sends: u64,
    pub(crate) zero_copy_fallbacks: u64,
}

impl SideFigures {
    /// A migration begins.
    pub(crate) fn begin(&mut self) {
        self.live = Live::default();
        self.counted = false;
    }

    pub(crate) fn set_live(&mut self, live: Live) {
        self.live = live;
    }

    /// The migration has ended.
    pub(crate) fn end(&mut self, live: Live, record: &MigrationRecord) {
        self.live = live;
        self.past = self.sums();
        self.counted = true;
        match record.outcome {
            Outcome::Completed => self.completed += 1,
            Outcome::Failed => self.failed += 1,
            Outcome::Cancelled => self.cancelled += 1,
            Outcome::Unfinished => {}
        }
        if !record.blackout.is_empty() {
            self.blackout.clone_from(&record.blackout);
        }
    }

    /// Over all migrations, the one under way included.
    pub(crate) fn sums(&self) -> Sums {
        if self.counted {
            return self.past;
        }
        let Live {
            glance,
            blackout_bytes,
            ..
        } = &self.live;
        let past = &self.past;
        Sums {
            bytes: past.bytes + glance.connection_bytes.iter().sum::<u64>(),
            blackout_bytes: past.blackout_bytes + blackout_bytes,
            data_pages: past.data_pages + glance.data_pages,
            zero_pages: past.zero_pages + glance.zero_pages,
            hole_pages: past.hole_pages + glance.hole_pages.unwrap_or(0),
            rounds: past.rounds + glance.round,
            zero_copy_sends: past.zero_copy_sends + glance.zero_copy_sends,
            zero_copy_fallbacks: past.zero_copy_fallbacks + glance.zero_copy_fallbacks,
        }
    }
}

/// Where the figures hang.
#[derive(Debug, Default)]
pub(crate) struct Board(Mutex<Arc<Figures>>);

impl Board {
    /// The figures as they are.
    pub(crate) fn figures(&self) -> Arc<Figures> {
        Arc::clone(&self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Puts up changed figures. Only the engine does.
    pub(crate) fn change(&self, change: impl FnOnce(&mut Figures)) {
        // Copied and changed outside of the lock.
        let mut figures = Figures::clone(&self.figures());
        change(&mut figures);
        let figures = Arc::new(figures);
        let old = std::mem::replace(
            &mut *self.0.lock().unwrap_or_else(PoisonError::into_inner),
            figures,
        );
        drop(old);
    }

    /// The same for the state of the VM, which seldom changes.
    pub(crate) fn change_runstate(&self, state: RunState) {
        if self.figures().runstate != Some(state) {
            self.change(|figures| figures.runstate = Some(state));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::watch::Glance;

    #[test]
    fn sums_go_on_growing_from_one_migration_to_the_next() {
        let live = |bytes| Live {
            glance: Glance {
                connection_bytes: vec![bytes, 1],
                round: 2,
                ..Glance::default()
            },
            ..Live::default()
        };
        let mut side = SideFigures::default();
        side.begin();
        side.set_live(live(10));
        assert_eq!(side.sums().bytes, 11);
        let record = crate::observe::record::read::parse(include_bytes!(
            "../../../tests/fixtures/record/v1/good/source.json"
        ));
        side.end(live(20), &record.unwrap());
        assert_eq!((side.sums().bytes, side.completed), (21, 1));
        assert!(!side.blackout.is_empty());
        side.begin();
        assert_eq!(side.sums().bytes, 21);
        side.set_live(live(5));
        assert_eq!((side.sums().bytes, side.sums().rounds), (27, 4));
    }
}
