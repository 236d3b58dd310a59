//! The words of an upgrade in place, at each of which something can happen to it.

use vmferry_cpr::manifest::Stage;
use vmferry_cpr::message::{GiverMessage, TakerMessage};
use vmferry_transport::wire::frame::{SourceFrame, TargetFrame};

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

    pub(super) fn has_fds(self) -> bool {
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
