//! Both connections of a migration over one socket that somebody connected for us.
//!
//! Per channel a socket pair: one end is the engine's, the other is pumped. A thread per channel carries bytes out, one for all
//! carries them in. When every channel has been closed on this side the socket is closed too, once the peer has closed its own or had
//! its time for that: closing at once could take back what is still on its way.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::loader::Connect;
use super::socket_pair;
use crate::limits::Deadlines;
use crate::wire::WireError;
use crate::wire::mux::{CHANNELS, Channel, HEADER_BYTES, MAGIC, PIECE_BYTES_MAX, PieceHeader};

/// Bytes asked of the engine's side at a time.
const READ_BYTES: usize = 128 << 10;
/// How long a closed side waits for the other, and for what it said to leave.
const GRACE: Duration = Duration::from_secs(1);

const _: () = assert!(READ_BYTES <= PIECE_BYTES_MAX as usize);

/// Learns, on a thread, that the socket has ended and why. Called once.
pub(super) type Ended = Box<dyn FnOnce(String) + Send>;

/// A socket that carries two connections. Dropping it leaves the connections alone; they end when both of their sides are closed.
#[derive(Clone)]
pub struct Mux(Arc<Shared>);

struct Shared {
    /// Any connected stream socket: the type only reads and writes, which is the same for every family.
    socket: UnixStream,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Our ends of the pairs, for what comes in.
    channels: [Option<UnixStream>; CHANNELS],
    /// Threads that carry bytes out.
    senders: usize,
    /// One of them writes at this moment, or the control channel's wants to.
    writing: bool,
    control_waits: bool,
    receiving: bool,
}

impl Mux {
    /// Takes over a connected stream socket. `first` are bytes that were read from it already. If the peer opens channels, `opened`
    /// gets the engine's end of each.
    ///
    /// # Errors
    /// When the process is out of threads, or the socket is none.
    pub fn start(
        socket: OwnedFd,
        first: Vec<u8>,
        deadlines: &Deadlines,
        opened: Option<Connect>,
        ended: Ended,
    ) -> io::Result<Self> {
        let socket = UnixStream::from(socket);
        socket.set_nonblocking(false)?;
        socket.set_write_timeout(Some(Duration::from_micros(deadlines.stall_us)))?;
        if opened.is_some() {
            // Somebody who says nothing at all must not keep a thread for ever.
            socket.set_read_timeout(Some(Duration::from_micros(deadlines.hello_us)))?;
        }
        let mux = Self(Arc::new(Shared {
            socket,
            state: Mutex::default(),
            changed: Condvar::new(),
        }));
        mux.0.lock().receiving = true;
        let receiver = mux.clone();
        thread::Builder::new()
            .name("mux-in".to_owned())
            .spawn(move || {
                let why = receiver.receive(&first, opened.as_ref());
                receiver.0.end();
                ended(why);
            })?;
        Ok(mux)
    }

