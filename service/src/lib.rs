//! vmferry as a service: the engine that owns a migration, QMP, the command line and the built-in machine.
//!
//! - [`cli`]: the command line
//! - [`config`]: what `vmferry run` is told
//! - [`engine`]: owns the guest and the migrations, one event at a time
//! - [`fds`]: file descriptors that operators have passed in
//! - [`machine`]: the built-in machine and its guest
//! - [`migration`]: what a migration is told and what it says of itself
//! - [`observe`]: metrics, records, log spans, reports
//! - [`qmp`]: the control interface
//! - [`succession`]: an upgrade in which the process stays and its program changes

pub mod cli;
pub mod config;
pub mod engine;
pub mod fds;
pub mod machine;
pub mod migration;
pub mod observe;
pub mod qmp;
pub mod succession;
