//! Frames of the data connections that carry state of devices which produce a stream of it, beside the pages.
//!
//! **DEVICE_DATA** (type 42): a piece of one device's stream. Flag bit 0: the stream ends with this piece; other flags are refused.
//!
//! | offset in body | size | field |
//! |---|---|---|
//! | 0 | 4 | round |
//! | 4 | 2 | device, by its position in the hello |
//! | 6 | 2 | reserved, zero |
//! | 8 | 8 | offset of the piece in the device's stream |
//! | 16 | 4 | payload bytes, at most [`DEVICE_PAYLOAD_BYTES_MAX`] |
//! | 20 | 4 | CRC32C of the payload; always, because no device checks that its state is whole |
//! | 24 | 8 | reserved, zero |
//!
//! The payload follows the body. Rules: within a round all pieces of a device come on one connection, in the order of its stream, and
//! the target applies a round only when the one before has ended on all connections: so the stream stays in order although the
//! connection may change from round to round. A stream ends in the last round, once, and every device that announces a stream in its
//! schema has one.

use super::WireError;
use super::header::{FrameHeader, HEADER_BYTES, Reader, encode_frame};
use crate::units::RoundId;

/// Frame type of [`DeviceData`].
pub const DEVICE_DATA: u8 = 42;
/// Flag of DEVICE_DATA: the stream of the device ends here.
pub const FLAG_STREAM_END: u8 = 1;
/// Longest payload, in bytes: what a receiver's buffer for pages holds.
pub const DEVICE_PAYLOAD_BYTES_MAX: u32 = 256 << 10;
/// Length of the body.
pub const DEVICE_DATA_BYTES: usize = 32;

const _: () = assert!(super::ram::FRAME_BYTES_MIN <= HEADER_BYTES + DEVICE_DATA_BYTES);

/// A DEVICE_DATA frame without its payload.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct DeviceData {
    /// The round it belongs to.
    pub round: RoundId,
    /// The device, by its position in the hello.
    pub device: u16,
    /// Offset of the piece in the device's stream, in bytes.
    pub offset: u64,
    /// Length of the piece, in bytes.
    pub payload_bytes: u32,
    /// CRC32C of the piece.
    pub payload_crc: u32,
    /// The stream ends with this piece.
    pub end: bool,
}

impl DeviceData {
    /// Header and body as they go over the wire.
    pub fn encode(&self) -> Vec<u8> {
        let Self {
            round,
            device,
            offset,
            payload_bytes,
            payload_crc,
            end,
        } = self;
        let mut body = Vec::with_capacity(DEVICE_DATA_BYTES);
        body.extend_from_slice(&round.0.to_le_bytes());
        body.extend_from_slice(&device.to_le_bytes());
        body.extend_from_slice(&[0; 2]);
        body.extend_from_slice(&offset.to_le_bytes());
        body.extend_from_slice(&payload_bytes.to_le_bytes());
        body.extend_from_slice(&payload_crc.to_le_bytes());
        body.extend_from_slice(&[0; 8]);
        encode_frame(DEVICE_DATA, if *end { FLAG_STREAM_END } else { 0 }, &body)
    }

    /// Reads a frame whose header has been read and checked with [`body_bytes`](super::ram::body_bytes).
    ///
    /// # Errors
    /// [`WireError`] for anything the module docs do not allow, except that round, device and offset are for the caller to compare.
    pub fn decode(header: &FrameHeader, body: &[u8]) -> Result<Self, WireError> {
        header.verify(body)?;
        if header.flags & !FLAG_STREAM_END != 0 {
            return Err(WireError::Kind {
                kind: header.kind,
                flags: header.flags,
            });
        }
        let mut reader = Reader::new(body);
        let round = RoundId(reader.u32()?);
        let device = reader.u16()?;
        let reserved = reader.u16()?;
        let offset = reader.u64()?;
        let payload_bytes = reader.u32()?;
        let payload_crc = reader.u32()?;
        if reserved != 0 || reader.u64()? != 0 {
            return Err(WireError::Reserved { kind: header.kind });
        }
        reader.finish()?;
        let end = header.flags & FLAG_STREAM_END != 0;
        if payload_bytes > DEVICE_PAYLOAD_BYTES_MAX || (payload_bytes == 0 && !end) {
            return Err(WireError::Value {
                field: "payload bytes",
                value: payload_bytes.into(),
            });
        }
        if offset.checked_add(payload_bytes.into()).is_none() {
            return Err(WireError::Value {
                field: "offset in a device's stream",
                value: offset,
            });
        }
        Ok(Self {
            round,
            device,
            offset,
            payload_bytes,
            payload_crc,
            end,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(bytes: &[u8]) -> Result<DeviceData, WireError> {
        let (head, body) = bytes.split_first_chunk::<HEADER_BYTES>().unwrap();
        DeviceData::decode(&FrameHeader::decode(head)?, body)
    }

    fn frame() -> DeviceData {
        DeviceData {
            round: RoundId(3),
            device: 7,
            offset: 1 << 40,
            payload_bytes: 4096,
            payload_crc: 0x1234,
            end: false,
        }
    }

    #[test]
    fn frames_are_read_as_they_were_written() {
        for end in [false, true] {
            let frame = DeviceData { end, ..frame() };
            assert_eq!(decode(&frame.encode()), Ok(frame));
        }
        let empty = DeviceData {
            payload_bytes: 0,
            end: true,
            ..frame()
        };
        assert_eq!(decode(&empty.encode()), Ok(empty));
    }

    #[test]
    fn impossible_pieces_are_refused() {
        let too_long = DeviceData {
            payload_bytes: DEVICE_PAYLOAD_BYTES_MAX + 1,
            ..frame()
        };
        let empty = DeviceData {
            payload_bytes: 0,
            ..frame()
        };
        let far = DeviceData {
            offset: u64::MAX,
            ..frame()
        };
        for bad in [too_long, empty, far] {
            assert!(matches!(
                decode(&bad.encode()),
                Err(WireError::Value { .. })
            ));
        }
        let mut body = frame().encode().split_off(HEADER_BYTES);
        body[6] = 1;
        let reserved = encode_frame(DEVICE_DATA, 0, &body);
        assert_eq!(
            decode(&reserved),
            Err(WireError::Reserved { kind: DEVICE_DATA })
        );
        let flags = encode_frame(DEVICE_DATA, 2, &frame().encode()[HEADER_BYTES..]);
        assert!(matches!(decode(&flags), Err(WireError::Kind { .. })));
    }
}
