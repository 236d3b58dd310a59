//! What each QMP command does.

use std::sync::Arc;

use serde::Serialize;
use serde_json::{Value, json};
use vmferry_transport::control::Address;
use vmferry_transport::memory::hash;
use vmferry_transport::proto::{MigrationStatus, SourceConfig};
use vmferry_transport::units::{MigrationId, Uuid};
use vmferry_transport::wire::frame::Resolution;

use super::arrival::qmp_status;
use super::guest::Guest;
use super::hand_over::HandOver;
use super::keep::Keep;
use super::outgoing::{Outgoing, OutgoingStart};
use super::route::Route;
use super::run_control::answer;
use super::successor::{InPlace, Successor};
use super::{Engine, Reply, block_infos, software};
use crate::machine::Accel;
use crate::migration::admission::{Admission, Operation, STEERING, admit};
use crate::migration::params::MigrationMode;
use crate::qmp::channels::NOWHERE;
use crate::qmp::schema::{
    BlockInfo, BlockerInfo, KvmInfo, NameInfo, RamHashInfo, RunState, StatusInfo, UuidInfo,
    WorkloadInfo,
};
use crate::qmp::{Command, EngineRequest, QmpError, ResolveOutcome, ShutdownReason};

pub(super) type Answer = Result<Value, QmpError>;

impl Engine {
    /// Executes a command. Most answer at once; those that wait for a job keep the reply.
    pub(super) async fn execute(&mut self, request: EngineRequest) {
        let EngineRequest { command, fd, reply } = request;
        if let Some(operation) = operation(&command) {
            match admit(operation, self.migration_status()) {
                Admission::Accept => {}
                Admission::Ignore => return answer(reply, Ok(json!({}))),
                Admission::Refuse(reason) => return answer(reply, Err(QmpError::generic(reason))),
            }
        }
        let outcome = match command {
            Command::Stop => return self.stop(reply),
            Command::Cont => return self.cont(reply),
            Command::XRamHash => return self.ram_hash(reply),
            Command::QueryStatus => value(StatusInfo {
                running: self.runstate == RunState::Running,
                status: self.runstate,
            }),
            Command::QueryName => value(NameInfo {
                name: self.name.clone(),
            }),
            Command::QueryBlock => {
                let disks = self.disks.infos().into_iter().map(BlockInfo::from);
                value(disks.collect::<Vec<_>>())
            }
            Command::QueryUuid => value(UuidInfo {
                uuid: self.uuid.unwrap_or(Uuid([0; 16])).to_string(),
            }),
            Command::QueryKvm => {
                let present = std::path::Path::new("/dev/kvm").exists();
                value(KvmInfo {
                    enabled: self.machine.accel() == Accel::Kvm,
                    present,
                })
            }
            Command::Quit => {
                self.end(0, ShutdownReason::HostQmpQuit);
                Ok(json!({}))
            }
            // Admitted only in a status that no migration of ours has yet.
            Command::Migrate { resume: true, .. }
            | Command::MigratePause
            | Command::MigrateRecover { .. }
            | Command::MigrateStartPostcopy => {
                Err(QmpError::generic("post-copy is not supported yet"))
            }
            Command::Migrate { address, cpr, .. } => self.migrate(address, cpr),
            Command::MigrateIncoming {
                address,
                exit_on_error,
            } => self.migrate_incoming(&address, exit_on_error).await,
            Command::QueryMigrate => value(self.migration_info()),
            Command::MigrateContinue { .. } => self.migrate_continue(),
            Command::MigrateCancel => self.cancel(),
            Command::MigrateSetParameters(patch) => self.set_parameters(&patch),
            Command::QueryMigrateParameters => value(&self.parameters),
            Command::MigrateSetCapabilities(changes) => self.set_capabilities(&changes),
            Command::QueryMigrateCapabilities => value(self.capabilities.list()),
            Command::AnnounceSelf(arguments) => self.announce_self(arguments),
            Command::CalcDirtyRate(arguments) => self.calc_dirty_rate(arguments),
            Command::QueryDirtyRate { unit } => value(self.dirty_rate.info(unit)),
            Command::Yank { instances } => self.yank(&instances),
            Command::QueryYank => value(self.yank_instances()),
            Command::GetFd { .. }
            | Command::CloseFd { .. }
            | Command::AddFd { .. }
            | Command::RemoveFd { .. }
            | Command::QueryFdSets => self.fd_command(command, fd),
            Command::XAddBlocker { reason, modes } => self
                .blockers
                .add(reason, modes)
                .map_err(|error| QmpError::from_chain(&error))
                .and_then(|id| value(BlockerInfo { id })),
            Command::XRemoveBlocker { id } => match self.blockers.remove(id) {
                true => Ok(json!({})),
                false => Err(QmpError::generic(format!("there is no blocker {id}"))),
            },
            Command::XQueryWorkload { reset } => self.workload(reset),
            Command::XConfirmUnplug { id } => self.confirm_unplug(&id),
            Command::XResolve { outcome } => self.resolve(outcome),
        };
        answer(reply, outcome);
    }

