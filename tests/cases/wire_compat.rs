//! The bytes of every frame of every released wire version stay what they are, and corrupt ones are refused for the right reason.
//!
//! Fixtures lie in `tests/fixtures/wire/v1`; `tests/fixtures/README.md` says how they are made. Once a version is released its
//! files are never written again.

use std::path::PathBuf;

use bytes::Bytes;
use vmferry_transport::units::{
    BlockId, MigrationId, PageCount, PageIndex, PageRun, RoundId, Uuid,
};
use vmferry_transport::wire::device_data::{DEVICE_DATA, DeviceData};
use vmferry_transport::wire::frame::{
    Abort, AbortCode, FrameBuffer, Ready, Resolution, SourceFrame, StateEnd, TargetFrame,
    Verification,
};
use vmferry_transport::wire::header::{FrameHeader, HEADER_BYTES, encode_frame};
use vmferry_transport::wire::hello::{BlockInfo, DataHello, Hello, HelloReply, VersionRange};
use vmferry_transport::wire::ram::{self, RamRun, RamRuns, RoundCounts, RoundEnd, RunKind};
use vmferry_transport::wire::{DeviceSchema, Section, WireError};

/// Set to write the fixtures of a version that is not released yet instead of comparing with them.
const WRITE: &str = "VMFERRY_WRITE_FIXTURES";

/// RAM blocks that the RAM frames of the fixtures belong to.
const BLOCKS: [PageCount; 2] = [PageCount(1 << 18), PageCount(16)];

/// A frame of either kind of connection, and of either direction.
#[derive(Debug, PartialEq)]
enum Frame {
    Source(SourceFrame),
    Target(TargetFrame),
    Runs(RamRuns),
    RoundEnd(RoundEnd),
    DeviceData(DeviceData),
}

impl Frame {
    fn encode(&self) -> Vec<u8> {
        match self {
            Self::Source(frame) => frame.encode(),
            Self::Target(frame) => frame.encode(),
            Self::Runs(frame) => frame.encode(),
            Self::DeviceData(frame) => frame.encode(),
            Self::RoundEnd(frame) => frame.encode(),
        }
    }

    /// Reads `bytes` as one frame of the same connection and direction as `self`.
    fn decode_like(&self, bytes: &[u8]) -> Result<Self, WireError> {
        let mut buffer = FrameBuffer::default();
        buffer.push(bytes);
        let frame = match self {
            Self::Source(_) => buffer.poll_frame()?.map(Self::Source),
            Self::Target(_) => buffer.poll_frame()?.map(Self::Target),
            Self::Runs(_) | Self::RoundEnd(_) | Self::DeviceData(_) => return decode_data(bytes),
        };
        frame.ok_or(WireError::Truncated)
    }
}

fn decode_data(bytes: &[u8]) -> Result<Frame, WireError> {
    let (header, body) = bytes
        .split_first_chunk::<HEADER_BYTES>()
        .ok_or(WireError::Truncated)?;
    let header = FrameHeader::decode(header)?;
    if ram::body_bytes(&header)? != body.len() {
        return Err(WireError::Truncated);
    }
    match header.kind {
        ram::RAM_RUNS => RamRuns::decode(&header, body, &BLOCKS).map(Frame::Runs),
        DEVICE_DATA => DeviceData::decode(&header, body).map(Frame::DeviceData),
        _ => RoundEnd::decode(&header, body).map(Frame::RoundEnd),
    }
}

