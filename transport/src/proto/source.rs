//! The source's half of a migration, from `migrate` to the outcome.
//!
//! ```text
//!  Idle -> Connecting -> AwaitReply -> Preparing -> Sending <-> Syncing        guest runs
//!                                                                 |
//!                                                                 v
//!          Finishing <- AwaitRunning <- AwaitReady <- LastRound <- LastSync <- Stopping
//!              |          |      ^ COMMIT                                       guest stopped
//!              v          v (link lost)
//!           Completed   Resolving <-> Unresolved (operator decides)
//!
//!  any state before COMMIT, on error or cancel  ->  Failing  ->  Ended (guest as before)
//! ```
//!
//! - **Preparing**: data connections and the dirty log are set up side by side.
//! - **Sending**: a round is on its way; it ends when the target has placed it, so that nothing is left in socket buffers when the
//!   guest stops.
//! - **Syncing**: the dirty logs are fetched; then another round or the switchover.
//! - **LastRound**: pages and device state leave side by side; the guest is stopped.
//! - **AwaitReady**: the target holds everything. If the link dies here the guest goes on at the source.
//! - **AwaitRunning**: COMMIT was sent. If the link dies here nobody but the target knows who owns the guest: the source stays stopped
//!   and asks (**Resolving**). If it cannot learn the answer it says so (**Unresolved**), goes on asking, and waits for the operator.
//! - **Failing**: pays the debts of the attempt in order: links closed, jobs over, dirty log off, guest resumed if it ran before.
//!
//! `P` is the proof that the guest is stopped. The core never makes one: it receives it with
//! [`handle_guest_stopped`](Source::handle_guest_stopped), and gives it back in [`SourceAction::ResumeGuest`], which no state after
//! COMMIT can emit unless the target said that it does not own the guest, or the operator decided so (I1).

use std::collections::VecDeque;
use std::fmt;

use super::estimate::{Decision, Estimate};
use super::status::MigrationStatus;
use crate::limits::{
    CONNECT_DEADLINE_US, HELLO_DEADLINE_US, KEEPALIVE_US, READY_DEADLINE_US, RESOLVE_DEADLINE_US,
    RESOLVE_RETRY_US, RUNNING_DEADLINE_US, STALL_US,
};
use crate::units::{MigrationId, Moment, PageCount, RoundId};
use crate::wire::frame::{Abort, AbortCode, Ready, Resolution, SourceFrame, StateEnd, TargetFrame};
use crate::wire::hello::{BlockInfo, DataHello, Hello, HelloReply, VersionRange};
use crate::wire::{DeviceSchema, Section};

/// What an attempt needs to know before it starts.
#[derive(Clone, Debug)]
pub struct SourceConfig {
    /// Names this attempt; random.
    pub migration_id: MigrationId,
    /// Number of data connections, 1 to 255.
    pub data_connections: u16,
    /// Checksums over page data.
    pub checksum: bool,
    /// Compare RAM and vCPU state of both sides before READY counts.
    pub verify: bool,
    /// Name and version of this software.
    pub software: String,
    /// RAM blocks.
    pub blocks: Vec<BlockInfo>,
    /// Devices.
    pub devices: Vec<DeviceSchema>,
    /// Whether the guest runs now. A guest that was paused is handed over paused, and left paused on failure.
    pub guest_runs: bool,
}

/// What the operator may change while the migration runs.
#[derive(Clone, Copy, Debug)]
pub struct SourceTuning {
    /// Longest blackout that is accepted, in microseconds, compared with the prediction.
    pub downtime_limit_us: u64,
}

/// Something that takes time and reports back exactly once.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum SourceJob {
    /// Connecting the control connection.
    ConnectControl,
    /// Connecting all data connections.
    ConnectData,
    /// Starting the dirty log and finding the pages that exist.
    StartLog,
    /// Sending a round.
    Round,
    /// Fetching the dirty log.
    Sync,
    /// Stopping the guest.
    StopGuest,
    /// Saving device state.
    SaveState,
    /// Closing all connections and ending the data threads.
    CloseLinks,
    /// Stopping the dirty log.
    StopLog,
    /// Resuming the guest.
    ResumeGuest,
}

