//! The QMP socket and its clients.
//!
//! Each client has three tasks: a reader that cuts the stream into objects, a main task that answers them one after the other and
//! passes events on, and a writer. They are joined by bounded queues. With out-of-band execution the main task goes on reading while
//! the engine executes a command, up to a number of commands that wait.
//!
//! - A client that sends much and reads little stops its own reader, nobody else.
//! - A client that negotiated and does not read its events fills its outbox and is disconnected.
//! - An event that the engine sent before a reply reaches the client before that reply.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::future;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::rc::Rc;
use std::time::Duration;

use serde_json::{Map, Value};
use tokio::sync::{broadcast, mpsc, watch};
use tokio::task::JoinHandle;
use vmferry_transport::control::{FdReader, Listener, Stream, runtime};

use super::codec::ObjectReader;
use super::passed_fds::PassedFds;
use super::session::{self, Session, Step, What};
use super::{EngineHandle, QmpError, QmpEvent};

/// Clients at one time. A monitor, a tool or two, and somebody looking; more is a client that forgets to hang up.
pub const CLIENTS_MAX: usize = 32;
/// Messages that may wait to be written to one client.
const OUTBOX_MESSAGES_MAX: usize = 256;
/// Objects that may wait for one client's main task.
const INBOX_OBJECTS_MAX: usize = 4;
/// Bytes read at once.
const READ_BYTES: usize = 4096;
/// How long the last replies may take to be written when the server ends.
const FAREWELL: Duration = Duration::from_secs(1);
/// Pause after a failed accept: out of descriptors, most likely.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Commands that may wait behind the one being executed, for a client that may overtake itself. QEMU's number. Such a client is not read
/// from while so many wait.
const COMMANDS_QUEUED_MAX: usize = 8;

/// An object, and the number of the read it ended in.
type Object = (Result<Map<String, Value>, QmpError>, u64);
/// Descriptors of one client: its reader puts them there, its main task takes them out.
type SharedFds = Rc<RefCell<PassedFds>>;

/// A QMP server. Dropping it closes every connection at once; [`finish`](Self::finish) lets the last replies out first.
#[derive(Debug)]
pub struct QmpServer {
    listener: Rc<Listener>,
    ending: watch::Sender<bool>,
    acceptor: JoinHandle<()>,
    clients: Clients,
}

/// The clients by a number of their own.
#[derive(Clone, Debug, Default)]
struct Clients(Rc<RefCell<HashMap<u64, Connected>>>);

#[derive(Debug)]
struct Connected {
    stream: Rc<Stream>,
    task: JoinHandle<()>,
}

impl QmpServer {
    /// Serves clients of `listener` with `engine`. Call it on a control thread.
    pub fn start(listener: Listener, engine: EngineHandle) -> Self {
        let (ending, ended) = watch::channel(false);
        let clients = Clients::default();
        let listener = Rc::new(listener);
        let accepting = accept(Rc::clone(&listener), engine, clients.clone(), ended);
        let acceptor = runtime::spawn(accepting);
        Self {
            listener,
            ending,
            acceptor,
            clients,
        }
    }

    /// Another descriptor of the listening socket, for the process that is to listen next.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub fn duplicate_listener(&self) -> std::io::Result<OwnedFd> {
        self.listener.duplicate()
    }

    /// Another process serves new clients now, at the same path. Those that are connected are still served.
    pub fn leave_listener(&self) {
        self.acceptor.abort();
        self.listener.leave_path();
    }

    /// Stops listening, lets every client have the replies that are due, for a second at most, and hangs up.
    pub async fn finish(self) {
        self.ending.send_replace(true);
        self.acceptor.abort();
        let deadline = tokio::time::Instant::now() + FAREWELL;
        let waiting: Vec<_> = self
            .clients
            .0
            .borrow_mut()
            .drain()
            .map(|(_, client)| client)
            .collect();
        for Connected { stream, task } in waiting {
            // Timing out drops the handle of a task, not a read or write.
            if tokio::time::timeout_at(deadline, task).await.is_err() {
                tracing::debug!(
                    client = stream.peer(),
                    "QMP client does not take its last replies"
                );
            }
            stream.shutdown();
        }
    }
}

impl Drop for QmpServer {
    fn drop(&mut self) {
        self.acceptor.abort();
        for client in self.clients.0.borrow().values() {
            client.stream.shutdown();
        }
    }
}

