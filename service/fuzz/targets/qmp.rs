//! What a QMP client may send: a stream of objects and junk, and arguments of each command.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vmferry::qmp::fuzz;

fuzz_target!(|bytes: &[u8]| {
    fuzz::client(bytes);
    fuzz::command(bytes);
});
