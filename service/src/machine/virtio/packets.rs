//! The worker's part of a virtio-net on a tap: moves packets between the tap and the rings.
//!
//! A packet waits in the tap until the driver has room for one of the usual length: what was not read is there for whoever serves the guest
//! next, in this process or another. How long a packet is, is known only when it has been read. One that turns out to be longer than the room
//! is kept and goes first, also after a stop and a start, and in saved state to whoever serves the guest next. The thread does not wait for
//! more than the usual: a driver that gives buffers back in batches may itself wait for the thread to use what is there.
//!
//! Offloads are off on the tap and not offered to the driver, so that every header is empty.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError};

use vm_memory::{Bytes, GuestAddress};

use super::net::{F_MRG_RXBUF, FRAME_BYTES_MIN, HEADER_BYTES, PACKET_BYTES_MAX};
use super::ring::{Broken, Chain, Ring};
use super::worker::{Serve, Step};
use crate::machine::ram::RamMemory;

/// Number of the queue to the guest; the other one is from it.
const TO_GUEST: u16 = 0;
/// Where the header says how many chains the packet fills.
const CHAINS_AT: std::ops::Range<usize> = 10..12;
/// Header, and a frame with the Ethernet header and a VLAN tag.
const USUAL_BYTES: usize = HEADER_BYTES + 1518;
/// Most buffers of a chain.
const BUFFERS_MAX: usize = 1024;
/// Most packets that are read away before the first start: many times what a tap keeps.
const STALE_MAX: usize = 10_000;
/// Failures of the host that are logged.
const LOGGED_MAX: u32 = 10;

/// What is on its way. Only one thread works with it at a time.
#[derive(Debug)]
pub(super) struct Packets {
    tap: Arc<File>,
    /// Packets pass through it: guest memory is never a slice. Starts with the packet that is kept, if there is one.
    bounce: Vec<u8>,
    /// The same for packets from the guest, which go on while one is kept.
    outgoing: Vec<u8>,
    /// Length of the packet that was read and waits for room.
    kept: Option<usize>,
    /// The tap may have packets.
    readable: bool,
    /// What it has is from before the guest was here.
    stale: bool,
    logged: u32,
}

/// The worker's hold of it.
#[derive(Clone, Debug)]
pub(super) struct Mover {
    packets: Arc<Mutex<Packets>>,
    tap: Arc<File>,
    /// What the driver has accepted.
    features: u64,
}

impl Mover {
    pub(super) fn new(packets: &Arc<Mutex<Packets>>, features: u64) -> Self {
        let tap = Arc::clone(&lock(packets).tap);
        Self {
            packets: Arc::clone(packets),
            tap,
            features,
        }
    }
}

/// Nothing is left half-way by a panic that would make it of no use.
pub(super) fn lock(packets: &Mutex<Packets>) -> std::sync::MutexGuard<'_, Packets> {
    packets.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Serve for Mover {
    fn source(&self) -> Option<BorrowedFd<'_>> {
        Some(self.tap.as_fd())
    }

    fn opened(&mut self) {
        lock(&self.packets).begin();
    }

    fn source_is_ready(&mut self) {
        lock(&self.packets).readable = true;
    }

    fn serve(&mut self, ring: &mut Ring, memory: &RamMemory) -> Result<Step, Broken> {
        let mut packets = lock(&self.packets);
        if ring.index() != TO_GUEST {
            packets.collect(ring, memory)
        } else if self.features & F_MRG_RXBUF != 0 {
            let wanted = packets.kept.unwrap_or(USUAL_BYTES);
            packets.deliver(ring, memory, wanted)
        } else {
            // Whatever it holds.
            packets.deliver(ring, memory, 1)
        }
    }
}

/// A chain to write a packet to.
struct Room {
    head: u16,
    buffers: Vec<(GuestAddress, usize)>,
    bytes: usize,
}

