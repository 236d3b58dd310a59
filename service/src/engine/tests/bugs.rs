//! Virtio devices with bugs: whoever waits is answered, and the guest goes on.

use std::time::{Duration, Instant};

use super::*;
use crate::machine::virtio::backends;
use crate::machine::virtio::tests::broken::{Bug, Buggy};

/// For what takes milliseconds.
const PATIENCE: Duration = Duration::from_secs(60);

impl Bench {
    /// With a guest that works on a disk, whose device may have a bug.
    fn with_disk(folder: &tempfile::TempDir) -> (Self, Bug) {
        let path = folder.path().join("image");
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        let mut configs = vec![path.to_str().unwrap().parse().unwrap()];
        machine::disk::name_disks(&mut configs).unwrap();
        let disks = Disks::open(&configs).unwrap();
        disks.activate().unwrap();
        let mut config = config(&[]);
        config.paused = true;
        config.machine.incoming = false;
        config.machine.workload_disk = true;
        let bug = Bug::default();
        let buggy = |disk| Box::new(Buggy(bug.clone(), disk)) as Box<dyn Backend>;
        let devices = backends(&disks).into_iter().map(buggy).collect();
        (Self::with(&config, devices), bug)
    }

    async fn next(&mut self) {
        let event = self.queue.recv().await.unwrap();
        self.engine.handle(event).await;
    }

    /// Says `stop`, and whether it has worked.
    async fn stops(&mut self) -> bool {
        let (reply, mut answer) = oneshot::channel();
        self.engine.stop(reply);
        self.next().await;
        answer.try_recv().unwrap().is_ok()
    }
}

#[test]
fn a_stop_is_answered_and_the_guest_runs_on_if_a_disk_panics_whenever_it_is_stopped() {
    run(async {
        let folder = tempfile::tempdir().unwrap();
        let (mut bench, bug) = Bench::with_disk(&folder);
        bench.engine.resume_guest();
        bench.next().await;
        let began = Instant::now();
        // Its driver is ready.
        while bug.heard("open") == 0 {
            assert!(began.elapsed() < PATIENCE);
            std::thread::sleep(Duration::from_millis(1));
        }
        bug.set(Some("stop"));
        for _ in 0..2 {
            assert!(!bench.stops().await);
            let guest = &bench.engine.guest;
            assert!(matches!(guest, Guest::Running), "{guest:?}");
        }
        bug.set(None);
        assert!(bench.stops().await);
        let guest = &bench.engine.guest;
        assert!(matches!(guest, Guest::Stopped(_)), "{guest:?}");
    })
    .unwrap();
}
