//! Listening sockets. Waiting is by readiness on both runtimes, so an accept may be dropped at any moment.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use socket2::{Domain, SockAddr, Socket, Type};
use tokio::io::Interest;

use super::connect::{off_thread, resolve};
use super::{Address, Stream};

/// Connections that may wait to be accepted. One migration opens up to 256 at once, and strangers may knock too.
pub const LISTEN_BACKLOG: i32 = 1024;

/// Not listening. The text names the address.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ListenError {
    /// The name is unknown, or no name server answered.
    #[error("cannot resolve the host name of {address}")]
    Resolve {
        /// Where.
        address: Address,
        /// What the resolver said.
        #[source]
        source: io::Error,
    },
    /// The kernel refused: in use, no permission, not an address of this host.
    #[error("cannot listen on {address}")]
    Listen {
        /// Where.
        address: Address,
        /// What the kernel said, of the last address tried.
        #[source]
        source: io::Error,
    },
    /// Another process listens on this unix socket. Stop it or choose another path.
    #[error("cannot listen on {address}: another process is listening there")]
    InUse {
        /// Where.
        address: Address,
    },
    /// Something that is not a socket has this path. It is left alone.
    #[error("cannot listen on {address}: the path exists and is not a socket")]
    NotASocket {
        /// Where.
        address: Address,
    },
    /// The address names no socket. Files, commands and descriptors are opened by others.
    #[error("cannot listen on {address}: it is no address of a socket")]
    NoSocket {
        /// Where.
        address: Address,
    },
}

/// A listening socket: TCP, unix or vsock. A unix socket has mode 0600 and its path is removed when the listener is dropped.
#[derive(Debug)]
pub struct Listener {
    link: Link,
    local: Address,
}

#[derive(Debug)]
enum Link {
    Tcp(tokio::net::TcpListener),
    Unix {
        listener: tokio::net::UnixListener,
        file: Option<SocketFile>,
    },
    Vsock {
        listener: Socket,
        /// A second handle on it that waits for readiness: the libraries have no type for vsock, and this one does not look.
        readiness: tokio::net::UnixStream,
    },
}

impl Listener {
    /// Listens on `address`. Port 0 lets the kernel choose, see [`local_address`](Self::local_address).
    ///
    /// # Errors
    /// [`ListenError`]. A unix path held by a live process is an error, a stale socket is replaced.
    pub async fn bind(address: &Address) -> Result<Self, ListenError> {
        let listen_error = |source| ListenError::Listen {
            address: address.clone(),
            source,
        };
        match address {
            Address::Tcp { host, port } => {
                let (name, port) = (host.clone(), *port);
                let candidates = off_thread("resolve", move || resolve(&name, port))
                    .await
                    .flatten()
                    .map_err(|source| ListenError::Resolve {
                        address: address.clone(),
                        source,
                    })?;
                bind_first(&candidates).map_err(listen_error)
            }
            Address::Unix { path } => {
                clear_stale(path, address)?;
                bind_unix(path, address.clone()).map_err(|source| match source.kind() {
                    io::ErrorKind::AddrInUse => ListenError::InUse {
                        address: address.clone(),
                    },
                    _ => listen_error(source),
                })
            }
            Address::Vsock { cid, port } => bind_vsock(*cid, *port).map_err(listen_error),
            Address::Fd { .. } | Address::Exec { .. } | Address::File { .. } => {
                Err(ListenError::NoSocket {
                    address: address.clone(),
                })
            }
        }
    }

    /// Takes over a socket that listens already; `address` is what it was named by. A unix socket's path stays when it is dropped.
    ///
    /// # Errors
    /// When it is of no family that can be listened on here, or does not listen.
    pub fn from_socket(socket: OwnedFd, address: &Address) -> Result<Self, ListenError> {
        let listen_error = |source| ListenError::Listen {
            address: address.clone(),
            source,
        };
        let socket = Socket::from(socket);
        adopt(socket, address).map_err(listen_error)
    }

