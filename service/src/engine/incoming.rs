//! Drives the target core: listens, takes connections in, receives into guest memory, loads state, starts the guest.

mod again;
mod jobs;
mod replay;

use std::collections::HashMap;
use std::error::Error;
use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use tokio::task::JoinHandle;
use vmferry_transport::control::{Address, Stream, runtime};
use vmferry_transport::data::{
    Backend, BackendChoice, DataError, DataReceiver, ReceiverConfig, ReceiverEvent,
    ReceiverProgress,
};
use vmferry_transport::proto::{
    Connection, Target, TargetAction, TargetConfig, TargetError, TargetJob, TargetStatus,
};
use vmferry_transport::streams::Replay;
use vmferry_transport::units::{MigrationId, Moment};
use vmferry_transport::wire::Section;
use vmferry_transport::wire::frame::{AbortCode, SourceFrame, TargetFrame};

use super::acceptor::Acceptor;
use super::clock::Clock;
use super::event::{Arrivals, Event, Events, OriginId, TargetEvent};
use super::jobs::off_thread;
use super::link::{ControlLink, LAST_WORD, LinkEvent};
use super::origin::{Origin, StandIn};
use super::outgoing::{YANKED, chain};
use super::passthrough::Sinks;
use crate::machine::Machine;

/// What the engine must do for the incoming migration, because it concerns more than the links.
#[derive(Debug)]
pub(super) enum IncomingAction {
    StatusChanged(TargetStatus),
    /// Load these sections into the stopped guest; the result goes to [`Incoming::handle`].
    Load {
        sections: Vec<Section>,
        verify: bool,
    },
    /// The guest belongs to this process; let it run if `run` says so and the operator did not ask otherwise.
    StartGuest {
        run: bool,
    },
    /// Tell the notifiers INCOMING_FAILED.
    NotifyFailed(MigrationId),
    /// Have the devices wait for their streams; the result goes to [`Incoming::handle`].
    Prepare,
    Failed {
        error: TargetError,
        linger: bool,
    },
}

/// An incoming migration, from the listener on.
pub(super) struct Incoming {
    core: Target,
    machine: Arc<dyn Machine>,
    clock: Clock,
    events: Events,
    arrivals: Arrivals,
    address: Address,
    acceptor: Option<JoinHandle<()>>,
    stand_in: Option<StandIn>,
    from_archive: bool,
    origin: OriginId,
    links: HashMap<Connection, Peer>,
    data: Vec<Option<OwnedFd>>,
    receiver: Option<DataReceiver>,
    progress: ReceiverProgress,
    backend: BackendChoice,
    /// Device state went into the machine, well or not.
    touched: bool,
    /// Guest memory is as if no attempt had been made.
    emptied: bool,
    /// Guest memory is shared with the source: it must never be emptied, and nothing else can come into it.
    in_place: bool,
    /// That memory waits in a file, for whichever process loads its archive.
    in_file: bool,
}

/// A connection that has said its first frame.
enum Peer {
    /// Not judged by the core yet: may become a control link or a data socket.
    New(Stream),
    Control(ControlLink),
    /// No connection at all: an archive that answers by itself.
    Replay(Box<Replay>),
}

impl fmt::Debug for Incoming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Incoming")
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

impl Incoming {
    /// Takes connections in from `origin`, which `address` has led to. They are numbered from `first`, so that those of an earlier
    /// origin are never taken for them.
    pub(super) fn start(
        address: &Address,
        origin: Origin,
        first: OriginId,
        config: TargetConfig,
        machine: Arc<dyn Machine>,
        clock: Clock,
        events: Events,
    ) -> Self {
        let arrivals = Arrivals::default();
        let deadlines = config.deadlines;
        let acceptor = Acceptor::new(first.0, deadlines, events.clone(), arrivals.clone());
        let (local, acceptor, stand_in) = match origin {
            Origin::Network(listener) => {
                let local = listener.local_address().clone();
                (local, runtime::spawn(acceptor.listen(listener)), None)
            }
            Origin::StandIn(stand_in, sockets) => {
                let task = acceptor.take(sockets, address.to_string());
                (address.clone(), runtime::spawn(task), Some(stand_in))
            }
        };
        let mut this = Self::new(local, first, config, machine, clock, events);
        this.arrivals = arrivals;
        this.acceptor = Some(acceptor);
        this.from_archive = matches!(stand_in, Some(StandIn::Loader(_)));
        this.stand_in = stand_in;
        this
    }

