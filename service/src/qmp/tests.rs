//! The server over real sockets, with a small engine task in place of the real one.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::oneshot;
use vmferry_transport::control::runtime::{self, RuntimeKind};
use vmferry_transport::control::{Address, Listener};

use super::{CLIENTS_MAX, Command, EngineHandle, EngineInbox, QmpError, QmpEvent, QmpServer};

/// Far longer than anything here takes; a test that needs it hangs.
const PATIENCE: Duration = Duration::from_secs(20);

/// A server on a thread of its own.
struct Server {
    dir: tempfile::TempDir,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    fn start(kind: RuntimeKind) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let (stop, stopped) = oneshot::channel();
        let (up, is_up) = std::sync::mpsc::channel();
        let thread = thread::spawn(move || {
            runtime::run_on(kind, async {
                let listener = Listener::bind(&Address::unix(&path).unwrap())
                    .await
                    .unwrap();
                let (handle, inbox) = EngineHandle::channel();
                let server = QmpServer::start(listener, handle);
                up.send(()).unwrap();
                tokio::select! {
                    () = engine(inbox) => {}
                    _ = stopped => {}
                }
                server.finish().await;
            })
            .unwrap();
        });
        is_up.recv_timeout(PATIENCE).unwrap();
        Self {
            dir,
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("qmp")
    }

    fn join(mut self) {
        self.end();
    }

    fn end(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if !thread::panicking() {
            self.end();
        }
    }
}

/// `stop` and `cont` send their events, `query-name` floods with events, `x-ram-hash` fails, `quit` ends the engine.
async fn engine(mut inbox: EngineInbox) {
    while let Some(request) = inbox.requests.recv().await {
        let mut last = false;
        let answer = match request.command {
            Command::Stop => {
                let _ = inbox.events.send(QmpEvent::stop());
                Ok(json!({}))
            }
            Command::Cont => {
                let _ = inbox.events.send(QmpEvent::resume());
                Ok(json!({}))
            }
            Command::QueryName => {
                for pass in 0..100 {
                    let _ = inbox.events.send(QmpEvent::migration_pass(pass));
                }
                Ok(json!({}))
            }
            Command::XRamHash => Err(QmpError::generic("the guest runs")),
            Command::Quit => {
                last = true;
                Ok(json!({}))
            }
            other => Ok(json!(format!("{other:?}"))),
        };
        let _ = request.reply.send(answer);
        if last {
            return;
        }
    }
}

struct Client {
    reader: BufReader<UnixStream>,
}

impl Client {
    fn connect(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Self {
            reader: BufReader::new(stream),
        }
    }

    fn negotiated(path: &Path) -> Self {
        let mut client = Self::connect(path);
        assert!(client.read()["QMP"].is_object());
        assert_eq!(client.execute("qmp_capabilities"), json!({"return": {}}));
        client
    }

    fn send(&mut self, text: &str) {
        self.reader.get_mut().write_all(text.as_bytes()).unwrap();
    }

    /// Null at the end of the connection.
    fn read(&mut self) -> Value {
        let mut line = String::new();
        match self.reader.read_line(&mut line) {
            Ok(0) => Value::Null,
            Ok(_) => serde_json::from_str(&line).unwrap(),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => Value::Null,
            Err(error) => panic!("{error}"),
        }
    }

    fn execute(&mut self, name: &str) -> Value {
        self.send(&json!({ "execute": name }).to_string());
        self.read()
    }
}

fn on_both(test: impl Fn(&Server)) {
    for kind in [RuntimeKind::Uring, RuntimeKind::Plain] {
        let server = Server::start(kind);
        test(&server);
        server.join();
    }
}

#[test]
fn commands_reach_the_engine_and_answers_the_client() {
    on_both(|server| {
        let mut client = Client::negotiated(&server.path());
        client.send("{\"execute\": \"query-migrate\", \"id\": [7]}\n");
        assert_eq!(client.read(), json!({"return": "QueryMigrate", "id": [7]}));
        let error = client.execute("x-ram-hash");
        assert_eq!(
            error,
            json!({"error": {"class": "GenericError", "desc": "the guest runs"}})
        );
    });
}

#[test]
fn an_event_comes_before_the_reply_of_the_command_that_caused_it() {
    on_both(|server| {
        let mut client = Client::negotiated(&server.path());
        for _ in 0..50 {
            assert_eq!(client.execute("stop")["event"], "STOP");
            assert_eq!(client.read(), json!({"return": {}}));
            assert_eq!(client.execute("cont")["event"], "RESUME");
            assert_eq!(client.read(), json!({"return": {}}));
        }
    });
}

