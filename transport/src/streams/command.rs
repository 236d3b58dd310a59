//! A command that takes or gives an archive: in a process group of its own, and gone when it is not wanted any more.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, ExitStatus, Stdio};
use std::time::Duration;

use rustix::event::PollFlags;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

use super::interrupt::{Interrupt, Waited};

/// How long a command may take to end when it was asked to, before it is made to.
const GRACE: Duration = Duration::from_millis(500);

/// A running command. Dropping it ends it, with everything it has started that did not leave its process group.
#[derive(Debug)]
pub(super) struct Command {
    child: Child,
    /// Readable when it has ended. Unlike the number it never names another process.
    pidfd: OwnedFd,
    reaped: bool,
}

/// Which end of the command is ours.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Direction {
    /// We write what it reads.
    Feed,
    /// We read what it writes.
    Drain,
}

impl Command {
    /// Starts `command` in a shell. Returns our end of the pipe, not blocking. What it says on standard error goes to ours.
    pub(super) fn spawn(command: &str, direction: Direction) -> io::Result<(Self, OwnedFd)> {
        let (stdin, stdout) = match direction {
            Direction::Feed => (Stdio::piped(), Stdio::null()),
            Direction::Drain => (Stdio::null(), Stdio::piped()),
        };
        let mut child = std::process::Command::new("/bin/sh")
            .arg("-c")
            .arg(command)
            .stdin(stdin)
            .stdout(stdout)
            .process_group(0)
            .spawn()?;
        let pipe: Option<OwnedFd> = match direction {
            Direction::Feed => child.stdin.take().map(OwnedFd::from),
            Direction::Drain => child.stdout.take().map(OwnedFd::from),
        };
        let pipe = pipe.ok_or_else(|| io::Error::other("the command has no pipe"))?;
        let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty());
        let pidfd = match pidfd {
            Ok(pidfd) => pidfd,
            Err(error) => {
                end_group(&child, Signal::KILL);
                // It was killed just now.
                let _ = child.wait();
                return Err(error.into());
            }
        };
        let command = Self {
            child,
            pidfd,
            reaped: false,
        };
        rustix::io::ioctl_fionbio(&pipe, true)?;
        Ok((command, pipe))
    }

    /// Waits until it ends by itself.
    pub(super) fn wait(&mut self, interrupt: &Interrupt) -> io::Result<ExitStatus> {
        interrupt.wait(self.pidfd.as_fd(), PollFlags::IN, None)?;
        self.reap()
    }

    /// How it ended, if it has or does so now: a shell closes the pipe a moment before it ends.
    pub(super) fn ended_soon(&mut self, interrupt: &Interrupt) -> Option<ExitStatus> {
        match interrupt.wait(self.pidfd.as_fd(), PollFlags::IN, Some(GRACE)) {
            Ok(Waited::Ready) => self.reap().ok(),
            _ => None,
        }
    }

    fn reap(&mut self) -> io::Result<ExitStatus> {
        let status = self.child.wait()?;
        self.reaped = true;
        Ok(status)
    }
}

impl Drop for Command {
    fn drop(&mut self) {
        if self.reaped {
            return;
        }
        end_group(&self.child, Signal::TERM);
        let gone = Interrupt::new()
            .and_then(|never| never.wait(self.pidfd.as_fd(), PollFlags::IN, Some(GRACE)));
        if !matches!(gone, Ok(Waited::Ready)) {
            tracing::warn!(
                pid = self.child.id(),
                "the command does not end, killing it"
            );
        }
        // Its number is taken as long as it is not reaped, so this hits nobody else; what it left behind goes with it.
        end_group(&self.child, Signal::KILL);
        // It was killed just now.
        let _ = self.reap();
    }
}

fn end_group(child: &Child, signal: Signal) {
    // Fails only when nobody is left.
    let _ = kill_process_group(Pid::from_child(child), signal);
}
