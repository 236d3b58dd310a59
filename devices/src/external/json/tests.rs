//! The server's side played by threads on real sockets.

use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixListener;
use std::sync::mpsc::{Receiver, channel};
use std::thread::{self, JoinHandle};

use tempfile::TempDir;

use super::*;
use crate::external::ServerNotifier;
use crate::notifier::{Mode, Modes, Notifiers, Priority, Setup, Told, Vetoed};

const ID: MigrationId = MigrationId([0xab; 16]);
const SETUP: &str =
    r#"{"event":"setup","mode":"normal","migration":"abababababababababababababababab"}"#;

/// What a server does with one connection: says one of these to each line it hears, then closes.
type Script = &'static [&'static str];

/// Longer than a busy host keeps a server waiting for the processor.
const PATIENCE: Duration = Duration::from_secs(60);
/// For servers that never answer.
const NO_PATIENCE: Duration = Duration::from_millis(300);

/// A server and what it hears.
struct Played {
    folder: TempDir,
    heard: Receiver<String>,
    thread: JoinHandle<()>,
}

/// Plays one connection after the other.
fn play(connections: &'static [Script]) -> Played {
    let folder = TempDir::new().unwrap();
    let listener = UnixListener::bind(folder.path().join("s")).unwrap();
    let (says, heard) = channel();
    let thread = thread::spawn(move || {
        for script in connections {
            let (connection, _) = listener.accept().unwrap();
            let mut lines = BufReader::new(connection.try_clone().unwrap()).lines();
            for answer in *script {
                let Some(Ok(line)) = lines.next() else { break };
                says.send(line).unwrap();
                // The client may have given up.
                let _ = (&connection).write_all(answer.as_bytes());
            }
        }
    });
    Played {
        folder,
        heard,
        thread,
    }
}

impl Played {
    fn server(&self) -> JsonServer {
        server(&self.folder.path().join("s"), PATIENCE)
    }

    fn notifiers(&self) -> Notifiers {
        notifiers(self.server())
    }

    /// Everything it has heard, after the client is gone.
    fn end(self) -> Vec<String> {
        self.thread.join().unwrap();
        self.heard.iter().collect()
    }
}

fn server(path: &Path, timeout: Duration) -> JsonServer {
    JsonServer::new("display", path)
        .unwrap()
        .with_timeout(timeout)
}

fn notifiers(server: JsonServer) -> Notifiers {
    let notifiers = Notifiers::new();
    let notifier = ServerNotifier::new(Box::new(server));
    notifiers.register(Modes::ALL, Priority::SERVER, Box::new(notifier));
    notifiers
}

fn setup(notifiers: &Notifiers) -> Result<Told, Vetoed> {
    notifiers.setup(&Setup {
        mode: Mode::Normal,
        migration: ID,
    })
}

