//! For authors of a VMM: how to put your file descriptors and devices into the manifest.
//!
//! An upgrade in place moves a VM from an old process to a new one on the same host. Guest memory is not copied: both processes map the
//! same file. Devices keep their connections: the new process gets the same tap interface, the same vhost-user socket. Two things
//! happen, one after the other:
//!
//! 1. **Prepare**, while the guest runs. The old process offers a manifest of all it will hand over and sends guest RAM. The new process
//!    maps it and builds its machine: VM, vCPUs, memory slots, threads. Whatever takes long belongs here.
//! 2. **Hand over**, while the guest is stopped. The old process stops the guest, makes every device let go of what only one process may
//!    own (a vhost device's owner, for instance), and only then sends the rest. The new process takes ownership.
//!
//! Then the device state moves and the migration commits, over the control connection of `vmferry-transport`: READY, COMMIT, RUNNING.
//! This crate moves descriptors and decides nothing about who runs the guest. Until COMMIT the old process has lost nothing: it holds every
//! descriptor that it ever had, and on a failure its devices take their owners back and the guest goes on.
//!
//! # What goes into which stage
//!
//! | descriptor | kind | stage | before it leaves |
//! |---|---|---|---|
//! | guest RAM | [`RamMemfd`](FdKind::RamMemfd), [`RamFile`](FdKind::RamFile) | prepare | nothing |
//! | eventfds, irqfds, ioeventfds | [`EventFd`](FdKind::EventFd), [`IrqFd`](FdKind::IrqFd), [`IoEventFd`](FdKind::IoEventFd) | either | detach irqfds from the old VM in SETUP |
//! | tap | [`Tap`](FdKind::Tap) | either; read it in one process only | stop reading in SETUP |
//! | kernel vhost | [`Vhost`](FdKind::Vhost) | hand over | VHOST_RESET_OWNER in SETUP; the new process does VHOST_SET_OWNER |
//! | vhost-user | [`VhostUser`](FdKind::VhostUser) | hand over | read the vring bases, send nothing more |
//! | VFIO | [`VfioContainer`](FdKind::VfioContainer), [`VfioDevice`](FdKind::VfioDevice), [`VfioGroup`](FdKind::VfioGroup), [`Iommufd`](FdKind::Iommufd) | hand over (groups and devices: either; the new process asks a device for its regions while the guest runs) | detach irqfds, have the container forget the addresses of DMA mappings; the new process tells it its own |
//! | listening sockets, logs | [`Listener`](FdKind::Listener), [`Qmp`](FdKind::Qmp), [`Log`](FdKind::Log) | either | accept in one process only |
//!
//! A kind with one owner cannot be put into the first stage: [`Handout::offer`] refuses it.
//!
//! # Example
//!
//! Both halves in one program, on two threads; in a VMM they are two processes, and [`spawn`](crate::spawn::spawn) starts the second.
//!
//! ```
//! use std::os::fd::OwnedFd;
//! use vmferry_cpr::give::GiverDeadlines;
//! use vmferry_cpr::handout::Handout;
//! use vmferry_cpr::manifest::{FdKind, Stage};
//! use vmferry_cpr::memfd;
//! use vmferry_cpr::socket::CprSocket;
//! use vmferry_cpr::take::TakerDeadlines;
//! use vmferry_cpr::takeover::Offered;
//! use vmferry_transport::units::MigrationId;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! const RAM_BYTES: u64 = 16 << 20;
//! let (ours, theirs) = CprSocket::pair()?;
//!
//! // The new process.
//! let new = std::thread::spawn(move || -> Result<(std::fs::File, OwnedFd), String> {
//!     let text = |error: &dyn std::fmt::Display| error.to_string();
//!     let socket = CprSocket::new(theirs).map_err(|error| text(&error))?;
//!     let offered = Offered::receive(socket, "vmm 2.0", TakerDeadlines::default())
//!         .map_err(|error| text(&error))?;
//!     if offered.manifest().of_kind(FdKind::VfioDevice).next().is_some() {
//!         offered.refuse("this build has no VFIO");
//!         return Err("not for us".to_owned());
//!     }
//!     let mut first = offered.accept().map_err(|error| text(&error))?;
//!     let ram = first.claim("ram0", "ram", FdKind::RamMemfd).map_err(|error| text(&error))?;
//!     let ram = memfd::reattach("ram0", ram, RAM_BYTES).map_err(|error| text(&error))?;
//!     // Map it, create the VM, its vCPUs and memory slots: the guest still runs in the old process.
//!     let prepared = first.taken().map_err(|error| text(&error))?;
//!     let mut second = prepared.wait().map_err(|error| text(&error))?;
//!     let kick = second.claim("net0", "queue0-kick", FdKind::IoEventFd).map_err(|error| text(&error))?;
//!     // Take ownership; then load the device state that comes over the control connection.
//!     second.taken().map_err(|error| text(&error))?;
//!     Ok((ram, kick))
//! });
//!
//! // The old process. Descriptors are borrowed from their devices.
//! let ram = memfd::create_ram("ram0", RAM_BYTES)?;
//! let kick = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC)?;
//! let mut handout = Handout::new();
//! handout
//!     .add_ram("ram0", RAM_BYTES, &ram)?
//!     .add(("net0", "queue0-kick"), FdKind::IoEventFd, Stage::HandOver, 0, &kick)?;
//! let id = MigrationId([7; 16]); // 128 random bits
//! let prepared = handout.offer(ours, id, "vmm 1.0", GiverDeadlines::default())?;
//! // Stop the guest, tell the notifiers SETUP. If that fails: prepared.give_up("why").
//! prepared.hand_over()?;
//! // Send the device state, wait for READY, commit.
//! let (same_ram, _same_kick) = new.join().expect("no panic")?;
//! assert_eq!(same_ram.metadata()?.len(), RAM_BYTES);
//! # Ok(())
//! # }
//! ```

#[cfg(doc)]
use crate::handout::Handout;
#[cfg(doc)]
use crate::manifest::FdKind;
