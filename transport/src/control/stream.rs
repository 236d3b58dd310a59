//! One connected socket on the control thread.

use std::cell::Cell;
use std::fmt;
use std::io;
use std::net::Shutdown;
use std::os::fd::OwnedFd;

use socket2::{Domain, Socket};

use super::runtime::{self, RuntimeKind};

/// A connected stream socket: TCP, unix or vsock. Not `Send`: it lives on its control thread until [`into_socket`](Self::into_socket).
///
/// Share it between a reader and a writer task with `Rc`. Reads and writes take their buffer by value and give it back, because
/// the kernel owns it meanwhile. Dropping a stream closes the connection, also under an abandoned read.
pub struct Stream {
    link: Link,
    /// A second handle on the same socket, for what must work while the kernel holds the first.
    socket: CloseOnDrop,
    peer: String,
    reading: Cell<bool>,
    writing: Cell<bool>,
}

/// How bytes move, by runtime and family. The libraries have no type for vsock; those for unix sockets only read and write, which is the
/// same for every family.
enum Link {
    UringTcp(tokio_uring::net::TcpStream),
    UringUnix(tokio_uring::net::UnixStream),
    PlainTcp(tokio::net::TcpStream),
    PlainUnix(tokio::net::UnixStream),
}

impl Stream {
    /// Takes over a connected socket. `peer` is the name of the other side for logs and errors.
    ///
    /// # Errors
    /// Outside of [`runtime::run`], when the socket is none of the three, or when the runtime cannot take it.
    pub fn from_socket(socket: OwnedFd, peer: impl Into<String>) -> io::Result<Self> {
        Self::from_connected(socket.into(), peer.into())
    }

    pub(super) fn from_connected(socket: Socket, peer: String) -> io::Result<Self> {
        let Some(kind) = runtime::kind() else {
            return Err(io::Error::other("streams exist on a control thread only"));
        };
        let domain = socket.domain()?;
        // An io_uring read of a non-blocking socket fails at once instead of waiting; epoll needs the opposite. The flag belongs
        // to the socket, not to the handle, so it also decides what `into_socket` has to undo.
        socket.set_nonblocking(kind == RuntimeKind::Plain)?;
        let handle: OwnedFd = socket.try_clone()?.into();
        let link = match (kind, domain) {
            (RuntimeKind::Uring, Domain::UNIX | Domain::VSOCK) => {
                Link::UringUnix(tokio_uring::net::UnixStream::from_std(handle.into()))
            }
            (RuntimeKind::Plain, Domain::UNIX | Domain::VSOCK) => {
                Link::PlainUnix(tokio::net::UnixStream::from_std(handle.into())?)
            }
            (RuntimeKind::Uring, Domain::IPV4 | Domain::IPV6) => {
                Link::UringTcp(tokio_uring::net::TcpStream::from_std(handle.into()))
            }
            (RuntimeKind::Plain, Domain::IPV4 | Domain::IPV6) => {
                Link::PlainTcp(tokio::net::TcpStream::from_std(handle.into())?)
            }
            (_, other) => {
                let text = format!("sockets of family {other:?} are not supported");
                return Err(io::Error::new(io::ErrorKind::Unsupported, text));
            }
        };
        let socket = CloseOnDrop(Some(socket));
        Ok(Self {
            link,
            socket,
            peer,
            reading: Cell::new(false),
            writing: Cell::new(false),
        })
    }

    /// The other side, for logs and errors: its address, or its process id and user on a unix socket.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// Waits for bytes and puts at most `buf.capacity()` of them into `buf`, replacing what it held. 0 means that the peer has
    /// closed, or that [`shutdown`](Self::shutdown) was called.
    ///
    /// Must be awaited to its end, see the [module docs](super).
    ///
    /// # Errors
    /// What the kernel says; `InvalidInput` for a buffer without capacity, and for a read while another one is under way or after
    /// one was abandoned.
    pub async fn read(&self, mut buf: Vec<u8>) -> (io::Result<usize>, Vec<u8>) {
        if buf.capacity() == 0 {
            return (Err(misuse("a read needs a buffer with capacity")), buf);
        }
        if self.reading.replace(true) {
            return (
                Err(misuse("another read is under way or was abandoned")),
                buf,
            );
        }
        buf.clear();
        let done = match &self.link {
            Link::UringTcp(stream) => stream.read(buf).await,
            Link::UringUnix(stream) => stream.read(buf).await,
            Link::PlainTcp(stream) => {
                read_when_ready(buf, || stream.readable(), |buf| stream.try_read_buf(buf)).await
            }
            Link::PlainUnix(stream) => {
                read_when_ready(buf, || stream.readable(), |buf| stream.try_read_buf(buf)).await
            }
        };
        self.reading.set(false);
        done
    }

