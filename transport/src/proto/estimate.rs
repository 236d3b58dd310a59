//! When to switch over: predicted blackout against the downtime limit, and whether another round would make it clearly shorter.
//! Pure arithmetic.

use crate::units::PageCount;

/// Costs of a switchover that do not depend on how much is dirty, in microseconds: stopping vCPUs, saving and loading device state.
/// About what is measured for a small VM; round trips are added to it.
const FIXED_US: u64 = 2_500;
/// A switchover takes three exchanges with the target: state and READY, COMMIT and RUNNING, and the last bytes of data.
const ROUND_TRIPS: u64 = 3;
/// Sending time below which another round cannot make a difference that anybody notices, in microseconds.
const NEGLIGIBLE_US: u64 = 400;
/// A round was worth its cost if it left less than this share of the smallest remainder before it, in percent.
const CLEARLY_LESS_PERCENT: u64 = 85;
/// Rounds in a row that may have been in vain. The dirty rate of one round says little about the next: the guest competes with our own
/// threads for processors, and where it stands in its memory decides whether a page that it writes has been sent yet.
const VAIN_ROUNDS_MAX: u32 = 2;
/// Most rounds spent on shrinking a remainder that already fits the limit.
const POLISHING_ROUNDS_MAX: u32 = 16;
/// Rounds with fewer pages say little about bandwidth: their time is mostly overhead.
const BANDWIDTH_PAGES_MIN: u64 = 512;

/// What the rounds so far have taught.
#[derive(Clone, Debug, Default)]
pub struct Estimate {
    bytes_per_sec: Option<u64>,
    /// What the operator says that the switchover will have.
    switchover_bytes_per_sec: Option<u64>,
    /// The rate was measured with pages that had content, not with zeros alone.
    by_data: bool,
    round_trip_us: Option<u64>,
    sync_us: u64,
    dirty_pages_per_sec: u64,
    /// What devices besides RAM have to give once they are stopped.
    device_bytes: u64,
    /// Rounds since the remainder fits the limit, those of them in a row that were in vain, and the smallest remainder.
    polished: u32,
    vain: u32,
    smallest: Option<PageCount>,
}

/// What to do with the pages that a dirty fetch has found.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Decision {
    /// Send them with the guest running.
    AnotherRound,
    /// Stop the guest.
    SwitchOver,
}

impl Estimate {
    /// Bytes of page data that the link takes per second; `None` before the first round is placed.
    pub fn bytes_per_sec(&self) -> Option<u64> {
        self.bytes_per_sec
    }

    /// Pages that the guest dirties per second, as the last dirty fetch has shown.
    pub fn dirty_pages_per_sec(&self) -> u64 {
        self.dirty_pages_per_sec
    }

    /// Bandwidth to decide by, in bytes per second, instead of the measured one.
    pub fn set_switchover_bandwidth(&mut self, bytes_per_sec: Option<u64>) {
        self.switchover_bytes_per_sec = bytes_per_sec.filter(|rate| *rate > 0);
    }

    /// Time of an exchange with the target. The shortest counts: whatever takes longer was held up by something else, once.
    pub fn note_round_trip(&mut self, micros: u64) {
        self.round_trip_us = Some(self.round_trip_us.map_or(micros, |known| known.min(micros)));
    }

    /// A round was placed at the target, `micros` after it began. Zero pages cost next to nothing, so they say something about the
    /// link only while nothing better is known: a rate that counts them would promise blackouts that pages with content cannot keep.
    pub fn note_round(&mut self, data: PageCount, zero: PageCount, micros: u64) {
        let by_data = data.0 > 0;
        let pages = if by_data { data } else { zero };
        if pages.0 == 0 {
            return;
        }
        let rate = per_second(pages.to_bytes(), micros).max(1);
        // Overhead makes a small round look slower than the link is, never faster: it can only correct upwards. If it could not even do
        // that, one stall in the first round of a small VM would be believed for ever.
        let is_better = match self.bytes_per_sec {
            Some(_) if by_data != self.by_data => by_data,
            Some(known) => pages.0 >= BANDWIDTH_PAGES_MIN || rate > known,
            None => true,
        };
        if is_better {
            self.bytes_per_sec = Some(rate);
            self.by_data = by_data;
        }
    }

