//! Servers that hear of the built-in machine's migrations: what `--notify` says.

use std::path::PathBuf;
use std::str::FromStr;

use vmferry_devices::external::{JsonServer, ServerNotifier};
use vmferry_devices::{DeviceError, Notifier};

use super::MachineError;
use super::disk::{is_id, split_path};

/// A server as the operator describes it: `unix:PATH[,id=NAME]`. A comma in a path is written twice.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct NotifyConfig {
    /// Its socket.
    pub path: PathBuf,
    /// Name for errors; the path if the operator gave none.
    pub id: String,
}

impl NotifyConfig {
    /// Tells the server; to be registered for all modes, at `Priority::SERVER`. Nothing is connected yet.
    ///
    /// # Errors
    /// When no socket can have this path.
    pub fn notifier(&self) -> Result<Box<dyn Notifier>, DeviceError> {
        let server = JsonServer::new(&self.id, &self.path)?;
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
        };
        for option in options.into_iter().flatten() {
            match option.split_once('=') {
                Some(("id", name)) if is_id(name) => name.clone_into(&mut config.id),
                _ => {
                    return Err(wrong(
                        "after the path only id=NAME may follow; write a comma in a path twice",
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_described_by_its_socket_and_a_name() {
        let plain: NotifyConfig = "unix:/tmp/a,,b".parse().unwrap();
        assert_eq!(
            (plain.path, plain.id),
            ("/tmp/a,b".into(), "/tmp/a,b".to_owned())
        );
        let named: NotifyConfig = "unix:s,id=display".parse().unwrap();
        assert_eq!(named.id, "display");
        assert_eq!(named.notifier().unwrap().name(), "display");
    }

    #[test]
    fn what_describes_no_server_is_refused_with_what_would() {
        let long = format!("unix:{}", "x".repeat(120));
        for (text, part) in [
            ("/tmp/s", "unix:PATH"),
            ("unix:", "name its socket"),
            ("unix:a,id=", "id=NAME"),
            ("unix:a,name=b", "id=NAME"),
            (long.as_str(), "too long"),
        ] {
            let error = NotifyConfig::from_str(text).unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
