//! Saved VMs of every released format: an archive keeps its bytes, and what was changed is refused for the right reason.

use std::path::PathBuf;

use bytes::Bytes;
use vmferry_transport::units::{
    BlockId, MigrationId, PageCount, PageIndex, PageRun, RoundId, Uuid,
};
use vmferry_transport::wire::archive::{
    ARCHIVE_END, ArchiveEncoder, ArchiveError, ArchiveItem, ArchiveReader,
};
use vmferry_transport::wire::device_data::DeviceData;
use vmferry_transport::wire::frame::{SourceFrame, StateEnd};
use vmferry_transport::wire::header::{HEADER_BYTES, encode_frame};
use vmferry_transport::wire::hello::{BlockInfo, Hello, VersionRange};
use vmferry_transport::wire::ram::{RamRun, RamRuns, RoundCounts, RoundEnd, RunKind};
use vmferry_transport::wire::{DeviceSchema, Section};

/// Makes the fixtures anew, for a format that no release has written.
const WRITE: &str = "VMFERRY_WRITE_FIXTURES";

/// A frame and its payload.
type Frame = (Vec<u8>, Vec<u8>);

fn hello() -> Frame {
    bare(SourceFrame::Hello(words_of_hello()).encode())
}

/// Of a guest whose memory stays in place.
fn hello_in_place() -> Frame {
    let hello = Hello {
        data_connections: 0,
        ..words_of_hello()
    };
    bare(SourceFrame::Hello(hello).encode())
}

fn words_of_hello() -> Hello {
    Hello {
        versions: VersionRange { min: 1, max: 1 },
        migration_id: MigrationId(*b"0123456789abcdef"),
        data_connections: 1,
        checksum: true,
        verify: true,
        software: "vmferry 0.1.0".to_owned(),
        blocks: vec![BlockInfo {
            name: "ram".to_owned(),
            pages: PageCount(8),
            page_bytes: 4096,
        }],
        devices: vec![DeviceSchema {
            name: "vcpu/0".to_owned(),
            schema: "kvm-vcpu".to_owned(),
            version_min: 1,
            version_max: 2,
        }],
        uuid: Some(Uuid(*b"fedcba9876543210")),
        switchover_ack: false,
    }
}

fn bare(frame: Vec<u8>) -> Frame {
    (frame, Vec::new())
}

fn ram(round: u32, runs: &[(u64, u64, RunKind)], payload: Vec<u8>) -> Frame {
    let runs = runs.iter().map(|&(start, count, kind)| RamRun {
        pages: PageRun {
            block: BlockId(0),
            start: PageIndex(start),
            count: PageCount(count),
        },
        kind,
    });
    let frame = RamRuns {
        round: RoundId(round),
        payload_crc: Some(crc32c(&payload)),
        runs: runs.collect(),
    };
    (frame.encode(), payload)
}

/// CRC32C, slowly: the fixture is to be checked by another implementation than the one that reads it.
fn crc32c(bytes: &[u8]) -> u32 {
    let step = |crc: u32, _| (crc >> 1) ^ (0x82f6_3b78 * (crc & 1));
    let byte = |crc: u32, byte: &u8| (0..8).fold(crc ^ u32::from(*byte), step);
    !bytes.iter().fold(!0, byte)
}

fn round_end(round: u32, last: bool, [frames, data, zero, hole, device]: [u64; 5]) -> Frame {
    let end = RoundEnd {
        round: RoundId(round),
        last,
        counts: RoundCounts {
            frames,
            data_pages: data,
            zero_pages: zero,
            hole_pages: hole,
            device_bytes: device,
        },
    };
    bare(end.encode())
}

/// A device that gives its state as a stream.
fn device_data(round: u32, offset: u64, payload: &[u8], end: bool) -> Frame {
    let frame = DeviceData {
        round: RoundId(round),
        device: 1,
        offset,
        payload_bytes: u32::try_from(payload.len()).unwrap(),
        payload_crc: crc32c(payload),
        end,
    };
    (frame.encode(), payload.to_vec())
}

fn section() -> Frame {
    bare(
        SourceFrame::Section(Section {
            name: "vcpu/0".to_owned(),
            schema: "kvm-vcpu".to_owned(),
            version: 2,
            bytes: Bytes::from_static(b"state of a device"),
        })
        .encode(),
    )
}

fn state_end(sections: u16, last_round: u32) -> Frame {
    bare(
        SourceFrame::StateEnd(StateEnd {
            sections,
            last_round: RoundId(last_round),
            guest_runs: true,
            ram_hash: Some(0x0102_0304_0506_0708_090a_0b0c_0d0e_0f10),
        })
        .encode(),
    )
}

fn switchover(round: u32) -> Frame {
    bare(SourceFrame::Switchover(RoundId(round)).encode())
}

