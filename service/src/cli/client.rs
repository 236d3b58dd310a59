//! A small blocking QMP client for the command line, for vmferry's sockets and QEMU's.
//!
//! Every wait has a deadline. Events that arrive meanwhile are skipped: the command line asks for the state it wants to know.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::qmp::QmpError;
use crate::qmp::schema::VersionInfo;

/// How long the other side may take for an answer. Every command answers at once; only hashing RAM takes its time.
pub const ANSWER_DEADLINE: Duration = Duration::from_secs(60);
/// How long it may take to greet.
const GREETING_DEADLINE: Duration = Duration::from_secs(5);
/// Longest message taken from a server. QEMU's schema, the longest there is, has a few hundred KiB.
const MESSAGE_BYTES_MAX: usize = 8 << 20;

/// Talking to a VM over QMP failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// No such socket, or nobody behind it.
    #[error("no VM can be reached at {}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Somebody is there and does not speak QMP, or says something strange.
    #[error("{} does not speak QMP: {problem}", path.display())]
    NotQmp {
        /// The socket.
        path: PathBuf,
        /// What was strange.
        problem: String,
    },
    /// The connection broke: the process has ended.
    #[error("the VM at {} hung up", path.display())]
    HungUp {
        /// The socket.
        path: PathBuf,
    },
    /// No answer in time. A monitor of QEMU serves one client at a time; another one may be connected.
    #[error("the VM at {} does not answer; is another client connected?", path.display())]
    Silent {
        /// The socket.
        path: PathBuf,
    },
    /// The VM understood and refused.
    #[error("the VM refused `{command}`")]
    Refused {
        /// Which command.
        command: String,
        /// Why.
        #[source]
        source: QmpError,
    },
}

impl ClientError {
    /// The VM's own words, if it was it that refused.
    pub fn refusal(&self) -> Option<&QmpError> {
        match self {
            Self::Refused { source, .. } => Some(source),
            _ => None,
        }
    }
}

/// A negotiated connection.
#[derive(Debug)]
pub struct QmpClient {
    stream: UnixStream,
    path: PathBuf,
    version: VersionInfo,
    received: Vec<u8>,
    next_id: u64,
}

