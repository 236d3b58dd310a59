//! The processes of an upgrade: the one that runs the VM, found through its monitor, and the one that takes over.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::LOOK_EVERY;

/// Bit of the flags in /proc/net/unix: the socket listens.
const ACCEPTS: u32 = 1 << 16;

/// A process that is not our child.
#[derive(Debug)]
pub(super) struct VmProcess {
    pid: Pid,
    /// Names this process even after another has got its number.
    handle: OwnedFd,
}

impl VmProcess {
    /// The process with this number.
    pub(super) fn open(pid: Pid) -> anyhow::Result<Self> {
        let handle = pidfd_open(pid, PidfdFlags::empty())
            .with_context(|| format!("the VM's process {} is out of reach", number(pid)))?;
        Ok(Self { pid, handle })
    }

    pub(super) fn pid(&self) -> Pid {
        self.pid
    }

    pub(super) fn number(&self) -> i32 {
        number(self.pid)
    }

    fn file(&self, name: &str) -> PathBuf {
        format!("/proc/{}/{name}", self.number()).into()
    }

    /// Its program and arguments.
    pub(super) fn command(&self) -> anyhow::Result<Vec<OsString>> {
        let path = self.file("cmdline");
        let bytes = fs::read(&path).with_context(|| {
            format!(
                "cannot read the VM's command line in {}; give it after --",
                path.display()
            )
        })?;
        let bytes = bytes.strip_suffix(&[0]).unwrap_or(&bytes);
        if bytes.is_empty() {
            bail!("the VM's process shows no command line; give it after --");
        }
        let words = bytes.split(|byte| *byte == 0);
        Ok(words
            .map(|word| OsString::from_vec(word.to_vec()))
            .collect())
    }

    /// Starts `command` where this process was started, with its output going where this one's goes. Outlives us and our terminal.
    pub(super) fn start_another(&self, command: &[OsString]) -> anyhow::Result<Child> {
        let (program, arguments) = command.split_first().context("the command is empty")?;
        let output = |fd: &str| match self.output(fd) {
            Some(file) => Stdio::from(file),
            None => Stdio::null(),
        };
        let mut command = Command::new(program);
        command
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(output("1"))
            .stderr(output("2"))
            .process_group(0);
        if let Ok(folder) = fs::read_link(self.file("cwd")) {
            command.current_dir(folder);
        }
        command
            .spawn()
            .with_context(|| format!("cannot start {}", Path::new(program).display()))
    }

    /// One of its outputs, if that is something that can be opened again.
    fn output(&self, fd: &str) -> Option<File> {
        let path = self.file("fd").join(fd);
        OpenOptions::new().append(true).open(path).ok()
    }

    /// Whether it ends within `patience`.
    pub(super) fn ends(&self, patience: Duration) -> io::Result<bool> {
        let deadline = Instant::now() + patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).map_err(io::Error::other)?;
            match poll(&mut [PollFd::new(&self.handle, PollFlags::IN)], Some(&left)) {
                Err(rustix::io::Errno::INTR) => {}
                answer => return Ok(answer? > 0),
            }
        }
    }
}

fn number(pid: Pid) -> i32 {
    pid.as_raw_nonzero().get()
}

