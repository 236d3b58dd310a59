//! Upgrades a VM without another process: its own becomes the new program. QEMU can do that too, from 10.2 on, with a file for the state.
//!
//! The connection to it ends with the exec, so the outcome is learnt at the same path from whichever program answers there: the new one,
//! or the old one again, with the reason.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};

use super::attempt::{Attempt, Over};
use super::process::VmProcess;
use super::qemu::goes_on;
use super::vmferry::{Done, OF_THE_GUESTS_ARRIVAL, arguments, command_line};
use super::{Failed, HAND_OVER, Patience, judge};
use crate::cli::client::{ClientError, QmpClient};
use crate::cli::exit::Exit;
use crate::cli::output;
use crate::cli::record::Record;
use crate::cli::status::GuestStatus;
use crate::migration::status::MigrationStatus;

/// The process that shall become another program.
#[derive(Debug)]
struct Vm<'a> {
    process: &'a VmProcess,
    qmp: &'a Path,
    patience: Patience,
}

/// Upgrades the VM behind `client`, which listens at `qmp` and is `process`; `binary` is the new program, this one if there is none.
pub(super) fn upgrade(
    client: QmpClient,
    process: &VmProcess,
    qmp: &Path,
    binary: Option<PathBuf>,
    json: bool,
) -> anyhow::Result<Exit> {
    let program = match binary {
        // As a name in PATH would be found from here.
        Some(program) if program.components().count() > 1 => std::path::absolute(program)?,
        Some(program) => program,
        None => std::env::current_exe().context("cannot find the program that is running")?,
    };
    let words = arguments(&command_line(process.pid())?, OF_THE_GUESTS_ARRIVAL);
    let words = [program.into_os_string()].into_iter().chain(words);
    let vm = Vm {
        process,
        qmp,
        patience: HAND_OVER,
    };
    vm.upgrade(client, &texts(words)?, json)
}

/// The same for a VM of QEMU; `command` is its new command line.
pub(super) fn upgrade_qemu(
    client: QmpClient,
    process: &VmProcess,
    qmp: &Path,
    command: Vec<OsString>,
    json: bool,
) -> anyhow::Result<Exit> {
    let vm = Vm {
        process,
        qmp,
        patience: HAND_OVER,
    };
    vm.upgrade_qemu(client, command, json)
}

impl Vm<'_> {
    fn attempt<'a>(&'a self, words: &'a [String]) -> Attempt<'a> {
        Attempt {
            process: self.process,
            qmp: self.qmp,
            words,
            patience: self.patience,
        }
    }

    fn upgrade(&self, mut client: QmpClient, words: &[String], json: bool) -> anyhow::Result<Exit> {
        let began = Instant::now();
        let before: GuestStatus = client.query("query-status")?;
        let Over {
            mut client, record, ..
        } = match self.attempt(words).make(client, json!({})) {
            Ok(over) => over,
            Err(Failed::Refused(error)) => return Err(error),
            Err(Failed::Lost(error, last)) => return Ok(self.lost(&error, &last, None)),
        };
        if record.status() != MigrationStatus::Completed {
            output::message(&format!(
                "upgrade {}: {}; the guest goes on in the old program",
                record.status(),
                reason(&record)
            ));
            return Ok(Exit::Failed);
        }
        let after: GuestStatus = match client.query("query-status") {
            Ok(after) => after,
            Err(error) => return self.after_the_exec(error.into(), &record),
        };
        judge(&before, &after)?;
        self.done(record, began).show(json)?;
        Ok(Exit::Done)
    }

    fn upgrade_qemu(
        &self,
        mut client: QmpClient,
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
        let over = match self.attempt(&words).make(client, channels) {
            Ok(over) => over,
            Err(Failed::Refused(error)) => return Err(error),
            Err(Failed::Lost(error, last)) => {
                // The new program may still have to read it.
                let _ = folder.keep();
                return Ok(self.lost(&error, &last, Some(&state)));
            }
        };
        let Over {
            mut client,
            record,
            executed,
        } = over;
        match record.status() {
            MigrationStatus::Completed => {}
            status if executed => {
                // Nobody else has it any more.
                let _ = folder.keep();
                bail!(
                    "the new program, process {}, has not loaded the guest, which is stopped ({status}): {}; \
                     its state is in {}",
                    self.process.number(),
                    reason(&record),
                    state.display()
                );
            }
            status => bail!("the upgrade {status}: {}", reason(&record)),
        }
        if let Err(error) = goes_on(&mut client, before.running, self.patience.work) {
            let error = error.context("the new program has the guest");
            return self.after_the_exec(error, &record);
        }
        self.done(record, began).show(json)?;
        Ok(Exit::Done)
    }

    fn done(&self, record: Record, began: Instant) -> Done {
        Done {
            record,
            old: self.process.pid(),
            new: self.process.number().unsigned_abs(),
            whole: began.elapsed(),
        }
    }

    /// Something is wrong with a guest that has arrived; what, nobody knows if the VM does not answer.
    fn after_the_exec(&self, error: anyhow::Error, last: &Record) -> anyhow::Result<Exit> {
        let told = error.downcast_ref::<ClientError>();
        match told.is_none_or(ClientError::is_answer) {
            true => Err(error),
            false => Ok(self.lost(&error, last, None)),
        }
    }

    /// Says that the outcome is not known, and where to look; `state` is what the new program may still read.
    fn lost(&self, error: &anyhow::Error, last: &Record, state: Option<&Path>) -> Exit {
        let pid = self.process.number();
        output::message(&format!(
            "lost sight of the upgrade, which was in `{}`: {error:#}",
            last.status_name()
        ));
        let state =
            state.map(|path| format!(" The state that it may still load is in {}", path.display()));
        output::message(&format!(
            "how it ends is not known here. If process {pid} lives, it has the guest, and nobody else: ask it \
             (`vmferry status --qmp {}`).{}",
            self.qmp.display(),
            state.unwrap_or_default()
        ));
        Exit::Lost
    }
}