/// Saved while it ran: two rounds, every kind of run.
fn running() -> Vec<Frame> {
    let page = |byte: u8| vec![byte; 4096];
    let kinds = [
        (0, 1, RunKind::Data),
        (1, 2, RunKind::Zero),
        (3, 4, RunKind::Hole),
        (7, 1, RunKind::Data),
    ];
    vec![
        hello(),
        ram(0, &kinds, [page(1), page(2)].concat()),
        device_data(0, 0, b"first", false),
        round_end(0, false, [2, 2, 2, 4, 5]),
        ram(1, &[(7, 1, RunKind::Data)], page(3)),
        device_data(1, 5, b"", true),
        round_end(1, true, [2, 1, 0, 0, 0]),
        switchover(1),
        section(),
        state_end(1, 1),
    ]
}

/// Saved while it was stopped, with empty memory.
fn stopped() -> Vec<Frame> {
    vec![
        hello(),
        ram(0, &[(0, 8, RunKind::Hole)], Vec::new()),
        round_end(0, true, [1, 0, 0, 8, 0]),
        switchover(0),
        section(),
        state_end(1, 0),
    ]
}

/// Memory stays in place.
fn in_place() -> Vec<Frame> {
    vec![hello_in_place(), switchover(0), section(), state_end(1, 0)]
}

/// Format and name of each good archive.
fn good_archives() -> Vec<(u16, &'static str, Vec<Frame>)> {
    vec![
        (1, "running", running()),
        (1, "stopped", stopped()),
        (2, "in_place", in_place()),
    ]
}

fn archive(frames: &[Frame]) -> Vec<u8> {
    archive_of(1, frames)
}

fn archive_of(version: u16, frames: &[Frame]) -> Vec<u8> {
    let mut encoder = ArchiveEncoder::default();
    let mut bytes = match version {
        1 => encoder.start(),
        _ => encoder.start_in_place(),
    };
    for (frame, payload) in frames {
        encoder.frame(frame, payload.len() as u64);
        bytes.extend_from_slice(frame);
        bytes.extend_from_slice(payload);
    }
    bytes.extend_from_slice(&encoder.end());
    bytes
}

/// Name, what is done to a good archive, and a part of the reason for refusing it.
type Corruption = (&'static str, fn() -> Vec<u8>, &'static str);

fn corruptions_in_place() -> Vec<Corruption> {
    vec![
        (
            "memory_announced",
            || archive_of(2, &[&[hello()], &in_place()[1..]].concat()),
            "the number of data connections is 1, not 0",
        ),
        (
            "with_pages",
            || {
                let pages = ram(0, &[(0, 8, RunKind::Hole)], Vec::new());
                let mut frames = in_place();
                frames.insert(1, pages);
                archive_of(2, &frames)
            },
            "page data where the switchover belongs",
        ),
        (
            "memory_left_out",
            || archive_of(1, &in_place()),
            "the number of data connections is 0, not 1",
        ),
    ]
}

fn all_corruptions() -> impl Iterator<Item = (u16, Corruption)> {
    let of = |version, corruptions: Vec<Corruption>| {
        corruptions.into_iter().map(move |one| (version, one))
    };
    of(1, corruptions()).chain(of(2, corruptions_in_place()))
}

fn changed(change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut bytes = archive(&running());
    change(&mut bytes);
    bytes
}

fn with_frames(change: impl FnOnce(&mut Vec<Frame>)) -> Vec<u8> {
    let mut frames = running();
    change(&mut frames);
    archive(&frames)
}

