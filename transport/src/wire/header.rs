//! The 16 bytes in front of every frame, and how bytes are read and written without panics.

use super::WireError;

/// First four bytes of every frame: `VMFY`.
pub const MAGIC: u32 = u32::from_le_bytes(*b"VMFY");

/// Length of an encoded [`FrameHeader`].
pub const HEADER_BYTES: usize = 16;

/// What stands in front of every frame.
///
/// | offset | size | field |
/// |---|---|---|
/// | 0 | 4 | magic `VMFY` |
/// | 4 | 1 | frame type |
/// | 5 | 1 | flags, meaning depends on the type; unknown bits are refused |
/// | 6 | 2 | reserved, zero |
/// | 8 | 4 | body length in bytes, bounded per type |
/// | 12 | 4 | CRC32C of bytes 0 to 11 followed by the body |
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct FrameHeader {
    /// Frame type.
    pub kind: u8,
    /// Flags of the type.
    pub flags: u8,
    /// Bytes of body that follow the header. Payload of RAM frames comes after the body and is not counted here.
    pub body_bytes: u32,
    /// CRC32C over the first 12 header bytes and the body.
    pub crc: u32,
}

impl FrameHeader {
    /// Reads a header. Says nothing about the body yet: its length must be checked against the limit of the type before a
    /// buffer is allocated, and its checksum with [`verify`](Self::verify) when it is there.
    ///
    /// # Errors
    /// [`WireError::Magic`] when the peer does not speak this protocol, [`WireError::Reserved`] for a set reserved bit.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, WireError> {
        let mut reader = Reader::new(bytes);
        let magic = reader.u32()?;
        if magic != MAGIC {
            return Err(WireError::Magic {
                first_bytes: magic.to_le_bytes(),
            });
        }
        let kind = reader.u8()?;
        let flags = reader.u8()?;
        if reader.u16()? != 0 {
            return Err(WireError::Reserved { kind });
        }
        Ok(Self {
            kind,
            flags,
            body_bytes: reader.u32()?,
            crc: reader.u32()?,
        })
    }

    /// Checks the checksum now that the body is there.
    ///
    /// # Errors
    /// [`WireError::Checksum`] when header or body were changed on the way.
    pub fn verify(&self, body: &[u8]) -> Result<(), WireError> {
        if checksum(&self.encode_without_crc(), body) == self.crc {
            Ok(())
        } else {
            Err(WireError::Checksum { kind: self.kind })
        }
    }

    fn encode_without_crc(&self) -> [u8; 12] {
        let mut bytes = [0; 12];
        bytes[..4].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[4] = self.kind;
        bytes[5] = self.flags;
        bytes[8..].copy_from_slice(&self.body_bytes.to_le_bytes());
        bytes
    }
}

/// Header and body of a frame as they go over the wire.
///
/// # Panics
/// If the body is longer than 4 GiB; bodies are bounded far below that.
pub fn encode_frame(kind: u8, flags: u8, body: &[u8]) -> Vec<u8> {
    let body_bytes = u32::try_from(body.len()).expect("frame bodies are bounded");
    let header = FrameHeader {
        kind,
        flags,
        body_bytes,
        crc: 0,
    };
    let start = header.encode_without_crc();
    let mut bytes = Vec::with_capacity(HEADER_BYTES + body.len());
    bytes.extend_from_slice(&start);
    bytes.extend_from_slice(&checksum(&start, body).to_le_bytes());
    bytes.extend_from_slice(body);
    bytes
}

fn checksum(start: &[u8; 12], body: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(start), body)
}

/// Reads little-endian fields from a body; running out of bytes is an error, never a panic.
#[derive(Debug)]
pub struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// Starts at the first byte.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// The next `count` bytes.
    ///
    /// # Errors
    /// [`WireError::Truncated`] if there are fewer; the same for all methods below.
    pub fn bytes(&mut self, count: usize) -> Result<&'a [u8], WireError> {
        let (taken, rest) = self
            .rest
            .split_at_checked(count)
            .ok_or(WireError::Truncated)?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let (taken, rest) = self.rest.split_first_chunk().ok_or(WireError::Truncated)?;
        self.rest = rest;
        Ok(*taken)
    }

    /// One byte.
    ///
    /// # Errors
    /// As [`bytes`](Self::bytes).
    pub fn u8(&mut self) -> Result<u8, WireError> {
        self.array::<1>().map(|[byte]| byte)
    }

    /// A 16-bit number.
    ///
    /// # Errors
    /// As [`bytes`](Self::bytes).
    pub fn u16(&mut self) -> Result<u16, WireError> {
        self.array().map(u16::from_le_bytes)
    }

    /// A 32-bit number.
    ///
    /// # Errors
    /// As [`bytes`](Self::bytes).
    pub fn u32(&mut self) -> Result<u32, WireError> {
        self.array().map(u32::from_le_bytes)
    }

    /// A 64-bit number.
    ///
    /// # Errors
    /// As [`bytes`](Self::bytes).
    pub fn u64(&mut self) -> Result<u64, WireError> {
        self.array().map(u64::from_le_bytes)
    }

    /// 16 bytes, such as an id.
    ///
    /// # Errors
    /// As [`bytes`](Self::bytes).
    pub fn id(&mut self) -> Result<[u8; 16], WireError> {
        self.array()
    }

    /// A boolean; anything but 0 and 1 is an error.
    ///
    /// # Errors
    /// [`WireError::Value`], or as [`bytes`](Self::bytes).
    pub fn bool(&mut self, field: &'static str) -> Result<bool, WireError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            value => Err(WireError::Value {
                field,
                value: u64::from(value),
            }),
        }
    }

    /// A text with a 16-bit length in front, of at most `max` bytes.
    ///
    /// # Errors
    /// [`WireError::TooLong`], [`WireError::Text`] when it is not UTF-8, or as [`bytes`](Self::bytes).
    pub fn text(&mut self, field: &'static str, max: usize) -> Result<String, WireError> {
        let len = usize::from(self.u16()?);
        if len > max {
            return Err(WireError::TooLong {
                field,
                len: len as u64,
                max: max as u64,
            });
        }
        let bytes = self.bytes(len)?;
        String::from_utf8(bytes.to_vec()).map_err(|_| WireError::Text { field })
    }

    /// Checks that nothing is left over.
    ///
    /// # Errors
    /// [`WireError::LeftOver`] with the number of bytes.
    pub fn finish(self) -> Result<(), WireError> {
        if self.rest.is_empty() {
            Ok(())
        } else {
            Err(WireError::LeftOver {
                len: self.rest.len(),
            })
        }
    }

    /// The bytes not read yet.
    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.rest)
    }
}

/// Appends a text with a 16-bit length in front, cut at a character boundary to at most `max` bytes.
pub fn put_text(body: &mut Vec<u8>, text: &str, max: usize) {
    let max = max.min(usize::from(u16::MAX));
    let mut len = text.len().min(max);
    while !text.is_char_boundary(len) {
        len -= 1;
    }
    // `len` is at most u16::MAX, so the conversion keeps it.
    body.extend_from_slice(&u16::try_from(len).unwrap_or(u16::MAX).to_le_bytes());
    body.extend_from_slice(&text.as_bytes()[..len]);
}
