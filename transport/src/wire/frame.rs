//! Frames of the control connection: one enum per direction.

use bytes::{Buf, Bytes, BytesMut};

use super::header::{FrameHeader, HEADER_BYTES, Reader, encode_frame, put_text};
use super::hello::{DataHello, Hello, HelloReply};
use super::{Section, WireError};
use crate::limits::{
    CONTROL_BYTES_MAX, HELLO_BYTES_MAX, NAME_BYTES_MAX, SECTION_BYTES_MAX, TEXT_BYTES_MAX,
};
use crate::units::{MigrationId, RoundId};

/// Type numbers of the frames. A number is never used again for something else.
pub mod kind {
    /// [`Hello`](super::Hello), first on a control connection.
    pub const HELLO: u8 = 1;
    /// [`DataHello`](super::DataHello), first on a data connection.
    pub const DATA_HELLO: u8 = 2;
    /// The guest is stopped; what follows is the last round.
    pub const SWITCHOVER: u8 = 3;
    /// State of one device.
    pub const SECTION: u8 = 4;
    /// All sections have been sent.
    pub const STATE_END: u8 = 5;
    /// The target owns the guest from here on.
    pub const COMMIT: u8 = 6;
    /// First on a new connection: what became of a migration?
    pub const RESOLVE: u8 = 7;
    /// The source knows the outcome; the target may forget it.
    pub const FINISH: u8 = 8;
    /// I am alive (both directions).
    pub const KEEPALIVE: u8 = 9;
    /// It is over, and why (both directions).
    pub const ABORT: u8 = 10;
    /// Answer to a hello.
    pub const HELLO_REPLY: u8 = 20;
    /// All data connections have arrived and memory is prepared.
    pub const DATA_READY: u8 = 21;
    /// Everything is loaded.
    pub const READY: u8 = 22;
    /// The guest belongs to the target, and runs if it ran before.
    pub const RUNNING: u8 = 23;
    /// Answer to RESOLVE.
    pub const RESOLVED: u8 = 24;
    /// Every page of a round is in its place.
    pub const ROUND_PLACED: u8 = 25;
    /// The target's devices are ready for a switchover.
    pub const SWITCHOVER_ACK: u8 = 26;
}

/// Why a side gives up, in a form the other side can act on; the text is for people.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum AbortCode {
    /// The operator cancelled.
    Cancelled,
    /// The two VMs do not fit together; nothing was changed. A retry needs another configuration.
    Incompatible,
    /// The receiver of this frame broke the protocol.
    Protocol,
    /// The sender of this frame has no memory, disk or kernel support for it.
    Resources,
    /// Device state was refused.
    Device,
    /// The target is busy with another migration, or was not started for one.
    Busy,
    /// Anything else on the sender's side.
    Internal,
}

impl AbortCode {
    const ALL: [Self; 7] = [
        Self::Cancelled,
        Self::Incompatible,
        Self::Protocol,
        Self::Resources,
        Self::Device,
        Self::Busy,
        Self::Internal,
    ];

    fn to_wire(self) -> u16 {
        match self {
            Self::Cancelled => 1,
            Self::Incompatible => 2,
            Self::Protocol => 3,
            Self::Resources => 4,
            Self::Device => 5,
            Self::Busy => 6,
            Self::Internal => 7,
        }
    }

    /// Codes of later versions read as [`AbortCode::Internal`]: the text still says what happened.
    fn from_wire(value: u16) -> Self {
        Self::ALL
            .into_iter()
            .find(|code| code.to_wire() == value)
            .unwrap_or(Self::Internal)
    }
}

/// It is over, and why. Body: 2 code, text reason.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Abort {
    /// What kind of reason.
    pub code: AbortCode,
    /// For people; cut at 4096 bytes.
    pub reason: String,
}

impl Abort {
    /// An abort with a reason.
    pub fn new(code: AbortCode, reason: impl Into<String>) -> Self {
        Self {
            code,
            reason: reason.into(),
        }
    }
}

/// End of the device state. Body: 2 number of sections, 4 number of the last round, 1 guest ran (0 or 1), 1 has hash, 16 hash.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct StateEnd {
    /// How many sections were sent.
    pub sections: u16,
    /// The round that must be complete before anything is loaded.
    pub last_round: RoundId,
    /// The guest ran before the switchover and shall run after it.
    pub guest_runs: bool,
    /// Hash of all RAM at the pause, when verification was asked for.
    pub ram_hash: Option<u128>,
}