    /// Writes all of `buf` and gives it back.
    ///
    /// # Errors
    /// What the kernel says; the peer may have got a part. `InvalidInput` while another write is under way or after one was
    /// abandoned: the stream's content would be undefined.
    pub async fn write_all(&self, buf: Vec<u8>) -> (io::Result<()>, Vec<u8>) {
        if self.writing.replace(true) {
            return (
                Err(misuse("another write is under way or was abandoned")),
                buf,
            );
        }
        let done = match &self.link {
            Link::UringTcp(stream) => stream.write_all(buf).await,
            Link::UringUnix(stream) => stream.write_all(buf).await,
            Link::PlainTcp(stream) => {
                write_when_ready(buf, || stream.writable(), |part| stream.try_write(part)).await
            }
            Link::PlainUnix(stream) => {
                write_when_ready(buf, || stream.writable(), |part| stream.try_write(part)).await
            }
        };
        self.writing.set(false);
        done
    }

    /// Ends the connection in both directions: a read under way returns what is there or 0, a write fails, and the peer sees the
    /// end. Calling it again does nothing.
    pub fn shutdown(&self) {
        self.socket.shutdown();
    }

    /// Another handle on the socket, for a reader of a kind of its own.
    pub(super) fn second_handle(&self) -> io::Result<OwnedFd> {
        match &self.socket.0 {
            Some(socket) => Ok(socket.try_clone()?.into()),
            None => Err(misuse("the socket is gone")),
        }
    }

    /// Leaves the control thread: the socket in blocking mode, close-on-exec, for one data thread. Bytes already read are gone;
    /// call it only where the protocol has nothing under way.
    ///
    /// # Errors
    /// When a read or write was abandoned (the kernel may still be moving bytes for it), or the kernel refuses.
    pub fn into_socket(self) -> io::Result<OwnedFd> {
        if self.reading.get() || self.writing.get() {
            return Err(misuse("an abandoned read or write still uses the socket"));
        }
        let Self {
            link, mut socket, ..
        } = self;
        // Deregisters from epoll before the mode changes.
        drop(link);
        let socket = socket
            .0
            .take()
            .ok_or_else(|| misuse("the socket is gone"))?;
        socket.set_nonblocking(false)?;
        Ok(socket.into())
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stream")
            .field("peer", &self.peer)
            .finish_non_exhaustive()
    }
}

/// Closing the last handle is not enough while the kernel holds the other one for a read: the peer would never see the end.
struct CloseOnDrop(Option<Socket>);

impl CloseOnDrop {
    fn shutdown(&self) {
        if let Some(socket) = &self.0 {
            // Fails only if the peer is gone already.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        self.shutdown();
    }
}

async fn read_when_ready<R: Future<Output = io::Result<()>>>(
    mut buf: Vec<u8>,
    ready: impl Fn() -> R,
    try_read: impl Fn(&mut Vec<u8>) -> io::Result<usize>,
) -> (io::Result<usize>, Vec<u8>) {
    loop {
        if let Err(error) = ready().await {
            return (Err(error), buf);
        }
        match try_read(&mut buf) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            done => return (done, buf),
        }
    }
}

async fn write_when_ready<R: Future<Output = io::Result<()>>>(
    buf: Vec<u8>,
    ready: impl Fn() -> R,
    try_write: impl Fn(&[u8]) -> io::Result<usize>,
) -> (io::Result<()>, Vec<u8>) {
    let mut written = 0;
    while written < buf.len() {
        if let Err(error) = ready().await {
            return (Err(error), buf);
        }
        match try_write(&buf[written..]) {
            Ok(0) => return (Err(io::ErrorKind::WriteZero.into()), buf),
            Ok(count) => written += count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return (Err(error), buf),
        }
    }
    (Ok(()), buf)
}

fn misuse(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, text)
}
