//! The source's half of a migration, from `migrate` to the outcome.
//!
//! ```text
//!  Idle -> Connecting -> AwaitReply -> Preparing -> Sending <-> Syncing -> Stopping      guest runs
//!                                                                              |
//!                                                      (operator) PreSwitchover |        guest stopped
//!                                                                          |    |
//!                                                                          v    v
//!          Finishing <- AwaitRunning <- AwaitReady <- LastRound <- LastSync <---+
//!              |          |      ^ COMMIT
//!              v          v (link lost)
//!           Completed   Resolving <-> Unresolved (operator decides)
//!
//!  any state before COMMIT, on error or cancel  ->  Failing  ->  Ended (guest as before)
//! ```
//!
//! - **Preparing**: the data connections are set up while the notifiers are told SETUP; when nobody has anything to wait for any more,
//!   the dirty log starts.
//! - **Sending**: a round is on its way; it ends when the target has placed it, so that nothing is left in socket buffers when the
//!   guest stops.
//! - **Syncing**: the dirty logs are fetched; then another round or the switchover. Where there is nothing to send and the guest cannot be
//!   stopped yet, because the downtime limit is too short even for that or the target has not acknowledged, *Resting* comes before the
//!   next round: nobody gains from thousands of empty ones in a second.
//! - **LastRound**: pages and device state leave side by side; the guest is stopped.
//! - **AwaitReady**: the target holds everything. If the link dies here the guest goes on at the source.
//! - **AwaitRunning**: COMMIT was sent. If the link dies here nobody but the target knows who owns the guest: the source stays stopped
//!   and asks (**Resolving**). If it cannot learn the answer it says so (**Unresolved**), goes on asking, and waits for the operator.
//! - **In place** (no data connections): before Connecting comes *Offering*, in which the target builds its machine around our RAM; there
//!   are no rounds and no dirty log; after the guest is stopped comes *Releasing*, in which the notifiers are told SETUP and devices let go
//!   of what they own, and only then do the other descriptors leave, side by side with the device state.
//! - **PreSwitchover**: only if the operator asked for it; nothing has been handed over yet.
//! - **Failing**: pays the debts of the attempt in order: links closed, jobs over, dirty log off, notifiers told FAILED, guest resumed if it
//!   ran before.
//!
//! `P` is the proof that the guest is stopped. The core never makes one: it receives it with
//! [`handle_guest_stopped`](Source::handle_guest_stopped), and gives it back in [`SourceAction::ResumeGuest`], which no state after
//! COMMIT can emit unless the target said that it does not own the guest, or the operator decided so (I1).

mod action;
mod deadlines;
mod failure;
mod in_place;
mod state;
mod stats;
mod transfer;

use std::collections::VecDeque;
use std::fmt;

pub use self::action::{
    CancelError, ContinueError, FirstRound, Outcome, Reason, RoundSent, SavedState, SourceAction,
    SourceConfig, SourceJob, SourceTuning,
};
use self::state::{Jobs, Setup, State};
use self::stats::Blackout;
pub use self::stats::{BlackoutParts, SourceStats};
use super::estimate::{Decision, Estimate};
use super::status::MigrationStatus;
use super::throttle::Throttle;
use crate::units::{MigrationId, Moment, PageCount};
use crate::wire::frame::{Resolution, SourceFrame, TargetFrame};

/// The source's half of a migration. See the module documentation.
#[derive(Debug)]
pub struct Source<P> {
    config: SourceConfig,
    tuning: SourceTuning,
    status: MigrationStatus,
    state: State<P>,
    jobs: Jobs,
    actions: VecDeque<SourceAction<P>>,
    estimate: Estimate,
    stats: SourceStats,
    blackout: Blackout,
    saved: SavedState,
    /// When the present state was entered, or when bytes last moved in it.
    moved_at: Moment,
    moved_bytes: u64,
    heard_at: Moment,
    said_at: Moment,
    synced_at: Moment,
    round_began: Moment,
    round_sent: RoundSent,
    control_open: bool,
    log_started: bool,
    /// Notifiers may have been told SETUP: they are owed DONE or FAILED (I7).
    notified: bool,
    /// The target's devices are ready for a switchover.
    acked: bool,
    /// Devices here have still to give what they give once, before they are stopped.
    devices_begin: bool,
    throttle: Throttle,
}