async fn accept(
    listener: Rc<Listener>,
    engine: EngineHandle,
    clients: Clients,
    ended: watch::Receiver<bool>,
) {
    for number in 0.. {
        let stream = loop {
            match listener.accept().await {
                Ok(stream) => break stream,
                Err(error) => {
                    tracing::warn!(
                        error = &error as &dyn std::error::Error,
                        "cannot accept a QMP client"
                    );
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        };
        if clients.0.borrow().len() == CLIENTS_MAX {
            tracing::warn!(
                client = stream.peer(),
                limit = CLIENTS_MAX,
                "too many QMP clients, hanging up"
            );
            continue;
        }
        let stream = Rc::new(stream);
        let serving = serve(Rc::clone(&stream), engine.clone(), ended.clone());
        let task = runtime::spawn({
            let clients = clients.clone();
            async move {
                serving.await;
                clients.0.borrow_mut().remove(&number);
            }
        });
        // The task has not run yet: spawning only queues it.
        clients
            .0
            .borrow_mut()
            .insert(number, Connected { stream, task });
    }
}

/// One client from greeting to end.
async fn serve(stream: Rc<Stream>, engine: EngineHandle, mut ended: watch::Receiver<bool>) {
    let (object_sender, mut objects) = mpsc::channel(INBOX_OBJECTS_MAX);
    let (outbox, messages) = mpsc::channel(OUTBOX_MESSAGES_MAX);
    let fds = SharedFds::default();
    let reader = match FdReader::new(&stream) {
        Ok(reader) => runtime::spawn(read_objects(reader, object_sender, Rc::clone(&fds))),
        Err(error) => {
            tracing::warn!(
                client = stream.peer(),
                error = &error as &dyn std::error::Error,
                "cannot read from a QMP client"
            );
            return stream.shutdown();
        }
    };
    let mut writer = runtime::spawn(write_messages(Rc::clone(&stream), messages));

    let mut client = Client {
        session: Session::default(),
        engine,
        outbox,
        events: None,
        fds,
        waiting: VecDeque::new(),
        pending: None,
        overtaking: None,
        hung_up: false,
    };
    let why = client.run(&mut objects, &mut ended).await;
    if matches!(why, Leave::Behind) {
        tracing::warn!(client = stream.peer(), reason = %why, "a QMP client is hung up on");
    } else {
        tracing::debug!(client = stream.peer(), reason = %why, "QMP client leaves");
    }
    // Without the outbox the writer ends once it has written what is due.
    drop(client);
    if matches!(why, Leave::Behind) {
        stream.shutdown();
    }
    // Timing out forgets nothing: the shutdown wakes a write that the client does not take, and the waiting read.
    let _ = tokio::time::timeout(FAREWELL, &mut writer).await;
    stream.shutdown();
    drop(objects);
    let _ = reader.await;
}

/// Why a session ends.
#[derive(Debug)]
enum Leave {
    /// The client hung up.
    HungUp,
    /// The client does not read what it gets.
    Behind,
    /// The server ends.
    Ended,
}

impl std::fmt::Display for Leave {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::HungUp => "it hung up",
            Self::Behind => "it does not read what it gets",
            Self::Ended => "the server ends",
        })
    }
}

/// A command that the engine is executing.
type Pending = Pin<Box<dyn Future<Output = Value>>>;

struct Client {
    session: Session,
    engine: EngineHandle,
    outbox: mpsc::Sender<Value>,
    /// From negotiation on.
    events: Option<broadcast::Receiver<QmpEvent>>,
    fds: SharedFds,
    /// Behind the one that is pending.
    waiting: VecDeque<Waiting>,
    pending: Option<Pending>,
    /// The same for a command out of band.
    overtaking: Option<Pending>,
    /// Nothing more will come; what came is answered.
    hung_up: bool,
}

/// A step that waits for its turn, with the descriptor for it.
struct Waiting {
    what: What,
    fd: Option<Result<OwnedFd, QmpError>>,
}

impl Client {
    async fn run(
        &mut self,
        objects: &mut mpsc::Receiver<Object>,
        ended: &mut watch::Receiver<bool>,
    ) -> Leave {
        if self.send(session::greeting()).await.is_err() {
            return Leave::HungUp;
        }
        let mut ending = false;
        loop {
            let idle = self.pending.is_none() && self.overtaking.is_none();
            if ending && idle {
                return Leave::Ended;
            }
            if self.hung_up && idle && self.waiting.is_empty() {
                return Leave::HungUp;
            }
            let reading = !ending && !self.hung_up && self.has_room();
            // Everything polled here may be dropped half-way: queues and the engine's answer, never a read or write.
            let step = tokio::select! {
                biased;
                event = next_event(&mut self.events) => self.pass_on(event),
                reply = next_reply(&mut self.overtaking) => {
                    self.overtaking = None;
                    self.reply(reply).await
                }
                reply = next_reply(&mut self.pending) => {
                    self.pending = None;
                    self.reply(reply).await
                }
                _ = ended.changed(), if !ending => {
                    ending = true;
                    Ok(())
                }
                object = objects.recv(), if reading => match object {
                    Some(object) => self.handle(object).await,
                    None => {
                        self.hung_up = true;
                        Ok(())
                    }
                },
            };
            let step = match step {
                Ok(()) if !ending => self.go_on().await,
                other => other,
            };
            if let Err(leave) = step {
                return leave;
            }
        }
    }