fn reason(record: &Record) -> String {
    let reason = record.error();
    reason.unwrap_or_else(|| "no reason is known".to_owned())
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rustix::process::Pid;

    use super::super::fake::Fake;
    use super::super::fake::Step::{End, Exec, For, HangUp, Is, LastWord, UntilCancel};
    use super::*;

    const LONG: Duration = Duration::from_secs(60);
    const SHORT: Duration = Duration::from_millis(30);
    /// Nothing that shall end well waits for this.
    const IN_A_HURRY: Patience = Patience {
        work: SHORT,
        cancel: SHORT,
    };

    /// Upgrades it, in this process.
    fn upgrade_within(fake: &Fake, patience: Patience) -> anyhow::Result<Exit> {
        let process = VmProcess::open(rustix::process::getpid()).unwrap();
        let qmp = fake.path();
        let client = QmpClient::connect(&qmp).unwrap();
        let vm = Vm {
            process: &process,
            qmp: &qmp,
            patience,
        };
        let command = ["/opt/new", "-m", "1G", "-S"];
        let done = match client.is_qemu() {
            true => vm.upgrade_qemu(client, command.map(OsString::from).to_vec(), true),
            false => vm.upgrade(client, &command.map(str::to_owned), true),
        };
        fake.assert_right();
        done
    }

    fn upgrade(fake: &Fake) -> anyhow::Result<Exit> {
        upgrade_within(fake, HAND_OVER)
    }

    /// The guest stays, and so do the parameters of its operator and nothing else.
    fn assert_stayed(fake: &Fake, mode: &Value) {
        assert_eq!(&fake.parameters(), mode);
        assert_eq!(fake.guest(), "running");
    }

    /// Removes the folder that must be there still.
    fn remove_kept(fake: &Fake) {
        std::fs::remove_dir_all(fake.file().parent().unwrap()).unwrap();
    }

    #[test]
    fn a_qemu_knows_the_mode_if_its_schema_lists_it() {
        let schema = |modes: Value| json!([{"name": "9", "meta-type": "enum", "values": modes}]);
        assert!(knows_exec(&schema(json!(["normal", "cpr-exec"]))));
        assert!(!knows_exec(&schema(json!(["normal", "cpr-transfer"]))));
        assert!(!knows_exec(&json!({})));
    }

    #[test]
    fn a_qemu_is_told_what_to_become_and_where_its_state_is_and_is_found_again() {
        let steps = [
            Is("setup"),
            Is("device"),
            Exec,
            Is("active"),
            Is("completed"),
        ];
        let fake = Fake::qemu("running", &steps);
        assert_eq!(upgrade(&fake).unwrap(), Exit::Done);
        let (_, set) = &fake.asked("migrate-set-parameters")[0];
        assert_eq!(set["mode"], "cpr-exec");
        let words = set["cpr-exec-command"].as_array().unwrap();
        assert_eq!(words[..5], ["/opt/new", "-m", "1G", "-S", "-incoming"]);
        let (_, migrate) = &fake.asked("migrate")[0];
        let main = &migrate["channels"][0]["addr"];
        let file = format!("file:{}", main["filename"].as_str().unwrap());
        assert_eq!(words[5], file.as_str());
        assert!(!fake.file().exists(), "the state is left behind");
    }

    #[test]
    fn a_qemu_that_is_completed_and_has_not_executed_yet_is_left_in_peace() {
        let steps = [
            vec![Is("device")],
            vec![Is("completed"); 5],
            // Not everybody who hangs up becomes another.
            vec![HangUp, Is("completed"), HangUp, HangUp, Is("completed")],
            vec![Exec, HangUp, Is("active"), HangUp, Is("completed")],
        ];
        let fake = Fake::qemu("running", &steps.concat());
        assert_eq!(upgrade(&fake).unwrap(), Exit::Done);
        assert_eq!(fake.asked("migrate-set-parameters").len(), 1);
    }

    #[test]
    fn a_qemu_that_cannot_execute_fails_and_keeps_the_guest_and_the_operators_parameters() {
        let operators = json!({"mode": "cpr-reboot", "cpr-exec-command": ["/opt/theirs"]});
        let reason = "execvp /opt/new failed";
        let failed = For("failed", reason);
        for steps in [
            vec![Is("completed"), Is("completed"), failed.clone()],
            vec![Is("active"), HangUp, Is("completed"), failed.clone()],
            vec![Is("device"), Is("failing"), failed],
        ] {
            let fake = Fake::qemu("running", &steps);
            fake.set(&operators);
            let error = format!("{:#}", upgrade(&fake).unwrap_err());
            assert!(error.contains(reason), "{error}");
            assert_stayed(&fake, &operators);
            assert!(!fake.file().parent().unwrap().exists());
        }
        for fake in [
            Fake::qemu("running", &[Is("none")]),
            Fake::vmferry("running", &[Is("none")]),
        ] {
            fake.set(&operators);
            fake.refuse("a device objects");
            let error = format!("{:#}", upgrade(&fake).unwrap_err());
            assert!(error.contains("a device objects"), "{error}");
            assert_stayed(&fake, &operators);
        }
    }

    #[test]
    fn a_guest_that_ran_goes_on_although_the_command_line_says_stopped() {
        let steps = [Is("completed"), Exec, Is("active"), Is("completed")];
        let fake = Fake::qemu("running", &steps);
        assert_eq!(upgrade(&fake).unwrap(), Exit::Done);
        assert_eq!(fake.guest(), "running");
        let fake = Fake::qemu("paused", &steps);
        assert_eq!(upgrade(&fake).unwrap(), Exit::Done);
        assert_eq!(fake.guest(), "paused", "nobody had it run");
        assert!(fake.asked("cont").is_empty());
    }

    #[test]
    fn what_comes_to_no_end_is_cancelled_and_then_given_up_with_the_state_kept() {
        let steps = [UntilCancel("active"), Is("cancelling"), Is("cancelled")];
        let fake = Fake::qemu("running", &steps);
        let at_once = Patience {
            work: Duration::ZERO,
            cancel: LONG,
        };
        let error = upgrade_within(&fake, at_once).unwrap_err().to_string();
        assert!(error.contains("cancelled"), "{error}");
        assert_eq!(fake.parameters()["mode"], "normal");
        for stuck in [
            vec![Is("active")],
            vec![Is("completed")],
            vec![Is("active"), HangUp, Is("device")],
            vec![HangUp],
        ] {
            let fake = Fake::qemu("running", &stuck);
            assert_eq!(upgrade_within(&fake, IN_A_HURRY).unwrap(), Exit::Lost);
            // It may still execute what it was told to.
            assert_eq!(fake.parameters()["mode"], "cpr-exec");
            remove_kept(&fake);
            let fake = Fake::vmferry("running", &stuck);
            assert_eq!(upgrade_within(&fake, IN_A_HURRY).unwrap(), Exit::Lost);
        }
        let fake = Fake::qemu("running", &[Exec, Is("active")]);
        assert_eq!(upgrade_within(&fake, IN_A_HURRY).unwrap(), Exit::Lost);
        let cancels = fake.asked("migrate_cancel");
        assert!(!cancels.contains(&(true, json!({}))), "the guest has moved");
        remove_kept(&fake);
    }

    #[test]
    fn a_vmferry_is_asked_again_until_its_migration_has_ended() {
        let reason = "it has no such device";
        let back = For("failed", reason);
        for (steps, exit) in [
            (
                vec![Is("device"), Exec, Is("active"), Is("completed")],
                Exit::Done,
            ),
            (
                vec![
                    Is("active"),
                    HangUp,
                    Is("active"),
                    Exec,
                    HangUp,
                    Is("completed"),
                ],
                Exit::Done,
            ),
            (
                vec![Is("active"), HangUp, Is("active"), back.clone()],
                Exit::Failed,
            ),
            (vec![Is("device"), Exec, Is("active"), back], Exit::Failed),
            // What is left of the last upgrade says nothing of this one.
            (
                vec![HangUp, Is("completed"), Is("active"), Exec, Is("completed")],
                Exit::Done,
            ),
        ] {
            let fake = Fake::vmferry("running", &steps);
            assert_eq!(upgrade(&fake).unwrap(), exit, "{steps:?}");
            assert_eq!(fake.parameters()["mode"], "normal");
            assert_eq!(fake.guest(), "running");
        }
    }

    #[test]
    fn a_vm_that_stops_answering_leaves_the_outcome_open() {
        let arrived = [Exec, LastWord("completed")].to_vec();
        for (steps, patience, kept) in [
            (vec![Is("device"), End], IN_A_HURRY, true),
            (vec![Exec, End], IN_A_HURRY, true),
            (arrived, HAND_OVER, false),
        ] {
            let fake = Fake::qemu("running", &steps);
            assert_eq!(upgrade_within(&fake, patience).unwrap(), Exit::Lost);
            assert_eq!(fake.file().parent().unwrap().exists(), kept);
            if kept {
                remove_kept(&fake);
            }
            let fake = Fake::vmferry("running", &steps);
            assert_eq!(upgrade_within(&fake, patience).unwrap(), Exit::Lost);
        }
    }

    #[test]
    fn the_state_stays_if_the_new_program_cannot_load_it() {
        let failed = For("failed", "unknown section");
        let fake = Fake::qemu("running", &[Is("completed"), Exec, Is("active"), failed]);
        let error = format!("{:#}", upgrade(&fake).unwrap_err());
        let file = fake.file();
        let told = ["unknown section", file.to_str().unwrap()];
        assert!(told.iter().all(|part| error.contains(part)), "{error}");
        assert_eq!(std::fs::read(&file).unwrap(), b"state");
        remove_kept(&fake);
    }

    #[test]
    fn every_cause_of_a_loss_is_told() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let dead = VmProcess::open(Pid::from_child(&child)).unwrap();
        child.wait().unwrap();
        let alive = VmProcess::open(rustix::process::getpid()).unwrap();
        for (process, part) in [
            (&dead, "has ended, and the guest"),
            (&alive, "can be reached"),
        ] {
            let fake = Fake::vmferry("running", &[Is("device"), End]);
            let qmp = fake.path();
            let client = QmpClient::connect(&qmp).unwrap();
            let attempt = Attempt {
                process,
                qmp: &qmp,
                words: &["/opt/new".to_owned()],
                patience: Patience {
                    work: SHORT,
                    cancel: LONG,
                },
            };
            let Err(Failed::Lost(error, last)) = attempt.make(client, json!({})) else {
                panic!("it is known how it ended");
            };
            let error = format!("{error:#}");
            assert!(error.contains(part) && error.contains("hung up"), "{error}");
            assert_eq!(last.status_name(), "device");
        }
    }
}
