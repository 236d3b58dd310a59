//! VMs that go into files, pipes and commands and come back, and migrations over sockets that were passed in. Case names are the paths
//! of QEMU's test list with `/` written as `_`, and what is ours beyond them.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::harness::{Accel, Machine, Vm, turn};

on_both_accelerators!(
    precopy_file,
    precopy_file_offset,
    precopy_file_offset_bad,
    precopy_file_connect_outgoing_fd_leak,
    precopy_file_of_a_stopped_guest,
    precopy_file_that_is_broken,
    precopy_file_that_does_not_fit,
    precopy_exec,
    precopy_exec_that_fails,
    precopy_exec_cancelled_while_it_takes_nothing,
);

/// Saves the guest; the final record.
fn save(source: &mut Vm, address: &str) -> Value {
    source.set(json!({ "x-verify": true }));
    source.migrate(address);
    let info = source.wait_migration();
    assert_eq!(info["status"], "completed", "{info}\n{}", source.said());
    assert_eq!(source.runstate(), "postmigrate");
    source.assert_guest_stopped();
    info
}

/// Loads the guest from `address` into a new VM.
fn load(machine: &Machine, address: &str) -> Vm {
    let mut target = machine.target_at("defer");
    target.execute("migrate-incoming", json!({ "uri": address }));
    let info = target.wait_migration();
    assert_eq!(info["status"], "completed", "{info}\n{}", target.said());
    target
}

/// Loading from `address` fails with a reason that contains `part`, and the process ends.
fn load_fails(machine: &Machine, address: &str, part: &str) {
    let mut target = machine.target_at("defer");
    target.execute("migrate-incoming", json!({ "uri": address }));
    target.assert_gave_up(part);
}

fn folder() -> TempDir {
    TempDir::with_prefix("vmferry-streams-").unwrap()
}

fn file_address(path: &Path) -> String {
    format!("file:{}", path.display())
}

fn precopy_file(accel: Accel) {
    let _turn = turn();
    let (machine, folder) = (Machine::small(accel), folder());
    let path = folder.path().join("vm");
    let address = file_address(&path);
    let mut source = machine.source();
    save(&mut source, &address);
    assert_eq!(
        fs::metadata(&path).unwrap().permissions().mode() & 0o777,
        0o600
    );
    let passes = source.query("x-query-workload")["passes"].as_u64().unwrap();
    drop(source);
    let mut target = load(&machine, &address);
    target.assert_guest_works();
    assert!(target.passes() > passes);
    // The archive is still good, and what came from it moves on.
    target.move_to(&mut machine.target());
    load(&machine, &address).assert_guest_works();
}

fn precopy_file_of_a_stopped_guest(accel: Accel) {
    let _turn = turn();
    let (machine, folder) = (Machine::small(accel), folder());
    let address = file_address(&folder.path().join("vm"));
    let mut source = machine.source();
    source.query("stop");
    save(&mut source, &address);
    let mut target = load(&machine, &address);
    assert_eq!(target.runstate(), "paused");
    target.assert_guest_stopped();
    target.query("cont");
    target.assert_guest_works();
}

fn precopy_file_offset(accel: Accel) {
    let _turn = turn();
    let (machine, folder) = (Machine::small(accel), folder());
    let path = folder.path().join("vm");
    // What was there before is kept up to the offset and gone behind it.
    fs::write(&path, vec![b'x'; 96 << 20]).unwrap();
    let address = format!("{},offset=64K", file_address(&path));
    let mut source = machine.source();
    save(&mut source, &address);
    let written = fs::read(&path).unwrap();
    assert!(written[..64 << 10].iter().all(|byte| *byte == b'x'));
    assert_eq!(&written[64 << 10..][..8], b"VMFYSAVE");
    assert!(written.len() < 64 << 20, "{}", written.len());
    load_fails(&machine, &file_address(&path), "this is no vmferry archive");
    load(&machine, &address).assert_guest_works();
}

fn precopy_file_offset_bad(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let mut source = machine.source();
    let reason = source.refusal("migrate", json!({ "uri": "file:/tmp/vm,offset=0x20M" }));
    assert!(reason.contains("`0x20M` is no offset"), "{reason}");
    assert_eq!(source.status(), "none");
    source.assert_guest_works();
}

fn precopy_file_connect_outgoing_fd_leak(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let mut source = machine.source();
    let mut before = None;
    for _ in 0..5 {
        source.migrate("file:/dev/full");
        let info = source.wait_migration();
        source.assert_failed(&info, "No space left on device");
        // The first may have opened what stays open.
        let holdings = source.holdings().counted();
        assert_eq!(*before.get_or_insert_with(|| holdings.clone()), holdings);
    }
    source.migrate("file:/nowhere/vm");
    let info = source.wait_migration();
    source.assert_failed(&info, "file:/nowhere/vm: cannot be opened: No such file");
    source.move_to(&mut machine.target());
}

