//! Who stands in the way, for error texts: the process that holds a lock, or at least has the file open.

use std::ffi::OsStr;
use std::fmt;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::lock;

/// Most processes that are looked at: an error text is not worth more, and the guest may be stopped meanwhile.
const PROCESSES_MAX: usize = 4096;
/// Longest process name that is shown; the kernel keeps 15 characters.
const NAME_CHARS_MAX: usize = 16;

/// A process that is in the way.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Holder {
    /// Its number.
    pub pid: u32,
    /// Its name; empty if it cannot be read.
    pub name: String,
    /// Whether the kernel named it. Otherwise it has the file open, and nobody knows more.
    pub certain: bool,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pid, name, certain } = self;
        write!(f, "process {pid}")?;
        if !name.is_empty() {
            write!(f, " ({name})")?;
        }
        f.write_str(if *certain {
            " holds it"
        } else {
            " has the file open"
        })
    }
}

/// Who probably holds a lock on `file`, which this process has open without a lock. None if this process may not look, or if it is on
/// another host.
pub(super) fn find(file: &File) -> Option<Holder> {
    if let Some(pid) = lock::owner(file) {
        return Some(holder(pid, true));
    }
    let wanted = file.metadata().ok()?;
    let wanted = (wanted.dev(), wanted.ino());
    let own = std::process::id();
    let others = fs::read_dir("/proc")
        .ok()?
        .flatten()
        .filter_map(|entry| number(&entry.file_name()))
        .filter(|pid| *pid != own);
    // This process last: its own opening is always found, and may be the other one of two disks on the same file.
    others
        .take(PROCESSES_MAX)
        .find(|pid| opened(*pid, wanted) > 0)
        .or_else(|| (opened(own, wanted) > 1).then_some(own))
        .map(|pid| holder(pid, false))
}

/// How many descriptors of process `pid` lead to the file with these device and inode numbers.
fn opened(pid: u32, wanted: (u64, u64)) -> usize {
    let Ok(descriptors) = fs::read_dir(format!("/proc/{pid}/fd")) else {
        return 0;
    };
    descriptors
        .flatten()
        .filter(|entry| {
            fs::metadata(entry.path()).is_ok_and(|found| (found.dev(), found.ino()) == wanted)
        })
        .count()
}

fn holder(pid: u32, certain: bool) -> Holder {
    let path = format!("/proc/{pid}/comm");
    let name = fs::read_to_string(Path::new(&path)).unwrap_or_default();
    // A process names itself as it likes.
    let name = name
        .trim_end()
        .chars()
        .filter(|c| !c.is_control())
        .take(NAME_CHARS_MAX)
        .collect();
    Holder { pid, name, certain }
}

fn number(name: &OsStr) -> Option<u32> {
    name.to_str()?.parse().ok()
}
