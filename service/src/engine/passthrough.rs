//! The VFIO devices' part in running, stopping and moving the guest. Everything here may block. What a device is asked once is asked before
//! the engine's loop begins, all else on the job thread, so that the loop never waits for the lock.

use std::sync::{Mutex, MutexGuard, PoisonError};

use vmferry_devices::DeviceError;
use vmferry_devices::vfio::{Blocker, VfioSet};
use vmferry_transport::data::{DeviceSink, DeviceSource, StreamedDevice};
use vmferry_transport::wire::DeviceSchema;

use crate::machine::Machine;

/// The streams of all devices, at the source.
pub(super) type Sources = Vec<StreamedDevice<dyn DeviceSource>>;
/// The streams of all devices, at the target.
pub(super) type Sinks = Vec<StreamedDevice<dyn DeviceSink>>;

/// What all devices have to give, in bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sizes {
    /// In the blackout, if they were stopped now.
    pub(super) stop_copy: u64,
    /// Once, before it.
    pub(super) initial: u64,
}

/// Everything that the hello lists: what has a section, then what has a stream.
pub(super) fn schemas(machine: &dyn Machine) -> Vec<DeviceSchema> {
    schemas_of(machine, &lock(&machine.vfio()))
}

/// Names of the devices that have a stream.
pub(super) fn streamed(machine: &dyn Machine) -> Vec<String> {
    let schemas = lock(&machine.vfio()).schemas();
    schemas.into_iter().map(|schema| schema.name).collect()
}

/// Why devices keep the machine from being migrated.
pub(super) fn blockers(machine: &dyn Machine) -> Vec<String> {
    let blockers = lock(&machine.vfio()).blockers();
    let text = |Blocker { device, reason }| format!("device {device}: {reason}");
    blockers.into_iter().map(text).collect()
}

/// Source: devices begin to give their state; the dirty log runs.
pub(super) fn begin(machine: &dyn Machine) -> Result<Sources, DeviceError> {
    let vfio = machine.vfio();
    let mut devices = lock(&vfio);
    devices.begin()?;
    devices.sources(&schemas_of(machine, &devices))
}

/// Source: how much there is to give, with the guest running.
pub(super) fn sizes(machine: &dyn Machine) -> Result<Sizes, DeviceError> {
    let mut sizes = Sizes::default();
    for (_, device) in lock(&machine.vfio()).sizes()? {
        // The blackout of a device that cannot tell (kernels before 6.2) is not predicted: waiting for it to become small would be for ever.
        let stop_copy = device.stop_copy_bytes.unwrap_or(0);
        sizes.stop_copy = sizes.stop_copy.saturating_add(stop_copy);
        sizes.initial = sizes.initial.saturating_add(device.initial_bytes);
    }
    Ok(sizes)
}

/// Source: the vCPUs are stopped, and the guest is to leave.
pub(super) fn stop_to_leave(machine: &dyn Machine) -> Result<(), DeviceError> {
    lock(&machine.vfio()).stop()
}

/// Target: devices are ready for their streams.
pub(super) fn begin_load(machine: &dyn Machine) -> Result<Sinks, DeviceError> {
    let vfio = machine.vfio();
    let mut devices = lock(&vfio);
    devices.begin_load()?;
    devices.sinks(&schemas_of(machine, &devices))
}

/// Target: the streams have ended; the devices check what they were given.
pub(super) fn finish_load(machine: &dyn Machine) -> Result<(), DeviceError> {
    lock(&machine.vfio()).finish_load()
}

/// The vCPUs are stopped, and the guest stays: its devices stop too.
pub(super) fn pause(machine: &dyn Machine) -> Result<(), DeviceError> {
    lock(&machine.vfio()).pause()
}

/// The vCPUs are about to run.
pub(super) fn run(machine: &dyn Machine) -> Result<(), DeviceError> {
    for stands in lock(&machine.vfio()).run()? {
        stands.log("a stop of the guest");
    }
    Ok(())
}

fn schemas_of(machine: &dyn Machine, devices: &VfioSet) -> Vec<DeviceSchema> {
    let mut schemas = machine.schemas();
    schemas.extend(devices.schemas());
    schemas
}

/// A panic that left the devices half-way is what the rollback is for.
fn lock(devices: &Mutex<VfioSet>) -> MutexGuard<'_, VfioSet> {
    devices.lock().unwrap_or_else(PoisonError::into_inner)
}
