//! What can happen to an upgrade in place, and what may become of the guest then.

use crate::grid::Fate;

use super::link::Deed;
use super::step::{Step, Way};

/// What happens, while the word of the step is on its way.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Fault {
    KillOld,
    KillNew,
    Frame(Deed),
}

impl Fault {
    pub(super) const ALL: [Self; 10] = [
        Self::KillOld,
        Self::KillNew,
        Self::Frame(Deed::Cut),
        Self::Frame(Deed::Halve),
        Self::Frame(Deed::Change),
        Self::Frame(Deed::Keep),
        Self::Frame(Deed::WithoutFds),
        Self::Frame(Deed::OneFdLess),
        Self::Frame(Deed::SwapFds),
        Self::Frame(Deed::ForeignFd),
    ];

    /// For people.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::KillOld => "kill old",
            Self::KillNew => "kill new",
            Self::Frame(Deed::Pass) => "nothing",
            Self::Frame(Deed::Cut) => "cut",
            Self::Frame(Deed::Halve) => "cut in the middle",
            Self::Frame(Deed::Change) => "changed",
            Self::Frame(Deed::Keep) => "stall",
            Self::Frame(Deed::WithoutFds) => "no descriptors",
            Self::Frame(Deed::OneFdLess) => "one missing",
            Self::Frame(Deed::SwapFds) => "two swapped",
            Self::Frame(Deed::ForeignFd) => "one foreign",
        }
    }

    /// Whether it can happen at this step.
    pub(super) fn fits(self, step: Step) -> bool {
        match self {
            Self::Frame(Deed::WithoutFds | Deed::OneFdLess | Deed::SwapFds | Deed::ForeignFd) => {
                step.has_fds()
            }
            _ => true,
        }
    }

    /// Whether a process is left that learns only by the time that passes what became of the other.
    pub(super) fn waits_for_a_deadline(self, step: Step) -> bool {
        match self {
            Self::Frame(Deed::Keep) => true,
            Self::KillOld => matches!(step, Step::Ready | Step::Commit),
            Self::KillNew => matches!(step, Step::Commit | Step::Running),
            Self::Frame(_) => false,
        }
    }

    /// What is done with the frame. What a process has said dies with it.
    pub(super) fn deed(self, step: Step) -> Deed {
        match (self, step.way()) {
            (Self::KillOld, Way::ToNew) | (Self::KillNew, Way::ToOld) => Deed::Cut,
            (Self::KillOld | Self::KillNew, _) => Deed::Pass,
            (Self::Frame(deed), _) => deed,
        }
    }

    /// What may become of the guest. Everything else is a fault of the program.
    pub(super) fn allowed(self, step: Step) -> Outcome {
        use Outcome::{Ends, Lost, Moves, MovesAsked, Stays, StaysAsked};
        match (step, self) {
            (Step::Running | Step::Finish, Self::KillOld) => Moves,
            (_, Self::KillOld) => Ends,
            (Step::Commit | Step::Running, Self::KillNew) => Lost,
            (Step::Finish, Self::KillNew) => Ends,
            (Step::Finish, _) => Moves,
            // The new process says so itself.
            (Step::Commit, Self::Frame(Deed::Change)) => Stays,
            (Step::Commit, _) => StaysAsked,
            (Step::Running, _) => MovesAsked,
            _ => Stays,
        }
    }
}

/// What became of the guest.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Outcome {
    RunsOn,
    Stays,
    StaysAsked,
    Moves,
    MovesAsked,
    Lost,
    Ends,
}

impl Fate for Outcome {
    const ALL: &'static [Self] = &[
        Self::RunsOn,
        Self::Stays,
        Self::StaysAsked,
        Self::Moves,
        Self::MovesAsked,
        Self::Lost,
        Self::Ends,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::RunsOn => "runs on",
            Self::Stays => "stays",
            Self::StaysAsked => "stays, asked",
            Self::Moves => "moves",
            Self::MovesAsked => "moves, asked",
            Self::Lost => "lost",
            Self::Ends => "ends with its process",
        }
    }

    fn meaning(self) -> &'static str {
        match self {
            Self::RunsOn => "the upgrade fails before the guest is stopped, and the next one works",
            Self::Stays => {
                "the upgrade fails, the new process ends, and the guest goes on in the old one, from which the next upgrade works"
            }
            Self::StaysAsked => {
                "the same, after the old process has stayed stopped, asked the new one, and been told that it does not own the guest"
            }
            Self::Moves => {
                "the guest goes on in the new process, from which the next upgrade works"
            }
            Self::MovesAsked => "the same, and the old process has asked",
            Self::Lost => {
                "the new process was killed after it was told to run the guest: nobody can know what it did to the memory, so the old one stays stopped, says so, and cannot be talked into resuming"
            }
            Self::Ends => "the process that the guest belonged to was killed, and no other runs it",
        }
    }
}
