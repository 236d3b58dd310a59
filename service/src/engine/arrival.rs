//! The engine's part in an incoming migration: listening, the guest, and what becomes of the process when it fails.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vmferry_cpr::{CprError, envelope};
use vmferry_devices::notifier::Mode;
use vmferry_transport::control::Address;
use vmferry_transport::proto::{
    MigrationStatus, TargetConfig, TargetError, TargetJob, TargetStatus,
};
use vmferry_transport::streams::{Inlet, REPLAY_BYTES_MAX, Replay};
use vmferry_transport::units::MigrationId;

use super::event::{Event, OriginId, TargetEvent};
use super::guest::{Guest, StoppedGuest};
use super::incoming::{Incoming, IncomingAction};
use super::jobs::PANICKED;
use super::origin::{Origin, OriginError, of_a_cut};
use super::outgoing::chain;
use super::settle::Succession;
use super::{Ending, Engine, block_infos, passthrough, software};
use crate::machine::{MachineError, ResumeError};
use crate::qmp::schema::RunState;
use crate::qmp::{QmpError, QmpEvent};

/// What the machine of an incoming migration is until the migration starts it.
const NOT_STOPPED: &str = "the machine is being stopped or started by somebody else";

/// What it means that the state is cut that a program has left before an exec.
const NOBODY_ELSE: &str = "no other process has the guest";

/// Why nothing begins any more.
const ENDS: &str = "the VM process is ending";

/// Exit code of a process whose incoming migration has failed.
const INCOMING_FAILED_CODE: u8 = 1;

impl Engine {
    /// Begins to listen for an incoming migration, in place of one that has failed.
    pub(super) async fn listen(
        &mut self,
        address: &Address,
        in_place: Option<MigrationId>,
    ) -> Result<OriginId, OriginError> {
        // Far more connections than one listener can have.
        let first = OriginId(self.listened << 32);
        self.listened += 1;
        let config = self.target_config(in_place);
        let (machine, events) = (self.machine.clone(), self.events.clone());
        let origin = Origin::open(address, first, &mut self.fds, &self.deadlines, &events).await?;
        let clock = self.clock;
        let mut incoming = Incoming::start(address, origin, first, config, machine, clock, events);
        if in_place.is_none() && self.kept.is_some() {
            incoming.memory_is_in_file();
        }
        self.incoming = Some(incoming);
        Ok(first)
    }

    /// Begins to load what the program before has left in an archive.
    ///
    /// # Errors
    /// It cannot be read.
    pub(super) fn load_archive(&mut self, archive: OwnedFd, id: MigrationId) -> anyhow::Result<()> {
        let first = OriginId(self.listened << 32);
        self.listened += 1;
        let address: Address = format!("exec:{}", std::process::id()).parse()?;
        let max = usize::try_from(REPLAY_BYTES_MAX).unwrap_or(usize::MAX);
        let name = "what the old program has left";
        let config = self.target_config(Some(id));
        let (machine, clock, events) = (self.machine.clone(), self.clock, self.events.clone());
        self.incoming = Some(match envelope::unseal(name, &archive, max) {
            Ok(bytes) => {
                let replay = Replay::new(&bytes);
                let replay = replay.map_err(|error| {
                    anyhow::anyhow!("{name}: {error}{}", of_a_cut(&error, NOBODY_ELSE))
                })?;
                Incoming::replay(address, replay, first, config, machine, clock, events)
            }
            // Whoever wrapped the new program has passed it on in something else, such as a pipe.
            Err(CprError::Descriptor { .. }) => {
                let inlet = Inlet::of_file(name, archive, 0)?;
                let origin =
                    Origin::archive(inlet, first, &self.deadlines, &self.events, NOBODY_ELSE)?;
                Incoming::start(&address, origin, first, config, machine, clock, events)
            }
            Err(error) => return Err(error.into()),
        });
        Ok(())
    }

    fn target_config(&self, in_place: Option<MigrationId>) -> TargetConfig {
        TargetConfig {
            blocks: block_infos(self.machine.as_ref()),
            devices: self.schemas.clone(),
            streamed: self.streamed.clone(),
            software: software(),
            uuid: self.uuid,
            in_place: in_place.or(self.kept),
            deadlines: self.deadlines,
        }
    }