    /// Whether another object may be looked at.
    fn has_room(&self) -> bool {
        match self.session.is_oob() {
            true => self.overtaking.is_none() && self.waiting.len() < COMMANDS_QUEUED_MAX,
            false => self.pending.is_none() && self.waiting.is_empty(),
        }
    }

    async fn handle(&mut self, (object, read): Object) -> Result<(), Leave> {
        self.fds.borrow_mut().command_in(read);
        let Step { what, oob } = match object {
            Ok(object) => self.session.handle(object),
            Err(error) => Step {
                what: What::Reply(session::reply(None, Err(error))),
                oob: false,
            },
        };
        let fd = match &what {
            What::Execute { command, .. } if command.takes_fd() => {
                Some(self.fds.borrow_mut().claim())
            }
            _ => None,
        };
        let step = Waiting { what, fd };
        if oob {
            self.overtaking = self.begin(step).await?;
        } else {
            self.waiting.push_back(step);
        }
        Ok(())
    }

    /// Begins what waits, one after the other, until something has to be waited for.
    async fn go_on(&mut self) -> Result<(), Leave> {
        while self.pending.is_none()
            && let Some(step) = self.waiting.pop_front()
        {
            self.pending = self.begin(step).await?;
        }
        Ok(())
    }

    async fn begin(&mut self, Waiting { what, fd }: Waiting) -> Result<Option<Pending>, Leave> {
        match what {
            What::Reply(reply) => self.send(reply).await.map(|()| None),
            What::Negotiated(reply) => {
                self.events = Some(self.engine.subscribe());
                self.send(reply).await.map(|()| None)
            }
            What::Execute { command, id } => {
                let engine = self.engine.clone();
                let fd = match fd.transpose() {
                    Ok(fd) => fd,
                    Err(error) => {
                        let reply = session::reply(id, Err(error));
                        return self.send(reply).await.map(|()| None);
                    }
                };
                let answer =
                    async move { session::reply(id, engine.execute_with(command, fd).await) };
                Ok(Some(Box::pin(answer)))
            }
        }
    }

    async fn reply(&mut self, reply: Value) -> Result<(), Leave> {
        self.drain_events()?;
        self.send(reply).await
    }

    /// A reply waits for room: only the client itself is held up.
    async fn send(&self, message: Value) -> Result<(), Leave> {
        self.outbox.send(message).await.map_err(|_| Leave::HungUp)
    }

    /// An event does not.
    fn pass_on(&self, event: Result<QmpEvent, broadcast::error::RecvError>) -> Result<(), Leave> {
        let event = match event {
            Ok(event) => event,
            Err(broadcast::error::RecvError::Lagged(_)) => return Err(Leave::Behind),
            Err(broadcast::error::RecvError::Closed) => return Err(Leave::Ended),
        };
        match self.outbox.try_send(serde_json::json!(event)) {
            Ok(()) => Ok(()),
            Err(mpsc::error::TrySendError::Full(_)) => Err(Leave::Behind),
            Err(mpsc::error::TrySendError::Closed(_)) => Err(Leave::HungUp),
        }
    }

    /// Passes on what the engine sent before the reply that is about to go out.
    fn drain_events(&mut self) -> Result<(), Leave> {
        while let Some(events) = &mut self.events {
            let event = match events.try_recv() {
                Ok(event) => Ok(event),
                Err(broadcast::error::TryRecvError::Lagged(count)) => {
                    Err(broadcast::error::RecvError::Lagged(count))
                }
                Err(_) => return Ok(()),
            };
            self.pass_on(event)?;
        }
        Ok(())
    }
}

async fn next_event(
    events: &mut Option<broadcast::Receiver<QmpEvent>>,
) -> Result<QmpEvent, broadcast::error::RecvError> {
    match events {
        Some(events) => events.recv().await,
        None => future::pending().await,
    }
}

async fn next_reply(pending: &mut Option<Pending>) -> Value {
    match pending {
        Some(pending) => pending.await,
        None => future::pending().await,
    }
}

async fn read_objects(reader: FdReader, objects: mpsc::Sender<Object>, fds: SharedFds) {
    let mut codec = ObjectReader::default();
    let mut buf = vec![0; READ_BYTES];
    for number in 1.. {
        // Anything but bytes is the end.
        let Ok(received) = reader.read(&mut buf).await else {
            return;
        };
        if received.bytes == 0 {
            return;
        }
        if received.fds_lost || !received.fds.is_empty() {
            fds.borrow_mut()
                .arrive(number, received.fds, received.fds_lost);
        }
        for object in codec.feed(&buf[..received.bytes]) {
            if objects.send((object, number)).await.is_err() {
                return;
            }
        }
    }
}

async fn write_messages(stream: Rc<Stream>, mut messages: mpsc::Receiver<Value>) {
    while let Some(message) = messages.recv().await {
        let mut line = message.to_string().into_bytes();
        line.extend_from_slice(b"\r\n");
        if stream.write_all(line).await.0.is_err() {
            return;
        }
    }
}
