//! Cases for the kernel lab: tests that need interfaces which the machine at hand lacks, and which therefore run inside an emulated
//! one. `tests/lab/run` builds this, boots the lab and runs it there; README.md beside this file says how to write a case.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on panics; clippy exempts test functions but not what they call"
)]

#[path = "../e2e/harness.rs"]
#[expect(dead_code, reason = "what the cases outside of the lab need more")]
mod harness; // processes under test, and what can be asked of them
#[path = "../e2e/line.rs"]
#[expect(dead_code, reason = "what the cases outside of the lab need more")]
mod line; // what a guest says on its serial port, in order
#[path = "../e2e/upgrade_faults/link.rs"]
#[expect(dead_code, reason = "what the cases outside of the lab need more")]
mod link; // the two sockets of an upgrade, with somebody in between
#[path = "../e2e/peer.rs"]
#[expect(dead_code, reason = "what the cases outside of the lab need more")]
mod peer; // either side of the protocol, spoken by hand
#[path = "../e2e/proc.rs"]
#[expect(dead_code, reason = "what the cases outside of the lab need more")]
mod proc; // what the kernel says of a process
#[path = "../e2e/proxy.rs"]
#[expect(dead_code, reason = "what the cases outside of the lab need more")]
mod proxy; // a link that changes, drops and cuts what passes
#[path = "../e2e/qmp.rs"]
#[expect(dead_code, reason = "what the cases outside of the lab need more")]
mod qmp; // the control interface, events kept
#[path = "../e2e/upgrade_faults/step.rs"]
#[expect(dead_code, reason = "what the cases outside of the lab need more")]
mod step; // the words of an upgrade
#[path = "../e2e/storage.rs"]
#[expect(dead_code, reason = "what the cases outside of the lab need more")]
mod storage; // back ends of disks in processes of their own
#[path = "../e2e/successor.rs"]
#[expect(dead_code, reason = "what the cases outside of the lab need more")]
mod successor; // processes that a VM goes on in
#[path = "../e2e/tap.rs"]
#[expect(dead_code, reason = "what the cases outside of the lab need more")]
mod tap; // packets that a guest sends back
#[path = "../e2e/upgrades.rs"]
mod upgrades; // one guest through many processes

mod command; // programs of the lab
mod emulated; // guests with next to no memory
mod mdev; // VFIO devices without hardware
mod modules; // loading modules of the kernel
mod net; // several hosts in one kernel
mod new_process; // VMs that change their process
mod trace; // what the kernel was asked
mod vfio; // what a VFIO device says of itself

mod huge; // memory in huge pages
mod in_place; // upgrades in place: taps, and the kernel's vhost
mod kernel; // what the lab promises to everything else here
mod kvm; // KVM with page tables of the hardware
mod linux; // Linux guests that are moved
mod union; // every writer is in the united dirty log
mod vfio_machine; // VM processes with VFIO devices
mod vfio_migration; // VFIO devices that migrate, and fail to
mod vfio_pci; // PCI devices behind an IOMMU
mod vhost; // back ends in the kernel: packets, sockets and their owner
mod vhost_log; // the log of packets
mod virtio_net; // the machine's network interface, driven by hand
