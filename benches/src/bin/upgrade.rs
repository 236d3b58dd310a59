//! What a guest notices of upgrades in place, against the size of its memory: a VM of vmferry and one of QEMU with the same guest take
//! turns, each handed over to a new process again and again by `vmferry upgrade`.
//!
//! The gap is what the guest itself saw: the longest time between two of its writes, read from its memory. No memory may come into being
//! and nothing in it may be wrong. Medians go to standard error as a table and, with every sample, to standard output as JSON.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use serde_json::{Value, json};
use tempfile::TempDir;
use vmferry::cli::client::QmpClient;
use vmferry::machine::workload::layout::{MAILBOX_GPA, PARAMS_GPA, mailbox, params};

/// Environment variable that makes this program the one that is measured.
const BE_VMFERRY: &str = "VMFERRY_UPGRADE_BE_VMFERRY";
/// Far longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(120);

/// Measures upgrades in place.
#[derive(Clone, Debug, Parser)]
struct Options {
    /// Sizes of memory in MiB.
    #[arg(long, value_delimiter = ',', default_values_t = [256, 1024, 4096, 16384])]
    mem: Vec<u64>,
    /// Memory that the guest keeps writing, in MiB.
    #[arg(long, default_value_t = 64)]
    working_set: u64,
    /// Upgrades of each VM.
    #[arg(long, default_value_t = 20)]
    runs: usize,
    /// Without QEMU.
    #[arg(long)]
    no_qemu: bool,
    /// QEMU, 10 or newer.
    #[arg(long, default_value = "qemu-system-x86_64")]
    qemu: String,
    /// A small run that proves that everything works and measures nothing.
    #[arg(long)]
    smoke: bool,
}

