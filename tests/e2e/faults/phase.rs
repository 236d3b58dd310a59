//! When something happens to a migration: the phases, each recognised by the frame that passes first in it, and held there.

use vmferry_transport::wire::frame::{SourceFrame, TargetFrame};

use crate::proxy::{Line, Passing, Way};

/// What a migration is at.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Phase {
    Connecting,
    Hello,
    Answer,
    Setup,
    WaitUnplug,
    FirstRound,
    LaterRound,
    PreSwitchover,
    LastRound,
    DeviceState,
    StateEnd,
    Ready,
    Commit,
    Running,
    Finish,
}

impl Phase {
    pub(super) const ALL: [Self; 15] = [
        Self::Connecting,
        Self::Hello,
        Self::Answer,
        Self::Setup,
        Self::WaitUnplug,
        Self::FirstRound,
        Self::LaterRound,
        Self::PreSwitchover,
        Self::LastRound,
        Self::DeviceState,
        Self::StateEnd,
        Self::Ready,
        Self::Commit,
        Self::Running,
        Self::Finish,
    ];

    /// For people.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Connecting => "connecting",
            Self::Hello => "hello: on its way",
            Self::Answer => "hello: answer on its way",
            Self::Setup => "setup: last data connection opens",
            Self::WaitUnplug => "wait-unplug",
            Self::FirstRound => "active: first round",
            Self::LaterRound => "active: later round",
            Self::PreSwitchover => "pre-switchover",
            Self::LastRound => "device: last round ends",
            Self::DeviceState => "device: state on its way",
            Self::StateEnd => "device: end of state on its way",
            Self::Ready => "before READY arrives",
            Self::Commit => "between READY and COMMIT",
            Self::Running => "between COMMIT and RUNNING",
            Self::Finish => "after RUNNING",
        }
    }

    /// Whether `passing` is what the phase begins with. Never for phases that a status shows, or that come before any frame.
    pub(super) fn begins_with(self, passing: &Passing<'_>) -> bool {
        match self {
            Self::Connecting | Self::WaitUnplug | Self::PreSwitchover => false,
            Self::Hello => matches!(passing, Passing::Source(SourceFrame::Hello(_))),
            Self::Answer => matches!(passing, Passing::Target(TargetFrame::HelloReply(_))),
            Self::Setup => {
                matches!(passing, Passing::Source(SourceFrame::DataHello(hello)) if hello.index == 1)
            }
            Self::FirstRound => {
                matches!(passing, Passing::Data(frame) if frame.has_pages() && frame.round() == 0)
            }
            Self::LaterRound => {
                matches!(passing, Passing::Data(frame) if frame.has_pages() && frame.round() > 0)
            }
            // The first of the connections: the other cannot have ended its round before.
            Self::LastRound => {
                matches!(passing, Passing::Data(frame) if frame.ends_last_round())
            }
            Self::DeviceState => matches!(passing, Passing::Source(SourceFrame::Section(_))),
            Self::StateEnd => matches!(passing, Passing::Source(SourceFrame::StateEnd(_))),
            Self::Ready => matches!(passing, Passing::Target(TargetFrame::Ready(_))),
            Self::Commit => matches!(passing, Passing::Source(SourceFrame::Commit)),
            Self::Running => matches!(passing, Passing::Target(TargetFrame::Running { .. })),
            Self::Finish => matches!(passing, Passing::Source(SourceFrame::Finish)),
        }
    }

    /// The status that shows the phase, where no frame does.
    pub(super) fn status(self) -> Option<&'static str> {
        match self {
            Self::WaitUnplug => Some("wait-unplug"),
            Self::PreSwitchover => Some("pre-switchover"),
            _ => None,
        }
    }

    /// Where the frame that it begins with is on its way.
    pub(super) fn held(self) -> Option<(Line, Way)> {
        match self {
            Self::Hello | Self::DeviceState | Self::StateEnd | Self::Commit | Self::Finish => {
                Some((Line::Control, Way::ToTarget))
            }
            Self::Answer | Self::Ready | Self::Running => Some((Line::Control, Way::ToSource)),
            Self::Setup => Some((Line::Data(1), Way::ToTarget)),
            // On one data connection or the other.
            Self::FirstRound | Self::LaterRound | Self::LastRound => None,
            Self::Connecting | Self::WaitUnplug | Self::PreSwitchover => None,
        }
    }

    /// Whether data connections exist.
    pub(super) fn has_data(self) -> bool {
        !matches!(self, Self::Connecting | Self::Hello | Self::Answer)
    }

    /// Whether pages are still to pass, so that a fault of a data connection must be noticed.
    pub(super) fn needs_data(self) -> bool {
        matches!(
            self,
            Self::Setup
                | Self::WaitUnplug
                | Self::FirstRound
                | Self::LaterRound
                | Self::PreSwitchover
                | Self::LastRound
        )
    }

    /// Whether pages may be still to pass: they and the device state leave side by side.
    pub(super) fn may_need_data(self) -> bool {
        self.needs_data() || matches!(self, Self::DeviceState | Self::StateEnd)
    }

    /// Whether the guest is stopped at the source.
    pub(super) fn guest_is_stopped(self) -> bool {
        matches!(
            self,
            Self::PreSwitchover
                | Self::LastRound
                | Self::DeviceState
                | Self::StateEnd
                | Self::Ready
                | Self::Commit
                | Self::Running
                | Self::Finish
        )
    }
}
