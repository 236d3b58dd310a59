//! A VM in one sequence of bytes: what `file:`, `exec:` and pipes carry.
//!
//! Nobody answers whoever writes an archive, so it holds what the source says and nothing else, in an order that can be read front
//! to back:
//!
//! ```text
//! START  HELLO  (RAM_RUNS payload | DEVICE_DATA payload)* ROUND_END  ...  SWITCHOVER  SECTION*  STATE_END  END
//!               '-- a round; one or more ----'
//! ```
//!
//! **START** is 16 bytes. All numbers are little-endian.
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 8 | magic `VMFYSAVE` |
//! | 8 | 2 | version of the archive format: 1 with memory, 2 without |
//! | 10 | 2 | reserved, zero |
//! | 12 | 4 | CRC32C of bytes 0 to 11 |
//!
//! Then come frames as on the wire: each with the [`FrameHeader`] whose checksum covers header and body, the bodies as in
//! [`hello`](super::hello), [`ram`] and [`frame`](super::frame). Beyond what is said there:
//!
//! - The hello announces one data connection. Its migration id names the archive.
//! - An archive of format 2 is of a guest whose memory stays in place, in a file of its own: the hello says so and announces no data
//!   connection, SWITCHOVER follows it at once, and there are no rounds.
//! - Every RAM_RUNS frame has its payload checksummed. Rounds count up from 0; only the last says that it is the last.
//! - SWITCHOVER and STATE_END name the last round, and STATE_END counts the sections.
//!
//! **END** (type 60, no flags) is written when the guest has been given up at the source. An archive without it is one of a save that
//! failed, was cancelled or is still under way, and must not be loaded: the guest may run elsewhere.
//!
//! | offset in body | size | field |
//! |---|---|---|
//! | 0 | 8 | bytes of the archive before this frame |
//! | 8 | 8 | frames before this one |
//! | 16 | 8 | bytes of payload |
//! | 24 | 4 | CRC32C over everything before this frame, payloads left out: they have their own checksums, which are covered |
//! | 28 | 4 | reserved, zero |
//!
//! Nothing follows. Extending: a new type of frame or a new meaning is a new version; a reader takes every version it knows.

use bytes::Bytes;

use super::WireError;
use super::device_data::{DEVICE_DATA, DeviceData};
use super::frame::{ControlFrame, SourceFrame, kind};
use super::header::{FrameHeader, HEADER_BYTES, Reader, encode_frame};
use super::hello::Hello;
use super::ram::{self, RAM_RUNS, ROUND_END, RamRuns, RoundEnd};
use crate::limits::SECTIONS_BYTES_MAX;
use crate::units::{PageCount, RoundId};

/// First bytes of an archive.
pub const MAGIC: [u8; 8] = *b"VMFYSAVE";
/// Version of the format that is written with memory.
pub const VERSION: u16 = 1;
/// Version of the format that is written without memory, which stays in place. Versions up to this one are read.
pub const VERSION_IN_PLACE: u16 = 2;
/// Frame type of END.
pub const ARCHIVE_END: u8 = 60;
/// Length of START.
pub const START_BYTES: usize = 16;
/// Length of the body of END.
pub const END_BYTES: usize = 32;

/// Why an archive cannot be read, and where.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("at byte {offset}: {fault}")]
pub struct ArchiveError {
    /// Offset in the archive of what is wrong: of START, of a frame, of a payload, or of the end.
    pub offset: u64,
    /// What is wrong.
    pub fault: ArchiveFault,
}

