//! What happens when an attempt does not go well: before COMMIT a failure whose debts are paid, after it a question.

use std::fmt;

use super::Source;
use super::action::{Outcome, Reason, SourceAction, SourceJob};
use super::state::State;
use crate::proto::status::MigrationStatus;
use crate::units::Moment;
use crate::wire::frame::{Resolution, SourceFrame};

impl<P: fmt::Debug> Source<P> {
    /// A link is gone. Before COMMIT that is a failure; after it, a question.
    pub(super) fn lose_link(&mut self, now: Moment, error: &str) {
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
                if !told && now.micros_since(since) >= self.config.deadlines.resolve_us {
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

    pub(super) fn ask(&mut self, now: Moment) {
        if let State::Resolving { tries, .. } = &mut self.state {
            *tries += 1;
        }
        self.moved_at = now;
        self.run(SourceJob::ConnectControl, SourceAction::ConnectControl);
    }

    pub(super) fn resolved(&mut self, now: Moment, resolution: Resolution) {
        match resolution {
            Resolution::Committed => self.complete(now, None),
            Resolution::NotCommitted => {
                let error = "it was lost at the commit, and the target confirms that it does not own the guest";
                self.take_back(now, Reason::Link(error.to_owned()));
            }
        }
    }

    /// The target said that it does not own the guest, or the operator did: a failure after COMMIT that may resume the guest.
    pub(super) fn take_back(&mut self, now: Moment, reason: Reason) {
        let stopped = match std::mem::replace(&mut self.state, State::Ended) {
            State::AwaitRunning { stopped } | State::Resolving { stopped, .. } => stopped,
            other => unreachable!("taken back while {}", other.name()),
        };
        self.begin_failing(now, Some(stopped), reason);
    }

    /// Gives up before COMMIT. Harmless when it is over already.
    pub(super) fn fail(&mut self, now: Moment, reason: Reason) {
        assert!(
            !self.state.in_doubt(),
            "after COMMIT only the target or the operator can say that the attempt failed"
        );
        if self.state.is_over() {
            return;
        }
        let stopped = match std::mem::replace(&mut self.state, State::Ended) {
            State::PreSwitchover { stopped }
            | State::Releasing { stopped }
            | State::LastSync { stopped }
            | State::LastRound { stopped, .. }
            | State::AwaitReady { stopped } => Some(stopped),
            _ => None,
        };
        self.begin_failing(now, stopped, reason);
    }

    pub(super) fn begin_failing(&mut self, now: Moment, stopped: Option<P>, reason: Reason) {
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
        self.let_run_freely();
        self.close_links();
    }

    /// What was said before still leaves; nothing is said after it, and nothing more is expected.
    pub(super) fn close_links(&mut self) {
        self.control_open = false;
        if !self.jobs.has(SourceJob::CloseLinks) {
            self.run(SourceJob::CloseLinks, SourceAction::CloseLinks);
        }
    }

    /// Goes one step on in cleaning up, if nothing is under way that must end first.
    pub(super) fn pay_debts(&mut self, now: Moment) {
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
        if self.notified {
            self.notified = false;
            if matches!(self.state, State::Failing { .. }) {
                self.run(SourceJob::NotifyFailed, SourceAction::NotifyFailed);
            } else {
                self.run(SourceJob::NotifyDone, SourceAction::NotifyDone);
            }
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
}
