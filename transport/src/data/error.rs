//! Why the data path stopped, sorted by who is at fault.

use std::io;

use crate::memory::DirtyLogError;
use crate::wire::WireError;

/// Why the data path stopped. It cannot go on after any of these: the attempt fails, the source keeps the guest.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// The peer broke the protocol. A retry meets the same peer; check that both sides run released versions.
    #[error("the peer broke the protocol on a data connection")]
    Peer(#[from] WireError),
    /// The peer closed or reset a data connection in the middle. Its log says why; a retry may work.
    #[error("the peer closed a data connection in the middle of a round; its own log says why")]
    Closed,
    /// The kernel reports a failure of the connection. Check the network; a retry may work.
    #[error("{op} failed on a data connection")]
    Link {
        /// What was attempted.
        op: &'static str,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// This host has no memory for guest pages. Free memory, or raise the limit of the memory cgroup or of the file system behind
    /// the guest's RAM, then retry.
    #[error(
        "this host has no memory for guest pages ({op} failed); free memory or raise its limit"
    )]
    Memory {
        /// What was attempted.
        op: &'static str,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// A device of this host failed to give or take its state. The attempt fails, the source keeps the guest.
    #[error("device {device:?}: {op} failed")]
    Device {
        /// Which device.
        device: String,
        /// What was attempted.
        op: &'static str,
        /// What the device says.
        #[source]
        source: io::Error,
    },
    /// The dirty log failed while pages were being sent. The attempt fails, nothing is lost.
    #[error("the dirty log failed while pages were being sent")]
    DirtyLog(#[from] DirtyLogError),
    /// A thread of the data path panicked: a bug of this program. The message of the panic is in its standard error.
    #[error("a data thread panicked; please report this")]
    Panic,
}

impl DataError {
    /// Sorts the kernel's answer to `op` on a socket whose buffers are guest pages, or on the file behind them.
    pub(crate) fn from_kernel(op: &'static str, source: io::Error) -> Self {
        if source.kind() == io::ErrorKind::UnexpectedEof {
            return Self::Closed;
        }
        match source.raw_os_error() {
            Some(libc::EPIPE | libc::ECONNRESET) => Self::Closed,
            Some(libc::EFAULT | libc::ENOMEM | libc::ENOSPC | libc::EDQUOT) => {
                Self::Memory { op, source }
            }
            _ => Self::Link { op, source },
        }
    }
}
