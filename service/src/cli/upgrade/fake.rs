//! A monitor for tests that behaves as that of a VM whose process executes another program: each program has its own parameters, its
//! clients come one at a time and lose it with the exec, and a QEMU is `completed` before its exec.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;

use serde_json::{Value, json};
use tempfile::TempDir;

/// What comes at a look at the migration. The last one stays.
#[derive(Clone, Debug)]
pub(super) enum Step {
    /// An answer.
    Is(&'static str),
    /// The same, for this reason.
    For(&'static str, &'static str),
    /// The same until somebody cancels.
    UntilCancel(&'static str),
    /// The connection ends by accident.
    HangUp,
    /// The process becomes the new program, and nobody hears more of the old one.
    Exec,
    /// Nobody answers any more.
    End,
    /// An answer, and none after it.
    LastWord(&'static str),
}

/// What was said to the VM: to the new program, which command, its arguments.
type Said = (bool, String, Value);

#[derive(Debug)]
struct State {
    package: &'static str,
    steps: VecDeque<Step>,
    executed: bool,
    parameters: Value,
    /// What `query-status` says.
    guest: &'static str,
    /// What it said in the old program.
    was: &'static str,
    state: Option<PathBuf>,
    cancelled: bool,
    dead: bool,
    refusal: Option<&'static str>,
    said: Vec<Said>,
    /// What must not be.
    wrong: Vec<String>,
}

/// The monitor. It ends with the test.
#[derive(Debug)]
pub(super) struct Fake {
    state: Arc<Mutex<State>>,
    dir: TempDir,
}

impl Fake {
    /// A QEMU with a guest in this state, whose migration takes these steps.
    pub(super) fn qemu(guest: &'static str, steps: &[Step]) -> Self {
        Self::new("", guest, steps)
    }

    /// The same for a vmferry.
    pub(super) fn vmferry(guest: &'static str, steps: &[Step]) -> Self {
        Self::new("vmferry 0", guest, steps)
    }

    fn new(package: &'static str, guest: &'static str, steps: &[Step]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("qmp")).unwrap();
        let state = State {
            package,
            steps: steps.iter().cloned().collect(),
            executed: false,
            parameters: json!({"mode": "normal", "cpr-exec-command": []}),
            guest,
            was: guest,
            state: None,
            cancelled: false,
            dead: false,
            refusal: None,
            said: Vec::new(),
            wrong: Vec::new(),
        };
        let state = Arc::new(Mutex::new(state));
        let served = Arc::clone(&state);
        thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                // Whoever hangs up while it is told something is a client like others.
                if serve(&stream, &served).is_some_and(|goes_on| !goes_on) {
                    break;
                }
            }
        });
        Self { state, dir }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub(super) fn path(&self) -> PathBuf {
        self.dir.path().join("qmp")
    }

    /// The operator has set parameters.
    pub(super) fn set(&self, parameters: &Value) {
        merge(&mut self.state().parameters, parameters);
    }

    /// `migrate` is refused for this reason.
    pub(super) fn refuse(&self, reason: &'static str) {
        self.state().refusal = Some(reason);
    }

    /// Its parameters now.
    pub(super) fn parameters(&self) -> Value {
        self.state().parameters.clone()
    }

    /// What `query-status` says now.
    pub(super) fn guest(&self) -> &'static str {
        self.state().guest
    }

    /// The file with the guest's state.
    pub(super) fn file(&self) -> PathBuf {
        self.state().state.clone().unwrap()
    }

    /// The arguments of all commands of this name, with which program they were for.
    pub(super) fn asked(&self, command: &str) -> Vec<(bool, Value)> {
        let state = self.state();
        let all = state.said.iter().filter(|said| said.1 == command);
        all.map(|said| (said.0, said.2.clone())).collect()
    }

    /// Nothing was done to it that a VM does not bear.
    pub(super) fn assert_right(&self) {
        let wrong = &self.state().wrong;
        assert!(wrong.is_empty(), "{wrong:?}");
    }
}

fn merge(into: &mut Value, from: &Value) {
    for (name, value) in from.as_object().unwrap() {
        into[name] = value.clone();
    }
}

/// Serves one client. `None`: it has hung up; otherwise whether others may come.
fn serve(mut stream: &UnixStream, state: &Mutex<State>) -> Option<bool> {
    let mut commands = BufReader::new(stream.try_clone().ok()?).lines();
    let package = state.lock().unwrap().package;
    let version = json!({"qemu": {"major": 10, "minor": 2, "micro": 0}, "package": package});
    let greeting = json!({"QMP": {"version": version, "capabilities": []}});
    writeln!(stream, "{greeting}").ok()?;
    loop {
        let command: Value = serde_json::from_str(&commands.next()?.ok()?).unwrap();
        let answer = match state.lock().unwrap().answer(&command) {
            Ok(value) => json!({"return": value, "id": command["id"]}),
            Err(Answer::Refusal(desc)) => {
                let error = json!({"class": "GenericError", "desc": desc});
                json!({"error": error, "id": command["id"]})
            }
            Err(Answer::None { goes_on }) => return Some(goes_on),
        };
        writeln!(stream, "{answer}").ok()?;
    }
}

