//! The log: standard error, as text for people or one JSON object per line for programs.

use std::fmt;
use std::io::Write;
use std::sync::OnceLock;
use std::time::SystemTime;

use clap::{Args, ValueEnum};
use tracing_subscriber::EnvFilter;

/// What is shown unless asked otherwise.
const DEFAULT_FILTER: &str = "warn";
/// The environment variable that asks otherwise.
const VARIABLE: &str = "VMFERRY_LOG";

static FORMAT: OnceLock<LogFormat> = OnceLock::new();

/// How the log is written.
#[derive(Args, Clone, Debug)]
pub struct LogArgs {
    /// Log this much: error, warn, info, debug or trace, also per module [default: $VMFERRY_LOG, or warn]
    #[arg(long, value_name = "FILTER", global = true, value_parser = parse_filter, help_heading = "Log")]
    log: Option<String>,
    /// Log as text, or as one JSON object per line
    #[arg(long, value_enum, value_name = "text|json", default_value_t = LogFormat::Text, global = true, hide_possible_values = true, help_heading = "Log")]
    log_format: LogFormat,
}

/// Form of a line.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// For programs.
    Json,
}

impl LogArgs {
    /// Starts logging, with colours in the text or without. A filter in the environment that cannot be read is as if it were not there.
    pub fn start(&self, colours: bool) {
        let from_environment = || EnvFilter::try_from_env(VARIABLE).ok();
        let filter = self
            .log
            .as_deref()
            .and_then(|text| EnvFilter::try_new(text).ok())
            .or_else(from_environment)
            .unwrap_or_else(|| EnvFilter::new(DEFAULT_FILTER));
        let format = *FORMAT.get_or_init(|| self.log_format);
        let builder = tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(std::io::stderr);
        match format {
            LogFormat::Text => builder.with_ansi(colours).init(),
            LogFormat::Json => builder.json().with_ansi(false).init(),
        }
    }
}

fn parse_filter(text: &str) -> Result<String, String> {
    match EnvFilter::try_new(text) {
        Ok(_) => Ok(text.to_owned()),
        Err(error) => Err(format!(
            "{error}; write a level such as info, or modules with levels such as warn,vmferry::engine=debug"
        )),
    }
}

/// Whether programs read what this one says.
pub(crate) fn is_json() -> bool {
    FORMAT.get() == Some(&LogFormat::Json)
}

/// Tells the operator something that is no log line: as a line of its own, or as a JSON object where programs read.
pub(crate) fn announce(what: fmt::Arguments<'_>) {
    let line = if is_json() {
        let now = humantime::format_rfc3339_micros(SystemTime::now());
        serde_json::json!({
            "timestamp": now.to_string(),
            "level": "NOTICE",
            "fields": { "message": what.to_string() },
        })
        .to_string()
    } else {
        format!("vmferry: {what}")
    };
    // Who closed standard error does not want to hear of it.
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_filter_is_refused_with_an_example() {
        for text in ["info", "off", "warn,vmferry::engine=debug"] {
            assert_eq!(parse_filter(text).as_deref(), Ok(text));
        }
        for text in ["vmferry=loud", "a=b=c"] {
            let error = parse_filter(text).unwrap_err();
            assert!(error.contains("vmferry::engine=debug"), "{error}");
        }
    }
}
