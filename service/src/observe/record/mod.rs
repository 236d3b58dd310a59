//! The record of one migration as one side saw it: what `vmferry run --record` writes and `vmferry report` reads.
//!
//! A record is one JSON object, schema [`FORMAT`] version [`VERSION`]. Times of the migration are microseconds since it began at this
//! side, sizes are bytes, pages have 4096 bytes. All lists are bounded by the writer ([`series`]) and checked by the reader ([`read`]).
//!
//! A later version of vmferry may add members within the same version; readers ignore what they do not know. A member that changes its
//! meaning or goes away makes a new version, and the reader says so instead of guessing.

pub mod read;
pub mod series;
#[cfg(test)]
mod tests;
pub(crate) mod writer;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::migration::status::MigrationStatus;

/// Value of [`MigrationRecord::format`].
pub const FORMAT: &str = "vmferry-migration-record";
/// The version that this program writes, and the newest it reads.
pub const VERSION: u32 = 1;

/// Which side of the migration wrote the record.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// The guest was to leave.
    Source,
    /// The guest was to arrive.
    Target,
}

impl Side {
    /// As in the record and in its file name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Target => "target",
        }
    }

    /// Which way the guest moves, seen from this side.
    pub fn direction(self) -> &'static str {
        match self {
            Self::Source => "outgoing",
            Self::Target => "incoming",
        }
    }
}

/// How the migration ended at this side.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The guest belongs to the target.
    Completed,
    /// It does not; an error says why.
    Failed,
    /// The operator did not want it any more.
    Cancelled,
    /// The process ended before the migration did.
    Unfinished,
}

impl Outcome {
    /// As in the record.
    pub fn name(self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Unfinished => "unfinished",
        }
    }
}

/// One migration as one side saw it.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct MigrationRecord {
    /// [`FORMAT`].
    pub format: String,
    /// [`VERSION`] of the writer.
    pub version: u32,
    /// Who wrote it.
    pub side: Side,
    /// Identity of the attempt, the same at both sides: 32 hexadecimal digits.
    pub migration_id: String,
    /// Name and version of the writer.
    pub software: String,
    /// Name and version of the other side, if it has said them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer_software: Option<String>,
    /// Name of the writer's host.
    #[serde(default)]
    pub host: String,
    /// Process number of the writer.
    #[serde(default)]
    pub pid: u32,
    /// Name of the VM, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm_name: Option<String>,
    /// When it began, in UTC, for people: `2026-05-04T13:14:15.000000Z`.
    pub began: String,
    /// The same in microseconds since 1970. Clocks of two hosts differ.
    pub began_unix_us: u64,
    /// Where the source went to, or where the target listened.
    pub address: String,
    /// What runs the guest: `kvm` or `soft`.
    #[serde(default)]
    pub accelerator: String,
    /// What moved the pages: `io_uring` or `plain`.
    #[serde(default)]
    pub backend: String,
    /// Size of the guest's memory.
    pub ram_bytes: u64,
    /// Memory that existed at this side at the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub populated_bytes: Option<u64>,
    /// Memory that existed at the target when it was ready, as the source was told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub populated_target_bytes: Option<u64>,
    /// The parameters at the begin, as `query-migrate-parameters` names them.
    #[serde(default)]
    pub parameters: Map<String, Value>,
    /// The capabilities that were on, by QMP's names.
    #[serde(default)]
    pub capabilities: Vec<String>,
    /// How it ended.
    pub outcome: Outcome,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// From begin to end, cleanup included.
    pub duration_us: u64,
    /// Sums over all rounds.
    pub totals: Totals,
    /// How long the guest stood still, in parts that follow each other and add up; empty where it is not known (at the target, and
    /// when the migration did not complete).
    #[serde(default)]
    pub blackout: Vec<BlackoutPart>,
    /// Changes of the status, in order.
    pub timeline: Vec<StatusChange>,
    /// Changes that were left out of `timeline`, behind its first half.
    #[serde(default)]
    pub timeline_omitted: u64,
    /// The rounds, in order.
    #[serde(default)]
    pub rounds: Vec<Round>,
    /// Rounds that were left out of `rounds`, behind its first half.
    #[serde(default)]
    pub rounds_omitted: u64,
    /// How far it was from time to time.
    #[serde(default)]
    pub samples: Vec<Sample>,
}

/// Sums over a whole migration.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct Totals {
    /// Bytes on all data connections.
    pub bytes: u64,
    /// Those of them that were sent while the guest stood still; known at the source.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blackout_bytes: Option<u64>,
    /// Pages with content, of complete rounds.
    pub data_pages: u64,
    /// Pages that exist and read as zero, of complete rounds.
    pub zero_pages: u64,
    /// Pages that do not exist; known at the target.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hole_pages: Option<u64>,
    /// Zero-copy sends.
    pub zero_copy_sends: u64,
    /// Zero-copy sends that the kernel did by copying.
    pub zero_copy_fallbacks: u64,
}

/// A part of the blackout.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlackoutPart {
    /// What took the time.
    pub part: String,
    /// How long.
    pub duration_us: u64,
}

/// The status changed.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct StatusChange {
    /// When.
    pub at_us: u64,
    /// To what.
    pub status: MigrationStatus,
}

/// A round of copying.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Round {
    /// Which; the first is 1.
    pub number: u64,
    /// When it began.
    pub began_us: u64,
    /// How long it took, the following fetch of the dirty log included.
    pub duration_us: u64,
    /// How long the pages took to be handed to the kernel; known at the source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub send_us: Option<u64>,
    /// Pages it had to send; known at the source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pages: Option<u64>,
    /// Pages with content.
    pub data_pages: u64,
    /// Pages that exist and read as zero.
    pub zero_pages: u64,
    /// Bytes on all data connections.
    pub bytes: u64,
    /// Pages that the guest had written by its end; known at the source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dirty_pages: Option<u64>,
    /// How fast the guest wrote, as the fetch at the end showed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dirty_bytes_per_sec: Option<u64>,
    /// How long the blackout would have been from here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub predicted_blackout_us: Option<u64>,
    /// The guest stood still.
    #[serde(default)]
    pub last: bool,
    /// The migration ended before the round did; its pages are not counted.
    #[serde(default)]
    pub unfinished: bool,
}

/// How far it was at one moment.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Sample {
    /// When.
    pub at_us: u64,
    /// Bytes since the begin, on all connections.
    pub bytes: u64,
    /// Bytes per second since the sample before.
    pub bytes_per_sec: u64,
    /// How fast the guest writes, as the last fetch of the dirty log showed; absent before the first, and at the target.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dirty_bytes_per_sec: Option<u64>,
    /// What this round has still to send; absent at the target.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remaining_bytes: Option<u64>,
    /// The round under way; the first is 1.
    pub round: u64,
    /// Bytes since the begin, on each connection.
    pub connection_bytes: Vec<u64>,
    /// By how much the guest is slowed down.
    #[serde(default)]
    pub throttle_percent: u8,
}

impl MigrationRecord {
    /// The whole blackout; `None` where it is not known.
    pub fn blackout_us(&self) -> Option<u64> {
        let parts = self.blackout.iter().map(|part| part.duration_us);
        (!self.blackout.is_empty()).then(|| parts.fold(0, u64::saturating_add))
    }
}
