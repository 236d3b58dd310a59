//! `vmferry upgrade`: moves a VM into a new process of another binary on the same host, under the running guest.

mod attempt;
mod exec;
#[cfg(test)]
mod fake;
mod process;
mod qemu;
mod vmferry;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use self::process::VmProcess;
use super::QmpArgs;
use super::client::QmpClient;
use super::exit::Exit;
use super::output;
use super::record::Record;
use super::signals::Signals;
use super::status::GuestStatus;
use crate::migration::status::MigrationStatus;

#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  \
    vmferry upgrade --qmp /tmp/vm.qmp\n  \
    vmferry upgrade --qmp /tmp/vm.qmp --binary /opt/vmferry-0.2/bin/vmferry --json\n  \
    vmferry upgrade --qmp /tmp/vm.qmp --mode exec\n  \
    vmferry upgrade --qmp /tmp/qemu.qmp -- qemu-system-x86_64 -M microvm ...\n\n\
    The guest's memory is neither copied nor sent: both processes map the same files.\n\
    Clients find the new process at the same path. The old one ends. With --mode exec\n\
    there is one process, which keeps its number, and clients connect again.\n\n\
    A VM of QEMU (10 or newer) must have its memory in descriptors that can be passed\n\
    on: a memory-backend-memfd with share=on, and aux-ram-share=on for the machine.\n\n\
    Exit status: 0 the new process has the guest, and runs it unless somebody has\n\
    stopped it since, 1 it has not, or the message says what is left to be done, 4 the VM stopped answering or comes to no end, so that\n\
    the outcome is not known.")]
pub(super) struct UpgradeArgs {
    #[command(flatten)]
    vm: QmpArgs,
    /// The new program [default: this one; for a VM of QEMU the one that runs it]
    #[arg(long, value_name = "PATH")]
    binary: Option<PathBuf>,
    /// How: into a new process (transfer), or by having the same process become the new program (exec)
    #[arg(long, value_enum, value_name = "transfer|exec", default_value_t = How::Transfer, hide_possible_values = true)]
    mode: How,
    /// Print what happened as JSON
    #[arg(long)]
    json: bool,
    /// Command that starts the new QEMU [default: that of the old one]
    #[arg(last = true, value_name = "COMMAND", conflicts_with = "binary")]
    command: Vec<OsString>,
}

/// Which way an upgrade goes.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum How {
    Transfer,
    Exec,
}

impl UpgradeArgs {
    pub(super) fn execute(self) -> anyhow::Result<Exit> {
        // Half-way is where nobody wants a VM to be.
        let _signals = Signals::take()?;
        let qmp = std::path::absolute(&self.vm.qmp)?;
        let client = QmpClient::connect(&qmp)?;
        let old = client
            .peer()
            .context("cannot tell which process the VM is")?;
        // Before it can end, and its number be another's.
        let old = VmProcess::open(old)?;
        if !client.is_qemu() {
            ensure!(
                self.command.is_empty(),
                "a VM of vmferry is started with the command line that it has; name the new program with --binary"
            );
            let upgrade = match self.mode {
                How::Transfer => vmferry::upgrade,
                How::Exec => exec::upgrade,
            };
            return upgrade(client, &old, &qmp, self.binary, self.json);
        }
        let mut command = match self.command.is_empty() {
            true => old.command()?,
            false => self.command,
        };
        if let (Some(binary), Some(program)) = (&self.binary, command.first_mut()) {
            // Not where the old process was started, but where we were.
            *program = std::path::absolute(binary)?.into();
        }
        if self.mode == How::Exec {
            let command = qemu::without_incoming(&command);
            return exec::upgrade_qemu(client, &old, &qmp, command, self.json);
        }
        qemu::upgrade(client, &old, &qmp, &command, self.json)
    }
}

/// How long a hand-over may take.
#[derive(Clone, Copy, Debug)]
struct Patience {
    /// Until it is cancelled.
    work: Duration,
    /// And then until it is given up.
    cancel: Duration,
}

/// As long as nobody has a reason for another one.
const HAND_OVER: Patience = Patience {
    work: Duration::from_secs(60),
    cancel: Duration::from_secs(60),
};
/// Pause between two looks at it.
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// Why there is no final record.
#[derive(Debug)]
enum Failed {
    /// Nothing has begun.
    Refused(anyhow::Error),
    /// The VM was told to hand over, and its answer or its end is not known: the new process may have the guest, and must live.
    Lost(anyhow::Error, Record),
}

/// The channels of a hand-over, at sockets in `folder`.
fn channels(folder: &Path) -> Vec<Value> {
    let channel = |kind: &str| {
        let addr = json!({"transport": "socket", "type": "unix", "path": folder.join(kind)});
        json!({"channel-type": kind, "addr": addr})
    };
    vec![channel("main"), channel("cpr")]
}

/// A hand-over, from the moment when the VM is told of it.
#[derive(Debug)]
struct HandOver {
    began: Instant,
    patience: Patience,
    cancelled: bool,
    last: Record,
}

impl HandOver {
    fn new(patience: Patience) -> Self {
        Self {
            began: Instant::now(),
            patience,
            cancelled: false,
            last: Record::default(),
        }
    }

    /// Tells the VM.
    fn begin(&mut self, client: &mut QmpClient, arguments: Value) -> Result<(), Failed> {
        self.began = Instant::now();
        match client.execute("migrate", arguments) {
            Ok(_) => Ok(()),
            Err(error) if error.is_answer() => Err(Failed::Refused(error.into())),
            Err(error) => Err(self.lost(error.into())),
        }
    }

