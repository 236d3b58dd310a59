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
    pub(crate) pid: u32,
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
        let moved_on = glance.round > seen.round;
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
            && round.bytes == 0
        {
            round.bytes = glance.bytes().saturating_sub(self.round_base);
            self.round_base = glance.bytes();
            if round.duration_us == 0 {
                round.duration_us = at_us.saturating_sub(round.began_us);
            }
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
            round_base,
            ..
        } = self;
        let at_source = beginning.side == Side::Source;
        let (timeline, timeline_omitted) = timeline.finish();
        let (mut rounds, rounds_omitted) = rounds.finish();
        let end_us = now.micros_since(beginning.now);
        if let Some(round) = rounds.last_mut()
            && round.send_us.is_none()
        {
            // Cut short, or the last round of a guest that had written nothing: it has no pages, but frames that say so.
            round.unfinished = status != MigrationStatus::Completed;
            round.bytes += seen.bytes().saturating_sub(round_base);
            if round.unfinished || round.duration_us == 0 {
                round.duration_us = end_us.saturating_sub(round.began_us);
            }
        }
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
            pid: beginning.pid,
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
            duration_us: end_us,
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

#[cfg(test)]
mod tests {
    use super::*;
    use MigrationStatus as S;

    fn watch(side: Side) -> Watch {
        Watch::new(Beginning {
            side,
            now: Moment(1_000),
            unix_us: 1_000_000,
            migration_id: "0".repeat(32),
            software: String::new(),
            host: String::new(),
            pid: 0,
            vm_name: None,
            address: String::new(),
            accelerator: String::new(),
            backend: String::new(),
            ram_bytes: 0,
            parameters: serde_json::Map::new(),
            capabilities: Vec::new(),
        })
    }

    fn at_source(at_us: u64, round: u64, syncs: u64, pages: (u64, u64), bytes: u64) -> Glance {
        Glance {
            now: Moment(1_000 + at_us),
            connection_bytes: vec![bytes, 0],
            round,
            round_pages: Some(pages.0),
            remaining_bytes: Some(0),
            syncs,
            dirty_pages_per_sec: (syncs > 1).then_some(100),
            predicted_blackout_us: (syncs > 1).then_some(5),
            data_pages: pages.1,
            ..Glance::default()
        }
    }

    /// Two rounds and the last one.
    fn source() -> Watch {
        let mut watch = watch(Side::Source);
        watch.status(Moment(1_000), S::Setup);
        watch.status(Moment(1_100), S::Active);
        for glance in [
            at_source(100, 1, 1, (90, 0), 0),
            // The pages have left, and are placed a while later.
            at_source(500, 1, 1, (90, 90), 900),
            // One event brings the fetch and the next round.
            at_source(600, 2, 2, (20, 90), 900),
            at_source(700, 2, 2, (20, 110), 1100),
            at_source(800, 2, 3, (5, 110), 1100),
        ] {
            assert!(watch.look(&glance));
            assert!(!watch.look(&glance), "the same again is nothing new");
        }
        watch.status(Moment(1_810), S::Device);
        watch.look(&at_source(900, 3, 4, (7, 110), 1100));
        watch.look(&at_source(1000, 3, 4, (7, 117), 1170));
        watch
    }

    #[test]
    fn rounds_are_told_apart_by_what_the_core_counts() {
        let mut watch = source();
        watch.status(Moment(2_100), S::Completed);
        let record = watch.finish(Moment(2_200), Ending::default());
        let rounds: Vec<_> = record
            .rounds
            .iter()
            .map(|r| (r.number, r.began_us, r.duration_us, r.send_us, r.bytes))
            .collect();
        let expected = [
            (1, 100, 500, Some(400), 900),
            (2, 600, 200, Some(100), 200),
            (3, 900, 100, Some(100), 70),
        ];
        assert_eq!(rounds, expected);
        let dirty: Vec<_> = record.rounds.iter().map(|r| r.dirty_pages).collect();
        assert_eq!(dirty, [Some(20), Some(5), None]);
        let to_send: Vec<_> = record.rounds.iter().map(|r| r.pages).collect();
        assert_eq!(to_send, [Some(90), Some(20), Some(7)]);
        let last: Vec<_> = record.rounds.iter().map(|r| r.last).collect();
        assert_eq!(last, [false, false, true]);
        assert_eq!(record.totals.blackout_bytes, Some(70));
        assert_eq!(record.outcome, Outcome::Completed);
        assert_eq!(record.began, "1970-01-01T00:00:01.000000Z");
    }

