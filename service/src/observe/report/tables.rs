//! The words and figures of the page: heading, key figures, and tables that say what the plots show.

use std::fmt::{Display, Write};

use super::html::{Text, short};
use crate::cli::size::{Size, duration, rate};
use crate::observe::record::{MigrationRecord, Outcome, Round, Sample, Side};

/// Rows at each end of a long table.
const ROWS_AT_ENDS: usize = 60;
/// Longest text shown of what a record says.
const TEXT_CHARS_MAX: usize = 2000;
/// Mark of a figure that is not known.
const UNKNOWN: &str = "–";

/// Bytes in this many pages.
fn pages(count: u64) -> Size {
    Size(count.saturating_mul(4096))
}

fn or_unknown(value: Option<impl Display>) -> String {
    value.map_or_else(|| UNKNOWN.to_owned(), |value| value.to_string())
}

/// Outcome, what was moved where and when, and the error.
pub(super) fn heading(record: &MigrationRecord, page: &mut String) {
    let outcome = record.outcome.name();
    let vm = match &record.vm_name {
        Some(name) => format!("Migration of {}", short(name, 64)),
        None => "Migration".to_owned(),
    };
    let (host, address) = (short(&record.host, 80), short(&record.address, 200));
    let route = match record.side {
        Side::Source => format!("{host} → {address}"),
        Side::Target => format!("→ {host} at {address}"),
    };
    let _ = write!(
        page,
        "<header><h1>{} <span class=\"badge {outcome}\">{outcome}</span></h1>\
         <p class=\"route\">{}</p>\
         <p class=\"faint\">{} UTC · {} · record of the {} · id <code>{}</code></p>",
        Text(&vm),
        Text(&route),
        Text(&readable_time(&record.began)),
        Text(&short(&record.software, 80)),
        record.side.name(),
        Text(&record.migration_id),
    );
    if let Some(error) = &record.error {
        let (title, class) = match record.outcome {
            Outcome::Cancelled => ("Why it ended", "note"),
            _ => ("Why it failed", "error"),
        };
        let error = short(error, TEXT_CHARS_MAX);
        let _ = write!(
            page,
            "<section class=\"{class}\"><h2>{title}</h2><p>{}</p></section>",
            Text(&error)
        );
    }
    if record.outcome == Outcome::Unfinished {
        page.push_str(
            "<section class=\"note\"><h2>Unfinished</h2><p>The process ended before the migration did. What became of the guest is \
             not in this record.</p></section>",
        );
    }
    page.push_str("</header>\n");
}

/// `2026-05-04T13:14:15.000000Z` as people write it.
fn readable_time(began: &str) -> String {
    let whole = began.split('.').next().unwrap_or_default();
    short(&whole.trim_end_matches('Z').replace('T', " "), 40)
}

/// The figures that everybody asks for first.
pub(super) fn key_figures(
    record: &MigrationRecord,
    other: Option<&MigrationRecord>,
    page: &mut String,
) {
    let totals = &record.totals;
    // The target's own limit has no say.
    let limit = match record.side {
        Side::Source => record.parameters.get("downtime-limit"),
        Side::Target => None,
    };
    let limit = limit.and_then(serde_json::Value::as_u64);
    let limit = limit.map(|ms| format!("limit {}", duration(ms.saturating_mul(1000))));
    let mean = match moving_us(record) {
        0 => String::new(),
        us => format!("{}/s on average", rate(totals.bytes, us)),
    };
    let verb = match record.side {
        Side::Source => "Sent",
        Side::Target => "Received",
    };
    let rounds = record.rounds.len() as u64 + record.rounds_omitted;
    let zero = pages(totals.zero_pages);
    let zero = if record.rounds.iter().any(|round| round.unfinished) {
        format!("with content in complete rounds, {zero} zero")
    } else {
        format!("with content, and {zero} zero")
    };
    let blackout = or_unknown(record.blackout_us().map(duration));
    let figures = [
        (
            "Duration",
            duration(record.duration_us),
            "cleanup included".to_owned(),
        ),
        ("Blackout", blackout, limit.unwrap_or_default()),
        (verb, Size(totals.bytes).to_string(), mean),
        ("Pages", pages(totals.data_pages).to_string(), zero),
        ("Rounds", rounds.to_string(), way(record)),
        (
            "Guest memory",
            Size(record.ram_bytes).to_string(),
            populated(record, other),
        ),
    ];
    page.push_str("<dl class=\"key\">");
    for (name, figure, remark) in figures {
        let _ = write!(
            page,
            "<div><dt>{name}</dt><dd>{}<small>{}</small></dd></div>",
            Text(&figure),
            Text(&remark)
        );
    }
    page.push_str("</dl>\n");
}

