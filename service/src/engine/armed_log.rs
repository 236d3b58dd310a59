//! The dirty log of an attempt, from its start to its end, with what is asked of VFIO devices at the same moments. Called on the job
//! thread.

use std::error::Error;
use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use vmferry_transport::data::RoundWork;
use vmferry_transport::memory::extents::Extents;
use vmferry_transport::memory::{DirtyLog, DirtyMap, WriteProtector};
use vmferry_transport::proto::FirstRound;
use vmferry_transport::units::PageCount;

use super::clock::micros;
use super::outgoing::chain;
use super::passthrough::{self, Sizes, Sources};
use crate::machine::Machine;

/// A dirty log that runs, with the pages it has reported and no round has sent.
pub(super) struct ArmedLog {
    log: Box<dyn DirtyLog>,
}

impl ArmedLog {
    /// Has KVM forget pages just before they are read.
    pub(super) fn protector(&self) -> Option<Arc<dyn WriteProtector>> {
        self.log.protector()
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
            stop_armed(armed);
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
    let fetched = armed.log.fetch(&mut dirty).map_err(|error| chain(&error));
    let took_us = micros(began.elapsed());
    let sizes = fetched.and_then(|()| match stopped {
        true => Ok(Sizes::default()),
        false => passthrough::sizes(machine).map_err(|error| chain(&error)),
    });
    match sizes {
        Ok(sizes) => Ok((armed, dirty, took_us, sizes)),
        Err(error) => {
            stop_armed(armed);
            Err(error)
        }
    }
}

/// Starts the log first and looks which pages exist second: a page that comes into being in between is in the log. A log that has looked
/// itself, before it was ready, saves looking at everything: only what were holes then may have changed.
fn arm_log(machine: &dyn Machine) -> Result<(ArmedLog, RoundWork, FirstRound), String> {
    let mut log = machine.dirty_log().map_err(|error| chain(&error))?;
    log.start().map_err(|error| chain(&error))?;
    let looked = log.take_extents();
    let armed = ArmedLog { log };
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
            stop_armed(armed);
            Err(chain(&error))
        }
    }
}

pub(super) fn stop_armed(mut armed: ArmedLog) {
    if let Err(error) = armed.log.stop() {
        tracing::warn!(
            error = &error as &dyn Error,
            "dirty log left running, the guest may be slow"
        );
    }
}
