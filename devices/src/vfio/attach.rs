//! VFIO's ioctls for descriptors as such: opening a device by its group and container, what regions it has, and the memory that a
//! container maps for it. vfio-ioctls has them for what it has opened itself, and neither gives its descriptors away nor takes any: a
//! process that takes a device over from another needs both.
//!
//! Safe for any descriptor, for the same reasons as [`ioctl`](super::ioctl).
#![expect(
    unsafe_code,
    reason = "no crate covers these ioctls for a descriptor that came from elsewhere; every structure is owned by the call"
)]

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use vfio_bindings::bindings::vfio::{
    VFIO_API_VERSION, VFIO_BASE, VFIO_DEVICE_FLAGS_RESET, VFIO_DMA_MAP_FLAG_READ,
    VFIO_DMA_MAP_FLAG_VADDR, VFIO_DMA_MAP_FLAG_WRITE, VFIO_DMA_UNMAP_FLAG_VADDR,
    VFIO_GROUP_FLAGS_VIABLE, VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE, VFIO_TYPE,
    VFIO_TYPE1v2_IOMMU, VFIO_UPDATE_VADDR, vfio_device_info, vfio_group_status,
    vfio_iommu_type1_dma_map, vfio_iommu_type1_dma_unmap, vfio_region_info,
};
use vmferry_transport::memory::ram::HostMapping;
use vmm_sys_util::ioctl::{
    ioctl, ioctl_with_mut_ref, ioctl_with_ptr, ioctl_with_ref, ioctl_with_val,
};
use vmm_sys_util::ioctl_io_nr;

use super::face::Iova;
use super::ioctl::{bytes_of, check};
use super::reach::DmaFace;

ioctl_io_nr!(VFIO_GET_API_VERSION, VFIO_TYPE as u32, VFIO_BASE);
ioctl_io_nr!(VFIO_CHECK_EXTENSION, VFIO_TYPE as u32, VFIO_BASE + 1);
ioctl_io_nr!(VFIO_SET_IOMMU, VFIO_TYPE as u32, VFIO_BASE + 2);
ioctl_io_nr!(VFIO_GROUP_GET_STATUS, VFIO_TYPE as u32, VFIO_BASE + 3);
ioctl_io_nr!(VFIO_GROUP_SET_CONTAINER, VFIO_TYPE as u32, VFIO_BASE + 4);
ioctl_io_nr!(VFIO_GROUP_GET_DEVICE_FD, VFIO_TYPE as u32, VFIO_BASE + 6);
ioctl_io_nr!(VFIO_DEVICE_GET_INFO, VFIO_TYPE as u32, VFIO_BASE + 7);
ioctl_io_nr!(VFIO_DEVICE_GET_REGION_INFO, VFIO_TYPE as u32, VFIO_BASE + 8);
ioctl_io_nr!(VFIO_IOMMU_MAP_DMA, VFIO_TYPE as u32, VFIO_BASE + 13);
ioctl_io_nr!(VFIO_IOMMU_UNMAP_DMA, VFIO_TYPE as u32, VFIO_BASE + 14);

/// Where a region lies in the file of its device, in bytes.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Region {
    /// Where it begins.
    pub file_offset: u64,
    /// Its length; 0 for one that does not exist, or can be neither read nor written.
    pub bytes: u64,
}

/// Opens a container that has no device yet, and checks that it is of a kind that is known here.
///
/// # Errors
/// /dev/vfio/vfio cannot be opened, or the kernel has no IOMMU of type 1.
pub fn open_container() -> io::Result<OwnedFd> {
    let container = File::options()
        .read(true)
        .write(true)
        .open("/dev/vfio/vfio")?;
    // SAFETY: the ioctl takes no argument.
    let version = check(unsafe { ioctl(&container, VFIO_GET_API_VERSION()) })?;
    // SAFETY: the argument is a number.
    let type1 = check(unsafe {
        ioctl_with_val(
            &container,
            VFIO_CHECK_EXTENSION(),
            VFIO_TYPE1v2_IOMMU.into(),
        )
    })?;
    if i64::from(version) != i64::from(VFIO_API_VERSION) || type1 != 1 {
        let text = format!("VFIO {version} of this kernel has no IOMMU of type 1, version 2");
        return Err(io::Error::new(io::ErrorKind::Unsupported, text));
    }
    Ok(container.into())
}

