//! Frames of the data connections.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vmferry_transport::wire::fuzz;

fuzz_target!(|bytes: &[u8]| fuzz::data_frame(bytes));
