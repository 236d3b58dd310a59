//! Cases for the kernel lab: tests that need interfaces which the machine at hand lacks, and which therefore run inside an emulated
//! one. `tests/lab/run` builds this, boots the lab and runs it there; README.md beside this file says how to write a case.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on panics; clippy exempts test functions but not what they call"
)]

mod command; // programs of the lab
mod modules; // loading modules of its kernel

mod kernel; // what the lab promises to everything else here
