//! Follows a migration to its end: a progress bar on a terminal, plain lines elsewhere.

use std::fmt;
use std::io::IsTerminal;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};
use serde_json::Value;

use super::client::{ClientError, QmpClient};
use super::output;
use super::size::{Size, duration, rate};
use crate::migration::status::MigrationStatus;
use crate::qmp::schema::MigrationInfo;

/// First pause between two looks: small migrations take a tenth of a second.
const PAUSE_MIN: Duration = Duration::from_millis(10);
/// Longest pause.
const PAUSE_MAX: Duration = Duration::from_millis(100);
/// Time between two plain lines.
const LINE_EVERY: Duration = Duration::from_secs(1);

/// Parts of the blackout in a line of 80 columns.
const PARTS_PER_LINE: usize = 3;

/// Shows how far a migration is.
pub(super) trait Display {
    /// A new state.
    fn update(&mut self, view: &View);
    /// No more will come.
    fn finish(&mut self) {}
}

/// Shows nothing.
pub(super) struct Quiet;

impl Display for Quiet {
    fn update(&mut self, _: &View) {}
}

/// The display for standard error as it is.
pub(super) fn display(quiet: bool) -> Box<dyn Display> {
    match (quiet, std::io::stderr().is_terminal()) {
        (true, _) => Box::new(Quiet),
        (false, true) => Box::new(Bar::new()),
        (false, false) => Box::new(Lines::default()),
    }
}

/// Asks the VM until its migration has ended, and returns the last record, whole and as far as we know it. Stops early when
/// `interrupted` says so; the record then is not one of an end.
pub(super) fn wait_for_end(
    client: &mut QmpClient,
    display: &mut dyn Display,
    interrupted: &dyn Fn() -> bool,
) -> Result<(Value, MigrationInfo), ClientError> {
    let mut view = View::default();
    let mut pause = PAUSE_MIN;
    let last = loop {
        let record: Value = client.query("query-migrate")?;
        let info: MigrationInfo = client.parse("query-migrate", &record)?;
        view.take(&info);
        display.update(&view);
        if info.status.is_none_or(MigrationStatus::is_idle) || interrupted() {
            break (record, info);
        }
        thread::sleep(pause);
        pause = (pause * 2).min(PAUSE_MAX);
    };
    display.finish();
    Ok(last)
}

/// What a reader wants to know while it lasts.
#[derive(Clone, Debug, Default)]
pub(super) struct View {
    status: MigrationStatus,
    round: u64,
    /// Bytes that this round had at its start, as far as seen.
    round_bytes: u64,
    left_bytes: u64,
    bytes_per_sec: u64,
    dirty_bytes_per_sec: u64,
    predicted_us: Option<u64>,
    /// A reason to worry before the end, such as a commit in doubt.
    problem: Option<String>,
}

