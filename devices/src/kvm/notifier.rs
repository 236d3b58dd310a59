//! What a migration means for KVM's clock and interrupt controllers, beyond their saved state.
//!
//! | Event | What happens |
//! | --- | --- |
//! | SETUP | their state is read once: a kernel that will not give it in the blackout is found out while the guest still runs |
//! | DONE | the interrupt controllers are silenced: the PIT stops ticking, the I/O APIC masks every input |
//! | FAILED | nothing: saving changed nothing. The pause is told to the guest when it is resumed, see [`tell_paused`](super::tell_paused) |
//!
//! DONE matters because a source process may live on for long after its guest has left. Its timers in the kernel would go on to wake
//! the host for nobody, and back ends that are still being closed would raise interrupts in vCPUs that never run again.
//!
//! On x86 nothing else is left to do at DONE. Interrupts that hardware has posted for a vCPU are part of its local APIC's state,
//! because KVM gathers them when that is read. GICs keep pending interrupts in tables in guest memory, which KVM must be asked to write.

use std::sync::Arc;

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irqchip,
};
use kvm_ioctls::VmFd;

use super::bytes::{from_bytes, kernel, to_bytes};
use super::{save_clock, save_irqchip};
use crate::DeviceError;
use crate::notifier::{Notifier, Setup};

/// Name in errors.
const NAME: &str = "kvm";
/// Mode of a PIT channel that counts only when its gate rises, which nothing does any more.
const PIT_MODE_STROBE: u8 = 5;
/// The I/O APIC's redirection entries, as bytes of `kvm_irqchip`: 24 of 8 bytes each, behind the header and four registers.
const REDIRECTIONS: std::ops::Range<usize> = 32..224;
/// Byte of an entry that has the mask bit, and the bit.
const MASK: (usize, u8) = (2, 1);
/// Where the mask register of a PIC is in `kvm_irqchip`; ones mask.
const PIC_IMR: usize = 10;

/// Looks after a VM's clock and interrupt controllers. Registered for all modes, at `Priority::CHECK`.
#[derive(Debug)]
pub struct KvmNotifier {
    vm: Arc<VmFd>,
    has_irqchip: bool,
    has_pit: bool,
}

impl KvmNotifier {
    /// For `vm`. `has_irqchip`, `has_pit`: what it has in the kernel.
    pub fn new(vm: Arc<VmFd>, has_irqchip: bool, has_pit: bool) -> Self {
        Self {
            vm,
            has_irqchip,
            has_pit,
        }
    }

    /// For a VM whose guest has left.
    fn silence(&self) -> Result<(), DeviceError> {
        if self.has_pit {
            let mut pit = self.vm.get_pit2().map_err(kernel(NAME, "KVM_GET_PIT2"))?;
            for channel in &mut pit.channels {
                channel.mode = PIT_MODE_STROBE;
            }
            self.vm
                .set_pit2(&pit)
                .map_err(kernel(NAME, "KVM_SET_PIT2"))?;
        }
        if self.has_irqchip {
            mask_pics(&self.vm)?;
            change_chip(&self.vm, KVM_IRQCHIP_IOAPIC, ioapic_masked)?;
        }
        Ok(())
    }
}

/// Masks every line of both PICs of `vm`, for guests that never look at them: what firmware would do.
///
/// # Errors
/// When the kernel refuses.
pub fn mask_pics(vm: &VmFd) -> Result<(), DeviceError> {
    change_chip(vm, KVM_IRQCHIP_PIC_MASTER, pic_masked)?;
    change_chip(vm, KVM_IRQCHIP_PIC_SLAVE, pic_masked)
}

fn change_chip(vm: &VmFd, chip_id: u32, change: fn(&mut [u8])) -> Result<(), DeviceError> {
    let mut chip = kvm_irqchip {
        chip_id,
        ..Default::default()
    };
    vm.get_irqchip(&mut chip)
        .map_err(kernel(NAME, "KVM_GET_IRQCHIP"))?;
    let mut bytes = to_bytes(&chip);
    change(&mut bytes);
    let chip: kvm_irqchip = from_bytes(NAME, "irqchip", &bytes)?;
    vm.set_irqchip(&chip)
        .map_err(kernel(NAME, "KVM_SET_IRQCHIP"))
}

fn pic_masked(bytes: &mut [u8]) {
    bytes[PIC_IMR] = 0xff;
}

fn ioapic_masked(bytes: &mut [u8]) {
    for entry in bytes[REDIRECTIONS].chunks_mut(8) {
        entry[MASK.0] |= MASK.1;
    }
}

impl Notifier for KvmNotifier {
    fn name(&self) -> &str {
        NAME
    }

    fn setup(&mut self, _: &Setup) -> Result<(), DeviceError> {
        save_clock(&self.vm, "kvm-clock")?;
        if self.has_irqchip {
            save_irqchip(&self.vm, "kvm-irqchip", self.has_pit)?;
        }
        Ok(())
    }

    fn done(&mut self) {
        if let Err(error) = self.silence() {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(
                error,
                "the interrupt controllers of a guest that left go on"
            );
        }
    }

    fn failed(&mut self) {}
}
