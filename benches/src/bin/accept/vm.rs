//! VM processes, and one migration between two of them.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;
use vmferry::cli::client::QmpClient;

/// Environment variable that makes this program the one that is measured.
pub(crate) const BE_A_VM: &str = "VMFERRY_ACCEPT_BE_A_VM";

/// Far longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(120);
/// How often the end of a migration is looked for; its own record of the time is what counts.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// What a VM is like. Sizes in MiB.
#[derive(Clone, Debug)]
pub(crate) struct Sort {
    pub(crate) mem_mib: u64,
    pub(crate) working_set_mib: u64,
    pub(crate) fill_mib: u64,
    pub(crate) dirty_rate: &'static str,
}

/// A VM process. Dropping it kills it.
pub(crate) struct Vm {
    child: Child,
    _dir: TempDir,
    client: QmpClient,
}

/// What a migration was like.
#[derive(Clone, Debug)]
pub(crate) struct Moved {
    /// From the command until the source knew that the guest runs at the target.
    pub(crate) total_ms: f64,
    /// Until this process knew it, with up to 5 ms more for looking.
    pub(crate) seen_ms: f64,
    /// Longest time between two writes of the guest, from before the migration until after it.
    pub(crate) gap_ms: f64,
    pub(crate) blackout_ms: f64,
    pub(crate) rounds: f64,
    /// Guest memory that exists at the source and at the target.
    pub(crate) populated_mib: (u64, u64),
    /// Page data that was sent.
    sent_bytes: f64,
    record: Value,
}

impl Moved {
    pub(crate) fn gib_per_s(&self) -> f64 {
        self.sent_bytes / f64::from(1 << 30) / (self.total_ms / 1000.0)
    }

    pub(crate) fn report(&self) -> Value {
        let Self {
            total_ms,
            seen_ms,
            gap_ms,
            populated_mib,
            record,
            ..
        } = self;
        json!({
            "total_ms": total_ms,
            "seen_ms": seen_ms,
            "gap_ms": gap_ms,
            "populated_mib": [populated_mib.0, populated_mib.1],
            "blackout": record["x-blackout"],
            "rounds": record["x-round"],
            "sent_bytes": record["ram"]["normal-bytes"],
        })
    }
}

impl Vm {
    /// A VM with a guest.
    pub(crate) fn source(accel: &str, sort: &Sort) -> Result<Self> {
        let (working_set, fill) = (
            format!("{}M", sort.working_set_mib),
            format!("{}M", sort.fill_mib),
        );
        let guest = [
            "--working-set",
            &working_set,
            "--fill",
            &fill,
            "--dirty-rate",
            sort.dirty_rate,
        ];
        Self::start(accel, sort, &guest)
    }

    /// A VM that waits for a guest.
    pub(crate) fn target(accel: &str, sort: &Sort) -> Result<Self> {
        Self::start(accel, sort, &["--incoming", "tcp:127.0.0.1:0"])
    }

    fn start(accel: &str, sort: &Sort, arguments: &[&str]) -> Result<Self> {
        let dir = TempDir::with_prefix("vmferry-accept-")?;
        let path = dir.path().join("qmp");
        let us = std::process::id().to_string();
        let mut child = Command::new(std::env::current_exe()?)
            .env(BE_A_VM, "1")
            .args(["run", "--accel", accel, "--end-with-parent", &us])
            .args(["--mem", &format!("{}M", sort.mem_mib)])
            .args(arguments)
            .arg("--qmp")
            .arg(&path)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let deadline = Instant::now() + PATIENCE;
        let client = loop {
            if let Ok(client) = QmpClient::connect(&path) {
                break client;
            }
            if let Some(status) = child.try_wait()? {
                bail!("a VM did not start: {status}");
            }
            ensure!(Instant::now() < deadline, "a VM does not answer");
            thread::sleep(LOOK_EVERY);
        };
        Ok(Self {
            child,
            _dir: dir,
            client,
        })
    }

    fn ask(&mut self, command: &str) -> Result<Value> {
        Ok(self.client.execute(command, json!({}))?)
    }

