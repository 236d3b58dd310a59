//! Saved state: rules and encoding.
//!
//! - A saved type lives in a `saved.rs` of its own, is named `<Thing>V<n>`, and is never used at run time.
//! - A released version is frozen. A new field is `Option` with `#[serde(default)]` and says what its absence means; any change
//!   of meaning is a new version. A build accepts versions n, n-1 and n-2.
//! - Saving and restoring destructure both sides completely, so that a new field does not compile until somebody decides about it.
//! - Restoring treats every value as hostile: bounded, checked, never asserted.
//! - Encoding is CBOR (RFC 8949) with field names, so that a reader can skip what it does not know.

use serde::Serialize;
use serde::de::DeserializeOwned;
use vmferry_transport::wire::{DeviceSchema, Section};

use crate::DeviceError;

/// Longest saved state of one device, in bytes. vCPU state with AMX is about 16 KiB; device models stay far below.
pub const STATE_BYTES_MAX: usize = 16 << 20;

/// A saved type: what it is called on the wire and which version it is.
pub trait SavedState: Serialize + DeserializeOwned {
    /// Schema name, the same for all versions.
    const SCHEMA: &'static str;
    /// Version of this type.
    const VERSION: u32;
}

/// The hello entry of a device that loads just the version `S`.
pub fn schema_of<S: SavedState>(device: &str) -> DeviceSchema {
    DeviceSchema {
        name: device.to_owned(),
        schema: S::SCHEMA.to_owned(),
        version_min: S::VERSION,
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

/// Decodes the section of a device, after checking that it is of schema and version `S` and of a sane length.
///
/// # Errors
/// [`DeviceError::Version`] for another schema or version, [`DeviceError::BadState`] for bytes that are not an `S`, or have
/// something behind it.
pub fn decode<S: SavedState>(section: &Section) -> Result<S, DeviceError> {
    if section.schema != S::SCHEMA || section.version != S::VERSION {
        return Err(DeviceError::Version {
            device: section.name.clone(),
            schema: section.schema.clone(),
            version: section.version,
            supported: format!("{} version {}", S::SCHEMA, S::VERSION),
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
    let mut rest: &[u8] = &section.bytes;
    let state = ciborium::from_reader(&mut rest).map_err(|error| bad(error.to_string()))?;
    if !rest.is_empty() {
        return Err(bad(format!("{} bytes are left over", rest.len())));
    }
    Ok(state)
}