    fn migrate(&mut self, address: Option<Address>, cpr: Option<Address>) -> Answer {
        let blocked = self.blockers.reasons(self.parameters.mode);
        let refusal = match self.runstate {
            _ if self.ending.is_some() => Some("the VM process is ending".to_owned()),
            RunState::Inmigrate => {
                Some("this VM waits for an incoming migration itself".to_owned())
            }
            RunState::Postmigrate => {
                Some("the guest was handed over to another process already".to_owned())
            }
            RunState::Shutdown | RunState::InternalError => Some("the guest has ended".to_owned()),
            _ if matches!(self.guest, Guest::Away) => {
                Some("the guest is being stopped or started just now".to_owned())
            }
            _ if !blocked.is_empty() => {
                Some(format!("migration is blocked: {}", blocked.join("; ")))
            }
            _ => None,
        };
        if let Some(refusal) = refusal {
            return Err(QmpError::generic(refusal));
        }
        let mode = self.parameters.mode;
        let keep = self.keep(mode, address.as_ref())?;
        let (route, in_place) = self.way(mode, address, cpr).map_err(QmpError::generic)?;
        // Both need the dirty log, and a migration is more urgent than a figure.
        self.end_measurement("a migration has begun");
        let mut id = [0; 16];
        rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty())
            .map_err(|error| QmpError::generic(format!("no random migration id: {error}")))?;
        self.attempts += 1;
        let start = OutgoingStart {
            attempt: self.attempts,
            config: SourceConfig {
                migration_id: MigrationId(id),
                data_connections: match mode {
                    MigrationMode::CprTransfer
                    | MigrationMode::CprExec
                    | MigrationMode::CprReboot => 0,
                    MigrationMode::Normal => {
                        route.data_connections(u16::from(self.parameters.multifd_channels))
                    }
                },
                checksum: self.parameters.x_checksum || route.is_archive(),
                verify: self.parameters.x_verify,
                software: software(),
                blocks: block_infos(self.machine.as_ref()),
                devices: self.schemas.clone(),
                guest_runs: matches!(self.guest, Guest::Running),
                uuid: self.uuid.filter(|_| self.capabilities.validate_uuid),
                switchover_ack: self.capabilities.switchover_ack,
                pause_before_switchover: self.capabilities.pause_before_switchover,
                deadlines: self.deadlines,
            },
            tuning: self.tuning(),
            bandwidth: Arc::clone(&self.bandwidth),
            notifiers: self.notifiers.clone(),
            disks: Arc::clone(&self.disks),
            route,
            detect_zero_pages: self.parameters.detect_zero_pages,
            mode,
            in_place,
            keep,
        };
        if matches!(self.guest, Guest::Running) {
            // What the guest stalls from now on is this attempt's. The memory of a stopped guest is left as it is.
            self.machine.reset_workload_gap();
        }
        self.outgoing = Some(Outgoing::start(
            start,
            Arc::clone(&self.machine),
            self.clock,
            self.events.clone(),
        ));
        Ok(json!({}))
    }

    /// How a migration of this mode gets to its target, and what one in place begins with.
    fn way(
        &mut self,
        mode: MigrationMode,
        main: Option<Address>,
        cpr: Option<Address>,
    ) -> Result<(Route, Option<InPlace>), String> {
        let refuse = |text: &str| Err(text.to_owned());
        let in_place = match (mode, &main, cpr) {
            (MigrationMode::CprExec, None, _) => {
                let command = &self.parameters.cpr_exec_command;
                let successor = Successor::new(command, self.heirlooms()?, &self.deadlines)?;
                let route = Route::to_program(command, self.deadlines)?;
                return Ok((route, Some(InPlace::Program(Box::new(successor)))));
            }
            (MigrationMode::CprExec, Some(_), _) => {
                return refuse(
                    "mode cpr-exec keeps the state in memory: leave `uri` and `channels` out",
                );
            }
            (_, None, _) => return refuse(NOWHERE),
            (MigrationMode::Normal | MigrationMode::CprReboot, ..) => None,
            (MigrationMode::CprTransfer, Some(Address::Unix { .. }), Some(cpr)) => {
                let mut heirlooms = self.heirlooms()?;
                let text = |error| format!("what is to be handed over: {error}");
                heirlooms.add_outputs().map_err(text)?;
                let hand_over = HandOver::new(cpr, heirlooms, &self.deadlines);
                Some(InPlace::Process(hand_over))
            }
            (MigrationMode::CprTransfer, _, Some(_)) => {
                return refuse("mode cpr-transfer needs a unix socket as the `main` channel");
            }
            (MigrationMode::CprTransfer, _, None) => {
                return refuse("mode cpr-transfer needs a channel of type `cpr` beside `main`");
            }
        };
        match main {
            Some(main) => Ok((Route::to(main, &mut self.fds, self.deadlines)?, in_place)),
            None => refuse(NOWHERE),
        }
    }

    /// What a migration begins with whose memory stays in its file; nothing for another one.
    fn keep(&self, mode: MigrationMode, main: Option<&Address>) -> Result<Option<Keep>, QmpError> {
        if mode != MigrationMode::CprReboot {
            return Ok(None);
        }
        if !matches!(main, Some(Address::File { .. })) {
            return Err(QmpError::generic(
                "mode cpr-reboot saves into a file: use file:PATH",
            ));
        }
        let Some(memory) = &self.memory else {
            return Err(QmpError::generic(
                "mode cpr-reboot needs guest memory in a file of its own: start the VM with --mem-path PATH",
            ));
        };
        Ok(Some(Keep::new(memory.clone(), self.machine.ram().clone())))
    }

    /// Lets a migration go on that waits for the operator; the table has admitted it.
    fn migrate_continue(&mut self) -> Answer {
        let now = self.clock.now();
        let outgoing = self.outgoing.as_mut();
        match outgoing.map(|outgoing| outgoing.core_mut().handle_continue(now)) {
            Some(Ok(())) => Ok(json!({})),
            _ => Err(QmpError::generic("nothing waits to be continued")),
        }
    }

    fn cancel(&mut self) -> Answer {
        let now = self.clock.now();
        if let Some(outgoing) = &mut self.outgoing {
            outgoing
                .core_mut()
                .handle_cancel(now)
                .map_err(|error| QmpError::generic(error.to_string()))?;
        }
        Ok(json!({}))
    }

    fn workload(&mut self, reset: bool) -> Answer {
        let Some(stats) = self.machine.workload_stats() else {
            return Err(QmpError::generic("no workload is in this machine yet"));
        };
        if reset {
            self.machine.reset_workload_gap();
        }
        value(WorkloadInfo::from(stats))
    }

    pub(super) fn ram_hash(&mut self, reply: Reply) {
        if self.runstate == RunState::Postmigrate && self.outgoing.is_some() {
            // Completed, but the proof is on its way back.
            self.hashes_wanted.push(reply);
            return;
        }
        let Guest::Stopped(stopped) = &self.guest else {
            answer(
                reply,
                Err(QmpError::generic(
                    "RAM can be hashed only while the guest is stopped",
                )),
            );
            return;
        };
        // Held by the job until it is done: nobody can resume the guest under it.
        let held = stopped.lend();
        let machine = Arc::clone(&self.machine);
        self.jobs.run(move || {
            let hash = hash::ram_hash(machine.ram());
            drop(held);
            answer(
                reply,
                match hash {
                    Ok(hash) => value(RamHashInfo {
                        hash: format!("{:032x}", hash.hash),
                    }),
                    Err(error) => Err(QmpError::generic(format!(
                        "guest memory could not be hashed: {error}"
                    ))),
                },
            );
        });
    }

    fn resolve(&mut self, outcome: ResolveOutcome) -> Answer {
        let resolution = match outcome {
            ResolveOutcome::SourceRuns => Resolution::NotCommitted,
            ResolveOutcome::TargetRuns => Resolution::Committed,
        };
        let in_place = self.outgoing.as_ref().is_some_and(Outgoing::is_in_place);
        if in_place && resolution == Resolution::NotCommitted {
            return Err(QmpError::generic(
                "both processes have the same memory, and the new one may have run the guest on it: going on here with the state of \
                 before could corrupt the guest. Only the new process itself can say that it has not",
            ));
        }
        let now = self.clock.now();
        let outgoing = self.outgoing.as_mut();
        if outgoing.is_some_and(|outgoing| {
            outgoing
                .core_mut()
                .handle_operator_resolution(now, resolution)
        }) {
            return Ok(json!({}));
        }
        Err(QmpError::generic(
            "there is no migration whose outcome is in doubt",
        ))
    }

    /// Status of the migration of this process: of the outgoing one if there was any, else of the incoming one.
    pub(super) fn migration_status(&self) -> MigrationStatus {
        match (self.outgoing_status(), &self.incoming) {
            (MigrationStatus::None, Some(incoming)) => qmp_status(incoming.core().status()),
            (status, _) => status,
        }
    }

    /// Status of the outgoing attempt, the last one included.
    pub(super) fn outgoing_status(&self) -> MigrationStatus {
        match (&self.outgoing, &self.record) {
            (Some(outgoing), _) => outgoing.core().status(),
            (None, Some(record)) => record.status(),
            (None, None) => MigrationStatus::None,
        }
    }
}