impl View {
    fn take(&mut self, info: &MigrationInfo) {
        self.status = info.status.unwrap_or_default();
        self.problem.clone_from(&info.error_desc);
        self.predicted_us = info
            .x_predicted_blackout_us
            .or_else(|| info.expected_downtime.map(|ms| ms.saturating_mul(1000)));
        let Some(ram) = &info.ram else { return };
        let round = info.x_round.unwrap_or(ram.dirty_sync_count);
        if round != self.round {
            self.round = round;
            self.round_bytes = 0;
        }
        self.left_bytes = ram.remaining;
        self.round_bytes = self.round_bytes.max(ram.remaining);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a float cast saturates, and the number is only shown"
        )]
        let bytes_per_sec = (ram.mbps * 125_000.0) as u64;
        self.bytes_per_sec = bytes_per_sec;
        self.dirty_bytes_per_sec = ram.dirty_pages_rate.saturating_mul(ram.page_size);
    }

    /// How much of the round is sent.
    fn percent(&self) -> u64 {
        if self.round_bytes == 0 {
            let began = matches!(
                self.status,
                MigrationStatus::None | MigrationStatus::Setup | MigrationStatus::Active
            );
            return if began { 0 } else { 100 };
        }
        let sent = u128::from(self.round_bytes - self.left_bytes) * 100;
        u64::try_from(sent / u128::from(self.round_bytes)).unwrap_or(100)
    }

    /// Where it stands, in a word or two.
    fn stage(&self) -> String {
        match self.status {
            MigrationStatus::None | MigrationStatus::Setup => "setup".to_owned(),
            MigrationStatus::Active if self.round == 0 => "preparing".to_owned(),
            MigrationStatus::Active => format!("round {}", self.round),
            MigrationStatus::Device => "switchover".to_owned(),
            other => other.to_string(),
        }
    }

    fn details(&self) -> String {
        if let Some(problem) = &self.problem {
            return problem.clone();
        }
        if matches!(self.status, MigrationStatus::None | MigrationStatus::Setup) {
            return "connecting, preparing both sides".to_owned();
        }
        let mut text = format!(
            "{} left, {}/s, dirtied {}/s",
            Size(self.left_bytes),
            Size(self.bytes_per_sec),
            Size(self.dirty_bytes_per_sec)
        );
        if let Some(us) = self.predicted_us {
            text.push_str(&format!(", predicted blackout {}", duration(us)));
        }
        text
    }
}

/// Two lines: a bar for the round, and the figures. Both are drawn from one view, so that they always belong together.
struct Bar {
    bar: ProgressBar,
    view: Arc<Mutex<View>>,
}

impl Bar {
    fn new() -> Self {
        let bar = ProgressBar::with_draw_target(Some(100), ProgressDrawTarget::stderr());
        let view = Arc::new(Mutex::new(View::default()));
        let (stage, details) = (Arc::clone(&view), Arc::clone(&view));
        // The template is a constant; were it wrong, the plain style would show.
        if let Ok(style) =
            ProgressStyle::with_template("{stage:<10} {wide_bar} {pos:>3}%\n  {details}")
        {
            let style = style
                .progress_chars("━━╌")
                .with_key(
                    "stage",
                    move |_: &ProgressState, out: &mut dyn fmt::Write| {
                        show(out, &lock(&stage).stage());
                    },
                )
                .with_key(
                    "details",
                    move |_: &ProgressState, out: &mut dyn fmt::Write| {
                        show(out, &lock(&details).details());
                    },
                );
            bar.set_style(style);
        }
        Self { bar, view }
    }
}

/// A view is whole whatever happened to the thread that held it.
fn lock(view: &Mutex<View>) -> MutexGuard<'_, View> {
    view.lock().unwrap_or_else(PoisonError::into_inner)
}

fn show(out: &mut dyn fmt::Write, text: &str) {
    // Writing into the line buffer of the bar does not fail.
    let _ = out.write_str(text);
}

impl Display for Bar {
    fn update(&mut self, view: &View) {
        lock(&self.view).clone_from(view);
        self.bar.set_position(view.percent());
        self.bar.tick();
    }

    fn finish(&mut self) {
        self.bar.finish_and_clear();
    }
}

#[derive(Default)]
struct Lines {
    shown: Option<(String, Instant)>,
}

impl Display for Lines {
    fn update(&mut self, view: &View) {
        let stage = view.stage();
        let due = match &self.shown {
            Some((last, at)) => *last != stage || at.elapsed() >= LINE_EVERY,
            None => true,
        };
        if due && !view.status.is_idle() {
            output::note(format_args!(
                "{stage:<10} {:>3}%, {}",
                view.percent(),
                view.details()
            ));
            self.shown = Some((stage, Instant::now()));
        }
    }
}

