//! What `--disk` says.

use std::path::PathBuf;
use std::str::FromStr;

use super::DiskError;

/// Longest name of a disk, in bytes.
pub const ID_BYTES_MAX: usize = 64;

/// A disk as the operator describes it: `PATH[,id=NAME][,ro]`. A comma in a path is written twice.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct DiskConfig {
    /// The image, a regular file.
    pub path: PathBuf,
    /// Name for operators; must be unique within the VM, and the same on both sides of a migration. Empty until
    /// [`name_disks`] has given it one.
    pub id: String,
    /// The guest only reads it; several VMs may at a time.
    pub read_only: bool,
}

impl FromStr for DiskConfig {
    type Err = DiskError;

    fn from_str(text: &str) -> Result<Self, DiskError> {
        let wrong = |reason: String| DiskError::Config {
            disk: text.to_owned(),
            reason,
        };
        let (path, options) = split_path(text);
        if path.is_empty() {
            return Err(wrong("name the image file first".to_owned()));
        }
        let (mut id, mut read_only) = (String::new(), false);
        for option in options.into_iter().flatten() {
            match option.split_once('=') {
                Some(("id", name)) if is_id(name) => name.clone_into(&mut id),
                Some(("id", name)) => {
                    return Err(wrong(format!(
                        "id {name:?}: use 1 to {ID_BYTES_MAX} letters, digits, '.', '_' and '-'"
                    )));
                }
                None if option == "ro" => read_only = true,
                _ => {
                    return Err(wrong(format!(
                        "unknown option {option:?}: use id=NAME or ro, and write a comma in a path twice"
                    )));
                }
            }
        }
        Ok(Self {
            path: path.into(),
            id,
            read_only,
        })
    }
}

/// Names the disks that have no name after their places, `disk0` and so on, and checks that no two have the same.
///
/// # Errors
/// The name that is there twice.
pub fn name_disks(disks: &mut [DiskConfig]) -> Result<(), DiskError> {
    for (number, disk) in disks.iter_mut().enumerate() {
        if disk.id.is_empty() {
            disk.id = format!("disk{number}");
        }
    }
    check_names(disks)
}

/// Checks that every disk has a name of its own.
pub(super) fn check_names(disks: &[DiskConfig]) -> Result<(), DiskError> {
    for (number, disk) in disks.iter().enumerate() {
        let wrong = |reason: &str| DiskError::Config {
            disk: disk.id.clone(),
            reason: reason.to_owned(),
        };
        if !is_id(&disk.id) {
            return Err(wrong("its id cannot be used as a name"));
        }
        if disks[..number].iter().any(|other| other.id == disk.id) {
            return Err(wrong("two disks have this id"));
        }
    }
    Ok(())
}

/// Whether operators may call a part of the machine so: short, and without characters that mean something elsewhere.
pub(in crate::machine) fn is_id(name: &str) -> bool {
    (1..=ID_BYTES_MAX).contains(&name.len())
        && name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
}

/// The path, and the options after it if there is a comma that ends it. A comma in the path is written twice.
pub(in crate::machine) fn split_path(text: &str) -> (String, Option<std::str::Split<'_, char>>) {
    let mut path = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once(',') {
        path.push_str(before);
        let Some(after) = after.strip_prefix(',') else {
            return (path, Some(after.split(',')));
        };
        path.push(',');
        rest = after;
    }
    path.push_str(rest);
    (path, None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> DiskConfig {
        text.parse().unwrap()
    }

    #[test]
    fn a_disk_is_described_by_path_name_and_access() {
        let plain = parsed("/var/a.raw");
        assert_eq!(plain.path, PathBuf::from("/var/a.raw"));
        assert!(plain.id.is_empty() && !plain.read_only);
        let full = parsed("b.raw,ro,id=root.0");
        assert_eq!(full.id, "root.0");
        assert!(full.read_only);
        assert_eq!(parsed("a,,b,,,ro").path, PathBuf::from("a,b,"));
        assert_eq!(parsed("id=a").path, PathBuf::from("id=a"));
    }

    #[test]
    fn what_describes_no_disk_is_refused_with_what_would() {
        let long = format!("a,id={}", "x".repeat(ID_BYTES_MAX + 1));
        for (text, part) in [
            ("", "image file"),
            (",ro", "image file"),
            ("a,rw", "id=NAME or ro"),
            ("a,", "id=NAME or ro"),
            ("a,id=", "letters"),
            ("a,id=a b", "letters"),
            (long.as_str(), "letters"),
        ] {
            let error = DiskConfig::from_str(text).unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn disks_are_named_after_their_places_and_never_alike() {
        let mut disks = [parsed("a"), parsed("b,id=root"), parsed("c")];
        name_disks(&mut disks).unwrap();
        assert_eq!(disks.map(|disk| disk.id), ["disk0", "root", "disk2"]);
        let error = name_disks(&mut [parsed("a"), parsed("b,id=disk0")]).unwrap_err();
        assert!(error.to_string().contains("disk0"), "{error}");
    }
}
