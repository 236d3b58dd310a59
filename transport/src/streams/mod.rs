//! Where a VM goes to or comes from when there is no target or source to talk to: files, pipes and commands, and single sockets.
//!
//! Both cores speak with a peer over a control connection and data connections. Here are stand-ins for that peer, in threads of this
//! process, at the other end of socket pairs; so cores, checks and drivers are the same for every address.
//!
//! ```text
//!  source core <==socket pairs==> [`ArchiveWriter`] --> file, pipe, command          saving
//!  target core <==socket pairs==> [`ArchiveLoader`] <-- file, pipe, command          loading
//!  target core <----- calls ----> [`Replay`] <-- what an exec has left               loading
//!  either core <==socket pairs==> [`Mux`] <--one socket--> [`Mux`] of the other side
//! ```
//!
//! - An [`Outlet`] or [`Inlet`] is the file, pipe or command, opened. What blocks there is ended by an interrupt, whatever it is.
//! - The format of what is written is in [`wire::archive`](crate::wire::archive), that of a shared socket in
//!   [`wire::mux`](crate::wire::mux).
//! - Saving is a migration whose commit is the end mark of the archive: written when the source has given the guest up, after all
//!   else has reached the disk. What has no end mark is not loaded.

mod command;
mod inlet;
mod interrupt;
mod loader;
mod mux;
mod outlet;
mod replay;
mod writer;

#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;

use rustix::fs::FileType;

pub use self::inlet::Inlet;
pub use self::loader::ArchiveLoader;
pub use self::mux::{Mux, is_shared};
pub use self::outlet::Outlet;
pub use self::replay::{REPLAY_BYTES_MAX, Replay};
pub use self::writer::ArchiveWriter;

/// A file, pipe or command cannot be used. The text names it.
#[derive(Debug, thiserror::Error)]
#[error("{name}: {reason}")]
pub struct StreamError {
    /// The address.
    pub name: String,
    /// What is wrong with it.
    pub reason: StreamFault,
}

/// What is wrong with a file, pipe or command.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StreamFault {
    /// The kernel refused to open it or to start it.
    #[error("cannot be opened: {0}")]
    Open(io::Error),
    /// The kernel failed while it was written. A retry needs room, rights or another place.
    #[error("cannot be written: {0}")]
    Write(io::Error),
    /// The kernel failed while it was read.
    #[error("cannot be read: {0}")]
    Read(io::Error),
    /// It is of a kind that cannot hold a VM. The operator is at fault.
    #[error("{0}")]
    Kind(&'static str),
    /// The command did not succeed.
    #[error("the command failed ({0})")]
    Command(String),
    /// What it holds is no complete archive.
    #[error(transparent)]
    Archive(#[from] crate::wire::archive::ArchiveError),
    /// This process, in its other role, gave up; what it says.
    #[error("{0}")]
    Refused(String),
    /// The migration was given up meanwhile.
    #[error("given up")]
    GivenUp,
}

impl StreamFault {
    fn of(self, name: &str) -> StreamError {
        StreamError {
            name: name.to_owned(),
            reason: self,
        }
    }
}

/// What a descriptor is that somebody passed to this process.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum FdKind {
    /// A connected stream socket.
    Connected,
    /// A stream socket that listens.
    Listening,
    /// A pipe.
    Pipe,
    /// A file or a device: `file:` takes those, from an fdset.
    File,
    /// Anything else, such as a datagram socket.
    Other,
}

/// Looks what a descriptor is.
///
/// # Errors
/// What the kernel says.
pub fn fd_kind(fd: &OwnedFd) -> io::Result<FdKind> {
    use rustix::net::{SocketType, sockopt};
    let mode = rustix::fs::fstat(fd)?.st_mode;
    Ok(match FileType::from_raw_mode(mode) {
        FileType::Socket if sockopt::socket_type(fd)? != SocketType::STREAM => FdKind::Other,
        FileType::Socket if sockopt::socket_acceptconn(fd)? => FdKind::Listening,
        FileType::Socket if rustix::net::getpeername(fd).is_ok() => FdKind::Connected,
        FileType::Fifo => FdKind::Pipe,
        FileType::RegularFile | FileType::BlockDevice | FileType::CharacterDevice => FdKind::File,
        _ => FdKind::Other,
    })
}

/// Whether writes and reads of it never wait for anybody but a disk.
///
/// # Errors
/// What the kernel says, or for what cannot hold an archive: a block device has no end, so that the end of an archive in it would be
/// lost among what was there before.
fn is_regular(file: &File) -> Result<bool, StreamFault> {
    let kind = file.metadata().map_err(StreamFault::Open)?.file_type();
    if kind.is_dir() {
        return Err(StreamFault::Kind("this is a directory"));
    }
    if kind.is_block_device() {
        return Err(StreamFault::Kind("this is a block device; use a file"));
    }
    Ok(kind.is_file())
}

/// Two ends of a connection within this process: the first stays with a stand-in, the second goes to the engine.
fn socket_pair() -> io::Result<(UnixStream, OwnedFd)> {
    let (ours, theirs) = UnixStream::pair()?;
    Ok((ours, theirs.into()))
}
