//! The few userfaultfd and pagemap ioctls of the dirty log, as safe functions.
//!
//! They are safe for any address in this process. None of them reads or writes the memory at the addresses it is given, changes
//! what a later read there returns, or moves a mapping: they only decide whether the kernel takes note of the next write to a page.
//! In the asynchronous mode that [`open`] insists on, the kernel lets that write go on by itself, so no thread can get stuck. The
//! kernel checks all ranges and answers with an error for one that is not mapped.
//!
//! Layouts and numbers are those of `linux/userfaultfd.h` and `linux/fs.h`.
#![expect(
    unsafe_code,
    reason = "no crate covers PAGEMAP_SCAN and asynchronous write protection; each ioctl gets exclusive access to a structure of the \
              size that is part of its number"
)]

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use rustix::mm::UserfaultfdFlags;

/// `UFFD_USER_MODE_ONLY`: what an unprivileged process must ask for. It restricts who is *told* about faults; in the asynchronous
/// mode nobody is, and writes by system calls are logged all the same.
const USER_MODE_ONLY: u32 = 1;
/// `UFFD_API`.
const API: u64 = 0xaa;
/// `UFFD_FEATURE_WP_HUGETLBFS_SHMEM`: write protection also in shared memory and huge pages. Linux 5.19.
const FEATURE_WP_SHARED: u64 = 1 << 12;
/// `UFFD_FEATURE_WP_UNPOPULATED`: write protection also where there is no page yet. Linux 6.4.
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
/// `UFFD_FEATURE_WP_ASYNC`: the kernel resolves the fault itself and only takes note. Linux 6.7, together with `PAGEMAP_SCAN`.
const FEATURE_WP_ASYNC: u64 = 1 << 15;
/// `UFFDIO_REGISTER_MODE_WP`, and `UFFDIO_WRITEPROTECT_MODE_WP` is the bit below.
const REGISTER_WP: u64 = 1 << 1;
const WRITEPROTECT_WP: u64 = 1 << 0;

/// `USERFAULTFD_IOC_NEW`, asked of `/dev/userfaultfd`.
const IOC_NEW: libc::Ioctl = 0xaa00;
const UFFDIO_API: libc::Ioctl = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::Ioctl = 0xc020_aa00;
const UFFDIO_UNREGISTER: libc::Ioctl = 0x8010_aa01;
const UFFDIO_WRITEPROTECT: libc::Ioctl = 0xc018_aa06;
const PAGEMAP_SCAN: libc::Ioctl = 0xc060_6610;

/// `PAGE_IS_WRITTEN`: not write-protected any more, so written since the protection was set.
const PAGE_IS_WRITTEN: u64 = 1 << 1;
/// `PM_SCAN_WP_MATCHING`: protects again what it reports, in the same step.
const SCAN_WP_MATCHING: u64 = 1 << 0;
/// `PM_SCAN_CHECK_WPASYNC`: fails if part of the range is not registered in the asynchronous mode.
const SCAN_CHECK_WPASYNC: u64 = 1 << 1;

/// `struct uffdio_api`.
#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_range`.
#[repr(C)]
struct UffdioRange {
    start: u64,
    len: u64,
}

impl From<&Range<u64>> for UffdioRange {
    fn from(range: &Range<u64>) -> Self {
        Self {
            start: range.start,
            len: range.end.saturating_sub(range.start),
        }
    }
}

/// `struct uffdio_register`.
#[repr(C)]
struct UffdioRegister {
    range: UffdioRange,
    mode: u64,
    ioctls: u64,
}

/// `struct uffdio_writeprotect`.
#[repr(C)]
struct UffdioWriteprotect {
    range: UffdioRange,
    mode: u64,
}

/// `struct page_region`: a run of pages, by address.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct PageRegion {
    /// First byte.
    pub(super) start: u64,
    /// The byte after the last one.
    pub(super) end: u64,
    categories: u64,
}

/// `struct pm_scan_arg`.
#[repr(C)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

// The size is part of an ioctl's number (bits 16 to 29), so a wrong layout is a wrong number.
const _: () = {
    assert!(size_of::<UffdioApi>() == (UFFDIO_API >> 16 & 0x3fff) as usize);
    assert!(size_of::<UffdioRegister>() == (UFFDIO_REGISTER >> 16 & 0x3fff) as usize);
    assert!(size_of::<UffdioRange>() == (UFFDIO_UNREGISTER >> 16 & 0x3fff) as usize);
    assert!(size_of::<UffdioWriteprotect>() == (UFFDIO_WRITEPROTECT >> 16 & 0x3fff) as usize);
    assert!(size_of::<ScanArg>() == (PAGEMAP_SCAN >> 16 & 0x3fff) as usize);
    assert!(size_of::<PageRegion>() == 24);
};

