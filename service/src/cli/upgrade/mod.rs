//! `vmferry upgrade`: a new process takes a running VM over from the old one on the same host, memory and all, and the old one ends.

mod process;
mod qemu;

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use serde_json::json;

use self::process::VmProcess;
use super::client::QmpClient;
use super::exit::Exit;
use super::record::Record;
use super::signals::Signals;
use super::{QmpArgs, output};

#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  \
    vmferry upgrade --qmp /tmp/vm.qmp --binary /usr/local/bin/qemu-system-x86_64\n  \
    vmferry upgrade --qmp /tmp/vm.qmp -- qemu-system-x86_64 -M microvm ...\n\n\
    A VM of QEMU must have its memory in descriptors that can be passed on: a\n\
    memory-backend-memfd with share=on, and aux-ram-share=on for the machine (QEMU 10\n\
    or newer).\n\n\
    Exit status: 0 the new process runs the guest and the old one has ended, 1 anything\n\
    else; the message says where the guest is.")]
pub(super) struct UpgradeArgs {
    #[command(flatten)]
    vm: QmpArgs,
    /// Program that takes over [default: the one that runs now]
    #[arg(long, value_name = "NEW")]
    binary: Option<PathBuf>,
    /// How the VM is handed over
    #[arg(long, value_enum, value_name = "MODE", default_value_t = Mode::Transfer)]
    mode: Mode,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
    /// Command that starts the new process [default: that of the old one]
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// How the VM is handed over.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum Mode {
    /// To a new process, over a socket
    Transfer,
}

/// A VM that runs in a new process.
struct Upgraded {
    pid: u32,
    /// From the start of the new process until it had the guest.
    took_us: u64,
    record: Record,
}

impl UpgradeArgs {
    pub(super) fn execute(self) -> anyhow::Result<Exit> {
        // Half-way is where nobody wants a VM to be.
        let _signals = Signals::take()?;
        let qmp = std::path::absolute(&self.vm.qmp)?;
        let mut client = QmpClient::connect(&qmp)?;
        let peer = client
            .peer()
            .context("cannot find the process behind the monitor")?;
        let old = VmProcess::open(peer)?;
        let mut command = match &self.command[..] {
            [] => old.command()?,
            command => command.to_vec(),
        };
        if let (Some(binary), Some(program)) = (&self.binary, command.first_mut()) {
            // Not where the old process was started, but where we were.
            *program = std::path::absolute(binary)?.into();
        }
        let Mode::Transfer = self.mode;
        if !client.is_qemu() {
            bail!("{} cannot be handed over to a new process; this takes a QEMU", client.name());
        }
        let upgraded = qemu::upgrade(&mut client, &old, &qmp, &command)?;
        self.show(&upgraded, &old)?;
        Ok(Exit::Done)
    }

    fn show(&self, upgraded: &Upgraded, old: &VmProcess) -> anyhow::Result<()> {
        let Upgraded {
            pid,
            took_us,
            record,
        } = upgraded;
        if self.json {
            let report = json!({
                "old-pid": old.number(),
                "new-pid": pid,
                "took-us": took_us,
                "downtime-ms": record.downtime_ms(),
                "migration": record.json(),
            });
            output::line(format_args!("{report:#}"))?;
            return Ok(());
        }
        output::line(format_args!(
            "upgraded: process {pid} runs the guest, {} has ended",
            old.number()
        ))?;
        if let Some(downtime) = record.downtime_ms() {
            #[expect(clippy::cast_precision_loss, reason = "a time for people")]
            let took_ms = *took_us as f64 / 1e3;
            output::line(format_args!(
                "the guest stood still for {downtime} ms; {took_ms:.1} ms with the start of the new process"
            ))?;
        }
        Ok(())
    }
}

/// Whether the process with this number is behind the monitor.
fn same_process(client: &QmpClient, pid: u32) -> bool {
    let peer = client.peer().map(|peer| peer.as_raw_nonzero().get());
    peer.ok().and_then(|peer| u32::try_from(peer).ok()) == Some(pid)
}
