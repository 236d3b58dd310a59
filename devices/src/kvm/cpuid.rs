//! What CPUID tells the guest: made at the source, checked against the target's KVM.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use zerocopy::{FromBytes, IntoBytes};

use super::bytes::bad_state;
use crate::DeviceError;

/// Features of the running state, not of the CPU: OSXSAVE in leaf 1, OSPKE in leaf 7.
const LEAF_1_ECX_DYNAMIC: u32 = 1 << 27;
const LEAF_7_ECX_DYNAMIC: u32 = 1 << 4;
/// VMX in leaf 1, SVM in leaf 0x8000_0001.
const LEAF_1_ECX_VMX: u32 = 1 << 5;
const LEAF_EXT_1_ECX_SVM: u32 = 1 << 2;
/// A hypervisor is present; always allowed, whether or not KVM lists it.
const LEAF_1_ECX_HYPERVISOR: u32 = 1 << 31;

/// CPUID for vCPU number `vcpu`: all that `supported` offers, less nested virtualisation, whose state is not saved, and with the
/// vCPU's APIC id.
pub(super) fn guest_cpuid(supported: &CpuId, vcpu: u32) -> CpuId {
    let mut cpuid = supported.clone();
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            1 => {
                entry.ecx = entry.ecx & !LEAF_1_ECX_VMX | LEAF_1_ECX_HYPERVISOR;
                entry.ebx = entry.ebx & 0x00ff_ffff | vcpu << 24;
            }
            0xb | 0x1f => entry.edx = vcpu,
            0x8000_0001 => entry.ecx &= !LEAF_EXT_1_ECX_SVM,
            _ => {}
        }
    }
    cpuid
}

pub(super) fn cpuid_to_bytes(cpuid: &CpuId) -> Vec<u8> {
    cpuid.as_slice().as_bytes().to_vec()
}

pub(super) fn cpuid_from_bytes(device: &str, bytes: &[u8]) -> Result<CpuId, DeviceError> {
    let size = size_of::<kvm_cpuid_entry2>();
    let count = bytes.len() / size;
    if !bytes.len().is_multiple_of(size) || count == 0 || count > KVM_MAX_CPUID_ENTRIES {
        return Err(bad_state(
            device,
            format!(
                "cpuid has {} bytes, expected {size} for each of 1 to {KVM_MAX_CPUID_ENTRIES} entries",
                bytes.len()
            ),
        ));
    }
    let entries: Vec<kvm_cpuid_entry2> = bytes
        .chunks_exact(size)
        .filter_map(|chunk| kvm_cpuid_entry2::read_from_bytes(chunk).ok())
        .collect();
    CpuId::from_entries(&entries).map_err(|error| bad_state(device, format!("cpuid: {error:?}")))
}

/// Feature bits that `saved` promises the guest and `supported` does not have, one text per register.
pub(super) fn missing_features(saved: &CpuId, supported: &CpuId) -> Vec<String> {
    let mut missing = Vec::new();
    for entry in saved.as_slice() {
        let ours = supported
            .as_slice()
            .iter()
            .find(|other| other.function == entry.function && other.index == entry.index);
        let words = feature_words(entry);
        let our_words = ours.map_or([("", 0); 4], feature_words);
        for ((register, wanted), (_, have)) in words.into_iter().zip(our_words) {
            let lacking = wanted & !have;
            if lacking != 0 {
                missing.push(format!(
                    "leaf {:#x}.{} {register} bits {lacking:#x}",
                    entry.function, entry.index
                ));
            }
        }
    }
    missing
}

/// The registers of an entry that hold feature bits, as far as a missing bit would break the guest; others as 0.
fn feature_words(entry: &kvm_cpuid_entry2) -> [(&'static str, u32); 4] {
    let (eax, ebx, ecx, edx) = match (entry.function, entry.index) {
        (1, _) => (
            0,
            0,
            entry.ecx & !LEAF_1_ECX_DYNAMIC & !LEAF_1_ECX_HYPERVISOR,
            entry.edx,
        ),
        (7, 0) => (0, entry.ebx, entry.ecx & !LEAF_7_ECX_DYNAMIC, entry.edx),
        (7, 1) => (entry.eax, 0, 0, entry.edx),
        (0xd, 0) => (entry.eax, 0, 0, entry.edx),
        (0xd, 1) => (entry.eax, 0, 0, 0),
        (0x4000_0001, _) => (entry.eax, 0, 0, 0),
        (0x8000_0001, _) => (0, 0, entry.ecx, entry.edx),
        (0x8000_0008, _) => (0, entry.ebx, 0, 0),
        _ => (0, 0, 0, 0),
    };
    [("eax", eax), ("ebx", ebx), ("ecx", ecx), ("edx", edx)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, ebx: u32, ecx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            ebx,
            ecx,
            ..Default::default()
        }
    }

    #[test]
    fn a_feature_that_the_target_lacks_is_named_and_state_bits_are_not() {
        let saved =
            CpuId::from_entries(&[leaf(1, 0, LEAF_1_ECX_DYNAMIC | 0x3), leaf(7, 0x20, 0)]).unwrap();
        let same = CpuId::from_entries(&[leaf(1, 0, 0x3), leaf(7, 0x20, 0)]).unwrap();
        assert!(missing_features(&saved, &same).is_empty());
        let less = CpuId::from_entries(&[leaf(1, 0, 0x1)]).unwrap();
        assert_eq!(
            missing_features(&saved, &less),
            ["leaf 0x1.0 ecx bits 0x2", "leaf 0x7.0 ebx bits 0x20"]
        );
    }

    #[test]
    fn cpuid_bytes_of_a_wrong_length_are_refused() {
        for bytes in [vec![], vec![0; 39], vec![0; 40 * 257]] {
            assert!(cpuid_from_bytes("vcpu/0", &bytes).is_err());
        }
    }
}