/// None that is good.
enum Answer {
    Refusal(&'static str),
    None { goes_on: bool },
}

impl State {
    fn answer(&mut self, command: &Value) -> Result<Value, Answer> {
        let name = command["execute"].as_str().unwrap();
        let arguments = &command["arguments"];
        self.said
            .push((self.executed, name.to_owned(), arguments.clone()));
        match name {
            _ if self.dead => return Err(Answer::None { goes_on: false }),
            "query-qmp-schema" => {
                return Ok(json!([{"meta-type": "enum", "values": ["cpr-exec"]}]));
            }
            "query-status" => {
                return Ok(json!({"running": self.guest == "running", "status": self.guest}));
            }
            "query-migrate-parameters" => return Ok(self.parameters.clone()),
            "migrate-set-parameters" => merge(&mut self.parameters, arguments),
            "migrate" => {
                if let Some(reason) = self.refusal {
                    return Err(Answer::Refusal(reason));
                }
                let file = arguments["channels"][0]["addr"]["filename"].as_str();
                self.state = file.map(PathBuf::from);
            }
            "query-migrate" => return self.look(),
            "migrate_cancel" => self.cancelled = true,
            "cont" => self.guest = "running",
            _ => {}
        }
        Ok(json!({}))
    }

    fn look(&mut self) -> Result<Value, Answer> {
        let step = match self.steps.front().cloned().unwrap() {
            Step::UntilCancel(status) if !self.cancelled => Step::Is(status),
            Step::UntilCancel(_) => {
                self.steps.pop_front();
                return self.look();
            }
            step if self.steps.len() == 1 => step,
            step => {
                self.steps.pop_front();
                step
            }
        };
        match step {
            Step::For(status, reason) => {
                self.is(status);
                Ok(json!({"status": status, "error-desc": reason}))
            }
            Step::Is(status) | Step::UntilCancel(status) => {
                self.is(status);
                Ok(json!({"status": status}))
            }
            Step::LastWord(status) => {
                self.is(status);
                self.dead = true;
                Ok(json!({"status": status}))
            }
            Step::HangUp => Err(Answer::None { goes_on: true }),
            Step::Exec => {
                self.execute();
                Err(Answer::None { goes_on: true })
            }
            Step::End => Err(Answer::None { goes_on: false }),
        }
    }

    /// What becomes of the guest.
    fn is(&mut self, status: &str) {
        match (self.executed, status) {
            (false, "device") => self.guest = "finish-migrate",
            (false, "completed") => self.guest = "postmigrate",
            // It is there without a guest.
            (true, "failed") if self.package.is_empty() => {}
            (_, "failed" | "cancelled") => self.guest = self.was,
            (true, "completed") if !self.package.is_empty() => self.guest = self.was,
            (true, "completed") if self.guest == "inmigrate" => {
                let waits = self.words().iter().any(|word| word == "-S");
                self.guest = if waits { "paused" } else { self.was };
                self.load();
            }
            _ => {}
        }
    }

    fn execute(&mut self) {
        let command = self.parameters["cpr-exec-command"].take();
        if command.as_array().is_none_or(Vec::is_empty) {
            self.wrong.push("nothing to execute".to_owned());
        }
        if self.package.is_empty() {
            self.guest = "inmigrate";
        }
        if let Some(path) = &self.state
            && let Err(error) = std::fs::write(path, "state")
        {
            self.wrong
                .push(format!("the state cannot be saved: {error}"));
        }
        self.executed = true;
        self.parameters = json!({"mode": "normal", "cpr-exec-command": []});
        self.said.push((true, "exec".to_owned(), command));
    }

    /// The words that the new program was started with.
    fn words(&self) -> Vec<Value> {
        let exec = self.said.iter().find(|said| said.1 == "exec");
        exec.and_then(|said| said.2.as_array().cloned())
            .unwrap_or_default()
    }

    fn load(&mut self) {
        let words = self.words();
        let file = words.last().and_then(Value::as_str);
        let file = file.and_then(|word| word.strip_prefix("file:"));
        let loaded = file.is_some_and(|path| {
            self.state.as_deref() == Some(Path::new(path)) && std::fs::read(path).is_ok()
        });
        if !loaded {
            self.wrong.push(format!("{words:?} find no state"));
        }
    }
}
