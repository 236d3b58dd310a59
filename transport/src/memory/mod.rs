//! Guest memory as migration sees it: blocks of RAM, bitmaps of pages, and who reports writes.
//!
//! Guest memory is never `&[u8]`: the guest writes it while we read. The core sees page numbers only; the data driver hands
//! addresses to the kernel.

pub mod bitmap;
mod dirty_log;
#[cfg(feature = "uring")]
pub mod extents;
#[cfg(feature = "uring")]
pub mod hash;
#[cfg(feature = "uring")]
pub mod populate;
#[cfg(feature = "uring")]
pub mod ram;
#[cfg(feature = "uring")]
mod samples;
#[cfg(feature = "uring")]
pub mod zero;

pub use bitmap::{DirtyMap, PageBitmap};
pub use dirty_log::{DirtyLog, DirtyLogError, UnitedLog, WriteProtector};
#[cfg(feature = "uring")]
pub use ram::{GuestRam, RamBlock};
#[cfg(feature = "uring")]
pub use samples::PageSamples;