/// One frame of every type, two where a field is optional. The names are those of the files.
fn frames() -> Vec<(&'static str, Frame)> {
    let id = MigrationId(*b"0123456789abcdef");
    let source = [
        ("hello", SourceFrame::Hello(hello(id))),
        (
            "hello_in_place",
            SourceFrame::Hello(Hello {
                data_connections: 0,
                ..hello(id)
            }),
        ),
        (
            "data_hello",
            SourceFrame::DataHello(DataHello {
                version: 1,
                migration_id: id,
                index: 3,
                count: 4,
            }),
        ),
        ("switchover", SourceFrame::Switchover(RoundId(5))),
        (
            "section",
            SourceFrame::Section(Section {
                name: "vcpu/0".to_owned(),
                schema: "kvm-vcpu".to_owned(),
                version: 1,
                bytes: Bytes::from_static(b"state of a device"),
            }),
        ),
        ("state_end", SourceFrame::StateEnd(state_end(None))),
        (
            "state_end_with_hash",
            SourceFrame::StateEnd(state_end(Some(0x0102_0304_0506_0708_090a_0b0c_0d0e_0f10))),
        ),
        ("commit", SourceFrame::Commit),
        ("resolve", SourceFrame::Resolve(id)),
        ("finish", SourceFrame::Finish),
        ("keepalive", SourceFrame::Keepalive),
        (
            "source_abort",
            SourceFrame::Abort(Abort::new(
                AbortCode::Cancelled,
                "cancelled by the operator",
            )),
        ),
    ]
    .map(|(name, frame)| (name, Frame::Source(frame)));
    let target = [
        (
            "hello_reply",
            TargetFrame::HelloReply(HelloReply {
                version: 1,
                software: "vmferry 0.1.0".to_owned(),
            }),
        ),
        ("data_ready", TargetFrame::DataReady),
        ("switchover_ack", TargetFrame::SwitchoverAck),
        ("round_placed", TargetFrame::RoundPlaced(RoundId(5))),
        ("ready", TargetFrame::Ready(ready(None))),
        (
            "ready_with_verification",
            TargetFrame::Ready(ready(Some(Verification {
                ram_hash: 7,
                state_differences: "vcpu/0: rip".to_owned(),
                took_us: 1_500,
            }))),
        ),
        ("running", TargetFrame::Running { resume_us: 120 }),
        (
            "resolved_committed",
            TargetFrame::Resolved(Resolution::Committed),
        ),
        (
            "resolved_not_committed",
            TargetFrame::Resolved(Resolution::NotCommitted),
        ),
        (
            "target_abort",
            TargetFrame::Abort(Abort::new(AbortCode::Resources, "no memory for 1 GiB")),
        ),
    ]
    .map(|(name, frame)| (name, Frame::Target(frame)));
    let data = [
        ("ram_runs", Frame::Runs(ram_runs(None))),
        (
            "ram_runs_with_checksum",
            Frame::Runs(ram_runs(Some(0xdead_beef))),
        ),
        (
            "device_data",
            Frame::DeviceData(DeviceData {
                round: RoundId(5),
                device: 2,
                offset: 1 << 33,
                payload_bytes: 4097,
                payload_crc: 0xfeed_beef,
                end: true,
            }),
        ),
        (
            "round_end",
            Frame::RoundEnd(RoundEnd {
                round: RoundId(5),
                last: true,
                counts: RoundCounts {
                    frames: 1,
                    data_pages: 2,
                    zero_pages: 3,
                    hole_pages: 4,
                    device_bytes: 5,
                },
            }),
        ),
    ];
    source.into_iter().chain(target).chain(data).collect()
}

fn hello(migration_id: MigrationId) -> Hello {
    Hello {
        versions: VersionRange { min: 1, max: 1 },
        migration_id,
        data_connections: 4,
        checksum: true,
        verify: true,
        software: "vmferry 0.1.0".to_owned(),
        blocks: vec![BlockInfo {
            name: "ram".to_owned(),
            pages: PageCount(1 << 18),
            page_bytes: 4096,
        }],
        devices: vec![DeviceSchema {
            name: "vcpu/0".to_owned(),
            schema: "kvm-vcpu".to_owned(),
            version_min: 1,
            version_max: 2,
        }],
        uuid: Some(Uuid([0x42; 16])),
        switchover_ack: true,
    }
}

