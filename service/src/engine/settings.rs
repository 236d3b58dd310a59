//! Parameters, capabilities and file descriptors that operators set. Whether they may be set now was judged before.

use std::os::fd::OwnedFd;

use serde_json::json;
use vmferry_transport::proto::{SourceTuning, ThrottleTuning};

use super::Engine;
use super::commands::{Answer, value};
use crate::migration::params::{CapabilityStatus, MigrationParameters, ParameterPatch};
use crate::qmp::{Command, QmpError};

impl Engine {
    pub(super) fn set_parameters(&mut self, patch: &ParameterPatch) -> Answer {
        self.parameters = self.parameters.clone().with(patch)?;
        self.bandwidth
            .set(self.parameters.max_bandwidth_bytes_per_sec);
        let tuning = self.tuning();
        if let Some(outgoing) = &mut self.outgoing {
            outgoing.core_mut().set_tuning(tuning);
        }
        Ok(json!({}))
    }

    pub(super) fn set_capabilities(&mut self, changes: &[CapabilityStatus]) -> Answer {
        self.capabilities = self.capabilities.with(changes)?;
        Ok(json!({}))
    }

    pub(super) fn tuning(&self) -> SourceTuning {
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

    /// `getfd` and its relatives. A descriptor that is not kept is closed.
    pub(super) fn fd_command(&mut self, command: Command, fd: Option<OwnedFd>) -> Answer {
        let fd = || fd.ok_or_else(|| QmpError::generic("no file descriptor came with the command"));
        let done = match command {
            Command::GetFd { name } => self.fds.put(&name, fd()?),
            Command::CloseFd { name } => self.fds.take(&name).map(drop),
            Command::AddFd { set, opaque } => {
                let added = self.fds.add(set, opaque, fd()?);
                return added
                    .map_err(|error| QmpError::from_chain(&error))
                    .and_then(value);
            }
            Command::RemoveFd { set, fd } => self.fds.remove(set, fd),
            _ => return value(self.fds.sets()),
        };
        done.map(|()| json!({}))
            .map_err(|error| QmpError::from_chain(&error))
    }
}
