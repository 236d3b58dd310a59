//! Addresses as operators write them: `tcp:HOST:PORT` and `unix:PATH`.
//!
//! Recipe for another kind (`vsock:`, `fd:`, `exec:`, `file:`): a variant, a line in `from_str`, one in `Display`, and the arms
//! the compiler asks for in `connect.rs` and `listener.rs`. Text in, text out must be the same text; a test checks it.

use std::fmt;
use std::net::Ipv6Addr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Longest host name: the limit of DNS.
pub const HOST_CHARS_MAX: usize = 253;
/// Longest path of a unix socket: the kernel's `sun_path` less its closing NUL.
pub const UNIX_PATH_BYTES_MAX: usize = 107;

/// Schemes that operators of other systems will try.
const KNOWN_ELSEWHERE: [&str; 5] = ["fd", "vsock", "exec", "file", "rdma"];

/// Where a migration goes to or comes from. Parsed and checked; printing gives the text that parses to the same address.
#[derive(Clone, Debug, Deserialize, Eq, Hash, PartialEq, Serialize)]
#[serde(try_from = "String", into = "String")]
#[non_exhaustive]
pub enum Address {
    /// `tcp:HOST:PORT`.
    Tcp {
        /// IPv4 address, IPv6 address without brackets, or a name.
        host: String,
        /// Port. 0 lets the kernel choose when listening and is refused when connecting.
        port: u16,
    },
    /// `unix:PATH`.
    Unix {
        /// Path of the socket, relative paths against the working directory.
        path: PathBuf,
    },
}

/// The text is no address. Whoever wrote it is at fault; nothing was tried.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("`{text}` is no address: {reason}")]
pub struct AddressError {
    /// What was given, cut to a readable length.
    pub text: String,
    /// What is wrong with it and what would be right.
    pub reason: String,
}

impl Address {
    /// An address of a unix socket.
    ///
    /// # Errors
    /// When the kernel or our own text form could not carry the path: empty, too long, a NUL in it, or not UTF-8.
    pub fn unix(path: impl AsRef<Path>) -> Result<Self, AddressError> {
        let path = path.as_ref();
        let Some(text) = path.to_str() else {
            return Err(fault(&path.to_string_lossy(), "the path must be UTF-8"));
        };
        format!("unix:{text}").parse()
    }
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let Some((scheme, rest)) = text.split_once(':') else {
            return Err(fault(text, "use tcp:HOST:PORT or unix:PATH"));
        };
        match scheme {
            "tcp" => parse_tcp(text, rest),
            "unix" => parse_unix(text, rest),
            other if KNOWN_ELSEWHERE.contains(&other) => Err(fault(
                text,
                format!("`{other}:` is not supported; use tcp:HOST:PORT or unix:PATH"),
            )),
            _ => Err(fault(
                text,
                "it must start with `tcp:` or `unix:`, as in tcp:HOST:PORT or unix:PATH",
            )),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
            Self::Unix { path } => write!(f, "unix:{}", path.display()),
        }
    }
}

impl TryFrom<String> for Address {
    type Error = AddressError;

    fn try_from(text: String) -> Result<Self, AddressError> {
        text.parse()
    }
}

impl From<Address> for String {
    fn from(address: Address) -> Self {
        address.to_string()
    }
}

fn parse_tcp(text: &str, rest: &str) -> Result<Address, AddressError> {
    let (host, port) = if let Some(inside) = rest.strip_prefix('[') {
        let Some((host, after)) = inside.split_once(']') else {
            return Err(fault(
                text,
                "the bracket around the IPv6 address is not closed",
            ));
        };
        check_ipv6(host).map_err(|reason| fault(text, reason))?;
        let Some(port) = after.strip_prefix(':') else {
            return Err(fault(text, "a port must follow, as in tcp:[::1]:4444"));
        };
        (host, port)
    } else {
        let Some((host, port)) = rest.rsplit_once(':') else {
            return Err(fault(text, "the port is missing, as in tcp:HOST:4444"));
        };
        if host.contains(':') {
            return Err(fault(
                text,
                "put an IPv6 address in brackets, as in tcp:[::1]:4444",
            ));
        }
        check_host(host).map_err(|reason| fault(text, reason))?;
        (host, port)
    };
    Ok(Address::Tcp {
        host: host.to_owned(),
        port: parse_port(port).map_err(|reason| fault(text, reason))?,
    })
}

fn parse_unix(text: &str, path: &str) -> Result<Address, AddressError> {
    if path.is_empty() {
        return Err(fault(
            text,
            "the path is missing, as in unix:/run/vmferry.sock",
        ));
    }
    if path.contains('\0') {
        return Err(fault(text, "a path cannot contain a NUL"));
    }
    if path.len() > UNIX_PATH_BYTES_MAX {
        let reason = format!(
            "the path has {} bytes, the kernel takes at most {UNIX_PATH_BYTES_MAX}; use a shorter directory",
            path.len()
        );
        return Err(fault(text, reason));
    }
    Ok(Address::Unix {
        path: PathBuf::from(path),
    })
}

