//! Bytes together with the file descriptors that a local client sends along (SCM_RIGHTS).

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::Stream;

/// Most descriptors in one message. QEMU's monitor takes as many.
pub const FDS_PER_MESSAGE_MAX: usize = 16;

const CONTROL_BYTES: usize = rustix::cmsg_space!(ScmRights(FDS_PER_MESSAGE_MAX));

/// Reads a stream by readiness instead of by the runtime's reads, because only `recvmsg` gives descriptors. Use it instead of
/// [`Stream::read`], not beside it.
///
/// [`Stream::shutdown`] ends it as it ends a read. A read may be dropped at any moment without losing anything.
#[derive(Debug)]
pub struct FdReader {
    socket: AsyncFd<OwnedFd>,
}

/// What one read gave.
#[derive(Debug, Default)]
pub struct Received {
    /// Bytes that were put into the buffer; 0 at the end of the stream.
    pub bytes: usize,
    /// Descriptors that came with the last of these bytes, close-on-exec.
    pub fds: Vec<OwnedFd>,
    /// Descriptors came that could not be taken: more than [`FDS_PER_MESSAGE_MAX`], or this process has no room for them. Those of
    /// the same message that could be taken were closed.
    pub fds_lost: bool,
}

impl FdReader {
    /// A reader of what arrives at `stream`.
    ///
    /// # Errors
    /// Outside of a control thread, or out of descriptors.
    pub fn new(stream: &Stream) -> io::Result<Self> {
        #[expect(
            deprecated,
            reason = "its successor is unsafe for the sake of types that change their descriptor, which an OwnedFd cannot"
        )]
        let socket = AsyncFd::with_interest(stream.second_handle()?, Interest::READABLE)?;
        Ok(Self { socket })
    }

    /// Waits for bytes and puts them at the start of `buf`.
    ///
    /// # Errors
    /// What the kernel says. `InvalidInput` for an empty buffer.
    pub async fn read(&self, buf: &mut [u8]) -> io::Result<Received> {
        if buf.is_empty() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "a read needs a buffer with room",
            ));
        }
        self.socket
            .async_io(Interest::READABLE, |socket| receive(socket, buf))
            .await
    }
}

fn receive(socket: &OwnedFd, buf: &mut [u8]) -> io::Result<Received> {
    let mut space = [MaybeUninit::uninit(); CONTROL_BYTES];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    // The socket may be in blocking mode, which io_uring wants.
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let message = recvmsg(socket, &mut [IoSliceMut::new(buf)], &mut control, flags)?;
    let mut fds = Vec::new();
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = part {
            fds.extend(rights);
        }
    }
    // Room for alignment may let one more in than was asked for.
    let fds_lost = message.flags.contains(ReturnFlags::CTRUNC) || fds.len() > FDS_PER_MESSAGE_MAX;
    if fds_lost {
        fds.clear();
    }
    Ok(Received {
        bytes: message.bytes,
        fds,
        fds_lost,
    })
}

#[cfg(test)]
mod tests {
    use std::io::{IoSlice, Write};
    use std::mem::MaybeUninit;
    use std::os::fd::{AsFd, BorrowedFd};
    use std::os::unix::net::UnixStream;
    use std::rc::Rc;
    use std::time::Duration;

    use rustix::io::{FdFlags, fcntl_getfd};
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

    use super::*;
    use crate::control::runtime::{self, RuntimeKind};

    /// Far longer than anything here takes; a test that needs it hangs.
    const PATIENCE: Duration = Duration::from_secs(60);

    fn on_both<F: Future<Output = ()>>(test: impl Fn(Stream, UnixStream) -> F) {
        for kind in [RuntimeKind::Uring, RuntimeKind::Plain] {
            runtime::run_on(kind, async {
                let (ours, theirs) = UnixStream::pair().unwrap();
                let stream = Stream::from_socket(ours.into(), "peer").unwrap();
                tokio::time::timeout(PATIENCE, test(stream, theirs))
                    .await
                    .expect("the test hangs");
            })
            .unwrap();
        }
    }

    fn send(socket: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        let sent = sendmsg(
            socket,
            &[IoSlice::new(bytes)],
            &mut control,
            SendFlags::empty(),
        );
        assert_eq!(sent.unwrap(), bytes.len());
    }

    #[test]
    fn descriptors_arrive_close_on_exec_with_their_bytes() {
        on_both(|stream, mut peer| async move {
            let reader = FdReader::new(&stream).unwrap();
            let mut buf = [0; 64];
            peer.write_all(b"none").unwrap();
            let got = reader.read(&mut buf).await.unwrap();
            assert_eq!((&buf[..got.bytes], got.fds.len()), (&b"none"[..], 0));

            let (near, far) = UnixStream::pair().unwrap();
            send(&peer, b"one", &[far.as_fd()]);
            drop(far);
            peer.write_all(b"next").unwrap();
            let got = reader.read(&mut buf).await.unwrap();
            // The kernel stops after the bytes that carry descriptors.
            assert_eq!(&buf[..got.bytes], b"one");
            let [fd] = <[OwnedFd; 1]>::try_from(got.fds).unwrap();
            assert!(fcntl_getfd(&fd).unwrap().contains(FdFlags::CLOEXEC));
            UnixStream::from(fd).write_all(b"!").unwrap();
            drop(near);
            let got = reader.read(&mut buf).await.unwrap();
            assert_eq!(&buf[..got.bytes], b"next");
            assert!(!got.fds_lost);
        });
    }

    #[test]
    fn more_descriptors_than_allowed_are_all_closed() {
        on_both(|stream, peer| async move {
            let reader = FdReader::new(&stream).unwrap();
            let (mut near, far) = UnixStream::pair().unwrap();
            send(&peer, b"x", &[far.as_fd(); FDS_PER_MESSAGE_MAX + 1]);
            drop(far);
            let got = reader.read(&mut [0; 8]).await.unwrap();
            assert!(got.fds_lost && got.fds.is_empty());
            // Nobody holds the other end any more.
            near.set_write_timeout(Some(PATIENCE)).unwrap();
            assert_eq!(
                near.write_all(b"?").unwrap_err().kind(),
                io::ErrorKind::BrokenPipe
            );
        });
    }

    #[test]
    fn shutdown_ends_a_waiting_read_and_the_peer_may_end_it_too() {
        on_both(|stream, _peer| async move {
            let stream = Rc::new(stream);
            let reader = FdReader::new(&stream).unwrap();
            let waiting = runtime::spawn(async move { reader.read(&mut [0; 8]).await });
            tokio::task::yield_now().await;
            stream.shutdown();
            assert_eq!(waiting.await.unwrap().unwrap().bytes, 0);
        });
        on_both(|stream, peer| async move {
            let reader = FdReader::new(&stream).unwrap();
            drop(peer);
            assert_eq!(reader.read(&mut [0; 8]).await.unwrap().bytes, 0);
            assert!(reader.read(&mut []).await.is_err());
        });
    }
}