impl<P: fmt::Debug> Source<P> {
    /// An attempt that has not begun.
    pub fn new(config: SourceConfig, tuning: SourceTuning) -> Self {
        Self {
            config,
            tuning,
            status: MigrationStatus::None,
            state: State::Idle,
            jobs: Jobs::default(),
            actions: VecDeque::new(),
            estimate: Estimate::default(),
            stats: SourceStats::default(),
            blackout: Blackout::default(),
            saved: SavedState::default(),
            moved_at: Moment::default(),
            moved_bytes: 0,
            heard_at: Moment::default(),
            said_at: Moment::default(),
            synced_at: Moment::default(),
            round_began: Moment::default(),
            round_sent: RoundSent::default(),
            control_open: false,
            log_started: false,
            notified: false,
            acked: false,
            devices_begin: false,
            throttle: Throttle::default(),
        }
    }

    /// The status.
    pub fn status(&self) -> MigrationStatus {
        self.status
    }

    /// Figures so far.
    pub fn stats(&self) -> &SourceStats {
        &self.stats
    }

    /// The share of time for which the vCPUs are kept from running, in percent.
    pub fn throttle_percent(&self) -> u8 {
        self.throttle.percent()
    }

    /// What the rounds so far have taught.
    pub fn estimate(&self) -> &Estimate {
        &self.estimate
    }

    /// Which attempt this is.
    pub fn migration_id(&self) -> MigrationId {
        self.config.migration_id
    }

    /// Whether COMMIT was sent and nothing has been heard of the outcome since.
    pub fn in_doubt(&self) -> bool {
        self.state.in_doubt()
    }

    /// Whether the operator was told that the outcome cannot be learnt.
    pub fn is_unresolved(&self) -> bool {
        matches!(self.state, State::Resolving { told: true, .. })
    }

    /// Why the attempt fails, while its cleanup is under way.
    pub fn failure(&self) -> Option<&Reason> {
        match &self.state {
            State::Failing { reason, .. } => Some(reason),
            _ => None,
        }
    }

    /// What to do next; call until `None`.
    #[must_use]
    pub fn poll_action(&mut self) -> Option<SourceAction<P>> {
        self.actions.pop_front()
    }

    /// Begins.
    ///
    /// # Panics
    /// If called twice.
    pub fn start(&mut self, now: Moment) {
        assert!(matches!(self.state, State::Idle), "an attempt starts once");
        self.set_tuning(self.tuning);
        self.stats.began = now;
        self.set_status(MigrationStatus::Setup);
        if self.config.data_connections == 0 {
            return self.offer(now);
        }
        self.enter(now, State::Connecting);
        self.run(SourceJob::ConnectControl, SourceAction::ConnectControl);
    }

    /// The operator changed a parameter.
    pub fn set_tuning(&mut self, tuning: SourceTuning) {
        self.estimate
            .set_switchover_bandwidth(tuning.switchover_bytes_per_sec);
        self.tuning = tuning;
    }

    /// The operator stopped or started the guest while rounds are being sent: it is handed over, or given back, as it is now.
    pub fn set_guest_runs(&mut self, runs: bool) {
        self.config.guest_runs = runs;
    }

    /// The operator cancels. Harmless when it is over already.
    ///
    /// # Errors
    /// [`CancelError::Committed`] after COMMIT.
    pub fn handle_cancel(&mut self, now: Moment) -> Result<(), CancelError> {
        if self.state.in_doubt() || matches!(self.state, State::Finishing { .. }) {
            return Err(CancelError::Committed);
        }
        self.fail(now, Reason::Cancelled);
        Ok(())
    }

