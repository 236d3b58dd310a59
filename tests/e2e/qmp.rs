//! A blocking QMP client that keeps the events.

use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};

/// Far longer than any answer takes; who needs it hangs.
const PATIENCE: Duration = Duration::from_secs(120);

/// Names negotiations after the first.
const AGAIN: &str = "again";

/// Why there is no answer.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Failure {
    /// The VM refuses, for this reason.
    Refused(String),
    /// The process has gone.
    Gone,
}

/// A negotiated connection.
pub(crate) struct Qmp {
    stream: UnixStream,
    received: Vec<u8>,
    next_id: u64,
    /// Answers to commands that were left.
    left: u32,
    /// Every event so far, oldest first.
    pub(crate) events: Vec<Value>,
}

impl Qmp {
    /// Connects and negotiates; `None` while nobody is there.
    pub(crate) fn connect(path: &Path) -> Option<Self> {
        let mut qmp = Self {
            stream: UnixStream::connect(path).ok()?,
            received: Vec::new(),
            next_id: 0,
            left: 0,
            events: Vec::new(),
        };
        let deadline = Instant::now() + PATIENCE;
        let mut greeting = qmp.message(deadline)?;
        // A QEMU that is about to begin says this to whoever connects just then.
        while greeting["event"].is_string() {
            greeting = qmp.message(deadline)?;
        }
        assert!(greeting["QMP"]["version"].is_object(), "{greeting}");
        qmp.execute("qmp_capabilities", json!({})).ok()?;
        Some(qmp)
    }

    /// Sends a blank with a file descriptor, for the next command.
    pub(crate) fn pass(&self, fd: BorrowedFd<'_>) {
        let fds = [fd];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        let bytes = [IoSlice::new(b" ")];
        sendmsg(&self.stream, &bytes, &mut control, SendFlags::empty()).unwrap();
    }

    /// Executes a command.
    pub(crate) fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, Failure> {
        self.execute_with(command, arguments, None)
    }

    /// Executes a command that comes with a descriptor.
    pub(crate) fn execute_with(
        &mut self,
        command: &str,
        arguments: Value,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<Value, Failure> {
        let id = self.next_id;
        self.next_id += 1;
        let line = json!({ "execute": command, "arguments": arguments, "id": id }).to_string();
        let deadline = Instant::now() + PATIENCE;
        if self.send(format!("{line}\n").as_bytes(), fd).is_err() {
            return Err(Failure::Gone);
        }
        loop {
            let mut message = self.message(deadline).ok_or(Failure::Gone)?;
            if message["event"].is_string() {
                self.events.push(message);
                continue;
            }
            if message["QMP"].is_object() {
                // A QEMU that was left by somebody just before greets twice now and then, and may have forgotten what was negotiated.
                let again = json!({ "execute": "qmp_capabilities", "id": AGAIN });
                if self.send(format!("{again}\n").as_bytes(), None).is_err() {
                    return Err(Failure::Gone);
                }
                continue;
            }
            if message["id"] == AGAIN {
                continue;
            }
            if message["id"].is_null() && self.left > 0 {
                self.left -= 1;
                continue;
            }
            assert_eq!(message["id"], json!(id), "{message}");
            if let Some(answer) = message.get_mut("return") {
                return Ok(answer.take());
            }
            let reason = message["error"]["desc"].as_str().unwrap();
            return Err(Failure::Refused(reason.to_owned()));
        }
    }

    /// Sends a command and does not wait for the answer, which the next command passes over.
    pub(crate) fn leave(&mut self, command: &str, arguments: &Value) {
        let line = json!({ "execute": command, "arguments": arguments });
        self.send(format!("{line}\n").as_bytes(), None).unwrap();
        self.left += 1;
    }

    fn send(&mut self, mut line: &[u8], fd: Option<BorrowedFd<'_>>) -> std::io::Result<()> {
        if let Some(fd) = fd {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let fds = [fd];
            assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
            let bytes = [IoSlice::new(line)];
            let sent = sendmsg(&self.stream, &bytes, &mut control, SendFlags::NOSIGNAL)?;
            line = &line[sent..];
        }
        self.stream.write_all(line)
    }

    /// Waits until an event that `wanted` likes has come, looking at those that are here already too. `None` if the process has gone.
    pub(crate) fn event(&mut self, wanted: impl Fn(&Value) -> bool) -> Option<Value> {
        let deadline = Instant::now() + PATIENCE;
        let mut seen = 0;
        loop {
            if let Some(event) = self.events[seen..].iter().find(|event| wanted(event)) {
                return Some(event.clone());
            }
            seen = self.events.len();
            let message = self.message(deadline)?;
            assert!(
                message["event"].is_string(),
                "unasked answer while waiting for an event: {message}"
            );
            self.events.push(message);
        }
    }

    /// Waits for such an event as well, and forgets it and everything before it: the next call finds the one after it.
    pub(crate) fn next_event(&mut self, wanted: impl Fn(&Value) -> bool) -> Option<Value> {
        let event = self.event(&wanted)?;
        let at = self.events.iter().position(wanted)?;
        self.events.drain(..=at);
        Some(event)
    }

    /// The next JSON text; `None` at the end of the stream.
    fn message(&mut self, deadline: Instant) -> Option<Value> {
        loop {
            if let Some(end) = self.received.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.received.drain(..=end).collect();
                return Some(serde_json::from_slice(&line).unwrap());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "no word on QMP for {PATIENCE:?}");
            self.stream.set_read_timeout(Some(left)).unwrap();
            let mut bytes = [0; 4096];
            match self.stream.read(&mut bytes) {
                Ok(0) => return None,
                Ok(count) => self.received.extend_from_slice(&bytes[..count]),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => return None,
            }
        }
    }
}
