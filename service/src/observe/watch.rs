//! Follows one migration at one side and makes its record. Pure: it is told everything, the time included.

use vmferry_transport::units::{Moment, PAGE_SIZE};

use super::Ending;
use super::record::series::{Ends, ROUNDS_MAX, Series, TIMELINE_MAX, per_second};
use super::record::{
    FORMAT, MigrationRecord, Outcome, Round, Sample, Side, StatusChange, Totals, VERSION,
};
use crate::migration::status::MigrationStatus;

/// The rate that is shown while a migration runs is the mean of this time, up to twice as long.
const RATE_WINDOW_US: u64 = 500_000;

/// What is known when a migration begins.
#[derive(Clone, Debug)]
pub(crate) struct Beginning {
    pub(crate) side: Side,
    pub(crate) now: Moment,
    pub(crate) unix_us: u64,
    /// 32 hexadecimal digits.
    pub(crate) migration_id: String,
    pub(crate) software: String,
    pub(crate) host: String,
    pub(crate) vm_name: Option<String>,
    pub(crate) address: String,
    pub(crate) accelerator: String,
    pub(crate) backend: String,
    pub(crate) ram_bytes: u64,
    pub(crate) parameters: serde_json::Map<String, serde_json::Value>,
    pub(crate) capabilities: Vec<String>,
}

/// What a migration looks like at one moment. Counts are of this migration, from its begin.
#[derive(Clone, Debug, Default)]
pub(crate) struct Glance {
    pub(crate) now: Moment,
    /// Bytes on each data connection.
    pub(crate) connection_bytes: Vec<u64>,
    /// The round under way or, at the end, the last; the first is 1, and 0 is none yet.
    pub(crate) round: u64,
    /// Pages that it has to send.
    pub(crate) round_pages: Option<u64>,
    /// Bytes that it has still to send.
    pub(crate) remaining_bytes: Option<u64>,
    /// Fetches of the dirty log.
    pub(crate) syncs: u64,
    pub(crate) dirty_pages_per_sec: Option<u64>,
    pub(crate) predicted_blackout_us: Option<u64>,
    /// Of complete rounds.
    pub(crate) data_pages: u64,
    pub(crate) zero_pages: u64,
    pub(crate) hole_pages: Option<u64>,
    pub(crate) zero_copy_sends: u64,
    pub(crate) zero_copy_fallbacks: u64,
    pub(crate) throttle_percent: u8,
    pub(crate) peer_software: Option<String>,
}

impl Glance {
    fn bytes(&self) -> u64 {
        self.connection_bytes.iter().sum()
    }
}

/// Figures of a migration under way, for those who want to know now.
#[derive(Clone, Debug, Default)]
pub(crate) struct Live {
    pub(crate) glance: Glance,
    /// Bytes sent while the guest stood still.
    pub(crate) blackout_bytes: u64,
    pub(crate) bytes_per_sec: u64,
    pub(crate) duration_us: u64,
}

/// One migration at one side.
#[derive(Debug)]
pub(crate) struct Watch {
    beginning: Beginning,
    timeline: Ends<StatusChange>,
    rounds: Ends<Round>,
    series: Series,
    status: MigrationStatus,
    /// Bytes sent when the guest was stopped.
    stopped_at_bytes: Option<u64>,
    /// What was seen last.
    seen: Glance,
    /// Bytes sent before the round under way.
    round_base: u64,
    /// Two earlier moments and their bytes, to measure the rate from.
    marks: [(Moment, u64); 2],
}

impl Watch {
    pub(crate) fn new(beginning: Beginning) -> Self {
        let now = beginning.now;
        Self {
            beginning,
            timeline: Ends::new(TIMELINE_MAX),
            rounds: Ends::new(ROUNDS_MAX),
            series: Series::default(),
            status: MigrationStatus::None,
            stopped_at_bytes: None,
            seen: Glance {
                now,
                ..Glance::default()
            },
            round_base: 0,
            marks: [(now, 0); 2],
        }
    }

    /// When it wants to be looked at next.
    pub(crate) fn due(&self) -> Moment {
        self.beginning.now.plus_micros(self.series.due_us())
    }

