//! Where a migration goes to, as `migrate` and `migrate-incoming` are told: a `uri`, or QEMU's list of `channels`.

use serde::Deserialize;
use serde_json::Value;
use vmferry_transport::control::Address;

use super::QmpError;
use super::types::{Members, Object, Type, Variants, needs, object};

/// One channel of the list.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Channel {
    channel_type: ChannelType,
    addr: ChannelAddress,
}

#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "kebab-case")]
enum ChannelType {
    Main,
    Cpr,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "transport")]
enum ChannelAddress {
    Socket(SocketAddress),
    Exec { args: Vec<String> },
    Rdma {},
    File { filename: String, offset: u64 },
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "type")]
enum SocketAddress {
    Inet { host: String, port: String },
    Unix { path: String },
    Vsock { cid: String, port: String },
    Fd { str: String },
}

/// The type of the argument `channels`.
pub(super) const CHANNELS: Type = Type::List(&Type::Object(&CHANNEL));

const CHANNEL: Object = object(&[
    needs("channel-type", Type::Enum(|| vec!["main", "cpr"])),
    needs("addr", Type::Object(&ADDRESS)),
]);
const ADDRESS: Object = Object {
    members: Members::Fixed(&[needs(
        "transport",
        Type::Enum(|| vec!["socket", "exec", "rdma", "file"]),
    )]),
    variants: Some(Variants {
        tag: "transport",
        cases: &[
            ("socket", &SOCKET),
            ("exec", &object(&[needs("args", Type::List(&Type::Str))])),
            (
                "rdma",
                &object(&[needs("host", Type::Str), needs("port", Type::Str)]),
            ),
            (
                "file",
                &object(&[needs("filename", Type::Str), needs("offset", Type::Int)]),
            ),
        ],
    }),
};
/// QEMU's `SocketAddress` without the members that a migration does not use.
const SOCKET: Object = Object {
    members: Members::Fixed(&[needs(
        "type",
        Type::Enum(|| vec!["inet", "unix", "vsock", "fd"]),
    )]),
    variants: Some(Variants {
        tag: "type",
        cases: &[
            (
                "inet",
                &object(&[needs("host", Type::Str), needs("port", Type::Str)]),
            ),
            ("unix", &object(&[needs("path", Type::Str)])),
            (
                "vsock",
                &object(&[needs("cid", Type::Str), needs("port", Type::Str)]),
            ),
            ("fd", &object(&[needs("str", Type::Str)])),
        ],
    }),
};

/// Why a migration without a place is refused.
pub(crate) const NOWHERE: &str = "either `uri` or `channels` must say where";

/// The addresses that the arguments name: that of the `main` channel, and that of `cpr`, if there is one.
///
/// # Errors
/// None, both, not exactly one main channel, or no address of ours.
pub(super) fn addresses(
    uri: Option<&str>,
    channels: Option<Value>,
) -> Result<(Address, Option<Address>), QmpError> {
    match (uri, channels) {
        (Some(uri), None) => uri
            .parse()
            .map(|main| (main, None))
            .map_err(|error| QmpError::generic(format!("argument `uri`: {error}"))),
        (None, Some(channels)) => by_type(channels)
            .map_err(|problem| QmpError::generic(format!("argument `channels`: {problem}"))),
        (Some(_), Some(_)) => Err(QmpError::generic(
            "give either `uri` or `channels`, not both",
        )),
        (None, None) => Err(QmpError::generic(NOWHERE)),
    }
}

/// The one address, where there is no use for a `cpr` channel.
///
/// # Errors
/// As [`addresses`], or a `cpr` channel.
pub(super) fn address(uri: Option<&str>, channels: Option<Value>) -> Result<Address, QmpError> {
    match addresses(uri, channels)? {
        (main, None) => Ok(main),
        (_, Some(_)) => Err(QmpError::generic(
            "argument `channels`: a process is started with its `cpr` channel (vmferry run --incoming-cpr)",
        )),
    }
}

