//! The `vmferry` binary; everything is in [`vmferry::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    vmferry::cli::main()
}
