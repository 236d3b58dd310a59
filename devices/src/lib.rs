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

pub mod announce;
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

pub use device::Device;
pub use error::DeviceError;
pub use notifier::{Notifier, Notifiers};
