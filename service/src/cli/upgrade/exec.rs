//! Upgrades a VM of vmferry without another process: its own becomes the new program.
//!
//! The connection to it ends with the exec, so the outcome is learnt at the same path from whichever program answers there: the new one,
//! or the old one again, with the reason.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use rustix::process::Pid;
use serde_json::json;

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
    let words: Vec<String> = words
        .map(OsString::into_string)
        .collect::<Result<_, _>>()
        .map_err(|word| anyhow::anyhow!("{word:?} cannot be said over QMP, which takes UTF-8"))?;
    let record = match run(&mut client, &words) {
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

/// Has the process become the new program; the record of an attempt that has ended without an exec.
///
/// # Errors
/// A refusal; or the connection has ended, as it does with an exec.
fn run(client: &mut QmpClient, words: &[String]) -> Result<Record, ClientError> {
    let parameters = json!({"mode": "cpr-exec", "cpr-exec-command": words});
    client.execute("migrate-set-parameters", parameters)?;
    client.execute("migrate", json!({}))?;
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
