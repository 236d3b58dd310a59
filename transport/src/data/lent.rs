//! Messages whose bytes are guest pages: one list of buffers for `sendmsg`, `recvmsg` and the ring.
//!
//! The kernel is told addresses, so somebody must vouch that they stay mapped. [`LentMessage`] does: it holds the RAM and owns the
//! only other buffer its list points into. Whoever lends it to the kernel owns it until the kernel is done: a blocking call by
//! borrowing it, the ring by keeping it in its slab.

#![expect(
    unsafe_code,
    reason = "lends guest pages to the kernel by address; `LentMessage` keeps them mapped"
)]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;

use crate::memory::GuestRam;
use crate::memory::zero::PAGE_BYTES;
use crate::units::PageRun;

/// Most buffers of one message: `UIO_MAXIOV` of the kernel.
pub(crate) const BUFFERS_MAX: usize = 1024;

/// A list of buffers that are either guest pages or parts of an own buffer.
pub(crate) struct LentMessage {
    /// Points into mappings of `ram` and into `own`, and nowhere else.
    buffers: Vec<libc::iovec>,
    /// First buffer that still has bytes to move.
    next: usize,
    bytes_left: u64,
    /// What the kernel reads: one element, on the heap so that its address survives moves of `self`. Not a box, which would claim to
    /// be the only pointer to it.
    header: Vec<libc::msghdr>,
    own: OwnBuffer,
    ram: GuestRam,
}

impl std::fmt::Debug for LentMessage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LentMessage")
            .field("buffers", &self.buffers.len())
            .field("bytes_left", &self.bytes_left)
            .finish_non_exhaustive()
    }
}

impl LentMessage {
    /// An empty message with an own buffer of `own_bytes`.
    pub(crate) fn new(ram: GuestRam, own_bytes: usize) -> Self {
        Self {
            buffers: Vec::with_capacity(BUFFERS_MAX),
            next: 0,
            bytes_left: 0,
            header: vec![empty_header()],
            own: OwnBuffer::new(own_bytes),
            ram,
        }
    }

    /// Forgets all buffers; the content of the own buffer stays.
    pub(crate) fn clear(&mut self) {
        self.buffers.clear();
        self.next = 0;
        self.bytes_left = 0;
    }

    /// The own buffer.
    pub(crate) fn own(&self) -> &[u8] {
        // SAFETY: the allocation has `len` initialised bytes (zeroed at birth). Nobody writes them while `self` is borrowed: the
        // kernel does so only while a blocking call borrows `self` mutably, or while the ring owns it.
        unsafe { std::slice::from_raw_parts(self.own.start.as_ptr(), self.own.layout.size()) }
    }

    /// The own buffer, to fill it.
    pub(crate) fn own_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `own`, and `&mut self` makes it the only access.
        unsafe { std::slice::from_raw_parts_mut(self.own.start.as_ptr(), self.own.layout.size()) }
    }

    /// Appends a part of the own buffer.
    ///
    /// # Panics
    /// If the range leaves the own buffer.
    pub(crate) fn push_own(&mut self, range: Range<usize>) {
        assert!(range.start <= range.end && range.end <= self.own.layout.size());
        let start = self.own.start.as_ptr().wrapping_add(range.start);
        self.push(start, range.len());
    }

    /// Appends guest pages.
    ///
    /// # Panics
    /// If they are outside of the RAM: runs are checked where they enter.
    pub(crate) fn push_pages(&mut self, run: PageRun) {
        let (start, len) = self
            .ram
            .block(run.block)
            .and_then(|block| block.host_range(run.start, run.count))
            .expect("runs were checked against the RAM");
        self.push(start, len);
    }

    fn push(&mut self, start: *mut u8, len: usize) {
        assert!(self.buffers.len() < BUFFERS_MAX);
        self.buffers.push(libc::iovec {
            iov_base: start.cast(),
            iov_len: len,
        });
        self.bytes_left += len as u64;
    }

    /// Bytes that have not been moved yet.
    pub(crate) fn bytes_left(&self) -> u64 {
        self.bytes_left
    }

    /// The kernel moved this many bytes: the rest of the message starts after them.
    ///
    /// # Panics
    /// If the message has fewer bytes.
    pub(crate) fn advance(&mut self, mut bytes: usize) {
        self.bytes_left = self
            .bytes_left
            .checked_sub(bytes as u64)
            .expect("the kernel moves at most what it was given");
        while bytes > 0 {
            let buffer = &mut self.buffers[self.next];
            if bytes < buffer.iov_len {
                buffer.iov_base = buffer.iov_base.wrapping_byte_add(bytes);
                buffer.iov_len -= bytes;
                return;
            }
            bytes -= buffer.iov_len;
            self.next += 1;
        }
    }

    /// What to hand to the kernel for the bytes that are left. The pointer and all it leads to stay valid until `self` is dropped or
    /// changed; moving `self` is harmless.
    pub(crate) fn header(&mut self) -> *mut libc::msghdr {
        let rest = &mut self.buffers[self.next..];
        self.header[0].msg_iov = rest.as_mut_ptr();
        self.header[0].msg_iovlen = rest.len() as _;
        self.header.as_mut_ptr()
    }

    /// Sends what is left with one blocking call and returns how many bytes the kernel took.
    ///
    /// # Errors
    /// What `sendmsg` says; `EFAULT` when a page cannot be read.
    pub(crate) fn send(&mut self, socket: BorrowedFd<'_>, flags: i32) -> io::Result<usize> {
        let fd = socket.as_raw_fd();
        let header = self.header();
        // SAFETY: the header and its list are valid, see `header`. All buffers lie in mappings that `self.ram` keeps alive or in
        // `self.own`, and the call ends before `self` can change. The guest may write the pages meanwhile; no reference to them
        // exists, and such a page is dirty and sent again.
        let sent = unsafe { libc::sendmsg(fd, header, flags) };
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    }

    /// Receives into what is left with one blocking call and returns how many bytes came; 0 at the end of the stream.
    ///
    /// # Errors
    /// What `recvmsg` says; `EFAULT` when there is no memory for a page.
    pub(crate) fn receive(&mut self, socket: BorrowedFd<'_>, flags: i32) -> io::Result<usize> {
        let fd = socket.as_raw_fd();
        let header = self.header();
        // SAFETY: as in `send`; the kernel writes the buffers. Guest RAM is mapped writable, and `&mut self` is the only way to
        // `own`.
        let received = unsafe { libc::recvmsg(fd, header, flags) };
        usize::try_from(received).map_err(|_| io::Error::last_os_error())
    }
}

