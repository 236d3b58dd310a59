//! Where the guest finds the regions of its VFIO devices: one window of memory-mapped I/O for each.
//!
//! ```text
//! 0xd100_0000  device 0: region 0 (its first 64 KiB)
//! 0xd101_0000            region 1, and so on up to region 15
//! 0xd110_0000  device 1
//! ...
//! 0xd200_0000  end: 16 devices
//! ```
//!
//! For PCI devices regions 0 to 5 are the BARs and 7 is the configuration space. There is no PCI bus in front of them, and no
//! interrupts: a guest polls. Where a device has nothing, reads give ones and writes are lost, as on a bus.

/// Address of the first window.
pub const WINDOWS_GPA: u64 = 0xd100_0000;
/// Address after the last.
pub const WINDOWS_END: u64 = WINDOWS_GPA + DEVICES_MAX as u64 * DEVICE_BYTES;
/// Most devices.
pub const DEVICES_MAX: usize = 16;
/// From a device to the next.
pub const DEVICE_BYTES: u64 = 1 << 20;
/// From a region to the next, and what of a region can be reached.
pub const REGION_BYTES: u64 = 64 << 10;
/// Most regions of a device.
pub const REGIONS_MAX: u32 = 16;

/// A place in a region of a device.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Place {
    /// Number of the device.
    pub device: usize,
    /// Number of the region.
    pub region: u32,
    /// Offset in the region.
    pub offset: u64,
}

/// What an access at `gpa` is for; `None` outside of the windows.
pub fn place(gpa: u64) -> Option<Place> {
    let at = gpa.checked_sub(WINDOWS_GPA).filter(|_| gpa < WINDOWS_END)?;
    Some(Place {
        device: usize::try_from(at / DEVICE_BYTES).ok()?,
        region: u32::try_from(at % DEVICE_BYTES / REGION_BYTES).ok()?,
        offset: at % REGION_BYTES,
    })
}

const _: () = assert!(REGION_BYTES * REGIONS_MAX as u64 == DEVICE_BYTES);
// Sets of devices are kept in 16 bits.
const _: () = assert!(DEVICES_MAX == 16);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::workload::layout::{HIGH_RAM_GPA, LOW_RAM_END};

    #[test]
    fn the_windows_lie_in_the_device_hole_one_after_the_other() {
        const { assert!(LOW_RAM_END <= WINDOWS_GPA && WINDOWS_END <= HIGH_RAM_GPA) };
        assert_eq!(place(WINDOWS_GPA - 1), None);
        assert_eq!(place(WINDOWS_END), None);
        assert_eq!(place(u64::MAX), None);
        let mut next = WINDOWS_GPA;
        for device in 0..DEVICES_MAX {
            for region in 0..REGIONS_MAX {
                for offset in [0, REGION_BYTES - 1] {
                    let expected = Place {
                        device,
                        region,
                        offset,
                    };
                    assert_eq!(place(next + offset), Some(expected));
                }
                next += REGION_BYTES;
            }
        }
    }
}
