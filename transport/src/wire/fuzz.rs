//! Arbitrary bytes against the decoders: what must hold whatever a peer sends (I5).
//!
//! The fuzz targets in `transport/fuzz` call these functions, and so do the tests below: on the corpora that the targets have collected,
//! and on every committed fixture, on each of them cut short, and on each of them with one bit flipped. A broken promise is a panic.

use bytes::Bytes;

use super::archive::{
    ARCHIVE_END, ArchiveEncoder, ArchiveError, ArchiveFault, ArchiveItem, ArchiveReader,
    START_BYTES,
};
use super::device_data::{DEVICE_DATA, DEVICE_DATA_BYTES};
use super::frame::{ControlFrame, FrameBuffer, SourceFrame, TargetFrame};
use super::header::{FrameHeader, HEADER_BYTES, encode_frame};
use super::hello::{self, Hello};
use super::mux::PieceHeader;
use super::ram::{self, RamRuns, RoundEnd};
use crate::limits::{BLOCKS_MAX, DEVICES_MAX, SECTION_BYTES_MAX};
use crate::units::PageCount;

/// Sizes of the RAM blocks that RAM frames are checked against.
const BLOCKS: [PageCount; 2] = [PageCount(1 << 20), PageCount(16)];

/// A stream of control frames in either direction, as it arrives in pieces. The first byte says how long the pieces are.
///
/// What is decoded survives being encoded and decoded again, and pieces of any length give the same frames as one piece.
///
/// # Panics
/// If one of this does not hold.
pub fn control_stream(bytes: &[u8]) {
    let Some((&piece, stream)) = bytes.split_first() else {
        return;
    };
    let piece = usize::from(piece) + 1;
    let source = read_stream(stream, piece, SourceFrame::encode);
    let target = read_stream(stream, piece, TargetFrame::encode);
    assert_eq!(source, read_stream(stream, usize::MAX, SourceFrame::encode));
    assert_eq!(target, read_stream(stream, usize::MAX, TargetFrame::encode));
}

/// The same for one frame of type and flags as in the first two bytes with the rest as its body, behind a right checksum: random
/// bytes hardly ever get past a wrong one.
///
/// # Panics
/// If a promise of [`control_stream`] does not hold.
pub fn control_frame(bytes: &[u8]) {
    let [kind, flags, body @ ..] = bytes else {
        return;
    };
    let frame = encode_frame(*kind, *flags, body);
    read_stream(&frame, usize::MAX, SourceFrame::encode);
    read_stream(&frame, usize::MAX, TargetFrame::encode);
}

/// One frame of a data connection: type and flags in the first two bytes, the rest is its body, behind a right checksum.
///
/// What is decoded lies inside the RAM blocks and encodes to the same bytes.
///
/// # Panics
/// If one of this does not hold.
pub fn data_frame(bytes: &[u8]) {
    let [kind, flags, body @ ..] = bytes else {
        return;
    };
    let frame = encode_frame(*kind, *flags, body);
    let Some((Ok(header), body)) = split_frame(&frame) else {
        unreachable!("an encoded frame has a header");
    };
    if ram::body_bytes(&header).is_err() {
        return;
    }
    if let Ok(runs) = RamRuns::decode(&header, body, &BLOCKS)
        && *kind == ram::RAM_RUNS
    {
        let inside = |run: &ram::RamRun| run.pages.end().0 <= BLOCKS[run.pages.block.index()].0;
        assert!(runs.runs.iter().all(inside), "{runs:?}");
        assert!(runs.payload_bytes() <= u64::from(ram::PAYLOAD_BYTES_MAX));
        assert_eq!(runs.encode(), frame);
    }
    if let Ok(end) = RoundEnd::decode(&header, body)
        && *kind == ram::ROUND_END
    {
        assert_eq!(end.encode(), frame);
    }
}

/// The body of a hello, compared with itself and with nothing.
///
/// What is decoded is within the limits, survives being encoded and decoded again, and fits itself unless it names something twice.
///
/// # Panics
/// If one of this does not hold.
pub fn hello(bytes: &[u8]) {
    let Ok(hello) = Hello::decode(bytes) else {
        return;
    };
    assert_eq!(Hello::decode(&hello.encode()).as_ref(), Ok(&hello));
    assert!(hello.blocks.len() <= BLOCKS_MAX && hello.devices.len() <= DEVICES_MAX);
    let fits_nothing = hello::compare(&hello, &[], &[], None).is_ok();
    assert_eq!(
        fits_nothing,
        hello.blocks.is_empty() && hello.devices.is_empty()
    );
    let mut names: Vec<_> = hello.devices.iter().map(|device| &device.name).collect();
    names.extend(hello.blocks.iter().map(|block| &block.name));
    names.sort_unstable();
    if names.windows(2).all(|pair| pair[0] != pair[1])
        && hello
            .devices
            .iter()
            .all(|device| device.version_min <= device.version_max)
    {
        assert_eq!(
            hello::compare(&hello, &hello.blocks, &hello.devices, hello.uuid),
            Ok(())
        );
    }
}