/// Over what the pages went.
fn way(record: &MigrationRecord) -> String {
    let counts = record.samples.iter().map(|s| s.connection_bytes.len());
    match counts.max() {
        None | Some(0) => "no data connection was made".to_owned(),
        Some(1) => format!("over 1 data connection, {}", short(&record.backend, 20)),
        Some(count) => format!(
            "over {count} data connections, {}",
            short(&record.backend, 20)
        ),
    }
}

/// How much of the memory exists, at both sides as far as it is known.
fn populated(record: &MigrationRecord, other: Option<&MigrationRecord>) -> String {
    let there = other.and_then(|other| other.populated_bytes);
    let (source, target) = match record.side {
        Side::Source => (
            record.populated_bytes,
            record.populated_target_bytes.or(there),
        ),
        Side::Target => (there, record.populated_bytes),
    };
    match (source, target) {
        (Some(source), Some(target)) => {
            format!(
                "populated: source {}, target {}",
                Size(source),
                Size(target)
            )
        }
        (Some(source), None) => format!("{} of it populated at the source", Size(source)),
        (None, Some(target)) => format!("{} of it populated at the target", Size(target)),
        (None, None) => String::new(),
    }
}

/// From the first page to the end of the sending.
fn moving_us(record: &MigrationRecord) -> u64 {
    let first = record.rounds.first().map(|round| round.began_us);
    let last = record
        .rounds
        .iter()
        .map(|round| round.began_us.saturating_add(round.duration_us))
        .max();
    match (first, last) {
        (Some(first), Some(last)) => last.saturating_sub(first),
        _ => 0,
    }
}

/// A table in a box that can be opened.
fn table(page: &mut String, title: &str, open: bool, heads: &[&str], rows: &[Vec<String>]) {
    if rows.is_empty() {
        return;
    }
    let open = if open { " open" } else { "" };
    let _ = write!(
        page,
        "<details{open}><summary>{title}</summary><div class=\"scroll\"><table><thead><tr>"
    );
    for head in heads {
        let _ = write!(page, "<th scope=\"col\">{head}</th>");
    }
    page.push_str("</tr></thead><tbody>");
    let omitted = rows.len().saturating_sub(2 * ROWS_AT_ENDS);
    for (number, row) in rows.iter().enumerate() {
        if omitted > 0 && number == ROWS_AT_ENDS {
            let _ = write!(
                page,
                "<tr><td class=\"omitted\" colspan=\"{}\">{omitted} rows are not shown</td></tr>",
                heads.len()
            );
        }
        if omitted > 0 && (ROWS_AT_ENDS..ROWS_AT_ENDS + omitted).contains(&number) {
            continue;
        }
        page.push_str("<tr>");
        for cell in row {
            let _ = write!(page, "<td>{}</td>", Text(cell));
        }
        page.push_str("</tr>");
    }
    page.push_str("</tbody></table></div></details>\n");
}

