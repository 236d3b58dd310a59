//! Kernel structures as byte strings and back, with the length checked.

use std::io;

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::DeviceError;

/// The structure's bytes.
pub(super) fn to_bytes<T: IntoBytes + Immutable>(value: &T) -> Vec<u8> {
    value.as_bytes().to_vec()
}

/// The structure from saved bytes, which must have its length exactly.
pub(super) fn from_bytes<T: FromBytes>(
    device: &str,
    field: &str,
    bytes: &[u8],
) -> Result<T, DeviceError> {
    T::read_from_bytes(bytes).map_err(|_| {
        bad_state(
            device,
            format!(
                "{field} has {} bytes, expected {}",
                bytes.len(),
                size_of::<T>()
            ),
        )
    })
}

pub(super) fn bad_state(device: &str, reason: String) -> DeviceError {
    DeviceError::BadState {
        device: device.to_owned(),
        reason,
    }
}

/// Names the device and the call in a kernel error.
pub(super) fn kernel<E: Into<io::Error>>(device: &str, op: &str) -> impl FnOnce(E) -> DeviceError {
    let (device, op) = (device.to_owned(), op.to_owned());
    move |error| DeviceError::Kernel {
        device,
        op,
        source: error.into(),
    }
}
