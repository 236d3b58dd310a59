//! What the demo found, for people and for programs.

use std::fmt;

use serde_json::{Map, Value, json};

use super::member;
use crate::cli::size::{Size, duration, rate};
use crate::qmp::schema::{MigrationInfo, RunState, StatusInfo, WorkloadInfo};

/// Everything that was seen.
#[derive(Clone, Debug)]
pub(super) struct Findings {
    pub(super) accelerator: &'static str,
    pub(super) mem_bytes: u64,
    pub(super) address: String,
    /// The source's last `query-migrate`.
    pub(super) record: MigrationInfo,
    pub(super) populated_target_bytes: Option<u64>,
    /// Passes of the guest just before the migration.
    pub(super) passes_at_source: u64,
    /// The guest's own account just after its arrival.
    pub(super) arrived: WorkloadInfo,
    /// And some seconds later.
    pub(super) later: WorkloadInfo,
    pub(super) source: StatusInfo,
    pub(super) target: StatusInfo,
}

/// One thing that must hold.
#[derive(Clone, Debug, PartialEq)]
struct Check {
    name: &'static str,
    passed: bool,
    details: String,
}

/// Findings and what they mean.
#[derive(Clone, Debug)]
pub(super) struct Report {
    findings: Findings,
    checks: Vec<Check>,
}

impl Report {
    pub(super) fn new(findings: Findings) -> Self {
        let checks = vec![
            ram_check(&findings.record),
            state_check(&findings.record),
            self_check(&findings),
            owner_check(&findings),
            sum_check(&findings.record),
        ];
        Self { findings, checks }
    }

    /// Nothing differs and nothing is missing.
    pub(super) fn passed(&self) -> bool {
        self.checks.iter().all(|check| check.passed)
    }

    pub(super) fn json(&self) -> Value {
        let Findings {
            accelerator,
            mem_bytes,
            address,
            record,
            populated_target_bytes,
            passes_at_source,
            arrived,
            later,
            source,
            target,
        } = &self.findings;
        let checks: Map<_, _> = self
            .checks
            .iter()
            .map(|check| {
                member(
                    check.name,
                    json!({ "passed": check.passed, "details": check.details }),
                )
            })
            .collect();
        json!({
            "passed": self.passed(),
            "accelerator": accelerator,
            "mem-bytes": mem_bytes,
            "address": address,
            "migration": record,
            "populated-target-bytes": populated_target_bytes,
            "passes-at-source": passes_at_source,
            "workload-on-arrival": arrived,
            "workload-later": later,
            "source": source,
            "target": target,
            "checks": checks,
        })
    }
}

fn ram_check(record: &MigrationInfo) -> Check {
    let (passed, details) = match &record.x_verification {
        None => (false, "the processes did not compare it".to_owned()),
        Some(found) if found.ram_hash_source.is_empty() => (false, "there is no hash".to_owned()),
        Some(found) if found.ram_hash_source == found.ram_hash_target => {
            (true, format!("{} on both sides", found.ram_hash_source))
        }
        Some(found) => (
            false,
            format!(
                "{} at the source, {} at the target",
                found.ram_hash_source, found.ram_hash_target
            ),
        ),
    };
    Check {
        name: "RAM at the pause",
        passed,
        details,
    }
}

fn state_check(record: &MigrationInfo) -> Check {
    let equal = record
        .x_verification
        .as_ref()
        .map(|found| found.vcpus_equal);
    let details = match equal {
        Some(true) => "equal on both sides",
        Some(false) => "differs",
        None => "the processes did not compare it",
    };
    Check {
        name: "vCPU state",
        passed: equal == Some(true),
        details: details.to_owned(),
    }
}

fn self_check(findings: &Findings) -> Check {
    let Findings {
        arrived,
        later,
        passes_at_source,
        ..
    } = findings;
    let went_on = arrived.passes >= *passes_at_source && later.passes > arrived.passes;
    let mut details = format!(
        "{} to {} passes, {} wrong pages",
        arrived.passes, later.passes, later.errors
    );
    if let Some(gpa) = later.first_error_gpa {
        details.push_str(&format!(", the first at {gpa:#x}"));
    }
    Check {
        name: "guest's own check",
        passed: went_on && later.errors == 0,
        details,
    }
}

fn owner_check(findings: &Findings) -> Check {
    let Findings { source, target, .. } = findings;
    let passed = target.running && !source.running && source.status == RunState::Postmigrate;
    let word = |status: &StatusInfo| if status.running { "running" } else { "stopped" };
    let details = format!("source {}, target {}", word(source), word(target));
    Check {
        name: "one owner",
        passed,
        details,
    }
}

fn sum_check(record: &MigrationInfo) -> Check {
    let (passed, details) = match &record.x_blackout {
        None => (false, "was not measured".to_owned()),
        Some(blackout) => {
            let sum: u64 = blackout.parts().iter().map(|(_, us)| us).sum();
            let details = format!(
                "parts {}, total {}",
                duration(sum),
                duration(blackout.total_us)
            );
            (sum == blackout.total_us && blackout.total_us > 0, details)
        }
    };
    Check {
        name: "blackout adds up",
        passed,
        details,
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.write_migration(f)?;
        self.write_blackout(f)?;
        writeln!(f)?;
        for Check {
            name,
            passed,
            details,
        } in &self.checks
        {
            let mark = if *passed { "ok  " } else { "FAIL" };
            writeln!(f, "  {mark}  {name:<18} {details}")?;
        }
        writeln!(f)?;
        match self.passed() {
            true => writeln!(f, "The guest moved and nothing of it was lost."),
            false => writeln!(f, "Something is wrong, see FAIL above."),
        }
    }
}