/// Has a group join a container; the first group also decides of which type the container is.
///
/// # Errors
/// The kernel's answer; `ResourceBusy` if some device of the group is not bound to a VFIO driver.
pub fn join(container: BorrowedFd<'_>, group: BorrowedFd<'_>, is_first: bool) -> io::Result<()> {
    let mut status = vfio_group_status {
        argsz: bytes_of::<vfio_group_status>(),
        flags: 0,
    };
    // SAFETY: `status` is the structure that the ioctl writes, and `argsz` its length.
    check(unsafe { ioctl_with_mut_ref(&group, VFIO_GROUP_GET_STATUS(), &mut status) })?;
    if status.flags & VFIO_GROUP_FLAGS_VIABLE == 0 {
        let text = "a device of its group is bound to another driver";
        return Err(io::Error::new(io::ErrorKind::ResourceBusy, text));
    }
    let number = container.as_raw_fd();
    // SAFETY: the kernel reads an int.
    check(unsafe { ioctl_with_ref(&group, VFIO_GROUP_SET_CONTAINER(), &number) })?;
    if is_first {
        // SAFETY: the argument is a number.
        check(unsafe { ioctl_with_val(&container, VFIO_SET_IOMMU(), VFIO_TYPE1v2_IOMMU.into()) })?;
    }
    Ok(())
}

/// Opens a device of a group that has joined a container; `name` is what its folder in sysfs is called.
///
/// # Errors
/// The kernel's answer.
pub fn open_device(group: BorrowedFd<'_>, name: &CStr) -> io::Result<OwnedFd> {
    // SAFETY: the kernel reads a string that ends with 0.
    let device =
        check(unsafe { ioctl_with_ptr(&group, VFIO_GROUP_GET_DEVICE_FD(), name.as_ptr()) })?;
    // SAFETY: the kernel has just made this descriptor for us, close-on-exec, and nobody else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(device) })
}

fn device_info(device: BorrowedFd<'_>) -> io::Result<vfio_device_info> {
    let mut info = vfio_device_info {
        argsz: bytes_of::<vfio_device_info>(),
        ..Default::default()
    };
    // SAFETY: `info` is the structure that the ioctl writes, and `argsz` its length.
    check(unsafe { ioctl_with_mut_ref(&device, VFIO_DEVICE_GET_INFO(), &mut info) })?;
    Ok(info)
}

/// Whether the device can be reset.
///
/// # Errors
/// The kernel's answer.
pub fn can_reset(device: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(device_info(device)?.flags & VFIO_DEVICE_FLAGS_RESET != 0)
}

/// The first `most` regions of a device.
///
/// # Errors
/// The kernel's answer.
pub fn regions(device: BorrowedFd<'_>, most: u32) -> io::Result<Vec<Region>> {
    let count = device_info(device)?.num_regions.min(most);
    let regions = (0..count).map(|index| {
        let mut info = vfio_region_info {
            argsz: bytes_of::<vfio_region_info>(),
            index,
            ..Default::default()
        };
        // SAFETY: `info` is the structure that the ioctl writes, and `argsz` its length.
        let answer =
            unsafe { ioctl_with_mut_ref(&device, VFIO_DEVICE_GET_REGION_INFO(), &mut info) };
        let usable = VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE;
        // One that the kernel does not describe, such as the legacy VGA region of what is no display.
        if answer < 0 || info.flags & usable == 0 {
            return Region::default();
        }
        Region {
            file_offset: info.offset,
            bytes: info.size,
        }
    });
    Ok(regions.collect())
}

