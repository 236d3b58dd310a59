//! The QMP client library of QEMU's own tools against real vmferry processes: `tests/py/qmp_flow.py` in all its surroundings.

use std::process::Command;

use crate::root;

/// Runs the script; it prints a line per case and fails if one does.
fn run(accel: &str, via: &str, environment: &[(&str, &str)]) {
    let python = root().join(".cache/venv/bin/python");
    if !python.exists() {
        println!("SKIPPED: no Python environment with qemu.qmp; .ci/packages makes it");
        return;
    }
    let output = Command::new(python)
        .arg(root().join("tests/py/qmp_flow.py"))
        .arg("--vmferry")
        .arg(env!("CARGO_BIN_EXE_vmferry-under-test"))
        .args(["--accel", accel, "--via", via])
        .envs(environment.iter().copied())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn the_python_client_drives_migrations_over_tcp() {
    run("soft", "tcp", &[]);
}

#[test]
fn the_python_client_drives_migrations_over_unix_sockets_without_io_uring() {
    run("soft", "unix", &[("VMFERRY_NO_URING", "1")]);
}

#[test]
fn the_python_client_drives_migrations_of_kvm_guests() {
    if let Err(error) = std::fs::File::open("/dev/kvm") {
        println!("SKIPPED: no /dev/kvm here ({error})");
        return;
    }
    run("kvm", "tcp", &[]);
}
