//! Guest RAM in a file with a name: on a tmpfs, a hugetlbfs or a DAX file system, where it outlives the process that uses it.
//!
//! Unlike a sealed memfd such a file may shrink under a mapping, by the hand of anybody who may write it; an access then ends in SIGBUS.
//! So it is made for its owner alone, and a lock keeps two VMs from using it at a time. The lock belongs to the open file: it goes along
//! when the descriptor is handed to another process, and ends with the last copy.

use std::fs::{File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::{FileType, FlockOperation, OFlags, Stat, flock, fstat, fstatvfs};
use rustix::io::FdFlags;

use crate::CprError;

/// Opens the file at `path` as `bytes` of RAM, and makes it if there is none: mode 0600, close-on-exec, locked. What an existing file
/// holds is kept. Also says whether the file is new: then it has no length before [`lengthen`], so that a start which is given up in
/// between, or dies, leaves nothing that would pass for memory.
///
/// # Errors
/// [`CprError::Request`] for a size that makes no RAM in this file system, or if there is no room for it, [`CprError::Descriptor`] if
/// there is something else or a file of another size, or another process uses it, [`CprError::Host`] if the kernel refuses.
pub fn open(path: &Path, bytes: u64) -> Result<(File, bool), CprError> {
    let name = path.display().to_string();
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(|error| CprError::host(format!("opening {name}"), error))?;
    let stat =
        fstat(&file).map_err(|error| CprError::host(format!("asking about {name}"), error))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(refuse(&name, "it is not a file".to_owned()));
    }
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => {
            return Err(refuse(&name, "another process uses it".to_owned()));
        }
        Err(error) => return Err(CprError::host(format!("locking {name}"), error)),
    }
    // The page size of a hugetlbfs, and never less than a page elsewhere.
    let unit = u64::try_from(stat.st_blksize).unwrap_or(4096).max(4096);
    if bytes == 0 || !bytes.is_multiple_of(unit) || i64::try_from(bytes).is_err() {
        return Err(CprError::Request(format!(
            "RAM of {bytes} bytes in {name}: the size must be a positive multiple of {unit}"
        )));
    }
    check_room(&file, &name, &stat, bytes)?;
    match u64::try_from(stat.st_size) {
        Ok(0) => Ok((file, true)),
        Ok(size) if size == bytes => Ok((file, false)),
        _ => {
            let size = stat.st_size;
            Err(refuse(
                &name,
                format!("it has {size} bytes, expected {bytes}"),
            ))
        }
    }
}

/// Makes a new file `bytes` of RAM, all holes.
///
/// # Errors
/// [`CprError::Host`] if the kernel refuses; the file is as it was.
pub fn lengthen(file: &File, bytes: u64) -> Result<(), CprError> {
    file.set_len(bytes)
        .map_err(|error| CprError::host(format!("sizing a file of RAM to {bytes} bytes"), error))
}

/// Empties such a file: all holes again, of the same size. Nothing may have it mapped.
///
/// # Errors
/// [`CprError::Host`] if the kernel refuses; the file may have no length then.
pub fn empty(file: &File) -> Result<(), CprError> {
    let emptied = file.metadata().and_then(|stat| {
        file.set_len(0)?;
        file.set_len(stat.len())
    });
    emptied.map_err(|error| CprError::host("emptying a file of RAM", error))
}

/// A guest that touches memory for which there is no room is killed, so it is looked for before. Others may still use it up.
fn check_room(file: &File, name: &str, stat: &Stat, bytes: u64) -> Result<(), CprError> {
    let room =
        fstatvfs(file).map_err(|error| CprError::host(format!("asking about {name}"), error))?;
    // Without a limit of its own, as hugetlbfs is by default.
    if room.f_blocks == 0 {
        return Ok(());
    }
    let there = u64::try_from(stat.st_blocks)
        .unwrap_or(0)
        .saturating_mul(512);
    let free = room.f_bavail.saturating_mul(room.f_frsize);
    if there.saturating_add(free) >= bytes {
        return Ok(());
    }
    Err(CprError::Request(format!(
        "RAM of {bytes} bytes in {name}: its file system has only {free} bytes left; make room, or mount it with a larger size="
    )))
}

