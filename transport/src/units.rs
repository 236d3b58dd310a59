//! Page, block and round numbers as types of their own, so that an index is never taken for a count or a byte length.

use std::fmt;

/// Bytes in the page that the dirty logs, the bitmaps and the wire count in: 4 KiB, whatever backs the block.
pub const PAGE_SIZE: u64 = 4096;

/// Which RAM block, by its position in the list of the hello.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct BlockId(pub u16);

impl BlockId {
    /// The position as an index into the block list.
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

/// A page by its position within its block, in units of [`PAGE_SIZE`].
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct PageIndex(pub u64);

impl PageIndex {
    /// Byte offset of the page's first byte within its block.
    pub fn to_offset(self) -> u64 {
        self.0 * PAGE_SIZE
    }
}

/// A number of pages.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct PageCount(pub u64);

impl PageCount {
    /// The number of pages that hold `bytes`, rounded up.
    pub fn from_bytes_ceil(bytes: u64) -> Self {
        Self(bytes.div_ceil(PAGE_SIZE))
    }

    /// Length in bytes.
    pub fn to_bytes(self) -> u64 {
        self.0 * PAGE_SIZE
    }
}

/// Number of a round of pre-copy; the first is 0. The last round, sent with the guest stopped, has a number of its own.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct RoundId(pub u32);

impl RoundId {
    /// The round after this one.
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for RoundId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A run of consecutive pages of one block.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct PageRun {
    /// The block.
    pub block: BlockId,
    /// First page.
    pub start: PageIndex,
    /// Number of pages, at least 1.
    pub count: PageCount,
}

impl PageRun {
    /// The page after the last one.
    pub fn end(self) -> PageIndex {
        PageIndex(self.start.0 + self.count.0)
    }
}

/// A point in time on the driver's monotonic clock, in microseconds since an arbitrary start. Cores only compare and subtract.
#[derive(Clone, Copy, Debug, Default, Eq, Ord, PartialEq, PartialOrd)]
pub struct Moment(pub u64);

impl Moment {
    /// Microseconds from `earlier` to `self`; 0 if `earlier` is later.
    pub fn micros_since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }

    /// This moment plus `micros`.
    #[must_use]
    pub fn plus_micros(self, micros: u64) -> Self {
        Self(self.0.saturating_add(micros))
    }
}

/// Identity of one migration attempt: 128 random bits chosen by the source's driver. Every connection names it.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct MigrationId(pub [u8; 16]);

impl fmt::Display for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}
