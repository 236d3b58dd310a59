//! A page from the records of a migration: one HTML file with everything in it, to be kept, mailed and printed.
//!
//! The plots are SVG made here, so that they are there without the script as well; the script (`script.js`) only shows the figures under
//! the pointer. Texts of a record are escaped, and a content security policy with a random nonce keeps anything that might slip through
//! from running or loading anything.

mod chart;
mod html;
mod lanes;
mod tables;
#[cfg(test)]
mod tests;
mod units;

use std::fmt::Write;

use serde_json::json;

use super::record::{MigrationRecord, Side};
use chart::{Axis, Chart, Form, Series};
use html::{Text, json_block, short};
use units::{Quantity, real};

/// Connections that get a layer of their own.
const LAYERS_MAX: usize = 8;
/// Pieces of time in which throughput is measured, if they are not shorter than [`PIECE_US_MIN`].
const PIECES: u64 = 160;
/// Shorter pieces would show when threads were woken, not how fast the link is.
const PIECE_US_MIN: u64 = 10_000;

/// The records make no page. The caller has chosen the wrong files.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ReportError {
    /// None, or more than two.
    #[error("a report is made of one or two records, not of {0}")]
    Count(usize),
    /// Not the two sides of one migration.
    #[error("the records are of different migrations: {0} and {1}")]
    OtherMigration(String, String),
    /// The same side twice.
    #[error("both records are of the {0}; give one of each side")]
    SameSide(&'static str),
}

/// The page for one record, or for both sides of a migration. `nonce` is a word that nobody could know when the records were written.
///
/// # Errors
/// [`ReportError`], when the records do not belong together.
pub fn page(records: &[MigrationRecord], nonce: &str) -> Result<String, ReportError> {
    let (main, other) = match records {
        [only] => (only, None),
        [a, b] if a.migration_id != b.migration_id => {
            return Err(ReportError::OtherMigration(
                a.migration_id.clone(),
                b.migration_id.clone(),
            ));
        }
        [a, b] if a.side == b.side => return Err(ReportError::SameSide(a.side.name())),
        // The source knows more.
        [a, b] if a.side == Side::Source => (a, Some(b)),
        [a, b] => (b, Some(a)),
        more => return Err(ReportError::Count(more.len())),
    };
    let mut page = String::with_capacity(256 << 10);
    let name = main.vm_name.as_deref().unwrap_or("a VM");
    let title = format!("Migration of {} {}", short(name, 64), main.outcome.name());
    let _ = write!(
        page,
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'nonce-{nonce}'; \
         script-src 'nonce-{nonce}'; base-uri 'none'; form-action 'none'\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n<title>{}</title>\n\
         <style nonce=\"{nonce}\">\n{}</style>\n</head>\n<body>\n<main>\n",
        Text(&title),
        include_str!("style.css")
    );
    tables::heading(main, &mut page);
    tables::key_figures(main, other, &mut page);
    let drawn = plots(main, other, &mut page);
    tables::rounds(main, &mut page);
    tables::timeline([Some(main), other], &mut page);
    tables::samples(main, &mut page);
    tables::settings(main, &mut page);
    let _ = write!(
        page,
        "<footer><p class=\"faint\">Made by vmferry {}. Times are since the begin at the {}; {}all sizes are binary.</p></footer>\n\
         </main>\n<div id=\"tip\" role=\"status\" aria-live=\"polite\" hidden></div>\n\
         <script type=\"application/json\" id=\"plots\">{}</script>\n<script nonce=\"{nonce}\">\n{}</script>\n</body>\n</html>\n",
        env!("CARGO_PKG_VERSION"),
        main.side.name(),
        if other.is_some() {
            "the target's are placed by the clocks of both hosts; "
        } else {
            ""
        },
        json_block(&json!(drawn)),
        include_str!("script.js")
    );
    Ok(page)
}

