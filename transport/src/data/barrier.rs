//! Where the target's threads meet at the end of a round.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::DataError;
use crate::wire::WireError;
use crate::wire::ram::{RoundCounts, RoundEnd};

/// Meeting point of all connections of a receiver. Nobody goes on to the next round before all have ended this one.
#[derive(Debug)]
pub(crate) struct RoundBarrier {
    connections: usize,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    arrived: usize,
    rounds_done: u64,
    /// What the first to arrive in this round says.
    last: bool,
    counts: RoundCounts,
    stopped: bool,
}

impl RoundBarrier {
    pub(crate) fn new(connections: usize) -> Self {
        Self {
            connections,
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// Waits until all connections have ended the round. The last to come runs `complete` with the counts of all before it lets the
    /// others go. Returns whether the next round may begin: not after a stop.
    ///
    /// # Errors
    /// When connections disagree on whether this was the last round, or what `complete` says. The others are not let go then:
    /// [`stop`](Self::stop) has to follow.
    pub(crate) fn arrive(
        &self,
        end: &RoundEnd,
        complete: impl FnOnce(RoundCounts) -> Result<(), DataError>,
    ) -> Result<bool, DataError> {
        let mut state = self.lock();
        if state.arrived == 0 {
            state.last = end.last;
            state.counts = RoundCounts::default();
        } else if state.last != end.last {
            return Err(DataError::Peer(WireError::Value {
                field: "last round",
                value: end.last.into(),
            }));
        }
        state.arrived += 1;
        state.counts.add(&end.counts);
        if state.arrived == self.connections {
            let counts = state.counts;
            // Not under the lock: `complete` calls the engine, which may stop us.
            drop(state);
            complete(counts)?;
            state = self.lock();
            state.arrived = 0;
            state.rounds_done += 1;
            self.changed.notify_all();
            return Ok(!state.stopped);
        }
        let round = state.rounds_done;
        let state = self
            .changed
            .wait_while(state, |state| state.rounds_done == round && !state.stopped)
            .unwrap_or_else(PoisonError::into_inner);
        Ok(!state.stopped)
    }

    /// Lets everybody go, for good.
    pub(crate) fn stop(&self) {
        self.lock().stopped = true;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change is complete when the lock is released; a panic elsewhere does not spoil it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
