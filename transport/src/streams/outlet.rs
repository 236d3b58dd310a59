//! What an archive is written to.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::event::PollFlags;

use super::command::{Command, Direction};
use super::interrupt::{Interrupt, given_up};
use super::{StreamError, StreamFault, is_regular};

/// Bytes written to a file before it is waited for that they are on the disk. The wait for the last of them comes while the guest is
/// stopped, and nothing may take longer than a stalled link.
const SYNC_BYTES: u64 = 64 << 20;

/// A file, pipe or command that takes an archive, not begun yet.
#[derive(Debug)]
pub struct Outlet {
    name: String,
    file: Option<File>,
    kind: Kind,
    interrupt: Interrupt,
    /// Nothing of the archive is missing but the word that it is safe.
    whole: bool,
    /// Who holds up the disk.
    #[cfg(test)]
    pub(super) slow_disk: Option<SlowDisk>,
}

/// A disk that takes its time for what is synced last.
#[cfg(test)]
#[derive(Debug)]
pub(super) struct SlowDisk {
    /// Told when it begins.
    pub(super) begun: std::sync::mpsc::Sender<()>,
    /// Ends it.
    pub(super) go: std::sync::mpsc::Receiver<()>,
}

#[derive(Debug)]
enum Kind {
    /// A regular file, whose bytes before `offset` are not ours.
    Regular { offset: u64, unsynced: u64 },
    /// A pipe or a device.
    Stream,
    /// The pipe to a command.
    Command(Command),
}

impl Outlet {
    /// Opens a file for the archive at `offset`: made with mode 0600 if it does not exist, cut at `offset` if it does. May block as
    /// file systems do.
    ///
    /// # Errors
    /// When it cannot be opened or has no such offset.
    pub fn file(name: &str, path: &Path, offset: u64) -> Result<Self, StreamError> {
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            // A pipe without a reader must not keep us waiting.
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map_err(|error| StreamFault::Open(error).of(name))?;
        // The name of a new file has to survive a crash of the host as its bytes do. Not every file system can be asked.
        let folder = path.parent().filter(|path| !path.as_os_str().is_empty());
        let synced = File::open(folder.unwrap_or_else(|| Path::new(".")))
            .and_then(|folder| folder.sync_all());
        tracing::debug!(name, synced = synced.is_ok(), "archive file opened");
        Self::of_file(name, file, offset)
    }

    /// Takes a descriptor of a file that somebody opened for writing; otherwise as [`file`](Self::file).
    ///
    /// # Errors
    /// As [`file`](Self::file).
    pub fn of_file(name: &str, file: impl Into<File>, offset: u64) -> Result<Self, StreamError> {
        let mut file: File = file.into();
        let regular = is_regular(&file).map_err(|fault| fault.of(name))?;
        let mut begin = || -> io::Result<Kind> {
            if regular {
                file.set_len(offset)?;
                file.seek(SeekFrom::Start(offset))?;
                return Ok(Kind::Regular {
                    offset,
                    unsynced: 0,
                });
            }
            if offset > 0 {
                file.seek(SeekFrom::Start(offset))?;
            }
            rustix::io::ioctl_fionbio(&file, true)?;
            Ok(Kind::Stream)
        };
        let kind = begin().map_err(|error| StreamFault::Open(error).of(name))?;
        Self::new(name, file, kind)
    }

    /// Takes the writing end of a pipe.
    ///
    /// # Errors
    /// When it is none.
    pub fn pipe(name: &str, pipe: OwnedFd) -> Result<Self, StreamError> {
        let mode = rustix::fs::fcntl_getfl(&pipe)
            .and_then(|flags| rustix::io::ioctl_fionbio(&pipe, true).map(|()| flags))
            .map_err(|error| StreamFault::Open(error.into()).of(name))?;
        if mode & rustix::fs::OFlags::RWMODE == rustix::fs::OFlags::RDONLY {
            return Err(StreamFault::Kind("this is the reading end of a pipe").of(name));
        }
        Self::new(name, pipe.into(), Kind::Stream)
    }

    /// Starts a command that reads the archive from its standard input.
    ///
    /// # Errors
    /// When no process can be started. A command that does not exist is noticed later: the shell says so.
    pub fn command(name: &str, command: &str) -> Result<Self, StreamError> {
        let (command, pipe) = Command::spawn(command, Direction::Feed)
            .map_err(|error| StreamFault::Open(error).of(name))?;
        Self::new(name, pipe.into(), Kind::Command(command))
    }

