//! Memory slots: guest RAM blocks at their guest-physical addresses, alive as long as KVM may reach them.

use std::fs::File;
use std::io;
use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET, KVM_MEM_LOG_DIRTY_PAGES,
    kvm_enable_cap,
};
use kvm_ioctls::VmFd;
use vmferry_transport::memory::{GuestRam, RamBlock};

use super::ioctl::{set_memory_slot, to_io};

/// KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE.
const MANUAL_PROTECT_ENABLE: u64 = 1;

/// How the dirty log of a VM is driven. Chosen once, before the log is first started.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum DirtyLogMode {
    /// KVM_CLEAR_DIRTY_LOG write-protects piece by piece; reading the log does not. The log starts with every bit set, so that
    /// starting it does not walk all memory in one go.
    ManualClear,
    /// KVM_GET_DIRTY_LOG reads, clears and write-protects the whole slot at once.
    GetClears,
}

/// The slots of one VM. Slot n holds block n.
#[derive(Debug)]
pub struct MemorySlots {
    vm: Arc<VmFd>,
    slots: Vec<Slot>,
    mode: DirtyLogMode,
}

#[derive(Debug)]
struct Slot {
    gpa: u64,
    block: RamBlock,
}

impl MemorySlots {
    /// Gives `vm` the blocks of `ram` at the addresses `gpas`. Takes the better dirty log mode that the kernel has, or `mode`.
    ///
    /// # Errors
    /// The kernel's answer; slots made so far are taken away again. `InvalidInput` if there are not as many addresses as blocks.
    pub fn new(
        vm: Arc<VmFd>,
        ram: &GuestRam,
        gpas: &[u64],
        mode: Option<DirtyLogMode>,
    ) -> io::Result<Self> {
        if ram.blocks().len() != gpas.len() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "{} addresses for {} RAM blocks",
                    gpas.len(),
                    ram.blocks().len()
                ),
            ));
        }
        let mode = choose_mode(&vm, mode)?;
        let mut slots = Self {
            vm,
            slots: Vec::with_capacity(gpas.len()),
            mode,
        };
        for (number, (block, gpa)) in (0..).zip(ram.blocks().iter().zip(gpas)) {
            set_memory_slot(&slots.vm, number, *gpa, Some(block), 0)?;
            slots.slots.push(Slot {
                gpa: *gpa,
                block: block.clone(),
            });
        }
        Ok(slots)
    }

    /// How the log is driven.
    pub fn mode(&self) -> DirtyLogMode {
        self.mode
    }

    pub(super) fn vm(&self) -> &VmFd {
        &self.vm
    }

    /// Pages per slot.
    pub(super) fn pages(&self) -> impl Iterator<Item = u64> {
        self.slots.iter().map(|slot| slot.block.pages().0)
    }

    /// The block in `slot`.
    pub(super) fn block(&self, slot: u32) -> Option<&RamBlock> {
        let index = usize::try_from(slot).ok()?;
        self.slots.get(index).map(|slot| &slot.block)
    }

    /// The file behind `slot` and the offset of the slot's first byte in it, if it has one.
    pub(super) fn file(&self, slot: u32) -> Option<(&File, u64)> {
        self.block(slot)?.file()
    }

    /// Switches the log of all slots on or off. On failure slots may differ; switching off is then still right.
    pub(super) fn set_logging(&self, on: bool) -> io::Result<()> {
        let flags = if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        let mut result = Ok(());
        for (number, slot) in (0..).zip(&self.slots) {
            let set = set_memory_slot(&self.vm, number, slot.gpa, Some(&slot.block), flags);
            if on {
                set?;
            } else {
                // Switching off goes on with the other slots; the first error is the one to report.
                result = result.and(set);
            }
        }
        result
    }
}

impl Drop for MemorySlots {
    fn drop(&mut self) {
        // The VM may outlive us: it must not reach the mappings, which may be gone next.
        for (number, slot) in (0..).zip(&self.slots) {
            if let Err(error) = set_memory_slot(&self.vm, number, slot.gpa, None, 0) {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "memory slot left behind"
                );
            }
        }
    }
}

fn choose_mode(vm: &VmFd, wanted: Option<DirtyLogMode>) -> io::Result<DirtyLogMode> {
    let offered = vm.check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into());
    let value = MANUAL_PROTECT_ENABLE | u64::from(KVM_DIRTY_LOG_INITIALLY_SET);
    let has_both = u64::try_from(offered).unwrap_or(0) & value == value;
    let mode = wanted.unwrap_or(if has_both {
        DirtyLogMode::ManualClear
    } else {
        DirtyLogMode::GetClears
    });
    if mode == DirtyLogMode::ManualClear {
        vm.enable_cap(&kvm_enable_cap {
            cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
            args: [value, 0, 0, 0],
            ..Default::default()
        })
        .map_err(to_io)?;
    }
    Ok(mode)
}