    /// One to which nobody can connect.
    fn new(
        address: Address,
        origin: OriginId,
        config: TargetConfig,
        machine: Arc<dyn Machine>,
        clock: Clock,
        events: Events,
    ) -> Self {
        let in_place = config.in_place.is_some();
        Self {
            core: Target::new(config),
            machine,
            clock,
            events,
            arrivals: Arrivals::default(),
            address,
            acceptor: None,
            from_archive: false,
            stand_in: None,
            origin,
            links: HashMap::new(),
            data: Vec::new(),
            receiver: None,
            progress: ReceiverProgress::default(),
            backend: Backend::detect(),
            touched: false,
            emptied: false,
            in_place,
            in_file: false,
        }
    }

    pub(super) fn core(&self) -> &Target {
        &self.core
    }

    pub(super) fn core_mut(&mut self) -> &mut Target {
        &mut self.core
    }

    /// Where it listens, the port resolved.
    pub(super) fn address(&self) -> &Address {
        &self.address
    }

    /// The source is no process of its own: nobody will ever ask for an outcome.
    pub(super) fn is_from_archive(&self) -> bool {
        self.from_archive
    }

    pub(super) fn backend(&self) -> &BackendChoice {
        &self.backend
    }

    pub(super) fn progress(&self) -> ReceiverProgress {
        self.receiver
            .as_ref()
            .map_or_else(|| self.progress.clone(), DataReceiver::progress)
    }

    pub(super) fn poll_timeout(&self) -> Option<Moment> {
        self.core.poll_timeout()
    }

    pub(super) fn tick(&mut self) {
        self.core.handle_timeout(self.clock.now());
    }

    /// It has ended, well or not.
    pub(super) fn is_over(&self) -> bool {
        matches!(
            self.core.status(),
            TargetStatus::Completed | TargetStatus::Failed
        )
    }

    /// The operator shuts all connections down.
    pub(super) fn yank(&mut self) {
        for peer in self.links.values() {
            match peer {
                Peer::New(stream) => stream.shutdown(),
                Peer::Control(link) => link.shut(),
                Peer::Replay(_) => {}
            }
        }
        if let Some(control) = self.core.control() {
            let now = self.clock.now();
            self.core
                .handle_connection_lost(now, control, YANKED, false);
        }
    }

    /// Stops listening: nobody will ask for the outcome any more. A unix socket's path is removed.
    pub(super) fn stop_listening(&mut self) {
        if let Some(acceptor) = self.acceptor.take() {
            acceptor.abort();
        }
    }

    pub(super) fn handle(&mut self, event: TargetEvent) {
        let now = self.clock.now();
        match event {
            TargetEvent::First(connection, frame) => self.introduced(now, connection, frame),
            TargetEvent::Link(connection, LinkEvent::Frame(frame)) => {
                self.core.handle_frame(now, connection, frame)
            }
            TargetEvent::Link(connection, LinkEvent::Lost { error, protocol }) => {
                if !(protocol && self.core.may_explain(connection)) {
                    self.links.remove(&connection);
                }
                self.core
                    .handle_connection_lost(now, connection, &error, protocol);
            }
            TargetEvent::Data(ReceiverEvent::RoundReceived { round, last, .. }) => {
                self.core.handle_round_placed(now, round, last);
            }
            TargetEvent::Data(ReceiverEvent::Failed { connection, error }) => {
                self.data_failed(now, data_error(connection, &error));
            }
            TargetEvent::DataLost(control, error) => {
                if self.core.control() == control {
                    self.core.handle_data_failed(now, error);
                }
            }
            // Of an origin that was given up.
            TargetEvent::SourceFailed(origin, _)
            | TargetEvent::SocketEnded(origin, _)
            | TargetEvent::SocketGone(origin, _)
                if origin != self.origin => {}
            TargetEvent::SourceFailed(_, text) => {
                let error = TargetError::Local(AbortCode::Resources, text);
                self.core.handle_origin_failed(now, error);
            }
            TargetEvent::SocketEnded(origin, text) => {
                let events = self.events.clone();
                runtime::spawn(async move {
                    // Its last words are on their way through the connections that it carried.
                    tokio::time::sleep(LAST_WORD).await;
                    // The engine ends only with the process.
                    let _ = events.send(Event::Target(TargetEvent::SocketGone(origin, text)));
                });
            }
            TargetEvent::SocketGone(_, text) => {
                self.core.handle_origin_failed(now, TargetError::Link(text));
            }
            // Kinds of a later version of the transport concern somebody else.
            TargetEvent::Data(_) => {}
            TargetEvent::Loaded(..)
            | TargetEvent::Started(_)
            | TargetEvent::StartLost
            | TargetEvent::Unmarked(..)
            | TargetEvent::Inherited(_) => {
                unreachable!("the engine takes what is its own out first")
            }
            TargetEvent::LoadBegun(Ok(devices)) => self.prepare(devices),
            TargetEvent::LoadBegun(Err(error)) => self.core.handle_job_failed(
                now,
                TargetJob::Prepare,
                AbortCode::Device,
                &chain(&error),
            ),
            TargetEvent::LoadedInto(Ok(loaded)) => self.core.handle_loaded(now, loaded),
            TargetEvent::LoadedInto(Err(error)) => {
                self.core.handle_job_failed(
                    now,
                    TargetJob::Load,
                    AbortCode::Device,
                    &chain(&error),
                );
            }
            TargetEvent::StartedWith(Ok(resume_us)) => {
                self.core.handle_guest_started(now, resume_us)
            }
            TargetEvent::StartedWith(Err(text)) => {
                self.core
                    .handle_job_failed(now, TargetJob::StartGuest, AbortCode::Internal, &text);
            }
            TargetEvent::Notified => self.core.handle_notified(now),
            TargetEvent::Emptied(Ok(())) => self.emptied = true,
            TargetEvent::Emptied(Err(error)) => tracing::error!(
                error = &error as &dyn Error,
                "guest memory cannot be emptied; no other migration can come here"
            ),
            TargetEvent::LinksClosed => self.core.handle_links_closed(now),
        }
    }

