//! Everything arrives, exactly, and nothing that was not there before.

use rustix::net::sockopt;

use super::*;
use crate::memory::DirtyMap;
use crate::memory::extents::tests::{anonymous_block, memfd_ram, run};
use crate::memory::populate::populated_bytes;
use crate::units::PageCount;
use crate::wire::ram::RUNS_PER_FRAME_MAX;

const BLOCKS: [u64; 3] = [3000, 1, 700];

/// Runs of data, zero pages and holes of random lengths.
fn fill_randomly(ram: &GuestRam, random: &mut Random) {
    for (block, pages) in (0..).zip(BLOCKS) {
        let mut index = 0;
        while index < pages {
            let longest = [1, 3, 300][random.below(3) as usize];
            let end = pages.min(index + 1 + random.below(longest));
            let kind = random.below(3);
            for index in index..end {
                match kind {
                    0 => write_page(ram, block, index, random.next()),
                    1 => page(ram, block, index).copy_from(&[0; PAGE_BYTES]),
                    _ => {}
                }
            }
            index = end;
        }
    }
}

/// Rewrites some pages, zeroes some, and marks them.
fn dirty_some(ram: &GuestRam, random: &mut Random) -> DirtyMap {
    let mut dirty = ram.empty_map();
    for _ in 0..random.below(40) {
        let block = random.below(3) as u16;
        let pages = BLOCKS[usize::from(block)];
        let start = random.below(pages);
        let count = 1 + random.below(60).min(pages - start - 1);
        let zero = random.below(3) == 0;
        for index in start..start + count {
            if zero {
                page(ram, block, index).copy_from(&[0; PAGE_BYTES]);
            } else {
                write_page(ram, block, index, random.next());
            }
        }
        dirty
            .block_mut(BlockId(block))
            .set_range(PageIndex(start), PageCount(count));
    }
    dirty
}

fn work(dirty: &DirtyMap) -> RoundWork {
    RoundWork {
        runs: dirty.runs().collect(),
        ..RoundWork::default()
    }
}

#[test]
fn random_memory_arrives_exactly_in_several_rounds() {
    let mut random = Random(7);
    for (transport, backend) in EVERYWHERE {
        for connections in [1, 2, 4, 16] {
            for checksum in [false, true] {
                let (source, target) = (memfd_ram(&BLOCKS), memfd_ram(&BLOCKS));
                fill_randomly(&source, &mut random);
                // The target's memory may hold something from before.
                if connections % 2 == 0 {
                    fill_randomly(&target, &mut random);
                }
                let config = SenderConfig {
                    checksum,
                    ..sender_config(backend)
                };
                let mut ferry = Ferry::new(transport, connections, config, source, target);
                ferry.first_round(false);
                for round in 1..5 {
                    let dirty = dirty_some(&ferry.source, &mut random);
                    ferry.round(work(&dirty), round == 4);
                }
                let (source, target) = ferry.finish();
                assert_eq!(
                    source.hash, target.hash,
                    "{transport:?} {backend:?} {connections} connections, checksum {checksum}"
                );
                assert!(target.populated_bytes <= source.populated_bytes);
            }
        }
    }
}

#[test]
fn holes_and_zero_pages_take_no_memory_at_the_target_and_no_payload() {
    for (transport, backend) in EVERYWHERE {
        let (source, target) = (memfd_ram(&[100_000]), memfd_ram(&[100_000]));
        for index in 500..1500 {
            page(&source, 0, index).copy_from(&[0; PAGE_BYTES]);
        }
        write_page(&source, 0, 1000, 1);
        let before = populated_bytes(&source).unwrap();
        let mut ferry = Ferry::new(transport, 2, sender_config(backend), source, target);
        let stats = ferry.first_round(true);
        assert_eq!(stats.counts.data_pages, 1);
        assert_eq!(stats.counts.zero_pages, 999);
        assert_eq!(stats.counts.hole_pages, 99_000);
        assert!(stats.wire_bytes < 2 * 4096, "{} bytes", stats.wire_bytes);
        let (source, target) = ferry.finish();
        assert_eq!(source.hash, target.hash);
        assert_eq!(source.populated_bytes, before);
        assert_eq!(target.populated_bytes, 4096);
    }
}

#[test]
fn memory_without_a_file_arrives_too() {
    for (transport, backend) in EVERYWHERE {
        for checksum in [false, true] {
            let anonymous = || GuestRam::new(vec![anonymous_block("anonymous", 600)]);
            let (source, target) = (anonymous(), anonymous());
            for index in [0, 3, 4, 5, 599] {
                write_page(&source, 0, index, index);
                write_page(&target, 0, index + 1 - index / 599, 77);
            }
            let config = SenderConfig {
                checksum,
                ..sender_config(backend)
            };
            let mut ferry = Ferry::new(transport, 3, config, source, target);
            ferry.first_round(true);
            let (source, target) = ferry.finish();
            assert_eq!(source.hash, target.hash);
        }
    }
}

