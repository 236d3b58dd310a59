//! Commands with checked arguments, as the engine gets them.

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use vmferry_transport::control::Address;

use super::QmpError;
use super::channels;
use crate::migration::params::{CapabilityStatus, MigrationMode, ParameterPatch};
use crate::migration::status::MigrationStatus;

/// What a client wants of the engine. Parsed and checked as far as that is possible without knowing the VM.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Command {
    /// `query-status`; returns [`StatusInfo`](super::schema::StatusInfo).
    QueryStatus,
    /// `query-name`; returns [`NameInfo`](super::schema::NameInfo).
    QueryName,
    /// `query-block`; returns a list of [`BlockInfo`](super::schema::BlockInfo).
    QueryBlock,
    /// `query-uuid`; returns [`UuidInfo`](super::schema::UuidInfo).
    QueryUuid,
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
        /// Where to; only a migration of mode cpr-exec has no such place.
        address: Option<Address>,
        /// Where the new process takes descriptors, for a migration in place.
        cpr: Option<Address>,
        /// Go on with a post-copy that has lost its connection.
        resume: bool,
    },
    /// `migrate-incoming`: listen, after `--incoming defer`.
    MigrateIncoming {
        /// Where.
        address: Address,
        /// End this process if the migration fails.
        exit_on_error: bool,
    },
    /// `query-migrate`; returns [`MigrationInfo`](super::schema::MigrationInfo).
    QueryMigrate,
    /// `migrate_cancel`. No error if no migration runs.
    MigrateCancel,
    /// `migrate-continue`: leave a status in which a migration waits for the operator.
    MigrateContinue {
        /// The status it is in.
        state: MigrationStatus,
    },
    /// `migrate-pause`: interrupt a post-copy.
    MigratePause,
    /// `migrate-recover`: listen again for a post-copy that was interrupted.
    MigrateRecover {
        /// Where.
        address: Address,
    },
    /// `migrate-start-postcopy`.
    MigrateStartPostcopy,
    /// `migrate-set-parameters`.
    MigrateSetParameters(ParameterPatch),
    /// `query-migrate-parameters`; returns [`MigrationParameters`](crate::migration::params::MigrationParameters).
    QueryMigrateParameters,
    /// `migrate-set-capabilities`.
    MigrateSetCapabilities(Vec<CapabilityStatus>),
    /// `query-migrate-capabilities`; returns
    /// [`MigrationCapabilities::list`](crate::migration::params::MigrationCapabilities::list).
    QueryMigrateCapabilities,
    /// `announce-self`: tell the network where the guest is.
    AnnounceSelf(AnnounceSelf),
    /// `calc-dirty-rate`: begin to measure how fast the guest dirties memory.
    CalcDirtyRate(CalcDirtyRate),
    /// `query-dirty-rate`; returns [`DirtyRateInfo`](super::schema::DirtyRateInfo).
    QueryDirtyRate {
        /// The unit of `calc-time` in the answer.
        unit: TimeUnit,
    },
    /// `yank`: shut the connections of these down.
    Yank {
        /// What.
        instances: Vec<YankInstance>,
    },
    /// `query-yank`; returns a list of [`YankInstance`].
    QueryYank,
    /// `getfd`: keep the descriptor that came along under this name.
    GetFd {
        /// The name.
        name: String,
    },
    /// `closefd`.
    CloseFd {
        /// The name.
        name: String,
    },
    /// `add-fd`: put the descriptor that came along into a set; returns [`AddedFd`](crate::fds::AddedFd).
    AddFd {
        /// The set, a new one if left out.
        set: Option<i64>,
        /// Text to keep with it.
        opaque: Option<String>,
    },
    /// `remove-fd`.
    RemoveFd {
        /// The set.
        set: i64,
        /// One descriptor of it, all if left out.
        fd: Option<i64>,
    },
    /// `query-fdsets`; returns a list of [`FdSetInfo`](crate::fds::FdSetInfo).
    QueryFdSets,
    /// `x-add-blocker`: refuse migrations until it is removed; returns [`BlockerInfo`](super::schema::BlockerInfo).
    XAddBlocker {
        /// Why, for those whose migration is refused.
        reason: String,
        /// Which kinds of migration.
        modes: Vec<MigrationMode>,
    },
    /// `x-remove-blocker`.
    XRemoveBlocker {
        /// Which, from `x-add-blocker`.
        id: u64,
    },
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

