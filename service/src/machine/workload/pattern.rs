//! What the workload writes: 64-bit words that tell which page, which pass and which place they belong to.
//!
//! - A page of the **working set** is stamped in pass n with one word per 64 bytes, so that a page mixed from two passes is found
//!   whatever cache line the seam lies at.
//! - A page of the **fill** is pseudo-random throughout, cannot be compressed, and any word can be computed by itself.
//!
//! The guest program computes the same values in assembly; a test compares the two. Page numbers are guest-physical address / 4096.

/// Words per page that carry the stamp.
pub const STAMPS_PER_PAGE: u64 = 64;
/// Bytes from one stamp to the next.
pub const STAMP_STRIDE_BYTES: u64 = 64;
/// Words per page of the fill.
pub const FILL_WORDS_PER_PAGE: u64 = 512;

// Odd constants without structure, so that no small change of page, pass and place together gives the same word.
pub(super) const STAMP_PAGE: u64 = 0x9e6c_63d0_a54b_13e7;
pub(super) const STAMP_PASS: u64 = 0xc2b2_ae3d_27d4_eb4f;
pub(super) const STAMP_WORD: u64 = 0x1656_67b1_9e37_79f9;
pub(super) const FILL_STEP: u64 = 0x9e37_79b9_7f4a_7c15;
pub(super) const FILL_SEED: u64 = 0x5851_f42d_4c95_7f2d;
pub(super) const FILL_MIX: u64 = 0xd6e8_feb8_6659_fd93;

/// Stamp number `word` (0 to 63) of page `page` in pass `pass` (the first pass is 1).
pub fn stamp(page: u64, pass: u64, word: u64) -> u64 {
    page.wrapping_mul(STAMP_PAGE)
        .wrapping_add(pass.wrapping_mul(STAMP_PASS))
        .wrapping_add(word.wrapping_mul(STAMP_WORD))
}

/// Word number `word` (0 to 511) of fill page `page`.
pub fn fill_word(page: u64, word: u64) -> u64 {
    let counter = page
        .wrapping_mul(FILL_WORDS_PER_PAGE)
        .wrapping_add(word)
        .wrapping_mul(FILL_STEP)
        .wrapping_add(FILL_SEED);
    let mixed = (counter ^ (counter >> 32)).wrapping_mul(FILL_MIX);
    mixed ^ (mixed >> 29)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn stamps_differ_between_neighbouring_pages_passes_and_places() {
        let mut seen = HashSet::new();
        for page in 1024..1056 {
            for pass in 1..33 {
                for word in 0..STAMPS_PER_PAGE {
                    assert!(seen.insert(stamp(page, pass, word)));
                }
            }
        }
    }

    #[test]
    fn fill_is_random_in_every_bit_and_never_zero_here() {
        let mut ones = [0_u32; 64];
        let mut bytes = [0_u32; 256];
        for page in 0..64 {
            for word in 0..FILL_WORDS_PER_PAGE {
                let value = fill_word(page, word);
                assert_ne!(value, 0);
                for (bit, count) in ones.iter_mut().enumerate() {
                    *count += u32::from(value >> bit & 1 == 1);
                }
                for byte in value.to_le_bytes() {
                    bytes[usize::from(byte)] += 1;
                }
            }
        }
        // 32768 words: each bit set in half of them, each byte value equally often, within six standard deviations.
        assert!(ones.iter().all(|count| (15_840..16_930).contains(count)));
        assert!(bytes.iter().all(|count| (830..1_220).contains(count)));
    }
}
