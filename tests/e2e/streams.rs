//! VMs that go into files, pipes and commands and come back, and migrations over sockets that were passed in. Case names are the paths
//! of QEMU's test list with `/` written as `_`, and what is ours beyond them.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::harness::{Accel, Launch, Machine, Vm, turn, until};
use crate::proc::Holdings;
use crate::qmp::Failure;

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
    precopy_exec_that_ends_late,
    precopy_fd_tcp,
    precopy_fd_to_a_listener_and_to_a_listening_fd,
    precopy_fd_cancelled_and_cut,
    precopy_fd_pipe,
    precopy_fd_of_no_use,
    precopy_file_offset_fdset,
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
        Holdings::await_at_first(&mut before, source.pid());
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
    with(&good[..good.len() - 1], "the guest may run elsewhere");
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
    // A process that shall not end says what is wrong, and takes another archive, however late that was found.
    let mut target = machine.target_at("defer");
    let take = |target: &mut Vm| {
        until("memory is empty again", || {
            let arguments = json!({ "uri": address, "exit-on-error": false });
            match target.qmp.execute("migrate-incoming", arguments) {
                Ok(_) => Some(()),
                Err(Failure::Refused(reason)) if reason.contains("still being emptied") => None,
                Err(failure) => panic!("{failure:?}"),
            }
        });
    };
    let mut before = String::new();
    for at in [cut, last, good.len()] {
        let mut changed = good.clone();
        changed.push(0);
        changed.truncate(good.len().max(at + 1));
        changed[at] ^= 1;
        fs::write(&path, &changed).unwrap();
        take(&mut target);
        before = until("it has failed", || {
            let info = target.query("query-migrate");
            let reason = info["error-desc"].as_str()?;
            (info["status"] == "failed" && reason != before).then(|| reason.to_owned())
        });
        assert!(before.contains("corrupt"), "{before}");
    }
    fs::write(&path, &good).unwrap();
    take(&mut target);
    until("it is loaded", || {
        (target.status() == "completed").then_some(())
    });
    target.assert_guest_works();

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
    let before = Holdings::settled(source.pid());
    let mark: PathBuf = folder.path().join("pid");
    // It ends only when its whole process group is ended.
    let command = format!(
        "exec:echo $$ > '{}'; sleep 1000; cat >/dev/null",
        mark.display()
    );
    source.migrate(&command);
    source.wait_status("active");
    let pid: u32 = until("the command runs", || {
        fs::read_to_string(&mark).ok()?.trim().parse().ok()
    });
    source.query("migrate_cancel");
    let info = source.wait_migration();
    assert_eq!(info["status"], "cancelled", "{info}");
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
    source.assert_guest_works();
    before.await_at(source.pid());

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

/// A command that needs more time for its end than a target may take to start a guest: the outcome is asked for until it is known, or
/// until the guest is taken back, which ends the command first.
fn precopy_exec_that_ends_late(accel: Accel) {
    let (machine, folder) = (Machine::small(accel), folder());
    let path = folder.path().join("vm");
    let (go, hasty) = (folder.path().join("go"), ["--x-deadline-scale", "40"]);
    let mark = folder.path().join("pid");
    let command = |end: &str| {
        format!(
            "exec:echo $$ > '{}'; cat > '{}'; while ! test -e '{}'; do sleep 0.01; done; {end}",
            mark.display(),
            path.display(),
            go.display()
        )
    };
    let mut source = machine.start_source(Launch::default().with(&hasty));
    source.warm_up();
    // One of them here and one there, as each takes its time.
    let failure = (accel == Accel::Kvm).then_some("false");
    for (end, status) in [(failure, "failed"), (Some("true"), "completed")] {
        source.migrate(&command(end.unwrap_or_default()));
        // Four seconds pass, and the source begins to ask. It is told to nobody before twelve more.
        let unresolved = source
            .qmp
            .event(|event| event["event"] == "x-MIGRATION_UNRESOLVED");
        assert!(unresolved.is_some(), "{}", source.said());
        if end.is_some() {
            source.assert_guest_stopped();
            fs::write(&go, "").unwrap();
        } else {
            // At once, while the link that was asked on is being closed.
            source.execute("x-resolve", json!({"outcome": "source-runs"}));
        }
        let info = source.wait_migration();
        assert_eq!(info["status"], status, "{info}");
        let pid = fs::read_to_string(&mark).unwrap();
        assert!(!Path::new("/proc").join(pid.trim()).exists());
        if end.is_some() {
            fs::remove_file(&go).unwrap();
        }
        if status == "failed" {
            source.assert_guest_works();
        }
    }
    load(&machine, &file_address(&path)).assert_guest_works();
}

