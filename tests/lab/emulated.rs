//! Guests for emulated processors.

use crate::harness::{Accel, Machine};

impl Machine {
    /// A guest for an emulated processor: with next to no memory, over which it makes ten passes per second.
    pub(crate) fn emulated(accel: Accel) -> Self {
        Self {
            mem: "16M",
            working_set: "256K",
            dirty_rate: "640",
            fill: "512K",
            ..Self::small(accel)
        }
    }
}
