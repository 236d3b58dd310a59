//! Frames of the data connections: runs of guest pages, and the end of a round.
//!
//! A data connection carries these frames and nothing else once its hello is done, source to target only. Each starts with the
//! [`FrameHeader`] whose checksum covers header and body. All numbers are little-endian.
//!
//! **RAM_RUNS** (type 40): what some pages contain. Flag bit 0: the payload is checksummed; other flags are refused.
//!
//! | offset in body | size | field |
//! |---|---|---|
//! | 0 | 4 | round |
//! | 4 | 4 | payload bytes: 4096 times the pages of all data runs, at most [`PAYLOAD_BYTES_MAX`] |
//! | 8 | 4 | CRC32C of the payload; zero without flag bit 0 |
//! | 12 | 2 | number of runs, 1 to [`RUNS_PER_FRAME_MAX`] |
//! | 14 | 2 | reserved, zero |
//! | 16 | 16 each | runs |
//!
//! | offset in run | size | field |
//! |---|---|---|
//! | 0 | 8 | first page within the block |
//! | 8 | 4 | number of pages, at least 1 |
//! | 12 | 2 | block, by its position in the hello |
//! | 14 | 1 | kind: 0 data, 1 zero, 2 hole |
//! | 15 | 1 | reserved, zero |
//!
//! The payload follows the body: the pages of the data runs, in the order of the runs, without padding. A zero run is memory that
//! exists and reads as zero; a hole run is memory that does not exist at the source and need not exist at the target.
//!
//! **ROUND_END** (type 41, no flags): the last frame of this connection in a round. Counts are of this connection and this round.
//!
//! | offset in body | size | field |
//! |---|---|---|
//! | 0 | 4 | round |
//! | 4 | 1 | 1 if no round follows, else 0 |
//! | 5 | 3 | reserved, zero |
//! | 8 | 8 | RAM_RUNS frames |
//! | 16 | 8 | data pages |
//! | 24 | 8 | zero pages |
//! | 32 | 8 | hole pages |
//! | 40 | 8 | bytes of device data, see [`device_data`](super::device_data) |
//!
//! Rules: rounds count up from 0 without gaps. Within a round a page appears at most once on all connections together; in round 0
//! every page of every block appears exactly once. The target applies a round only when the one before has ended on *all*
//! connections, so a page sent in two rounds over two sockets always ends with the newer content.

use super::WireError;
use super::device_data::{DEVICE_DATA, DEVICE_DATA_BYTES, DeviceData, FLAG_STREAM_END};
use super::header::{FrameHeader, HEADER_BYTES, Reader, encode_frame};
use crate::units::{BlockId, PAGE_SIZE, PageCount, PageIndex, PageRun, RoundId};

/// Frame type of [`RamRuns`].
pub const RAM_RUNS: u8 = 40;
/// Frame type of [`RoundEnd`].
pub const ROUND_END: u8 = 41;
/// Flag of RAM_RUNS: the payload is covered by its own checksum.
pub const FLAG_PAYLOAD_CHECKSUM: u8 = 1;

/// Most runs in one frame. With one buffer for the header this stays far below the 1024 buffers of one `sendmsg`, and 512
/// scattered pages (2 MiB) are plenty to hide the cost of a frame.
pub const RUNS_PER_FRAME_MAX: usize = 512;
/// Longest payload of a frame. Larger ones save nothing, and a receiver may want to hold one.
pub const PAYLOAD_BYTES_MAX: u32 = 4 << 20;
/// Bytes of a RAM_RUNS body before its runs.
pub const RUNS_FIXED_BYTES: usize = 16;
/// Bytes of one run.
pub const RUN_BYTES: usize = 16;
/// Length of a ROUND_END body.
pub const ROUND_END_BYTES: usize = 48;
/// Shortest frame on a data connection: RAM_RUNS with one run. A receiver may always read this much.
pub const FRAME_BYTES_MIN: usize = HEADER_BYTES + RUNS_FIXED_BYTES + RUN_BYTES;
/// Longest frame without its payload.
pub const FRAME_BYTES_MAX: usize = HEADER_BYTES + RUNS_FIXED_BYTES + RUNS_PER_FRAME_MAX * RUN_BYTES;