/// What the target found when it was asked to verify.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Verification {
    /// Hash of all RAM before the guest runs.
    pub ram_hash: u128,
    /// State that does not read back as it was loaded; empty when all is equal.
    pub state_differences: String,
    /// How long hashing and reading back took, in microseconds.
    pub took_us: u64,
}

/// Everything is loaded. Body: 8 load time, 8 populated bytes, 1 has verification, and if so 16 hash, 8 time, text differences.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Ready {
    /// How long loading the device state took, in microseconds, without verification.
    pub load_us: u64,
    /// Bytes of RAM that are populated at the target.
    pub populated_bytes: u64,
    /// Present when the hello asked for it.
    pub verification: Option<Verification>,
}

/// Frames from the source.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum SourceFrame {
    /// First frame of a control connection.
    Hello(Hello),
    /// First frame of a data connection.
    DataHello(DataHello),
    /// The guest is stopped; the round named is the last.
    Switchover(RoundId),
    /// State of one device.
    Section(Section),
    /// All sections have been sent.
    StateEnd(StateEnd),
    /// The target owns the guest from here on.
    Commit,
    /// First frame of a control connection that asks for an outcome.
    Resolve(MigrationId),
    /// The source knows the outcome.
    Finish,
    /// I am alive.
    Keepalive,
    /// It is over.
    Abort(Abort),
}

/// What became of a migration, as the target knows it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Resolution {
    /// COMMIT arrived: the guest belongs to the target.
    Committed,
    /// COMMIT never arrived and will not be accepted any more: the guest belongs to the source.
    NotCommitted,
}

/// Frames from the target.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum TargetFrame {
    /// Answer to a hello that fits.
    HelloReply(HelloReply),
    /// All data connections have arrived.
    DataReady,
    /// The target's devices are ready for a switchover; only if the hello asked for it, and once.
    SwitchoverAck,
    /// Every page of a round is in its place. The source waits for it between rounds, never within one.
    RoundPlaced(RoundId),
    /// Everything is loaded.
    Ready(Ready),
    /// The guest belongs to the target. Time from COMMIT until the vCPUs ran, in microseconds.
    Running {
        /// How long starting took.
        resume_us: u64,
    },
    /// Answer to RESOLVE.
    Resolved(Resolution),
    /// I am alive.
    Keepalive,
    /// It is over.
    Abort(Abort),
}

impl SourceFrame {
    /// Header and body as they go over the wire.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Self::Hello(hello) => encode_frame(kind::HELLO, 0, &hello.encode()),
            Self::DataHello(hello) => encode_frame(kind::DATA_HELLO, 0, &hello.encode()),
            Self::Switchover(round) => encode_frame(kind::SWITCHOVER, 0, &round.0.to_le_bytes()),
            Self::Section(section) => encode_frame(kind::SECTION, 0, &encode_section(section)),
            Self::StateEnd(end) => encode_frame(kind::STATE_END, 0, &encode_state_end(end)),
            Self::Commit => encode_frame(kind::COMMIT, 0, &[]),
            Self::Resolve(id) => encode_frame(kind::RESOLVE, 0, &id.0),
            Self::Finish => encode_frame(kind::FINISH, 0, &[]),
            Self::Keepalive => encode_frame(kind::KEEPALIVE, 0, &[]),
            Self::Abort(abort) => encode_abort(abort),
        }
    }
}

impl TargetFrame {
    /// Header and body as they go over the wire.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Self::HelloReply(reply) => encode_frame(kind::HELLO_REPLY, 0, &reply.encode()),
            Self::DataReady => encode_frame(kind::DATA_READY, 0, &[]),
            Self::SwitchoverAck => encode_frame(kind::SWITCHOVER_ACK, 0, &[]),
            Self::RoundPlaced(round) => encode_frame(kind::ROUND_PLACED, 0, &round.0.to_le_bytes()),
            Self::Ready(ready) => encode_frame(kind::READY, 0, &encode_ready(ready)),
            Self::Running { resume_us } => encode_frame(kind::RUNNING, 0, &resume_us.to_le_bytes()),
            Self::Resolved(resolution) => {
                let value = match resolution {
                    Resolution::Committed => 1,
                    Resolution::NotCommitted => 2,
                };
                encode_frame(kind::RESOLVED, 0, &[value])
            }
            Self::Keepalive => encode_frame(kind::KEEPALIVE, 0, &[]),
            Self::Abort(abort) => encode_abort(abort),
        }
    }
}

/// Frames of one direction, as [`FrameBuffer`] reads them.
pub trait ControlFrame: Sized {
    /// Longest body of a frame of this type, in bytes; `None` if this direction has no such type.
    fn body_max(kind: u8) -> Option<u32>;

