//! How fast a guest writes while its process changes, and when it is as fast as before.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::vm::Ram;

/// From one look to the next.
const LOOK_EVERY: Duration = Duration::from_micros(500);
/// Over so many seconds a rate is measured: shorter ones are mostly noise.
const WINDOW_S: f64 = 0.01;
/// Of the rate before.
const BACK: f64 = 0.9;

/// Seconds since the first look, and pages written.
type Look = (f64, u64);

/// Looks at a guest's memory, whoever runs it.
pub(crate) struct Watch {
    over: Arc<AtomicBool>,
    looks: Arc<Mutex<Vec<Look>>>,
    thread: JoinHandle<Result<()>>,
    began: Instant,
    /// Seconds after which the upgrade began.
    mark: f64,
}

impl Watch {
    /// Begins to look, with the guest running as it does.
    pub(crate) fn start(ram: Ram) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let looks = Arc::new(Mutex::new(Vec::new()));
        let began = Instant::now();
        let thread = thread::spawn({
            let (over, looks) = (Arc::clone(&over), Arc::clone(&looks));
            move || {
                while !over.load(Ordering::Relaxed) {
                    let look = (began.elapsed().as_secs_f64(), ram.written()?);
                    looks
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .push(look);
                    thread::sleep(LOOK_EVERY);
                }
                Ok(())
            }
        });
        Self {
            over,
            looks,
            thread,
            began,
            mark: 0.0,
        }
    }

    /// What was seen up to now is how the guest is without an upgrade.
    pub(crate) fn mark(&mut self) {
        self.mark = self.began.elapsed().as_secs_f64();
    }

    /// Ends when the guest is back, or after `most`; milliseconds from the last write before the longest gap until then.
    pub(crate) fn end(self, most: Duration) -> Result<f64> {
        let began = Instant::now();
        let back = loop {
            let looks = self.looks.lock().unwrap_or_else(PoisonError::into_inner);
            let back = back_after(&looks, self.mark);
            drop(looks);
            if back.is_some() || began.elapsed() > most {
                break back;
            }
            thread::sleep(Duration::from_millis(20));
        };
        self.over.store(true, Ordering::Relaxed);
        match self.thread.join() {
            Ok(looked) => looked?,
            Err(_) => bail!("the thread that looks has panicked"),
        }
        // A guest that is never as fast as before has no such time, and the median may still have one.
        Ok(back.unwrap_or(f64::INFINITY))
    }
}

#[expect(clippy::cast_precision_loss, reason = "a rate for people")]
fn rate((from, before): Look, (to, after): Look) -> f64 {
    (after - before) as f64 / (to - from).max(f64::EPSILON)
}

/// Milliseconds from the beginning of the longest gap after `mark` until a window begins in which the rate is that before `mark`.
fn back_after(looks: &[Look], mark: f64) -> Option<f64> {
    let marked = looks.iter().position(|look| look.0 >= mark)?;
    let usual = rate(*looks.first()?, looks[marked]);
    // The gap: looks at which nothing was new.
    let (mut since, mut gap) = (marked, marked..marked);
    for at in marked + 1..looks.len() {
        if looks[at].1 != looks[at - 1].1 {
            since = at;
        } else if looks[at].0 - looks[since].0 > looks[gap.end].0 - looks[gap.start].0 {
            gap = since..at;
        }
    }
    let back = (gap.end..looks.len()).find_map(|from| {
        let rest = looks[from..].iter();
        let to = rest
            .clone()
            .find(|look| look.0 >= looks[from].0 + WINDOW_S)?;
        (rate(looks[from], *to) >= BACK * usual).then_some(looks[from])
    })?;
    Some((back.0 - looks[gap.start].0) * 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_is_back_when_it_writes_as_before_and_not_when_it_only_writes() {
        // 1000 pages a second; a gap of 5 ms from 0.2 s on, then half as fast for 20 ms.
        let pages = |ms: u64| match ms {
            ..200 => ms,
            200..205 => 200,
            205..225 => 200 + (ms - 205) / 2,
            _ => 210 + (ms - 225),
        };
        let looks: Vec<Look> = (0_u32..300)
            .map(|ms| (f64::from(ms) / 1e3, 10 * pages(ms.into())))
            .collect();
        let back = back_after(&looks, 0.1).unwrap();
        assert!((23.0..27.0).contains(&back), "{back}");
        assert_eq!(back_after(&looks[..224], 0.1), None);
    }
}