fn plots(
    main: &MigrationRecord,
    other: Option<&MigrationRecord>,
    page: &mut String,
) -> Vec<serde_json::Value> {
    let sampled = main.samples.last().map_or(0, |sample| sample.at_us);
    let axis = Axis {
        end_us: main.duration_us.max(sampled).max(1),
        bands: lanes::bands(main),
    };
    if !main.timeline.is_empty() {
        lanes::draw_phases(main, &axis, page);
    }
    let mut drawn = Vec::new();
    drawn.extend(throughput(main, other, axis.end_us).draw(&axis, page));
    if main.side == Side::Source {
        drawn.extend(dirty_rate(main).draw(&axis, page));
        drawn.extend(remaining(main).draw(&axis, page));
    }
    drawn.extend(connections(main).draw(&axis, page));
    if main
        .samples
        .iter()
        .any(|sample| sample.throttle_percent > 0)
    {
        drawn.extend(throttle(main).draw(&axis, page));
    }
    lanes::draw_blackout(&main.blackout, page);
    drawn
}

fn throughput(main: &MigrationRecord, other: Option<&MigrationRecord>, end_us: u64) -> Chart {
    let label = |record: &MigrationRecord| match record.side {
        Side::Source => "sent by the source".to_owned(),
        Side::Target => "received by the target".to_owned(),
    };
    let mut series = vec![Series {
        label: label(main),
        points: rates(main, 0),
    }];
    let mut about = "Bytes per second on all data connections together.".to_owned();
    if let Some(other) = other {
        let offset = i128::from(other.began_unix_us) - i128::from(main.began_unix_us);
        let mut points = rates(other, offset);
        let all = points.len();
        points.retain(|(at_us, _)| *at_us <= end_us);
        if points.len() < all || (all == 0 && other.totals.bytes > 0) {
            about.push_str(
                " The clocks of the hosts differ: not all that the other side saw can be shown.",
            );
        }
        series.push(Series {
            label: label(other),
            points,
        });
    }
    Chart {
        id: "throughput",
        title: "Throughput",
        about,
        quantity: Quantity::BytesPerSecond,
        form: Form::Lines,
        series,
        empty: "No pages were moved.",
    }
}

/// Bytes per second in equal pieces of the time in which anything moved. `offset_us` is added to the record's own times; what is then
/// before the begin is left out.
fn rates(record: &MigrationRecord, offset_us: i128) -> Vec<(u64, f64)> {
    let counts: Vec<_> = record.samples.iter().map(|s| (s.at_us, s.bytes)).collect();
    let (Some((first_us, _)), Some((last_us, total))) = (
        counts.iter().find(|(_, bytes)| *bytes > 0).copied(),
        counts.last().copied(),
    ) else {
        return Vec::new();
    };
    if total == 0 {
        return Vec::new();
    }
    // From the last sample without any byte on.
    let quiet = counts
        .iter()
        .rev()
        .find(|(at_us, bytes)| *bytes == 0 && *at_us < first_us);
    let from_us = quiet.map_or(0, |(at_us, _)| *at_us);
    let piece_us = ((last_us - from_us) / PIECES)
        .max(PIECE_US_MIN)
        .min((last_us - from_us).max(1));
    let mut points = Vec::new();
    let (mut at_us, mut before) = (from_us, 0.0);
    while at_us < last_us {
        let next_us = (at_us + piece_us).min(last_us);
        let bytes = bytes_at(&counts, next_us);
        let rate = (bytes - before) / real(next_us - at_us) * 1e6;
        // A short piece at the end says little; its bytes are in the record all the same.
        if next_us - at_us >= piece_us / 2 {
            let shown = i128::from(at_us + (next_us - at_us) / 2) + offset_us;
            points.extend(u64::try_from(shown).ok().map(|shown| (shown, rate)));
        }
        (at_us, before) = (next_us, bytes);
    }
    points
}

/// Bytes at a moment between two samples.
fn bytes_at(counts: &[(u64, u64)], at_us: u64) -> f64 {
    let behind = counts.partition_point(|(sampled, _)| *sampled < at_us);
    match (
        behind.checked_sub(1).map(|index| counts[index]),
        counts.get(behind),
    ) {
        (_, Some((sampled, bytes))) if *sampled == at_us => real(*bytes),
        (Some((from_us, from)), Some((to_us, to))) => {
            let share = real(at_us - from_us) / real(to_us - from_us);
            real(from) + (real(*to) - real(from)) * share
        }
        (None, Some((_, bytes))) => real(*bytes),
        (Some((_, bytes)), None) => real(bytes),
        (None, None) => 0.0,
    }
}

