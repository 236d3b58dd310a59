//! Log spans of a migration: the migration, the phase it is in, the round under way. Whatever is logged while the engine handles the
//! migration carries all three.

use tracing::{Span, error_span};

use super::record::Side;
use crate::migration::status::MigrationStatus;

/// The three spans, nested. They have the level of errors, so that every line that is shown has them.
#[derive(Debug)]
pub(super) struct Spans {
    migration: Span,
    phase: Option<(MigrationStatus, Span)>,
    round: Option<(u64, Span)>,
}

impl Spans {
    pub(super) fn new(side: Side, migration_id: &str) -> Self {
        Self {
            migration: error_span!(parent: None, "migration", id = migration_id, direction = side.direction()),
            phase: None,
            round: None,
        }
    }

    /// The migration is in this phase now; the phases are named as the statuses.
    pub(super) fn phase(&mut self, status: MigrationStatus) {
        if self
            .phase
            .as_ref()
            .is_none_or(|(known, _)| *known != status)
        {
            let span = error_span!(parent: &self.migration, "phase", status = status.name());
            self.phase = Some((status, span));
            // A round that goes on does so in the new phase.
            if let Some((number, _)) = self.round.take() {
                self.round(number);
            }
        }
    }

    /// This round is under way; 0 for none.
    pub(super) fn round(&mut self, number: u64) {
        let known = self.round.as_ref().map_or(0, |(known, _)| *known);
        if known == number {
            return;
        }
        let parent = self
            .phase
            .as_ref()
            .map_or(&self.migration, |(_, span)| span);
        self.round = (number > 0).then(|| (number, error_span!(parent: parent, "round", number)));
    }

    /// The innermost.
    pub(super) fn innermost(&self) -> Span {
        let phase = self.phase.as_ref().map(|(_, span)| span);
        let round = self.round.as_ref().map(|(_, span)| span);
        round.or(phase).unwrap_or(&self.migration).clone()
    }
}
