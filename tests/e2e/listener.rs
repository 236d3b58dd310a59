//! A server that VMs tell how their migrations go (`--notify`), and what it makes of that: the order is that of I7, and no vCPU runs
//! between a failure and its news.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::harness::{Launch, Vm, until};
use crate::qmp::Qmp;

/// What was heard of one event.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Heard {
    pub(crate) event: String,
    pub(crate) migration: String,
    /// Whether the guest ran while the server was told of a failure.
    pub(crate) guest_ran: bool,
}

#[derive(Default)]
struct Shared {
    heard: Mutex<Vec<Heard>>,
    /// Where the VM can be asked; unknown before it has started.
    qmp: Mutex<Option<PathBuf>>,
    vetoes: AtomicBool,
    /// Whoever tells of this event waits for its answer.
    holds: Mutex<Option<&'static str>>,
    /// Every connection there was.
    connections: Mutex<Vec<UnixStream>>,
    /// Looks at something whenever it is told of a failure.
    looks: Mutex<Option<Box<dyn Fn() + Send>>>,
    over: AtomicBool,
}

/// A server with one client: a connection is heard when the one before it has ended.
pub(crate) struct Listener {
    dir: TempDir,
    shared: Arc<Shared>,
}

impl Listener {
    pub(crate) fn new() -> Self {
        let dir = TempDir::with_prefix("vmferry-notify-").unwrap();
        let socket = UnixListener::bind(dir.path().join("s")).unwrap();
        let shared = Arc::new(Shared::default());
        let (next, connections) = mpsc::channel();
        let accepting = Arc::clone(&shared);
        thread::spawn(move || {
            for connection in socket.incoming() {
                if accepting.over.load(Ordering::SeqCst) {
                    return;
                }
                let connection = connection.unwrap();
                let copy = connection.try_clone().unwrap();
                accepting.connections.lock().unwrap().push(copy);
                // Nobody hears it any more once a connection has failed the test.
                let _ = next.send(connection);
            }
        });
        let serving = Arc::clone(&shared);
        thread::spawn(move || {
            for connection in connections {
                serve(&connection, &serving);
            }
        });
        Self { dir, shared }
    }

    /// Has a VM that is started so tell this server, and wait for it as long as a busy host may keep it from answering.
    pub(crate) fn attend(&self, launch: Launch) -> Launch {
        self.attend_within(60, launch)
    }

    /// As [`attend`](Self::attend), with a VM that waits so many seconds for an answer.
    pub(crate) fn attend_within(&self, seconds: u32, launch: Launch) -> Launch {
        let socket = format!("unix:{},timeout={seconds}", self.socket().display());
        launch.with(&["--notify", &socket])
    }

    /// The VM that tells it.
    pub(crate) fn knows(&self, vm: &Vm) {
        *self.shared.qmp.lock().unwrap() = Some(vm.qmp_path());
    }

    /// Objects to every migration, or to none.
    pub(crate) fn veto(&self, all: bool) {
        self.shared.vetoes.store(all, Ordering::SeqCst);
    }

    /// Takes its time with the news of an event until told otherwise; that of a failure keeps a migration `failing` or `cancelling`. The
    /// program does not wait for ever: see [`attend`](Self::attend).
    pub(crate) fn hold(&self, event: &'static str) {
        *self.shared.holds.lock().unwrap() = Some(event);
    }

    /// Answers whoever waits.
    pub(crate) fn let_go(&self) {
        *self.shared.holds.lock().unwrap() = None;
    }

    /// Looks at something with every news of a failure, before the guest may run again.
    pub(crate) fn on_failure(&self, look: impl Fn() + Send + 'static) {
        *self.shared.looks.lock().unwrap() = Some(Box::new(look));
    }

    /// How many connections clients have to it. One is made at the first event, kept, and given up when the answer comes late.
    pub(crate) fn connections(&self) -> usize {
        let mut connections = self.shared.connections.lock().unwrap();
        connections.retain(is_open);
        connections.len()
    }

    /// Everything heard so far.
    pub(crate) fn heard(&self) -> Vec<Heard> {
        self.shared.heard.lock().unwrap().clone()
    }

    /// As [`assert_order`](Self::assert_order), except that the last migration of a VM that was killed has no end.
    pub(crate) fn assert_order_unless(&self, killed: bool, what: &str) {
        if !killed {
            self.assert_order(what);
        }
    }

    /// Of every migration that began at this side the end was told, once, and nothing else.
    pub(crate) fn assert_order(&self, what: &str) {
        until(format_args!("{what}: every SETUP has its end"), || {
            let heard = self.heard();
            let begun = heard.iter().filter(|one| one.event == "setup").count();
            let ended = |one: &&Heard| one.event == "done" || one.event == "failed";
            (heard.iter().filter(ended).count() >= begun).then_some(())
        });
        let mut open: Option<String> = None;
        for one in self.heard() {
            match one.event.as_str() {
                "setup" => {
                    assert_eq!(open.replace(one.migration.clone()), None, "{what}: {one:?}");
                }
                "done" | "failed" => {
                    assert_eq!(open.take(), Some(one.migration.clone()), "{what}: {one:?}");
                }
                "incoming-failed" => {}
                other => panic!("{what}: {other}"),
            }
        }
        assert_eq!(open, None, "{what}");
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("s")
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::SeqCst);
        // Wakes the server; if it has gone already there is nobody to wake.
        let _ = UnixStream::connect(self.socket());
    }
}

/// Serves one connection to its end.
fn serve(connection: &UnixStream, shared: &Shared) {
    let mut answers = connection;
    for line in BufReader::new(connection).lines() {
        let Ok(line) = line else { return };
        let said: Value = serde_json::from_str(&line).unwrap();
        let text = |name: &str| said[name].as_str().unwrap().to_owned();
        let event = text("event");
        let failed = event == "failed";
        let vetoed = event == "setup" && shared.vetoes.load(Ordering::SeqCst);
        if failed && let Some(look) = &*shared.looks.lock().unwrap() {
            look();
        }
        let path = shared.qmp.lock().unwrap().clone();
        // One that waited too long for the answer has hung up, and may go on.
        let guest_ran = failed && path.is_some_and(|path| guest_runs(&path)) && is_open(connection);
        let holds = || *shared.holds.lock().unwrap() == Some(event.as_str());
        shared.heard.lock().unwrap().push(Heard {
            event: event.clone(),
            migration: text("migration"),
            guest_ran,
        });
        while holds() && !shared.over.load(Ordering::SeqCst) {
            thread::sleep(Duration::from_millis(2));
        }
        let answer = if vetoed {
            json!({ "veto": "not now" })
        } else {
            json!({ "ok": true })
        };
        // The VM may have been killed.
        let _ = answers.write_all(format!("{answer}\n").as_bytes());
    }
}

/// Whether the other side has not hung up.
fn is_open(connection: &UnixStream) -> bool {
    let mut byte = [0];
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    match recv(connection, &mut byte, flags) {
        Ok((_, bytes)) => bytes > 0,
        Err(error) => error == Errno::AGAIN,
    }
}

fn guest_runs(qmp: &Path) -> bool {
    Qmp::connect(qmp)
        .and_then(|mut qmp| qmp.execute("query-status", json!({})).ok())
        .is_some_and(|status| status["running"] == true)
}
