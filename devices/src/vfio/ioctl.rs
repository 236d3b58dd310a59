//! VFIO's ioctls for migration, as safe functions over a descriptor that somebody else owns.
//!
//! They are safe for any descriptor: the numbers are VFIO's alone, and one that is not VFIO's answers ENOTTY or EINVAL. The kernel reads
//! and writes the structures that it is given and, where noted, an array whose length was checked; a transition may answer with a new
//! descriptor.
//!
//! vfio-ioctls has some of them for devices and containers that it has opened itself, and keeps their streams to itself; a VMM may have
//! opened them in another way, and several threads read streams here.
#![expect(
    unsafe_code,
    reason = "no crate covers the migration ioctls for a descriptor of somebody else; every structure is owned by the call, and every \
              array is checked against the length that the kernel is told"
)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd};
use std::sync::Arc;

use vfio_bindings::bindings::vfio::{
    __IncompleteArrayField, VFIO_BASE, VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT,
    VFIO_DEVICE_FEATURE_DMA_LOGGING_START, VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP,
    VFIO_DEVICE_FEATURE_GET, VFIO_DEVICE_FEATURE_MIG_DATA_SIZE,
    VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2,
    VFIO_DEVICE_FEATURE_MIGRATION, VFIO_DEVICE_FEATURE_PROBE, VFIO_DEVICE_FEATURE_SET,
    VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP, VFIO_IOMMU_DIRTY_PAGES_FLAG_START,
    VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP, VFIO_TYPE, vfio_bitmap, vfio_device_feature,
    vfio_device_feature_dma_logging_control, vfio_device_feature_dma_logging_range,
    vfio_device_feature_dma_logging_report, vfio_device_feature_mig_data_size,
    vfio_device_feature_mig_state, vfio_device_feature_migration, vfio_iommu_type1_dirty_bitmap,
    vfio_iommu_type1_dirty_bitmap_get, vfio_iommu_type1_info, vfio_precopy_info,
};
use vfio_ioctls::VfioContainer;
use vmm_sys_util::ioctl::{ioctl, ioctl_with_mut_ptr, ioctl_with_mut_ref};
use vmm_sys_util::ioctl_io_nr;

use super::face::Iova;

ioctl_io_nr!(VFIO_DEVICE_RESET, VFIO_TYPE as u32, VFIO_BASE + 11);
ioctl_io_nr!(VFIO_IOMMU_GET_INFO, VFIO_TYPE as u32, VFIO_BASE + 12);
ioctl_io_nr!(VFIO_DEVICE_FEATURE, VFIO_TYPE as u32, VFIO_BASE + 17);
ioctl_io_nr!(VFIO_IOMMU_DIRTY_PAGES, VFIO_TYPE as u32, VFIO_BASE + 17);
ioctl_io_nr!(VFIO_MIG_GET_PRECOPY_INFO, VFIO_TYPE as u32, VFIO_BASE + 21);

/// Longest answer of VFIO_IOMMU_GET_INFO that is read, in bytes. A few hundred are usual.
const INFO_BYTES_MAX: usize = 64 << 10;

/// A VFIO_DEVICE_FEATURE with what follows its header.
#[repr(C)]
struct Feature<P> {
    header: vfio_device_feature,
    payload: P,
}

/// A VFIO_IOMMU_DIRTY_PAGES with what follows its header.
#[repr(C)]
struct DirtyPages<P> {
    header: vfio_iommu_type1_dirty_bitmap,
    payload: P,
}

// Nothing may lie between a header and its payload.
const _: () = {
    assert!(size_of::<Feature<()>>() == 8);
    assert!(size_of::<Feature<vfio_device_feature_mig_state>>() == 16);
    assert!(size_of::<Feature<vfio_device_feature_dma_logging_report>>() == 40);
    assert!(size_of::<DirtyPages<()>>() == 8);
    assert!(size_of::<DirtyPages<vfio_iommu_type1_dirty_bitmap_get>>() == 48);
};

/// A structure length, as the kernel counts.
pub(super) fn bytes_of<T>() -> u32 {
    u32::try_from(size_of::<T>()).expect("structures of the kernel are small")
}

