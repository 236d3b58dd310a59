//! The lock that says which process may write an image.
//!
//! A lock of the open file description covers the whole file. It belongs to the inode, whatever path led there; it works between two
//! openings in one process as well; and it ends with the description, so a killed process leaves none behind. Other programs that
//! lock images, QEMU among them, respect it.

#![expect(
    unsafe_code,
    reason = "fcntl with a struct flock, for which no crate here has a safe face"
)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// What others must not do meanwhile.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Kind {
    /// Others may read.
    Shared,
    /// Others may do nothing.
    Exclusive,
}

/// Takes the lock, without waiting. False if somebody else holds one that excludes it. `file` is open for writing if the lock is
/// exclusive.
pub(super) fn try_lock(file: &File, kind: Kind) -> io::Result<bool> {
    let mut request = whole_file(match kind {
        Kind::Shared => libc::F_RDLCK,
        Kind::Exclusive => libc::F_WRLCK,
    });
    match fcntl(file, libc::F_OFD_SETLK, &mut request) {
        Ok(()) => Ok(true),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

/// Gives the lock back. Closing would do so too, but not while a child process between fork and exec still has the description.
pub(super) fn unlock(file: &File) -> io::Result<()> {
    fcntl(file, libc::F_OFD_SETLK, &mut whole_file(libc::F_UNLCK))
}

/// The process whose lock is in the way of an exclusive one, where the kernel tells: not for locks of open file descriptions.
pub(super) fn owner(file: &File) -> Option<u32> {
    let mut request = whole_file(libc::F_WRLCK);
    fcntl(file, libc::F_OFD_GETLK, &mut request).ok()?;
    u32::try_from(request.l_pid)
        .ok()
        .filter(|pid| *pid != 0 && i32::from(request.l_type) != libc::F_UNLCK)
}

/// A request about all of the file, however long it becomes. The kernel wants `l_pid` to be 0.
fn whole_file(kind: i32) -> libc::flock {
    libc::flock {
        // The constants are small; the field is narrower than their type.
        l_type: i16::try_from(kind).unwrap_or(i16::MAX),
        l_whence: 0,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

fn fcntl(file: &File, command: i32, request: &mut libc::flock) -> io::Result<()> {
    // SAFETY: both commands read a `struct flock`, and F_OFD_GETLK writes it; `request` is one, and borrowed for the call.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), command, std::ptr::from_mut(request)) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
