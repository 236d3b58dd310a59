//! What happens to a world from outside: faults that are due, the operator, strangers.

use vmferry_transport::proto::{MigrationStatus, SourceJob};
use vmferry_transport::wire::frame::Resolution;

use super::faults::{Faults, Kill, Since};
use super::net::{Item, Use};
use super::{Event, Side, World, hostile};

impl World {
    /// Whether anything happened: that is a step of its own then.
    pub(super) fn meet_step_faults(&mut self) -> bool {
        let Some(begun) = self.faults_since() else {
            return false;
        };
        let step = self.step - begun;
        let mut happened = false;
        let at = |fault: &Option<Kill>| fault.filter(|kill| kill.step == step);
        if let Some(kill) = at(&self.faults.kill_source).filter(|_| self.source.alive) {
            happened = true;
            self.note(|| format!("the source dies: {kill:?}"));
            self.source.alive = false;
            self.close_all(Side::Source, kill.silent);
        }
        if let Some(kill) = at(&self.faults.kill_target).filter(|_| self.target.alive) {
            happened = true;
            self.note(|| format!("the target dies: {kill:?}"));
            self.target.alive = false;
            self.close_all(Side::Target, kill.silent);
            if let Some(delay_us) = self.faults.restart_target_after_us {
                self.schedule(delay_us, Event::Restart);
            }
        }
        for (side, freeze) in [
            (Side::Source, self.faults.freeze_source),
            (Side::Target, self.faults.freeze_target),
        ] {
            if let Some(freeze) = freeze.filter(|freeze| freeze.step == step) {
                self.note(|| format!("{side:?} is frozen for {} us", freeze.micros));
                self.frozen_until[side as usize] = self.now + freeze.micros;
            }
        }
        if self.faults.cancel_source == Some(step) && self.is_awake(Side::Source) {
            happened = true;
            self.operator_cancels();
        }
        if self.faults.cancel_target == Some(step) && self.is_awake(Side::Target) {
            happened = true;
            self.note(|| "the operator cancels at the target".to_owned());
            let now = self.moment();
            self.target.core.handle_cancel(now);
        }
        if self.faults.pause == Some(step)
            && self.is_awake(Side::Source)
            && self.may_pause()
            && self.source.running
        {
            happened = true;
            self.note(|| "the operator pauses the guest".to_owned());
            self.source.proof = Some(self.pause_guest());
            self.guest_should_run = false;
            self.source.core.set_guest_runs(false);
            let delay = self.rng.below(20_000);
            self.schedule(delay, Event::Continue);
        }
        happened
    }

    /// At which step the faults began, if they have.
    pub(super) fn faults_since(&self) -> Option<u64> {
        match self.faults.since {
            Since::Start => Some(0),
            Since::Stop => self.stopped_at_step,
            Since::Commit => self.committed_at_step,
        }
    }

    /// Whether a fault happens now.
    pub(super) fn chance(&mut self, of: impl Fn(&Faults) -> u32) -> bool {
        let per_mille = of(&self.faults);
        let quiet = self
            .faults
            .quiet_after_us
            .is_some_and(|after| self.now > after);
        !quiet && self.faults_since().is_some() && self.rng.chance(per_mille)
    }

    pub(super) fn hangs(&mut self) -> bool {
        self.chance(|faults| faults.hang_connect)
    }

    pub(super) fn operator_cancels(&mut self) {
        let (now, status, was_over) = (
            self.moment(),
            self.source.core.status(),
            self.source.ending.is_some(),
        );
        let answer = self.source.core.handle_cancel(now);
        self.note(|| format!("the operator cancels at the source: {answer:?}"));
        match answer {
            Ok(()) => {
                // An attempt that is failing already ends as failed.
                self.source.cancelled |= !was_over
                    && !matches!(status, MigrationStatus::Failing | MigrationStatus::Failed);
            }
            Err(_) => assert!(
                self.source.commit_sent,
                "refused although nothing is committed"
            ),
        }
    }

    /// The guest may be paused and continued while rounds are sent, as with `stop` and `cont`.
    pub(super) fn may_pause(&self) -> bool {
        self.source.ending.is_none()
            && !self.source.has_job(SourceJob::StopGuest)
            && matches!(
                self.source.core.status(),
                MigrationStatus::Setup | MigrationStatus::Active
            )
    }

    pub(super) fn operator_continues(&mut self) {
        if self.is_awake(Side::Source) && self.may_pause() && self.source.proof.take().is_some() {
            self.note(|| "the operator lets the guest go on".to_owned());
            self.source.running = true;
            self.guest_should_run = true;
            self.source.core.set_guest_runs(true);
        }
    }

    pub(super) fn operator_goes_on(&mut self) {
        if !self.source.alive || self.source.ending.is_some() {
            return;
        }
        if !self.is_awake(Side::Source) {
            // Operators try again.
            self.schedule(1_000_000, Event::GoOn);
        } else {
            let (now, status) = (self.moment(), self.source.core.status());
            let answer = self.source.core.handle_continue(now);
            self.note(|| format!("the operator goes on: {answer:?}"));
            assert_eq!(answer.is_ok(), status == MigrationStatus::PreSwitchover);
        }
    }

    /// The operator looks at the target. If it might still take the guest, it is fenced first.
    pub(super) fn operator_decides(&mut self) {
        if !self.source.alive || !self.source.core.is_unresolved() {
            return;
        }
        let decision = if self.target.owns_guest() {
            Resolution::Committed
        } else {
            if self.target.alive {
                self.target.alive = false;
                self.close_all(Side::Target, false);
            }
            Resolution::NotCommitted
        };
        self.note(|| format!("the operator says {decision:?}"));
        self.source.operator = Some(decision);
        let now = self.moment();
        assert!(self.source.core.handle_operator_resolution(now, decision));
    }

    pub(super) fn stranger_connects(&mut self) {
        if !self.target.alive || !self.target.listens {
            return;
        }
        let link = self.open_link(Use::Stranger);
        self.target_accepts(link);
        let bytes = hostile::stranger_bytes(&mut self.rng, &self.blocks);
        self.note(|| format!("a stranger on {link:?}"));
        if !bytes.is_empty() {
            self.write(link, Side::Source, Item::Bytes(bytes));
        }
        if self.rng.chance(500) {
            self.close_link(link, Side::Source, true);
        }
    }
}