fn corruptions() -> Vec<Corruption> {
    vec![
        ("empty", Vec::new, "at byte 0: incomplete"),
        (
            "of_another_program",
            || changed(|bytes| bytes[..8].copy_from_slice(b"QEVM\0\0\0\x03")),
            "at byte 0: this is no vmferry archive",
        ),
        (
            "start_changed",
            || changed(|bytes| bytes[8] = 9),
            "at byte 0: the start is corrupt",
        ),
        (
            "newer_version",
            || {
                changed(|bytes| {
                    bytes[8] = 3;
                    let crc = crc32c(&bytes[..12]).to_le_bytes();
                    bytes[12..16].copy_from_slice(&crc);
                })
            },
            "archive format 3, this version reads 1 to 2",
        ),
        (
            "cut_in_the_hello",
            || changed(|bytes| bytes.truncate(50)),
            "at byte 50: incomplete",
        ),
        (
            "cut_in_page_data",
            || changed(|bytes| bytes.truncate(3000)),
            "at byte 3000: incomplete",
        ),
        (
            "without_its_end",
            || changed(|bytes| bytes.truncate(bytes.len() - HEADER_BYTES - 32)),
            "incomplete",
        ),
        (
            "page_data_changed",
            || changed(|bytes| bytes[3000] ^= 1),
            "bad checksum of page data",
        ),
        (
            "frame_changed",
            || changed(|bytes| bytes[60] ^= 1),
            "at byte 16: corrupt: bad checksum of a frame of type 1",
        ),
        (
            "zeros_where_a_frame_belongs",
            || changed(|bytes| bytes[16..].fill(0)),
            "at byte 16: corrupt: no frame begins here",
        ),
        (
            "something_behind_the_end",
            || changed(|bytes| bytes.push(b'x')),
            "bytes follow the end",
        ),
        (
            "pages_without_checksum",
            || {
                with_frames(|frames| {
                    let mut body = frames[1].0.split_off(HEADER_BYTES);
                    body[8..12].fill(0);
                    frames[1].0 = encode_frame(40, 0, &body);
                })
            },
            "page data without checksum",
        ),
        (
            "a_round_left_out",
            || with_frames(|frames| drop(frames.drain(1..4))),
            "the round is 1, not 0",
        ),
        (
            "state_before_the_last_round",
            || with_frames(|frames| drop(frames.remove(6))),
            "the switchover where page data or the end of a round belongs",
        ),
        (
            "a_device_left_out",
            || with_frames(|frames| drop(frames.remove(8))),
            "the number of device states is 1, not 0",
        ),
        (
            "another_last_round",
            || with_frames(|frames| frames[9] = state_end(1, 0)),
            "the round is 0, not 1",
        ),
        (
            "two_data_connections",
            || {
                with_frames(|frames| {
                    let mut body = frames[0].0.split_off(HEADER_BYTES);
                    body[20] = 2;
                    frames[0].0 = encode_frame(1, 0, &body);
                })
            },
            "the number of data connections is 2, not 1",
        ),
        (
            "a_word_of_a_conversation",
            || with_frames(|frames| frames[7] = bare(SourceFrame::Keepalive.encode())),
            "a frame that is of no archive where the switchover belongs",
        ),
        (
            "totals_of_another_archive",
            || {
                changed(|bytes| {
                    let other = archive(&stopped());
                    let end = bytes.len() - HEADER_BYTES - 32;
                    bytes.truncate(end);
                    bytes.extend_from_slice(&other[other.len() - HEADER_BYTES - 32..]);
                })
            },
            "its length is",
        ),
        (
            "a_longer_end",
            || {
                changed(|bytes| {
                    let end = bytes.len() - HEADER_BYTES - 32;
                    bytes.truncate(end);
                    bytes.extend_from_slice(&encode_frame(ARCHIVE_END, 0, &[0; 40]));
                })
            },
            "frame body is too long: 40, at most 32 allowed",
        ),
    ]
}

fn read(mut bytes: &[u8]) -> Result<Vec<ArchiveItem>, ArchiveError> {
    let mut reader = ArchiveReader::default();
    let mut items = Vec::new();
    while reader.wants() > 0 {
        let Some((piece, rest)) = bytes.split_at_checked(reader.wants()) else {
            return Err(reader.ends_early(bytes.len() as u64));
        };
        items.extend(reader.feed(piece)?);
        bytes = rest;
    }
    match bytes {
        [] => Ok(items),
        _ => Err(reader.goes_on()),
    }
}

fn folder(version: u16, kind: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join(format!("fixtures/archive/v{version}"))
        .join(kind)
}

/// The fixture, written first if the environment asks for it.
fn fixture(version: u16, kind: &str, name: &str, bytes: &[u8]) -> Vec<u8> {
    let folder = folder(version, kind);
    let path = folder.join(format!("{name}.bin"));
    if std::env::var_os(WRITE).is_some() {
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(&path, bytes).unwrap();
    }
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn archives_of_versions_1_and_2_keep_their_bytes() {
    for (version, name, frames) in good_archives() {
        let bytes = archive_of(version, &frames);
        assert!(
            fixture(version, "good", name, &bytes) == bytes,
            "{name}: the format has changed, and archives that exist can no longer be loaded"
        );
        // Each frame is an item, and the end is one more.
        assert_eq!(read(&bytes).unwrap().len(), frames.len() + 1, "{name}");
    }
}

#[test]
fn corrupt_archives_of_versions_1_and_2_are_refused_with_the_reason() {
    for (version, (name, make, reason)) in all_corruptions() {
        let error = read(&fixture(version, "corrupt", name, &make())).expect_err(name);
        assert!(error.to_string().contains(reason), "{name}: {error}");
    }
}

#[test]
fn every_archive_belongs_to_a_test() {
    let good = good_archives().into_iter();
    let good = good.map(|(version, name, _)| (version, "good", name));
    let corrupt = all_corruptions().map(|(version, (name, ..))| (version, "corrupt", name));
    let known: Vec<_> = good.chain(corrupt).collect();
    for (version, kind) in [(1, "good"), (1, "corrupt"), (2, "good"), (2, "corrupt")] {
        for entry in std::fs::read_dir(folder(version, kind)).unwrap() {
            let file = entry.unwrap().file_name().into_string().unwrap();
            let name = file.strip_suffix(".bin").unwrap_or(&file);
            assert!(
                known.contains(&(version, kind, name)),
                "v{version}/{kind}/{file}: no test reads it"
            );
        }
    }
}
