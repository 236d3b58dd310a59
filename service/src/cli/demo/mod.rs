//! `vmferry demo`: the main job in one command. Two VM processes on this machine, a guest that writes all the time, one live migration,
//! and a check of everything that can be checked.

mod process;
mod report;

use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use serde_json::{Value, json};
use tempfile::TempDir;
use vmferry_transport::control::Address;

use super::follow::{OnInterrupt, Options, Outcome, Show, follow};
use super::migrate::set_streams;
use super::output;
use super::run::{MachineArgs, working_set_default};
use super::signals::Signals;
use super::size::{DirtyRate, Size};
use crate::migration::status::MigrationStatus;
use crate::qmp::schema::{KvmInfo, MigrationInfo, StatusInfo, WorkloadInfo};
use process::VmProcess;
use report::{Findings, Report};

/// How long the guest runs at the target before it is asked whether all is well.
const RUN_AT_TARGET: Duration = Duration::from_secs(2);
/// How long it may take there to finish a pass over its working set, which takes long at low rates.
const PASS_DEADLINE: Duration = Duration::from_secs(60);
/// How long the guest may take to fill its memory and warm up.
const WARM_UP_DEADLINE: Duration = Duration::from_secs(600);
/// Passes before the migration begins: from the second on the guest checks what it wrote.
const WARM_UP_PASSES: u64 = 2;
/// Pause between two looks at the workload.
const LOOK_EVERY: Duration = Duration::from_millis(20);

#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  \
    vmferry demo\n  \
    vmferry demo --mem 4G --streams 4 --dirty-rate max\n  \
    vmferry demo --accel soft --via unix --json\n\n\
    Both sides hash all RAM and compare vCPU state inside the blackout, which a\n\
    real migration does not do; the report shows that time as `verify`. Exit\n\
    status 0 means that every check passed.")]
pub(super) struct DemoArgs {
    #[command(flatten)]
    machine: MachineArgs,
    /// Memory that the guest keeps writing [default: 64M, at most a quarter of RAM]
    #[arg(long, value_name = "SIZE")]
    working_set: Option<Size>,
    /// Pages that the guest writes per second, or as fast as it can
    #[arg(long, value_name = "PAGES_PER_SEC|max", default_value = "50000")]
    dirty_rate: DirtyRate,
    /// Memory that the guest fills at start with incompressible data [default: a quarter of RAM]
    #[arg(long, value_name = "SIZE")]
    fill: Option<Size>,
    /// Data connections, 1 to 255
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..))]
    streams: u8,
    /// What connects the two processes: TCP over 127.0.0.1, or a unix socket
    #[arg(long, value_enum, default_value_t = Via::Tcp)]
    via: Via,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
    /// Show no progress
    #[arg(long)]
    quiet: bool,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum Via {
    Tcp,
    Unix,
}

impl DemoArgs {
    pub(super) fn execute(self) -> anyhow::Result<ExitCode> {
        // Every exit goes through the clean-up.
        let signals = Signals::take()?;
        let dir = tempfile::Builder::new()
            .prefix("vmferry-demo-")
            .tempdir()
            .context("cannot make a directory for sockets")?;
        let demo = Demo {
            args: &self,
            dir: &dir,
            signals: &signals,
        };
        let report = demo.run()?;
        if self.json {
            output::line(format_args!("{:#}", report.json()))?;
        } else {
            output::text(format_args!("{report}"))?;
        }
        Ok(if report.passed() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        })
    }

    fn fill(&self) -> Size {
        self.fill.unwrap_or(Size((self.machine.mem.0 / 4) & !4095))
    }
}

struct Demo<'a> {
    args: &'a DemoArgs,
    dir: &'a TempDir,
    signals: &'a Signals,
}

