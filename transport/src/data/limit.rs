//! The bandwidth limit: one for all connections of a migration, adjustable while it runs.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How much unused allowance is kept for later, in time: enough to bridge a late wake-up of a sender, and far below the second over
/// which the limit has to hold.
const BURST: Duration = Duration::from_millis(10);
/// Longest sleep before the limit is looked at again.
const NAP_MAX: Duration = Duration::from_millis(100);

/// Bytes per second that senders may put on the wire together; 0 is no limit.
///
/// A sender asks before it sends. It may go when nobody owes time, and its bytes put everybody in debt for as long as they take at
/// the limit. So the limit holds on average whatever the size of a message.
#[derive(Debug)]
pub struct BandwidthLimit {
    bytes_per_sec: AtomicU64,
    /// When the bytes sent so far are paid for.
    paid_until: Mutex<Option<Instant>>,
    changed: Condvar,
}

impl BandwidthLimit {
    /// A limit in bytes per second; 0 is none.
    pub fn new(bytes_per_sec: u64) -> Self {
        Self {
            bytes_per_sec: AtomicU64::new(bytes_per_sec),
            paid_until: Mutex::new(None),
            changed: Condvar::new(),
        }
    }

    /// Changes the limit, also for senders that wait at this moment. Bytes per second; 0 is none.
    pub fn set(&self, bytes_per_sec: u64) {
        let mut paid_until = self.lock();
        self.bytes_per_sec.store(bytes_per_sec, Ordering::Relaxed);
        // Debt was counted at the old rate and could be long; at most one message per connection is forgiven.
        *paid_until = None;
        drop(paid_until);
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
        let mut paid_until = self.lock();
        loop {
            let rate = self.get();
            if rate == 0 || stop() {
                return;
            }
            let now = Instant::now();
            let due = paid_until.unwrap_or(now);
            if let Some(debt) = due
                .checked_duration_since(now)
                .filter(|debt| !debt.is_zero())
            {
                let nap = debt.min(NAP_MAX);
                (paid_until, _) = self
                    .changed
                    .wait_timeout(paid_until, nap)
                    .unwrap_or_else(PoisonError::into_inner);
            } else {
                let earliest = now.checked_sub(BURST).unwrap_or(now);
                let cost = Duration::from_secs_f64(bytes as f64 / rate as f64);
                *paid_until = Some(due.max(earliest) + cost);
                return;
            }
        }
    }

    /// Wakes all senders that wait, so that they look at their stop condition.
    pub(crate) fn wake(&self) {
        drop(self.lock());
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Option<Instant>> {
        // A time is valid whatever happened to the thread that held the lock.
        self.paid_until
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
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
        // The first goes at once, 20 more are 200 ms, less the burst.
        assert!(began.elapsed() >= Duration::from_millis(189));
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
