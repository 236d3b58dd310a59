//! The simplest possible copy of memory over sockets, to compare the data path with: `send` here, `recv` there, nothing else.

#![expect(
    unsafe_code,
    reason = "sends and receives mapped RAM by address, as the data path it is compared with does"
)]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use vm_memory::{GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress};

/// Bytes per system call. Smaller ones cost more, larger ones gain nothing.
const CALL_BYTES: usize = 512 << 10;

/// Which way the bytes go.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Way {
    /// From the memory into the sockets.
    Send,
    /// From the sockets into the memory.
    Receive,
}

/// Moves the whole region, an equal share over each socket, one thread each. Both sides must have the same sizes and sockets.
///
/// # Errors
/// What the sockets say, or when the peer ends early.
///
/// # Panics
/// If a thread panics, or the region has no address.
pub fn copy(region: &GuestRegionMmap, sockets: &[OwnedFd], way: Way) -> io::Result<()> {
    let start = region
        .get_host_address(MemoryRegionAddress(0))
        .expect("a mapped region has an address") as usize;
    let len = usize::try_from(region.len()).expect("a mapped region fits memory");
    let share = len.div_ceil(sockets.len());
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..len)
            .step_by(share)
            .zip(sockets)
            .map(|(from, socket)| {
                let bytes = share.min(len - from);
                scope.spawn(move || {
                    // SAFETY: `from..from + bytes` lies inside the region, which is borrowed until the threads are joined.
                    unsafe { move_bytes(start + from, bytes, socket, way) }
                })
            })
            .collect();
        threads.into_iter().try_for_each(|thread| {
            let moved = thread.join();
            moved.expect("moving bytes does not panic")
        })
    })
}

/// # Safety
/// `bytes` bytes at `address` must be mapped until the return, readable to send and writable to receive, and not be borrowed.
unsafe fn move_bytes(
    mut address: usize,
    mut bytes: usize,
    socket: &OwnedFd,
    way: Way,
) -> io::Result<()> {
    while bytes > 0 {
        let part = bytes.min(CALL_BYTES);
        let fd = socket.as_raw_fd();
        let moved = match way {
            // SAFETY: the caller vouches for the memory; the kernel only reads it.
            Way::Send => unsafe { libc::send(fd, address as *const _, part, libc::MSG_NOSIGNAL) },
            // SAFETY: the caller vouches for the memory; no reference to it exists.
            Way::Receive => unsafe { libc::recv(fd, address as *mut _, part, libc::MSG_WAITALL) },
        };
        let moved = usize::try_from(moved).map_err(|_| io::Error::last_os_error())?;
        if moved == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        address += moved;
        bytes -= moved;
    }
    Ok(())
}