    /// The operator lets a migration go on that waits in `pre-switchover`.
    ///
    /// # Errors
    /// [`ContinueError`] if it does not wait.
    pub fn handle_continue(&mut self, now: Moment) -> Result<(), ContinueError> {
        match std::mem::replace(&mut self.state, State::Ended) {
            State::PreSwitchover { stopped } => {
                self.set_status(MigrationStatus::Device);
                self.switch_over(now, stopped);
                Ok(())
            }
            other => {
                self.state = other;
                Err(ContinueError(self.status))
            }
        }
    }

    /// The operator says what became of a migration whose outcome cannot be learnt. Returns whether there was such a migration.
    pub fn handle_operator_resolution(&mut self, now: Moment, resolution: Resolution) -> bool {
        if !self.is_unresolved() {
            return false;
        }
        match resolution {
            Resolution::Committed => self.complete(now, None),
            Resolution::NotCommitted => {
                let decision = "the link was lost at the commit, and the operator decided that the guest stays at the source";
                self.take_back(now, Reason::Local(decision.to_owned()));
            }
        }
        true
    }

    /// The control connection is up.
    pub fn handle_control_connected(&mut self, now: Moment) {
        if !self.jobs.end(SourceJob::ConnectControl)
            || self.state.is_over()
            || self.jobs.has(SourceJob::CloseLinks)
        {
            return;
        }
        self.control_open = true;
        self.heard_at = now;
        let id = self.config.migration_id;
        match &mut self.state {
            State::Connecting => {
                let hello = self.hello();
                self.send(now, SourceFrame::Hello(hello));
                self.enter(now, State::AwaitReply);
            }
            State::Resolving { asked, .. } => {
                *asked = true;
                self.send(now, SourceFrame::Resolve(id));
                self.moved_at = now;
            }
            _ => {}
        }
    }

    /// All data connections are up.
    pub fn handle_data_connected(&mut self, now: Moment) {
        if self.jobs.end(SourceJob::ConnectData) {
            // The target's DATA_READY may have been faster than the report of our own connects.
            self.begin_when_prepared(now);
        }
    }

    /// Every notifier was told SETUP and agrees; `waiting_for` names a device that the guest must let go of first.
    pub fn handle_setup_told(&mut self, now: Moment, waiting_for: Option<String>) {
        if self.jobs.end(SourceJob::NotifySetup) {
            self.start_log_when_set_up(now, waiting_for.clone());
            self.hand_over_fds_when_set_up(now, waiting_for);
            self.pay_debts(now);
        }
    }

    /// The guest has let go of every device that it had to.
    pub fn handle_unplugged(&mut self, now: Moment) {
        if let State::Preparing {
            setup: Setup::Waiting { .. },
            ..
        } = self.state
        {
            self.start_log_when_set_up(now, None);
        }
    }

    /// The guest will not let go of its devices; `error` says which, and why.
    pub fn handle_unplug_failed(&mut self, now: Moment, error: &str) {
        if let State::Preparing {
            setup: Setup::Waiting { .. },
            ..
        } = self.state
        {
            self.fail(now, Reason::Local(error.to_owned()));
        }
    }

    /// The notifiers were told FAILED or DONE.
    pub fn handle_notified(&mut self, now: Moment, job: SourceJob) {
        self.jobs.end(job);
        self.pay_debts(now);
    }

    /// The dirty log runs, and it is known which pages exist.
    pub fn handle_log_started(&mut self, now: Moment, found: FirstRound) {
        if !self.jobs.end(SourceJob::StartLog) {
            return;
        }
        self.log_started = true;
        self.synced_at = now;
        if let State::Preparing { first, .. } = &mut self.state {
            *first = Some(found);
        }
        self.begin_when_prepared(now);
        self.pay_debts(now);
    }

    /// The kernel has taken every byte of the round.
    pub fn handle_round_sent(&mut self, now: Moment, round: RoundSent) {
        if !self.jobs.end(SourceJob::Round) {
            return;
        }
        self.moved_at = now;
        self.round_sent = round;
        self.stats.data.0 += round.data.0;
        self.stats.zero.0 += round.zero.0;
        match &mut self.state {
            State::Sending { sent, .. } => *sent = true,
            State::LastRound { sent, .. } => {
                *sent = true;
                self.blackout.sent = now;
                self.stats.last_round_bytes = round.wire_bytes;
            }
            _ => {}
        }
        self.end_round_when_placed(now);
        self.hand_over_when_sent(now);
    }

