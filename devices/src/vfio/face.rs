//! What is asked of the kernel about a VFIO device and its container: traits with one method per request, and what asks for real.
//!
//! A VMM whose devices are reached in another way, by a broker process for one, implements the traits for its own type. A test puts a
//! type of its own in front of the real one, to have any request fail.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;

use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2, VFIO_IOMMU_INFO_CAPS,
    VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION, VFIO_MIGRATION_P2P, VFIO_MIGRATION_PRE_COPY,
    VFIO_MIGRATION_STOP_COPY, VFIO_PRECOPY_INFO_REINIT, vfio_device_mig_state_VFIO_DEVICE_STATE_NR,
    vfio_device_mig_state_VFIO_DEVICE_STATE_PRE_COPY_P2P,
    vfio_device_mig_state_VFIO_DEVICE_STATE_RESUMING,
    vfio_device_mig_state_VFIO_DEVICE_STATE_RUNNING_P2P,
    vfio_device_mig_state_VFIO_DEVICE_STATE_STOP_COPY,
};

use super::ioctl;
use super::states::{DeviceState, Support};

// The core has the kernel's numbers as its own; here is where both are known.
const _: () = {
    assert!(VFIO_MIGRATION_STOP_COPY == 1 && VFIO_MIGRATION_P2P == 2);
    assert!(VFIO_MIGRATION_PRE_COPY == 4);
    assert!(DeviceState::ALL.len() == vfio_device_mig_state_VFIO_DEVICE_STATE_NR as usize);
    assert!(
        DeviceState::StopCopy as u32 == vfio_device_mig_state_VFIO_DEVICE_STATE_STOP_COPY
            && DeviceState::Resuming as u32 == vfio_device_mig_state_VFIO_DEVICE_STATE_RESUMING
            && DeviceState::RunningP2p as u32
                == vfio_device_mig_state_VFIO_DEVICE_STATE_RUNNING_P2P
            && DeviceState::PreCopyP2p as u32
                == vfio_device_mig_state_VFIO_DEVICE_STATE_PRE_COPY_P2P
    );
};

/// A range of addresses as devices see them.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Iova {
    /// First address.
    pub start: u64,
    /// Length in bytes.
    pub bytes: u64,
}

/// What a device in PRE_COPY still has to give, in bytes.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct PrecopyInfo {
    /// Of what it has to give once; it should be stopped only when this is 0.
    pub initial_bytes: u64,
    /// Of what has changed since it was given.
    pub dirty_bytes: u64,
    /// The device has begun anew with what it has to give once, so that being at 0 before means nothing any more.
    pub reinit: bool,
}

/// Requests to one VFIO device. Called by several threads at once.
pub trait VfioFace: Send + Sync {
    /// How the device migrates; `None` if it does not.
    ///
    /// # Errors
    /// The kernel's answer.
    fn support(&self) -> io::Result<Option<Support>>;

    /// The state the device is in.
    ///
    /// # Errors
    /// The kernel's answer, or `InvalidData` for a state that this build does not know.
    fn state(&self) -> io::Result<DeviceState>;

    /// Moves the device to `state`, over as many others as it takes; returns the stream if that opened one.
    ///
    /// # Errors
    /// The kernel's answer. The device may then be in any state on the way, or in ERROR.
    fn set_state(&self, state: DeviceState) -> io::Result<Option<File>>;

    /// Estimate of what there were to read if the device were stopped now, in bytes; `None` if it cannot tell.
    ///
    /// # Errors
    /// The kernel's answer.
    fn stop_copy_bytes(&self) -> io::Result<Option<u64>>;

    /// Asks to be told by [`PrecopyInfo::reinit`]; false if the kernel does not know of it. Comes before PRE_COPY.
    ///
    /// # Errors
    /// The kernel's answer.
    fn enable_reinit(&self) -> io::Result<bool>;

    /// What a device in PRE_COPY still has to give. `reinit` is noise unless [`enable_reinit`](Self::enable_reinit) said yes.
    ///
    /// # Errors
    /// The kernel's answer.
    fn precopy_info(&self, stream: &File) -> io::Result<PrecopyInfo>;

