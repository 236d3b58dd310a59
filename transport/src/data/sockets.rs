//! The sockets of one direction and the switch that ends all their threads.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::net::{AddressFamily, Shutdown, SocketAddrAny, sockopt};

/// Size of both socket buffers on connections within a host. What waits there should still be in the cache when it is read; the
/// kernel's own choice of several MiB costs a third of the throughput. Between hosts the kernel knows better: there the buffers have
/// to cover bandwidth times delay.
const LOCAL_BUFFER_BYTES: usize = 256 << 10;

/// Connected sockets, the bytes that went over each, and whether it is over.
#[derive(Debug)]
pub(crate) struct Sockets {
    sockets: Vec<Arc<OwnedFd>>,
    bytes: Vec<AtomicU64>,
    stopped: Arc<AtomicBool>,
}

impl Sockets {
    /// Takes the sockets over. Headers and small last frames must not wait for an acknowledgement, hence `TCP_NODELAY`.
    pub(crate) fn new(sockets: Vec<OwnedFd>) -> io::Result<Self> {
        if sockets.is_empty() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the data path needs at least one connection",
            ));
        }
        sockets.iter().try_for_each(prepare)?;
        Ok(Self {
            bytes: sockets.iter().map(|_| AtomicU64::new(0)).collect(),
            sockets: sockets.into_iter().map(Arc::new).collect(),
            stopped: Arc::default(),
        })
    }

    /// Number of connections.
    pub(crate) fn len(&self) -> usize {
        self.sockets.len()
    }

    /// One socket.
    pub(crate) fn socket(&self, connection: usize) -> Arc<OwnedFd> {
        Arc::clone(&self.sockets[connection])
    }

    /// Becomes true when all threads have to end.
    pub(crate) fn stop_flag(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.stopped)
    }

    /// Whether all threads have to end.
    pub(crate) fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    /// Ends all connections. Returns whether they were not ended before: the first caller knows the reason, later ones see only
    /// consequences of it.
    pub(crate) fn stop(&self) -> bool {
        let first = !self.stopped.swap(true, Ordering::AcqRel);
        if first {
            for socket in &self.sockets {
                // Fails only if the connection is gone already.
                let _ = rustix::net::shutdown(socket, Shutdown::Both);
            }
        }
        first
    }

    /// Counts bytes of a connection.
    pub(crate) fn add_bytes(&self, connection: usize, bytes: u64) {
        self.bytes[connection].fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes of each connection so far.
    pub(crate) fn bytes(&self) -> Vec<u64> {
        let load = |bytes: &AtomicU64| bytes.load(Ordering::Relaxed);
        self.bytes.iter().map(load).collect()
    }
}

/// Whether the peer is another host, as far as addresses tell: namespaces on one host look like hosts.
pub(crate) fn leaves_the_host(socket: &OwnedFd) -> bool {
    let address = |address: rustix::io::Result<Option<SocketAddrAny>>| {
        SocketAddr::try_from(address.ok()??).ok()
    };
    let peer = address(rustix::net::getpeername(socket));
    let own = address(rustix::net::getsockname(socket).map(Some));
    match (peer, own) {
        (Some(peer), Some(own)) => !peer.ip().to_canonical().is_loopback() && peer.ip() != own.ip(),
        _ => false,
    }
}

fn prepare(socket: &OwnedFd) -> io::Result<()> {
    let family = sockopt::socket_domain(socket)?;
    if family == AddressFamily::INET || family == AddressFamily::INET6 {
        sockopt::set_tcp_nodelay(socket, true)?;
    }
    if !leaves_the_host(socket) {
        sockopt::set_socket_send_buffer_size(socket, LOCAL_BUFFER_BYTES)?;
        sockopt::set_socket_recv_buffer_size(socket, LOCAL_BUFFER_BYTES)?;
    }
    Ok(())
}