    /// Takes over the listening socket of a process that leaves, with the path of a unix socket: it is removed when this is dropped.
    ///
    /// # Errors
    /// As [`from_socket`](Self::from_socket).
    pub fn inherit(socket: OwnedFd, address: &Address) -> Result<Self, ListenError> {
        let socket = Socket::from(socket);
        // It listens already. Who listened last is whom the clients of a unix socket see at the other end.
        socket
            .listen(LISTEN_BACKLOG)
            .map_err(|source| ListenError::Listen {
                address: address.clone(),
                source,
            })?;
        let mut this = Self::from_socket(socket.into(), address)?;
        if let (Link::Unix { file, .. }, Address::Unix { path }) = (&mut this.link, address) {
            // Without the file nobody can connect, but those who have are still served.
            *file = SocketFile::new(path).ok();
        }
        Ok(this)
    }

    /// Another descriptor of the same socket, for a process that is to listen in place of this one.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub fn duplicate(&self) -> io::Result<OwnedFd> {
        match &self.link {
            Link::Tcp(listener) => listener.as_fd().try_clone_to_owned(),
            Link::Unix { listener, .. } => listener.as_fd().try_clone_to_owned(),
            Link::Vsock { listener, .. } => listener.as_fd().try_clone_to_owned(),
        }
    }

    /// Another process listens there now: a unix socket's path stays when this is dropped.
    pub fn leave_path(&self) {
        if let Link::Unix {
            file: Some(file), ..
        } = &self.link
        {
            file.stays.store(true, Ordering::Relaxed);
        }
    }

    /// The address with the port that the kernel chose and the name resolved.
    pub fn local_address(&self) -> &Address {
        &self.local
    }

    /// The next connection; TCP sockets get TCP_NODELAY. May be dropped at any moment without losing a connection.
    ///
    /// # Errors
    /// When this process is out of file descriptors or memory. The listener stays usable; wait before trying again.
    pub async fn accept(&self) -> io::Result<Stream> {
        loop {
            match self.accept_once().await {
                // The peer was gone before we came to it.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                other => return other,
            }
        }
    }

    async fn accept_once(&self) -> io::Result<Stream> {
        match &self.link {
            Link::Tcp(listener) => {
                let (stream, from) = listener.accept().await?;
                stream.set_nodelay(true)?;
                Stream::from_socket(OwnedFd::from(stream.into_std()?), format!("tcp:{from}"))
            }
            Link::Unix { listener, .. } => {
                let (stream, _) = listener.accept().await?;
                let peer = match stream.peer_cred() {
                    Ok(cred) => {
                        format!("process {} of user {}", cred.pid().unwrap_or(0), cred.uid())
                    }
                    Err(_) => "a local process".to_owned(),
                };
                Stream::from_socket(OwnedFd::from(stream.into_std()?), peer)
            }
            Link::Vsock {
                listener,
                readiness,
            } => {
                let (socket, from) = readiness
                    .async_io(Interest::READABLE, || listener.accept())
                    .await?;
                let peer = vsock_address(&from)
                    .map_or_else(|| "a vsock peer".to_owned(), |address| address.to_string());
                Stream::from_socket(socket.into(), peer)
            }
        }
    }
}