impl Demo<'_> {
    fn run(&self) -> anyhow::Result<Report> {
        let mut target = self.start_target()?;
        let mut source = self.start_source()?;
        let outcome = self.migrate_and_check(&mut source, &mut target);
        if outcome.is_err() {
            // What the processes had to say is gone with the directory.
            source.show_log();
            target.show_log();
        }
        source.end();
        target.end();
        outcome
    }

    fn start_target(&self) -> anyhow::Result<VmProcess> {
        let listen = match self.args.via {
            Via::Tcp => "tcp:127.0.0.1:0".parse()?,
            Via::Unix => Address::unix(self.dir.path().join("migration"))?,
        };
        let mut arguments = self.machine_arguments();
        arguments.extend(["--incoming".to_owned(), listen.to_string()]);
        VmProcess::start(self.dir.path(), "target", &arguments, &|| {
            self.check_interrupt()
        })
    }

    fn start_source(&self) -> anyhow::Result<VmProcess> {
        let mut arguments = self.machine_arguments();
        let working_set = self
            .args
            .working_set
            .unwrap_or_else(|| working_set_default(self.args.machine.mem));
        arguments.extend(["--working-set".to_owned(), working_set.0.to_string()]);
        arguments.extend(["--dirty-rate".to_owned(), self.args.dirty_rate.to_string()]);
        arguments.extend(["--fill".to_owned(), self.args.fill().0.to_string()]);
        VmProcess::start(self.dir.path(), "source", &arguments, &|| {
            self.check_interrupt()
        })
    }

    fn machine_arguments(&self) -> Vec<String> {
        let MachineArgs { mem, vcpus, accel } = &self.args.machine;
        let (mem, vcpus) = (mem.0.to_string(), vcpus.to_string());
        ["--mem", &mem, "--vcpus", &vcpus, "--accel", accel.name()]
            .map(ToOwned::to_owned)
            .to_vec()
    }

    fn migrate_and_check(
        &self,
        source: &mut VmProcess,
        target: &mut VmProcess,
    ) -> anyhow::Result<Report> {
        let accel: KvmInfo = source.query("query-kvm")?;
        let address = listening_address(target)?;
        self.say(&format!(
            "{} guest on {}, over {address} with {} data connections",
            self.args.machine.mem,
            accelerator(accel),
            self.args.streams
        ));
        self.warm_up(source)?;
        let passes_at_source = self.migrate(source, &address)?;
        let record: MigrationInfo = source.query("query-migrate")?;
        self.say("the guest runs at the target; watching it for two seconds");
        let arrived: WorkloadInfo = target.query("x-query-workload")?;
        let later = self.run_on(target, &arrived)?;
        let there: MigrationInfo = target.query("query-migrate")?;
        let findings = Findings {
            accelerator: accelerator(accel),
            mem_bytes: self.args.machine.mem.0,
            address: address.to_string(),
            record,
            populated_target_bytes: there.x_populated_target,
            passes_at_source,
            arrived,
            later,
            source: source.query::<StatusInfo>("query-status")?,
            target: target.query::<StatusInfo>("query-status")?,
        };
        Ok(Report::new(findings))
    }

    /// Until the guest has filled its memory and checks what it writes.
    fn warm_up(&self, source: &mut VmProcess) -> anyhow::Result<()> {
        let deadline = Instant::now() + WARM_UP_DEADLINE;
        loop {
            let workload: WorkloadInfo = source.query("x-query-workload")?;
            if workload.filled_pages >= workload.fill_pages && workload.passes >= WARM_UP_PASSES {
                return Ok(());
            }
            if workload.errors > 0 {
                bail!("the guest found corruption before anything was migrated");
            }
            if Instant::now() > deadline {
                bail!(
                    "the guest does not get going: {} passes in {} s",
                    workload.passes,
                    WARM_UP_DEADLINE.as_secs()
                );
            }
            self.check_interrupt()?;
            thread::sleep(LOOK_EVERY);
        }
    }

    /// Migrates; returns the guest's passes just before.
    fn migrate(&self, source: &mut VmProcess, address: &Address) -> anyhow::Result<u64> {
        let client = source.client();
        client.execute("migrate-set-parameters", json!({ "x-verify": true }))?;
        set_streams(client, self.args.streams)?;
        // From here on the longest gap that the guest sees is the migration's.
        let workload = client.execute("x-query-workload", json!({ "reset": true }))?;
        let workload: WorkloadInfo = client.parse("x-query-workload", &workload)?;
        client.execute("migrate", json!({ "uri": address }))?;
        let options = Options {
            qmp: self.dir.path().join("source.qmp"),
            show: if self.args.quiet {
                Show::Nothing
            } else {
                Show::Progress
            },
            on_interrupt: OnInterrupt::Detach,
            look_around: false,
        };
        let record = match follow(client, self.signals, &options) {
            Outcome::Ended(record) => record,
            Outcome::Detached(_) => bail!("interrupted"),
            Outcome::Lost(error, _) => return Err(error.into()),
        };
        match record.status() {
            MigrationStatus::Completed => Ok(workload.passes),
            status => {
                let reason = record.error();
                bail!(
                    "the migration {status}: {}",
                    reason.unwrap_or_else(|| "no reason given".to_owned())
                )
            }
        }
    }

    /// Lets the guest run on, at least [`RUN_AT_TARGET`] and a pass.
    fn run_on(
        &self,
        target: &mut VmProcess,
        arrived: &WorkloadInfo,
    ) -> anyhow::Result<WorkloadInfo> {
        let began = Instant::now();
        loop {
            self.check_interrupt()?;
            thread::sleep(LOOK_EVERY);
            if began.elapsed() < RUN_AT_TARGET {
                continue;
            }
            let workload: WorkloadInfo = target.query("x-query-workload")?;
            if workload.passes > arrived.passes
                || workload.errors > 0
                || began.elapsed() > PASS_DEADLINE
            {
                return Ok(workload);
            }
        }
    }

    fn check_interrupt(&self) -> anyhow::Result<()> {
        anyhow::ensure!(!self.signals.asked_to_end(), "interrupted");
        Ok(())
    }

    fn say(&self, text: &str) {
        if !self.args.quiet && !self.args.json {
            output::note(format_args!("{text}"));
        }
    }
}

fn listening_address(target: &mut VmProcess) -> anyhow::Result<Address> {
    let info: MigrationInfo = target.query("query-migrate")?;
    let address = info
        .socket_address
        .iter()
        .flatten()
        .next()
        .context("the target does not say where it listens")?;
    Ok(address.to_address()?)
}

fn accelerator(info: KvmInfo) -> &'static str {
    if info.enabled { "KVM" } else { "host threads" }
}

/// A pair of names and values for JSON.
fn member(name: &str, value: impl serde::Serialize) -> (String, Value) {
    (name.to_owned(), json!(value))
}