fn check_ipv6(host: &str) -> Result<(), &'static str> {
    let (address, zone) = match host.split_once('%') {
        Some((address, zone)) => (address, Some(zone)),
        None => (host, None),
    };
    if address.parse::<Ipv6Addr>().is_err() {
        return Err("what is in brackets must be an IPv6 address");
    }
    match zone {
        Some(zone) if zone.is_empty() || !zone.chars().all(is_name_char) => {
            Err("after `%` the name or number of a network interface must follow")
        }
        _ => Ok(()),
    }
}

fn check_host(host: &str) -> Result<(), String> {
    if host.is_empty() {
        return Err("the host is missing; 0.0.0.0 or [::] listens on every interface".to_owned());
    }
    if host.len() > HOST_CHARS_MAX {
        return Err(format!(
            "a host name has at most {HOST_CHARS_MAX} characters"
        ));
    }
    match host.chars().find(|c| !is_name_char(*c)) {
        Some(wrong) => Err(format!(
            "{wrong:?} cannot be in a host name; it takes letters, digits, `.`, `-` and `_`"
        )),
        None => Ok(()),
    }
}

fn is_name_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_')
}

fn parse_port(port: &str) -> Result<u16, String> {
    let plain = !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit());
    let number = plain.then(|| port.parse::<u16>().ok()).flatten();
    number.ok_or_else(|| {
        format!(
            "`{}` is no port; a port is a number from 0 to 65535",
            brief(port)
        )
    })
}

fn fault(text: &str, reason: impl Into<String>) -> AddressError {
    AddressError {
        text: brief(text),
        reason: reason.into(),
    }
}

/// At most 80 characters of `text`, so that an error stays readable whatever was given.
fn brief(text: &str) -> String {
    const SHOWN: usize = 80;
    let mut shown: String = text.chars().take(SHOWN).collect();
    if shown.len() < text.len() {
        shown.push('…');
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reason(text: &str) -> String {
        text.parse::<Address>().unwrap_err().to_string()
    }

    #[test]
    fn text_comes_back_as_it_was_written() {
        for text in [
            "tcp:127.0.0.1:4444",
            "tcp:host-1.example_net.org:0",
            "tcp:[::1]:65535",
            "tcp:[fe80::1%eth0]:1",
            "unix:/run/a b:c.sock",
            "unix:relative.sock",
        ] {
            let address: Address = text.parse().unwrap();
            assert_eq!(address.to_string(), text);
            assert_eq!(
                String::from(address.clone()).parse::<Address>().unwrap(),
                address
            );
        }
    }

    #[test]
    fn brackets_are_not_part_of_the_host() {
        let address: Address = "tcp:[::1]:7".parse().unwrap();
        assert_eq!(
            address,
            Address::Tcp {
                host: "::1".into(),
                port: 7
            }
        );
    }

    #[test]
    fn errors_say_what_is_wrong_and_what_would_be_right() {
        for (text, part) in [
            ("", "tcp:HOST:PORT or unix:PATH"),
            ("localhost:1", "must start with `tcp:` or `unix:`"),
            ("tcp:localhost", "port is missing"),
            ("tcp::1", "host is missing"),
            ("tcp:::1:1", "in brackets"),
            ("tcp:[::1:1", "not closed"),
            ("tcp:[::1]", "port must follow"),
            ("tcp:[name]:1", "must be an IPv6 address"),
            ("tcp:[::1%]:1", "network interface"),
            ("tcp:h:65536", "0 to 65535"),
            ("tcp:h:", "0 to 65535"),
            ("tcp:h:+1", "0 to 65535"),
            ("tcp:h:4444,to=9", "is no port"),
            ("tcp:a/b:1", "'/' cannot be in a host name"),
            ("unix:", "path is missing"),
            ("unix:a\0b", "NUL"),
            ("vsock:3:4", "`vsock:` is not supported"),
        ] {
            assert!(reason(text).contains(part), "{text:?}: {}", reason(text));
        }
    }

    #[test]
    fn lengths_are_bounded_and_errors_stay_short() {
        let longest = "x".repeat(UNIX_PATH_BYTES_MAX);
        assert!(format!("unix:{longest}").parse::<Address>().is_ok());
        assert!(reason(&format!("unix:{longest}x")).contains("at most 107"));
        assert!(reason(&format!("tcp:{}:1", "h".repeat(254))).contains("at most 253"));
        assert!(reason(&"z:".repeat(100_000)).len() < 300);
    }

    #[test]
    fn a_path_becomes_an_address_only_if_it_can_be_written() {
        use std::os::unix::ffi::OsStrExt;
        assert!(Address::unix("/tmp/x").is_ok());
        assert!(Address::unix(std::ffi::OsStr::from_bytes(b"/tmp/\xff")).is_err());
    }
}