    /// The dirty logs were fetched: `dirty` pages are to be sent now, those included that earlier fetches found and no round has sent.
    pub fn handle_synced(&mut self, now: Moment, dirty: PageCount, took_us: u64) {
        if !self.jobs.end(SourceJob::Sync) {
            return;
        }
        let elapsed = now.micros_since(self.synced_at);
        self.synced_at = now;
        self.stats.round_pages = dirty;
        self.stats.sync_count += 1;
        match std::mem::replace(&mut self.state, State::Ended) {
            State::Syncing => {
                self.state = State::Syncing;
                self.estimate.note_sync(dirty, elapsed, took_us);
                self.stats.predicted_blackout_us = Some(self.estimate.blackout_us(dirty));
                self.actions
                    .push_back(SourceAction::PassStarted(self.stats.sync_count));
                tracing::debug!(
                    round = self.stats.round.0,
                    dirty_pages = dirty.0,
                    elapsed_us = elapsed,
                    fetch_us = took_us,
                    bytes_per_sec = self.estimate.bytes_per_sec(),
                    predicted_blackout_us = self.stats.predicted_blackout_us,
                    "dirty log fetched"
                );
                match self.estimate.decide(dirty, self.tuning.downtime_limit_us) {
                    Decision::SwitchOver if self.is_acknowledged() => {
                        self.stop_guest(now);
                    }
                    Decision::SwitchOver | Decision::AnotherRound => {
                        self.throttle(now, dirty);
                        if dirty.0 == 0 && self.round_was_empty() && !self.devices_begin {
                            self.enter(now, State::Resting);
                        } else {
                            self.send_round(now);
                        }
                    }
                }
            }
            State::LastSync { stopped } => {
                self.blackout.synced = now;
                let round = self.stats.round.next();
                self.stats.round = round;
                self.send(now, SourceFrame::Switchover(round));
                self.enter(
                    now,
                    State::LastRound {
                        stopped,
                        sent: false,
                        saved: false,
                    },
                );
                self.run(
                    SourceJob::Round,
                    SourceAction::SendRound { round, last: true },
                );
                let hash_ram = self.config.verify;
                self.run(SourceJob::SaveState, SourceAction::SaveState { hash_ram });
            }
            other => {
                self.state = other;
                self.pay_debts(now);
            }
        }
    }

    /// What devices beside RAM have to give, asked together with the dirty logs: `stop_copy_bytes` in the blackout if they were stopped
    /// now, and before that `initial_bytes` once, for which a switchover that is to be acknowledged waits. A round that was placed has
    /// brought the target all of what was left before it.
    pub fn handle_device_sizes(&mut self, stop_copy_bytes: u64, initial_bytes: u64) {
        self.estimate.note_device_bytes(stop_copy_bytes);
        self.devices_begin = initial_bytes > 0;
    }

    fn is_acknowledged(&self) -> bool {
        !self.config.switchover_ack || (self.acked && !self.devices_begin)
    }

    /// Every vCPU has left the guest, but a device would not stop: the attempt fails, and the guest is resumed with the proof.
    pub fn handle_devices_not_stopped(&mut self, now: Moment, proof: P, error: &str) {
        assert!(
            self.jobs.end(SourceJob::StopGuest),
            "a guest that nobody stopped"
        );
        match &mut self.state {
            State::Stopping => {
                self.begin_failing(now, Some(proof), Reason::Local(error.to_owned()));
            }
            State::Failing { stopped, .. } => {
                *stopped = Some(proof);
                self.pay_debts(now);
            }
            other => unreachable!("the guest stopped while {}", other.name()),
        }
    }

    /// A device of this host does not give its state: before COMMIT that ends the attempt, and no link is to blame.
    pub fn handle_device_failed(&mut self, now: Moment, error: &str) {
        if !self.state.in_doubt() {
            self.fail(now, Reason::Local(error.to_owned()));
        }
    }

