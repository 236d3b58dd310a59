//! The wire format.

pub mod section;

pub use section::{DeviceSchema, Section};
