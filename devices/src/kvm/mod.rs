//! KVM's own state and its dirty log: what a VMM has to move besides RAM and its own devices.
//!
//! - [`vcpu`]: all state of a vCPU, saved and loaded in the order KVM needs
//! - [`clock`], [`irqchip`]: state of the VM as a whole
//! - [`slots`], [`dirty_log`]: guest memory as KVM sees it, and which pages of it were written
//! - [`notifier`]: what a migration means for the clock and the interrupt controllers
//! - [`kick`]: gets vCPUs out of the guest
//! - [`saved`]: the saved types

mod bytes;
pub mod clock;
mod cpuid;
pub mod dirty_log;
mod ioctl;
pub mod irqchip;
pub mod kick;
mod msrs;
pub mod notifier;
pub mod saved;
pub mod slots;
mod tsc;
pub mod vcpu;

pub use clock::{ClockMove, restore_clock, save_clock, tell_paused};
pub use dirty_log::KvmDirtyLog;
pub use irqchip::{restore_irqchip, save_irqchip};
pub use kick::{Kicker, install_kick_handler};
pub use notifier::{KvmNotifier, mask_pics};
pub use slots::{DirtyLogMode, MemorySlots};
pub use vcpu::{KvmVcpu, VcpuProfile, vcpu_name};

#[cfg(test)]
mod tests;
