//! Upgrades a VM of vmferry.
//!
//! The new process is started as the old one was. It gets the old one's memory, its QMP and metrics sockets and its output; clients find
//! it at the same paths. If anything goes wrong before the guest is handed over it goes on in the old process.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{Before, Failed, channels, hand_over};
use crate::cli::client::QmpClient;
use crate::cli::exit::Exit;
use crate::cli::migrate::lost;
use crate::cli::output;
use crate::cli::record::Record;
use crate::cli::size::duration;
use crate::cli::status::GuestStatus;
use crate::migration::status::MigrationStatus;
use crate::succession;

/// Pause between two looks at the migration.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// How long a process may take to end when there is nothing left for it to do.
const END_DEADLINE: Duration = Duration::from_secs(10);
/// Options of `vmferry run` that say how its guest came, not what it is; with the number of words each takes.
const OF_THE_ARRIVAL: [(&str, usize); 4] = [
    ("--end-with-parent", 1),
    ("--incoming", 1),
    ("--incoming-cpr", 1),
    ("--paused", 0),
];
/// The same for a process that stays and has the same parent.
pub(super) const OF_THE_GUESTS_ARRIVAL: &[(&str, usize)] = OF_THE_ARRIVAL.split_at(1).1;

/// What an upgrade has cost.
#[derive(Debug)]
pub(super) struct Done {
    pub(super) record: Record,
    pub(super) old: Pid,
    pub(super) new: u32,
    pub(super) whole: Duration,
}

/// Upgrades the VM behind `client`, which listens at `qmp` and is process `old`; `binary` is the new program, this one if there is none.
pub(super) fn upgrade(
    mut client: QmpClient,
    old: Pid,
    qmp: &Path,
    binary: Option<PathBuf>,
    json: bool,
) -> anyhow::Result<Exit> {
    let began = Instant::now();
    let before: GuestStatus = client.query("query-status")?;
    let parameters = Before::of(&mut client, &["mode"])?;
    let program = match binary {
        Some(program) => program,
        None => std::env::current_exe().context("cannot find the program that is running")?,
    };
    // Where both processes meet; nobody else may enter.
    let place = TempDir::with_prefix("vmferry-upgrade-")?;
    let mut child = start(&program, old, &place)?;
    let mode = json!({"mode": "cpr-transfer"});
    let asked = client.execute("migrate-set-parameters", mode);
    let handed = asked
        .map_err(|error| Failed::Refused(error.into()))
        .and_then(|_| hand_over(&mut client, &channels(place.path())));
    let record = match handed {
        Ok(record) => record,
        Err(Failed::Refused(error)) => {
            give_up(&mut client, &parameters, &mut child);
            return Err(error);
        }
        Err(Failed::Lost(error, last)) => {
            // Where the old process asks for the outcome.
            let _ = place.keep();
            return Ok(lost(error.as_ref(), &last));
        }
    };
    if record.status() != MigrationStatus::Completed {
        let reason = record
            .error()
            .unwrap_or_else(|| "no reason is known".to_owned());
        let ended = give_up(&mut client, &parameters, &mut child);
        output::message(&format!(
            "upgrade {}: {reason}; the new process, {}, {ended}; the guest goes on in process {old}",
            record.status(),
            program.display()
        ));
        return Ok(Exit::Failed);
    }
    verify(qmp, &child, &before)?;
    end(client, old)?;
    let done = Done {
        record,
        old,
        new: child.id(),
        whole: began.elapsed(),
    };
    done.show(json)?;
    Ok(Exit::Done)
}

/// The command line of process `old`, which must be one of `vmferry run`.
pub(super) fn command_line(old: Pid) -> anyhow::Result<Vec<u8>> {
    let unknown = || format!("cannot tell how process {old} was started");
    let cmdline = fs::read(format!("/proc/{old}/cmdline")).with_context(unknown)?;
    ensure!(
        split(&cmdline).any(|word| word == "run"),
        "process {old} was not started with `vmferry run`"
    );
    Ok(cmdline)
}

