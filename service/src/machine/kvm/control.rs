//! Who may run: stops, parks and starts the vCPU threads.
//!
//! One mutex holds what is wanted and how many threads are parked. A thread leaves its parking place only after it has seen, under
//! the mutex, that running is wanted; it clears its kick there too. One that has not begun to run is as good as parked. A pause sets what
//! is wanted, then kicks, so a thread that has not entered the guest yet is turned back at the entry, and none is missed. All threads are
//! kicked before any is waited for.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::machine::{MachineEvent, throttle};

/// What the vCPU threads shall do.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Wanted {
    Run,
    Stop,
    Quit,
}

/// What a parked thread was woken for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Woken {
    /// Enter the guest.
    Run,
    /// End the thread.
    Quit,
}

/// Shared by the machine and its vCPU threads.
#[derive(Debug)]
pub(super) struct Control {
    state: Mutex<State>,
    changed: Condvar,
    /// Copy of `wanted != Run` that is cheap to look at after every exit.
    stop: AtomicBool,
}

#[derive(Debug)]
struct State {
    wanted: Wanted,
    threads: u32,
    /// Threads that have not begun yet. They count as parked: nobody leads into the guest but through the parking place.
    unborn: u32,
    parked: u32,
    /// Why the guest has ended, if it has.
    ended: Option<String>,
    /// Share of time for which the vCPUs rest, in percent.
    throttle_percent: u8,
}

impl State {
    fn may_run(&self) -> Result<(), String> {
        self.ended.clone().map_or(Ok(()), Err)
    }
}

impl Control {
    /// For `threads` vCPU threads, which shall not run yet.
    pub(super) fn new(threads: u32) -> Self {
        Self {
            state: Mutex::new(State {
                wanted: Wanted::Stop,
                threads,
                unborn: threads,
                parked: 0,
                ended: None,
                throttle_percent: 0,
            }),
            changed: Condvar::new(),
            stop: AtomicBool::new(true),
        }
    }