    /// A dirty fetch found `dirty` pages written in the `elapsed_us` since the one before, and took `sync_us`.
    pub fn note_sync(&mut self, dirty: PageCount, elapsed_us: u64, sync_us: u64) {
        self.dirty_pages_per_sec = per_second(dirty.0, elapsed_us);
        self.sync_us = sync_us;
    }

    /// Devices would have this much to give if they were stopped now, in bytes. It leaves beside the last pages, and no further round makes
    /// it less.
    pub fn note_device_bytes(&mut self, bytes: u64) {
        self.device_bytes = bytes;
    }

    /// How long the guest would stand still if it were stopped now with `dirty` pages to send, in microseconds.
    pub fn blackout_us(&self, dirty: PageCount) -> u64 {
        let fixed = FIXED_US
            .saturating_add(ROUND_TRIPS.saturating_mul(self.round_trip_us.unwrap_or(0)))
            .saturating_add(self.sync_us);
        fixed
            .saturating_add(self.sending_us(dirty))
            .saturating_add(self.bytes_us(self.device_bytes))
    }

    /// Decides on `dirty` pages, found by the fetch that was noted last.
    pub fn decide(&mut self, dirty: PageCount, downtime_limit_us: u64) -> Decision {
        if self.blackout_us(dirty) > downtime_limit_us {
            (self.polished, self.vain, self.smallest) = (0, 0, None);
            return Decision::AnotherRound;
        }
        if self.sending_us(dirty) <= NEGLIGIBLE_US || self.polished >= POLISHING_ROUNDS_MAX {
            return Decision::SwitchOver;
        }
        let clearly_less = self.smallest.is_none_or(|smallest| {
            u128::from(dirty.0) * 100 < u128::from(smallest.0) * u128::from(CLEARLY_LESS_PERCENT)
        });
        if clearly_less {
            self.smallest = Some(dirty);
            self.vain = 0;
        } else {
            self.vain += 1;
        }
        if self.vain > VAIN_ROUNDS_MAX {
            return Decision::SwitchOver;
        }
        self.polished += 1;
        Decision::AnotherRound
    }

    fn sending_us(&self, dirty: PageCount) -> u64 {
        self.bytes_us(dirty.to_bytes())
    }

    fn bytes_us(&self, bytes: u64) -> u64 {
        match self.switchover_bytes_per_sec.or(self.bytes_per_sec) {
            Some(rate) => saturating(u128::from(bytes) * 1_000_000 / u128::from(rate)),
            None if bytes == 0 => 0,
            None => u64::MAX,
        }
    }
}

fn per_second(amount: u64, micros: u64) -> u64 {
    saturating(u128::from(amount) * 1_000_000 / u128::from(micros.max(1)))
}