fn state_end(ram_hash: Option<u128>) -> StateEnd {
    StateEnd {
        sections: 3,
        last_round: RoundId(5),
        guest_runs: true,
        ram_hash,
    }
}

fn ready(verification: Option<Verification>) -> Ready {
    Ready {
        load_us: 900,
        populated_bytes: 64 << 20,
        verification,
    }
}

fn ram_runs(payload_crc: Option<u32>) -> RamRuns {
    let run = |block, start, count, kind| RamRun {
        pages: PageRun {
            block: BlockId(block),
            start: PageIndex(start),
            count: PageCount(count),
        },
        kind,
    };
    RamRuns {
        round: RoundId(5),
        payload_crc,
        runs: vec![
            run(0, 0x1_2345, 2, RunKind::Data),
            run(0, 0x2_0000, 0x1_0000, RunKind::Hole),
            run(1, 15, 1, RunKind::Zero),
        ],
    }
}

/// Name of the file, the good frame it is made from, what is done to it, and part of the error.
type Corruption = (&'static str, &'static str, fn(&mut Vec<u8>), &'static str);

/// Frames that must be refused.
fn corruptions() -> Vec<Corruption> {
    vec![
        (
            "http_request",
            "hello",
            |frame| *frame = b"GET / HTTP/1.1\r\n\r\n".to_vec(),
            "does not speak",
        ),
        (
            "reserved_header_field",
            "commit",
            |frame| frame[6] = 1,
            "reserved field",
        ),
        (
            "unknown_type",
            "commit",
            |frame| retype(frame, 200),
            "unexpected frame type 200",
        ),
        (
            "frame_of_the_other_direction",
            "commit",
            |frame| retype(frame, 23),
            "unexpected frame type 23",
        ),
        ("unknown_flags", "commit", |frame| frame[5] = 1, "flags 0x1"),
        (
            "flipped_bit_in_the_body",
            "section",
            |frame| frame[40] ^= 4,
            "bad checksum",
        ),
        (
            "flipped_bit_in_the_checksum",
            "commit",
            |frame| frame[13] ^= 4,
            "bad checksum",
        ),
        (
            "body_too_long",
            "commit",
            |frame| frame[8..12].fill(0xff),
            "too long",
        ),
        (
            "body_cut_short",
            "section",
            |frame| frame.truncate(30),
            "ends too early",
        ),
        (
            "byte_left_over",
            "switchover",
            |frame| rebody(frame, |body| body.push(0)),
            "too many",
        ),
        (
            "field_cut_short",
            "resolve",
            |frame| rebody(frame, |body| body.truncate(9)),
            "ends too early",
        ),
        (
            "newer_versions_only",
            "hello",
            |frame| rebody(frame, |body| body[..4].copy_from_slice(&[2, 0, 9, 0])),
            "no common protocol version",
        ),
        (
            "versions_in_wrong_order",
            "hello",
            |frame| rebody(frame, |body| body[0] = 9),
            "oldest version",
        ),
        (
            "no_data_connections",
            "hello",
            |frame| rebody(frame, |body| body[20] = 0),
            "data connections",
        ),
        (
            "index_past_the_count",
            "data_hello",
            |frame| rebody(frame, |body| body[18] = 4),
            "data connection index",
        ),
        (
            "neither_true_nor_false",
            "state_end",
            |frame| rebody(frame, |body| body[6] = 2),
            "guest runs",
        ),
        (
            "unknown_resolution",
            "resolved_committed",
            |frame| rebody(frame, |body| body[0] = 3),
            "resolution",
        ),
        (
            "text_longer_than_the_frame",
            "hello_reply",
            |frame| rebody(frame, |body| body[2] = 200),
            "ends too early",
        ),
        (
            "text_not_utf8",
            "hello_reply",
            |frame| rebody(frame, |body| body[5] = 0xff),
            "not valid UTF-8",
        ),
        (
            "no_runs",
            "ram_runs",
            |frame| rebody(frame, |body| body[12] = 0),
            "run count",
        ),
        (
            "run_of_no_pages",
            "ram_runs",
            |frame| rebody(frame, |body| body[24..28].fill(0)),
            "pages",
        ),
        (
            "run_past_the_block",
            "ram_runs",
            |frame| rebody(frame, |body| body[16 + 7] = 0x7f),
            "outside of RAM block 0",
        ),
        (
            "run_of_an_unknown_block",
            "ram_runs",
            |frame| rebody(frame, |body| body[28] = 2),
            "RAM block 2",
        ),
        (
            "run_of_unknown_kind",
            "ram_runs",
            |frame| rebody(frame, |body| body[30] = 3),
            "run kind",
        ),
        (
            "payload_of_other_length",
            "ram_runs",
            |frame| rebody(frame, |body| body[5] = 0x10),
            "payload bytes",
        ),
        (
            "checksum_without_its_flag",
            "ram_runs",
            |frame| rebody(frame, |body| body[8] = 1),
            "reserved field",
        ),
        (
            "half_a_run",
            "ram_runs",
            |frame| rebody(frame, |body| body.truncate(40)),
            "body bytes",
        ),
        (
            "reserved_round_end_field",
            "round_end",
            |frame| rebody(frame, |body| body[7] = 1),
            "reserved field",
        ),
    ]
}

/// Changes the body and puts the right length and checksum in front of it again.
fn rebody(frame: &mut Vec<u8>, change: impl FnOnce(&mut Vec<u8>)) {
    let mut body = frame.split_off(HEADER_BYTES);
    change(&mut body);
    *frame = encode_frame(frame[4], frame[5], &body);
}

fn retype(frame: &mut Vec<u8>, kind: u8) {
    frame[4] = kind;
    rebody(frame, |_body| {});
}

/// The fixture, written first if the environment asks for it.
fn fixture(folder: &str, name: &str, bytes: &[u8]) -> Vec<u8> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("fixtures/wire/v1")
        .join(folder);
    let path = folder.join(format!("{name}.bin"));
    if std::env::var_os(WRITE).is_some() {
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(&path, bytes).unwrap();
    }
    std::fs::read(&path).unwrap_or_else(|error| {
        panic!(
            "{}: {error}; a new frame needs a fixture: run once with {WRITE}=1",
            path.display()
        )
    })
}

