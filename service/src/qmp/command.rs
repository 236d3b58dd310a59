//! Commands with checked arguments, as the engine gets them.

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use vmferry_transport::control::Address;
use vmferry_transport::proto::MigrationStatus;

use super::QmpError;
use crate::migration::params::{CapabilityStatus, ParameterPatch};

/// What a client wants of the engine. Parsed and checked as far as that is possible without knowing the VM.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Command {
    /// `query-status`; returns [`StatusInfo`](super::schema::StatusInfo).
    QueryStatus,
    /// `query-name`; returns [`NameInfo`](super::schema::NameInfo).
    QueryName,
    /// `query-kvm`; returns [`KvmInfo`](super::schema::KvmInfo).
    QueryKvm,
    /// `stop`: pause the guest. No error if it is paused already.
    Stop,
    /// `cont`: let the guest run. No error if it runs already.
    Cont,
    /// `quit`: end this process.
    Quit,
    /// `migrate`: returns as soon as the attempt is under way.
    Migrate {
        /// Where to.
        uri: Address,
    },
    /// `migrate-incoming`: listen. Once per process, after `--incoming defer`.
    MigrateIncoming {
        /// Where.
        uri: Address,
    },
    /// `query-migrate`; returns [`MigrationInfo`](super::schema::MigrationInfo).
    QueryMigrate,
    /// `migrate-continue`: go on from `pre-switchover`.
    MigrateContinue {
        /// The status that the operator believes the migration to be in.
        state: MigrationStatus,
    },
    /// `migrate_cancel`. No error if no migration runs.
    MigrateCancel,
    /// `migrate-set-parameters`.
    MigrateSetParameters(ParameterPatch),
    /// `query-migrate-parameters`; returns [`MigrationParameters`](crate::migration::params::MigrationParameters).
    QueryMigrateParameters,
    /// `migrate-set-capabilities`.
    MigrateSetCapabilities(Vec<CapabilityStatus>),
    /// `query-migrate-capabilities`; returns
    /// [`MigrationCapabilities::list`](crate::migration::params::MigrationCapabilities::list).
    QueryMigrateCapabilities,
    /// `x-query-workload`; returns [`WorkloadInfo`](super::schema::WorkloadInfo).
    XQueryWorkload {
        /// Forget the longest gap after reading it.
        reset: bool,
    },
    /// `x-ram-hash`, only while the guest is stopped; returns [`RamHashInfo`](super::schema::RamHashInfo).
    XRamHash,
    /// `x-confirm-unplug`: says for the guest that it has let go of a stand-in for a failover primary.
    XConfirmUnplug {
        /// The primary.
        id: String,
    },
    /// `x-resolve`: the operator decides which side has the guest, after a commit whose outcome cannot be learnt.
    XResolve {
        /// The decision.
        outcome: ResolveOutcome,
    },
}

/// Which side has the guest, says the operator.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "kebab-case")]
pub enum ResolveOutcome {
    /// The source resumes. The operator has made sure that the target does not run, and never will.
    SourceRuns,
    /// The target has it; the source stays stopped for good.
    TargetRuns,
}

/// Arguments of `migrate`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct MigrateArguments {
    uri: Option<String>,
    channels: Option<Value>,
    #[serde(default)]
    resume: bool,
}

/// Arguments of `migrate-incoming`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct MigrateIncomingArguments {
    uri: Option<String>,
    channels: Option<Value>,
    #[serde(default)]
    exit_on_error: Option<bool>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ContinueArguments {
    state: MigrationStatus,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct CapabilitiesArguments {
    capabilities: Vec<CapabilityStatus>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct WorkloadArguments {
    reset: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ConfirmUnplugArguments {
    id: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ResolveArguments {
    outcome: ResolveOutcome,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct NoArguments {}

/// Reads `arguments` into `T`; the error names the argument.
pub(super) fn arguments<T: DeserializeOwned>(arguments: Map<String, Value>) -> Result<T, QmpError> {
    serde_path_to_error::deserialize(Value::Object(arguments)).map_err(|error| {
        let path = error.path().to_string();
        let problem = error.into_inner();
        QmpError::generic(match path.as_str() {
            // At the top, serde's own words name the argument.
            "." => problem.to_string(),
            _ => format!("argument `{path}`: {problem}"),
        })
    })
}

/// For commands without arguments.
pub(super) fn no_arguments(given: Map<String, Value>) -> Result<(), QmpError> {
    arguments::<NoArguments>(given).map(|NoArguments {}| ())
}

pub(super) fn migrate(given: Map<String, Value>) -> Result<Command, QmpError> {
    let MigrateArguments {
        uri,
        channels,
        resume,
    } = arguments(given)?;
    if resume {
        return Err(QmpError::generic("argument `resume` is not supported yet"));
    }
    Ok(Command::Migrate {
        uri: address(uri, channels)?,
    })
}

pub(super) fn migrate_incoming(given: Map<String, Value>) -> Result<Command, QmpError> {
    let MigrateIncomingArguments {
        uri,
        channels,
        exit_on_error,
    } = arguments(given)?;
    if exit_on_error.is_some() {
        return Err(QmpError::generic(
            "argument `exit-on-error` is not supported yet",
        ));
    }
    Ok(Command::MigrateIncoming {
        uri: address(uri, channels)?,
    })
}

pub(super) fn migrate_continue(given: Map<String, Value>) -> Result<Command, QmpError> {
    let ContinueArguments { state } = arguments(given)?;
    Ok(Command::MigrateContinue { state })
}

pub(super) fn set_parameters(given: Map<String, Value>) -> Result<Command, QmpError> {
    Ok(Command::MigrateSetParameters(ParameterPatch::parse(
        &given,
    )?))
}

pub(super) fn set_capabilities(given: Map<String, Value>) -> Result<Command, QmpError> {
    let CapabilitiesArguments { capabilities } = arguments(given)?;
    Ok(Command::MigrateSetCapabilities(capabilities))
}

pub(super) fn query_workload(given: Map<String, Value>) -> Result<Command, QmpError> {
    let WorkloadArguments { reset } = arguments(given)?;
    Ok(Command::XQueryWorkload { reset })
}

pub(super) fn confirm_unplug(given: Map<String, Value>) -> Result<Command, QmpError> {
    let ConfirmUnplugArguments { id } = arguments(given)?;
    Ok(Command::XConfirmUnplug { id })
}

pub(super) fn resolve(given: Map<String, Value>) -> Result<Command, QmpError> {
    let ResolveArguments { outcome } = arguments(given)?;
    Ok(Command::XResolve { outcome })
}

fn address(uri: Option<String>, channels: Option<Value>) -> Result<Address, QmpError> {
    match (uri, channels) {
        (Some(uri), None) => uri
            .parse()
            .map_err(|error| QmpError::generic(format!("argument `uri`: {error}"))),
        (None, Some(_)) => Err(QmpError::generic(
            "argument `channels` is not supported yet; use `uri`",
        )),
        (Some(_), Some(_)) => Err(QmpError::generic(
            "give either `uri` or `channels`, not both",
        )),
        (None, None) => Err(QmpError::generic("argument `uri` is missing")),
    }
}
