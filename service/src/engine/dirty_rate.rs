//! `calc-dirty-rate`: how fast the guest writes memory, to judge beforehand whether it can be migrated.
//!
//! Measures by comparing some pages or by the dirty log of the machine. The log is the one that migrations use, so a migration ends a
//! measurement. The probe lives where only the job thread takes it: jobs run in order, so the log is stopped before a migration
//! starts its own, however far the measurement was.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::json;
use vmferry_transport::memory::{DirtyLogError, PageSamples};
use vmferry_transport::units::{Moment, PAGE_SIZE};

use super::Engine;
use super::armed_log::ArmedLog;
use super::clock::Clock;
use super::commands::Answer;
use super::event::Event;
use super::jobs::PANICKED;
use super::outgoing::chain;
use crate::machine::Machine;
use crate::qmp::schema::{DirtyRateInfo, DirtyRateStatus, RunState};
use crate::qmp::{CalcDirtyRate, DirtyRateMode, QmpError, TimeUnit};

/// Shortest and longest measurement in milliseconds, as in QEMU.
const CALC_TIME_MS: std::ops::RangeInclusive<i64> = 50..=60_000;
/// Fewest and most pages per GiB that are compared, as in QEMU.
const SAMPLE_PAGES: std::ops::RangeInclusive<i64> = 128..=16_384;
/// Pages per GiB that are compared unless the operator says otherwise, as in QEMU.
const SAMPLE_PAGES_DEFAULT: i64 = 512;

/// The measurement under way, or the last one.
#[derive(Debug, Default)]
pub(super) struct DirtyRate {
    number: u64,
    calc_time_ms: u64,
    /// With `calc_time` left open, which depends on who asks.
    info: DirtyRateInfo,
    /// Where it stands, while under way.
    probe: SharedProbe,
    until: Option<Moment>,
}

/// News of the measurement with this number.
#[derive(Debug)]
pub(super) enum Measured {
    /// The probe is in place.
    Began(u64),
    /// MiB per second.
    Ended(u64, u64),
    /// There will be no result.
    Failed(u64, String),
}

/// What will tell how much was written.
enum Probe {
    Samples(PageSamples, Moment),
    Log(ArmedLog, Moment),
}

#[derive(Clone, Default)]
struct SharedProbe(Arc<Mutex<Option<Probe>>>);

impl SharedProbe {
    fn put(&self, probe: Probe) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(probe);
    }

    fn take(&self) -> Option<Probe> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl fmt::Debug for SharedProbe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SharedProbe")
    }
}

impl DirtyRate {
    pub(super) fn poll_timeout(&self) -> Option<Moment> {
        self.until
    }

    /// The answer to `query-dirty-rate`.
    pub(super) fn info(&self, unit: TimeUnit) -> DirtyRateInfo {
        DirtyRateInfo {
            calc_time: match unit {
                TimeUnit::Second => self.calc_time_ms / 1000,
                TimeUnit::Millisecond => self.calc_time_ms,
            },
            calc_time_unit: unit,
            ..self.info.clone()
        }
    }
}

impl Engine {
    /// `calc-dirty-rate`.
    pub(super) fn calc_dirty_rate(&mut self, arguments: CalcDirtyRate) -> Answer {
        let (calc_time_ms, samples) = check(arguments)?;
        let refusal = match self.runstate {
            _ if self.dirty_rate.info.status == DirtyRateStatus::Measuring => {
                "the dirty rate is being measured already"
            }
            RunState::Inmigrate => "no guest is here yet",
            RunState::Postmigrate => "the guest was handed over to another process",
            RunState::Shutdown | RunState::InternalError => "the guest has ended",
            _ => "",
        };
        if !refusal.is_empty() {
            return Err(QmpError::generic(refusal));
        }
        let number = self.dirty_rate.number + 1;
        let probe = SharedProbe::default();
        self.dirty_rate = DirtyRate {
            number,
            calc_time_ms,
            info: DirtyRateInfo {
                status: DirtyRateStatus::Measuring,
                start_time: monotonic_seconds(),
                sample_pages: samples.unwrap_or(0),
                mode: arguments.mode,
                ..DirtyRateInfo::default()
            },
            probe: probe.clone(),
            until: None,
        };
        let (machine, events, clock) = (Arc::clone(&self.machine), self.events.clone(), self.clock);
        self.jobs.run_owing(self.lost(number), move || {
            let news = match begin(machine.as_ref(), samples, clock) {
                Ok(begun) => {
                    probe.put(begun);
                    Measured::Began(number)
                }
                Err(error) => Measured::Failed(number, error),
            };
            // The engine ends only with the process.
            let _ = events.send(Event::Measured(news));
        });
        Ok(json!({}))
    }

