//! The io_uring driver: one ring per data connection, used by the thread that made it.
//!
//! Ownership rules for everything below, because the kernel writes and reads memory behind the compiler's back:
//!
//! 1. An operation's memory is a [`LentMessage`](crate::data::lent::LentMessage), moved into the ring's slab when the operation is
//!    submitted. It leaves the slab when the kernel has posted the operation's *last* completion: the second one for zero-copy.
//! 2. Nobody can reach a message in the slab, so nothing it points to can be freed or changed.
//! 3. A ring that is dropped with operations under way shuts its socket down, which completes them, and reaps them. If the kernel
//!    does not let go, the messages are leaked rather than freed.
//! 4. A short transfer is a normal result: the rest is submitted again, from the right byte.

mod link;
mod ring;

pub(crate) use link::UringLink;
pub(crate) use ring::probe;