    /// What this side knows for sure counts at once. A connection that just ended may have an explanation on its way.
    fn data_failed(&mut self, now: Moment, error: TargetError) {
        if !matches!(error, TargetError::Link(_)) {
            self.core.handle_data_failed(now, error);
            return;
        }
        let (events, control) = (self.events.clone(), self.core.control());
        runtime::spawn(async move {
            tokio::time::sleep(LAST_WORD).await;
            // The engine ends only with the process.
            let _ = events.send(Event::Target(TargetEvent::DataLost(control, error)));
        });
    }

    fn introduced(&mut self, now: Moment, connection: Connection, frame: SourceFrame) {
        let Some((stream, buffer)) = self.arrivals.take(connection.0) else {
            return;
        };
        let peer = if matches!(frame, SourceFrame::DataHello(_)) {
            if buffer.pending() > 0 {
                tracing::warn!(
                    peer = stream.peer(),
                    "a data connection sends before it may"
                );
                stream.shutdown();
                return;
            }
            Peer::New(stream)
        } else {
            let events = self.events.clone();
            Peer::Control(ControlLink::start(stream, buffer, move |event| {
                // The engine ends only with the process.
                let _ = events.send(Event::Target(TargetEvent::Link(connection, event)));
            }))
        };
        self.links.insert(connection, peer);
        self.core.handle_first_frame(now, connection, frame);
    }

    /// Does what the core asks for, up to the next thing that is the engine's to do.
    pub(super) fn poll(&mut self) -> Option<IncomingAction> {
        while let Some(action) = self.core.poll_action() {
            match action {
                TargetAction::StatusChanged(status) => {
                    return Some(IncomingAction::StatusChanged(status));
                }
                TargetAction::Load { sections, verify } => {
                    return Some(IncomingAction::Load { sections, verify });
                }
                TargetAction::StartGuest { run } => {
                    return Some(IncomingAction::StartGuest { run });
                }
                TargetAction::Failed { error, linger } => {
                    return Some(IncomingAction::Failed { error, linger });
                }
                TargetAction::NotifyFailed => {
                    let id = self.core.migration_id().unwrap_or_default();
                    return Some(IncomingAction::NotifyFailed(id));
                }
                TargetAction::Settled => self.stop_listening(),
                TargetAction::Send(connection, frame) => self.send(connection, &frame),
                TargetAction::Close(connection) => {
                    if let Some(peer) = self.links.remove(&connection) {
                        runtime::spawn(close(peer));
                    }
                }
                TargetAction::AdoptData { connection, index } => self.adopt(connection, index),
                TargetAction::Prepare => return Some(IncomingAction::Prepare),
                TargetAction::CloseLinks => self.close_links(),
            }
        }
        None
    }

    fn send(&mut self, connection: Connection, frame: &TargetFrame) {
        match self.links.get_mut(&connection) {
            Some(Peer::Control(link)) => link.send(frame.encode()),
            Some(Peer::Replay(replay)) => {
                let answer = replay.answer(frame);
                self.replayed(connection, answer);
            }
            // A refused data connection is told why before it is closed.
            Some(Peer::New(_)) => {
                if let Some(Peer::New(stream)) = self.links.remove(&connection) {
                    let bytes = frame.encode();
                    runtime::spawn(async move {
                        let (written, _) = stream.write_all(bytes).await;
                        tracing::debug!(ok = written.is_ok(), "refused a data connection");
                        stream.shutdown();
                    });
                }
            }
            None => {}
        }
    }

