//! A peer that breaks the protocol or vanishes is met by a clear error, never by a panic, a hang or a wrong page.

use std::io::Write;

use super::*;
use crate::memory::extents::tests::{memfd_ram, run};
use crate::units::PageRun;
use crate::wire::WireError;
use crate::wire::header::encode_frame;
use crate::wire::ram::{RAM_RUNS, RamRun, RamRuns, RoundCounts, RoundEnd, RunKind};

fn frame(round: u32, kind: RunKind, pages: PageRun) -> Vec<u8> {
    let frame = RamRuns {
        round: RoundId(round),
        payload_crc: None,
        runs: vec![RamRun { pages, kind }],
    };
    let mut bytes = frame.encode();
    bytes.resize(
        bytes.len() + usize::try_from(frame.payload_bytes()).unwrap(),
        7,
    );
    bytes
}

fn end(round: u32, frames: u64, data_pages: u64, zero_pages: u64) -> Vec<u8> {
    let counts = RoundCounts {
        frames,
        data_pages,
        zero_pages,
        hole_pages: 0,
        device_bytes: 0,
    };
    let end = RoundEnd {
        round: RoundId(round),
        last: false,
        counts,
    };
    end.encode()
}

/// What a receiver with 10 pages of RAM says to these bytes on its first connection, after which that one is closed.
fn verdict(backend: Backend, connections: usize, bytes: &[u8]) -> DataError {
    let (source, target) = socket_pairs(Transport::Unix, connections);
    let ram = memfd_ram(&[10]);
    let (receiver, events) = start_receiver(target, &ram, backend);
    let mut source: Vec<_> = source.into_iter().map(UnixStream::from).collect();
    // May fail in the middle when the receiver closes early.
    let _ = source[0].write_all(bytes);
    drop(source.remove(0));
    let event = events.recv_timeout(PATIENCE).unwrap();
    receiver.join();
    match event {
        ReceiverEvent::Failed {
            connection: 0,
            error,
        } => {
            assert!(events.recv().is_err(), "one failure is reported once");
            error
        }
        other => panic!("{other:?}"),
    }
}

fn peer_error(connections: usize, bytes: &[u8]) -> WireError {
    let verdicts = [Backend::Uring, Backend::Plain].map(|backend| {
        match verdict(backend, connections, bytes) {
            DataError::Peer(error) => error,
            other => panic!("{other:?}"),
        }
    });
    let [uring, plain] = verdicts;
    assert_eq!(uring, plain);
    uring
}

#[test]
fn a_peer_that_speaks_something_else_is_recognised() {
    let error = peer_error(
        1,
        b"GET / HTTP/1.1\r\nHost: somewhere.example.org\r\nAccept: */*\r\n\r\n",
    );
    assert!(matches!(error, WireError::Magic { .. }), "{error}");
}

#[test]
fn a_frame_of_the_control_connection_is_refused() {
    let error = peer_error(1, &encode_frame(1, 0, &[0; 40]));
    assert_eq!(error, WireError::Kind { kind: 1, flags: 0 });
}