    /// What to say of a job that has panicked.
    fn lost(&self, number: u64) -> impl FnOnce() + Send + 'static {
        let events = self.events.clone();
        move || {
            let failed = Measured::Failed(number, PANICKED.to_owned());
            // The engine ends only with the process.
            let _ = events.send(Event::Measured(failed));
        }
    }

    /// Something happened to a measurement; news of one that was given up are dropped.
    pub(super) fn measured(&mut self, news: Measured) {
        let rate = &mut self.dirty_rate;
        let (Measured::Began(number) | Measured::Ended(number, _) | Measured::Failed(number, _)) =
            news;
        if number != rate.number || rate.info.status != DirtyRateStatus::Measuring {
            return;
        }
        match news {
            Measured::Began(_) => {
                let now = self.clock.now();
                rate.until = Some(now.plus_micros(rate.calc_time_ms.saturating_mul(1000)));
            }
            Measured::Ended(_, mib_per_sec) => {
                rate.info.status = DirtyRateStatus::Measured;
                rate.info.dirty_rate = Some(mib_per_sec);
            }
            Measured::Failed(_, error) => {
                tracing::warn!(error, "the dirty rate could not be measured");
                rate.info.status = DirtyRateStatus::Unstarted;
                rate.info.x_error = Some(error);
            }
        }
    }

    /// Ends the measurement whose time is over.
    pub(super) fn measure_what_is_due(&mut self) {
        let rate = &mut self.dirty_rate;
        if rate.until.is_none_or(|until| self.clock.now() < until) {
            return;
        }
        rate.until = None;
        let (number, probe) = (rate.number, rate.probe.clone());
        let (machine, events, clock) = (Arc::clone(&self.machine), self.events.clone(), self.clock);
        self.jobs.run_owing(self.lost(number), move || {
            let Some(probe) = probe.take() else {
                return;
            };
            let news = match end(machine.as_ref(), probe, clock) {
                Ok(mib_per_sec) => Measured::Ended(number, mib_per_sec),
                Err(error) => Measured::Failed(number, error),
            };
            // The engine ends only with the process.
            let _ = events.send(Event::Measured(news));
        });
    }

    /// Gives a measurement up, if there is one, because of `reason`. What it uses is free before any later job runs.
    pub(super) fn end_measurement(&mut self, reason: &str) {
        let rate = &mut self.dirty_rate;
        if rate.info.status != DirtyRateStatus::Measuring {
            return;
        }
        rate.info.status = DirtyRateStatus::Unstarted;
        rate.info.x_error = Some(format!("the measurement was given up: {reason}"));
        rate.until = None;
        let probe = rate.probe.clone();
        self.jobs.run(move || {
            if let Some(Probe::Log(log, _)) = probe.take() {
                log.stop();
            }
        });
    }
}

/// Time in milliseconds, and pages per GiB if pages are to be compared.
fn check(arguments: CalcDirtyRate) -> Result<(u64, Option<u64>), QmpError> {
    let CalcDirtyRate {
        calc_time,
        calc_time_unit,
        sample_pages,
        mode,
    } = arguments;
    let calc_time_ms = match calc_time_unit {
        TimeUnit::Second => calc_time.saturating_mul(1000),
        TimeUnit::Millisecond => calc_time,
    };
    let (shortest, longest) = CALC_TIME_MS.into_inner();
    let calc_time_ms = u64::try_from(calc_time_ms)
        .ok()
        .filter(|_| CALC_TIME_MS.contains(&calc_time_ms))
        .ok_or_else(|| {
            QmpError::generic(format!(
                "argument `calc-time` must be from {shortest} to {longest} ms"
            ))
        })?;
    match (mode, sample_pages) {
        (DirtyRateMode::DirtyRing, _) => Err(QmpError::generic(
            "mode `dirty-ring` is not supported; use dirty-bitmap or page-sampling",
        )),
        (DirtyRateMode::DirtyBitmap, Some(_)) => Err(QmpError::generic(
            "argument `sample-pages` goes with mode page-sampling only",
        )),
        (DirtyRateMode::DirtyBitmap, None) => Ok((calc_time_ms, None)),
        (DirtyRateMode::PageSampling, pages) => {
            let pages = pages.unwrap_or(SAMPLE_PAGES_DEFAULT);
            let (fewest, most) = SAMPLE_PAGES.into_inner();
            let samples = u64::try_from(pages)
                .ok()
                .filter(|_| SAMPLE_PAGES.contains(&pages))
                .ok_or_else(|| {
                    QmpError::generic(format!(
                        "argument `sample-pages` must be from {fewest} to {most}"
                    ))
                })?;
            Ok((calc_time_ms, Some(samples)))
        }
    }
}

