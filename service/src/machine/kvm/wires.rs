//! What a Linux guest needs of KVM besides vCPUs, and what ties eventfds of devices to KVM: kicks of drivers without an exit to this
//! process, interrupts without a call from it.

use std::sync::Arc;

use kvm_ioctls::{IoEventAddress, VmFd};
use vmferry_devices::kvm::mask_pics;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::host;
use crate::machine::MachineError;
use crate::machine::linux::SERIAL_GSI;
use crate::machine::virtio::{Bus, QUEUE_NOTIFY};

/// Three pages that KVM wants for itself on some processors, and one more; above all that the guest uses.
const TSS_GPA: usize = 0xfffb_d000;
const IDENTITY_MAP_GPA: u64 = 0xfffb_c000;

/// Gives `vm` interrupt controllers. To be called before it has vCPUs. A kernel on hardware without legacy, as the ACPI tables tell it,
/// takes its time from the clock of KVM and from the local APICs: there is no PIT.
pub(super) fn make_platform(vm: &VmFd) -> Result<(), MachineError> {
    vm.set_identity_map_address(IDENTITY_MAP_GPA)
        .map_err(host("KVM_SET_IDENTITY_MAP_ADDR"))?;
    vm.set_tss_address(TSS_GPA)
        .map_err(host("KVM_SET_TSS_ADDR"))?;
    vm.create_irq_chip().map_err(host("KVM_CREATE_IRQCHIP"))?;
    // The guest's firmware would have, and the guest believes in none.
    mask_pics(vm)?;
    Ok(())
}

/// Ties the kicks of all devices of `bus` to `vm`, and their interrupts if it has interrupt controllers.
pub(super) fn connect(bus: Bus, vm: &VmFd, has_irqchip: bool) -> Result<Bus, MachineError> {
    for window in bus.windows() {
        for (queue, kick) in (0_u32..).zip(&window.kicks) {
            let notify = IoEventAddress::Mmio(window.gpa + QUEUE_NOTIFY);
            vm.register_ioevent(kick, &notify, queue)
                .map_err(host("KVM_IOEVENTFD"))?;
        }
        if has_irqchip {
            vm.register_irqfd(window.interrupt.eventfd(), window.gsi)
                .map_err(host("KVM_IRQFD"))?;
        }
    }
    Ok(bus)
}

/// The serial port's interrupt line, if `vm` has interrupt controllers.
pub(super) fn serial_line(
    vm: &VmFd,
    has_irqchip: bool,
) -> Result<Option<Arc<EventFd>>, MachineError> {
    if !has_irqchip {
        return Ok(None);
    }
    let line = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(host("make an eventfd"))?;
    vm.register_irqfd(&line, SERIAL_GSI)
        .map_err(host("KVM_IRQFD"))?;
    Ok(Some(Arc::new(line)))
}
