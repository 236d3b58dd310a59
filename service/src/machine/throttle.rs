//! How vCPUs are slowed down: they run for a slice of time, then rest for as long as the throttle wants.
//!
//! The slice is short enough that a guest stays responsive under a mild throttle, and long enough that leaving and entering the guest
//! costs little of it.

use std::time::Duration;

/// How long a vCPU runs between two rests.
pub(super) const SLICE: Duration = Duration::from_millis(10);
/// Most of its time that may be taken from a vCPU, in percent.
pub(super) const THROTTLE_PERCENT_MAX: u8 = 99;

/// How long a vCPU rests after each [`SLICE`] so that it runs for all but `percent` of the time; zero for 0.
pub(super) fn rest(percent: u8) -> Duration {
    let percent = u32::from(percent.min(THROTTLE_PERCENT_MAX));
    SLICE * percent / (100 - percent)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rest_is_the_share_that_was_asked_for() {
        for percent in 0..=THROTTLE_PERCENT_MAX {
            let rest = rest(percent).as_secs_f64();
            let share = rest / (rest + SLICE.as_secs_f64()) * 100.0;
            assert!(
                (share - f64::from(percent)).abs() < 0.001,
                "{percent}: {share}"
            );
        }
        assert_eq!(rest(u8::MAX), rest(THROTTLE_PERCENT_MAX));
    }
}
