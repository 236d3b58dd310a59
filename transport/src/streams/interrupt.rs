//! Ending another thread's wait: an eventfd that is polled beside what is waited for.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

/// Raised once and for good by whoever gives up; seen by every wait, also those that begin later.
#[derive(Clone, Debug)]
pub(super) struct Interrupt(Arc<OwnedFd>);

/// Why a wait ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Waited {
    /// The descriptor is ready, or broken, which the next call on it tells.
    Ready,
    /// The time is over.
    TimedOut,
}

impl Interrupt {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(eventfd(
            0,
            EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK,
        )?)))
    }

    /// How many hold it: threads that are still there.
    #[cfg(test)]
    pub(super) fn holders(&self) -> usize {
        Arc::strong_count(&self.0)
    }

    pub(super) fn raise(&self) {
        // Fails only when the counter is full, which is as good.
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }

    pub(super) fn is_raised(&self) -> bool {
        let zero = Timespec::default();
        let mut fds = [PollFd::new(&self.0, PollFlags::IN)];
        matches!(poll(&mut fds, Some(&zero)), Ok(1..))
    }

    /// Waits until `fd` is ready for reading or writing.
    ///
    /// # Errors
    /// [`given_up`] when raised, else what the kernel says.
    pub(super) fn wait(
        &self,
        fd: BorrowedFd<'_>,
        flags: PollFlags,
        limit: Option<Duration>,
    ) -> io::Result<Waited> {
        let limit = limit.map(|limit| Timespec {
            tv_sec: limit.as_secs().try_into().unwrap_or(i64::MAX),
            tv_nsec: limit.subsec_nanos().into(),
        });
        loop {
            let mut fds = [
                PollFd::from_borrowed_fd(fd, flags),
                PollFd::from_borrowed_fd(self.0.as_fd(), PollFlags::IN),
            ];
            match poll(&mut fds, limit.as_ref()) {
                Ok(0) => return Ok(Waited::TimedOut),
                Ok(_) if !fds[1].revents().is_empty() => return Err(given_up()),
                Ok(_) => return Ok(Waited::Ready),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// The error of whoever was interrupted. Not `ErrorKind::Interrupted`, after which the standard library tries again.
pub(super) fn given_up() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, "given up")
}