fn veto(notifiers: &Notifiers) -> String {
    let Vetoed { error, told } = setup(notifiers).unwrap_err();
    notifiers.failed(told);
    match std::error::Error::source(&error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

fn events(heard: &[String]) -> Vec<String> {
    heard
        .iter()
        .map(|line| {
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            assert_eq!(line["migration"], ID.to_string());
            line["event"].as_str().unwrap().to_owned()
        })
        .collect()
}

const OK: &str = "{\"ok\":true}\n";

#[test]
fn a_server_hears_setup_and_the_end_on_one_connection() {
    let played = play(&[&[OK; 5]]);
    let notifiers = played.notifiers();
    let told = setup(&notifiers).unwrap();
    notifiers.done(told);
    let told = setup(&notifiers).unwrap();
    notifiers.failed(told);
    notifiers.incoming_failed(Mode::Normal, ID);
    let heard = played.end();
    assert_eq!(heard[0], SETUP);
    assert_eq!(
        events(&heard),
        ["setup", "done", "setup", "failed", "incoming-failed"]
    );
}

#[test]
fn a_veto_reaches_the_operator_in_the_servers_words() {
    let played = play(&[&[
        "{\"veto\":\"a client is copying\\na file\",\"since\":7}\n",
        OK,
    ]]);
    let text = veto(&played.notifiers());
    assert!(
        text.contains("display") && text.contains("a client is copying a file"),
        "{text}"
    );
    assert_eq!(events(&played.end()), ["setup", "failed"]);
}

#[test]
fn a_dead_server_vetoes_setup_and_is_only_logged_later() {
    let nobody = TempDir::new().unwrap();
    let text = veto(&notifiers(server(&nobody.path().join("s"), PATIENCE)));
    assert!(text.contains("display") && text.contains("setup"), "{text}");

    // Closes after SETUP, and nobody listens any more.
    let played = play(&[&[OK]]);
    let notifiers = played.notifiers();
    let told = setup(&notifiers).unwrap();
    assert_eq!(events(&played.end()), ["setup"]);
    notifiers.done(told);
}

#[test]
fn a_server_that_comes_back_hears_the_end_on_a_new_connection() {
    let played = play(&[&[OK], &[OK]]);
    let notifiers = played.notifiers();
    let told = setup(&notifiers).unwrap();
    notifiers.failed(told);
    assert_eq!(events(&played.end()), ["setup", "failed"]);
}

#[test]
fn answers_that_are_not_as_agreed_veto() {
    for (answer, part) in [
        ("{}\n", "not as agreed"),
        ("{\"ok\":false}\n", "not as agreed"),
        ("{\"ok\":1}\n", "not as agreed"),
        ("[]\n", "not as agreed"),
        ("\u{7f}\n", "not as agreed"),
        ("{\"ok\":true}\n{\"ok\":true}\n", "more than it was asked"),
        ("{\"veto\":\"\"}\n", "no reason"),
        ("{\"ok\":true}", "end of file"),
    ] {
        // Leaked, as the scripts live as long as the program.
        let script: Script = Vec::leak(vec![answer]);
        let played = play(Vec::leak(vec![script]));
        let text = veto(&played.notifiers());
        assert!(text.contains(part), "{answer:?}: {text}");
        played.end();
    }
}

#[test]
fn a_server_cannot_make_us_hold_more_than_a_line() {
    let long = "x".repeat(LINE_BYTES_MAX + 1).leak();
    let script: Script = Vec::leak(vec![&*long]);
    let played = play(Vec::leak(vec![script]));
    let text = veto(&played.notifiers());
    assert!(text.contains("too long"), "{text}");
    played.end();

    let long = format!("{{\"veto\":\"{}\"}}\n", "y".repeat(LINE_BYTES_MAX - 100)).leak();
    let script: Script = Vec::leak(vec![&*long]);
    let played = play(Vec::leak(vec![script]));
    let text = veto(&played.notifiers());
    assert!(text.len() < 700, "{} bytes", text.len());
    played.end();
}

#[test]
fn a_silent_server_is_not_waited_for_for_ever() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("s");
    // Takes connections as far as the kernel does it, and reads nothing.
    let _silent = UnixListener::bind(&path).unwrap();
    let text = veto(&notifiers(server(&path, NO_PATIENCE)));
    assert!(text.contains("no answer within 0.3 s"), "{text}");
}

#[test]
fn a_server_without_room_for_connections_is_not_waited_for() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("s");
    let full = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )
    .unwrap();
    rustix::net::bind(&full, &SocketAddrUnix::new(&path).unwrap()).unwrap();
    rustix::net::listen(&full, 1).unwrap();
    let mut connections = Vec::new();
    while let Ok(connection) = open(&path) {
        connections.push(connection);
    }
    let text = veto(&notifiers(server(&path, PATIENCE)));
    assert!(text.contains("takes no connections"), "{text}");
}

#[test]
fn a_path_that_fits_no_socket_is_refused_at_once() {
    let path = "p".repeat(200);
    let error = JsonServer::new("display", Path::new(&path)).unwrap_err();
    assert!(error.to_string().contains("display"), "{error}");
}