impl Command {
    /// Whether it uses a file descriptor that the client has sent along.
    pub fn takes_fd(&self) -> bool {
        matches!(self, Self::GetFd { .. } | Self::AddFd { .. })
    }
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

/// Arguments of `announce-self`; what is left out is as the migration parameters say.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq)]
pub struct AnnounceSelf {
    /// Time before the second announcement, in milliseconds.
    pub initial: Option<u64>,
    /// Longest time between two, in milliseconds.
    pub max: Option<u64>,
    /// How many.
    pub rounds: Option<u64>,
    /// By how much the time grows, in milliseconds.
    pub step: Option<u64>,
    /// Only these interfaces.
    pub interfaces: Option<Vec<String>>,
    /// A name for this run of announcements; one of the same name is replaced.
    #[serde(default)]
    pub id: String,
}

/// Arguments of `calc-dirty-rate`.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "kebab-case")]
pub struct CalcDirtyRate {
    /// How long, in `calc_time_unit`.
    pub calc_time: i64,
    /// The unit.
    #[serde(default)]
    pub calc_time_unit: TimeUnit,
    /// Pages per GiB to look at, with page sampling.
    pub sample_pages: Option<i64>,
    /// How.
    #[serde(default)]
    pub mode: DirtyRateMode,
}

/// A unit of time.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum TimeUnit {
    /// Seconds.
    #[default]
    Second,
    /// Milliseconds.
    Millisecond,
}

/// How the dirty rate is measured.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum DirtyRateMode {
    /// Some pages are compared before and after.
    #[default]
    PageSampling,
    /// KVM's dirty ring; not supported.
    DirtyRing,
    /// The dirty log that migrations use.
    DirtyBitmap,
}

/// Something that `yank` can get unstuck.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, serde::Serialize)]
#[serde(rename_all = "kebab-case", tag = "type")]
pub enum YankInstance {
    /// The connections of the migration.
    Migration,
    /// A block device's connection; there are none.
    BlockNode {
        /// Which.
        #[serde(rename = "node-name")]
        node_name: String,
    },
    /// A character device's connection; there are none.
    Chardev {
        /// Which.
        id: String,
    },
}

type Arguments = Map<String, Value>;
type Parsed = Result<Command, QmpError>;

/// Reads `given`, which was checked against the command's declaration, into `T`.
fn read<T: DeserializeOwned>(given: Arguments) -> Result<T, QmpError> {
    serde_path_to_error::deserialize(Value::Object(given)).map_err(|error| {
        let path = error.path().to_string();
        let problem = error.into_inner();
        QmpError::generic(match path.as_str() {
            // At the top, serde's own words name the argument.
            "." => problem.to_string(),
            _ => format!("argument `{path}`: {problem}"),
        })
    })
}