    /// The status has changed.
    pub(crate) fn status(&mut self, now: Moment, status: MigrationStatus) {
        self.status = status;
        let at_us = now.micros_since(self.beginning.now);
        self.timeline.push(StatusChange { at_us, status });
        if is_stopped(status) && self.stopped_at_bytes.is_none() {
            self.stopped_at_bytes = Some(self.seen.bytes());
        }
    }

    /// How it is doing. Returns whether anything new was noted.
    pub(crate) fn look(&mut self, glance: &Glance) -> bool {
        let seen = &self.seen;
        let sent = (glance.data_pages, glance.zero_pages) != (seen.data_pages, seen.zero_pages);
        let synced = glance.syncs != seen.syncs;
        let moved_on = glance.round != seen.round;
        let is_due = glance.now >= self.due();
        let ended = self.status.is_end();
        if !(sent || synced || moved_on || is_due || ended) {
            return false;
        }
        if sent {
            self.note_sent(glance);
        }
        if synced {
            self.note_sync(glance);
        }
        if moved_on {
            self.open_round(glance);
        }
        self.seen = glance.clone();
        if self
            .seen
            .peer_software
            .as_ref()
            .is_some_and(String::is_empty)
        {
            self.seen.peer_software = None;
        }
        self.note_rate();
        // Before the connections exist there is nothing to plot.
        if !glance.connection_bytes.is_empty() || is_due {
            self.take_sample();
        }
        true
    }

    /// The pages of the round have left.
    fn note_sent(&mut self, glance: &Glance) {
        let at_us = glance.now.micros_since(self.beginning.now);
        let data_pages = glance.data_pages.saturating_sub(self.seen.data_pages);
        let zero_pages = glance.zero_pages.saturating_sub(self.seen.zero_pages);
        let bytes = glance.bytes();
        let at_source = self.beginning.side == Side::Source;
        if let Some(round) = self.rounds.last_mut() {
            round.data_pages += data_pages;
            round.zero_pages += zero_pages;
            round.bytes = bytes.saturating_sub(self.round_base);
            round.duration_us = at_us.saturating_sub(round.began_us);
            if at_source {
                round.send_us = Some(round.duration_us);
            }
        }
        self.round_base = bytes;
    }

    /// The dirty log was fetched at the end of a round. Before the last round it is fetched twice; what the second one finds is
    /// what the last round sends.
    fn note_sync(&mut self, glance: &Glance) {
        let at_us = glance.now.micros_since(self.beginning.now);
        if let Some(round) = self.rounds.last_mut()
            && round.dirty_pages.is_none()
            && !round.last
        {
            round.dirty_pages = glance.round_pages;
            round.dirty_bytes_per_sec = glance
                .dirty_pages_per_sec
                .map(|pages| pages.saturating_mul(PAGE_SIZE));
            round.predicted_blackout_us = glance.predicted_blackout_us;
            round.duration_us = at_us.saturating_sub(round.began_us);
        }
    }

    fn open_round(&mut self, glance: &Glance) {
        let at_us = glance.now.micros_since(self.beginning.now);
        // A round without pages has not been noticed as sent.
        if let Some(round) = self.rounds.last_mut()
            && round.duration_us == 0
        {
            round.duration_us = at_us.saturating_sub(round.began_us);
        }
        self.rounds.push(Round {
            number: glance.round,
            began_us: at_us,
            pages: glance.round_pages,
            last: is_stopped(self.status),
            ..Round::default()
        });
    }

    fn note_rate(&mut self) {
        let (now, bytes) = (self.seen.now, self.seen.bytes());
        let [_, newer] = self.marks;
        if now.micros_since(newer.0) >= RATE_WINDOW_US {
            self.marks = [newer, (now, bytes)];
        }
    }

    fn take_sample(&mut self) {
        let seen = &self.seen;
        self.series.push(Sample {
            at_us: seen.now.micros_since(self.beginning.now),
            bytes: seen.bytes(),
            bytes_per_sec: 0,
            dirty_bytes_per_sec: match seen.syncs {
                // The first pass counts as a fetch that has found everything.
                0 | 1 => None,
                _ => seen
                    .dirty_pages_per_sec
                    .map(|pages| pages.saturating_mul(PAGE_SIZE)),
            },
            remaining_bytes: seen.remaining_bytes,
            round: seen.round,
            connection_bytes: seen.connection_bytes.clone(),
            throttle_percent: seen.throttle_percent,
        });
    }

