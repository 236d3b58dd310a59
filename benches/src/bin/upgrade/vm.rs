//! VMs that are upgraded: of vmferry and of QEMU.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;
use vmferry::cli::client::QmpClient;
use vmferry::machine::workload::layout::{PARAMS_GPA, mailbox, mailbox_gpa, params};

use crate::rate::Watch;

/// Environment variable that makes this program the one that is measured.
pub(crate) const BE_VMFERRY: &str = "VMFERRY_UPGRADE_BE_VMFERRY";
/// Far longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long a guest is watched at most until it writes as before.
const AFTERWARDS: Duration = Duration::from_secs(2);

/// Pages per second of each of several vCPUs.
const HELD_BACK: u64 = 2000;

/// What a VM has. Sizes in MiB.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Shape {
    pub(crate) mem: u64,
    pub(crate) working_set: u64,
    pub(crate) vcpus: u32,
    pub(crate) disks: usize,
}

impl Shape {
    /// One vCPU at full speed; more of them are held back, because with fewer processors than vCPUs they would measure the scheduler.
    fn dirty_rate(&self) -> String {
        match self.vcpus {
            1 => "max".to_owned(),
            vcpus => (u64::from(vcpus) * HELD_BACK).to_string(),
        }
    }
}

/// One upgrade.
#[derive(Clone, Debug)]
pub(crate) struct Sample {
    pub(crate) gap_ms: f64,
    /// As the VMM says; QEMU knows whole milliseconds only.
    pub(crate) blackout_ms: f64,
    /// From the last write before to the first moment at which the guest writes at 90 % of its rate.
    pub(crate) back_ms: f64,
    /// From the start of the new process to its word that it runs the guest, or to the end of the old one (vmferry).
    pub(crate) total_ms: f64,
    /// Of the blackout, as the VMM says.
    parts: Value,
}

impl Sample {
    pub(crate) fn report(&self) -> Value {
        let Self {
            gap_ms,
            blackout_ms,
            back_ms,
            total_ms,
            parts,
        } = self;
        json!({
            "gap-ms": gap_ms,
            "blackout-ms": blackout_ms,
            "back-ms": back_ms,
            "total-ms": total_ms,
            "blackout-parts": parts,
        })
    }
}

/// A VM, in whichever process. Dropping it ends it.
pub(crate) struct Vm {
    pub(crate) name: &'static str,
    /// How it is upgraded.
    pub(crate) mode: String,
    pub(crate) shape: Shape,
    dir: TempDir,
    /// The process that runs it.
    pid: u64,
    /// The first of them, which is our child.
    first: Child,
}

impl Vm {
    pub(crate) fn vmferry(shape: Shape, mode: &str) -> Result<Self> {
        let dir = TempDir::with_prefix("vmferry-upgrade-")?;
        let mut command = ourselves()?;
        command
            .args(["run", "--mem", &format!("{}M", shape.mem)])
            .args(["--vcpus", &shape.vcpus.to_string()])
            .args(["--dirty-rate", &shape.dirty_rate()])
            .args(["--working-set", &format!("{}M", shape.working_set), "--qmp"])
            .arg(dir.path().join("qmp"));
        for disk in 0..shape.disks {
            let path = dir.path().join(format!("disk{disk}"));
            File::create(&path)?.set_len(1 << 20)?;
            command.arg("--disk").arg(path);
        }
        Self::start("vmferry", mode, shape, dir, command)
    }

    pub(crate) fn qemu(qemu: &str, shape: Shape) -> Result<Self> {
        let Shape {
            mem, working_set, ..
        } = shape;
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
        Self::start("qemu", "transfer", shape, dir, command)
    }

