//! An attempt to have a VM's process become another program, followed from outside.
//!
//! The connection ends with the exec, but not only with it: whoever answers next is asked whether it is still the program that was told.
//! A QEMU says `completed` just before it executes the other, and `failed` thereafter if it cannot. So `completed` counts only where the
//! other program says it.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde_json::{Value, json};

use super::process::VmProcess;
use super::{Before, Failed, HandOver, LOOK_EVERY, Patience, same_process};
use crate::cli::client::{ClientError, QmpClient};
use crate::cli::record::Record;
use crate::migration::status::MigrationStatus;

/// The parameter with the words of the new program.
const COMMAND: &str = "cpr-exec-command";

/// What is attempted.
#[derive(Debug)]
pub(super) struct Attempt<'a> {
    pub(super) process: &'a VmProcess,
    /// Where both programs listen.
    pub(super) qmp: &'a Path,
    /// The new program and its arguments.
    pub(super) words: &'a [String],
    /// How long the old program may take, and then the new one.
    pub(super) patience: Patience,
}

/// An attempt that has come to its end.
#[derive(Debug)]
pub(super) struct Over {
    /// Whichever program the process is now.
    pub(super) client: QmpClient,
    /// What that says.
    pub(super) record: Record,
    /// Whether there was an exec. Perhaps two: a vmferry that cannot go on becomes the old program again.
    pub(super) executed: bool,
}

/// Who is asked, and for how long.
struct Following {
    hand_over: HandOver,
    executed: bool,
}

impl Attempt<'_> {
    /// Makes it. The parameters that it sets are put back unless the new program has the guest, or may have it.
    pub(super) fn make(&self, mut client: QmpClient, migrate: Value) -> Result<Over, Failed> {
        let before = Before::of(&mut client, &["mode", COMMAND]).map_err(Failed::Refused)?;
        let parameters = json!({"mode": "cpr-exec", COMMAND: self.words});
        client
            .execute("migrate-set-parameters", parameters)
            .map_err(|error| Failed::Refused(error.into()))?;
        let mut following = Following {
            hand_over: HandOver::new(self.patience),
            executed: false,
        };
        let begun = following.hand_over.begin(&mut client, migrate);
        let mut end = begun.and_then(|()| following.end(&mut client));
        loop {
            let (error, last) = match end {
                Ok(record) => {
                    if record.status() != MigrationStatus::Completed {
                        before.restore(&mut client);
                    }
                    let executed = following.executed;
                    return Ok(Over {
                        client,
                        record,
                        executed,
                    });
                }
                Err(Failed::Refused(error)) => {
                    before.restore(&mut client);
                    return Err(Failed::Refused(error));
                }
                Err(Failed::Lost(error, last)) => (error, last),
            };
            if following.hand_over.is_given_up() {
                return Err(Failed::Lost(error, last));
            }
            // A monitor of QEMU serves one client at a time.
            drop(client);
            client = match self.reconnect() {
                Ok(client) => client,
                Err(gone) => return Err(Failed::Lost(error.context(format!("{gone:#}")), last)),
            };
            end = match self.has_executed(&mut client, following.executed) {
                Ok(executed) => {
                    following.is_with(executed);
                    following.end(&mut client)
                }
                Err(error) => Err(Failed::Lost(error.into(), last)),
            };
        }
    }

    /// Whether another program answers than the one that was told. That one would have been told these words; what comes after an exec
    /// starts with the parameters of its command line.
    fn has_executed(&self, client: &mut QmpClient, known: bool) -> Result<bool, ClientError> {
        if known {
            return Ok(true);
        }
        let parameters = client.execute("query-migrate-parameters", json!({}))?;
        Ok(parameters[COMMAND] != json!(self.words))
    }

    /// Connects to whichever program the process is now.
    fn reconnect(&self) -> anyhow::Result<QmpClient> {
        let began = Instant::now();
        let pid = self.process.number();
        loop {
            thread::sleep(LOOK_EVERY);
            match QmpClient::connect(self.qmp) {
                Ok(client) if same_process(&client, pid.unsigned_abs()) => return Ok(client),
                Ok(_) => bail!(
                    "another process than {pid} answers at {}",
                    self.qmp.display()
                ),
                Err(error) if began.elapsed() >= self.patience.work => {
                    return Err(error).context("the VM's process lives and does not answer");
                }
                Err(_) => {}
            }
            let ended = self.process.ends(Duration::ZERO);
            if ended.context("cannot watch the process")? {
                bail!("process {pid} has ended, and the guest with it");
            }
        }
    }
}

impl Following {
    /// Another program may have come.
    fn is_with(&mut self, executed: bool) {
        if executed && !self.executed {
            self.executed = true;
            self.hand_over.is_beyond_cancel();
        }
    }

    fn end(&mut self, client: &mut QmpClient) -> Result<Record, Failed> {
        let executed = self.executed;
        let over = |status: MigrationStatus| match status {
            // Its exec is still to come, or this is of another migration.
            MigrationStatus::Completed => executed,
            status => status.is_end(),
        };
        self.hand_over.end(client, over)
    }
}
