//! Letters whole, cut, changed and breaking rules; and the bytes of the released version.

use std::path::{Path, PathBuf};

use super::*;
use crate::manifest::{FdEntry, FdKind, FileId, Stage};

/// Set to write the fixtures of a version that is not released yet instead of comparing with them.
const WRITE: &str = "VMFERRY_WRITE_FIXTURES";

fn entry(name: &str, role: &str, kind: FdKind, stage: Stage) -> FdEntry {
    FdEntry {
        name: name.to_owned(),
        role: role.to_owned(),
        kind,
        stage,
        value: 7,
        file: FileId { dev: 1, ino: 2 },
    }
}

fn letter(leg: Leg) -> Letter {
    let manifest = Manifest::new(vec![
        entry("ram0", "ram", FdKind::RamMemfd, Stage::Prepare),
        entry("process", "archive", FdKind::Other, Stage::HandOver),
    ])
    .unwrap();
    Letter {
        leg,
        pid: 4711,
        id: MigrationId(*b"0123456789abcdef"),
        software: "vmferry 0.1.0".to_owned(),
        manifest,
        numbers: match leg {
            Leg::Asked => Vec::new(),
            _ => vec![12, 7],
        },
        words: vec![b"/opt/vmferry".to_vec(), b"run".to_vec(), Vec::new()],
        reason: match leg {
            Leg::Back => "it has no such device".to_owned(),
            _ => String::new(),
        },
        account: b"{}".to_vec(),
    }
}

const GOOD: [(&str, Leg); 3] = [
    ("asked", Leg::Asked),
    ("there", Leg::There),
    ("back", Leg::Back),
];

/// A letter with this done to its body, and right checksums.
fn with_body(change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let good = letter(Leg::There).encode().unwrap();
    let mut body = good[HEAD_BYTES..].to_vec();
    change(&mut body);
    let mut bytes = good[..12].to_vec();
    put_length(&mut bytes, body.len());
    bytes.extend_from_slice(&crc32c::crc32c(&body).to_le_bytes());
    bytes.extend_from_slice(&crc32c::crc32c(&bytes).to_le_bytes());
    bytes.extend_from_slice(&body);
    bytes
}

/// The same for the head.
fn with_head(change: impl FnOnce(&mut [u8])) -> Vec<u8> {
    let mut bytes = letter(Leg::There).encode().unwrap();
    change(&mut bytes[..HEAD_BYTES - 4]);
    let checksum = crc32c::crc32c(&bytes[..HEAD_BYTES - 4]);
    bytes[HEAD_BYTES - 4..HEAD_BYTES].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

/// Name, bytes, part of the reason.
fn corrupt() -> Vec<(&'static str, Vec<u8>, &'static str)> {
    let good = letter(Leg::There).encode().unwrap();
    let number_at = |body: &[u8], number: u32| {
        let bytes = number.to_le_bytes();
        body.windows(4).position(|part| part == bytes).unwrap()
    };
    let renumbered = |old: u32, new: u32| {
        with_body(|body| {
            let at = number_at(body, old);
            body[at..at + 4].copy_from_slice(&new.to_le_bytes());
        })
    };
    let mut flipped = good.clone();
    *flipped.last_mut().unwrap() ^= 1;
    let mut head = good.clone();
    head[9] ^= 1;
    vec![
        ("empty", Vec::new(), "0 bytes"),
        ("cut_in_the_head", good[..20].to_vec(), "20 bytes"),
        ("cut_in_the_body", good[..60].to_vec(), "60 bytes"),
        ("longer", [&good[..], b"x"].concat(), "should have"),
        (
            "of_another_program",
            [b"QEMU", &good[4..]].concat(),
            "no letter",
        ),
        ("head_changed", head, "checksum of its head"),
        ("body_changed", flipped, "checksum of its body"),
        (
            "newer_version",
            with_head(|head| head[8] = 2),
            "version 2, this build reads 1",
        ),
        ("unknown_leg", with_head(|head| head[10] = 3), "leg"),
        ("reserved", with_head(|head| head[11] = 1), "leg"),
        ("standard_stream", renumbered(12, 2), "number 2 cannot"),
        ("same_number_twice", renumbered(12, 7), "number 7 cannot"),
        (
            "negative_number",
            renumbered(12, u32::MAX),
            "number 4294967295 cannot",
        ),
        (
            "too_many_words",
            with_body(|body| {
                let at = body.windows(4).position(|part| part == b"/opt").unwrap() - 8;
                body[at..at + 4].copy_from_slice(&u32::MAX.to_le_bytes());
            }),
            "words is too long",
        ),
        (
            "word_with_nul",
            with_body(|body| {
                let at = body.windows(3).position(|part| part == b"run").unwrap();
                body[at + 1] = 0;
            }),
            "NUL",
        ),
        (
            "account_longer_than_the_letter",
            with_body(|body| {
                let at = body.len() - 6;
                body[at..at + 4].copy_from_slice(&100_u32.to_le_bytes());
            }),
            "too early",
        ),
        (
            "bytes_behind_it",
            with_body(|body| body.push(0)),
            "too many",
        ),
        (
            "manifest_with_an_unknown_kind",
            with_body(|body| {
                let at = body.windows(4).position(|part| part == b"ram0").unwrap();
                // Behind count, stage: kind, value, device, inode, length of the name.
                body[at - 2 - 24 - 1] = 99;
            }),
            "kind 99",
        ),
    ]
}

fn fixture(folder: &str, name: &str, bytes: &[u8]) -> Vec<u8> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/fixtures/cpr/letter/v1")
        .join(folder);
    let path: PathBuf = folder.join(format!("{name}.bin"));
    if std::env::var_os(WRITE).is_some() {
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(&path, bytes).unwrap();
    }
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn letters_of_version_1_keep_their_bytes() {
    for (name, leg) in GOOD {
        let letter = letter(leg);
        let bytes = letter.encode().unwrap();
        assert_eq!(fixture("good", name, &bytes), bytes, "{name}");
        assert_eq!(Letter::decode(&bytes), Ok(letter), "{name}");
    }
}

#[test]
fn corrupt_letters_of_version_1_are_refused_with_the_reason() {
    for (name, bytes, part) in corrupt() {
        let error = Letter::decode(&fixture("corrupt", name, &bytes)).expect_err(name);
        assert!(error.to_string().contains(part), "{name}: {error}");
    }
}

#[test]
fn no_letter_is_written_that_nobody_could_read() {
    let broken = |change: fn(&mut Letter)| {
        let mut letter = letter(Leg::There);
        change(&mut letter);
        letter.encode().unwrap_err()
    };
    for (change, part) in [
        ((|l| l.numbers.push(9)) as fn(&mut Letter), "3 bytes"),
        (|l| l.numbers[0] = 1, "number 1"),
        (|l| l.words.push(vec![0]), "NUL"),
        (
            |l| l.words = vec![vec![b'x'; TEXT_BYTES_MAX]],
            "command line",
        ),
        (|l| l.account = vec![0; TEXT_BYTES_MAX + 1], "account"),
    ] {
        let error = broken(change).to_string();
        assert!(error.contains(part), "{error}");
    }
}