/// Takes over such a file that another process handed to this one, after checking that it is a file of `expected_bytes` that can be read
/// and written. The descriptor is close-on-exec afterwards. On error it is closed.
///
/// # Errors
/// [`CprError::Descriptor`] when it is something else, [`CprError::Host`] when the kernel refuses to tell.
pub fn reattach(name: &str, fd: OwnedFd, expected_bytes: u64) -> Result<File, CprError> {
    let ask = |what: &str, error: rustix::io::Errno| {
        CprError::host(format!("{what} of descriptor {name:?}"), error)
    };
    rustix::io::fcntl_setfd(&fd, FdFlags::CLOEXEC)
        .map_err(|error| ask("setting close-on-exec", error))?;
    let stat = fstat(&fd).map_err(|error| ask("reading the type", error))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(refuse(name, "it is not a file".to_owned()));
    }
    let mode = rustix::fs::fcntl_getfl(&fd).map_err(|error| ask("reading the mode", error))?;
    if mode & OFlags::ACCMODE != OFlags::RDWR || mode.contains(OFlags::PATH) {
        return Err(refuse(
            name,
            "it is not open for reading and writing".to_owned(),
        ));
    }
    if u64::try_from(stat.st_size) != Ok(expected_bytes) {
        let size = stat.st_size;
        let reason = format!("it has {size} bytes, expected {expected_bytes}");
        return Err(refuse(name, reason));
    }
    Ok(fd.into())
}

fn refuse(name: &str, reason: String) -> CprError {
    CprError::Descriptor {
        name: name.to_owned(),
        reason,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};

    use super::*;

    const BYTES: u64 = 1 << 20;

    fn refusal<T: std::fmt::Debug>(outcome: Result<T, CprError>) -> String {
        match outcome {
            Err(error) => error.to_string(),
            Ok(accepted) => panic!("accepted: {accepted:?}"),
        }
    }

    #[test]
    fn what_a_vm_wrote_is_there_when_the_next_one_opens_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ram");
        let (given_up, is_new) = open(&path, BYTES).unwrap();
        assert!(is_new);
        drop(given_up);
        let (ram, is_new) = open(&path, BYTES).unwrap();
        assert!(is_new, "nothing was ever in it");
        lengthen(&ram, BYTES).unwrap();
        let stat = ram.metadata().unwrap();
        assert_eq!((stat.len(), stat.blocks()), (BYTES, 0));
        assert_eq!(stat.permissions().mode() & 0o777, 0o600);
        ram.write_all_at(b"guest", 4096).unwrap();
        drop(ram);
        let mut seen = [0; 5];
        let (ram, is_new) = open(&path, BYTES).unwrap();
        assert!(!is_new);
        ram.read_exact_at(&mut seen, 4096).unwrap();
        assert_eq!(&seen, b"guest");
        empty(&ram).unwrap();
        ram.read_exact_at(&mut seen, 4096).unwrap();
        let stat = ram.metadata().unwrap();
        assert_eq!((&seen, stat.len(), stat.blocks()), (&[0; 5], BYTES, 0));
    }

    #[test]
    fn ram_that_its_file_system_has_no_room_for_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let room = fstatvfs(File::open(folder.path()).unwrap()).unwrap();
        let unit = 1 << 21;
        let bytes = (room.f_blocks * room.f_frsize / unit + 1) * unit;
        let reason = refusal(open(&folder.path().join("ram"), bytes));
        assert!(reason.contains("make room"), "{reason}");
    }

    #[test]
    fn only_one_vm_uses_it_and_the_lock_goes_along_with_the_descriptor() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ram");
        let (ram, _) = open(&path, BYTES).unwrap();
        lengthen(&ram, BYTES).unwrap();
        let handed: OwnedFd = ram.try_clone().unwrap().into();
        drop(ram);
        assert!(refusal(open(&path, BYTES)).contains("another process"));
        let ram = reattach("ram0", handed, BYTES).unwrap();
        assert!(refusal(open(&path, BYTES)).contains("another process"));
        drop(ram);
        open(&path, BYTES).unwrap();
    }

    #[test]
    fn what_is_no_such_file_is_refused_and_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ram");
        std::fs::write(&path, b"somebody's file").unwrap();
        let reason = refusal(open(&path, BYTES));
        assert!(
            reason.contains("15") && reason.contains("1048576"),
            "{reason}"
        );
        assert_eq!(std::fs::read(&path).unwrap(), b"somebody's file");
        let null = OpenOptions::new().read(true).write(true).open("/dev/null");
        assert!(refusal(reattach("ram0", null.unwrap().into(), BYTES)).contains("not a file"));
        let readable = File::open(&path).unwrap();
        assert!(refusal(reattach("ram0", readable.into(), 15)).contains("reading and writing"));
        let new = folder.path().join("new");
        assert!(matches!(open(&new, 4097), Err(CprError::Request(_))));
    }
}
