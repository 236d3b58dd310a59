//! What operators may say at any moment, and what the engine makes of it before a core hears of it.

use vmferry_transport::proto::{MigrationStatus, SourceTuning};
use vmferry_transport::wire::frame::Resolution;

use super::faults::Notice;
use super::net::{LinkId, Use};
use super::rng::Rng;
use super::run_control::Guest;
use super::setup::THROTTLE;
use super::source_host::Ending;
use super::{Event, Side, World};

/// A command of an operator.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Command {
    /// `migrate_cancel` at the source.
    Cancel,
    /// The target gives up on what comes in.
    CancelIncoming,
    /// `migrate` to the same address: refused while an attempt is under way or the guest is gone.
    Migrate,
    /// `migrate-continue` out of pre-switchover.
    Continue,
    /// `stop`.
    Stop(Side),
    /// `cont`.
    Cont(Side),
    /// `migrate-set-parameters`: the downtime limit in microseconds.
    SetDowntimeLimit(u64),
    /// `migrate-set-parameters`: the bandwidth that the switchover is told to have, in bytes per second.
    SetSwitchoverBandwidth(Option<u64>),
    /// The guest may be slowed down, or not any more. QMP refuses this while a migration is under way; the core does not mind.
    SetAutoConverge(bool),
    /// `x-resolve`; refused unless the outcome is in doubt. The operator who says it has looked at the target.
    Resolve,
    /// `yank`: every connection of the side is shut down at once.
    Yank(Side),
    /// `quit`.
    Quit(Side),
}

impl Command {
    /// All of them.
    pub const ALL: [Self; 19] = [
        Self::Cancel,
        Self::CancelIncoming,
        Self::Migrate,
        Self::Continue,
        Self::Stop(Side::Source),
        Self::Stop(Side::Target),
        Self::Cont(Side::Source),
        Self::Cont(Side::Target),
        Self::SetDowntimeLimit(0),
        Self::SetDowntimeLimit(u64::MAX),
        Self::SetSwitchoverBandwidth(Some(1)),
        Self::SetSwitchoverBandwidth(None),
        Self::SetAutoConverge(true),
        Self::SetAutoConverge(false),
        Self::Resolve,
        Self::Yank(Side::Source),
        Self::Yank(Side::Target),
        Self::Quit(Side::Source),
        Self::Quit(Side::Target),
    ];

    /// Which process is told.
    pub(super) fn side(self) -> Side {
        match self {
            Self::CancelIncoming => Side::Target,
            Self::Stop(side) | Self::Cont(side) | Self::Yank(side) | Self::Quit(side) => side,
            _ => Side::Source,
        }
    }

    /// Any of them; those that end a run are rarer, or nothing would come after them.
    pub(super) fn random(rng: &mut Rng) -> Self {
        match rng.pick(&Self::ALL) {
            Self::Yank(_) | Self::Quit(_) | Self::CancelIncoming if rng.chance(600) => {
                rng.pick(&[Self::Stop(Side::Source), Self::Cont(Side::Source)])
            }
            command => command,
        }
    }
}

/// A command and when it comes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Order {
    /// The step, counted as that of other faults.
    pub step: u64,
    /// What is said.
    pub command: Command,
}

/// The operator tries again when an attempt has failed or was cancelled.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Again {
    /// How often.
    pub times: u32,
    /// To a new target process that takes the place of the old one, which is ended if it lives.
    pub fresh: bool,
}

impl World {
    /// Does what an operator says. Nobody is there to hear it if the process is gone or stands still.
    pub(super) fn execute(&mut self, command: Command) {
        if !self.is_awake(command.side()) {
            return;
        }
        self.note(|| format!("the operator says {command:?}"));
        match command {
            Command::Cancel => self.operator_cancels(),
            Command::CancelIncoming => {
                let now = self.moment();
                self.target.core.handle_cancel(now);
            }
            Command::Migrate => self.operator_migrates(false),
            Command::Continue => self.operator_continues(),
            Command::Stop(side) => self.operator_stops(side),
            Command::Cont(side) => self.operator_conts(side),
            Command::SetDowntimeLimit(downtime_limit_us) => self.operator_tunes(SourceTuning {
                downtime_limit_us,
                ..self.tuning
            }),
            Command::SetSwitchoverBandwidth(switchover_bytes_per_sec) => {
                self.operator_tunes(SourceTuning {
                    switchover_bytes_per_sec,
                    ..self.tuning
                });
            }
            Command::SetAutoConverge(on) => self.operator_tunes(SourceTuning {
                auto_converge: on.then_some(THROTTLE),
                ..self.tuning
            }),
            Command::Resolve => self.operator_resolves(),
            Command::Yank(side) => self.operator_yanks(side),
            Command::Quit(side) => self.operator_quits(side),
        }
    }

