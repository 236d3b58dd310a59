//! The target's half of a migration, from the first connection until the guest runs here or never will.
//!
//! ```text
//!  Listening -> AwaitData -> Preparing -> Receiving -> Loading -> Ready -> Starting -> Running
//!      ^            |            |            |           |         |         |
//!      |            v            v            v           v         v         v (start failed)
//!   (hello does not fit)         +------------+-- Failing --+-------+---------+
//!                                                   |
//!                                                 Failed
//! ```
//!
//! - **Listening**: a hello that does not fit is refused and changes nothing; the next one is welcome.
//! - **Receiving**: pages go from the data connections into memory; sections are collected. Loading begins when the last round is in
//!   its place and every section is here.
//! - **Ready**: everything is loaded. The guest still belongs to the source: if the link dies here, the attempt has failed, for good.
//! - **Starting**: COMMIT was read. From here on the guest belongs to the target.
//! - **Failing**: the notifiers hear of it first and give back what they have taken over; only then the source is told.
//! - **Failed**: the target never starts this guest. That promise is what an answer to RESOLVE rests on, so a COMMIT that arrives
//!   later is ignored (I1).

mod action;
mod connections;
mod state;
mod switchover;

use std::collections::VecDeque;

pub use self::action::{
    Connection, Loaded, TargetAction, TargetConfig, TargetError, TargetJob, TargetStatus,
};
use self::state::{Attempt, Phase};
use crate::units::{MigrationId, Moment, RoundId};
use crate::wire::frame::{AbortCode, Ready, Resolution, SourceFrame, TargetFrame};

/// Attempts that failed and may still be asked about. A source asks within a minute; the list is short because attempts are not.
const REMEMBERED_MAX: usize = 64;

/// The target's half of a migration. See the module documentation.
#[derive(Debug)]
pub struct Target {
    config: TargetConfig,
    status: TargetStatus,
    phase: Phase,
    attempt: Option<Attempt>,
    error: Option<TargetError>,
    jobs: Vec<TargetJob>,
    actions: VecDeque<TargetAction>,
    /// Attempts that failed here: each is answered with "not committed".
    refused: VecDeque<MigrationId>,
    entered_at: Moment,
    heard_at: Moment,
    said_at: Moment,
    control_open: bool,
}

impl Target {
    /// A target that waits for its first connection.
    pub fn new(config: TargetConfig) -> Self {
        Self {
            config,
            status: TargetStatus::None,
            phase: Phase::Listening,
            attempt: None,
            error: None,
            jobs: Vec::new(),
            actions: VecDeque::new(),
            refused: VecDeque::new(),
            entered_at: Moment::default(),
            heard_at: Moment::default(),
            said_at: Moment::default(),
            control_open: false,
        }
    }

    /// The status.
    pub fn status(&self) -> TargetStatus {
        self.status
    }

    /// Why the attempt failed, once it has.
    pub fn error(&self) -> Option<&TargetError> {
        self.error.as_ref()
    }

    /// COMMIT was read: the guest is this side's, and runs or is being started.
    pub fn has_guest(&self) -> bool {
        matches!(self.phase, Phase::Starting | Phase::Running)
    }

    /// Everything is loaded, and the source has not said COMMIT.
    pub fn is_ready(&self) -> bool {
        self.phase == Phase::Ready
    }

    /// COMMIT was read, and the source has not been told what came of it.
    pub fn is_starting(&self) -> bool {
        self.phase == Phase::Starting
    }

    /// The attempt has failed, and those who must hear of it have not all been told.
    pub fn is_failing(&self) -> bool {
        matches!(self.phase, Phase::Failing { .. })
    }

    /// The control connection of the attempt that was accepted last.
    pub fn control(&self) -> Option<Connection> {
        self.attempt.as_ref().map(|attempt| attempt.control)
    }

    /// The attempt that was accepted last.
    pub fn migration_id(&self) -> Option<MigrationId> {
        self.attempt.as_ref().map(|attempt| attempt.id)
    }

    /// What to do next; call until `None`.
    #[must_use]
    pub fn poll_action(&mut self) -> Option<TargetAction> {
        self.actions.pop_front()
    }

