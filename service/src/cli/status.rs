//! `vmferry status`: how a VM and its migration are doing, once or all the time.

use std::fmt;
use std::path::Path;

use clap::Args;
use serde::Deserialize;
use serde_json::{Value, json};

use super::client::{ClientError, QmpClient};
use super::exit::Exit;
use super::follow::{OnInterrupt, Options, Outcome, Show, follow};
use super::record::Record;
use super::signals::Signals;
use super::size::{Size, duration, rate};
use super::style::{Colours, Tone, clean};
use super::{QmpArgs, migrate, output};
use crate::migration::status::MigrationStatus;
use crate::qmp::schema::WorkloadInfo;

#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  vmferry status --qmp /tmp/source.qmp\n  vmferry status --qmp /tmp/target.qmp --watch\n\n\
    --watch follows the migration that is under way, or waits for the first one,\n\
    and ends as `migrate` does, with the same exit status; if the last migration\n\
    is over already, at once. Ctrl-C ends the watching and nothing else (130)."
)]
pub(super) struct StatusArgs {
    #[command(flatten)]
    vm: QmpArgs,
    /// Keep showing it until the migration is over
    #[arg(long)]
    watch: bool,
    /// Print JSON: one object, or with --watch one per line
    #[arg(long)]
    json: bool,
}

impl StatusArgs {
    pub(super) fn execute(self) -> anyhow::Result<Exit> {
        let mut client = QmpClient::connect(&self.vm.qmp)?;
        if self.watch {
            return self.follow(&mut client);
        }
        let mut about = About {
            status: client.query("query-status")?,
            ..About::default()
        };
        let migration = Record::new(client.query("query-migrate")?);
        match client.query("x-query-workload") {
            Ok(workload) => about.workload = Some(workload),
            Err(ClientError::Missing { .. }) => about.no_workload = true,
            // Without a guest there is nothing to tell.
            Err(ClientError::Refused { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        if self.json {
            let all = json!({
                "version": client.version(),
                "status": about.status,
                "migration": migration.json(),
                "workload": about.workload,
            });
            output::line(format_args!("{all:#}"))?;
            return Ok(Exit::Done);
        }
        for line in about.lines(&client.name(), &self.vm.qmp) {
            output::line(format_args!("{line}"))?;
        }
        for line in migration_lines(&migration, Colours::of_stdout()) {
            output::line(format_args!("  migration  {line}"))?;
        }
        Ok(Exit::Done)
    }

    fn follow(&self, client: &mut QmpClient) -> anyhow::Result<Exit> {
        let signals = Signals::take()?;
        let options = Options {
            qmp: self.vm.qmp.clone(),
            show: if self.json {
                Show::Json
            } else {
                Show::Progress
            },
            // Who only looks on is not asked.
            on_interrupt: OnInterrupt::Detach,
            look_around: true,
        };
        match follow(client, &signals, &options) {
            Outcome::Ended(record) if self.json => Ok(Exit::of(record.status())),
            Outcome::Ended(record) => migrate::conclude(&record, client),
            Outcome::Detached(signal) => Ok(Exit::Detached(signal)),
            Outcome::Lost(error, last) => Ok(migrate::lost(&error, &last)),
        }
    }
}

/// The VM apart from its migration.
#[derive(Clone, Debug, Default)]
pub(super) struct About {
    /// Answer to `query-status`.
    pub(super) status: Value,
    /// Answer to `x-query-workload`.
    pub(super) workload: Option<Value>,
    /// The monitor has no such command.
    pub(super) no_workload: bool,
}

impl About {
    /// For people.
    pub(super) fn lines(&self, name: &str, qmp: &Path) -> Vec<String> {
        let guest = GuestStatus::deserialize(&self.status);
        let mut lines = vec![
            format!("{} at {}", clean(name), qmp.display()),
            format!("  guest      {}", guest.unwrap_or_default()),
        ];
        let workload = self.workload.as_ref().map(WorkloadInfo::deserialize);
        if let Some(Ok(workload)) = workload {
            lines.push(format!("  workload   {}", workload_line(&workload)));
        } else if self.no_workload {
            lines.push("  workload   not told (no x-query-workload here)".to_owned());
        }
        lines
    }

    /// For programs.
    pub(super) fn json(&self) -> Value {
        json!({ "status": self.status, "workload": self.workload })
    }
}

/// `query-status` of any VM, whatever states it has.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct GuestStatus {
    /// Whether vCPUs run.
    pub(super) running: bool,
    status: String,
}

impl GuestStatus {
    /// Whether it can never go on.
    pub(super) fn is_broken(&self) -> bool {
        self.status == "internal-error"
    }
}

impl fmt::Display for GuestStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&clean(&self.status))?;
        if self.running {
            Ok(())
        } else {
            f.write_str(" (stopped)")
        }
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
    if workload.disk_blocks_written > 0 {
        line.push_str(&format!(
            ", {} blocks written to disk, {} checked",
            workload.disk_blocks_written, workload.disk_blocks_checked
        ));
    }
    line
}

