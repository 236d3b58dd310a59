//! Why file descriptors or guest RAM could not be made, checked or handed over.

use std::io;

/// Why file descriptors or guest RAM could not be made, checked or handed over.
///
/// Sorted by who is at fault: the caller, the process that handed something over, this host.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CprError {
    /// What was asked for cannot be made. The caller is at fault; a retry fails the same way.
    #[error("{0}")]
    Request(String),
    /// A descriptor that was handed over is not what was announced. The process that sent it is at fault; a retry meets the same
    /// descriptor. The VM must stay where it is.
    #[error("descriptor {name:?} refused: {reason}")]
    Descriptor {
        /// What the descriptor was announced as.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The kernel refused. The host is at fault (limits, memory, an old kernel); a retry may help once that is mended.
    #[error("{op} failed")]
    Host {
        /// What was asked of the kernel.
        op: String,
        /// Its answer.
        #[source]
        source: io::Error,
    },
}

impl CprError {
    /// The kernel refused `op`.
    pub(crate) fn host(op: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::Host {
            op: op.into(),
            source: source.into(),
        }
    }
}
