//! The trait of a part of the VM that has state to move.

use vmferry_transport::wire::{DeviceSchema, Section};

use crate::DeviceError;

/// A part of the VM with state that a migration moves. Called only while every vCPU is stopped.
///
/// There are no default implementations: a device that forgot one would migrate silently without its state.
pub trait Device: Send {
    /// Unique name within the VM, the same on both sides, such as `serial/0`.
    fn name(&self) -> &str;

    /// What this device saves and loads.
    fn schema(&self) -> DeviceSchema;

    /// The state at this moment. Must not change the device: a failed migration goes on with it.
    ///
    /// # Errors
    /// When the kernel or a back end refuses; the device is then unchanged.
    fn save(&mut self) -> Result<Section, DeviceError>;

    /// Takes over the state of `section`, which carries this device's name.
    ///
    /// # Errors
    /// When the state is refused. The device may then be half-loaded and must not run.
    fn restore(&mut self, section: &Section) -> Result<(), DeviceError>;
}
