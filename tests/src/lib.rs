//! Deterministic simulation of two hosts, and what the integration tests share.

pub mod sim;
pub mod stand_in;
pub mod virtqueue;
