//! One virtqueue: where the guest's driver has put it, how far the back end has come, and the events of both directions.

use std::io;

use serde::{Deserialize, Serialize};
use vhost::VringConfigData;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::check_features;
use super::memory::VhostMemory;
use crate::DeviceError;
use crate::saved::SavedState;

/// Most descriptors in a split ring.
pub const RING_SIZE_MAX: u16 = 32768;
/// Flag of VHOST_SET_VRING_ADDR: writes to the used ring are logged.
const VRING_LOG: u32 = 1;

/// A split virtqueue as the guest's driver has set it up. Addresses are guest-physical.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Ring {
    /// Number of descriptors, a power of two.
    pub size: u16,
    /// Descriptor table, 16 bytes per descriptor.
    pub desc: u64,
    /// Available ring, which the driver writes.
    pub avail: u64,
    /// Used ring, which the back end writes.
    pub used: u64,
    /// Index in the available ring that the back end takes next. A back end knows it while it runs, this is current while it stands.
    pub base: u16,
}

impl Ring {
    /// What is wrong with a ring in `memory`, if anything is.
    pub fn problem(&self, memory: &VhostMemory) -> Option<String> {
        let Self {
            size,
            desc,
            avail,
            used,
            base: _,
        } = *self;
        if !size.is_power_of_two() || size > RING_SIZE_MAX {
            return Some(format!("a ring of {size} descriptors"));
        }
        let size = u64::from(size);
        let parts = [
            ("descriptor table", desc, 16 * size, 16),
            ("available ring", avail, 6 + 2 * size, 2),
            ("used ring", used, 6 + 8 * size, 4),
        ];
        parts.into_iter().find_map(|(what, address, bytes, align)| {
            if !address.is_multiple_of(align) {
                return Some(format!(
                    "its {what} is at {address:#x}, not aligned to {align}"
                ));
            }
            (!memory.holds(address, bytes))
                .then(|| format!("its {what} of {bytes} bytes at {address:#x} is not in RAM"))
        })
    }

    /// How many requests the driver has made available that nobody has taken yet, if that makes sense. Reads guest memory.
    ///
    /// # Errors
    /// `InvalidData` if it does not, or if the ring is not in RAM.
    pub fn waiting(&self, memory: &VhostMemory) -> io::Result<u16> {
        let index = self.read_index(memory, self.avail)?;
        let waiting = index.wrapping_sub(self.base);
        if waiting > self.size {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!(
                    "the driver is at {index} and the back end at {} of a ring of {}",
                    self.base, self.size
                ),
            ));
        }
        Ok(waiting)
    }

    /// The index of the used ring: how many requests were ever answered, modulo 65536. Reads guest memory.
    ///
    /// # Errors
    /// `InvalidData` if the ring is not in RAM.
    pub fn used_index(&self, memory: &VhostMemory) -> io::Result<u16> {
        self.read_index(memory, self.used)
    }

    fn read_index(&self, memory: &VhostMemory, ring: u64) -> io::Result<u16> {
        let index: u16 = memory
            .memory()
            .read_obj(GuestAddress(ring.saturating_add(2)))
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        Ok(u16::from_le(index))
    }

    /// For crate vhost; `log` for a back end that is to note its writes to the used ring.
    pub(super) fn config(&self, log: bool) -> VringConfigData {
        VringConfigData {
            queue_max_size: RING_SIZE_MAX,
            queue_size: self.size,
            flags: if log { VRING_LOG } else { 0 },
            desc_table_addr: self.desc,
            used_ring_addr: self.used,
            avail_ring_addr: self.avail,
            log_addr: log.then_some(self.used),
        }
    }
}

/// The events of one queue, and its ring once the driver has set it up.
#[derive(Debug)]
pub struct Queue {
    /// The guest tells the back end that requests wait.
    pub kick: EventFd,
    /// The back end tells the guest that there are answers.
    pub call: EventFd,
    /// The ring.
    pub ring: Option<Ring>,
}

impl Queue {
    /// A queue that is not set up.
    pub fn new(kick: EventFd, call: EventFd) -> Self {
        Self {
            kick,
            call,
            ring: None,
        }
    }

    /// Wakes both sides: what one told the other before the ring was taken up may have been lost.
    ///
    /// # Errors
    /// When an event cannot be signalled.
    pub(super) fn wake(&self) -> io::Result<()> {
        if self.ring.is_some() {
            self.kick.write(1)?;
            self.call.write(1)?;
        }
        Ok(())
    }
}

/// State of a vhost device, as it is saved. Version 1, frozen.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct VhostV1 {
    /// Features that the driver has accepted.
    pub features: u64,
    /// One entry per queue; absent for one that the driver has not set up.
    pub rings: Vec<Option<RingV1>>,
}

