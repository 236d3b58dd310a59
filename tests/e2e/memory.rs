//! A target that runs out of memory: the guest goes on at the source.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use crate::harness::{Accel, Launch, Machine, whole_machine};

on_both_accelerators!(a_target_without_memory_leaves_the_guest_running);

/// Where the memory controller is, of either generation.
const ROOTS: [(&str, &str); 2] = [
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
    ("/sys/fs/cgroup", "memory.max"),
];

/// A group of processes that may use only so much memory; gone on drop.
struct Group(PathBuf);

impl Group {
    /// `None`, and a reason on the output, where this process may not make one.
    fn new(bytes: u64) -> Option<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("vmferry-e2e-{}x{number}", std::process::id());
        for (root, limit) in ROOTS {
            let group = Self(Path::new(root).join(&name));
            if fs::create_dir(&group.0).is_ok()
                && fs::write(group.0.join(limit), bytes.to_string()).is_ok()
            {
                // Without swap, where that is counted.
                let _ = fs::write(group.0.join("memory.swap.max"), "0");
                return Some(group);
            }
        }
        println!("SKIPPED: no memory cgroup can be made here");
        None
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        for _ in 0..100 {
            // Busy until the last process in it is gone.
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
}

fn a_target_without_memory_leaves_the_guest_running(accel: Accel) {
    let _turn = whole_machine();
    let machine = Machine {
        mem: "256M",
        fill: "128M",
        ..Machine::small(accel)
    };
    let Some(group) = Group::new(64 << 20) else {
        return;
    };
    let mut source = machine.source();
    // Enters the group, and then becomes the program.
    let enter = format!("echo $$ > {}/cgroup.procs; exec \"$@\"", group.0.display());
    let launch = Launch::default().through(&["sh", "-c", &enter, "sh"]);
    let mut target = machine.start_target("tcp:127.0.0.1:0", launch);
    let error = source.assert_migration_fails(&target.address(), "");
    // The kernel kills it, or it noticed and said so.
    println!("{error}");
    let status = target.wait_exit();
    assert_ne!(status.code(), Some(0), "{}", target.said());
    source.move_to(&mut machine.target());
}