fn bind_first(candidates: &[SocketAddr]) -> io::Result<Listener> {
    let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for candidate in candidates {
        match bind_tcp(*candidate) {
            Ok(listener) => return Ok(listener),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn bind_tcp(at: SocketAddr) -> io::Result<Listener> {
    let socket = Socket::new(Domain::for_address(at), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&at.into())?;
    socket.listen(LISTEN_BACKLOG)?;
    socket.set_nonblocking(true)?;
    listen_tcp(socket)
}

fn listen_tcp(socket: Socket) -> io::Result<Listener> {
    let listener = tokio::net::TcpListener::from_std(OwnedFd::from(socket).into())?;
    let bound = listener.local_addr()?;
    let host = match bound {
        SocketAddr::V6(v6) if v6.scope_id() != 0 => format!("{}%{}", v6.ip(), v6.scope_id()),
        _ => bound.ip().to_string(),
    };
    let local = Address::Tcp {
        host,
        port: bound.port(),
    };
    Ok(Listener {
        link: Link::Tcp(listener),
        local,
    })
}

fn adopt(socket: Socket, address: &Address) -> io::Result<Listener> {
    if !socket.is_listener()? {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "the socket does not listen",
        ));
    }
    socket.set_nonblocking(true)?;
    let link = match socket.domain()? {
        Domain::IPV4 | Domain::IPV6 => {
            return listen_tcp(socket);
        }
        Domain::UNIX => Link::Unix {
            listener: tokio::net::UnixListener::from_std(OwnedFd::from(socket).into())?,
            file: None,
        },
        Domain::VSOCK => listen_vsock(socket)?,
        other => {
            let text = format!("sockets of family {other:?} are not supported");
            return Err(io::Error::new(io::ErrorKind::Unsupported, text));
        }
    };
    let local = address.clone();
    Ok(Listener { link, local })
}

fn bind_vsock(cid: u32, port: u32) -> io::Result<Listener> {
    let socket = Socket::new(Domain::VSOCK, Type::STREAM, None)?;
    socket.bind(&SockAddr::vsock(cid, port))?;
    socket.listen(LISTEN_BACKLOG)?;
    socket.set_nonblocking(true)?;
    let local = vsock_address(&socket.local_addr()?).unwrap_or(Address::Vsock { cid, port });
    Ok(Listener {
        link: listen_vsock(socket)?,
        local,
    })
}

fn listen_vsock(listener: Socket) -> io::Result<Link> {
    let second: OwnedFd = listener.try_clone()?.into();
    let readiness = tokio::net::UnixStream::from_std(second.into())?;
    Ok(Link::Vsock {
        listener,
        readiness,
    })
}

fn vsock_address(address: &SockAddr) -> Option<Address> {
    let (cid, port) = address.as_vsock_address()?;
    Some(Address::Vsock { cid, port })
}

/// Removes the socket that a dead process left behind.
fn clear_stale(path: &Path, address: &Address) -> Result<(), ListenError> {
    let listen_error = |source| ListenError::Listen {
        address: address.clone(),
        source,
    };
    let Ok(meta) = fs::symlink_metadata(path) else {
        return Ok(());
    };
    if !meta.file_type().is_socket() {
        return Err(ListenError::NotASocket {
            address: address.clone(),
        });
    }
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None).map_err(listen_error)?;
    socket.set_nonblocking(true).map_err(listen_error)?;
    let to = SockAddr::unix(path).map_err(listen_error)?;
    match socket.connect(&to) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(listen_error)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        // Connected, or its queue is full: alive either way.
        _ => Err(ListenError::InUse {
            address: address.clone(),
        }),
    }
}

fn bind_unix(path: &Path, local: Address) -> io::Result<Listener> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.bind(&SockAddr::unix(path)?)?;
    let file = SocketFile::new(path)?;
    // Before `listen`: until then nobody can connect, so the socket is never open to others.
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    socket.listen(LISTEN_BACKLOG)?;
    socket.set_nonblocking(true)?;
    let listener = tokio::net::UnixListener::from_std(OwnedFd::from(socket).into())?;
    Ok(Listener {
        link: Link::Unix {
            listener,
            file: Some(file),
        },
        local,
    })
}

/// The path of our socket. Removed on drop, unless somebody else has put another file there meanwhile.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
    /// It belongs to somebody else now.
    stays: AtomicBool,
}

impl SocketFile {
    fn new(path: &Path) -> io::Result<Self> {
        // Absolute, because the process may change its directory before the drop.
        let path = std::path::absolute(path)?;
        let identity = identity(&path)?;
        Ok(Self {
            path,
            identity,
            stays: AtomicBool::new(false),
        })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if !self.stays.load(Ordering::Relaxed)
            && identity(&self.path).is_ok_and(|now| now == self.identity)
        {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Device and inode number.
fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let meta = fs::symlink_metadata(path)?;
    Ok((meta.dev(), meta.ino()))
}
