//! Upgrades a VM of QEMU with its own `cpr-transfer`: a new process with the same command line and two more channels takes the descriptors
//! of the memory from the old one, then the device state.
//!
//! The old process keeps the guest until it says `completed`; whatever goes wrong before, it goes on there and the new process ends.

use std::ffi::OsString;
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};

use super::process::{KeptSockets, VmProcess, listening, wait_for};
use super::{Before, Failed, channels, hand_over, same_process};
use crate::cli::client::QmpClient;
use crate::cli::exit::Exit;
use crate::cli::migrate::lost;
use crate::cli::output;
use crate::cli::record::Record;
use crate::cli::size::duration;
use crate::cli::status::GuestStatus;
use crate::migration::status::MigrationStatus;

/// How long a process may take to start and to listen.
const START: Duration = Duration::from_secs(30);
/// How long the old process may take to end.
const QUIT: Duration = Duration::from_secs(30);

/// Upgrades the VM behind `client`; `command` starts its successor.
pub(super) fn upgrade(
    mut client: QmpClient,
    old: &VmProcess,
    qmp: &Path,
    command: &[OsString],
    json: bool,
) -> anyhow::Result<Exit> {
    let was: GuestStatus = client.query("query-status")?;
    let before = Before::of(&mut client, &["mode"])?;
    let dir = tempfile::TempDir::with_prefix("vmferry-upgrade-")?;
    let channels = channels(dir.path());
    let mut command = without_incoming(command);
    for channel in &channels {
        command.push("-incoming".into());
        command.push(channel.to_string().into());
    }
    let began = Instant::now();
    let mut new = Successor(Some(old.start_another(&command)?));
    let (pid, cpr) = (new.child().id(), dir.path().join("cpr"));
    // The path is there a moment before anybody listens, and who only tries to connect is taken for the old process.
    wait_for(new.child(), "waited for the VM", START, || {
        listening(pid).is_ok_and(|paths| paths.contains(&cpr))
    })?;
    client
        .execute("migrate-set-parameters", json!({ "mode": "cpr-transfer" }))
        .context("this QEMU hands nothing over; it takes 10.0 or newer")?;
    let record = match hand_over(&mut client, &channels) {
        Ok(record) => record,
        Err(Failed::Refused(error)) => {
            before.restore(&mut client);
            return Err(error);
        }
        Err(Failed::Lost(error, last)) => {
            // The new process may have the guest: it must live, and whoever finds out decides.
            new.0 = None;
            // Where the old process asks for the outcome.
            let _ = dir.keep();
            return Ok(lost(error.as_ref(), &last));
        }
    };
    if record.status() != MigrationStatus::Completed {
        before.restore(&mut client);
    }
    match (record.status(), record.error()) {
        (MigrationStatus::Completed, _) => {}
        (status, Some(reason)) => bail!("the hand-over {status}: {reason}"),
        (status, None) => bail!("the hand-over {status}"),
    }
    // From here on the guest is the new process's, which must live.
    let mut child = new.0.take().context("the new process is gone")?;
    let took = began.elapsed();
    arrived(qmp, &mut child, was.running).with_context(|| {
        format!(
            "the guest has been handed over to process {}; the old one, {}, is left as it is",
            child.id(),
            old.number()
        )
    })?;
    let kept = KeptSockets::of(child.id()).context("cannot look where the new process listens")?;
    end(client, old, kept, QUIT)?;
    show(old, child.id(), took, &record, json)?;
    Ok(Exit::Done)
}

/// The old process has nothing left to do. It removes the names of its sockets on its way out, which are the new one's now, and clients
/// find them there all the same.
fn end(
    mut client: QmpClient,
    old: &VmProcess,
    kept: KeptSockets,
    patience: Duration,
) -> anyhow::Result<()> {
    // It may hang up before it answers.
    let _ = client.execute("quit", json!({}));
    let ended = kept.while_ends(old, patience);
    if ended.context("cannot wait for the old process")? {
        return kept
            .restore()
            .context("the new process runs the guest, but one of its sockets has lost its name");
    }
    let pid = old.number();
    bail!(
        "the new process runs the guest, but the old one, {pid}, does not end. It has no guest any more: kill -9 {pid}. Then, or when it \
         ends by itself and takes the names of the new one's sockets with it: {}",
        kept.commands()
    )
}

fn show(
    old: &VmProcess,
    new: u32,
    took: Duration,
    record: &Record,
    as_json: bool,
) -> anyhow::Result<()> {
    let took_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
    if as_json {
        let report = json!({
            "old-pid": old.number(),
            "new-pid": new,
            // As QEMU says it, which is no finer.
            "blackout-us": record.downtime_ms().map(|ms| ms * 1000),
            "total-us": took_us,
            "migration": record.json(),
        });
        output::line(format_args!("{report:#}"))?;
        return Ok(());
    }
    output::line(format_args!(
        "process {new} has taken the guest over from process {} in {}",
        old.number(),
        duration(took_us)
    ))?;
    if let Some(downtime) = record.downtime_ms() {
        output::line(format_args!("blackout {}", duration(downtime * 1000)))?;
    }
    Ok(())
}

/// Looks whether the new process has the guest, and lets it run if it did before.
fn arrived(qmp: &Path, child: &mut Child, running: bool) -> anyhow::Result<()> {
    let pid = child.id();
    let mut client = None;
    wait_for(child, "opened its monitor", START, || {
        client = QmpClient::connect(qmp)
            .ok()
            .filter(|client| same_process(client, pid));
        client.is_some()
    })?;
    goes_on(&mut client.context("its monitor is gone")?, running, START)
}