fn precopy_file_that_is_broken(accel: Accel) {
    let _turn = turn();
    let (machine, folder) = (Machine::small(accel), folder());
    let path = folder.path().join("vm");
    let address = file_address(&path);
    let mut source = machine.source();
    save(&mut source, &address);
    let good = fs::read(&path).unwrap();

    let with = |bytes: &[u8], part: &str| {
        fs::write(&path, bytes).unwrap();
        load_fails(&machine, &address, part);
    };
    let cut = good.len() / 2;
    with(
        &good[..cut],
        &format!("cannot load {address}: at byte {cut}: incomplete"),
    );
    with(&good[..good.len() - 1], "incomplete");
    with(&[], "at byte 0: incomplete");
    let mut longer = good.clone();
    longer.push(0);
    with(
        &longer,
        &format!("at byte {}: corrupt: bytes follow", good.len()),
    );
    let mut changed = good.clone();
    changed[cut] ^= 1;
    with(&changed, "corrupt");
    let mut changed = good.clone();
    let last = changed.len() - 1;
    changed[last] ^= 1;
    with(&changed, "corrupt");
    fs::write(&path, &good).unwrap();
    load(&machine, &address).assert_guest_works();
    let mut target = machine.target_at("defer");
    let absent = format!("{address}2");
    let reason = target.refusal("migrate-incoming", json!({ "uri": absent }));
    assert!(reason.contains("No such file"), "{reason}");
    // Nothing is lost: another try is welcome.
    target.execute("migrate-incoming", json!({ "uri": address }));
    assert_eq!(target.wait_migration()["status"], "completed");
}

fn precopy_file_that_does_not_fit(accel: Accel) {
    let _turn = turn();
    let (machine, folder) = (Machine::small(accel), folder());
    let address = file_address(&folder.path().join("vm"));
    save(&mut machine.source(), &address);
    let other = Machine {
        mem: "96M",
        ..machine
    };
    load_fails(
        &other,
        &address,
        "67108864 bytes at the source and 100663296",
    );
}

fn precopy_exec(accel: Accel) {
    let _turn = turn();
    let (machine, folder) = (Machine::small(accel), folder());
    let path = folder.path().join("vm.gz");
    let mut source = machine.source();
    save(
        &mut source,
        &format!("exec:gzip -1c > '{}'", path.display()),
    );
    assert_eq!(fs::read(&path).unwrap()[..2], [0x1f, 0x8b]);
    let mut target = load(&machine, &format!("exec:gzip -dc '{}'", path.display()));
    target.assert_guest_works();
}

fn precopy_exec_that_fails(accel: Accel) {
    let _turn = turn();
    let (machine, folder) = (Machine::small(accel), folder());
    let path = folder.path().join("vm");
    let mut source = machine.source();
    for (command, part) in [
        ("exec:exit 3", "the command failed (exit status: 3)"),
        ("exec:head -c 100000 >/dev/null; exit 4", "(exit status: 4)"),
        // All of it is taken, and then it fails: the guest must not be lost.
        ("exec:cat >/dev/null; exit 5", "(exit status: 5)"),
        ("exec:kill -9 $$", "(signal: 9 (SIGKILL))"),
    ] {
        source.migrate(command);
        let info = source.wait_migration();
        source.assert_failed(&info, part);
    }
    save(&mut source, &file_address(&path));
    let cat = |rest: &str| format!("exec:cat '{}'{rest}", path.display());
    load_fails(&machine, &cat("; exit 6"), "(exit status: 6)");
    load_fails(&machine, &cat("; echo more"), "bytes follow the end");
    load_fails(&machine, "exec:exit 7", "(exit status: 7)");
    load_fails(&machine, "exec:true", "at byte 0: incomplete");
    load(&machine, &cat("")).assert_guest_works();
}

fn precopy_exec_cancelled_while_it_takes_nothing(accel: Accel) {
    let _turn = turn();
    let (machine, folder) = (Machine::small(accel), folder());
    let mut source = machine.source();
    let before = source.holdings().counted();
    let mark: PathBuf = folder.path().join("pid");
    // It ends only when its whole process group is ended.
    let command = format!(
        "exec:echo $$ > '{}'; sleep 1000; cat >/dev/null",
        mark.display()
    );
    source.migrate(&command);
    source.wait_status("active");
    let pid: u32 = crate::harness::until("the command runs", || {
        fs::read_to_string(&mark).ok()?.trim().parse().ok()
    });
    source.query("migrate_cancel");
    let info = source.wait_migration();
    assert_eq!(info["status"], "cancelled", "{info}");
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
    source.assert_guest_works();
    assert_eq!(source.holdings().counted(), before);

    // A save that was cancelled leaves nothing to load.
    let path = folder.path().join("vm");
    source.set(json!({ "max-bandwidth": 1 << 20 }));
    source.migrate(&file_address(&path));
    source.wait_status("active");
    source.query("migrate_cancel");
    assert_eq!(source.wait_migration()["status"], "cancelled");
    load_fails(&machine, &file_address(&path), "incomplete");
    source.set(json!({ "max-bandwidth": 0 }));
    source.move_to(&mut machine.target());
}