/// What an ioctl has answered.
///
/// # Errors
/// The last error of this thread, for an answer below 0.
pub(super) fn check(answer: i32) -> io::Result<i32> {
    if answer < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(answer)
    }
}

/// One VFIO_DEVICE_FEATURE; `flags` are the feature and what to do with it. Returns the payload as the kernel left it.
///
/// # Safety
/// Addresses in `payload` must be of arrays that live through the call and are as long as `payload` says.
unsafe fn feature<P>(fd: BorrowedFd<'_>, flags: u32, payload: P) -> io::Result<P> {
    let mut request = Feature {
        header: vfio_device_feature {
            argsz: bytes_of::<Feature<P>>(),
            flags,
            data: __IncompleteArrayField::new(),
        },
        payload,
    };
    // SAFETY: `request` begins with the header that the ioctl takes, and `argsz` is its length. What its payload points to is the
    // caller's promise.
    let answer = unsafe { ioctl_with_mut_ref(&fd, VFIO_DEVICE_FEATURE(), &mut request) };
    check(answer)?;
    Ok(request.payload)
}

/// Whether the device has a feature, and it can be set.
///
/// # Errors
/// ENOTTY or EINVAL if not, by the kernel's age.
pub(super) fn probe_settable(fd: BorrowedFd<'_>, feature_number: u32) -> io::Result<()> {
    let flags = VFIO_DEVICE_FEATURE_PROBE | VFIO_DEVICE_FEATURE_SET | feature_number;
    // SAFETY: there is no payload.
    unsafe { feature(fd, flags, ()) }
}

/// Whether the device logs DMA, for [`start_dma_logging`].
///
/// # Errors
/// As [`probe_settable`].
pub(super) fn probe_dma_logging(fd: BorrowedFd<'_>) -> io::Result<()> {
    probe_settable(fd, VFIO_DEVICE_FEATURE_DMA_LOGGING_START)
}

/// The flags of VFIO_DEVICE_FEATURE_MIGRATION.
///
/// # Errors
/// The kernel's answer; ENOTTY if the device does not migrate.
pub(super) fn migration_flags(fd: BorrowedFd<'_>) -> io::Result<u64> {
    let flags = VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_MIGRATION;
    // SAFETY: the payload has no addresses.
    let payload = unsafe { feature(fd, flags, vfio_device_feature_migration { flags: 0 }) }?;
    Ok(payload.flags)
}

/// The number of the state that the device is in.
///
/// # Errors
/// The kernel's answer.
pub(super) fn state(fd: BorrowedFd<'_>) -> io::Result<u32> {
    let flags = VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE;
    let payload = vfio_device_feature_mig_state {
        device_state: 0,
        data_fd: -1,
    };
    // SAFETY: the payload has no addresses.
    let payload = unsafe { feature(fd, flags, payload) }?;
    Ok(payload.device_state)
}

/// Moves the device to the state with number `state`; returns the stream if that opened one.
///
/// # Errors
/// The kernel's answer. The device may then be in any state on the way.
pub(super) fn set_state(fd: BorrowedFd<'_>, state: u32) -> io::Result<Option<File>> {
    let flags = VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE;
    let payload = vfio_device_feature_mig_state {
        device_state: state,
        data_fd: -1,
    };
    // SAFETY: the payload has no addresses.
    let payload = unsafe { feature(fd, flags, payload) }?;
    if payload.data_fd < 0 {
        return Ok(None);
    }
    // SAFETY: the kernel has just made this descriptor for us, close-on-exec, and nobody else knows its number.
    Ok(Some(unsafe { File::from_raw_fd(payload.data_fd) }))
}

/// An estimate of what is left to read if the device were stopped now, in bytes.
///
/// # Errors
/// The kernel's answer; ENOTTY before Linux 6.2.
pub(super) fn stop_copy_bytes(fd: BorrowedFd<'_>) -> io::Result<u64> {
    let flags = VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_MIG_DATA_SIZE;
    let payload = vfio_device_feature_mig_data_size {
        stop_copy_length: 0,
    };
    // SAFETY: the payload has no addresses.
    let payload = unsafe { feature(fd, flags, payload) }?;
    Ok(payload.stop_copy_length)
}