/// Waits until the new program has the guest, and lets it run if it `ran` in the old one.
pub(super) fn goes_on(client: &mut QmpClient, ran: bool, patience: Duration) -> anyhow::Result<()> {
    let deadline = Instant::now() + patience;
    loop {
        let status: Value = client.query("query-status")?;
        match status["status"].as_str() {
            // Not there yet.
            Some("inmigrate") => {}
            _ if !ran || status["running"] == true => return Ok(()),
            // Its command line says that it waits for an operator, who has let the old one run.
            Some("paused") => drop(client.execute("cont", json!({}))?),
            _ => {}
        }
        ensure!(
            Instant::now() < deadline,
            "the guest does not go on there: it is {status}"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The command without what would have it wait for another guest, or leave us.
pub(super) fn without_incoming(command: &[OsString]) -> Vec<OsString> {
    let mut kept = Vec::new();
    let mut words = command.iter();
    while let Some(word) = words.next() {
        if word == "-incoming" || word == "--incoming" {
            words.next();
        } else if word != "-daemonize" && word != "--daemonize" {
            kept.push(word.clone());
        }
    }
    kept
}

/// A process that ends if it does not get the guest.
struct Successor(Option<Child>);

impl Successor {
    fn child(&mut self) -> &mut Child {
        self.0.as_mut().expect("taken at the end only")
    }
}

impl Drop for Successor {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            // It has ended by itself, or ends now.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::path::PathBuf;
    use std::process::{Command, Stdio};
    use std::thread;

    use rustix::process::Pid;

    use super::super::fake::Fake;
    use super::super::fake::Step::Is;
    use super::*;

    /// A new process's socket, and an old process that runs these commands of a shell, with the path of the socket as `$0`.
    struct Scene {
        _dir: tempfile::TempDir,
        path: PathBuf,
        _listener: UnixListener,
        shell: Child,
        old: VmProcess,
        fake: Fake,
    }

    impl Scene {
        fn new(commands: &str) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("qmp");
            let listener = UnixListener::bind(&path).unwrap();
            let shell = Command::new("sh")
                .args(["-c", commands])
                .arg(&path)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let old = VmProcess::open(Pid::from_child(&shell)).unwrap();
            let fake = Fake::qemu("postmigrate", &[Is("completed")]);
            Self {
                _dir: dir,
                path,
                _listener: listener,
                shell,
                old,
                fake,
            }
        }

        fn end(&self, kept: KeptSockets, patience: Duration) -> anyhow::Result<()> {
            let client = QmpClient::connect(&self.fake.path()).unwrap();
            end(client, &self.old, kept, patience)
        }

        /// A second name for the socket; which this is.
        fn keep(&self) -> (KeptSockets, PathBuf) {
            let kept = KeptSockets::at(vec![self.path.clone()], 7);
            (kept, self.path.with_file_name(".qmp.upgrade-7"))
        }

        fn is_found(&self) -> bool {
            UnixStream::connect(&self.path).is_ok()
        }
    }

    impl Drop for Scene {
        fn drop(&mut self) {
            // It has ended, or has nobody to end it.
            let _ = self.shell.kill();
            let _ = self.shell.wait();
        }
    }

    #[test]
    fn the_monitor_is_found_while_an_old_process_that_has_removed_it_takes_its_time() {
        let mut scene = Scene::new("rm \"$0\"; echo; read line");
        let (kept, second) = scene.keep();
        let (input, output) = (scene.shell.stdin.take(), scene.shell.stdout.take());
        let found = thread::scope(|scope| {
            let ending = scope.spawn(|| scene.end(kept, Duration::from_secs(60)));
            output.unwrap().read_exact(&mut [0]).unwrap();
            let deadline = Instant::now() + Duration::from_secs(50);
            let mut found = false;
            while !found && Instant::now() < deadline {
                found = scene.is_found();
            }
            drop(input);
            ending.join().unwrap().unwrap();
            found
        });
        assert!(found && scene.is_found());
        assert!(!second.exists());
        assert_eq!(scene.fake.asked("quit").len(), 1);
    }

    #[test]
    fn an_old_process_that_ends_late_takes_no_name_that_cannot_be_put_back() {
        let mut scene = Scene::new("read line; rm \"$0\"");
        let (kept, second) = scene.keep();
        let error = scene.end(kept, Duration::from_millis(20)).unwrap_err();
        let error = error.to_string();
        let command = format!("mv '{}' '{}'", second.display(), scene.path.display());
        assert!(
            error.contains("kill -9") && error.contains(&command),
            "{error}"
        );
        assert!(scene.is_found());
        drop(scene.shell.stdin.take());
        scene.shell.wait().unwrap();
        assert!(!scene.is_found(), "the old process has removed it");
        let shell = Command::new("sh").args(["-c", &command]).status();
        assert!(shell.unwrap().success());
        assert!(scene.is_found());
    }

    #[test]
    fn the_successor_waits_for_this_guest_and_no_other() {
        let old = ["qemu", "-m", "1G", "-incoming", "defer", "-daemonize", "-S"];
        let old: Vec<OsString> = old.map(OsString::from).to_vec();
        assert_eq!(without_incoming(&old), ["qemu", "-m", "1G", "-S"]);
        assert_eq!(
            without_incoming(&["qemu".into(), "--incoming".into()]),
            ["qemu"]
        );
    }
}