    /// Every vCPU has left the guest, or it was stopped before.
    pub fn handle_guest_stopped(&mut self, now: Moment, proof: P) {
        assert!(
            self.jobs.end(SourceJob::StopGuest),
            "a guest that nobody stopped"
        );
        self.blackout.stopped = now;
        match &mut self.state {
            State::Stopping if self.config.pause_before_switchover => {
                self.enter(now, State::PreSwitchover { stopped: proof });
                self.set_status(MigrationStatus::PreSwitchover);
            }
            State::Stopping => self.switch_over(now, proof),
            State::Failing { stopped, .. } => {
                *stopped = Some(proof);
                self.pay_debts(now);
            }
            other => unreachable!("the guest stopped while {}", other.name()),
        }
    }

    /// Device state is saved.
    pub fn handle_state_saved(&mut self, now: Moment, state: SavedState) {
        if !self.jobs.end(SourceJob::SaveState) {
            return;
        }
        if let State::LastRound { saved, .. } = &mut self.state {
            *saved = true;
            self.blackout.saved = now;
            self.saved = state;
            self.hand_over_when_sent(now);
        } else {
            self.pay_debts(now);
        }
    }

    /// A job failed on this side, or on the way to the target (connects, rounds).
    pub fn handle_job_failed(&mut self, now: Moment, job: SourceJob, error: &str) {
        if !self.jobs.end(job) {
            return;
        }
        match job {
            SourceJob::ConnectControl | SourceJob::ConnectData | SourceJob::Round => {
                self.lose_link(now, error);
            }
            SourceJob::CloseLinks
            | SourceJob::StopLog
            | SourceJob::NotifyFailed
            | SourceJob::NotifyDone
            | SourceJob::ResumeGuest => {
                unreachable!("job {job:?} reports in its own way");
            }
            _ => self.fail(now, Reason::Local(error.to_owned())),
        }
        self.pay_debts(now);
    }

    /// A connection broke: closed by the peer, reset, or a frame that is none. `protocol` says that the bytes were at fault.
    pub fn handle_link_lost(&mut self, now: Moment, error: &str, protocol: bool) {
        if protocol && !self.state.in_doubt() {
            self.fail(now, Reason::Protocol(error.to_owned()));
        } else {
            self.lose_link(now, error);
        }
    }

    /// Bytes of page data that have left so far, over all rounds. Any growth shows that the link is not stalled.
    pub fn handle_progress(&mut self, now: Moment, bytes: u64) {
        if bytes != self.moved_bytes {
            self.moved_bytes = bytes;
            // Deadlines of other states do not wait for pages.
            if matches!(self.state, State::Sending { .. } | State::LastRound { .. }) {
                self.moved_at = now;
            }
        }
    }

    /// All links are closed and their jobs are over.
    pub fn handle_links_closed(&mut self, now: Moment) {
        self.jobs.end(SourceJob::CloseLinks);
        for job in [
            SourceJob::ConnectControl,
            SourceJob::ConnectData,
            SourceJob::Round,
            SourceJob::OfferFds,
            SourceJob::HandOverFds,
        ] {
            self.jobs.end(job);
        }
        self.control_open = false;
        match &self.state {
            // The old links are gone: asking starts from a clean slate, at once the first time.
            State::Resolving { tries: 0, .. } => self.ask(now),
            State::Resolving { .. } => self.moved_at = now,
            _ => self.pay_debts(now),
        }
    }

    /// The dirty log is off.
    pub fn handle_log_stopped(&mut self, now: Moment) {
        self.jobs.end(SourceJob::StopLog);
        self.pay_debts(now);
    }

    /// The guest runs again.
    pub fn handle_guest_resumed(&mut self, now: Moment) {
        self.jobs.end(SourceJob::ResumeGuest);
        self.config.guest_runs = false;
        self.pay_debts(now);
    }

