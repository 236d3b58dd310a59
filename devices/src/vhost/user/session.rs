//! One connection to a back end in another process: the handshake, and requests that cannot hang.
//!
//! Crate vhost waits for answers without end. Here a watch shuts the connection down when an answer takes too long; the request then
//! fails as if the back end had died, which to us is the same.

#[cfg(test)]
use std::cell::Cell;
use std::io::{self, IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vhost::VhostBackend;
use vhost::vhost_user::message::{
    VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Error as ProtocolError, Frontend, VhostUserFrontend};

use crate::vhost::log::LogPages;

/// Longest time for an answer. A back end answers GET_VRING_BASE when what is under way has ended, so this is the longest that a
/// request of the guest may take while it is stopped.
pub const ANSWER_DEADLINE: Duration = Duration::from_secs(30);

#[cfg(test)]
thread_local! {
    /// How long this thread waits for answers instead, for tests in which none comes.
    pub(super) static PATIENCE: Cell<Duration> = const { Cell::new(ANSWER_DEADLINE) };
}

/// [`ANSWER_DEADLINE`], unless a test wants another one.
fn patience() -> Duration {
    #[cfg(test)]
    return PATIENCE.get();
    #[cfg(not(test))]
    ANSWER_DEADLINE
}

/// VHOST_USER_SET_LOG_BASE, and the header's flags: version 1, a reply.
const SET_LOG_BASE: u32 = 6;
const VERSION: u32 = 1;
const REPLY: u32 = 4;
/// Longest answer to it that is read, in bytes.
const LOG_REPLY_MAX: u32 = 64;

/// Protocol features that are used where the back end has them.
const WANTED: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ
    .union(VhostUserProtocolFeatures::LOG_SHMFD)
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::CONFIG)
    .union(VhostUserProtocolFeatures::INFLIGHT_SHMFD)
    .union(VhostUserProtocolFeatures::DEVICE_STATE);

/// A connection, ready for requests.
pub(super) struct Session {
    frontend: Frontend,
    socket: UnixStream,
    watch: Arc<Watch>,
    watcher: Option<JoinHandle<()>>,
    /// Features of the device, as the back end says them.
    pub(super) offered: u64,
    /// What was agreed on.
    pub(super) protocol: VhostUserProtocolFeatures,
}

impl Session {
    /// Connects to the back end that listens at `path`, and agrees with it on the protocol.
    ///
    /// # Errors
    /// When nobody listens, or what listens is no back end with at least `queues` queues.
    pub(super) fn connect(path: &Path, queues: usize) -> io::Result<Self> {
        Self::over(UnixStream::connect(path)?, queues)
    }

    /// The same over a connection that is there.
    ///
    /// # Errors
    /// As [`connect`](Self::connect).
    pub(super) fn over(socket: UnixStream, queues: usize) -> io::Result<Self> {
        let watch = Arc::new(Watch::default());
        let watcher = {
            let (watch, socket) = (Arc::clone(&watch), socket.try_clone()?);
            std::thread::Builder::new()
                .name("vhost-user-watch".to_owned())
                .spawn(move || watch.run(&socket))?
        };
        let mut session = Self {
            frontend: Frontend::from_stream(socket.try_clone()?, queues as u64),
            socket,
            watch,
            watcher: Some(watcher),
            offered: 0,
            protocol: VhostUserProtocolFeatures::empty(),
        };
        session.agree(queues)?;
        Ok(session)
    }

