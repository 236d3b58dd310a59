//! One receiver thread: reads frames, checks them and places pages.
//!
//! Each receive of page data also takes the start of the next frame, because within a round another frame always follows: so a frame
//! with one run costs one system call.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::DataError;
use super::config::ZeroCopy;
use super::lent::{BUFFERS_MAX, LentMessage};
use super::link::{self, Link};
use super::page_set::rest_of;
use super::placement::Placement;
use super::receiver::Shared;
use crate::memory::zero::PAGE_BYTES;
use crate::units::{PageCount, PageRun, RoundId};
use crate::wire::WireError;
use crate::wire::device_data::{DEVICE_DATA, DEVICE_PAYLOAD_BYTES_MAX, DeviceData};
use crate::wire::header::{FrameHeader, HEADER_BYTES};
use crate::wire::ram::{
    self, FRAME_BYTES_MAX, FRAME_BYTES_MIN, RAM_RUNS, RamRuns, RoundCounts, RoundEnd, RunKind,
};

/// Pages that go through the own buffer at a time: 256 KiB, so that they are still in the cache when they are written to their place.
const BUFFERED_PAGES_MAX: u64 = 64;
/// Where buffered pages start in the own buffer: the first page after the longest header.
const BUFFERED_AT: usize = FRAME_BYTES_MAX.next_multiple_of(PAGE_BYTES);
const OWN_BYTES: usize = BUFFERED_AT + BUFFERED_PAGES_MAX as usize * PAGE_BYTES;

const _: () = assert!(DEVICE_PAYLOAD_BYTES_MAX as usize <= OWN_BYTES - BUFFERED_AT);

/// Body of a receiver thread. Ends after the last round, on a stop, or on failure.
pub(super) fn run(shared: &Shared, connection: usize) {
    let body = AssertUnwindSafe(|| Worker::open(shared, connection)?.run());
    match catch_unwind(body).unwrap_or(Err(DataError::Panic)) {
        Ok(()) => {}
        Err(error) => shared.fail(connection, error),
    }
}

struct Worker<'a> {
    shared: &'a Shared,
    placement: &'a Placement,
    connection: usize,
    link: Box<dyn Link>,
    /// Its own buffer starts with the frame that is being read. `None` while the link has it.
    message: Option<LentMessage>,
    round: RoundId,
    counts: RoundCounts,
}

/// A part of the payload in one receive.
#[derive(Clone, Copy, Debug)]
struct Piece {
    run: PageRun,
    /// Place in the own buffer; `None` if the pages are received where they belong.
    buffered_at: Option<usize>,
}

impl<'a> Worker<'a> {
    fn open(shared: &'a Shared, connection: usize) -> Result<Self, DataError> {
        let link = link::open(
            shared.sockets.socket(connection),
            shared.config.backend,
            ZeroCopy::Never,
            shared.sockets.stop_flag(),
        );
        Ok(Self {
            shared,
            placement: shared.placement()?,
            connection,
            link: link.map_err(|source| DataError::from_kernel("setting up a socket", source))?,
            message: Some(LentMessage::new(shared.ram.clone(), OWN_BYTES)),
            round: RoundId(0),
            counts: RoundCounts::default(),
        })
    }

    fn run(mut self) -> Result<(), DataError> {
        loop {
            self.receive_own(0, FRAME_BYTES_MIN)?;
            // One round: frames follow each other without a pause that anybody could wait in.
            let end = loop {
                let header = self.receive_frame()?;
                match header.kind {
                    RAM_RUNS => {
                        let blocks = &self.shared.block_pages;
                        let frame = RamRuns::decode(&header, self.body(&header), blocks)?;
                        self.place(&frame)?;
                    }
                    DEVICE_DATA => {
                        let piece = DeviceData::decode(&header, self.body(&header))?;
                        self.pass_on(&piece)?;
                    }
                    _ => break RoundEnd::decode(&header, self.body(&header))?,
                }
            };
            self.check_end(&end)?;
            let complete = |counts| self.shared.complete(&end, counts);
            if !self.shared.barrier.arrive(&end, complete)? || end.last {
                return Ok(());
            }
            self.round = self.round.next();
            self.counts = RoundCounts::default();
        }
    }

    /// Reads the rest of the frame whose first [`FRAME_BYTES_MIN`] bytes are there, without its payload.
    fn receive_frame(&mut self) -> Result<FrameHeader, DataError> {
        let own = self.message().own();
        let head = own.first_chunk().expect("the own buffer holds a frame");
        let header = FrameHeader::decode(head)?;
        let end = HEADER_BYTES + ram::body_bytes(&header)?;
        self.receive_own(FRAME_BYTES_MIN, end)?;
        Ok(header)
    }

    fn body(&self, header: &FrameHeader) -> &[u8] {
        let end = HEADER_BYTES + header.body_bytes as usize;
        let message = self.message.as_ref().expect("back after each receive");
        &message.own()[HEADER_BYTES..end]
    }

    /// Receives bytes `from..to` of the own buffer.
    fn receive_own(&mut self, from: usize, to: usize) -> Result<(), DataError> {
        if from == to {
            return Ok(());
        }
        let message = self.message();
        message.clear();
        message.push_own(from..to);
        self.receive()
    }

    fn receive(&mut self) -> Result<(), DataError> {
        let message = self.message.take().expect("back after each receive");
        let bytes = message.bytes_left();
        let received = self.link.receive(message);
        self.message = Some(
            received.map_err(|source| DataError::from_kernel("receiving guest pages", source))?,
        );
        self.shared.sockets.add_bytes(self.connection, bytes);
        Ok(())
    }

    fn message(&mut self) -> &mut LentMessage {
        self.message.as_mut().expect("back after each receive")
    }