/// Every round.
pub(super) fn rounds(record: &MigrationRecord, page: &mut String) {
    let heads = [
        "Round",
        "Began",
        "Took",
        "To send",
        "Content",
        "Zero",
        "On the wire",
        "Dirty after",
        "Dirty rate",
        "Predicted blackout",
    ];
    let row = |round: &Round| {
        let last = match (round.last, round.unfinished) {
            (_, true) => " (unfinished)",
            (true, _) => " (last)",
            _ => "",
        };
        vec![
            format!("{}{last}", round.number),
            duration(round.began_us),
            duration(round.duration_us),
            or_unknown(round.pages.map(pages)),
            pages(round.data_pages).to_string(),
            pages(round.zero_pages).to_string(),
            Size(round.bytes).to_string(),
            or_unknown(round.dirty_pages.map(pages)),
            or_unknown(
                round
                    .dirty_bytes_per_sec
                    .map(|rate| format!("{}/s", Size(rate))),
            ),
            or_unknown(round.predicted_blackout_us.map(duration)),
        ]
    };
    let rows: Vec<_> = record.rounds.iter().map(row).collect();
    table(page, "Rounds", true, &heads, &rows);
    if record.rounds_omitted > 0 {
        let _ = write!(
            page,
            "<p class=\"faint\">{} rounds in the middle are not in the record.</p>",
            record.rounds_omitted
        );
    }
}

/// Changes of the status, at both sides.
pub(super) fn timeline(records: [Option<&MigrationRecord>; 2], page: &mut String) {
    for record in records.into_iter().flatten() {
        let rows: Vec<_> = record
            .timeline
            .iter()
            .map(|change| vec![duration(change.at_us), change.status.name().to_owned()])
            .collect();
        let title = format!("Status at the {}", record.side.name());
        table(page, &title, false, &["After", "Status"], &rows);
    }
}

/// What the plots are drawn from.
pub(super) fn samples(record: &MigrationRecord, page: &mut String) {
    let heads = [
        "After",
        "Bytes",
        "Throughput",
        "Dirty rate",
        "Remaining",
        "Round",
        "Slowest connection",
        "Fastest connection",
        "Throttle",
    ];
    let row = |sample: &Sample| {
        vec![
            duration(sample.at_us),
            Size(sample.bytes).to_string(),
            format!("{}/s", Size(sample.bytes_per_sec)),
            or_unknown(
                sample
                    .dirty_bytes_per_sec
                    .map(|rate| format!("{}/s", Size(rate))),
            ),
            or_unknown(sample.remaining_bytes.map(Size)),
            sample.round.to_string(),
            or_unknown(sample.connection_bytes.iter().min().map(|b| Size(*b))),
            or_unknown(sample.connection_bytes.iter().max().map(|b| Size(*b))),
            format!("{} %", sample.throttle_percent),
        ]
    };
    let rows: Vec<_> = record.samples.iter().map(row).collect();
    table(page, "Figures behind the plots", false, &heads, &rows);
}

/// How it was set up.
pub(super) fn settings(record: &MigrationRecord, page: &mut String) {
    let mut rows: Vec<_> = record
        .parameters
        .iter()
        .map(|(name, value)| {
            let value = match value {
                serde_json::Value::String(text) if text.is_empty() => UNKNOWN.to_owned(),
                serde_json::Value::String(text) => short(text, 200),
                other => short(&other.to_string(), 200),
            };
            vec![short(name, 60), value]
        })
        .collect();
    let capabilities: Vec<_> = record
        .capabilities
        .iter()
        .map(|name| short(name, 60))
        .collect();
    rows.push(vec![
        "capabilities".to_owned(),
        short(&capabilities.join(", "), 400),
    ]);
    table(page, "Parameters", false, &["Name", "Value"], &rows);
    let zero_copy = format!(
        "{} sends, {} of them copied by the kernel",
        record.totals.zero_copy_sends, record.totals.zero_copy_fallbacks
    );
    let rows = [
        ("Accelerator", short(&record.accelerator, 40)),
        ("Moves pages by", short(&record.backend, 40)),
        ("Zero copy", zero_copy),
        ("Software here", short(&record.software, 80)),
        (
            "Software there",
            or_unknown(record.peer_software.as_deref().map(|text| short(text, 80))),
        ),
        ("Process", record.pid.to_string()),
    ]
    .map(|(name, value)| vec![name.to_owned(), value]);
    table(page, "Environment", false, &["What", "Value"], &rows);
}
