//! What blocks at the target, on the job thread: readying devices, loading state, starting the guest. What each finds goes to
//! [`Incoming::handle`](super::Incoming::handle), or to the engine where it holds the guest.

use std::sync::Arc;
use std::time::Instant;

use vmferry_devices::DeviceError;
use vmferry_transport::memory::{hash, populate};
use vmferry_transport::proto::Loaded;
use vmferry_transport::wire::Section;
use vmferry_transport::wire::frame::Verification;

use super::Incoming;
use crate::engine::clock::micros;
use crate::engine::event::{Event, TargetEvent};
use crate::engine::guest::StoppedGuest;
use crate::engine::jobs::{JobThread, PANICKED};
use crate::engine::ownership::start_arrived_guest;
use crate::engine::passthrough::{self, Sinks};
use crate::machine::disk::Disks;
use crate::machine::heirloom::DeviceFd;
use crate::machine::read_back::state_differences;
use crate::machine::{Machine, VcpusStopped};

impl Incoming {
    /// Queues the job that readies the devices for their streams.
    pub(in crate::engine) fn begin_load(&mut self, jobs: &JobThread) {
        if self.in_place {
            // They are what they are, and were or are at work without this program.
            return self.prepare(Sinks::new());
        }
        let (events, machine) = (self.events.clone(), Arc::clone(&self.machine));
        let failed = self.lost(|| TargetEvent::LoadBegun(Err(panicked())));
        jobs.run_owing(failed, move || {
            let begun = passthrough::begin_load(machine.as_ref());
            // The engine ends only with the process.
            let _ = events.send(Event::Target(TargetEvent::LoadBegun(begun)));
        });
    }

    /// What to say of a job that has panicked.
    pub(super) fn lost(
        &self,
        event: impl FnOnce() -> TargetEvent + Send + 'static,
    ) -> impl FnOnce() + Send + 'static {
        let events = self.events.clone();
        move || {
            // The engine ends only with the process.
            let _ = events.send(Event::Target(event()));
        }
    }

    /// Queues the job that loads the state; the proof comes back with the result.
    pub(in crate::engine) fn load(
        &mut self,
        jobs: &JobThread,
        stopped: StoppedGuest,
        fds: Vec<DeviceFd>,
        sections: Vec<Section>,
        verify: bool,
    ) {
        self.touched = true;
        let (events, machine) = (self.events.clone(), Arc::clone(&self.machine));
        // Without the proof: half of a guest must not even be stopped anew, which may fail and let it run.
        let failed = self.lost(|| TargetEvent::LoadedInto(Err(panicked())));
        jobs.run_owing(failed, move || {
            let proof = stopped.lend();
            let loaded = machine
                .take_over(&proof, fds)
                .and_then(|()| load(machine.as_ref(), &proof, &sections, verify));
            drop(proof);
            // The engine ends only with the process.
            let _ = events.send(Event::Target(TargetEvent::Loaded(stopped, loaded)));
        });
    }

    /// Queues the job that takes the disks and lets the guest run.
    pub(in crate::engine) fn start_guest(
        &self,
        jobs: &JobThread,
        disks: Arc<Disks>,
        stopped: StoppedGuest,
    ) {
        let (events, machine) = (self.events.clone(), Arc::clone(&self.machine));
        jobs.run_owing(self.lost(|| TargetEvent::StartLost), move || {
            let began = Instant::now();
            let started = start_arrived_guest(machine.as_ref(), &disks, stopped)
                .map(|()| micros(began.elapsed()));
            // The engine ends only with the process.
            let _ = events.send(Event::Target(TargetEvent::Started(started)));
        });
    }
}

fn load(
    machine: &dyn Machine,
    stopped: &VcpusStopped,
    sections: &[Section],
    verify: bool,
) -> Result<Loaded, DeviceError> {
    let host = |op: &str, source| DeviceError::Kernel {
        device: "ram".to_owned(),
        op: op.to_owned(),
        source,
    };
    let began = Instant::now();
    // First: what a device refuses must not have changed anything else.
    passthrough::finish_load(machine)?;
    machine.load(stopped, sections)?;
    let load_us = micros(began.elapsed());
    let verification = if verify {
        let began = Instant::now();
        let hash =
            hash::ram_hash(machine.ram()).map_err(|error| host("hashing guest memory", error))?;
        let differences = state_differences(machine, stopped, sections)?;
        Some(Verification {
            ram_hash: hash.hash,
            state_differences: differences.join("; "),
            took_us: micros(began.elapsed()),
        })
    } else {
        None
    };
    let populated_bytes = populate::populated_bytes(machine.ram())
        .map_err(|error| host("looking up populated memory", error))?;
    Ok(Loaded {
        load_us,
        populated_bytes,
        verification,
    })
}

fn panicked() -> DeviceError {
    DeviceError::Panicked {
        device: "machine".to_owned(),
        during: "a job".to_owned(),
        text: PANICKED.to_owned(),
    }
}
