//! Programs of the lab: busybox, iproute2.

use std::process::Command;

/// Runs a program that must succeed; returns what it printed.
pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    match attempt(program, arguments) {
        Ok(said) => said,
        Err(said) => panic!("{program} {}: {said}", arguments.join(" ")),
    }
}

/// The same for one that may fail: then, what it complained of.
pub(crate) fn attempt(program: &str, arguments: &[&str]) -> Result<String, String> {
    assert_inside();
    let output = Command::new(program)
        .args(arguments)
        .output()
        .map_err(|error| error.to_string())?;
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if output.status.success() {
        Ok(said(&output.stdout))
    } else {
        Err(format!("{}: {}", output.status, said(&output.stderr)))
    }
}

/// Cases change their machine: they run in the lab or not at all.
pub(crate) fn assert_inside() {
    let parameters = std::fs::read_to_string("/proc/cmdline").unwrap();
    assert!(
        parameters.contains(" lab."),
        "this is not the lab: start the case with tests/lab/run"
    );
}
