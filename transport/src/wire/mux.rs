//! Several connections over one socket, for peers that have only one: the control connection and one data connection.
//!
//! Either side sends pieces, each behind 12 bytes. All numbers are little-endian.
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 4 | magic `VMFX` |
//! | 4 | 1 | channel: 0 control connection, 1 data connection |
//! | 5 | 3 | reserved, zero |
//! | 8 | 4 | bytes that follow, at most [`PIECE_BYTES_MAX`]; 0 says that the sender has closed the channel |
//!
//! The side that begins a migration opens a channel by sending on it. Nothing follows the end of a channel on it. Pieces have no
//! checksum: what they carry has its own.

use super::WireError;
use super::header::Reader;

/// First four bytes of every piece.
pub const MAGIC: [u8; 4] = *b"VMFX";
/// Length of a header.
pub const HEADER_BYTES: usize = 12;
/// Longest piece, in bytes: a word on the control channel waits for one of the data channel at most.
pub const PIECE_BYTES_MAX: u32 = 256 << 10;
/// Number of channels.
pub const CHANNELS: usize = 2;

/// One of the connections.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Channel {
    /// The control connection.
    Control,
    /// The data connection.
    Data,
}

impl Channel {
    /// Its position among all channels.
    pub fn index(self) -> usize {
        match self {
            Self::Control => 0,
            Self::Data => 1,
        }
    }
}

/// What stands in front of a piece.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct PieceHeader {
    /// Where it belongs.
    pub channel: Channel,
    /// Bytes that follow; 0 ends the channel.
    pub bytes: u32,
}

impl PieceHeader {
    /// As it goes over the wire.
    pub fn encode(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4] = u8::from(self.channel == Channel::Data);
        bytes[8..].copy_from_slice(&self.bytes.to_le_bytes());
        bytes
    }

    /// Reads a header.
    ///
    /// # Errors
    /// [`WireError`] for anything the module docs do not allow; [`WireError::Magic`] if the peer speaks something else.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, WireError> {
        let mut reader = Reader::new(bytes);
        let magic = reader.u32()?.to_le_bytes();
        if magic != MAGIC {
            return Err(WireError::Magic { first_bytes: magic });
        }
        let channel = match reader.u8()? {
            0 => Channel::Control,
            1 => Channel::Data,
            other => {
                return Err(WireError::Value {
                    field: "channel",
                    value: other.into(),
                });
            }
        };
        if reader.bytes(3)? != [0; 3] {
            return Err(WireError::Reserved { kind: 0 });
        }
        let bytes = reader.u32()?;
        if bytes > PIECE_BYTES_MAX {
            return Err(WireError::TooLong {
                field: "piece",
                len: bytes.into(),
                max: PIECE_BYTES_MAX.into(),
            });
        }
        Ok(Self { channel, bytes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_survives_the_wire() {
        for channel in [Channel::Control, Channel::Data] {
            for bytes in [0, 1, PIECE_BYTES_MAX] {
                let header = PieceHeader { channel, bytes };
                assert_eq!(PieceHeader::decode(&header.encode()), Ok(header));
            }
        }
    }

    #[test]
    fn what_the_format_does_not_allow_is_refused() {
        let good = PieceHeader {
            channel: Channel::Data,
            bytes: 5,
        };
        for at in [0, 1, 2, 3, 4, 5, 6, 7, 11] {
            let mut bad = good.encode();
            bad[at] ^= 0x10;
            assert!(PieceHeader::decode(&bad).is_err(), "byte {at}");
        }
    }
}