/// A saved VM, and the header of a piece on a shared socket.
///
/// The reader never wants more than a section may have. What it has accepted are whole frames that belong to an archive, in an order
/// that a writer could have written, and an archive is complete only with an end that fits.
///
/// # Panics
/// If one of this does not hold.
pub fn archive(bytes: &[u8]) {
    let read = read_archive(bytes);
    if let Some(first) = bytes.first_chunk()
        && let Ok(header) = PieceHeader::decode(first)
    {
        assert_eq!(header.encode(), *first);
    }
    match read {
        Ok(items) => {
            assert!(matches!(items.first(), Some(ArchiveItem::Hello(_))));
            assert!(matches!(items.last(), Some(ArchiveItem::End)));
        }
        Err(error) => {
            assert!(error.offset <= bytes.len() as u64, "{error}");
            if error.fault == ArchiveFault::Incomplete {
                assert_eq!(error.offset, bytes.len() as u64);
            }
        }
    }
}

/// The same for frames that are cut out of the input and put behind right checksums, after a right start: type, flags and 16 bits of
/// length each. Payloads are zeros. An end with an empty body gets the totals that are right.
///
/// # Panics
/// If a promise of [`archive`] does not hold.
pub fn archive_frames(bytes: &[u8]) {
    let starts = [ArchiveEncoder::start, ArchiveEncoder::start_in_place];
    for start in starts {
        frames_behind(start, bytes);
    }
}

fn frames_behind(start: fn(&mut ArchiveEncoder) -> Vec<u8>, mut bytes: &[u8]) {
    let mut encoder = ArchiveEncoder::default();
    let mut archive = start(&mut encoder);
    while let Some(([kind, flags, low, high], rest)) = bytes.split_first_chunk() {
        let len = usize::from(u16::from_le_bytes([*low, *high])).min(rest.len());
        let (body, rest) = rest.split_at(len);
        bytes = rest;
        if *kind == ARCHIVE_END && body.is_empty() {
            archive.extend_from_slice(&encoder.end());
            continue;
        }
        let mut body = body.to_vec();
        let mut payload = Vec::new();
        if *kind == ram::RAM_RUNS && body.len() >= ram::RUNS_FIXED_BYTES {
            // Two pages at most: 4096 is bit 12.
            let pages = usize::from(body[5] >> 4 & 3);
            payload.resize(pages << 12, 0);
            body[8..12].copy_from_slice(&crc32c::crc32c(&payload).to_le_bytes());
        }
        if *kind == DEVICE_DATA && body.len() == DEVICE_DATA_BYTES {
            payload.resize(usize::from(body[16]), 0);
            body[20..24].copy_from_slice(&crc32c::crc32c(&payload).to_le_bytes());
        }
        let frame = encode_frame(*kind, *flags, &body);
        encoder.frame(&frame, payload.len() as u64);
        archive.extend_from_slice(&frame);
        archive.extend_from_slice(&payload);
    }
    self::archive(&archive);
}

fn read_archive(mut bytes: &[u8]) -> Result<Vec<ArchiveItem>, ArchiveError> {
    let mut reader = ArchiveReader::default();
    let mut items = Vec::new();
    let mut taken = 0;
    while reader.wants() > 0 {
        assert!(reader.wants() <= SECTION_BYTES_MAX as usize);
        assert!(reader.offset() <= taken && (taken == 0 || taken >= START_BYTES as u64));
        let Some((piece, rest)) = bytes.split_at_checked(reader.wants()) else {
            return Err(reader.ends_early(bytes.len() as u64));
        };
        let item = reader.feed(piece)?;
        if let Some(ArchiveItem::Control(frame)) = &item {
            let again = read_stream::<SourceFrame>(reader.frame(), usize::MAX, SourceFrame::encode);
            assert_eq!(again, std::slice::from_ref(frame));
        }
        items.extend(item);
        (bytes, taken) = (rest, taken + piece.len() as u64);
    }
    match bytes {
        [] => Ok(items),
        _ => Err(reader.goes_on()),
    }
}

/// Reads frames until the stream ends or is broken. Every frame is encoded again, which must decode to the same frame.
fn read_stream<F>(stream: &[u8], piece: usize, encode: fn(&F) -> Vec<u8>) -> Vec<F>
where
    F: ControlFrame + PartialEq + std::fmt::Debug,
{
    let mut buffer = FrameBuffer::default();
    let mut frames = Vec::new();
    let mut pushed = 0;
    for bytes in stream.chunks(piece) {
        buffer.push(bytes);
        pushed += bytes.len();
        loop {
            match buffer.poll_frame::<F>() {
                Ok(Some(frame)) => {
                    let again = encode(&frame);
                    let Some((Ok(header), body)) = split_frame(&again) else {
                        unreachable!("an encoded frame has a header");
                    };
                    let decoded = F::decode(header.kind, Bytes::copy_from_slice(body));
                    assert_eq!(decoded.as_ref(), Ok(&frame));
                    frames.push(frame);
                }
                Ok(None) => break,
                Err(_refused) => return frames,
            }
        }
        assert!(buffer.pending() <= pushed);
    }
    frames
}

