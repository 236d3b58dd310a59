//! What a migration is told and what it says of itself. Pure: no I/O, no clock.
//!
//! - [`params`]: parameters and capabilities, with QEMU's names, ranges and all-or-nothing rule
//! - [`status`]: the names of the states a migration can be in

pub mod params;
pub mod status;