/// Starts the new process as the old one was started, with a socket that the old one will find it at.
fn start(program: &Path, old: Pid, place: &TempDir) -> anyhow::Result<Child> {
    let proc = PathBuf::from(format!("/proc/{old}"));
    let read = |name: &str| {
        fs::read(proc.join(name))
            .with_context(|| format!("cannot tell how process {old} was started"))
    };
    let words = arguments(&command_line(old)?, &OF_THE_ARRIVAL);
    let listener = UnixListener::bind(place.path().join("cpr"))
        .context("cannot listen for the old process")?;
    let mut incoming = OsString::from("unix:");
    incoming.push(place.path().join("main"));
    let mut command = Command::new(program);
    command
        .args(words)
        .arg("--incoming")
        .arg(incoming)
        .args(["--incoming-cpr", "inherited"])
        .current_dir(proc.join("cwd"))
        .env_clear()
        .envs(environment(&read("environ")?))
        .stdin(Stdio::from(OwnedFd::from(listener)))
        .stdout(Stdio::null())
        // Until it has the old process's.
        .stderr(Stdio::inherit())
        .process_group(0);
    command
        .spawn()
        .with_context(|| format!("cannot start {}", program.display()))
}

/// The words of the old process's command line without its name and without how its guest came.
pub(super) fn arguments(cmdline: &[u8], of_the_arrival: &[(&str, usize)]) -> Vec<OsString> {
    let mut words = split(cmdline).skip(1);
    let mut kept = Vec::new();
    while let Some(word) = words.next() {
        let found = of_the_arrival.iter().find(|(option, _)| {
            word.as_bytes()
                .strip_prefix(option.as_bytes())
                .is_some_and(|rest| rest.is_empty() || rest[0] == b'=')
        });
        match found {
            None => kept.push(word),
            // With `=` the value is in the same word.
            Some((option, count)) if word.len() == option.len() => {
                words.by_ref().take(*count).for_each(drop);
            }
            Some(_) => {}
        }
    }
    kept
}

fn environment(environ: &[u8]) -> impl Iterator<Item = (OsString, OsString)> {
    split(environ).filter_map(|line| {
        let (name, value) = line
            .as_bytes()
            .split_at(line.as_bytes().iter().position(|b| *b == b'=')?);
        let owned = |bytes: &[u8]| OsString::from_vec(bytes.to_vec());
        // The kernel goes on showing what an exec has used up.
        let passed_on = name != succession::VARIABLE.as_bytes();
        passed_on.then(|| (owned(name), owned(&value[1..])))
    })
}

fn split(bytes: &[u8]) -> impl Iterator<Item = OsString> {
    let bytes = bytes.strip_suffix(b"\0").unwrap_or(bytes);
    bytes
        .split(|byte| *byte == 0)
        .map(|word| OsStr::from_bytes(word).to_owned())
}

/// The guest stays in the old process, where the next migration is as it would have been: the new process ends. Says how it ended.
fn give_up(client: &mut QmpClient, before: &Before, child: &mut Child) -> String {
    before.restore(client);
    let deadline = Instant::now() + END_DEADLINE;
    // It has heard of the failure, or is not what it should be.
    while Instant::now() < deadline && matches!(child.try_wait(), Ok(None)) {
        thread::sleep(LOOK_EVERY);
    }
    // Fails if it has ended.
    let _ = child.kill();
    match child.wait() {
        Ok(status) => format!("ended with {status}"),
        Err(error) => format!("cannot be asked how it ended: {error}"),
    }
}

/// Somebody else answers at the same path now, and the guest is as it was.
fn verify(qmp: &Path, child: &Child, before: &GuestStatus) -> anyhow::Result<()> {
    let mut client = QmpClient::connect(qmp).context("the new process does not answer")?;
    let peer = client
        .peer()
        .map(|pid| pid.as_raw_nonzero().get().unsigned_abs());
    ensure!(
        peer == Some(child.id()),
        "the guest has moved to process {}, but another one answers at {}",
        child.id(),
        qmp.display()
    );
    let after: GuestStatus = client.query("query-status")?;
    if before.running && !after.running {
        bail!(
            "the guest ran before the upgrade and is stopped in the new process, which is process {}",
            child.id()
        );
    }
    Ok(())
}

/// The old process has nothing left to do.
fn end(mut client: QmpClient, old: Pid) -> anyhow::Result<()> {
    let process = pidfd_open(old, PidfdFlags::empty()).context("cannot watch the old process")?;
    client.execute("quit", json!({}))?;
    let timeout = Timespec {
        tv_sec: i64::try_from(END_DEADLINE.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: 0,
    };
    let ended = poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&timeout));
    ensure!(
        ended.is_ok_and(|ended| ended > 0),
        "the guest is in the new process, but the old one, process {old}, does not end"
    );
    Ok(())
}

impl Done {
    /// Says what has happened.
    pub(super) fn show(&self, json: bool) -> anyhow::Result<()> {
        if json {
            return Ok(output::line(format_args!("{:#}", self.json()))?);
        }
        for line in self.lines() {
            output::line(format_args!("{line}"))?;
        }
        Ok(())
    }