const _: () = assert!(FRAME_BYTES_MIN <= HEADER_BYTES + ROUND_END_BYTES);
const _: () = assert!(HEADER_BYTES + ROUND_END_BYTES <= FRAME_BYTES_MAX);

/// What the pages of a run contain.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum RunKind {
    /// What the payload says.
    Data,
    /// Zeros, in memory that exists.
    Zero,
    /// Nothing: no memory behind them, they read as zero.
    Hole,
}

/// A run of pages and what they contain.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct RamRun {
    /// Which pages; at most `u32::MAX` of them.
    pub pages: PageRun,
    /// What they contain.
    pub kind: RunKind,
}

/// A RAM_RUNS frame without its payload.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct RamRuns {
    /// The round it belongs to.
    pub round: RoundId,
    /// CRC32C of the payload, if it is checksummed.
    pub payload_crc: Option<u32>,
    /// 1 to [`RUNS_PER_FRAME_MAX`] runs.
    pub runs: Vec<RamRun>,
}

impl RamRuns {
    /// Number of bytes that follow the body.
    pub fn payload_bytes(&self) -> u64 {
        data_pages(&self.runs).to_bytes()
    }

    /// Header and body as they go over the wire.
    ///
    /// # Panics
    /// If runs or payload are over their limits, or a run over `u32::MAX` pages: the sender's own mistake.
    pub fn encode(&self) -> Vec<u8> {
        assert!((1..=RUNS_PER_FRAME_MAX).contains(&self.runs.len()));
        let payload_bytes = u32::try_from(self.payload_bytes())
            .ok()
            .filter(|&bytes| bytes <= PAYLOAD_BYTES_MAX)
            .expect("the payload of a frame is bounded");
        let run_count = u16::try_from(self.runs.len()).expect("at most 512 runs");
        let mut body = Vec::with_capacity(RUNS_FIXED_BYTES + self.runs.len() * RUN_BYTES);
        body.extend_from_slice(&self.round.0.to_le_bytes());
        body.extend_from_slice(&payload_bytes.to_le_bytes());
        body.extend_from_slice(&self.payload_crc.unwrap_or(0).to_le_bytes());
        body.extend_from_slice(&run_count.to_le_bytes());
        body.extend_from_slice(&[0; 2]);
        for RamRun { pages, kind } in &self.runs {
            let count = u32::try_from(pages.count.0).expect("runs are split at u32::MAX pages");
            body.extend_from_slice(&pages.start.0.to_le_bytes());
            body.extend_from_slice(&count.to_le_bytes());
            body.extend_from_slice(&pages.block.0.to_le_bytes());
            body.extend_from_slice(&[kind.number(), 0]);
        }
        let flags = match self.payload_crc {
            Some(_) => FLAG_PAYLOAD_CHECKSUM,
            None => 0,
        };
        encode_frame(RAM_RUNS, flags, &body)
    }

    /// Reads a frame whose header has been read and checked with [`body_bytes`]. `blocks` are the sizes of the RAM blocks.
    ///
    /// # Errors
    /// [`WireError`] for anything the module docs do not allow, except that the round and pages sent twice are for the caller.
    pub fn decode(
        header: &FrameHeader,
        body: &[u8],
        blocks: &[PageCount],
    ) -> Result<Self, WireError> {
        header.verify(body)?;
        if header.flags & !FLAG_PAYLOAD_CHECKSUM != 0 {
            return Err(WireError::Kind {
                kind: header.kind,
                flags: header.flags,
            });
        }
        let checksummed = header.flags & FLAG_PAYLOAD_CHECKSUM != 0;
        let mut reader = Reader::new(body);
        let round = RoundId(reader.u32()?);
        let payload_bytes = reader.u32()?;
        let crc = reader.u32()?;
        let run_count = reader.u16()?;
        if reader.u16()? != 0 || (!checksummed && crc != 0) {
            return Err(WireError::Reserved { kind: header.kind });
        }
        if run_count == 0 || usize::from(run_count) > RUNS_PER_FRAME_MAX {
            return Err(WireError::Value {
                field: "run count",
                value: run_count.into(),
            });
        }
        let runs = (0..run_count)
            .map(|_| decode_run(&mut reader, blocks))
            .collect::<Result<Vec<_>, _>>()?;
        reader.finish()?;
        if payload_bytes > PAYLOAD_BYTES_MAX
            || data_pages(&runs).to_bytes() != u64::from(payload_bytes)
        {
            return Err(WireError::Value {
                field: "payload bytes",
                value: payload_bytes.into(),
            });
        }
        Ok(Self {
            round,
            payload_crc: checksummed.then_some(crc),
            runs,
        })
    }
}

