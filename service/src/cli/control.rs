//! One command each for what an operator can do to a migration: cancel, pause, continue, incoming, yank, resolve.

use clap::{Args, ValueEnum};
use serde_json::{Value, json};
use vmferry_transport::control::Address;

use super::client::QmpClient;
use super::exit::Exit;
use super::follow::{OnInterrupt, Options, Outcome, Show, follow};
use super::migrate::{lost, parse_address};
use super::record::Record;
use super::signals::Signals;
use super::{QmpArgs, output};
use crate::migration::status::MigrationStatus;

/// Which VM, and how to answer.
#[derive(Args, Debug)]
pub(super) struct Common {
    #[command(flatten)]
    vm: QmpArgs,
    /// Print what the VM says about the migration afterwards, as JSON
    #[arg(long)]
    json: bool,
}

impl Common {
    fn connect(&self) -> anyhow::Result<QmpClient> {
        Ok(QmpClient::connect(&self.vm.qmp)?)
    }

    /// Says what has been done: `text`, or the record.
    fn say(&self, client: &mut QmpClient, text: &str) -> anyhow::Result<Exit> {
        if self.json {
            let record: Value = client.query("query-migrate")?;
            output::line(format_args!("{record:#}"))?;
        } else {
            output::line(format_args!("{text}"))?;
        }
        Ok(Exit::Done)
    }
}

#[derive(Args, Debug)]
#[command(after_help = "Example:\n  vmferry cancel --qmp /tmp/source.qmp\n\n\
    Waits until the guest is back at the source. Succeeds if there is nothing to\n\
    cancel. After the commit a migration cannot be cancelled any more: then the exit\n\
    status is 1.")]
pub(super) struct CancelArgs {
    #[command(flatten)]
    common: Common,
}

impl CancelArgs {
    pub(super) fn execute(self) -> anyhow::Result<Exit> {
        let mut client = self.common.connect()?;
        let signals = Signals::take()?;
        let before = Record::new(client.query("query-migrate")?);
        if before.status().is_idle() {
            return self
                .common
                .say(&mut client, "there is no migration under way");
        }
        client.execute("migrate_cancel", json!({}))?;
        let options = Options {
            qmp: self.common.vm.qmp.clone(),
            show: Show::Nothing,
            on_interrupt: OnInterrupt::Detach,
            look_around: false,
        };
        let record = match follow(&mut client, &signals, &options) {
            Outcome::Ended(record) => record,
            Outcome::Detached(signal) => return Ok(Exit::Detached(signal)),
            Outcome::Lost(error, last) => return Ok(lost(&error, &last)),
        };
        if self.common.json {
            output::line(format_args!("{:#}", record.json()))?;
        } else {
            output::line(format_args!("{}", record.status_name()))?;
        }
        // It may have been faster.
        Ok(match record.status() {
            MigrationStatus::Completed => Exit::Failed,
            _ => Exit::Done,
        })
    }
}

#[derive(Args, Debug)]
#[command(after_help = "Example:\n  vmferry pause --qmp /tmp/source.qmp\n\n\
    Breaks the link of a post-copy migration on purpose (migrate-pause), so that it\n\
    can be recovered over another one. A pre-copy migration is not paused but\n\
    cancelled, and its guest is paused with `stop` over QMP.")]
pub(super) struct PauseArgs {
    #[command(flatten)]
    common: Common,
}

impl PauseArgs {
    pub(super) fn execute(self) -> anyhow::Result<Exit> {
        let mut client = self.common.connect()?;
        client.execute_out_of_band("migrate-pause", json!({}))?;
        self.common.say(&mut client, "the migration is paused")
    }
}

#[derive(Args, Debug)]
#[command(after_help = "Example:\n  \
    vmferry capabilities --qmp /tmp/source.qmp pause-before-switchover=on\n  \
    vmferry migrate --qmp /tmp/source.qmp tcp:192.0.2.7:4444 --detach\n  \
    vmferry continue --qmp /tmp/source.qmp\n\n\
    A migration with the capability pause-before-switchover stops the guest, and then\n\
    waits for this before it switches over.")]
