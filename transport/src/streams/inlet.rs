//! What an archive is read from.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::event::PollFlags;

use super::command::{Command, Direction};
use super::interrupt::Interrupt;
use super::{StreamError, StreamFault, is_regular};

/// A file, pipe or command that gives an archive, not begun yet.
#[derive(Debug)]
pub struct Inlet {
    name: String,
    file: File,
    regular: bool,
    command: Option<Command>,
    interrupt: Interrupt,
}

impl Inlet {
    /// Opens a file whose archive begins at `offset`. May block as file systems do.
    ///
    /// # Errors
    /// When it cannot be opened or has no such offset.
    pub fn file(name: &str, path: &Path, offset: u64) -> Result<Self, StreamError> {
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map_err(|error| StreamFault::Open(error).of(name))?;
        Self::of_file(name, file, offset)
    }

    /// Takes a descriptor of a file that somebody opened for reading; otherwise as [`file`](Self::file).
    ///
    /// # Errors
    /// As [`file`](Self::file).
    pub fn of_file(name: &str, file: impl Into<File>, offset: u64) -> Result<Self, StreamError> {
        let mut file: File = file.into();
        let regular = is_regular(&file).map_err(|fault| fault.of(name))?;
        let mut begin = || -> io::Result<()> {
            if regular || offset > 0 {
                file.seek(SeekFrom::Start(offset))?;
            }
            if !regular {
                rustix::io::ioctl_fionbio(&file, true)?;
            }
            Ok(())
        };
        begin().map_err(|error| StreamFault::Open(error).of(name))?;
        Self::new(name, file, regular, None)
    }

    /// Takes the reading end of a pipe.
    ///
    /// # Errors
    /// When it is none.
    pub fn pipe(name: &str, pipe: OwnedFd) -> Result<Self, StreamError> {
        let mode = rustix::fs::fcntl_getfl(&pipe)
            .and_then(|flags| rustix::io::ioctl_fionbio(&pipe, true).map(|()| flags))
            .map_err(|error| StreamFault::Open(error.into()).of(name))?;
        if mode & rustix::fs::OFlags::RWMODE == rustix::fs::OFlags::WRONLY {
            return Err(StreamFault::Kind("this is the writing end of a pipe").of(name));
        }
        Self::new(name, pipe.into(), false, None)
    }

    /// Starts a command that writes the archive to its standard output.
    ///
    /// # Errors
    /// When no process can be started. A command that does not exist is noticed later: the shell says so.
    pub fn command(name: &str, command: &str) -> Result<Self, StreamError> {
        let (command, pipe) = Command::spawn(command, Direction::Drain)
            .map_err(|error| StreamFault::Open(error).of(name))?;
        Self::new(name, pipe.into(), false, Some(command))
    }

    fn new(
        name: &str,
        file: File,
        regular: bool,
        command: Option<Command>,
    ) -> Result<Self, StreamError> {
        let interrupt = Interrupt::new().map_err(|error| StreamFault::Open(error).of(name))?;
        Ok(Self {
            name: name.to_owned(),
            file,
            regular,
            command,
            interrupt,
        })
    }

    /// The address, for messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn interrupt(&self) -> Interrupt {
        self.interrupt.clone()
    }

    /// The stream has ended early: how the command behind it ended, if that is why.
    pub(super) fn failure(&mut self) -> Option<StreamFault> {
        let status = self.command.as_mut()?.ended_soon(&self.interrupt)?;
        (!status.success()).then(|| StreamFault::Command(status.to_string()))
    }

    /// Everything has been read: waits for the command to succeed.
    pub(super) fn finish(&mut self) -> Result<(), StreamFault> {
        let Some(command) = &mut self.command else {
            return Ok(());
        };
        let status = command.wait(&self.interrupt).map_err(StreamFault::Read)?;
        if status.success() {
            return Ok(());
        }
        Err(StreamFault::Command(status.to_string()))
    }
}

impl Read for Inlet {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        loop {
            // Before the first read too: a pipe that nobody has opened for writing yet reads as ended.
            if !self.regular {
                self.interrupt
                    .wait(self.file.as_fd(), PollFlags::IN, None)?;
            }
            match self.file.read(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                done => return done,
            }
        }
    }
}