    /// When [`handle_timeout`](Self::handle_timeout) must be called at the latest.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Moment> {
        let joining = (self.phase == Phase::AwaitData).then(|| {
            self.entered_at
                .plus_micros(self.config.deadlines.connect_us)
        });
        let silence = self
            .phase
            .before_commit()
            .then(|| self.heard_at.plus_micros(self.config.deadlines.stall_us));
        let keepalive = self
            .keeps_alive()
            .then(|| self.said_at.plus_micros(self.config.deadlines.keepalive_us));
        [joining, silence, keepalive].into_iter().flatten().min()
    }

    /// The first frame of a new connection. Whatever it is, the connection is answered, adopted or closed.
    pub fn handle_first_frame(&mut self, now: Moment, connection: Connection, frame: SourceFrame) {
        match frame {
            SourceFrame::Hello(hello) => self.welcome(now, connection, hello),
            SourceFrame::DataHello(hello) => self.join(now, connection, hello),
            SourceFrame::Resolve(id) => self.answer(now, connection, id),
            _ => self.refuse(
                connection,
                AbortCode::Protocol,
                "a connection must begin with a hello",
            ),
        }
    }

    /// A later frame of a control connection.
    pub fn handle_frame(&mut self, now: Moment, connection: Connection, frame: SourceFrame) {
        if self
            .attempt
            .as_ref()
            .is_none_or(|attempt| attempt.control != connection)
        {
            // A connection that asked for an outcome says FINISH when it has the answer; nothing else is of interest.
            if frame == SourceFrame::Finish && self.asks(connection) {
                self.settle();
            }
            return;
        }
        self.heard_at = now;
        match (self.phase, frame) {
            (Phase::Failing { .. } | Phase::Failed | Phase::Listening, _)
            | (_, SourceFrame::Keepalive) => {}
            (Phase::Running, SourceFrame::Finish) => self.settle(),
            (Phase::Starting | Phase::Running, _) => {}
            (_, SourceFrame::Abort(abort)) => self.fail(now, TargetError::Source(abort)),
            (Phase::Receiving, SourceFrame::Switchover(round)) => self.announce(now, round),
            (Phase::Receiving, SourceFrame::Section(section)) => self.collect(now, section),
            (Phase::Receiving, SourceFrame::StateEnd(end)) => self.end_state(now, end),
            (Phase::Ready, SourceFrame::Commit) => self.commit(now),
            (phase, frame) => {
                let text = format!("unexpected {} while {}", frame_name(&frame), phase.name());
                self.fail(now, TargetError::Protocol(text));
            }
        }
    }

    /// A control connection broke, or carried bytes that are no frame (`protocol`).
    pub fn handle_connection_lost(
        &mut self,
        now: Moment,
        connection: Connection,
        error: &str,
        protocol: bool,
    ) {
        let Some(attempt) = &mut self.attempt else {
            return;
        };
        attempt.askers.retain(|asker| *asker != connection);
        if attempt.control != connection {
            return;
        }
        // What cannot be read can still be written to.
        self.control_open &= protocol && self.may_explain(connection);
        if self.phase.before_commit() {
            let text = error.to_owned();
            self.fail(
                now,
                if protocol {
                    TargetError::Protocol(text)
                } else {
                    TargetError::Link(text)
                },
            );
        }
    }

    /// Whether this connection is to be kept although it cannot be read any more: the source has yet to be told why it fails.
    pub fn may_explain(&self, connection: Connection) -> bool {
        let failing = matches!(self.phase, Phase::Failing { .. });
        self.control() == Some(connection) && (self.phase.before_commit() || failing)
    }

    /// A data connection failed.
    pub fn handle_data_failed(&mut self, now: Moment, error: TargetError) {
        if self.phase.before_commit() {
            self.fail(now, error);
        }
    }

    /// The only place where a source could come from has none to give: no attempt will ever begin, or the one under way cannot go on.
    pub fn handle_origin_failed(&mut self, now: Moment, error: TargetError) {
        if self.phase == Phase::Listening {
            self.set_status(TargetStatus::Setup);
            self.begin_failing(now, error);
        } else {
            self.handle_data_failed(now, error);
        }
    }

    /// Memory is prepared and the data threads run.
    pub fn handle_prepared(&mut self, now: Moment) {
        self.end_job(TargetJob::Prepare);
        if self.phase == Phase::Preparing {
            self.enter(now, Phase::Receiving);
            self.set_status(TargetStatus::Active);
            self.send_control(now, TargetFrame::DataReady);
            if self
                .attempt
                .as_ref()
                .is_some_and(|attempt| attempt.switchover_ack)
            {
                // No device of ours needs to have seen anything before the switchover.
                self.send_control(now, TargetFrame::SwitchoverAck);
            }
        }
        self.pay_debts();
    }

    /// Every page of a round is in its place, on all connections.
    pub fn handle_round_placed(&mut self, now: Moment, round: RoundId, last: bool) {
        if self.phase != Phase::Receiving {
            return;
        }
        if last && let Some(attempt) = &mut self.attempt {
            attempt.last_placed = Some(round);
        }
        self.send_control(now, TargetFrame::RoundPlaced(round));
        self.load_when_complete(now);
    }

    /// All device state is loaded.
    pub fn handle_loaded(&mut self, now: Moment, loaded: Loaded) {
        self.end_job(TargetJob::Load);
        if self.phase == Phase::Loading {
            let Loaded {
                load_us,
                populated_bytes,
                verification,
            } = loaded;
            self.enter(now, Phase::Ready);
            self.send_control(
                now,
                TargetFrame::Ready(Ready {
                    load_us,
                    populated_bytes,
                    verification,
                }),
            );
        }
        self.pay_debts();
    }

    /// The guest runs, or is kept paused as it was; `resume_us` is how long it took.
    pub fn handle_guest_started(&mut self, now: Moment, resume_us: u64) {
        self.end_job(TargetJob::StartGuest);
        assert_eq!(self.phase, Phase::Starting, "a guest that nobody started");
        self.enter(now, Phase::Running);
        self.send_control(now, TargetFrame::Running { resume_us });
        self.set_status(TargetStatus::Completed);
        self.reply_to_askers(Resolution::Committed);
    }

    /// A job failed. A guest that could not be started has not run a single instruction, and no device has worked for it.
    pub fn handle_job_failed(&mut self, now: Moment, job: TargetJob, code: AbortCode, error: &str) {
        self.end_job(job);
        let error = TargetError::Local(code, error.to_owned());
        if self.phase == Phase::Starting {
            self.begin_failing(now, error);
        } else if self.phase.before_commit() {
            self.fail(now, error);
        }
        self.pay_debts();
    }

    /// The notifiers were told INCOMING_FAILED and have given back what they had taken over: now the failure is published.
    pub fn handle_notified(&mut self, now: Moment) {
        self.end_job(TargetJob::NotifyFailed);
        if let Phase::Failing { told, .. } = &mut self.phase
            && !*told
        {
            *told = true;
            self.set_status(TargetStatus::Failing);
            if let Some(error) = self.error.as_ref().filter(|_| self.control_open) {
                let abort = error.to_abort();
                self.send_control(now, TargetFrame::Abort(abort));
            }
            self.reply_to_askers(Resolution::NotCommitted);
            self.start_job(TargetJob::CloseLinks, TargetAction::CloseLinks);
        }
        self.pay_debts();
    }

    /// All links of the attempt are closed and the data threads have ended.
    pub fn handle_links_closed(&mut self, _now: Moment) {
        self.end_job(TargetJob::CloseLinks);
        self.control_open = false;
        self.pay_debts();
    }

    /// The operator (or the end of the process) gives up on the attempt. Harmless when there is none, or when the guest is here.
    pub fn handle_cancel(&mut self, now: Moment) {
        if self.phase.before_commit() {
            self.fail(
                now,
                TargetError::Local(AbortCode::Cancelled, "cancelled at the target".to_owned()),
            );
        }
    }

    /// Memory is empty again after a failure: the next hello is welcome.
    ///
    /// # Panics
    /// If the last attempt is not over.
    pub fn listen_again(&mut self, now: Moment) {
        assert_eq!(
            self.phase,
            Phase::Failed,
            "only a failed target can start over"
        );
        self.attempt = None;
        self.enter(now, Phase::Listening);
    }

    /// Time has passed.
    pub fn handle_timeout(&mut self, now: Moment) {
        if self.phase == Phase::AwaitData
            && now
                >= self
                    .entered_at
                    .plus_micros(self.config.deadlines.connect_us)
        {
            let joined = self
                .attempt
                .as_ref()
                .map_or(&[][..], |attempt| &attempt.joined);
            let (came, all) = (
                joined.iter().filter(|joined| **joined).count(),
                joined.len(),
            );
            let after_s = self.config.deadlines.connect_us / 1_000_000;
            let text = format!("only {came} of {all} data connections arrived within {after_s} s");
            self.fail(now, TargetError::Protocol(text));
        }
        if self.phase.before_commit()
            && now >= self.heard_at.plus_micros(self.config.deadlines.stall_us)
        {
            let text = format!(
                "the source gave no sign of life for {} s",
                self.config.deadlines.stall_us / 1_000_000
            );
            self.fail(now, TargetError::Link(text));
        }
        if self.keeps_alive() && now >= self.said_at.plus_micros(self.config.deadlines.keepalive_us)
        {
            self.send_control(now, TargetFrame::Keepalive);
        }
    }

    fn keeps_alive(&self) -> bool {
        self.control_open && (self.phase.before_commit() || self.phase == Phase::Starting)
    }

    fn fail(&mut self, now: Moment, error: TargetError) {
        assert!(
            self.phase.before_commit(),
            "an attempt fails before COMMIT only, not while {}",
            self.phase.name()
        );
        self.begin_failing(now, error);
    }

    fn begin_failing(&mut self, now: Moment, error: TargetError) {
        // A source that gave up itself has not sent COMMIT and is in no doubt.
        let knows = matches!(error, TargetError::Source(_));
        let linger = matches!(self.phase, Phase::Ready | Phase::Starting) && !knows;
        if let Some(attempt) = &self.attempt {
            if self.refused.len() == REMEMBERED_MAX {
                self.refused.pop_front();
            }
            self.refused.push_back(attempt.id);
        }
        self.error = Some(error);
        let told = false;
        self.enter(now, Phase::Failing { linger, told });
        self.start_job(TargetJob::NotifyFailed, TargetAction::NotifyFailed);
    }

    fn pay_debts(&mut self) {
        let Phase::Failing { linger, told: true } = self.phase else {
            return;
        };
        if self.jobs.is_empty() {
            self.phase = Phase::Failed;
            self.set_status(TargetStatus::Failed);
            let error = self
                .error
                .clone()
                .unwrap_or_else(|| TargetError::Link("unknown".to_owned()));
            self.actions
                .push_back(TargetAction::Failed { error, linger });
        }
    }

    fn send_control(&mut self, now: Moment, frame: TargetFrame) {
        if let Some(attempt) = &self.attempt
            && self.control_open
        {
            self.said_at = now;
            self.actions
                .push_back(TargetAction::Send(attempt.control, frame));
        }
    }

    fn start_job(&mut self, job: TargetJob, action: TargetAction) {
        assert!(!self.jobs.contains(&job), "job {job:?} started twice");
        self.jobs.push(job);
        self.actions.push_back(action);
    }

    fn end_job(&mut self, job: TargetJob) {
        self.jobs.retain(|running| *running != job);
    }

    fn enter(&mut self, now: Moment, phase: Phase) {
        tracing::debug!(phase = phase.name(), "target");
        self.phase = phase;
        self.entered_at = now;
    }

    /// The one place where the status changes.
    fn set_status(&mut self, to: TargetStatus) {
        if self.status != to {
            self.status = to;
            self.actions.push_back(TargetAction::StatusChanged(to));
        }
    }
}

fn frame_name(frame: &SourceFrame) -> &'static str {
    match frame {
        SourceFrame::Hello(_) => "hello",
        SourceFrame::DataHello(_) => "data hello",
        SourceFrame::Switchover(_) => "SWITCHOVER",
        SourceFrame::Section(_) => "device state",
        SourceFrame::StateEnd(_) => "end of device state",
        SourceFrame::Commit => "COMMIT",
        SourceFrame::Resolve(_) => "RESOLVE",
        SourceFrame::Finish => "FINISH",
        SourceFrame::Keepalive => "keepalive",
        SourceFrame::Abort(_) => "abort",
    }
}
