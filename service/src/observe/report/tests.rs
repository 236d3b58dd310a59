//! The page as text; a browser looks at it in `tests/e2e/observe.rs`.

use super::*;
use crate::migration::status::MigrationStatus;
use crate::observe::record::read::parse;
use crate::observe::record::{BlackoutPart, Outcome, Round, Sample, StatusChange};

fn source() -> MigrationRecord {
    let bytes = include_bytes!("../../../../tests/fixtures/record/v1/good/source.json");
    parse(bytes).unwrap()
}

fn target() -> MigrationRecord {
    let bytes = include_bytes!("../../../../tests/fixtures/record/v1/good/target.json");
    parse(bytes).unwrap()
}

fn failed() -> MigrationRecord {
    let bytes = include_bytes!("../../../../tests/fixtures/record/v1/good/failed.json");
    parse(bytes).unwrap()
}

/// What the page gives its script.
fn data(page: &str) -> serde_json::Value {
    let (_, rest) = page.split_once("id=\"plots\">").unwrap();
    let (data, _) = rest.split_once("</script>").unwrap();
    serde_json::from_str(data).unwrap()
}

#[test]
fn a_completed_migration_has_every_plot_and_its_figures() {
    let page = page(&[source(), target()], "n").unwrap();
    for id in [
        "phases",
        "throughput",
        "dirty-rate",
        "remaining",
        "connections",
        "blackout",
    ] {
        assert!(page.contains(&format!("id=\"plot-{id}\"")), "{id}");
    }
    let data = data(&page);
    let ids: Vec<_> = data
        .as_array()
        .unwrap()
        .iter()
        .map(|plot| &plot["id"])
        .collect();
    assert_eq!(
        ids,
        ["throughput", "dirty-rate", "remaining", "connections"]
    );
    assert_eq!(data[0]["series"].as_array().unwrap().len(), 2);
    assert_eq!(data[3]["series"].as_array().unwrap().len(), 4);
    assert!(page.contains("Status at the source") && page.contains("Status at the target"));
    assert!(page.contains("id <code>10b8829ad1e32e797d6ab0e661da9927</code>"));
}

#[test]
fn nothing_is_loaded_from_anywhere() {
    let page = page(&[source()], "secret").unwrap();
    for outside in ["src=", "@import", "url(", "href=\"http", "<img", "<iframe"] {
        assert!(!page.contains(outside), "{outside}");
    }
    assert!(page.contains("default-src 'none'"));
    assert_eq!(page.matches("<script").count(), 2);
    assert_eq!(page.matches("nonce=\"secret\"").count(), 2);
    assert!(
        !page.contains(" style=\""),
        "the policy forbids style attributes"
    );
}

#[test]
fn no_text_of_a_record_becomes_markup() {
    const EVIL: &str = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'";
    let mut record = source();
    for text in [
        &mut record.software,
        &mut record.host,
        &mut record.address,
        &mut record.began,
        &mut record.accelerator,
        &mut record.backend,
    ] {
        *text = EVIL.to_owned();
    }
    record.vm_name = Some(EVIL.to_owned());
    record.peer_software = Some(EVIL.to_owned());
    record.error = Some(EVIL.to_owned());
    record.capabilities = vec![EVIL.to_owned()];
    record.parameters.insert(EVIL.to_owned(), EVIL.into());
    for part in &mut record.blackout {
        part.part = EVIL.to_owned();
    }
    record.outcome = Outcome::Failed;
    let page = page(&[record], "n").unwrap();
    assert_eq!(page.matches("<script").count(), 2);
    assert_eq!(page.matches("</script").count(), 2);
    assert!(!page.contains("<img"));
    assert!(page.contains("&lt;/script&gt;"));
}

#[test]
fn a_migration_that_did_nothing_says_so_instead_of_empty_plots() {
    let page = page(&[failed()], "n").unwrap();
    assert_eq!(data(&page), serde_json::json!([]));
    assert!(page.contains("No pages were moved."));
    assert!(page.contains("Why it failed") && page.contains("Connection refused"));
    assert!(page.contains("Known to the source"));
    assert!(!page.contains("NaN") && !page.contains("inf"));
}

#[test]
fn numbers_at_their_limits_make_a_page_that_is_no_larger_than_sensible() {
    let mut record = source();
    record.duration_us = 1 << 50;
    record.totals.bytes = u64::MAX;
    record.totals.data_pages = u64::MAX;
    record.blackout = vec![
        BlackoutPart {
            part: "x".repeat(5000),
            duration_us: 1 << 50,
        };
        64
    ];
    record.timeline = vec![
        StatusChange {
            at_us: 1 << 50,
            status: MigrationStatus::Active,
        };
        256
    ];
    record.rounds = (0..2048)
        .map(|number| Round {
            number,
            began_us: number,
            duration_us: 1 << 50,
            pages: Some(u64::MAX),
            bytes: u64::MAX,
            dirty_bytes_per_sec: Some(u64::MAX),
            ..Round::default()
        })
        .collect();
    record.samples = (0..255)
        .map(|number| Sample {
            at_us: number * number,
            bytes: u64::MAX,
            remaining_bytes: Some(u64::MAX),
            connection_bytes: vec![u64::MAX; 255],
            throttle_percent: 99,
            ..Sample::default()
        })
        .collect();
    let page = page(&[record], "n").unwrap();
    assert!(page.len() < 2 << 20, "{}", page.len());
    assert!(!page.contains("NaN") && !page.contains("inf"));
    assert!(page.contains("plot-throttle"));
    assert_eq!(data(&page)[3]["series"][0]["label"], "most");
}

#[test]
fn records_that_do_not_belong_together_are_refused() {
    assert_eq!(page(&[], "n"), Err(ReportError::Count(0)));
    assert_eq!(
        page(&[source(), source()], "n"),
        Err(ReportError::SameSide("source"))
    );
    let other = page(&[source(), failed()], "n").unwrap_err();
    assert!(
        other.to_string().contains("different migrations"),
        "{other}"
    );
}

#[test]
fn hosts_whose_clocks_differ_are_told_of_and_spoil_no_plot() {
    for shift in [-3_600_000_000_i64, 3_600_000_000] {
        let mut other = target();
        other.began_unix_us = other.began_unix_us.saturating_add_signed(shift);
        let page = page(&[source(), other], "n").unwrap();
        assert!(page.contains("The clocks of the hosts differ"), "{shift}");
        assert_eq!(data(&page)[0]["series"].as_array().unwrap().len(), 1);
    }
    let page = page(&[source(), target()], "n").unwrap();
    assert!(!page.contains("The clocks of the hosts differ"));
}

#[test]
fn the_rates_of_a_plot_add_up_to_the_bytes_that_were_moved() {
    let record = source();
    let rates = rates(&record, 0);
    assert!(rates.len() >= 5, "{rates:?}");
    let piece_us = real(rates[1].0 - rates[0].0);
    let moved: f64 = rates.iter().map(|(_, rate)| rate * piece_us / 1e6).sum();
    let total = real(record.totals.bytes);
    assert!((moved / total - 1.0).abs() < 0.1, "{moved} of {total}");
}
