//! vmferry as a service: the engine that owns a migration, QMP, the command line and the built-in machine.
//!
//! - [`machine`]: the built-in machine and its guest
//! - [`migration`]: what a migration is told and what it says of itself
//! - [`qmp`]: the control interface

pub mod machine;
pub mod migration;
pub mod qmp;
