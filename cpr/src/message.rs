//! What the two processes of a hand-over say to each other on the `cpr` socket.
//!
//! Frames as everywhere in vmferry ([`FrameHeader`](vmferry_transport::wire::header::FrameHeader)), with types of their own, so that a
//! socket that was meant for something else is noticed at the first frame. Descriptors travel with the first byte of an FDS frame and
//! with nothing else.
//!
//! | type | name | from | body |
//! |---|---|---|---|
//! | 0x40 | OFFER | old | 2+2 oldest and newest version, 16 id of the hand-over, text software, [manifest](crate::manifest) |
//! | 0x41 | FDS | old | 4 position of the first in the manifest, 4 number of descriptors, 1 to 253 |
//! | 0x42 | STAGE | old | 1 stage that is now complete |
//! | 0x43 | GIVE_UP | old | text reason |
//! | 0x50 | ACCEPT | new | 2 version, text software |
//! | 0x51 | TAKEN | new | 1 stage whose descriptors are all in use |
//! | 0x52 | REFUSE | new | text reason |

use bytes::Bytes;
use vmferry_transport::limits::{TEXT_BYTES_MAX, VERSION_MAX, VERSION_MIN};
use vmferry_transport::units::MigrationId;
use vmferry_transport::wire::WireError;
use vmferry_transport::wire::frame::ControlFrame;
use vmferry_transport::wire::header::{Reader, encode_frame, put_text};
use vmferry_transport::wire::hello::VersionRange;

use crate::manifest::{FDS_MAX, Manifest, ManifestError, NAME_BYTES_MAX, ROLE_BYTES_MAX, Stage};

/// Most descriptors that the kernel passes in one message (SCM_MAX_FD).
pub const BATCH_MAX: usize = 253;

/// Versions of this conversation that this build speaks. Its own: the control connection negotiates another.
pub const VERSIONS: VersionRange = VersionRange {
    min: VERSION_MIN,
    max: VERSION_MAX,
};

/// Longest OFFER: names and roles at a quarter of their limits for the most descriptors, which is more than anybody has.
pub const OFFER_BYTES_MAX: u32 = (FDS_MAX * (32 + NAME_BYTES_MAX / 4 + ROLE_BYTES_MAX / 4)) as u32;
/// Longest body of any other frame.
const SHORT_BYTES_MAX: u32 = 8 << 10;

const _: () = assert!(TEXT_BYTES_MAX + 64 < SHORT_BYTES_MAX as usize);

mod kind {
    pub(super) const OFFER: u8 = 0x40;
    pub(super) const FDS: u8 = 0x41;
    pub(super) const STAGE: u8 = 0x42;
    pub(super) const GIVE_UP: u8 = 0x43;
    pub(super) const ACCEPT: u8 = 0x50;
    pub(super) const TAKEN: u8 = 0x51;
    pub(super) const REFUSE: u8 = 0x52;
}

/// First word of the process that gives the descriptors away.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Offer {
    /// Versions that it speaks.
    pub versions: VersionRange,
    /// Which hand-over this is: the id of the migration that it belongs to.
    pub id: MigrationId,
    /// Its software, for people.
    pub software: String,
    /// What it will hand over. `Err` if it cannot be understood; everything else of the offer can.
    pub manifest: Result<Manifest, ManifestError>,
}

/// From the process that gives.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum GiverMessage {
    /// What will come.
    Offer(Offer),
    /// Comes with this many descriptors.
    Fds {
        /// Position of the first in the manifest.
        first: u32,
        /// How many.
        count: u32,
    },
    /// All descriptors of the stage were sent.
    Stage(Stage),
    /// Nothing more will come, and why.
    GiveUp(String),
}

/// From the process that takes.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum TakerMessage {
    /// The offer fits.
    Accept {
        /// Version that both speak from now on.
        version: u16,
        /// Its software, for people.
        software: String,
    },
    /// The descriptors of the stage are in use.
    Taken(Stage),
    /// It cannot be, and why.
    Refuse(String),
}

impl GiverMessage {
    /// Header and body.
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Vec::new();
        let kind = match self {
            Self::Offer(offer) => {
                body.extend_from_slice(&offer.versions.min.to_le_bytes());
                body.extend_from_slice(&offer.versions.max.to_le_bytes());
                body.extend_from_slice(&offer.id.0);
                put_text(&mut body, &offer.software, TEXT_BYTES_MAX);
                if let Ok(manifest) = &offer.manifest {
                    manifest.encode(&mut body);
                }
                kind::OFFER
            }
            Self::Fds { first, count } => {
                body.extend_from_slice(&first.to_le_bytes());
                body.extend_from_slice(&count.to_le_bytes());
                kind::FDS
            }
            Self::Stage(stage) => {
                body.push(*stage as u8);
                kind::STAGE
            }
            Self::GiveUp(reason) => {
                put_text(&mut body, reason, TEXT_BYTES_MAX);
                kind::GIVE_UP
            }
        };
        encode_frame(kind, 0, &body)
    }
}