/// Asks for flags in the answers of [`precopy_info`].
///
/// # Errors
/// The kernel's answer; ENOTTY or EINVAL if it does not know of it.
pub(super) fn set_precopy_info_v2(fd: BorrowedFd<'_>) -> io::Result<()> {
    let flags = VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2;
    // SAFETY: there is no payload.
    unsafe { feature(fd, flags, ()) }
}

/// Flags, initial and dirty bytes of a device in PRE_COPY, asked of its stream. The flags mean something only after
/// [`set_precopy_info_v2`].
///
/// # Errors
/// The kernel's answer; EINVAL outside of PRE_COPY.
pub(super) fn precopy_info(stream: BorrowedFd<'_>) -> io::Result<(u32, u64, u64)> {
    let mut info = vfio_precopy_info {
        argsz: bytes_of::<vfio_precopy_info>(),
        flags: 0,
        initial_bytes: 0,
        dirty_bytes: 0,
    };
    // SAFETY: `info` is the structure that the ioctl reads and writes, and `argsz` its length.
    let answer = unsafe { ioctl_with_mut_ref(&stream, VFIO_MIG_GET_PRECOPY_INFO(), &mut info) };
    check(answer)?;
    Ok((info.flags, info.initial_bytes, info.dirty_bytes))
}

/// Resets the device.
///
/// # Errors
/// The kernel's answer.
pub(super) fn reset(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the ioctl takes no argument.
    let answer = unsafe { ioctl(&fd, VFIO_DEVICE_RESET()) };
    check(answer).map(drop)
}

/// Has the device log its writes to `ranges`; returns the page size it logs in, in bytes.
///
/// # Errors
/// The kernel's answer.
pub(super) fn start_dma_logging(
    fd: BorrowedFd<'_>,
    page_bytes: u64,
    ranges: &[Iova],
) -> io::Result<u64> {
    let ranges: Vec<_> = ranges
        .iter()
        .map(|range| vfio_device_feature_dma_logging_range {
            iova: range.start,
            length: range.bytes,
        })
        .collect();
    let payload = vfio_device_feature_dma_logging_control {
        page_size: page_bytes,
        num_ranges: u32::try_from(ranges.len()).map_err(io::Error::other)?,
        __reserved: 0,
        ranges: ranges.as_ptr().expose_provenance() as u64,
    };
    let flags = VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_DMA_LOGGING_START;
    // SAFETY: the kernel reads `num_ranges` elements of `ranges`, which lives until the end of this function.
    let payload = unsafe { feature(fd, flags, payload) }?;
    Ok(payload.page_size)
}

/// Ends what [`start_dma_logging`] began.
///
/// # Errors
/// The kernel's answer.
pub(super) fn stop_dma_logging(fd: BorrowedFd<'_>) -> io::Result<()> {
    let flags = VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP;
    // SAFETY: there is no payload.
    unsafe { feature(fd, flags, ()) }
}

/// Sets the bits of pages in `range` that the device has written, and has it forget them. Bit 0 is the page at `range.start`; bits
/// already set stay.
///
/// # Errors
/// The kernel's answer, or `InvalidInput` if `words` is too short.
pub(super) fn report_dma(
    fd: BorrowedFd<'_>,
    range: Iova,
    page_bytes: u64,
    words: &mut [u64],
) -> io::Result<()> {
    check_words(range, page_bytes, words)?;
    let payload = vfio_device_feature_dma_logging_report {
        iova: range.start,
        length: range.bytes,
        page_size: page_bytes,
        bitmap: words.as_mut_ptr().expose_provenance() as u64,
    };
    let flags = VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT;
    // SAFETY: the kernel sets bits of `bitmap`, one for each page of the range, rounded up to whole words; `words` has as many, checked
    // above, and is borrowed through the call.
    unsafe { feature(fd, flags, payload) }.map(drop)
}

/// A bitmap must have a bit for each page of its range.
fn check_words(range: Iova, page_bytes: u64, words: &[u64]) -> io::Result<()> {
    let pages = range.bytes.checked_div(page_bytes).unwrap_or(u64::MAX);
    if !range.bytes.is_multiple_of(page_bytes.max(1)) || (words.len() as u64) < pages.div_ceil(64) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!(
                "a bitmap of {} words for {} bytes in pages of {page_bytes}",
                words.len(),
                range.bytes
            ),
        ));
    }
    Ok(())
}

