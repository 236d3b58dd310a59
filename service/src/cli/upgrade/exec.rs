//! Upgrades a VM without another process: its own becomes the new program. QEMU can do that too, from 10.2 on, with a file for the state.
//!
//! The connection to it ends with the exec, so the outcome is learnt at the same path from whichever program answers there: the new one,
//! or the old one again, with the reason.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use rustix::process::Pid;
use serde_json::{Value, json};

use super::process::VmProcess;
use super::vmferry::{Done, OF_THE_GUESTS_ARRIVAL, arguments, command_line};
use super::{HAND_OVER, LOOK_EVERY, same_process};
use crate::cli::client::{ClientError, QmpClient};
use crate::cli::exit::Exit;
use crate::cli::migrate::lost;
use crate::cli::output;
use crate::cli::record::Record;
use crate::cli::status::GuestStatus;
use crate::migration::status::MigrationStatus;

/// Upgrades the VM behind `client`, which listens at `qmp` and is process `pid`; `binary` is the new program, this one if there is none.
pub(super) fn upgrade(
    mut client: QmpClient,
    pid: Pid,
    qmp: &Path,
    binary: Option<PathBuf>,
    json: bool,
) -> anyhow::Result<Exit> {
    let began = Instant::now();
    let process = VmProcess::open(pid)?;
    let before: GuestStatus = client.query("query-status")?;
    let program = match binary {
        // As a name in PATH would be found from here.
        Some(program) if program.components().count() > 1 => std::path::absolute(program)?,
        Some(program) => program,
        None => std::env::current_exe().context("cannot find the program that is running")?,
    };
    let words = arguments(&command_line(pid)?, OF_THE_GUESTS_ARRIVAL);
    let words = [program.into_os_string()].into_iter().chain(words);
    let words = texts(words)?;
    let record = match run(&mut client, &words, json!({})) {
        Ok(record) => record,
        Err(error) if error.is_answer() => {
            as_before(&mut client);
            return Err(error.into());
        }
        // As it should be; or the process has ended.
        Err(error) => match reconnect(&process, qmp) {
            Ok(new) => {
                client = new;
                Record::new(client.execute("query-migrate", json!({}))?)
            }
            Err(gone) => {
                let error = anyhow::Error::from(error).context(gone);
                return Ok(lost(error.as_ref(), &Record::default()));
            }
        },
    };
    if record.status() != MigrationStatus::Completed {
        as_before(&mut client);
        let reason = record.error();
        let reason = reason.unwrap_or_else(|| "no reason is known".to_owned());
        output::message(&format!(
            "upgrade {}: {reason}; the guest goes on in the old program",
            record.status()
        ));
        return Ok(Exit::Failed);
    }
    let after: GuestStatus = client.query("query-status")?;
    ensure!(
        after.running || !before.running,
        "the guest ran before the upgrade and is stopped in the new program"
    );
    let done = Done {
        record,
        old: pid,
        new: pid.as_raw_nonzero().get().unsigned_abs(),
        whole: began.elapsed(),
    };
    done.show(json)?;
    Ok(Exit::Done)
}

/// The same for a VM of QEMU; `command` is its new command line.
pub(super) fn upgrade_qemu(
    mut client: QmpClient,
    process: &VmProcess,
    qmp: &Path,
    command: Vec<OsString>,
    json: bool,
) -> anyhow::Result<Exit> {
    let schema = client.execute("query-qmp-schema", json!({}))?;
    ensure!(
        knows_exec(&schema),
        "{} has no mode cpr-exec, which is in QEMU from 10.2 on: leave --mode exec out",
        client.name()
    );
    let began = Instant::now();
    let before: GuestStatus = client.query("query-status")?;
    let folder = tempfile::TempDir::with_prefix("vmferry-upgrade-")?;
    let state = folder.path().join("state");
    let incoming = [
        OsString::from("-incoming"),
        format!("file:{}", state.display()).into(),
    ];
    let words = texts(command.into_iter().chain(incoming))?;
    let main = json!({"transport": "file", "filename": state, "offset": 0});
    let channels = json!({"channels": [{"channel-type": "main", "addr": main}]});
    match run(&mut client, &words, channels) {
        Ok(record) => {
            as_before(&mut client);
            let reason = record
                .error()
                .unwrap_or_else(|| "no reason is known".to_owned());
            bail!("the upgrade {}: {reason}", record.status());
        }
        Err(error) if error.is_answer() => {
            as_before(&mut client);
            return Err(error.into());
        }
        Err(error) => match reconnect(process, qmp) {
            Ok(new) => client = new,
            Err(gone) => {
                // The new program may still read it.
                let _ = folder.keep();
                let error = anyhow::Error::from(error).context(gone);
                return Ok(lost(error.as_ref(), &Record::default()));
            }
        },
    }
    while before.running && !client.query::<GuestStatus>("query-status")?.running {
        let pid = process.number();
        ensure!(
            began.elapsed() < HAND_OVER,
            "the guest does not run in process {pid}"
        );
        thread::sleep(LOOK_EVERY);
    }
    let pid = Pid::from_raw(process.number()).context("no process")?;
    let done = Done {
        record: Record::new(client.execute("query-migrate", json!({}))?),
        old: pid,
        new: pid.as_raw_nonzero().get().unsigned_abs(),
        whole: began.elapsed(),
    };
    done.show(json)?;
    Ok(Exit::Done)
}

