//! Reads a record back. A record is a file that somebody sent: nothing in it is believed before it is checked, and what is wrong with
//! it is said in one sentence.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::series::{CONNECTION_COUNTS_MAX, ROUNDS_MAX, SAMPLES_MAX, TIMELINE_MAX};
use super::{FORMAT, MigrationRecord, VERSION};

/// Largest file that is read. The writer stays below a tenth of it.
pub const FILE_BYTES_MAX: u64 = 16 << 20;
/// Most parts of a blackout.
const PARTS_MAX: usize = 64;
/// Longest time that is believed: a century.
const TIME_US_MAX: u64 = 100 * 366 * 24 * 3600 * 1_000_000;

/// The file is no record that can be shown. Whoever wrote or chose it is at fault; nothing was changed.
#[derive(Debug, thiserror::Error)]
#[error("{}: {fault}", path.display())]
pub struct ReadError {
    /// Which file.
    pub path: PathBuf,
    /// What is wrong with it.
    #[source]
    pub fault: RecordFault,
}

/// What is wrong with a record.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RecordFault {
    /// The file cannot be read.
    #[error("cannot be read: {0}")]
    Io(io::Error),
    /// Larger than [`FILE_BYTES_MAX`].
    #[error("is larger than {} MiB, which no migration record is", FILE_BYTES_MAX >> 20)]
    TooLarge,
    /// The end is missing.
    #[error("is cut off: the end of the record is missing (line {line})")]
    CutOff {
        /// Where it ends.
        line: usize,
    },
    /// Not JSON, or not a record.
    #[error("is no migration record of vmferry: {0}")]
    NotARecord(String),
    /// Of a version that this program does not know.
    #[error(
        "is a record of version {0}, this vmferry reads version {VERSION}; use the vmferry that wrote it, or a newer one"
    )]
    Version(u64),
    /// A member is missing or has the wrong type.
    #[error("is a damaged record: {0}")]
    Damaged(String),
}

/// Reads a record.
///
/// # Errors
/// [`ReadError`], with the file and what is wrong with it.
pub fn read(path: &Path) -> Result<MigrationRecord, ReadError> {
    let fail = |fault| ReadError {
        path: path.to_owned(),
        fault,
    };
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(|error| fail(RecordFault::Io(error)))?;
    // One byte more than allowed, so that too large is told from just large enough. A pipe has no size to ask for.
    file.take(FILE_BYTES_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| fail(RecordFault::Io(error)))?;
    parse(&bytes).map_err(fail)
}

/// What every version has.
#[derive(Deserialize)]
struct Head {
    format: String,
    version: u64,
}

/// Parses and checks a record.
///
/// # Errors
/// [`RecordFault`].
pub fn parse(bytes: &[u8]) -> Result<MigrationRecord, RecordFault> {
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(RecordFault::TooLarge);
    }
    let head: Head = serde_json::from_slice(bytes).map_err(|error| {
        if error.is_eof() && !bytes.is_empty() {
            RecordFault::CutOff { line: error.line() }
        } else {
            RecordFault::NotARecord(error.to_string())
        }
    })?;
    if head.format != FORMAT {
        let shown: String = head.format.chars().take(60).collect();
        return Err(RecordFault::NotARecord(format!(
            "its format is {shown:?}, not {FORMAT:?}"
        )));
    }
    if head.version != u64::from(VERSION) {
        return Err(RecordFault::Version(head.version));
    }
    let record: MigrationRecord =
        serde_json::from_slice(bytes).map_err(|error| RecordFault::Damaged(error.to_string()))?;
    check(&record).map_err(RecordFault::Damaged)?;
    Ok(record)
}

/// What the page takes for granted.
fn check(record: &MigrationRecord) -> Result<(), String> {
    let MigrationRecord {
        migration_id,
        blackout,
        timeline,
        rounds,
        samples,
        duration_us,
        began_unix_us,
        ..
    } = record;
    let hex = |c: char| c.is_ascii_hexdigit() && !c.is_ascii_uppercase();
    if migration_id.len() != 32 || !migration_id.chars().all(hex) {
        return Err("migration-id is not 32 hexadecimal digits".to_owned());
    }
    for (list, length, most) in [
        ("blackout", blackout.len(), PARTS_MAX),
        ("timeline", timeline.len(), TIMELINE_MAX),
        ("rounds", rounds.len(), ROUNDS_MAX),
        ("samples", samples.len(), SAMPLES_MAX),
    ] {
        if length > most {
            return Err(format!(
                "{list} has {length} entries, at most {most} are written"
            ));
        }
    }
    let counts: usize = samples.iter().map(|s| s.connection_bytes.len()).sum();
    if counts > CONNECTION_COUNTS_MAX + usize::from(u8::MAX) {
        return Err(format!("samples have {counts} connection-bytes"));
    }
    in_order("timeline", timeline.iter().map(|change| change.at_us))?;
    in_order("rounds", rounds.iter().map(|round| round.began_us))?;
    in_order("samples", samples.iter().map(|sample| sample.at_us))?;
    let bytes = samples.iter().map(|sample| sample.bytes);
    if !bytes.is_sorted() {
        return Err("bytes of samples get fewer".to_owned());
    }
    let parts = blackout.iter().map(|part| part.duration_us);
    let times = rounds.iter().map(|round| round.duration_us);
    let limits = parts.chain(times).chain([*duration_us, *began_unix_us]);
    match limits.max() {
        Some(longest) if longest > TIME_US_MAX => Err(format!("a time of {longest} microseconds")),
        _ => Ok(()),
    }
}

fn in_order(list: &str, times: impl Iterator<Item = u64> + Clone) -> Result<(), String> {
    if !times.clone().is_sorted() {
        return Err(format!("{list} is not in the order of time"));
    }
    match times.max() {
        Some(last) if last > TIME_US_MAX => {
            Err(format!("{list} has a time of {last} microseconds"))
        }
        _ => Ok(()),
    }
}