/// Declares the arguments of one command where they are read.
macro_rules! arguments {
    ($given:ident { $($(#[$attribute:meta])* $name:ident: $kind:ty),* $(,)? }) => {
        let ($($name,)*) = {
            #[derive(Deserialize)]
            #[serde(rename_all = "kebab-case")]
            struct Arguments { $($(#[$attribute])* $name: $kind,)* }
            let Arguments { $($name),* } = read($given)?;
            ($($name,)*)
        };
    };
}

pub(super) fn migrate(given: Arguments) -> Parsed {
    arguments!(given { uri: Option<String>, channels: Option<Value>, resume: Option<bool> });
    let (address, cpr) = match (uri.as_deref(), channels) {
        (None, None) => (None, None),
        (uri, channels) => {
            let (main, cpr) = channels::addresses(uri, channels)?;
            (Some(main), cpr)
        }
    };
    Ok(Command::Migrate {
        address,
        cpr,
        resume: resume.unwrap_or(false),
    })
}

pub(super) fn migrate_incoming(given: Arguments) -> Parsed {
    arguments!(given { uri: Option<String>, channels: Option<Value>, exit_on_error: Option<bool> });
    Ok(Command::MigrateIncoming {
        address: channels::address(uri.as_deref(), channels)?,
        exit_on_error: exit_on_error.unwrap_or(true),
    })
}

pub(super) fn migrate_continue(given: Arguments) -> Parsed {
    arguments!(given {
        state: MigrationStatus
    });
    Ok(Command::MigrateContinue { state })
}

pub(super) fn migrate_recover(given: Arguments) -> Parsed {
    arguments!(given { uri: String });
    Ok(Command::MigrateRecover {
        address: channels::address(Some(&uri), None)?,
    })
}

pub(super) fn set_parameters(given: Arguments) -> Parsed {
    Ok(Command::MigrateSetParameters(ParameterPatch::parse(
        &given,
    )?))
}

pub(super) fn set_capabilities(given: Arguments) -> Parsed {
    arguments!(given { capabilities: Vec<CapabilityStatus> });
    Ok(Command::MigrateSetCapabilities(capabilities))
}

pub(super) fn announce_self(given: Arguments) -> Parsed {
    Ok(Command::AnnounceSelf(read(given)?))
}

pub(super) fn calc_dirty_rate(given: Arguments) -> Parsed {
    Ok(Command::CalcDirtyRate(read(given)?))
}

pub(super) fn query_dirty_rate(given: Arguments) -> Parsed {
    arguments!(given { calc_time_unit: Option<TimeUnit> });
    Ok(Command::QueryDirtyRate {
        unit: calc_time_unit.unwrap_or_default(),
    })
}

pub(super) fn yank(given: Arguments) -> Parsed {
    arguments!(given { instances: Vec<YankInstance> });
    Ok(Command::Yank { instances })
}

pub(super) fn getfd(given: Arguments) -> Parsed {
    arguments!(given { fdname: String });
    Ok(Command::GetFd { name: fdname })
}

pub(super) fn closefd(given: Arguments) -> Parsed {
    arguments!(given { fdname: String });
    Ok(Command::CloseFd { name: fdname })
}

pub(super) fn add_fd(given: Arguments) -> Parsed {
    arguments!(given { fdset_id: Option<i64>, opaque: Option<String> });
    Ok(Command::AddFd {
        set: fdset_id,
        opaque,
    })
}

pub(super) fn remove_fd(given: Arguments) -> Parsed {
    arguments!(given { fdset_id: i64, fd: Option<i64> });
    Ok(Command::RemoveFd { set: fdset_id, fd })
}

pub(super) fn add_blocker(given: Arguments) -> Parsed {
    arguments!(given { reason: String, modes: Option<Vec<String>> });
    let modes = match modes {
        None => MigrationMode::ALL.to_vec(),
        Some(names) => MigrationMode::ALL
            .into_iter()
            .filter(|mode| names.iter().any(|name| name == mode.name()))
            .collect(),
    };
    Ok(Command::XAddBlocker { reason, modes })
}

pub(super) fn remove_blocker(given: Arguments) -> Parsed {
    arguments!(given { id: u64 });
    Ok(Command::XRemoveBlocker { id })
}

pub(super) fn query_workload(given: Arguments) -> Parsed {
    arguments!(given { reset: Option<bool> });
    Ok(Command::XQueryWorkload {
        reset: reset.unwrap_or(false),
    })
}

pub(super) fn confirm_unplug(given: Arguments) -> Parsed {
    arguments!(given { id: String });
    Ok(Command::XConfirmUnplug { id })
}

pub(super) fn resolve(given: Arguments) -> Parsed {
    arguments!(given {
        outcome: ResolveOutcome
    });
    Ok(Command::XResolve { outcome })
}
