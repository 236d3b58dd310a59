//! One sender thread: prepares the next frame while the kernel sends the one before.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};

use super::DataError;
use super::config::ZeroCopy;
use super::lent::LentMessage;
use super::link::{self, Link, ZeroCopyCounts};
use super::sender::{Command, RoundStats, SenderEvent, Shared};
use super::work::Round;
use crate::memory::zero::{GuestPage, PAGE_BYTES};
use crate::units::PageIndex;
use crate::wire::device_data::DEVICE_PAYLOAD_BYTES_MAX;
use crate::wire::ram::{
    FRAME_BYTES_MAX, PAYLOAD_BYTES_MAX, RamRuns, RoundCounts, RoundEnd, RunKind,
};

/// Where the payload starts in the own buffer when it is copied for its checksum: the first page after the longest header.
const PAYLOAD_AT: usize = FRAME_BYTES_MAX.next_multiple_of(PAGE_BYTES);

/// Body of a sender thread. Ends after the last round, on a stop, on failure, or when nobody can send commands any more.
pub(super) fn run(shared: &Shared, connection: usize, commands: &mpsc::Receiver<Command>) {
    let body = AssertUnwindSafe(|| Worker::open(shared, connection)?.run(commands));
    match catch_unwind(body).unwrap_or(Err(DataError::Panic)) {
        Ok(()) => {}
        Err(error) => shared.fail(connection, error),
    }
}

struct Worker<'a> {
    shared: &'a Shared,
    connection: usize,
    link: Box<dyn Link>,
    /// A message that is not under way.
    spare: Option<LentMessage>,
    /// Bytes of the message under way.
    under_way_bytes: u64,
    /// Messages wait for bandwidth.
    limited: bool,
    /// Position of the device that is being read.
    device: Option<usize>,
    zero_copy: ZeroCopyCounts,
}

impl<'a> Worker<'a> {
    fn open(shared: &'a Shared, connection: usize) -> Result<Self, DataError> {
        let config = &shared.config;
        // A page may change between its checksum and its transmission.
        let zero_copy = if config.checksum {
            ZeroCopy::Never
        } else {
            config.zero_copy
        };
        let socket = shared.sockets.socket(connection);
        let link = link::open(
            socket,
            config.backend,
            zero_copy,
            shared.sockets.stop_flag(),
        );
        Ok(Self {
            shared,
            connection,
            link: link.map_err(|source| DataError::from_kernel("setting up a socket", source))?,
            spare: None,
            under_way_bytes: 0,
            limited: true,
            device: None,
            zero_copy: ZeroCopyCounts::default(),
        })
    }

    fn run(mut self, commands: &mpsc::Receiver<Command>) -> Result<(), DataError> {
        while let Ok(Command::Send(round)) = commands.recv() {
            self.send_round(&round)?;
            if round.last {
                break;
            }
        }
        Ok(())
    }

    fn send_round(&mut self, round: &Arc<Round>) -> Result<(), DataError> {
        let mut counts = RoundCounts::default();
        let mut bytes = 0;
        // First: the slowest device decides when the last round ends.
        while let Some(message) = self.next_device_piece(round, &mut counts)? {
            bytes += message.bytes_left();
            self.send(message)?;
        }
        let limit = &self.shared.config.bandwidth;
        // The guest waits for the last round: no limit then.
        self.limited = !round.last;
        let rate = || if round.last { 0 } else { limit.get() };
        while let Some((frame, looked_at)) = round.next_frame(&self.shared.ram, rate())? {
            let message = self.load(frame, &mut counts);
            bytes += message.bytes_left();
            self.send(message)?;
            round.pages_done.fetch_add(looked_at, Ordering::Relaxed);
        }
        let end = RoundEnd {
            round: round.id,
            last: round.last,
            counts,
        };
        let message = self.load_own(&end.encode());
        bytes += message.bytes_left();
        self.send(message)?;
        self.finish()?;
        self.add_totals(&counts);
        if let Some((counts, wire_bytes)) = round.finish(&counts, bytes)
            && !self.shared.sockets.is_stopped()
        {
            let stats = RoundStats {
                counts,
                wire_bytes,
                duration_us: u64::try_from(round.began.elapsed().as_micros()).unwrap_or(u64::MAX),
            };
            (self.shared.events)(SenderEvent::RoundSent {
                round: round.id,
                stats,
            });
        }
        Ok(())
    }

    /// Waits for the message before, then for bandwidth, then lets this one go.
    fn send(&mut self, message: LentMessage) -> Result<(), DataError> {
        self.finish()?;
        let bytes = message.bytes_left();
        if self.limited {
            let stopped = || self.shared.sockets.is_stopped();
            self.shared.config.bandwidth.acquire(bytes, stopped);
        }
        self.under_way_bytes = bytes;
        self.link
            .send_start(message)
            .map_err(|source| DataError::from_kernel("sending guest pages", source))
    }

