//! A mark beside a file of guest RAM: which saved guest the memory belongs to.
//!
//! The state of a guest and its memory lie in different files here, and only both together are a guest. The mark names the archive. It is
//! set when a guest has been saved, and removed before a guest is started on the memory, so neither memory that another guest has used
//! meanwhile nor an archive that was loaded once passes for the other's half.
//!
//! It is an empty file beside it, `PATH.saved-ID`: what it says is in its name, which is there in one step, and which file systems whose
//! files cannot be written, such as hugetlbfs, have too.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use vmferry_transport::units::MigrationId;

use crate::CprError;

/// What follows the name of the file of RAM in that of its mark; the id comes behind it, in hexadecimal digits.
const INFIX: &str = ".saved-";

/// Where the mark is that says that the memory at `ram` belongs to the saved guest `id`.
pub fn path(ram: &Path, id: MigrationId) -> PathBuf {
    let mut path = OsString::from(ram);
    path.push(format!("{INFIX}{id}"));
    path.into()
}

/// The saved guest that the memory at `ram` belongs to, if there is one.
///
/// # Errors
/// [`CprError::Descriptor`] if there are several marks, or something with such a name that is none, [`CprError::Host`] if the kernel does
/// not tell.
pub fn read(ram: &Path) -> Result<Option<MigrationId>, CprError> {
    match marks(ram)?[..] {
        [] => Ok(None),
        [id] => Ok(Some(id)),
        [id, ..] => Err(CprError::Descriptor {
            name: ram.display().to_string(),
            reason: format!(
                "it has several marks of saved guests beside it, one is {}: remove those that are wrong",
                path(ram, id).display()
            ),
        }),
    }
}

/// Marks the memory at `ram` as that of the saved guest `id`, in place of any earlier mark. On return the mark would survive a loss of
/// power as far as the file system does.
///
/// # Errors
/// As [`read`], but for several marks; there may be one then.
pub fn set(ram: &Path, id: MigrationId) -> Result<(), CprError> {
    remove_marks(ram)?;
    let mark = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path(ram, id));
    mark.and_then(|_| sync_folder(ram))
        .map_err(|error| failed("marking", ram, error))
}

/// Removes the mark of the memory at `ram`, if there is one. On return it stays removed after a loss of power.
///
/// # Errors
/// As [`read`], but for several marks; one may be there still.
pub fn remove(ram: &Path) -> Result<(), CprError> {
    remove_marks(ram)?;
    sync_folder(ram).map_err(|error| failed("removing the mark of", ram, error))
}

fn remove_marks(ram: &Path) -> Result<(), CprError> {
    for id in marks(ram)? {
        fs::remove_file(path(ram, id))
            .map_err(|error| failed("removing the mark of", ram, error))?;
    }
    Ok(())
}

/// The marks beside `ram`. Something else with such a name is refused: it is somebody's own, or says what this build cannot read.
fn marks(ram: &Path) -> Result<Vec<MigrationId>, CprError> {
    let looked = |error| failed("looking for marks of", ram, error);
    let mut marks = Vec::new();
    for entry in fs::read_dir(folder(ram)).map_err(looked)? {
        let name = entry.map_err(looked)?.file_name();
        let Some(digits) = suffix(ram, &name) else {
            continue;
        };
        let id = std::str::from_utf8(digits).ok().and_then(id_of);
        // Written as this build writes it.
        let id = id.filter(|id| path(ram, *id).file_name() == Some(&name));
        marks.push(id.ok_or_else(|| CprError::Descriptor {
            name: ram.display().to_string(),
            reason: format!(
                "{} beside it is no mark of vmferry's: give it another name",
                name.display()
            ),
        })?);
    }
    Ok(marks)
}

/// What follows in the name of a mark of `ram`.
fn suffix<'a>(ram: &Path, name: &'a OsString) -> Option<&'a [u8]> {
    let mut start = ram.file_name()?.to_owned().into_vec();
    start.extend_from_slice(INFIX.as_bytes());
    name.as_bytes().strip_prefix(start.as_slice())
}

fn folder(ram: &Path) -> &Path {
    match ram.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

fn sync_folder(ram: &Path) -> io::Result<()> {
    match File::open(folder(ram))?.sync_all() {
        // A file system without anything to wait for.
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
        synced => synced,
    }
}

fn failed(what: &str, ram: &Path, error: io::Error) -> CprError {
    CprError::host(format!("{what} {}", ram.display()), error)
}

fn id_of(digits: &str) -> Option<MigrationId> {
    let mut id = [0; 16];
    if digits.len() != 2 * id.len() || !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    for (at, byte) in id.iter_mut().enumerate() {
        *byte = u8::from_str_radix(digits.get(2 * at..2 * at + 2)?, 16).ok()?;
    }
    Some(MigrationId(id))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_read_as_it_was_set_and_a_newer_one_replaces_it() {
        let folder = tempfile::tempdir().unwrap();
        let ram = folder.path().join("ram");
        let other = folder.path().join("ram.ram1");
        assert_eq!(read(&ram).unwrap(), None);
        let id = MigrationId(*b"\x00\x01\xfe\xffsome other i");
        set(&other, id).unwrap();
        for id in [id, MigrationId([0xa5; 16])] {
            set(&ram, id).unwrap();
            assert_eq!(read(&ram).unwrap(), Some(id));
            assert!(path(&ram, id).exists());
        }
        remove(&ram).unwrap();
        assert_eq!(read(&ram).unwrap(), None);
        remove(&ram).unwrap();
        assert_eq!(read(&other).unwrap(), Some(id));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_is_no_mark_or_one_too_many_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let ram = folder.path().join("ram");
        for text in [
            "",
            "00",
            "0g0102030405060708090a0b0c0d0e0f",
            "+00102030405060708090a0b0c0d0e0f",
            "000102030405060708090A0B0C0D0E0F",
            "é0102030405060708090a0b0c0d0e0f",
        ] {
            let foreign = folder.path().join(format!("ram.saved-{text}"));
            fs::write(&foreign, "").unwrap();
            let id = MigrationId([3; 16]);
            for refused in [read(&ram).map(|_| ()), set(&ram, id), remove(&ram)] {
                let error = refused.unwrap_err().to_string();
                assert!(error.contains("no mark"), "{text}: {error}");
            }
            assert!(foreign.exists(), "it was somebody else's");
            fs::remove_file(foreign).unwrap();
        }
        for byte in [1, 2] {
            fs::write(path(&ram, MigrationId([byte; 16])), "").unwrap();
        }
        let error = read(&ram).unwrap_err().to_string();
        assert!(error.contains("several marks"), "{error}");
    }
}
