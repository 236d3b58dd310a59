//! Addresses as operators write them: `tcp:HOST:PORT`, `unix:PATH`, `vsock:CID:PORT`, `fd:NAME`, `exec:COMMAND` and
//! `file:PATH[,offset=N]`.
//!
//! The first three are sockets, for `connect.rs` and `listener.rs`; an `fd:` may be one. What `exec:` and `file:` name takes bytes in
//! one direction only. Text in, text out must be the same text; a test checks it.

use std::fmt;
use std::net::Ipv6Addr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Longest host name: the limit of DNS.
pub const HOST_CHARS_MAX: usize = 253;
/// Longest path of a unix socket: the kernel's `sun_path` less its closing NUL.
pub const UNIX_PATH_BYTES_MAX: usize = 107;

/// Longest path of a file: the kernel's `PATH_MAX` less its closing NUL.
pub const FILE_PATH_BYTES_MAX: usize = 4095;
/// Longest name of a descriptor that was passed to the process, in bytes.
pub const FD_NAME_BYTES_MAX: usize = 255;
/// Longest command, in bytes: half of what the kernel takes as one argument.
pub const COMMAND_BYTES_MAX: usize = 64 << 10;

/// Largest offset into a file: the kernel's are signed.
const OFFSET_MAX: u64 = i64::MAX as u64;
/// What comes between path and offset of a file.
const OFFSET_OPTION: &str = ",offset=";
/// What can be written.
const FORMS: &str =
    "tcp:HOST:PORT, unix:PATH, vsock:CID:PORT, fd:NAME, exec:COMMAND or file:PATH[,offset=N]";
