//! Where progress is shown: lines that are redrawn in place on a terminal, plain lines elsewhere, JSON for programs.
//!
//! On a terminal the cursor stays on the line below the last one, where an echoed Ctrl-C spoils nothing. Every frame is one write;
//! no line reaches the last column, so none wraps; the cursor is never hidden. Whatever ends us leaves the terminal usable.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use super::view::View;
use crate::cli::output;
use crate::cli::style::{Colours, Tone, columns, cut, is_dumb, wrap};

/// Time between two lines where they are not redrawn.
const LINE_EVERY: Duration = Duration::from_secs(1);
/// A terminal that does not tell its size.
const COLUMNS_DEFAULT: usize = 80;
const ROWS_DEFAULT: usize = 24;
/// Wider is not easier to read.
const COLUMNS_MAX: usize = 100;
/// Width of the column with the stage: `pre-switchover` and a space fit.
const STAGE_COLUMNS: usize = 15;
/// Width of the time so far, with some room before it.
const ELAPSED_COLUMNS: usize = 11;
/// The shortest bar that is worth more than the time so far.
const BAR_COLUMNS_MIN: usize = 10;
/// Most lines that each part of a notice gets; one that stands alone gets twice as many.
const NOTICE_LINES: usize = 4;

/// Shows how far a migration is.
pub(super) trait Display {
    /// A new state.
    fn update(&mut self, view: &View);
    /// A line that stays.
    fn note(&mut self, text: &str) {
        output::note(format_args!("vmferry: {text}"));
    }
    /// Asks something; updates may come before the answer.
    fn ask(&mut self, question: &str) {
        let _ = io::stderr().lock().write_all(question.as_bytes());
    }
    /// The question has been answered (`true`: with Enter), or has become pointless.
    fn asked(&mut self, entered: bool) {
        if !entered {
            output::note(format_args!(""));
        }
    }
    /// Somebody else has written to the terminal.
    fn forget(&mut self) {}
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
    if quiet {
        return Box::new(Quiet);
    }
    if io::stderr().is_terminal() && !is_dumb() {
        Box::new(Screen::default())
    } else {
        Box::new(Lines::default())
    }
}

/// Columns and rows of standard error.
fn size() -> (usize, usize) {
    let size = rustix::termios::tcgetwinsize(io::stderr()).ok();
    let known = |number: Option<u16>, default| match number {
        None | Some(0) => default,
        Some(number) => usize::from(number),
    };
    let columns = known(size.map(|size| size.ws_col), COLUMNS_DEFAULT);
    (columns, known(size.map(|size| size.ws_row), ROWS_DEFAULT))
}

/// Columns for text that may wrap; none where standard error is no terminal.
pub(in crate::cli) fn text_columns() -> Option<usize> {
    let terminal = io::stderr().is_terminal();
    terminal.then(|| (size().0.saturating_sub(1)).min(COLUMNS_MAX))
}

/// A few lines that are drawn again and again.
#[derive(Default)]
struct Screen {
    /// Columns of each line, without colours.
    widths: Vec<usize>,
    asking: bool,
}

impl Screen {
    /// Commands that bring the cursor to where the first line begins.
    fn home(&self, columns: usize) -> String {
        // A terminal that was made narrower has wrapped what it shows.
        let rows = |width: &usize| width.div_ceil(columns.max(1)).max(1);
        let up: usize = self.widths.iter().map(rows).sum();
        match up {
            0 => "\r".to_owned(),
            up => format!("\r\x1b[{up}A"),
        }
    }

    fn draw(&mut self, lines: Vec<(Tone, String, String)>) {
        let (columns_now, rows) = size();
        let colours = Colours::of_stderr();
        let mut text = self.home(columns_now);
        let most = rows.saturating_sub(1).max(1);
        self.widths.clear();
        for (tone, coloured, rest) in lines.into_iter().take(most) {
            text.push_str(&format!(
                "{}{rest}\x1b[K\r\n",
                colours.paint(tone, &coloured)
            ));
            self.widths.push(columns(&coloured) + columns(&rest));
        }
        text.push_str("\x1b[J");
        write(&text);
    }

    fn clear(&mut self) {
        let text = format!("{}\x1b[J", self.home(size().0));
        self.widths.clear();
        write(&text);
    }
}

impl Display for Screen {
    fn update(&mut self, view: &View) {
        if !self.asking {
            let columns = size().0.saturating_sub(1).min(COLUMNS_MAX);
            self.draw(frame(view, columns));
        }
    }

    fn note(&mut self, text: &str) {
        self.clear();
        for line in wrap(
            &format!("vmferry: {text}"),
            text_columns().unwrap_or(COLUMNS_DEFAULT),
        ) {
            output::note(format_args!("{line}"));
        }
    }

    fn ask(&mut self, question: &str) {
        self.asking = true;
        write(&format!(
            "\r\x1b[J{}",
            cut(question, size().0.saturating_sub(8))
        ));
    }

    fn asked(&mut self, entered: bool) {
        self.asking = false;
        write(if entered {
            "\x1b[1A\r\x1b[J"
        } else {
            "\r\x1b[J"
        });
    }

    fn forget(&mut self) {
        self.widths.clear();
        self.asking = false;
    }

    fn finish(&mut self) {
        self.clear();
    }
}

/// Whoever closed standard error does not want to see it.
fn write(text: &str) {
    let _ = io::stderr().lock().write_all(text.as_bytes());
}