/// Passes a descriptor to a VM.
fn pass(vm: &mut Vm, command: &str, arguments: Value, fd: impl AsFd) -> Value {
    let passed = vm.qmp.execute_with(command, arguments, Some(fd.as_fd()));
    passed.unwrap()
}

fn getfd(vm: &mut Vm, name: &str, fd: impl AsFd) {
    pass(vm, "getfd", json!({ "fdname": name }), fd);
}

fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (ours, listener.accept().unwrap().0)
}

fn arrive_at(target: &mut Vm, address: &str) {
    target.execute("migrate-incoming", json!({ "uri": address }));
}

fn precopy_fd_tcp(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let mut source = machine.source();
    let before = Holdings::settled(source.pid());
    let mut target = machine.target_at("defer");
    let (a, b) = tcp_pair();
    getfd(&mut source, "fd-mig", a);
    getfd(&mut target, "fd-mig", b);
    arrive_at(&mut target, "fd:fd-mig");
    source.set(json!({ "multifd-channels": 4 }));
    source.move_to_at(&mut target, "fd:fd-mig");
    // Nothing of it is left: what is gone cannot be used again.
    before.await_like(source.pid(), |held| held.fds.clone());
    let reason = source.refusal("closefd", json!({ "fdname": "fd-mig" }));
    assert!(reason.contains("no file descriptor named"), "{reason}");

    // On to the next, over another kind of socket.
    let mut next = machine.target_at("defer");
    let (a, b) = UnixStream::pair().unwrap();
    getfd(&mut target, "a", a);
    getfd(&mut next, "b", b);
    arrive_at(&mut next, "fd:b");
    target.move_to_at(&mut next, "fd:a");
}

fn precopy_fd_to_a_listener_and_to_a_listening_fd(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let mut source = machine.source();
    let mut target = machine.target();
    let port = target.address().replace("tcp:", "");
    getfd(&mut source, "out", TcpStream::connect(port).unwrap());
    source.move_to_at(&mut target, "fd:out");

    let mut next = machine.target_at("defer");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("tcp:{}", listener.local_addr().unwrap());
    getfd(&mut next, "in", listener);
    arrive_at(&mut next, "fd:in");
    assert_eq!(next.address(), address);
    target.move_to(&mut next);
}

fn precopy_fd_cancelled_and_cut(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let mut source = machine.source();
    let before = Holdings::settled(source.pid());
    source.set(json!({ "max-bandwidth": 1 << 20 }));
    for cut in [false, true] {
        let mut target = machine.target_at("defer");
        let (a, b) = tcp_pair();
        let ours = a.try_clone().unwrap();
        getfd(&mut source, "a", a);
        getfd(&mut target, "b", b);
        arrive_at(&mut target, "fd:b");
        source.migrate("fd:a");
        source.wait_status("active");
        if cut {
            ours.shutdown(Shutdown::Both).unwrap();
            let info = source.wait_migration();
            source.assert_failed(&info, "migration link");
            target.assert_gave_up("closed the connection");
        } else {
            drop(ours);
            source.query("migrate_cancel");
            assert_eq!(source.wait_migration()["status"], "cancelled");
            source.assert_guest_works();
            target.assert_gave_up("cancelled by the operator");
        }
    }
    before.await_at(source.pid());

    // A target whose only socket ends before anything came gives up.
    let mut target = machine.target_at("defer");
    let (a, b) = tcp_pair();
    getfd(&mut target, "b", b);
    arrive_at(&mut target, "fd:b");
    drop(a);
    target.assert_gave_up("fd:b: the peer closed the connection");
    source.set(json!({ "max-bandwidth": 0 }));
    source.move_to(&mut machine.target());
}