#[test]
fn events_go_to_every_client_that_negotiated_and_to_no_other() {
    on_both(|server| {
        let mut first = Client::negotiated(&server.path());
        let mut second = Client::negotiated(&server.path());
        let mut silent = Client::connect(&server.path());
        assert!(silent.read()["QMP"].is_object());
        first.execute("stop");
        assert_eq!(second.read()["event"], "STOP");
        // The next thing the third one hears is the answer to its own command.
        assert_eq!(silent.execute("qmp_capabilities"), json!({"return": {}}));
    });
}

#[test]
fn pipelined_commands_are_answered_in_order() {
    on_both(|server| {
        let mut client = Client::negotiated(&server.path());
        let text: String = (0..200)
            .map(|id| json!({"execute": "query-migrate", "id": id}).to_string())
            .collect();
        client.send(&text);
        for id in 0..200 {
            assert_eq!(client.read()["id"], id);
        }
    });
}

#[test]
fn junk_is_answered_and_the_session_goes_on() {
    on_both(|server| {
        let mut client = Client::negotiated(&server.path());
        client.send("GET / HTTP/1.1\n");
        let error = client.read();
        assert_eq!(error["error"]["class"], "GenericError");
        assert!(client.execute("query-migrate")["return"].is_string());
    });
}

#[test]
fn a_client_that_does_not_read_is_dropped_and_others_go_on() {
    on_both(|server| {
        let mut deaf = Client::negotiated(&server.path());
        let mut other = Client::negotiated(&server.path());
        // Each of these is 100 events for everybody. Socket buffer, outbox and event queue of the deaf one fill up.
        for _ in 0..100 {
            other.send("{\"execute\": \"query-name\"}");
            for _ in 0..100 {
                assert_eq!(other.read()["event"], "MIGRATION_PASS");
            }
            assert_eq!(other.read(), json!({"return": {}}));
        }
        let mut rest = Vec::new();
        deaf.reader
            .get_mut()
            .set_read_timeout(Some(PATIENCE))
            .unwrap();
        // Ends only because the server has hung up.
        let _ = deaf.reader.read_to_end(&mut rest);
        assert!(rest.iter().filter(|&&byte| byte == b'\n').count() < 10_000);
        assert!(other.execute("query-migrate")["return"].is_string());
    });
}

#[test]
fn a_client_that_sends_and_never_reads_holds_up_only_itself() {
    on_both(|server| {
        let mut greedy = Client::negotiated(&server.path());
        greedy
            .reader
            .get_mut()
            .set_write_timeout(Some(Duration::from_millis(200)))
            .unwrap();
        let line = json!({"execute": "query-commands"}).to_string();
        // Until the server takes no more of it.
        let stuck =
            (0..1_000_000).any(|_| greedy.reader.get_mut().write_all(line.as_bytes()).is_err());
        assert!(stuck);
        let mut other = Client::negotiated(&server.path());
        assert!(other.execute("query-migrate")["return"].is_string());
    });
}

#[test]
fn clients_are_limited_and_a_place_becomes_free_again() {
    on_both(|server| {
        let mut clients: Vec<_> = (0..CLIENTS_MAX)
            .map(|_| Client::negotiated(&server.path()))
            .collect();
        assert_eq!(Client::connect(&server.path()).read(), Value::Null);
        clients.pop();
        // The server notices the end of the last one some time later.
        let back = (0..1000).any(|_| {
            thread::sleep(Duration::from_millis(2));
            !Client::connect(&server.path()).read().is_null()
        });
        assert!(back);
    });
}

#[test]
fn a_half_closed_client_still_gets_its_replies() {
    on_both(|server| {
        let mut client = Client::negotiated(&server.path());
        client.send("{\"execute\": \"query-migrate\"}{\"execute\": \"query-version\"}");
        client
            .reader
            .get_ref()
            .shutdown(std::net::Shutdown::Write)
            .unwrap();
        assert!(client.read()["return"].is_string());
        assert!(client.read()["return"]["qemu"].is_object());
        assert_eq!(client.read(), Value::Null);
    });
}

#[test]
fn the_reply_to_quit_arrives_and_the_socket_is_gone() {
    on_both(|server| {
        let mut client = Client::negotiated(&server.path());
        assert_eq!(client.execute("quit"), json!({"return": {}}));
        assert_eq!(client.read(), Value::Null);
        let gone = (0..1000).any(|_| {
            thread::sleep(Duration::from_millis(2));
            !server.path().exists()
        });
        assert!(gone);
    });
}

#[test]
fn a_client_that_comes_and_goes_leaves_nothing_behind() {
    on_both(|server| {
        for _ in 0..100 {
            drop(Client::connect(&server.path()));
        }
        for _ in 0..CLIENTS_MAX * 2 {
            // Each may be refused while places of the dead are being freed, but not for ever.
            let mut tries = 0..1000;
            assert!(tries.any(|_| {
                thread::sleep(Duration::from_millis(1));
                !Client::connect(&server.path()).read().is_null()
            }));
        }
    });
}
