//! All integration tests in one binary, so that linking stays cheap. One line per module: what it proves.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on panics; clippy exempts test functions but not what they call"
)]

mod archive_compat; // I5: the archive format stays what it is, corrupt archives are refused for the right reason
mod operators; // I1, I3, I6, I7 and the disks: any command at any step
mod qemu_table; // the table of which test covers which of QEMU's
mod qmp_client; // QEMU's own QMP client drives migrations
mod regressions; // runs that once broke an invariant
mod simulation; // I1, I2, I3, I5, I6, I7: both cores in one world with every kind of fault
mod state_compat; // I5: what builds of the last two versions have saved is loaded
mod tap_net; // I2, I5: a network interface whose packets the VMM moves loses none, and survives its driver
mod tidy; // rules of the house that the compiler does not check
mod wire_compat; // I5: the wire format stays what it is, corrupt frames are refused for the right reason

/// Root of the repository.
fn root() -> std::path::PathBuf {
    let tests = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().unwrap().to_path_buf()
}
