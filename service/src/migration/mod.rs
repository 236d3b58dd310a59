//! What a migration is told and what it says of itself. Pure: no I/O, no clock.
//!
//! - `admission`: which command may be given in which status
//! - `announce`: when to tell the network that the guest has moved
//! - `blockers`: reasons against a migration
//! - [`params`]: parameters and capabilities, with QEMU's names, ranges and all-or-nothing rule
//! - [`status`]: the names of the states a migration can be in

pub(crate) mod admission;
pub(crate) mod announce;
pub(crate) mod blockers;
pub mod params;
pub mod status;