/// What a type1 container says of itself: `vfio_iommu_type1_info` and the capabilities behind it.
///
/// # Errors
/// The kernel's answer.
pub(super) fn iommu_info(fd: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    let mut bytes = size_of::<vfio_iommu_type1_info>();
    loop {
        // Words, because the kernel's structure is aligned to them.
        let mut info = vec![0_u64; bytes.div_ceil(8)];
        // `argsz`, the first four bytes.
        info[0] = (info.len() * 8) as u64;
        // SAFETY: the kernel writes at most `argsz` bytes from the start of `info` on, which is as long and aligned for the structure.
        let answer = unsafe { ioctl_with_mut_ptr(&fd, VFIO_IOMMU_GET_INFO(), info.as_mut_ptr()) };
        check(answer)?;
        // It answers with the length that it would need.
        let needed = usize::try_from(info[0] & 0xffff_ffff).map_err(io::Error::other)?;
        if needed <= info.len() * 8 || bytes >= INFO_BYTES_MAX {
            return Ok(info.iter().flat_map(|word| word.to_ne_bytes()).collect());
        }
        bytes = needed.min(INFO_BYTES_MAX);
    }
}

/// One VFIO_IOMMU_DIRTY_PAGES.
///
/// # Safety
/// As [`feature`].
unsafe fn dirty_pages<P>(fd: BorrowedFd<'_>, flags: u32, payload: P) -> io::Result<()> {
    let mut request = DirtyPages {
        header: vfio_iommu_type1_dirty_bitmap {
            argsz: bytes_of::<DirtyPages<P>>(),
            flags,
            data: __IncompleteArrayField::new(),
        },
        payload,
    };
    // SAFETY: `request` begins with the header that the ioctl takes, and `argsz` is its length. What its payload points to is the
    // caller's promise.
    let answer = unsafe { ioctl_with_mut_ref(&fd, VFIO_IOMMU_DIRTY_PAGES(), &mut request) };
    check(answer).map(drop)
}

/// Has a container note which of its mapped pages devices write.
///
/// # Errors
/// The kernel's answer.
pub(super) fn start_dirty_pages(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: there is no payload.
    unsafe { dirty_pages(fd, VFIO_IOMMU_DIRTY_PAGES_FLAG_START, ()) }
}

/// Ends what [`start_dirty_pages`] began.
///
/// # Errors
/// The kernel's answer.
pub(super) fn stop_dirty_pages(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: there is no payload.
    unsafe { dirty_pages(fd, VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP, ()) }
}

/// Copies the bits of written pages in `range` to `words`, and has the container forget them.
///
/// # Errors
/// The kernel's answer, EINVAL among them if the range ends inside of a mapping, or `InvalidInput` if `words` is too short.
pub(super) fn get_dirty_pages(
    fd: BorrowedFd<'_>,
    range: Iova,
    page_bytes: u64,
    words: &mut [u64],
) -> io::Result<()> {
    check_words(range, page_bytes, words)?;
    let payload = vfio_iommu_type1_dirty_bitmap_get {
        iova: range.start,
        size: range.bytes,
        bitmap: vfio_bitmap {
            pgsize: page_bytes,
            size: size_of_val(words) as u64,
            data: words.as_mut_ptr(),
        },
    };
    // SAFETY: the kernel writes at most `size` bytes at `data`, which is what `words` has; it is borrowed through the call.
    unsafe { dirty_pages(fd, VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP, payload) }
}

/// A device or a container that vfio-ioctls has opened, for whatever takes a descriptor here. Shares ownership.
pub struct OfVfioIoctls<T>(Arc<T>);

// Not derived: that would ask for a T that can be cloned.
impl<T> Clone for OfVfioIoctls<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T> OfVfioIoctls<T> {
    /// Shares `opened`.
    pub fn new(opened: Arc<T>) -> Self {
        Self(opened)
    }
}

impl<T> std::fmt::Debug for OfVfioIoctls<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("OfVfioIoctls")
    }
}

impl AsFd for OfVfioIoctls<vfio_ioctls::VfioDevice> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the device owns a file and closes it when it is dropped, not before.
        unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }
}

impl AsFd for OfVfioIoctls<VfioContainer> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the container owns a file and closes it when it is dropped, not before.
        unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }
}
