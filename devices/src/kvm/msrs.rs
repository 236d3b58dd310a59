//! MSRs in bulk: which ones a vCPU has, their values, and setting them with the culprit named.

use std::io;

use kvm_bindings::{KVM_MAX_MSR_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::bytes::{bad_state, kernel};
use super::tsc::IA32_TSC;
use crate::DeviceError;

/// Its value is dropped unless the local APIC's timer mode, the TSC and its offset are in place: set last.
pub(super) const IA32_TSC_DEADLINE: u32 = 0x6e0;
/// Most MSRs accepted from a stream. KVM lists less than 200.
const MSRS_MAX: usize = 1024;

/// Where the guest wants the wall clock, under its old and its new number. Setting it makes KVM write the clock there at once, into memory
/// that has just been made equal to the source's; nothing else is remembered, and a guest that wants the clock again sets it again.
const KVM_WALL_CLOCK: [u32; 2] = [0x11, 0x4b56_4d00];

/// Whether an MSR is one with which a guest asks for the wall clock.
pub(super) fn is_wall_clock(index: u32) -> bool {
    KVM_WALL_CLOCK.contains(&index)
}

/// Those of `listed` that `vcpu` lets us read, without the TSC, which has a way of its own, and without those that only ask KVM to write
/// something. The order of the list is kept, the TSC
/// deadline comes last.
pub(super) fn readable_msrs(vcpu: &VcpuFd, listed: &[u32]) -> io::Result<Vec<u32>> {
    let mut candidates: Vec<u32> = listed
        .iter()
        .copied()
        .filter(|index| !matches!(*index, IA32_TSC | IA32_TSC_DEADLINE))
        .filter(|index| !is_wall_clock(*index))
        .collect();
    if listed.contains(&IA32_TSC_DEADLINE) {
        candidates.push(IA32_TSC_DEADLINE);
    }
    let mut readable = Vec::with_capacity(candidates.len());
    let mut rest = candidates.as_slice();
    while !rest.is_empty() {
        let asked = &rest[..rest.len().min(KVM_MAX_MSR_ENTRIES)];
        let mut msrs = list_of(asked.iter().map(|index| (*index, 0)))?;
        let read = vcpu.get_msrs(&mut msrs)?.min(asked.len());
        readable.extend_from_slice(&asked[..read]);
        // KVM stops at the first that it cannot read; that one is left out.
        let unreadable = usize::from(read < asked.len());
        rest = &rest[read + unreadable..];
    }
    Ok(readable)
}

/// Values of `indices`, all of which must be readable.
pub(super) fn get_msrs(
    vcpu: &VcpuFd,
    device: &str,
    indices: &[u32],
) -> Result<Vec<(u32, u64)>, DeviceError> {
    let mut values = Vec::with_capacity(indices.len());
    for asked in indices.chunks(KVM_MAX_MSR_ENTRIES) {
        let mut msrs = list_of(asked.iter().map(|index| (*index, 0)))
            .map_err(kernel(device, "allocating an MSR list"))?;
        let read = vcpu
            .get_msrs(&mut msrs)
            .map_err(kernel(device, "KVM_GET_MSRS"))?;
        if let Some(unread) = asked.get(read) {
            return Err(bad_state(
                device,
                format!("MSR {unread:#x} cannot be read any more"),
            ));
        }
        values.extend(
            msrs.as_slice()
                .iter()
                .map(|entry| (entry.index, entry.data)),
        );
    }
    Ok(values)
}

/// Sets all of `values`, in order. One that KVM refuses is an error that names it, unless the vCPU holds that value already.
pub(super) fn set_msrs(
    vcpu: &VcpuFd,
    device: &str,
    values: &[(u32, u64)],
) -> Result<(), DeviceError> {
    if values.len() > MSRS_MAX {
        return Err(bad_state(
            device,
            format!("{} MSRs, more than the {MSRS_MAX} allowed", values.len()),
        ));
    }
    let mut rest = values;
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(KVM_MAX_MSR_ENTRIES)];
        let msrs =
            list_of(batch.iter().copied()).map_err(kernel(device, "allocating an MSR list"))?;
        let set = vcpu
            .set_msrs(&msrs)
            .map_err(kernel(device, "KVM_SET_MSRS"))?
            .min(batch.len());
        rest = &rest[set..];
        if let Some((&(index, value), after)) =
            (set < batch.len()).then(|| rest.split_first()).flatten()
        {
            accept_if_held(vcpu, device, index, value)?;
            rest = after;
        }
    }
    Ok(())
}

fn accept_if_held(vcpu: &VcpuFd, device: &str, index: u32, value: u64) -> Result<(), DeviceError> {
    let mut msrs =
        list_of([(index, 0)].into_iter()).map_err(kernel(device, "allocating an MSR list"))?;
    let read = vcpu
        .get_msrs(&mut msrs)
        .map_err(kernel(device, "KVM_GET_MSRS"))?;
    let held = msrs
        .as_slice()
        .first()
        .filter(|_| read == 1)
        .map(|entry| entry.data);
    match held {
        Some(held) if held == value => Ok(()),
        Some(held) => Err(bad_state(
            device,
            format!("this host's KVM refuses {value:#x} for MSR {index:#x}, which holds {held:#x}"),
        )),
        None => Err(bad_state(
            device,
            format!("this host's KVM has no MSR {index:#x}, whose saved value is {value:#x}"),
        )),
    }
}

fn list_of(values: impl ExactSizeIterator<Item = (u32, u64)>) -> io::Result<Msrs> {
    let entries: Vec<_> = values
        .map(|(index, data)| kvm_msr_entry {
            index,
            data,
            ..Default::default()
        })
        .collect();
    Msrs::from_entries(&entries).map_err(|error| io::Error::other(format!("{error:?}")))
}
