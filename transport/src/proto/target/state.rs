//! Where an attempt stands at the target.

use std::collections::VecDeque;

use super::action::Connection;
use crate::units::{MigrationId, RoundId};
use crate::wire::Section;
use crate::wire::frame::StateEnd;

/// An attempt that was accepted.
#[derive(Debug)]
pub(super) struct Attempt {
    pub(super) id: MigrationId,
    pub(super) control: Connection,
    pub(super) version: u16,
    pub(super) verify: bool,
    pub(super) switchover_ack: bool,
    pub(super) joined: Vec<bool>,
    pub(super) sections: Vec<Section>,
    pub(super) section_bytes: u64,
    pub(super) announced: Option<RoundId>,
    pub(super) last_placed: Option<RoundId>,
    pub(super) end: Option<StateEnd>,
    pub(super) guest_runs: bool,
    /// Connections that asked for the outcome. Those that came while the guest was starting, or before a failure may be told, still wait
    /// for the answer.
    pub(super) askers: VecDeque<Connection>,
    /// The source has said that it knows the outcome.
    pub(super) settled: bool,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Phase {
    Listening,
    AwaitData,
    Preparing,
    Receiving,
    Loading,
    Ready,
    Starting,
    Running,
    /// Told: the notifiers know, so everybody else may.
    Failing {
        linger: bool,
        told: bool,
    },
    Failed,
}

impl Phase {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Listening => "listening",
            Self::AwaitData => "waiting for data connections",
            Self::Preparing => "preparing",
            Self::Receiving => "receiving",
            Self::Loading => "loading",
            Self::Ready => "waiting for COMMIT",
            Self::Starting => "starting the guest",
            Self::Running => "running the guest",
            Self::Failing { .. } => "failing",
            Self::Failed => "failed",
        }
    }

    pub(super) fn before_commit(self) -> bool {
        matches!(
            self,
            Self::AwaitData | Self::Preparing | Self::Receiving | Self::Loading | Self::Ready
        )
    }
}
