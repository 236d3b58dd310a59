//! Streams of devices that are damaged on their way, and a target that dies while the devices are stopped: the guest stays.

use std::sync::{Arc, Mutex};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use vmferry_devices::vfio::DeviceState;
use vmferry_transport::wire::device_data::{DEVICE_DATA, DeviceData};
use vmferry_transport::wire::frame::SourceFrame;
use vmferry_transport::wire::ram::RoundEnd;

use super::{
    HEADER_BYTES, STREAM_BYTES, assert_talks_at, machine, start_source, start_target, states, talk,
    two, with,
};
use crate::harness::{Vm, until};
use crate::proc::Holdings;
use crate::proxy::{Passing, Proxy, Verdict};
use crate::qmp::Failure;

/// What becomes of the stream of `vfio/1` on its way. Checksums are right again afterwards: only the device can notice.
#[derive(Clone, Copy, Debug)]
enum Damage {
    /// It ends after so many bytes.
    Cut(u64),
    /// This byte is another.
    Change(u64),
}

impl Damage {
    /// What passes instead of a piece of the stream.
    fn apply(self, piece: DeviceData, payload: &[u8]) -> Verdict {
        let mut payload = payload.to_vec();
        let end = piece.offset + u64::from(piece.payload_bytes);
        match self {
            Self::Change(at) if (piece.offset..end).contains(&at) => {
                payload[usize::try_from(at - piece.offset).unwrap()] ^= 1;
            }
            Self::Cut(length) if end > length || piece.end => {
                let left = length.saturating_sub(piece.offset);
                payload.truncate(usize::try_from(left).unwrap());
                if payload.is_empty() && !piece.end {
                    return Verdict::Drop;
                }
            }
            _ => return Verdict::Pass,
        }
        let offset = match self {
            Self::Cut(length) => piece.offset.min(length),
            Self::Change(_) => piece.offset,
        };
        let changed = DeviceData {
            offset,
            payload_bytes: payload.len().try_into().unwrap(),
            payload_crc: crc32c::crc32c(&payload),
            ..piece
        };
        let mut bytes = changed.encode();
        bytes.extend_from_slice(&payload);
        Verdict::Replace(bytes)
    }
}

/// A link to `target`, for one data connection, that has every piece of the stream of `vfio/1` judged.
fn link(
    target: &mut Vm,
    mut judge: impl FnMut(DeviceData, &[u8]) -> Verdict + Send + 'static,
) -> Proxy {
    let mut place = None;
    // Bytes that were left out of the round: the source's count of them is made right.
    let mut missing = 0;
    Proxy::new(&target.address(), move |frame| match frame {
        Passing::Source(SourceFrame::Hello(hello)) => {
            let mut devices = hello.devices.iter();
            let at = devices.position(|device| device.name == "vfio/1").unwrap();
            place = Some(u16::try_from(at).unwrap());
            Verdict::Pass
        }
        Passing::Data(frame) if frame.ends_round() => {
            let mut end = RoundEnd::decode(&frame.header, frame.body).unwrap();
            end.counts.device_bytes -= std::mem::take(&mut missing);
            Verdict::Replace(end.encode())
        }
        Passing::Data(frame) if frame.header.kind == DEVICE_DATA => {
            let piece = DeviceData::decode(&frame.header, frame.body).unwrap();
            if Some(piece.device) == place {
                let verdict = judge(piece, frame.payload);
                missing += match &verdict {
                    Verdict::Replace(bytes) => frame.bytes.len() - bytes.len(),
                    Verdict::Drop => frame.payload.len(),
                    _ => 0,
                } as u64;
                verdict
            } else {
                Verdict::Pass
            }
        }
        _ => Verdict::Pass,
    })
}

/// In the log of a source whose migration failed, the devices work again before any vCPU.
#[track_caller]
fn assert_devices_first(said: &str) {
    let lines: Vec<_> = said.lines().collect();
    let last = |part: &str| lines.iter().rposition(|line| line.contains(part));
    let (devices, vcpus) = (last("a migration that failed"), last("vCPUs are let go"));
    assert!(devices.is_some() && devices < vcpus, "{said}");
}

/// The migration failed with a word from or about `vfio/1`, and everything is at the source as it was.
#[track_caller]
fn assert_stayed(source: &mut Vm, info: &Value, part: &str, paused: bool) {
    let error = info["error-desc"].as_str().unwrap_or_default();
    assert_eq!(info["status"], "failed", "{info}\n{}", source.said());
    assert!(error.contains(part), "{error}");
    if paused {
        assert_eq!(source.runstate(), "paused");
        assert_eq!(states(source), [DeviceState::Stop; 2]);
    } else {
        assert_eq!(states(source), [DeviceState::Running; 2]);
        // Unless it failed while the guest ran.
        if source.statuses().contains(&"device".to_owned()) {
            assert_devices_first(&source.said());
        }
        source.assert_guest_works();
        talk(source);
    }
}