/// What the driver is to do.
#[derive(Debug)]
pub enum SourceAction<P> {
    /// Tell everybody: the status is now this.
    StatusChanged(MigrationStatus),
    /// Tell everybody: this pass over memory begins; QEMU's MIGRATION_PASS.
    PassStarted(u64),
    /// Job [`SourceJob::ConnectControl`]: reports [`Source::handle_control_connected`].
    ConnectControl,
    /// Send on the control connection.
    SendControl(SourceFrame),
    /// Job [`SourceJob::ConnectData`]: open one connection per hello and send the hello on it.
    ConnectData(Vec<DataHello>),
    /// Job [`SourceJob::StartLog`]: reports [`Source::handle_log_started`].
    StartLog,
    /// Job [`SourceJob::Round`]: send everything found by the last fetch. Reports [`Source::handle_round_sent`].
    SendRound {
        /// Number of the round.
        round: RoundId,
        /// The guest is stopped: no round follows.
        last: bool,
    },
    /// Job [`SourceJob::Sync`]: add the dirty logs to what the next round sends. Reports [`Source::handle_synced`].
    Sync,
    /// Job [`SourceJob::StopGuest`]: reports [`Source::handle_guest_stopped`].
    StopGuest,
    /// Job [`SourceJob::SaveState`]: reports [`Source::handle_state_saved`].
    SaveState {
        /// Hash all RAM too.
        hash_ram: bool,
    },
    /// Job [`SourceJob::CloseLinks`]: end connects, rounds and data threads that are under way, close all connections, after what was
    /// given to `SendControl` has left if the link takes it. Reports [`Source::handle_links_closed`]; nothing of the links may be
    /// reported after that.
    CloseLinks,
    /// Job [`SourceJob::StopLog`]: reports [`Source::handle_log_stopped`], also when the log could not be stopped.
    StopLog,
    /// Job [`SourceJob::ResumeGuest`]: the only way to let the guest run again.
    ResumeGuest(P),
    /// Tell the operator: the outcome cannot be learnt. The guest is stopped here and may run at the target.
    Unresolved,
    /// The attempt is over. The last action.
    Finished(Outcome<P>),
}

/// How an attempt ended.
#[derive(Debug)]
pub enum Outcome<P> {
    /// The guest belongs to the target. The proof keeps it stopped here.
    Completed(P),
    /// The guest is where it was.
    Failed {
        /// Why.
        reason: Reason,
        /// Present if the guest is stopped: it was before, or it could not be resumed.
        stopped: Option<P>,
    },
}

/// Why an attempt failed, sorted by whose fault it is.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Reason {
    /// The operator cancelled.
    #[error("cancelled by the operator")]
    Cancelled,
    /// The target gave up and said why.
    #[error("the target refused: {}", .0.reason)]
    Target(Abort),
    /// The peer broke the protocol.
    #[error("the target broke the protocol: {0}")]
    Protocol(String),
    /// The link failed.
    #[error("migration link: {0}")]
    Link(String),
    /// The peer did not do something in time.
    #[error("the target did not {what} within {after_s} s")]
    Deadline {
        /// What was waited for.
        what: &'static str,
        /// For how long, in seconds.
        after_s: u64,
    },
    /// Something failed on this host.
    #[error("{0}")]
    Local(String),
    /// The target found other memory or device state than was sent.
    #[error("verification failed: {0}")]
    Verification(String),
}

impl Reason {
    /// What the target is told. The text never holds more than the operator of the source would see.
    fn to_abort(&self) -> Abort {
        let code = match self {
            Self::Cancelled => AbortCode::Cancelled,
            Self::Target(_) | Self::Local(_) | Self::Verification(_) => AbortCode::Internal,
            Self::Protocol(_) => AbortCode::Protocol,
            Self::Link(_) | Self::Deadline { .. } => AbortCode::Resources,
        };
        Abort::new(code, self.to_string())
    }
}

/// What the first round will send.
#[derive(Clone, Copy, Debug, Default)]
pub struct FirstRound {
    /// Pages that exist.
    pub present: PageCount,
    /// Pages that do not, and are sent as holes.
    pub holes: PageCount,
}

