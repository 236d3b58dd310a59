//! An upgrade by `execve`: the process stays, its program changes under the stopped guest.
//!
//! ```text
//!  old program                                        new program
//!  -----------                                        -----------
//!  asks a copy of the new one ([`ask`]) ------------> answers and ends
//!  guest stops, devices let go
//!  state into a memfd, letter into another
//!  execve ============== commit ====================> [`take`]: reads the letter, takes every descriptor
//!                                                     builds the machine round the memory, loads, runs the guest
//!  runs the guest, reports why  <=== one way back === execve of the old program ([`WayBack`]), if anything fails before that
//! ```
//!
//! What it is about is in `ARCHITECTURE.md`; the letter is [`vmferry_cpr::letter`].

pub mod account;
pub mod ask;
mod call;
pub(crate) mod keeper;
pub(crate) mod told;
mod way_back;

use std::ffi::{CString, OsStr, OsString};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use rustix::fs::Access;
use vmferry_cpr::envelope;
use vmferry_cpr::letter::{Leg, Letter, NUMBER_MIN};
use vmferry_cpr::table::FdTable;

use crate::machine::kvm::HeadStart;
use crate::observe::logging;

use told::Unhandled;

pub use account::Account;
pub use keeper::WayBackKeeper;
pub use way_back::WayBack;

/// The environment variable that names the number of the letter's memfd. In no environment but that of an exec.
pub const VARIABLE: &str = "VMFERRY_CPR_EXEC";
/// Name in the manifest of what belongs to the process and not to a device.
pub const PROCESS: &str = "process";
/// Role of the archive with the guest's state.
pub const ARCHIVE: &str = "archive";
/// Role of the program to go back to.
pub const PROGRAM: &str = "program";

/// A child that clears this program's memory away after the exec. Dropping it ends it: there was no exec.
#[derive(Debug)]
pub struct ClearsUp(Option<call::Holder>);

impl ClearsUp {
    /// Starts it. The exec works without one as well; it takes longer then.
    pub fn start() -> Self {
        let holder = call::Holder::start();
        let error = holder.as_ref().err();
        if let Some(error) = error {
            tracing::warn!(%error, "the exec has to clear guest memory away itself");
        }
        Self(holder.ok())
    }

    /// For the account.
    pub fn number(&self) -> i32 {
        self.0
            .as_ref()
            .map_or(0, |holder| holder.pid().as_raw_nonzero().get())
    }
}

/// What the program that this process was before has left.
#[derive(Debug)]
pub struct Inheritance {
    /// What it has written.
    pub letter: Letter,
    /// The same, for the VMM.
    pub account: Account,
    /// The descriptors.
    pub table: FdTable<OwnedFd>,
    /// When this program began, in microseconds of the monotonic clock.
    pub began_us: u64,
    /// How to become the old program again; nothing on the way back.
    pub way_back: WayBackKeeper,
    /// The machine, as far as it was begun, or why it was not.
    pub head_start: anyhow::Result<Option<HeadStart>>,
}

/// Takes what the program before has left, if there was one: to be called first of all, while this process has one thread. The variable
/// is gone afterwards, and every descriptor is close-on-exec.
///
/// # Errors
/// There was one, and what it has left cannot be used. Nobody runs the guest then.
pub fn take() -> anyhow::Result<Option<Inheritance>> {
    let began_us = account::now_us();
    let number = match call::take_variable(VARIABLE) {
        Some(value) => {
            let number = value.to_str().and_then(|text| text.parse().ok());
            number.with_context(|| format!("{VARIABLE}={value:?} is no descriptor"))?
        }
        None => match unnamed_letter() {
            Some(number) => number,
            None => return Ok(None),
        },
    };
    let memfd = call::adopt(number).with_context(|| format!("descriptor {number}"))?;
    let letter = envelope::open_letter(&memfd)?;
    let ours = std::process::id();
    ensure!(
        letter.pid == ours,
        "the letter is for process {}, this one is {ours}",
        letter.pid
    );
    ensure!(letter.leg != Leg::Asked, "the letter is a question");
    let account = Account::decode(&letter.account);
    let mut table = envelope::adopt(&letter, call::adopt)?;
    let way_back = match letter.leg {
        Leg::Back => None,
        // Without a way back the guest can still go on here.
        _ => WayBack::of(&letter, &mut table)
            .inspect_err(|error| {
                logging::announce(format_args!("no way back is kept: {error:#}"));
            })
            .ok(),
    };
    Ok(Some(Inheritance {
        letter,
        account,
        table,
        began_us,
        way_back: WayBackKeeper::new(way_back),
        head_start: Ok(None),
    }))
}

/// The letter of a process whose program was wrapped in one that has cleaned the environment: without the variable it is known by its
/// name. A question is not meant, which comes as the standard input.
fn unnamed_letter() -> Option<u32> {
    let link = format!("/memfd:{} (deleted)", envelope::NAME);
    let mut entries = std::fs::read_dir("/proc/self/fd").ok()?.flatten();
    entries.find_map(|entry| {
        let number = entry.file_name().to_str()?.parse().ok()?;
        let is_it = std::fs::read_link(entry.path()).ok()? == Path::new(&link);
        (number >= NUMBER_MIN && is_it).then_some(number)
    })
}

