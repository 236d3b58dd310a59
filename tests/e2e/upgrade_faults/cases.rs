//! Other reasons why an upgrade fails, which no frame shows.

use std::fs::File;
use std::path::Path;

use serde_json::json;
use vmferry::machine::disk::{Disk, DiskConfig};

use crate::cli::says;
use crate::harness::{Accel, Launch, Vm};
use crate::listener::Listener;
use crate::successor::{Waiting, channels};
use crate::upgrade::{SOON, assert_upgrades, waiting};

use super::cell::machine;
use super::link::{Deed, listener_of_another_user};
use super::step::Fault;

on_both_accelerators!(every_other_reason_leaves_the_guest_where_it_is);

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

    /// Whether the guest goes on without ever having been stopped.
    fn is_noticed_early(self) -> bool {
        !matches!(self, Self::Veto | Self::DiskTaken)
    }
}

fn every_other_reason_leaves_the_guest_where_it_is(accel: Accel) {
    for case in ALL {
        run(accel, case);
    }
}

fn run(accel: Accel, case: Case) {
    let machine = machine(accel, Fault::Frame(Deed::Pass));
    let folder = tempfile::tempdir().unwrap();
    let [ours, theirs] = ["ours", "theirs"].map(|name| folder.path().join(name));
    for image in [&ours, &theirs] {
        File::create(image).unwrap().set_len(1 << 20).unwrap();
    }
    let disk = |image: &Path| format!("{},id=disk0", image.display());
    let listener = Listener::new();
    let mut launch = listener.attend(Launch::default().with(&SOON));
    if case == Case::DiskTaken {
        launch = launch.with(&["--disk", &disk(&ours)]);
    }
    let mut old = machine.start_source(launch);
    old.warm_up();
    listener.knows(&old);
    old.qmp.events.clear();
    let (_, reason) = case.name_and_reason();
    let path = old.qmp_path();
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
                return;
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
            let more = ["--disk", &disk(&theirs)];
            let new = waiting(&old, &machine, &more);
            to_waiting(&mut old, new)
        }
    };
    assert!(error.contains(reason), "{case:?}: {error}");
    println!("{accel:?}, {case:?}: {error}");
    old.query("query-status");
    let stopped = old.qmp.events.iter().any(|event| event["event"] == "STOP");
    assert_eq!(stopped, !case.is_noticed_early(), "{case:?}");
    listener.assert_order("the old process");
    old.set(json!({"mode": "normal"}));
    assert_upgrades(old);
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
