//! Saved state of virtio devices.

use serde::{Deserialize, Serialize};
use vmferry_devices::saved::SavedState;

/// Registers and queues of a device, schema `virtio-mmio`, version 1, frozen but for [`undelivered`](Self::undelivered).
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
    /// A packet for the guest, with its header, that a network interface had taken and not delivered. Absent if there is none, as nearly
    /// always, and in what builds have saved that had no such field; those skip it, and the network has lost that packet.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "serde_bytes")]
    pub undelivered: Option<Vec<u8>>,
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use vmferry_devices::saved::fixtures;

    use super::*;

    #[test]
    fn state_of_a_virtio_device_keeps_its_bytes() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/state");
        let queue = QueueV1 {
            size: 256,
            ready: true,
            desc_gpa: 0x1000,
            avail_gpa: 0x2000,
            used_gpa: 0x3000,
            next_avail: 17,
            next_used: 16,
        };
        let transport = TransportV1 {
            slot: 1,
            device_type: 2,
            device_features_sel: 0,
            driver_features_sel: 1,
            driver_features: 0x1_0000_0003,
            queue_sel: 1,
            status: 15,
            interrupt_reasons: 2,
            config_generation: 4,
            config: vec![5; 60],
            queues: vec![queue],
            undelivered: None,
        };
        fixtures::check(&folder, &[transport]).unwrap();
    }

    #[test]
    fn a_packet_that_was_not_delivered_goes_along_and_builds_without_that_field_skip_it() {
        use vmferry_devices::saved::{decode, encode};

        /// What matters of the type before the field came.
        #[derive(Deserialize, Serialize)]
        struct Before {
            slot: u32,
            queues: Vec<QueueV1>,
        }
        impl SavedState for Before {
            const SCHEMA: &'static str = TransportV1::SCHEMA;
            const VERSION: u32 = TransportV1::VERSION;
        }
        let path = "../tests/fixtures/state/virtio-mmio/v1.cbor";
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
        let mut section = encode(
            "net",
            &Before {
                slot: 0,
                queues: Vec::new(),
            },
        )
        .unwrap();
        section.bytes = std::fs::read(path).unwrap().into();
        let mut saved: TransportV1 = decode(&section).unwrap();
        assert_eq!(saved.undelivered, None);
        saved.undelivered = Some(vec![7; 9000]);
        let section = encode("net", &saved).unwrap();
        assert_eq!(decode::<TransportV1>(&section).unwrap(), saved);
        let before: Before = decode(&section).unwrap();
        assert_eq!((before.slot, before.queues.len()), (1, 1));
    }
}
