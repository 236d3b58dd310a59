//! A ring for one socket and the slab that owns the memory of its operations.

#![expect(
    unsafe_code,
    reason = "queues operations on raw addresses; the slab owns the memory until the last completion"
)]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use io_uring::{IoUring, cqueue, opcode, squeue, types};

use crate::data::lent::LentMessage;

/// Operations that may be under way: one send or receive, and zero-copy sends that the kernel still reads.
pub(crate) const OPS_MAX: usize = 16;

/// `IORING_SEND_ZC_REPORT_USAGE`: the second completion says whether the kernel copied nevertheless.
const SEND_ZC_REPORT_USAGE: u16 = 1 << 3;
/// `IORING_NOTIF_USAGE_ZC_COPIED`: it did.
const NOTIF_COPIED: u32 = 1 << 31;

/// What to do with a message.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum OpKind {
    Send,
    SendZeroCopy,
    Receive,
}

/// An operation that the kernel has finished, or with which only the reading of its memory is not.
#[derive(Debug)]
pub(crate) struct Completion {
    /// Bytes moved.
    pub(crate) result: io::Result<usize>,
    /// The message; `None` while the kernel still reads it (zero-copy).
    pub(crate) message: Option<LentMessage>,
}

/// Place of an operation in the slab.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Token(usize);

#[derive(Debug)]
struct Op {
    message: LentMessage,
    state: OpState,
}

#[derive(Debug)]
enum OpState {
    /// No completion yet.
    InKernel,
    /// All bytes are accounted for, the kernel still reads the memory. `None` once the result was fetched.
    Lent(Option<i32>),
    /// The last completion came.
    Done(Option<i32>),
}

/// A ring and the operations under way on its socket.
pub(crate) struct Ring {
    uring: IoUring,
    socket: Arc<OwnedFd>,
    slab: Vec<Option<Op>>,
    /// Operations of which the kernel owes a completion.
    in_kernel: usize,
    /// Zero-copy sends that the kernel copied.
    copied: u64,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring")
            .field("in_kernel", &self.in_kernel)
            .finish_non_exhaustive()
    }
}

/// Whether the kernel lets this process make a ring.
///
/// # Errors
/// Why not.
pub(crate) fn probe() -> io::Result<()> {
    build().map(drop)
}

/// The best ring the kernel offers: completions only when asked for by the one thread that submits (6.1), else only when that thread
/// enters the kernel anyway (5.19), else the default.
fn build() -> io::Result<IoUring> {
    // A completion queue of twice the operations: zero-copy posts two each.
    let (submissions, completions) = (OPS_MAX as u32, 2 * OPS_MAX as u32);
    let mut refused = None;
    for flags in 0..3 {
        let mut builder = IoUring::builder();
        builder.dontfork().setup_cqsize(completions);
        match flags {
            0 => builder.setup_single_issuer().setup_defer_taskrun(),
            1 => builder.setup_coop_taskrun(),
            _ => &mut builder,
        };
        match builder.build(submissions) {
            Ok(uring) => return Ok(uring),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => refused = Some(error),
            Err(error) => return Err(error),
        }
    }
    Err(refused.unwrap_or_else(|| io::ErrorKind::Unsupported.into()))
}

impl Ring {
    /// A ring for `socket`. Must be made on the thread that uses it.
    ///
    /// # Errors
    /// When the kernel refuses (sysctl `kernel.io_uring_disabled`, seccomp, locked memory), or does not know the operations.
    pub(crate) fn new(socket: Arc<OwnedFd>) -> io::Result<Self> {
        Ok(Self {
            uring: build()?,
            socket,
            slab: (0..OPS_MAX).map(|_| None).collect(),
            in_kernel: 0,
            copied: 0,
        })
    }

