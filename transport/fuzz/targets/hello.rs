//! The hello: the longest and the first thing that a stranger may send.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vmferry_transport::wire::fuzz;

fuzz_target!(|bytes: &[u8]| fuzz::hello(bytes));