    #[test]
    fn a_round_that_the_end_cut_short_is_marked_and_keeps_its_bytes() {
        let mut watch = watch(Side::Source);
        watch.status(Moment(1_000), S::Active);
        watch.look(&at_source(0, 1, 1, (90, 0), 0));
        watch.status(Moment(1_900), S::Cancelling);
        watch.status(Moment(1_950), S::Cancelled);
        watch.look(&at_source(950, 1, 1, (90, 0), 300));
        let record = watch.finish(Moment(2_000), Ending::default());
        let round = &record.rounds[0];
        assert!(round.unfinished && !round.last);
        assert_eq!((round.bytes, round.duration_us), (300, 1000));
        assert_eq!(record.outcome, Outcome::Cancelled);
        assert_eq!(record.samples.last().map(|sample| sample.bytes), Some(300));
    }

    #[test]
    fn rounds_without_pages_keep_the_bytes_of_their_frames() {
        let mut watch = watch(Side::Source);
        watch.status(Moment(1_000), S::Active);
        watch.look(&at_source(0, 1, 1, (90, 0), 0));
        watch.look(&at_source(100, 1, 1, (90, 90), 900));
        watch.look(&at_source(200, 2, 2, (0, 90), 900));
        watch.status(Moment(1_300), S::Device);
        watch.look(&at_source(300, 3, 3, (0, 90), 964));
        watch.status(Moment(1_400), S::Completed);
        watch.look(&at_source(400, 3, 3, (0, 90), 1028));
        let record = watch.finish(Moment(1_500), Ending::default());
        let bytes: Vec<_> = record.rounds.iter().map(|r| r.bytes).collect();
        assert_eq!(bytes, [900, 64, 64]);
        assert!(record.rounds.iter().all(|round| !round.unfinished));
    }

    #[test]
    fn a_process_that_ends_first_leaves_an_unfinished_record() {
        let record = source().finish(Moment(5_000), Ending::default());
        assert_eq!(record.outcome, Outcome::Unfinished);
        assert_eq!(record.duration_us, 4_000);
    }

    #[test]
    fn the_target_counts_what_has_arrived_and_knows_the_last_round_at_the_end() {
        let glance = |at_us: u64, rounds: u64, over: u64, bytes: u64| Glance {
            now: Moment(1_000 + at_us),
            connection_bytes: vec![bytes],
            round: rounds + 1 - over,
            data_pages: rounds * 10,
            hole_pages: Some(rounds),
            ..Glance::default()
        };
        let mut watch = watch(Side::Target);
        watch.status(Moment(1_000), S::Active);
        watch.look(&glance(0, 0, 0, 0));
        watch.look(&glance(10, 1, 0, 100));
        watch.look(&glance(20, 2, 0, 200));
        watch.status(Moment(1_030), S::Completed);
        watch.look(&glance(30, 2, 1, 200));
        let record = watch.finish(Moment(1_031), Ending::default());
        let rounds: Vec<_> = record
            .rounds
            .iter()
            .map(|r| (r.number, r.data_pages, r.bytes, r.last))
            .collect();
        assert_eq!(rounds, [(1, 10, 100, false), (2, 10, 100, true)]);
        assert_eq!(record.totals.hole_pages, Some(2));
        assert!(
            record
                .rounds
                .iter()
                .all(|r| r.send_us.is_none() && !r.unfinished)
        );
    }

    #[test]
    fn the_rate_follows_the_last_second_and_is_nothing_at_the_end() {
        let mut watch = watch(Side::Source);
        watch.status(Moment(1_000), S::Active);
        let mut bytes = 0;
        for tenth in 0..100_u64 {
            // Twice as fast in the second half.
            bytes += if tenth < 50 { 100 } else { 200 };
            watch.look(&at_source(tenth * 100_000, 1, 1, (1, 0), bytes));
        }
        assert_eq!(watch.live().bytes_per_sec, 2_000);
        watch.status(Moment(10_001_000), S::Failed);
        assert_eq!(watch.live().bytes_per_sec, 0);
    }
}
