//! When to tell the network where the guest is, after it has moved: several times, at growing intervals, because such a message may be
//! lost and switches may still be learning.

use vmferry_transport::units::Moment;

/// How often and when. Times in milliseconds.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct AnnounceTiming {
    /// Between the first announcement and the second.
    pub(crate) initial_ms: u64,
    /// No interval is longer.
    pub(crate) max_ms: u64,
    /// How many announcements.
    pub(crate) rounds: u64,
    /// By how much each interval is longer than the one before.
    pub(crate) step_ms: u64,
}

/// One run of announcements. The first is due at once.
#[derive(Debug)]
pub(crate) struct Announcer {
    timing: AnnounceTiming,
    made: u64,
    due: Moment,
}

impl Announcer {
    /// Begins at `now`.
    pub(crate) fn new(now: Moment, timing: AnnounceTiming) -> Self {
        Self {
            timing,
            made: 0,
            due: now,
        }
    }

    /// When [`poll`](Self::poll) wants to be asked; `None` when the last announcement was made.
    pub(crate) fn poll_timeout(&self) -> Option<Moment> {
        (self.made < self.timing.rounds).then_some(self.due)
    }

    /// Whether an announcement is to be made now. One that comes late is made once; the next keeps its distance.
    pub(crate) fn poll(&mut self, now: Moment) -> bool {
        if self.poll_timeout().is_none_or(|due| now < due) {
            return false;
        }
        let AnnounceTiming {
            initial_ms,
            max_ms,
            step_ms,
            ..
        } = self.timing;
        let wait_ms = initial_ms
            .saturating_add(self.made.saturating_mul(step_ms))
            .min(max_ms);
        self.made += 1;
        self.due = now.plus_micros(wait_ms.saturating_mul(1000));
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QEMUS: AnnounceTiming = AnnounceTiming {
        initial_ms: 50,
        max_ms: 550,
        rounds: 5,
        step_ms: 100,
    };

    /// Milliseconds at which announcements are made by a driver that is always in time.
    fn times(timing: AnnounceTiming) -> Vec<u64> {
        let mut announcer = Announcer::new(Moment(7_000), timing);
        let mut times = Vec::new();
        while let Some(due) = announcer.poll_timeout() {
            assert!(due.0 == 7_000 || !announcer.poll(Moment(due.0 - 1)));
            assert!(announcer.poll(due));
            times.push((due.0 - 7_000) / 1000);
        }
        assert!(!announcer.poll(Moment(u64::MAX)));
        times
    }

    #[test]
    fn intervals_grow_up_to_the_longest() {
        assert_eq!(times(QEMUS), [0, 50, 200, 450, 800]);
        let short = AnnounceTiming {
            max_ms: 120,
            ..QEMUS
        };
        assert_eq!(times(short), [0, 50, 170, 290, 410]);
    }

    #[test]
    fn no_rounds_are_no_announcement() {
        let none = AnnounceTiming { rounds: 0, ..QEMUS };
        assert!(times(none).is_empty());
    }

    #[test]
    fn a_late_announcement_is_made_once() {
        let mut announcer = Announcer::new(Moment(0), QEMUS);
        assert!(announcer.poll(Moment(10_000_000)));
        assert!(!announcer.poll(Moment(10_000_000)));
        assert_eq!(announcer.poll_timeout(), Some(Moment(10_050_000)));
    }

    #[test]
    fn no_timing_overflows() {
        let timing = AnnounceTiming {
            initial_ms: u64::MAX,
            max_ms: u64::MAX,
            rounds: 3,
            step_ms: u64::MAX,
        };
        let mut announcer = Announcer::new(Moment(1), timing);
        assert!(announcer.poll(Moment(1)));
        assert_eq!(announcer.poll_timeout(), Some(Moment(u64::MAX)));
    }
}