/// Opens a userfaultfd, close-on-exec, that write-protects asynchronously.
///
/// Tries the system call, which needs no privilege here, then `/dev/userfaultfd`, which is what a system call filter may leave.
///
/// # Errors
/// `Unsupported` where the kernel is too old, else the answer of the system call.
pub(super) fn open() -> io::Result<OwnedFd> {
    let flags = UserfaultfdFlags::CLOEXEC
        | UserfaultfdFlags::NONBLOCK
        | UserfaultfdFlags::from_bits_retain(USER_MODE_ONLY);
    // SAFETY: the call makes a descriptor and nothing else. What the descriptor can do is limited to the functions of this file,
    // none of which answers faults or fills pages.
    let uffd = unsafe { rustix::mm::userfaultfd(flags) }
        .or_else(|from_call| open_device().map_err(|_from_device| io::Error::from(from_call)))?;
    let mut api = UffdioApi {
        api: API,
        features: FEATURE_WP_SHARED | FEATURE_WP_UNPOPULATED | FEATURE_WP_ASYNC,
        ioctls: 0,
    };
    // SAFETY: `api` is the structure that UFFDIO_API reads and writes, with its size checked above.
    let answer = unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_API, &raw mut api) };
    check(answer).map_err(|error| match error.raw_os_error() {
        Some(libc::EINVAL) => unsupported(),
        _ => error,
    })?;
    Ok(uffd)
}

fn open_device() -> io::Result<OwnedFd> {
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/userfaultfd")?;
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: USERFAULTFD_IOC_NEW takes its flags by value.
    let fd = unsafe { libc::ioctl(device.as_raw_fd(), IOC_NEW, flags) };
    let fd = check(fd)?;
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// What is said when the kernel lacks the interface.
fn unsupported() -> io::Error {
    io::Error::new(
        io::ErrorKind::Unsupported,
        "this kernel cannot track writes by asynchronous write protection, which needs Linux 6.7",
    )
}

/// Watches the pages in `range` for writes. Until [`protect`] all of them count as written.
///
/// # Errors
/// The kernel's answer: `EBUSY` if another userfaultfd watches part of it, `EINVAL` if it is not mapped, or not writable.
pub(super) fn register(uffd: &OwnedFd, range: &Range<u64>) -> io::Result<()> {
    let mut register = UffdioRegister {
        range: range.into(),
        mode: REGISTER_WP,
        ioctls: 0,
    };
    // SAFETY: `register` is the structure that UFFDIO_REGISTER reads and writes, with its size checked above.
    let answer = unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_REGISTER, &raw mut register) };
    check(answer).map(drop)
}

/// Makes every page in `range` count as not written. Makes no page exist that did not.
///
/// # Errors
/// The kernel's answer; part of the range may then be protected.
pub(super) fn protect(uffd: &OwnedFd, range: &Range<u64>) -> io::Result<()> {
    let mut protect = UffdioWriteprotect {
        range: range.into(),
        mode: WRITEPROTECT_WP,
    };
    loop {
        // SAFETY: `protect` is the structure that UFFDIO_WRITEPROTECT reads, with its size checked above.
        let answer =
            unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_WRITEPROTECT, &raw mut protect) };
        match check(answer) {
            // Somebody changed the address space meanwhile: the kernel asks to be called again.
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => std::thread::yield_now(),
            answer => return answer.map(drop),
        }
    }
}

/// Ends watching `range`.
///
/// # Errors
/// The kernel's answer.
pub(super) fn unregister(uffd: &OwnedFd, range: &Range<u64>) -> io::Result<()> {
    let mut range = UffdioRange::from(range);
    // SAFETY: `range` is the structure that UFFDIO_UNREGISTER reads, with its size checked above.
    let answer = unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_UNREGISTER, &raw mut range) };
    check(answer).map(drop)
}

/// Opens the page tables of this process for [`scan_written`].
///
/// # Errors
/// The kernel's answer.
pub(super) fn open_pagemap() -> io::Result<File> {
    File::open("/proc/self/pagemap")
}

/// Finds written pages in `range`, fills `found` with them in ascending order, and protects those again in the same step. Returns
/// how many runs were found and the address where the search stopped: the end of `range`, or less if `found` is full.
///
/// # Errors
/// The kernel's answer. Pages may then have been protected again without being reported.
pub(super) fn scan_written(
    pagemap: &File,
    range: &Range<u64>,
    found: &mut [PageRegion],
) -> io::Result<(usize, u64)> {
    let mut arg = ScanArg {
        size: size_of::<ScanArg>() as u64,
        flags: SCAN_WP_MATCHING | SCAN_CHECK_WPASYNC,
        start: range.start,
        end: range.end,
        walk_end: 0,
        vec: found.as_mut_ptr().expose_provenance() as u64,
        vec_len: found.len() as u64,
        max_pages: 0,
        category_inverted: 0,
        category_mask: PAGE_IS_WRITTEN,
        category_anyof_mask: 0,
        return_mask: PAGE_IS_WRITTEN,
    };
    // SAFETY: `arg` is the structure that PAGEMAP_SCAN reads and writes, with its size checked above. `arg.vec` is `found`, which is
    // borrowed for the whole call, and `arg.vec_len` its length; any bit pattern is a `PageRegion`.
    let answer = unsafe { libc::ioctl(pagemap.as_fd().as_raw_fd(), PAGEMAP_SCAN, &raw mut arg) };
    let runs = check(answer).map_err(|error| match error.raw_os_error() {
        Some(libc::ENOTTY) => unsupported(),
        _ => error,
    })?;
    let runs = usize::try_from(runs).map_err(io::Error::other)?;
    Ok((runs.min(found.len()), arg.walk_end))
}

fn check(answer: libc::c_int) -> io::Result<libc::c_int> {
    if answer < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(answer)
    }
}
