//! Auto-converge: how much of their time the vCPUs are kept from running, so that a guest that writes faster than the link carries still
//! gets away. Pure arithmetic.
//!
//! The rule is QEMU's, so that operators find the parameters do what they know: over a period of at least a second, the bytes that the
//! guest dirtied are compared with those that were sent. The second period in a row in which they exceed the trigger's share raises the
//! throttle, first to its initial value, then by increments up to its maximum.

use crate::units::Moment;

/// Shortest period that is judged, in microseconds: shorter ones are decided by where the guest happens to stand.
const PERIOD_US: u64 = 1_000_000;
/// Periods in a row over the trigger until the throttle is raised.
const STRIKES: u32 = 2;

/// What the operator allows. All in percent.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ThrottleTuning {
    /// Share of the bytes sent that the guest may dirty meanwhile, 1 to 100.
    pub trigger_percent: u8,
    /// First throttle, 1 to 99.
    pub initial_percent: u8,
    /// What is added each time, 1 to 99.
    pub increment_percent: u8,
    /// Most that the guest is slowed down, up to 99.
    pub max_percent: u8,
    /// Add no more than what would just be enough, so that the last steps are small.
    pub tailslow: bool,
}

/// The throttle of one attempt.
#[derive(Clone, Debug, Default)]
pub struct Throttle {
    percent: u8,
    since: Moment,
    dirtied_bytes: u64,
    sent_bytes: u64,
    strikes: u32,
}

impl Throttle {
    /// Judges from `now` on.
    pub fn new(now: Moment) -> Self {
        Self {
            since: now,
            ..Self::default()
        }
    }

    /// Share of time for which the vCPUs do not run, in percent.
    pub fn percent(&self) -> u8 {
        self.percent
    }

    /// A round ended that sent `sent_bytes`, during which the guest dirtied `dirtied_bytes`. Returns the new throttle if it changes.
    pub fn note(
        &mut self,
        now: Moment,
        dirtied_bytes: u64,
        sent_bytes: u64,
        tuning: ThrottleTuning,
    ) -> Option<u8> {
        self.dirtied_bytes = self.dirtied_bytes.saturating_add(dirtied_bytes);
        self.sent_bytes = self.sent_bytes.saturating_add(sent_bytes);
        if now.micros_since(self.since) < PERIOD_US {
            return None;
        }
        let dirtied = u128::from(self.dirtied_bytes) * 100;
        let allowed = u128::from(self.sent_bytes) * u128::from(tuning.trigger_percent);
        (self.since, self.dirtied_bytes, self.sent_bytes) = (now, 0, 0);
        if dirtied <= allowed {
            self.strikes = 0;
            return None;
        }
        self.strikes += 1;
        if self.strikes < STRIKES {
            return None;
        }
        self.strikes = 0;
        let raised = self.raised(dirtied, allowed, tuning);
        (raised != self.percent).then(|| {
            self.percent = raised;
            raised
        })
    }

    fn raised(&self, dirtied: u128, allowed: u128, tuning: ThrottleTuning) -> u8 {
        if self.percent == 0 {
            return tuning.initial_percent.min(tuning.max_percent);
        }
        let mut step = tuning.increment_percent;
        if tuning.tailslow {
            // With this share of its time, the guest would dirty just what is allowed.
            let runs = u128::from(100 - self.percent.min(99));
            let enough = runs - (runs * allowed / dirtied.max(1)).min(runs);
            step = step.min(u8::try_from(enough.max(1)).unwrap_or(u8::MAX));
        }
        let raised = self.percent.saturating_add(step).min(tuning.max_percent);
        // A maximum that was lowered meanwhile counts for what comes.
        raised.max(self.percent.min(tuning.max_percent))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TUNING: ThrottleTuning = ThrottleTuning {
        trigger_percent: 50,
        initial_percent: 20,
        increment_percent: 10,
        max_percent: 99,
        tailslow: false,
    };

    fn second(count: u64) -> Moment {
        Moment::default().plus_micros(count * PERIOD_US)
    }

    fn run(tuning: ThrottleTuning, dirtied: u64, seconds: u64) -> Vec<u8> {
        let mut throttle = Throttle::new(second(0));
        (1..=seconds)
            .filter_map(|now| throttle.note(second(now), dirtied, 1000, tuning))
            .collect()
    }

    #[test]
    fn a_guest_that_converges_is_left_alone() {
        assert_eq!(run(TUNING, 500, 100), []);
    }

    #[test]
    fn every_second_period_over_the_trigger_slows_the_guest_down() {
        assert_eq!(run(TUNING, 501, 8), [20, 30, 40, 50]);
    }

    #[test]
    fn the_maximum_is_kept() {
        let tuning = ThrottleTuning {
            max_percent: 45,
            ..TUNING
        };
        assert_eq!(run(tuning, 5000, 100), [20, 30, 40, 45]);
    }

    #[test]
    fn short_rounds_are_judged_together() {
        let mut throttle = Throttle::new(second(0));
        let changes: Vec<_> = (1..=40)
            .filter_map(|tenth| {
                let now = Moment::default().plus_micros(tenth * PERIOD_US / 10);
                throttle.note(now, 100, 100, TUNING)
            })
            .collect();
        assert_eq!(changes, [20, 30]);
    }

    #[test]
    fn a_good_period_takes_the_first_strike_back() {
        let mut throttle = Throttle::new(second(0));
        let dirtied = [600, 100, 600, 100, 600];
        for (now, dirtied) in (1..).zip(dirtied) {
            assert_eq!(throttle.note(second(now), dirtied, 1000, TUNING), None);
        }
    }

    #[test]
    fn the_tail_is_slowed_down_in_small_steps() {
        let tuning = ThrottleTuning {
            tailslow: true,
            increment_percent: 30,
            ..TUNING
        };
        // Dirties 4 % more than allowed: hardly any more throttle is needed.
        assert_eq!(run(tuning, 520, 6), [20, 24, 27]);
    }

    #[test]
    fn nothing_overflows() {
        let mut throttle = Throttle::new(second(0));
        for now in 1..20 {
            throttle.note(second(now), u64::MAX, 0, TUNING);
            throttle.note(second(now), u64::MAX, u64::MAX, TUNING);
        }
    }
}
