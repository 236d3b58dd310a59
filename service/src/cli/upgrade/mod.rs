//! `vmferry upgrade`: moves a VM into a new process of another binary on the same host, under the running guest.

mod process;
mod qemu;
mod vmferry;

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::{Context, ensure};
use clap::Args;

use self::process::VmProcess;
use super::QmpArgs;
use super::client::QmpClient;
use super::exit::Exit;
use super::signals::Signals;

#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  \
    vmferry upgrade --qmp /tmp/vm.qmp\n  \
    vmferry upgrade --qmp /tmp/vm.qmp --binary /opt/vmferry-0.2/bin/vmferry --json\n  \
    vmferry upgrade --qmp /tmp/qemu.qmp -- qemu-system-x86_64 -M microvm ...\n\n\
    The guest's memory is neither copied nor sent: both processes map the same files.\n\
    Clients find the new process at the same path. The old one ends.\n\n\
    A VM of QEMU (10 or newer) must have its memory in descriptors that can be passed\n\
    on: a memory-backend-memfd with share=on, and aux-ram-share=on for the machine.\n\n\
    Exit status: 0 the new process runs the guest, 1 it does not, or the message says\n\
    what is left to be done, 4 the VM stopped answering, so that the outcome is not\n\
    known.")]
pub(super) struct UpgradeArgs {
    #[command(flatten)]
    vm: QmpArgs,
    /// The new program [default: this one; for a VM of QEMU the one that runs it]
    #[arg(long, value_name = "PATH")]
    binary: Option<PathBuf>,
    /// Print what happened as JSON
    #[arg(long)]
    json: bool,
    /// Command that starts the new QEMU [default: that of the old one]
    #[arg(last = true, value_name = "COMMAND", conflicts_with = "binary")]
    command: Vec<OsString>,
}

impl UpgradeArgs {
    pub(super) fn execute(self) -> anyhow::Result<Exit> {
        // Half-way is where nobody wants a VM to be.
        let _signals = Signals::take()?;
        let qmp = std::path::absolute(&self.vm.qmp)?;
        let client = QmpClient::connect(&qmp)?;
        let old = client
            .peer()
            .context("cannot tell which process the VM is")?;
        if !client.is_qemu() {
            ensure!(
                self.command.is_empty(),
                "a VM of vmferry is started with the command line that it has; name the new program with --binary"
            );
            return vmferry::upgrade(client, old, &qmp, self.binary, self.json);
        }
        let old = VmProcess::open(old)?;
        let mut command = match self.command.is_empty() {
            true => old.command()?,
            false => self.command,
        };
        if let (Some(binary), Some(program)) = (&self.binary, command.first_mut()) {
            // Not where the old process was started, but where we were.
            *program = std::path::absolute(binary)?.into();
        }
        qemu::upgrade(client, &old, &qmp, &command, self.json)
    }
}

/// Whether the process with this number is behind the monitor.
fn same_process(client: &QmpClient, pid: u32) -> bool {
    let peer = client.peer().map(|peer| peer.as_raw_nonzero().get());
    peer.and_then(|peer| u32::try_from(peer).ok()) == Some(pid)
}
