//! Stops and starts vCPU threads.
//!
//! ```text
//!           resume                    stop asked, seen between two pages
//! parked ------------> running ------------------------------------------> parked
//! ```
//!
//! A vCPU counts as parked from the moment it has put its registers down until it has seen the command to run, both under one lock.
//! So a resume that is followed at once by a stop may never have let a vCPU go, and "all parked" is true without waiting for it.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::machine::{MachineEvent, throttle};

/// Longest time a vCPU may take to park. It looks at the command between two pages, so only a host in distress comes near.
pub(super) const PARK_MAX: Duration = Duration::from_secs(10);

/// What the vCPUs shall do.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Command {
    Run,
    Stop,
    Quit,
}

/// What a vCPU learns when it leaves the parking place.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Leave {
    /// Take the registers and run.
    Run,
    /// End the thread.
    Quit,
}

/// The guest cannot run any more, for this reason.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Ended(pub(super) String);

#[derive(Debug)]
struct Inner {
    command: Command,
    parked: u32,
    ended: Option<Ended>,
    /// To be reported once all vCPUs are parked.
    event: Option<MachineEvent>,
}

impl Inner {
    fn may_run(&self) -> Result<(), Ended> {
        self.ended.clone().map_or(Ok(()), Err)
    }
}

/// Where vCPU threads stop. Built with the command to stop and no vCPU parked.
#[derive(Debug)]
pub(super) struct Gate {
    vcpus: u32,
    /// Whether the command is another one than to run. A hint that needs no lock; the command itself decides.
    leave_guest: AtomicBool,
    /// Share of time for which vCPUs rest, in percent.
    throttle_percent: AtomicU8,
    inner: Mutex<Inner>,
    command_changed: Condvar,
    vcpu_parked: Condvar,
}

impl Gate {
    /// A gate for so many vCPUs.
    pub(super) fn new(vcpus: u32) -> Self {
        Self {
            vcpus,
            leave_guest: AtomicBool::new(true),
            throttle_percent: AtomicU8::new(0),
            inner: Mutex::new(Inner {
                command: Command::Stop,
                parked: 0,
                ended: None,
                event: None,
            }),
            command_changed: Condvar::new(),
            vcpu_parked: Condvar::new(),
        }
    }

