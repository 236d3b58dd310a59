//! The QMP client library of QEMU's own tools against real vmferry processes: `tests/py/qmp_flow.py` in all its surroundings, and
//! `tests/py/same_sequence.py`, which drives QEMU too and wants to see the same.

use std::process::Command;

use crate::root;

/// Runs a script; it prints a line per case and fails if one does.
fn run_script(name: &str, arguments: &[&str], environment: &[(&str, &str)]) {
    let python = root().join(".cache/venv/bin/python");
    if !python.exists() {
        println!("SKIPPED: no Python environment with qemu.qmp; .ci/packages makes it");
        return;
    }
    let output = Command::new(python)
        .arg(root().join("tests/py").join(name))
        .arg("--vmferry")
        .arg(env!("CARGO_BIN_EXE_vmferry-under-test"))
        .args(arguments)
        .envs(environment.iter().copied())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}{errors}");
    // What the script could not do counts as if it were a test here.
    print!("{said}");
}

fn run(accel: &str, via: &str, environment: &[(&str, &str)]) {
    run_script(
        "qmp_flow.py",
        &["--accel", accel, "--via", via],
        environment,
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

#[test]
fn vmferry_and_qemu_go_through_the_same_statuses() {
    run_script("same_sequence.py", &["--accel", "soft"], &[]);
}

#[test]
fn vmferry_with_kvm_and_qemu_go_through_the_same_statuses() {
    if let Err(error) = std::fs::File::open("/dev/kvm") {
        println!("SKIPPED: no /dev/kvm here ({error})");
        return;
    }
    run_script("same_sequence.py", &["--accel", "kvm"], &[]);
}