    /// Starts an operation on all bytes left of `message`. The kernel does as much as it can at once.
    ///
    /// # Errors
    /// When the kernel does not accept submissions. The ring is unusable then.
    ///
    /// # Panics
    /// If [`OPS_MAX`] operations are under way.
    pub(crate) fn start(&mut self, kind: OpKind, mut message: LentMessage) -> io::Result<Token> {
        let at = self
            .slab
            .iter()
            .position(Option::is_none)
            .expect("callers keep to OPS_MAX");
        let header = message.header();
        let fd = types::Fd(self.socket.as_raw_fd());
        // `MSG_WAITALL` lets the kernel resume short transfers by itself.
        let flags = (libc::MSG_WAITALL | libc::MSG_NOSIGNAL) as u32;
        let entry = match kind {
            OpKind::Send => opcode::SendMsg::new(fd, header).flags(flags).build(),
            OpKind::SendZeroCopy => opcode::SendMsgZc::new(fd, header)
                .flags(flags)
                .ioprio(SEND_ZC_REPORT_USAGE)
                .build(),
            OpKind::Receive => opcode::RecvMsg::new(fd, header).flags(flags).build(),
        };
        self.slab[at] = Some(Op {
            message,
            state: OpState::InKernel,
        });
        self.queue(&entry.user_data(at as u64))?;
        // From here on the kernel owes a completion, even if it has not looked at the queue yet.
        self.in_kernel += 1;
        self.enter(0)?;
        Ok(Token(at))
    }

    /// Waits for the result of an operation. Unless the kernel still reads the memory, this ends the operation.
    ///
    /// # Errors
    /// When waiting itself fails; a failed operation is in [`Completion::result`].
    ///
    /// # Panics
    /// If the token's operation has given its result already.
    pub(crate) fn result(&mut self, token: Token) -> io::Result<Completion> {
        loop {
            let op = self.op(token);
            let result = match &mut op.state {
                OpState::InKernel => None,
                OpState::Lent(result) | OpState::Done(result) => result.take(),
            };
            match result {
                Some(result) => {
                    return Ok(Completion {
                        result: io_result(result),
                        message: self.take_if_done(token),
                    });
                }
                None => {
                    assert!(
                        matches!(op.state, OpState::InKernel),
                        "one result per operation"
                    );
                    self.reap(1)?;
                }
            }
        }
    }

    /// The message of an operation whose result was fetched, once the kernel no longer reads its memory. Does not wait.
    pub(crate) fn try_release(&mut self, token: Token) -> Option<LentMessage> {
        self.deliver();
        self.take_if_done(token)
    }

    /// Bytes that the message of an operation under way had left when the operation started.
    pub(crate) fn bytes_left(&self, token: Token) -> u64 {
        let op = self.slab[token.0].as_ref();
        op.expect("tokens name operations under way")
            .message
            .bytes_left()
    }

    /// Zero-copy sends that the kernel copied nevertheless.
    pub(crate) fn copied(&self) -> u64 {
        self.copied
    }