    /// Waits until the guest has touched everything that it will.
    pub(crate) fn warm_up(&mut self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let workload = self.ask("x-query-workload")?;
            let filled = workload["filled-pages"] == workload["fill-pages"];
            if filled && workload["passes"].as_u64() >= Some(1) {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "the guest does not get ready");
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Stops the guest.
    pub(crate) fn stop(&mut self) -> Result<()> {
        self.ask("stop").map(drop)
    }

    /// Lets the guest run again.
    pub(crate) fn cont(&mut self) -> Result<()> {
        self.ask("cont").map(drop)
    }

    /// Makes all guest memory exist, from outside: this machine has no option for it. Written rather than allocated, because the
    /// kernel leaves the zeroing of allocated pages to whoever touches them first.
    pub(crate) fn populate(&self) -> Result<()> {
        let zeros = vec![0; 1 << 20];
        for file in self.memory()? {
            let file = fs::File::options().read(true).write(true).open(file)?;
            let bytes = file.metadata()?.len();
            for offset in (0..bytes).step_by(zeros.len()) {
                let left = usize::try_from(bytes - offset)?;
                file.write_all_at(&zeros[..left.min(zeros.len())], offset)?;
            }
        }
        Ok(())
    }

    /// Guest memory that exists, in MiB.
    fn populated_mib(&self) -> Result<u64> {
        let mut blocks = 0;
        for file in self.memory()? {
            blocks += fs::metadata(file)?.blocks();
        }
        Ok((blocks * 512) >> 20)
    }

    /// Its memfds, as paths that can be opened.
    fn memory(&self) -> Result<Vec<std::path::PathBuf>> {
        let mut files = Vec::new();
        for entry in fs::read_dir(format!("/proc/{}/fd", self.child.id()))? {
            let path = entry?.path();
            let link = fs::read_link(&path);
            if link.is_ok_and(|link| link.to_string_lossy().starts_with("/memfd:")) {
                files.push(path);
            }
        }
        Ok(files)
    }

    /// Moves the guest to `target` and waits until it has written there for a while.
    pub(crate) fn move_to(&mut self, target: &mut Self, connections: u8) -> Result<Moved> {
        let info = target.ask("query-migrate")?;
        let port = info["socket-address"][0]["port"]
            .as_str()
            .context("the target listens")?;
        let uri = format!("tcp:127.0.0.1:{port}");
        let parameters = json!({ "multifd-channels": connections });
        self.client.execute("migrate-set-parameters", parameters)?;
        // The guest may have been let run just now: that gap is not the migration's. It forgets it with its next write.
        thread::sleep(Duration::from_millis(50));
        self.client
            .execute("x-query-workload", json!({ "reset": true }))?;
        thread::sleep(Duration::from_millis(50));
        let began = Instant::now();
        self.client.execute("migrate", json!({ "uri": uri }))?;
        let record = loop {
            let info = self.ask("query-migrate")?;
            match info["status"].as_str() {
                Some("completed") => break info,
                Some("failed" | "cancelled") => bail!("the migration failed: {info}"),
                _ => {}
            }
            ensure!(began.elapsed() < PATIENCE, "no end: {info}");
            thread::sleep(LOOK_EVERY);
        };
        let seen_ms = began.elapsed().as_secs_f64() * 1000.0;
        thread::sleep(Duration::from_millis(100));
        let workload = target.ask("x-query-workload")?;
        ensure!(workload["errors"] == 0, "corruption: {workload}");
        let number = |value: &Value| value.as_f64().context("a figure is missing");
        Ok(Moved {
            total_ms: number(&record["total-time"])?,
            seen_ms,
            gap_ms: number(&workload["longest-gap-us"])? / 1000.0,
            blackout_ms: number(&record["x-blackout"]["total-us"])? / 1000.0,
            rounds: number(&record["x-round"])?,
            populated_mib: (self.populated_mib()?, target.populated_mib()?),
            sent_bytes: number(&record["ram"]["normal-bytes"])?,
            record,
        })
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // Fail only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