fn saturating(value: u128) -> u64 {
    u64::try_from(value).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT_US: u64 = 300_000;

    /// One GB/s, dirtying `rate` pages per second.
    fn estimate(rate: u64) -> Estimate {
        let mut estimate = Estimate::default();
        estimate.note_round(PageCount(262_144), PageCount(0), 1_073_741);
        estimate.note_sync(PageCount(rate), 1_000_000, 500);
        estimate
    }

    #[test]
    fn an_idle_guest_is_switched_over_at_once() {
        assert_eq!(
            estimate(0).decide(PageCount(0), LIMIT_US),
            Decision::SwitchOver
        );
    }

    #[test]
    fn a_remainder_that_fits_is_still_shrunk_while_that_helps() {
        let mut estimate = estimate(12_000);
        for dirty in [48_000, 30_000, 9_000, 4_000, 500] {
            assert_eq!(
                estimate.decide(PageCount(dirty), LIMIT_US),
                Decision::AnotherRound
            );
        }
        assert_eq!(
            estimate.decide(PageCount(60), LIMIT_US),
            Decision::SwitchOver
        );
    }

    #[test]
    fn a_remainder_that_fits_and_does_not_shrink_is_sent_after_few_tries() {
        let mut estimate = estimate(225_000);
        for dirty in [48_000, 47_000, 46_000] {
            assert_eq!(
                estimate.decide(PageCount(dirty), LIMIT_US),
                Decision::AnotherRound
            );
        }
        assert_eq!(
            estimate.decide(PageCount(45_000), LIMIT_US),
            Decision::SwitchOver
        );
    }

    #[test]
    fn what_devices_have_to_give_counts_but_no_round_is_spent_on_it() {
        let mut estimate = estimate(0);
        // A third of a second, and more than the limit.
        estimate.note_device_bytes(400 << 20);
        assert!(estimate.blackout_us(PageCount(0)) > LIMIT_US);
        assert_eq!(
            estimate.decide(PageCount(0), LIMIT_US),
            Decision::AnotherRound
        );
        estimate.note_device_bytes(200 << 20);
        assert_eq!(
            estimate.decide(PageCount(0), LIMIT_US),
            Decision::SwitchOver
        );
    }

    #[test]
    fn what_does_not_fit_is_never_switched_over() {
        let mut estimate = estimate(400_000);
        for _ in 0..100 {
            assert_eq!(
                estimate.decide(PageCount(100_000), LIMIT_US),
                Decision::AnotherRound
            );
        }
    }

    #[test]
    fn polishing_ends() {
        let mut estimate = estimate(1_000);
        let mut dirty = PageCount(60_000);
        let rounds = std::iter::repeat_with(|| {
            dirty.0 = dirty.0 * 80 / 100;
            estimate.decide(dirty, LIMIT_US)
        });
        let rounds = rounds.take_while(|decision| *decision == Decision::AnotherRound);
        assert_eq!(rounds.count(), POLISHING_ROUNDS_MAX as usize);
    }

    #[test]
    fn zero_pages_do_not_make_the_link_look_fast() {
        let mut estimate = Estimate::default();
        estimate.note_round(PageCount(0), PageCount(1 << 20), 100_000);
        let by_zeros = estimate.blackout_us(PageCount(100_000));
        estimate.note_round(PageCount(100), PageCount(1 << 20), 100_000);
        assert!(estimate.blackout_us(PageCount(100_000)) > by_zeros);
    }

    #[test]
    fn a_stall_in_the_first_round_is_not_believed_for_ever() {
        let mut estimate = Estimate::default();
        estimate.note_round(PageCount(20), PageCount(0), 20_000_000);
        assert_eq!(
            estimate.decide(PageCount(20), LIMIT_US),
            Decision::AnotherRound
        );
        estimate.note_round(PageCount(20), PageCount(0), 100);
        assert_eq!(
            estimate.decide(PageCount(20), LIMIT_US),
            Decision::SwitchOver
        );
    }

    #[test]
    fn one_slow_answer_is_not_believed_for_ever() {
        let mut estimate = estimate(0);
        estimate.note_round_trip(1_000_000);
        assert_eq!(
            estimate.decide(PageCount(0), LIMIT_US),
            Decision::AnotherRound
        );
        estimate.note_round_trip(150);
        assert_eq!(
            estimate.decide(PageCount(0), LIMIT_US),
            Decision::SwitchOver
        );
    }

    #[test]
    fn a_round_of_holes_teaches_nothing() {
        let mut estimate = Estimate::default();
        estimate.note_round(PageCount(0), PageCount(0), 1_000);
        assert_eq!(estimate.bytes_per_sec(), None);
        assert_eq!(
            estimate.decide(PageCount(0), LIMIT_US),
            Decision::SwitchOver
        );
    }

    #[test]
    fn nothing_overflows() {
        let mut estimate = Estimate::default();
        estimate.note_round(PageCount(1 << 50), PageCount(1 << 50), 0);
        estimate.note_sync(PageCount(u64::MAX / 8192), 0, 0);
        estimate.decide(PageCount(1 << 50), u64::MAX);
        let mut unknown = Estimate::default();
        unknown.note_sync(PageCount(u64::MAX / 8192), 0, u64::MAX);
        unknown.note_round_trip(u64::MAX);
        unknown.decide(PageCount(1), u64::MAX);
    }
}