/// What is wrong with an archive.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ArchiveFault {
    /// It does not begin as archives do.
    #[error("this is no vmferry archive")]
    NoArchive,
    /// Written by a version that this one does not know. Load it with that one.
    #[error("archive format {found}, this version reads {VERSION} to {VERSION_IN_PLACE}")]
    Version {
        /// The version it names.
        found: u16,
    },
    /// START was changed.
    #[error("the start is corrupt")]
    Start,
    /// A frame was changed, or has what no frame has.
    #[error("corrupt: {0}")]
    Frame(WireError),
    /// The bytes are no frame.
    #[error("corrupt: no frame begins here")]
    NoFrame,
    /// A frame is good in itself but not here.
    #[error("corrupt: {what} where {wanted} belongs")]
    Order {
        /// What was found.
        what: &'static str,
        /// What would be right.
        wanted: &'static str,
    },
    /// Frames contradict each other.
    #[error("corrupt: {what} is {found}, not {expected}")]
    Contradiction {
        /// Which number.
        what: &'static str,
        /// What was found.
        found: u64,
        /// What would be right.
        expected: u64,
    },
    /// It ends before its END: the save failed, was cancelled, or is still under way; or the file was cut.
    #[error("incomplete: it ends here; the save was interrupted, or not all of it is here")]
    Incomplete,
    /// Something follows END.
    #[error("corrupt: bytes follow the end of the archive")]
    Trailing,
}

/// Counts what is written and makes the frames that are of archives only.
#[derive(Clone, Debug, Default)]
pub struct ArchiveEncoder {
    totals: Totals,
}

impl ArchiveEncoder {
    /// START of an archive with memory.
    pub fn start(&mut self) -> Vec<u8> {
        self.start_of(VERSION)
    }

    /// START of an archive of a guest whose memory stays in place.
    pub fn start_in_place(&mut self) -> Vec<u8> {
        self.start_of(VERSION_IN_PLACE)
    }

    fn start_of(&mut self, version: u16) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&version.to_le_bytes());
        bytes.extend_from_slice(&[0; 2]);
        bytes.extend_from_slice(&crc32c::crc32c(&bytes).to_le_bytes());
        self.totals.add_start(&bytes);
        bytes
    }

    /// Notes a frame (header and body) that is written, and how many bytes of payload follow it.
    pub fn frame(&mut self, frame: &[u8], payload_bytes: u64) {
        self.totals.add_frame(frame, payload_bytes);
    }

    /// END.
    pub fn end(&self) -> Vec<u8> {
        encode_frame(ARCHIVE_END, 0, &self.totals.encode())
    }

    /// Bytes so far.
    pub fn bytes(&self) -> u64 {
        self.totals.bytes
    }
}

/// What the body of END says.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
struct Totals {
    bytes: u64,
    frames: u64,
    payload_bytes: u64,
    crc: u32,
}

impl Totals {
    fn add_start(&mut self, bytes: &[u8]) {
        self.bytes += bytes.len() as u64;
        self.crc = crc32c::crc32c_append(self.crc, bytes);
    }

    fn add_frame(&mut self, frame: &[u8], payload_bytes: u64) {
        self.bytes += frame.len() as u64 + payload_bytes;
        self.frames += 1;
        self.payload_bytes += payload_bytes;
        self.crc = crc32c::crc32c_append(self.crc, frame);
    }

    fn encode(&self) -> Vec<u8> {
        let mut body = Vec::with_capacity(END_BYTES);
        for number in [self.bytes, self.frames, self.payload_bytes] {
            body.extend_from_slice(&number.to_le_bytes());
        }
        body.extend_from_slice(&self.crc.to_le_bytes());
        body.extend_from_slice(&[0; 4]);
        body
    }

    fn check(&self, body: &[u8]) -> Result<(), ArchiveFault> {
        let mut reader = Reader::new(body);
        let ours = [
            ("its length", self.bytes),
            ("its number of frames", self.frames),
            ("its length of page data", self.payload_bytes),
        ];
        for (what, expected) in ours {
            let found = reader.u64()?;
            if found != expected {
                return Err(ArchiveFault::Contradiction {
                    what,
                    found,
                    expected,
                });
            }
        }
        let found = reader.u32()?;
        if found != self.crc {
            return Err(ArchiveFault::Contradiction {
                what: "the checksum over all frames",
                found: found.into(),
                expected: self.crc.into(),
            });
        }
        match reader.u32()? {
            0 => Ok(reader.finish()?),
            _ => Err(WireError::Reserved { kind: ARCHIVE_END }.into()),
        }
    }
}

impl From<WireError> for ArchiveFault {
    fn from(error: WireError) -> Self {
        match error {
            WireError::Magic { .. } => Self::NoFrame,
            other => Self::Frame(other),
        }
    }
}

