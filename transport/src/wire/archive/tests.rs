//! Archives whole, cut, changed and put together wrongly.

use super::*;
use crate::units::{BlockId, MigrationId, PageIndex, PageRun};
use crate::wire::Section;
use crate::wire::frame::StateEnd;
use crate::wire::hello::{BlockInfo, VersionRange};
use crate::wire::ram::{RamRun, RoundCounts, RunKind};

fn hello() -> Hello {
    Hello {
        versions: VersionRange::OURS,
        migration_id: MigrationId([1; 16]),
        data_connections: 1,
        checksum: true,
        verify: false,
        software: "s".into(),
        blocks: vec![BlockInfo {
            name: "ram".into(),
            pages: PageCount(3),
            page_bytes: 4096,
        }],
        devices: Vec::new(),
        uuid: None,
        switchover_ack: false,
    }
}

fn ram(round: u32, kind: RunKind, payload: &[u8]) -> Vec<u8> {
    let pages = PageRun {
        block: BlockId(0),
        start: PageIndex(1),
        count: PageCount(1),
    };
    let frame = RamRuns {
        round: RoundId(round),
        payload_crc: Some(crc32c::crc32c(payload)),
        runs: vec![RamRun { pages, kind }],
    };
    frame.encode()
}

fn round_end(round: u32, last: bool) -> Vec<u8> {
    let (round, counts) = (RoundId(round), RoundCounts::default());
    RoundEnd {
        round,
        last,
        counts,
    }
    .encode()
}

fn section() -> SourceFrame {
    SourceFrame::Section(Section {
        name: "cpu".into(),
        schema: "x".into(),
        version: 1,
        bytes: Bytes::from_static(b"state"),
    })
}

fn state_end(sections: u16) -> SourceFrame {
    SourceFrame::StateEnd(StateEnd {
        sections,
        last_round: RoundId(1),
        guest_runs: true,
        ram_hash: None,
    })
}

/// Frames behind the hello, each with its payload.
fn frames() -> Vec<(Vec<u8>, Vec<u8>)> {
    let page = vec![7; 4096];
    let bare = |frame: Vec<u8>| (frame, Vec::new());
    vec![
        (ram(0, RunKind::Data, &page), page),
        bare(ram(0, RunKind::Hole, &[])),
        bare(round_end(0, false)),
        bare(round_end(1, true)),
        bare(SourceFrame::Switchover(RoundId(1)).encode()),
        bare(section().encode()),
        bare(state_end(1).encode()),
    ]
}

fn archive_of(frames: &[(Vec<u8>, Vec<u8>)]) -> Vec<u8> {
    let mut encoder = ArchiveEncoder::default();
    let mut bytes = encoder.start();
    let hello = (SourceFrame::Hello(hello()).encode(), Vec::new());
    for (frame, payload) in [&[hello], frames].concat() {
        let (frame, payload) = (&frame, &payload);
        encoder.frame(frame, payload.len() as u64);
        bytes.extend_from_slice(frame);
        bytes.extend_from_slice(payload);
    }
    assert_eq!(encoder.bytes(), bytes.len() as u64);
    bytes.extend_from_slice(&encoder.end());
    bytes
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

#[test]
fn an_archive_is_read_as_it_was_written() {
    let items = read(&archive_of(&frames())).unwrap();
    assert_eq!(items.len(), frames().len() + 2);
    assert_eq!(items[0], ArchiveItem::Hello(Box::new(hello())));
    let payload_bytes = 4096;
    assert_eq!(items[1], ArchiveItem::Ram { payload_bytes });
    assert_eq!(items[2], ArchiveItem::Ram { payload_bytes: 0 });
    assert_eq!(items[6], ArchiveItem::Control(section()));
    assert_eq!(items[8], ArchiveItem::End);
}

#[test]
fn an_archive_cut_anywhere_is_incomplete_at_that_byte() {
    let bytes = archive_of(&frames());
    for len in 0..bytes.len() {
        let error = read(&bytes[..len]).unwrap_err();
        let (offset, fault) = (len as u64, ArchiveFault::Incomplete);
        assert_eq!(error, ArchiveError { offset, fault });
    }
}

#[test]
fn every_changed_byte_is_noticed_before_the_end() {
    let good = archive_of(&frames());
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 1 << (at % 8);
        let error = read(&bad).unwrap_err();
        // A length that grew is noticed where the bytes end.
        assert!(error.offset <= bad.len() as u64 + 4096, "{at}: {error}");
        assert!(
            error.offset <= at as u64 || error.fault == ArchiveFault::Incomplete,
            "{at}: {error}"
        );
    }
}