    /// Reads a body whose length and checksum are right.
    ///
    /// # Errors
    /// What is wrong with it.
    fn decode(kind: u8, body: Bytes) -> Result<Self, WireError>;
}

impl ControlFrame for SourceFrame {
    fn body_max(kind: u8) -> Option<u32> {
        match kind {
            kind::HELLO => Some(HELLO_BYTES_MAX),
            kind::SECTION => Some(SECTION_BYTES_MAX),
            kind::DATA_HELLO..=kind::ABORT => Some(CONTROL_BYTES_MAX),
            _ => None,
        }
    }

    fn decode(kind: u8, body: Bytes) -> Result<Self, WireError> {
        let mut reader = Reader::new(&body);
        let frame = match kind {
            kind::HELLO => return Hello::decode(&body).map(Self::Hello),
            kind::DATA_HELLO => return DataHello::decode(&body).map(Self::DataHello),
            kind::SECTION => return decode_section(&body).map(Self::Section),
            kind::ABORT => return decode_abort(&body).map(Self::Abort),
            kind::SWITCHOVER => Self::Switchover(RoundId(reader.u32()?)),
            kind::STATE_END => Self::StateEnd(decode_state_end(&mut reader)?),
            kind::COMMIT => Self::Commit,
            kind::RESOLVE => Self::Resolve(MigrationId(reader.id()?)),
            kind::FINISH => Self::Finish,
            kind::KEEPALIVE => Self::Keepalive,
            _ => return Err(WireError::Kind { kind, flags: 0 }),
        };
        reader.finish()?;
        Ok(frame)
    }
}

impl ControlFrame for TargetFrame {
    fn body_max(kind: u8) -> Option<u32> {
        matches!(
            kind,
            kind::HELLO_REPLY..=kind::SWITCHOVER_ACK | kind::KEEPALIVE | kind::ABORT
        )
        .then_some(CONTROL_BYTES_MAX)
    }

    fn decode(kind: u8, body: Bytes) -> Result<Self, WireError> {
        let mut reader = Reader::new(&body);
        let frame = match kind {
            kind::HELLO_REPLY => return HelloReply::decode(&body).map(Self::HelloReply),
            kind::ABORT => return decode_abort(&body).map(Self::Abort),
            kind::DATA_READY => Self::DataReady,
            kind::SWITCHOVER_ACK => Self::SwitchoverAck,
            kind::ROUND_PLACED => Self::RoundPlaced(RoundId(reader.u32()?)),
            kind::READY => Self::Ready(decode_ready(&mut reader)?),
            kind::RUNNING => Self::Running {
                resume_us: reader.u64()?,
            },
            kind::RESOLVED => Self::Resolved(match reader.u8()? {
                1 => Resolution::Committed,
                2 => Resolution::NotCommitted,
                value => {
                    return Err(WireError::Value {
                        field: "resolution",
                        value: u64::from(value),
                    });
                }
            }),
            kind::KEEPALIVE => Self::Keepalive,
            _ => return Err(WireError::Kind { kind, flags: 0 }),
        };
        reader.finish()?;
        Ok(frame)
    }
}

fn encode_section(section: &Section) -> Vec<u8> {
    let Section {
        name,
        schema,
        version,
        bytes,
    } = section;
    let mut body = Vec::with_capacity(bytes.len() + 64);
    put_text(&mut body, name, NAME_BYTES_MAX);
    put_text(&mut body, schema, NAME_BYTES_MAX);
    body.extend_from_slice(&version.to_le_bytes());
    body.extend_from_slice(bytes);
    body
}

fn decode_section(body: &Bytes) -> Result<Section, WireError> {
    let mut reader = Reader::new(body);
    let name = reader.text("device name", NAME_BYTES_MAX)?;
    let schema = reader.text("device schema", NAME_BYTES_MAX)?;
    let version = reader.u32()?;
    let state = reader.rest();
    Ok(Section {
        name,
        schema,
        version,
        bytes: body.slice_ref(state),
    })
}

fn encode_state_end(end: &StateEnd) -> Vec<u8> {
    let StateEnd {
        sections,
        last_round,
        guest_runs,
        ram_hash,
    } = end;
    let mut body = sections.to_le_bytes().to_vec();
    body.extend_from_slice(&last_round.0.to_le_bytes());
    body.push(u8::from(*guest_runs));
    body.push(u8::from(ram_hash.is_some()));
    body.extend_from_slice(&ram_hash.unwrap_or(0).to_le_bytes());
    body
}