/// Puts the probe in place; runs on the job thread.
fn begin(machine: &dyn Machine, samples: Option<u64>, clock: Clock) -> Result<Probe, String> {
    let Some(per_gib) = samples else {
        let log = machine.dirty_log().map_err(|error| chain(&error))?;
        let mut log = ArmedLog::start(log).map_err(|error| chain(&error))?;
        if let Err(error) = forget_all(machine, &mut log) {
            log.stop();
            return Err(chain(&error));
        }
        return Ok(Probe::Log(log, clock.now()));
    };
    let mut seed = [0; 8];
    rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty())
        .map_err(|error| error.to_string())?;
    let bytes = machine.ram().pages().to_bytes();
    let count = per_gib * bytes.div_ceil(1 << 30);
    let taken = PageSamples::take(machine.ram(), count, u64::from_le_bytes(seed));
    let samples = taken.map_err(|error| format!("guest memory cannot be looked at: {error}"))?;
    Ok(Probe::Samples(samples, clock.now()))
}

/// A log may begin with pages that were written before; and some forget a page only when they are told to.
fn forget_all(machine: &dyn Machine, log: &mut ArmedLog) -> Result<(), DirtyLogError> {
    let mut dirty = machine.ram().empty_map();
    log.fetch(&mut dirty)?;
    match log.protector() {
        Some(protector) => protector.protect(&dirty.runs().collect::<Vec<_>>()),
        None => Ok(()),
    }
}

/// MiB per second; runs on the job thread.
fn end(machine: &dyn Machine, probe: Probe, clock: Clock) -> Result<u64, String> {
    let ram = machine.ram();
    let (pages, began) = match probe {
        Probe::Samples(samples, began) => {
            let changed = samples
                .changed(ram)
                .map_err(|error| format!("guest memory cannot be looked at: {error}"))?;
            let pages = ram.pages().0 * changed / samples.count().max(1);
            (pages, began)
        }
        Probe::Log(mut log, began) => {
            let mut dirty = ram.empty_map();
            let fetched = log.fetch(&mut dirty);
            log.stop();
            fetched.map_err(|error| chain(&error))?;
            (dirty.count().0, began)
        }
    };
    Ok(mib_per_sec(pages, clock.now().micros_since(began)))
}

fn mib_per_sec(pages: u64, took_us: u64) -> u64 {
    let bytes = u128::from(pages) * u128::from(PAGE_SIZE) * 1_000_000;
    u64::try_from((bytes / u128::from(took_us.max(1))) >> 20).unwrap_or(u64::MAX)
}

fn monotonic_seconds() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::atomic::Ordering;

    use super::*;
    use crate::engine::armed_log::tests::{broken, machine};

    fn wanted(calc_time: i64) -> CalcDirtyRate {
        CalcDirtyRate {
            calc_time,
            calc_time_unit: TimeUnit::Second,
            sample_pages: None,
            mode: DirtyRateMode::PageSampling,
        }
    }

    #[test]
    fn times_and_pages_out_of_range_are_refused() {
        assert_eq!(check(wanted(1)), Ok((1000, Some(512))));
        for seconds in [0, -1, 61, i64::MAX, i64::MIN] {
            let error = check(wanted(seconds)).unwrap_err();
            assert!(error.desc.contains("`calc-time`"), "{}", error.desc);
        }
        let ms = CalcDirtyRate {
            calc_time_unit: TimeUnit::Millisecond,
            ..wanted(50)
        };
        assert_eq!(check(ms), Ok((50, Some(512))));
        for pages in [127, 16_385, -1] {
            let bad = CalcDirtyRate {
                sample_pages: Some(pages),
                ..wanted(1)
            };
            assert!(check(bad).unwrap_err().desc.contains("`sample-pages`"));
        }
        let bitmap = CalcDirtyRate {
            mode: DirtyRateMode::DirtyBitmap,
            ..wanted(1)
        };
        assert_eq!(check(bitmap), Ok((1000, None)));
        let both = CalcDirtyRate {
            sample_pages: Some(512),
            ..bitmap
        };
        assert!(check(both).is_err());
        let ring = CalcDirtyRate {
            mode: DirtyRateMode::DirtyRing,
            ..wanted(1)
        };
        assert!(check(ring).unwrap_err().desc.contains("dirty-ring"));
    }

    #[test]
    fn the_log_of_a_measurement_that_panics_is_stopped() {
        let (log, stops) = broken();
        let (machine, clock) = (machine(), Clock::new());
        let ending = || end(machine.as_ref(), Probe::Log(log, clock.now()), clock);
        assert!(catch_unwind(AssertUnwindSafe(ending)).is_err());
        assert_eq!(stops.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn rates_are_mebibytes_per_second_of_the_time_it_really_took() {
        assert_eq!(mib_per_sec(256, 1_000_000), 1);
        assert_eq!(mib_per_sec(25_600, 500_000), 200);
        assert_eq!(mib_per_sec(255, 1_000_000), 0);
        assert_eq!(mib_per_sec(u64::MAX, 0), u64::MAX);
    }
}
