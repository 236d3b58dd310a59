//! What a VFIO device says of itself and what a guest does with it, without the code under test.

#![expect(
    unsafe_code,
    reason = "ioctls of VFIO; the code under test has its own, which must not judge itself"
)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;

use libc::{c_int, c_ulong};
use rustix::mm::{MapFlags, ProtFlags};

use crate::mdev::Mdev;

const CHECK_EXTENSION: c_ulong = 0x3b65;
const SET_IOMMU: c_ulong = 0x3b66;
const GROUP_SET_CONTAINER: c_ulong = 0x3b68;
const GROUP_GET_DEVICE_FD: c_ulong = 0x3b6a;
const DEVICE_GET_REGION_INFO: c_ulong = 0x3b6c;
const IOMMU_MAP_DMA: c_ulong = 0x3b71;
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

/// Registers of a serial port: data, and the state of its queue with a bit for something in it.
const DATA: u64 = 0;
const LINE_STATUS: u64 = 5;
const DATA_READY: u8 = 1;

/// An open device, in a container of its own.
pub(crate) struct Opened {
    device: OwnedFd,
    // Closed after the device.
    _group: File,
    container: File,
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
            container,
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

    /// Another descriptor of the device, as a VMM hands it to the code under test.
    pub(crate) fn device(&self) -> OwnedFd {
        self.device.try_clone().unwrap()
    }

    /// Another descriptor of its container.
    pub(crate) fn container(&self) -> File {
        self.container.try_clone().unwrap()
    }

    /// Lets the device reach `bytes` bytes of new memory as `iova`. It stays until the process ends.
    pub(crate) fn map(&self, iova: u64, bytes: u64) {
        let length = usize::try_from(bytes).unwrap();
        // SAFETY: new memory at a place that the kernel chooses.
        let memory = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                length,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
            )
        };
        // Size of the structure; for reading and writing.
        let mut request = [32 | 3 << 32, memory.unwrap() as u64, iova, bytes];
        ioctl(
            self.container.as_raw_fd(),
            IOMMU_MAP_DMA,
            address(&mut request),
        )
        .unwrap();
    }

    /// As the guest: writes to a serial port of mtty, which queues at most 15 bytes.
    pub(crate) fn send(&self, port: u32, bytes: &[u8]) {
        let device = File::from(self.device());
        let at = self.region(port);
        for byte in bytes {
            device.write_all_at(&[*byte], at + DATA).unwrap();
        }
    }

    /// As the guest: reads all that a serial port of mtty has queued.
    pub(crate) fn receive(&self, port: u32) -> Vec<u8> {
        let device = File::from(self.device());
        let at = self.region(port);
        let read = |register: u64| {
            let mut byte = [0];
            device.read_exact_at(&mut byte, at + register).unwrap();
            byte[0]
        };
        let mut found = Vec::new();
        while read(LINE_STATUS) & DATA_READY != 0 {
            found.push(read(DATA));
        }
        found
    }

    /// Where in the device's file a region begins.
    fn region(&self, index: u32) -> u64 {
        // Size, flags, index, offset of capabilities; size and offset of the region.
        let mut request = [32, u64::from(index), 0, 0];
        ioctl(
            self.device.as_raw_fd(),
            DEVICE_GET_REGION_INFO,
            address(&mut request),
        )
        .unwrap();
        request[3]
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