fn precopy_fd_pipe(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let mut source = machine.source();
    let mut target = machine.target_at("defer");
    let (mut saved, writer) = io::pipe().unwrap();
    getfd(&mut source, "out", writer);
    let (reader, mut given) = io::pipe().unwrap();
    getfd(&mut target, "in", reader);
    // In between stands somebody who is slow, and who keeps all of it.
    let keeper = thread::spawn(move || {
        let mut all = Vec::new();
        let mut piece = [0; 65536];
        loop {
            let count = saved.read(&mut piece).unwrap();
            if count == 0 {
                return all;
            }
            all.extend_from_slice(&piece[..count]);
            given.write_all(&piece[..count]).unwrap();
        }
    });
    arrive_at(&mut target, "fd:in");
    source.migrate("fd:out");
    assert_eq!(source.wait_migration()["status"], "completed");
    let all = keeper.join().unwrap();
    assert_eq!(target.wait_migration()["status"], "completed");
    target.assert_guest_works();
    assert_eq!(all[..8], *b"VMFYSAVE");
}

fn precopy_fd_of_no_use(accel: Accel) {
    let _turn = turn();
    let (machine, folder) = (Machine::small(accel), folder());
    let mut source = machine.source();
    let migrate = |source: &mut Vm| source.refusal("migrate", json!({ "uri": "fd:x" }));
    let reason = migrate(&mut source);
    assert!(reason.contains("no file descriptor named `x`"), "{reason}");
    let file = File::create(folder.path().join("vm")).unwrap();
    getfd(&mut source, "x", file);
    let reason = migrate(&mut source);
    assert!(reason.contains("use file:/dev/fdset/N"), "{reason}");
    getfd(&mut source, "x", TcpListener::bind("127.0.0.1:0").unwrap());
    let reason = migrate(&mut source);
    assert!(reason.contains("this socket listens"), "{reason}");
    getfd(&mut source, "x", io::pipe().unwrap().0);
    source.migrate("fd:x");
    let info = source.wait_migration();
    source.assert_failed(&info, "this is the reading end of a pipe");
    // Nobody reads it.
    getfd(&mut source, "x", io::pipe().unwrap().1);
    source.migrate("fd:x");
    let info = source.wait_migration();
    source.assert_failed(&info, "fd:x: cannot be written: Broken pipe");
    source.move_to(&mut machine.target());
}

fn precopy_file_offset_fdset(accel: Accel) {
    let _turn = turn();
    let (machine, folder) = (Machine::small(accel), folder());
    let path = folder.path().join("vm");
    fs::write(&path, vec![b'x'; 8192]).unwrap();
    let writable = File::options().write(true).open(&path).unwrap();
    let mut source = machine.source();
    let set = |vm: &mut Vm, file: File| {
        let added = pass(vm, "add-fd", json!({}), file);
        format!("file:/dev/fdset/{},offset=4096", added["fdset-id"])
    };
    let address = set(&mut source, writable);
    save(&mut source, &address);
    let written = fs::read(&path).unwrap();
    assert!(written[..4096].iter().all(|byte| *byte == b'x'));
    assert_eq!(&written[4096..][..8], b"VMFYSAVE");

    let mut target = machine.target_at("defer");
    let absent = json!({ "uri": "file:/dev/fdset/77" });
    let reason = target.refusal("migrate-incoming", absent);
    assert!(reason.contains("77"), "{reason}");
    let address = set(&mut target, File::open(&path).unwrap());
    arrive_at(&mut target, &address);
    assert_eq!(target.wait_migration()["status"], "completed");
    target.assert_guest_works();
}
