//! A server on a unix socket that is told in lines of JSON.
//!
//! ```text
//! to it    {"event":"setup","migration":"6d1f...","mode":"normal"}
//!          {"event":"done","migration":"6d1f..."}      or "failed", "incoming-failed"
//! from it  {"ok":true}                                 to every line
//!          {"veto":"a client is copying a file"}       instead, to "setup" only
//! ```
//!
//! One connection serves as many events as it lives; where it has ended, the next event makes a new one. A server may see SETUP twice
//! for one migration if it ended between. Everything it says is bounded, in length and in time.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use serde::{Deserialize, Serialize};
use vmferry_transport::units::MigrationId;

use super::{Server, ServerEvent};
use crate::DeviceError;

/// Longest line that a server may say, in bytes, its end included.
pub const LINE_BYTES_MAX: usize = 4096;
/// Time that a server has for being told and for its answer unless another one is asked for. The guest may be stopped meanwhile.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// A server on a unix socket.
#[derive(Debug)]
pub struct JsonServer {
    name: String,
    path: PathBuf,
    timeout: Duration,
    connection: Option<UnixStream>,
}

#[derive(Serialize)]
struct Line<'a> {
    event: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    mode: Option<&'a str>,
    migration: &'a str,
}

/// Further members are none of our business.
#[derive(Deserialize)]
struct Answer {
    #[serde(default)]
    ok: bool,
    veto: Option<String>,
}

impl JsonServer {
    /// A server at `path`, `name` for errors. Nothing is connected before the first event.
    ///
    /// # Errors
    /// When no socket can have this path.
    pub fn new(name: &str, path: &Path) -> Result<Self, DeviceError> {
        SocketAddrUnix::new(path).map_err(|error| DeviceError::Kernel {
            device: name.to_owned(),
            op: format!("using {} as a socket", path.display()),
            source: error.into(),
        })?;
        Ok(Self {
            name: name.to_owned(),
            path: path.to_owned(),
            timeout: ANSWER_TIMEOUT,
            connection: None,
        })
    }

    /// Gives the server so long for every answer, instead of [`ANSWER_TIMEOUT`]. The guest may be stopped meanwhile.
    #[must_use]
    pub fn with_timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    /// Says `line` and gives the answer. On a connection that the server has closed meanwhile, once more on a new one.
    fn ask(&mut self, line: &[u8]) -> io::Result<Answer> {
        let deadline = Deadline::after(self.timeout);
        if let Some(connection) = self.connection.take() {
            match self.ask_on(connection, line, &deadline) {
                Err(error) if has_ended(&error) => {}
                answer => return answer,
            }
        }
        let connection = open(&self.path)?;
        self.ask_on(connection, line, &deadline)
    }

    /// Keeps the connection only if all went well: an answer that comes late must not pass for that to the next event.
    fn ask_on(
        &mut self,
        mut connection: UnixStream,
        line: &[u8],
        deadline: &Deadline,
    ) -> io::Result<Answer> {
        connection.set_write_timeout(Some(deadline.left()?))?;
        connection
            .write_all(line)
            .map_err(|error| in_words(error, || deadline.too_late()))?;
        let answer = read_line(&mut connection, deadline)?;
        let answer = serde_json::from_slice(&answer).map_err(|error| {
            io::Error::new(
                io::ErrorKind::InvalidData,
                format!("its answer is not as agreed: {error}"),
            )
        })?;
        self.connection = Some(connection);
        Ok(answer)
    }
}

impl Server for JsonServer {
    fn name(&self) -> &str {
        &self.name
    }

    fn tell(&mut self, event: ServerEvent, migration: MigrationId) -> Result<(), DeviceError> {
        let mode = match event {
            ServerEvent::Setup(mode) => Some(mode.to_string()),
            _ => None,
        };
        let line = Line {
            event: &event.to_string(),
            mode: mode.as_deref(),
            migration: &migration.to_string(),
        };
        let answer = serde_json::to_vec(&line)
            .map_err(io::Error::from)
            .and_then(|mut line| {
                line.push(b'\n');
                self.ask(&line)
            });
        let source = match answer {
            Ok(Answer {
                ok: true,
                veto: None,
            }) => return Ok(()),
            Ok(Answer {
                veto: Some(reason), ..
            }) if mode.is_some() => {
                return Err(DeviceError::Vetoed {
                    device: self.name.clone(),
                    reason: printable(&reason),
                });
            }
            Ok(_) => io::Error::new(io::ErrorKind::InvalidData, "its answer is not as agreed"),
            Err(error) => error,
        };
        Err(DeviceError::Kernel {
            device: self.name.clone(),
            op: format!("telling {event} to the server at {}", self.path.display()),
            source,
        })
    }
}

/// Connects without waiting: a server whose queue is full is as good as dead.
fn open(path: &Path) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?;
    connect(&socket, &address)
        .map_err(|error| in_words(error.into(), || io::Error::other("it takes no connections")))?;
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// One line without its end. More than one is not as agreed.
fn read_line(connection: &mut UnixStream, deadline: &Deadline) -> io::Result<Vec<u8>> {
    let wrong = |text: &str| io::Error::new(io::ErrorKind::InvalidData, text);
    let mut line = Vec::new();
    let mut buffer = [0; 512];
    loop {
        connection.set_read_timeout(Some(deadline.left()?))?;
        let read = match connection.read(&mut buffer) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(in_words(error, || deadline.too_late())),
        };
        line.extend_from_slice(&buffer[..read]);
        if let Some(end) = line.iter().position(|byte| *byte == b'\n') {
            if end + 1 < line.len() {
                return Err(wrong("it says more than it was asked"));
            }
            line.truncate(end);
            return Ok(line);
        }
        if line.len() >= LINE_BYTES_MAX {
            return Err(wrong("its answer is too long"));
        }
    }
}

/// When the server must have answered.
struct Deadline {
    began: Instant,
    timeout: Duration,
}

impl Deadline {
    fn after(timeout: Duration) -> Self {
        Self {
            began: Instant::now(),
            timeout,
        }
    }

    /// Never zero, which would mean no limit to a socket.
    fn left(&self) -> io::Result<Duration> {
        self.timeout
            .checked_sub(self.began.elapsed())
            .filter(|left| !left.is_zero())
            .ok_or_else(|| self.too_late())
    }

    fn too_late(&self) -> io::Error {
        io::Error::new(
            io::ErrorKind::TimedOut,
            format!("no answer within {} s", self.timeout.as_secs_f64()),
        )
    }
}

/// The connection is gone, and the server may be there again.
fn has_ended(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset | io::ErrorKind::UnexpectedEof
    )
}

/// Sockets say "would block" where they mean something else.
fn in_words(error: io::Error, meaning: impl FnOnce() -> io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::WouldBlock {
        return meaning();
    }
    error
}

/// The server's words as they may stand in an error.
fn printable(text: &str) -> String {
    const CHARS_MAX: usize = 500;
    let text: String = text
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(CHARS_MAX)
        .collect();
    if text.trim().is_empty() {
        return "the server gives no reason".to_owned();
    }
    text
}

#[cfg(test)]
mod tests;