    fn is_same_process(&self) -> bool {
        self.old.as_raw_nonzero().get().unsigned_abs() == self.new
    }

    /// The parts of the blackout under the names that they have here.
    fn parts(&self) -> Vec<(&'static str, u64)> {
        let Some(parts) = self.record.blackout() else {
            return Vec::new();
        };
        vec![
            ("stopping the vCPUs", parts.pause_us),
            ("waiting for you", parts.pre_switchover_us),
            ("devices letting go", parts.dirty_fetch_us),
            ("handing descriptors over", parts.last_round_us),
            ("saving device state", parts.device_state_us),
            ("starting the new program", parts.exec_us),
            ("building the machine", parts.build_us),
            ("loading it", parts.load_us),
            ("commit", parts.commit_us),
            ("resuming the vCPUs", parts.resume_us),
            ("verifying", parts.verify_us),
        ]
    }

    /// As far as the VM says; QEMU knows whole milliseconds, if anything.
    fn total_us(&self) -> Option<u64> {
        let whole = self.record.blackout().map(|parts| parts.total_us);
        whole.or_else(|| self.record.downtime_ms().map(|ms| ms * 1000))
    }

    fn json(&self) -> Value {
        let parts: serde_json::Map<_, _> = self
            .parts()
            .into_iter()
            .map(|(name, us)| (format!("{}-us", name.replace(' ', "-")), us.into()))
            .collect();
        json!({
            "mode": if self.is_same_process() { "exec" } else { "transfer" },
            "old-pid": self.old.as_raw_nonzero().get(),
            "new-pid": self.new,
            "blackout-us": self.total_us(),
            "blackout-parts": parts,
            "total-us": u64::try_from(self.whole.as_micros()).unwrap_or(u64::MAX),
        })
    }

    fn lines(&self) -> Vec<String> {
        let whole = u64::try_from(self.whole.as_micros()).unwrap_or(u64::MAX);
        let who = match self.is_same_process() {
            true => format!("process {} goes on as the new program after", self.new),
            false => format!(
                "process {} has taken the guest over from process {} in",
                self.new, self.old
            ),
        };
        let mut lines = vec![format!("{who} {}", duration(whole))];
        lines.extend(
            self.total_us()
                .map(|us| format!("blackout {}", duration(us))),
        );
        let parts = self.parts().into_iter().filter(|(_, us)| *us > 0);
        lines.extend(parts.map(|(name, us)| format!("  {name} {}", duration(us))));
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::super::fake::Fake;
    use super::*;

    #[test]
    fn the_new_process_is_told_what_the_vm_is_and_not_how_it_came() {
        let cmdline = b"/old/vmferry\0--log\0debug\0run\0--mem\x001G\0--incoming\0unix:/tmp/x\0--qmp\0q\0--paused\0\
            --incoming-cpr=inherited\0--end-with-parent\x0012\0--incoming=defer\0--vcpus\x002\0";
        assert_eq!(
            arguments(cmdline, &OF_THE_ARRIVAL),
            [
                "--log", "debug", "run", "--mem", "1G", "--qmp", "q", "--vcpus", "2"
            ]
        );
        let same_parent = arguments(cmdline, OF_THE_GUESTS_ARRIVAL);
        assert!(same_parent.contains(&"--end-with-parent".into()));
        assert!(!same_parent.contains(&"--paused".into()));
    }

    #[test]
    fn the_environment_is_read_with_empty_values_and_equal_signs() {
        let environ: Vec<_> =
            environment(b"A=1\0EMPTY=\0VMFERRY_CPR_EXEC=7\0B=x=y\0nonsense\0").collect();
        let expected = [("A", "1"), ("EMPTY", ""), ("B", "x=y")];
        assert_eq!(environ, expected.map(|(a, b)| (a.into(), b.into())));
    }

    #[test]
    fn an_upgrade_that_is_given_up_leaves_the_operators_mode() {
        let fake = Fake::vmferry("running", &[]);
        let operators = json!({"mode": "cpr-reboot", "cpr-exec-command": ["theirs"]});
        fake.set(&operators);
        let mut client = QmpClient::connect(&fake.path()).unwrap();
        let before = Before::of(&mut client, &["mode"]).unwrap();
        fake.set(&json!({"mode": "cpr-transfer"}));
        let mut child = Command::new("false").spawn().unwrap();
        let ended = give_up(&mut client, &before, &mut child);
        assert!(ended.contains("exit status: 1"), "{ended}");
        assert_eq!(fake.parameters(), operators);
    }
}
