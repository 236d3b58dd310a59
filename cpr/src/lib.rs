//! How file descriptors, guest RAM first among them, change process.
//!
//! A VMM author begins with the [`guide`].
//!
//! - [`manifest`]: the list of what changes process, by name, role and kind
//! - [`message`]: what the two processes say to each other
//! - [`give`], [`take`]: both halves of a hand-over as state machines without I/O
//! - [`table`]: descriptors that arrived, each claimed once or closed and counted
//! - [`socket`]: the socket between them, with descriptors, deadlines and a check of who is at the other end
//! - [`handout`], [`takeover`]: both halves with a real socket, step by step
//! - [`letter`], [`envelope`]: what a program leaves for the program that its process becomes by an exec
//! - [`spawn`]: starting the new process with one inherited socket
//! - [`memfd`]: guest RAM as a sealed memfd, and taking over one that another process made
//! - [`shared`]: guest RAM in a file with a name, which outlives its VM
//! - [`mark`]: which saved guest such a file belongs to
//! - [`error`]: what can go wrong, sorted by who is at fault
#![forbid(unsafe_code)]

mod check;
#[cfg(test)]
mod compat;
pub mod envelope;
pub mod error;
#[cfg(any(test, feature = "testkit"))]
pub mod fuzz;
pub mod give;
pub mod guide;
pub mod handout;
pub mod letter;
pub mod manifest;
pub mod mark;
pub mod memfd;
pub mod message;
pub mod shared;
#[cfg(test)]
mod simulation;
pub mod socket;
pub mod spawn;
pub mod table;
pub mod take;
pub mod takeover;
#[cfg(test)]
mod tests;

pub use error::CprError;
