//! The end of a migration in a few lines.

use crate::cli::record::Record;
use crate::cli::size::{Size, duration, rate};
use crate::cli::style::{Colours, Tone};
use crate::migration::status::MigrationStatus;

/// Parts of the blackout in a line of 80 columns.
const PARTS_PER_LINE: usize = 3;

/// The end in a few lines for people; without the reason of a failure.
pub(in crate::cli) fn summary(record: &Record, colours: Colours) -> Vec<String> {
    let status = record.status();
    let tone = match status {
        MigrationStatus::Completed => Tone::Good,
        MigrationStatus::Cancelled => Tone::Attention,
        _ => Tone::Bad,
    };
    let mut first = colours.paint(tone, &record.status_name());
    let took = record.total_ms().map(|ms| ms.saturating_mul(1000));
    match (record.ram("transferred"), took) {
        (Some(0), Some(0)) => first.push_str(" at once"),
        (Some(0), Some(us)) => first.push_str(&format!(" after {}", duration(us))),
        (Some(sent), Some(us)) => first.push_str(&format!(
            " {} {}: {} in {}, {}/s",
            if status == MigrationStatus::Completed {
                "in"
            } else {
                "after"
            },
            duration(us),
            Size(sent),
            counted(record.round(), "round"),
            rate(sent, us),
        )),
        (Some(received), None) => first.push_str(&format!(": {} received", Size(received))),
        (None, _) => {}
    }
    let mut lines = vec![first];
    if let Some((count @ 1.., backend)) = record.connections() {
        let connections = counted(count, "data connection");
        lines.push(format!("over {connections} ({backend})"));
    }
    if let Some(blackout) = record.blackout() {
        lines.push(format!("blackout {}", duration(blackout.total_us)));
        let parts = blackout.parts().into_iter().filter(|(_, us)| *us > 0);
        let parts: Vec<_> = parts
            .map(|(name, us)| format!("{name} {}", duration(us)))
            .collect();
        lines.extend(
            parts
                .chunks(PARTS_PER_LINE)
                .map(|some| format!("  {}", some.join(", "))),
        );
    } else if let Some(ms) = record.downtime_ms() {
        lines.push(format!(
            "blackout {ms} ms (this VM does not tell its parts)"
        ));
    }
    lines
}

fn counted(count: u64, what: &str) -> String {
    let s = if count == 1 { "" } else { "s" };
    format!("{count} {what}{s}")
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn lines(answer: Value) -> Vec<String> {
        summary(&Record::new(answer), Colours::none())
    }

    #[test]
    fn the_summary_names_the_parts_of_the_blackout_that_took_time() {
        let found = lines(json!({
            "status": "completed", "total-time": 500, "x-round": 1, "x-connections": 1, "x-backend": "io_uring",
            "ram": {"transferred": 1 << 20},
            "x-blackout": {"total-us": 1500, "pause-us": 500, "last-round-us": 1000}
        }));
        let expected = [
            "completed in 500 ms: 1 MiB in 1 round, 2 MiB/s",
            "over 1 data connection (io_uring)",
            "blackout 1.50 ms",
            "  pause 500 µs, last round 1.00 ms",
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn an_attempt_that_moved_nothing_has_no_figures() {
        let failed = |ms: u64| {
            lines(json!({
                "status": "failed", "total-time": ms, "x-connections": 0, "x-backend": "io_uring",
                "ram": {"transferred": 0}
            }))
        };
        assert_eq!(failed(0), ["failed at once"]);
        assert_eq!(failed(10_000), ["failed after 10.0 s"]);
        let cancelled = lines(json!({
            "status": "cancelled", "total-time": 1000, "x-round": 2, "ram": {"transferred": 1 << 20}
        }));
        assert_eq!(
            cancelled,
            ["cancelled after 1.00 s: 1 MiB in 2 rounds, 1 MiB/s"]
        );
    }

    #[test]
    fn the_summary_of_qemu_has_what_qemu_tells() {
        let found = lines(json!({
            "status": "completed", "total-time": 2000, "downtime": 12,
            "ram": {"transferred": 2 << 20, "dirty-sync-count": 4}
        }));
        let expected = [
            "completed in 2.00 s: 2 MiB in 4 rounds, 1 MiB/s",
            "blackout 12 ms (this VM does not tell its parts)",
        ];
        assert_eq!(found, expected);
        assert_eq!(lines(json!({"status": "completed"})), ["completed"]);
        let target = json!({"status": "completed", "ram": {"transferred": 2 << 20}});
        assert_eq!(lines(target), ["completed: 2 MiB received"]);
    }
}