/// Schemes that operators of other systems will try.
const KNOWN_ELSEWHERE: [&str; 1] = ["rdma"];

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
    /// `vsock:CID:PORT`.
    Vsock {
        /// Context id of a VM or host; 4294967295 listens for all of them.
        cid: u32,
        /// Port. 4294967295 lets the kernel choose when listening.
        port: u32,
    },
    /// `fd:NAME`.
    Fd {
        /// Name of a descriptor that was passed to the process.
        name: String,
    },
    /// `exec:COMMAND`.
    Exec {
        /// What `/bin/sh -c` runs.
        command: String,
    },
    /// `file:PATH[,offset=N]`.
    File {
        /// Path of the file, relative paths against the working directory. `/dev/fdset/N` means a set of descriptors that was passed to
        /// the process.
        path: PathBuf,
        /// Bytes at the start of the file that are not ours.
        offset: u64,
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

    /// An address of a file, of which the first `offset` bytes are not ours.
    ///
    /// # Errors
    /// When the kernel or our own text form could not carry the path or the offset.
    pub fn file(path: &str, offset: u64) -> Result<Self, AddressError> {
        let text = format!("file:{path}{OFFSET_OPTION}{offset}");
        if path.contains(OFFSET_OPTION) {
            let reason = format!("a path cannot contain `{OFFSET_OPTION}`");
            return Err(fault(&text, reason));
        }
        text.parse()
    }

    /// An address of a program with its arguments. It runs in place of the shell.
    ///
    /// # Errors
    /// When there is no program, or the kernel could not carry the arguments.
    pub fn exec(args: &[String]) -> Result<Self, AddressError> {
        if let [shell, option, command] = args
            && shell == "/bin/sh"
            && option == "-c"
        {
            return format!("exec:{command}").parse();
        }
        let quoted = args
            .iter()
            .map(|arg| format!(" '{}'", arg.replace('\'', r"'\''")));
        match quoted.collect::<String>() {
            none if none.is_empty() => Err(fault("exec:", "the program is missing")),
            words => format!("exec:exec{words}").parse(),
        }
    }
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let Some((scheme, rest)) = text.split_once(':') else {
            return Err(fault(text, format!("use {FORMS}")));
        };
        let parsed = match scheme {
            "tcp" => return parse_tcp(text, rest),
            "unix" => return parse_unix(text, rest),
            "vsock" => parse_vsock(rest),
            "fd" => parse_fd(rest),
            "exec" => parse_exec(rest),
            "file" => parse_file(rest),
            other if KNOWN_ELSEWHERE.contains(&other) => {
                Err(format!("`{other}:` is not supported; use {FORMS}"))
            }
            _ => Err(format!("it must start with the kind, as in {FORMS}")),
        };
        parsed.map_err(|reason| fault(text, reason))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
            Self::Unix { path } => write!(f, "unix:{}", path.display()),
            Self::Vsock { cid, port } => write!(f, "vsock:{cid}:{port}"),
            Self::Fd { name } => write!(f, "fd:{name}"),
            Self::Exec { command } => write!(f, "exec:{command}"),
            Self::File { path, offset: 0 } => write!(f, "file:{}", path.display()),
            Self::File { path, offset } => {
                write!(f, "file:{}{OFFSET_OPTION}{offset}", path.display())
            }
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

fn parse_vsock(rest: &str) -> Result<Address, String> {
    let (cid, port) = rest
        .split_once(':')
        .ok_or("the port is missing, as in vsock:3:4444")?;
    let number = |field: &str, text: &str| {
        decimal(text)
            .and_then(|number| u32::try_from(number).ok())
            .ok_or_else(|| {
                format!(
                    "`{}` is no {field}; it is a number from 0 to 4294967295",
                    brief(text)
                )
            })
    };
    Ok(Address::Vsock {
        cid: number("context id", cid)?,
        port: number("port", port)?,
    })
}

fn parse_fd(name: &str) -> Result<Address, String> {
    if name.is_empty() {
        return Err("the name is missing, as in fd:NAME after getfd of NAME".to_owned());
    }
    if name.len() > FD_NAME_BYTES_MAX || name.chars().any(char::is_control) {
        return Err(format!(
            "a name of a descriptor has at most {FD_NAME_BYTES_MAX} bytes and no control characters"
        ));
    }
    Ok(Address::Fd {
        name: name.to_owned(),
    })
}

fn parse_exec(command: &str) -> Result<Address, String> {
    if command.trim().is_empty() {
        return Err("the command is missing, as in exec:gzip -c > FILE".to_owned());
    }
    if command.len() > COMMAND_BYTES_MAX || command.contains('\0') {
        return Err(format!(
            "a command has at most {COMMAND_BYTES_MAX} bytes and no NUL"
        ));
    }
    Ok(Address::Exec {
        command: command.to_owned(),
    })
}

fn parse_file(rest: &str) -> Result<Address, String> {
    let (path, offset) = match rest.split_once(OFFSET_OPTION) {
        Some((path, offset)) => (path, parse_offset(offset)?),
        None => (rest, 0),
    };
    if path.is_empty() {
        return Err("the path is missing, as in file:/var/tmp/vm.vmferry".to_owned());
    }
    if path.len() > FILE_PATH_BYTES_MAX || path.contains('\0') {
        return Err(format!(
            "a path has at most {FILE_PATH_BYTES_MAX} bytes and no NUL"
        ));
    }
    Ok(Address::File {
        path: PathBuf::from(path),
        offset,
    })
}

/// Decimal with an optional binary suffix, or hexadecimal without one: `4096`, `4K`, `0x1000`.
fn parse_offset(text: &str) -> Result<u64, String> {
    let hexadecimal = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X"));
    let bytes = match hexadecimal {
        Some(digits) if digits.bytes().all(|b| b.is_ascii_hexdigit()) => {
            u64::from_str_radix(digits, 16).ok()
        }
        Some(_) => None,
        None => {
            let (digits, shift) = match text.char_indices().next_back() {
                Some((at, last)) if !last.is_ascii_digit() => ("BKMGTPE"
                    .find(last.to_ascii_uppercase()))
                .map_or(("", 0), |unit| (&text[..at], 10 * unit)),
                _ => (text, 0),
            };
            decimal(digits).and_then(|number| number.checked_mul(1 << shift))
        }
    };
    bytes.filter(|bytes| *bytes <= OFFSET_MAX).ok_or_else(|| {
        format!(
            "`{}` is no offset; it is a number of bytes, as in 4096, 0x1000, 4K or 1M, below 8E",
            brief(text)
        )
    })
}

fn decimal(digits: &str) -> Option<u64> {
    let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
    plain.then(|| digits.parse().ok()).flatten()
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
            "vsock:2:4294967295",
            "fd:migrate-1",
            "exec:gzip -c > 'a b:c,d'",
            "file:/var/tmp/vm",
            "file:a,b:c,offset=4096",
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
            ("", "use tcp:HOST:PORT, unix:PATH"),
            ("localhost:1", "must start with the kind, as in tcp:"),
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
            ("rdma:h:1", "`rdma:` is not supported"),
            ("vsock:3", "port is missing"),
            ("vsock::4", "no context id"),
            ("vsock:3:4294967296", "no port"),
            ("fd:", "name is missing"),
            ("fd:a\nb", "no control characters"),
            ("exec: ", "command is missing"),
            ("exec:a\0", "no NUL"),
            ("file:", "path is missing"),
            ("file:,offset=1", "path is missing"),
            ("file:a\0b", "no NUL"),
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
    fn offsets_take_suffixes_and_bad_ones_are_refused() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("7b", 7),
            ("4K", 4096),
            ("1m", 1 << 20),
            ("2G", 2 << 30),
            ("7E", 7 << 60),
            ("0x1000", 4096),
            ("9223372036854775807", i64::MAX as u64),
        ] {
            let address: Address = format!("file:f,offset={text}").parse().unwrap();
            let path = PathBuf::from("f");
            assert_eq!(
                address,
                Address::File {
                    path,
                    offset: bytes
                }
            );
        }
        for text in [
            "",
            "K",
            "-1",
            "+1",
            "1.5M",
            "0x20M",
            "0x",
            "4KB",
            "8E",
            "16E",
            "1 ",
            "1,offset=2",
            "ä",
        ] {
            let text = format!("file:f,offset={text}");
            assert!(reason(&text).contains("is no offset"), "{}", reason(&text));
        }
    }

    #[test]
    fn a_program_with_arguments_becomes_a_command_of_the_shell() {
        let exec = |args: &[&str]| {
            let args: Vec<_> = args.iter().map(|arg| (*arg).to_owned()).collect();
            Address::exec(&args).map(|address| address.to_string())
        };
        assert_eq!(exec(&["/bin/sh", "-c", "a | b"]).unwrap(), "exec:a | b");
        assert_eq!(
            exec(&["cat", "it's", ""]).unwrap(),
            r"exec:exec 'cat' 'it'\''s' ''"
        );
        assert!(exec(&[]).is_err());
        assert!(exec(&["a\0"]).is_err());
    }

    #[test]
    fn a_file_name_that_looks_like_an_option_is_refused() {
        assert!(Address::file("a,offset=1", 0).is_err());
        assert_eq!(
            Address::file("a", 9).unwrap().to_string(),
            "file:a,offset=9"
        );
        assert_eq!(Address::file("a", 0).unwrap().to_string(), "file:a");
    }

    #[test]
    fn a_path_becomes_an_address_only_if_it_can_be_written() {
        use std::os::unix::ffi::OsStrExt;
        assert!(Address::unix("/tmp/x").is_ok());
        assert!(Address::unix(std::ffi::OsStr::from_bytes(b"/tmp/\xff")).is_err());
    }
}
