//! `stop` and `cont`: the operator stops the guest and lets it run, unless a migration has the say.

use std::sync::Arc;

use serde_json::{Value, json};
use vmferry_transport::proto::Target;

use super::event::Event;
use super::guest::{Guest, StoppedGuest};
use super::incoming::Incoming;
use super::jobs::panicked;
use super::outgoing::chain;
use super::ownership::{StopError, resumed_perhaps, start_guest, stop_again, stop_guest};
use super::{Engine, Reply};
use crate::machine::ResumeError;
use crate::qmp::schema::RunState;
use crate::qmp::{QmpError, QmpEvent};

impl Engine {
    /// `stop`.
    pub(super) fn stop(&mut self, reply: Reply) {
        // While it is being started it is too late to say that it shall not be.
        let arrives = self.incoming.as_ref().map(Incoming::core);
        let starts = matches!(self.guest, Guest::Away) && arrives.is_some_and(Target::has_guest);
        if self.runstate == RunState::Inmigrate && !starts {
            self.autostart = false;
            answer(reply, Ok(json!({})));
            return;
        }
        match std::mem::replace(&mut self.guest, Guest::Away) {
            Guest::Running => {
                let (events, machine) = (self.events.clone(), Arc::clone(&self.machine));
                let (ours, report) = (Arc::clone(&machine), events.clone());
                let instead = move || {
                    let failed = StopError {
                        source: panicked(),
                        stopped: stop_again(ours.as_ref()).ok(),
                    };
                    // The engine ends only with the process.
                    let _ = report.send(Event::Stopped(Err(failed)));
                };
                self.jobs.run_owing(instead, move || {
                    // The engine ends only with the process.
                    let _ = events.send(Event::Stopped(stop_guest(machine.as_ref())));
                });
                self.waiting.push(reply);
            }
            Guest::Stopped(stopped) => {
                self.guest = Guest::Stopped(stopped);
                answer(reply, Ok(json!({})));
            }
            Guest::Away => answer(reply, Err(self.busy())),
        }
    }

    /// `cont`.
    pub(super) fn cont(&mut self, reply: Reply) {
        let refusal = match self.runstate {
            // Before anything else: half of a guest must not even seem to be startable.
            _ if self.incoming_is_lost() => {
                Some("the incoming migration has failed; this guest will never run here")
            }
            RunState::Inmigrate => {
                self.autostart = true;
                answer(reply, Ok(json!({})));
                return;
            }
            RunState::Postmigrate => Some(
                "the guest was handed over to the target; letting it run here too would make two of it",
            ),
            RunState::Shutdown => Some("the guest has ended"),
            RunState::InternalError => Some("the guest cannot go on; see the log"),
            _ => None,
        };
        if let Some(refusal) = refusal {
            answer(reply, Err(QmpError::generic(refusal)));
            return;
        }
        match self.guest {
            Guest::Running => answer(reply, Ok(json!({}))),
            Guest::Stopped(_) => {
                self.resume_guest();
                self.waiting.push(reply);
            }
            Guest::Away => answer(reply, Err(self.busy())),
        }
    }

    /// Lets a stopped guest run; the result comes as an event.
    pub(super) fn resume_guest(&mut self) {
        if let Guest::Stopped(stopped) = std::mem::replace(&mut self.guest, Guest::Away) {
            let (events, machine) = (self.events.clone(), Arc::clone(&self.machine));
            let disks = Arc::clone(&self.disks);
            let (ours, report) = (Arc::clone(&machine), events.clone());
            let instead = move || {
                // The engine ends only with the process.
                let _ = report.send(Event::Resumed(resumed_perhaps(ours.as_ref())));
            };
            self.jobs.run_owing(instead, move || {
                let started = start_guest(machine.as_ref(), &disks, stopped);
                // The engine ends only with the process.
                let _ = events.send(Event::Resumed(started));
            });
        }
    }

    /// A stop that the operator asked for is done.
    pub(super) fn stopped(&mut self, result: Result<StoppedGuest, StopError>) {
        let outcome = match result {
            Ok(stopped) => {
                self.guest = Guest::Stopped(stopped);
                self.set_runstate(RunState::Paused);
                self.emit(QmpEvent::stop());
                self.tell_migration(false);
                Ok(json!({}))
            }
            Err(StopError { source, stopped }) => {
                self.guest = match stopped {
                    None => Guest::Running,
                    Some(stopped) => {
                        self.set_runstate(RunState::Paused);
                        self.emit(QmpEvent::stop());
                        Guest::Stopped(stopped)
                    }
                };
                self.tell_migration(matches!(self.guest, Guest::Running));
                Err(QmpError::generic(chain(&source)))
            }
        };
        self.answer_waiting(&outcome);
    }

    /// A resume that the operator asked for is done.
    pub(super) fn resumed(&mut self, result: Result<(), ResumeError>) {
        let outcome = match result {
            Ok(()) => {
                self.guest = Guest::Running;
                self.set_runstate(RunState::Running);
                self.emit(QmpEvent::resume());
                self.tell_migration(true);
                Ok(json!({}))
            }
            Err(ResumeError { proof, source }) => {
                self.guest = Guest::Stopped(StoppedGuest::new(proof));
                let text = chain(&source);
                tracing::error!(error = text, "the guest could not be resumed");
                Err(QmpError::generic(text))
            }
        };
        self.answer_waiting(&outcome);
    }

    fn tell_migration(&mut self, runs: bool) {
        if let Some(outgoing) = &mut self.outgoing {
            outgoing.core_mut().set_guest_runs(runs);
        }
        if std::mem::take(&mut self.switchover_waits) {
            self.stop_for_switchover();
        }
    }

    fn answer_waiting(&mut self, outcome: &Result<Value, QmpError>) {
        for reply in self.waiting.drain(..) {
            answer(reply, outcome.clone());
        }
        if std::mem::take(&mut self.switchover_waits) {
            self.stop_for_switchover();
        }
    }

    fn incoming_is_lost(&self) -> bool {
        self.incoming
            .as_ref()
            .is_some_and(|incoming| incoming.core().error().is_some())
    }

    fn busy(&self) -> QmpError {
        QmpError::generic(match &self.outgoing {
            Some(outgoing) if outgoing.core().is_unresolved() => {
                "nobody knows whether the target runs the guest; find out, then say x-resolve"
            }
            Some(_) => "a migration is switching over; wait for its end or cancel it",
            None => "the guest is being stopped or started just now",
        })
    }
}

/// The client may be gone; then nobody is interested.
pub(super) fn answer(reply: Reply, outcome: Result<Value, QmpError>) {
    let _ = reply.send(outcome);
}
