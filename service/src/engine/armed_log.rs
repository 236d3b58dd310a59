//! The dirty log of an attempt or a measurement, from its start to its end, and what an attempt asks of VFIO devices at the same moments.
//! Called on the job thread.

use std::error::Error;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use vmferry_transport::data::RoundWork;
use vmferry_transport::memory::extents::Extents;
use vmferry_transport::memory::{DirtyLog, DirtyLogError, DirtyMap, WriteProtector};
use vmferry_transport::proto::FirstRound;
use vmferry_transport::units::PageCount;

use super::clock::micros;
use super::outgoing::chain;
use super::passthrough::{self, Sizes, Sources};
use crate::machine::Machine;

/// A dirty log that runs. One that a job takes with it into a panic is stopped, because nobody else can any more and it slows the guest.
///
/// Otherwise its end is [`stop`](Self::stop), and not to be dropped: who drops one does not know whether the next log has begun, which
/// would be switched off with it.
pub(super) struct ArmedLog {
    log: Box<dyn DirtyLog>,
}

impl ArmedLog {
    /// Starts it.
    ///
    /// # Errors
    /// It does not start.
    pub(super) fn start(log: Box<dyn DirtyLog>) -> Result<Self, DirtyLogError> {
        let mut armed = Self { log };
        armed.log.start()?;
        Ok(armed)
    }

    /// Adds what it has found to `dirty`.
    ///
    /// # Errors
    /// As [`DirtyLog::fetch`].
    pub(super) fn fetch(&mut self, dirty: &mut DirtyMap) -> Result<(), DirtyLogError> {
        self.log.fetch(dirty)
    }

    /// Ends it.
    pub(super) fn stop(mut self) {
        if let Err(error) = self.log.stop() {
            tracing::warn!(
                error = &error as &dyn Error,
                "dirty log left running, the guest may be slow"
            );
        }
    }

    /// Has KVM forget pages just before they are read.
    pub(super) fn protector(&self) -> Option<Arc<dyn WriteProtector>> {
        self.log.protector()
    }
}

impl Drop for ArmedLog {
    fn drop(&mut self) {
        if !thread::panicking() {
            return;
        }
        let stopped = catch_unwind(AssertUnwindSafe(|| self.log.stop()));
        if !matches!(stopped, Ok(Ok(()))) {
            tracing::warn!("the dirty log of a job that panicked is left running");
        }
    }
}

impl fmt::Debug for ArmedLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ArmedLog").field(&self.log.name()).finish()
    }
}

/// Starts the logs, has devices begin to give their state, and finds what the first round sends.
pub(super) fn arm(
    machine: &dyn Machine,
) -> Result<(ArmedLog, RoundWork, FirstRound, Sources), String> {
    let (armed, work, found) = arm_log(machine)?;
    match passthrough::begin(machine) {
        Ok(devices) => Ok((armed, work, found, devices)),
        Err(error) => {
            armed.stop();
            Err(chain(&error))
        }
    }
}

/// Adds what the log has found to `dirty`, and asks how much the devices have to give: unless they have stopped, which leaves nothing to
/// be predicted. Returns how long the log took, in microseconds. After an error the log is off.
pub(super) fn fetch(
    mut armed: ArmedLog,
    mut dirty: DirtyMap,
    machine: &dyn Machine,
    stopped: bool,
) -> Result<(ArmedLog, DirtyMap, u64, Sizes), String> {
    let began = Instant::now();
    let fetched = armed.fetch(&mut dirty).map_err(|error| chain(&error));
    let took_us = micros(began.elapsed());
    let sizes = fetched.and_then(|()| match stopped {
        true => Ok(Sizes::default()),
        false => passthrough::sizes(machine).map_err(|error| chain(&error)),
    });
    match sizes {
        Ok(sizes) => Ok((armed, dirty, took_us, sizes)),
        Err(error) => {
            armed.stop();
            Err(error)
        }
    }
}

/// Starts the log first and looks which pages exist second: a page that comes into being in between is in the log. A log that has looked
/// itself, before it was ready, saves looking at everything: only what were holes then may have changed.
fn arm_log(machine: &dyn Machine) -> Result<(ArmedLog, RoundWork, FirstRound), String> {
    let log = machine.dirty_log().map_err(|error| chain(&error))?;
    let mut armed = ArmedLog::start(log).map_err(|error| chain(&error))?;
    let looked = armed.log.take_extents();
    let extents = match looked {
        Some(mut extents) => extents.look_again(machine.ram()).map(|()| extents),
        None => Extents::of(machine.ram()),
    };
    match extents {
        Ok(extents) => {
            let holes = PageCount(extents.holes.iter().map(|run| run.count.0).sum());
            let found = FirstRound {
                present: extents.data_pages(),
                holes,
            };
            Ok((armed, RoundWork::all(extents), found))
        }
        Err(error) => {
            armed.stop();
            Err(chain(&error))
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;
    use crate::engine::rehearsal::tests::config;
    use crate::machine::{self, Given};

    /// Counts its stops, and panics at each of them and whenever it is fetched.
    struct Broken(Arc<AtomicU32>);

    impl DirtyLog for Broken {
        fn name(&self) -> &'static str {
            "broken"
        }

        fn start(&mut self) -> Result<(), DirtyLogError> {
            Ok(())
        }

        fn take_extents(&mut self) -> Option<Extents> {
            None
        }

        fn fetch(&mut self, _: &mut DirtyMap) -> Result<(), DirtyLogError> {
            panic!("on purpose")
        }

        fn protector(&self) -> Option<Arc<dyn WriteProtector>> {
            None
        }

        fn stop(&mut self) -> Result<(), DirtyLogError> {
            self.0.fetch_add(1, Ordering::SeqCst);
            assert!(!thread::panicking(), "on purpose too");
            Ok(())
        }
    }

    /// A log that runs, and how often it was stopped.
    pub(in crate::engine) fn broken() -> (ArmedLog, Arc<AtomicU32>) {
        let stops = Arc::new(AtomicU32::new(0));
        let log = ArmedLog::start(Box::new(Broken(Arc::clone(&stops)))).unwrap();
        (log, stops)
    }

    pub(in crate::engine) fn machine() -> Arc<dyn Machine> {
        let config = config(&[]);
        let (given, nobody) = (None::<Given>, Arc::new(|_| {}));
        machine::build(&config.machine, given, Vec::new(), config.accel, nobody).unwrap()
    }

    #[test]
    fn a_log_is_stopped_once_by_whoever_stops_it_or_by_a_panic_and_not_when_it_is_dropped_late() {
        let machine = machine();
        let (log, stops) = broken();
        let fetching = || fetch(log, DirtyMap::default(), machine.as_ref(), true);
        assert!(catch_unwind(AssertUnwindSafe(fetching)).is_err());
        assert_eq!(stops.load(Ordering::SeqCst), 1);

        let (log, stops) = broken();
        log.stop();
        assert_eq!(stops.load(Ordering::SeqCst), 1);

        let (log, stops) = broken();
        drop(log);
        assert_eq!(stops.load(Ordering::SeqCst), 0);
    }
}
