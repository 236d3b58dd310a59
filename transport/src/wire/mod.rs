//! The wire format.

pub mod archive;
pub mod device_data;
pub mod frame;
#[cfg(any(test, feature = "testkit"))]
pub mod fuzz;
pub mod header;
pub mod hello;
pub mod mux;
pub mod ram;
pub mod section;

pub use section::{DeviceSchema, Section};

/// The peer sent bytes that the protocol does not allow. The link is closed; a retry meets the same peer.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// The first bytes are not ours: the peer speaks another protocol.
    #[error("the peer does not speak the vmferry protocol (a frame starts with {})", printable(.first_bytes))]
    Magic {
        /// What stood where the magic belongs.
        first_bytes: [u8; 4],
    },
    /// A reserved field is not zero.
    #[error("a reserved field of a frame of type {kind} is set")]
    Reserved {
        /// Frame type.
        kind: u8,
    },
    /// A frame type or flag that this side does not know, or that the sender may not send.
    #[error("unexpected frame type {kind} with flags {flags:#x}")]
    Kind {
        /// Frame type.
        kind: u8,
        /// Flags.
        flags: u8,
    },
    /// Header or body were changed on the way.
    #[error("bad checksum of a frame of type {kind}")]
    Checksum {
        /// Frame type.
        kind: u8,
    },
    /// Pages arrived changed.
    #[error("bad checksum of page data")]
    PayloadChecksum,
    /// The body ends in the middle of a field.
    #[error("a frame ends too early")]
    Truncated,
    /// The body has more bytes than its fields.
    #[error("a frame has {len} bytes too many")]
    LeftOver {
        /// How many.
        len: usize,
    },
    /// No protocol version that both sides speak. Upgrade one of them.
    #[error("no common protocol version: this side speaks {ours}, the peer {theirs}")]
    Version {
        /// What this side speaks.
        ours: hello::VersionRange,
        /// What the peer speaks.
        theirs: hello::VersionRange,
    },
    /// A length is over its limit.
    #[error("{field} is too long: {len}, at most {max} allowed")]
    TooLong {
        /// Which length.
        field: &'static str,
        /// Its value.
        len: u64,
        /// Its limit.
        max: u64,
    },
    /// A field has a value that is not allowed.
    #[error("field {field} has the value {value}, which is not allowed")]
    Value {
        /// Which field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// A text is not UTF-8.
    #[error("field {field} is not valid UTF-8")]
    Text {
        /// Which field.
        field: &'static str,
    },
    /// A run of pages lies outside its block, or names a block that does not exist.
    #[error("pages {start}+{count} are outside of RAM block {block}")]
    OutsideBlock {
        /// The block.
        block: u16,
        /// First page.
        start: u64,
        /// Number of pages.
        count: u64,
    },
    /// A RAM frame belongs to another round than its connection is in.
    #[error("a RAM frame of round {found} came in round {expected}")]
    Round {
        /// The round that the connection is in.
        expected: u32,
        /// The round that the frame names.
        found: u32,
    },
    /// Pages came a second time within one round.
    #[error("pages {start}+{count} of RAM block {block} came twice in one round")]
    PagesTwice {
        /// The block.
        block: u16,
        /// First page of the run that was partly there already.
        start: u64,
        /// Its number of pages.
        count: u64,
    },
    /// The first round ended before every page was accounted for.
    #[error("the first round left out {count} pages of RAM")]
    PagesMissing {
        /// How many.
        count: u64,
    },
    /// A piece of a device's stream that does not follow on the one before.
    #[error("data of device {device:?} continues at byte {found}, {expected} bytes have come")]
    DeviceOffset {
        /// Which device.
        device: String,
        /// Bytes so far.
        expected: u64,
        /// Where the piece belongs.
        found: u64,
    },
    /// The last round ended in the middle of a device's stream.
    #[error("the data of device {device:?} is not complete")]
    DeviceUnfinished {
        /// Which device.
        device: String,
    },
    /// The end of a round names other totals than what arrived.
    #[error("the peer counts {sent} {what} in the round, but {received} arrived")]
    RoundTotals {
        /// What was counted.
        what: &'static str,
        /// The sender's count.
        sent: u64,
        /// The receiver's count.
        received: u64,
    },
}

fn printable(bytes: &[u8]) -> String {
    format!("\"{}\"", bytes.escape_ascii())
}
