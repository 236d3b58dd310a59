//! Figures of an attempt, and the blackout in parts that add up.

use super::Source;
use crate::units::{Moment, PageCount, RoundId};
use crate::wire::frame::Ready;

/// Times at which the steps of the blackout were reached.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Blackout {
    pub(super) asked: Moment,
    pub(super) stopped: Moment,
    pub(super) continued: Moment,
    pub(super) synced: Moment,
    pub(super) sent: Moment,
    pub(super) saved: Moment,
    pub(super) ready: Moment,
}

/// Parts of the blackout in microseconds. They add up to the time from the order to stop until the target's word that it runs.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct BlackoutParts {
    /// Getting every vCPU out of the guest.
    pub pause_us: u64,
    /// Waiting for the operator to go on, when that was asked for.
    pub pre_switchover_us: u64,
    /// The last fetch of the dirty logs.
    pub dirty_fetch_us: u64,
    /// Handing the last pages to the kernel.
    pub last_round_us: u64,
    /// Device state, as far as it took longer than the last round.
    pub device_state_us: u64,
    /// The target placing the last pages and loading the state.
    pub load_us: u64,
    /// The exchange of COMMIT and RUNNING.
    pub commit_us: u64,
    /// The target letting the vCPUs run.
    pub resume_us: u64,
    /// Hashing and reading back on both sides, when verification was asked for.
    pub verify_us: u64,
}

impl BlackoutParts {
    /// The whole blackout.
    pub fn total_us(&self) -> u64 {
        let Self {
            pause_us,
            pre_switchover_us,
            dirty_fetch_us,
            last_round_us,
            device_state_us,
            load_us,
            commit_us,
            resume_us,
            verify_us,
        } = self;
        pause_us
            + pre_switchover_us
            + dirty_fetch_us
            + last_round_us
            + device_state_us
            + load_us
            + commit_us
            + resume_us
            + verify_us
    }
}

/// Figures of an attempt.
#[derive(Clone, Debug, Default)]
pub struct SourceStats {
    /// When it began.
    pub began: Moment,
    /// When the first round began.
    pub first_round: Option<Moment>,
    /// When it ended, well or not.
    pub ended: Option<Moment>,
    /// Number of the round that is under way or was the last.
    pub round: RoundId,
    /// Dirty fetches so far, the first pass included.
    pub sync_count: u64,
    /// Pages the present round is to send.
    pub round_pages: PageCount,
    /// Pages sent as zero in complete rounds.
    pub zero: PageCount,
    /// Pages sent with content in complete rounds.
    pub data: PageCount,
    /// Bytes that the last round put on the data connections.
    pub last_round_bytes: u64,
    /// Predicted blackout at the last dirty fetch, in microseconds.
    pub predicted_blackout_us: Option<u64>,
    /// The blackout, once it is over.
    pub blackout: Option<BlackoutParts>,
    /// Hash of all RAM at the pause, when verification was asked for.
    pub ram_hash: Option<u128>,
    /// What the target said when it was ready.
    pub ready: Option<Ready>,
    /// The target's software.
    pub target_software: String,
}

impl<P> Source<P> {
    /// The blackout until now, when the target has said READY and not RUNNING. For a target that will take this process's place.
    pub fn blackout_so_far(&self, now: Moment) -> BlackoutParts {
        self.blackout_parts(now, 0)
    }

    /// The parts are differences of consecutive times, so they add up whatever the clocks of the two sides say.
    pub(super) fn blackout_parts(&self, running: Moment, resume_us: u64) -> BlackoutParts {
        let Blackout {
            asked,
            stopped,
            continued,
            synced,
            sent,
            saved,
            ready,
        } = self.blackout;
        let handed_over = sent.max(saved);
        let state = handed_over.micros_since(sent);
        let hash_us = self.saved.hash_us.min(state);
        let load = ready.micros_since(handed_over);
        let took = self
            .stats
            .ready
            .as_ref()
            .and_then(|ready| ready.verification.as_ref());
        let check_us = took
            .map_or(0, |verification| verification.took_us)
            .min(load);
        let commit = running.micros_since(ready);
        let resume_us = resume_us.min(commit);
        BlackoutParts {
            pause_us: stopped.micros_since(asked),
            pre_switchover_us: continued.micros_since(stopped),
            dirty_fetch_us: synced.micros_since(continued),
            last_round_us: sent.micros_since(synced),
            device_state_us: state - hash_us,
            load_us: load - check_us,
            commit_us: commit - resume_us,
            resume_us,
            verify_us: hash_us + check_us,
        }
    }
}
