//! Abort and drop end everything, at any moment, and leave nothing behind.

use std::time::Instant;

use super::*;
use crate::memory::extents::tests::{memfd_ram, run};

#[test]
fn abort_joins_all_threads_at_any_moment() {
    let mut random = Random(11);
    for (transport, backend) in EVERYWHERE {
        for attempt in 0..12 {
            let (source, target) = (memfd_ram(&[4000]), memfd_ram(&[4000]));
            for index in (0..4000).step_by(2) {
                write_page(&source, 0, index, index);
            }
            let config = SenderConfig {
                // Some of them while threads wait for bandwidth.
                bandwidth: Arc::new(BandwidthLimit::new([0, 1000, 50_000_000][attempt % 3])),
                checksum: attempt % 2 == 0,
                ..sender_config(backend)
            };
            let mut ferry = Ferry::new(transport, 3, config, source, target);
            let work = RoundWork::all(Extents::of(&ferry.source).unwrap());
            ferry.queue(work, attempt % 4 == 0);
            std::thread::sleep(Duration::from_micros(random.below(4000)));
            if attempt % 2 == 0 {
                ferry.sender.abort();
                ferry.receiver.abort();
            } else {
                ferry.receiver.abort();
                ferry.sender.abort();
            }
            ferry.sender.join();
            ferry.receiver.join();
        }
    }
}

#[test]
fn abort_of_idle_threads_and_of_a_wait_at_the_barrier_joins_them() {
    for (transport, backend) in EVERYWHERE {
        let (source, target) = (memfd_ram(&[10]), memfd_ram(&[10]));
        let ferry = Ferry::new(transport, 4, sender_config(backend), source, target);
        ferry.receiver.abort();
        ferry.receiver.join();
        ferry.sender.abort();
        ferry.sender.join();
        // After an abort nobody is told about the consequences.
        assert!(ferry.received.recv().is_err());
        assert!(ferry.sent.recv().is_err());
    }
}

#[test]
fn an_abort_of_one_side_is_seen_as_a_closed_link_by_the_other() {
    for (transport, backend) in EVERYWHERE {
        let (source, target) = (memfd_ram(&[10]), memfd_ram(&[10]));
        let mut ferry = Ferry::new(transport, 2, sender_config(backend), source, target);
        ferry.first_round(false);
        ferry.sender.abort();
        let event = ferry.received.recv_timeout(PATIENCE).unwrap();
        let ReceiverEvent::Failed { error, .. } = event else {
            panic!("{event:?}");
        };
        assert!(matches!(error, DataError::Closed), "{error:?}");
    }
}

/// Also covers dropping without `join`. Threads and files of this process are shared with tests that run at the same time, so what
/// is checked is the RAM's own reference count: every thread holds one.
#[test]
fn nothing_holds_the_ram_or_the_sockets_afterwards() {
    for (transport, backend) in EVERYWHERE {
        for aborted in [false, true] {
            let (source, target) = (memfd_ram(&[100]), memfd_ram(&[100]));
            let mappings = [&source, &target].map(|ram| Arc::clone(ram.blocks()[0].mapping()));
            let mut ferry = Ferry::new(transport, 4, sender_config(backend), source, target);
            if aborted {
                ferry.queue(
                    RoundWork {
                        runs: vec![run(0, 0, 100)],
                        ..RoundWork::default()
                    },
                    false,
                );
                drop(ferry);
            } else {
                ferry.first_round(true);
                ferry.finish();
            }
            for mapping in &mappings {
                assert_eq!(Arc::strong_count(mapping), 1, "{transport:?} {backend:?}");
            }
        }
    }
}

/// Goal: after any ending the process has as many threads and files as before. Method: other tests run in this process at the same
/// time, so the counting is done in a process of its own, which runs this test alone.
#[test]
fn no_thread_and_no_file_is_left_behind() {
    const ALONE: &str = "VMFERRY_TEST_ALONE";
    if std::env::var_os(ALONE).is_none() {
        let name = "data::tests::ending::no_thread_and_no_file_is_left_behind";
        let status = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name, "--test-threads=1"])
            .env(ALONE, "1")
            .status()
            .unwrap();
        assert!(status.success());
        return;
    }
    let count = |what: &str| std::fs::read_dir(what).unwrap().count();
    let census = || [count("/proc/self/fd"), count("/proc/self/task")];
    let before = census();
    for (transport, backend) in EVERYWHERE {
        for ending in 0..3 {
            let (source, target) = (memfd_ram(&[100]), memfd_ram(&[100]));
            let mut ferry = Ferry::new(transport, 8, sender_config(backend), source, target);
            ferry.first_round(ending == 0);
            match ending {
                0 => drop(ferry.finish()),
                1 => drop(ferry),
                _ => {
                    ferry.sender.abort();
                    let event = ferry.received.recv_timeout(PATIENCE).unwrap();
                    assert!(matches!(event, ReceiverEvent::Failed { .. }));
                }
            }
        }
    }
    // A thread that was joined may not be off the kernel's list yet.
    let began = Instant::now();
    while census() != before && began.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(census(), before);
}

#[test]
fn a_bandwidth_limit_holds_for_all_connections_together_until_the_guest_stops() {
    // No upper bound on the time is asserted: the machine may be busy. The lower bound is the limit itself.
    for backend in [Backend::Uring, Backend::Plain] {
        let (source, target) = (memfd_ram(&[1000]), memfd_ram(&[1000]));
        for index in 0..1000 {
            write_page(&source, 0, index, index);
        }
        let limit = Arc::new(BandwidthLimit::new(8_000_000));
        let config = SenderConfig {
            bandwidth: Arc::clone(&limit),
            ..sender_config(backend)
        };
        let began = Instant::now();
        let mut ferry = Ferry::new(Transport::Unix, 4, config, source, target);
        let stats = ferry.first_round(false);
        let least = stats.wire_bytes as f64 / 8_000_000.0;
        assert!(
            began.elapsed().as_secs_f64() >= least * 0.9,
            "{:?}",
            began.elapsed()
        );
        // At this pace the last round would not end while anybody waits for it.
        limit.set(1);
        let work = RoundWork {
            runs: vec![run(0, 0, 1000)],
            ..RoundWork::default()
        };
        ferry.round(work, true);
        ferry.finish();
    }
}
