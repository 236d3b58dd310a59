//! The interrupt controllers in the kernel: both PICs, the I/O APIC, and the PIT if the VM has it. The local APICs belong to the vCPUs.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irqchip, kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use vmferry_transport::wire::Section;

use super::bytes::{bad_state, from_bytes, kernel, to_bytes};
use super::saved::IrqchipV1;
use crate::DeviceError;
use crate::saved::{decode, encode};

/// Saves the interrupt controllers as section `device`; with the PIT if `has_pit`.
///
/// # Errors
/// When the kernel refuses.
pub fn save_irqchip(vm: &VmFd, device: &str, has_pit: bool) -> Result<Section, DeviceError> {
    let chip = |chip_id: u32| {
        let mut chip = kvm_irqchip {
            chip_id,
            ..Default::default()
        };
        vm.get_irqchip(&mut chip)
            .map_err(kernel(device, "KVM_GET_IRQCHIP"))
            .map(|()| to_bytes(&chip))
    };
    let pit = has_pit
        .then(|| {
            vm.get_pit2()
                .map_err(kernel(device, "KVM_GET_PIT2"))
                .map(|pit| to_bytes(&pit))
        })
        .transpose()?;
    encode(
        device,
        &IrqchipV1 {
            pic_master: chip(KVM_IRQCHIP_PIC_MASTER)?,
            pic_slave: chip(KVM_IRQCHIP_PIC_SLAVE)?,
            ioapic: chip(KVM_IRQCHIP_IOAPIC)?,
            pit,
        },
    )
}

/// Loads the interrupt controllers from `section`.
///
/// # Errors
/// When the section is refused, or the kernel refuses.
pub fn restore_irqchip(vm: &VmFd, section: &Section, has_pit: bool) -> Result<(), DeviceError> {
    let device = &section.name;
    let IrqchipV1 {
        pic_master,
        pic_slave,
        ioapic,
        pit,
    } = decode(section)?;
    let mut chips = Vec::new();
    for (field, bytes, id) in [
        ("pic_master", pic_master, KVM_IRQCHIP_PIC_MASTER),
        ("pic_slave", pic_slave, KVM_IRQCHIP_PIC_SLAVE),
        ("ioapic", ioapic, KVM_IRQCHIP_IOAPIC),
    ] {
        let chip: kvm_irqchip = from_bytes(device, field, &bytes)?;
        if chip.chip_id != id {
            return Err(bad_state(
                device,
                format!("{field} holds chip {}, expected {id}", chip.chip_id),
            ));
        }
        chips.push(chip);
    }
    let pit: Option<kvm_pit_state2> = pit
        .map(|bytes| from_bytes(device, "pit", &bytes))
        .transpose()?;
    if pit.is_some() != has_pit {
        return Err(bad_state(
            device,
            "only one of the two VMs has a PIT in the kernel".to_owned(),
        ));
    }
    for chip in &chips {
        vm.set_irqchip(chip)
            .map_err(kernel(device, "KVM_SET_IRQCHIP"))?;
    }
    if let Some(pit) = pit {
        vm.set_pit2(&pit).map_err(kernel(device, "KVM_SET_PIT2"))?;
    }
    Ok(())
}