    /// Opens a channel; the engine's end of it.
    ///
    /// # Errors
    /// When it was opened before, or the process is out of descriptors or threads.
    pub fn open(&self, channel: Channel) -> io::Result<OwnedFd> {
        let (ours, theirs) = socket_pair()?;
        let mut state = self.0.lock();
        let place = &mut state.channels[channel.index()];
        if place.is_some() {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                "one socket carries one control and one data connection, each once",
            ));
        }
        *place = Some(ours.try_clone()?);
        state.senders += 1;
        drop(state);
        let sender = self.clone();
        let spawned = thread::Builder::new()
            .name("mux-out".to_owned())
            .spawn(move || sender.send(channel, ours));
        if let Err(error) = spawned {
            self.0.lock().senders -= 1;
            return Err(error);
        }
        Ok(theirs)
    }

    /// Waits until what was said has left and the peer has closed its side too, but not for long, and ends the socket. Blocks.
    pub fn close(&self) {
        let deadline = Instant::now() + 2 * GRACE;
        let mut state = self.0.lock();
        // Never opened: nobody would close it.
        if state.channels.iter().all(Option::is_none) {
            drop(state);
            self.0.shutdown(Shutdown::Both);
            state = self.0.lock();
        }
        while state.receiving || state.senders > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let waited = self.0.changed.wait_timeout(state, left);
            (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
        drop(state);
        self.0.shutdown(Shutdown::Both);
    }

    /// Body of the thread of a channel.
    fn send(&self, channel: Channel, mut from: UnixStream) {
        let mut piece = vec![0; HEADER_BYTES + READ_BYTES];
        loop {
            // An error is an end: the engine is gone.
            let count = from.read(&mut piece[HEADER_BYTES..]).unwrap_or(0);
            let bytes = u32::try_from(count).unwrap_or(0);
            piece[..HEADER_BYTES].copy_from_slice(&PieceHeader { channel, bytes }.encode());
            let sent = self.0.write(channel, &piece[..HEADER_BYTES + count]);
            if let Err(error) = &sent {
                tracing::debug!(error = error as &dyn std::error::Error, "shared socket");
                self.0.end();
            }
            if count == 0 || sent.is_err() {
                break;
            }
        }
        let mut state = self.0.lock();
        state.senders -= 1;
        if state.senders == 0 {
            // What is still to come from the peer is its own end.
            let _ = self.0.socket.set_read_timeout(Some(GRACE));
            self.0.shutdown(Shutdown::Write);
        }
        drop(state);
        self.0.changed.notify_all();
    }

    /// Body of the thread that receives. Returns why it ended.
    fn receive(&self, first: &[u8], opened: Option<&Connect>) -> String {
        let mut socket = first.chain(&self.0.socket);
        let mut piece = Vec::new();
        let mut ended = [false; CHANNELS];
        loop {
            let mut header = [0; HEADER_BYTES];
            if let Err(error) = socket.read_exact(&mut header) {
                return describe(&error);
            }
            let PieceHeader { channel, bytes } = match PieceHeader::decode(&header) {
                Ok(header) => header,
                Err(WireError::Magic { .. }) => {
                    return "the peer does not share this socket as fd: does; it must use fd: too, or listen with tcp: or unix:".to_owned();
                }
                Err(error) => return error.to_string(),
            };
            let ended = &mut ended[channel.index()];
            if *ended {
                return "the peer broke the protocol: it goes on after the end of a channel"
                    .to_owned();
            }
            *ended = bytes == 0;
            piece.resize(bytes as usize, 0);
            if let Err(error) = socket.read_exact(&mut piece) {
                return describe(&error);
            }
            if let Err(text) = self.deliver(channel, &piece, opened) {
                return text;
            }
        }
    }

    fn deliver(
        &self,
        channel: Channel,
        piece: &[u8],
        opened: Option<&Connect>,
    ) -> Result<(), String> {
        let known = self.0.local(channel);
        let mut to = match (known, opened) {
            (Some(to), _) => to,
            (None, Some(opened)) if !piece.is_empty() => {
                let theirs = self.open(channel).map_err(|error| error.to_string())?;
                // From now on silence is for the protocol to judge.
                let _ = self.0.socket.set_read_timeout(None);
                opened(theirs);
                self.0.local(channel).ok_or("closed")?
            }
            (None, _) => {
                return Err("the peer broke the protocol: a channel that nobody opened".to_owned());
            }
        };
        // The engine may have closed its end; the peer hears of that from the thread that sends.
        if piece.is_empty() {
            let _ = to.shutdown(Shutdown::Write);
        } else {
            let _ = to.write_all(piece);
        }
        Ok(())
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn local(&self, channel: Channel) -> Option<UnixStream> {
        let state = self.lock();
        state.channels[channel.index()].as_ref()?.try_clone().ok()
    }

    /// One piece at a time; the control channel goes first.
    fn write(&self, channel: Channel, piece: &[u8]) -> io::Result<()> {
        let control = channel == Channel::Control;
        let mut state = self.lock();
        state.control_waits |= control;
        while state.writing || (state.control_waits && !control) {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.writing = true;
        drop(state);
        let written = (&self.socket).write_all(piece);
        let mut state = self.lock();
        state.writing = false;
        if control {
            state.control_waits = false;
        }
        drop(state);
        self.changed.notify_all();
        written
    }

    /// Nothing comes any more: the engine sees the end of both connections.
    fn end(&self) {
        self.shutdown(Shutdown::Both);
        let mut state = self.lock();
        state.receiving = false;
        for local in state.channels.iter().flatten() {
            // Fails only if it is closed already.
            let _ = local.shutdown(Shutdown::Both);
        }
        drop(state);
        self.changed.notify_all();
    }

    fn shutdown(&self, how: Shutdown) {
        // Fails only if it is closed already.
        let _ = self.socket.shutdown(how);
    }
}

impl fmt::Debug for Mux {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Mux").field(&self.0.socket).finish()
    }
}

fn describe(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => "the peer closed the connection".to_owned(),
        io::ErrorKind::WouldBlock => "the peer says nothing".to_owned(),
        _ => format!("reading failed: {error}"),
    }
}

/// Whether a connection whose first bytes these are is shared by several.
pub fn is_shared(first: &[u8]) -> bool {
    first.starts_with(&MAGIC)
}
