//! Records that were written, cut, spoilt, and written into folders that do not want them.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use serde_json::{Value, json};

use super::read::{RecordFault, parse, read};
use super::writer::RecordWriter;
use super::{MigrationRecord, Outcome, Side};

const GOOD: [&[u8]; 3] = [
    include_bytes!("../../../../tests/fixtures/record/v1/good/source.json"),
    include_bytes!("../../../../tests/fixtures/record/v1/good/target.json"),
    include_bytes!("../../../../tests/fixtures/record/v1/good/failed.json"),
];

fn value(bytes: &[u8]) -> Value {
    serde_json::from_slice(bytes).unwrap()
}

fn spoilt(change: impl FnOnce(&mut Value)) -> RecordFault {
    let mut record = value(GOOD[0]);
    change(&mut record);
    parse(record.to_string().as_bytes()).unwrap_err()
}

#[test]
fn records_of_version_1_stay_readable_and_are_written_the_same() {
    for bytes in GOOD {
        let record = parse(bytes).unwrap();
        assert_eq!(serde_json::to_value(&record).unwrap(), value(bytes));
    }
    let source = parse(GOOD[0]).unwrap();
    assert_eq!(
        (source.side, source.outcome),
        (Side::Source, Outcome::Completed)
    );
    assert!(source.blackout_us() > Some(0));
    let target = parse(GOOD[1]).unwrap();
    assert_eq!(target.migration_id, source.migration_id);
    assert_eq!(target.blackout_us(), None);
    assert_eq!(parse(GOOD[2]).unwrap().outcome, Outcome::Failed);
}

#[test]
fn the_rounds_of_a_record_add_up_to_its_totals() {
    for bytes in &GOOD[..2] {
        let record = parse(bytes).unwrap();
        let sum = |of: fn(&super::Round) -> u64| record.rounds.iter().map(of).sum::<u64>();
        assert_eq!(sum(|round| round.data_pages), record.totals.data_pages);
        assert_eq!(sum(|round| round.zero_pages), record.totals.zero_pages);
        assert_eq!(sum(|round| round.bytes), record.totals.bytes);
        assert_eq!(record.samples.last().unwrap().bytes, record.totals.bytes);
        let pages = |round: &super::Round| round.data_pages + round.zero_pages;
        assert!(record.rounds.iter().all(|round| pages(round) > 0));
        let last: Vec<_> = record.rounds.iter().map(|round| round.last).collect();
        assert!(last.ends_with(&[true]) && last.iter().filter(|last| **last).count() == 1);
    }
}

#[test]
fn a_record_that_is_cut_anywhere_is_refused_as_cut_off() {
    for bytes in GOOD {
        let end = bytes.iter().rposition(|byte| *byte == b'}').unwrap();
        for cut in 1..=end {
            match parse(&bytes[..cut]) {
                Err(RecordFault::CutOff { line: 1 }) => {}
                other => panic!("{cut}: {other:?}"),
            }
        }
    }
    assert!(matches!(parse(b""), Err(RecordFault::NotARecord(_))));
}

/// Every place in a value, as a JSON pointer. Of a list, the first element stands for all.
fn places(value: &Value, at: &str, found: &mut Vec<String>) {
    match value {
        Value::Object(members) => members.iter().for_each(|(name, member)| {
            let place = format!("{at}/{name}");
            found.push(place.clone());
            places(member, &place, found);
        }),
        Value::Array(items) if !items.is_empty() => places(&items[0], &format!("{at}/0"), found),
        _ => {}
    }
}

#[test]
fn wrong_types_and_numbers_anywhere_never_panic_and_are_named() {
    let good = value(GOOD[0]);
    let mut found = Vec::new();
    places(&good, "", &mut found);
    assert!(found.len() > 60, "{found:?}");
    let wrong = [
        json!(null),
        json!(-1),
        json!(1.5),
        json!(1e300),
        json!(u64::MAX),
        json!("<script>"),
        json!([[[]]]),
        json!({}),
    ];
    for place in found {
        // What the parameters say is shown as it is.
        let free = place.starts_with("/parameters/");
        let refused = wrong.iter().filter(|wrong| {
            let mut record = good.clone();
            *record.pointer_mut(&place).unwrap() = (*wrong).clone();
            let parsed = parse(record.to_string().as_bytes());
            parsed.is_err_and(|fault| !fault.to_string().is_empty())
        });
        assert!(free || refused.count() >= 3, "{place}");
    }
}