impl Packets {
    /// Nothing on its way yet; `tap` is non-blocking. What `stale` packets it has until the first start are not for this guest: a bridge sent
    /// them here as well, because it did not know where the guest was.
    pub(super) fn new(tap: Arc<File>, stale: bool) -> Self {
        Self {
            tap,
            bounce: vec![0; PACKET_BYTES_MAX],
            outgoing: Vec::new(),
            kept: None,
            // Nobody knows what has happened before.
            readable: true,
            stale,
            logged: 0,
        }
    }

    /// Another driver comes: it gets nothing that was for the last one.
    pub(super) fn forget(&mut self) {
        self.kept = None;
    }

    /// The packet that is kept, header included.
    pub(super) fn kept(&self) -> Option<Vec<u8>> {
        let len = self.kept?;
        self.bounce.get(..len).map(<[u8]>::to_vec)
    }

    /// Keeps this one instead, which is no longer than a packet may be.
    pub(super) fn keep(&mut self, packet: Option<&[u8]>) {
        self.kept = packet.and_then(|packet| {
            let room = self.bounce.get_mut(..packet.len())?;
            room.copy_from_slice(packet);
            Some(packet.len())
        });
    }

    /// The guest runs from now on. Somebody else may have read from the tap meanwhile, or left something there.
    pub(super) fn begin(&mut self) {
        if std::mem::take(&mut self.stale) {
            // The rest of each is dropped. The one that is kept came with the guest.
            let mut start = [0; HEADER_BYTES];
            let read = |_: &usize| (&*self.tap).read(&mut start).is_ok();
            let count = (0..STALE_MAX).take_while(read).count();
            tracing::debug!(count, "packets from before the guest was here");
        }
        self.readable = true;
    }

    /// Brings one packet from the tap to the guest, as soon as the ring has room for `wanted` bytes, header included.
    fn deliver(
        &mut self,
        ring: &mut Ring,
        memory: &RamMemory,
        wanted: usize,
    ) -> Result<Step, Broken> {
        if self.kept.is_none() && !self.readable {
            return Ok(Step::Waiting);
        }
        let mut rooms: Vec<Room> = Vec::new();
        let mut bytes = 0;
        let mut taken = 0;
        while bytes < wanted && taken < ring.size() {
            let Some(chain) = ring.take(memory)? else {
                ring.put_back(taken);
                return Ok(Step::Empty);
            };
            taken += 1;
            let room = Room::new(chain)?;
            bytes += room.bytes;
            rooms.push(room);
        }
        let Some(len) = self.next_packet() else {
            ring.put_back(taken);
            return Ok(Step::Waiting);
        };
        if len > bytes {
            ring.put_back(taken);
            // More room than that there will never be, or it may come.
            let never = wanted == 1 || taken == ring.size();
            self.kept = (!never).then_some(len);
            return Ok(Step::Done);
        }
        let used = self.write(&rooms, len, memory)?;
        self.kept = None;
        ring.put_back(taken - count_of(&used));
        ring.give_back(memory, &used)?;
        Ok(Step::Done)
    }

