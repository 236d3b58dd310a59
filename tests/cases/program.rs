//! The `vmferry` program under test, as built from the present sources.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Root of the repository.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_path_buf()
}

/// The program, built first if it is missing or older than its sources, with the optimisation of this test.
pub(crate) fn vmferry() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        // The same selection as `.ci/check` builds: another one has other features and would build everything a second time.
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args(["build", "--quiet", "--workspace", "--bins"]);
        if !cfg!(debug_assertions) {
            cargo.arg("--release");
        }
        let status = cargo.current_dir(root()).status().unwrap();
        assert!(status.success(), "vmferry could not be built");
        // This test is PROFILE/deps/cases-HASH.
        let test = std::env::current_exe().unwrap();
        let program = test.ancestors().nth(2).unwrap().join("vmferry");
        assert!(program.exists(), "no {}", program.display());
        program
    })
}
