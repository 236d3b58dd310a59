//! How an attempt reaches its target: over the network, over one socket that was passed in, or into an archive that stands in for it.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use vmferry_transport::control::{Address, Stream};
use vmferry_transport::limits::Deadlines;
use vmferry_transport::streams::{ArchiveWriter, FdKind, Mux, Outlet, StreamError, fd_kind};
use vmferry_transport::wire::mux::Channel;

use super::jobs::off_thread;
use super::outgoing::chain;
use super::software;
use crate::fds::{Access, FdStore};

/// Where the descriptors of a set are found as files.
const FDSET_PREFIX: &str = "/dev/fdset/";

/// The way to the target of one attempt. Clones are the same way.
#[derive(Clone)]
pub(super) struct Route(Rc<Inner>);

struct Inner {
    address: Address,
    deadlines: Deadlines,
    way: Way,
    /// Nothing is to be opened any more.
    closed: Cell<bool>,
}

enum Way {
    Dial,
    Shared(Mux),
    Archive {
        /// Taken by the first connection.
        opening: RefCell<Option<Opening>>,
        writer: RefCell<Option<Arc<ArchiveWriter>>>,
    },
}

/// An archive that was named and is not open yet.
enum Opening {
    File(PathBuf, u64),
    /// From an fdset, open already.
    FileFd(OwnedFd, u64),
    Command(String),
    Pipe(OwnedFd),
}

impl Route {
    /// Finds what the address names, and takes the descriptor it may mean.
    ///
    /// # Errors
    /// A text for the operator when there is no such descriptor, or it is of no use.
    pub(super) fn to(
        address: Address,
        fds: &mut FdStore,
        deadlines: Deadlines,
    ) -> Result<Self, String> {
        let archive = |opening| Way::Archive {
            opening: RefCell::new(Some(opening)),
            writer: RefCell::default(),
        };
        let way = match &address {
            Address::Exec { command } => archive(Opening::Command(command.clone())),
            Address::File { path, offset } => archive(match fdset(path)? {
                None => Opening::File(path.clone(), *offset),
                Some(set) => {
                    let fd = fds
                        .open(set, Access::Write)
                        .map_err(|error| chain(&error))?;
                    Opening::FileFd(fd, *offset)
                }
            }),
            Address::Fd { name } => {
                let fd = fds.take(name).map_err(|error| chain(&error))?;
                match fd_kind(&fd) {
                    Ok(FdKind::Pipe) => archive(Opening::Pipe(fd)),
                    Ok(FdKind::Connected) => {
                        // Whoever uses a connection sees by itself that it has ended.
                        let mux = Mux::start(fd, Vec::new(), &deadlines, None, Box::new(|_| {}));
                        Way::Shared(mux.map_err(|error| format!("{address}: {error}"))?)
                    }
                    Ok(kind) => return Err(format!("{address}: {}", no_target(kind))),
                    Err(error) => return Err(format!("{address}: {error}")),
                }
            }
            _ => Way::Dial,
        };
        Ok(Self(Rc::new(Inner {
            address,
            deadlines,
            way,
            closed: Cell::new(false),
        })))
    }

    /// To the program that this process becomes: nobody is ever connected to.
    pub(super) fn to_program(command: &[String], deadlines: Deadlines) -> Result<Self, String> {
        Ok(Self(Rc::new(Inner {
            address: Address::exec(command).map_err(|error| error.to_string())?,
            deadlines,
            way: Way::Dial,
            closed: Cell::new(false),
        })))
    }

    /// As the operator has named it.
    pub(super) fn address(&self) -> &Address {
        &self.0.address
    }

    /// How many data connections it has room for.
    pub(super) fn data_connections(&self, wanted: u16) -> u16 {
        match self.0.way {
            Way::Dial => wanted,
            Way::Shared(_) | Way::Archive { .. } => 1,
        }
    }

    /// The pages of an archive are checksummed.
    pub(super) fn is_archive(&self) -> bool {
        matches!(self.0.way, Way::Archive { .. })
    }

    /// Opens a control connection.
    pub(super) async fn control(&self) -> Result<Stream, String> {
        match &self.0.way {
            Way::Dial => self.dial().await,
            Way::Shared(mux) => self.channel(mux, Channel::Control),
            Way::Archive { opening, .. } => {
                let opening = opening.borrow_mut().take();
                if let Some(opening) = opening {
                    self.open(opening).await?;
                }
                self.pair(ArchiveWriter::connect_control)
            }
        }
    }

