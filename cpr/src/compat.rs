//! The bytes of every message of every released version stay what they are, and corrupt ones are refused for the right reason.
//!
//! Fixtures lie in `tests/fixtures/cpr/v1`; `tests/fixtures/README.md` says how they are made.

use std::path::{Path, PathBuf};

use vmferry_transport::units::MigrationId;
use vmferry_transport::wire::frame::FrameBuffer;
use vmferry_transport::wire::header::encode_frame;
use vmferry_transport::wire::hello::VersionRange;

use crate::manifest::{FdEntry, FdKind, FileId, Manifest, Stage};
use crate::message::{GiverMessage, Offer, TakerMessage};

/// Set to write the fixtures of a version that is not released yet instead of comparing with them.
const WRITE: &str = "VMFERRY_WRITE_FIXTURES";

fn entry(name: &str, role: &str, kind: FdKind, stage: Stage, value: u64) -> FdEntry {
    FdEntry {
        name: name.to_owned(),
        role: role.to_owned(),
        kind,
        stage,
        value,
        file: FileId {
            dev: 1,
            ino: 0x1234_5678,
        },
    }
}

fn offer() -> Offer {
    let mut entries = vec![entry(
        "ram0",
        "ram",
        FdKind::RamMemfd,
        Stage::Prepare,
        1 << 30,
    )];
    for kind in FdKind::ALL {
        entries.push(entry(
            "device",
            kind.name(),
            kind,
            Stage::HandOver,
            kind as u64,
        ));
    }
    Offer {
        versions: VersionRange { min: 1, max: 1 },
        id: MigrationId(*b"0123456789abcdef"),
        software: "vmferry 0.1.0".to_owned(),
        manifest: Ok(Manifest::new(entries).unwrap()),
    }
}

fn giver_messages() -> Vec<(&'static str, GiverMessage)> {
    vec![
        ("offer", GiverMessage::Offer(offer())),
        (
            "offer_of_nothing",
            GiverMessage::Offer(Offer {
                manifest: Ok(Manifest::default()),
                ..offer()
            }),
        ),
        (
            "fds",
            GiverMessage::Fds {
                first: 1,
                count: 16,
            },
        ),
        ("stage_prepare", GiverMessage::Stage(Stage::Prepare)),
        ("stage_hand_over", GiverMessage::Stage(Stage::HandOver)),
        (
            "give_up",
            GiverMessage::GiveUp("cancelled by the operator".to_owned()),
        ),
    ]
}

fn taker_messages() -> Vec<(&'static str, TakerMessage)> {
    vec![
        (
            "accept",
            TakerMessage::Accept {
                version: 1,
                software: "vmferry 0.1.0".to_owned(),
            },
        ),
        ("taken_prepare", TakerMessage::Taken(Stage::Prepare)),
        ("taken_hand_over", TakerMessage::Taken(Stage::HandOver)),
        ("refuse", TakerMessage::Refuse("no memory".to_owned())),
    ]
}

/// Frames that must be refused: name, bytes, part of the reason.
fn corrupt() -> Vec<(&'static str, Vec<u8>, &'static str)> {
    let good = GiverMessage::Offer(offer()).encode();
    let body = &good[16..];
    // Versions, id, and the length and bytes of the software stand before the number of entries.
    let count_at = 4 + 16 + 2 + "vmferry 0.1.0".len();
    let with = |at: usize, byte: u8| {
        let mut body = body.to_vec();
        body[at] = byte;
        encode_frame(0x40, 0, &body)
    };
    let mut flipped = good.clone();
    *flipped.last_mut().unwrap() ^= 1;
    let longer = [
        GiverMessage::Stage(Stage::Prepare).encode()[16..].to_vec(),
        vec![0],
    ]
    .concat();
    let fds = |count: u32| [1_u32.to_le_bytes(), count.to_le_bytes()].concat();
    vec![
        ("bad_checksum", flipped, "checksum"),
        (
            "early_owner",
            with(count_at + 5, FdKind::Vhost as u8),
            "one owner",
        ),
        ("unknown_kind", with(count_at + 5, 99), "kind 99"),
        ("bad_stage", with(count_at + 4, 7), "stage"),
        ("too_many_entries", with(count_at + 3, 0xff), "at most"),
        ("one_entry_too_many", with(count_at, 18), "too early"),
        (
            "no_descriptors",
            encode_frame(0x41, 0, &fds(0)),
            "number of descriptors",
        ),
        (
            "over_the_kernels_limit",
            encode_frame(0x41, 0, &fds(254)),
            "number of descriptors",
        ),
        ("longer_stage", encode_frame(0x42, 0, &longer), "too many"),
        (
            "of_the_control_connection",
            encode_frame(1, 0, b""),
            "frame type 1",
        ),
        ("flags", encode_frame(0x42, 1, &[0]), "flags"),
    ]
}

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/fixtures/cpr/v1")
        .join(name)
}

/// The bytes that were committed under this name; writes them first if told to.
fn fixture(folder_name: &str, name: &str, bytes: &[u8]) -> Vec<u8> {
    let path = folder(folder_name).join(format!("{name}.bin"));
    if std::env::var_os(WRITE).is_some() {
        std::fs::create_dir_all(folder(folder_name)).unwrap();
        std::fs::write(&path, bytes).unwrap();
    }
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn hand_over_messages_of_version_1_keep_their_bytes() {
    for (name, message) in giver_messages() {
        let bytes = fixture("good", name, &message.encode());
        assert_eq!(message.encode(), bytes, "{name}");
        let mut buffer = FrameBuffer::default();
        buffer.push(&bytes);
        assert_eq!(buffer.poll_frame().unwrap(), Some(message), "{name}");
    }
    for (name, message) in taker_messages() {
        let bytes = fixture("good", name, &message.encode());
        assert_eq!(message.encode(), bytes, "{name}");
        let mut buffer = FrameBuffer::default();
        buffer.push(&bytes);
        assert_eq!(buffer.poll_frame().unwrap(), Some(message), "{name}");
    }
}

#[test]
fn corrupt_hand_over_messages_of_version_1_are_refused_with_the_reason() {
    for (name, bytes, part) in corrupt() {
        let bytes = fixture("corrupt", name, &bytes);
        let mut buffer = FrameBuffer::default();
        buffer.push(&bytes);
        let reason = match buffer.poll_frame::<GiverMessage>() {
            Err(error) => error.to_string(),
            Ok(Some(GiverMessage::Offer(Offer {
                manifest: Err(error),
                ..
            }))) => error.to_string(),
            other => panic!("{name} was accepted: {other:?}"),
        };
        assert!(reason.contains(part), "{name}: {reason}");
    }
}
