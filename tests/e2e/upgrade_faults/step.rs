//! When something happens to an upgrade in place, what, and what may become of the guest then.

use vmferry_cpr::manifest::Stage;
use vmferry_cpr::message::{GiverMessage, TakerMessage};
use vmferry_transport::wire::frame::{SourceFrame, TargetFrame};

use super::link::Deed;

/// Where a frame goes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Way {
    ToNew,
    ToOld,
}

/// A word of the two processes, in the order in which they are said.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Step {
    Offer,
    Accepted,
    RamFds,
    RamEnd,
    Prepared,
    Hello,
    Answer,
    OtherFds,
    OtherEnd,
    Taken,
    State,
    StateEnd,
    Ready,
    Commit,
    Running,
    Finish,
}

impl Step {
    pub(super) const ALL: [Self; 16] = [
        Self::Offer,
        Self::Accepted,
        Self::RamFds,
        Self::RamEnd,
        Self::Prepared,
        Self::Hello,
        Self::Answer,
        Self::OtherFds,
        Self::OtherEnd,
        Self::Taken,
        Self::State,
        Self::StateEnd,
        Self::Ready,
        Self::Commit,
        Self::Running,
        Self::Finish,
    ];

    /// For people.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Offer => "offer of descriptors",
            Self::Accepted => "offer accepted",
            Self::RamFds => "descriptors of RAM",
            Self::RamEnd => "end of descriptors of RAM",
            Self::Prepared => "new process is prepared",
            Self::Hello => "hello",
            Self::Answer => "answer to it",
            Self::OtherFds => "other descriptors (guest stopped)",
            Self::OtherEnd => "end of the others",
            Self::Taken => "descriptors taken",
            Self::State => "device state",
            Self::StateEnd => "end of device state",
            Self::Ready => "READY",
            Self::Commit => "COMMIT",
            Self::Running => "RUNNING",
            Self::Finish => "FINISH",
        }
    }

    pub(super) fn way(self) -> Way {
        match self {
            Self::Offer
            | Self::RamFds
            | Self::RamEnd
            | Self::Hello
            | Self::OtherFds
            | Self::OtherEnd
            | Self::State
            | Self::StateEnd
            | Self::Commit
            | Self::Finish => Way::ToNew,
            Self::Accepted
            | Self::Prepared
            | Self::Answer
            | Self::Taken
            | Self::Ready
            | Self::Running => Way::ToOld,
        }
    }

    fn has_fds(self) -> bool {
        matches!(self, Self::RamFds | Self::OtherFds)
    }

    pub(super) fn is_given(self, message: &GiverMessage) -> bool {
        match self {
            Self::Offer => matches!(message, GiverMessage::Offer(_)),
            Self::RamFds => matches!(message, GiverMessage::Fds { first: 0, .. }),
            Self::RamEnd => matches!(message, GiverMessage::Stage(Stage::Prepare)),
            Self::OtherFds => matches!(message, GiverMessage::Fds { first: 1.., .. }),
            Self::OtherEnd => matches!(message, GiverMessage::Stage(Stage::HandOver)),
            _ => false,
        }
    }

    pub(super) fn is_taken(self, message: &TakerMessage) -> bool {
        match self {
            Self::Accepted => matches!(message, TakerMessage::Accept { .. }),
            Self::Prepared => matches!(message, TakerMessage::Taken(Stage::Prepare)),
            Self::Taken => matches!(message, TakerMessage::Taken(Stage::HandOver)),
            _ => false,
        }
    }

    pub(super) fn is_sent(self, frame: &SourceFrame) -> bool {
        match self {
            Self::Hello => matches!(frame, SourceFrame::Hello(_)),
            Self::State => matches!(frame, SourceFrame::Section(_)),
            Self::StateEnd => matches!(frame, SourceFrame::StateEnd(_)),
            Self::Commit => matches!(frame, SourceFrame::Commit),
            Self::Finish => matches!(frame, SourceFrame::Finish),
            _ => false,
        }
    }

    pub(super) fn is_answered(self, frame: &TargetFrame) -> bool {
        match self {
            Self::Answer => matches!(frame, TargetFrame::HelloReply(_)),
            Self::Ready => matches!(frame, TargetFrame::Ready(_)),
            Self::Running => matches!(frame, TargetFrame::Running { .. }),
            _ => false,
        }
    }
}

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
    Stays,
    StaysAsked,
    Moves,
    MovesAsked,
    Lost,
    Ends,
}

impl Outcome {
    pub(super) const ALL: [Self; 6] = [
        Self::Stays,
        Self::StaysAsked,
        Self::Moves,
        Self::MovesAsked,
        Self::Lost,
        Self::Ends,
    ];

    /// For people.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Stays => "stays",
            Self::StaysAsked => "stays, asked",
            Self::Moves => "moves",
            Self::MovesAsked => "moves, asked",
            Self::Lost => "lost",
            Self::Ends => "ends with its process",
        }
    }

    /// In a sentence.
    pub(super) fn meaning(self) -> &'static str {
        match self {
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