    /// Resets the device: it runs, with the state of one just switched on.
    ///
    /// # Errors
    /// The kernel's answer.
    fn reset(&self) -> io::Result<()>;

    /// Whether the device can log what it writes to memory.
    ///
    /// # Errors
    /// The kernel's answer.
    fn logs_dma(&self) -> io::Result<bool>;

    /// Begins to log writes to `ranges`, which do not overlap; returns the page size that it logs in, in bytes.
    ///
    /// # Errors
    /// The kernel's answer, E2BIG among them if there are too many ranges.
    fn start_dma_logging(&self, page_bytes: u64, ranges: &[Iova]) -> io::Result<u64>;

    /// Ends logging.
    ///
    /// # Errors
    /// The kernel's answer.
    fn stop_dma_logging(&self) -> io::Result<()>;

    /// Sets the bits of the pages of `range` that were written since the last report, and forgets them. Bit 0 is the first page.
    ///
    /// # Errors
    /// The kernel's answer. Pages may then have been forgotten.
    fn report_dma(&self, range: Iova, page_bytes: u64, words: &mut [u64]) -> io::Result<()>;

    /// Reads from a stream of the device.
    ///
    /// # Errors
    /// The kernel's answer; ENOMSG in PRE_COPY if there is nothing at the moment.
    fn read_stream(&self, mut stream: &File, buffer: &mut [u8]) -> io::Result<usize> {
        stream.read(buffer)
    }

    /// Writes to a stream of the device; returns how many bytes it took.
    ///
    /// # Errors
    /// The kernel's answer.
    fn write_stream(&self, mut stream: &File, bytes: &[u8]) -> io::Result<usize> {
        stream.write(bytes)
    }
}

/// The kernel, asked over the descriptor of a device: `OwnedFd`, `File`, `Arc<OwnedFd>`, or
/// [`OfVfioIoctls`](super::OfVfioIoctls) for one that vfio-ioctls has opened.
#[derive(Clone, Debug)]
pub struct FdFace<T>(T);

impl<T: AsFd> FdFace<T> {
    /// For the device behind `device`. Uses it, and neither configures nor closes it before it is dropped.
    pub fn new(device: T) -> Self {
        Self(device)
    }
}

/// ENOTTY is what a kernel says of a feature that the device or the kernel lacks; EINVAL is what drivers without features of their own
/// say.
fn if_it_has_it<T>(answer: io::Result<T>) -> io::Result<Option<T>> {
    match answer {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL)) => Ok(None),
        answer => answer.map(Some),
    }
}

impl<T: AsFd + Send + Sync> VfioFace for FdFace<T> {
    fn support(&self) -> io::Result<Option<Support>> {
        let flags = if_it_has_it(ioctl::migration_flags(self.0.as_fd()))?;
        Ok(flags.map(Support::from_flags))
    }

    fn state(&self) -> io::Result<DeviceState> {
        let number = ioctl::state(self.0.as_fd())?;
        DeviceState::from_number(number).ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::InvalidData,
                format!("the kernel knows a state {number}, which is newer than this program"),
            )
        })
    }

    fn set_state(&self, state: DeviceState) -> io::Result<Option<File>> {
        ioctl::set_state(self.0.as_fd(), state.number())
    }

    fn stop_copy_bytes(&self) -> io::Result<Option<u64>> {
        if_it_has_it(ioctl::stop_copy_bytes(self.0.as_fd()))
    }

    fn enable_reinit(&self) -> io::Result<bool> {
        let device = self.0.as_fd();
        let feature = VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2;
        if if_it_has_it(ioctl::probe_settable(device, feature))?.is_none() {
            return Ok(false);
        }
        ioctl::set_precopy_info_v2(device).map(|()| true)
    }

    fn precopy_info(&self, stream: &File) -> io::Result<PrecopyInfo> {
        let (flags, initial_bytes, dirty_bytes) = ioctl::precopy_info(stream.as_fd())?;
        Ok(PrecopyInfo {
            initial_bytes,
            dirty_bytes,
            reinit: flags & VFIO_PRECOPY_INFO_REINIT != 0,
        })
    }

    fn reset(&self) -> io::Result<()> {
        ioctl::reset(self.0.as_fd())
    }

    fn logs_dma(&self) -> io::Result<bool> {
        let probed = if_it_has_it(ioctl::probe_dma_logging(self.0.as_fd()))?;
        Ok(probed.is_some())
    }

    fn start_dma_logging(&self, page_bytes: u64, ranges: &[Iova]) -> io::Result<u64> {
        ioctl::start_dma_logging(self.0.as_fd(), page_bytes, ranges)
    }

    fn stop_dma_logging(&self) -> io::Result<()> {
        ioctl::stop_dma_logging(self.0.as_fd())
    }

    fn report_dma(&self, range: Iova, page_bytes: u64, words: &mut [u64]) -> io::Result<()> {
        ioctl::report_dma(self.0.as_fd(), range, page_bytes, words)
    }
}

