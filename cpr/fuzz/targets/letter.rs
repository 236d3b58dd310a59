//! What might be in the memfd that a program leaves for the next.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vmferry_cpr::fuzz;

fuzz_target!(|bytes: &[u8]| fuzz::letter(bytes));
