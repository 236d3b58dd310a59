//! How the data path is driven.

use std::sync::Arc;

use super::limit::BandwidthLimit;
use crate::uring;

/// Environment variable that, set to `1`, keeps the data path off io_uring.
pub const NO_URING_ENV: &str = "VMFERRY_NO_URING";

/// What moves bytes between guest memory and sockets.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Backend {
    /// One io_uring per data connection.
    Uring,
    /// Blocking system calls.
    Plain,
}

/// A [`Backend`] and why it was chosen, for the log and for statistics.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct BackendChoice {
    /// The backend.
    pub backend: Backend,
    /// Why, as a clause: "the kernel refuses io_uring (...)".
    pub reason: String,
}

impl Backend {
    /// Plain calls if the environment variable [`NO_URING_ENV`] is `1` or the kernel refuses to make a ring, else io_uring.
    pub fn detect() -> BackendChoice {
        if std::env::var_os(NO_URING_ENV).is_some_and(|value| value == "1") {
            return BackendChoice {
                backend: Self::Plain,
                reason: format!("{NO_URING_ENV}=1 is set"),
            };
        }
        match uring::probe() {
            Ok(()) => BackendChoice {
                backend: Self::Uring,
                reason: "the kernel offers io_uring".to_owned(),
            },
            Err(error) => BackendChoice {
                backend: Self::Plain,
                reason: format!(
                    "the kernel refuses io_uring ({error}); look at sysctl kernel.io_uring_disabled, seccomp and the kernel version"
                ),
            },
        }
    }

    /// The word used in logs, statistics and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Uring => "io_uring",
            Self::Plain => "plain",
        }
    }
}

/// When to let the network card read guest pages directly instead of copying them into the socket.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum ZeroCopy {
    /// On TCP connections to other hosts, as long as the kernel reports that it really saves the copy. Never with checksums, because
    /// the page could change between checksum and transmission, and only with io_uring.
    #[default]
    Auto,
    /// Always copy.
    Never,
    /// As `Auto`, but also tried within the host, where it is in vain.
    #[cfg(test)]
    Anywhere,
    /// Even if the kernel reports that it copies.
    #[cfg(test)]
    Always,
}

/// How a sender works.
#[derive(Clone, Debug)]
pub struct SenderConfig {
    /// What moves the bytes.
    pub backend: Backend,
    /// Protect page data by CRC32C, at the price of one more copy.
    pub checksum: bool,
    /// Bytes per second of all connections together.
    pub bandwidth: Arc<BandwidthLimit>,
    /// Zero-copy sends.
    pub zero_copy: ZeroCopy,
}

/// How a receiver works.
#[derive(Clone, Copy, Debug)]
pub struct ReceiverConfig {
    /// What moves the bytes.
    pub backend: Backend,
}
