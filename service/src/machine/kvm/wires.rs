//! Ties the devices' eventfds to KVM: kicks of drivers without an exit to this process, interrupts without a call from it.

use kvm_ioctls::{IoEventAddress, VmFd};

use super::host;
use crate::machine::MachineError;
use crate::machine::virtio::{Bus, QUEUE_NOTIFY};

/// Ties the kicks of all devices of `bus` to `vm`.
pub(super) fn connect(bus: Bus, vm: &VmFd) -> Result<Bus, MachineError> {
    for window in bus.windows() {
        for (queue, kick) in (0_u32..).zip(&window.kicks) {
            let notify = IoEventAddress::Mmio(window.gpa + QUEUE_NOTIFY);
            vm.register_ioevent(kick, &notify, queue)
                .map_err(host("KVM_IOEVENTFD"))?;
        }
    }
    Ok(bus)
}
