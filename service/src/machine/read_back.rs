//! Reading a machine's state back after loading it, to find out whether it took what it was given.

use vmferry_devices::DeviceError;
use vmferry_devices::kvm::saved::{ClockV1, VcpuV2};
use vmferry_devices::saved::{SavedState, decode};
use vmferry_transport::wire::Section;

use super::{Machine, VcpusStopped};

/// Differences between `loaded` and what the machine saves now, in words; empty when all is equal. Clocks are left out, because they
/// have moved on, and so are the fields of a vCPU that follow them.
///
/// # Errors
/// When the machine cannot save.
pub fn state_differences(
    machine: &dyn Machine,
    stopped: &VcpusStopped,
    loaded: &[Section],
) -> Result<Vec<String>, DeviceError> {
    let mut differences = Vec::new();
    for now in machine.save(stopped)? {
        let name = &now.name;
        match loaded.iter().find(|section| section.name == *name) {
            None => differences.push(format!("{name}: was not loaded")),
            Some(_) if now.schema == ClockV1::SCHEMA => {}
            Some(then) if now.schema == VcpuV2::SCHEMA => {
                let (then, now): (VcpuV2, VcpuV2) = (decode(then)?, decode(&now)?);
                differences.extend(
                    then.differences(&now)
                        .iter()
                        .map(|field| format!("{name}: {field}")),
                );
            }
            // An older version has other bytes for the same.
            Some(then) if then.version != now.version => {}
            Some(then) if then.bytes != now.bytes => {
                differences.push(format!("{name}: state differs"))
            }
            Some(_) => {}
        }
    }
    Ok(differences)
}
