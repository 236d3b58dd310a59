//! A small QMP client for the command line, for vmferry's sockets and QEMU's.
//!
//! Every wait has a deadline, and [`QmpClient::poll`] waits as long as its caller likes. Events that arrive meanwhile are skipped:
//! the command line asks for the state it wants to know.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::qmp::schema::VersionInfo;
use crate::qmp::{ErrorClass, QmpError};

/// How long the other side may take for an answer. Every command answers at once; only hashing RAM takes its time.
pub const ANSWER_DEADLINE: Duration = Duration::from_secs(60);
/// How long it may take to greet: a busy host may leave a process out for seconds.
const GREETING_DEADLINE: Duration = Duration::from_secs(15);
/// Names negotiations after the first: their answers do not matter.
const AGAIN: &str = "again";
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
    #[error(
        "the VM at {} does not answer. Is another client connected? A monitor of QEMU serves one at a time; \
         a second -qmp option gives it another",
        path.display()
    )]
    Silent {
        /// The socket.
        path: PathBuf,
    },
    /// The VM has no such command.
    #[error("the monitor of this VM has no `{command}`: it is {vm}")]
    Missing {
        /// Which command.
        command: String,
        /// What answers, with its version.
        vm: String,
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

    /// The VM answered, if only to say no: the connection is good.
    pub fn is_answer(&self) -> bool {
        matches!(self, Self::Refused { .. } | Self::Missing { .. })
    }
}

/// An answer, as the VM gave it.
type Answer = Result<Value, QmpError>;

