//! What a virtual machine is made of: device state, KVM state, dirty logs, notifiers.
//!
//! A VMM author implements [`Device`] for each part that has state, and picks the dirty logs that see the VM's writers.
//!
//! - [`announce`]: the trait of a network interface, for after a move
//! - [`saved`]: rules for saved state, and its encoding
//! - [`device`]: the trait of a part with state
//! - [`notifier`]: the trait of a part that must know how a migration goes
//! - [`vfio`]: migrates VFIO devices that a VMM owns
//! - [`vhost`]: owns back ends in the kernel and in other processes, and moves them
//! - [`failover`], [`external`]: network cards that cannot move, and servers outside; both are such parts
//! - [`kvm`], [`soft`], [`vmm_writes`]: state and dirty logs of vCPUs, without KVM, and of the VMM itself
//!
//! # Migrate your own VFIO or vhost device
//!
//! The two kinds differ in who knows the state. A VFIO device's driver gives it as a *stream* that is not ours to read; it goes beside
//! RAM, in part while the guest runs. Of a vhost back end the VMM saves a *section*: features and positions in the rings. Both write
//! guest memory past KVM, so their dirty logs are united with that of the vCPUs, and both must stand still before the last fetch.
//!
//! | Moment | VFIO ([`vfio::VfioSet`], all devices together) | vhost ([`vhost::VhostDevice`]) |
//! | --- | --- | --- |
//! | the VM is built | wrap the descriptors, register [`vfio::VfioNotifier`] | make it, register [`vhost::VhostNotifier`] |
//! | `migrate` is asked for | `blockers` | `blocker` |
//! | the dirty log starts | [`vfio::dirty_logs`], then `begin`, `sources` | [`vhost::dirty_logs`] |
//! | vCPUs have stopped | `stop`: each device gives the rest of its stream | `stop`, `save` |
//! | last fetch, last round | streams are read to their end | the section goes |
//! | target, before READY | `begin_load`, `sinks` are written, `finish_load` | `restore` |
//! | target, after COMMIT, before the vCPUs | `run` | `start` |
//! | failed, before the vCPUs run again | the notifier: back to RUNNING, or reset | `start` |
//! | the guest has left | the notifier: STOP for good | drop it |
//!
//! In an upgrade in place nothing is saved of a VFIO device and nothing loaded: [`vfio::VfioInPlace`] has the kernel forget the addresses
//! behind its DMA, the new process tells it others ([`vfio::in_place`]). A vhost back end changes its owner ([`vhost::VhostNotifier`]).
//!
//! A VM with one device of each kind. [`vfio`] and [`vhost`] say more about each step, and what an operator's pause means.
//!
//! ```no_run
//! use std::fs::File;
//! use std::os::fd::OwnedFd;
//! use std::sync::{Arc, Mutex};
//!
//! use vmferry_devices::notifier::{Mode, Modes, Notifiers, Priority, Setup};
//! use vmferry_devices::vfio::{FdContainer, FdFace, Mapped, VfioDevice, VfioNotifier, VfioSet};
//! use vmferry_devices::vhost::{VhostDevice, VhostMemory, VhostNotifier};
//! use vmferry_devices::{Device, vfio, vhost};
//! use vmferry_transport::data::{DeviceSink, DeviceSource, StreamedDevice};
//! use vmferry_transport::memory::{DirtyLog, GuestRam, UnitedLog};
//! use vmferry_transport::units::MigrationId;
//! use vmferry_transport::wire::{DeviceSchema, Section};
//!
//! type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;
//!
//! /// The rest of your engine: vCPUs, and RAM over the connections of `vmferry_transport`.
//! trait Engine {
//!     /// Starts the dirty log. FAILED and DONE end it.
//!     fn start_log(&mut self, log: Box<dyn DirtyLog>) -> Result<()>;
//!     fn rounds(&mut self, streams: Vec<StreamedDevice<dyn DeviceSource>>) -> Result<()>;
//!     fn stop_vcpus(&mut self) -> Result<()>;
//!     fn run_vcpus(&mut self);
//!     /// Last fetch, last round, sections; returns when the target is READY, and COMMIT has been sent.
//!     fn last_round(&mut self, sections: Vec<Section>) -> Result<()>;
//!     /// Target: all rounds; the sections.
//!     fn receive(&mut self, streams: Vec<StreamedDevice<dyn DeviceSink>>) -> Result<Vec<Section>>;
//!     /// Target: says READY and waits for COMMIT.
//!     fn ready(&mut self) -> Result<()>;
//! }
//!
//! struct Vm {
//!     gpu: Arc<Mutex<VfioSet>>,
//!     net: Arc<Mutex<VhostDevice>>,
//!     notifiers: Notifiers,
//! }
//!
//! impl Vm {
//!     /// `gpu` is what VFIO_GROUP_GET_DEVICE_FD or iommufd gave, or a copy of it.
//!     fn new(gpu: OwnedFd, net: VhostDevice) -> Self {
//!         let gpu = VfioDevice::new("vfio/gpu", FdFace::new(gpu));
//!         let gpu = Arc::new(Mutex::new(VfioSet::new(vec![gpu])));
//!         let net = Arc::new(Mutex::new(net));
//!         let notifiers = Notifiers::new();
//!         let of_gpu = Box::new(VfioNotifier::new(Arc::clone(&gpu)));
//!         let of_net = Box::new(VhostNotifier::new(Arc::clone(&net)));
//!         notifiers.register(Mode::Normal, Priority::DEVICE, of_gpu);
//!         notifiers.register(Modes::ALL, Priority::DEVICE, of_net);
//!         Self { gpu, net, notifiers }
//!     }
//!
//!     /// The devices of the hello: both sides compare them before anything happens.
//!     fn hello(&self) -> Vec<DeviceSchema> {
//!         let mut devices = vec![self.net.lock().unwrap().schema()];
//!         devices.extend(self.gpu.lock().unwrap().schemas());
//!         devices
//!     }
//!
//!     /// `log` is that of KVM and of your own writes. `mapped` is what the container maps, `memory` what the back end sees.
//!     fn all_writers(
//!         &self,
//!         log: Box<dyn DirtyLog>,
//!         (container, mapped): (File, &[Mapped]),
//!         (memory, ram): (VhostMemory, &GuestRam),
//!     ) -> Result<Box<dyn DirtyLog>> {
//!         let container = Arc::new(FdContainer::new(container));
//!         let mut logs = vec![log];
//!         logs.extend(vfio::dirty_logs(&self.gpu.lock().unwrap(), Some(container), mapped)?);
//!         logs.extend(vhost::dirty_logs(&[Arc::clone(&self.net)], memory, ram)?);
//!         Ok(Box::new(UnitedLog::new(logs)))
//!     }
//!
//!     /// Source.
//!     fn leave(&self, id: MigrationId, log: Box<dyn DirtyLog>, engine: &mut dyn Engine) -> Result<()> {
//!         let setup = Setup { mode: Mode::Normal, migration: id };
//!         let told = match self.notifiers.setup(&setup) {
//!             Ok(told) => told,
//!             // A device that cannot migrate is one reason.
//!             Err(vetoed) => {
//!                 self.notifiers.failed(vetoed.told);
//!                 return Err(vetoed.error.into());
//!             }
//!         };
//!         match self.try_to_leave(log, engine) {
//!             Ok(()) => self.notifiers.done(told),
//!             Err(error) => {
//!                 // Devices first: a vCPU must not meet one that is stopped.
//!                 self.notifiers.failed(told);
//!                 self.net.lock().unwrap().start()?;
//!                 engine.run_vcpus();
//!                 return Err(error);
//!             }
//!         }
//!         Ok(())
//!     }
//!
//!     fn try_to_leave(&self, log: Box<dyn DirtyLog>, engine: &mut dyn Engine) -> Result<()> {
//!         engine.start_log(log)?;
//!         let hello = self.hello();
//!         self.gpu.lock().unwrap().begin()?;
//!         let streams = self.gpu.lock().unwrap().sources(&hello)?;
//!         engine.rounds(streams)?;
//!         engine.stop_vcpus()?;
//!         let section = {
//!             let mut net = self.net.lock().unwrap();
//!             net.stop()?;
//!             net.save()?
//!         };
//!         self.gpu.lock().unwrap().stop()?;
//!         engine.last_round(vec![section])
//!     }
//!
//!     /// Target. If this fails before COMMIT, the source goes on: tell the notifiers `incoming_failed`.
//!     fn arrive(&self, engine: &mut dyn Engine) -> Result<()> {
//!         let hello = self.hello();
//!         self.gpu.lock().unwrap().begin_load()?;
//!         let streams = self.gpu.lock().unwrap().sinks(&hello)?;
//!         let sections = engine.receive(streams)?;
//!         // Each device checks here what it was given, while the source can still go on.
//!         self.gpu.lock().unwrap().finish_load()?;
//!         for section in &sections {
//!             self.net.lock().unwrap().restore(section)?;
//!         }
//!         engine.ready()?;
//!         for stands in self.gpu.lock().unwrap().run()? {
//!             stands.log("the migration");
//!         }
//!         self.net.lock().unwrap().start()?;
//!         engine.run_vcpus();
//!         Ok(())
//!     }
//! }
//! # fn main() {}
//! ```

pub mod announce;
mod before;
pub mod device;
pub mod error;
pub mod external;
pub mod failover;
pub mod kvm;
pub mod notifier;
pub mod saved;
pub mod soft;
pub mod vfio;
pub mod vhost;
pub mod vmm_writes;

pub use before::Before;
pub use device::Device;
pub use error::DeviceError;
pub use notifier::{Notifier, Notifiers};
