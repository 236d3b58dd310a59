//! Migrates VFIO devices: hardware that is passed through to a guest, and mediated devices, whose drivers can save and load their state.
//!
//! A VMM keeps its devices and their descriptors. It tells a [`VfioSet`] about all of them, shares it with a [`VfioNotifier`], and
//! calls the set at the right moments of a migration; streams and dirty logs go to `vmferry-transport`.
//!
//! # In a VMM
//!
//! ```no_run
//! use std::fs::File;
//! use std::os::fd::OwnedFd;
//! use std::sync::{Arc, Mutex, PoisonError};
//!
//! use vmferry_devices::notifier::{Mode, Notifiers, Priority};
//! use vmferry_devices::vfio::{
//!     FdContainer, FdFace, Mapped, VfioDevice, VfioNotifier, VfioSet, dirty_logs,
//! };
//! use vmferry_transport::data::{DeviceSink, DeviceSource, StreamedDevice};
//! use vmferry_transport::memory::DirtyLog;
//! use vmferry_transport::wire::DeviceSchema;
//!
//! type Error = Box<dyn std::error::Error>;
//!
//! /// When the VM is built: descriptors of its devices, as VFIO_GROUP_GET_DEVICE_FD or iommufd gave them, or copies of these.
//! fn tell(devices: Vec<OwnedFd>, notifiers: &Notifiers) -> Arc<Mutex<VfioSet>> {
//!     let devices = devices.into_iter().enumerate().map(|(number, device)| {
//!         VfioDevice::new(format!("vfio/{number}"), FdFace::new(device))
//!     });
//!     let set = Arc::new(Mutex::new(VfioSet::new(devices.collect())));
//!     // Vetoes what cannot work; after a failure brings the devices back before a vCPU runs.
//!     let notifier = Box::new(VfioNotifier::new(Arc::clone(&set)));
//!     notifiers.register(Mode::Normal, Priority::DEVICE, notifier);
//!     set
//! }
//!
//! /// What the source does besides sending RAM. The data path reads the streams, in each round and in the last.
//! fn source(
//!     set: &Mutex<VfioSet>,
//!     container: File,
//!     mapped: &[Mapped],
//!     hello: &[DeviceSchema],
//!     start_logs: impl FnOnce(Vec<Box<dyn DirtyLog>>) -> Result<(), Error>,
//!     rounds: impl FnOnce(Vec<StreamedDevice<dyn DeviceSource>>) -> Result<(), Error>,
//!     stop_vcpus: impl FnOnce() -> Result<(), Error>,
//!     last_fetch_and_round: impl FnOnce() -> Result<(), Error>,
//! ) -> Result<(), Error> {
//!     // For one call at a time: others stop and continue the guest meanwhile.
//!     let set = || set.lock().unwrap_or_else(PoisonError::into_inner);
//!     // United with the logs of KVM and of the VMM itself.
//!     start_logs(dirty_logs(&set(), Some(Arc::new(FdContainer::new(container))), mapped)?)?;
//!     set().begin()?;
//!     let streams = set().sources(hello)?;
//!     rounds(streams)?;
//!     for (device, sizes) in set().sizes()? {
//!         println!("{device}: {sizes:?}");
//!     }
//!     stop_vcpus()?;
//!     set().quiesce()?;
//!     set().stop()?;
//!     last_fetch_and_round()
//! }
//!
//! /// What the target does. `receive` returns when all streams have ended.
//! fn target(
//!     set: &mut VfioSet,
//!     hello: &[DeviceSchema],
//!     receive: impl FnOnce(Vec<StreamedDevice<dyn DeviceSink>>) -> Result<(), Error>,
//!     ready_and_commit: impl FnOnce() -> Result<(), Error>,
//! ) -> Result<(), Error> {
//!     set.begin_load()?;
//!     receive(set.sinks(hello)?)?;
//!     // Here a device refuses a state that it cannot use, and the source goes on.
//!     set.finish_load()?;
//!     ready_and_commit()?;
//!     for stands in set.run()? {
//!         stands.log("the migration");
//!     }
//!     Ok(())
//! }
//! # fn main() {}
//! ```
//!
//! # The order of the calls
//!
//! | Source | What it does to the devices | Target | What it does to the devices |
//! | --- | --- | --- | --- |
//! | [`blockers`](VfioSet::blockers), SETUP | nothing; vetoes | | |
//! | dirty logs start, [`begin`](VfioSet::begin) | RUNNING -> PRE_COPY, where there is PRE_COPY | [`begin_load`](VfioSet::begin_load) | -> RESUMING |
//! | rounds: [`sources`](VfioSet::sources) are read, [`sizes`](VfioSet::sizes) | | [`sinks`](VfioSet::sinks) are written | |
//! | vCPUs stop, [`quiesce`](VfioSet::quiesce) | all -> PRE_COPY_P2P or RUNNING_P2P | | |
//! | [`stop`](VfioSet::stop) | all -> STOP_COPY | | |
//! | last fetch, last round | streams are read to their end | | |
//! | | | [`finish_load`](VfioSet::finish_load), before READY | RESUMING -> STOP: each checks its state |
//! | COMMIT | | [`run`](VfioSet::run), unless the guest was paused | all -> RUNNING_P2P, then all -> RUNNING |
//! | DONE: [`end`](VfioSet::end) | -> STOP | | |
//! | FAILED: [`roll_back`](VfioSet::roll_back) | to where they were, or reset | INCOMING_FAILED: [`abandon_load`](VfioSet::abandon_load) | reset |
//!
//! A step that fails returns the device's name and the kernel's answer and leaves the devices as they are; `roll_back` finds its way from
//! anywhere: by transitions first, tried twice, then by a reset, after which the guest's driver has to set the device up again. Both it
//! and `run` say what became of each device ([`Standing`]).
//!
//! A guest that an operator pauses has its devices stopped too, with [`pause`](VfioSet::pause). Migrated like that, they go from STOP to
//! STOP_COPY and never work at the source; at the target they stay in STOP until `run`.
//!
//! A device whose driver cannot migrate has no states: it works while its guest is stopped, and neither `pause` nor `run` asks anything of
//! it. It keeps the VM from being migrated, but not from being upgraded in place where addresses can be changed under DMA.
//!
//! What a stream holds is between the two drivers. What the VMM emulates of a device, such as its PCI configuration space and its
//! interrupts, is not in it: that is a [`Device`](crate::Device) of the VMM.
//!
//! # In place
//!
//! A device whose VM changes its process on the same host stays: its descriptor goes to the new process, with those of its group and its
//! container; [`open_container`], [`join`] and [`open_device`] give a VMM descriptors that it can pass on. The VMM maps guest memory with
//! a [`Reach`], shares it with a [`VfioInPlace`], and in the new process calls [`take_over`](in_place::take_over) before READY and
//! [`run`](VfioSet::run) after COMMIT.
//!
//! # Modules
//!
//! - [`reach`]: the memory that devices reach, and whose it is
//! - [`in_place`]: devices that stay while the process changes
//! - [`states`]: the states of a device and the ways between them
//! - [`face`]: what is asked of the kernel; traits, so that a VMM or a test can stand between
//! - [`dma_log`]: which pages devices have written

mod attach;
mod device;
pub mod dma_log;
pub mod face;
pub mod in_place;
mod ioctl;
#[cfg(test)]
mod model;
mod notifier;
pub mod reach;
mod reboot;
mod set;
pub mod states;
mod stream;
#[cfg(test)]
mod tests;

pub use attach::{Region, can_reset, join, open_container, open_device, regions};
pub use device::{DeviceSizes, SCHEMA, SCHEMA_VERSION, Standing, VfioDevice};
pub use dma_log::{Mapped, dirty_logs};
pub use face::{ContainerFace, FdContainer, FdFace, VfioFace};
pub use in_place::VfioInPlace;
pub use ioctl::OfVfioIoctls;
pub use notifier::VfioNotifier;
pub use reach::{Reach, Reached};
pub use reboot::{NOT_SUSPENDED, VfioReboot};
pub use set::{Blocker, Stands, VfioSet};
pub use states::{DeviceState, Support};