/// A ROUND_END frame.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct RoundEnd {
    /// The round that ends.
    pub round: RoundId,
    /// No round follows.
    pub last: bool,
    /// What this connection carried in the round.
    pub counts: RoundCounts,
}

/// What one connection carried in one round.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct RoundCounts {
    /// RAM_RUNS frames.
    pub frames: u64,
    /// Pages sent with their content.
    pub data_pages: u64,
    /// Pages that exist and read as zero.
    pub zero_pages: u64,
    /// Pages that do not exist.
    pub hole_pages: u64,
    /// Bytes of device data.
    pub device_bytes: u64,
}

impl RoundCounts {
    /// Counts one frame with these runs. Counters stick at their maximum rather than wrap.
    pub fn add_frame(&mut self, runs: &[RamRun]) {
        self.frames = self.frames.saturating_add(1);
        for run in runs {
            let counter = match run.kind {
                RunKind::Data => &mut self.data_pages,
                RunKind::Zero => &mut self.zero_pages,
                RunKind::Hole => &mut self.hole_pages,
            };
            *counter = counter.saturating_add(run.pages.count.0);
        }
    }

    /// Adds another connection's or round's counts.
    pub fn add(&mut self, other: &Self) {
        self.frames = self.frames.saturating_add(other.frames);
        self.data_pages = self.data_pages.saturating_add(other.data_pages);
        self.zero_pages = self.zero_pages.saturating_add(other.zero_pages);
        self.hole_pages = self.hole_pages.saturating_add(other.hole_pages);
        self.device_bytes = self.device_bytes.saturating_add(other.device_bytes);
    }
}

impl RoundEnd {
    /// The frame as it goes over the wire.
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Vec::with_capacity(ROUND_END_BYTES);
        body.extend_from_slice(&self.round.0.to_le_bytes());
        body.extend_from_slice(&[u8::from(self.last), 0, 0, 0]);
        let counts = &self.counts;
        for count in [
            counts.frames,
            counts.data_pages,
            counts.zero_pages,
            counts.hole_pages,
            counts.device_bytes,
        ] {
            body.extend_from_slice(&count.to_le_bytes());
        }
        encode_frame(ROUND_END, 0, &body)
    }

    /// Reads a frame whose header has been read and checked with [`body_bytes`].
    ///
    /// # Errors
    /// [`WireError`] for anything the module docs do not allow.
    pub fn decode(header: &FrameHeader, body: &[u8]) -> Result<Self, WireError> {
        header.verify(body)?;
        let mut reader = Reader::new(body);
        let round = RoundId(reader.u32()?);
        let last = reader.bool("last round")?;
        if reader.bytes(3)? != [0; 3] {
            return Err(WireError::Reserved { kind: header.kind });
        }
        let counts = RoundCounts {
            frames: reader.u64()?,
            data_pages: reader.u64()?,
            zero_pages: reader.u64()?,
            hole_pages: reader.u64()?,
            device_bytes: reader.u64()?,
        };
        reader.finish()?;
        Ok(Self {
            round,
            last,
            counts,
        })
    }
}