fn main() -> ExitCode {
    // The VMs and their upgrades are this program too, so that they are never older than what is measured.
    if std::env::var_os(BE_VMFERRY).is_some() {
        return vmferry::cli::main();
    }
    let mut options = Options::parse();
    if options.smoke {
        (options.mem, options.working_set, options.runs) = (vec![64], 4, 1);
    }
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("upgrade: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    let mut cases = Vec::new();
    for &mem in &options.mem {
        let mut vms = vec![Vm::vmferry(mem, options.working_set)?];
        if !options.no_qemu {
            vms.push(Vm::qemu(&options.qemu, mem, options.working_set)?);
        }
        for vm in &vms {
            vm.tell("stop")?;
        }
        let mut samples = vec![Vec::new(); vms.len()];
        for _ in 0..options.runs {
            for (vm, samples) in vms.iter_mut().zip(&mut samples) {
                // One guest at a time: each takes a processor of its own.
                vm.tell("cont")?;
                samples.push(vm.upgrade()?);
                vm.tell("stop")?;
            }
        }
        for (vm, samples) in vms.iter().zip(samples) {
            let median = |what: fn(&Sample) -> f64| median(samples.iter().map(what).collect());
            let (gap, blackout) = (median(|s| s.gap_ms), median(|s| s.blackout_ms));
            let total = median(|s| s.total_ms);
            let worst = samples.iter().map(|s| s.gap_ms).fold(0.0, f64::max);
            eprintln!(
                "{:8} {mem:6} MiB: gap {gap:6.2} ms (max {worst:6.2}), blackout {blackout:6.2} ms, in all {total:7.1} ms",
                vm.name
            );
            cases.push(json!({
                "vmm": vm.name,
                "mem-mib": mem,
                "gap-ms": gap,
                "blackout-ms": blackout,
                "total-ms": total,
                "samples": samples.iter().map(Sample::report).collect::<Vec<_>>(),
            }));
        }
    }
    let report = json!({ "benchmark": "upgrade", "cases": cases });
    println!("{report:#}");
    Ok(())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// One upgrade.
#[derive(Clone, Debug)]
struct Sample {
    gap_ms: f64,
    /// As the VMM says; QEMU knows whole milliseconds only.
    blackout_ms: f64,
    /// From the start of the new process to its word that it runs the guest, or to the end of the old one (vmferry).
    total_ms: f64,
}

impl Sample {
    fn report(&self) -> Value {
        let Self {
            gap_ms,
            blackout_ms,
            total_ms,
        } = self;
        json!({ "gap-ms": gap_ms, "blackout-ms": blackout_ms, "total-ms": total_ms })
    }
}

/// A VM, in whichever process. Dropping it ends it.
struct Vm {
    name: &'static str,
    dir: TempDir,
    /// The process that runs it.
    pid: u64,
    /// The first of them, which is our child.
    first: Child,
}

impl Vm {
    fn vmferry(mem: u64, working_set: u64) -> Result<Self> {
        let dir = TempDir::with_prefix("vmferry-upgrade-")?;
        let mut command = ourselves()?;
        command
            .args(["run", "--mem", &format!("{mem}M"), "--dirty-rate", "max"])
            .args(["--working-set", &format!("{working_set}M"), "--qmp"])
            .arg(dir.path().join("qmp"));
        Self::start("vmferry", dir, command)
    }

    fn qemu(qemu: &str, mem: u64, working_set: u64) -> Result<Self> {
        let dir = TempDir::with_prefix("vmferry-upgrade-")?;
        let image = dir.path().join("workload");
        let made = ourselves()?
            .args([
                "workload-image",
                "--mem",
                &format!("{mem}M"),
                "--dirty-rate",
                "max",
            ])
            .args(["--working-set", &format!("{working_set}M"), "--output"])
            .arg(&image)
            .output()?;
        ensure!(made.status.success(), "no image: {made:?}");
        let machine = "microvm,acpi=off,pit=off,pic=off,rtc=off,isa-serial=on,memory-backend=ram0";
        let mut command = Command::new(qemu);
        command
            .args(["-M", &format!("{machine},aux-ram-share=on")])
            .args(["-accel", "kvm", "-cpu", "qemu64", "-m", &format!("{mem}M")])
            .args([
                "-object",
                &format!("memory-backend-memfd,id=ram0,size={mem}M,share=on"),
            ])
            .args(["-nodefaults", "-display", "none", "-no-reboot"])
            .args(["-qmp", "unix:qmp,server=on,wait=off", "-kernel"])
            .arg(&image)
            .current_dir(dir.path());
        Self::start("qemu", dir, command)
    }

    fn start(name: &'static str, dir: TempDir, mut command: Command) -> Result<Self> {
        let first = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        let vm = Self {
            name,
            dir,
            pid: first.id().into(),
            first,
        };
        let deadline = Instant::now() + PATIENCE;
        // Not asked over QMP: some KVMs do not survive a boot that is interrupted.
        while vm
            .memory()
            .and_then(|ram| ram.field(mailbox::PASSES))
            .unwrap_or(0)
            < 2
        {
            ensure!(
                Instant::now() < deadline,
                "the guest of {name} does not run"
            );
            thread::sleep(Duration::from_millis(20));
        }
        Ok(vm)
    }

    fn qmp(&self) -> PathBuf {
        self.dir.path().join("qmp")
    }

    fn tell(&self, command: &str) -> Result<()> {
        QmpClient::connect(&self.qmp())?.execute(command, json!({}))?;
        Ok(())
    }

    fn upgrade(&mut self) -> Result<Sample> {
        // The guest has been stopped: that gap ends now.
        thread::sleep(Duration::from_millis(50));
        let ram = self.memory()?;
        let populated = ram.file.metadata()?.blocks();
        ram.forget_gap()?;
        thread::sleep(Duration::from_millis(50));
        let output = ourselves()?
            .args(["upgrade", "--json", "--qmp"])
            .arg(self.qmp())
            .stdin(Stdio::null())
            .output()?;
        if !output.status.success() {
            bail!("{}: {}", self.name, String::from_utf8_lossy(&output.stderr));
        }
        let report: Value = serde_json::from_slice(&output.stdout)?;
        let number = |name: &str| report[name].as_f64().with_context(|| format!("no {name}"));
        self.pid = report["new-pid"].as_u64().context("no new-pid")?;
        // Long enough for the gap to end, and for a write of every page.
        thread::sleep(Duration::from_millis(150));
        let ram = self.memory()?;
        ensure!(
            ram.field(mailbox::ERRORS)? == 0,
            "{}: corruption",
            self.name
        );
        let now = ram.file.metadata()?.blocks();
        ensure!(now == populated, "{}: memory came into being", self.name);
        Ok(Sample {
            gap_ms: ram.gap_ms()?,
            blackout_ms: number("blackout-us")? / 1e3,
            total_ms: number("total-us")? / 1e3,
        })
    }

    /// The block of memory that the workload lies in.
    fn memory(&self) -> Result<Ram> {
        for entry in fs::read_dir(format!("/proc/{}/fd", self.pid))? {
            let path = entry?.path();
            let link = fs::read_link(&path);
            if !link.is_ok_and(|link| link.to_string_lossy().starts_with("/memfd:")) {
                continue;
            }
            let ram = Ram::open(&path)?;
            if ram.word(PARAMS_GPA + params::MAGIC_AT).ok() == Some(params::MAGIC) {
                return Ok(ram);
            }
        }
        bail!("process {} of {} has no guest memory", self.pid, self.name)
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if let Ok(mut client) = QmpClient::connect(&self.qmp()) {
            // It may hang up before it answers.
            let _ = client.execute("quit", json!({}));
        }
        // Fail only if it has ended already.
        let _ = self.first.kill();
        let _ = self.first.wait();
    }
}

/// Memory of a guest with one vCPU, seen from outside.
struct Ram {
    file: File,
}

impl Ram {
    fn open(path: &Path) -> Result<Self> {
        let file = File::options().read(true).write(true).open(path)?;
        Ok(Self { file })
    }

    fn word(&self, gpa: u64) -> Result<u64> {
        let mut bytes = [0; 8];
        self.file.read_exact_at(&mut bytes, gpa)?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn field(&self, at: u64) -> Result<u64> {
        self.word(MAILBOX_GPA + at)
    }

    fn forget_gap(&self) -> Result<()> {
        let requested = self.field(mailbox::RESET_REQUESTED)? + 1;
        let at = MAILBOX_GPA + mailbox::RESET_REQUESTED;
        Ok(self.file.write_all_at(&requested.to_le_bytes(), at)?)
    }

    #[expect(clippy::cast_precision_loss, reason = "a time for people")]
    fn gap_ms(&self) -> Result<f64> {
        let khz = self.word(PARAMS_GPA + params::TSC_KHZ)?.max(1);
        Ok(self.field(mailbox::LONGEST_GAP_TICKS)? as f64 / khz as f64)
    }
}

fn ourselves() -> Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.env(BE_VMFERRY, "1");
    Ok(command)
}