    fn operator_cancels(&mut self) {
        if self.source.ending.is_some() {
            return;
        }
        let (now, status) = (self.moment(), self.source.core.status());
        let answer = self.source.core.handle_cancel(now);
        self.see(match answer {
            Ok(()) => "the migration is cancelled",
            Err(_) => "cancel is refused",
        });
        match answer {
            // An attempt that is failing already ends as failed.
            Ok(()) => self.source.cancelled |= status != MigrationStatus::Failing,
            Err(_) => assert!(
                self.source.commit_sent,
                "refused although nothing is committed"
            ),
        }
    }

    /// The operator lets a migration go on that waits in pre-switchover. At any other time that is refused and changes nothing.
    pub(super) fn operator_continues(&mut self) {
        if self.source.ending.is_some() {
            return;
        }
        let (now, status) = (self.moment(), self.source.core.status());
        let answer = self.source.core.handle_continue(now);
        self.see(match answer {
            Ok(()) => "the operator lets the migration go on",
            Err(_) => "continue is refused",
        });
        assert_eq!(answer.is_ok(), status == MigrationStatus::PreSwitchover);
    }

    /// Parameters change at any time but while an attempt is cleaned up.
    pub(super) fn operator_tunes(&mut self, tuning: SourceTuning) {
        let status = self.source.core.status();
        if matches!(
            status,
            MigrationStatus::Failing | MigrationStatus::Cancelling
        ) {
            self.see("parameters are refused");
            return;
        }
        self.tuning = tuning;
        if self.source.ending.is_none() {
            self.source.core.set_tuning(tuning);
        }
    }

    fn operator_resolves(&mut self) {
        if self.source.core.is_unresolved() {
            self.see("x-resolve before the operator was to look");
            self.operator_decides();
            return;
        }
        let now = self.moment();
        for resolution in [Resolution::Committed, Resolution::NotCommitted] {
            let taken = self.source.core.handle_operator_resolution(now, resolution);
            assert!(!taken, "the operator is asked for nothing");
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
            self.end_target();
            Resolution::NotCommitted
        };
        self.note(|| format!("the operator says {decision:?}"));
        self.source.operator = Some(decision);
        let now = self.moment();
        assert!(self.source.core.handle_operator_resolution(now, decision));
    }

    /// `migrate`, admitted as the engine admits it.
    fn operator_migrates(&mut self, fresh: bool) {
        let over = self
            .source
            .ending
            .is_some_and(|ending| ending != Ending::Completed);
        if !over || self.source.quits || matches!(self.source.guest, Guest::Away) {
            self.see("migrate is refused");
            return;
        }
        if fresh || !self.target.alive {
            self.end_target();
            self.target = self.new_target();
        }
        self.start_attempt();
    }

    /// The attempt is over: the operator who is not content tries once more.
    pub(super) fn try_again_soon(&mut self) {
        let Some(again) = &mut self.faults.again else {
            return;
        };
        if again.times > 0 {
            again.times -= 1;
            let delay = self.rng.pick(&[0, 0, 1_000, 3_000_000]);
            self.source.tries_again = true;
            self.schedule(delay, Event::Again);
        }
    }

    pub(super) fn tries_again(&mut self) {
        self.source.tries_again = false;
        let Some(again) = self.faults.again.filter(|_| self.source.alive) else {
            return;
        };
        self.see("the operator tries again");
        self.operator_migrates(again.fresh);
    }

    fn operator_yanks(&mut self, side: Side) {
        for id in (0..self.links.len() as u64).map(LinkId) {
            let link = self.link(id);
            if link.open[side as usize] && !(side == Side::Source && link.used == Use::Stranger) {
                self.break_link(id, side, Notice::Both);
            }
        }
    }

    /// What is under way is cancelled, and the process ends when that is done; at once if it is asked twice or it is too late.
    fn operator_quits(&mut self, side: Side) {
        let now = self.moment();
        match side {
            Side::Source => {
                let again = std::mem::replace(&mut self.source.quits, true);
                let over = self.source.ending.is_some();
                if again || over || self.source.core.handle_cancel(now).is_err() {
                    self.end_source();
                }
            }
            Side::Target => {
                let again = std::mem::replace(&mut self.target.quits, true);
                self.target.core.handle_cancel(now);
                if again || !self.target.core.is_failing() {
                    self.end_target();
                }
            }
        }
    }

    /// The process ends; its kernel closes what it leaves open.
    pub(super) fn end_source(&mut self) {
        if std::mem::take(&mut self.source.alive) {
            self.close_all(Side::Source, false);
        }
    }

    /// The same at the target.
    pub(super) fn end_target(&mut self) {
        if std::mem::take(&mut self.target.alive) {
            self.close_all(Side::Target, false);
        }
    }
}