/// Waits until `ready`, which looks at the new process from outside.
///
/// # Errors
/// It ends first, or is not ready in time.
pub(super) fn wait_for(
    child: &mut Child,
    what: &str,
    patience: Duration,
    mut ready: impl FnMut() -> bool,
) -> anyhow::Result<()> {
    let deadline = Instant::now() + patience;
    loop {
        if ready() {
            return Ok(());
        }
        if let Some(status) = child.try_wait()? {
            bail!(
                "the new process ended before it {what} ({})",
                ending(status)
            );
        }
        if Instant::now() >= deadline {
            bail!(
                "the new process has not {what} within {} s",
                patience.as_secs()
            );
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn ending(status: ExitStatus) -> String {
    format!("{status}; its messages went where those of the old one go")
}

/// Names of unix sockets that a process listens at, kept while another that once listened there ends, and removes them. The second names
/// stay until [`restore`](Self::restore): a process that ends late may remove the others at any time.
#[derive(Debug)]
pub(super) struct KeptSockets(Vec<(PathBuf, PathBuf)>);

impl KeptSockets {
    /// Gives each socket of process `pid` a second name.
    pub(super) fn of(pid: u32) -> io::Result<Self> {
        Ok(Self::at(listening(pid)?, pid))
    }

    /// The same for those at these paths.
    pub(super) fn at(paths: Vec<PathBuf>, pid: u32) -> Self {
        let mut kept = Vec::new();
        for path in paths {
            let mut name = OsString::from(".");
            name.push(path.file_name().unwrap_or_default());
            name.push(format!(".upgrade-{pid}"));
            let second = path.with_file_name(name);
            // One that cannot be kept is not worth more than the upgrade.
            match fs::hard_link(&path, &second) {
                Ok(()) => kept.push((path, second)),
                Err(error) => tracing::warn!(%error, "{} may vanish", path.display()),
            }
        }
        Self(kept)
    }

    /// Whether `process` ends within `patience`. Clients find the sockets meanwhile.
    pub(super) fn while_ends(&self, process: &VmProcess, patience: Duration) -> io::Result<bool> {
        let deadline = Instant::now() + patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let ended = process.ends(LOOK_EVERY.min(left))?;
            for (path, second) in &self.0 {
                // Fails as long as the name is there. What else may be wrong is told when it is put back for good.
                let _ = fs::hard_link(second, path);
            }
            if ended || left.is_zero() {
                return Ok(ended);
            }
        }
    }

    /// Puts back what was removed, and takes the second names away. Nobody removes any more.
    ///
    /// # Errors
    /// The first, after all were tried.
    pub(super) fn restore(self) -> io::Result<()> {
        let put_back = |(path, second): (PathBuf, PathBuf)| {
            // Replaces what the old process left, were it anything; the same socket stays what it is.
            fs::rename(&second, &path)?;
            // Two names of one socket: rename does nothing then.
            if second.exists() {
                fs::remove_file(&second)?;
            }
            Ok(())
        };
        let all: Vec<io::Result<()>> = self.0.into_iter().map(put_back).collect();
        all.into_iter().collect()
    }

    /// Commands for a shell that put back what is removed after all.
    pub(super) fn commands(&self) -> String {
        let quoted = |path: &Path| path.display().to_string().replace('\'', r"'\''");
        let commands = self
            .0
            .iter()
            .map(|(path, second)| format!("mv '{}' '{}'", quoted(second), quoted(path)));
        commands.collect::<Vec<_>>().join("; ")
    }
}

/// Where process `pid` listens.
pub(super) fn listening(pid: u32) -> io::Result<Vec<PathBuf>> {
    let mut inodes = BTreeSet::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        // Descriptors come and go while we look.
        let Ok(target) = fs::read_link(entry?.path()) else {
            continue;
        };
        let text = target.to_string_lossy();
        if let Some(inode) = text.strip_prefix("socket:[") {
            inodes.insert(inode.trim_end_matches(']').to_owned());
        }
    }
    let folder = fs::read_link(format!("/proc/{pid}/cwd"))?;
    let table = fs::read(format!("/proc/{pid}/net/unix"))?;
    let lines = table.split(|byte| *byte == b'\n').skip(1);
    let paths = lines.filter_map(|line| {
        let (path, inode) = listener(line)?;
        inodes.contains(inode).then(|| folder.join(path))
    });
    Ok(paths.collect())
}

/// Path and inode of a line of /proc/net/unix, if that is a listening socket with a path. The columns are padded with blanks, and a path
/// may have some too: Num, RefCount, Protocol, Flags, Type, St, Inode, Path.
fn listener(line: &[u8]) -> Option<(&Path, &str)> {
    let (flags, rest) = word(after(line, 3)?)?;
    let accepts = u32::from_str_radix(flags, 16).ok()? & ACCEPTS != 0;
    let (inode, path) = word(after(rest, 2)?)?;
    let path = path.strip_prefix(b" ").filter(|path| !path.is_empty())?;
    let is_path = accepts && !path.starts_with(b"@");
    is_path.then(|| (Path::new(OsStr::from_bytes(path)), inode))
}

/// What follows this many words.
fn after(text: &[u8], words: usize) -> Option<&[u8]> {
    (0..words).try_fold(text, |text, _| Some(word(text)?.1))
}

/// The first word, and what follows it.
fn word(text: &[u8]) -> Option<(&str, &[u8])> {
    let text = text.trim_ascii_start();
    let end = text.iter().position(|byte| *byte == b' ');
    let (word, rest) = text.split_at(end.unwrap_or(text.len()));
    Some((std::str::from_utf8(word).ok()?, rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::{UnixListener, UnixStream};

    #[test]
    fn sockets_that_listen_are_found_and_survive_the_loss_of_their_name() {
        let dir = tempfile::tempdir().unwrap();
        let (path, other) = (dir.path().join("a b"), dir.path().join("other"));
        let listener = UnixListener::bind(&path).unwrap();
        let _dropped = UnixListener::bind(&other).unwrap();
        let found = listening(std::process::id()).unwrap();
        assert!(found.contains(&path) && found.contains(&other), "{found:?}");
        // Others of this process come and go with their tests.
        let kept = KeptSockets::at(vec![path.clone(), other], std::process::id());
        fs::remove_file(&path).unwrap();
        assert!(UnixStream::connect(&path).is_err());
        kept.restore().unwrap();
        assert!(UnixStream::connect(&path).is_ok());
        drop(listener);
        let left: Vec<_> = fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(left.len(), 2, "{left:?}");
    }

    #[test]
    fn a_process_shows_its_command_line_and_its_end() {
        let mut child = Command::new("sleep").arg("100").spawn().unwrap();
        let process = VmProcess::open(Pid::from_child(&child)).unwrap();
        // It is there a moment later than the process.
        let command = std::iter::repeat_with(|| process.command())
            .take(1_000_000)
            .find_map(Result::ok);
        assert_eq!(command.unwrap(), ["sleep", "100"]);
        assert!(!process.ends(Duration::ZERO).unwrap());
        child.kill().unwrap();
        assert!(process.ends(Duration::from_secs(20)).unwrap());
        child.wait().unwrap();
    }

    #[test]
    fn a_new_process_that_ends_too_early_is_no_reason_to_wait() {
        let mut child = Command::new("false").spawn().unwrap();
        let patience = Duration::from_secs(60);
        let error = wait_for(&mut child, "listened", patience, || false).unwrap_err();
        assert!(
            error.to_string().contains("ended before it listened"),
            "{error}"
        );
    }

    #[test]
    fn lines_of_the_socket_table_are_read_with_blanks_in_the_path() {
        let line = b"0000000000000000: 00000002 00000000 00010000 0001 01 20414 /run/a b";
        let (path, inode) = listener(line).unwrap();
        assert_eq!((path, inode), (Path::new("/run/a b"), "20414"));
        let connected = b"0000000000000000: 00000003 00000000 00000000 0001 03    22 /run/a";
        assert_eq!(listener(connected), None);
        let nameless = b"0000000000000000: 00000002 00000000 00010000 0001 01 20414";
        assert_eq!(listener(nameless), None);
    }
}