/// Whether the schema of a QEMU lists the mode.
fn knows_exec(schema: &Value) -> bool {
    let entities = schema.as_array().into_iter().flatten();
    let values = entities.flat_map(|entity| entity["values"].as_array().into_iter().flatten());
    values.into_iter().any(|value| value == "cpr-exec")
}

fn texts(words: impl Iterator<Item = OsString>) -> anyhow::Result<Vec<String>> {
    words
        .map(OsString::into_string)
        .collect::<Result<_, _>>()
        .map_err(|word| anyhow::anyhow!("{word:?} cannot be said over QMP, which takes UTF-8"))
}

/// Has the process become the new program; the record of an attempt that has ended without an exec.
///
/// # Errors
/// A refusal; or the connection has ended, as it does with an exec.
fn run(client: &mut QmpClient, words: &[String], arguments: Value) -> Result<Record, ClientError> {
    let parameters = json!({"mode": "cpr-exec", "cpr-exec-command": words});
    client.execute("migrate-set-parameters", parameters)?;
    client.execute("migrate", arguments)?;
    let began = Instant::now();
    let mut cancelled = false;
    loop {
        let record = Record::new(client.execute("query-migrate", json!({}))?);
        if record.status().is_end() {
            return Ok(record);
        }
        if began.elapsed() >= HAND_OVER && !cancelled {
            cancelled = true;
            match client.execute("migrate_cancel", json!({})) {
                // Refused when it is too late; the next looks tell.
                Err(error) if !error.is_answer() => return Err(error),
                _ => {}
            }
        }
        thread::sleep(LOOK_EVERY);
    }
}

/// Connects to whichever program the process is now.
fn reconnect(process: &VmProcess, qmp: &Path) -> anyhow::Result<QmpClient> {
    let began = Instant::now();
    let pid = process.number();
    loop {
        match QmpClient::connect(qmp) {
            Ok(client) if same_process(&client, pid.unsigned_abs()) => return Ok(client),
            Ok(_) => bail!("another process than {pid} answers at {}", qmp.display()),
            Err(error) if began.elapsed() >= HAND_OVER => {
                return Err(error).context("the new program does not answer");
            }
            Err(_) => {}
        }
        let patience = Duration::ZERO;
        if process.ends(patience).context("cannot watch the process")? {
            bail!("process {pid} has ended, and the guest with it");
        }
        thread::sleep(LOOK_EVERY);
    }
}

/// The next migration is an ordinary one again.
fn as_before(client: &mut QmpClient) {
    let ordinary = json!({"mode": "normal", "cpr-exec-command": []});
    if let Err(error) = client.execute("migrate-set-parameters", ordinary) {
        output::message(&output::chain(&error));
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_qemu_knows_the_mode_if_its_schema_lists_it() {
        let schema = |modes: Value| json!([{"name": "9", "meta-type": "enum", "values": modes}]);
        assert!(knows_exec(&schema(json!(["normal", "cpr-exec"]))));
        assert!(!knows_exec(&schema(json!(["normal", "cpr-transfer"]))));
        assert!(!knows_exec(&json!({})));
    }

    /// A monitor that answers commands in order and writes down what it was asked, one connection after the other; ends with the last.
    fn monitor(path: &Path, connections: Vec<Vec<Value>>) -> thread::JoinHandle<Vec<Value>> {
        let listener = UnixListener::bind(path).unwrap();
        thread::spawn(move || {
            let mut asked = Vec::new();
            for answers in connections {
                let (stream, _) = listener.accept().unwrap();
                let mut commands = BufReader::new(stream.try_clone().unwrap()).lines();
                let version = json!({"qemu": {"major": 10, "minor": 2, "micro": 0}, "package": ""});
                let greeting = json!({"QMP": {"version": version, "capabilities": []}});
                writeln!(&stream, "{greeting}").unwrap();
                for answer in [json!({})].into_iter().chain(answers) {
                    let command: Value =
                        serde_json::from_str(&commands.next().unwrap().unwrap()).unwrap();
                    writeln!(
                        &stream,
                        "{}",
                        json!({"return": answer, "id": command["id"]})
                    )
                    .unwrap();
                    asked.push(command);
                }
                // The exec, at the next look at the migration.
                drop(commands.next());
            }
            asked
        })
    }

    #[test]
    fn a_qemu_is_told_what_to_become_and_where_its_state_is_and_is_found_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let running = json!({"running": true, "status": "running"});
        let schema = json!([{"meta-type": "enum", "values": ["cpr-exec"]}]);
        let none = json!({});
        let old = vec![schema, running.clone(), none.clone(), none];
        let arriving = json!({"running": false, "status": "inmigrate"});
        let new = vec![arriving, running, json!({"status": "completed"})];
        let monitor = monitor(&path, vec![old, new]);
        let client = QmpClient::connect(&path).unwrap();
        let process = VmProcess::open(rustix::process::getpid()).unwrap();
        let command = ["/opt/qemu", "-m", "1G"].map(OsString::from).to_vec();
        let exit = upgrade_qemu(client, &process, &path, command, true).unwrap();
        assert_eq!(exit, Exit::Done);
        let asked = monitor.join().unwrap();
        let parameters = &asked[3]["arguments"];
        assert_eq!(parameters["mode"], "cpr-exec");
        let words = parameters["cpr-exec-command"].as_array().unwrap();
        assert_eq!(words[..4], ["/opt/qemu", "-m", "1G", "-incoming"]);
        let main = &asked[4]["arguments"]["channels"][0]["addr"];
        let file = format!("file:{}", main["filename"].as_str().unwrap());
        assert_eq!(words[4], file.as_str());
    }
}