fn dirty_rate(record: &MigrationRecord) -> Chart {
    let mut points: Vec<(u64, f64)> = Vec::new();
    for round in &record.rounds {
        if let Some(rate) = round.dirty_bytes_per_sec {
            points.push((round.began_us, real(rate)));
            points.push((round.began_us.saturating_add(round.duration_us), real(rate)));
        }
    }
    Chart {
        id: "dirty-rate",
        title: "Dirty rate",
        about: "Memory that the guest wrote per second, over each round; known when the dirty log is fetched at its end.".to_owned(),
        quantity: Quantity::BytesPerSecond,
        form: Form::Steps,
        series: vec![Series {
            label: "written by the guest".to_owned(),
            points,
        }],
        empty: "No round came to its end, so the dirty log was never fetched.",
    }
}

fn remaining(record: &MigrationRecord) -> Chart {
    let points = record.samples.iter();
    Chart {
        id: "remaining",
        title: "Remaining",
        about: "Memory that the round under way had still to send. Each round begins with what the guest wrote during the one before."
            .to_owned(),
        quantity: Quantity::Bytes,
        form: Form::Lines,
        series: vec![Series {
            label: "still to send".to_owned(),
            points: points
                .filter_map(|sample| Some((sample.at_us, real(sample.remaining_bytes?))))
                .collect(),
        }],
        empty: "No round began.",
    }
}

fn connections(record: &MigrationRecord) -> Chart {
    let samples: Vec<_> = record
        .samples
        .iter()
        .filter(|sample| !sample.connection_bytes.is_empty())
        .collect();
    let count = samples
        .last()
        .map_or(0, |sample| sample.connection_bytes.len());
    let nothing = samples.last().is_none_or(|sample| sample.bytes == 0);
    let series = |label: String, of: &dyn Fn(&[u64]) -> u64| Series {
        label,
        points: if nothing {
            Vec::new()
        } else {
            let points = samples.iter();
            points
                .map(|sample| (sample.at_us, real(of(&sample.connection_bytes))))
                .collect()
        },
    };
    let (form, about, series) = if count <= LAYERS_MAX {
        let about =
            "Bytes on each data connection since the begin, on top of each other.".to_owned();
        let layers = (0..count).map(|index| {
            let of = move |bytes: &[u64]| bytes.get(index).copied().unwrap_or(0);
            series(format!("connection {index}"), &of)
        });
        (Form::Stack, about, layers.collect())
    } else {
        let about = format!(
            "Bytes on a data connection since the begin: the extremes and the middle of {count}."
        );
        let ranked = |part: fn(usize) -> usize| {
            move |bytes: &[u64]| {
                let mut bytes = bytes.to_vec();
                bytes.sort_unstable();
                bytes.get(part(bytes.len())).copied().unwrap_or(0)
            }
        };
        let three = vec![
            series("most".to_owned(), &ranked(|count| count.saturating_sub(1))),
            series("median".to_owned(), &ranked(|count| count / 2)),
            series("least".to_owned(), &ranked(|_| 0)),
        ];
        (Form::Lines, about, three)
    };
    Chart {
        id: "connections",
        title: "Bytes per connection",
        about,
        quantity: Quantity::Bytes,
        form,
        series,
        empty: "No data connection carried anything.",
    }
}

fn throttle(record: &MigrationRecord) -> Chart {
    let points = record.samples.iter();
    Chart {
        id: "throttle",
        title: "Throttling of the guest",
        about: "Share of the time that the vCPUs were kept from running, so that the migration converges.".to_owned(),
        quantity: Quantity::Percent,
        form: Form::Steps,
        series: vec![Series {
            label: "kept from running".to_owned(),
            points: points
                .map(|sample| (sample.at_us, f64::from(sample.throttle_percent)))
                .collect(),
        }],
        empty: "",
    }
}
