//! vmferry as a service: the engine that owns a migration, QMP, the command line and the built-in machine.
//!
//! - [`machine`]: the built-in machine and its guest

pub mod machine;
