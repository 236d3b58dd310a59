//! Other reasons why an upgrade fails, which no frame shows.

use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::thread;
use std::time::Instant;

use serde_json::json;
use vmferry::machine::disk::{Disk, DiskConfig};

use crate::cli::says;
use crate::grid::Grid;
use crate::harness::{Accel, Launch, Vm, kvm_is_here, turn};
use crate::listener::Listener;
use crate::successor::{Waiting, channels};
use crate::upgrade::{SOON, assert_upgrades, waiting};

use super::cell::{Seen, machine};
use super::fault::{Fault, Outcome};
use super::link::Deed;

/// Cases under way at the same time.
const WORKERS: usize = 4;

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Case {
    NoProgram,
    OtherProgram,
    OtherUser,
    OtherSize,
    OtherDevices,
    DiskMissing,
    Veto,
    DiskTaken,
}

pub(super) const ALL: [Case; 8] = [
    Case::NoProgram,
    Case::OtherProgram,
    Case::OtherUser,
    Case::OtherSize,
    Case::OtherDevices,
    Case::DiskMissing,
    Case::Veto,
    Case::DiskTaken,
];

/// Nobody, on most systems.
const ANOTHER: u32 = 65534;

impl Case {
    /// What is wrong, and a part of the reason that is given.
    pub(super) fn name_and_reason(self) -> (&'static str, &'static str) {
        match self {
            Self::NoProgram => (
                "the new program does not exist",
                "cannot start /nowhere/vmferry",
            ),
            Self::OtherProgram => ("it is not vmferry", "/bin/false, ended with exit status: 1"),
            Self::OtherUser => ("the new process is another user's", "runs as user 65534"),
            Self::OtherSize => ("it was started for a VM of another size", "bytes of memory"),
            Self::OtherDevices => ("it was started with another device", "disk0"),
            Self::DiskMissing => ("it cannot open a disk", "opening of /nowhere/disk failed"),
            Self::Veto => ("somebody who is told objects", "not now"),
            Self::DiskTaken => (
                "a block device cannot be activated there",
                "another process holds the lock",
            ),
        }
    }

    /// What becomes of the guest: most of them are noticed before it is stopped.
    pub(super) fn outcome(self) -> Outcome {
        match self {
            Self::Veto | Self::DiskTaken => Outcome::Stays,
            _ => Outcome::RunsOn,
        }
    }
}

/// A table with a row for each.
pub(super) fn grid() -> Grid<Case> {
    let rows = ALL.map(|case| (case.name_and_reason().0, vec![Some(case)]));
    Grid::new("Reason", &["cpr-transfer".to_owned()], rows.to_vec())
}

fn assert_all_as_designed(accel: Accel) {
    let file = format!("faults-in-place-reasons-{}.md", accel.name());
    let wanted = grid().squares();
    grid().assert_all(&file, WORKERS, wanted, |case, (): &mut ()| {
        let seen = run(accel, case);
        let (_, reason) = case.name_and_reason();
        match seen.outcome == case.outcome() && seen.error.contains(reason) {
            true => Ok(seen),
            false => Err(format!("{seen:?}")),
        }
    });
}

#[test]
fn every_other_reason_leaves_the_guest_where_it_is() {
    let _turn = turn();
    assert_all_as_designed(Accel::Soft);
}

#[test]
fn every_other_reason_leaves_the_guest_where_it_is_on_kvm_too() {
    if kvm_is_here() {
        let _turn = turn();
        assert_all_as_designed(Accel::Kvm);
    }
}

