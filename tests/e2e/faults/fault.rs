//! What happens to a migration, and what may become of its guest then.

use crate::proxy::{Line, Way};

use crate::grid::Fate;

use super::cell::Seen;
use super::phase::Phase;

/// What happens.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Fault {
    KillSource,
    KillTarget,
    Cut(Line),
    /// Everything is cut and nobody comes through until somebody repairs it.
    LinkDown,
    /// No byte passes, and the connection stays open.
    Stall(Line, Option<Way>),
    /// Bytes are changed, or there are some too many.
    Corrupt(Line, Way),
}

impl Fault {
    pub(super) const ALL: [Self; 16] = [
        Self::KillSource,
        Self::KillTarget,
        Self::Cut(Line::Control),
        Self::Cut(Line::Data(0)),
        Self::Cut(Line::Data(1)),
        Self::Cut(Line::All),
        Self::LinkDown,
        Self::Stall(Line::Control, Some(Way::ToTarget)),
        Self::Stall(Line::Control, Some(Way::ToSource)),
        Self::Stall(Line::Data(0), None),
        Self::Stall(Line::Data(1), None),
        Self::Stall(Line::All, None),
        Self::Corrupt(Line::Control, Way::ToTarget),
        Self::Corrupt(Line::Control, Way::ToSource),
        Self::Corrupt(Line::Data(0), Way::ToTarget),
        Self::Corrupt(Line::Data(1), Way::ToTarget),
    ];

    /// For people.
    pub(super) fn name(self) -> String {
        let line = |line| match line {
            Line::Control => "control".to_owned(),
            Line::Data(index) => format!("data {index}"),
            Line::All => "all".to_owned(),
        };
        let way = |way| match way {
            Way::ToTarget => " to target",
            Way::ToSource => " to source",
        };
        match self {
            Self::KillSource => "kill source".to_owned(),
            Self::KillTarget => "kill target".to_owned(),
            Self::Cut(what) => format!("cut {}", line(what)),
            Self::LinkDown => "link down".to_owned(),
            Self::Stall(what, None) => format!("stall {}", line(what)),
            Self::Stall(what, Some(to)) => format!("stall {}{}", line(what), way(to)),
            Self::Corrupt(what, to) => format!("corrupt {}{}", line(what), way(to)),
        }
    }

    /// Whether it concerns data connections and nothing else.
    pub(super) fn only_data(self) -> bool {
        matches!(
            self,
            Self::Cut(Line::Data(_))
                | Self::Stall(Line::Data(_), _)
                | Self::Corrupt(Line::Data(_), _)
        )
    }

    /// Whether it can happen in this phase.
    pub(super) fn fits(self, phase: Phase) -> bool {
        match phase {
            // Nothing of the link is there yet but the wish for it.
            Phase::Connecting => matches!(
                self,
                Self::KillSource
                    | Self::KillTarget
                    | Self::Cut(Line::Control)
                    | Self::Stall(Line::All, None)
                    | Self::Corrupt(Line::Control, Way::ToSource)
            ),
            _ => phase.has_data() || !self.only_data(),
        }
    }

    /// Whether what becomes of the guest is decided only when a deadline has passed.
    pub(super) fn waits_for_a_deadline(self, phase: Phase) -> bool {
        match (phase, self) {
            (Phase::Finish, _) | (Phase::Running, Self::Stall(_, Some(Way::ToTarget))) => false,
            (Phase::Commit | Phase::Running, _) if self.only_data() => false,
            (Phase::Commit | Phase::Running, Self::KillTarget | Self::LinkDown) => true,
            // The target waits for as many connections as it was told of.
            (Phase::Setup, _) if self.only_data() => true,
            (_, Self::Stall(..)) => true,
            _ => false,
        }
    }

    /// Whether this may have become of the guest.
    pub(super) fn allows(self, phase: Phase, outcome: Outcome) -> bool {
        let allowed = self.allowed(phase);
        // On a busy host a source whose deadlines are short asks for what is on its way.
        let hasty = self.waits_for_a_deadline(phase) && outcome == Outcome::MovesAsked;
        allowed.contains(&outcome) || (hasty && allowed.contains(&Outcome::Moves))
    }

    /// Whether the source says as much of the fault as can be known there.
    pub(super) fn explains(self, phase: Phase, seen: &Seen) -> bool {
        let says = |part| seen.error.contains(part);
        match (seen.outcome, self) {
            (Outcome::Moves | Outcome::MovesAsked | Outcome::MovesLater | Outcome::Ends, _) => {
                seen.error.is_empty()
            }
            (Outcome::Decided, _) => says("the operator decided"),
            (Outcome::StaysAsked | Outcome::StaysLater, _) => says("lost at the commit"),
            (Outcome::Stays, Self::Corrupt(Line::Control, Way::ToTarget)) => {
                says("the target refused: ") && !says("closed the connection")
            }
            (Outcome::Stays, Self::Corrupt(_, Way::ToSource)) => {
                says("the target broke the protocol")
            }
            // The connection may be about to say which one it is.
            (Outcome::Stays, Self::Corrupt(Line::Data(_), _))
                if matches!(phase, Phase::Setup | Phase::WaitUnplug) =>
            {
                says("data connection")
            }
            (Outcome::Stays, Self::Corrupt(Line::Data(_), _)) => {
                says("the target refused: the source broke the protocol: data connection")
            }
            (Outcome::Stays, Self::Stall(..)) => says("within") || says("no sign of life"),
            (Outcome::Stays, _) => !seen.error.is_empty(),
        }
    }