/// A negotiated connection.
#[derive(Debug)]
pub struct QmpClient {
    stream: UnixStream,
    path: PathBuf,
    version: VersionInfo,
    out_of_band: bool,
    /// The arguments of `qmp_capabilities`.
    wanted: Value,
    received: Vec<u8>,
    next_id: u64,
    /// Commands under way, by id.
    asked: BTreeMap<u64, String>,
    /// Answers that came while another was waited for.
    answered: BTreeMap<u64, Answer>,
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
        let mut client = Self {
            stream,
            path: path.to_owned(),
            version: VersionInfo::ours(),
            out_of_band: false,
            wanted: json!({}),
            received: Vec::new(),
            next_id: 0,
            asked: BTreeMap::new(),
            answered: BTreeMap::new(),
        };
        let deadline = Instant::now() + GREETING_DEADLINE;
        let greeting = loop {
            match client.message(deadline.saturating_duration_since(Instant::now()))? {
                // A QEMU that is about to begin says this to whoever connects just then.
                Some(message) if message["event"].is_string() => {}
                Some(message) => break message,
                None if Instant::now() < deadline => {}
                None => return Err(client.silent()),
            }
        };
        client.version = serde_json::from_value(greeting["QMP"]["version"].clone())
            .map_err(|_| client.not_qmp("there was no greeting"))?;
        let offered = greeting["QMP"]["capabilities"].as_array();
        let out_of_band = offered.is_some_and(|all| all.contains(&json!("oob")));
        if out_of_band {
            client.wanted = json!({ "enable": ["oob"] });
        }
        client.execute("qmp_capabilities", client.wanted.clone())?;
        client.out_of_band = out_of_band;
        Ok(client)
    }

    /// The process at the other end, if it can be told.
    pub fn peer(&self) -> Option<rustix::process::Pid> {
        let peer = rustix::net::sockopt::socket_peercred(&self.stream).ok()?;
        Some(peer.pid)
    }

    /// Whether the other side is QEMU, as far as it says.
    pub fn is_qemu(&self) -> bool {
        !self.version.package.starts_with("vmferry")
    }

    /// What the other side is.
    pub fn version(&self) -> &VersionInfo {
        &self.version
    }

    /// What the other side is, for people.
    pub fn name(&self) -> String {
        let VersionInfo { qemu, package } = &self.version;
        if !self.is_qemu() {
            return package.clone();
        }
        format!("QEMU {}.{}.{}", qemu.major, qemu.minor, qemu.micro)
    }

    /// Executes a command and waits for its answer.
    ///
    /// # Errors
    /// [`ClientError::Refused`] with the VM's reason, and everything that can happen to a connection.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, ClientError> {
        let id = self.send(command, arguments)?;
        self.wait(id)
    }

    /// Executes a command that shall not wait for a main loop which is stuck, where the VM offers that.
    ///
    /// # Errors
    /// As [`execute`](Self::execute).
    pub fn execute_out_of_band(
        &mut self,
        command: &str,
        arguments: Value,
    ) -> Result<Value, ClientError> {
        let how = if self.out_of_band {
            "exec-oob"
        } else {
            "execute"
        };
        let id = self.send_as(how, command, arguments)?;
        self.wait(id)
    }

    /// Sends a command without waiting; [`poll`](Self::poll) brings the answer.
    ///
    /// # Errors
    /// The connection broke, or the VM takes nothing.
    pub fn send(&mut self, command: &str, arguments: Value) -> Result<u64, ClientError> {
        self.send_as("execute", command, arguments)
    }

    fn send_as(&mut self, how: &str, command: &str, arguments: Value) -> Result<u64, ClientError> {
        let id = self.next_id;
        self.next_id += 1;
        self.write(&json!({ how: command, "arguments": arguments, "id": id }))?;
        self.asked.insert(id, command.to_owned());
        Ok(id)
    }

    fn write(&mut self, message: &Value) -> Result<(), ClientError> {
        let line = message.to_string() + "\n";
        self.stream
            .set_write_timeout(Some(ANSWER_DEADLINE))
            .map_err(|error| self.broken(&error))?;
        self.stream
            .write_all(line.as_bytes())
            .map_err(|error| self.broken(&error))
    }

    /// The answer to the command that was sent with `id`, if it comes within `patience`.
    ///
    /// # Errors
    /// As [`execute`](Self::execute), except that silence is none.
    pub fn poll(&mut self, id: u64, patience: Duration) -> Result<Option<Value>, ClientError> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(answer) = self.answered.remove(&id) {
                let command = self.asked.remove(&id).unwrap_or_default();
                return match answer {
                    Ok(value) => Ok(Some(value)),
                    Err(source) => Err(self.refused(command, source)),
                };
            }
            let Some(message) = self.message(deadline.saturating_duration_since(Instant::now()))?
            else {
                return Ok(None);
            };
            self.sort(message)?;
        }
    }

    /// Takes a message that came in; events are skipped.
    fn sort(&mut self, mut message: Value) -> Result<(), ClientError> {
        if message.get("event").is_some() || message["id"] == AGAIN {
            return Ok(());
        }
        if message.get("QMP").is_some() {
            // A QEMU that was left by somebody just before greets twice now and then, and may have forgotten what was negotiated.
            let command = "qmp_capabilities";
            let again = json!({ "execute": command, "arguments": self.wanted, "id": AGAIN });
            return self.write(&again);
        }
        let id = match message.get("id") {
            Some(theirs) => theirs.as_u64().filter(|id| self.asked.contains_key(id)),
            // QEMU leaves the id out when it could not even read the command.
            None => self.asked.keys().next().copied(),
        };
        let id = id.ok_or_else(|| self.not_qmp("an answer to something else"))?;
        let answer = match message.get_mut("return") {
            Some(value) => Ok(value.take()),
            None => Err(reason(&message["error"])),
        };
        self.answered.insert(id, answer);
        Ok(())
    }

    fn wait(&mut self, id: u64) -> Result<Value, ClientError> {
        self.poll(id, ANSWER_DEADLINE)?.ok_or_else(|| self.silent())
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

    /// The next JSON text of the server, one line each, if it comes within `patience`.
    fn message(&mut self, patience: Duration) -> Result<Option<Value>, ClientError> {
        let deadline = Instant::now() + patience;
        let mut searched = 0;
        loop {
            if let Some(at) = self.received[searched..]
                .iter()
                .position(|&byte| byte == b'\n')
            {
                let line: Vec<u8> = self.received.drain(..=searched + at).collect();
                searched = 0;
                if line.trim_ascii().is_empty() {
                    continue;
                }
                return serde_json::from_slice(&line)
                    .map(Some)
                    .map_err(|_| self.not_qmp("its answer is no JSON"));
            }
            searched = self.received.len();
            if searched > MESSAGE_BYTES_MAX {
                return Err(self.not_qmp("an endless message"));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || !self.receive(left)? {
                return Ok(None);
            }
        }
    }

    /// Whether something came within `patience`, which is not zero.
    fn receive(&mut self, patience: Duration) -> Result<bool, ClientError> {
        self.stream
            .set_read_timeout(Some(patience))
            .map_err(|error| self.broken(&error))?;
        let mut buf = [0; 4096];
        match self.stream.read(&mut buf) {
            Ok(0) => Err(ClientError::HungUp {
                path: self.path.clone(),
            }),
            Ok(count) => {
                self.received.extend_from_slice(&buf[..count]);
                Ok(true)
            }
            Err(error) => match error.kind() {
                io::ErrorKind::Interrupted => Ok(true),
                io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Ok(false),
                _ => Err(self.broken(&error)),
            },
        }
    }

    fn refused(&self, command: String, source: QmpError) -> ClientError {
        if source.class == ErrorClass::CommandNotFound {
            let vm = self.name();
            return ClientError::Missing { command, vm };
        }
        ClientError::Refused { command, source }
    }

    fn silent(&self) -> ClientError {
        ClientError::Silent {
            path: self.path.clone(),
        }
    }

    fn broken(&self, error: &io::Error) -> ClientError {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => self.silent(),
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

/// The VM's reason; its class may be one that we do not know.
fn reason(error: &Value) -> QmpError {
    QmpError::deserialize(error).unwrap_or_else(|_| {
        QmpError::generic(error["desc"].as_str().unwrap_or("it gave no reason"))
    })
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
    fn an_event_may_come_before_the_greeting() {
        let (client, _dir) = client_of(&[
            "{\"event\": \"RESUME\"}\r\n{\"QMP\": {\"version\": {\"qemu\": {\"major\": 10, \"minor\": 0, \"micro\": 2}, \"package\": \"\"}, \"capabilities\": []}}\r\n",
            "{\"return\": {}, \"id\": 0}\r\n",
        ]);
        assert_eq!(client.unwrap().version().qemu.major, 10);
    }

    #[test]
    fn who_is_greeted_twice_negotiates_twice() {
        let (client, _dir) = client_of(&[
            GREETING,
            GREETING,
            "{\"return\": {}, \"id\": 0}\r\n{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"\"}, \"id\": \"again\"}\r\n",
            "{\"return\": {\"running\": true, \"status\": \"running\"}, \"id\": 1}\r\n",
        ]);
        let mut client = client.unwrap();
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
    fn a_command_that_is_missing_is_told_with_the_version_that_lacks_it() {
        let (client, _dir) = client_of(&[
            GREETING,
            "{\"return\": {}, \"id\": 0}\r\n",
            "{\"id\": 1, \"error\": {\"class\": \"CommandNotFound\", \"desc\": \"x-resolve?\"}}\r\n",
        ]);
        let error = client.unwrap().execute("x-resolve", json!({})).unwrap_err();
        assert!(error.is_answer());
        assert_eq!(
            error.to_string(),
            "the monitor of this VM has no `x-resolve`: it is QEMU 10.0.2"
        );
    }

    #[test]
    fn answers_may_come_late_and_while_another_is_waited_for() {
        let (client, _dir) = client_of(&[
            GREETING,
            "{\"return\": {}, \"id\": 0}\r\n",
            "{\"event\": \"STOP\"}\r\n",
            "{\"return\": 5, \"id\": 1}\r\n{\"return\": 6, \"id\": 2}\r\n",
        ]);
        let mut client = client.unwrap();
        let first = client.send("query-migrate", json!({})).unwrap();
        assert_eq!(client.poll(first, Duration::ZERO).unwrap(), None);
        assert_eq!(client.poll(first, Duration::from_millis(1)).unwrap(), None);
        assert_eq!(client.execute("migrate_cancel", json!({})).unwrap(), 6);
        let late = client.poll(first, Duration::ZERO).unwrap();
        assert_eq!(late, Some(json!(5)));
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
