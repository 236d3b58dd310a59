//! The protocol as two state machines without I/O: [`Source`] and [`Target`].
//!
//! Neither reads a clock, owns a socket, starts a thread or touches guest memory. A driver tells them what happened through
//! `handle_*`, with the time, and then drains [`poll_action`](Source::poll_action) until it yields `None`. Between calls it waits
//! for events until [`poll_timeout`](Source::poll_timeout) at the latest. The simulation in `tests` and the engine in `service` are
//! such drivers.
//!
//! Actions come in two kinds. Some are done at once and never fail as far as the core is concerned (send a frame, say something).
//! Others start a *job* (connect, sync, stop the guest...) that reports back exactly once, with its own `handle_*` or with
//! [`handle_job_failed`](Source::handle_job_failed). A core that gives up waits for the jobs it has started before it lets the guest
//! run, so that a stop that is still under way cannot overtake the resume.

mod bucket;
mod estimate;
mod source;
mod status;
mod target;
#[cfg(test)]
mod tests;
mod throttle;

pub use bucket::{Bucket, KEPT_US};
pub use estimate::{Decision, Estimate};
pub use source::{
    BlackoutParts, CancelError, ContinueError, FirstRound, Outcome, Reason, RoundSent, SavedState,
    Source, SourceAction, SourceConfig, SourceJob, SourceStats, SourceTuning,
};
pub use status::MigrationStatus;
pub use target::{
    Connection, Loaded, Target, TargetAction, TargetConfig, TargetError, TargetJob, TargetStatus,
};
pub use throttle::{Throttle, ThrottleTuning};
