//! Where an incoming migration comes from: whoever connects, one socket that was passed in, or an archive.

use std::os::fd::OwnedFd;

use tokio::sync::mpsc;
use vmferry_transport::control::{Address, ListenError, Listener};
use vmferry_transport::limits::Deadlines;
use vmferry_transport::streams::{
    ArchiveLoader, FdKind, Inlet, Mux, StreamError, StreamFault, fd_kind,
};
use vmferry_transport::wire::archive::{ArchiveError, ArchiveFault};

use super::event::{Event, Events, OriginId, TargetEvent};
use super::jobs::off_thread;
use super::outgoing::chain;
use super::route::{fdset, no_target};
use crate::fds::{Access, FdStore};

/// No migration can come from there. The text names the address.
#[derive(Debug, thiserror::Error)]
pub(super) enum OriginError {
    /// Not listening.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The file, pipe or command cannot be read.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// The descriptor is not there or of no use.
    #[error("{0}: {1}")]
    Fd(Address, String),
    /// The process is out of something.
    #[error("{0}: {1}")]
    Local(Address, String),
}

/// Where connections of an incoming migration come from.
pub(super) enum Origin {
    /// Anybody may connect.
    Network(Listener),
    /// A stand-in for the source, in this process.
    StandIn(StandIn, mpsc::UnboundedReceiver<OwnedFd>),
}

/// What gives connections to the target in place of a listener.
pub(super) enum StandIn {
    /// Reads an archive.
    Loader(ArchiveLoader),
    /// Shares a socket with the source.
    Mux(Mux),
}

impl StandIn {
    /// Ends it, and waits until what it holds is left alone. Blocks.
    pub(super) fn end(self) {
        match self {
            Self::Loader(loader) => loader.give_up(),
            Self::Mux(mux) => mux.close(),
        }
    }
}

impl Origin {
    /// Listens, or opens the archive and begins to read it.
    ///
    /// # Errors
    /// When there is nothing to listen on or to read. What an archive holds is found out later.
    pub(super) async fn open(
        address: &Address,
        id: OriginId,
        fds: &mut FdStore,
        deadlines: &Deadlines,
        events: &Events,
    ) -> Result<Self, OriginError> {
        let fd_error = |text: String| OriginError::Fd(address.clone(), text);
        let name = address.to_string();
        let inlet = match address {
            Address::Exec { command } => Inlet::command(&name, command)?,
            Address::File { path, offset } => {
                let set = fdset(path).map_err(fd_error)?;
                let opened = set.map(|set| fds.open(set, Access::Read)).transpose();
                let opened = opened.map_err(|error| fd_error(chain(&error)))?;
                let (path, offset) = (path.clone(), *offset);
                off_thread("open", move || match opened {
                    Some(fd) => Inlet::of_file(&name, fd, offset),
                    None => Inlet::file(&name, &path, offset),
                })
                .await
                .map_err(|text| OriginError::Local(address.clone(), text))??
            }
            Address::Fd { name: fd_name } => {
                let fd = fds.take(fd_name).map_err(|error| fd_error(chain(&error)))?;
                match fd_kind(&fd) {
                    Ok(FdKind::Pipe) => Inlet::pipe(&name, fd)?,
                    Ok(FdKind::Listening) => {
                        return Ok(Self::Network(Listener::from_socket(fd, address)?));
                    }
                    Ok(FdKind::Connected) => {
                        return Self::share(fd, address, id, deadlines, events);
                    }
                    Ok(kind) => return Err(fd_error(no_target(kind).to_owned())),
                    Err(error) => return Err(fd_error(error.to_string())),
                }
            }
            _ => return Ok(Self::Network(Listener::bind(address).await?)),
        };
        Ok(Self::archive(
            inlet,
            id,
            deadlines,
            events,
            "the guest may run elsewhere",
        )?)
    }

    /// Begins to read an archive. `cut` says what it means if it ends before its end.
    ///
    /// # Errors
    /// The process is out of threads.
    pub(super) fn archive(
        inlet: Inlet,
        id: OriginId,
        deadlines: &Deadlines,
        events: &Events,
        cut: &'static str,
    ) -> Result<Self, StreamError> {
        let (connect, connections) = connections();
        let events = events.clone();
        let failed = move |error: StreamError| {
            let text = format!("cannot load {error}{}", of_a_cut(&error.reason, cut));
            // The engine ends only with the process.
            let _ = events.send(Event::Target(TargetEvent::SourceFailed(id, text)));
        };
        let loader = ArchiveLoader::start(inlet, deadlines, connect, Box::new(failed))?;
        Ok(Self::StandIn(StandIn::Loader(loader), connections))
    }

    fn share(
        socket: OwnedFd,
        address: &Address,
        id: OriginId,
        deadlines: &Deadlines,
        events: &Events,
    ) -> Result<Self, OriginError> {
        let (connect, connections) = connections();
        let (name, events) = (address.to_string(), events.clone());
        let ended = move |why: String| {
            let text = format!("{name}: {why}");
            // The engine ends only with the process.
            let _ = events.send(Event::Target(TargetEvent::SocketEnded(id, text)));
        };
        let mux = Mux::start(
            socket,
            Vec::new(),
            deadlines,
            Some(connect),
            Box::new(ended),
        );
        let mux = mux.map_err(|error| OriginError::Local(address.clone(), error.to_string()))?;
        Ok(Self::StandIn(StandIn::Mux(mux), connections))
    }
}

/// What is added to an error of an archive that ends before its end: what that means.
pub(super) fn of_a_cut(error: &StreamFault, cut: &str) -> String {
    match error {
        StreamFault::Archive(ArchiveError {
            fault: ArchiveFault::Incomplete,
            ..
        }) => format!("; {cut}"),
        _ => String::new(),
    }
}

pub(super) type Connect = Box<dyn Fn(OwnedFd) + Send>;

/// A queue of connections, and what puts them there.
pub(super) fn connections() -> (Connect, mpsc::UnboundedReceiver<OwnedFd>) {
    let (given, connections) = mpsc::unbounded_channel();
    let connect = move |socket| {
        // Nobody takes it when the migration has ended; closing it tells the other end.
        let _ = given.send(socket);
    };
    (Box::new(connect), connections)
}
