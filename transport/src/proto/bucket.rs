//! How long senders must wait so that a bandwidth limit holds.
//!
//! Whoever sends pays afterwards: a message may go when nobody owes anything, and puts everybody in debt for as long as its bytes take
//! at the limit. So the limit holds on average whatever the size of a message. Time that nobody used is kept for a moment only.
//!
//! In any stretch of time `t` at most `rate * (t + KEPT_US)` bytes leave, and one message more.

use crate::units::Moment;

/// How much unused time is kept for later, in microseconds: enough to make up for late wake-ups of senders on a busy host, and little
/// against the second over which a limit has to hold.
pub const KEPT_US: u64 = 25_000;

const MICROS: i128 = 1_000_000;

/// The account of all senders under one limit.
#[derive(Clone, Debug)]
pub struct Bucket {
    /// Bytes per second; 0 is no limit.
    rate: u64,
    /// What is owed, in millionths of a byte, at [`settled`](Self::settled): a microsecond pays `rate` of them. Below 0 it is unused time.
    debt: i128,
    settled: Moment,
}

impl Bucket {
    /// An account under a limit in bytes per second; 0 is none.
    pub fn new(rate: u64) -> Self {
        Self {
            rate,
            debt: 0,
            settled: Moment(0),
        }
    }

    /// Changes the limit. Nobody waits longer for what was sent before than they would have, and a limit that stays the same changes
    /// nothing.
    pub fn set_rate(&mut self, now: Moment, rate: u64) {
        self.settle(now);
        if rate == 0 || self.rate == 0 {
            self.debt = 0;
        } else {
            let scaled = self.debt.checked_mul(rate.into());
            let scaled = scaled.map_or(self.debt, |debt| debt / i128::from(self.rate));
            self.debt = self.debt.min(scaled).max(Self::kept(rate));
        }
        self.rate = rate;
    }

    /// Sends a message of `bytes`, if it may go now.
    ///
    /// # Errors
    /// How many microseconds to wait before asking again, at least 1.
    pub fn take(&mut self, now: Moment, bytes: u64) -> Result<(), u64> {
        self.settle(now);
        if self.rate == 0 {
            return Ok(());
        }
        if self.debt > 0 {
            let wait = self.debt.div_euclid(i128::from(self.rate)) + 1;
            return Err(u64::try_from(wait).unwrap_or(u64::MAX));
        }
        self.debt += i128::from(bytes) * MICROS;
        Ok(())
    }

    fn settle(&mut self, now: Moment) {
        let passed = i128::from(now.micros_since(self.settled)) * i128::from(self.rate);
        self.debt = (self.debt - passed).max(Self::kept(self.rate));
        self.settled = self.settled.max(now);
    }