#[test]
fn a_file_that_cannot_be_written_is_filled_through_its_mapping() {
    let (source, target) = (memfd_ram(&[300]), memfd_ram(&[300]));
    for index in 100..300 {
        write_page(&source, 0, index, index);
    }
    let (file, _) = target.blocks()[0].file().unwrap();
    rustix::fs::fcntl_add_seals(file, rustix::fs::SealFlags::FUTURE_WRITE).unwrap();
    for checksum in [false, true] {
        let config = SenderConfig {
            checksum,
            ..sender_config(Backend::Uring)
        };
        let mut ferry = Ferry::new(Transport::Unix, 2, config, source.clone(), target.clone());
        ferry.first_round(true);
        let (source, target) = ferry.finish();
        assert_eq!(source.hash, target.hash);
    }
}

/// Goal: the order of rounds holds even if a connection is far ahead of another.
/// Method: the same few pages get new content for each round and are sent as soon as the round before has left the source, over
/// so many connections that pages move to another socket from round to round. Only then the target is waited for.
#[test]
fn a_page_sent_in_many_rounds_over_several_sockets_ends_with_its_newest_content() {
    for (transport, backend) in EVERYWHERE {
        let (source, target) = (memfd_ram(&[64]), memfd_ram(&[64]));
        let mut ferry = Ferry::new(transport, 4, sender_config(backend), source, target);
        ferry.first_round(false);
        let all = RoundWork {
            runs: (0..64).map(|index| run(0, index, 1)).collect(),
            ..RoundWork::default()
        };
        for burst in 0..60 {
            let rounds = 1 + burst % 4;
            for round in 0..rounds {
                for index in 0..64 {
                    write_page(&ferry.source, 0, index, (burst * 4 + round) * 64 + index);
                }
                ferry.queue(all.clone(), false);
                ferry.settle_source();
            }
            for _ in 0..rounds {
                ferry.settle_target();
            }
            let hashes = [&ferry.source, &ferry.target].map(|ram| ram_hash(ram).unwrap().hash);
            assert_eq!(hashes[0], hashes[1], "burst {burst}");
        }
        ferry.round(RoundWork::default(), true);
        ferry.finish();
    }
}

/// Goal: a write that races with a round is never lost once it is sent again, and old content never comes back.
/// Method: a thread keeps writing while rounds of all pages run; a last round with the writer stopped must settle everything.
#[test]
fn a_writer_during_the_rounds_is_caught_up_with_by_the_last() {
    for (transport, backend) in EVERYWHERE {
        let (source, target) = (memfd_ram(&[512]), memfd_ram(&[512]));
        let mut ferry = Ferry::new(transport, 2, sender_config(backend), source, target);
        ferry.first_round(false);
        let all = RoundWork {
            runs: vec![run(0, 0, 512)],
            ..RoundWork::default()
        };
        std::thread::scope(|scope| {
            let ram = ferry.source.clone();
            let writer = scope.spawn(move || {
                let mut random = Random(99);
                for _ in 0..3000 {
                    write_page(&ram, 0, random.below(512), random.next());
                }
            });
            while !writer.is_finished() {
                ferry.round(all.clone(), false);
            }
        });
        ferry.round(all, true);
        let (source, target) = ferry.finish();
        assert_eq!(source.hash, target.hash);
    }
}

#[test]
fn short_writes_and_tiny_buffers_change_nothing() {
    for (transport, backend) in EVERYWHERE {
        let (ours, theirs) = socket_pairs(transport, 2);
        let kept: Vec<_> = ours
            .iter()
            .map(|socket| socket.try_clone().unwrap())
            .collect();
        let (source, target) = (memfd_ram(&BLOCKS), memfd_ram(&BLOCKS));
        fill_randomly(&source, &mut Random(3));
        let mut ferry = Ferry::over(ours, theirs, sender_config(backend), source, target);
        // Not the receive buffers: TCP drops segments that do not fit and then waits for timers.
        for socket in kept {
            sockopt::set_socket_send_buffer_size(socket, 1).unwrap();
        }
        ferry.first_round(true);
        let (source, target) = ferry.finish();
        assert_eq!(source.hash, target.hash);
    }
}

