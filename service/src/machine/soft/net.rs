//! The workload's network interface, as the guest program has it: each UDP packet goes back, one at a time, a step for each page that vCPU 0
//! writes. All its state is guest memory, and what lies where is told in `workload::layout::net`.

use std::sync::atomic::{Ordering, fence};

use super::driver::Driver;
use super::memory::VcpuMemory;
use super::vcpu::Wrong;
use crate::machine::virtio::{Bus, QUEUE_NOTIFY};
use crate::machine::workload::layout::{NET_GPA, NO_INTERRUPT, net};

/// Bytes of a packet that change when it goes back, rounded up to words.
const HEADERS_BYTES: usize = 56;

/// The interface behind a window.
#[derive(Debug)]
pub(super) struct NetWork<'a>(Driver<'a>);

impl<'a> NetWork<'a> {
    /// The interface behind `window`. `None` for no window.
    pub(super) fn new(memory: &'a VcpuMemory, bus: &'a Bus, window: u64) -> Option<Self> {
        Driver::new(memory, bus, window, NET_GPA).map(Self)
    }

    /// Sets the device up as a driver does.
    pub(super) fn set_up(&self) {
        let driver = &self.0;
        driver.begin();
        let to_guest = [net::TO_DESC, net::TO_AVAIL, net::TO_USED];
        driver.set_up_queue(0, net::QUEUE_SIZE, to_guest);
        let from_guest = [net::FROM_DESC, net::FROM_AVAIL, net::FROM_USED];
        driver.set_up_queue(1, net::QUEUE_SIZE, from_guest);
        driver.finish();
        for number in 0..net::QUEUE_SIZE {
            let desc = net::TO_DESC + number * 16;
            driver.store(desc, buffer(number) + NET_GPA);
            driver.store(desc + 8, net::TO_DESC_REST);
        }
        driver.store(net::TO_AVAIL + 8, net::TO_AVAIL_1);
        driver.store(net::TO_AVAIL + 16, net::TO_AVAIL_2);
        driver.store(net::OFFERED, net::QUEUE_SIZE - 1);
        driver.store(net::READY, 1);
        self.offer();
    }

    /// A step of work, without waiting. Returns what was found wrong.
    pub(super) fn step(&self) -> Option<Wrong> {
        let driver = &self.0;
        if driver.load(net::READY) == 0 {
            return None;
        }
        if driver.load(net::HELD) != 0 {
            let left = driver.load(net::FROM_USED) >> 16;
            if (left ^ driver.load(net::SENT)) & 0xffff != 0 {
                return None;
            }
            driver.store(net::HELD, 0);
            self.offer();
        }
        let seen = driver.load(net::SEEN);
        // The word that the used ring begins in the middle of.
        let come = driver.load(net::TO_USED - 4) >> 48;
        if (come ^ seen) & 0xffff == 0 {
            return None;
        }
        // Only now what the device has written before.
        fence(Ordering::SeqCst);
        driver.store(net::SEEN, seen.wrapping_add(1));
        let expected = seen % net::QUEUE_SIZE;
        let entry = net::TO_USED + 4 + expected * 8;
        let used = driver.load(entry);
        let (found, bytes) = (used & 0xffff_ffff, used >> 32);
        if found != expected {
            self.offer();
            return Some(Wrong {
                gpa: NET_GPA + entry,
                expected,
                found,
            });
        }
        if !self.turn_round(expected, bytes) {
            self.offer();
        }
        None
    }

    /// Sends the packet in buffer `number` back; false if it is none to be answered.
    fn turn_round(&self, number: u64, bytes: u64) -> bool {
        let (driver, at) = (&self.0, buffer(number));
        let mut packet = [0; HEADERS_BYTES];
        for (word, place) in packet.chunks_exact_mut(8).zip((at..).step_by(8)) {
            word.copy_from_slice(&driver.load(place).to_le_bytes());
        }
        let ipv4 = (net::ETHER_IPV4 as u16).to_le_bytes();
        let kind = net::ETHER_TYPE as usize;
        if bytes < net::ANSWER_BYTES_MIN || packet[kind..kind + 2] != ipv4 {
            return false;
        }
        packet[..12].fill(0);
        packet[12..24].rotate_left(6);
        packet[net::IP_ADDRESSES as usize..][..8].rotate_left(4);
        packet[net::UDP_PORTS as usize..][..4].rotate_left(2);
        for (word, place) in packet.as_chunks::<8>().0.iter().zip((at..).step_by(8)) {
            driver.store(place, u64::from_le_bytes(*word));
        }
        driver.store(net::FROM_DESC, NET_GPA + at);
        driver.store(net::FROM_DESC + 8, bytes);
        let sent = driver.load(net::SENT).wrapping_add(1);
        driver.store(net::SENT, sent);
        driver.store(net::HELD, 1);
        fence(Ordering::SeqCst);
        driver.store(net::FROM_AVAIL, (sent & 0xffff) << 16 | NO_INTERRUPT);
        driver.write_register(QUEUE_NOTIFY, 1);
        true
    }

    /// Offers the next buffer to the device.
    fn offer(&self) {
        let driver = &self.0;
        let offered = driver.load(net::OFFERED).wrapping_add(1);
        driver.store(net::OFFERED, offered);
        fence(Ordering::SeqCst);
        driver.store(net::TO_AVAIL, (offered & 0xffff) << 16 | net::TO_AVAIL_0);
        driver.write_register(QUEUE_NOTIFY, 0);
    }
}

/// Place of a buffer among the driver's words.
fn buffer(number: u64) -> u64 {
    net::BUFFERS + number * net::BUFFER_BYTES
}