    fn agree(&mut self, queues: usize) -> io::Result<()> {
        self.ask(|frontend| frontend.set_owner())?;
        self.offered = self.ask(|frontend| frontend.get_features())?;
        if self.offered & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "the back end is too old: it has no VHOST_USER_F_PROTOCOL_FEATURES",
            ));
        }
        let offered = self.ask(|frontend| frontend.get_protocol_features())?;
        self.protocol = offered & WANTED;
        let agreed = self.protocol;
        self.ask(|frontend| frontend.set_protocol_features(agreed))?;
        if agreed.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            // From here on a refusal is heard where it belongs.
            self.frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        if agreed.contains(VhostUserProtocolFeatures::MQ) {
            let has = self.ask(|frontend| frontend.get_queue_num())?;
            if has < queues as u64 {
                return Err(io::Error::new(
                    io::ErrorKind::Unsupported,
                    format!("the back end has {has} queues, and {queues} are wanted"),
                ));
            }
        }
        Ok(())
    }

    /// Whether the back end has something that is used.
    pub(super) fn has(&self, feature: VhostUserProtocolFeatures) -> bool {
        self.protocol.contains(feature)
    }

    /// One request, with its answer.
    ///
    /// # Errors
    /// The back end's answer; [`is_lost`] tells whether there is none to come.
    pub(super) fn ask<T>(
        &self,
        request: impl FnOnce(&mut Frontend) -> vhost::Result<T>,
    ) -> io::Result<T> {
        let mut frontend = self.frontend.clone();
        let watched = self.watch.begin();
        let answer = request(&mut frontend);
        drop(watched);
        answer.map_err(to_io)
    }

    /// Tells the back end where to mark what it writes.
    ///
    /// Crate vhost waits for an answer of a length of its own there; back ends answer with nothing, a number, or what was asked.
    ///
    /// # Errors
    /// As [`ask`](Self::ask).
    pub(super) fn set_log_base(&self, log: &LogPages) -> io::Result<()> {
        let _watched = self.watch.begin();
        let mut message = [0_u8; 28];
        for (at, word) in [SET_LOG_BASE, VERSION, 16].into_iter().enumerate() {
            message[4 * at..4 * at + 4].copy_from_slice(&word.to_ne_bytes());
        }
        // Length, then the offset in the file.
        message[12..20].copy_from_slice(&log.bytes().to_ne_bytes());
        let fds = [log.file().as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&fds));
        let sent = sendmsg(
            &self.socket,
            &[IoSlice::new(&message)],
            &mut control,
            SendFlags::NOSIGNAL,
        )?;
        if sent != message.len() {
            return Err(io::Error::new(
                io::ErrorKind::WriteZero,
                "the back end does not read its requests",
            ));
        }
        let mut header = [0_u8; 12];
        let mut socket = &self.socket;
        socket.read_exact(&mut header).map_err(lost)?;
        let word = |at: usize| {
            let mut bytes = [0; 4];
            bytes.copy_from_slice(&header[at..at + 4]);
            u32::from_ne_bytes(bytes)
        };
        if word(0) != SET_LOG_BASE || word(4) & REPLY == 0 || word(8) > LOG_REPLY_MAX {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the back end answers something else than it was asked",
            ));
        }
        let mut rest = vec![0; word(8) as usize];
        socket.read_exact(&mut rest).map_err(lost)
    }

    /// The connection, to wait for its end: it becomes readable (POLLRDHUP) when the back end has gone.
    pub(super) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Ends the connection, whoever else has it.
    pub(super) fn shut(&self) {
        // It may have gone already.
        let _gone_already = self.socket.shutdown(std::net::Shutdown::Both);
    }

    /// Whether the back end is still there.
    pub(super) fn is_alive(&self) -> bool {
        let mut fds = [PollFd::new(&self.socket, PollFlags::RDHUP)];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        matches!(poll(&mut fds, Some(&now)), Ok(0))
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.watch.quit();
        if let Some(watcher) = self.watcher.take() {
            // It has nothing to say.
            let _ended = watcher.join();
        }
    }
}

/// What the watch knows.
#[derive(Default)]
struct Watched {
    deadline: Option<Instant>,
    quit: bool,
}

/// Ends a connection whose other end does not answer.
#[derive(Default)]
struct Watch {
    state: Mutex<Watched>,
    changed: Condvar,
}

/// A request under way. Ends on drop.
struct UnderWay<'a>(&'a Watch);

impl Watch {
    fn begin(&self) -> UnderWay<'_> {
        self.lock().deadline = Instant::now().checked_add(patience());
        self.changed.notify_all();
        UnderWay(self)
    }

    fn quit(&self) {
        self.lock().quit = true;
        self.changed.notify_all();
    }

    fn run(&self, socket: &UnixStream) {
        let mut state = self.lock();
        while !state.quit {
            let left = state
                .deadline
                .map(|deadline| deadline.saturating_duration_since(Instant::now()));
            state = match left {
                Some(Duration::ZERO) => {
                    tracing::warn!(
                        "a vhost-user back end does not answer; its connection is ended"
                    );
                    let _gone_already = socket.shutdown(std::net::Shutdown::Both);
                    state.deadline = None;
                    state
                }
                Some(left) => {
                    let waited = self.changed.wait_timeout(state, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                None => {
                    let waited = self.changed.wait(state);
                    waited.unwrap_or_else(PoisonError::into_inner)
                }
            };
        }
    }

    fn lock(&self) -> MutexGuard<'_, Watched> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.lock().deadline = None;
    }
}

fn lost(error: io::Error) -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, error)
}

/// Whether an error means that the back end has gone.
pub(super) fn is_lost(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::NotFound
            | io::ErrorKind::NotConnected
    )
}

fn to_io(error: vhost::Error) -> io::Error {
    match error {
        vhost::Error::VhostUserProtocol(
            error @ (ProtocolError::Disconnected
            | ProtocolError::PartialMessage
            | ProtocolError::SocketBroken(_)),
        ) => lost(io::Error::other(error)),
        vhost::Error::VhostUserProtocol(ProtocolError::SocketError(error)) => error,
        vhost::Error::VhostUserProtocol(ProtocolError::BackendInternalError) => {
            io::Error::other("the back end refuses")
        }
        other => crate::vhost::kernel::to_io(other),
    }
}