/// Length of the body that a header of a data connection announces, checked against the limits of its type before anything is read
/// or allocated.
///
/// # Errors
/// [`WireError::Kind`] for a frame that does not belong on a data connection, [`WireError::Value`] for an impossible length.
pub fn body_bytes(header: &FrameHeader) -> Result<usize, WireError> {
    let bytes = usize::try_from(header.body_bytes).unwrap_or(usize::MAX);
    let possible = match header.kind {
        RAM_RUNS if header.flags & !FLAG_PAYLOAD_CHECKSUM == 0 => {
            (FRAME_BYTES_MIN - HEADER_BYTES..=FRAME_BYTES_MAX - HEADER_BYTES).contains(&bytes)
                && (bytes - RUNS_FIXED_BYTES).is_multiple_of(RUN_BYTES)
        }
        ROUND_END if header.flags == 0 => bytes == ROUND_END_BYTES,
        DEVICE_DATA if header.flags & !FLAG_STREAM_END == 0 => bytes == DEVICE_DATA_BYTES,
        kind => {
            return Err(WireError::Kind {
                kind,
                flags: header.flags,
            });
        }
    };
    if possible {
        Ok(bytes)
    } else {
        Err(WireError::Value {
            field: "body bytes",
            value: header.body_bytes.into(),
        })
    }
}

impl RunKind {
    fn number(self) -> u8 {
        match self {
            Self::Data => 0,
            Self::Zero => 1,
            Self::Hole => 2,
        }
    }
}

fn decode_run(reader: &mut Reader<'_>, blocks: &[PageCount]) -> Result<RamRun, WireError> {
    let start = reader.u64()?;
    let count = u64::from(reader.u32()?);
    let block = reader.u16()?;
    let kind = match reader.u8()? {
        0 => RunKind::Data,
        1 => RunKind::Zero,
        2 => RunKind::Hole,
        value => {
            return Err(WireError::Value {
                field: "run kind",
                value: value.into(),
            });
        }
    };
    if reader.u8()? != 0 {
        return Err(WireError::Reserved { kind: RAM_RUNS });
    }
    let inside = blocks
        .get(usize::from(block))
        .zip(start.checked_add(count))
        .is_some_and(|(pages, end)| end <= pages.0);
    if !inside || count == 0 {
        return Err(WireError::OutsideBlock {
            block,
            start,
            count,
        });
    }
    Ok(RamRun {
        pages: PageRun {
            block: BlockId(block),
            start: PageIndex(start),
            count: PageCount(count),
        },
        kind,
    })
}

fn data_pages(runs: &[RamRun]) -> PageCount {
    let pages = runs
        .iter()
        .filter(|run| run.kind == RunKind::Data)
        .map(|run| run.pages.count.0);
    // At most 512 runs of u32::MAX pages: no overflow, also when multiplied by the page size.
    PageCount(pages.sum())
}

const _: () = assert!(RUNS_PER_FRAME_MAX as u64 * (u32::MAX as u64) < u64::MAX / PAGE_SIZE);