fn run(accel: Accel, case: Case) -> Seen {
    let machine = machine(accel, Fault::Frame(Deed::Pass));
    let folder = tempfile::tempdir().unwrap();
    let [ours, theirs] = ["ours", "theirs"].map(|name| folder.path().join(name));
    for image in [&ours, &theirs] {
        File::create(image).unwrap().set_len(1 << 20).unwrap();
    }
    let disk = |image: &Path| format!("{},id=disk0", image.display());
    let listener = Listener::new();
    let mut launch = listener.attend(Launch::default());
    if case == Case::DiskTaken {
        launch = launch.with(&["--disk", &disk(&ours)]).with(&SOON);
    }
    let mut old = machine.start_source(launch);
    old.warm_up();
    listener.knows(&old);
    old.qmp.events.clear();
    let path = old.qmp_path();
    let began = Instant::now();
    let error = match case {
        Case::NoProgram => says(&path, &["upgrade", "--binary", "/nowhere/vmferry"], 1),
        Case::OtherProgram => says(&path, &["upgrade", "--binary", "/bin/false"], 1),
        Case::Veto => {
            listener.veto(true);
            let said = says(&path, &["upgrade"], 1);
            listener.veto(false);
            said
        }
        Case::OtherUser => {
            let Some(_listener) = listener_of_another_user(folder.path(), ANOTHER) else {
                println!("SKIPPED: only root can play another user");
                return Seen {
                    outcome: case.outcome(),
                    took: began.elapsed(),
                    error: format!("not run: {}", case.name_and_reason().1),
                };
            };
            hand_over(&mut old, &channels(folder.path()))
        }
        Case::OtherSize => {
            let larger = crate::harness::Machine {
                mem: "32M",
                ..machine.clone()
            };
            let new = waiting(&old, &larger, &[]);
            to_waiting(&mut old, new)
        }
        Case::OtherDevices => {
            let more = ["--disk", &disk(&theirs)];
            let new = waiting(&old, &machine, &more);
            to_waiting(&mut old, new)
        }
        Case::DiskMissing => {
            let missing = ["--disk", &disk(Path::new("/nowhere/disk"))];
            let new = waiting(&old, &machine, &missing);
            to_waiting(&mut old, new)
        }
        Case::DiskTaken => {
            // Alike, and somebody else's.
            let third_party = Disk::open(DiskConfig {
                path: theirs.clone(),
                id: "third-party".to_owned(),
                read_only: false,
            })
            .unwrap();
            third_party.activate().unwrap();
            let theirs = disk(&theirs);
            // It stays for a while, to be asked.
            let more = [&["--disk", &theirs], &SOON[..]].concat();
            let new = waiting(&old, &machine, &more);
            to_waiting(&mut old, new)
        }
    };
    let took = began.elapsed();
    old.query("query-status");
    let stopped = old.qmp.events.iter().any(|event| event["event"] == "STOP");
    listener.assert_order("the old process");
    old.set(json!({"mode": "normal"}));
    assert_upgrades(old);
    Seen {
        outcome: match stopped {
            true => Outcome::Stays,
            false => Outcome::RunsOn,
        },
        took,
        error,
    }
}

/// An upgrade that fails; the reason.
fn hand_over(old: &mut Vm, channels: &serde_json::Value) -> String {
    old.set(json!({"mode": "cpr-transfer"}));
    old.execute("migrate", json!({ "channels": channels }));
    let info = old.wait_migration();
    assert_eq!(info["status"], "failed", "{info}");
    info["error-desc"].as_str().unwrap().to_owned()
}

fn to_waiting(old: &mut Vm, mut new: Waiting) -> String {
    let error = hand_over(old, &channels(new.folder()));
    assert_eq!(new.wait_exit().code(), Some(1), "{error}");
    error
}

/// A socket whose listener is another user, as the kernel tells whoever connects.
fn listener_of_another_user(folder: &Path, uid: u32) -> Option<UnixListener> {
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o777)).unwrap();
    let path = folder.join("cpr");
    // Threads have their own identity for the kernel, and this one ends with it.
    thread::spawn(move || {
        let uid = rustix::fs::Uid::from_raw(uid);
        rustix::thread::set_thread_res_uid(uid, uid, uid).ok()?;
        Some(UnixListener::bind(path).unwrap())
    })
    .join()
    .unwrap()
}