fn migration_lines(record: &Record, colours: Colours) -> Vec<String> {
    let status = record.status();
    let mut lines = Vec::new();
    if status == MigrationStatus::None && record.listening().is_empty() {
        lines.push("none so far".to_owned());
    } else if status != MigrationStatus::None {
        let tone = match status {
            MigrationStatus::Completed => Tone::Good,
            MigrationStatus::Failed | MigrationStatus::Failing => Tone::Bad,
            _ => Tone::Attention,
        };
        lines.push(colours.paint(tone, &record.status_name()));
    }
    if matches!(status, MigrationStatus::None | MigrationStatus::Setup) {
        let listening = record.listening().into_iter();
        lines.extend(listening.map(|address| format!("waiting for one at {address}")));
    }
    lines.extend(ram_line(record));
    if let Some(blackout) = record.blackout() {
        lines.push(format!("blackout {}", duration(blackout.total_us)));
    } else if let Some(ms) = record.downtime_ms() {
        lines.push(format!("blackout {ms} ms"));
    }
    if let Some(percent) = record.throttle() {
        lines.push(format!("guest throttled {percent}%"));
    }
    lines.extend(record.error());
    let blocked = record.blocked().into_iter();
    lines.extend(blocked.map(|reason| format!("blocked: {reason}")));
    lines
}

fn ram_line(record: &Record) -> Option<String> {
    let bytes = record.ram("transferred")?;
    let moved = Size(bytes);
    Some(match record.total_ms().map(|ms| ms.saturating_mul(1000)) {
        // The target of a migration does not count time.
        None => format!("{moved} received"),
        Some(us) if record.status().is_end() => {
            let rate = rate(bytes, us);
            format!("{moved} sent in {}, {rate}/s", duration(us))
        }
        Some(_) => format!(
            "{moved} sent, {} left, {}/s dirtied",
            Size(record.ram("remaining").unwrap_or(0)),
            Size(record.dirtied().unwrap_or(0))
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(answer: Value) -> Vec<String> {
        migration_lines(&Record::new(answer), Colours::none())
    }

    #[test]
    fn nothing_so_far_is_said_in_words() {
        assert_eq!(lines(json!({})), ["none so far"]);
        let address = json!([{"type": "inet", "host": "::1", "port": "4444"}]);
        assert_eq!(
            lines(json!({"socket-address": address.clone()})),
            ["waiting for one at tcp:[::1]:4444"]
        );
        assert_eq!(
            lines(json!({"status": "setup", "socket-address": address})),
            ["setup", "waiting for one at tcp:[::1]:4444"]
        );
    }

    #[test]
    fn a_failure_shows_its_reason() {
        let found = lines(json!({
            "status": "failed", "ram": {"transferred": 1 << 20}, "total-time": 500,
            "error-desc": "the target has less memory", "blocked-reasons": ["a device"]
        }));
        let expected = [
            "failed",
            "1 MiB sent in 500 ms, 2 MiB/s",
            "the target has less memory",
            "blocked: a device",
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn what_a_monitor_lacks_is_said() {
        let about = About {
            status: json!({"running": true, "status": "running"}),
            no_workload: true,
            ..About::default()
        };
        let expected = [
            "QEMU 10.0.2 at /q",
            "  guest      running",
            "  workload   not told (no x-query-workload here)",
        ];
        assert_eq!(about.lines("QEMU 10.0.2", Path::new("/q")), expected);
    }
}