    fn finish(&mut self) -> Result<(), DataError> {
        let message = self
            .link
            .send_finish()
            .map_err(|source| DataError::from_kernel("sending guest pages", source))?;
        if message.is_some() {
            self.spare = message;
        }
        let bytes = std::mem::take(&mut self.under_way_bytes);
        self.shared.sockets.add_bytes(self.connection, bytes);
        Ok(())
    }

    /// An empty message: a used one if there is, else a new one.
    fn message(&mut self) -> LentMessage {
        let mut message = self.spare.take().unwrap_or_else(|| {
            let devices = self
                .shared
                .devices()
                .is_some_and(|streams| !streams.is_empty());
            let payload_bytes = match (self.shared.config.checksum, devices) {
                (true, _) => PAYLOAD_BYTES_MAX,
                (false, true) => DEVICE_PAYLOAD_BYTES_MAX,
                (false, false) => 0,
            } as usize;
            LentMessage::new(self.shared.ram.clone(), PAYLOAD_AT + payload_bytes)
        });
        message.clear();
        message
    }

    /// The next piece of the device that this thread has taken, or of the next one that nobody has; `None` when all have been read.
    fn next_device_piece(
        &mut self,
        round: &Round,
        counts: &mut RoundCounts,
    ) -> Result<Option<LentMessage>, DataError> {
        loop {
            let at = match self.device {
                Some(at) => at,
                None => round.claim_device(),
            };
            let shared = self.shared;
            let Some(mut stream) = shared.devices().and_then(|streams| streams.get(at)) else {
                self.device = None;
                return Ok(None);
            };
            self.device = Some(at);
            let mut message = self.message();
            let payload = PAYLOAD_AT..PAYLOAD_AT + DEVICE_PAYLOAD_BYTES_MAX as usize;
            let piece = stream.next_piece(round.id, round.last, &mut message.own_mut()[payload])?;
            let Some(piece) = piece else {
                self.spare = Some(message);
                self.device = None;
                continue;
            };
            counts.device_bytes += u64::from(piece.payload_bytes);
            let head = piece.encode();
            message.own_mut()[..head.len()].copy_from_slice(&head);
            message.push_own(0..head.len());
            if piece.payload_bytes > 0 {
                message.push_own(PAYLOAD_AT..PAYLOAD_AT + piece.payload_bytes as usize);
            }
            return Ok(Some(message));
        }
    }

    fn load_own(&mut self, frame: &[u8]) -> LentMessage {
        let mut message = self.message();
        message.own_mut()[..frame.len()].copy_from_slice(frame);
        message.push_own(0..frame.len());
        message
    }

    fn load(&mut self, mut frame: RamRuns, counts: &mut RoundCounts) -> LentMessage {
        counts.add_frame(&frame.runs);
        let mut message = self.message();
        let mut payload_end = PAYLOAD_AT;
        if self.shared.config.checksum {
            payload_end += self.copy_payload(&frame, &mut message);
            frame.payload_crc = Some(crc32c::crc32c(&message.own()[PAYLOAD_AT..payload_end]));
        }
        let head = frame.encode();
        message.own_mut()[..head.len()].copy_from_slice(&head);
        message.push_own(0..head.len());
        if payload_end > PAYLOAD_AT {
            message.push_own(PAYLOAD_AT..payload_end);
        } else {
            let data = frame.runs.iter().filter(|run| run.kind == RunKind::Data);
            data.for_each(|run| message.push_pages(run.pages));
        }
        message
    }

    /// Copies the pages into the own buffer, so that what is checksummed is what is sent. Returns the number of bytes.
    fn copy_payload(&self, frame: &RamRuns, message: &mut LentMessage) -> usize {
        let mut places = message.own_mut()[PAYLOAD_AT..]
            .as_chunks_mut::<PAGE_BYTES>()
            .0
            .iter_mut();
        let mut bytes = 0;
        for run in frame.runs.iter().filter(|run| run.kind == RunKind::Data) {
            let Some(block) = self.shared.ram.block(run.pages.block) else {
                continue;
            };
            let indices = run.pages.start.0..run.pages.end().0;
            for (index, place) in indices.zip(&mut places) {
                if let Some(page) = GuestPage::of(block, PageIndex(index)) {
                    page.copy_to(place);
                    bytes += PAGE_BYTES;
                }
            }
        }
        bytes
    }

    fn add_totals(&mut self, counts: &RoundCounts) {
        let progress = &self.shared.progress;
        let zero_copy = self.link.zero_copy();
        for (counter, value) in [
            (&progress.frames, counts.frames),
            (&progress.data_pages, counts.data_pages),
            (&progress.zero_pages, counts.zero_pages),
            (&progress.hole_pages, counts.hole_pages),
            (&progress.device_bytes, counts.device_bytes),
            (
                &progress.zero_copy_sends,
                zero_copy.sends - self.zero_copy.sends,
            ),
            (
                &progress.zero_copy_fallbacks,
                zero_copy.fallbacks - self.zero_copy.fallbacks,
            ),
        ] {
            counter.fetch_add(value, Ordering::Relaxed);
        }
        self.zero_copy = zero_copy;
    }
}