/// What a round has sent.
#[derive(Clone, Copy, Debug, Default)]
pub struct RoundSent {
    /// Pages sent with content.
    pub data: PageCount,
    /// Pages sent as zero.
    pub zero: PageCount,
    /// Bytes on the data connections, headers included.
    pub wire_bytes: u64,
}

/// Saved device state.
#[derive(Clone, Debug, Default)]
pub struct SavedState {
    /// One section per device.
    pub sections: Vec<Section>,
    /// Hash of all RAM, if it was asked for.
    pub ram_hash: Option<u128>,
    /// How long hashing took, in microseconds.
    pub hash_us: u64,
}

/// It is too late to cancel.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum CancelError {
    /// COMMIT was sent: the target owns the guest, or nobody knows.
    #[error(
        "the guest has been handed over to the target already; the migration cannot be cancelled any more"
    )]
    Committed,
}

/// Times at which the steps of the blackout were reached.
#[derive(Clone, Copy, Debug, Default)]
struct Blackout {
    asked: Moment,
    stopped: Moment,
    synced: Moment,
    sent: Moment,
    saved: Moment,
    ready: Moment,
}

/// Parts of the blackout in microseconds. They add up to the time from the order to stop until the target's word that it runs.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct BlackoutParts {
    /// Getting every vCPU out of the guest.
    pub pause_us: u64,
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
            dirty_fetch_us,
            last_round_us,
            device_state_us,
            load_us,
            commit_us,
            resume_us,
            verify_us,
        } = self;
        pause_us
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

#[derive(Debug)]
enum State<P> {
    Idle,
    Connecting,
    AwaitReply,
    Preparing {
        data_ready: bool,
        first: Option<FirstRound>,
    },
    Sending {
        sent: bool,
        placed: bool,
    },
    Syncing,
    Stopping,
    LastSync {
        stopped: P,
    },
    LastRound {
        stopped: P,
        sent: bool,
        saved: bool,
    },
    AwaitReady {
        stopped: P,
    },
    AwaitRunning {
        stopped: P,
    },
    Resolving {
        stopped: P,
        since: Moment,
        /// Attempts to ask so far.
        tries: u64,
        told: bool,
        asked: bool,
    },
    Finishing {
        stopped: P,
    },
    Failing {
        stopped: Option<P>,
        reason: Reason,
    },
    Ended,
}

impl<P> State<P> {
    fn name(&self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Connecting => "connecting",
            Self::AwaitReply => "waiting for the answer to the hello",
            Self::Preparing { .. } => "preparing",
            Self::Sending { .. } => "sending a round",
            Self::Syncing => "fetching the dirty log",
            Self::Stopping => "stopping the guest",
            Self::LastSync { .. } => "fetching the dirty log for the last time",
            Self::LastRound { .. } => "sending the last round",
            Self::AwaitReady { .. } => "waiting for READY",
            Self::AwaitRunning { .. } => "waiting for RUNNING",
            Self::Resolving { .. } => "asking for the outcome",
            Self::Finishing { .. } => "finishing",
            Self::Failing { .. } => "failing",
            Self::Ended => "ended",
        }
    }

    /// COMMIT was sent and the outcome is not known.
    fn in_doubt(&self) -> bool {
        matches!(self, Self::AwaitRunning { .. } | Self::Resolving { .. })
    }

    fn is_over(&self) -> bool {
        matches!(
            self,
            Self::Idle | Self::Finishing { .. } | Self::Failing { .. } | Self::Ended
        )
    }
}

/// Jobs that were started and have not reported back.
#[derive(Clone, Copy, Default)]
struct Jobs(u16);

impl Jobs {
    fn start(&mut self, job: SourceJob) {
        assert!(!self.has(job), "job {job:?} started twice");
        self.0 |= 1 << job as u16;
    }

    /// Whether the job was under way. A report of a job that is not is late news of closed links and is dropped.
    fn end(&mut self, job: SourceJob) -> bool {
        let was = self.has(job);
        self.0 &= !(1 << job as u16);
        was
    }

    fn has(self, job: SourceJob) -> bool {
        self.0 & 1 << job as u16 != 0
    }

    fn none(self) -> bool {
        self.0 == 0
    }
}