#[test]
fn what_the_page_relies_on_is_checked() {
    type Change = fn(&mut Value);
    let cases: [(Change, &str); 10] = [
        (|r| r["format"] = json!("x".repeat(500)), "its format is"),
        (|r| r["version"] = json!(0), "version 0, this vmferry reads"),
        (|r| r["version"] = json!(2), "or a newer one"),
        (|r| r["migration-id"] = json!("../../etc"), "32 hexadecimal"),
        (
            |r| drop(r.as_object_mut().unwrap().remove("timeline")),
            "missing field `timeline`",
        ),
        (
            |r| r["samples"][0]["at-us"] = json!(1_u64 << 40),
            "not in the order",
        ),
        (
            |r| r["samples"][0]["bytes"] = json!(1_u64 << 60),
            "get fewer",
        ),
        (|r| r["timeline"][3]["at-us"] = json!(u64::MAX), "a time of"),
        (|r| r["duration-us"] = json!(u64::MAX), "a time of"),
        (
            |r| r["samples"] = json!(vec![r["samples"][0].clone(); 3000]),
            "3000 entries",
        ),
    ];
    for (change, part) in cases {
        let text = spoilt(change).to_string();
        assert!(text.contains(part), "{text} / {part}");
        assert!(text.len() < 300, "{text}");
    }
    let many = spoilt(|r| {
        r["samples"] = json!(vec![r["samples"][0].clone(); 2000]);
        for sample in r["samples"].as_array_mut().unwrap() {
            sample["connection-bytes"] = json!(vec![1; 100]);
        }
    });
    assert!(many.to_string().contains("connection-bytes"), "{many}");
    assert!(matches!(parse(b"[1]"), Err(RecordFault::NotARecord(_))));
    assert!(matches!(parse(b"\x7fELF"), Err(RecordFault::NotARecord(_))));
    // Deeper than any parser may follow.
    let deep = "[".repeat(1 << 20);
    assert!(matches!(
        parse(deep.as_bytes()),
        Err(RecordFault::NotARecord(_))
    ));
}

#[test]
fn members_of_a_later_writer_are_ignored() {
    let mut record = value(GOOD[0]);
    record["new"] = json!({ "a": [1] });
    record["rounds"][0]["new"] = json!(1);
    let read = parse(record.to_string().as_bytes()).unwrap();
    assert_eq!(read, parse(GOOD[0]).unwrap());
}

#[test]
fn a_file_larger_than_any_record_is_not_read_to_its_end() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("huge.json");
    let file = fs::File::create(&path).unwrap();
    // Sparse: a terabyte costs nothing until somebody reads it.
    file.set_len(1 << 40).unwrap();
    let error = read(&path).unwrap_err();
    assert!(matches!(error.fault, RecordFault::TooLarge), "{error}");
    assert!(error.to_string().contains("huge.json"));
    let missing = read(&dir.path().join("none.json")).unwrap_err();
    assert!(matches!(missing.fault, RecordFault::Io(_)));
}

#[test]
fn records_are_written_for_their_owner_and_never_over_one_another() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("a/b");
    let record = parse(GOOD[0]).unwrap();
    let writer = RecordWriter::start(&folder).unwrap();
    for outcome in [Outcome::Failed, Outcome::Completed] {
        let record = MigrationRecord {
            outcome,
            ..record.clone()
        };
        writer.submit(record);
    }
    writer.finish();
    let mut names: Vec<_> = fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    let name = "20261120T203313.622Z-10b8829ad1e32e797d6ab0e661da9927-source";
    assert_eq!(names, [format!("{name}-2.json"), format!("{name}.json")]);
    for (name, outcome) in [
        (&names[0], Outcome::Completed),
        (&names[1], Outcome::Failed),
    ] {
        let path = folder.join(name);
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert_eq!(read(&path).unwrap().outcome, outcome);
    }
    assert_eq!(
        fs::metadata(&folder).unwrap().permissions().mode() & 0o777,
        0o700
    );
}

#[test]
fn a_folder_that_takes_no_records_is_noticed_at_once_or_costs_only_the_record() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    let error = RecordWriter::start(&file.join("below")).unwrap_err();
    assert!(format!("{error:#}").contains("below"), "{error:#}");
    // Gone while the process runs.
    let folder = dir.path().join("gone");
    let writer = RecordWriter::start(&folder).unwrap();
    fs::remove_dir(&folder).unwrap();
    writer.submit(parse(GOOD[0]).unwrap());
    writer.finish();
    assert!(!folder.exists());
}