/// What a command means for a migration, if anything.
fn operation(command: &Command) -> Option<Operation> {
    Some(match command {
        Command::Migrate { resume: false, .. } => Operation::Migrate,
        Command::Migrate { resume: true, .. } => Operation::Resume,
        Command::MigrateIncoming { .. } => Operation::Incoming,
        Command::MigrateCancel => Operation::Cancel,
        Command::MigrateContinue { state } => Operation::Continue(*state),
        Command::MigratePause => Operation::Pause,
        Command::MigrateRecover { .. } => Operation::Recover,
        Command::MigrateStartPostcopy => Operation::StartPostcopy,
        Command::MigrateSetCapabilities(_) => Operation::SetCapabilities,
        Command::MigrateSetParameters(patch) => {
            if patch.names().all(|name| STEERING.contains(&name)) {
                Operation::Steer
            } else {
                Operation::SetParameters
            }
        }
        Command::CalcDirtyRate(_) => Operation::MeasureDirtyRate,
        Command::XAddBlocker { .. } => Operation::AddBlocker,
        _ => return None,
    })
}

/// An answer as JSON.
pub(super) fn value(answer: impl Serialize) -> Answer {
    serde_json::to_value(answer)
        .map_err(|error| QmpError::generic(format!("the answer cannot be written: {error}")))
}
