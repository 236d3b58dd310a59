//! The way of an attempt whose RAM stays where it is: descriptors instead of rounds.
//!
//! The order is what keeps a device from having two owners: the guest is stopped, every notifier was told SETUP and has agreed, and only
//! then do descriptors with one owner leave. If stopping or SETUP fails, none of them has left.

use std::fmt;

use super::Source;
use super::action::{FirstRound, Reason, SourceAction, SourceJob};
use super::state::{Setup, State};
use crate::units::Moment;
use crate::wire::frame::SourceFrame;

impl<P: fmt::Debug> Source<P> {
    /// The target has built its machine around our RAM and listens.
    pub fn handle_fds_offered(&mut self, now: Moment) {
        if !self.jobs.end(SourceJob::OfferFds) {
            return;
        }
        if matches!(self.state, State::Offering) {
            self.enter(now, State::Connecting);
            self.run(SourceJob::ConnectControl, SourceAction::ConnectControl);
        }
        self.pay_debts(now);
    }

    /// The target uses every descriptor.
    pub fn handle_fds_handed_over(&mut self, now: Moment) {
        if !self.jobs.end(SourceJob::HandOverFds) {
            return;
        }
        if let State::LastRound { sent, .. } = &mut self.state {
            *sent = true;
            self.blackout.sent = now;
            self.hand_over_when_sent(now);
        }
        self.pay_debts(now);
    }

    pub(super) fn offer(&mut self, now: Moment) {
        self.enter(now, State::Offering);
        self.run(SourceJob::OfferFds, SourceAction::OfferFds);
    }

    /// There is nothing to wait for but the target's word: notifiers are told when the guest is stopped.
    pub(super) fn prepare_in_place(&mut self, now: Moment) {
        self.enter(
            now,
            State::Preparing {
                data_ready: false,
                setup: Setup::Done,
                first: Some(FirstRound::default()),
            },
        );
    }

    /// The guest is stopped: everybody lets go.
    pub(super) fn release(&mut self, now: Moment, stopped: P) {
        self.enter(now, State::Releasing { stopped });
        self.notified = true;
        self.run(SourceJob::NotifySetup, SourceAction::NotifySetup);
    }

    pub(super) fn hand_over_fds_when_set_up(&mut self, now: Moment, waiting_for: Option<String>) {
        if !matches!(self.state, State::Releasing { .. }) {
            return;
        }
        if let Some(device) = waiting_for {
            let text = format!("the guest is stopped and cannot let go of device {device:?}");
            return self.fail(now, Reason::Local(text));
        }
        let State::Releasing { stopped } = std::mem::replace(&mut self.state, State::Ended) else {
            return;
        };
        self.blackout.synced = now;
        self.send(now, SourceFrame::Switchover(self.stats.round));
        self.enter(
            now,
            State::LastRound {
                stopped,
                sent: false,
                saved: false,
            },
        );
        self.run(SourceJob::HandOverFds, SourceAction::HandOverFds);
        let hash_ram = self.config.verify;
        self.run(SourceJob::SaveState, SourceAction::SaveState { hash_ram });
    }
}