impl Report {
    fn write_migration(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Findings {
            record,
            accelerator,
            mem_bytes,
            address,
            later,
            ..
        } = &self.findings;
        let unknown = || "unknown".to_owned();
        let size = |bytes: Option<u64>| bytes.map_or_else(unknown, |bytes| Size(bytes).to_string());
        writeln!(f)?;
        writeln!(
            f,
            "  guest        {} of RAM, accelerator {accelerator}",
            Size(*mem_bytes)
        )?;
        let connections = record
            .x_connections
            .map_or_else(unknown, |count| count.to_string());
        let backend = record.x_backend.as_deref().unwrap_or("unknown");
        writeln!(
            f,
            "  path         {address}, {connections} data connections, {backend}"
        )?;
        if let Some(ram) = &record.ram {
            let us = record.total_time.unwrap_or(0).saturating_mul(1000);
            let rounds = record.x_round.unwrap_or(ram.dirty_sync_count);
            writeln!(f, "  rounds       {rounds}")?;
            writeln!(
                f,
                "  sent         {} in {}, {}/s",
                Size(ram.transferred),
                duration(us),
                rate(ram.transferred, us)
            )?;
        }
        writeln!(
            f,
            "  memory       {} exist at the source, {} at the target",
            size(record.x_populated_source),
            size(self.findings.populated_target_bytes)
        )?;
        writeln!(
            f,
            "  longest gap  {} seen by the guest itself, comparison included",
            duration(later.longest_gap_us)
        )
    }

    fn write_blackout(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(blackout) = &self.findings.record.x_blackout else {
            return Ok(());
        };
        let own_us = blackout.total_us.saturating_sub(blackout.verify_us);
        writeln!(
            f,
            "  blackout     {}, plus {} for the demo's comparison of both sides",
            duration(own_us),
            duration(blackout.verify_us)
        )?;
        for (name, us) in blackout.parts() {
            writeln!(f, "    {name:<18} {:>8}", duration(us))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qmp::schema::{BlackoutInfo, RamInfo, VerificationInfo};

    fn good() -> Findings {
        let hash = "0123456789abcdef0123456789abcdef".to_owned();
        Findings {
            accelerator: "KVM",
            mem_bytes: 1 << 30,
            address: "tcp:127.0.0.1:4444".into(),
            record: MigrationInfo {
                ram: Some(RamInfo {
                    transferred: 600 << 20,
                    ..Default::default()
                }),
                total_time: Some(500),
                x_round: Some(3),
                x_blackout: Some(BlackoutInfo {
                    total_us: 30,
                    pause_us: 10,
                    verify_us: 20,
                    ..Default::default()
                }),
                x_verification: Some(VerificationInfo {
                    ram_hash_source: hash.clone(),
                    ram_hash_target: hash,
                    vcpus_equal: true,
                }),
                ..Default::default()
            },
            populated_target_bytes: Some(600 << 20),
            passes_at_source: 5,
            arrived: WorkloadInfo {
                passes: 7,
                ..Default::default()
            },
            later: WorkloadInfo {
                passes: 9,
                ..Default::default()
            },
            source: StatusInfo {
                running: false,
                status: RunState::Postmigrate,
            },
            target: StatusInfo {
                running: true,
                status: RunState::Running,
            },
        }
    }

    #[test]
    fn a_good_migration_passes_and_is_told_in_80_columns() {
        let report = Report::new(good());
        assert!(report.passed(), "{report}");
        let text = report.to_string();
        assert!(
            text.lines().all(|line| line.chars().count() <= 80),
            "{text}"
        );
        assert!(
            text.contains("rounds       3") && text.contains("1200 MiB/s")
                || text.contains("1.17 GiB/s"),
            "{text}"
        );
        assert_eq!(report.json()["passed"], true);
    }

    #[test]
    fn anything_that_differs_or_is_missing_fails() {
        type Spoil = fn(&mut Findings);
        let spoilers: [Spoil; 11] = [
            |f| f.record.x_verification = None,
            |f| {
                f.record
                    .x_verification
                    .as_mut()
                    .unwrap()
                    .ram_hash_target
                    .push('0')
            },
            |f| {
                f.record.x_verification = Some(VerificationInfo {
                    vcpus_equal: true,
                    ..Default::default()
                })
            },
            |f| f.record.x_verification.as_mut().unwrap().vcpus_equal = false,
            |f| f.later.passes = f.arrived.passes,
            |f| f.later.errors = 1,
            |f| f.arrived.passes = f.passes_at_source - 1,
            |f| f.source.running = true,
            |f| f.target.running = false,
            |f| f.record.x_blackout = None,
            |f| f.record.x_blackout.as_mut().unwrap().total_us += 1,
        ];
        for (number, spoil) in spoilers.iter().enumerate() {
            let mut findings = good();
            spoil(&mut findings);
            let report = Report::new(findings);
            assert!(!report.passed(), "number {number}");
            assert!(report.to_string().contains("FAIL"));
        }
    }
}