/// What a piece of an archive is.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum ArchiveItem {
    /// The hello. Comes first.
    Hello(Box<Hello>),
    /// Pages, or a piece of a device's stream: [`ArchiveReader::frame`] is the frame without its payload, and the bytes that were fed last are the payload, checked; a
    /// frame whose runs are all zero or holes has none.
    Ram {
        /// Length of the payload.
        payload_bytes: usize,
    },
    /// End of a round.
    RoundEnd(RoundEnd),
    /// Switchover, a section, or the end of the state.
    Control(SourceFrame),
    /// END, and everything agrees with it. Comes last.
    End,
}

/// Reads an archive front to back. It says how many bytes it wants, and takes exactly so many; no number is over
/// [`SECTION_BYTES_MAX`](crate::limits::SECTION_BYTES_MAX).
#[derive(Clone, Debug)]
pub struct ArchiveReader {
    stage: Stage,
    in_place: bool,
    wants: Wants,
    totals: Totals,
    /// Header and body of the present frame.
    frame: Vec<u8>,
    blocks: Vec<PageCount>,
    round: RoundId,
    sections: u64,
    section_bytes: u64,
}

/// Which frames may come.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Stage {
    Hello,
    Round,
    /// The last round is complete.
    Switchover,
    Sections,
    End,
    Over,
}

/// What the next bytes are.
#[derive(Clone, Debug)]
enum Wants {
    Start,
    Header,
    Body(FrameHeader),
    Payload { bytes: usize, crc: u32 },
    Nothing,
}

impl Default for ArchiveReader {
    fn default() -> Self {
        Self {
            stage: Stage::Hello,
            in_place: false,
            wants: Wants::Start,
            totals: Totals::default(),
            frame: Vec::new(),
            blocks: Vec::new(),
            round: RoundId(0),
            sections: 0,
            section_bytes: 0,
        }
    }
}

impl ArchiveReader {
    /// How many bytes to feed next; 0 when the archive is complete.
    pub fn wants(&self) -> usize {
        match &self.wants {
            Wants::Start => START_BYTES,
            Wants::Header => HEADER_BYTES,
            Wants::Body(header) => header.body_bytes as usize,
            Wants::Payload { bytes, .. } => *bytes,
            Wants::Nothing => 0,
        }
    }

    /// Bytes of the archive that were read and found good, so far: where the piece begins that is wanted next.
    pub fn offset(&self) -> u64 {
        self.totals.bytes
    }

    /// Header and body of the frame that the last item came from.
    pub fn frame(&self) -> &[u8] {
        &self.frame
    }

