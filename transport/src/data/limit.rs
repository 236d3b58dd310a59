//! The bandwidth limit: one for all connections of a migration, adjustable while it runs.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::proto::Bucket;
use crate::units::Moment;

/// Longest sleep before the limit is looked at again.
const NAP_MAX: Duration = Duration::from_millis(100);

/// Bytes per second that senders may put on the wire together; 0 is no limit. Waits as [`Bucket`] says.
#[derive(Debug)]
pub struct BandwidthLimit {
    bytes_per_sec: AtomicU64,
    began: Instant,
    bucket: Mutex<Bucket>,
    changed: Condvar,
}

impl BandwidthLimit {
    /// A limit in bytes per second; 0 is none.
    pub fn new(bytes_per_sec: u64) -> Self {
        Self {
            bytes_per_sec: AtomicU64::new(bytes_per_sec),
            began: Instant::now(),
            bucket: Mutex::new(Bucket::new(bytes_per_sec)),
            changed: Condvar::new(),
        }
    }

    /// Changes the limit, also for senders that wait at this moment. Bytes per second; 0 is none.
    pub fn set(&self, bytes_per_sec: u64) {
        let mut bucket = self.lock();
        bucket.set_rate(self.now(), bytes_per_sec);
        self.bytes_per_sec.store(bytes_per_sec, Ordering::Relaxed);
        drop(bucket);
        self.changed.notify_all();
    }

    /// The limit in bytes per second; 0 is none.
    pub fn get(&self) -> u64 {
        self.bytes_per_sec.load(Ordering::Relaxed)
    }

    /// Waits until `bytes` may be sent, or `stop` says that they need not be.
    pub(crate) fn acquire(&self, bytes: u64, stop: impl Fn() -> bool) {
        if self.get() == 0 {
            return;
        }
        let mut bucket = self.lock();
        while !stop() {
            let Err(wait_us) = bucket.take(self.now(), bytes) else {
                return;
            };
            let nap = Duration::from_micros(wait_us).min(NAP_MAX);
            (bucket, _) = self
                .changed
                .wait_timeout(bucket, nap)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Wakes all senders that wait, so that they look at their stop condition.
    pub(crate) fn wake(&self) {
        drop(self.lock());
        self.changed.notify_all();
    }

    fn now(&self) -> Moment {
        Moment(u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX))
    }

    fn lock(&self) -> MutexGuard<'_, Bucket> {
        // An account is valid whatever happened to the thread that held the lock.
        self.bucket.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::thread;

    use super::*;

    #[test]
    fn bytes_take_at_least_their_time_at_the_limit() {
        let limit = BandwidthLimit::new(10_000_000);
        let began = Instant::now();
        for _ in 0..21 {
            limit.acquire(100_000, || false);
        }
        // The first goes at once, 20 more are 200 ms, less what may be kept.
        assert!(began.elapsed() >= Duration::from_millis(174));
    }

    #[test]
    fn a_waiting_sender_notices_a_new_limit_and_a_stop() {
        let limit = Arc::new(BandwidthLimit::new(1));
        limit.acquire(1_000_000, || false);
        let waiting = {
            let limit = Arc::clone(&limit);
            thread::spawn(move || limit.acquire(1, || false))
        };
        // A million seconds of debt: without the new limit the thread would never end.
        limit.set(0);
        waiting.join().unwrap();
        limit.set(1);
        limit.acquire(1_000_000, || false);
        limit.acquire(1, || true);
    }
}
