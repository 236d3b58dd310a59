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

/// The UUID of a VM, as the operator gave it.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Uuid(pub [u8; 16]);

/// A text that is no UUID.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("a UUID is written as 32 hexadecimal digits, like 12345678-1234-1234-1234-123456789abc")]
pub struct UuidError;

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, byte) in self.0.iter().enumerate() {
            if matches!(index, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl std::str::FromStr for Uuid {
    type Err = UuidError;

    fn from_str(text: &str) -> Result<Self, UuidError> {
        let groups: Vec<_> = text.split('-').map(str::len).collect();
        if !matches!(groups[..], [8, 4, 4, 4, 12] | [32]) {
            return Err(UuidError);
        }
        let digits: Option<Vec<u32>> = text
            .chars()
            .filter(|c| *c != '-')
            .map(|c| c.to_digit(16))
            .collect();
        let digits = digits.ok_or(UuidError)?;
        let mut bytes = [0; 16];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            *byte = u8::try_from(pair[0] << 4 | pair[1]).map_err(|_| UuidError)?;
        }
        Ok(Self(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_is_read_as_it_is_written() {
        let text = "01234567-89ab-cdef-0123-456789abcdef";
        let uuid: Uuid = text.parse().unwrap();
        assert_eq!(uuid.to_string(), text);
        assert_eq!(text.replace('-', "").to_uppercase().parse(), Ok(uuid));
        for bad in [
            "",
            "0",
            "01234567-89ab-cdef-0123-456789abcde",
            "01234567-89ab-cdef-0123-456789abcdeg",
            "0123456789ab-cdef-0123-4567-89abcdef",
            "01234567-89ab-cdef-0123-45678é9abcde",
        ] {
            assert_eq!(bad.parse::<Uuid>(), Err(UuidError), "{bad:?}");
        }
    }
}
