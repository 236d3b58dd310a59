//! What the benchmarks share: parameters in a small and a full size, warm memory, raw copies to compare with.

pub mod raw_copy;
