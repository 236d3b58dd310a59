//! What happens to a world from outside: faults that are due, the operator, strangers.

use super::commands::Command;
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
        let orders = std::mem::take(&mut self.faults.orders);
        for order in orders.iter().filter(|order| order.step == step) {
            happened = true;
            self.execute(order.command);
        }
        self.faults.orders = orders;
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

    /// When a process takes commands again. Operators repeat what nobody has heard.
    pub(super) fn when_awake(&self, command: Command) -> u64 {
        self.frozen_until[command.side() as usize]
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