    /// The guest could not be resumed; it stays stopped, and the operator may try again.
    pub fn handle_resume_failed(&mut self, now: Moment, proof: P, error: &str) {
        self.jobs.end(SourceJob::ResumeGuest);
        self.config.guest_runs = false;
        if let State::Failing { stopped, reason } = &mut self.state {
            *stopped = Some(proof);
            *reason = Reason::Local(format!(
                "{reason}; and the guest could not be resumed: {error}"
            ));
        }
        self.pay_debts(now);
    }

    /// A frame came on the control connection.
    pub fn handle_frame(&mut self, now: Moment, frame: TargetFrame) {
        self.heard_at = now;
        if self.state.is_over() {
            return;
        }
        match (&mut self.state, frame) {
            (_, TargetFrame::Keepalive) => {}
            (State::AwaitReply, TargetFrame::HelloReply(reply)) => self.prepare(now, reply),
            (State::Preparing { data_ready, .. }, TargetFrame::DataReady) if !*data_ready => {
                *data_ready = true;
                self.begin_when_prepared(now);
            }
            (_, TargetFrame::SwitchoverAck) if self.config.switchover_ack && !self.acked => {
                self.acked = true;
                if matches!(self.state, State::Resting) {
                    self.send_round(now);
                }
            }
            (State::Sending { placed, .. }, TargetFrame::RoundPlaced(round))
                if round == self.stats.round && !*placed =>
            {
                *placed = true;
                self.end_round_when_placed(now);
            }
            // The last round needs no such word: READY says more. The target reports it all the same.
            (
                State::LastRound { .. } | State::AwaitReady { .. },
                TargetFrame::RoundPlaced(round),
            ) if round == self.stats.round => {}
            (State::AwaitReady { .. }, TargetFrame::Ready(ready)) => self.commit(now, ready),
            (State::AwaitRunning { .. }, TargetFrame::Running { resume_us }) => {
                self.complete(now, Some(resume_us))
            }
            (State::Resolving { asked: true, .. }, TargetFrame::Resolved(resolution)) => {
                self.resolved(now, resolution)
            }
            // Sent before COMMIT was read, or because starting failed: either way the target says that it does not run the guest.
            (State::AwaitRunning { .. }, TargetFrame::Abort(abort)) => {
                self.take_back(now, Reason::Target(abort))
            }
            // A target that knows nothing of the attempt is no answer.
            (State::Resolving { .. }, _) => {
                self.lose_link(now, "the target does not know this migration")
            }
            (_, TargetFrame::Abort(abort)) => self.fail(now, Reason::Target(abort)),
            (State::AwaitRunning { .. }, _) => {
                self.lose_link(now, "unexpected frame instead of RUNNING")
            }
            (state, frame) => {
                let text = format!("unexpected {} while {}", frame_name(&frame), state.name());
                self.fail(now, Reason::Protocol(text));
            }
        }
    }

    fn enter(&mut self, now: Moment, state: State<P>) {
        tracing::debug!(state = state.name(), "source");
        self.state = state;
        self.moved_at = now;
    }

    fn send(&mut self, now: Moment, frame: SourceFrame) {
        self.said_at = now;
        self.actions.push_back(SourceAction::SendControl(frame));
    }

    fn run(&mut self, job: SourceJob, action: SourceAction<P>) {
        self.jobs.start(job);
        self.actions.push_back(action);
    }

    /// The one place where the status changes.
    fn set_status(&mut self, to: MigrationStatus) {
        assert!(
            self.status.may_become(to),
            "status {} may not become {to}",
            self.status
        );
        self.status = to;
        self.actions.push_back(SourceAction::StatusChanged(to));
    }
}

fn frame_name(frame: &TargetFrame) -> &'static str {
    match frame {
        TargetFrame::HelloReply(_) => "answer to a hello",
        TargetFrame::DataReady => "DATA_READY",
        TargetFrame::SwitchoverAck => "SWITCHOVER_ACK",
        TargetFrame::RoundPlaced(_) => "ROUND_PLACED",
        TargetFrame::Ready(_) => "READY",
        TargetFrame::Running { .. } => "RUNNING",
        TargetFrame::Resolved(_) => "RESOLVED",
        TargetFrame::Keepalive => "keepalive",
        TargetFrame::Abort(_) => "abort",
    }
}