impl fmt::Debug for Jobs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

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

    /// What to do next; call until `None`.
    #[must_use]
    pub fn poll_action(&mut self) -> Option<SourceAction<P>> {
        self.actions.pop_front()
    }

    /// When [`handle_timeout`](Self::handle_timeout) must be called at the latest.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Moment> {
        let deadline = self.deadline().map(|(at, _)| at);
        let keepalive = self
            .control_open
            .then(|| self.said_at.plus_micros(KEEPALIVE_US));
        let silence = self.listens().then(|| self.heard_at.plus_micros(STALL_US));
        [deadline, keepalive, silence].into_iter().flatten().min()
    }

    /// Begins.
    ///
    /// # Panics
    /// If called twice.
    pub fn start(&mut self, now: Moment) {
        assert!(matches!(self.state, State::Idle), "an attempt starts once");
        self.stats.began = now;
        self.set_status(MigrationStatus::Setup);
        self.enter(now, State::Connecting);
        self.run(SourceJob::ConnectControl, SourceAction::ConnectControl);
    }

    /// The operator changed a parameter.
    pub fn set_tuning(&mut self, tuning: SourceTuning) {
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
                match self.estimate.decide(dirty, self.tuning.downtime_limit_us) {
                    Decision::AnotherRound => self.send_round(now),
                    Decision::SwitchOver => self.stop_guest(now),
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

    /// Every vCPU has left the guest, or it was stopped before.
    pub fn handle_guest_stopped(&mut self, now: Moment, proof: P) {
        assert!(
            self.jobs.end(SourceJob::StopGuest),
            "a guest that nobody stopped"
        );
        self.blackout.stopped = now;
        match &mut self.state {
            State::Stopping => {
                self.enter(now, State::LastSync { stopped: proof });
                self.run(SourceJob::Sync, SourceAction::Sync);
            }
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
            SourceJob::CloseLinks | SourceJob::StopLog | SourceJob::ResumeGuest => {
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

    /// Time has passed. Call at [`poll_timeout`](Self::poll_timeout) or later.
    pub fn handle_timeout(&mut self, now: Moment) {
        if let Some((at, what)) = self.deadline()
            && now >= at
        {
            self.expire(now, what);
        }
        if self.listens() && now >= self.heard_at.plus_micros(STALL_US) {
            let reason = Reason::Deadline {
                what: "give a sign of life",
                after_s: STALL_US / 1_000_000,
            };
            if self.state.in_doubt() {
                self.lose_link(now, "the target is silent");
            } else {
                self.fail(now, reason);
            }
        }
        if self.control_open && now >= self.said_at.plus_micros(KEEPALIVE_US) {
            self.send(now, SourceFrame::Keepalive);
        }
    }

    /// What is waited for from the peer, until when.
    fn deadline(&self) -> Option<(Moment, &'static str)> {
        let (micros, what) = match &self.state {
            State::Connecting => (CONNECT_DEADLINE_US, "accept the connection"),
            State::AwaitReply => (HELLO_DEADLINE_US, "answer the hello"),
            State::Preparing { data_ready, .. }
                if !data_ready || self.jobs.has(SourceJob::ConnectData) =>
            {
                (CONNECT_DEADLINE_US, "accept all data connections")
            }
            State::Sending { .. } | State::LastRound { sent: false, .. } => {
                (STALL_US, "take any page")
            }
            State::AwaitReady { .. } => (READY_DEADLINE_US, "get ready"),
            State::AwaitRunning { .. } => (RUNNING_DEADLINE_US, "start the guest"),
            State::Resolving { .. } if self.jobs.has(SourceJob::CloseLinks) => return None,
            State::Resolving { asked: false, .. } if !self.jobs.has(SourceJob::ConnectControl) => {
                (RESOLVE_RETRY_US, "answer")
            }
            State::Resolving { .. } => (HELLO_DEADLINE_US, "answer"),
            _ => return None,
        };
        Some((self.moved_at.plus_micros(micros), what))
    }

    fn expire(&mut self, now: Moment, what: &'static str) {
        let after_s = now.micros_since(self.moved_at) / 1_000_000;
        match &self.state {
            State::AwaitRunning { .. } => {
                self.lose_link(now, "the target did not confirm that it runs the guest")
            }
            State::Resolving { asked: false, .. } if !self.jobs.has(SourceJob::ConnectControl) => {
                self.ask(now)
            }
            State::Resolving { .. } => self.lose_link(now, "no answer"),
            _ => self.fail(now, Reason::Deadline { what, after_s }),
        }
    }

    /// Whether silence on the control connection is a fault.
    fn listens(&self) -> bool {
        self.control_open && !self.state.is_over()
    }

    fn hello(&self) -> Hello {
        let SourceConfig {
            migration_id,
            data_connections,
            checksum,
            verify,
            software,
            blocks,
            devices,
            guest_runs: _,
        } = self.config.clone();
        Hello {
            versions: VersionRange::OURS,
            migration_id,
            data_connections,
            checksum,
            verify,
            software,
            blocks,
            devices,
        }
    }

    fn prepare(&mut self, now: Moment, reply: HelloReply) {
        let HelloReply { version, software } = reply;
        if !(VersionRange::OURS.min..=VersionRange::OURS.max).contains(&version) {
            let ours = VersionRange::OURS;
            self.fail(
                now,
                Reason::Protocol(format!(
                    "it chose protocol version {version}, offered was {ours}"
                )),
            );
            return;
        }
        self.stats.target_software = software;
        self.estimate
            .note_round_trip(now.micros_since(self.moved_at));
        self.enter(
            now,
            State::Preparing {
                data_ready: false,
                first: None,
            },
        );
        let (migration_id, count) = (self.config.migration_id, self.config.data_connections);
        let hellos = (0..count)
            .map(|index| DataHello {
                version,
                migration_id,
                index,
                count,
            })
            .collect();
        self.run(SourceJob::ConnectData, SourceAction::ConnectData(hellos));
        self.run(SourceJob::StartLog, SourceAction::StartLog);
    }

    fn begin_when_prepared(&mut self, now: Moment) {
        let State::Preparing {
            data_ready: true,
            first: Some(first),
        } = self.state
        else {
            return;
        };
        if self.jobs.has(SourceJob::ConnectData) {
            // The target has them all, so our own word is only a moment away.
            return;
        }
        self.set_status(MigrationStatus::Active);
        self.stats.first_round = Some(now);
        self.stats.sync_count = 1;
        self.stats.round_pages = first.present;
        self.enter(
            now,
            State::Sending {
                sent: false,
                placed: false,
            },
        );
        self.round_began = now;
        self.run(
            SourceJob::Round,
            SourceAction::SendRound {
                round: RoundId(0),
                last: false,
            },
        );
    }

    fn send_round(&mut self, now: Moment) {
        let round = self.stats.round.next();
        self.stats.round = round;
        self.enter(
            now,
            State::Sending {
                sent: false,
                placed: false,
            },
        );
        self.round_began = now;
        self.run(
            SourceJob::Round,
            SourceAction::SendRound { round, last: false },
        );
    }

    fn end_round_when_placed(&mut self, now: Moment) {
        let State::Sending {
            sent: true,
            placed: true,
        } = self.state
        else {
            return;
        };
        let RoundSent { data, zero, .. } = self.round_sent;
        let took_us = now.micros_since(self.round_began);
        self.estimate.note_round(data, zero, took_us);
        // A round is an exchange too, and a small one takes hardly longer.
        self.estimate.note_round_trip(took_us);
        self.enter(now, State::Syncing);
        self.run(SourceJob::Sync, SourceAction::Sync);
    }

    fn stop_guest(&mut self, now: Moment) {
        self.set_status(MigrationStatus::Device);
        self.blackout.asked = now;
        self.enter(now, State::Stopping);
        self.run(SourceJob::StopGuest, SourceAction::StopGuest);
    }

    fn hand_over_when_sent(&mut self, now: Moment) {
        let State::LastRound {
            sent: true,
            saved: true,
            ..
        } = self.state
        else {
            return;
        };
        let State::LastRound { stopped, .. } = std::mem::replace(&mut self.state, State::Ended)
        else {
            return;
        };
        let SavedState {
            sections, ram_hash, ..
        } = &mut self.saved;
        let sections = std::mem::take(sections);
        let ram_hash = *ram_hash;
        let count = u16::try_from(sections.len()).expect("the hello bounds the number of devices");
        for section in sections {
            self.send(now, SourceFrame::Section(section));
        }
        self.stats.ram_hash = ram_hash;
        self.send(
            now,
            SourceFrame::StateEnd(StateEnd {
                sections: count,
                last_round: self.stats.round,
                guest_runs: self.config.guest_runs,
                ram_hash,
            }),
        );
        self.enter(now, State::AwaitReady { stopped });
    }

    /// The target holds everything. From the moment the frame is handed to the driver the source never resumes by itself.
    fn commit(&mut self, now: Moment, ready: Ready) {
        if let Err(difference) = self.check_verification(&ready) {
            self.fail(now, Reason::Verification(difference));
            return;
        }
        self.stats.ready = Some(ready);
        self.blackout.ready = now;
        let State::AwaitReady { stopped } = std::mem::replace(&mut self.state, State::Ended) else {
            unreachable!("commit is called in AwaitReady");
        };
        self.enter(now, State::AwaitRunning { stopped });
        self.send(now, SourceFrame::Commit);
    }

    fn check_verification(&self, ready: &Ready) -> Result<(), String> {
        if !self.config.verify {
            return Ok(());
        }
        let Some(found) = &ready.verification else {
            return Err("the target did not verify although it was asked to".to_owned());
        };
        if Some(found.ram_hash) != self.stats.ram_hash {
            let ours = self.stats.ram_hash.unwrap_or(0);
            return Err(format!(
                "RAM hash is {ours:032x} at the source and {:032x} at the target",
                found.ram_hash
            ));
        }
        if !found.state_differences.is_empty() {
            return Err(format!(
                "device state reads back differently at the target: {}",
                found.state_differences
            ));
        }
        Ok(())
    }

    fn complete(&mut self, now: Moment, resume_us: Option<u64>) {
        let stopped = match std::mem::replace(&mut self.state, State::Ended) {
            State::AwaitRunning { stopped } | State::Resolving { stopped, .. } => stopped,
            other => unreachable!("completed while {}", other.name()),
        };
        self.stats.blackout = resume_us.map(|resume_us| self.blackout_parts(now, resume_us));
        self.stats.ended = Some(now);
        self.enter(now, State::Finishing { stopped });
        if self.control_open {
            self.send(now, SourceFrame::Finish);
        }
        self.set_status(MigrationStatus::Completed);
        self.close_links();
    }

    /// The parts are differences of consecutive times, so they add up whatever the clocks of the two sides say.
    fn blackout_parts(&self, running: Moment, resume_us: u64) -> BlackoutParts {
        let Blackout {
            asked,
            stopped,
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
            dirty_fetch_us: synced.micros_since(stopped),
            last_round_us: sent.micros_since(synced),
            device_state_us: state - hash_us,
            load_us: load - check_us,
            commit_us: commit - resume_us,
            resume_us,
            verify_us: hash_us + check_us,
        }
    }

    /// A link is gone. Before COMMIT that is a failure; after it, a question.
    fn lose_link(&mut self, now: Moment, error: &str) {
        match std::mem::replace(&mut self.state, State::Ended) {
            State::AwaitRunning { stopped } => {
                self.enter(
                    now,
                    State::Resolving {
                        stopped,
                        since: now,
                        tries: 0,
                        told: false,
                        asked: false,
                    },
                );
                self.close_links();
            }
            State::Resolving {
                stopped,
                since,
                tries,
                mut told,
                asked: _,
            } => {
                if !told && now.micros_since(since) >= RESOLVE_DEADLINE_US {
                    told = true;
                    self.actions.push_back(SourceAction::Unresolved);
                }
                self.enter(
                    now,
                    State::Resolving {
                        stopped,
                        since,
                        tries,
                        told,
                        asked: false,
                    },
                );
                if self.control_open || self.jobs.has(SourceJob::ConnectControl) {
                    self.close_links();
                }
            }
            other => {
                self.state = other;
                self.fail(now, Reason::Link(error.to_owned()));
            }
        }
    }

    fn ask(&mut self, now: Moment) {
        if let State::Resolving { tries, .. } = &mut self.state {
            *tries += 1;
        }
        self.moved_at = now;
        self.run(SourceJob::ConnectControl, SourceAction::ConnectControl);
    }

    fn resolved(&mut self, now: Moment, resolution: Resolution) {
        match resolution {
            Resolution::Committed => self.complete(now, None),
            Resolution::NotCommitted => {
                let error = "it was lost at the commit, and the target confirms that it does not own the guest";
                self.take_back(now, Reason::Link(error.to_owned()));
            }
        }
    }

    /// The target said that it does not own the guest, or the operator did: a failure after COMMIT that may resume the guest.
    fn take_back(&mut self, now: Moment, reason: Reason) {
        let stopped = match std::mem::replace(&mut self.state, State::Ended) {
            State::AwaitRunning { stopped } | State::Resolving { stopped, .. } => stopped,
            other => unreachable!("taken back while {}", other.name()),
        };
        self.begin_failing(now, Some(stopped), reason);
    }

    /// Gives up before COMMIT. Harmless when it is over already.
    fn fail(&mut self, now: Moment, reason: Reason) {
        assert!(
            !self.state.in_doubt(),
            "after COMMIT only the target or the operator can say that the attempt failed"
        );
        if self.state.is_over() {
            return;
        }
        let stopped = match std::mem::replace(&mut self.state, State::Ended) {
            State::LastSync { stopped }
            | State::LastRound { stopped, .. }
            | State::AwaitReady { stopped } => Some(stopped),
            _ => None,
        };
        self.begin_failing(now, stopped, reason);
    }

    fn begin_failing(&mut self, now: Moment, stopped: Option<P>, reason: Reason) {
        let cancelled = reason == Reason::Cancelled;
        self.set_status(if cancelled {
            MigrationStatus::Cancelling
        } else {
            MigrationStatus::Failing
        });
        if self.control_open {
            self.send(now, SourceFrame::Abort(reason.to_abort()));
        }
        self.enter(now, State::Failing { stopped, reason });
        self.close_links();
    }

    /// What was said before still leaves; nothing is said after it, and nothing more is expected.
    fn close_links(&mut self) {
        self.control_open = false;
        if !self.jobs.has(SourceJob::CloseLinks) {
            self.run(SourceJob::CloseLinks, SourceAction::CloseLinks);
        }
    }

    /// Goes one step on in cleaning up, if nothing is under way that must end first.
    fn pay_debts(&mut self, now: Moment) {
        if !self.jobs.none()
            || !matches!(self.state, State::Failing { .. } | State::Finishing { .. })
        {
            return;
        }
        if self.log_started {
            self.log_started = false;
            self.run(SourceJob::StopLog, SourceAction::StopLog);
            return;
        }
        match std::mem::replace(&mut self.state, State::Ended) {
            State::Failing {
                stopped: Some(proof),
                reason,
            } if self.config.guest_runs => {
                self.state = State::Failing {
                    stopped: None,
                    reason,
                };
                self.run(SourceJob::ResumeGuest, SourceAction::ResumeGuest(proof));
            }
            State::Failing { stopped, reason } => {
                // Not by the reason: a cancelled attempt may have met an error on its way out.
                let cancelled = self.status == MigrationStatus::Cancelling;
                self.stats.ended = Some(now);
                self.set_status(if cancelled {
                    MigrationStatus::Cancelled
                } else {
                    MigrationStatus::Failed
                });
                self.actions
                    .push_back(SourceAction::Finished(Outcome::Failed { reason, stopped }));
            }
            State::Finishing { stopped } => {
                self.actions
                    .push_back(SourceAction::Finished(Outcome::Completed(stopped)));
            }
            other => self.state = other,
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
        TargetFrame::RoundPlaced(_) => "ROUND_PLACED",
        TargetFrame::Ready(_) => "READY",
        TargetFrame::Running { .. } => "RUNNING",
        TargetFrame::Resolved(_) => "RESOLVED",
        TargetFrame::Keepalive => "keepalive",
        TargetFrame::Abort(_) => "abort",
    }
}
