//! The guest's half of a virtqueue, for tests of back ends: a driver that works on guest memory without a guest.

use std::fs::File;
use std::sync::Arc;

use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, MmapRegion};
use vmferry_devices::vhost::{Region, Ring, VhostMemory};
use vmferry_transport::memory::{DirtyMap, GuestRam, RamBlock};
use vmferry_transport::units::{BlockId, PAGE_SIZE, PageCount};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Descriptors that each request may have.
pub const PARTS_MAX: u16 = 4;
const DESC_NEXT: u16 = 1;
const DESC_WRITE: u16 = 2;

/// RAM of one block at address 0, in a memfd.
///
/// # Panics
/// When the host has no memory.
pub fn ram(pages: u64) -> (VhostMemory, GuestRam) {
    let bytes = pages * PAGE_SIZE;
    let file: File = vmferry_cpr::memfd::create_ram("ram", bytes).expect("a memfd");
    let len = usize::try_from(bytes).expect("64 bits");
    let mapping = MmapRegion::from_file(FileOffset::new(file, 0), len).expect("a mapping");
    let region = Arc::new(Region::new(mapping, GuestAddress(0)).expect("it fits"));
    let block = RamBlock::new("ram", region.clone()).expect("whole pages");
    let memory = VhostMemory::new(vec![region]).expect("one region");
    (memory, GuestRam::new(vec![block]))
}

/// Copies all of `from` to `to`, as a migration does.
///
/// # Panics
/// When they differ in size.
pub fn copy(from: &VhostMemory, to: &VhostMemory) {
    let bytes = usize::try_from(from.memory().last_addr().0 + 1).expect("64 bits");
    let mut all = vec![0; bytes];
    from.memory()
        .read_slice(&mut all, GuestAddress(0))
        .expect("RAM");
    to.memory()
        .write_slice(&all, GuestAddress(0))
        .expect("RAM of the same size");
}

/// Page numbers that are marked in a map of one block of `pages`.
pub fn marked(map: &DirtyMap, pages: u64) -> Vec<u64> {
    let marked = map.block(BlockId(0));
    assert_eq!(marked.len(), PageCount(pages));
    marked
        .runs(BlockId(0))
        .flat_map(|run| run.start.0..run.end().0)
        .collect()
}

/// Two events, of kicks and calls.
///
/// # Panics
/// When the host has no descriptors.
pub fn events() -> (EventFd, EventFd) {
    let event = || EventFd::new(EFD_NONBLOCK).expect("an event");
    (event(), event())
}

/// One part of a request: address, length, and whether the back end writes it.
pub type Part = (u64, u32, bool);

/// A driver of one split ring. Requests are told apart by slots, which the caller uses one at a time.
#[derive(Clone, Debug)]
pub struct Driver {
    memory: VhostMemory,
    ring: Ring,
    made: u16,
    seen: u16,
}

impl Driver {
    /// A ring of `size` descriptors in four pages from `address` on, nothing in it: the used ring has the last page for itself.
    pub fn new(memory: &VhostMemory, address: u64, size: u16) -> Self {
        let ring = Ring {
            size,
            desc: address,
            avail: address + 2 * PAGE_SIZE,
            used: address + 3 * PAGE_SIZE,
            base: 0,
        };
        assert!(u64::from(size) * 16 <= 2 * PAGE_SIZE && u64::from(size) * 8 + 6 <= PAGE_SIZE);
        Self {
            memory: memory.clone(),
            ring,
            made: 0,
            seen: 0,
        }
    }

    /// The same driver after its guest has moved to `memory`.
    pub fn moved(&self, memory: &VhostMemory) -> Self {
        Self {
            memory: memory.clone(),
            ..self.clone()
        }
    }

    /// Where the ring is.
    pub fn ring(&self) -> Ring {
        self.ring
    }

    /// The page of the used ring.
    pub fn used_page(&self) -> u64 {
        self.ring.used / PAGE_SIZE
    }

    /// Guest memory.
    pub fn memory(&self) -> &VhostMemory {
        &self.memory
    }

    fn write<T: vm_memory::ByteValued>(&self, value: T, address: u64) {
        self.memory
            .memory()
            .write_obj(value, GuestAddress(address))
            .expect("RAM");
    }

    fn read<T: vm_memory::ByteValued>(&self, address: u64) -> T {
        self.memory
            .memory()
            .read_obj(GuestAddress(address))
            .expect("RAM")
    }

    /// Makes a request available in `slot`. The caller kicks.
    ///
    /// # Panics
    /// If it has too many parts, or there is no such slot.
    pub fn post(&mut self, slot: u16, parts: &[Part]) {
        let head = slot * PARTS_MAX;
        assert!(parts.len() <= usize::from(PARTS_MAX) && head + PARTS_MAX <= self.ring.size);
        for (number, (address, bytes, writable)) in (head..).zip(parts) {
            let last = usize::from(number - head) + 1 == parts.len();
            let next = if last { 0 } else { DESC_NEXT };
            let flags = next | if *writable { DESC_WRITE } else { 0 };
            let at = self.ring.desc + u64::from(number) * 16;
            self.write(*address, at);
            self.write(*bytes, at + 8);
            self.write(flags, at + 12);
            self.write(number + 1, at + 14);
        }
        let entry = u64::from(self.made % self.ring.size);
        self.write(head, self.ring.avail + 4 + entry * 2);
        self.made = self.made.wrapping_add(1);
        // The entry before the index.
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        self.write(self.made, self.ring.avail + 2);
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    }

    /// The next answer, if there is one: the slot, and how many bytes were written.
    pub fn answer(&mut self) -> Option<(u16, u32)> {
        let index: u16 = self.read(self.ring.used + 2);
        if index == self.seen {
            return None;
        }
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        let entry = u64::from(self.seen % self.ring.size);
        let head: u32 = self.read(self.ring.used + 4 + entry * 8);
        let bytes: u32 = self.read(self.ring.used + 8 + entry * 8);
        self.seen = self.seen.wrapping_add(1);
        Some((u16::try_from(head).expect("a head") / PARTS_MAX, bytes))
    }

    /// How many requests have no answer that was taken.
    pub fn open(&self) -> u16 {
        self.made.wrapping_sub(self.seen)
    }
}
