//! The door of an incoming migration: connections come in, and each says who it is, on a task of its own.
//!
//! Several connections may come over one socket, when the source has only one; they come in here like any other.

use std::cell::Cell;
use std::error::Error;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc};
use vmferry_transport::control::{Listener, Stream, runtime};
use vmferry_transport::limits::Deadlines;
use vmferry_transport::proto::Connection;
use vmferry_transport::streams::Mux;
use vmferry_transport::wire::frame::{Abort, AbortCode, TargetFrame};

use super::event::{Arrivals, Event, Events, TargetEvent};
use super::link::{FirstFrameError, first_frame};
use super::origin::connections;

/// Connections that have not said who they are yet. More wait in the kernel's queue.
const STRANGERS_MAX: usize = 300;
/// Pause after a failed accept: the process is out of descriptors, and trying at once would only burn time.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Gives connections their numbers and tells the engine of them.
#[derive(Clone)]
pub(super) struct Acceptor {
    next: Rc<Cell<u64>>,
    deadlines: Deadlines,
    events: Events,
    arrivals: Arrivals,
}

impl Acceptor {
    /// The first connection gets the number `first`.
    pub(super) fn new(
        first: u64,
        deadlines: Deadlines,
        events: Events,
        arrivals: Arrivals,
    ) -> Self {
        Self {
            next: Rc::new(Cell::new(first)),
            deadlines,
            events,
            arrivals,
        }
    }

    /// Takes connections in for as long as the listener lives. A silent one delays nobody.
    pub(super) async fn listen(self, listener: Listener) {
        let strangers = Arc::new(Semaphore::new(STRANGERS_MAX));
        loop {
            let Ok(place) = Arc::clone(&strangers).acquire_owned().await else {
                return;
            };
            let stream = loop {
                match listener.accept().await {
                    Ok(stream) => break stream,
                    Err(error) => {
                        tracing::warn!(
                            error = &error as &dyn Error,
                            "accepting a migration connection failed"
                        );
                        tokio::time::sleep(ACCEPT_RETRY).await;
                    }
                }
            };
            let acceptor = self.clone();
            runtime::spawn(async move {
                if let Some((stream, first)) = acceptor.introduce(stream).await {
                    acceptor.share(stream, first).await;
                }
                drop(place);
            });
        }
    }

    /// Takes connections in that somebody in this process makes, until there will be no more.
    pub(super) async fn take(self, mut sockets: mpsc::UnboundedReceiver<OwnedFd>, name: String) {
        while let Some(socket) = sockets.recv().await {
            match Stream::from_socket(socket, name.clone()) {
                Ok(stream) => {
                    let acceptor = self.clone();
                    runtime::spawn(async move {
                        if let Some((stream, _)) = acceptor.introduce(stream).await {
                            // A shared connection within a shared connection.
                            stream.shutdown();
                        }
                    });
                }
                // Closed by that, which its other end sees.
                Err(error) => tracing::error!(error = &error as &dyn Error, "connection lost"),
            }
        }
    }

    /// Takes connections in that come over one socket, until it ends.
    async fn share(&self, stream: Stream, first: Vec<u8>) {
        let name = stream.peer().to_owned();
        let (connect, sockets) = connections();
        // Whoever uses one of the connections sees by itself that it has ended.
        let ended = Box::new(|_| {});
        let shared = stream
            .into_socket()
            .and_then(|socket| Mux::start(socket, first, &self.deadlines, Some(connect), ended));
        match shared {
            Ok(_) => self.clone().take(sockets, name).await,
            Err(error) => tracing::warn!(
                peer = name,
                error = &error as &dyn Error,
                "a shared connection is lost"
            ),
        }
    }

    /// Reads the first frame under a deadline. The read itself is never cancelled: the deadline shuts the stream down, which ends it.
    /// Gives the stream back, and what was read of it, if several connections come over it.
    async fn introduce(&self, stream: Stream) -> Option<(Stream, Vec<u8>)> {
        let connection = Connection(self.next.replace(self.next.get() + 1));
        let stream = Rc::new(stream);
        let watched = Rc::downgrade(&stream);
        let patience = Duration::from_micros(self.deadlines.hello_us);
        let deadline = runtime::spawn(async move {
            tokio::time::sleep(patience).await;
            if let Some(stream) = watched.upgrade() {
                stream.shutdown();
            }
        });
        let first = first_frame(&stream).await;
        deadline.abort();
        let stream = Rc::into_inner(stream)?;
        match first {
            Ok((frame, buffer)) => {
                self.arrivals.leave(connection.0, stream, buffer);
                let event = TargetEvent::First(connection, frame);
                // The engine ends only with the process.
                let _ = self.events.send(Event::Target(event));
            }
            Err(FirstFrameError::Shared(first)) => return Some((stream, first)),
            Err(error) => {
                tracing::warn!(
                    peer = stream.peer(),
                    error = &error as &dyn Error,
                    "not a migration connection"
                );
                if let FirstFrameError::Wire(error) = &error {
                    let abort = Abort::new(AbortCode::Incompatible, error.to_string());
                    // A last word to somebody who may not understand it.
                    let _ = stream.write_all(TargetFrame::Abort(abort).encode()).await;
                }
                stream.shutdown();
            }
        }
        None
    }
}
