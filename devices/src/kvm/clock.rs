//! The VM's paravirtual clock, and what moving it tells about the TSC.
//!
//! The guest's clocks count the blackout: a guest that measures time sees it as a pause, not as time that never was. KVM advances the
//! clock itself when it knows the wall clock of both sides; otherwise we do.

use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

use kvm_bindings::{KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, kvm_clock_data};
use kvm_ioctls::{VcpuFd, VmFd};
use vmferry_transport::wire::Section;

use super::bytes::{bad_state, kernel};
use super::saved::ClockV1;
use crate::DeviceError;
use crate::saved::{decode, encode};

/// Longest blackout that is believed, in nanoseconds: 30 days. More means that the wall clock of one host is wrong.
const ELAPSED_NS_MAX: u64 = 30 * 24 * 3600 * 1_000_000_000;

/// Both sides' readings of the guest's clock, which place the target's TSC relative to the source's.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ClockMove {
    /// At the source, when it was saved.
    pub source: ClockV1,
    /// At the target, after it was loaded.
    pub target: ClockV1,
}

/// Saves the clock as section `device`.
///
/// # Errors
/// When the kernel refuses.
pub fn save_clock(vm: &VmFd, device: &str) -> Result<Section, DeviceError> {
    encode(device, &read_clock(vm, device)?)
}

/// Loads the clock from `section`, advanced by the time since it was saved.
///
/// # Errors
/// When the section is refused, or the kernel refuses.
pub fn restore_clock(vm: &VmFd, section: &Section) -> Result<ClockMove, DeviceError> {
    let device = &section.name;
    let source: ClockV1 = decode(section)?;
    let ClockV1 {
        clock_ns,
        realtime_ns,
        host_tsc: _,
    } = source;
    let elapsed_ns = elapsed_since(device, realtime_ns)?;
    // KVM takes the wall clock only together with its stable TSC mode; without it we advance the clock ourselves.
    let advanced = clock_ns
        .checked_add(elapsed_ns)
        .ok_or_else(|| bad_state(device, format!("a clock of {clock_ns} ns")))?;
    let by_kernel = kvm_clock_data {
        clock: clock_ns,
        realtime: realtime_ns,
        flags: KVM_CLOCK_REALTIME,
        ..Default::default()
    };
    let by_us = kvm_clock_data {
        clock: advanced,
        ..Default::default()
    };
    vm.set_clock(&by_kernel)
        .or_else(|_| vm.set_clock(&by_us))
        .map_err(kernel(device, "KVM_SET_CLOCK"))?;
    let target = read_clock(vm, device)?;
    Ok(ClockMove { source, target })
}

/// Tells the guest of `vcpu`, which must not be running, that it was stopped, so that its watchdogs do not take the pause for a hang.
/// False if the guest does not use the clock of KVM, and has nowhere to be told.
///
/// To be called for every vCPU before it runs again, after each stop, whoever stopped it: by an operator, for a migration that failed,
/// and at the target after the state was loaded. KVM keeps the news until the vCPU enters the guest, and they are no part of any saved
/// state: what was said at the source is lost by a migration. That is why this belongs to resuming and is no matter of a notifier: when
/// a migration fails early, the guest was never stopped, and its running vCPUs cannot be told anything.
///
/// # Errors
/// When the kernel refuses for another reason. The guest may then complain about the pause; it runs all the same.
pub fn tell_paused(vcpu: &VcpuFd) -> io::Result<bool> {
    match vcpu.kvmclock_ctrl() {
        Ok(()) => Ok(true),
        Err(error) if error.errno() == libc::EINVAL => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn read_clock(vm: &VmFd, device: &str) -> Result<ClockV1, DeviceError> {
    let data = vm.get_clock().map_err(kernel(device, "KVM_GET_CLOCK"))?;
    let has = |flag: u32| data.flags & flag != 0;
    let realtime_ns = if has(KVM_CLOCK_REALTIME) {
        data.realtime
    } else {
        realtime_ns(device)?
    };
    Ok(ClockV1 {
        clock_ns: data.clock,
        realtime_ns,
        host_tsc: has(KVM_CLOCK_HOST_TSC).then_some(data.host_tsc),
    })
}

/// Wall clock in nanoseconds since 1970.
pub(super) fn realtime_ns(device: &str) -> Result<u64, DeviceError> {
    let since_1970 = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_err(io::Error::other)
        .map_err(kernel(device, "reading the wall clock"))?;
    u64::try_from(since_1970.as_nanos())
        .map_err(io::Error::other)
        .map_err(kernel(device, "reading the wall clock"))
}

/// Nanoseconds since `realtime_ns` on this host's wall clock; 0 if that lies in the future, as between hosts whose clocks differ a
/// little.
pub(super) fn elapsed_since(device: &str, saved_ns: u64) -> Result<u64, DeviceError> {
    let now = realtime_ns(device)?;
    if now.abs_diff(saved_ns) > ELAPSED_NS_MAX {
        return Err(bad_state(
            device,
            format!(
                "saved at {saved_ns} ns since 1970, this host's clock says {now}: one of the two clocks is wrong"
            ),
        ));
    }
    Ok(now.saturating_sub(saved_ns))
}
