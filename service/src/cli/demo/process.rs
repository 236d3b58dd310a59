//! One VM process of the demo, and the promise that it is gone in the end.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde::de::DeserializeOwned;
use serde_json::json;

use crate::cli::client::QmpClient;
use crate::cli::output;

/// How long a process may take to build its machine and answer.
const START_DEADLINE: Duration = Duration::from_secs(20);
/// How long it may take to end when asked to.
const END_DEADLINE: Duration = Duration::from_secs(5);
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// A `vmferry run`. Dropping it kills the process and waits for it; the kernel kills it if this process dies first.
#[derive(Debug)]
pub(super) struct VmProcess {
    child: Child,
    role: &'static str,
    log: PathBuf,
    client: QmpClient,
}

impl VmProcess {
    /// Starts one and waits until it answers. `check` may give up.
    pub(super) fn start(
        dir: &Path,
        role: &'static str,
        arguments: &[String],
        check: &dyn Fn() -> anyhow::Result<()>,
    ) -> anyhow::Result<Self> {
        let (qmp, log) = (
            dir.join(format!("{role}.qmp")),
            dir.join(format!("{role}.log")),
        );
        let errors =
            File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        let program = std::env::current_exe().context("cannot find the program that is running")?;
        let child = Command::new(program)
            .arg("run")
            .args(arguments)
            .arg("--qmp")
            .arg(&qmp)
            .args(["--name", role])
            .args(["--end-with-parent", &std::process::id().to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(errors)
            // Ctrl-C is for us alone; we end them in order.
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start the {role}"))?;
        let mut child = Started(Some(child));
        let client = child.wait_for_client(&qmp, &log, role, check)?;
        let child = child.0.take().context("the process is gone")?;
        Ok(Self {
            child,
            role,
            log,
            client,
        })
    }

    /// Its QMP.
    pub(super) fn client(&mut self) -> &mut QmpClient {
        &mut self.client
    }

    /// Asks it something.
    pub(super) fn query<T: DeserializeOwned>(&mut self, command: &str) -> anyhow::Result<T> {
        self.client
            .query(command)
            .with_context(|| format!("asking the {}", self.role))
    }

    /// What it wrote to standard error, on ours.
    pub(super) fn show_log(&self) {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        for line in log.lines() {
            output::note(format_args!("{}: {line}", self.role));
        }
    }

    /// Ends it in order if it lets itself be ended.
    pub(super) fn end(mut self) {
        if self.client.execute("quit", json!({})).is_ok() {
            let deadline = Instant::now() + END_DEADLINE;
            while Instant::now() < deadline && matches!(self.child.try_wait(), Ok(None)) {
                thread::sleep(LOOK_EVERY);
            }
        }
    }
}

impl Drop for VmProcess {
    fn drop(&mut self) {
        kill(&mut self.child);
    }
}

/// A child that does not answer yet.
struct Started(Option<Child>);

impl Started {
    fn wait_for_client(
        &mut self,
        qmp: &Path,
        log: &Path,
        role: &str,
        check: &dyn Fn() -> anyhow::Result<()>,
    ) -> anyhow::Result<QmpClient> {
        let deadline = Instant::now() + START_DEADLINE;
        loop {
            let refusal = match QmpClient::connect(qmp) {
                Ok(client) => return Ok(client),
                Err(error) => error,
            };
            let ended = match &mut self.0 {
                Some(child) => child.try_wait()?,
                None => None,
            };
            if let Some(status) = ended {
                let said = fs::read_to_string(log).unwrap_or_default();
                bail!("the {role} did not start ({status}): {}", said.trim());
            }
            if Instant::now() > deadline {
                return Err(refusal).with_context(|| format!("the {role} does not answer"));
            }
            check()?;
            thread::sleep(LOOK_EVERY);
        }
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            kill(child);
        }
    }
}

/// Both fail only for a process that is gone already.
fn kill(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}
