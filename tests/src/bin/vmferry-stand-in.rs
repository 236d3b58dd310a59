//! A bad successor of a program: [`vmferry_tests::stand_in`].

use std::process::ExitCode;

fn main() -> ExitCode {
    vmferry_tests::stand_in::main()
}
