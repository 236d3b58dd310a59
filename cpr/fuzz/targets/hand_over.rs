//! What another process may say on the `cpr` socket.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vmferry_cpr::fuzz;

fuzz_target!(|bytes: &[u8]| {
    fuzz::stream(bytes);
    fuzz::conversation(bytes);
});
