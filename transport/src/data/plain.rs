//! The driver for kernels without io_uring: blocking `sendmsg` and `recvmsg`.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use super::lent::LentMessage;
use super::link::Link;

/// A socket driven by blocking calls. `shutdown` from another thread ends them.
#[derive(Debug)]
pub(crate) struct PlainLink {
    socket: Arc<OwnedFd>,
    sent: Option<LentMessage>,
}

impl PlainLink {
    /// Drives a blocking socket.
    pub(crate) fn new(socket: Arc<OwnedFd>) -> Self {
        Self { socket, sent: None }
    }
}

impl Link for PlainLink {
    fn send_start(&mut self, mut message: LentMessage) -> io::Result<()> {
        while message.bytes_left() > 0 {
            match message.send(self.socket.as_fd(), libc::MSG_NOSIGNAL) {
                Ok(sent) => message.advance(sent),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.sent = Some(message);
        Ok(())
    }

    fn send_finish(&mut self) -> io::Result<Option<LentMessage>> {
        Ok(self.sent.take())
    }

    fn receive(&mut self, mut message: LentMessage) -> io::Result<LentMessage> {
        while message.bytes_left() > 0 {
            match message.receive(self.socket.as_fd(), libc::MSG_WAITALL) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(received) => message.advance(received),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(message)
    }
}