pub(super) struct ContinueArgs {
    #[command(flatten)]
    common: Common,
    /// The status in which it waits; if it is in another one, nothing happens
    #[arg(long, value_name = "STATUS", default_value = "pre-switchover")]
    state: String,
}

impl ContinueArgs {
    pub(super) fn execute(self) -> anyhow::Result<Exit> {
        let mut client = self.common.connect()?;
        client.execute("migrate-continue", json!({ "state": self.state }))?;
        self.common.say(&mut client, "the migration goes on")
    }
}

#[derive(Args, Debug)]
#[command(after_help = "Example:\n  \
    vmferry run --mem 1G --qmp /tmp/target.qmp --incoming defer\n  \
    vmferry incoming --qmp /tmp/target.qmp tcp:0.0.0.0:4444\n  \
    vmferry status --qmp /tmp/target.qmp --watch\n\n\
    For a VM that was started with `--incoming defer` (QEMU: -incoming defer).")]
pub(super) struct IncomingArgs {
    #[command(flatten)]
    common: Common,
    /// Where to wait for the guest, such as tcp:HOST:PORT or unix:PATH
    #[arg(value_name = "ADDR", value_parser = parse_address)]
    address: Address,
}

impl IncomingArgs {
    pub(super) fn execute(self) -> anyhow::Result<Exit> {
        let mut client = self.common.connect()?;
        client.execute("migrate-incoming", json!({ "uri": self.address }))?;
        let record = Record::new(client.query("query-migrate")?);
        // The kernel may have chosen the port.
        let at = match record.listening().join(", ") {
            none if none.is_empty() => self.address.to_string(),
            some => some,
        };
        self.common
            .say(&mut client, &format!("waiting for a guest at {at}"))
    }
}

#[derive(Args, Debug)]
#[command(after_help = "Example:\n  vmferry yank --qmp /tmp/source.qmp\n\n\
    Shuts the connections of a migration whose peer or network does not answer, at\n\
    once. The migration then fails as if the link had been cut; before the commit the\n\
    guest goes on at the source. Works while the VM waits for its network, too.")]
pub(super) struct YankArgs {
    #[command(flatten)]
    common: Common,
}

impl YankArgs {
    pub(super) fn execute(self) -> anyhow::Result<Exit> {
        let mut client = self.common.connect()?;
        let known = client.execute_out_of_band("query-yank", json!({}))?;
        let migration = json!({ "type": "migration" });
        if known.as_array().is_none_or(|all| !all.contains(&migration)) {
            return self
                .common
                .say(&mut client, "there is no migration to yank");
        }
        client.execute_out_of_band("yank", json!({ "instances": [migration] }))?;
        self.common
            .say(&mut client, "the connections of the migration are shut")
    }
}

#[derive(Args, Debug)]
#[command(
    after_help = "Example:\n  vmferry resolve --qmp /tmp/source.qmp target-runs\n\n\
    Only for a source that lost its target at the commit and says so (`vmferry status`,\n\
    event x-MIGRATION_UNRESOLVED). Look at the target first. `source-runs` starts the\n\
    guest here: say it only if the target does not run the guest and never will,\n\
    because its process has ended. Two running copies destroy the guest's disks."
)]
pub(super) struct ResolveArgs {
    #[command(flatten)]
    common: Common,
    /// Which side has the guest
    #[arg(value_enum)]
    outcome: Side,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum Side {
    /// The target never will run the guest; resume it at the source
    SourceRuns,
    /// The target has the guest; the source stays stopped for good
    TargetRuns,
}

impl ResolveArgs {
    pub(super) fn execute(self) -> anyhow::Result<Exit> {
        let mut client = self.common.connect()?;
        let (outcome, said) = match self.outcome {
            Side::SourceRuns => ("source-runs", "the guest goes on at the source"),
            Side::TargetRuns => ("target-runs", "the guest is the target's"),
        };
        client.execute("x-resolve", json!({ "outcome": outcome }))?;
        self.common.say(&mut client, said)
    }
}