/// Requests to the container of VFIO devices, about the memory that is mapped for them.
pub trait ContainerFace: Send + Sync {
    /// How the container notes what devices write; `None` if it does not.
    ///
    /// # Errors
    /// The kernel's answer.
    fn tracking(&self) -> io::Result<Option<Tracking>>;

    /// Begins to note it.
    ///
    /// # Errors
    /// The kernel's answer.
    fn start_dirty_pages(&self) -> io::Result<()>;

    /// Ends it.
    ///
    /// # Errors
    /// The kernel's answer.
    fn stop_dirty_pages(&self) -> io::Result<()>;

    /// Sets the bits of the pages of `range` that were written since the last call, and forgets them. `range` begins and ends where
    /// mappings do; `words` is all zero.
    ///
    /// # Errors
    /// The kernel's answer. Pages may then have been forgotten.
    fn get_dirty_pages(&self, range: Iova, page_bytes: u64, words: &mut [u64]) -> io::Result<()>;
}

/// How a container notes what devices write.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Tracking {
    /// The page size it has to be asked in, in bytes.
    pub page_bytes: u64,
    /// Longest bitmap that it fills in one call, in bytes.
    pub bitmap_bytes_max: u64,
}

/// The kernel, asked over the descriptor of a container of type 1.
#[derive(Clone, Debug)]
pub struct FdContainer<T>(T);

impl<T: AsFd> FdContainer<T> {
    /// For the container behind `container`, whose IOMMU is set to type 1.
    pub fn new(container: T) -> Self {
        Self(container)
    }
}

impl<T: AsFd + Send + Sync> ContainerFace for FdContainer<T> {
    fn tracking(&self) -> io::Result<Option<Tracking>> {
        Ok(tracking_of(&ioctl::iommu_info(self.0.as_fd())?))
    }

    fn start_dirty_pages(&self) -> io::Result<()> {
        ioctl::start_dirty_pages(self.0.as_fd())
    }

    fn stop_dirty_pages(&self) -> io::Result<()> {
        ioctl::stop_dirty_pages(self.0.as_fd())
    }

    fn get_dirty_pages(&self, range: Iova, page_bytes: u64, words: &mut [u64]) -> io::Result<()> {
        ioctl::get_dirty_pages(self.0.as_fd(), range, page_bytes, words)
    }
}

