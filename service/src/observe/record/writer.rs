//! Writes records on a thread of its own: a slow or full disk delays nobody and harms nothing but the record.

use std::fs::{self, DirBuilder};
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError, SyncSender, TrySendError};
use std::thread;
use std::time::Duration;

use anyhow::Context;
use tempfile::NamedTempFile;

use super::MigrationRecord;

/// Records that may wait for the disk. One migration makes one.
const WAITING_MAX: usize = 4;
/// How long the end of the process waits for the disk.
const FAREWELL: Duration = Duration::from_secs(5);
/// Names tried when a file of that name exists, which takes two attempts with one identity.
const NAMES_MAX: u32 = 100;

/// The thread, and the way to it.
#[derive(Debug)]
pub(crate) struct RecordWriter {
    queue: SyncSender<Box<MigrationRecord>>,
    ended: mpsc::Receiver<()>,
}

impl RecordWriter {
    /// Writes into `folder`, which is made if it does not exist.
    ///
    /// # Errors
    /// When the folder cannot be made or nothing can be written into it. Better now than after the first migration.
    pub(crate) fn start(folder: &Path) -> anyhow::Result<Self> {
        if !folder.is_dir() {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(folder)
                .with_context(|| {
                    format!("cannot make the folder {} for records", folder.display())
                })?;
        }
        NamedTempFile::with_prefix_in(".probe-", folder)
            .with_context(|| format!("cannot write records into {}", folder.display()))?;
        // Relative paths must not depend on what the process does later.
        let folder = fs::canonicalize(folder)
            .with_context(|| format!("cannot find the folder {}", folder.display()))?;
        let (queue, waiting) = mpsc::sync_channel::<Box<MigrationRecord>>(WAITING_MAX);
        let (ending, ended) = mpsc::channel::<()>();
        thread::Builder::new()
            .name("vm-records".into())
            .spawn(move || {
                for record in waiting {
                    match write(&folder, &record) {
                        Ok(path) => tracing::info!(path = %path.display(), "migration recorded"),
                        Err(error) => tracing::warn!(
                            folder = %folder.display(),
                            migration_id = record.migration_id,
                            error = &error as &dyn std::error::Error,
                            "the record of this migration could not be written and is lost"
                        ),
                    }
                }
                drop(ending);
            })
            .context("cannot start the thread that writes records")?;
        Ok(Self { queue, ended })
    }

    /// Hands a record over and returns at once.
    pub(crate) fn submit(&self, record: MigrationRecord) {
        match self.queue.try_send(Box::new(record)) {
            Ok(()) => {}
            Err(TrySendError::Full(record) | TrySendError::Disconnected(record)) => tracing::warn!(
                migration_id = record.migration_id,
                "the disk takes no records; the record of this migration is lost"
            ),
        }
    }

    /// Waits until all records are written, but not for ever.
    pub(crate) fn finish(self) {
        drop(self.queue);
        if self.ended.recv_timeout(FAREWELL) == Err(RecvTimeoutError::Timeout) {
            tracing::warn!("the disk takes no records; what waits for it is lost");
        }
    }
}

/// Writes a record completely or not at all, with mode 0600, and never over another file.
fn write(folder: &Path, record: &MigrationRecord) -> io::Result<PathBuf> {
    // Made with mode 0600, and removed again unless it gets its name.
    let mut file = NamedTempFile::with_prefix_in(".record-", folder)?;
    {
        let mut out = io::BufWriter::new(file.as_file_mut());
        serde_json::to_writer(&mut out, record)?;
        out.write_all(b"\n")?;
        out.flush()?;
    }
    file.as_file().sync_all()?;
    for number in 1..=NAMES_MAX {
        let path = folder.join(file_name(record, number));
        match file.persist_noclobber(&path) {
            Ok(_) => return Ok(path),
            Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => file = error.file,
            Err(error) => return Err(error.error),
        }
    }
    Err(io::Error::new(
        io::ErrorKind::AlreadyExists,
        "too many files have its name",
    ))
}

/// UTC time in milliseconds, identity, side: names sort by time, and the two sides of a migration are found by its identity.
fn file_name(record: &MigrationRecord, number: u32) -> String {
    const LENGTH: usize = "20260504T131415.926".len();
    let began = record.began.chars();
    let began = began.filter(|c| c.is_ascii_alphanumeric() || *c == '.');
    let began: String = began.take(LENGTH).collect();
    let again = match number {
        1 => String::new(),
        _ => format!("-{number}"),
    };
    format!(
        "{began}Z-{}-{}{again}.json",
        record.migration_id,
        record.side.name()
    )
}
