//! Guest memory in huge pages, whose pool is the lab's own to set: moved, kept through a new process and a new program, and in a file that
//! outlives its VM.

use std::fs;
use std::path::Path;

use serde_json::json;

use crate::command::{assert_inside, run};
use crate::harness::{Accel, Launch, Machine, Vm, program, until};
use crate::modules::load_kvm;
use crate::new_process::Moved;

/// The pages of one guest.
const PAGES: u32 = 8;
const HUGETLBFS: &str = "/huge";

/// Sets pages aside: `used`, which are in use, and so many that are not.
fn set_pool(used: u32, pages: u32) {
    assert_inside();
    fs::write("/proc/sys/vm/nr_hugepages", (used + pages).to_string()).unwrap();
    assert_eq!(free(), pages, "the lab has too little memory in one piece");
}

/// Those that exist and are nobody's.
fn free() -> u32 {
    let count = |name: &str| {
        let text = fs::read_to_string(format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{name}"));
        text.unwrap().trim().parse::<u32>().unwrap()
    };
    count("free_hugepages") - count("resv_hugepages")
}

#[test]
fn a_guest_in_huge_pages_moves_into_others_and_leaves_none_behind() {
    load_kvm();
    let machine = Machine::emulated(Accel::Kvm);
    let huge = || Launch::default().with(&["--huge-pages", "2M"]);
    set_pool(0, 2 * PAGES);
    let mut source = machine.start_source(huge());
    source.warm_up();
    assert_eq!(free(), PAGES);
    let mut target = machine.start_target("tcp:127.0.0.1:0", huge());
    source.move_to(&mut target);
    drop(source);
    // Too few for another: nobody is started who would be killed later.
    set_pool(PAGES, PAGES - 1);
    let words = ["--accel", "kvm", "--mem", "16M"];
    let said = Vm::try_start("refused", &huge().with(&words))
        .err()
        .unwrap();
    assert!(said.contains("nr_hugepages"), "{said}");
    target.assert_guest_works();
    drop(target);
    set_pool(0, 0);
}

#[test]
fn a_guest_keeps_its_huge_pages_through_upgrades_and_moves_out_of_them_if_it_can() {
    load_kvm();
    for accel in [Accel::Soft, Accel::Kvm] {
        let machine = Machine::emulated(accel);
        // No page more than the guest has: who would take others is refused.
        set_pool(0, PAGES);
        let launch = Launch::default().with(&["--huge-pages", "2M"]);
        let mut vm = machine.start_source(launch);
        vm.warm_up();
        let moved = Moved::from(vm.qmp_path());
        assert_eq!(vm.wait_exit().code(), Some(0), "{}", vm.said());
        moved.assert_passes(2);
        let moved = moved.execs();
        moved.assert_passes(2);
        assert_eq!(free(), 0);
        let mut target = machine.target();
        let mut command = program();
        command.args(["migrate", &target.address(), "--quiet", "--qmp"]);
        let output = command.arg(vm.qmp_path()).output().unwrap();
        if accel == Accel::Soft {
            // Known, and said, before anybody tries.
            let info = moved.query("query-migrate");
            assert_ne!(info["status"], "failed", "{info}");
            let reason = info["blocked-reasons"][0].as_str().unwrap();
            assert!(reason.contains("out of huge pages") && !reason.contains("cpr-reboot"));
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(said.contains("out of huge pages"), "{said}");
            moved.assert_passes(2);
        } else {
            assert!(output.status.success(), "{output:?}");
            target.assert_guest_works();
        }
        drop(moved);
        until("the pages are free", || (free() == PAGES).then_some(()));
    }
    set_pool(0, 0);
}

#[test]
fn a_guest_is_saved_and_loaded_with_its_memory_in_a_hugetlbfs() {
    load_kvm();
    fs::create_dir_all(HUGETLBFS).unwrap();
    run("mount", &["-t", "hugetlbfs", "none", HUGETLBFS]);
    set_pool(0, PAGES);
    for accel in [Accel::Soft, Accel::Kvm] {
        let machine = Machine::emulated(accel);
        let memory = format!("{HUGETLBFS}/ram");
        let in_file = || Launch::default().with(&["--mem-path", &memory]);
        let mut source = machine.start_source(in_file());
        source.warm_up();
        source.set(json!({"mode": "cpr-reboot", "x-verify": true}));
        let archive = "/tmp/saved-in-huge-pages";
        source.migrate(&format!("file:{archive}"));
        let info = source.wait_migration();
        assert_eq!(info["status"], "completed", "{info}\n{}", source.said());
        drop(source);
        assert!(fs::metadata(archive).unwrap().len() < 1 << 20);
        let mut target = machine.start_target("defer", in_file());
        target.execute(
            "migrate-incoming",
            json!({ "uri": format!("file:{archive}") }),
        );
        assert_eq!(
            target.wait_migration()["status"],
            "completed",
            "{}",
            target.said()
        );
        target.assert_guest_works();
        drop(target);
        fs::remove_file(Path::new(&memory)).unwrap();
    }
    run("umount", &[HUGETLBFS]);
    set_pool(0, 0);
}
