//! Virtio devices behind virtio-mmio windows (version 2 of the transport).
//!
//! ```text
//! vCPU exit --> Bus --> Transport (registers, queues; a mutex each) --> Backend: prepare, open, stop
//!                                                                        |  blk, tap_net: a worker thread in this process
//!                                                                        |  others: the kernel, another process
//!               guest RAM: rings and buffers <---------------------------+
//! ```
//!
//! - [`backend`]: what a device model has to offer; the one trait to implement
//! - [`transport`]: the registers of one device; [`bus`]: all devices of a machine
//! - [`worker`]: the thread of a device that is served by this process; [`ring`]: a ring that it serves
//! - [`blk`]: a disk on a raw image
//! - [`vhost_user`]: a disk of another process; [`outside`]: what describes it, and network interfaces
//! - [`net`]: what network interfaces share; [`vhost_net`]: a tap, whose packets the kernel moves; [`tap_net`]: a tap, whose packets this
//!   process moves, which is done in [`packets`]
//! - [`saved`]: saved state
//!
//! A device works only between `Machine::go` and `Machine::pause`. Before the first of them everything that can fail is made ready
//! ([`Bus::prepare`]), with each device at a gate that it passes only when the guest runs here ([`Bus::open`]): as long as "not started" is
//! still a possible answer, no device has touched a ring, a buffer or a packet. A pause stops the vCPUs first and then every back end, which
//! hands back where it was in its rings; so nothing writes guest memory or an image afterwards. What a back end writes through
//! vm-memory is in the dirty log by itself; one that writes past it brings its own log.
//!
//! Interrupts are edges on one line per device, whoever raises them: an eventfd that is tied to the interrupt controller in the kernel.
//! The register that tells why always says "used buffers" while a device works, because a back end outside this process cannot set
//! it. Machines without interrupt controllers have guests that poll. After a stop each line is raised once and each queue is looked at
//! once, for what was on its way.

pub mod backend;
pub mod blk;
pub mod bus;
pub mod net;
pub mod outside;
pub mod packets;
pub mod ring;
pub mod saved;
pub mod tap_net;
pub mod transport;
pub mod vhost_net;
pub mod vhost_user;
pub mod worker;

#[cfg(test)]
pub(crate) mod tests;

pub use backend::{Backend, Interrupt, QueueBase, QueueStart, Start};
pub use bus::{Bus, Window};
pub use outside::{BlkConfig, NetConfig, OutsideConfig};

use super::disk::Disks;

/// The devices of a machine with `disks`, in the order of their windows.
pub fn backends(disks: &Disks) -> Vec<Box<dyn Backend>> {
    disks
        .iter()
        .map(|disk| Box::new(blk::Blk::new(disk.clone())) as Box<dyn Backend>)
        .collect()
}

/// Most devices of a machine.
pub const DEVICES_MAX: usize = 8;
/// Guest-physical address of the first window, in the device hole below 4 GiB.
pub const WINDOWS_GPA: u64 = 0xd000_0000;
/// Bytes of a window, and their distance.
pub const WINDOW_BYTES: u64 = 0x1000;
/// Interrupt line of the first device; the others follow.
pub const GSI_FIRST: u32 = 5;
/// Offset of the register that a driver writes a queue's number to.
pub const QUEUE_NOTIFY: u64 = 0x50;
/// Most queues of a device.
pub const QUEUES_MAX: usize = 8;
/// The feature that tells today's devices from legacy ones. The transport offers it for every back end and insists on it.
pub const F_VERSION_1: u64 = 1 << 32;