#[test]
fn what_follows_the_end_is_refused() {
    let mut bytes = archive_of(&frames());
    let end = bytes.len() as u64;
    bytes.push(0);
    let error = read(&bytes).unwrap_err();
    assert_eq!((error.offset, error.fault), (end, ArchiveFault::Trailing));
}

#[test]
fn other_versions_and_other_files_are_told_apart() {
    let mut bytes = archive_of(&frames());
    bytes[8] = 3;
    let crc = crc32c::crc32c(&bytes[..12]).to_le_bytes();
    bytes[12..16].copy_from_slice(&crc);
    let error = read(&bytes).unwrap_err().to_string();
    assert_eq!(
        error,
        "at byte 0: archive format 3, this version reads 1 to 2"
    );
    let error = read(b"QEVM and then sixteen").unwrap_err().to_string();
    assert_eq!(error, "at byte 0: this is no vmferry archive");
}

#[test]
fn a_frame_in_the_wrong_place_is_named() {
    let cases: [(usize, Vec<u8>, &str); 6] = [
        (
            0,
            state_end(0).encode(),
            "page data or the end of a round belongs",
        ),
        (
            4,
            section().encode(),
            "device state where the switchover belongs",
        ),
        (3, round_end(2, true), "the round is 2, not 1"),
        (
            6,
            state_end(2).encode(),
            "number of device states is 2, not 1",
        ),
        (
            6,
            SourceFrame::Commit.encode(),
            "a frame that is of no archive",
        ),
        (
            4,
            SourceFrame::Switchover(RoundId(0)).encode(),
            "the round is 0, not 1",
        ),
    ];
    for (at, frame, part) in cases {
        let mut frames = frames();
        frames[at] = (frame, Vec::new());
        let error = read(&archive_of(&frames)).unwrap_err().to_string();
        assert!(error.contains(part), "{error:?} does not say {part:?}");
    }
}

#[test]
fn frames_left_out_are_missed_at_the_end() {
    let all = frames();
    let mut without = ArchiveEncoder::default();
    let mut bytes = without.start();
    let hello = SourceFrame::Hello(hello()).encode();
    without.frame(&hello, 0);
    bytes.extend_from_slice(&hello);
    let mut with = without.clone();
    for (at, (frame, payload)) in all.iter().enumerate() {
        with.frame(frame, payload.len() as u64);
        if at != 1 {
            bytes.extend_from_slice(frame);
            bytes.extend_from_slice(payload);
        }
    }
    bytes.extend_from_slice(&with.end());
    let error = read(&bytes).unwrap_err();
    assert!(matches!(
        error.fault,
        ArchiveFault::Contradiction {
            what: "its length",
            ..
        }
    ));
}

#[test]
fn page_data_needs_a_checksum() {
    let mut frames = frames();
    let unchecked = RamRuns::decode(
        &FrameHeader::decode(frames[0].0.first_chunk().unwrap()).unwrap(),
        &frames[0].0[HEADER_BYTES..],
        &[PageCount(3)],
    );
    let unchecked = RamRuns {
        payload_crc: None,
        ..unchecked.unwrap()
    };
    frames[0].0 = unchecked.encode();
    let error = read(&archive_of(&frames)).unwrap_err().to_string();
    assert!(error.contains("without checksum"), "{error}");
}