/// A ring in [`VhostV1`].
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct RingV1 {
    /// [`Ring::size`].
    pub size: u16,
    /// [`Ring::desc`].
    pub desc: u64,
    /// [`Ring::avail`].
    pub avail: u64,
    /// [`Ring::used`].
    pub used: u64,
    /// [`Ring::base`].
    pub base: u16,
}

impl SavedState for VhostV1 {
    const SCHEMA: &'static str = "vhost";
    const VERSION: u32 = 1;
}

impl From<Ring> for RingV1 {
    fn from(ring: Ring) -> Self {
        let Ring {
            size,
            desc,
            avail,
            used,
            base,
        } = ring;
        Self {
            size,
            desc,
            avail,
            used,
            base,
        }
    }
}

impl From<RingV1> for Ring {
    fn from(ring: RingV1) -> Self {
        let RingV1 {
            size,
            desc,
            avail,
            used,
            base,
        } = ring;
        Self {
            size,
            desc,
            avail,
            used,
            base,
        }
    }
}

impl VhostV1 {
    /// Of a device that stands.
    pub(super) fn new(features: u64, queues: &[Queue]) -> Self {
        let rings = queues.iter().map(|queue| queue.ring.map(RingV1::from));
        Self {
            features,
            rings: rings.collect(),
        }
    }

    /// The features and rings for a device that has `queues` queues and `offered` features.
    ///
    /// # Errors
    /// [`DeviceError::BadState`] for state that the device cannot have.
    pub(super) fn check(
        self,
        device: &str,
        offered: u64,
        queues: usize,
        memory: &VhostMemory,
    ) -> Result<(u64, Vec<Option<Ring>>), DeviceError> {
        let bad = |reason: String| DeviceError::BadState {
            device: device.to_owned(),
            reason,
        };
        let Self { features, rings } = self;
        check_features(device, features, offered)?;
        if rings.len() != queues {
            let count = rings.len();
            return Err(bad(format!("{count} queues, this device has {queues}")));
        }
        let rings: Vec<_> = rings.into_iter().map(|ring| ring.map(Ring::from)).collect();
        for (number, ring) in rings.iter().enumerate() {
            if let Some(problem) = ring.and_then(|ring| ring.problem(memory)) {
                return Err(bad(format!("queue {number}: {problem}")));
            }
        }
        Ok((features, rings))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vhost::memory::tests::anonymous;

    const RING: Ring = Ring {
        size: 256,
        desc: 0x1000,
        avail: 0x2000,
        used: 0x3000,
        base: 7,
    };

    type Damage = fn(&mut VhostV1);

    fn saved(ring: Ring) -> VhostV1 {
        VhostV1 {
            features: 1 << 32,
            rings: vec![Some(ring.into()), None],
        }
    }

    #[test]
    fn saved_state_is_taken_over_as_it_is() {
        let memory = anonymous(&[(0, 5)]);
        let (features, rings) = saved(RING).check("net/0", 3 << 32, 2, &memory).unwrap();
        assert_eq!(features, 1 << 32);
        assert_eq!(rings, [Some(RING), None]);
    }

    #[test]
    fn saved_state_that_the_device_cannot_have_is_refused_with_the_reason() {
        let memory = anonymous(&[(0, 5)]);
        let damage: [(&str, Damage); 8] = [
            ("features 0x4", |state| state.features |= 4),
            ("3 queues", |state| state.rings.push(None)),
            ("a ring of 0", |state| first(state).size = 0),
            ("a ring of 255", |state| first(state).size = 255),
            ("used ring", |state| first(state).used = 0x4fff - 3),
            ("available ring", |state| first(state).avail = u64::MAX - 1),
            ("descriptor table", |state| first(state).desc = 0x1008),
            ("used ring", |state| first(state).size = 1024),
        ];
        for (reason, damage) in damage {
            let mut state = saved(RING);
            damage(&mut state);
            let error = state.check("net/0", 1 << 32, 2, &memory).unwrap_err();
            let error = error.to_string();
            assert!(error.contains(reason) && error.contains("net/0"), "{error}");
        }
    }

    fn first(state: &mut VhostV1) -> &mut RingV1 {
        state.rings[0].as_mut().unwrap()
    }

    #[test]
    fn a_driver_that_is_further_than_its_ring_is_long_is_noticed() {
        let memory = anonymous(&[(0, 5)]);
        let index = |value: u16| {
            memory
                .memory()
                .write_obj(value, GuestAddress(RING.avail + 2))
                .unwrap();
        };
        index(7);
        assert_eq!(RING.waiting(&memory).unwrap(), 0);
        index(7 + 256);
        assert_eq!(RING.waiting(&memory).unwrap(), 256);
        index(6);
        let error = RING.waiting(&memory).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