    /// `migrate-incoming`.
    pub(super) async fn migrate_incoming(
        &mut self,
        address: &Address,
        exit_on_error: bool,
    ) -> Result<Value, QmpError> {
        let refusal = match &self.incoming {
            _ if self.ending.is_some() => Some(ENDS),
            _ if self.runstate != RunState::Inmigrate => {
                Some("this VM was not started with --incoming defer")
            }
            Some(incoming) => incoming.why_not_again(),
            None => None,
        };
        if let Some(refusal) = refusal {
            return Err(QmpError::generic(refusal));
        }
        self.exit_on_error = exit_on_error;
        self.listen(address, None)
            .await
            .map_err(|error| QmpError::generic(chain(&error)))?;
        Ok(json!({}))
    }

    /// Something happened to the incoming migration.
    pub(super) fn target_event(&mut self, event: TargetEvent) {
        let event = match event {
            TargetEvent::Loaded(stopped, result) => {
                self.guest = Guest::Stopped(stopped);
                TargetEvent::LoadedInto(result)
            }
            TargetEvent::Unmarked(run, id, unmarked) => return self.unmarked(run, id, unmarked),
            TargetEvent::Inherited(inherited) => {
                self.house.inherit(inherited);
                return;
            }
            TargetEvent::Started(Ok(resume_us)) => {
                self.guest = Guest::Running;
                self.set_runstate(RunState::Running);
                self.emit(QmpEvent::resume());
                self.primaries.guest_arrived();
                if !self.house.in_place {
                    // In place the network finds it where it was.
                    self.announce_arrival();
                }
                self.settle_in();
                TargetEvent::StartedWith(Ok(resume_us))
            }
            TargetEvent::Started(Err(ResumeError { proof, source })) => {
                self.guest = Guest::Stopped(StoppedGuest::new(proof));
                if let Some(id) = self.unmarked.take() {
                    self.mark_again(id);
                }
                if self.stays_stopped_here(&source) {
                    return;
                }
                TargetEvent::StartedWith(Err(chain(&source)))
            }
            TargetEvent::StartLost => return self.start_lost(),
            other => other,
        };
        if let Some(incoming) = &mut self.incoming {
            incoming.handle(event);
        }
    }

    /// The old program has the guest back and cannot let it run, for want of a disk perhaps. There is nobody else who could: it is kept
    /// stopped for the operator, whose `cont` tries again.
    fn stays_stopped_here(&mut self, error: &MachineError) -> bool {
        let returned = |succession: &Succession| succession.returned.is_some();
        if !self.house.succession.as_ref().is_some_and(returned) {
            return false;
        }
        let error = error as &dyn std::error::Error;
        tracing::error!(
            error,
            "the guest is back and stays stopped; cont tries again"
        );
        self.arrived_stopped();
        true
    }

    /// The guest is here and is not to run.
    pub(super) fn arrived_stopped(&mut self) {
        if let Some(incoming) = &mut self.incoming {
            let now = self.clock.now();
            incoming.core_mut().handle_guest_started(now, 0);
        }
        self.set_runstate(RunState::Paused);
        self.primaries.guest_arrived();
        if self.house.in_place {
            self.stop_devices();
        }
        self.settle_in();
    }

    /// Devices that stay work as they did at the old process, until they are told that the guest does not run here. Comes before any
    /// `cont`, which is a job like this.
    fn stop_devices(&self) {
        let machine = Arc::clone(&self.machine);
        self.jobs.run(move || {
            if let Err(error) = passthrough::pause(machine.as_ref()) {
                let error = &error as &dyn std::error::Error;
                tracing::error!(error, "a device of the stopped guest works on");
            }
        });
    }

    /// Does what concerns more than the links.
    pub(super) fn incoming_action(&mut self, action: IncomingAction) {
        match action {
            IncomingAction::StatusChanged(status) => {
                let status = self.arrival_status(status);
                self.observe_incoming(status);
                if self.capabilities.events {
                    self.emit(QmpEvent::migration(status));
                }
            }
            IncomingAction::Load { sections, verify } => {
                let Some(incoming) = &mut self.incoming else {
                    return;
                };
                match std::mem::replace(&mut self.guest, Guest::Away) {
                    Guest::Stopped(stopped) => {
                        let fds = self.house.take_devices();
                        incoming.load(&self.jobs, stopped, fds, sections, verify);
                    }
                    guest => {
                        self.guest = guest;
                        incoming.refuse_job(TargetJob::Load, NOT_STOPPED);
                    }
                }
            }
            IncomingAction::Prepare => {
                if let Some(incoming) = &mut self.incoming {
                    incoming.begin_load(&self.jobs);
                }
            }
            IncomingAction::StartGuest { run } => self.take_over(run),
            IncomingAction::NotifyFailed(migration) => {
                let (notifiers, events) = (self.notifiers.clone(), self.events.clone());
                let mode = match self.kept {
                    Some(_) if !self.house.in_place => Mode::CprReboot,
                    _ => self.house.mode(),
                };
                let report = self.events.clone();
                let instead = move || {
                    // The engine ends only with the process.
                    let _ = report.send(Event::Target(TargetEvent::Notified));
                };
                self.jobs.run_owing(instead, move || {
                    notifiers.incoming_failed(mode, migration);
                    // The engine ends only with the process.
                    let _ = events.send(Event::Target(TargetEvent::Notified));
                });
            }
            IncomingAction::Failed { error, linger } => self.incoming_failed(&error, linger),
        }
    }

