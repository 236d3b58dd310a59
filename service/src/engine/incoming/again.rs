//! Whether there can be another attempt after one that has failed.

use std::sync::Arc;

use vmferry_transport::memory::populate;
use vmferry_transport::proto::TargetStatus;

use super::Incoming;
use crate::engine::event::{Event, TargetEvent};
use crate::engine::jobs::{JobThread, PANICKED};

impl Incoming {
    /// The guest's memory is in this process's file already, and stays there if its archive cannot be loaded: another try is welcome.
    pub(in crate::engine) fn memory_is_in_file(&mut self) {
        self.in_file = true;
    }

    /// Why there can be no other incoming migration in this process now; `None` if there can.
    pub(in crate::engine) fn why_not_again(&self) -> Option<&'static str> {
        if self.in_place && !self.in_file {
            Some("this process was started to take over one guest in place; use a new process")
        } else if self.core.status() != TargetStatus::Failed {
            Some("this VM listens for an incoming migration already")
        } else if self.touched {
            Some(
                "device state of the failed migration is in this machine already; use a new process",
            )
        } else if !self.emptied && !self.in_place {
            Some("the memory that the failed migration filled is still being emptied; try again")
        } else {
            None
        }
    }

    /// Begins to undo what a failed attempt has done, so that there can be another. Does nothing if that cannot be.
    pub(in crate::engine) fn start_over(&mut self, jobs: &JobThread) {
        self.stop_listening();
        if self.touched || self.in_place {
            return;
        }
        let (events, machine) = (self.events.clone(), Arc::clone(&self.machine));
        let failed = self.lost(|| TargetEvent::Emptied(Err(std::io::Error::other(PANICKED))));
        jobs.run_owing(failed, move || {
            let emptied = populate::empty(machine.ram());
            // The engine ends only with the process.
            let _ = events.send(Event::Target(TargetEvent::Emptied(emptied)));
        });
    }
}
