//! Saved state of virtio devices.

use serde::{Deserialize, Serialize};
use vmferry_devices::saved::SavedState;

/// Registers and queues of a device, schema `virtio-mmio`, version 1. Not yet released.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct TransportV1 {
    /// Which window it stands behind, counted from 0.
    pub slot: u32,
    /// Device type.
    pub device_type: u32,
    /// DeviceFeaturesSel.
    pub device_features_sel: u32,
    /// DriverFeaturesSel.
    pub driver_features_sel: u32,
    /// What the driver has accepted.
    pub driver_features: u64,
    /// QueueSel.
    pub queue_sel: u32,
    /// Status.
    pub status: u32,
    /// Interrupt reasons that were not acknowledged, other than used buffers.
    pub interrupt_reasons: u32,
    /// ConfigGeneration.
    pub config_generation: u32,
    /// The configuration space, as the driver saw it.
    #[serde(with = "serde_bytes")]
    pub config: Vec<u8>,
    /// All queues.
    pub queues: Vec<QueueV1>,
}

impl SavedState for TransportV1 {
    const SCHEMA: &'static str = "virtio-mmio";
    const VERSION: u32 = 1;
}

/// A queue of a device.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct QueueV1 {
    /// QueueNum.
    pub size: u16,
    /// QueueReady.
    pub ready: bool,
    /// Descriptor table.
    pub desc_gpa: u64,
    /// Available ring.
    pub avail_gpa: u64,
    /// Used ring.
    pub used_gpa: u64,
    /// Next entry of the available ring.
    pub next_avail: u16,
    /// Next entry of the used ring.
    pub next_used: u16,
}
