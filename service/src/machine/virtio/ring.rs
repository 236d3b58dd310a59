//! A ring that is served by this process.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::backend::{QueueBase, QueueStart};
use crate::machine::ram::RamMemory;

/// The driver may say which entry of a ring it wants to hear of (VIRTIO_F_EVENT_IDX).
pub const F_EVENT_IDX: u64 = 1 << 29;
/// The driver wants no interrupts: a flag of the available ring.
const NO_INTERRUPT: u16 = 1;
/// Flags and index, before the entries of either ring.
const RING_HEADER_BYTES: u64 = 4;
const AVAIL_ENTRY_BYTES: u64 = 2;
const USED_ENTRY_BYTES: u64 = 8;

/// A chain of descriptors as a device sees it.
pub type Chain<'a> = DescriptorChain<&'a RamMemory>;

/// What the driver has made of a ring makes no sense. It is left alone from then on.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// The ring itself.
    #[error("the ring")]
    Ring(#[from] virtio_queue::Error),
    /// A word of the ring, or a buffer, is not in RAM.
    #[error("not in RAM")]
    Memory(#[from] vm_memory::GuestMemoryError),
    /// What is in it.
    #[error("{0}")]
    Content(&'static str),
}

/// A queue of a device that works.
#[derive(Debug)]
pub struct Ring {
    index: u16,
    queue: Queue,
    kick: Arc<EventFd>,
    broken: bool,
    /// Entry of the available ring that the driver had not filled when it was looked for.
    looked_for: u16,
    /// Entries of the used ring that the driver may not have been told of.
    untold: u16,
    /// The driver was told to kick, if it listens to a flag.
    asked: bool,
}

impl Ring {
    pub(super) fn new(start: QueueStart, features: u64) -> std::io::Result<Self> {
        let QueueStart { index, state, kick } = start;
        let mut queue = Queue::try_from(state).map_err(std::io::Error::other)?;
        queue.set_event_idx(features & F_EVENT_IDX != 0);
        Ok(Self {
            index,
            queue,
            kick,
            broken: false,
            looked_for: state.next_avail,
            untold: 0,
            asked: false,
        })
    }

    /// Number of the queue.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Entries that it has.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Takes the next chain that the driver has made available.
    ///
    /// # Errors
    /// When the ring makes no sense.
    pub fn take<'a>(&mut self, memory: &'a RamMemory) -> Result<Option<Chain<'a>>, Broken> {
        self.looked_for = self.queue.next_avail();
        Ok(self.queue.iter(memory)?.next())
    }

    /// Puts back the last `count` chains that were taken, as if they had not been. Only those that nothing was used of after.
    pub fn put_back(&mut self, count: u16) {
        let before = self.queue.next_avail().wrapping_sub(count);
        self.queue.set_next_avail(before);
    }

    /// Gives chains back to the driver, all in one moment: of each its head, and how many bytes were written to it.
    ///
    /// # Errors
    /// When one is not of this ring.
    pub fn give_back(&mut self, memory: &RamMemory, chains: &[(u16, u32)]) -> Result<(), Broken> {
        let Some(((last, bytes), others)) = chains.split_last() else {
            return Ok(());
        };
        let mut next = self.queue.next_used();
        for (head, bytes) in others {
            if *head >= self.size() {
                return Err(virtio_queue::Error::InvalidDescriptorIndex.into());
            }
            let at = self.used_entry(next)?;
            memory.write_obj([u32::from(*head).to_le(), bytes.to_le()], at)?;
            next = next.wrapping_add(1);
        }
        // The driver sees none of them before the index, which goes with the last.
        self.queue.set_next_used(next);
        self.queue.add_used(memory, *last, *bytes)?;
        let count = u16::try_from(chains.len()).unwrap_or(u16::MAX);
        self.untold = self.untold.saturating_add(count);
        Ok(())
    }

    /// Whether the driver is to be interrupted for what it was given back since it was asked last.
    ///
    /// `virtio_queue` answers the same question (`needs_notification`), but says yes to a driver without event indices that wants no
    /// interrupts, and counts only what went through its `add_used`, which is one of many in [`give_back`](Self::give_back).
    ///
    /// # Errors
    /// When the ring is not in RAM.
    pub(super) fn wants_interrupt(&mut self, memory: &RamMemory) -> Result<bool, Broken> {
        let untold = std::mem::take(&mut self.untold);
        if untold == 0 {
            return Ok(false);
        }
        // The driver looks at the used ring after it has said what it wants to hear of.
        fence(Ordering::SeqCst);
        if !self.queue.event_idx_enabled() {
            let flags =
                memory.load::<u16>(GuestAddress(self.queue.avail_ring()), Ordering::Relaxed)?;
            return Ok(u16::from_le(flags) & NO_INTERRUPT == 0);
        }
        let behind = RING_HEADER_BYTES + u64::from(self.size()) * AVAIL_ENTRY_BYTES;
        let at = beyond(self.queue.avail_ring(), behind)?;
        let wanted = u16::from_le(memory.load(at, Ordering::Relaxed)?);
        let ago = self.queue.next_used().wrapping_sub(wanted).wrapping_sub(1);
        Ok(ago < untold)
    }

    /// Has the driver kick when it fills the entry that was looked for last; true if it has done so meanwhile.
    ///
    /// # Errors
    /// When the ring is not in RAM.
    pub(super) fn wants_kick(&mut self, memory: &RamMemory) -> Result<bool, Broken> {
        // Without the feature it always kicks, unless a back end before this one told it not to: the flag is in the guest's memory, and
        // the kernel's leaves it there when it is stopped.
        if std::mem::replace(&mut self.asked, true) && !self.queue.event_idx_enabled() {
            return Ok(false);
        }
        // Chains that were put back are there, but not enough of them.
        let next = self.queue.next_avail();
        self.queue.set_next_avail(self.looked_for);
        let filled = self.queue.enable_notification(memory);
        self.queue.set_next_avail(next);
        Ok(filled?)
    }

    pub(super) fn kick(&self) -> &EventFd {
        &self.kick
    }

    pub(super) fn is_broken(&self) -> bool {
        self.broken
    }

    pub(super) fn set_broken(&mut self) {
        self.broken = true;
    }

    /// How far it has come.
    pub(super) fn base(&self) -> QueueBase {
        QueueBase {
            index: self.index,
            next_avail: self.queue.next_avail(),
            next_used: self.queue.next_used(),
        }
    }

    fn used_entry(&self, number: u16) -> Result<GuestAddress, Broken> {
        let entry = u64::from(number % self.size()) * USED_ENTRY_BYTES;
        beyond(self.queue.used_ring(), RING_HEADER_BYTES + entry)
    }
}

fn beyond(ring: u64, bytes: u64) -> Result<GuestAddress, Broken> {
    let at = GuestAddress(ring).checked_add(bytes);
    at.ok_or_else(|| virtio_queue::Error::AddressOverflow.into())
}