#[test]
fn a_frame_with_an_impossible_length_is_refused_before_its_body() {
    let mut bytes = encode_frame(RAM_RUNS, 0, &[0; 40]);
    bytes[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
    let error = peer_error(1, &bytes);
    assert!(matches!(error, WireError::Value { .. }), "{error}");
}

#[test]
fn a_run_outside_of_its_block_is_refused() {
    let error = peer_error(1, &frame(0, RunKind::Zero, run(0, 9, 2)));
    assert!(matches!(error, WireError::OutsideBlock { .. }), "{error}");
}

#[test]
fn a_frame_with_a_changed_byte_is_refused() {
    let mut bytes = frame(0, RunKind::Data, run(0, 3, 2));
    bytes[20] ^= 1;
    assert_eq!(
        peer_error(1, &bytes),
        WireError::Checksum { kind: RAM_RUNS }
    );
}

#[test]
fn changed_page_data_is_noticed_when_it_is_checksummed() {
    let payload = [7; 2 * PAGE_BYTES];
    let sent = RamRuns {
        round: RoundId(0),
        payload_crc: Some(crc32c::crc32c(&payload)),
        runs: vec![RamRun {
            pages: run(0, 3, 2),
            kind: RunKind::Data,
        }],
    };
    let mut bytes = sent.encode();
    bytes.extend_from_slice(&payload);
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    bytes.extend_from_slice(&end(0, 1, 2, 0));
    assert_eq!(peer_error(1, &bytes), WireError::PayloadChecksum);
}

#[test]
fn a_frame_of_another_round_is_refused() {
    let expected = WireError::Round {
        expected: 0,
        found: 1,
    };
    assert_eq!(
        peer_error(1, &frame(1, RunKind::Zero, run(0, 0, 10))),
        expected
    );
    assert_eq!(peer_error(1, &end(1, 0, 0, 0)), expected);
}

#[test]
fn a_first_round_that_leaves_pages_out_is_refused() {
    let mut bytes = frame(0, RunKind::Zero, run(0, 0, 4));
    bytes.extend(frame(0, RunKind::Data, run(0, 5, 5)));
    bytes.extend(end(0, 2, 5, 4));
    assert_eq!(peer_error(1, &bytes), WireError::PagesMissing { count: 1 });
}

#[test]
fn a_page_that_comes_twice_in_a_round_is_refused() {
    let mut bytes = frame(0, RunKind::Zero, run(0, 0, 4));
    bytes.extend(frame(0, RunKind::Data, run(0, 3, 2)));
    bytes.extend(end(0, 2, 2, 4));
    let error = peer_error(1, &bytes);
    assert!(
        matches!(error, WireError::PagesTwice { start: 3, .. }),
        "{error}"
    );
}

#[test]
fn totals_that_do_not_fit_are_refused() {
    let mut bytes = frame(0, RunKind::Zero, run(0, 0, 10));
    bytes.extend(end(0, 1, 0, 9));
    let error = peer_error(1, &bytes);
    assert!(
        matches!(
            error,
            WireError::RoundTotals {
                sent: 9,
                received: 10,
                ..
            }
        ),
        "{error}"
    );
}

/// Goal: wherever the peer closes, the receiver says so. Method: a whole round is cut at every interesting byte.
#[test]
fn a_peer_that_closes_in_the_middle_is_reported_wherever_it_happens() {
    let mut bytes = frame(0, RunKind::Data, run(0, 0, 4));
    let payload_at = bytes.len() - 4 * PAGE_BYTES;
    bytes.extend(frame(0, RunKind::Zero, run(0, 4, 6)));
    let end_at = bytes.len();
    bytes.extend(end(0, 2, 4, 6));
    let cuts = [
        0,
        1,
        15,
        16,
        17,
        payload_at,
        payload_at + 5000,
        end_at - 1,
        end_at,
        end_at + 20,
        bytes.len() - 1,
    ];
    for cut in cuts {
        for backend in [Backend::Uring, Backend::Plain] {
            let error = verdict(backend, 1, &bytes[..cut]);
            assert!(
                matches!(error, DataError::Closed),
                "cut at {cut}: {error:?}"
            );
        }
    }
}

#[test]
fn a_failure_of_one_connection_ends_the_others_wherever_they_wait() {
    // The other three have sent nothing and stay open.
    let error = peer_error(4, &encode_frame(99, 0, &[0; 40]));
    assert_eq!(error, WireError::Kind { kind: 99, flags: 0 });
    // And here the first waits at the barrier when a second one breaks the protocol.
    let (source, target) = socket_pairs(Transport::Unix, 2);
    let ram = memfd_ram(&[10]);
    let (receiver, events) = start_receiver(target, &ram, Backend::Uring);
    let mut source: Vec<_> = source.into_iter().map(UnixStream::from).collect();
    source[0].write_all(&end(0, 0, 0, 0)).unwrap();
    source[1].write_all(&end(7, 0, 0, 0)).unwrap();
    let event = events.recv_timeout(PATIENCE).unwrap();
    assert!(
        matches!(event, ReceiverEvent::Failed { connection: 1, .. }),
        "{event:?}"
    );
    assert_eq!(receiver.join().rounds, 0);
}

#[test]
fn connections_that_disagree_about_the_last_round_are_refused() {
    let (source, target) = socket_pairs(Transport::Unix, 2);
    let ram = memfd_ram(&[10]);
    let (receiver, events) = start_receiver(target, &ram, Backend::Uring);
    let mut source: Vec<_> = source.into_iter().map(UnixStream::from).collect();
    let last = RoundEnd {
        round: RoundId(0),
        last: true,
        counts: RoundCounts::default(),
    };
    source[0].write_all(&end(0, 0, 0, 0)).unwrap();
    source[1].write_all(&last.encode()).unwrap();
    let event = events.recv_timeout(PATIENCE).unwrap();
    let ReceiverEvent::Failed { error, .. } = event else {
        panic!("{event:?}");
    };
    assert!(matches!(
        error,
        DataError::Peer(WireError::Value {
            field: "last round",
            ..
        })
    ));
    receiver.join();
}

#[test]
fn a_target_that_vanishes_is_reported_to_the_source() {
    for (transport, backend) in EVERYWHERE {
        let (source, target) = socket_pairs(transport, 2);
        let ram = memfd_ram(&[20_000]);
        for index in 0..20_000 {
            write_page(&ram, 0, index, 5);
        }
        let (sender, events) = start_sender(source, &ram, Vec::new(), sender_config(backend));
        sender.send_round(RoundId(0), RoundWork::all(Extents::of(&ram).unwrap()), true);
        drop(target);
        let event = events.recv_timeout(PATIENCE).unwrap();
        let SenderEvent::Failed { error, .. } = event else {
            panic!("{event:?}");
        };
        assert!(matches!(error, DataError::Closed), "{error:?}");
        sender.join();
        assert!(events.recv().is_err(), "one failure is reported once");
    }
}

/// Goal: no memory at the target is told apart from a broken link. Method: the RAM file is cut short behind the mapping's back, so
/// that the kernel cannot place a page.
#[test]
fn a_target_without_memory_for_a_page_says_so() {
    for backend in [Backend::Uring, Backend::Plain] {
        let (source, target) = socket_pairs(Transport::Unix, 1);
        let ram = memfd_ram(&[10]);
        write_page(&ram, 0, 3, 1);
        let (receiver, events) = start_receiver(target, &ram, backend);
        let mut source = UnixStream::from(source.into_iter().next().unwrap());
        let mut round = frame(0, RunKind::Hole, run(0, 0, 3));
        round.extend(frame(0, RunKind::Data, run(0, 3, 1)));
        round.extend(frame(0, RunKind::Hole, run(0, 4, 6)));
        let counts = RoundCounts {
            frames: 3,
            data_pages: 1,
            zero_pages: 0,
            hole_pages: 9,
            device_bytes: 0,
        };
        let round_end = RoundEnd {
            round: RoundId(0),
            last: false,
            counts,
        };
        round.extend(round_end.encode());
        source.write_all(&round).unwrap();
        let event = events.recv_timeout(PATIENCE).unwrap();
        assert!(
            matches!(event, ReceiverEvent::RoundReceived { .. }),
            "{event:?}"
        );
        ram.blocks()[0].file().unwrap().0.set_len(0).unwrap();
        // In one piece: the target closes the connection as soon as it has seen the frame.
        let mut round = frame(1, RunKind::Data, run(0, 3, 1));
        round.extend(end(1, 1, 1, 0));
        source.write_all(&round).unwrap();
        let event = events.recv_timeout(PATIENCE).unwrap();
        let ReceiverEvent::Failed { error, .. } = event else {
            panic!("{event:?}");
        };
        assert!(matches!(error, DataError::Memory { .. }), "{error:?}");
        receiver.join();
    }
}