    /// Opens a data connection.
    pub(super) async fn data(&self) -> Result<Stream, String> {
        match &self.0.way {
            Way::Dial => self.dial().await,
            Way::Shared(mux) => self.channel(mux, Channel::Data),
            Way::Archive { .. } => self.pair(ArchiveWriter::connect_data),
        }
    }

    /// The links are closed. With `leave` what was given to an archive stays there; else it is given up, and what it holds of the
    /// archive is left alone when this ends.
    pub(super) async fn close(&self, leave: bool) {
        if !leave {
            self.0.closed.set(true);
        }
        let closed = match &self.0.way {
            Way::Dial => Ok(()),
            Way::Shared(mux) => {
                let mux = mux.clone();
                off_thread("close", move || mux.close()).await
            }
            Way::Archive { writer, .. } => {
                let Some(writer) = writer.borrow().clone() else {
                    return;
                };
                let closing = Arc::clone(&writer);
                let closed = off_thread("close", move || match leave {
                    true => closing.leave(),
                    false => closing.give_up(),
                });
                let closed = closed.await;
                if closed.is_err() && !leave {
                    // The guest must not go on beside an archive of it, though all else has to wait for this.
                    writer.give_up();
                }
                closed
            }
        };
        if let Err(error) = closed {
            tracing::error!(error, "the way to the target may still be in use");
        }
    }

    async fn dial(&self) -> Result<Stream, String> {
        let stream = Stream::connect(&self.0.address).await;
        stream.map_err(|error| chain(&error))
    }

    async fn open(&self, opening: Opening) -> Result<(), String> {
        let name = self.0.address.to_string();
        let opened = off_thread("open", move || opening.open(&name)).await?;
        let outlet = opened.map_err(|error| chain(&error))?;
        if let Way::Archive { writer, .. } = &self.0.way {
            let new = Arc::new(ArchiveWriter::new(outlet, software(), &self.0.deadlines));
            if self.0.closed.get() {
                // Ending a command takes its time.
                return off_thread("close", move || new.give_up()).await;
            }
            *writer.borrow_mut() = Some(new);
        }
        Ok(())
    }

    fn pair(
        &self,
        connect: fn(&ArchiveWriter) -> std::io::Result<OwnedFd>,
    ) -> Result<Stream, String> {
        let writer = match &self.0.way {
            Way::Archive { writer, .. } => writer.borrow().clone(),
            Way::Dial | Way::Shared(_) => None,
        };
        let writer = writer.ok_or_else(|| format!("{} is closed", self.0.address))?;
        self.stream(connect(&writer))
    }

    fn channel(&self, mux: &Mux, channel: Channel) -> Result<Stream, String> {
        self.stream(mux.open(channel))
    }

    fn stream(&self, socket: std::io::Result<OwnedFd>) -> Result<Stream, String> {
        let address = &self.0.address;
        socket
            .and_then(|socket| Stream::from_socket(socket, address.to_string()))
            .map_err(|error| format!("{address}: {error}"))
    }
}

impl Opening {
    /// May block.
    fn open(self, name: &str) -> Result<Outlet, StreamError> {
        match self {
            Self::File(path, offset) => Outlet::file(name, &path, offset),
            Self::FileFd(fd, offset) => Outlet::of_file(name, fd, offset),
            Self::Command(command) => Outlet::command(name, &command),
            Self::Pipe(pipe) => Outlet::pipe(name, pipe),
        }
    }
}

impl fmt::Debug for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Route").field(&self.0.address).finish()
    }
}

/// The number of the set that a path names, if it names one.
pub(super) fn fdset(path: &Path) -> Result<Option<u32>, String> {
    let Some(rest) = path
        .to_str()
        .and_then(|path| path.strip_prefix(FDSET_PREFIX))
    else {
        return Ok(None);
    };
    let digits = !rest.is_empty() && rest.bytes().all(|byte| byte.is_ascii_digit());
    match rest.parse() {
        Ok(set) if digits => Ok(Some(set)),
        _ => Err(format!("`{rest}` is no number of an fdset")),
    }
}

/// Why no migration goes over such a descriptor.
pub(super) fn no_target(kind: FdKind) -> &'static str {
    match kind {
        FdKind::File => "this is a file; put it into an fdset (add-fd) and use file:/dev/fdset/N",
        FdKind::Listening => "this socket listens; a migration leaves over a connected one",
        FdKind::Connected | FdKind::Pipe | FdKind::Other => {
            "a migration goes over a connected stream socket or a pipe, and this is neither"
        }
    }
}
