//! What is waited for, until when, and what happens if it does not come (I6).

use std::fmt;

use super::Source;
use super::action::{Reason, SourceJob};
use super::state::{Setup, State};
use crate::units::Moment;
use crate::wire::frame::SourceFrame;

/// Before a round that may have nothing to send, in microseconds.
const REST_US: u64 = 10_000;

impl<P: fmt::Debug> Source<P> {
    /// When [`handle_timeout`](Self::handle_timeout) must be called at the latest.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Moment> {
        let deadline = self.deadline().map(|(at, _)| at);
        let keepalive = self
            .control_open
            .then(|| self.said_at.plus_micros(self.config.deadlines.keepalive_us));
        let silence = self
            .listens()
            .then(|| self.heard_at.plus_micros(self.config.deadlines.stall_us));
        [
            deadline,
            self.unplug_deadline(),
            self.rest_ends(),
            keepalive,
            silence,
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// Time has passed. Call at [`poll_timeout`](Self::poll_timeout) or later.
    pub fn handle_timeout(&mut self, now: Moment) {
        if let Some((at, what)) = self.deadline()
            && now >= at
        {
            self.expire(now, what);
        }
        if self.rest_ends().is_some_and(|at| now >= at) {
            self.send_round(now);
        }
        if let State::Preparing {
            setup: Setup::Waiting { device, since },
            ..
        } = &self.state
            && now.micros_since(*since) >= self.config.deadlines.unplug_us
        {
            let after_s = self.config.deadlines.unplug_us / 1_000_000;
            let text = format!("the guest did not let go of device {device:?} within {after_s} s");
            self.fail(now, Reason::Local(text));
        }
        if self.listens() && now >= self.heard_at.plus_micros(self.config.deadlines.stall_us) {
            let reason = Reason::Deadline {
                what: "give a sign of life",
                after_s: self.config.deadlines.stall_us / 1_000_000,
            };
            if self.state.in_doubt() {
                self.lose_link(now, "the target is silent");
            } else {
                self.fail(now, reason);
            }
        }
        if self.control_open && now >= self.said_at.plus_micros(self.config.deadlines.keepalive_us)
        {
            self.send(now, SourceFrame::Keepalive);
        }
    }

    /// What is waited for from the peer, until when.
    fn deadline(&self) -> Option<(Moment, &'static str)> {
        let (micros, what) = match &self.state {
            State::Connecting => (self.config.deadlines.connect_us, "accept the connection"),
            State::AwaitReply => (self.config.deadlines.hello_us, "answer the hello"),
            State::Preparing { data_ready, .. }
                if !data_ready || self.jobs.has(SourceJob::ConnectData) =>
            {
                (
                    self.config.deadlines.connect_us,
                    "accept all data connections",
                )
            }
            // Who hands descriptors over has deadlines of its own, and memory that goes to a disk takes as long as the disk: giving up would
            // not let the guest run any earlier.
            State::LastRound { sent: false, .. } if self.config.data_connections == 0 => {
                return None;
            }
            State::Sending { .. } | State::LastRound { sent: false, .. } => {
                (self.config.deadlines.stall_us, "take any page")
            }
            State::AwaitReady { .. } => (self.config.deadlines.ready_us, "get ready"),
            State::AwaitRunning { .. } => (self.config.deadlines.running_us, "start the guest"),
            State::Resolving { .. } if self.jobs.has(SourceJob::CloseLinks) => return None,
            State::Resolving { asked: false, .. } if !self.jobs.has(SourceJob::ConnectControl) => {
                (self.config.deadlines.resolve_retry_us, "answer")
            }
            State::Resolving { .. } => (self.config.deadlines.hello_us, "answer"),
            _ => return None,
        };
        Some((self.moved_at.plus_micros(micros), what))
    }

    fn unplug_deadline(&self) -> Option<Moment> {
        match &self.state {
            State::Preparing {
                setup: Setup::Waiting { since, .. },
                ..
            } => Some(since.plus_micros(self.config.deadlines.unplug_us)),
            _ => None,
        }
    }

    fn rest_ends(&self) -> Option<Moment> {
        matches!(self.state, State::Resting).then(|| self.moved_at.plus_micros(REST_US))
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
}
