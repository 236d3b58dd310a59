//! How file descriptors, guest RAM first among them, change process.
//!
//! - [`memfd`]: guest RAM as a sealed memfd, and taking over one that another process made
//! - [`error`]: what can go wrong, sorted by who is at fault
#![forbid(unsafe_code)]

pub mod error;
pub mod memfd;

pub use error::CprError;