fn a_damaged_stream_leaves_the_guest_where_it_is(paused: bool) {
    let machine = machine();
    let devices = [two(), two()];
    let mut source = start_source(&machine, &devices[0]);
    if paused {
        source.query("stop");
    }
    let held = Holdings::settled(source.pid());
    for (damage, part) in [
        (Damage::Cut(0), "RESUMING -> STOP"),
        (Damage::Cut(HEADER_BYTES), "RESUMING -> STOP"),
        (Damage::Cut(STREAM_BYTES - 1), "RESUMING -> STOP"),
        (Damage::Change(0), "vfio/1"),
    ] {
        let mut target = start_target(&machine, &devices[1]);
        let link = link(&mut target, move |piece, payload| {
            damage.apply(piece, payload)
        });
        source.set(json!({ "multifd-channels": 1 }));
        source.migrate(&link.address());
        let info = source.wait_migration();
        assert_stayed(&mut source, &info, part, paused);
        let error = info["error-desc"].as_str().unwrap();
        assert!(error.contains("vfio/1"), "{damage:?}: {error}");
        target.assert_gave_up("vfio/1");
    }
    // Streams are closed.
    held.await_like(source.pid(), |held| held.fds.clone());
    let mut target = start_target(&machine, &devices[1]);
    if paused {
        source.migrate(&target.address());
        let info = source.wait_migration();
        assert_eq!(info["status"], "completed", "{info}\n{}", source.said());
        assert_eq!(target.runstate(), "paused");
        assert_eq!(states(&target), [DeviceState::Stop; 2]);
        target.query("cont");
        target.assert_guest_works();
    } else {
        source.move_to(&mut target);
    }
    assert_talks_at(&mut target);
}

#[test]
fn a_stream_that_was_damaged_on_the_way_is_refused_by_its_device_and_the_guest_stays() {
    a_damaged_stream_leaves_the_guest_where_it_is(false);
}

#[test]
fn a_stream_that_was_damaged_on_the_way_is_refused_also_if_the_guest_is_paused() {
    a_damaged_stream_leaves_the_guest_where_it_is(true);
}

#[test]
fn a_target_killed_while_the_devices_are_stopped_leaves_them_and_the_guest_at_the_source() {
    let machine = machine();
    let devices = [two(), two()];
    let mut source = start_source(&machine, &devices[0]);
    for before_the_end in [true, false] {
        let mut target = start_target(&machine, &devices[1]);
        let pid = Pid::from_raw(target.pid().try_into().unwrap()).unwrap();
        let stopped = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&stopped);
        let kill = move || {
            kill_process(pid, Signal::KILL).unwrap();
        };
        // The last bytes exist only when the device is in STOP_COPY; READY comes after them.
        let link = link(&mut target, move |piece, _| {
            if piece.offset < HEADER_BYTES {
                return Verdict::Pass;
            }
            if piece.end || before_the_end {
                seen.lock().unwrap().push(piece.offset);
                kill();
            }
            match before_the_end {
                true => Verdict::Drop,
                false => Verdict::Pass,
            }
        });
        source.set(json!({ "multifd-channels": 1 }));
        source.migrate(&link.address());
        let info = source.wait_migration();
        assert!(!stopped.lock().unwrap().is_empty());
        assert_stayed(&mut source, &info, "", false);
        target.kill();
    }
    let mut target = start_target(&machine, &devices[1]);
    source.move_to(&mut target);
    assert_talks_at(&mut target);
}

#[test]
fn one_target_process_takes_a_guest_after_its_devices_have_refused_another_stream() {
    let machine = machine();
    let devices = [two(), two()];
    let mut source = start_source(&machine, &devices[0]);
    let mut target = machine.start_target("defer", with(&devices[1]));
    let listen = |target: &mut Vm| {
        until("memory is empty", || {
            let arguments = json!({ "uri": "tcp:127.0.0.1:0", "exit-on-error": false });
            match target.qmp.execute("migrate-incoming", arguments) {
                Ok(_) => Some(()),
                Err(Failure::Refused(reason)) if reason.contains("still being emptied") => None,
                Err(failure) => panic!("{failure:?}"),
            }
        });
    };
    listen(&mut target);
    // Noticed in a round: what fails later leaves the process with state that must not be mixed with another's.
    let link = link(&mut target, |piece, payload| {
        Damage::Change(0).apply(piece, payload)
    });
    source.set(json!({ "multifd-channels": 1 }));
    source.migrate(&link.address());
    let info = source.wait_migration();
    assert_stayed(&mut source, &info, "vfio/1", false);
    assert_eq!(target.wait_migration()["status"], "failed");
    // Reset, and ready for the next.
    assert_eq!(states(&target), [DeviceState::Running; 2]);
    listen(&mut target);
    source.move_to(&mut target);
    assert_talks_at(&mut target);
}
