//! The data path: guest pages between memory and sockets, on threads of its own.
//!
//! ```text
//! engine --send_round--> DataSender    N threads: claim chunk, sort zero pages, one vectored send per frame
//!                            | N sockets (frames: wire::ram)
//! engine <--events------ DataReceiver  N threads: read frame, check, place pages; barrier between rounds
//! ```
//!
//! One thread per connection and direction, each with a ring of its own ([`Backend::Uring`]) or with blocking calls
//! ([`Backend::Plain`]). The engine's thread is never blocked, except by `join`. Workers claim chunks of a round from a shared
//! cursor, so that also a small last round uses all connections.
//!
//! **Ordering.** A target thread applies frames of round n + 1 only after the end of round n came on all connections. So a page that
//! was sent in two rounds over two sockets ends with the newer content.
//!
//! **Completeness.** A page may come once per round; in round 0 every page must. Each end of a round names counts that are compared
//! with what arrived.
//!
//! **Failure.** The first error of any connection is reported once and ends all of them, because a round that misses one connection is
//! worth nothing. `abort` does the same without an event. Nothing hangs: threads wait only for a socket (ended by `shutdown`), for the
//! barrier, for a command or for bandwidth, and all of these are woken.

mod barrier;
mod config;
mod device;
mod error;
pub(crate) mod lent;
mod limit;
pub(crate) mod link;
mod page_set;
mod placement;
mod plain;
mod receiver;
mod receiving;
mod sender;
mod sending;
pub(crate) mod sockets;
#[cfg(test)]
mod tests;
mod work;

pub use config::{Backend, BackendChoice, NO_URING_ENV, ReceiverConfig, SenderConfig, ZeroCopy};
pub use device::{DeviceSink, DeviceSource, StreamedDevice};
pub use error::DataError;
pub use limit::BandwidthLimit;
pub use link::ZeroCopyCounts;
pub use receiver::{DataReceiver, ReceiverEvent, ReceiverProgress, ReceiverTotals};
pub use sender::{DataSender, RoundStats, SenderEvent, SenderProgress, SenderTotals};
pub use work::RoundWork;
