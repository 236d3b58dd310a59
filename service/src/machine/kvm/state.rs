//! Saves and loads the machine as sections: `machine`, `kvm-clock`, `vcpu/N`, `serial/0`, and `kvm-irqchip` with a Linux guest.

use serde::{Deserialize, Serialize};
use vmferry_devices::saved::{SavedState, decode, encode, schema_of};
use vmferry_devices::{DeviceError, kvm};
use vmferry_transport::wire::{DeviceSchema, Section};

use crate::machine::serial::{SERIAL, SerialV1};
use crate::machine::workload::WorkloadConfig;

/// Name of the section of the machine as a whole.
pub(super) const MACHINE: &str = "machine";
/// Name of the clock's section.
pub(super) const CLOCK: &str = "kvm-clock";
/// Name of the section of the interrupt controllers, of a machine that has them.
pub(super) const IRQCHIP: &str = "kvm-irqchip";

/// The machine as a whole, schema `machine-kvm`, version 1, frozen. A machine of another kind has another schema, so that
/// neither loads the other's.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct MachineV1 {
    /// RAM in bytes; must be the target's.
    pub mem_bytes: u64,
    /// Number of vCPUs; must be the target's.
    pub vcpus: u32,
    /// What the guest does; absent if the guest is not the workload.
    #[serde(default)]
    pub workload: Option<WorkloadV1>,
}

impl SavedState for MachineV1 {
    const SCHEMA: &'static str = "machine-kvm";
    const VERSION: u32 = 1;
}

/// What the workload guest was asked to do.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct WorkloadV1 {
    /// Bytes that it keeps writing.
    pub working_set_bytes: u64,
    /// Pages per second; absent for as fast as it can.
    #[serde(default)]
    pub dirty_pages_per_sec: Option<u64>,
    /// Bytes that it filled at start.
    pub fill_bytes: u64,
}

/// What a machine with `vcpus` vCPUs saves and loads, in order.
pub(super) fn schemas(vcpus: u32, has_irqchip: bool) -> Vec<DeviceSchema> {
    let mut schemas = vec![
        schema_of::<MachineV1>(MACHINE),
        schema_of::<kvm::saved::ClockV1>(CLOCK),
    ];
    schemas
        .extend((0..vcpus).map(|number| schema_of::<kvm::saved::VcpuV2>(&kvm::vcpu_name(number))));
    schemas.push(schema_of::<SerialV1>(SERIAL));
    if has_irqchip {
        schemas.push(schema_of::<kvm::saved::IrqchipV1>(IRQCHIP));
    }
    schemas
}

/// The machine's own section.
pub(super) fn save_machine(
    mem_bytes: u64,
    vcpus: u32,
    workload: Option<WorkloadConfig>,
) -> Result<Section, DeviceError> {
    let workload = workload.map(
        |WorkloadConfig {
             working_set_bytes,
             dirty_pages_per_sec,
             fill_bytes,
         }| WorkloadV1 {
            working_set_bytes,
            dirty_pages_per_sec,
            fill_bytes,
        },
    );
    encode(
        MACHINE,
        &MachineV1 {
            mem_bytes,
            vcpus,
            workload,
        },
    )
}

/// Checks the machine's own section against a machine with `mem_bytes` and `vcpus`; gives what its guest does.
pub(super) fn load_machine(
    section: &Section,
    mem_bytes: u64,
    vcpus: u32,
) -> Result<Option<WorkloadConfig>, DeviceError> {
    let MachineV1 {
        mem_bytes: their_bytes,
        vcpus: their_vcpus,
        workload,
    } = decode(section)?;
    let bad = |reason: String| DeviceError::BadState {
        device: MACHINE.to_owned(),
        reason,
    };
    if (their_bytes, their_vcpus) != (mem_bytes, vcpus) {
        return Err(bad(format!(
            "it has {their_bytes} bytes of RAM and {their_vcpus} vCPUs, this machine {mem_bytes} and {vcpus}"
        )));
    }
    let workload = workload.map(
        |WorkloadV1 {
             working_set_bytes,
             dirty_pages_per_sec,
             fill_bytes,
         }| WorkloadConfig {
            working_set_bytes,
            dirty_pages_per_sec,
            fill_bytes,
        },
    );
    if let Some(workload) = &workload {
        workload
            .check(mem_bytes, vcpus)
            .map_err(|error| bad(error.to_string()))?;
    }
    Ok(workload)
}

/// Puts `sections` into the order of `schemas`. Unknown, doubled and missing ones are errors, and so is a schema of another kind.
pub(in crate::machine) fn in_order<'a>(
    schemas: &[DeviceSchema],
    sections: &'a [Section],
) -> Result<Vec<&'a Section>, DeviceError> {
    if let Some(unknown) = sections
        .iter()
        .find(|section| schemas.iter().all(|schema| schema.name != section.name))
    {
        return Err(DeviceError::Unknown {
            device: unknown.name.clone(),
        });
    }
    schemas
        .iter()
        .map(|schema| only_one(schema, sections))
        .collect()
}

fn only_one<'a>(
    schema: &DeviceSchema,
    sections: &'a [Section],
) -> Result<&'a Section, DeviceError> {
    let mut found = sections
        .iter()
        .filter(|section| section.name == schema.name);
    let section = found.next().ok_or_else(|| DeviceError::Missing {
        device: schema.name.clone(),
    })?;
    if found.next().is_some() {
        return Err(DeviceError::BadState {
            device: schema.name.clone(),
            reason: "the stream holds it twice".to_owned(),
        });
    }
    let versions = schema.version_min..=schema.version_max;
    if section.schema != schema.schema || !versions.contains(&section.version) {
        return Err(DeviceError::Version {
            device: section.name.clone(),
            schema: section.schema.clone(),
            version: section.version,
            supported: format!("{} versions {versions:?}", schema.schema),
        });
    }
    Ok(section)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use vmferry_devices::saved::fixtures;

    use super::*;

    #[test]
    fn state_of_the_machine_keeps_its_bytes() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/state");
        let machine = MachineV1 {
            mem_bytes: 64 << 20,
            vcpus: 2,
            workload: Some(WorkloadV1 {
                working_set_bytes: 4 << 20,
                dirty_pages_per_sec: Some(1000),
                fill_bytes: 8 << 20,
            }),
        };
        fixtures::check(&folder, &[machine]).unwrap();
    }
}
