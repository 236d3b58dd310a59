//! A look at two VMs, again and again: they may never run at the same time (I1).

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use serde_json::json;

use crate::qmp::{Failure, Qmp};

/// Watches over two VMs until it is ended.
pub(crate) struct Watch {
    over: Arc<AtomicBool>,
    looks: Arc<AtomicU64>,
    watcher: Option<JoinHandle<()>>,
}

impl Watch {
    /// Looks as often as possible.
    pub(crate) fn over(source: PathBuf, target: PathBuf) -> Self {
        Self::every(Duration::ZERO, source, target)
    }

    /// Looks with this pause between two looks.
    pub(crate) fn every(pause: Duration, source: PathBuf, target: PathBuf) -> Self {
        let (over, looks) = (Arc::new(AtomicBool::new(false)), Arc::default());
        let (end, count) = (Arc::clone(&over), Arc::clone(&looks));
        let watcher = thread::spawn(move || watch(pause, &source, &target, &end, &count));
        Self {
            over,
            looks,
            watcher: Some(watcher),
        }
    }

    /// How often both were looked at so far.
    pub(crate) fn looks(&self) -> u64 {
        self.looks.load(Ordering::SeqCst)
    }

    /// How often both were looked at. Fails the test if both ran.
    pub(crate) fn end(mut self) -> u64 {
        self.over.store(true, Ordering::SeqCst);
        if let Some(watcher) = self.watcher.take() {
            watcher.join().unwrap();
        }
        self.looks.load(Ordering::SeqCst)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
    }
}

/// Once the guest has run at the target it may never again run at the source.
fn watch(pause: Duration, source: &Path, target: &Path, over: &AtomicBool, looks: &AtomicU64) {
    let (Some(mut source), Some(mut target)) = (Qmp::connect(source), Qmp::connect(target)) else {
        return;
    };
    let runs = |qmp: &mut Qmp| match qmp.execute("query-status", json!({})) {
        Ok(status) => status["running"] == true,
        // The process has ended, or is about to.
        Err(Failure::Gone | Failure::Refused(_)) => false,
    };
    while !over.load(Ordering::SeqCst) {
        let at_target = runs(&mut target);
        assert!(!(at_target && runs(&mut source)), "two guests run");
        looks.fetch_add(1, Ordering::SeqCst);
        thread::sleep(pause);
    }
}
