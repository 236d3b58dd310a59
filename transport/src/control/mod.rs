//! Control-plane I/O: one thread, cheap tasks, small messages. Guest pages never come this way.
//!
//! Everything above talks to this module only, so the runtime below can be replaced in these files alone:
//!
//! - [`Address`]: where to listen or connect, as operators write it.
//! - [`runtime`]: the control thread. tokio-uring where io_uring works, plain tokio where it is refused.
//! - [`Stream`] and [`Listener`]: sockets of either kind behind one face.
//!
//! # Rules
//! - **One reader per stream, and it reads to the end.** An abandoned io_uring read stays alive in the kernel and would swallow
//!   the next bytes, so a [`Stream`] refuses a second read after a dropped one. End a reader with [`Stream::shutdown`], never by
//!   dropping its future, and never put a `read` under a timeout or into a `select!`.
//! - Connecting and accepting wait for readiness instead of using io_uring: both must be cancellable at any moment, and an
//!   abandoned io_uring accept leaks the connection it gets.
//! - A stream whose handshake is over becomes a plain blocking socket with [`Stream::into_socket`] and moves to a data thread.

mod address;
#[cfg(feature = "uring")]
mod connect;
#[cfg(feature = "uring")]
mod fd_reader;
#[cfg(feature = "uring")]
mod listener;
#[cfg(feature = "uring")]
pub mod runtime;
#[cfg(feature = "uring")]
mod stream;
#[cfg(test)]
#[cfg(feature = "uring")]
mod tests;

pub use address::{
    Address, AddressError, COMMAND_BYTES_MAX, FD_NAME_BYTES_MAX, FILE_PATH_BYTES_MAX,
    HOST_CHARS_MAX, UNIX_PATH_BYTES_MAX,
};
#[cfg(feature = "uring")]
pub use connect::{CONNECT_DEADLINE, ConnectError};
#[cfg(feature = "uring")]
pub use fd_reader::{FDS_PER_MESSAGE_MAX, FdReader, Received};
#[cfg(feature = "uring")]
pub use listener::{LISTEN_BACKLOG, ListenError, Listener};
#[cfg(feature = "uring")]
pub use stream::Stream;
