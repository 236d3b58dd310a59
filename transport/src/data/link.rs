//! What the data path needs from a connected socket. Two drivers provide it: the ring and plain system calls.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::config::{Backend, ZeroCopy};
use super::lent::LentMessage;
use super::plain::PlainLink;
use crate::uring::UringLink;

/// One direction of one data connection, used by one thread.
///
/// An end of the stream is an error of kind `UnexpectedEof`: there is always a frame to come when somebody receives.
pub(crate) trait Link {
    /// Starts to send the whole message. At most one is under way: finish the one before first.
    fn send_start(&mut self, message: LentMessage) -> io::Result<()>;

    /// Waits until the kernel has taken all bytes of the message under way. Returns a message to use again, or none if the kernel
    /// still reads its memory (zero-copy), or none is under way.
    fn send_finish(&mut self) -> io::Result<Option<LentMessage>>;

    /// Waits until the whole message is filled.
    fn receive(&mut self, message: LentMessage) -> io::Result<LentMessage>;

    /// How zero-copy sends went so far.
    fn zero_copy(&self) -> ZeroCopyCounts {
        ZeroCopyCounts::default()
    }
}

/// How zero-copy sends of one connection went.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct ZeroCopyCounts {
    /// Messages sent with zero-copy.
    pub sends: u64,
    /// Zero-copy sends that were in vain: the kernel copied nevertheless, or refused and the message was sent again. Unless the
    /// refusal was for a moment, the connection uses plain sends from then on.
    pub fallbacks: u64,
}

/// Opens the driver for `socket` on the thread that will use it. If the ring cannot be had, plain calls do the job.
pub(crate) fn open(
    socket: Arc<OwnedFd>,
    backend: Backend,
    zero_copy: ZeroCopy,
    stopped: Arc<AtomicBool>,
) -> io::Result<Box<dyn Link>> {
    // A ring refuses to wait for a non-blocking socket, and plain calls would spin on one.
    rustix::io::ioctl_fionbio(&socket, false)?;
    if backend == Backend::Uring {
        match UringLink::open(Arc::clone(&socket), zero_copy, stopped) {
            Ok(link) => return Ok(Box::new(link)),
            Err(error) => tracing::warn!(
                error = &error as &dyn std::error::Error,
                "no ring for a data connection, plain system calls are used"
            ),
        }
    }
    Ok(Box::new(PlainLink::new(socket)))
}