    /// COMMIT has come: the guest is ours.
    fn take_over(&mut self, run: bool) {
        if let (Some(id), Some(memory)) = (self.kept.take(), self.memory.clone()) {
            // Once it has run, its memory is not that of the archive any more.
            let events = self.events.clone();
            let report = self.events.clone();
            let instead = move || {
                let failed = TargetEvent::Unmarked(run, id, Err(PANICKED.to_owned()));
                // The engine ends only with the process.
                let _ = report.send(Event::Target(failed));
            };
            self.jobs.run_owing(instead, move || {
                let unmarked = TargetEvent::Unmarked(run, id, memory.forget());
                // The engine ends only with the process.
                let _ = events.send(Event::Target(unmarked));
            });
            return;
        }
        self.adopt_output();
        self.begin_succession();
        let Some(incoming) = &mut self.incoming else {
            return;
        };
        if !(run && self.autostart) {
            return self.arrived_stopped();
        }
        match std::mem::replace(&mut self.guest, Guest::Away) {
            Guest::Stopped(stopped) => {
                incoming.start_guest(&self.jobs, Arc::clone(&self.disks), stopped);
            }
            guest => {
                self.guest = guest;
                incoming.refuse_job(TargetJob::StartGuest, NOT_STOPPED);
            }
        }
    }

    /// Memory belongs to no archive any more, or may not.
    fn unmarked(&mut self, run: bool, id: MigrationId, unmarked: Result<(), String>) {
        let refusal = match unmarked {
            // Whoever saved the guest has it still, and so has the next process.
            Ok(()) if self.ending.is_some() => ENDS.to_owned(),
            Ok(()) => {
                self.unmarked = Some(id);
                return self.take_over(run);
            }
            Err(error) => error,
        };
        self.mark_again(id);
        if let Some(incoming) = &mut self.incoming {
            incoming.refuse_job(TargetJob::StartGuest, &refusal);
        }
    }

    /// No vCPU has run and no disk is ours: the archive can be loaded once more.
    fn mark_again(&self, id: MigrationId) {
        let Some(memory) = self.memory.clone() else {
            return;
        };
        self.jobs.run(move || {
            if let Err(error) = memory.remember(id) {
                tracing::error!(
                    error,
                    "the saved guest cannot be loaded again: its memory is not marked"
                );
            }
        });
    }

    /// The process has nothing left to do: its memory is half-filled. It stays reachable as long as the source may be in doubt, or for
    /// good if the operator has said so; then there may be another attempt.
    fn incoming_failed(&mut self, error: &TargetError, linger: bool) {
        tracing::error!(%error, "incoming migration failed; this guest will never run here");
        // Who was told to end does not begin again as another program.
        if self.ending.is_none() {
            self.go_back(&error.to_string());
        }
        // Neither program goes on.
        self.tell_after_exec(false);
        let asked = self.incoming.as_ref();
        let linger = linger && !asked.is_some_and(Incoming::is_from_archive);
        if !self.exit_on_error {
            if let Some(incoming) = self.incoming.as_mut().filter(|_| !linger) {
                incoming.start_over(&self.jobs);
            }
            return;
        }
        let at = linger.then(|| Instant::now() + Duration::from_micros(self.deadlines.linger_us));
        if self.ending.is_none() {
            self.ending = Some(Ending {
                code: INCOMING_FAILED_CODE,
                at,
                told: None,
            });
        }
    }
}

/// The same status in the words of QMP, which has one list for both sides.
pub(super) fn qmp_status(status: TargetStatus) -> MigrationStatus {
    match status {
        TargetStatus::None => MigrationStatus::None,
        TargetStatus::Setup => MigrationStatus::Setup,
        TargetStatus::Active => MigrationStatus::Active,
        TargetStatus::Completed => MigrationStatus::Completed,
        TargetStatus::Failing => MigrationStatus::Failing,
        TargetStatus::Failed => MigrationStatus::Failed,
    }
}
