//! What crate vhost does only for descriptors that it has opened itself, as safe functions over a descriptor that somebody else owns.
//!
//! They are safe for any descriptor: the numbers are vhost's alone, and one that is not vhost's answers ENOTTY.
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
use vmm_sys_util::ioctl::ioctl_with_ref;

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