fn split_frame(frame: &[u8]) -> Option<(Result<FrameHeader, super::WireError>, &[u8])> {
    let (header, body) = frame.split_first_chunk::<HEADER_BYTES>()?;
    Some((FrameHeader::decode(header), body))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    /// The fixtures of all released versions, good and corrupt: whole frames as they go over the wire.
    fn corpus() -> Vec<Vec<u8>> {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/wire/v1");
        let mut corpus = Vec::new();
        for folder in ["good", "corrupt"] {
            for entry in std::fs::read_dir(fixtures.join(folder)).unwrap() {
                corpus.push(std::fs::read(entry.unwrap().path()).unwrap());
            }
        }
        assert!(corpus.len() > 20, "only {} fixtures found", corpus.len());
        corpus
    }

    /// All targets on one input, in each form that they take.
    fn all_targets(frame: &[u8]) {
        for piece in [0, 2, 255] {
            control_stream(&[&[piece], frame].concat());
        }
        if let Some((_, body)) = split_frame(frame) {
            let typed = [&frame[4..6], body].concat();
            control_frame(&typed);
            data_frame(&typed);
            hello(body);
        }
    }

    /// What the targets call, on what the fuzzer has found worth keeping for them.
    #[test]
    fn no_input_of_the_corpora_breaks_a_promise() {
        type Promise = fn(&[u8]);
        let targets: [(&str, &[Promise]); 4] = [
            ("frames", &[control_stream, control_frame]),
            ("ram_frames", &[data_frame]),
            ("hello", &[hello]),
            ("archive", &[archive, archive_frames]),
        ];
        for (name, promises) in targets {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
                .join("fuzz/corpus")
                .join(name);
            let mut inputs = 0;
            for entry in std::fs::read_dir(folder).unwrap() {
                let bytes = std::fs::read(entry.unwrap().path()).unwrap();
                promises.iter().for_each(|promise| promise(&bytes));
                inputs += 1;
            }
            assert!(inputs > 20, "only {inputs} inputs of {name} found");
        }
    }

    #[test]
    fn no_fixture_breaks_a_decoder_whole_cut_or_changed() {
        for frame in corpus() {
            all_targets(&frame);
            for cut in 0..frame.len() {
                all_targets(&frame[..cut]);
            }
            for bit in 0..frame.len() * 8 {
                let mut changed = frame.clone();
                changed[bit / 8] ^= 1 << (bit % 8);
                all_targets(&changed);
            }
        }
    }

    fn archives() -> Vec<Vec<u8>> {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/archive");
        let folders = ["v1/good", "v1/corrupt", "v2/good", "v2/corrupt"];
        let folders = folders.map(|folder| fixtures.join(folder));
        let files = folders
            .iter()
            .flat_map(|folder| std::fs::read_dir(folder).unwrap());
        let archives: Vec<_> = files
            .map(|entry| std::fs::read(entry.unwrap().path()).unwrap())
            .collect();
        assert!(archives.len() > 10, "only {} fixtures", archives.len());
        archives
    }

    /// The frames of an archive in the form that `archive_frames` takes.
    fn cut_out(archive: &[u8]) -> Vec<u8> {
        let mut rest = archive.get(START_BYTES..).unwrap_or_default();
        let mut frames = Vec::new();
        while let Some((Ok(header), body)) = split_frame(rest) {
            let Some((body, after)) = body.split_at_checked(header.body_bytes as usize) else {
                break;
            };
            let end = header.kind == ARCHIVE_END;
            let body = if end { &[] } else { body };
            frames.extend_from_slice(&[header.kind, header.flags]);
            frames.extend_from_slice(&u16::try_from(body.len()).unwrap().to_le_bytes());
            frames.extend_from_slice(body);
            let payload = match header.kind {
                ram::RAM_RUNS => usize::from(body[5] >> 4) << 12,
                DEVICE_DATA => usize::from(body[16]),
                _ => 0,
            };
            rest = after.get(payload..).unwrap_or_default();
        }
        frames
    }

    #[test]
    fn no_archive_breaks_the_reader_whole_cut_or_changed() {
        for bytes in archives() {
            archive(&bytes);
            for cut in 0..bytes.len() {
                archive(&bytes[..cut]);
            }
            for at in 0..bytes.len() {
                let mut changed = bytes.clone();
                changed[at] ^= 1 << (at % 8);
                archive(&changed);
            }
            let frames = cut_out(&bytes);
            archive_frames(&frames);
            for at in 0..frames.len() {
                archive_frames(&frames[..at]);
                for bit in 0..8 {
                    let mut changed = frames.clone();
                    changed[at] ^= 1 << bit;
                    archive_frames(&changed);
                }
            }
        }
    }

    #[test]
    fn frames_in_one_stream_are_read_one_after_the_other() {
        let mut stream = vec![7];
        corpus()
            .iter()
            .for_each(|frame| stream.extend_from_slice(frame));
        control_stream(&stream);
    }
}