    /// What may become of the guest; the first is what the design says, another one is possible where pages and state leave side by
    /// side. Everything else is a fault of the program.
    pub(super) fn allowed(self, phase: Phase) -> &'static [Outcome] {
        use Outcome::*;
        match (phase, self) {
            (Phase::Running | Phase::Finish, Self::KillSource) => &[Moves],
            (_, Self::KillSource) => &[Ends],
            (Phase::Commit | Phase::Running, Self::KillTarget) => &[Decided],
            (Phase::Finish, Self::KillTarget) => &[Ends],
            (Phase::Finish, _) => &[Moves],
            (Phase::Commit | Phase::Running, _) if self.only_data() => &[Moves],

            // COMMIT does not arrive.
            (Phase::Commit, Self::LinkDown) => &[StaysLater],
            (Phase::Commit, Self::Stall(Line::All, _)) => &[StaysLater],
            (Phase::Commit, Self::Stall(_, Some(Way::ToSource))) => &[MovesAsked],
            (Phase::Commit, Self::Corrupt(_, Way::ToSource)) => &[MovesAsked],
            // The target says so itself.
            (Phase::Commit, Self::Corrupt(..)) => &[Stays],
            (Phase::Commit, _) => &[StaysAsked],

            // RUNNING does not arrive.
            (Phase::Running, Self::LinkDown | Self::Stall(Line::All, _)) => &[MovesLater],
            (Phase::Running, Self::Stall(_, Some(Way::ToTarget))) => &[Moves],
            (Phase::Running, Self::Corrupt(_, Way::ToTarget)) => &[Moves],
            (Phase::Running, _) => &[MovesAsked],

            // READY arrives, COMMIT does not. In the last round all of the state may have passed already.
            (Phase::Ready, Self::Stall(_, Some(Way::ToTarget))) => &[StaysAsked],
            (Phase::LastRound, Self::Stall(_, Some(Way::ToTarget))) => &[Stays, StaysAsked],
            // COMMIT and the target's reason to give up cross.
            (Phase::Ready, Self::Corrupt(Line::Control, Way::ToTarget)) => &[Stays, StaysAsked],

            (_, _) if !self.only_data() || phase.needs_data() => &[Stays],
            (_, _) if phase.may_need_data() => &[Stays, Moves],
            (_, _) => &[Moves],
        }
    }
}

/// What became of the guest.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Outcome {
    /// It goes on at the source.
    Stays,
    /// The source has asked and been told that it goes on there.
    StaysAsked,
    /// The same, when the link was repaired; until then the source was stopped and said so.
    StaysLater,
    /// The source was stopped and said so; the operator, who knew that the target was dead, let it go on at the source.
    Decided,
    /// It goes on at the target.
    Moves,
    /// It goes on at the target; the source has asked.
    MovesAsked,
    /// The same, when the link was repaired.
    MovesLater,
    /// It has ended with the process that it belonged to.
    Ends,
}

impl Fate for Outcome {
    const ALL: &'static [Self] = &[
        Self::Stays,
        Self::StaysAsked,
        Self::StaysLater,
        Self::Decided,
        Self::Moves,
        Self::MovesAsked,
        Self::MovesLater,
        Self::Ends,
    ];

    fn meaning(self) -> &'static str {
        match self {
            Self::Stays => "the migration fails and the guest goes on at the source",
            Self::StaysAsked => {
                "the link is lost at the commit; the source stays stopped, asks the target, and goes on as the target does not own the guest"
            }
            Self::StaysLater => {
                "the same, but the target cannot be asked: the source stays stopped and says so until the link is repaired"
            }
            Self::Decided => {
                "nobody is left to ask: the source stays stopped and says so until an operator, who knows that the target is dead, decides"
            }
            Self::Moves => "the guest goes on at the target",
            Self::MovesAsked => {
                "the link is lost at the commit; the source stays stopped, asks, and learns that the guest runs at the target"
            }
            Self::MovesLater => "the same, when the link is repaired",
            Self::Ends => "the process that the guest belonged to was killed, and no other runs it",
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Stays => "stays",
            Self::StaysAsked => "stays, asked",
            Self::StaysLater => "stays, asked later",
            Self::Decided => "operator decides",
            Self::Moves => "moves",
            Self::MovesAsked => "moves, asked",
            Self::MovesLater => "moves, asked later",
            Self::Ends => "ends with its process",
        }
    }
}