impl QmpClient {
    /// Connects to the socket at `path` and negotiates.
    ///
    /// # Errors
    /// [`ClientError`], with the path.
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let stream = UnixStream::connect(path).map_err(|source| ClientError::Connect {
            path: path.to_owned(),
            source,
        })?;
        let version = VersionInfo::ours();
        let mut client = Self {
            stream,
            path: path.to_owned(),
            version,
            received: Vec::new(),
            next_id: 0,
        };
        let greeting = client.message(Instant::now() + GREETING_DEADLINE)?;
        client.version = serde_json::from_value(greeting["QMP"]["version"].clone())
            .map_err(|_| client.not_qmp("there was no greeting"))?;
        client.execute("qmp_capabilities", json!({}))?;
        Ok(client)
    }

    /// What the other side is.
    pub fn version(&self) -> &VersionInfo {
        &self.version
    }

    /// Executes a command and waits for its answer.
    ///
    /// # Errors
    /// [`ClientError::Refused`] with the VM's reason, and everything that can happen to a connection.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, ClientError> {
        let id = self.next_id;
        self.next_id += 1;
        let line =
            json!({ "execute": command, "arguments": arguments, "id": id }).to_string() + "\n";
        let deadline = Instant::now() + ANSWER_DEADLINE;
        self.stream
            .set_write_timeout(Some(ANSWER_DEADLINE))
            .map_err(|error| self.broken(&error))?;
        self.stream
            .write_all(line.as_bytes())
            .map_err(|error| self.broken(&error))?;
        loop {
            let mut message = self.message(deadline)?;
            if message.get("event").is_some() {
                continue;
            }
            // QEMU leaves the id out when it could not even read the command.
            if message.get("id").is_some_and(|theirs| *theirs != json!(id)) {
                return Err(self.not_qmp("an answer to something else"));
            }
            if let Some(value) = message.get_mut("return") {
                return Ok(value.take());
            }
            let source = serde_json::from_value(message["error"].take())
                .unwrap_or_else(|_| QmpError::generic("it gave no reason"));
            return Err(ClientError::Refused {
                command: command.to_owned(),
                source,
            });
        }
    }

    /// Executes a command without arguments and reads its answer.
    ///
    /// # Errors
    /// As [`execute`](Self::execute), and [`ClientError::NotQmp`] for an answer of the wrong shape.
    pub fn query<T: DeserializeOwned>(&mut self, command: &str) -> Result<T, ClientError> {
        let value = self.execute(command, json!({}))?;
        self.parse(command, &value)
    }

    /// Reads an answer to `command`.
    ///
    /// # Errors
    /// [`ClientError::NotQmp`] for an answer of the wrong shape.
    pub fn parse<T: DeserializeOwned>(
        &self,
        command: &str,
        answer: &Value,
    ) -> Result<T, ClientError> {
        T::deserialize(answer)
            .map_err(|error| self.not_qmp(&format!("strange answer to `{command}`: {error}")))
    }

    /// The next JSON text of the server: one line each.
    fn message(&mut self, deadline: Instant) -> Result<Value, ClientError> {
        let mut searched = 0;
        loop {
            if let Some(at) = self.received[searched..]
                .iter()
                .position(|&byte| byte == b'\n')
            {
                let line: Vec<u8> = self.received.drain(..=searched + at).collect();
                if line.trim_ascii().is_empty() {
                    searched = 0;
                    continue;
                }
                return serde_json::from_slice(&line)
                    .map_err(|_| self.not_qmp("its answer is no JSON"));
            }
            searched = self.received.len();
            if searched > MESSAGE_BYTES_MAX {
                return Err(self.not_qmp("an endless message"));
            }
            self.receive(deadline)?;
        }
    }

    fn receive(&mut self, deadline: Instant) -> Result<(), ClientError> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ClientError::Silent {
                path: self.path.clone(),
            });
        }
        self.stream
            .set_read_timeout(Some(left))
            .map_err(|error| self.broken(&error))?;
        let mut buf = [0; 4096];
        match self.stream.read(&mut buf) {
            Ok(0) => Err(ClientError::HungUp {
                path: self.path.clone(),
            }),
            Ok(count) => {
                self.received.extend_from_slice(&buf[..count]);
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            Err(error) => Err(self.broken(&error)),
        }
    }

    fn broken(&self, error: &io::Error) -> ClientError {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => ClientError::Silent {
                path: self.path.clone(),
            },
            _ => ClientError::HungUp {
                path: self.path.clone(),
            },
        }
    }

    fn not_qmp(&self, problem: &str) -> ClientError {
        ClientError::NotQmp {
            path: self.path.clone(),
            problem: problem.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::*;

    /// A server that says `script`, one entry at once, each after the first only when a line has come in.
    fn client_of(
        script: &'static [&'static str],
    ) -> (Result<QmpClient, ClientError>, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut answers = script.iter();
            let mut say = |stream: &mut UnixStream| {
                answers
                    .next()
                    .is_some_and(|text| stream.write_all(text.as_bytes()).is_ok())
            };
            if !say(&mut stream) {
                return;
            }
            let mut byte = [0];
            while stream.read(&mut byte).is_ok_and(|count| count == 1) {
                if byte == *b"\n" && !say(&mut stream) {
                    return;
                }
            }
        });
        (QmpClient::connect(&path), dir)
    }

    const GREETING: &str = "{\"QMP\": {\"version\": {\"qemu\": {\"major\": 10, \"minor\": 0, \"micro\": 2}, \"package\": \"Debian\"}, \"capabilities\": [\"oob\"]}}\r\n";

    #[test]
    fn events_between_are_skipped_and_answers_may_come_in_pieces() {
        let (client, _dir) = client_of(&[
            GREETING,
            "{\"return\": {}, \"id\": 0}\r\n",
            "{\"event\": \"STOP\"}\r\n\r\n{\"return\": {\"running\": true, \"status\": \"running\"}, \"id\": 1}\r\n",
        ]);
        let mut client = client.unwrap();
        assert_eq!(client.version().qemu.major, 10);
        let status: crate::qmp::schema::StatusInfo = client.query("query-status").unwrap();
        assert!(status.running);
    }

    #[test]
    fn a_refusal_carries_the_reason_of_the_vm() {
        let (client, _dir) = client_of(&[
            GREETING,
            "{\"return\": {}, \"id\": 0}\r\n",
            "{\"id\": 1, \"error\": {\"class\": \"GenericError\", \"desc\": \"not now\"}}\r\n",
        ]);
        let error = client.unwrap().execute("migrate", json!({})).unwrap_err();
        assert_eq!(error.to_string(), "the VM refused `migrate`");
        assert_eq!(error.refusal().unwrap().desc, "not now");
    }

    #[test]
    fn strangers_are_told_apart() {
        for (script, part) in [
            (&["HTTP/1.1 400 Bad Request\r\n"][..], "no JSON"),
            (&["{\"hello\": 1}\n"], "no greeting"),
            (&[GREETING], "hung up"),
            (&[], "hung up"),
            (
                &[GREETING, "{\"return\": {}, \"id\": 99}\n"],
                "something else",
            ),
        ] {
            let (client, _dir) = client_of(script);
            let error = client.unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
        let error = QmpClient::connect(Path::new("/nowhere/qmp")).unwrap_err();
        assert!(error.to_string().contains("/nowhere/qmp"));
    }
}
