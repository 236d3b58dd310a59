//! Bytes of saved state that were committed, so that a later build is measured by what an earlier one did. For tests: those of this
//! workspace, and those of a VMM with schemas of its own.
//!
//! A folder holds `SCHEMA/vN.cbor` for every version that was ever saved.

use std::fmt::Debug;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use vmferry_transport::wire::Section;

use super::{SavedState, decode, encode, oldest};

/// Set to write the fixture of a version that has none. One that exists is never replaced.
const WRITE: &str = "VMFERRY_WRITE_FIXTURES";

/// Checks that every version of `S` that is loaded still means what it did, and that the present one is saved as it was: `values` are
/// what the fixtures hold, from the oldest version that is loaded to the present one.
///
/// # Errors
/// What is wrong, and what to do about it.
pub fn check<S>(folder: &Path, values: &[S]) -> Result<(), String>
where
    S: SavedState + PartialEq + Debug,
{
    check_or_write(folder, values, std::env::var_os(WRITE).is_some())
}

pub(super) fn check_or_write<S>(folder: &Path, values: &[S], may_write: bool) -> Result<(), String>
where
    S: SavedState + PartialEq + Debug,
{
    let (first, last) = (oldest(S::VERSION), S::VERSION);
    let name = S::SCHEMA;
    if (first..=last).count() != values.len() {
        return Err(format!(
            "{name}: versions {first} to {last} are loaded, and {} values were given to check them with",
            values.len()
        ));
    }
    for (version, value) in (first..).zip(values) {
        let bytes = fixture(folder, version, value, may_write)?;
        let section = |bytes: Vec<u8>, version| Section {
            name: name.to_owned(),
            schema: name.to_owned(),
            version,
            bytes: bytes.into(),
        };
        let now = encode(name, value).map_err(|error| error.to_string())?;
        if version == last && now.bytes != bytes {
            return Err(format!(
                "{name} version {version} is saved with other bytes than before, so builds that exist could not load it: make the change a \
                 new version, keep loading this one, and add a fixture (with {WRITE}=1 in the environment)"
            ));
        }
        match decode::<S>(&section(bytes.clone(), version)) {
            Ok(loaded) if loaded == *value => {}
            Ok(loaded) => {
                return Err(format!(
                    "{name} version {version} is loaded as {loaded:?}, and was {value:?}"
                ));
            }
            Err(error) => return Err(format!("{name} version {version}: {error}")),
        }
        let cut = (0..bytes.len())
            .find(|len| decode::<S>(&section(bytes[..*len].to_vec(), version)).is_ok());
        if let Some(len) = cut {
            return Err(format!(
                "{name} version {version} is loaded when cut at byte {len}"
            ));
        }
        for foreign in [first - 1, last + 1] {
            if decode::<S>(&section(bytes.clone(), foreign)).is_ok() {
                return Err(format!("{name} version {foreign} is loaded"));
            }
        }
    }
    Ok(())
}

fn fixture<S: SavedState>(
    folder: &Path,
    version: u32,
    value: &S,
    may_write: bool,
) -> Result<Vec<u8>, String> {
    let path = folder.join(S::SCHEMA).join(format!("v{version}.cbor"));
    let failed = |error: std::io::Error| format!("{}: {error}", path.display());
    match fs::read(&path) {
        Err(error) if error.kind() == ErrorKind::NotFound && version == S::VERSION && may_write => {
            let section = encode(S::SCHEMA, value).map_err(|error| error.to_string())?;
            fs::create_dir_all(folder.join(S::SCHEMA)).map_err(failed)?;
            fs::write(&path, &section.bytes).map_err(failed)?;
            Ok(section.bytes.to_vec())
        }
        read => read.map_err(failed),
    }
}
