//! `vmferry upgrade`: moves a VM into a new process of another binary on the same host, under the running guest.

mod exec;
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
use super::client::{ClientError, QmpClient};
use super::exit::Exit;
use super::record::Record;
use super::signals::Signals;

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
    Exit status: 0 the new process runs the guest, 1 it does not, or the message says\n\
    what is left to be done, 4 the VM stopped answering, so that the outcome is not\n\
    known.")]
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
        if !client.is_qemu() {
            ensure!(
                self.command.is_empty(),
                "a VM of vmferry is started with the command line that it has; name the new program with --binary"
            );
            let upgrade = match self.mode {
                How::Transfer => vmferry::upgrade,
                How::Exec => exec::upgrade,
            };
            return upgrade(client, old, &qmp, self.binary, self.json);
        }
        let old = VmProcess::open(old)?;
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

/// How long a hand-over may take before it is cancelled, and how long the cancel may take.
const HAND_OVER: Duration = Duration::from_secs(60);
/// Pause between two looks at it.
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// Why there is no final record.
#[derive(Debug)]
enum Failed {
    /// Nothing has begun.
    Refused(ClientError),
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

/// Tells the VM to hand over, and waits for the end. One that takes too long is cancelled.
fn hand_over(client: &mut QmpClient, channels: &[Value]) -> Result<Record, Failed> {
    let mut last = Record::new(Value::Null);
    if let Err(error) = client.execute("migrate", json!({ "channels": channels })) {
        return Err(match error.is_answer() {
            true => Failed::Refused(error),
            false => Failed::Lost(error.into(), last),
        });
    }
    let began = Instant::now();
    let mut cancelled = false;
    loop {
        match client.execute("query-migrate", json!({})) {
            Ok(answer) => last = Record::new(answer),
            Err(error) => return Err(Failed::Lost(error.into(), last)),
        }
        if last.status().is_end() {
            return Ok(last);
        }
        if began.elapsed() >= HAND_OVER && !cancelled {
            cancelled = true;
            // Refused when the guest has been given away; the next looks tell.
            match client.execute("migrate_cancel", json!({})) {
                Err(error) if !error.is_answer() => return Err(Failed::Lost(error.into(), last)),
                _ => {}
            }
        }
        if began.elapsed() >= 2 * HAND_OVER {
            let reason = last
                .error()
                .unwrap_or_else(|| "it takes too long".to_owned());
            return Err(Failed::Lost(anyhow::Error::msg(reason), last));
        }
        thread::sleep(LOOK_EVERY);
    }
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
