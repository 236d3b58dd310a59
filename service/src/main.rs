//! The `vmferry` binary.
fn main() {}
