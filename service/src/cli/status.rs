//! `vmferry status` and `vmferry cancel`.

use std::fmt;
use std::process::ExitCode;

use clap::Args;
use serde::Deserialize;
use serde_json::{Value, json};

use super::client::{ClientError, QmpClient};
use super::size::{Size, duration, rate};
use super::{QmpArgs, follow, output};
use crate::migration::status::MigrationStatus;
use crate::qmp::schema::{MigrationInfo, RamInfo, WorkloadInfo};

#[derive(Args, Debug)]
#[command(after_help = "Example:\n  vmferry status --qmp /tmp/source.qmp")]
pub(super) struct StatusArgs {
    #[command(flatten)]
    vm: QmpArgs,
    /// Print one JSON object instead
    #[arg(long)]
    json: bool,
}

impl StatusArgs {
    pub(super) fn execute(self) -> anyhow::Result<ExitCode> {
        let mut client = QmpClient::connect(&self.vm.qmp)?;
        let status: Value = client.query("query-status")?;
        let migration: Value = client.query("query-migrate")?;
        let workload = optional(client.query("x-query-workload"))?;
        if self.json {
            let all = json!({
                "version": client.version(),
                "status": status,
                "migration": migration,
                "workload": workload,
            });
            output::line(format_args!("{all:#}"))?;
            return Ok(ExitCode::SUCCESS);
        }
        output::line(format_args!(
            "{} at {}",
            client.version().package.trim(),
            self.vm.qmp.display()
        ))?;
        output::line(format_args!(
            "  guest      {}",
            client.parse::<GuestStatus>("query-status", &status)?
        ))?;
        let workload: Option<WorkloadInfo> = workload.map(serde_json::from_value).transpose()?;
        if let Some(workload) = workload {
            output::line(format_args!("  workload   {}", workload_line(&workload)))?;
        }
        for line in migration_lines(&serde_json::from_value(migration)?) {
            output::line(format_args!("  migration  {line}"))?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

#[derive(Args, Debug)]
#[command(after_help = "Example:\n  vmferry cancel --qmp /tmp/source.qmp\n\n\
    Succeeds if there is nothing to cancel. After the commit a migration cannot\n\
    be cancelled any more.")]
pub(super) struct CancelArgs {
    #[command(flatten)]
    vm: QmpArgs,
}

impl CancelArgs {
    pub(super) fn execute(self) -> anyhow::Result<ExitCode> {
        let mut client = QmpClient::connect(&self.vm.qmp)?;
        let before: MigrationInfo = client.query("query-migrate")?;
        if before.status.is_none_or(MigrationStatus::is_idle) {
            output::line(format_args!("there is no migration under way"))?;
            return Ok(ExitCode::SUCCESS);
        }
        client.execute("migrate_cancel", json!({}))?;
        let (_, info) = follow::wait_for_end(&mut client, &mut follow::Quiet, &|| false)?;
        let outcome = info.status.unwrap_or_default();
        output::line(format_args!("{outcome}"))?;
        // It may have been faster.
        let too_late = outcome == MigrationStatus::Completed;
        Ok(if too_late {
            ExitCode::FAILURE
        } else {
            ExitCode::SUCCESS
        })
    }
}

/// `query-status` of any VM, whatever states it has.
#[derive(Debug, Deserialize)]
pub(super) struct GuestStatus {
    /// Whether vCPUs run.
    pub(super) running: bool,
    status: String,
}

impl fmt::Display for GuestStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.status)?;
        if self.running {
            Ok(())
        } else {
            f.write_str(" (stopped)")
        }
    }
}

/// `None` if the VM has no such command, or nothing to say to it.
fn optional(answer: Result<Value, ClientError>) -> Result<Option<Value>, ClientError> {
    match answer {
        Ok(value) => Ok(Some(value)),
        Err(ClientError::Refused { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

fn workload_line(workload: &WorkloadInfo) -> String {
    let mut line = format!(
        "{} passes, {} errors, longest gap {}",
        workload.passes,
        workload.errors,
        duration(workload.longest_gap_us)
    );
    if workload.filled_pages < workload.fill_pages {
        let percent = workload.filled_pages * 100 / workload.fill_pages;
        line.push_str(&format!(", {percent}% filled"));
    }
    line
}

fn migration_lines(info: &MigrationInfo) -> Vec<String> {
    let Some(status) = info.status else {
        let listening = info
            .socket_address
            .iter()
            .flatten()
            .filter_map(|a| a.to_address().ok());
        let lines: Vec<_> = listening
            .map(|address| format!("waiting for one at {address}"))
            .collect();
        return if lines.is_empty() {
            vec!["none so far".to_owned()]
        } else {
            lines
        };
    };
    let mut lines = vec![status.to_string()];
    if let Some(ram) = info.ram {
        lines.push(ram_line(status, ram, info.total_time));
    }
    if let Some(blackout) = &info.x_blackout {
        lines.push(format!("blackout {}", duration(blackout.total_us)));
    }
    lines.extend(info.error_desc.clone());
    lines.extend(
        info.blocked_reasons
            .iter()
            .flatten()
            .map(|reason| format!("blocked: {reason}")),
    );
    lines
}

fn ram_line(status: MigrationStatus, ram: RamInfo, total_ms: Option<u64>) -> String {
    let moved = Size(ram.transferred);
    match total_ms.map(|ms| ms.saturating_mul(1000)) {
        // The target of a migration does not count time.
        None => format!("{moved} received"),
        Some(us) if status.is_end() => {
            format!(
                "{moved} sent in {}, {}/s",
                duration(us),
                rate(ram.transferred, us)
            )
        }
        Some(_) => format!(
            "{moved} sent, {} left, {}/s dirtied",
            Size(ram.remaining),
            Size(ram.dirty_pages_rate.saturating_mul(ram.page_size))
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_so_far_is_said_in_words() {
        assert_eq!(migration_lines(&MigrationInfo::default()), ["none so far"]);
        let waiting: MigrationInfo = serde_json::from_value(json!({
            "socket-address": [{"type": "inet", "host": "::1", "port": "4444"}]
        }))
        .unwrap();
        assert_eq!(
            migration_lines(&waiting),
            ["waiting for one at tcp:[::1]:4444"]
        );
    }

    #[test]
    fn a_failure_shows_its_reason() {
        let info = MigrationInfo {
            status: Some(MigrationStatus::Failed),
            ram: Some(RamInfo {
                transferred: 1 << 20,
                ..Default::default()
            }),
            error_desc: Some("the target has less memory".into()),
            total_time: Some(500),
            ..Default::default()
        };
        assert_eq!(
            migration_lines(&info),
            [
                "failed",
                "1 MiB sent in 500 ms, 2 MiB/s",
                "the target has less memory"
            ]
        );
    }
}
