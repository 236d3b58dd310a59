//! What the guest has on its disk (I2, I3): it writes and checks an image that source and target share, while it is moved.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::harness::{Accel, Launch, Machine, Vm, turn, until};
use crate::storage::Daemon;

on_both_accelerators!(
    no_block_is_lost_or_stale_however_often_the_guest_moves,
    a_guest_that_stays_keeps_its_disk_as_it_was,
    a_block_changed_behind_its_back_is_found_by_the_guest,
    no_block_is_lost_or_stale_between_two_storage_daemons,
    a_guest_that_stays_keeps_its_disk_of_another_process,
    a_guest_outlives_the_back_end_of_its_disk_and_still_moves,
);

/// 256 blocks of the guest's size.
const IMAGE_BYTES: u64 = 1 << 20;
const BLOCKS: u64 = IMAGE_BYTES / 4096;
const MOVES: usize = 8;
/// The same between two daemons, on KVM; less on host threads, whose guest is the same to a back end.
const MOVES_OF_DAEMONS: usize = 50;

/// An image in a folder of its own.
struct Image(TempDir);

impl Image {
    fn new(bytes: u64) -> Self {
        let folder = TempDir::with_prefix("vmferry-disk-").unwrap();
        let file = File::create(folder.path().join("disk.raw")).unwrap();
        file.set_len(bytes).unwrap();
        Self(folder)
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("disk.raw")
    }

    /// The same for both sides, though only a source says what its guest does.
    fn launch(&self) -> Launch {
        let path = self.path();
        Launch::default().with(&["--disk", path.to_str().unwrap(), "--workload-disk"])
    }
}

fn fast(accel: Accel) -> Machine {
    Machine {
        dirty_rate: "50000",
        working_set: "1M",
        fill: "0",
        ..Machine::small(accel)
    }
}

fn number(workload: &Value, name: &str) -> u64 {
    workload[name].as_u64().unwrap()
}

/// Waits until the guest has been twice over its whole disk from now on: every block was read back once at least. None was wrong.
fn check_whole_disk(vm: &mut Vm) {
    let before = number(&vm.query("x-query-workload"), "disk-blocks-checked");
    let workload = until("the guest has been over its disk", || {
        let workload = vm.query("x-query-workload");
        (number(&workload, "disk-blocks-checked") >= before + 2 * BLOCKS).then_some(workload)
    });
    assert_eq!(number(&workload, "disk-errors"), 0, "{workload}");
    assert_eq!(number(&workload, "errors"), 0, "{workload}");
}

fn no_block_is_lost_or_stale_however_often_the_guest_moves(accel: Accel) {
    let _turn = turn();
    let machine = fast(accel);
    let image = Image::new(IMAGE_BYTES);
    let mut vm = machine.start_source(image.launch());
    vm.warm_up();
    check_whole_disk(&mut vm);
    for _ in 0..MOVES {
        let mut target = machine.start_target("tcp:127.0.0.1:0", image.launch());
        vm.move_to(&mut target);
        vm = target;
        check_whole_disk(&mut vm);
    }
}

fn a_guest_that_stays_keeps_its_disk_as_it_was(accel: Accel) {
    let _turn = turn();
    let machine = fast(accel);
    let image = Image::new(IMAGE_BYTES);
    let mut vm = machine.start_source(image.launch());
    vm.warm_up();
    check_whole_disk(&mut vm);
    // The state of the device is refused while the guest is stopped: it knows another size.
    let longer = Image::new(2 * IMAGE_BYTES);
    let target = &mut machine.start_target("tcp:127.0.0.1:0", longer.launch());
    let error = vm.assert_migration_fails(&target.address(), "sectors");
    assert!(error.contains("virtio-blk/disk0"), "{error}");
    check_whole_disk(&mut vm);
    let mut target = machine.start_target("tcp:127.0.0.1:0", image.launch());
    vm.move_to(&mut target);
    check_whole_disk(&mut target);
}

fn a_block_changed_behind_its_back_is_found_by_the_guest(accel: Accel) {
    let _turn = turn();
    let image = Image::new(IMAGE_BYTES);
    let mut vm = fast(accel).start_source(image.launch());
    vm.warm_up();
    check_whole_disk(&mut vm);
    vm.execute("stop", json!({}));
    // An older generation of one block, as a disk that lost a write would have it: that of another block is as wrong.
    let file = File::options()
        .read(true)
        .write(true)
        .open(image.path())
        .unwrap();
    let mut block = [0; 4096];
    file.read_exact_at(&mut block, 4096).unwrap();
    file.write_all_at(&block, 77 * 4096).unwrap();
    vm.execute("cont", json!({}));
    let workload = until("the guest finds the block", || {
        let workload = vm.query("x-query-workload");
        (number(&workload, "disk-errors") > 0).then_some(workload)
    });
    assert_eq!(number(&workload, "disk-errors"), 1, "{workload}");
    assert_eq!(number(&workload, "errors"), 1, "{workload}");
}

