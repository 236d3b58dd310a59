//! I5: an old process that is told to end while it does not know what became of its guest. It waits for the answer; told twice it does not,
//! and leaves the new process the paths at which clients find it.

use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use crate::harness::{Accel, Launch, PATIENCE, Vm, turn};
use crate::listener::Listener;
use crate::successor::Waiting;
use crate::upgrade::{SOON, scrape, waiting};

use super::cell::{machine, moved};
use super::fault::Fault;
use super::link::{Deed, Link};
use super::step::Step;

/// Who says it twice within this time is in no hurry.
const SAME_WISH: Duration = Duration::from_millis(1100);

on_both_accelerators!(
    an_old_process_that_is_told_to_end_in_doubt_hears_first_what_became_of_its_guest,
    an_old_process_that_is_told_so_twice_leaves_the_new_one_its_paths,
);

/// An old process in doubt: the guest runs in the new one, and the word of that does not come.
struct Doubt {
    old: Vm,
    new: Waiting,
    listener: Listener,
    metrics: PathBuf,
    _link: Link,
}

impl Doubt {
    fn new(accel: Accel) -> Self {
        let machine = machine(accel, Fault::Frame(Deed::Keep));
        let listener = Listener::new();
        let folder = tempfile::tempdir().unwrap().keep();
        let metrics = folder.join("metrics");
        let address = format!("unix:{}", metrics.display());
        let launch = Launch::default().with(&SOON).with(&["--metrics", &address]);
        let mut old = machine.start_source(listener.attend(launch));
        old.warm_up();
        old.set(json!({"mode": "cpr-transfer"}));
        let new = waiting(&old, &machine, &["--metrics", &address]);
        let link = Link::new(new.folder(), Step::Running);
        old.execute("migrate", json!({"channels": link.channels()}));
        assert!(link.wait(PATIENCE), "{}", old.said());
        link.go(Deed::Keep);
        Self {
            old,
            new,
            listener,
            metrics,
            _link: link,
        }
    }

    fn tell(&self) {
        let pid = Pid::from_raw(self.old.pid().cast_signed()).unwrap();
        kill_process(pid, Signal::TERM).unwrap();
    }

    /// The old process has ended, and the new one is where it was.
    fn assert_moved(mut self) {
        assert_eq!(self.old.wait_exit().code(), Some(0), "{}", self.old.said());
        assert!(scrape(&self.metrics).starts_with("HTTP/1.1 200"));
        moved(&self.old, &mut self.new);
        std::fs::remove_dir_all(self.metrics.parent().unwrap()).unwrap();
    }
}

fn an_old_process_that_is_told_to_end_in_doubt_hears_first_what_became_of_its_guest(accel: Accel) {
    let _turn = turn();
    let doubt = Doubt::new(accel);
    doubt.tell();
    doubt.listener.assert_order("the old process");
    doubt.assert_moved();
}

fn an_old_process_that_is_told_so_twice_leaves_the_new_one_its_paths(accel: Accel) {
    let _turn = turn();
    let mut doubt = Doubt::new(accel);
    doubt.tell();
    let event = doubt.old.qmp.event(|event| event["event"] == "SHUTDOWN");
    assert!(event.is_some(), "{}", doubt.old.said());
    thread::sleep(SAME_WISH);
    doubt.tell();
    doubt.assert_moved();
}
