//! Standard output, whose reader may leave at any time (`vmferry status | head -1` is no error), and standard error for people.

use std::error::Error;
use std::fmt;
use std::io::{self, Write};

use super::follow::text_columns;
use super::style::{clean, wrap};

/// Writes a line.
pub(super) fn line(content: fmt::Arguments<'_>) -> io::Result<()> {
    text(format_args!("{content}\n"))
}

/// Writes text as it is.
pub(super) fn text(content: fmt::Arguments<'_>) -> io::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_fmt(content).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}

/// Writes a line to standard error. Who closed that does not want to hear of it.
pub(super) fn note(content: fmt::Arguments<'_>) {
    let _ = io::stderr().lock().write_fmt(format_args!("{content}\n"));
}

/// Writes a message that may be long to standard error: one line, which is wrapped on a terminal.
pub(super) fn message(content: &str) {
    let content = format!("vmferry: {}", clean(content));
    let lines = match text_columns() {
        Some(columns) => wrap(&content, columns.saturating_sub(2)),
        None => vec![content],
    };
    for (number, line) in lines.iter().enumerate() {
        let indent = if number == 0 { "" } else { "  " };
        note(format_args!("{indent}{line}"));
    }
}

/// An error with everything below it, joined by colons.
pub(super) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut below = error.source();
    while let Some(source) = below {
        text.push_str(&format!(": {source}"));
        below = source.source();
    }
    text
}