    fn kept(rate: u64) -> i128 {
        -i128::from(rate) * i128::from(KEPT_US)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECOND: u64 = 1_000_000;

    /// Senders that always have something to send, and a clock that only they move. Each has its message size and wakes up late by up
    /// to `late_us`.
    struct World {
        bucket: Bucket,
        now: u64,
        /// When it asks again, and what it sends.
        senders: Vec<(u64, u64)>,
        late_us: u64,
        steps: u64,
        /// When how much left.
        sent: Vec<(u64, u64)>,
    }

    impl World {
        fn new(rate: u64, messages: &[u64], late_us: u64) -> Self {
            Self {
                bucket: Bucket::new(rate),
                now: 0,
                senders: messages.iter().map(|bytes| (0, *bytes)).collect(),
                late_us,
                steps: 0,
                sent: Vec::new(),
            }
        }

        fn run_until(&mut self, end: u64) {
            loop {
                let (at, bytes) = self.senders.iter_mut().min().unwrap();
                if *at >= end {
                    self.now = end;
                    return;
                }
                self.now = self.now.max(*at);
                self.steps += 1;
                match self.bucket.take(Moment(self.now), *bytes) {
                    Ok(()) => self.sent.push((self.now, *bytes)),
                    Err(wait) => {
                        let late = self.steps.wrapping_mul(7919) % (self.late_us + 1);
                        *at = self.now + wait + late;
                    }
                }
            }
        }

        fn sent_between(&self, from: u64, to: u64) -> u64 {
            let within = self.sent.iter().filter(|(at, _)| (from..to).contains(at));
            within.map(|(_, bytes)| bytes).sum()
        }

        /// The largest deviation from the rate over any whole second, in percent of it.
        fn worst_percent(&self, rate: u64, from: u64) -> f64 {
            let mut worst: f64 = 0.0;
            let mut start = from;
            while start + SECOND <= self.now {
                let sent = self.sent_between(start, start + SECOND) as f64;
                worst = worst.max((sent / rate as f64 - 1.0).abs() * 100.0);
                start += SECOND / 20;
            }
            worst
        }
    }

    /// Message sizes as the data path chooses them: a hundredth of a second, over all connections, at least a page.
    fn messages(rate: u64, connections: u64) -> Vec<u64> {
        let each = (rate / 100 / connections).clamp(4096, 1_500_000) + 48;
        vec![each; usize::try_from(connections).unwrap()]
    }

    #[test]
    fn the_limit_holds_over_every_second_whatever_it_is_and_however_many_share_it() {
        for rate in [200_000, 1 << 20, 10_000_000, 125_000_000, 10_000_000_000] {
            for connections in [1, 2, 8, 32] {
                for late_us in [0, 100, 5_000, 15_000] {
                    let mut world = World::new(rate, &messages(rate, connections), late_us);
                    world.run_until(5 * SECOND);
                    let worst = world.worst_percent(rate, 0);
                    assert!(
                        worst <= 5.0,
                        "{worst:.2} % at {rate} bytes/s, {connections} connections, {late_us} us late"
                    );
                }
            }
        }
    }

    #[test]
    fn a_tiny_limit_holds_over_the_time_of_its_messages() {
        let rate = 1000;
        let mut world = World::new(rate, &messages(rate, 4), 1000);
        world.run_until(1000 * SECOND);
        let sent = world.sent_between(0, 1000 * SECOND);
        assert!(sent.abs_diff(1000 * rate) <= 4144 + rate / 40, "{sent}");
    }

    #[test]
    fn a_new_limit_holds_from_the_first_second_on() {
        for (before, after) in [
            (1 << 20, 100 << 20),
            (100 << 20, 1 << 20),
            (10_000_000, 9_000_000),
            (0, 1 << 20),
        ] {
            let mut world = World::new(before, &messages(before.max(1 << 20), 2), 100);
            if before > 0 {
                world.run_until(3 * SECOND);
            }
            let changed = world.now;
            world.bucket.set_rate(Moment(changed), after);
            for (sender, bytes) in world.senders.iter_mut().zip(messages(after, 2)) {
                *sender = (changed, bytes);
            }
            world.run_until(changed + 3 * SECOND);
            let worst = world.worst_percent(after, changed);
            assert!(worst <= 5.0, "{worst:.2} % from {before} to {after}");
        }
    }

    #[test]
    fn setting_the_same_limit_again_and_again_does_not_soften_it() {
        let mut bucket = Bucket::new(1_000_000);
        let mut sent = 0;
        for micros in 0..SECOND {
            bucket.set_rate(Moment(micros), 1_000_000);
            while bucket.take(Moment(micros), 10_000).is_ok() {
                sent += 10_000;
            }
        }
        assert!(sent <= 1_010_000 + 10_000 + 25_000, "{sent}");
    }

    #[test]
    fn time_that_nobody_used_is_kept_for_a_moment_only() {
        let mut bucket = Bucket::new(1_000_000);
        let now = Moment(3600 * SECOND);
        let mut sent = 0;
        while bucket.take(now, 1000).is_ok() {
            sent += 1000;
        }
        assert_eq!(sent, KEPT_US + 1000);
    }

    #[test]
    fn without_a_limit_nobody_waits_and_nobody_owes() {
        let mut bucket = Bucket::new(0);
        assert_eq!(bucket.take(Moment(0), u64::MAX), Ok(()));
        bucket.set_rate(Moment(0), 1);
        assert_eq!(bucket.take(Moment(0), u64::MAX), Ok(()));
        assert!(bucket.take(Moment(1), 1).is_err());
        bucket.set_rate(Moment(1), 0);
        assert_eq!(bucket.take(Moment(1), 1), Ok(()));
    }

    proptest! {
        #[test]
        fn whoever_waits_as_told_may_go_and_not_before(
            rate in 1_u64..1 << 60, bytes in 1_u64..1 << 40, start in 0_u64..1 << 40,
        ) {
            let mut bucket = Bucket::new(rate);
            // All that is kept, and something that is owed.
            prop_assert_eq!(bucket.take(Moment(start), rate / 40 + 1 + bytes), Ok(()));
            let wait = bucket.take(Moment(start), bytes).unwrap_err();
            let early = bucket.clone().take(Moment(start + wait - 1), bytes);
            prop_assert!(wait == 1 || early.is_err());
            prop_assert_eq!(bucket.take(Moment(start + wait), bytes), Ok(()));
        }
    }
}