/// The lines of one moment, none wider than `most`: tone and text of the coloured part, and the rest.
fn frame(view: &View, most: usize) -> Vec<(Tone, String, String)> {
    let plain = |text: &str| (Tone::Plain, String::new(), cut(text, most));
    let mut lines: Vec<_> = view.about.iter().map(|line| plain(line)).collect();
    let stage = cut(&format!("{:<STAGE_COLUMNS$}", view.stage()), most);
    let figures = view.figures(most.saturating_sub(2));
    let elapsed = view.elapsed().unwrap_or_default();
    let rest = most.saturating_sub(columns(&stage));
    match view.percent() {
        Some(percent) => {
            let mut after = format!(" {percent:>3}%");
            if rest >= columns(&after) + ELAPSED_COLUMNS + BAR_COLUMNS_MIN {
                after.push_str(&format!("{elapsed:>ELAPSED_COLUMNS$}"));
            }
            lines.push((view.tone(), stage, cut(&bar(percent, &after, rest), rest)));
            if !figures.is_empty() {
                lines.push(plain(&format!("  {figures}")));
            }
        }
        None => lines.push((view.tone(), stage, cut(&figures, rest))),
    }
    if let Some((tone, notice)) = view.notice() {
        let wrapped = notice.iter().flat_map(|line| {
            let pieces = wrap(line, most.saturating_sub(2)).into_iter();
            // Words of others must not push away what is to be done.
            pieces.take(if notice.len() > 1 {
                NOTICE_LINES
            } else {
                2 * NOTICE_LINES
            })
        });
        lines.extend(wrapped.map(|line| (tone, format!("  {line}"), String::new())));
    }
    lines
}

/// A bar of all columns that `after` leaves.
fn bar(percent: u64, after: &str, most: usize) -> String {
    let width = most.saturating_sub(columns(after));
    let full = usize::try_from(percent.min(100)).unwrap_or(100) * width / 100;
    format!("{}{}{after}", "━".repeat(full), "╌".repeat(width - full))
}

/// A line when something has changed, and every second.
#[derive(Default)]
struct Lines {
    shown: Option<(String, Instant)>,
    noticed: Option<String>,
}

impl Display for Lines {
    fn update(&mut self, view: &View) {
        let stage = view.stage();
        let due = match &self.shown {
            Some((last, at)) => *last != stage || at.elapsed() >= LINE_EVERY,
            None => true,
        };
        if !due {
            return;
        }
        if !view.is_idle() || self.shown.as_ref().is_none_or(|(last, _)| *last != stage) {
            let percent = view.percent().map(|percent| format!("{percent:>3}%, "));
            output::note(format_args!(
                "{stage:<STAGE_COLUMNS$} {}{}",
                percent.unwrap_or_default(),
                view.figures(usize::MAX)
            ));
        }
        let notice = view.notice().map(|(_, lines)| lines.join("; "));
        if notice != self.noticed {
            if let Some(text) = &notice {
                output::note(format_args!("vmferry: {text}"));
            }
            self.noticed = notice;
        }
        self.shown = Some((stage, Instant::now()));
    }
}

/// One JSON object per line on standard output, when the status has changed and every second.
#[derive(Default)]
pub(super) struct JsonLines {
    shown: Option<(String, Instant)>,
}

impl Display for JsonLines {
    fn update(&mut self, view: &View) {
        let status = view.record().status_name();
        let due = match &self.shown {
            Some((last, at)) => *last != status || at.elapsed() >= LINE_EVERY,
            None => true,
        };
        if due {
            // Without a reader the next signal, or the end of the migration, ends us.
            let _ = output::line(format_args!("{}", view.json()));
            self.shown = Some((status, Instant::now()));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;
    use crate::cli::record::Record;

    fn lines(answer: serde_json::Value, most: usize) -> Vec<String> {
        let mut view = View::new(Path::new("/tmp/source.qmp"));
        view.take(Record::new(answer), Instant::now());
        let frame = frame(&view, most);
        frame
            .into_iter()
            .map(|(_, coloured, rest)| coloured + &rest)
            .collect()
    }

    #[test]
    fn a_frame_is_a_bar_and_its_figures() {
        let found = lines(
            json!({
                "status": "active", "x-round": 3, "total-time": 12_400, "x-predicted-blackout-us": 850,
                "ram": {"remaining": 1 << 20, "dirty-pages-rate": 256, "page-size": 4096}
            }),
            50,
        );
        let expected = [
            "round 3        ╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌   0%     12.4 s",
            "  1 MiB left, dirty 1 MiB/s, blackout ~ 850 µs",
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn no_line_is_wider_than_it_may_be() {
        let long = "漢字 and words ".repeat(60);
        for status in [
            "none",
            "setup",
            "active",
            "failing",
            "device",
            "pre-switchover",
            "postcopy-recover-setup",
        ] {
            for most in [1, 10, 20, 39, 79, 100] {
                let answer = json!({
                    "status": status, "error-desc": long, "total-time": 3_723_000, "cpu-throttle-percentage": 99,
                    "x-predicted-blackout-us": 99_999_999, "x-round": 7, "expected-downtime": 5,
                    "ram": {"remaining": u64::MAX, "dirty-pages-rate": u64::MAX, "page-size": 4096, "transferred": 7}
                });
                let found = lines(answer, most);
                assert!(found.len() <= 2 + 5 * NOTICE_LINES, "{found:?}");
                for line in found {
                    // Below that, a notice takes what it needs for a word.
                    assert!(columns(&line) <= most.max(10), "{most}: {line:?}");
                }
            }
        }
    }

    #[test]
    fn the_cursor_goes_back_over_lines_that_a_narrower_terminal_has_wrapped() {
        let screen = Screen {
            widths: vec![79, 30, 0],
            ..Screen::default()
        };
        assert_eq!(screen.home(80), "\r\x1b[3A");
        assert_eq!(screen.home(40), "\r\x1b[4A");
        assert_eq!(Screen::default().home(80), "\r");
    }
}
