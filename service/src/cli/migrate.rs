//! `vmferry migrate`: starts a migration over QMP and follows it.

use std::process::ExitCode;

use anyhow::Context;
use clap::Args;
use serde_json::json;
use vmferry_transport::control::{Address, AddressError};

use super::client::QmpClient;
use super::status::GuestStatus;
use super::{QmpArgs, follow, output};
use crate::migration::status::MigrationStatus;
use crate::qmp::schema::MigrationInfo;

#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  \
    vmferry migrate --qmp /tmp/source.qmp tcp:192.0.2.7:4444\n  \
    vmferry migrate --qmp /tmp/source.qmp unix:/tmp/target.sock --streams 4 --json\n\n\
    Exit status 0 means that the guest has moved. Ctrl-C stops following, not the\n\
    migration; `vmferry cancel` stops that.")]
pub(super) struct MigrateArgs {
    #[command(flatten)]
    vm: QmpArgs,
    /// Where the target waits: tcp:HOST:PORT or unix:PATH
    #[arg(value_name = "ADDR", value_parser = parse_address)]
    address: Address,
    /// Data connections, 1 to 255 [default: as set in the VM, 2 at first]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..))]
    streams: Option<u8>,
    /// Print the final record as JSON instead of a summary
    #[arg(long)]
    json: bool,
    /// Show no progress
    #[arg(long)]
    quiet: bool,
    /// Return as soon as the migration has begun
    #[arg(long, conflicts_with = "json")]
    detach: bool,
}

impl MigrateArgs {
    pub(super) fn execute(self) -> anyhow::Result<ExitCode> {
        let mut client = QmpClient::connect(&self.vm.qmp)?;
        if let Some(streams) = self.streams {
            set_streams(&mut client, streams)?;
        }
        client.execute("migrate", json!({ "uri": self.address }))?;
        if self.detach {
            return Ok(ExitCode::SUCCESS);
        }
        let mut display = follow::display(self.quiet);
        let (record, info) = follow::wait_for_end(&mut client, display.as_mut(), &|| false)
            .context("lost sight of the migration")?;
        if self.json {
            output::line(format_args!("{record:#}"))?;
        } else if !self.quiet {
            for line in follow::summary(&info) {
                output::line(format_args!("{line}"))?;
            }
        }
        if info.status == Some(MigrationStatus::Completed) {
            return Ok(ExitCode::SUCCESS);
        }
        explain(&info, client.query("query-status").ok());
        Ok(ExitCode::FAILURE)
    }
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
fn explain(info: &MigrationInfo, status: Option<GuestStatus>) {
    let outcome = info.status.unwrap_or_default();
    match &info.error_desc {
        Some(reason) => output::note(format_args!("vmferry: migration {outcome}: {reason}")),
        None => output::note(format_args!("vmferry: migration {outcome}")),
    }
    let guest = match status {
        Some(status) if status.running => "the guest goes on running at the source",
        Some(_) => "the guest is stopped at the source",
        None => "the source does not answer any more",
    };
    output::note(format_args!("vmferry: {guest}"));
}

fn parse_address(text: &str) -> Result<Address, String> {
    text.parse().map_err(|error: AddressError| error.reason)
}