    /// Length of the packet at the start of the buffer: the one that was kept, or the next of the tap. `None` if there is none.
    fn next_packet(&mut self) -> Option<usize> {
        if let Some(len) = self.kept {
            return Some(len);
        }
        loop {
            match (&*self.tap).read(&mut self.bounce) {
                Ok(len) if len >= HEADER_BYTES + FRAME_BYTES_MIN => return Some(len),
                // No packet.
                Ok(0) => break,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    if error.kind() != io::ErrorKind::WouldBlock {
                        self.log("no packet can be read from the tap", &error);
                    }
                    break;
                }
            }
        }
        self.readable = false;
        None
    }

    /// Writes the packet of `len` bytes to as many of `rooms` as it fills; their heads, and how many bytes each has got.
    fn write(
        &mut self,
        rooms: &[Room],
        len: usize,
        memory: &RamMemory,
    ) -> Result<Vec<(u16, u32)>, Broken> {
        let mut used = Vec::new();
        let mut left = len;
        for room in rooms {
            let part = left.min(room.bytes);
            // As `len`, far less than that.
            used.push((room.head, u32::try_from(part).unwrap_or(u32::MAX)));
            left -= part;
            if left == 0 {
                break;
            }
        }
        let count = count_of(&used);
        let packet = &mut self.bounce[..len];
        // The kernel may leave what it does not know of as it was.
        packet[..HEADER_BYTES].fill(0);
        packet[CHAINS_AT].copy_from_slice(&count.to_le_bytes());
        let mut rest = &*packet;
        for (address, room) in rooms.iter().flat_map(|room| &room.buffers) {
            let (part, behind) = rest.split_at(rest.len().min(*room));
            memory.write_slice(part, *address)?;
            rest = behind;
        }
        Ok(used)
    }

    /// Brings one packet from the guest to the tap.
    fn collect(&mut self, ring: &mut Ring, memory: &RamMemory) -> Result<Step, Broken> {
        let Some(chain) = ring.take(memory)? else {
            return Ok(Step::Empty);
        };
        let head = chain.head_index();
        let mut packet = std::mem::take(&mut self.outgoing);
        packet.clear();
        let sent = match gather(chain, memory, &mut packet) {
            true => self.send(&mut packet),
            false => Ok(()),
        };
        self.outgoing = packet;
        match sent.map_err(|error| (error.kind(), error)) {
            Ok(()) => {}
            Err((io::ErrorKind::WouldBlock, _)) => {
                ring.put_back(1);
                return Ok(Step::Waiting);
            }
            // As a card without a cable.
            Err((_, error)) => self.log("a packet of the guest is lost", &error),
        }
        ring.give_back(memory, &[(head, 0)])?;
        Ok(Step::Done)
    }

    fn send(&self, packet: &mut [u8]) -> io::Result<()> {
        // No offload was offered: whatever the header says, the packet is as it is.
        packet[..HEADER_BYTES].fill(0);
        loop {
            match (&*self.tap).write(packet) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                sent => return sent.map(drop),
            }
        }
    }

    fn log(&mut self, what: &str, error: &io::Error) {
        self.logged = self.logged.saturating_add(1);
        if self.logged <= LOGGED_MAX {
            let error = error as &dyn std::error::Error;
            tracing::warn!(error, "{what}");
        }
    }
}

impl Room {
    fn new(chain: Chain<'_>) -> Result<Self, Broken> {
        let head = chain.head_index();
        let (mut buffers, mut bytes) = (Vec::new(), 0_usize);
        for buffer in chain {
            if !buffer.is_write_only() || buffers.len() == BUFFERS_MAX {
                return Err(Broken::Content("no room for a packet"));
            }
            let len = buffer.len() as usize;
            buffers.push((buffer.addr(), len));
            bytes += len;
        }
        if bytes == 0 {
            return Err(Broken::Content("room for nothing"));
        }
        Ok(Self {
            head,
            buffers,
            bytes,
        })
    }
}

/// A ring has no more.
fn count_of(chains: &[(u16, u32)]) -> u16 {
    u16::try_from(chains.len()).unwrap_or(u16::MAX)
}

/// Copies a packet of the guest, header included; false if it is none.
fn gather(chain: Chain<'_>, memory: &RamMemory, packet: &mut Vec<u8>) -> bool {
    for (number, buffer) in chain.enumerate() {
        let (at, len) = (packet.len(), buffer.len() as usize);
        if buffer.is_write_only() || number == BUFFERS_MAX || len > PACKET_BYTES_MAX - at {
            return false;
        }
        packet.resize(at + len, 0);
        if memory.read_slice(&mut packet[at..], buffer.addr()).is_err() {
            return false;
        }
    }
    packet.len() >= HEADER_BYTES + FRAME_BYTES_MIN
}