    /// Waits until `over`. One that takes too long is cancelled, and given up if that does not help.
    fn end(
        &mut self,
        client: &mut QmpClient,
        over: impl Fn(MigrationStatus) -> bool,
    ) -> Result<Record, Failed> {
        loop {
            match client.execute("query-migrate", json!({})) {
                Ok(answer) => self.last = Record::new(answer),
                Err(error) => return Err(self.lost(error.into())),
            }
            if over(self.last.status()) {
                return Ok(self.last.clone());
            }
            if self.began.elapsed() >= self.patience.work && !self.cancelled {
                self.cancelled = true;
                // Refused when the guest has been given away; the next looks tell.
                match client.execute("migrate_cancel", json!({})) {
                    Err(error) if !error.is_answer() => return Err(self.lost(error.into())),
                    _ => {}
                }
            }
            if self.is_given_up() {
                let reason = self.last.error();
                let reason = reason.unwrap_or_else(|| "it takes too long".to_owned());
                return Err(self.lost(anyhow::Error::msg(reason)));
            }
            thread::sleep(LOOK_EVERY);
        }
    }

    /// The new program has the word now: it gets the same time, and nothing is cancelled any more.
    fn is_beyond_cancel(&mut self) {
        self.began = Instant::now();
        self.cancelled = true;
    }

    fn is_given_up(&self) -> bool {
        self.began.elapsed() >= self.patience.work + self.patience.cancel
    }

    fn lost(&self, error: anyhow::Error) -> Failed {
        Failed::Lost(error, self.last.clone())
    }
}

/// Tells the VM to hand over to another process, and waits for the end.
fn hand_over(client: &mut QmpClient, channels: &[Value]) -> Result<Record, Failed> {
    let mut hand_over = HandOver::new(HAND_OVER);
    hand_over.begin(client, json!({ "channels": channels }))?;
    hand_over.end(client, MigrationStatus::is_end)
}

/// The parameters that an upgrade sets, as the operator had them.
#[derive(Debug)]
struct Before(Value);

impl Before {
    /// Those with these names.
    fn of(client: &mut QmpClient, names: &[&str]) -> anyhow::Result<Self> {
        let all = client.execute("query-migrate-parameters", json!({}))?;
        ensure!(
            all["mode"].is_string(),
            "{} cannot be upgraded in place",
            client.name()
        );
        let kept = names.iter().map(|name| {
            let value = match &all[*name] {
                // What a list is that was never set.
                Value::Null => json!([]),
                value => value.clone(),
            };
            ((*name).to_owned(), value)
        });
        Ok(Self(Value::Object(kept.collect())))
    }

    /// Has the next migration be like those before. What went wrong meanwhile is told anyway, so this only says if it fails too.
    fn restore(&self, client: &mut QmpClient) {
        if let Err(error) = client.execute("migrate-set-parameters", self.0.clone()) {
            output::message(&output::chain(&error));
        }
    }
}

/// What is to be said of a guest that has arrived.
///
/// # Errors
/// It cannot go on. One that was stopped is where others wanted it: a message.
fn judge(before: &GuestStatus, after: &GuestStatus) -> anyhow::Result<()> {
    ensure!(
        !after.is_broken(),
        "the guest has moved and cannot go on: it is {after}; see the log of the new program"
    );
    if before.running && !after.running {
        output::message(&format!(
            "the guest ran before the upgrade, and is {after} in the new program: somebody has stopped it since"
        ));
    }
    Ok(())
}

/// Whether the process with this number is behind the monitor.
fn same_process(client: &QmpClient, pid: u32) -> bool {
    let peer = client.peer().map(|peer| peer.as_raw_nonzero().get());
    peer.and_then(|peer| u32::try_from(peer).ok()) == Some(pid)
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::net::UnixListener;

    use super::*;

    const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": ""}, "capabilities": []}}"#;

    /// A VM that gives these answers, each to one command, and hangs up.
    fn vm(answers: &'static [&'static str]) -> (QmpClient, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("qmp")).unwrap();
        thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let mut commands = BufReader::new(stream.try_clone().unwrap()).lines();
            let negotiated = [GREETING, r#"{"return": {}, "id": 0}"#];
            for answer in negotiated.iter().chain(answers) {
                writeln!(&stream, "{answer}").unwrap();
                commands.next();
            }
        });
        let client = QmpClient::connect(&dir.path().join("qmp")).unwrap();
        (client, dir)
    }

    #[test]
    fn only_a_refusal_says_that_nothing_has_begun() {
        let (mut client, _dir) =
            vm(&[r#"{"error": {"class": "GenericError", "desc": "not now"}, "id": 1}"#]);
        let refused = hand_over(&mut client, &[]);
        assert!(matches!(refused, Err(Failed::Refused(_))), "{refused:?}");
        let silent_deaths: [&'static [&'static str]; 2] = [
            &[],
            &[
                r#"{"return": {}, "id": 1}"#,
                r#"{"return": {"status": "device"}, "id": 2}"#,
            ],
        ];
        for answers in silent_deaths {
            let (mut client, _dir) = vm(answers);
            let lost = hand_over(&mut client, &[]);
            assert!(matches!(lost, Err(Failed::Lost(..))), "{lost:?}");
        }
    }
}
