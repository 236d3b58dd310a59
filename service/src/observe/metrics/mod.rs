//! The Prometheus endpoint: `GET /metrics` over HTTP/1.1, on a thread of its own.
//!
//! The names and what they mean are in `text.rs`, and in the README for operators. A client that is slow, silent or talks nonsense costs
//! one of [`CLIENTS_MAX`] places for at most [`PATIENCE`]; when all are taken, new clients are told to come back later. The migration
//! does not notice any of it: figures are taken from the board in `figures.rs`, see there.

mod http;
pub(crate) mod text;

use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use anyhow::Context;
use tokio::sync::{Semaphore, oneshot};
use vmferry_transport::control::runtime::{self, RuntimeKind};
use vmferry_transport::control::{Address, Listener, Stream};

use super::figures::Board;
use crate::machine::Machine;

/// Clients at one time.
pub const CLIENTS_MAX: usize = 16;
/// How long a client has to say what it wants and to take the answer.
pub const PATIENCE: Duration = Duration::from_secs(5);
/// How long the end of the process waits for the thread.
const FAREWELL: Duration = Duration::from_secs(1);
/// Pause after a failed accept: out of descriptors, most likely.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The address is not one for metrics. The operator is at fault.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum MetricsAddressError {
    /// Not a kind that Prometheus can ask.
    #[error("metrics are served at unix:PATH or tcp:ADDRESS:PORT, not at {0}")]
    Kind(Address),
    /// Others could read it.
    #[error(
        "{0} may be reachable from other hosts: use tcp:127.0.0.1:PORT or unix:PATH, or say --metrics-public"
    )]
    Public(Address),
}

/// Checks where metrics are to be served: metrics name hosts, sizes and errors, which are nobody else's business unless the operator
/// says so with `public`.
///
/// # Errors
/// [`MetricsAddressError`].
pub fn check_address(address: &Address, public: bool) -> Result<(), MetricsAddressError> {
    match address {
        Address::Unix { .. } => Ok(()),
        Address::Tcp { host, .. } => {
            // A name may mean anything; this one does not.
            let is_local = host == "localhost"
                || host
                    .parse::<IpAddr>()
                    .is_ok_and(|address| address.is_loopback());
            if is_local || public {
                Ok(())
            } else {
                Err(MetricsAddressError::Public(address.clone()))
            }
        }
        _ => Err(MetricsAddressError::Kind(address.clone())),
    }
}

/// The endpoint. Dropping it ends it, and removes a unix socket's path.
#[derive(Debug)]
pub(crate) struct MetricsServer {
    address: Address,
    socket: OwnedFd,
    leaves_path: Arc<AtomicBool>,
    stop: Option<oneshot::Sender<()>>,
    stopped: mpsc::Receiver<()>,
}

impl Drop for MetricsServer {
    fn drop(&mut self) {
        drop(self.stop.take());
        // The thread waits for nothing but its clients' sockets, and not for these when it ends.
        let _ = self.stopped.recv_timeout(FAREWELL);
    }
}

impl MetricsServer {
    /// Listens at `address`, or takes the socket of a process that listened there before, and answers on a thread.
    ///
    /// # Errors
    /// When the address cannot be listened on.
    pub(crate) fn start(
        address: &Address,
        inherited: Option<OwnedFd>,
        board: Arc<Board>,
        machine: Arc<dyn Machine>,
    ) -> anyhow::Result<Self> {
        let (opened, open) = mpsc::channel();
        let (stop, asked_to_stop) = oneshot::channel::<()>();
        let (stopping, stopped) = mpsc::channel::<()>();
        let wanted = address.clone();
        let leaves_path = Arc::new(AtomicBool::new(false));
        let leaves = Arc::clone(&leaves_path);
        let source = text::Source { board, machine };
        thread::Builder::new()
            .name("vm-metrics".into())
            .spawn(move || {
                // The runtime without io_uring: it has no queue of its own to overrun and shares nothing with the control thread.
                let served = runtime::run_on(RuntimeKind::Plain, async {
                    let bound = match inherited {
                        Some(socket) => Listener::inherit(socket, &wanted),
                        None => Listener::bind(&wanted).await,
                    };
                    let listener = match bound {
                        Ok(listener) => listener,
                        Err(error) => return drop(opened.send(Err(error.into()))),
                    };
                    let local = listener.local_address().clone();
                    let socket = listener.duplicate().map_err(anyhow::Error::from);
                    // Fails only if nobody waits for it.
                    let _ = opened.send(socket.map(|socket| (local, socket)));
                    tokio::select! {
                        () = serve(&listener, Rc::new(source)) => {}
                        _ = asked_to_stop => {}
                    }
                    if leaves.load(Ordering::Relaxed) {
                        listener.leave_path();
                    }
                });
                drop(stopping);
                if let Err(error) = served {
                    tracing::error!(
                        error = &error as &dyn std::error::Error,
                        "no metrics: the thread cannot work"
                    );
                }
            })
            .context("cannot start the thread that serves metrics")?;
        let (address, socket) = open
            .recv()
            .unwrap_or_else(|_| Err(anyhow::anyhow!("the thread has ended")))
            .context("cannot serve metrics")?;
        Ok(Self {
            address,
            socket,
            leaves_path,
            stop: Some(stop),
            stopped,
        })
    }

    /// Another descriptor of the listening socket, for the process that is to listen next.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub(crate) fn duplicate_listener(&self) -> std::io::Result<OwnedFd> {
        self.socket.try_clone()
    }

    /// Another process answers there now.
    pub(crate) fn leave(self) {
        self.leaves_path.store(true, Ordering::Relaxed);
    }

    /// Where it listens, the port resolved.
    pub(crate) fn address(&self) -> &Address {
        &self.address
    }
}

async fn serve(listener: &Listener, source: Rc<text::Source>) {
    let places = Arc::new(Semaphore::new(CLIENTS_MAX));
    loop {
        let stream = match listener.accept().await {
            Ok(stream) => stream,
            Err(error) => {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "cannot accept a client of the metrics"
                );
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
            tracing::debug!(client = stream.peer(), "too many clients of the metrics");
            // Dropping it closes the connection, and the client tries again.
            continue;
        };
        let source = Rc::clone(&source);
        runtime::spawn(async move {
            answer(stream, &source).await;
            drop(place);
        });
    }
}

/// Answers one client. Its reads and writes are never dropped half-way: when its time is over the stream is shut down, which ends them.
async fn answer(stream: Stream, source: &text::Source) {
    let stream = Rc::new(stream);
    let watched = Rc::downgrade(&stream);
    let deadline = runtime::spawn(async move {
        tokio::time::sleep(PATIENCE).await;
        if let Some(stream) = watched.upgrade() {
            tracing::debug!(
                client = stream.peer(),
                "a client of the metrics is too slow"
            );
            stream.shutdown();
        }
    });
    http::converse(&stream, |path| match path {
        "/metrics" => Some(source.render()),
        _ => None,
    })
    .await;
    deadline.abort();
    stream.shutdown();
}
