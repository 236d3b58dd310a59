//! `vmferry migrate`: starts a migration over QMP and follows it.

use clap::{Args, ValueEnum};
use serde_json::json;
use vmferry_transport::control::{Address, AddressError};

use super::client::QmpClient;
use super::exit::Exit;
use super::follow::{OnInterrupt, Options, Outcome, Show, follow, summary};
use super::record::Record;
use super::signals::Signals;
use super::status::GuestStatus;
use super::style::Colours;
use super::{QmpArgs, output};
use crate::migration::status::MigrationStatus;

#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  \
    vmferry migrate --qmp /tmp/source.qmp tcp:192.0.2.7:4444\n  \
    vmferry migrate --qmp /tmp/source.qmp unix:/tmp/target.sock --streams 4 --json\n  \
    vmferry migrate --qmp /tmp/source.qmp tcp:192.0.2.7:4444 --detach\n\n\
    Exit status: 0 the guest has moved, 1 it has not, 3 cancelled, 4 the VM stopped\n\
    answering, so that the outcome is not known, 130 detached.\n\n\
    Ctrl-C while following asks whether to cancel the migration or to detach and\n\
    let it go on; a second Ctrl-C detaches. Where nobody can be asked (no terminal),\n\
    SIGINT detaches, unless --on-interrupt says otherwise; SIGTERM and SIGHUP always\n\
    do. Losing its watcher never changes what happens to a VM.")]
pub(super) struct MigrateArgs {
    #[command(flatten)]
    vm: QmpArgs,
    /// Where the target waits, such as tcp:HOST:PORT or unix:PATH
    #[arg(value_name = "ADDR", value_parser = parse_address)]
    address: Address,
    /// Data connections, 1 to 255 [default: as set in the VM, 2 at first]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..))]
    streams: Option<u8>,
    /// How the guest moves: cpr-reboot saves it into file:PATH while its memory stays in the file that it is in (`vmferry run
    /// --mem-path`) [default: as set in the VM, normal at first]
    #[arg(long, value_enum, value_name = "MODE")]
    mode: Option<Mode>,
    /// Follow it to the end, which is what happens without any option too
    #[arg(long)]
    watch: bool,
    /// Print the final record as JSON instead of a summary
    #[arg(long)]
    json: bool,
    /// Show no progress
    #[arg(long)]
    quiet: bool,
    /// Return as soon as the migration has begun
    #[arg(long, conflicts_with_all = ["watch", "quiet", "on_interrupt"])]
    detach: bool,
    /// What Ctrl-C does
    #[arg(long, value_enum, value_name = "WHAT", default_value_t = OnInterrupt::Ask)]
    on_interrupt: OnInterrupt,
}

/// Modes that need nobody at the other end.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum Mode {
    Normal,
    CprReboot,
}

impl Mode {
    fn set(self, client: &mut QmpClient) -> anyhow::Result<()> {
        let name = match self {
            Self::Normal => "normal",
            Self::CprReboot => "cpr-reboot",
        };
        client.execute("migrate-set-parameters", json!({ "mode": name }))?;
        Ok(())
    }
}

impl MigrateArgs {
    pub(super) fn execute(self) -> anyhow::Result<Exit> {
        let mut client = QmpClient::connect(&self.vm.qmp)?;
        // From here on a signal must not end us between the start and the first look.
        let signals = Signals::take()?;
        if let Some(streams) = self.streams {
            set_streams(&mut client, streams)?;
        }
        if let Some(mode) = self.mode {
            mode.set(&mut client)?;
        }
        client.execute("migrate", json!({ "uri": self.address }))?;
        if self.detach {
            if self.json {
                let record: serde_json::Value = client.query("query-migrate")?;
                output::line(format_args!("{record:#}"))?;
            }
            return Ok(Exit::Done);
        }
        let options = Options {
            qmp: self.vm.qmp.clone(),
            show: if self.quiet {
                Show::Nothing
            } else {
                Show::Progress
            },
            on_interrupt: self.on_interrupt,
            look_around: false,
        };
        let record = match follow(&mut client, &signals, &options) {
            Outcome::Ended(record) => record,
            Outcome::Detached(signal) => {
                self.say_detached();
                return Ok(Exit::Detached(signal));
            }
            Outcome::Lost(error, last) => return Ok(lost(&error, &last)),
        };
        if self.json {
            output::line(format_args!("{:#}", record.json()))?;
        }
        if self.json || self.quiet {
            let outcome = record.status();
            if outcome == MigrationStatus::Cancelled {
                output::message(&format!("migration {outcome}"));
            }
            explain(&record, client.query("query-status").ok());
            return Ok(Exit::of(outcome));
        }
        conclude(&record, &mut client)
    }

    fn say_detached(&self) {
        let qmp = self.vm.qmp.display();
        output::message(&format!(
            "detached; the migration goes on. See `vmferry status --watch --qmp {qmp}` and `vmferry cancel --qmp {qmp}`"
        ));
    }
}

/// Says how a migration ended, and what became of the guest.
pub(super) fn conclude(record: &Record, client: &mut QmpClient) -> anyhow::Result<Exit> {
    for line in summary(record, Colours::of_stdout()) {
        output::line(format_args!("{line}"))?;
    }
    explain(record, client.query("query-status").ok());
    Ok(Exit::of(record.status()))
}

/// Says that the VM cannot be asked any more, and what that means.
pub(super) fn lost(error: &dyn std::error::Error, last: &Record) -> Exit {
    output::message(&format!(
        "lost sight of the migration, which was in `{}`: {}",
        last.status_name(),
        output::chain(error)
    ));
    output::message(
        "how it ends is not known here: its process may have died, or only its monitor. Before starting the guest anywhere, ask \
         the other side (`vmferry status`); if the target runs it, it has moved",
    );
    Exit::Lost
}

/// Several data connections need the capability `multifd` in QEMU; vmferry takes it as a matter of course.
pub(super) fn set_streams(client: &mut QmpClient, streams: u8) -> anyhow::Result<()> {
    let multifd = json!({ "capabilities": [{ "capability": "multifd", "state": true }] });
    client.execute("migrate-set-capabilities", multifd)?;
    client.execute(
        "migrate-set-parameters",
        json!({ "multifd-channels": streams }),
    )?;
    Ok(())
}

/// Why it did not work, and how the guest is.
fn explain(record: &Record, status: Option<GuestStatus>) {
    match (record.status(), record.error()) {
        (MigrationStatus::Completed, _) => return,
        // Whoever did that knows why.
        (MigrationStatus::Cancelled, _) => {}
        (outcome, Some(reason)) => output::message(&format!("migration {outcome}: {reason}")),
        (outcome, None) => output::message(&format!(
            "migration {outcome}; this VM gives no reason, its log may"
        )),
    }
    let incoming = record.total_ms().is_none() && !record.listening().is_empty();
    output::message(match status {
        Some(_) if incoming => "the guest has not arrived; it is where it was",
        Some(status) if status.running => "the guest goes on running at the source",
        Some(_) => "the guest is stopped at the source",
        None => "the source does not answer any more",
    });
}

/// An address on the command line.
pub(super) fn parse_address(text: &str) -> Result<Address, String> {
    text.parse().map_err(|error: AddressError| error.reason)
}