    /// The lock is only held for assignments, so a thread that panicked elsewhere left nothing half-done behind it.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn command(&self, inner: &mut Inner, command: Command) {
        inner.command = command;
        self.leave_guest
            .store(command != Command::Run, Ordering::Release);
        self.command_changed.notify_all();
    }

    /// For a vCPU, between two pages: whether it has to park.
    pub(super) fn must_leave_guest(&self) -> bool {
        self.leave_guest.load(Ordering::Acquire)
    }

    /// For a vCPU that has put its registers down: waits until it may run. `report` gets the event that made all vCPUs stop, from
    /// the last one that parks.
    pub(super) fn park(&self, report: impl FnOnce(MachineEvent)) -> Leave {
        let mut inner = self.lock();
        inner.parked += 1;
        if inner.parked == self.vcpus
            && let Some(event) = inner.event.take()
        {
            drop(inner);
            report(event);
            inner = self.lock();
        }
        self.vcpu_parked.notify_all();
        loop {
            match inner.command {
                Command::Stop => {
                    inner = self
                        .command_changed
                        .wait(inner)
                        .unwrap_or_else(PoisonError::into_inner);
                }
                Command::Run => {
                    inner.parked -= 1;
                    return Leave::Run;
                }
                Command::Quit => return Leave::Quit,
            }
        }
    }

    /// Makes vCPUs rest for `percent` of the time. One that rests already looks at its new share at once.
    pub(super) fn set_throttle(&self, percent: u8) {
        // Under the lock, or one that is about to rest could miss it.
        let _inner = self.lock();
        self.throttle_percent.store(percent, Ordering::SeqCst);
        self.command_changed.notify_all();
    }

    /// Whether vCPUs have to rest between slices.
    pub(super) fn is_throttled(&self) -> bool {
        self.throttle_percent.load(Ordering::Relaxed) > 0
    }

    /// For a vCPU whose slice is over: rests, or until it has to park.
    pub(super) fn rest(&self) {
        let began = Instant::now();
        let mut inner = self.lock();
        while inner.command == Command::Run {
            let percent = self.throttle_percent.load(Ordering::SeqCst);
            let left = throttle::rest(percent).saturating_sub(began.elapsed());
            if left.is_zero() {
                return;
            }
            inner = self
                .command_changed
                .wait_timeout(inner, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// For a vCPU: sleeps for `duration`, or until it has to park, whichever comes first.
    pub(super) fn sleep(&self, duration: Duration) {
        let until = Instant::now() + duration;
        let mut inner = self.lock();
        while inner.command == Command::Run {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            inner = self
                .command_changed
                .wait_timeout(inner, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// For a vCPU that cannot go on: stops all for good. The first reason stays, and only its event is reported.
    pub(super) fn end(&self, reason: &str, event: MachineEvent) {
        let mut inner = self.lock();
        if inner.ended.is_none() {
            inner.ended = Some(Ended(reason.to_owned()));
            inner.event = Some(event);
        }
        if inner.command == Command::Run {
            self.command(&mut inner, Command::Stop);
        }
    }

    /// Stops all vCPUs and waits until they are parked. If one does not within `patience`, all run again as before.
    pub(super) fn stop(&self, patience: Duration) -> Result<(), ParkTimeout> {
        let mut inner = self.lock();
        let before = inner.command;
        if before == Command::Run {
            self.command(&mut inner, Command::Stop);
        }
        let (mut inner, _) = self
            .vcpu_parked
            .wait_timeout_while(inner, patience, |inner| inner.parked < self.vcpus)
            .unwrap_or_else(PoisonError::into_inner);
        if inner.parked == self.vcpus {
            return Ok(());
        }
        let running = self.vcpus - inner.parked;
        if before == Command::Run && inner.ended.is_none() {
            self.command(&mut inner, Command::Run);
        }
        Err(ParkTimeout { running })
    }

    /// Whether [`resume`](Self::resume) would let the vCPUs run. While all are parked the answer does not change.
    pub(super) fn may_run(&self) -> Result<(), Ended> {
        self.lock().may_run()
    }

    /// Lets all vCPUs run, unless the guest has ended.
    pub(super) fn resume(&self) -> Result<(), Ended> {
        let mut inner = self.lock();
        inner.may_run()?;
        self.command(&mut inner, Command::Run);
        Ok(())
    }

    /// Makes all threads end, running or parked.
    pub(super) fn quit(&self) {
        self.command(&mut self.lock(), Command::Quit);
    }
}

/// Some vCPUs did not park in time.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct ParkTimeout {
    /// How many.
    pub(super) running: u32,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    /// Lets the threads of a test end, also when the test fails.
    struct QuitAtEnd<'a>(&'a Gate);

    impl Drop for QuitAtEnd<'_> {
        fn drop(&mut self) {
            self.0.quit();
        }
    }

    fn parked_until_quit(gate: &Gate) {
        assert_eq!(gate.park(|event| panic!("{event:?}")), Leave::Quit);
    }

    #[test]
    fn a_vcpu_that_does_not_park_fails_the_stop_and_all_run_on() {
        let gate = Gate::new(2);
        gate.resume().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // One parks when told and is let go again; the other is stuck somewhere.
                while !gate.must_leave_guest() {
                    std::thread::yield_now();
                }
                while gate.park(|event| panic!("{event:?}")) == Leave::Run {
                    gate.sleep(PARK_MAX);
                }
            });
            let _quit = QuitAtEnd(&gate);
            let timeout = gate.stop(Duration::from_millis(50)).unwrap_err();
            assert!((1..=2).contains(&timeout.running));
            assert!(!gate.must_leave_guest(), "they run as before");
            // Nor does a stop that fails while they are stopped start them.
            gate.end("test", MachineEvent::GuestExit(1));
            gate.stop(Duration::from_millis(1)).unwrap_err();
            assert!(gate.must_leave_guest());
        });
    }

    #[test]
    fn the_first_end_counts_and_is_reported_once_all_are_parked() {
        let gate = Gate::new(2);
        gate.resume().unwrap();
        gate.end("first", MachineEvent::GuestExit(1));
        gate.end("second", MachineEvent::GuestExit(2));
        std::thread::scope(|scope| {
            scope.spawn(|| parked_until_quit(&gate));
            let _quit = QuitAtEnd(&gate);
            while gate.lock().parked == 0 {
                std::thread::yield_now();
            }
            let seen = RefCell::new(Vec::new());
            gate_last(&gate, &seen);
            assert_eq!(*seen.borrow(), [MachineEvent::GuestExit(1)]);
            assert_eq!(gate.resume(), Err(Ended("first".to_owned())));
        });
    }

    /// Parks as the last vCPU and, once it has reported, makes all quit.
    fn gate_last(gate: &Gate, seen: &RefCell<Vec<MachineEvent>>) {
        let left = gate.park(|event| {
            seen.borrow_mut().push(event);
            gate.quit();
        });
        assert_eq!(left, Leave::Quit);
    }
}