/// Feeds arbitrary bytes to the decoders of a data connection, as fuzzing and tests do. Returns how many frames were accepted; any
/// accepted frame must encode to the bytes it was read from.
///
/// # Panics
/// If decoding and encoding disagree: that is the bug fuzzing looks for.
pub fn fuzz_ram_frames(mut bytes: &[u8], blocks: &[PageCount]) -> usize {
    let mut accepted = 0;
    while let Some((head, rest)) = bytes.split_first_chunk::<HEADER_BYTES>() {
        let Ok(header) = FrameHeader::decode(head) else {
            break;
        };
        let Ok(body_bytes) = body_bytes(&header) else {
            break;
        };
        let Some((body, rest)) = rest.split_at_checked(body_bytes) else {
            break;
        };
        let (encoded, payload_bytes) = if header.kind == ROUND_END {
            let Ok(end) = RoundEnd::decode(&header, body) else {
                break;
            };
            (end.encode(), 0)
        } else if header.kind == DEVICE_DATA {
            let Ok(piece) = DeviceData::decode(&header, body) else {
                break;
            };
            (piece.encode(), piece.payload_bytes as usize)
        } else {
            let Ok(frame) = RamRuns::decode(&header, body, blocks) else {
                break;
            };
            let payload_bytes = usize::try_from(frame.payload_bytes()).unwrap_or(usize::MAX);
            (frame.encode(), payload_bytes)
        };
        assert_eq!(encoded, bytes[..HEADER_BYTES + body_bytes]);
        accepted += 1;
        bytes = rest.get(payload_bytes..).unwrap_or_default();
    }
    accepted
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BLOCKS: [PageCount; 2] = [PageCount(1000), PageCount(16)];

    fn run(block: u16, start: u64, count: u64, kind: RunKind) -> RamRun {
        RamRun {
            pages: PageRun {
                block: BlockId(block),
                start: PageIndex(start),
                count: PageCount(count),
            },
            kind,
        }
    }

    fn frame(runs: Vec<RamRun>) -> RamRuns {
        RamRuns {
            round: RoundId(3),
            payload_crc: None,
            runs,
        }
    }

    fn decode(bytes: &[u8]) -> Result<RamRuns, WireError> {
        let header = FrameHeader::decode(bytes.first_chunk().unwrap())?;
        let body_bytes = body_bytes(&header)?;
        assert_eq!(bytes.len(), HEADER_BYTES + body_bytes);
        RamRuns::decode(&header, &bytes[HEADER_BYTES..], &BLOCKS)
    }

    /// `bytes` with one byte of the body changed and the frame's checksum made right again.
    fn patched(bytes: &[u8], at: usize, value: u8) -> Vec<u8> {
        let mut body = bytes[HEADER_BYTES..].to_vec();
        body[at] = value;
        encode_frame(bytes[4], bytes[5], &body)
    }

    #[test]
    fn a_run_that_leaves_its_block_is_refused() {
        for bad in [
            run(0, 999, 2, RunKind::Data),
            run(1, 16, 1, RunKind::Zero),
            run(2, 0, 1, RunKind::Hole),
            run(0, u64::MAX, 1, RunKind::Zero),
        ] {
            let error = decode(&frame(vec![bad]).encode()).unwrap_err();
            assert!(matches!(error, WireError::OutsideBlock { .. }), "{error}");
        }
    }

    #[test]
    fn an_empty_run_is_refused() {
        let bytes = frame(vec![run(0, 1, 1, RunKind::Zero)]).encode();
        let error = decode(&patched(&bytes, RUNS_FIXED_BYTES + 8, 0)).unwrap_err();
        assert!(matches!(error, WireError::OutsideBlock { count: 0, .. }));
    }

    #[test]
    fn reserved_bytes_unknown_kinds_and_wrong_lengths_are_refused() {
        let bytes = frame(vec![run(0, 1, 2, RunKind::Data)]).encode();
        let reserved = [14, 15, RUNS_FIXED_BYTES + 15, 8];
        for at in reserved {
            let error = decode(&patched(&bytes, at, 1)).unwrap_err();
            assert_eq!(error, WireError::Reserved { kind: RAM_RUNS }, "byte {at}");
        }
        let kind = decode(&patched(&bytes, RUNS_FIXED_BYTES + 14, 3)).unwrap_err();
        assert!(matches!(kind, WireError::Value { value: 3, .. }));
        let payload = decode(&patched(&bytes, 5, 0x10)).unwrap_err();
        assert!(matches!(payload, WireError::Value { .. }));
        let more_runs = decode(&patched(&bytes, 12, 2)).unwrap_err();
        assert_eq!(more_runs, WireError::Truncated);
        let no_runs = decode(&patched(&bytes, 12, 0)).unwrap_err();
        assert!(matches!(no_runs, WireError::Value { value: 0, .. }));
    }

    #[test]
    fn a_payload_over_the_limit_is_refused() {
        let pages = u64::from(PAYLOAD_BYTES_MAX) / PAGE_SIZE;
        let blocks = [PageCount(pages + 1)];
        let fits = frame(vec![run(0, 0, pages, RunKind::Data)]).encode();
        let header = FrameHeader::decode(fits.first_chunk().unwrap()).unwrap();
        assert!(RamRuns::decode(&header, &fits[HEADER_BYTES..], &blocks).is_ok());
        // One page more: 0x401 pages are 0x401000 bytes.
        let mut body = fits[HEADER_BYTES..].to_vec();
        body[4..8].copy_from_slice(&(PAYLOAD_BYTES_MAX + 4096).to_le_bytes());
        body[RUNS_FIXED_BYTES + 8..RUNS_FIXED_BYTES + 12].copy_from_slice(&0x401_u32.to_le_bytes());
        let bytes = encode_frame(RAM_RUNS, 0, &body);
        let header = FrameHeader::decode(bytes.first_chunk().unwrap()).unwrap();
        let error = RamRuns::decode(&header, &body, &blocks).unwrap_err();
        assert!(matches!(error, WireError::Value { .. }));
    }

    #[test]
    fn headers_with_impossible_lengths_flags_or_kinds_are_refused_before_the_body() {
        let header = |kind, flags, body_bytes| FrameHeader {
            kind,
            flags,
            body_bytes,
            crc: 0,
        };
        assert!(body_bytes(&header(RAM_RUNS, 0, 32)).is_ok());
        assert!(body_bytes(&header(ROUND_END, 0, 48)).is_ok());
        assert!(body_bytes(&header(DEVICE_DATA, 1, 32)).is_ok());
        for bad in [
            header(RAM_RUNS, 0, 31),
            header(RAM_RUNS, 0, 16),
            header(RAM_RUNS, 0, 33),
            header(RAM_RUNS, 0, u32::MAX),
            header(RAM_RUNS, 2, 32),
            header(ROUND_END, 1, 48),
            header(ROUND_END, 0, 49),
            header(DEVICE_DATA, 2, 32),
            header(DEVICE_DATA, 0, 33),
            header(1, 0, 32),
        ] {
            assert!(body_bytes(&bad).is_err(), "{bad:?}");
        }
    }

    fn any_run() -> impl Strategy<Value = RamRun> {
        (0_u64..990, 1_u64..8, 0_u8..3).prop_map(|(start, count, kind)| {
            let kind = [RunKind::Data, RunKind::Zero, RunKind::Hole][usize::from(kind)];
            run(0, start, count, kind)
        })
    }

    proptest! {
        #[test]
        fn what_was_encoded_is_decoded(
            runs in prop::collection::vec(any_run(), 1..100), round: u32, payload_crc: Option<u32>,
        ) {
            let sent = RamRuns { round: RoundId(round), payload_crc, runs };
            prop_assert_eq!(decode(&sent.encode()), Ok(sent));
        }

        #[test]
        fn a_round_end_survives_the_wire(round: u32, last: bool, counts: [u64; 4]) {
            let [frames, data_pages, zero_pages, hole_pages] = counts;
            let device_bytes = data_pages;
            let counts = RoundCounts { frames, data_pages, zero_pages, hole_pages, device_bytes };
            let sent = RoundEnd { round: RoundId(round), last, counts };
            let bytes = sent.encode();
            let header = FrameHeader::decode(bytes.first_chunk().unwrap()).unwrap();
            prop_assert_eq!(body_bytes(&header), Ok(ROUND_END_BYTES));
            prop_assert_eq!(RoundEnd::decode(&header, &bytes[HEADER_BYTES..]), Ok(sent));
        }

        #[test]
        fn a_changed_bit_is_noticed(runs in prop::collection::vec(any_run(), 1..20), bit: prop::sample::Index) {
            let mut bytes = frame(runs).encode();
            let bit = bit.index(bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(fuzz_ram_frames(&bytes, &BLOCKS), 0);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            fuzz_ram_frames(&bytes, &BLOCKS);
        }

        #[test]
        fn arbitrary_bodies_with_a_right_checksum_never_panic(kind in 39_u8..43, flags in 0_u8..3, body: Vec<u8>) {
            fuzz_ram_frames(&encode_frame(kind, flags, &body), &BLOCKS);
        }
    }
}
