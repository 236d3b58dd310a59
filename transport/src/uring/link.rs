//! A data connection over a ring.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::ring::{OPS_MAX, OpKind, Ring, Token};
use crate::data::ZeroCopy;
use crate::data::lent::LentMessage;
use crate::data::link::{Link, ZeroCopyCounts};
use crate::data::sockets::leaves_the_host;
use crate::limits::STALL_US;

/// Zero-copy sends whose memory the kernel may still read; one place of the slab stays free for the next operation.
const LENT_MAX: usize = OPS_MAX - 1;
/// Messages below this are not worth the page references and the second completion of zero-copy (the kernel documentation says
/// about 10 KiB; headers alone are never worth it).
const ZERO_COPY_BYTES_MIN: u64 = 32 << 10;

/// How long the peer may take to acknowledge the last zero-copy sends before the connection is torn down. As long as a link on which
/// nothing moves is taken for alive.
const ACKNOWLEDGE_MAX: Duration = Duration::from_micros(STALL_US);
/// How often a wait for an acknowledgement looks whether it is still wanted.
const NAP: Duration = Duration::from_millis(50);

/// A socket driven by a ring of its own.
#[derive(Debug)]
pub(crate) struct UringLink {
    ring: Ring,
    sending: Option<(Token, OpKind)>,
    /// Zero-copy sends that the kernel has taken and still reads, oldest first.
    lent: VecDeque<Token>,
    zero_copy: bool,
    /// Keep to zero-copy although the kernel copies; only tests want that.
    insists: bool,
    zero_copy_sends: u64,
    zero_copy_refusals: u64,
    stopped: Arc<AtomicBool>,
}

impl UringLink {
    /// Makes a ring for a blocking socket, on the thread that will use it. `stopped` tells when waiting for the peer has become
    /// pointless.
    pub(crate) fn open(
        socket: Arc<OwnedFd>,
        zero_copy: ZeroCopy,
        stopped: Arc<AtomicBool>,
    ) -> io::Result<Self> {
        let (zero_copy, insists) = match zero_copy {
            ZeroCopy::Auto => (leaves_the_host(&socket), false),
            ZeroCopy::Never => (false, false),
            #[cfg(test)]
            ZeroCopy::Anywhere => (true, false),
            #[cfg(test)]
            ZeroCopy::Always => (true, true),
        };
        Ok(Self {
            ring: Ring::new(socket)?,
            sending: None,
            lent: VecDeque::with_capacity(LENT_MAX),
            zero_copy,
            insists,
            zero_copy_sends: 0,
            zero_copy_refusals: 0,
            stopped,
        })
    }

    fn start(&mut self, message: LentMessage) -> io::Result<()> {
        let kind = if self.zero_copy && message.bytes_left() >= ZERO_COPY_BYTES_MIN {
            OpKind::SendZeroCopy
        } else {
            OpKind::Send
        };
        self.sending = Some((self.ring.start(kind, message)?, kind));
        Ok(())
    }

    /// Zero-copy costs more than it saves on this connection.
    fn give_up_zero_copy(&mut self, reason: &'static str) {
        if std::mem::take(&mut self.zero_copy) {
            tracing::info!(reason, "zero-copy given up on a data connection");
        }
    }

    /// The kernel refused a zero-copy send. If that is because too much memory is lent, one part of it is waited for.
    fn handle_refusal(&mut self, error: &io::Error) -> io::Result<()> {
        self.zero_copy_refusals += 1;
        let out_of_memory = matches!(error.raw_os_error(), Some(libc::ENOMEM | libc::ENOBUFS));
        match self.lent.front() {
            Some(&oldest) if out_of_memory => {
                self.reclaim(oldest)?;
                self.lent.pop_front();
            }
            _ => self.give_up_zero_copy("the kernel refuses it"),
        }
        Ok(())
    }

    /// Waits until the kernel no longer reads the memory of a zero-copy send. Only the peer's acknowledgement ends this, which
    /// `shutdown` does not bring about, so the wait looks whether it is still wanted.
    fn reclaim(&mut self, token: Token) -> io::Result<LentMessage> {
        loop {
            if let Some(message) = self.ring.try_release(token) {
                return Ok(message);
            }
            if self.stopped.load(Ordering::Acquire) {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            self.ring.wait(NAP)?;
        }
    }

    /// A message to use again from those whose memory the kernel has let go. Waits only if it holds too many.
    fn spare(&mut self) -> io::Result<Option<LentMessage>> {
        let Some(&oldest) = self.lent.front() else {
            return Ok(None);
        };
        let released = if self.lent.len() >= LENT_MAX {
            Some(self.reclaim(oldest)?)
        } else {
            self.ring.try_release(oldest)
        };
        if released.is_some() {
            self.lent.pop_front();
        }
        if self.ring.copied() > 0 && !self.insists {
            self.give_up_zero_copy("the kernel copies nevertheless");
        }
        Ok(released)
    }
}

impl Link for UringLink {
    fn send_start(&mut self, message: LentMessage) -> io::Result<()> {
        assert!(self.sending.is_none(), "one message at a time");
        self.start(message)
    }

    fn send_finish(&mut self) -> io::Result<Option<LentMessage>> {
        while let Some((token, kind)) = self.sending.take() {
            let completion = self.ring.result(token)?;
            let zero_copy = kind == OpKind::SendZeroCopy;
            let sent = match completion.result {
                Ok(sent) => sent,
                Err(error) if zero_copy && is_zero_copy_refusal(&error) => {
                    self.handle_refusal(&error)?;
                    0
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                Err(error) => return Err(error),
            };
            self.zero_copy_sends += u64::from(zero_copy);
            let mut message = match completion.message {
                Some(message) => message,
                None if self.ring.bytes_left(token) == sent as u64 => {
                    self.lent.push_back(token);
                    break;
                }
                // The rest cannot be sent from memory that is lent already: wait for it. Short zero-copy sends are rare.
                None => self.reclaim(token)?,
            };
            message.advance(sent);
            if message.bytes_left() == 0 {
                return Ok(Some(message));
            }
            self.start(message)?;
        }
        self.spare()
    }

    fn receive(&mut self, mut message: LentMessage) -> io::Result<LentMessage> {
        while message.bytes_left() > 0 {
            let token = self.ring.start(OpKind::Receive, message)?;
            let completion = self.ring.result(token)?;
            message = completion.message.expect("a receive completes once");
            match completion.result {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(received) => message.advance(received),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(message)
    }

    fn zero_copy(&self) -> ZeroCopyCounts {
        ZeroCopyCounts {
            sends: self.zero_copy_sends,
            fallbacks: self.zero_copy_refusals + self.ring.copied(),
        }
    }
}

impl Drop for UringLink {
    fn drop(&mut self) {
        // Zero-copy sends of a healthy connection end when the peer acknowledges; only then may the ring shut the socket down.
        let deadline = Instant::now() + ACKNOWLEDGE_MAX;
        while let Some(&token) = self.lent.front()
            && self.sending.is_none()
            && !self.stopped.load(Ordering::Acquire)
            && Instant::now() < deadline
        {
            if self.ring.try_release(token).is_some() {
                self.lent.pop_front();
            } else if self.ring.wait(NAP).is_err() {
                return;
            }
        }
    }
}

/// Refusals that concern zero-copy alone: unsupported, or too much memory locked.
fn is_zero_copy_refusal(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::EINVAL | libc::ENOMEM | libc::ENOBUFS)
    )
}