#[test]
fn more_scattered_pages_and_holes_than_fit_a_frame_arrive() {
    let pages = RUNS_PER_FRAME_MAX as u64 * 5;
    for (transport, backend) in EVERYWHERE {
        let (source, target) = (memfd_ram(&[pages]), memfd_ram(&[pages]));
        for index in (0..pages).step_by(2) {
            write_page(&source, 0, index, index);
        }
        let mut ferry = Ferry::new(transport, 3, sender_config(backend), source, target);
        let stats = ferry.first_round(false);
        assert_eq!(stats.counts.data_pages, pages / 2);
        assert_eq!(stats.counts.hole_pages, pages / 2);
        // And again onto pages that exist, where they are received in place.
        let extents = Extents::of(&ferry.source).unwrap();
        ferry.round(RoundWork::all(extents), true);
        let (source, target) = ferry.finish();
        assert_eq!(source, target);
    }
}

#[test]
fn progress_and_totals_add_up() {
    let (source, target) = (memfd_ram(&[1000]), memfd_ram(&[1000]));
    for index in 0..1000 {
        write_page(&source, 0, index, index);
    }
    let config = sender_config(Backend::Uring);
    let mut ferry = Ferry::new(Transport::Unix, 4, config, source, target);
    let stats = ferry.first_round(false);
    let progress = ferry.sender.progress();
    assert_eq!(progress.wire_bytes(), stats.wire_bytes);
    assert_eq!(progress.round_pages, 1000);
    assert_eq!(progress.round_pages_remaining(), 0);
    assert!(stats.wire_bytes > 1000 * 4096);
    let second = ferry.round(
        RoundWork {
            runs: vec![run(0, 0, 100)],
            ..RoundWork::default()
        },
        true,
    );
    assert_eq!(second.counts.data_pages, 100);
    let sent = ferry.sender.join();
    assert_eq!(sent.counts.data_pages, 1100);
    assert_eq!(sent.wire_bytes, stats.wire_bytes + second.wire_bytes);
    assert_eq!(ferry.receiver.join().rounds, 2);
}

#[test]
fn zero_copy_within_the_host_is_given_up_and_counted() {
    let (source, target) = (memfd_ram(&BLOCKS), memfd_ram(&BLOCKS));
    fill_randomly(&source, &mut Random(3));
    for transport in [Transport::Tcp, Transport::Unix] {
        let config = SenderConfig {
            zero_copy: ZeroCopy::Anywhere,
            ..sender_config(Backend::Uring)
        };
        let mut ferry = Ferry::new(transport, 2, config, source.clone(), target.clone());
        for _ in 0..10 {
            ferry.first_round(false);
        }
        ferry.round(RoundWork::default(), true);
        let zero_copy = ferry.sender.progress().zero_copy;
        assert!(zero_copy.fallbacks > 0, "{zero_copy:?}");
        assert!(zero_copy.sends < 100, "{zero_copy:?}");
        let (source, target) = ferry.finish();
        assert_eq!(source.hash, target.hash);
    }
}

/// Goal: memory lent to the kernel beyond the send, many messages at a time, does no harm. Method: the kernel copies late on
/// loopback, but its completions come as with a network card. A writer changes pages meanwhile.
#[test]
fn zero_copy_with_many_messages_lent_delivers_every_page() {
    let (source, target) = (memfd_ram(&[8000]), memfd_ram(&[8000]));
    for index in 0..8000 {
        write_page(&source, 0, index, index);
    }
    let config = SenderConfig {
        zero_copy: ZeroCopy::Always,
        ..sender_config(Backend::Uring)
    };
    let mut ferry = Ferry::new(Transport::Tcp, 2, config, source, target);
    std::thread::scope(|scope| {
        let ram = ferry.source.clone();
        let writer = scope.spawn(move || {
            let mut random = Random(99);
            for _ in 0..1000 {
                write_page(&ram, 0, random.below(8000), random.next());
            }
        });
        while !writer.is_finished() {
            ferry.first_round(false);
        }
    });
    ferry.first_round(true);
    let zero_copy = ferry.sender.progress().zero_copy;
    assert!(zero_copy.sends > 30, "{zero_copy:?}");
    let (source, target) = ferry.finish();
    assert_eq!(source.hash, target.hash);
}

#[test]
fn zero_pages_leave_as_data_when_nobody_is_to_look_for_them() {
    for (transport, backend) in EVERYWHERE {
        let (source, target) = (memfd_ram(&[100]), memfd_ram(&[100]));
        write_page(&source, 0, 7, 1);
        // Stale content at the target must become zero all the same.
        write_page(&target, 0, 50, 2);
        let mut ferry = Ferry::new(transport, 2, sender_config(backend), source, target);
        let work = RoundWork {
            runs: vec![run(0, 0, 100)],
            zeros_as_data: true,
            ..RoundWork::default()
        };
        let stats = ferry.round(work, true);
        assert_eq!((stats.counts.data_pages, stats.counts.zero_pages), (100, 0));
        let hashes = [&ferry.source, &ferry.target].map(|ram| ram_hash(ram).unwrap().hash);
        assert_eq!(hashes[0], hashes[1]);
        ferry.finish();
    }
}