    fn start(
        name: &'static str,
        mode: &str,
        shape: Shape,
        dir: TempDir,
        mut command: Command,
    ) -> Result<Self> {
        let first = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        let mut vm = Self {
            name,
            mode: mode.to_owned(),
            shape,
            dir,
            pid: first.id().into(),
            first,
        };
        let deadline = Instant::now() + PATIENCE;
        // Not asked over QMP: some KVMs do not survive a boot that is interrupted.
        while vm
            .memory()
            .and_then(|ram| ram.least(mailbox::PASSES))
            .unwrap_or(0)
            < 2
        {
            let ended = vm.first.try_wait()?;
            ensure!(
                ended.is_none() && Instant::now() < deadline,
                "the guest of {name} with {shape:?} does not run"
            );
            thread::sleep(Duration::from_millis(20));
        }
        Ok(vm)
    }

    fn qmp(&self) -> PathBuf {
        self.dir.path().join("qmp")
    }

    pub(crate) fn tell(&self, command: &str) -> Result<()> {
        QmpClient::connect(&self.qmp())?.execute(command, json!({}))?;
        Ok(())
    }

    pub(crate) fn upgrade(&mut self) -> Result<Sample> {
        // The guest has been stopped: that gap ends now.
        thread::sleep(Duration::from_millis(50));
        let ram = self.memory()?;
        let populated = ram.file.metadata()?.blocks();
        ram.forget_gap()?;
        // The rate before counts.
        let mut watch = Watch::start(self.memory()?);
        thread::sleep(Duration::from_millis(100));
        watch.mark();
        let output = ourselves()?
            .args(["upgrade", "--json", "--mode", &self.mode, "--qmp"])
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
        let back_ms = watch.end(AFTERWARDS)?;
        let ram = self.memory()?;
        ensure!(
            ram.total(mailbox::ERRORS)? == 0,
            "{}: corruption",
            self.name
        );
        let now = ram.file.metadata()?.blocks();
        ensure!(now == populated, "{}: memory came into being", self.name);
        Ok(Sample {
            gap_ms: ram.gap_ms()?,
            back_ms,
            blackout_ms: number("blackout-us")? / 1e3,
            total_ms: number("total-us")? / 1e3,
            parts: report["blackout-parts"].clone(),
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
            let ram = Ram::open(&path, self.shape.vcpus)?;
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

/// Memory of a guest, seen from outside.
pub(crate) struct Ram {
    file: File,
    vcpus: u32,
}

impl Ram {
    fn open(path: &Path, vcpus: u32) -> Result<Self> {
        let file = File::options().read(true).write(true).open(path)?;
        Ok(Self { file, vcpus })
    }

    fn word(&self, gpa: u64) -> Result<u64> {
        let mut bytes = [0; 8];
        self.file.read_exact_at(&mut bytes, gpa)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// A field of the mailbox of each vCPU.
    fn fields(&self, at: u64) -> Result<Vec<u64>> {
        let words = (0..self.vcpus).map(|vcpu| self.word(mailbox_gpa(vcpu) + at));
        words.collect()
    }

    fn least(&self, at: u64) -> Result<u64> {
        Ok(self.fields(at)?.into_iter().min().unwrap_or(0))
    }

    fn total(&self, at: u64) -> Result<u64> {
        Ok(self.fields(at)?.into_iter().sum())
    }

    /// Pages that the guest has written since it began.
    pub(crate) fn written(&self) -> Result<u64> {
        self.total(mailbox::PAGES_WRITTEN)
    }

    fn forget_gap(&self) -> Result<()> {
        for vcpu in 0..self.vcpus {
            let at = mailbox_gpa(vcpu) + mailbox::RESET_REQUESTED;
            let requested = self.word(at)? + 1;
            self.file.write_all_at(&requested.to_le_bytes(), at)?;
        }
        Ok(())
    }

    /// The longest of any vCPU.
    #[expect(clippy::cast_precision_loss, reason = "a time for people")]
    fn gap_ms(&self) -> Result<f64> {
        let khz = self.word(PARAMS_GPA + params::TSC_KHZ)?.max(1);
        let longest = self.fields(mailbox::LONGEST_GAP_TICKS)?.into_iter().max();
        Ok(longest.unwrap_or(0) as f64 / khz as f64)
    }
}

fn ourselves() -> Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.env(BE_VMFERRY, "1");
    Ok(command)
}
