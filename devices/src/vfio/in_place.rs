//! What an upgrade in place means for VFIO devices, told by the registry of notifiers.
//!
//! The devices stay what they are: nothing is saved of them and nothing loaded, and the new process gets their descriptors. What changes
//! is who is asked for guest memory and who hears their interrupts.
//!
//! | Event | What happens |
//! | --- | --- |
//! | SETUP, vCPUs stopped | interrupts are disconnected from KVM; the container lets go of our addresses ([`Way::Addresses`]), or the devices are stopped and their memory unmapped ([`Way::Stopped`]) |
//! | DONE | the container and the devices are somebody else's |
//! | FAILED | memory is mapped at our addresses again, whatever the new process had done, devices that were stopped work again, interrupts are connected again; before any vCPU runs |
//! | INCOMING_FAILED | the new process disconnects interrupts; its mappings the old one takes from it |
//!
//! The new process takes over before it says READY, with [`take_over`].

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ioctls::VmFd;
use vmferry_transport::units::MigrationId;
use vmm_sys_util::eventfd::EventFd;

use super::reach::{Reach, Way};
use super::set::VfioSet;
use crate::notifier::{Notifier, Setup};
use crate::{Before, DeviceError};

/// Name of the notifier, and of what its errors are about.
const NAME: &str = "vfio container";

/// Interrupts of devices as far as the VMM has connected them to its VM. While they are disconnected the eventfds count what comes, and
/// KVM looks at them when they are connected again: none is lost.
pub trait Wires: Send {
    /// The VM hears of no interrupt any more.
    ///
    /// # Errors
    /// The kernel's answer.
    fn disconnect(&mut self) -> io::Result<()>;

    /// The VM hears of those that came meanwhile, and of all that come.
    ///
    /// # Errors
    /// The kernel's answer.
    fn connect(&mut self) -> io::Result<()>;
}

/// Eventfds that are interrupts of a VM (irqfds). The eventfds go to the new process like any other descriptor.
pub struct IrqFds {
    vm: Arc<VmFd>,
    lines: Vec<(EventFd, u32)>,
    connected: usize,
}

impl IrqFds {
    /// Eventfds and the interrupts of `vm` that they are, not connected yet.
    pub fn new(vm: Arc<VmFd>, lines: Vec<(EventFd, u32)>) -> Self {
        Self {
            vm,
            lines,
            connected: 0,
        }
    }
}

impl fmt::Debug for IrqFds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IrqFds")
            .field("lines", &self.lines.len())
            .field("connected", &self.connected)
            .finish_non_exhaustive()
    }
}

impl Wires for IrqFds {
    fn disconnect(&mut self) -> io::Result<()> {
        while let Some((eventfd, gsi)) = self.connected.checked_sub(1).map(|at| &self.lines[at]) {
            self.vm.unregister_irqfd(eventfd, *gsi)?;
            self.connected -= 1;
        }
        Ok(())
    }

    fn connect(&mut self) -> io::Result<()> {
        while let Some((eventfd, gsi)) = self.lines.get(self.connected) {
            self.vm.register_irqfd(eventfd, *gsi)?;
            self.connected += 1;
        }
        Ok(())
    }
}

/// The memory that devices reach. `None` in a process that waits for the container of another.
pub type SharedReach = Arc<Mutex<Option<Reach>>>;

/// Lets devices stay while the process changes. Registered for `cpr-transfer` and `cpr-exec`, at `Priority::DEVICE`.
pub struct VfioInPlace {
    set: Arc<Mutex<VfioSet>>,
    reach: SharedReach,
    wires: Option<Box<dyn Wires>>,
}

impl VfioInPlace {
    /// For the devices in `set` and the memory that they reach.
    pub fn new(set: Arc<Mutex<VfioSet>>, reach: SharedReach) -> Self {
        Self {
            set,
            reach,
            wires: None,
        }
    }

    /// With interrupts that are connected to a VM.
    #[must_use]
    pub fn with_wires(mut self, wires: Box<dyn Wires>) -> Self {
        self.wires = Some(wires);
        self
    }
}

/// A panic that left it half-way is what FAILED is for.
fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

fn kernel(op: &str, source: io::Error) -> DeviceError {
    DeviceError::Kernel {
        device: NAME.to_owned(),
        op: op.to_owned(),
        source,
    }
}

/// Why devices cannot stay while the process changes; `None` if they can.
pub fn blocker(set: &VfioSet, reach: &Reach) -> Option<String> {
    match reach.way() {
        Way::Addresses => None,
        Way::Stopped => set.blockers().into_iter().next().map(|blocker| {
            format!(
                "device {}: the kernel cannot change addresses behind its DMA (no VFIO_UPDATE_VADDR, which mediated devices never \
                 have), and it cannot be stopped: {}",
                blocker.device, blocker.reason
            )
        }),
    }
}

/// The new process: its addresses are behind the mappings from now on. The devices in `set` work on or stay stopped, as they came.
///
/// # Errors
/// The old process has not let go, or a limit of locked memory is too low, or the devices were stopped and the kernel does not tell this
/// process how to let them work. The old one takes back whatever was taken.
pub fn take_over(set: &VfioSet, reach: &mut Reach, before: Before) -> Result<(), DeviceError> {
    if let Some(reason) = blocker(set, reach) {
        return Err(DeviceError::Vetoed {
            device: NAME.to_owned(),
            reason,
        });
    }
    let taken = match before {
        Before::Process => reach.take(),
        Before::Program => reach.take_back(),
    };
    taken.map_err(|source| kernel("mapping guest memory for VFIO devices", source))
}

impl Notifier for VfioInPlace {
    fn name(&self) -> &str {
        NAME
    }

    fn setup(&mut self, _: &Setup) -> Result<(), DeviceError> {
        let (mut set, mut reach) = (lock(&self.set), lock(&self.reach));
        let Some(reach) = reach.as_mut() else {
            return Ok(());
        };
        if let Some(reason) = blocker(&set, reach) {
            return Err(DeviceError::Vetoed {
                device: NAME.to_owned(),
                reason,
            });
        }
        if let Some(wires) = &mut self.wires {
            wires
                .disconnect()
                .map_err(|source| kernel("KVM_IRQFD", source))?;
        }
        if reach.way() == Way::Stopped {
            set.hold()?;
        }
        reach
            .release()
            .map_err(|source| kernel("letting go of guest memory", source))
    }

    fn done(&mut self) {
        lock(&self.set).leave();
    }

    fn failed(&mut self) {
        if let Some(reach) = lock(&self.reach).as_mut()
            && let Err(error) = reach.take_back()
        {
            let error = &error as &dyn std::error::Error;
            tracing::error!(error, "VFIO devices do not reach all of the guest's memory");
        }
        for stands in lock(&self.set).let_go() {
            stands.log("an upgrade that failed");
        }
        if let Some(wires) = &mut self.wires
            && let Err(error) = wires.connect()
        {
            let error = &error as &dyn std::error::Error;
            tracing::error!(error, "interrupts of VFIO devices do not reach the guest");
        }
    }

    fn incoming_failed(&mut self, _: MigrationId) {
        if let Some(wires) = &mut self.wires
            && let Err(error) = wires.disconnect()
        {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, "interrupts of VFIO devices stay connected here");
        }
        if let Some(reach) = lock(&self.reach).as_mut() {
            reach.abandon();
        }
    }
}

impl fmt::Debug for VfioInPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VfioInPlace")
            .field("reach", &self.reach)
            .field("wires", &self.wires.is_some())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