    /// Whether the calling vCPU thread shall leave the guest and park.
    pub(super) fn stop_wanted(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    /// The calling thread begins, and parks next.
    pub(super) fn born(&self) {
        let mut state = self.lock();
        state.unborn = state.unborn.saturating_sub(1);
    }

    /// Parks the calling thread until it shall run or end. `unkick` is called before it is let go, while no pause can come between.
    pub(super) fn park(&self, unkick: impl FnOnce()) -> Woken {
        let mut state = self.lock();
        state.parked += 1;
        self.changed.notify_all();
        loop {
            match state.wanted {
                Wanted::Run => {
                    state.parked -= 1;
                    unkick();
                    return Woken::Run;
                }
                Wanted::Quit => return Woken::Quit,
                Wanted::Stop => state = self.wait(state),
            }
        }
    }

    /// Sleeps for `time`, or until a stop is wanted.
    pub(super) fn sleep(&self, time: Duration) {
        let Some(end) = Instant::now().checked_add(time) else {
            return;
        };
        let mut state = self.lock();
        while state.wanted == Wanted::Run {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            state = self.wait_at_most(state, left);
        }
    }

    /// From now on vCPUs rest for `percent` of the time. Those that rest longer than that go on.
    pub(super) fn set_throttle(&self, percent: u8) {
        self.lock().throttle_percent = percent;
        self.changed.notify_all();
    }

    /// For the thread that tells vCPUs to rest: waits for `time`, or until the throttle is another than `percent`. Returns the throttle,
    /// or `None` if the threads shall end.
    pub(super) fn wait_throttle(&self, percent: u8, time: Duration) -> Option<u8> {
        let end = Instant::now().checked_add(time);
        let mut state = self.lock();
        while state.wanted != Wanted::Quit && state.throttle_percent == percent {
            let left = end.map_or(Duration::MAX, |end| {
                end.saturating_duration_since(Instant::now())
            });
            if left.is_zero() {
                break;
            }
            state = if percent == 0 {
                self.wait(state)
            } else {
                self.wait_at_most(state, left)
            };
        }
        (state.wanted != Wanted::Quit).then_some(state.throttle_percent)
    }

    /// For a vCPU thread that was kicked and is not to stop: rests, if it is due to, and lets the vCPU into the guest again by `unkick`,
    /// while no pause can come between.
    pub(super) fn rest(&self, due: bool, unkick: impl FnOnce()) {
        let began = Instant::now();
        let mut state = self.lock();
        while due && state.wanted == Wanted::Run {
            let left = throttle::rest(state.throttle_percent).saturating_sub(began.elapsed());
            if left.is_zero() {
                break;
            }
            state = self.wait_at_most(state, left);
        }
        if state.wanted == Wanted::Run {
            unkick();
        }
    }

    /// Wants a stop, calls `kick`, and waits until every thread is parked. False if that took longer than `deadline`.
    pub(super) fn stop_all(&self, kick: impl FnOnce(), deadline: Duration) -> bool {
        self.want_stop();
        kick();
        self.wait_all_parked(deadline)
    }

    /// Whether [`run_all`](Self::run_all) would let the threads run. While all are parked the answer does not change.
    ///
    /// # Errors
    /// Why the guest has ended, if it has.
    pub(super) fn may_run(&self) -> Result<(), String> {
        self.lock().may_run()
    }

    /// Lets all threads run.
    ///
    /// # Errors
    /// Why the guest has ended, if it has.
    pub(super) fn run_all(&self) -> Result<(), String> {
        let mut state = self.lock();
        state.may_run()?;
        if state.wanted == Wanted::Stop {
            state.wanted = Wanted::Run;
            self.stop.store(false, Ordering::SeqCst);
        }
        self.changed.notify_all();
        Ok(())
    }

    /// Ends all threads. The caller kicks and joins them.
    pub(super) fn quit(&self) {
        let mut state = self.lock();
        state.wanted = Wanted::Quit;
        self.stop.store(true, Ordering::SeqCst);
        self.changed.notify_all();
    }

    /// The calling vCPU thread reports the end of the guest. Returns true to the first thread that does: it shall kick the others
    /// and give the event out in [`park_ended`](Self::park_ended).
    pub(super) fn end(&self, event: &MachineEvent) -> bool {
        let mut state = self.lock();
        let first = state.ended.is_none();
        if first {
            state.ended = Some(match event {
                MachineEvent::GuestExit(value) => format!("it wrote {value} to the exit port"),
                MachineEvent::VcpuFailed(text) => text.clone(),
            });
        }
        if state.wanted == Wanted::Run {
            state.wanted = Wanted::Stop;
            self.stop.store(true, Ordering::SeqCst);
        }
        self.changed.notify_all();
        first
    }

    /// Parks the calling thread for good, after the end of the guest. Once all threads are parked, `report` is called, without the mutex,
    /// so that it may ask for a pause.
    pub(super) fn park_ended(&self, report: Option<impl FnOnce()>) {
        let mut state = self.lock();
        state.parked += 1;
        self.changed.notify_all();
        if let Some(report) = report {
            while state.parked < state.threads && state.wanted != Wanted::Quit {
                state = self.wait(state);
            }
            let all_parked = state.parked == state.threads;
            drop(state);
            if all_parked {
                report();
            }
            state = self.lock();
        }
        while state.wanted != Wanted::Quit {
            state = self.wait(state);
        }
    }

    fn want_stop(&self) {
        let mut state = self.lock();
        if state.wanted == Wanted::Run {
            state.wanted = Wanted::Stop;
            self.stop.store(true, Ordering::SeqCst);
        }
        self.changed.notify_all();
    }

    fn wait_all_parked(&self, deadline: Duration) -> bool {
        let Some(end) = Instant::now().checked_add(deadline) else {
            return false;
        };
        let mut state = self.lock();
        while state.parked + state.unborn < state.threads {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self.wait_at_most(state, left);
        }
        true
    }

    fn wait_at_most<'a>(
        &self,
        state: MutexGuard<'a, State>,
        time: Duration,
    ) -> MutexGuard<'a, State> {
        self.changed
            .wait_timeout(state, time)
            .unwrap_or_else(PoisonError::into_inner)
            .0
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed
            .wait(state)
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// A thread that panicked holds no half-made state: every change is one assignment.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