    fn adopt(&mut self, connection: Connection, index: u16) {
        let Some(Peer::New(stream)) = self.links.remove(&connection) else {
            return;
        };
        let index = usize::from(index);
        if self.data.len() <= index {
            self.data.resize_with(index + 1, || None);
        }
        match stream.into_socket() {
            Ok(socket) => self.data[index] = Some(socket),
            Err(error) => {
                let error = TargetError::Link(format!("data connection {index}: {error}"));
                self.core.handle_data_failed(self.clock.now(), error);
            }
        }
    }

    fn prepare(&mut self, devices: Sinks) {
        if self.core.is_failing() {
            // The links have gone or go; all that is left to do is to end the job.
            return self.core.handle_prepared(self.clock.now());
        }
        let sockets: Option<Vec<OwnedFd>> = std::mem::take(&mut self.data).into_iter().collect();
        let events = self.events.clone();
        let config = ReceiverConfig {
            backend: self.backend.backend,
        };
        let report = Arc::new(move |event| {
            // The engine ends only with the process.
            let _ = events.send(Event::Target(TargetEvent::Data(event)));
        });
        let now = self.clock.now();
        let Some(sockets) = sockets else {
            let text = "a data connection was lost before the first page";
            self.core
                .handle_job_failed(now, TargetJob::Prepare, AbortCode::Resources, text);
            return;
        };
        if sockets.is_empty() {
            // In place there is nothing to receive.
            return self.core.handle_prepared(now);
        }
        match DataReceiver::start(sockets, self.machine.ram().clone(), devices, config, report) {
            Ok(receiver) => {
                self.receiver = Some(receiver);
                self.core.handle_prepared(now);
            }
            Err(error) => {
                self.core.handle_job_failed(
                    now,
                    TargetJob::Prepare,
                    AbortCode::Resources,
                    &chain(&error),
                );
            }
        }
    }

    /// Data threads are joined on a thread of their own: the control thread never waits for them.
    fn close_links(&mut self) {
        let control = self
            .core
            .control()
            .and_then(|control| self.links.remove(&control));
        self.data.clear();
        let receiver = self.receiver.take();
        if let Some(receiver) = &receiver {
            self.progress = receiver.progress();
        }
        let stand_in = self.stand_in.take();
        let events = self.events.clone();
        let (joined, join) = tokio::sync::oneshot::channel::<()>();
        match receiver {
            Some(receiver) => {
                receiver.abort();
                let end = move || {
                    let totals = receiver.join();
                    tracing::debug!(?totals, "data threads have ended");
                    drop(joined);
                };
                if let Err(error) = std::thread::Builder::new()
                    .name("vm-join".into())
                    .spawn(end)
                {
                    tracing::warn!(
                        error = &error as &dyn Error,
                        "no thread to join the data threads with"
                    );
                }
            }
            // Nothing to wait for: the other end learns that this one is gone.
            None => drop(joined),
        }
        runtime::spawn(async move {
            if let Some(peer) = control {
                close(peer).await;
            }
            if let Some(stand_in) = stand_in
                && let Err(error) = off_thread("close", move || stand_in.end()).await
            {
                tracing::error!(error, "the way from the source may still be in use");
            }
            // Resolves when the sending end is dropped, which is when the data threads are gone.
            let _ = join.await;
            // The engine ends only with the process.
            let _ = events.send(Event::Target(TargetEvent::LinksClosed));
        });
    }

    /// The process is about to end: what was said on the links leaves first, or a second passes.
    pub(super) async fn say_the_rest(&mut self) {
        let links = self.links.drain();
        let closing: Vec<_> = links.map(|(_, peer)| runtime::spawn(close(peer))).collect();
        for closed in closing {
            // A task that panicked has nothing more to say.
            let _ = closed.await;
        }
    }

    /// The engine could not even begin a job.
    pub(super) fn refuse_job(&mut self, job: TargetJob, error: &str) {
        let now = self.clock.now();
        self.core
            .handle_job_failed(now, job, AbortCode::Internal, error);
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        self.stop_listening();
    }
}

fn data_error(connection: usize, error: &DataError) -> TargetError {
    let text = format!("data connection {connection}: {}", chain(error));
    match error {
        // Whose fault it is says the kind already.
        DataError::Peer(fault) => {
            TargetError::Protocol(format!("data connection {connection}: {fault}"))
        }
        DataError::Memory { .. } => TargetError::Local(AbortCode::Resources, text),
        DataError::Device { .. } => TargetError::Local(AbortCode::Device, chain(error)),
        _ => TargetError::Link(text),
    }
}

async fn close(peer: Peer) {
    match peer {
        Peer::New(stream) => stream.shutdown(),
        Peer::Control(link) => link.close().await,
        Peer::Replay(_) => {}
    }
}