/// A guest's disk that is served by `daemon`.
fn served_by(daemon: &Daemon) -> Launch {
    let disk = format!("vhost-user:{},id=disk", daemon.socket().display());
    Launch::default().with(&["--blk", &disk, "--workload-disk"])
}

fn image_file(folder: &Path, bytes: u64) {
    let file = File::create(folder.join("image")).unwrap();
    file.set_len(bytes).unwrap();
}

fn no_block_is_lost_or_stale_between_two_storage_daemons(accel: Accel) {
    let _turn = turn();
    let machine = fast(accel);
    let folder = TempDir::with_prefix("vmferry-disk-").unwrap();
    image_file(folder.path(), IMAGE_BYTES);
    let Some(mut daemon) = Daemon::start(folder.path(), "daemon0") else {
        return;
    };
    let mut vm = machine.start_source(served_by(&daemon));
    vm.warm_up();
    check_whole_disk(&mut vm);
    let moves = match accel {
        Accel::Kvm => MOVES_OF_DAEMONS,
        Accel::Soft => MOVES_OF_DAEMONS / 5,
    };
    for number in 1..=moves {
        let next = Daemon::start(folder.path(), &format!("daemon{number}")).unwrap();
        let mut target = machine.start_target("tcp:127.0.0.1:0", served_by(&next));
        vm.move_to(&mut target);
        vm = target;
        check_whole_disk(&mut vm);
        // The last one's guest has left.
        daemon = next;
    }
    drop(daemon);
}

fn a_guest_that_stays_keeps_its_disk_of_another_process(accel: Accel) {
    let _turn = turn();
    let machine = fast(accel);
    let folders = [IMAGE_BYTES, 2 * IMAGE_BYTES].map(|bytes| {
        let folder = TempDir::with_prefix("vmferry-disk-").unwrap();
        image_file(folder.path(), bytes);
        folder
    });
    let [image, longer] = folders.each_ref().map(TempDir::path);
    let Some(mut daemon) = Daemon::start(image, "source") else {
        return;
    };
    let mut vm = machine.start_source(served_by(&daemon));
    vm.warm_up();
    check_whole_disk(&mut vm);
    vm.execute("stop", json!({}));
    drop(daemon);
    daemon = Daemon::start(image, "source").unwrap();
    vm.execute("cont", json!({}));
    check_whole_disk(&mut vm);
    // Refused while the guest is stopped, with its requests answered and its log on: all of that is undone.
    let other = Daemon::start(longer, "other").unwrap();
    let target = &mut machine.start_target("tcp:127.0.0.1:0", served_by(&other));
    let error = vm.assert_migration_fails(&target.address(), "sectors");
    assert!(error.contains("virtio-blk/disk"), "{error}");
    check_whole_disk(&mut vm);
    let next = Daemon::start(image, "target").unwrap();
    let mut target = machine.start_target("tcp:127.0.0.1:0", served_by(&next));
    vm.move_to(&mut target);
    drop(daemon);
    check_whole_disk(&mut target);
}

fn a_guest_outlives_the_back_end_of_its_disk_and_still_moves(accel: Accel) {
    let _turn = turn();
    let machine = fast(accel);
    let folder = TempDir::with_prefix("vmferry-disk-").unwrap();
    image_file(folder.path(), IMAGE_BYTES);
    let Some(daemon) = Daemon::start(folder.path(), "daemon") else {
        return;
    };
    let mut vm = machine.start_source(served_by(&daemon));
    vm.warm_up();
    check_whole_disk(&mut vm);
    drop(daemon);
    until("its end is seen", || {
        vm.said().contains("a back end has gone").then_some(())
    });
    vm.assert_guest_works();
    let _again = Daemon::start(folder.path(), "daemon").unwrap();
    // Which of the two hangs on whether a request was under way.
    let goes_on = until("the next one is seen", || {
        let said = vm.said();
        let goes_on = said.contains("a back end is there again");
        (goes_on || said.contains("has to reset it")).then_some(goes_on)
    });
    if goes_on {
        check_whole_disk(&mut vm);
    }
    let next = Daemon::start(folder.path(), "next").unwrap();
    let mut target = machine.start_target("tcp:127.0.0.1:0", served_by(&next));
    vm.move_to(&mut target);
    let workload = target.query("x-query-workload");
    assert_eq!(number(&workload, "disk-errors"), 0, "{workload}");
    if goes_on {
        check_whole_disk(&mut target);
    }
}