    /// Takes the next [`wants`](Self::wants) bytes. A frame is an item when the last of its bytes is here.
    ///
    /// # Errors
    /// What is wrong, and where. There is no next piece then.
    ///
    /// # Panics
    /// If it gets another number of bytes: the caller's own mistake.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<Option<ArchiveItem>, ArchiveError> {
        assert_eq!(bytes.len(), self.wants(), "feed what is wanted");
        let offset = self.totals.bytes;
        self.take(bytes)
            .map_err(|fault| ArchiveError { offset, fault })
    }

    /// Nothing more can be read although something is wanted; `had` bytes of it came.
    pub fn ends_early(&self, had: u64) -> ArchiveError {
        let part: u64 = match &self.wants {
            Wants::Body(_) => HEADER_BYTES as u64,
            Wants::Payload { .. } => self.frame.len() as u64,
            Wants::Start | Wants::Header | Wants::Nothing => 0,
        };
        ArchiveError {
            offset: self.totals.bytes + part + had,
            fault: ArchiveFault::Incomplete,
        }
    }

    /// Something follows a complete archive.
    pub fn goes_on(&self) -> ArchiveError {
        ArchiveError {
            offset: self.totals.bytes,
            fault: ArchiveFault::Trailing,
        }
    }

    fn take(&mut self, bytes: &[u8]) -> Result<Option<ArchiveItem>, ArchiveFault> {
        match std::mem::replace(&mut self.wants, Wants::Nothing) {
            Wants::Start => {
                self.in_place = check_start(bytes)? == VERSION_IN_PLACE;
                self.totals.add_start(bytes);
                self.wants = Wants::Header;
                Ok(None)
            }
            Wants::Header => {
                let header = bytes.first_chunk().ok_or(WireError::Truncated)?;
                let header = FrameHeader::decode(header)?;
                self.check_place(&header)?;
                self.frame.clear();
                self.frame.extend_from_slice(bytes);
                self.wants = Wants::Body(header);
                // Nothing is wanted of an empty body, and 0 means the end.
                if header.body_bytes == 0 {
                    return self.take(&[]);
                }
                Ok(None)
            }
            Wants::Body(header) => {
                self.frame.extend_from_slice(bytes);
                header.verify(bytes)?;
                self.take_frame(&header, bytes)
            }
            Wants::Payload { bytes: len, crc } => {
                if crc32c::crc32c(bytes) != crc {
                    return Err(WireError::PayloadChecksum.into());
                }
                Ok(Some(self.end_ram(len)))
            }
            Wants::Nothing => Ok(None),
        }
    }

    /// Whether a frame of this type may come now and be so long, before its body is read.
    fn check_place(&self, header: &FrameHeader) -> Result<(), ArchiveFault> {
        let (fits, wanted) = match self.stage {
            Stage::Hello => (header.kind == kind::HELLO, "a hello"),
            Stage::Round => (
                matches!(header.kind, RAM_RUNS | DEVICE_DATA | ROUND_END),
                "page data or the end of a round",
            ),
            Stage::Switchover => (header.kind == kind::SWITCHOVER, "the switchover"),
            Stage::Sections => (
                matches!(header.kind, kind::SECTION | kind::STATE_END),
                "device state or its end",
            ),
            Stage::End | Stage::Over => (header.kind == ARCHIVE_END, "the end of the archive"),
        };
        if !fits {
            let what = kind_name(header.kind);
            return Err(ArchiveFault::Order { what, wanted });
        }
        let max = match header.kind {
            RAM_RUNS | DEVICE_DATA | ROUND_END => ram::body_bytes(header)? as u64,
            ARCHIVE_END => END_BYTES as u64,
            other => SourceFrame::body_max(other).unwrap_or(0).into(),
        };
        let len = header.body_bytes.into();
        if len > max {
            let field = "frame body";
            return Err(WireError::TooLong { field, len, max }.into());
        }
        if header.flags != 0 && !matches!(header.kind, RAM_RUNS | DEVICE_DATA) {
            let FrameHeader { kind, flags, .. } = *header;
            return Err(WireError::Kind { kind, flags }.into());
        }
        Ok(())
    }

    fn take_frame(
        &mut self,
        header: &FrameHeader,
        body: &[u8],
    ) -> Result<Option<ArchiveItem>, ArchiveFault> {
        let item = match header.kind {
            RAM_RUNS => return self.take_ram(header, body),
            DEVICE_DATA => return self.take_device_data(header, body),
            ROUND_END => {
                let end = RoundEnd::decode(header, body)?;
                self.expect_round(end.round)?;
                if end.last {
                    self.stage = Stage::Switchover;
                } else {
                    self.round = self.round.next();
                }
                ArchiveItem::RoundEnd(end)
            }
            ARCHIVE_END => {
                self.totals.check(body)?;
                self.stage = Stage::Over;
                ArchiveItem::End
            }
            other => self.take_control(other, body)?,
        };
        self.totals.add_frame(&self.frame, 0);
        self.wants = match self.stage {
            Stage::Over => Wants::Nothing,
            _ => Wants::Header,
        };
        Ok(Some(item))
    }

    fn take_ram(
        &mut self,
        header: &FrameHeader,
        body: &[u8],
    ) -> Result<Option<ArchiveItem>, ArchiveFault> {
        let runs = RamRuns::decode(header, body, &self.blocks)?;
        self.expect_round(runs.round)?;
        let Some(crc) = runs.payload_crc else {
            return Err(ArchiveFault::Order {
                what: "page data without checksum",
                wanted: "page data with checksum",
            });
        };
        let bytes = usize::try_from(runs.payload_bytes()).unwrap_or(usize::MAX);
        if bytes > 0 {
            self.wants = Wants::Payload { bytes, crc };
            return Ok(None);
        }
        Ok(Some(self.end_ram(0)))
    }

    fn take_device_data(
        &mut self,
        header: &FrameHeader,
        body: &[u8],
    ) -> Result<Option<ArchiveItem>, ArchiveFault> {
        let piece = DeviceData::decode(header, body)?;
        self.expect_round(piece.round)?;
        let bytes = piece.payload_bytes as usize;
        if bytes > 0 {
            let crc = piece.payload_crc;
            self.wants = Wants::Payload { bytes, crc };
            return Ok(None);
        }
        Ok(Some(self.end_ram(0)))
    }

    fn end_ram(&mut self, payload_bytes: usize) -> ArchiveItem {
        self.totals.add_frame(&self.frame, payload_bytes as u64);
        self.wants = Wants::Header;
        ArchiveItem::Ram { payload_bytes }
    }

    fn take_control(&mut self, kind: u8, body: &[u8]) -> Result<ArchiveItem, ArchiveFault> {
        let frame = SourceFrame::decode(kind, Bytes::copy_from_slice(body))?;
        match &frame {
            SourceFrame::Hello(hello) => {
                let expected = u64::from(!self.in_place);
                if u64::from(hello.data_connections) != expected {
                    return Err(ArchiveFault::Contradiction {
                        what: "the number of data connections",
                        found: hello.data_connections.into(),
                        expected,
                    });
                }
                self.blocks = hello.blocks.iter().map(|block| block.pages).collect();
                self.stage = match self.in_place {
                    true => Stage::Switchover,
                    false => Stage::Round,
                };
                return Ok(ArchiveItem::Hello(Box::new(hello.clone())));
            }
            SourceFrame::Switchover(round) => {
                self.expect_round(*round)?;
                self.stage = Stage::Sections;
            }
            SourceFrame::Section(section) => {
                self.sections += 1;
                self.section_bytes += section.bytes.len() as u64;
                if self.section_bytes > SECTIONS_BYTES_MAX {
                    return Err(WireError::TooLong {
                        field: "device state",
                        len: self.section_bytes,
                        max: SECTIONS_BYTES_MAX,
                    }
                    .into());
                }
            }
            SourceFrame::StateEnd(end) => {
                self.expect_round(end.last_round)?;
                let (what, found) = ("the number of device states", end.sections.into());
                let expected = self.sections;
                if found != expected {
                    return Err(ArchiveFault::Contradiction {
                        what,
                        found,
                        expected,
                    });
                }
                self.stage = Stage::End;
            }
            _ => return Err(WireError::Kind { kind, flags: 0 }.into()),
        }
        Ok(ArchiveItem::Control(frame))
    }

    fn expect_round(&self, found: RoundId) -> Result<(), ArchiveFault> {
        if found == self.round {
            return Ok(());
        }
        Err(ArchiveFault::Contradiction {
            what: "the round",
            found: found.0.into(),
            expected: self.round.0.into(),
        })
    }
}

/// The version of the format.
fn check_start(bytes: &[u8]) -> Result<u16, ArchiveFault> {
    let mut reader = Reader::new(bytes);
    if reader.bytes(MAGIC.len())? != MAGIC {
        return Err(ArchiveFault::NoArchive);
    }
    let found = reader.u16()?;
    let reserved = reader.u16()?;
    if reader.u32()? != crc32c::crc32c(&bytes[..START_BYTES - 4]) {
        return Err(ArchiveFault::Start);
    }
    match (found, reserved) {
        (VERSION | VERSION_IN_PLACE, 0) => Ok(found),
        (VERSION | VERSION_IN_PLACE, _) => Err(ArchiveFault::Start),
        _ => Err(ArchiveFault::Version { found }),
    }
}

fn kind_name(kind: u8) -> &'static str {
    match kind {
        kind::HELLO => "a hello",
        kind::SWITCHOVER => "the switchover",
        kind::SECTION => "device state",
        kind::STATE_END => "the end of the device state",
        RAM_RUNS => "page data",
        DEVICE_DATA => "device data",
        ROUND_END => "the end of a round",
        ARCHIVE_END => "the end of the archive",
        _ => "a frame that is of no archive",
    }
}

#[cfg(test)]
mod tests;
