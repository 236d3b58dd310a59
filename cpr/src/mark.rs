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
    let refuse = |reason: String| CprError::Descriptor {
        name: ram.display().to_string(),
        reason,
    };
    let mut found = None;
    for name in names(ram).map_err(|error| failed("looking for marks of", ram, error))? {
        let shown = name.display();
        let digits = suffix(ram, &name).and_then(|digits| std::str::from_utf8(digits).ok());
        let Some(id) = digits.and_then(id_of) else {
            return Err(refuse(format!("{shown} beside it is no mark of vmferry's")));
        };
        if found.replace(id).is_some() {
            return Err(refuse(format!(
                "it has several marks of saved guests beside it, one is {shown}: remove those that are wrong"
            )));
        }
    }
    Ok(found)
}

/// Marks the memory at `ram` as that of the saved guest `id`, in place of any earlier mark. On return the mark would survive a loss of
/// power as far as the file system does.
///
/// # Errors
/// [`CprError::Host`]; there may be a mark then.
pub fn set(ram: &Path, id: MigrationId) -> Result<(), CprError> {
    remove_marks(ram)
        .and_then(|()| {
            OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(path(ram, id))
        })
        .and_then(|_| sync_folder(ram))
        .map_err(|error| failed("marking", ram, error))
}

/// Removes the mark of the memory at `ram`, if there is one. On return it stays removed after a loss of power.
///
/// # Errors
/// [`CprError::Host`]; the mark may be there still.
pub fn remove(ram: &Path) -> Result<(), CprError> {
    remove_marks(ram)
        .and_then(|()| sync_folder(ram))
        .map_err(|error| failed("removing the mark of", ram, error))
}

fn remove_marks(ram: &Path) -> io::Result<()> {
    for name in names(ram)? {
        if suffix(ram, &name).is_some() {
            fs::remove_file(folder(ram).join(name))?;
        }
    }
    Ok(())
}

/// Names beside `ram` that begin as those of its marks do.
fn names(ram: &Path) -> io::Result<Vec<OsString>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder(ram))? {
        let name = entry?.file_name();
        if suffix(ram, &name).is_some() {
            names.push(name);
        }
    }
    Ok(names)
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
            "é0102030405060708090a0b0c0d0e0f",
        ] {
            let foreign = folder.path().join(format!("ram.saved-{text}"));
            fs::write(&foreign, "").unwrap();
            assert!(
                read(&ram).unwrap_err().to_string().contains("no mark"),
                "{text}"
            );
            fs::remove_file(foreign).unwrap();
        }
        for byte in [1, 2] {
            fs::write(path(&ram, MigrationId([byte; 16])), "").unwrap();
        }
        let error = read(&ram).unwrap_err().to_string();
        assert!(error.contains("several marks"), "{error}");
    }
}
