//! Loading modules of the lab's kernel. What is there is named in `modules.txt`.

use std::path::Path;

use rustix::thread::{CpuSet, sched_setaffinity};

use crate::command::{assert_inside, run};

/// Loads a module with all that it depends on. One that is loaded already stays as it is.
pub(crate) fn load(name: &str) {
    run("modprobe", &[name]);
}

/// Loads a module whose first user opens `device`, and checks that it can be opened.
pub(crate) fn load_for(device: &str, name: &str) {
    load(name);
    assert!(
        Path::new(device).exists(),
        "{name} is loaded and there is no {device}"
    );
    if let Err(error) = std::fs::File::options().read(true).write(true).open(device) {
        panic!("{device}: {error}");
    }
}

/// Loads KVM for the case that calls, which runs on one processor of the lab from now on, with all that it starts. The emulator walks nested
/// page tables on one of its processors while the kernel changes them on another, and seldom gets that wrong: on a busy host guests ended
/// in a triple fault or stood still (4 of 60 runs of one unit test and 1 of 6 of a Linux guest; never outside of the lab).
pub(crate) fn load_kvm() {
    assert_inside();
    load_for("/dev/kvm", "kvm_amd");
    let mut first = CpuSet::new();
    first.set(0);
    // Of this thread: each case has its own.
    sched_setaffinity(None, &first).unwrap();
}
