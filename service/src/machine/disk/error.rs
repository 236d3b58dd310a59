//! What can go wrong with a disk. Every text names the disk and, where it matters, the file.

use std::io;
use std::path::PathBuf;

use super::holder::Holder;

/// What went wrong with a disk.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiskError {
    /// The description of a disk cannot be used. The operator is at fault.
    #[error("disk {disk}: {reason}")]
    Config {
        /// The disk, or what was written in its place.
        disk: String,
        /// What is wrong.
        reason: String,
    },
    /// Somebody else holds the lock: this side must not touch the image. Stop the other one, then try again.
    #[error(
        "disk {disk}: another process holds the lock of {}{}",
        path.display(),
        holder.as_ref().map(|holder| format!(": {holder}")).unwrap_or_default()
    )]
    Locked {
        /// The disk.
        disk: String,
        /// Its image.
        path: PathBuf,
        /// Who is in the way, if that can be seen from here.
        holder: Option<Holder>,
    },
    /// The image is not the one it was when this disk was described. Put the old one back, then try again.
    #[error("disk {disk}: {} {change} since this process first opened it", path.display())]
    Changed {
        /// The disk.
        disk: String,
        /// Its image.
        path: PathBuf,
        /// What happened to it.
        change: String,
    },
    /// The host refused. The image is as it was, except for the request that failed.
    #[error("disk {disk}: {op} of {} failed", path.display())]
    Host {
        /// The disk.
        disk: String,
        /// Its image.
        path: PathBuf,
        /// What was asked.
        op: &'static str,
        /// The answer.
        #[source]
        source: io::Error,
    },
    /// The host once failed to store what had been written. The guest cannot be moved away from this image, whose content is not what
    /// the guest believes; restart it after repairing the storage.
    #[error("disk {disk}: earlier writes to {} were lost by the host", path.display())]
    LostWrites {
        /// The disk.
        disk: String,
        /// Its image.
        path: PathBuf,
    },
    /// Requests did not end in time; the disk stays active.
    #[error("disk {disk}: {requests} requests to {} did not end within {seconds} s", path.display())]
    Busy {
        /// The disk.
        disk: String,
        /// Its image.
        path: PathBuf,
        /// How many.
        requests: usize,
        /// How long was waited.
        seconds: u64,
    },
    /// The image belongs to the other side of a migration, or to nobody. The caller is at fault.
    #[error("disk {disk} is inactive: its image must not be touched")]
    Inactive {
        /// The disk.
        disk: String,
    },
    /// A write to a read-only disk. The guest is at fault.
    #[error("disk {disk} is read-only")]
    ReadOnly {
        /// The disk.
        disk: String,
    },
    /// A request beyond the end. The guest is at fault.
    #[error("disk {disk}: {bytes} bytes at {offset} reach beyond its {size} bytes")]
    Beyond {
        /// The disk.
        disk: String,
        /// Where the request starts.
        offset: u64,
        /// How long it is.
        bytes: usize,
        /// How large the disk is.
        size: u64,
    },
}
