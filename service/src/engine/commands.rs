//! What each QMP command does.

use std::sync::Arc;

use serde::Serialize;
use serde_json::{Value, json};
use vmferry_transport::control::Address;
use vmferry_transport::memory::hash;
use vmferry_transport::proto::{MigrationStatus, SourceConfig, SourceTuning, ThrottleTuning};
use vmferry_transport::units::MigrationId;
use vmferry_transport::wire::frame::Resolution;

use super::guest::Guest;
use super::outgoing::{Outgoing, OutgoingStart, chain};
use super::route::Route;
use super::run_control::answer;
use super::{Engine, Reply, software};
use crate::machine::Accel;
use crate::migration::params::{CapabilityStatus, MigrationParameters, ParameterPatch};
use crate::qmp::schema::{KvmInfo, NameInfo, RamHashInfo, RunState, StatusInfo, WorkloadInfo};
use crate::qmp::{Command, EngineRequest, QmpError, ResolveOutcome, ShutdownReason};

type Answer = Result<Value, QmpError>;

impl Engine {
    /// Executes a command. Most answer at once; those that wait for a job keep the reply.
    pub(super) async fn execute(&mut self, request: EngineRequest) {
        let EngineRequest { command, reply } = request;
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
            Command::Migrate { uri } => self.migrate(uri),
            Command::MigrateIncoming { uri } => self.migrate_incoming(&uri).await,
            Command::QueryMigrate => value(self.migration_info()),
            Command::MigrateContinue { state } => self.migrate_continue(state),
            Command::MigrateCancel => self.cancel(),
            Command::MigrateSetParameters(patch) => self.set_parameters(&patch),
            Command::QueryMigrateParameters => value(self.parameters),
            Command::MigrateSetCapabilities(changes) => self.set_capabilities(&changes),
            Command::QueryMigrateCapabilities => value(self.capabilities.list()),
            Command::XQueryWorkload { reset } => self.workload(reset),
            Command::XConfirmUnplug { id } => self.confirm_unplug(&id),
            Command::XResolve { outcome } => self.resolve(outcome),
        };
        answer(reply, outcome);
    }

    fn migrate(&mut self, address: Address) -> Answer {
        let status = self.outgoing_status();
        let refusal = match self.runstate {
            _ if !status.is_idle() => Some(format!(
                "a migration is under way already (status {status})"
            )),
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
            _ => None,
        };
        if let Some(refusal) = refusal {
            return Err(QmpError::generic(refusal));
        }
        let route = Route::to(address, &mut self.fds, self.deadlines).map_err(QmpError::generic)?;
        let mut id = [0; 16];
        rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty())
            .map_err(|error| QmpError::generic(format!("no random migration id: {error}")))?;
        self.attempts += 1;
        let start = OutgoingStart {
            attempt: self.attempts,
            config: SourceConfig {
                migration_id: MigrationId(id),
                data_connections: route
                    .data_connections(u16::from(self.parameters.multifd_channels)),
                checksum: self.parameters.x_checksum || route.is_archive(),
                verify: self.parameters.x_verify,
                software: software(),
                blocks: self.block_infos(),
                devices: self.machine.schemas(),
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
        };
        self.outgoing = Some(Outgoing::start(
            start,
            Arc::clone(&self.machine),
            self.clock,
            self.events.clone(),
        ));
        Ok(json!({}))
    }

    async fn migrate_incoming(&mut self, address: &Address) -> Answer {
        if self.incoming.is_some() {
            return Err(QmpError::generic(
                "this VM listens for an incoming migration already",
            ));
        }
        if self.runstate != RunState::Inmigrate {
            return Err(QmpError::generic(
                "this VM was not started with --incoming defer",
            ));
        }
        self.listen(address)
            .await
            .map_err(|error| QmpError::generic(chain(&error)))?;
        Ok(json!({}))
    }

    /// Lets a migration go on that waits in `state`; only `pre-switchover` waits.
    fn migrate_continue(&mut self, state: MigrationStatus) -> Answer {
        let (now, status) = (self.clock.now(), self.outgoing_status());
        if state != status {
            return Err(QmpError::generic(format!(
                "the migration is in status {status}, not {state}"
            )));
        }
        let continued = self
            .outgoing
            .as_mut()
            .map(|outgoing| outgoing.core_mut().handle_continue(now));
        match continued {
            Some(Ok(())) => Ok(json!({})),
            _ => Err(QmpError::generic(format!(
                "a migration in status {status} does not wait to be continued"
            ))),
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

    fn set_parameters(&mut self, patch: &ParameterPatch) -> Answer {
        let status = self.outgoing_status();
        if matches!(
            status,
            MigrationStatus::Failing | MigrationStatus::Cancelling
        ) {
            return Err(QmpError::generic(format!(
                "parameters cannot change while cleanup is under way (status {status})"
            )));
        }
        self.parameters = self.parameters.with(patch)?;
        self.bandwidth
            .set(self.parameters.max_bandwidth_bytes_per_sec);
        let tuning = self.tuning();
        if let Some(outgoing) = &mut self.outgoing {
            outgoing.core_mut().set_tuning(tuning);
        }
        Ok(json!({}))
    }

    fn set_capabilities(&mut self, changes: &[CapabilityStatus]) -> Answer {
        let status = self.outgoing_status();
        if !status.is_idle() {
            return Err(QmpError::generic(format!(
                "capabilities cannot change while a migration is under way (status {status})"
            )));
        }
        self.capabilities = self.capabilities.with(changes)?;
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

    fn tuning(&self) -> SourceTuning {
        let MigrationParameters {
            downtime_limit_ms,
            avail_switchover_bandwidth_bytes_per_sec: available,
            throttle_trigger_threshold_percent: trigger_percent,
            cpu_throttle_initial_percent: initial_percent,
            cpu_throttle_increment_percent: increment_percent,
            max_cpu_throttle_percent: max_percent,
            cpu_throttle_tailslow: tailslow,
            ..
        } = self.parameters;
        SourceTuning {
            downtime_limit_us: downtime_limit_ms * 1000,
            switchover_bytes_per_sec: (available > 0).then_some(available),
            auto_converge: self.capabilities.auto_converge.then_some(ThrottleTuning {
                trigger_percent,
                initial_percent,
                increment_percent,
                max_percent,
                tailslow,
            }),
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

/// An answer as JSON.
fn value(answer: impl Serialize) -> Answer {
    serde_json::to_value(answer)
        .map_err(|error| QmpError::generic(format!("the answer cannot be written: {error}")))
}