fn decode_state_end(reader: &mut Reader<'_>) -> Result<StateEnd, WireError> {
    let sections = reader.u16()?;
    let last_round = RoundId(reader.u32()?);
    let guest_runs = reader.bool("guest runs")?;
    let has_hash = reader.bool("has hash")?;
    let hash = u128::from_le_bytes(reader.id()?);
    Ok(StateEnd {
        sections,
        last_round,
        guest_runs,
        ram_hash: has_hash.then_some(hash),
    })
}

fn encode_ready(ready: &Ready) -> Vec<u8> {
    let Ready {
        load_us,
        populated_bytes,
        verification,
    } = ready;
    let mut body = load_us.to_le_bytes().to_vec();
    body.extend_from_slice(&populated_bytes.to_le_bytes());
    body.push(u8::from(verification.is_some()));
    if let Some(Verification {
        ram_hash,
        state_differences,
        took_us,
    }) = verification
    {
        body.extend_from_slice(&ram_hash.to_le_bytes());
        body.extend_from_slice(&took_us.to_le_bytes());
        put_text(&mut body, state_differences, TEXT_BYTES_MAX);
    }
    body
}

fn decode_ready(reader: &mut Reader<'_>) -> Result<Ready, WireError> {
    let load_us = reader.u64()?;
    let populated_bytes = reader.u64()?;
    let verification = if reader.bool("has verification")? {
        let ram_hash = u128::from_le_bytes(reader.id()?);
        let took_us = reader.u64()?;
        Some(Verification {
            ram_hash,
            took_us,
            state_differences: reader.text("differences", TEXT_BYTES_MAX)?,
        })
    } else {
        None
    };
    Ok(Ready {
        load_us,
        populated_bytes,
        verification,
    })
}

fn encode_abort(abort: &Abort) -> Vec<u8> {
    let Abort { code, reason } = abort;
    let mut body = code.to_wire().to_le_bytes().to_vec();
    put_text(&mut body, reason, TEXT_BYTES_MAX);
    encode_frame(kind::ABORT, 0, &body)
}

fn decode_abort(body: &[u8]) -> Result<Abort, WireError> {
    let mut reader = Reader::new(body);
    let abort = Abort {
        code: AbortCode::from_wire(reader.u16()?),
        reason: reader.text("reason", TEXT_BYTES_MAX)?,
    };
    reader.finish()?;
    Ok(abort)
}

/// Collects bytes of a control connection and yields frames. Holds at most one frame and what came behind it in the same read.
#[derive(Debug, Default)]
pub struct FrameBuffer {
    bytes: BytesMut,
}

impl FrameBuffer {
    /// Adds bytes as they came from the link.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The next complete frame; `None` if more bytes are needed. A length is checked against the limit of its type before the body
    /// is waited for.
    ///
    /// # Errors
    /// What is wrong with the stream. It has no next frame then: close the connection.
    pub fn poll_frame<F: ControlFrame>(&mut self) -> Result<Option<F>, WireError> {
        // A peer that speaks something else often sends less than a header and waits: judge its first bytes at once.
        if let Some(first) = self.bytes.first_chunk::<4>()
            && u32::from_le_bytes(*first) != super::header::MAGIC
        {
            return Err(WireError::Magic {
                first_bytes: *first,
            });
        }
        let Some(header) = self.bytes.first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let header = FrameHeader::decode(header)?;
        let max = match F::body_max(header.kind) {
            Some(max) if header.flags == 0 => max,
            _ => {
                return Err(WireError::Kind {
                    kind: header.kind,
                    flags: header.flags,
                });
            }
        };
        if header.body_bytes > max {
            let (len, max) = (u64::from(header.body_bytes), u64::from(max));
            return Err(WireError::TooLong {
                field: "frame body",
                len,
                max,
            });
        }
        let total = HEADER_BYTES + header.body_bytes as usize;
        if self.bytes.len() < total {
            return Ok(None);
        }
        let mut frame = self.bytes.split_to(total);
        frame.advance(HEADER_BYTES);
        let body = frame.freeze();
        header.verify(&body)?;
        F::decode(header.kind, body).map(Some)
    }

    /// What no frame has been made of.
    pub fn into_rest(self) -> Vec<u8> {
        self.bytes.to_vec()
    }

    /// Bytes that no frame has been made of yet. After the end of a stream: 0 if it ended between two frames.
    pub fn pending(&self) -> usize {
        self.bytes.len()
    }
}

#[cfg(test)]
mod tests;