/// What the kernel does with the memory that a container maps. [`Reach`](super::reach::Reach) keeps what is mapped alive.
pub(super) struct KernelDma<T>(pub(super) T);

impl<T: AsFd> KernelDma<T> {
    fn map_with(&self, flags: u32, range: Iova, memory: &dyn HostMapping) -> io::Result<()> {
        if memory.len() < range.bytes {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let request = vfio_iommu_type1_dma_map {
            argsz: bytes_of::<vfio_iommu_type1_dma_map>(),
            flags,
            vaddr: memory.host_address().expose_provenance() as u64,
            iova: range.start,
            size: range.bytes,
        };
        // SAFETY: `request` is the structure that the ioctl reads, and `argsz` its length. What is mapped is memory that its
        // implementation of `HostMapping` vouches for: it stays there as long as `memory` lives, which the caller keeps until the
        // kernel has forgotten the address, and nobody has references to it.
        check(unsafe { ioctl_with_ref(&self.0.as_fd(), VFIO_IOMMU_MAP_DMA(), &request) }).map(drop)
    }

    fn unmap_with(&self, flags: u32, range: Iova) -> io::Result<()> {
        let mut request = vfio_iommu_type1_dma_unmap {
            argsz: bytes_of::<vfio_iommu_type1_dma_unmap>(),
            flags,
            iova: range.start,
            size: range.bytes,
            ..Default::default()
        };
        // SAFETY: `request` is the structure that the ioctl reads and writes, and `argsz` its length; without a flag for it no bitmap
        // follows.
        let answer =
            unsafe { ioctl_with_mut_ref(&self.0.as_fd(), VFIO_IOMMU_UNMAP_DMA(), &mut request) };
        check(answer)?;
        // It answers with how much that was. Kernels before 6.2 leave alone what another process has mapped, and say so like this.
        if request.size == range.bytes {
            Ok(())
        } else {
            Err(io::Error::from_raw_os_error(libc::ENOENT))
        }
    }
}

impl<T: AsFd + Send + Sync> DmaFace for KernelDma<T> {
    fn can_change_addresses(&self) -> io::Result<bool> {
        // SAFETY: the argument is a number.
        let answer = check(unsafe {
            ioctl_with_val(
                &self.0.as_fd(),
                VFIO_CHECK_EXTENSION(),
                VFIO_UPDATE_VADDR.into(),
            )
        })?;
        Ok(answer == 1)
    }

    fn map(&self, range: Iova, memory: &dyn HostMapping) -> io::Result<()> {
        self.map_with(
            VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
            range,
            memory,
        )
    }

    fn unmap(&self, range: Iova) -> io::Result<()> {
        self.unmap_with(0, range)
    }

    fn forget_address(&self, range: Iova) -> io::Result<()> {
        self.unmap_with(VFIO_DMA_UNMAP_FLAG_VADDR, range)
    }

    fn tell_address(&self, range: Iova, memory: &dyn HostMapping) -> io::Result<()> {
        self.map_with(VFIO_DMA_MAP_FLAG_VADDR, range, memory)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_that_is_not_vfios_is_refused_and_maps_nothing() {
        let null = File::open("/dev/null").unwrap();
        let face = KernelDma(null.try_clone().unwrap());
        let range = Iova {
            start: 0,
            bytes: 4096,
        };
        for refused in [
            join(null.as_fd(), null.as_fd(), true),
            open_device(null.as_fd(), c"0000:00:00.0").map(drop),
            regions(null.as_fd(), 16).map(drop),
            can_reset(null.as_fd()).map(drop),
            face.can_change_addresses().map(drop),
            face.unmap(range),
            face.forget_address(range),
        ] {
            assert_eq!(refused.unwrap_err().raw_os_error(), Some(libc::ENOTTY));
        }
    }
}
