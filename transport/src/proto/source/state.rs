//! Where an attempt stands, and which jobs are under way.

use std::fmt;

use super::action::{FirstRound, Reason, SourceJob};
use crate::units::Moment;

/// How far the notifiers are with SETUP.
#[derive(Debug)]
pub(super) enum Setup {
    /// They are being told.
    Telling,
    /// The guest has not let go of this device yet.
    Waiting { device: String, since: Moment },
    /// Nothing is waited for any more.
    Done,
}

#[derive(Debug)]
pub(super) enum State<P> {
    Idle,
    /// In place only: the target builds its machine around our RAM.
    Offering,
    Connecting,
    AwaitReply,
    Preparing {
        data_ready: bool,
        setup: Setup,
        first: Option<FirstRound>,
    },
    Sending {
        sent: bool,
        placed: bool,
    },
    Syncing,
    Resting,
    Stopping,
    /// The guest is stopped, and the operator has the say.
    PreSwitchover {
        stopped: P,
    },
    /// In place only: the notifiers are told, and devices let go of what they own.
    Releasing {
        stopped: P,
    },
    LastSync {
        stopped: P,
    },
    LastRound {
        stopped: P,
        sent: bool,
        saved: bool,
    },
    AwaitReady {
        stopped: P,
    },
    AwaitRunning {
        stopped: P,
    },
    Resolving {
        stopped: P,
        since: Moment,
        /// Attempts to ask so far.
        tries: u64,
        told: bool,
        asked: bool,
    },
    Finishing {
        stopped: P,
    },
    Failing {
        stopped: Option<P>,
        reason: Reason,
    },
    Ended,
}

impl<P> State<P> {
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Offering => "offering descriptors",
            Self::Connecting => "connecting",
            Self::AwaitReply => "waiting for the answer to the hello",
            Self::Preparing { .. } => "preparing",
            Self::Sending { .. } => "sending a round",
            Self::Syncing => "fetching the dirty log",
            Self::Resting => "waiting for something to send",
            Self::Stopping => "stopping the guest",
            Self::PreSwitchover { .. } => "waiting for the operator to go on",
            Self::Releasing { .. } => "telling the notifiers",
            Self::LastSync { .. } => "fetching the dirty log for the last time",
            Self::LastRound { .. } => "sending the last round",
            Self::AwaitReady { .. } => "waiting for READY",
            Self::AwaitRunning { .. } => "waiting for RUNNING",
            Self::Resolving { .. } => "asking for the outcome",
            Self::Finishing { .. } => "finishing",
            Self::Failing { .. } => "failing",
            Self::Ended => "ended",
        }
    }

    /// COMMIT was sent and the outcome is not known.
    pub(super) fn in_doubt(&self) -> bool {
        matches!(self, Self::AwaitRunning { .. } | Self::Resolving { .. })
    }

    pub(super) fn is_over(&self) -> bool {
        matches!(
            self,
            Self::Idle | Self::Finishing { .. } | Self::Failing { .. } | Self::Ended
        )
    }
}

/// Jobs that were started and have not reported back.
#[derive(Clone, Copy, Default)]
pub(super) struct Jobs(u16);

impl Jobs {
    pub(super) fn start(&mut self, job: SourceJob) {
        assert!(!self.has(job), "job {job:?} started twice");
        self.0 |= 1 << job as u16;
    }

    /// Whether the job was under way. A report of a job that is not is late news of closed links and is dropped.
    pub(super) fn end(&mut self, job: SourceJob) -> bool {
        let was = self.has(job);
        self.0 &= !(1 << job as u16);
        was
    }

    pub(super) fn has(self, job: SourceJob) -> bool {
        self.0 & 1 << job as u16 != 0
    }

    pub(super) fn none(self) -> bool {
        self.0 == 0
    }
}

impl fmt::Debug for Jobs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}