    /// Waits for any completion, at most for `time`.
    ///
    /// # Errors
    /// When waiting fails for another reason than the time.
    pub(crate) fn wait(&mut self, time: Duration) -> io::Result<()> {
        let time = types::Timespec::from(time);
        let limited = types::SubmitArgs::new().timespec(&time);
        match self.uring.submitter().submit_with_args(1, &limited) {
            Ok(_) => Ok(()),
            Err(error) if matches!(error.raw_os_error(), Some(libc::ETIME | libc::EINTR)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn op(&mut self, token: Token) -> &mut Op {
        self.slab[token.0]
            .as_mut()
            .expect("tokens name operations under way")
    }

    fn take_if_done(&mut self, token: Token) -> Option<LentMessage> {
        match self.op(token).state {
            OpState::Done(None) => self.slab[token.0].take().map(|op| op.message),
            _ => None,
        }
    }

    fn queue(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        // SAFETY: the entry points to the header of a message that is in the slab already. Messages leave the slab only after their
        // last completion (`take_if_done`) or are leaked (`drop`), so header, buffer list and buffers stay valid for the kernel. The
        // file descriptor is ours until then too.
        let pushed = unsafe { self.uring.submission().push(entry) };
        // The queue has a place per slab entry and is emptied at once, so this cannot happen.
        pushed.map_err(|_| io::Error::other("the submission queue is full"))
    }

    /// Submits what is queued and waits for `want` completions.
    fn enter(&mut self, want: usize) -> io::Result<()> {
        loop {
            match self.uring.submit_and_wait(want) {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Completions do not fit: those there are taken by the caller, who then comes again.
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }

    fn reap(&mut self, want: usize) -> io::Result<()> {
        if self.uring.completion().is_empty() {
            self.enter(want)?;
        }
        self.deliver();
        Ok(())
    }

    fn deliver(&mut self) {
        // Collected first: nothing below may touch the ring while its queue is borrowed.
        let mut arrived = [None; 2 * OPS_MAX];
        let count = arrived
            .iter_mut()
            .zip(self.uring.completion())
            .map(|(place, entry)| *place = Some((entry.user_data(), entry.result(), entry.flags())))
            .count();
        for (token, result, flags) in arrived[..count].iter().flatten().copied() {
            self.complete(token, result, flags);
        }
    }

    fn complete(&mut self, token: u64, result: i32, flags: u32) {
        let op = usize::try_from(token)
            .ok()
            .and_then(|at| self.slab.get_mut(at))
            .and_then(Option::as_mut)
            .expect("the kernel completes what was submitted");
        if cqueue::notif(flags) {
            let OpState::Lent(result_left) = &mut op.state else {
                panic!("a notification before its result");
            };
            if result.cast_unsigned() & NOTIF_COPIED != 0 {
                self.copied += 1;
            }
            op.state = OpState::Done(result_left.take());
            self.in_kernel -= 1;
        } else {
            assert!(
                matches!(op.state, OpState::InKernel),
                "one result per operation"
            );
            // Also an error may be followed by a notification: the flag decides, not the result.
            if cqueue::more(flags) {
                op.state = OpState::Lent(Some(result));
            } else {
                op.state = OpState::Done(Some(result));
                self.in_kernel -= 1;
            }
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        if self.in_kernel == 0 {
            return;
        }
        // Ends whatever waits for the peer. The connection is of no use any more: operations under way at this point mean failure
        // or cancellation, except for zero-copy sends whose notification is late, and those are reaped before (see `UringLink`).
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
        // Throws away what TCP still holds of a zero-copy send to a peer that no longer acknowledges.
        let _ = rustix::net::connect_unspec(&self.socket);
        while self.in_kernel > 0 {
            if let Err(error) = self.reap(1) {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    operations = self.in_kernel,
                    "the kernel keeps guest memory, which is therefore never freed"
                );
                std::mem::forget(std::mem::take(&mut self.slab));
                return;
            }
        }
    }
}

fn io_result(result: i32) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result))
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::memory::extents::tests::{memfd_ram, run};

    #[test]
    fn a_ring_that_is_dropped_waits_for_the_kernel_before_it_frees_memory() {
        let ram = memfd_ram(&[4]);
        let mapping = Arc::clone(ram.blocks()[0].mapping());
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut ring = Ring::new(Arc::new(ours.into())).unwrap();
        let mut message = LentMessage::new(ram, 10);
        message.push_own(0..10);
        message.push_pages(run(0, 0, 4));
        // Nothing was sent, so the kernel holds on to this.
        ring.start(OpKind::Receive, message).unwrap();
        assert_eq!(ring.in_kernel, 1);
        drop(ring);
        assert_eq!(Arc::strong_count(&mapping), 1);
        // The connection is over for the peer as well.
        assert_eq!(theirs.read(&mut [0; 1]).unwrap(), 0);
    }

    #[test]
    fn several_operations_keep_their_memory_until_each_is_complete() {
        let ram = memfd_ram(&[4]);
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut ring = Ring::new(Arc::new(ours.into())).unwrap();
        let tokens: Vec<_> = (0..OPS_MAX as u8)
            .map(|value| {
                let mut message = LentMessage::new(ram.clone(), 100);
                message.own_mut().fill(value);
                message.push_own(0..100);
                ring.start(OpKind::Send, message).unwrap()
            })
            .collect();
        for (value, token) in (0..).zip(tokens) {
            let completion = ring.result(token).unwrap();
            assert_eq!(completion.result.unwrap(), 100);
            assert_eq!(completion.message.unwrap().own(), [value; 100]);
        }
        assert_eq!(ring.in_kernel, 0);
        let mut received = [0; 100 * OPS_MAX];
        theirs.read_exact(&mut received).unwrap();
    }

    #[test]
    fn a_failed_operation_gives_its_memory_back_with_the_reason() {
        let ram = memfd_ram(&[4]);
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        let mut ring = Ring::new(Arc::new(ours.into())).unwrap();
        let mut message = LentMessage::new(ram, 10);
        message.push_own(0..10);
        let token = ring.start(OpKind::Send, message).unwrap();
        let completion = ring.result(token).unwrap();
        assert_eq!(
            completion.result.unwrap_err().kind(),
            io::ErrorKind::BrokenPipe
        );
        assert!(completion.message.is_some());
    }
}
