//! Upgrades a VM of vmferry.
//!
//! The new process is started as the old one was. It gets the old one's memory, its QMP and metrics sockets and its output; clients find
//! it at the same paths. If anything goes wrong before the guest is handed over it goes on in the old process.
//!
//! Other clients may do to either process what they like meanwhile: what they did is told, and is no failure of the upgrade.

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

use anyhow::{Context, ensure};
use rustix::process::Pid;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::process::VmProcess;
use super::{Before, Failed, channels, hand_over, judge, same_process};
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
/// How long a process that has no guest may take to end.
const END_DEADLINE: Duration = Duration::from_secs(10);
/// How long the old process may take to end when that of which it is asked is over: it tells every server of `--notify`, and each may take
/// its time, up to a minute if the operator says so.
const LAST_WORDS: Duration = Duration::from_secs(300);
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
    process: &VmProcess,
    qmp: &Path,
    binary: Option<PathBuf>,
    json: bool,
) -> anyhow::Result<Exit> {
    let old = process.pid();
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
        Err(Failed::Lost(error, last)) => match taken_over(process, qmp, &mut child) {
            Some(record) => record,
            None => {
                // Where the old process asks for the outcome.
                let _ = place.keep();
                return Ok(lost(error.as_ref(), &last));
            }
        },
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
    let after = arrived(qmp, child.id()).with_context(|| {
        format!("the guest has been handed over; the old process, {old}, is left as it is")
    })?;
    let judged = judge(&before, &after);
    // Whatever the guest does, this one has it no more.
    let ended = end(client, process, LAST_WORDS);
    judged.and(ended)?;
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

/// What the new process says of the hand-over, if the old one has ended without a word: whoever saw before us that it was over may have told
/// it to.
fn taken_over(old: &VmProcess, qmp: &Path, child: &mut Child) -> Option<Record> {
    // One that lives asks the new one itself, and is to be asked.
    if !old.ends(END_DEADLINE).ok()? {
        return None;
    }
    let deadline = Instant::now() + END_DEADLINE;
    while Instant::now() < deadline && matches!(child.try_wait(), Ok(None)) {
        if let Some(record) = has_taken_over(qmp, child.id()) {
            return Some(record);
        }
        thread::sleep(LOOK_EVERY);
    }
    None
}

/// The record of process `new` when it has the guest.
fn has_taken_over(qmp: &Path, new: u32) -> Option<Record> {
    let client = QmpClient::connect(qmp).ok();
    let mut client = client.filter(|client| same_process(client, new))?;
    let record = Record::new(client.execute("query-migrate", json!({})).ok()?);
    (record.status() == MigrationStatus::Completed).then_some(record)
}

/// What the guest does in process `new`, which answers at the same path now.
fn arrived(qmp: &Path, new: u32) -> anyhow::Result<GuestStatus> {
    let connected = QmpClient::connect(qmp);
    let mut client =
        connected.with_context(|| format!("the new process, {new}, does not answer"))?;
    ensure!(
        same_process(&client, new),
        "another process than {new}, to which the guest has moved, answers at {}",
        qmp.display()
    );
    Ok(client.query("query-status")?)
}

/// The old process has nothing left to do. It may have been told by others, and may end before it answers.
fn end(mut client: QmpClient, old: &VmProcess, patience: Duration) -> anyhow::Result<()> {
    let refused = client.execute("quit", json!({})).err();
    let wait = |patience| old.ends(patience).context("cannot watch the old process");
    let soon = END_DEADLINE.min(patience);
    if wait(soon)? {
        return Ok(());
    }
    let pid = old.number();
    if let Some(error) = refused {
        return Err(error).with_context(|| {
            format!("the guest is in the new process, but the old one, {pid}, was not told to end; end it")
        });
    }
    output::message(&format!(
        "the guest is in the new process; the old one, {pid}, is still telling servers of --notify, or stuck"
    ));
    ensure!(
        wait(patience - soon)?,
        "the guest is in the new process, but the old one, {pid}, does not end; it has no guest any more: kill it"
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
    use super::super::fake::Step::{Is, LastWord};
    use super::*;

    /// A process that has ended; another may have its number.
    fn ended() -> VmProcess {
        let mut child = Command::new("true").spawn().unwrap();
        let process = VmProcess::open(Pid::from_child(&child)).unwrap();
        child.wait().unwrap();
        process
    }

    #[test]
    fn an_old_process_that_ends_on_completed_without_being_asked_has_ended() {
        let fake = Fake::vmferry("running", &[Is("device"), LastWord("completed")]);
        let mut client = QmpClient::connect(&fake.path()).unwrap();
        let record = hand_over(&mut client, &[]).unwrap();
        assert_eq!(record.status(), MigrationStatus::Completed);
        end(client, &ended(), Duration::ZERO).unwrap();
        assert_eq!(fake.asked("quit").len(), 1);
    }

    #[test]
    fn an_old_process_that_does_not_end_is_named_with_the_reason() {
        let alive = VmProcess::open(rustix::process::getpid()).unwrap();
        for (step, parts) in [
            (Is("completed"), ["does not end", "kill it"]),
            (LastWord("completed"), ["was not told to end", "hung up"]),
        ] {
            let fake = Fake::vmferry("running", &[step]);
            let mut client = QmpClient::connect(&fake.path()).unwrap();
            hand_over(&mut client, &[]).unwrap();
            let error = end(client, &alive, Duration::from_millis(20)).unwrap_err();
            let error = format!("{error:#}");
            assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        }
    }

    #[test]
    fn the_word_of_the_new_process_counts_when_the_old_one_has_ended_without_one() {
        // The fake has the number of this process.
        let new = std::process::id();
        let fake = Fake::vmferry("running", &[Is("active"), Is("completed")]);
        assert!(has_taken_over(&fake.path(), new).is_none());
        let record = has_taken_over(&fake.path(), new).unwrap();
        assert_eq!(record.status(), MigrationStatus::Completed);
        assert!(has_taken_over(&fake.path(), new + 1).is_none());
        // One that has ended says nothing.
        let mut child = Command::new("false").spawn().unwrap();
        assert!(taken_over(&ended(), &fake.path(), &mut child).is_none());
    }

    #[test]
    fn a_guest_that_somebody_has_stopped_since_is_where_it_should_be() {
        let new = std::process::id();
        let before = arrived(&Fake::vmferry("running", &[]).path(), new).unwrap();
        let stopped = arrived(&Fake::vmferry("paused", &[]).path(), new).unwrap();
        judge(&before, &stopped).unwrap();
        let broken = arrived(&Fake::vmferry("internal-error", &[]).path(), new).unwrap();
        let error = judge(&before, &broken).unwrap_err().to_string();
        assert!(error.contains("cannot go on"), "{error}");
        let elsewhere = arrived(&Fake::vmferry("running", &[]).path(), new + 1);
        assert!(elsewhere.is_err());
    }

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