    /// The figures now.
    pub(crate) fn live(&self) -> Live {
        let (now, bytes) = (self.seen.now, self.seen.bytes());
        let [(since, base), _] = self.marks;
        let over = self.status.is_end();
        let mut glance = self.seen.clone();
        if over {
            glance.throttle_percent = 0;
        }
        Live {
            glance,
            blackout_bytes: self.blackout_bytes(),
            bytes_per_sec: match now.micros_since(since) {
                _ if over => 0,
                0 => 0,
                took_us => per_second(bytes.saturating_sub(base), took_us),
            },
            duration_us: now.micros_since(self.beginning.now),
        }
    }

    fn blackout_bytes(&self) -> u64 {
        let base = self.stopped_at_bytes.unwrap_or(u64::MAX);
        self.seen.bytes().saturating_sub(base)
    }

    /// Makes the record.
    pub(crate) fn finish(self, now: Moment, ending: Ending) -> MigrationRecord {
        let blackout_bytes = self.blackout_bytes();
        let Self {
            beginning,
            timeline,
            rounds,
            series,
            status,
            seen,
            ..
        } = self;
        let at_source = beginning.side == Side::Source;
        let (timeline, timeline_omitted) = timeline.finish();
        let (mut rounds, rounds_omitted) = rounds.finish();
        if !at_source {
            // The target counts what has arrived, and learns only at the end that nothing follows.
            let arrived = |round: &Round| round.data_pages + round.zero_pages + round.bytes > 0;
            if rounds.last().is_some_and(|round| !arrived(round)) {
                rounds.pop();
            }
            if let (Some(round), MigrationStatus::Completed) = (rounds.last_mut(), status) {
                round.last = true;
            }
        }
        let began = std::time::UNIX_EPOCH + std::time::Duration::from_micros(beginning.unix_us);
        MigrationRecord {
            format: FORMAT.to_owned(),
            version: VERSION,
            side: beginning.side,
            migration_id: beginning.migration_id,
            software: beginning.software,
            peer_software: seen.peer_software.clone(),
            host: beginning.host,
            pid: std::process::id(),
            vm_name: beginning.vm_name,
            began: humantime::format_rfc3339_micros(began).to_string(),
            began_unix_us: beginning.unix_us,
            address: beginning.address,
            accelerator: beginning.accelerator,
            backend: beginning.backend,
            ram_bytes: beginning.ram_bytes,
            populated_bytes: ending.populated_bytes,
            populated_target_bytes: ending.populated_target_bytes,
            parameters: beginning.parameters,
            capabilities: beginning.capabilities,
            outcome: outcome(status),
            error: ending.error,
            duration_us: now.micros_since(beginning.now),
            totals: Totals {
                bytes: seen.bytes(),
                blackout_bytes: at_source.then_some(blackout_bytes),
                data_pages: seen.data_pages,
                zero_pages: seen.zero_pages,
                hole_pages: seen.hole_pages,
                zero_copy_sends: seen.zero_copy_sends,
                zero_copy_fallbacks: seen.zero_copy_fallbacks,
            },
            blackout: ending.blackout,
            timeline,
            timeline_omitted,
            rounds,
            rounds_omitted,
            samples: series.finish(),
        }
    }
}

/// Statuses in which the guest stands still at the source.
fn is_stopped(status: MigrationStatus) -> bool {
    matches!(
        status,
        MigrationStatus::PreSwitchover | MigrationStatus::Device | MigrationStatus::PostcopyDevice
    )
}

fn outcome(status: MigrationStatus) -> Outcome {
    match status {
        MigrationStatus::Completed => Outcome::Completed,
        MigrationStatus::Failed => Outcome::Failed,
        MigrationStatus::Cancelled => Outcome::Cancelled,
        _ => Outcome::Unfinished,
    }
}