/// Finds the capability for migration in what a container says of itself: `vfio_iommu_type1_info`, behind it a chain of capabilities,
/// each with its id and the offset of the next.
fn tracking_of(info: &[u8]) -> Option<Tracking> {
    let u16_at = |at: usize| Some(u16::from_ne_bytes(info.get(at..)?.first_chunk().copied()?));
    let u32_at = |at: usize| Some(u32::from_ne_bytes(info.get(at..)?.first_chunk().copied()?));
    let u64_at = |at: usize| Some(u64::from_ne_bytes(info.get(at..)?.first_chunk().copied()?));
    if u32_at(4)? & VFIO_IOMMU_INFO_CAPS == 0 {
        return None;
    }
    let mut at = usize::try_from(u32_at(16)?).ok()?;
    // A chain goes forward: one that does not would never end.
    while at != 0 {
        if u32::from(u16_at(at)?) == VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION {
            let sizes = u64_at(at + 16)?;
            // It answers for the smallest page size only.
            let page_bytes = 1_u64.checked_shl(sizes.trailing_zeros())?;
            return Some(Tracking {
                page_bytes,
                bitmap_bytes_max: u64_at(at + 24)?,
            });
        }
        let next = usize::try_from(u32_at(at + 4)?).ok()?;
        at = if next > at { next } else { 0 };
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(flags: u32, first: u32, capabilities: &[(u16, u32, [u64; 3])]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for word in [0, flags] {
            bytes.extend_from_slice(&u32::to_ne_bytes(word));
        }
        bytes.extend_from_slice(&4096_u64.to_ne_bytes());
        for word in [first, 0] {
            bytes.extend_from_slice(&u32::to_ne_bytes(word));
        }
        for (id, next, body) in capabilities {
            bytes.extend_from_slice(&id.to_ne_bytes());
            bytes.extend_from_slice(&1_u16.to_ne_bytes());
            bytes.extend_from_slice(&next.to_ne_bytes());
            body.iter()
                .for_each(|word| bytes.extend_from_slice(&word.to_ne_bytes()));
        }
        bytes
    }

    #[test]
    fn the_capability_for_migration_is_found_behind_others() {
        let found = Some(Tracking {
            page_bytes: 4096,
            bitmap_bytes_max: 1 << 28,
        });
        let migration = [0, 4096 | 1 << 21, 1 << 28];
        assert_eq!(
            tracking_of(&info(2, 24, &[(1, 56, [0; 3]), (2, 0, migration)])),
            found
        );
        assert_eq!(tracking_of(&info(2, 24, &[(2, 0, migration)])), found);
    }

    #[test]
    fn a_chain_that_ends_early_loops_or_leaves_the_answer_has_no_capability() {
        let none = [0, 0, 0];
        for (what, bytes) in [
            ("no capabilities", info(0, 24, &[(2, 0, [0, 4096, 1])])),
            ("an empty chain", info(2, 0, &[(2, 0, [0, 4096, 1])])),
            ("another capability", info(2, 24, &[(1, 0, none)])),
            ("a loop", info(2, 24, &[(1, 24, none)])),
            ("beyond the end", info(2, 4000, &[(1, 0, none)])),
            ("without page sizes", info(2, 24, &[(2, 0, none)])),
            ("nothing at all", Vec::new()),
        ] {
            assert_eq!(tracking_of(&bytes), None, "{what}");
        }
        let whole = info(2, 24, &[(2, 0, [0, 4096, 1])]);
        for length in 0..whole.len() {
            assert_eq!(tracking_of(&whole[..length]), None, "{length} bytes");
        }
    }

    #[test]
    fn a_descriptor_that_is_no_vfio_device_does_not_migrate() {
        let face = FdFace::new(File::open("/dev/null").unwrap());
        assert_eq!(face.support().unwrap(), None);
        assert!(!face.logs_dma().unwrap());
        assert!(!face.enable_reinit().unwrap());
        assert_eq!(face.stop_copy_bytes().unwrap(), None);
        for refused in [
            face.state().map(drop),
            face.set_state(DeviceState::Stop).map(drop),
            face.reset(),
            face.start_dma_logging(
                4096,
                &[Iova {
                    start: 0,
                    bytes: 4096,
                }],
            )
            .map(drop),
            face.stop_dma_logging(),
            face.precopy_info(&File::open("/dev/null").unwrap())
                .map(drop),
        ] {
            assert_eq!(refused.unwrap_err().raw_os_error(), Some(libc::ENOTTY));
        }
        let container = FdContainer::new(File::open("/dev/null").unwrap());
        assert!(container.tracking().is_err());
        assert!(container.start_dirty_pages().is_err());
    }

    #[test]
    fn a_bitmap_too_short_for_its_range_does_not_reach_the_kernel() {
        let face = FdFace::new(File::open("/dev/null").unwrap());
        let container = FdContainer::new(File::open("/dev/null").unwrap());
        for (pages, page_bytes, words) in [(65, 4096, 1), (1, 4096, 0), (1, 0, 1)] {
            let range = Iova {
                start: 0,
                bytes: pages * 4096,
            };
            let mut words = vec![0; words];
            for refused in [
                face.report_dma(range, page_bytes, &mut words),
                container.get_dirty_pages(range, page_bytes, &mut words),
            ] {
                assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::InvalidInput);
            }
        }
    }
}