/// The program of a command, found and looked at.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Program {
    path: PathBuf,
    /// Device, inode, bytes and time of the last change: what was asked is what is executed.
    identity: (u64, u64, u64, i64, i64),
}

impl Program {
    /// Finds a program as a shell would: by its path, or by its name in `PATH`.
    ///
    /// # Errors
    /// There is none, or it cannot be executed.
    pub fn find(name: &OsStr) -> anyhow::Result<Self> {
        let path = if name.as_bytes().contains(&b'/') {
            std::path::absolute(name)?
        } else {
            let folders = std::env::var_os("PATH").unwrap_or_default();
            let mut places = std::env::split_paths(&folders).map(|folder| folder.join(name));
            places
                .find(|path| executable(path).is_ok())
                .with_context(|| format!("there is no program {} in PATH", name.display()))?
        };
        executable(&path).with_context(|| format!("{} cannot be executed", path.display()))?;
        let identity = identity(&path)?;
        Ok(Self { path, identity })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Becomes this program, unless the process was told to end. Returns only if that fails, and why.
    pub fn become_it(&self, words: &[OsString], number: u32) -> anyhow::Error {
        let run = || -> anyhow::Result<io::Error> {
            let signals = Unhandled::new()?;
            ensure!(
                identity(&self.path)? == self.identity,
                "it has changed since it was asked"
            );
            let path = c_string(self.path.as_os_str())?;
            let (words, environment) = (c_strings(words)?, environment(number)?);
            signals.ensure_not_told()?;
            Ok(call::execute(&path, &words, &environment))
        };
        let error = run().map_or_else(|error| error, anyhow::Error::from);
        error.context(format!("{} cannot be executed", self.path.display()))
    }
}

fn executable(path: &Path) -> io::Result<()> {
    let metadata = std::fs::metadata(path)?;
    if !metadata.is_file() {
        return Err(io::Error::other("it is no file"));
    }
    Ok(rustix::fs::access(path, Access::EXEC_OK)?)
}

fn identity(path: &Path) -> io::Result<(u64, u64, u64, i64, i64)> {
    use std::os::unix::fs::MetadataExt;
    let metadata = std::fs::metadata(path)?;
    Ok((
        metadata.dev(),
        metadata.ino(),
        metadata.len(),
        metadata.mtime(),
        metadata.mtime_nsec(),
    ))
}

/// The environment of this process, and the variable.
fn environment(number: u32) -> anyhow::Result<Vec<CString>> {
    let ours = std::env::vars_os().filter(|(name, _)| name != VARIABLE);
    let mut lines: Vec<OsString> = ours
        .map(|(name, value)| {
            [name.as_os_str(), OsStr::new("="), &value]
                .into_iter()
                .collect()
        })
        .collect();
    lines.push(format!("{VARIABLE}={number}").into());
    c_strings(&lines)
}

fn c_strings(words: &[OsString]) -> anyhow::Result<Vec<CString>> {
    words.iter().map(|word| c_string(word)).collect()
}

fn c_string(word: &OsStr) -> anyhow::Result<CString> {
    CString::new(word.as_bytes()).with_context(|| format!("{word:?} has a NUL"))
}

/// The command line of this process, for the way back.
pub fn own_words() -> Vec<Vec<u8>> {
    std::env::args_os().map(OsString::into_vec).collect()
}

/// Opens the program of this process, even if its file was replaced.
///
/// # Errors
/// What the kernel says.
pub fn own_program() -> io::Result<OwnedFd> {
    use rustix::fs::{Mode, OFlags, open};
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    Ok(open("/proc/self/exe", flags, Mode::empty())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_found_by_path_or_in_the_path_and_must_be_executable() {
        assert_eq!(
            Program::find(OsStr::new("/bin/sh")).unwrap().path(),
            Path::new("/bin/sh")
        );
        assert!(
            Program::find(OsStr::new("sh"))
                .unwrap()
                .path()
                .ends_with("sh")
        );
        for (name, part) in [
            ("/nowhere/vmferry", "/nowhere/vmferry cannot be executed"),
            ("/", "/ cannot be executed"),
            ("/proc/self/status", "cannot be executed"),
            ("no-such-program-anywhere", "in PATH"),
            ("", "in PATH"),
        ] {
            let error = Program::find(OsStr::new(name)).unwrap_err();
            assert!(format!("{error:#}").contains(part), "{name}: {error:#}");
        }
    }

    #[test]
    fn a_program_that_was_replaced_is_not_executed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new");
        std::fs::copy("/bin/true", &path).unwrap();
        let program = Program::find(path.as_os_str()).unwrap();
        std::fs::write(&path, "#!/bin/false\n").unwrap();
        let error = program.become_it(&["new".into()], 3);
        assert!(format!("{error:#}").contains("changed since"), "{error:#}");
    }

    #[test]
    fn the_environment_names_the_letter_once() {
        let lines = environment(7).unwrap();
        let ours = |line: &&CString| line.to_bytes().starts_with(VARIABLE.as_bytes());
        let found: Vec<_> = lines.iter().filter(ours).collect();
        assert_eq!(found, [c"VMFERRY_CPR_EXEC=7"]);
        assert!(lines.len() > 1, "the rest of the environment stays");
    }
}
