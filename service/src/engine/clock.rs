//! The one place of the engine that reads time.

use std::time::{Duration, Instant};

use vmferry_transport::units::Moment;

/// Monotonic time since the engine started, as the cores count it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Clock {
    start: Instant,
}

impl Clock {
    pub(super) fn new() -> Self {
        Self {
            start: Instant::now(),
        }
    }

    pub(super) fn now(self) -> Moment {
        Moment(micros(self.start.elapsed()))
    }

    /// When `moment` will be, for a timer.
    pub(super) fn instant(self, moment: Moment) -> Instant {
        self.start + Duration::from_micros(moment.0)
    }
}

/// Whole microseconds of a duration.
pub(super) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
