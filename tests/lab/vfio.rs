//! What a VFIO device says of itself, asked without the code under test.

#![expect(
    unsafe_code,
    reason = "ioctls of VFIO; the code under test has its own, which must not judge itself"
)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use libc::{c_int, c_ulong};

use crate::mdev::Mdev;

const CHECK_EXTENSION: c_ulong = 0x3b65;
const SET_IOMMU: c_ulong = 0x3b66;
const GROUP_SET_CONTAINER: c_ulong = 0x3b68;
const GROUP_GET_DEVICE_FD: c_ulong = 0x3b6a;
const DEVICE_FEATURE: c_ulong = 0x3b75;

const TYPE1V2_IOMMU: c_ulong = 3;
const FEATURE_GET: u32 = 1 << 16;
const FEATURE_MIGRATION: u32 = 1;
const FEATURE_MIG_DEVICE_STATE: u32 = 2;

/// The device migrates by STOP_COPY; it has the P2P states; it has PRE_COPY.
pub(crate) const STOP_COPY: u64 = 1;
pub(crate) const P2P: u64 = 2;
pub(crate) const PRE_COPY: u64 = 4;
/// State of a device that runs.
pub(crate) const RUNNING: u32 = 2;

/// An open device, in a container of its own.
pub(crate) struct Opened {
    device: OwnedFd,
    // Closed after the device.
    _group: File,
    _container: File,
}

/// The answer, or the error of the kernel.
fn ioctl(fd: RawFd, request: c_ulong, argument: c_ulong) -> io::Result<c_int> {
    // SAFETY: the callers pass numbers where VFIO takes numbers, and addresses of live values of the size that VFIO expects.
    let answer = unsafe { libc::ioctl(fd, request, argument) };
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(answer)
}

fn address<T>(value: &mut T) -> c_ulong {
    std::ptr::from_mut(value) as c_ulong
}

impl Opened {
    /// Opens a device as a VMM does.
    pub(crate) fn new(mdev: &Mdev) -> Self {
        let open = |path| File::options().read(true).write(true).open(path);
        let container = open("/dev/vfio/vfio".into()).unwrap();
        let group = open(mdev.group()).unwrap();
        assert_eq!(
            ioctl(container.as_raw_fd(), CHECK_EXTENSION, TYPE1V2_IOMMU).unwrap(),
            1
        );
        let mut of = container.as_raw_fd();
        ioctl(group.as_raw_fd(), GROUP_SET_CONTAINER, address(&mut of)).unwrap();
        ioctl(container.as_raw_fd(), SET_IOMMU, TYPE1V2_IOMMU).unwrap();
        let mut name = [0_u8; 64];
        name[..mdev.uuid().len()].copy_from_slice(mdev.uuid().as_bytes());
        let device = ioctl(group.as_raw_fd(), GROUP_GET_DEVICE_FD, address(&mut name)).unwrap();
        Self {
            // SAFETY: the kernel has just made this descriptor, for us.
            device: unsafe { OwnedFd::from_raw_fd(device) },
            _group: group,
            _container: container,
        }
    }

    /// What kind of migration it offers.
    ///
    /// # Errors
    /// ENOTTY if it does not migrate.
    pub(crate) fn migration_flags(&self) -> io::Result<u64> {
        self.feature(FEATURE_MIGRATION)
    }

    /// The state it is in.
    pub(crate) fn state(&self) -> u32 {
        // The upper half is a descriptor, of the other direction.
        (self.feature(FEATURE_MIG_DEVICE_STATE).unwrap() & 0xffff_ffff) as u32
    }

    /// Reads a feature of eight bytes.
    fn feature(&self, feature: u32) -> io::Result<u64> {
        // Size of the whole, flags, and the data in two halves.
        let mut request = [16, feature | FEATURE_GET, 0_u32, 0];
        ioctl(
            self.device.as_raw_fd(),
            DEVICE_FEATURE,
            address(&mut request),
        )?;
        Ok(u64::from(request[2]) | u64::from(request[3]) << 32)
    }
}