/// Memory of ours that the kernel reads and writes through raw pointers. Not a `Box<[u8]>`: the pointers in the buffer list must stay
/// valid while the message moves and while slices are made of it.
struct OwnBuffer {
    start: NonNull<u8>,
    layout: Layout,
}

impl OwnBuffer {
    /// Zeroed and page-aligned. At least one byte, so that the allocator never sees size zero.
    fn new(bytes: usize) -> Self {
        let layout =
            Layout::from_size_align(bytes.max(1), PAGE_BYTES).expect("own buffers are small");
        // SAFETY: the size is not zero.
        let start = unsafe { alloc_zeroed(layout) };
        let Some(start) = NonNull::new(start) else {
            handle_alloc_error(layout);
        };
        Self { start, layout }
    }
}

impl Drop for OwnBuffer {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this very layout, freed only here. The kernel is done with it: see `LentMessage`.
        unsafe { dealloc(self.start.as_ptr(), self.layout) }
    }
}

fn empty_header() -> libc::msghdr {
    // SAFETY: a `msghdr` is plain pointers and integers; null and zero mean "no address, no buffers, no control data".
    unsafe { std::mem::zeroed() }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::memory::extents::tests::{memfd_ram, run};
    use crate::memory::zero::GuestPage;
    use crate::units::PageIndex;

    #[test]
    fn a_message_resumes_at_the_right_byte_after_any_short_write() {
        let (source, target) = (memfd_ram(&[3]), memfd_ram(&[3]));
        for index in 0..3_u8 {
            let page = GuestPage::of(&source.blocks()[0], PageIndex(index.into())).unwrap();
            page.copy_from(&std::array::from_fn(|at| {
                (at % 253).to_le_bytes()[0] ^ index
            }));
        }
        let mut sent = LentMessage::new(source.clone(), 100);
        for cut in [1, 49, 50, 51, 4145, 4146, 4147, 8241, 8242, 8243] {
            let (left, right) = UnixStream::pair().unwrap();
            let mut received = LentMessage::new(target.clone(), 60);
            received.push_own(10..60);
            received.push_pages(run(0, 0, 1));
            received.push_pages(run(0, 1, 2));
            sent.clear();
            sent.own_mut()[..50].fill(9);
            sent.push_own(0..50);
            sent.push_pages(run(0, 2, 1));
            sent.push_pages(run(0, 0, 2));
            // What the kernel took in a first write of `cut` bytes is consumed by hand on both sides.
            assert_eq!(sent.send(left.as_fd(), 0).unwrap(), 50 + 3 * 4096);
            sent.advance(cut);
            assert_eq!(sent.bytes_left(), 50 + 3 * 4096 - cut as u64);
            let mut first = received;
            let all = first.receive(right.as_fd(), libc::MSG_WAITALL).unwrap();
            assert_eq!(all, 50 + 3 * 4096);
            assert_eq!(first.own()[10..60], [9; 50]);
            // The rest of the message, sent again, equals the tail of what came.
            let rest = usize::try_from(sent.bytes_left()).unwrap();
            assert_eq!(sent.send(left.as_fd(), 0).unwrap(), rest);
            first.clear();
            first.push_own(10..60);
            first.push_pages(run(0, 0, 3));
            first.advance(cut);
            let again = first
                .receive(right.as_fd(), libc::MSG_WAITALL | libc::MSG_DONTWAIT)
                .unwrap();
            assert_eq!(again, rest);
            for (from, to) in [(2, 0), (0, 1), (1, 2)] {
                let content = |ram: &GuestRam, page| {
                    let mut content = [0; PAGE_BYTES];
                    let page = GuestPage::of(&ram.blocks()[0], PageIndex(page)).unwrap();
                    page.copy_to(&mut content);
                    content
                };
                assert_eq!(content(&source, from), content(&target, to), "cut at {cut}");
            }
        }
    }
}
