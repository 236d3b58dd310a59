//! Pages and state that were changed on the way: the target notices, says what it saw, and the guest goes on at the source as if
//! nothing had been.

use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::json;
use vmferry_transport::wire::frame::{SourceFrame, StateEnd, TargetFrame};
use vmferry_transport::wire::header::encode_frame;
use vmferry_transport::wire::ram::{RAM_RUNS, ROUND_END, RUNS_FIXED_BYTES};

use crate::harness::{Accel, Machine, Vm, turn};
use crate::proxy::{DataFrame, Passing, Proxy, Verdict};

on_both_accelerators!(
    frames_of_pages_that_were_changed_are_noticed,
    changed_pages_are_noticed_by_checksum_or_verification,
    a_link_that_breaks_at_any_frame_leaves_the_guest_running,
    device_state_that_was_changed_is_refused,
);

/// Migrates over a link with this hook; the target gives up, and the guest goes on here. Returns the error.
fn assert_fails(
    machine: &Machine,
    source: &mut Vm,
    part: &str,
    hook: impl FnMut(&Passing<'_>) -> Verdict + Send + 'static,
) -> String {
    let mut target = machine.target();
    let proxy = Proxy::new(&target.address(), hook);
    let error = source.assert_migration_fails(&proxy.address(), part);
    assert_eq!(target.wait_exit().code(), Some(1), "{}", target.said());
    error
}

/// The first frame that `wanted` likes is changed by `change`; the others pass.
fn change_one(
    wanted: Wanted,
    change: Change,
) -> impl FnMut(&Passing<'_>) -> Verdict + Send + 'static {
    let mut done = false;
    move |passing| match passing {
        Passing::Data(frame) if !done && wanted(frame) => {
            done = true;
            change(frame)
        }
        _ => Verdict::Pass,
    }
}

/// The frame with another body, its header made right, and the same payload.
fn with_body(frame: &DataFrame<'_>, change: impl Fn(&mut Vec<u8>)) -> Verdict {
    let mut body = frame.body.to_vec();
    change(&mut body);
    let mut bytes = encode_frame(frame.header.kind, frame.header.flags, &body);
    bytes.extend_from_slice(frame.payload);
    Verdict::Replace(bytes)
}

/// The frame with bytes changed wherever they are.
fn with_bytes(frame: &DataFrame<'_>, change: impl Fn(&mut Vec<u8>)) -> Verdict {
    let mut bytes = frame.bytes.to_vec();
    change(&mut bytes);
    Verdict::Replace(bytes)
}

type Wanted = fn(&DataFrame<'_>) -> bool;
type Change = fn(&DataFrame<'_>) -> Verdict;

fn frames_of_pages_that_were_changed_are_noticed(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let mut source = machine.source();
    let pages: Wanted = |frame| frame.has_pages();
    let end: Wanted = |frame| frame.ends_round();
    let cases: [(&str, Wanted, Change, &str); 13] = [
        (
            "magic",
            pages,
            |frame| with_bytes(frame, |bytes| bytes[0] = b'X'),
            "does not speak the vmferry protocol",
        ),
        (
            "checksum of the frame",
            pages,
            |frame| with_bytes(frame, |bytes| bytes[12] ^= 1),
            "bad checksum of a frame of type 40",
        ),
        (
            "type",
            pages,
            |frame| with_bytes(frame, |bytes| bytes[4] = 77),
            "unexpected frame type 77",
        ),
        (
            "flags",
            pages,
            |frame| with_bytes(frame, |bytes| bytes[5] = 0x80),
            "unexpected frame type 40 with flags 0x80",
        ),
        (
            "body length",
            pages,
            |frame| with_bytes(frame, |bytes| bytes[8..12].fill(0xff)),
            "field body bytes has the value 4294967295",
        ),
        (
            "payload length",
            pages,
            |frame| with_body(frame, |body| body[5] ^= 0x10),
            "field payload bytes has the value",
        ),
        (
            "page outside of its block",
            pages,
            |frame| {
                with_body(frame, |body| {
                    body[RUNS_FIXED_BYTES..][..8].fill(0x7f);
                })
            },
            "are outside of RAM block 0",
        ),
        (
            "block that does not exist",
            pages,
            |frame| with_body(frame, |body| body[RUNS_FIXED_BYTES + 12] = 9),
            "are outside of RAM block 9",
        ),
        (
            "round",
            pages,
            |frame| with_body(frame, |body| body[0] = 5),
            "a RAM frame of round 5 came in round 0",
        ),
        (
            "frame twice",
            pages,
            |frame| with_bytes(frame, |bytes| bytes.extend_from_within(..)),
            "came twice in one round",
        ),
        (
            "frame missing",
            pages,
            |_| Verdict::Drop,
            "in the round, but",
        ),
        (
            "totals",
            end,
            |frame| with_body(frame, |body| body[16] ^= 1),
            "data pages in the round, but",
        ),
        (
            "round that ends as another one",
            end,
            |frame| with_body(frame, |body| body[0] = 1),
            "a RAM frame of round 1 came in round 0",
        ),
    ];
    for (what, wanted, change, part) in cases {
        println!("{what}");
        let error = assert_fails(&machine, &mut source, part, change_one(wanted, change));
        let blamed = "the target refused: the source broke the protocol: data connection ";
        assert!(error.starts_with(blamed), "{error}");
    }

    // Left out so that the totals fit: noticed because the first round names every page.
    source.set(json!({ "multifd-channels": 1 }));
    let mut left_out = None;
    assert_fails(
        &machine,
        &mut source,
        "the first round left out",
        move |passing| match passing {
            Passing::Data(frame) if left_out.is_none() && frame.has_only_pages() => {
                left_out = Some(frame.payload.len() as u64 / 4096);
                Verdict::Drop
            }
            Passing::Data(frame) if frame.ends_round() => with_body(frame, |body| {
                let mut less = |at: usize, by: u64| {
                    let count = u64::from_le_bytes(body[at..at + 8].try_into().unwrap());
                    body[at..at + 8].copy_from_slice(&(count - by).to_le_bytes());
                };
                less(8, 1);
                less(16, left_out.unwrap());
            }),
            _ => Verdict::Pass,
        },
    );
    source.move_to(&mut machine.target());
}

fn changed_pages_are_noticed_by_checksum_or_verification(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let mut source = machine.source();
    let flip: Change = |frame| {
        with_bytes(frame, |bytes| {
            let last = bytes.len() - 1;
            bytes[last] ^= 1;
        })
    };
    source.set(json!({ "x-checksum": true }));
    assert_fails(
        &machine,
        &mut source,
        "bad checksum of page data",
        change_one(|frame| frame.has_pages(), flip),
    );

    // Pages of the fill are never sent again: what was changed in the first round is still wrong at the end.
    source.set(json!({ "x-checksum": false, "x-verify": true }));
    let mut target = machine.target();
    let proxy = Proxy::new(&target.address(), |passing| match passing {
        Passing::Data(frame) if frame.has_pages() => with_bytes(frame, |bytes| {
            let last = bytes.len() - 1;
            bytes[last] ^= 1;
        }),
        _ => Verdict::Pass,
    });
    let error = source.assert_migration_fails(&proxy.address(), "verification failed: RAM hash");
    assert!(error.contains(" at the source and "), "{error}");
    // It was ready, but the source that gave up is in no doubt: there is nothing to stay for.
    target.assert_gave_up("the source gave up: verification failed");
    source.move_to(&mut machine.target());
}

fn a_link_that_breaks_at_any_frame_leaves_the_guest_running(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let mut source = machine.source();
    // How many frames there are before COMMIT.
    let counted = std::sync::Arc::new(AtomicUsize::new(0));
    let frames = std::sync::Arc::clone(&counted);
    let mut target = machine.target();
    let proxy = Proxy::new(&target.address(), move |passing| {
        if matches!(passing, Passing::Source(SourceFrame::Commit)) {
            return Verdict::Cut;
        }
        frames.fetch_add(1, Ordering::Relaxed);
        Verdict::Pass
    });
    source.assert_migration_fails(&proxy.address(), "lost at the commit");
    target.wait_runstate("inmigrate");
    let frames = counted.load(Ordering::Relaxed);
    assert!(frames > 10, "only {frames} frames");

    for cut_at in (0..frames).step_by(frames.div_ceil(8)) {
        let mut target = machine.target();
        let mut number = 0;
        let proxy = Proxy::new(&target.address(), move |passing| {
            // Other frames than at the first time may come, and a commit that was sent is another story.
            assert!(!matches!(passing, Passing::Source(SourceFrame::Commit)));
            number += 1;
            if number > cut_at || matches!(passing, Passing::Target(TargetFrame::Ready(_))) {
                Verdict::Cut
            } else {
                Verdict::Pass
            }
        });
        source.assert_migration_fails(&proxy.address(), "");
        // A target that has seen nothing of it still waits, one that is ready stays reachable; neither runs the guest.
        if target.lives() {
            let state = target.qmp.execute("query-status", json!({}));
            assert!(state.is_err() || state.unwrap()["status"] == "inmigrate");
        }
    }
    source.move_to(&mut machine.target());
}

fn device_state_that_was_changed_is_refused(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let mut source = machine.source();
    type Hook = fn(&SourceFrame) -> Verdict;
    let cases: [(&str, Hook, &str); 7] = [
        (
            "left out",
            |frame| match frame {
                SourceFrame::Section(section) if section.name == "vcpu/0" => Verdict::Drop,
                _ => Verdict::Pass,
            },
            "device states were announced",
        ),
        (
            "left out and not counted",
            |frame| match frame {
                SourceFrame::Section(section) if section.name == "vcpu/0" => Verdict::Drop,
                SourceFrame::StateEnd(end) => {
                    let sections = end.sections - 1;
                    let end = StateEnd { sections, ..*end };
                    Verdict::Replace(SourceFrame::StateEnd(end).encode())
                }
                _ => Verdict::Pass,
            },
            "no state came for device \"vcpu/0\"",
        ),
        (
            "twice",
            |frame| match frame {
                SourceFrame::Section(_) => Verdict::Replace(frame.encode().repeat(2)),
                _ => Verdict::Pass,
            },
            "comes twice",
        ),
        (
            "too new",
            |frame| match frame {
                SourceFrame::Section(section) => {
                    let mut section = section.clone();
                    section.version = 9;
                    Verdict::Replace(SourceFrame::Section(section).encode())
                }
                _ => Verdict::Pass,
            },
            "version 9, its hello allows",
        ),
        (
            "of a device that does not exist",
            |frame| match frame {
                SourceFrame::Section(section) => {
                    let mut section = section.clone();
                    section.name = "toaster".to_owned();
                    Verdict::Replace(SourceFrame::Section(section).encode())
                }
                _ => Verdict::Pass,
            },
            "state of device \"toaster\" comes, which does not exist here",
        ),
        (
            "cut short",
            |frame| match frame {
                SourceFrame::Section(section) if section.name == "vcpu/0" => {
                    let mut section = section.clone();
                    section.bytes.truncate(section.bytes.len() / 2);
                    Verdict::Replace(SourceFrame::Section(section).encode())
                }
                _ => Verdict::Pass,
            },
            "vcpu/0",
        ),
        (
            "wrong last round",
            |frame| match frame {
                SourceFrame::StateEnd(end) => {
                    let last_round = end.last_round.next();
                    let end = StateEnd { last_round, ..*end };
                    Verdict::Replace(SourceFrame::StateEnd(end).encode())
                }
                _ => Verdict::Pass,
            },
            "the end of the device state contradicts the switchover",
        ),
    ];
    for (what, hook, part) in cases {
        println!("{what}");
        let error = assert_fails(&machine, &mut source, part, move |passing| match passing {
            Passing::Source(frame) => hook(frame),
            _ => Verdict::Pass,
        });
        assert!(error.starts_with("the target refused: "), "{error}");
        // The guest was stopped for this one, and goes on.
        assert!(
            source
                .qmp
                .events
                .iter()
                .any(|event| event["event"] == "RESUME")
        );
    }
    source.move_to(&mut machine.target());
}

const _: () = assert!(RAM_RUNS == 40 && ROUND_END == 41);
