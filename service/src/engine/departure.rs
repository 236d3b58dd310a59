//! The engine's part in an outgoing migration: what concerns the guest, the operator and the record.

use std::sync::Arc;

use vmferry_transport::proto::{MigrationStatus, Outcome, SourceJob};

use super::data_links::end_sender;
use super::event::{Event, SourceEvent};
use super::guest::{Guest, StoppedGuest};
use super::info::{Record, unresolved};
use super::jobs::PANICKED;
use super::outgoing::{Outgoing, OutgoingAction, chain};
use super::ownership::{resumed_perhaps, start_guest, stop_again, take_back};
use super::{Engine, passthrough};
use crate::qmp::QmpEvent;
use crate::qmp::schema::RunState;

impl Engine {
    /// Something happened to the outgoing attempt. News of an attempt that is over are dropped.
    pub(super) fn source_event(&mut self, attempt: u64, event: SourceEvent) {
        if self
            .outgoing
            .as_ref()
            .is_none_or(|outgoing| outgoing.attempt() != attempt)
        {
            // Its threads are waited for elsewhere.
            if let SourceEvent::DataConnected(sender) = event {
                end_sender(sender, None);
            }
            return;
        }
        match &event {
            // Unless the operator had stopped it before.
            SourceEvent::Stopped(..) if self.runstate != RunState::FinishMigrate => {
                self.set_runstate(RunState::FinishMigrate);
                self.emit(QmpEvent::stop());
            }
            SourceEvent::JobFailed(SourceJob::StopGuest, _) => self.guest = Guest::Running,
            SourceEvent::Resumed(Ok(())) => {
                self.guest = Guest::Running;
                self.set_runstate(RunState::Running);
                self.emit(QmpEvent::resume());
            }
            _ => {}
        }
        if let Some(outgoing) = &mut self.outgoing {
            outgoing.handle(event);
        }
    }

    /// Does what concerns more than the attempt.
    pub(super) fn outgoing_action(&mut self, action: OutgoingAction) {
        match action {
            OutgoingAction::StatusChanged(status) => {
                self.observe_outgoing(status);
                if status == MigrationStatus::Completed {
                    // Cleanup goes on for a moment; nobody may see a completed migration whose guest still seems to be on its way.
                    self.set_runstate(RunState::Postmigrate);
                    if self.outgoing.as_ref().is_some_and(Outgoing::is_in_place) {
                        self.leave_house();
                    }
                }
                if self.capabilities.events {
                    self.emit(QmpEvent::migration(status));
                }
            }
            OutgoingAction::PassStarted(pass) => {
                if self.capabilities.events {
                    self.emit(QmpEvent::migration_pass(pass));
                }
            }
            OutgoingAction::StopGuest => {
                if let Some(outgoing) = &mut self.outgoing {
                    outgoing.note_guest_stall();
                }
                self.stop_for_switchover();
            }
            OutgoingAction::ResumeGuest(stopped) => {
                let (events, machine) = (self.events.clone(), Arc::clone(&self.machine));
                let (attempt, disks) = (self.attempts, Arc::clone(&self.disks));
                let (ours, report) = (Arc::clone(&machine), events.clone());
                let instead = move || {
                    let resumed = SourceEvent::Resumed(resumed_perhaps(ours.as_ref()));
                    // The engine ends only with the process.
                    let _ = report.send(Event::Source(attempt, resumed));
                };
                self.jobs.run_owing(instead, move || {
                    let result = start_guest(machine.as_ref(), &disks, stopped);
                    // The engine ends only with the process.
                    let _ = events.send(Event::Source(attempt, SourceEvent::Resumed(result)));
                });
            }
            OutgoingAction::Unresolved => {
                let in_place = self.outgoing.as_ref().is_some_and(Outgoing::is_in_place);
                let text = unresolved(in_place);
                tracing::error!("{text}");
                self.emit(QmpEvent::now(
                    "x-MIGRATION_UNRESOLVED",
                    serde_json::json!({ "desc": text }),
                ));
                if self.ending.is_some() {
                    self.abandon_outgoing();
                }
            }
            OutgoingAction::Exec => {
                if let Some(outgoing) = &mut self.outgoing {
                    outgoing.exec();
                }
            }
            OutgoingAction::Finished(outcome) => self.finish_outgoing(outcome),
        }
    }

    /// The guest may have been stopped by the operator meanwhile; then its proof is here already.
    pub(super) fn stop_for_switchover(&mut self) {
        match std::mem::replace(&mut self.guest, Guest::Away) {
            Guest::Stopped(stopped) => {
                self.set_runstate(RunState::FinishMigrate);
                self.stop_devices_to_leave(Some(stopped));
            }
            // The operator's stop or cont is under way; its end brings us back here.
            Guest::Away => self.switchover_waits = true,
            Guest::Running => self.stop_devices_to_leave(None),
        }
    }

    /// Stops the vCPUs, unless they are, and then the devices.
    fn stop_devices_to_leave(&self, stopped: Option<StoppedGuest>) {
        let (events, machine) = (self.events.clone(), Arc::clone(&self.machine));
        let attempt = self.attempts;
        // In place the devices stay: who must make them let go is told SETUP.
        let stay = self.outgoing.as_ref().is_some_and(Outgoing::is_in_place);
        let (ours, report) = (Arc::clone(&machine), events.clone());
        let instead = move || {
            let event = match stop_again(ours.as_ref()) {
                Ok(stopped) => SourceEvent::Stopped(stopped, Err(PANICKED.to_owned())),
                Err(_) => SourceEvent::JobFailed(SourceJob::StopGuest, PANICKED.to_owned()),
            };
            // The engine ends only with the process.
            let _ = report.send(Event::Source(attempt, event));
        };
        self.jobs.run_owing(instead, move || {
            let pause = || machine.pause().map(StoppedGuest::new);
            let event = match stopped.map_or_else(pause, Ok) {
                Ok(stopped) => {
                    let devices = match stay {
                        true => Ok(()),
                        false => passthrough::stop_to_leave(machine.as_ref()),
                    };
                    SourceEvent::Stopped(stopped, devices.map_err(|error| chain(&error)))
                }
                Err(error) => SourceEvent::JobFailed(SourceJob::StopGuest, chain(&error)),
            };
            // The engine ends only with the process.
            let _ = events.send(Event::Source(attempt, event));
        });
    }

    fn finish_outgoing(&mut self, outcome: Outcome<StoppedGuest>) {
        let Some(outgoing) = self.outgoing.take() else {
            return;
        };
        let error = match &outcome {
            Outcome::Completed(_) => None,
            Outcome::Failed { reason, .. } => Some(reason.to_string()),
        };
        match outcome {
            Outcome::Completed(stopped) => {
                self.guest = Guest::Stopped(stopped);
            }
            Outcome::Failed {
                stopped: Some(stopped),
                ..
            } => {
                self.guest = Guest::Stopped(stopped);
                self.set_runstate(RunState::Paused);
                let disks = Arc::clone(&self.disks);
                self.jobs.run(move || take_back(&disks));
            }
            Outcome::Failed { stopped: None, .. } => {}
        }
        match &error {
            None => {}
            Some(_) if outgoing.core().status() == MigrationStatus::Cancelled => {
                tracing::info!("migration cancelled, the guest is still here");
            }
            Some(error) => tracing::error!(error, "migration failed, the guest is still here"),
        }
        self.observe_outgoing_end(&outgoing, error.as_deref());
        self.record = Some(Record::of(&outgoing, error));
        for reply in std::mem::take(&mut self.hashes_wanted) {
            self.ram_hash(reply);
        }
    }
}
