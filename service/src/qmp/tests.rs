//! The server over real sockets, with a small engine task in place of the real one.

use std::io::{BufRead, BufReader, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};
use tokio::sync::oneshot;
use vmferry_transport::control::runtime::{self, RuntimeKind};
use vmferry_transport::control::{Address, Listener};

use super::{CLIENTS_MAX, Command, EngineHandle, EngineInbox, QmpError, QmpEvent, QmpServer};

/// Far longer than anything here takes; a test that needs it hangs.
const PATIENCE: Duration = Duration::from_secs(60);

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

/// `stop` and `cont` send their events, `query-name` floods with events, `x-ram-hash` fails, `quit` ends the engine, `query-kvm` is
/// answered when `migrate-pause` is, `getfd` writes its name to what came along.
async fn engine(mut inbox: EngineInbox) {
    let mut held = Vec::new();
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
            Command::QueryKvm => {
                held.push(request.reply);
                continue;
            }
            Command::MigratePause => {
                for reply in held.drain(..) {
                    let _ = reply.send(Ok(json!("released")));
                }
                Ok(json!({}))
            }
            Command::GetFd { name } => {
                let mut file = std::fs::File::from(request.fd.unwrap());
                file.write_all(name.as_bytes()).unwrap();
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

impl Client {
    /// Negotiated, with out-of-band execution.
    fn overtaking(path: &Path) -> Self {
        let mut client = Self::connect(path);
        assert_eq!(client.read()["QMP"]["capabilities"], json!(["oob"]));
        client.send(r#"{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}"#);
        assert_eq!(client.read(), json!({"return": {}}));
        client
    }

    /// Sends bytes with descriptors.
    fn send_with(&mut self, text: &str, fds: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(32))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        let bytes = [IoSlice::new(text.as_bytes())];
        sendmsg(
            self.reader.get_ref(),
            &bytes,
            &mut control,
            SendFlags::empty(),
        )
        .unwrap();
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

#[test]
fn what_is_out_of_band_overtakes_a_command_that_takes_long() {
    on_both(|server| {
        let mut client = Client::overtaking(&server.path());
        // One is executed, seven wait behind it; with one more the client would not be read from.
        for id in 0..8 {
            client.send(&json!({"execute": "query-kvm", "id": id}).to_string());
        }
        let mut answered = Vec::new();
        while answered.len() < 8 {
            // Releases the one that is being executed, if it has reached the engine.
            client.send(r#"{"exec-oob": "migrate-pause", "id": "now"}"#);
            loop {
                let reply = client.read();
                if reply["id"] == "now" {
                    break;
                }
                assert_eq!(reply["return"], "released");
                answered.push(reply["id"].clone());
            }
        }
        let in_order: Vec<_> = (0..8).map(|id| json!(id)).collect();
        assert_eq!(answered, in_order);
    });
}

#[test]
fn a_refused_command_out_of_band_is_answered_at_once_too() {
    on_both(|server| {
        let mut client = Client::overtaking(&server.path());
        client.send(r#"{"execute": "query-kvm", "id": 1}{"exec-oob": "stop", "id": 2}"#);
        let refused = client.read();
        assert_eq!(refused["id"], 2);
        assert_eq!(refused["error"]["class"], "GenericError");
        client.send(r#"{"exec-oob": "migrate-pause", "id": 3}"#);
        let ids = [client.read()["id"].clone(), client.read()["id"].clone()];
        assert!(
            ids.contains(&json!(1)) && ids.contains(&json!(3)),
            "{ids:?}"
        );
    });
}

#[test]
fn a_client_that_did_not_ask_for_it_cannot_overtake() {
    on_both(|server| {
        let mut client = Client::negotiated(&server.path());
        client.send(r#"{"exec-oob": "migrate-pause"}"#);
        let desc = client.read()["error"]["desc"].to_string();
        assert!(desc.contains("not enabled"), "{desc}");
    });
}

#[test]
fn only_so_many_commands_wait_and_none_is_lost() {
    on_both(|server| {
        let mut client = Client::overtaking(&server.path());
        client.send(r#"{"execute": "query-kvm", "id": "first"}"#);
        let text: String = (0..100)
            .map(|id| json!({"execute": "query-migrate", "id": id}).to_string())
            .collect();
        client.send(&text);
        // Behind a hundred others this one is not seen: a second client must help.
        client.send(r#"{"exec-oob": "migrate-pause", "id": "stuck"}"#);
        let mut other = Client::negotiated(&server.path());
        let first = loop {
            assert_eq!(other.execute("migrate-pause"), json!({"return": {}}));
            client
                .reader
                .get_ref()
                .set_read_timeout(Some(Duration::from_millis(20)))
                .unwrap();
            let mut line = String::new();
            match client.reader.read_line(&mut line) {
                Ok(_) => break serde_json::from_str::<Value>(&line).unwrap(),
                Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
            }
        };
        client
            .reader
            .get_ref()
            .set_read_timeout(Some(PATIENCE))
            .unwrap();
        assert_eq!(first["id"], "first");
        let mut ids: Vec<Value> = (0..101).map(|_| client.read()["id"].clone()).collect();
        ids.retain(|id| id != "stuck");
        assert_eq!(ids, (0..100).map(|id| json!(id)).collect::<Vec<_>>());
    });
}

#[test]
fn a_descriptor_reaches_the_command_it_came_with() {
    on_both(|server| {
        let mut client = Client::negotiated(&server.path());
        let command =
            |name: &str| json!({"execute": "getfd", "arguments": {"fdname": name}}).to_string();
        let mut ends = Vec::new();
        // With the command, and with a blank before it as the Python client does; pipelined.
        for name in ["one", "two", "three", "four"] {
            let (near, far) = UnixStream::pair().unwrap();
            if name.len() == 3 {
                client.send_with(&command(name), &[far.as_fd()]);
            } else {
                client.send_with(" ", &[far.as_fd()]);
                client.send(&command(name));
            }
            ends.push((near, name));
        }
        for (mut near, name) in ends {
            assert_eq!(client.read(), json!({"return": {}}));
            let mut text = String::new();
            near.set_read_timeout(Some(PATIENCE)).unwrap();
            // Ends because the engine has closed what it got.
            near.read_to_string(&mut text).unwrap();
            assert_eq!(text, name);
        }
    });
}

#[test]
fn a_command_without_its_descriptor_is_refused_and_strays_are_closed() {
    on_both(|server| {
        let mut client = Client::negotiated(&server.path());
        let getfd = r#"{"execute": "getfd", "arguments": {"fdname": "x"}}"#;
        client.send(getfd);
        assert!(
            client.read()["error"]["desc"]
                .to_string()
                .contains("SCM_RIGHTS")
        );
        let (mut near, far) = UnixStream::pair().unwrap();
        client.send_with(r#"{"execute": "query-migrate"}"#, &[far.as_fd(); 3]);
        drop(far);
        for _ in 0..3 {
            assert!(client.read()["return"].is_string());
            client.send(r#"{"execute": "query-migrate"}"#);
        }
        assert!(client.read()["return"].is_string());
        near.set_read_timeout(Some(PATIENCE)).unwrap();
        assert_eq!(near.read(&mut [0; 1]).unwrap(), 0, "still open somewhere");
        let (near, far) = UnixStream::pair().unwrap();
        client.send_with(getfd, &[far.as_fd(); 30]);
        let desc = client.read()["error"]["desc"].to_string();
        assert!(desc.contains("could not be received"), "{desc}");
        drop(near);
    });
}
