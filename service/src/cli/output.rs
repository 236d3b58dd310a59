//! Standard output, whose reader may leave at any time: `vmferry status | head -1` is no error.

use std::fmt;
use std::io::{self, Write};

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
