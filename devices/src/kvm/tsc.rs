//! The TSC of a vCPU, moved so that it counts the blackout.
//!
//! Where KVM tells the offset of the guest's TSC and both hosts' TSCs at a known guest time, the new offset follows exactly, and all
//! vCPUs keep their distances. Otherwise the saved value, advanced by the elapsed wall clock, is written to IA32_TSC.
//!
//! kvm-pvm takes the value but shows its guest the host's own TSC (the offset reads 0): there the TSC jumps when the host changes.

use std::io;

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::bytes::{bad_state, kernel};
use super::clock::{ClockMove, elapsed_since, realtime_ns};
use super::ioctl::{set_tsc_offset, tsc_offset};
use super::saved::TscV1;
use crate::DeviceError;

/// MSR index of the TSC.
pub(super) const IA32_TSC: u32 = 0x10;
/// Largest difference of TSC frequencies that is taken for the same, in parts per million: calibration is no better.
const KHZ_TOLERANCE_PPM: u64 = 250;

/// Reads the TSC.
pub(super) fn save_tsc(
    vcpu: &VcpuFd,
    device: &str,
    has_offset: bool,
) -> Result<TscV1, DeviceError> {
    let mut msrs = tsc_msr(device, 0)?;
    let read = vcpu
        .get_msrs(&mut msrs)
        .map_err(kernel(device, "KVM_GET_MSRS of IA32_TSC"))?;
    let realtime_ns = realtime_ns(device)?;
    let value = match msrs.as_slice() {
        [entry] if read == 1 => entry.data,
        _ => return Err(bad_state(device, "IA32_TSC cannot be read".to_owned())),
    };
    let offset = has_offset
        .then(|| tsc_offset(vcpu).map_err(kernel(device, "reading the TSC offset")))
        .transpose()?;
    Ok(TscV1 {
        khz: vcpu.get_tsc_khz().unwrap_or(0),
        value,
        realtime_ns,
        offset,
    })
}

/// Makes the vCPU count at the saved frequency. Before [`restore_tsc`].
pub(super) fn restore_tsc_khz(
    vcpu: &VcpuFd,
    device: &str,
    saved: &TscV1,
) -> Result<(), DeviceError> {
    let ours = vcpu.get_tsc_khz().unwrap_or(0);
    if saved.khz == ours || saved.khz == 0 || ours == 0 || nearly_equal(saved.khz, ours) {
        return Ok(());
    }
    vcpu.set_tsc_khz(saved.khz).map_err(|error| {
        bad_state(
            device,
            format!(
                "its TSC runs at {} kHz, this host's at {ours} kHz and cannot be scaled: {error}",
                saved.khz
            ),
        )
    })
}

/// Sets the TSC so that it goes on as if it had counted all the time since it was saved.
pub(super) fn restore_tsc(
    vcpu: &VcpuFd,
    device: &str,
    has_offset: bool,
    saved: &TscV1,
    clock: Option<&ClockMove>,
) -> Result<(), DeviceError> {
    // Offsets compare TSCs of the same frequency only.
    let host_khz_is_ours = vcpu
        .get_tsc_khz()
        .is_ok_and(|khz| nearly_equal(khz, saved.khz));
    if let Some(offset) = clock
        .filter(|_| has_offset && host_khz_is_ours)
        .and_then(|clock| moved_offset(saved, clock))
    {
        return set_tsc_offset(vcpu, offset).map_err(kernel(device, "setting the TSC offset"));
    }
    let elapsed_ns = elapsed_since(device, saved.realtime_ns)?;
    let ticks = u128::from(elapsed_ns) * u128::from(saved.khz) / 1_000_000;
    let ticks =
        u64::try_from(ticks).map_err(|_| bad_state(device, format!("{ticks} ticks elapsed")))?;
    let msrs = tsc_msr(device, saved.value.wrapping_add(ticks))?;
    let set = vcpu
        .set_msrs(&msrs)
        .map_err(kernel(device, "KVM_SET_MSRS of IA32_TSC"))?;
    if set != 1 {
        return Err(bad_state(device, "IA32_TSC cannot be set".to_owned()));
    }
    Ok(())
}

/// The target's TSC offset, by the algorithm of the kernel's documentation of `KVM_VCPU_TSC_OFFSET`: at the same guest time the guest
/// TSC must be the same on both sides. `None` where a reading is missing.
fn moved_offset(saved: &TscV1, clock: &ClockMove) -> Option<u64> {
    let ClockMove { source, target } = clock;
    let offset = i128::from(saved.offset?);
    let source_tsc = i128::from(source.host_tsc?);
    let target_tsc = i128::from(target.host_tsc?);
    let guest_ns = i128::from(target.clock_ns) - i128::from(source.clock_ns);
    let guest_ticks = guest_ns * i128::from(saved.khz) / 1_000_000;
    let moved = offset + guest_ticks + source_tsc - target_tsc;
    // Offsets are modulo 2^64.
    u64::try_from(moved.rem_euclid(1 << 64)).ok()
}

fn nearly_equal(left_khz: u32, right_khz: u32) -> bool {
    u64::from(left_khz.abs_diff(right_khz)) * 1_000_000
        <= u64::from(left_khz.max(right_khz)) * KHZ_TOLERANCE_PPM
}

fn tsc_msr(device: &str, data: u64) -> Result<Msrs, DeviceError> {
    let entry = kvm_msr_entry {
        index: IA32_TSC,
        data,
        ..Default::default()
    };
    Msrs::from_entries(&[entry])
        .map_err(|error| io::Error::other(format!("{error:?}")))
        .map_err(kernel(device, "allocating an MSR list"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::saved::ClockV1;

    fn reading(clock_ns: u64, host_tsc: u64) -> ClockV1 {
        ClockV1 {
            clock_ns,
            realtime_ns: 0,
            host_tsc: Some(host_tsc),
        }
    }

    #[test]
    fn moved_offset_keeps_the_guest_tsc_at_the_same_guest_time() {
        // 2 ticks per ns. Source: guest TSC 5000 at guest time 1000. Target: guest time 1600 at host TSC 90, so guest TSC 6200.
        let saved = TscV1 {
            khz: 2_000_000,
            value: 0,
            realtime_ns: 0,
            offset: Some(5000_u64.wrapping_sub(7_000_000)),
        };
        let clock = ClockMove {
            source: reading(1000, 7_000_000),
            target: reading(1600, 90),
        };
        let offset = moved_offset(&saved, &clock).unwrap();
        assert_eq!(offset.wrapping_add(90), 6200);
    }

    #[test]
    fn frequencies_within_calibration_error_count_as_equal() {
        assert!(nearly_equal(2_600_000, 2_600_600));
        assert!(!nearly_equal(2_600_000, 2_601_000));
        assert!(nearly_equal(0, 0));
    }
}
