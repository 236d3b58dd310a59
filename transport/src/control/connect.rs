//! Connecting: name resolution and `connect` on a thread of their own, bounded by a deadline.
//!
//! Resolution has no non-blocking form, and an io_uring connect cannot be abandoned without leaking its socket for minutes. A
//! short-lived thread has neither problem: dropping the future forgets the thread, which closes what it gets and ends by itself.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use socket2::{Domain, SockAddr, Socket, Type};

use super::{Address, Stream};
use crate::limits;

/// Longest time for resolving and connecting, all addresses of a name together: half of what a migration has for all of its
/// connections.
pub const CONNECT_DEADLINE: Duration = Duration::from_micros(limits::CONNECT_DEADLINE_US / 2);
/// Pause before trying again when a unix listener's queue is full.
const QUEUE_FULL_PAUSE: Duration = Duration::from_millis(5);

/// No connection. Nothing was sent.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// The name is unknown, or no name server answered.
    #[error("cannot resolve the host name of {address}")]
    Resolve {
        /// Where to.
        address: Address,
        /// What the resolver said.
        #[source]
        source: io::Error,
    },
    /// Nobody listens there, the network has no way to it, or it did not answer within [`CONNECT_DEADLINE`].
    #[error("cannot connect to {address}")]
    Connect {
        /// Where to.
        address: Address,
        /// What the kernel said, of the last address tried.
        #[source]
        source: io::Error,
    },
    /// The address can only be listened on. The caller is at fault.
    #[error("cannot connect to {address}: this port is for listening only")]
    AnyPort {
        /// Where to.
        address: Address,
    },
    /// The address names no socket. Files, commands and descriptors are opened by others.
    #[error("cannot connect to {address}: it is no address of a socket")]
    NoSocket {
        /// Where to.
        address: Address,
    },
}

impl Stream {
    /// Connects to `address`; TCP sockets get TCP_NODELAY. Takes at most [`CONNECT_DEADLINE`]; dropping the future gives up.
    ///
    /// # Errors
    /// [`ConnectError`], which names the address.
    pub async fn connect(address: &Address) -> Result<Self, ConnectError> {
        let any_port = matches!(
            address,
            Address::Tcp { port: 0, .. } | Address::Vsock { port: u32::MAX, .. }
        );
        if any_port {
            return Err(ConnectError::AnyPort {
                address: address.clone(),
            });
        }
        let wanted = address.clone();
        let socket = off_thread("connect", move || connect_blocking(&wanted))
            .await
            .map_err(|source| ConnectError::Connect {
                address: address.clone(),
                source,
            })??;
        Self::from_connected(socket, address.to_string()).map_err(|source| ConnectError::Connect {
            address: address.clone(),
            source,
        })
    }
}

/// Runs blocking `work` on a thread of its own. Not the runtime's blocking pool: ending a runtime would wait for it.
pub(super) async fn off_thread<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<T> {
    let (done, result) = tokio::sync::oneshot::channel();
    thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            // Nobody waiting any more is fine: the result, a socket perhaps, is dropped here.
            let _ = done.send(work());
        })?;
    result
        .await
        .map_err(|_| io::Error::other("the helper thread panicked"))
}

/// All socket addresses of `host`, in the resolver's order of preference.
pub(super) fn resolve(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    let found: Vec<_> = (host, port).to_socket_addrs()?.collect();
    if found.is_empty() {
        return Err(io::Error::new(
            io::ErrorKind::NotFound,
            "the name has no address",
        ));
    }
    Ok(found)
}

fn connect_blocking(address: &Address) -> Result<Socket, ConnectError> {
    let deadline = Instant::now() + CONNECT_DEADLINE;
    let connect_error = |source| ConnectError::Connect {
        address: address.clone(),
        source,
    };
    match address {
        Address::Tcp { host, port } => {
            let candidates = resolve(host, *port).map_err(|source| ConnectError::Resolve {
                address: address.clone(),
                source,
            })?;
            connect_first(&candidates, deadline).map_err(connect_error)
        }
        Address::Unix { path } => connect_unix(path, deadline).map_err(connect_error),
        Address::Vsock { cid, port } => {
            let left = deadline.saturating_duration_since(Instant::now());
            connect_vsock(*cid, *port, left).map_err(connect_error)
        }
        Address::Fd { .. } | Address::Exec { .. } | Address::File { .. } => {
            Err(ConnectError::NoSocket {
                address: address.clone(),
            })
        }
    }
}

/// The first of `candidates` that answers.
fn connect_first(candidates: &[SocketAddr], deadline: Instant) -> io::Result<Socket> {
    let mut last = io::Error::from(io::ErrorKind::TimedOut);
    for candidate in candidates {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        match connect_tcp(*candidate, left) {
            Ok(socket) => return Ok(socket),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn connect_tcp(to: SocketAddr, limit: Duration) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
    socket.connect_timeout(&to.into(), limit)?;
    socket.set_tcp_nodelay(true)?;
    Ok(socket)
}

fn connect_vsock(cid: u32, port: u32, limit: Duration) -> io::Result<Socket> {
    let socket = Socket::new(Domain::VSOCK, Type::STREAM, None)?;
    socket.connect_timeout(&SockAddr::vsock(cid, port), limit)?;
    Ok(socket)
}

/// A unix connect answers at once, except that a full queue of the listener says "try again".
fn connect_unix(path: &Path, deadline: Instant) -> io::Result<Socket> {
    let to = SockAddr::unix(path)?;
    loop {
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        socket.set_nonblocking(true)?;
        match socket.connect(&to) {
            Ok(()) => {
                socket.set_nonblocking(false)?;
                return Ok(socket);
            }
            Err(error)
                if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < deadline =>
            {
                thread::sleep(QUEUE_FULL_PAUSE);
            }
            Err(error) => return Err(error),
        }
    }
}