    fn new(name: &str, file: File, kind: Kind) -> Result<Self, StreamError> {
        let interrupt = Interrupt::new().map_err(|error| StreamFault::Open(error).of(name))?;
        Ok(Self {
            name: name.to_owned(),
            file: Some(file),
            kind,
            interrupt,
            whole: false,
            #[cfg(test)]
            slow_disk: None,
        })
    }

    /// The address, for messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn interrupt(&self) -> Interrupt {
        self.interrupt.clone()
    }

    /// Writes all of it.
    pub(super) fn put(&mut self, bytes: &[u8]) -> Result<(), StreamFault> {
        self.write_all(bytes).map_err(|error| self.fault(error))?;
        if let Kind::Regular { unsynced, .. } = &mut self.kind {
            *unsynced += bytes.len() as u64;
            if *unsynced >= SYNC_BYTES {
                self.sync()?;
            }
        }
        Ok(())
    }

    /// Waits until what a file holds is on the disk. Nothing of the kind exists for a pipe.
    pub(super) fn sync(&mut self) -> Result<(), StreamFault> {
        if let (Kind::Regular { unsynced, .. }, Some(file)) = (&mut self.kind, &self.file) {
            file.sync_data().map_err(StreamFault::Write)?;
            *unsynced = 0;
        }
        Ok(())
    }

    /// Everything has been written: waits for the disk, or for the command to succeed.
    pub(super) fn finish(&mut self) -> Result<(), StreamFault> {
        self.whole = true;
        #[cfg(test)]
        if let Some(SlowDisk { begun, go }) = self.slow_disk.take() {
            // A test that is over does not look.
            let _ = (begun.send(()), go.recv());
        }
        match (&mut self.kind, &self.file) {
            (Kind::Regular { .. }, Some(file)) => file.sync_all().map_err(StreamFault::Write),
            (Kind::Command(command), _) => {
                // It reads the end of its input.
                self.file = None;
                let waited = command.wait(&self.interrupt);
                let status = waited.map_err(|error| self.fault(error))?;
                if status.success() {
                    return Ok(());
                }
                Err(StreamFault::Command(status.to_string()))
            }
            _ => Ok(()),
        }
    }

    /// Whether it is a file, whose archive can be discarded however late.
    pub(super) fn is_file(&self) -> bool {
        matches!(self.kind, Kind::Regular { .. })
    }

    /// The archive is not to be: what a file holds of it goes. What a pipe has taken is without its end, unless all had been written.
    pub(super) fn discard(mut self) {
        let removed = match (&self.kind, &self.file) {
            (Kind::Regular { offset, .. }, Some(file)) => {
                let cut = file.set_len(*offset);
                // A whole one must not come back when the host loses power.
                cut.and_then(|()| if self.whole { file.sync_all() } else { Ok(()) })
            }
            _ if self.whole => Err(io::Error::other("it has been passed on")),
            _ => Ok(()),
        };
        if let Err(error) = removed {
            let error = &error as &dyn std::error::Error;
            let name = self.name.as_str();
            match self.whole {
                true => tracing::error!(
                    name,
                    error,
                    "an archive that was given up could not be removed and may load: see to it that nobody does, for the guest goes on here"
                ),
                false => tracing::warn!(
                    name,
                    error,
                    "what was written of an archive that failed could not be removed; it has no end and will not load"
                ),
            }
        }
        // Before the command is ended, in case it does not live for long anyway.
        self.file = None;
    }

    /// A command that failed knows more of the reason than the pipe to it.
    fn fault(&mut self, error: io::Error) -> StreamFault {
        if self.interrupt.is_raised() {
            return StreamFault::GivenUp;
        }
        if error.kind() == io::ErrorKind::BrokenPipe
            && let Kind::Command(command) = &mut self.kind
            && let Some(status) = command.ended_soon(&self.interrupt)
        {
            return StreamFault::Command(status.to_string());
        }
        StreamFault::Write(error)
    }
}

impl Write for Outlet {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let file = self.file.as_ref().ok_or(io::ErrorKind::BrokenPipe)?;
        if matches!(self.kind, Kind::Regular { .. }) && self.interrupt.is_raised() {
            return Err(given_up());
        }
        loop {
            match rustix::io::write(file, bytes) {
                Ok(count) => return Ok(count),
                Err(rustix::io::Errno::AGAIN) => {
                    self.interrupt.wait(file.as_fd(), PollFlags::OUT, None)?;
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
