//! Lists of a record that stay short however long a migration takes. Pure: no clock, no I/O.

use std::collections::VecDeque;

use super::Sample;

/// Most samples of a record.
pub const SAMPLES_MAX: usize = 2048;
/// Most byte counts of connections in all samples: with many connections there are fewer samples.
pub const CONNECTION_COUNTS_MAX: usize = 1 << 16;
/// Most rounds of a record.
pub const ROUNDS_MAX: usize = 2048;
/// Most status changes of a record.
pub const TIMELINE_MAX: usize = 256;

/// Time between samples, at first. Small migrations take a tenth of a second and are worth a plot too.
const EARLY_EVERY_US: u64 = 10_000;
/// For how long.
const EARLY_US: u64 = 2_000_000;
/// Time between samples later.
const EVERY_US: u64 = 100_000;

/// Samples of a migration. When there are too many, every second one goes and the time between them doubles.
#[derive(Clone, Debug, Default)]
pub struct Series {
    samples: Vec<Sample>,
    doublings: u32,
    due_us: u64,
}

impl Series {
    /// When the next sample should be taken, in microseconds since the begin.
    pub fn due_us(&self) -> u64 {
        self.due_us
    }

    /// Adds a sample, and expects the next one after a while. Samples come in the order of their time; one that has the time of the
    /// last replaces it.
    pub fn push(&mut self, sample: Sample) {
        let at_us = sample.at_us;
        let connections = sample.connection_bytes.len().max(1);
        match self.samples.last_mut() {
            Some(last) if last.at_us >= at_us => *last = sample,
            _ => self.samples.push(sample),
        }
        let most = (CONNECTION_COUNTS_MAX / connections).clamp(2, SAMPLES_MAX);
        if self.samples.len() > most {
            let mut index = 0;
            self.samples.retain(|_| {
                index += 1;
                index % 2 == 1
            });
            self.doublings = (self.doublings + 1).min(32);
        }
        let every_us = if at_us < EARLY_US && self.doublings == 0 {
            EARLY_EVERY_US
        } else {
            EVERY_US << self.doublings
        };
        self.due_us = at_us + every_us;
    }

    /// The samples, each with the rate since the one before.
    pub fn finish(mut self) -> Vec<Sample> {
        let mut before = (0, 0);
        for sample in &mut self.samples {
            let (at_us, bytes) = before;
            let took_us = sample.at_us.saturating_sub(at_us);
            sample.bytes_per_sec = match took_us {
                0 => 0,
                _ => per_second(sample.bytes.saturating_sub(bytes), took_us),
            };
            before = (sample.at_us, sample.bytes);
        }
        self.samples
    }
}

/// So much in so many microseconds, per second.
pub fn per_second(amount: u64, took_us: u64) -> u64 {
    let rate = u128::from(amount) * 1_000_000 / u128::from(took_us.max(1));
    u64::try_from(rate).unwrap_or(u64::MAX)
}

/// A list that keeps its beginning and its end when it gets too long.
#[derive(Clone, Debug)]
pub struct Ends<T> {
    first: Vec<T>,
    latest: VecDeque<T>,
    omitted: u64,
    half: usize,
}

impl<T> Ends<T> {
    /// An empty list that keeps at most `most`, an even number.
    pub fn new(most: usize) -> Self {
        Self {
            first: Vec::new(),
            latest: VecDeque::new(),
            omitted: 0,
            half: most / 2,
        }
    }

    /// Adds to the end.
    pub fn push(&mut self, item: T) {
        if self.first.len() < self.half {
            self.first.push(item);
            return;
        }
        if self.latest.len() == self.half {
            self.latest.pop_front();
            self.omitted += 1;
        }
        self.latest.push_back(item);
    }

    /// What was added last.
    pub fn last_mut(&mut self) -> Option<&mut T> {
        match self.latest.back_mut() {
            Some(item) => Some(item),
            None => self.first.last_mut(),
        }
    }

    /// What is left, and how much was left out in the middle.
    pub fn finish(self) -> (Vec<T>, u64) {
        let mut all = self.first;
        all.extend(self.latest);
        (all, self.omitted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(at_us: u64, connections: usize) -> Sample {
        Sample {
            at_us,
            bytes: at_us * 3,
            connection_bytes: vec![at_us; connections],
            ..Sample::default()
        }
    }

    #[test]
    fn a_migration_of_days_has_a_bounded_number_of_samples_from_begin_to_end() {
        for connections in [1, 2, 255] {
            let mut series = Series::default();
            let end_us = 3 * 24 * 3600 * 1_000_000;
            while series.due_us() < end_us {
                series.push(sample(series.due_us(), connections));
            }
            let last_us = series.samples.last().unwrap().at_us;
            let samples = series.finish();
            assert!(samples.len() <= SAMPLES_MAX && samples.len() * connections <= 1 << 16);
            assert!(samples.len() >= 100, "{}", samples.len());
            assert_eq!(samples[0].at_us, 0);
            assert!(last_us > end_us - end_us / 50);
            let rates = samples.iter().skip(1);
            assert!(
                rates
                    .clone()
                    .all(|sample| sample.bytes_per_sec == 3_000_000)
            );
        }
    }

    #[test]
    fn the_first_seconds_are_seen_more_closely() {
        let mut series = Series::default();
        while series.due_us() < 4_000_000 {
            series.push(sample(series.due_us(), 2));
        }
        let samples = series.finish();
        assert_eq!(samples.iter().filter(|s| s.at_us < 2_000_000).count(), 200);
        assert_eq!(samples.len(), 220);
    }

    #[test]
    fn two_samples_of_one_moment_are_one() {
        let mut series = Series::default();
        series.push(sample(5, 1));
        series.push(sample(5, 1));
        assert_eq!(series.finish().len(), 1);
    }

    #[test]
    fn a_long_list_keeps_its_ends() {
        let mut ends = Ends::new(6);
        for number in 0..100 {
            ends.push(number);
            assert_eq!(ends.last_mut(), Some(&mut number.clone()));
        }
        assert_eq!(ends.finish(), (vec![0, 1, 2, 97, 98, 99], 94));
        let mut short = Ends::new(6);
        short.push('a');
        assert_eq!(short.finish(), (vec!['a'], 0));
    }
}