#[test]
fn frames_of_version_1_keep_their_bytes() {
    for (name, frame) in frames() {
        let bytes = frame.encode();
        assert_eq!(
            fixture("good", name, &bytes),
            bytes,
            "{name}: the encoding of a frame has changed, which a peer of another build cannot know"
        );
        assert_eq!(frame.decode_like(&bytes), Ok(frame), "{name}");
    }
}

#[test]
fn corrupt_frames_of_version_1_are_refused_with_the_reason() {
    let frames = frames();
    for (name, of, change, reason) in corruptions() {
        let (_, good) = frames.iter().find(|(name, _)| *name == of).unwrap();
        let mut bytes = good.encode();
        change(&mut bytes);
        let error = good
            .decode_like(&fixture("corrupt", name, &bytes))
            .expect_err(name);
        assert!(error.to_string().contains(reason), "{name}: {error}");
    }
}

#[test]
fn every_fixture_belongs_to_a_test() {
    let good: Vec<_> = frames().into_iter().map(|(name, _)| name).collect();
    let corrupt: Vec<_> = corruptions().into_iter().map(|(name, ..)| name).collect();
    for (folder, names) in [("good", good), ("corrupt", corrupt)] {
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
            .join("fixtures/wire/v1")
            .join(folder);
        for entry in std::fs::read_dir(path).unwrap() {
            let file = entry.unwrap().file_name().into_string().unwrap();
            let name = file.strip_suffix(".bin").unwrap_or(&file);
            assert!(names.contains(&name), "{folder}/{file}: no test reads it");
        }
    }
}