fn by_type(channels: Value) -> Result<(Address, Option<Address>), String> {
    let channels: Vec<Channel> =
        serde_json::from_value(channels).map_err(|error| error.to_string())?;
    let (mut main, mut cpr) = (None, None);
    for Channel { channel_type, addr } in channels {
        match channel_type {
            ChannelType::Cpr if cpr.is_some() => {
                return Err("there must be only one `cpr` channel".to_owned());
            }
            ChannelType::Cpr => match addr.to_address()? {
                unix @ Address::Unix { .. } => cpr = Some(unix),
                other => return Err(format!("the `cpr` channel is a unix socket, not {other}")),
            },
            ChannelType::Main if main.is_some() => {
                return Err("there must be only one `main` channel".to_owned());
            }
            ChannelType::Main => main = Some(addr.to_address()?),
        }
    }
    let main = main.ok_or_else(|| "there must be a `main` channel".to_owned())?;
    Ok((main, cpr))
}

impl ChannelAddress {
    fn to_address(&self) -> Result<Address, String> {
        let parsed = match self {
            Self::Socket(SocketAddress::Inet { host, port }) if host.contains(':') => {
                format!("tcp:[{host}]:{port}").parse()
            }
            Self::Socket(SocketAddress::Inet { host, port }) => {
                format!("tcp:{host}:{port}").parse()
            }
            Self::Socket(SocketAddress::Unix { path }) => Address::unix(path),
            Self::Socket(SocketAddress::Vsock { cid, port }) => {
                format!("vsock:{cid}:{port}").parse()
            }
            Self::Socket(SocketAddress::Fd { str }) => format!("fd:{str}").parse(),
            Self::Exec { args } => Address::exec(args),
            Self::Rdma {} => return Err("transport `rdma` is not supported".to_owned()),
            Self::File { filename, offset } => Address::file(filename, *offset),
        };
        parsed.map_err(|error| error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn main(addr: Value) -> Value {
        json!([{"channel-type": "main", "addr": addr}])
    }

    #[test]
    fn every_kind_of_channel_is_the_same_as_its_uri() {
        for (addr, uri) in [
            (
                json!({"transport": "socket", "type": "inet", "host": "a", "port": "5"}),
                "tcp:a:5",
            ),
            (
                json!({"transport": "socket", "type": "inet", "host": "::1", "port": "5"}),
                "tcp:[::1]:5",
            ),
            (
                json!({"transport": "socket", "type": "unix", "path": "/a b"}),
                "unix:/a b",
            ),
            (
                json!({"transport": "socket", "type": "vsock", "cid": "3", "port": "4"}),
                "vsock:3:4",
            ),
            (
                json!({"transport": "socket", "type": "fd", "str": "name"}),
                "fd:name",
            ),
            (
                json!({"transport": "exec", "args": ["/bin/sh", "-c", "cat > x"]}),
                "exec:cat > x",
            ),
            (
                json!({"transport": "file", "filename": "/f", "offset": 4096}),
                "file:/f,offset=4096",
            ),
        ] {
            let channels = main(addr);
            assert_eq!(CHANNELS.check("channels", &channels), Ok(()));
            assert_eq!(
                address(None, Some(channels)).unwrap(),
                address(Some(uri), None).unwrap()
            );
        }
    }

    #[test]
    fn lists_that_name_no_single_main_channel_are_refused() {
        let unix = json!({"transport": "socket", "type": "unix", "path": "/x"});
        let cpr = json!({"channel-type": "cpr", "addr": unix});
        let line = json!({"channel-type": "main", "addr": unix});
        for (channels, part) in [
            (json!([]), "must be a `main` channel"),
            (json!([line, line]), "only one `main`"),
            (json!([line, cpr, cpr]), "only one `cpr`"),
            (
                main(json!({"transport": "rdma", "host": "h", "port": "1"})),
                "`rdma` is not supported",
            ),
            (
                main(json!({"transport": "socket", "type": "inet", "host": "h", "port": "ssh"})),
                "no address",
            ),
            (main(json!({"transport": "exec", "args": []})), "program"),
        ] {
            let error = address(None, Some(channels)).unwrap_err();
            assert!(error.desc.contains(part), "{}", error.desc);
        }
        assert!(address(None, None).is_err());
        assert!(address(Some("unix:/x"), Some(json!([line]))).is_err());
    }
}
