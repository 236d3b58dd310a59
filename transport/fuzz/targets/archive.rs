//! Saved VMs: bytes as they are, and frames behind right checksums.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vmferry_transport::wire::fuzz;

fuzz_target!(|bytes: &[u8]| {
    fuzz::archive(bytes);
    fuzz::archive_frames(bytes);
});
