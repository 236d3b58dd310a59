//! Control frames: a stream cut into pieces, and one frame behind a right checksum.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vmferry_transport::wire::fuzz;

fuzz_target!(|bytes: &[u8]| {
    fuzz::control_stream(bytes);
    fuzz::control_frame(bytes);
});
