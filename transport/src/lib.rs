//! How guest pages and device state move from one process to another.
//!
//! Reading order: [`units`] and [`memory`] say what is moved; the wire module is the format; the proto module decides; the data
//! module moves pages on threads and rings of its own.

pub mod control;
#[cfg(feature = "uring")]
pub mod data;
pub mod limits;
pub mod memory;
pub mod proto;
#[cfg(feature = "uring")]
pub mod streams;
pub mod units;
#[cfg(feature = "uring")]
mod uring;
pub mod wire;