impl ControlFrame for GiverMessage {
    fn body_max(kind: u8) -> Option<u32> {
        match kind {
            kind::OFFER => Some(OFFER_BYTES_MAX),
            kind::FDS..=kind::GIVE_UP => Some(SHORT_BYTES_MAX),
            _ => None,
        }
    }

    fn decode(kind: u8, body: Bytes) -> Result<Self, WireError> {
        let mut reader = Reader::new(&body);
        let message = match kind {
            kind::OFFER => {
                let versions = VersionRange {
                    min: reader.u16()?,
                    max: reader.u16()?,
                };
                let id = MigrationId(reader.id()?);
                let software = reader.text("software", TEXT_BYTES_MAX)?;
                let manifest = Manifest::decode(&mut reader, body.len());
                if manifest.is_err() {
                    // A later version may have added to it; the offer is answered with what is not understood.
                    reader.rest();
                }
                Self::Offer(Offer {
                    versions,
                    id,
                    software,
                    manifest,
                })
            }
            kind::FDS => {
                let (first, count) = (reader.u32()?, reader.u32()?);
                if count == 0 || count as usize > BATCH_MAX {
                    return Err(WireError::Value {
                        field: "number of descriptors",
                        value: u64::from(count),
                    });
                }
                Self::Fds { first, count }
            }
            kind::STAGE => Self::Stage(stage(&mut reader)?),
            kind::GIVE_UP => Self::GiveUp(reader.text("reason", TEXT_BYTES_MAX)?),
            _ => return Err(WireError::Kind { kind, flags: 0 }),
        };
        reader.finish()?;
        Ok(message)
    }
}

impl TakerMessage {
    /// Header and body.
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Vec::new();
        let kind = match self {
            Self::Accept { version, software } => {
                body.extend_from_slice(&version.to_le_bytes());
                put_text(&mut body, software, TEXT_BYTES_MAX);
                kind::ACCEPT
            }
            Self::Taken(stage) => {
                body.push(*stage as u8);
                kind::TAKEN
            }
            Self::Refuse(reason) => {
                put_text(&mut body, reason, TEXT_BYTES_MAX);
                kind::REFUSE
            }
        };
        encode_frame(kind, 0, &body)
    }
}

impl ControlFrame for TakerMessage {
    fn body_max(kind: u8) -> Option<u32> {
        (kind::ACCEPT..=kind::REFUSE)
            .contains(&kind)
            .then_some(SHORT_BYTES_MAX)
    }

    fn decode(kind: u8, body: Bytes) -> Result<Self, WireError> {
        let mut reader = Reader::new(&body);
        let message = match kind {
            kind::ACCEPT => Self::Accept {
                version: reader.u16()?,
                software: reader.text("software", TEXT_BYTES_MAX)?,
            },
            kind::TAKEN => Self::Taken(stage(&mut reader)?),
            kind::REFUSE => Self::Refuse(reader.text("reason", TEXT_BYTES_MAX)?),
            _ => return Err(WireError::Kind { kind, flags: 0 }),
        };
        reader.finish()?;
        Ok(message)
    }
}

fn stage(reader: &mut Reader<'_>) -> Result<Stage, WireError> {
    Ok(if reader.bool("stage")? {
        Stage::HandOver
    } else {
        Stage::Prepare
    })
}

/// Why a hand-over came to nothing, sorted by whose fault it is.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum HandOverError {
    /// The caller gave it up, with this reason.
    #[error("given up: {0}")]
    GivenUp(String),
    /// The other process gave it up or refused, with this reason.
    #[error("the other process refused: {0}")]
    Peer(String),
    /// The other process broke the rules of the conversation.
    #[error("the other process broke the hand-over protocol: {0}")]
    Protocol(String),
    /// What came over the socket was no conversation of this kind, or a descriptor is not what was announced.
    #[error("descriptor {name:?} {role:?} refused: {reason}")]
    Descriptor {
        /// Name.
        name: String,
        /// Role.
        role: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The socket ended.
    #[error("the socket to the other process was lost: {0}")]
    Link(String),
    /// The other process did not answer.
    #[error("the other process did not {what} within {after_ms} ms")]
    Deadline {
        /// What was waited for.
        what: &'static str,
        /// For how long.
        after_ms: u64,
    },
}
