//! Device state on the wire: a named, versioned, length-bounded piece of bytes that the transport does not look into.

use bytes::Bytes;

/// Saved state of one device.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Section {
    /// Which device of the VM, such as `vcpu/0`. Unique within a VM.
    pub name: String,
    /// How the bytes are to be read, such as `kvm-vcpu`.
    pub schema: String,
    /// Version of the schema.
    pub version: u32,
    /// The state, encoded as the schema says.
    pub bytes: Bytes,
}

/// What a side can save or load: one entry per device in the hello, compared before the guest notices anything.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct DeviceSchema {
    /// Which device of the VM.
    pub name: String,
    /// Its schema.
    pub schema: String,
    /// Oldest version that can be loaded.
    pub version_min: u32,
    /// Newest version that can be loaded, and the one that is saved.
    pub version_max: u32,
}
