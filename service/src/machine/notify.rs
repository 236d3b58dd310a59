//! Servers that hear of the built-in machine's migrations: what `--notify` says.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use vmferry_devices::external::{ANSWER_TIMEOUT, JsonServer, ServerNotifier};
use vmferry_devices::{DeviceError, Notifier};

use super::MachineError;
use super::disk::{is_id, split_path};

/// Longest time that a server may be given for an answer, in seconds: the guest may be stopped meanwhile.
const TIMEOUT_SECONDS_MAX: u64 = 60;

/// A server as the operator describes it: `unix:PATH[,id=NAME][,timeout=SECONDS]`. A comma in a path is written twice.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct NotifyConfig {
    /// Its socket.
    pub path: PathBuf,
    /// Name for errors; the path if the operator gave none.
    pub id: String,
    /// Time that it has for every answer.
    pub timeout: Duration,
}

impl NotifyConfig {
    /// Tells the server; to be registered for all modes, at `Priority::SERVER`. Nothing is connected yet.
    ///
    /// # Errors
    /// When no socket can have this path.
    pub fn notifier(&self) -> Result<Box<dyn Notifier>, DeviceError> {
        let server = JsonServer::new(&self.id, &self.path)?.with_timeout(self.timeout);
        Ok(Box::new(ServerNotifier::new(Box::new(server))))
    }
}

impl FromStr for NotifyConfig {
    type Err = MachineError;

    fn from_str(text: &str) -> Result<Self, MachineError> {
        let wrong = |reason: &str| MachineError::Config(format!("server {text:?}: {reason}"));
        let rest = text
            .strip_prefix("unix:")
            .ok_or_else(|| wrong("write unix:PATH"))?;
        let (path, options) = split_path(rest);
        if path.is_empty() {
            return Err(wrong("name its socket"));
        }
        let mut config = Self {
            id: path.clone(),
            path: path.into(),
            timeout: ANSWER_TIMEOUT,
        };
        for option in options.into_iter().flatten() {
            match option.split_once('=') {
                Some(("id", name)) if is_id(name) => name.clone_into(&mut config.id),
                Some(("timeout", seconds)) => {
                    config.timeout = parse_timeout(seconds).ok_or_else(|| {
                        wrong(&format!(
                            "its timeout must be from 1 to {TIMEOUT_SECONDS_MAX} seconds"
                        ))
                    })?;
                }
                _ => {
                    return Err(wrong(
                        "after the path only id=NAME and timeout=SECONDS may follow; write a comma in a path twice",
                    ));
                }
            }
        }
        // The path is known to be good from here on.
        config.notifier().map_err(|error| {
            let source = std::error::Error::source(&error).map(ToString::to_string);
            wrong(&source.unwrap_or_default())
        })?;
        Ok(config)
    }
}

fn parse_timeout(seconds: &str) -> Option<Duration> {
    // The number alone: `parse` would take a sign.
    let seconds = seconds
        .bytes()
        .all(|byte| byte.is_ascii_digit())
        .then(|| seconds.parse().ok())
        .flatten()?;
    (1..=TIMEOUT_SECONDS_MAX)
        .contains(&seconds)
        .then(|| Duration::from_secs(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_described_by_its_socket_a_name_and_a_timeout() {
        let plain: NotifyConfig = "unix:/tmp/a,,b".parse().unwrap();
        assert_eq!(
            (plain.path, plain.id, plain.timeout),
            ("/tmp/a,b".into(), "/tmp/a,b".to_owned(), ANSWER_TIMEOUT)
        );
        let named: NotifyConfig = "unix:s,id=display".parse().unwrap();
        assert_eq!(named.id, "display");
        assert_eq!(named.notifier().unwrap().name(), "display");
        for seconds in [1, TIMEOUT_SECONDS_MAX] {
            let text = format!("unix:s,timeout={seconds},id=a");
            let patient: NotifyConfig = text.parse().unwrap();
            assert_eq!(patient.timeout, Duration::from_secs(seconds));
            assert_eq!(patient.id, "a");
        }
    }

    #[test]
    fn what_describes_no_server_is_refused_with_what_would() {
        let long = format!("unix:{}", "x".repeat(120));
        for (text, part) in [
            ("/tmp/s", "unix:PATH"),
            ("unix:", "name its socket"),
            ("unix:a,id=", "id=NAME"),
            ("unix:a,name=b", "id=NAME"),
            ("unix:a,timeout", "timeout=SECONDS"),
            ("unix:a,timeout=", "from 1 to 60 seconds"),
            ("unix:a,timeout=0", "from 1 to 60 seconds"),
            ("unix:a,timeout=61", "from 1 to 60 seconds"),
            ("unix:a,timeout=+2", "from 1 to 60 seconds"),
            ("unix:a,timeout=2s", "from 1 to 60 seconds"),
            (
                "unix:a,timeout=18446744073709551616",
                "from 1 to 60 seconds",
            ),
            (long.as_str(), "too long"),
        ] {
            let error = NotifyConfig::from_str(text).unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