    /// Applies a frame: zeros at once, data as it is received. Ends with the start of the next frame in the own buffer.
    fn place(&mut self, frame: &RamRuns) -> Result<(), DataError> {
        if frame.round != self.round {
            return Err(self.wrong_round(frame.round));
        }
        for run in &frame.runs {
            self.shared.cover(run.pages)?;
        }
        self.counts.add_frame(&frame.runs);
        for run in frame.runs.iter().filter(|run| run.kind != RunKind::Data) {
            self.placement.clear(run.pages, run.kind);
        }
        let mut data = frame
            .runs
            .iter()
            .filter(|run| run.kind == RunKind::Data)
            .map(|run| run.pages);
        let mut left = data.next();
        let mut crc = 0;
        loop {
            let mut pieces = Vec::new();
            let mut buffered = 0;
            self.message().clear();
            // One buffer is for the start of the next frame.
            while let Some(run) = left
                && pieces.len() < BUFFERS_MAX - 1
                && let Some(piece) = self.next_piece(run, &mut buffered, frame)
            {
                left = rest_of(run, piece.run).or_else(|| data.next());
                self.push(piece);
                pieces.push(piece);
            }
            if left.is_none() {
                self.message().push_own(0..FRAME_BYTES_MIN);
            }
            self.receive()?;
            if frame.payload_crc.is_some() {
                crc = self.checksum(crc, &pieces);
            }
            self.write_buffered(&pieces)?;
            if left.is_none() {
                break;
            }
        }
        match frame.payload_crc {
            Some(sent) if sent != crc => Err(DataError::Peer(WireError::PayloadChecksum)),
            _ => Ok(()),
        }
    }

    /// The next part of `run` for the message under construction; `None` if it needs the own buffer and that is full. `buffered`
    /// counts the pages in the own buffer.
    fn next_piece(&self, run: PageRun, buffered: &mut u64, frame: &RamRuns) -> Option<Piece> {
        let (mut part, mut straight) = self.placement.first_part(run);
        if frame.payload_crc.is_some() && self.placement.writes(run) {
            // Checksummed in the cache rather than by reading guest memory back.
            (part, straight) = (run, false);
        }
        let mut buffered_at = None;
        if !straight {
            buffered_at = Some(BUFFERED_AT + *buffered as usize * PAGE_BYTES);
            part.count = PageCount(part.count.0.min(BUFFERED_PAGES_MAX - *buffered));
            *buffered += part.count.0;
        }
        (part.count.0 > 0).then_some(Piece {
            run: part,
            buffered_at,
        })
    }

    fn push(&mut self, piece: Piece) {
        let bytes = piece.run.count.0 as usize * PAGE_BYTES;
        match piece.buffered_at {
            Some(start) => self.message().push_own(start..start + bytes),
            None => {
                self.placement.prepare(piece.run);
                self.message().push_pages(piece.run);
            }
        }
    }

    fn write_buffered(&mut self, pieces: &[Piece]) -> Result<(), DataError> {
        let placement = self.placement;
        let own = self.message().own();
        for piece in pieces {
            if let Some(start) = piece.buffered_at {
                let bytes = piece.run.count.0 as usize * PAGE_BYTES;
                placement.write(piece.run, &own[start..start + bytes])?;
            }
        }
        Ok(())
    }

    /// Continues the payload's checksum over what was just received.
    fn checksum(&mut self, mut crc: u32, pieces: &[Piece]) -> u32 {
        let placement = self.placement;
        let own = self.message().own();
        let mut content = [0; PAGE_BYTES];
        for &Piece { run, buffered_at } in pieces {
            if let Some(start) = buffered_at {
                let bytes = run.count.0 as usize * PAGE_BYTES;
                crc = crc32c::crc32c_append(crc, &own[start..start + bytes]);
                continue;
            }
            let pages = (run.start.0..run.end().0).filter_map(|index| placement.page(run, index));
            for page in pages {
                page.copy_to(&mut content);
                crc = crc32c::crc32c_append(crc, &content);
            }
        }
        crc
    }

    /// Gives a piece of a device's stream to the device. Ends with the start of the next frame in the own buffer.
    fn pass_on(&mut self, piece: &DeviceData) -> Result<(), DataError> {
        if piece.round != self.round {
            return Err(self.wrong_round(piece.round));
        }
        let payload = BUFFERED_AT..BUFFERED_AT + piece.payload_bytes as usize;
        let message = self.message();
        message.clear();
        if !payload.is_empty() {
            message.push_own(payload.clone());
        }
        message.push_own(0..FRAME_BYTES_MIN);
        self.receive()?;
        self.counts.device_bytes += u64::from(piece.payload_bytes);
        let message = self.message.as_ref().expect("back after each receive");
        self.shared.devices.take(piece, &message.own()[payload])
    }

    fn check_end(&self, end: &RoundEnd) -> Result<(), DataError> {
        if end.round != self.round {
            return Err(self.wrong_round(end.round));
        }
        let (ours, theirs) = (&self.counts, &end.counts);
        for (what, received, sent) in [
            ("frames", ours.frames, theirs.frames),
            ("data pages", ours.data_pages, theirs.data_pages),
            ("zero pages", ours.zero_pages, theirs.zero_pages),
            ("hole pages", ours.hole_pages, theirs.hole_pages),
            (
                "bytes of device data",
                ours.device_bytes,
                theirs.device_bytes,
            ),
        ] {
            if sent != received {
                return Err(DataError::Peer(WireError::RoundTotals {
                    what,
                    sent,
                    received,
                }));
            }
        }
        Ok(())
    }

    fn wrong_round(&self, found: RoundId) -> DataError {
        DataError::Peer(WireError::Round {
            expected: self.round.0,
            found: found.0,
        })
    }
}
