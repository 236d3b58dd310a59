//! The command line.
//!
//! `run` becomes a VM process; everything else is a QMP client ([`client`]) of one or two of those, or of QEMU.
//! Errors go to standard error as one line with their causes; the exit status is 0 only if what was asked for has happened.

pub mod client;
mod control;
mod demo;
mod exit;
mod follow;
mod image;
mod migrate;
mod output;
mod record;
mod report;
mod run;
mod settings;
mod signals;
pub mod size;
mod status;
mod style;
mod upgrade;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::observe::logging::{self, LogArgs};
use crate::succession::{self, Inheritance};

/// Live migration of KVM virtual machines.
#[derive(Debug, Parser)]
#[command(
    name = "vmferry",
    version,
    about = "Live migration of KVM virtual machines",
    max_term_width = 100,
    after_help = "Start here:  vmferry demo\n\n\
        Three terminals:\n  \
        vmferry run --mem 1G --qmp /tmp/target.qmp --incoming tcp:127.0.0.1:4444\n  \
        vmferry run --mem 1G --qmp /tmp/source.qmp\n  \
        vmferry migrate --qmp /tmp/source.qmp tcp:127.0.0.1:4444\n\n\
        ADDR is tcp:HOST:PORT (an IPv6 address in brackets), unix:PATH, vsock:CID:PORT,\n\
        fd:NAME, exec:COMMAND or file:PATH[,offset=SIZE].\n\
        SIZE is a whole number with K, M, G or T (binary), like 512M.\n\
        Everything but `run` and `demo` works on QEMU's QMP sockets too.\n\n\
        Exit status: 0 done, 1 failed, 2 wrong command line, 3 migration cancelled,\n\
        4 the VM stopped answering while it was followed (the outcome is not known),\n\
        129, 130 or 143 following was ended by SIGHUP, Ctrl-C or SIGTERM (the migration\n\
        goes on).\n\n\
        Environment: VMFERRY_LOG sets the log level (error, warn, info, debug, trace),\n\
        VMFERRY_NO_URING=1 does without io_uring, NO_COLOR=1 without colours."
)]
pub struct Cli {
    #[command(flatten)]
    log: LogArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a virtual machine, or wait for one to arrive
    Run(Box<run::RunArgs>),
    /// Migrate a running VM and follow it to the end
    Migrate(migrate::MigrateArgs),
    /// Move a VM into a new process of another binary on this host, under the running guest
    Upgrade(upgrade::UpgradeArgs),
    /// Show how a VM and its migration are doing
    Status(status::StatusArgs),
    /// Cancel a migration; the guest goes on at the source
    Cancel(control::CancelArgs),
    /// Go on with a migration that waits before its switchover
    Continue(control::ContinueArgs),
    /// Pause a post-copy migration, so that it can be recovered
    Pause(control::PauseArgs),
    /// Shut the connections of a migration that hangs
    Yank(control::YankArgs),
    /// Decide which side has the guest when a link was lost at the commit
    Resolve(control::ResolveArgs),
    /// Have a VM wait for a guest
    Incoming(control::IncomingArgs),
    /// Show or set migration parameters
    Set(settings::SetArgs),
    /// Show or switch migration capabilities
    Capabilities(settings::CapabilitiesArgs),
    /// Migrate a running VM between two processes of this machine, and check the result
    Demo(demo::DemoArgs),
    /// Make a page with plots from the record of a migration
    Report(report::ReportArgs),
    /// Write the built-in guest as an ELF file that other VMMs can boot
    WorkloadImage(image::ImageArgs),
}

/// Which VM to talk to.
#[derive(Args, Debug)]
struct QmpArgs {
    /// QMP socket of the VM (vmferry's or QEMU's)
    #[arg(long, value_name = "PATH")]
    qmp: PathBuf,
}

/// The whole program: the arguments of this process, logging, and errors as one line.
pub fn main() -> ExitCode {
    let inheritance = match succession::take() {
        Ok(inheritance) => inheritance,
        Err(error) => {
            output::message(&format!(
                "the guest of the program before is lost: {error:#}"
            ));
            return exit::Exit::Failed.code();
        }
    };
    let ended = match inheritance {
        None => Cli::parse().run(None),
        Some(inheritance) => {
            let way_back = inheritance.way_back.clone();
            way_back.guard(|| go_on(inheritance))
        }
    };
    match ended {
        Ok(code) => code,
        Err(error) => {
            let text = format!("{error:#}");
            if logging::is_json() {
                logging::announce(format_args!("{text}"));
            } else {
                output::message(&text);
            }
            exit::Exit::Failed.code()
        }
    }
}

/// A guest stands, which the program before has left.
fn go_on(mut inheritance: Inheritance) -> anyhow::Result<ExitCode> {
    // The machine is built while its command line is read.
    crate::engine::begin_machine(&mut inheritance);
    let cli = Cli::try_parse().map_err(|error| {
        // Usage and advice are for whoever is at a terminal.
        let why = error.to_string();
        anyhow::Error::msg(why.lines().next().unwrap_or_default().to_owned())
    })?;
    cli.run(Some(inheritance))
}

impl Cli {
    fn run(self, inheritance: Option<Inheritance>) -> anyhow::Result<ExitCode> {
        self.log.start(style::Colours::of_stderr().on());
        self.execute(inheritance)
    }

    /// Does what was asked for; with what the program before has left, if this process was one.
    ///
    /// # Errors
    /// What went wrong, with its causes; to be shown to the user.
    pub fn execute(self, inheritance: Option<Inheritance>) -> anyhow::Result<ExitCode> {
        let exit = match self.command {
            Command::Run(args) => return args.execute(inheritance),
            _ if inheritance.is_some() => anyhow::bail!("this is no `vmferry run`"),
            Command::Demo(args) => return args.execute(),
            Command::WorkloadImage(args) => return args.execute(),
            Command::Report(args) => return args.execute(),
            Command::Migrate(args) => args.execute(),
            Command::Upgrade(args) => args.execute(),
            Command::Status(args) => args.execute(),
            Command::Cancel(args) => args.execute(),
            Command::Continue(args) => args.execute(),
            Command::Pause(args) => args.execute(),
            Command::Yank(args) => args.execute(),
            Command::Resolve(args) => args.execute(),
            Command::Incoming(args) => args.execute(),
            Command::Set(args) => args.execute(),
            Command::Capabilities(args) => args.execute(),
        };
        Ok(exit?.code())
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_option_is_explained_and_every_command_has_an_example() {
        for command in Cli::command().get_subcommands() {
            let name = command.get_name();
            assert!(command.get_about().is_some(), "{name}");
            assert!(
                command
                    .get_after_help()
                    .is_some_and(|h| h.to_string().contains("vmferry ")),
                "{name}"
            );
            for argument in command.get_arguments().filter(|a| !a.is_hide_set()) {
                assert!(argument.get_help().is_some(), "{name} {argument}");
            }
        }
    }
}