/// The end in a few lines for people.
pub(super) fn summary(info: &MigrationInfo) -> Vec<String> {
    let status = info.status.unwrap_or_default();
    let mut lines = vec![status.to_string()];
    if let Some(ram) = &info.ram {
        let us = info.total_time.unwrap_or(0).saturating_mul(1000);
        let rounds = info.x_round.unwrap_or(ram.dirty_sync_count);
        lines[0] = format!(
            "{status} in {}: {} in {}, {}/s",
            duration(us),
            Size(ram.transferred),
            counted(rounds, "round"),
            rate(ram.transferred, us),
        );
    }
    if let (Some(count), Some(backend)) = (info.x_connections, &info.x_backend) {
        lines.push(format!(
            "over {} ({backend})",
            counted(count, "data connection")
        ));
    }
    if let Some(blackout) = &info.x_blackout {
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
    } else if let Some(ms) = info.downtime {
        lines.push(format!("blackout {ms} ms"));
    }
    lines
}

fn counted(count: u64, what: &str) -> String {
    let s = if count == 1 { "" } else { "s" };
    format!("{count} {what}{s}")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn info(json: Value) -> MigrationInfo {
        serde_json::from_value(json).unwrap()
    }

    fn active(round: u64, remaining: u64) -> MigrationInfo {
        info(json!({
            "status": "active", "x-round": round, "x-predicted-blackout-us": 12_300,
            "ram": {"remaining": remaining, "total": 1000 << 20, "mbps": 8000.0, "dirty-pages-rate": 256, "page-size": 4096}
        }))
    }

    #[test]
    fn progress_is_that_of_the_round() {
        let mut view = View::default();
        view.take(&active(1, 200 << 20));
        assert_eq!((view.stage().as_str(), view.percent()), ("round 1", 0));
        view.take(&active(1, 50 << 20));
        assert_eq!(view.percent(), 75);
        view.take(&active(2, 10 << 20));
        assert_eq!((view.stage().as_str(), view.percent()), ("round 2", 0));
        view.take(&active(2, 0));
        assert_eq!(view.percent(), 100);
        assert_eq!(
            view.details(),
            "0 B left, 954 MiB/s, dirtied 1 MiB/s, predicted blackout 12.3 ms"
        );
    }

    #[test]
    fn an_answer_of_qemu_is_enough() {
        let mut view = View::default();
        view.take(&info(json!({"status": "setup"})));
        assert_eq!(view.stage(), "setup");
        view.take(&info(json!({
            "status": "active", "expected-downtime": 300,
            "ram": {"remaining": 5, "dirty-sync-count": 3, "mbps": 1e300, "dirty-pages-rate": u64::MAX, "page-size": 4096}
        })));
        assert_eq!(view.stage(), "round 3");
        assert!(view.details().contains("predicted blackout 300 ms"));
        let lines = summary(&info(json!({
            "status": "completed", "total-time": 2000, "downtime": 12,
            "ram": {"transferred": 2 << 20, "dirty-sync-count": 4}
        })));
        assert_eq!(
            lines,
            [
                "completed in 2.00 s: 2 MiB in 4 rounds, 1 MiB/s",
                "blackout 12 ms"
            ]
        );
    }

    #[test]
    fn a_problem_before_the_end_is_shown_instead_of_numbers() {
        let mut view = View::default();
        view.take(&info(
            json!({"status": "device", "error-desc": "the outcome is not known"}),
        ));
        assert_eq!(view.stage(), "switchover");
        assert_eq!(view.details(), "the outcome is not known");
    }

    #[test]
    fn the_summary_names_the_parts_of_the_blackout_that_took_time() {
        let lines = summary(&info(json!({
            "status": "completed", "total-time": 500, "x-round": 1, "x-connections": 1, "x-backend": "io_uring",
            "ram": {"transferred": 1 << 20},
            "x-blackout": {"total-us": 1500, "pause-us": 500, "last-round-us": 1000}
        })));
        let expected = [
            "completed in 500 ms: 1 MiB in 1 round, 2 MiB/s",
            "over 1 data connection (io_uring)",
            "blackout 1.50 ms",
            "  pause 500 µs, last round 1.00 ms",
        ];
        assert_eq!(lines, expected);
    }
}
