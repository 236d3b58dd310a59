//! What crate vhost does only for descriptors that it has opened itself, as safe functions over a descriptor that somebody else owns; and
//! taps, which no crate here covers.
//!
//! They are safe for any descriptor: the numbers are those of vhost and tun alone, and another descriptor answers ENOTTY.
#![expect(
    unsafe_code,
    reason = "crate vhost has these only for descriptors that it opened; each ioctl reads one structure of the size that is part of its \
              number"
)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use vhost::vhost_kern::vhost_binding::{
    VHOST_NET_SET_BACKEND, VHOST_VSOCK_SET_GUEST_CID, VHOST_VSOCK_SET_RUNNING, vhost_vring_file,
};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};
use vmm_sys_util::ioctl_iow_nr;

ioctl_iow_nr!(TUNSETIFF, TUN, 202, libc::c_int);
ioctl_iow_nr!(TUNSETOFFLOAD, TUN, 208, libc::c_uint);
ioctl_iow_nr!(TUNSETVNETHDRSZ, TUN, 216, libc::c_int);

const TUN: libc::c_uint = 0x54;
const IFF_TAP: u16 = 0x2;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;

/// `struct ifreq` of the kernel.
#[repr(C)]
struct Interface {
    name: [u8; libc::IFNAMSIZ],
    flags: u16,
    rest: [u8; 22],
}

const _: () = assert!(size_of::<Interface>() == size_of::<libc::ifreq>());

fn check(answer: i32) -> io::Result<()> {
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// VHOST_NET_SET_BACKEND: the socket or tap that queue `index` works on; `None` stops it and waits for what is under way.
///
/// # Errors
/// The kernel's answer.
pub(super) fn net_set_backend(vhost: &File, index: u32, tap: Option<&File>) -> io::Result<()> {
    let backend = vhost_vring_file {
        index,
        fd: tap.map_or(-1, AsRawFd::as_raw_fd),
    };
    // SAFETY: the kernel reads a structure of this type, and takes a reference of its own to the file.
    check(unsafe { ioctl_with_ref(vhost, VHOST_NET_SET_BACKEND(), &backend) })
}

/// VHOST_VSOCK_SET_GUEST_CID.
///
/// # Errors
/// The kernel's answer; EADDRINUSE if another guest has the number.
pub(super) fn vsock_set_cid(vhost: &File, cid: u64) -> io::Result<()> {
    // SAFETY: the kernel reads a number of this length.
    check(unsafe { ioctl_with_ref(vhost, VHOST_VSOCK_SET_GUEST_CID(), &cid) })
}

/// VHOST_VSOCK_SET_RUNNING.
///
/// # Errors
/// The kernel's answer.
pub(super) fn vsock_set_running(vhost: &File, running: bool) -> io::Result<()> {
    let running = libc::c_int::from(running);
    // SAFETY: the kernel reads an int.
    check(unsafe { ioctl_with_ref(vhost, VHOST_VSOCK_SET_RUNNING(), &running) })
}

/// TUNSETIFF: attaches `tun` to the tap called `name`, with virtio headers of `header_bytes` and no offloads.
///
/// # Errors
/// The kernel's answer; EBUSY if another process has the tap. `InvalidInput` for no name of an interface.
pub(super) fn attach_tap(tun: &File, name: &str, header_bytes: u8) -> io::Result<()> {
    let mut interface = Interface {
        name: [0; libc::IFNAMSIZ],
        flags: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR,
        rest: [0; 22],
    };
    // The last byte stays zero.
    if name.is_empty() || name.len() >= interface.name.len() || name.contains(['\0', '%', '/']) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    interface.name[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: the kernel reads and writes a structure of this length, despite the number, which says int.
    check(unsafe { ioctl_with_mut_ref(tun, TUNSETIFF(), &mut interface) })?;
    // SAFETY: takes a number.
    check(unsafe { ioctl_with_val(tun, TUNSETOFFLOAD(), 0) })?;
    let bytes = libc::c_int::from(header_bytes);
    // SAFETY: the kernel reads an int.
    check(unsafe { ioctl_with_ref(tun, TUNSETVNETHDRSZ(), &bytes) })
}
