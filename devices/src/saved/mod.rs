//! Saved state: rules and encoding.
//!
//! - A saved type lives in a `saved.rs` of its own, is named `<Thing>V<n>`, and is never used at run time.
//! - A version is frozen as soon as a build with it has run anywhere: its bytes are committed ([`fixtures`]), and any change is a new
//!   version. A new field is `Option` with `#[serde(default)]` and says what its absence means, so that the new type reads the older
//!   versions by itself; where the meaning changes, [`SavedState::upgrade`] says how.
//! - One kind of field may join a version that exists: an `Option` that is nearly always absent, is not written then, and that a build
//!   which skips it can do without. A new version would keep every guest from going back to such a build, for nothing.
//! - A build loads versions n, n-1 and n-2 ([`oldest`]) and saves version n. The hello has both ends of the range, so that a target that is
//!   too old, or too new, refuses before the guest is stopped.
//! - Saving and restoring destructure both sides completely, so that a new field does not compile until somebody decides about it.
//! - Restoring treats every value as hostile: bounded, checked, never asserted.
//! - Encoding is CBOR (RFC 8949) with field names, so that a reader can skip what it does not know.

pub mod fixtures;
#[cfg(test)]
mod tests;

use serde::Serialize;
use serde::de::DeserializeOwned;
use vmferry_transport::wire::{DeviceSchema, Section};

use crate::DeviceError;

/// Longest saved state of one device, in bytes. vCPU state with AMX is about 16 KiB; device models stay far below.
pub const STATE_BYTES_MAX: usize = 16 << 20;

/// How many versions before its own a build still loads.
pub const VERSIONS_BACK: u32 = 2;

/// The oldest version that a build loads whose own is `version`. Versions count from 1.
pub const fn oldest(version: u32) -> u32 {
    let oldest = version.saturating_sub(VERSIONS_BACK);
    if oldest == 0 { 1 } else { oldest }
}

/// A saved type: what it is called on the wire and which version it is.
pub trait SavedState: Serialize + DeserializeOwned {
    /// Schema name, the same for all versions.
    const SCHEMA: &'static str;
    /// Version of this type, from 1.
    const VERSION: u32;

    /// Reads what an older version has saved, from [`oldest`] on. Without another implementation its fields are those of this type, and
    /// fields that came later are absent.
    ///
    /// # Errors
    /// Why the bytes are not of that version.
    fn upgrade(version: u32, bytes: &[u8]) -> Result<Self, String> {
        let _ = version;
        read(bytes)
    }
}

/// The hello entry of a device that saves `S`, and loads what [`decode`] does.
pub fn schema_of<S: SavedState>(device: &str) -> DeviceSchema {
    DeviceSchema {
        name: device.to_owned(),
        schema: S::SCHEMA.to_owned(),
        version_min: oldest(S::VERSION),
        version_max: S::VERSION,
    }
}

/// Encodes `state` as the section of `device`.
///
/// # Errors
/// [`DeviceError::BadState`] if the type cannot be encoded, which is a bug of the type.
pub fn encode<S: SavedState>(device: &str, state: &S) -> Result<Section, DeviceError> {
    let mut bytes = Vec::new();
    ciborium::into_writer(state, &mut bytes).map_err(|error| DeviceError::BadState {
        device: device.to_owned(),
        reason: format!("it cannot be encoded: {error}"),
    })?;
    Ok(Section {
        name: device.to_owned(),
        schema: S::SCHEMA.to_owned(),
        version: S::VERSION,
        bytes: bytes.into(),
    })
}

/// Decodes the section of a device, after checking that it is of schema `S`, of a version that is loaded, and of a sane length.
///
/// # Errors
/// [`DeviceError::Version`] for another schema or version, [`DeviceError::BadState`] for bytes that are not an `S`, or have
/// something behind it.
pub fn decode<S: SavedState>(section: &Section) -> Result<S, DeviceError> {
    let versions = oldest(S::VERSION)..=S::VERSION;
    if section.schema != S::SCHEMA || !versions.contains(&section.version) {
        let (first, last) = (versions.start(), versions.end());
        return Err(DeviceError::Version {
            device: section.name.clone(),
            schema: section.schema.clone(),
            version: section.version,
            supported: if first == last {
                format!("{} version {last}", S::SCHEMA)
            } else {
                format!("{} versions {first} to {last}", S::SCHEMA)
            },
        });
    }
    let bad = |reason: String| DeviceError::BadState {
        device: section.name.clone(),
        reason,
    };
    if section.bytes.len() > STATE_BYTES_MAX {
        return Err(bad(format!(
            "{} bytes, more than the {STATE_BYTES_MAX} allowed",
            section.bytes.len()
        )));
    }
    let state = match section.version {
        version if version == S::VERSION => read(&section.bytes),
        version => S::upgrade(version, &section.bytes),
    };
    state.map_err(bad)
}

/// Reads a value and nothing behind it; what [`SavedState::upgrade`] reads older types with.
///
/// # Errors
/// Why the bytes are no `T`.
pub fn read<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    let mut rest = bytes;
    let value = ciborium::from_reader(&mut rest).map_err(|error| error.to_string())?;
    match rest.len() {
        0 => Ok(value),
        left => Err(format!("{left} bytes are left over")),
    }
}
