//! What stands in for KVM where there is none: a dirty log made of the host's own page tables.

pub mod pagemap;

mod ioctl;

pub use pagemap::PagemapLog;
