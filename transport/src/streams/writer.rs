//! The target's half of the protocol, for a source whose guest goes into an archive.
//!
//! Per control connection a thread that answers; one thread that takes pages and writes everything. If memory stays in place there are
//! no pages and no data connection, and the thread writes the rest. It says READY when all but the
//! end mark is written and on the disk, and RUNNING when the end mark is too. What goes wrong before or after COMMIT reaches the
//! source as ABORT: the archive has no end mark then, or is discarded, and the guest goes on at the source. An operator who takes the
//! guest back without that word has a file discarded too, before the guest goes on; whatever a disk holds up ends first.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::net::RecvFlags;

use super::interrupt::{Interrupt, Waited};
use super::outlet::Outlet;
use super::{StreamFault, socket_pair};
use crate::limits::{CONTROL_BYTES_MAX, Deadlines};
use crate::units::PageCount;
use crate::wire::WireError;
use crate::wire::archive::ArchiveEncoder;
use crate::wire::device_data::{DEVICE_DATA, DeviceData};
use crate::wire::frame::{
    Abort, AbortCode, FrameBuffer, Ready, Resolution, SourceFrame, StateEnd, TargetFrame,
    Verification,
};
use crate::wire::header::{FrameHeader, HEADER_BYTES};
use crate::wire::hello::{Hello, HelloReply, VersionRange};
use crate::wire::ram::{self, RAM_RUNS, RamRuns, RoundEnd};

#[cfg(test)]
mod tests;

/// Bytes asked for in one read of a control connection.
const READ_BYTES: usize = 64 << 10;

/// Saves one VM. The engine connects to it as it does to a target, with one data connection and checksummed pages.
#[derive(Debug)]
pub struct ArchiveWriter {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Shared {
    name: String,
    software: String,
    keepalive: Duration,
    interrupt: Interrupt,
    outlet: Mutex<Option<Outlet>>,
    state: Mutex<State>,
    changed: Condvar,
}

/// What the threads know of each other.
#[derive(Debug, Default)]
struct State {
    /// The newest control connection, for what is said on it.
    control: Option<UnixStream>,
    data: Option<UnixStream>,
    hello: Option<Hello>,
    switchover: Vec<SourceFrame>,
    end: Option<StateEnd>,
    decision: Decision,
    /// The source has lost the link and asks for the outcome.
    asked: bool,
    /// What became of the archive.
    outcome: Option<Result<(), String>>,
    /// One that is complete, as long as the source may not know.
    complete: Option<Outlet>,
}

#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
enum Decision {
    #[default]
    Open,
    /// COMMIT has come: the guest is the archive's.
    Committed,
    /// It will not be taken any more.
    GivenUp,
}

impl ArchiveWriter {
    /// Waits for the first connection. Nothing is written before.
    pub fn new(outlet: Outlet, software: String, deadlines: &Deadlines) -> Self {
        Self {
            shared: Arc::new(Shared {
                name: outlet.name().to_owned(),
                software,
                keepalive: Duration::from_micros(deadlines.keepalive_us),
                interrupt: outlet.interrupt(),
                outlet: Mutex::new(Some(outlet)),
                state: Mutex::default(),
                changed: Condvar::new(),
            }),
            threads: Mutex::default(),
        }
    }

    /// A control connection. Later ones may ask what became of the archive.
    ///
    /// # Errors
    /// When the process is out of descriptors or threads.
    pub fn connect_control(&self) -> io::Result<OwnedFd> {
        let (ours, theirs) = socket_pair()?;
        let first = self.shared.lock().control.replace(ours.try_clone()?);
        self.spawn("save-control", move |shared| shared.serve(&ours))?;
        if first.is_none() {
            self.spawn("save-in-place", Shared::save_in_place)?;
        }
        Ok(theirs)
    }

    /// The data connection.
    ///
    /// # Errors
    /// When the process is out of descriptors or threads.
    pub fn connect_data(&self) -> io::Result<OwnedFd> {
        let (ours, theirs) = socket_pair()?;
        self.shared.lock().data = Some(ours.try_clone()?);
        self.spawn("save-data", move |shared| shared.save(Some(ours)))?;
        Ok(theirs)
    }

    /// Ends the save, and waits until its file or command is left alone. For a guest that goes on at the source: a file is discarded
    /// even if it is complete, unless the source has said that it knows. Blocks, as long as a file system may.
    pub fn give_up(&self) {
        self.shared.give_up();
        self.join();
        self.shared.discard();
    }

    /// The source will not come back. An archive whose outcome is known has been dealt with when this returns; another goes on being
    /// written: the guest is given to it. Blocks for a moment.
    pub fn leave(&self) {
        let settled = self.shared.lock().outcome.is_some();
        if settled {
            self.join();
        }
    }

    fn spawn(&self, name: &str, body: impl FnOnce(&Shared) + Send + 'static) -> io::Result<()> {
        let shared = Arc::clone(&self.shared);
        let thread = thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || body(&shared))?;
        self.threads().push(thread);
        Ok(())
    }

    fn join(&self) {
        let threads = std::mem::take(&mut *self.threads());
        for thread in threads {
            if thread.join().is_err() {
                tracing::error!(name = self.shared.name, "a thread that saves has panicked");
            }
        }
    }

    fn threads(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for ArchiveWriter {
    fn drop(&mut self) {
        if self.shared.lock().decision == Decision::Open {
            self.shared.give_up();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn say(&self, frame: &TargetFrame) {
        let control = self.lock().control.as_ref().map(UnixStream::try_clone);
        if let Some(Ok(mut control)) = control {
            // Fails if the source has closed the link, which its thread here sees.
            let _ = control.write_all(&frame.encode());
        }
    }

    /// From now on no COMMIT is taken, and whatever waits ends.
    fn give_up(&self) {
        let mut state = self.lock();
        if state.outcome.is_some() {
            return;
        }
        state.decision = Decision::GivenUp;
        if let Some(data) = &state.data {
            // Fails only if it is closed already.
            let _ = data.shutdown(Shutdown::Both);
        }
        drop(state);
        self.interrupt.raise();
        self.changed.notify_all();
    }

    /// Of a save that has been given up and has no threads: one that was never begun, as there was no data connection, and one that was
    /// complete before anybody knew.
    fn discard(&self) {
        let mut outlet = self.outlet.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(outlet) = outlet.take() {
            outlet.discard();
        }
        let mut state = self.lock();
        if let Some(complete) = state.complete.take() {
            state.decision = Decision::GivenUp;
            state.outcome = Some(Err(StreamFault::GivenUp.to_string()));
            drop(state);
            complete.discard();
        }
    }

    /// Body of the thread of a control connection.
    fn serve(&self, control: &UnixStream) {
        match self.answer(control) {
            Ok(()) => {}
            Err(error) => tracing::debug!(name = self.name, error, "control connection ended"),
        }
        let open = self.lock().decision == Decision::Open;
        if open {
            self.give_up();
        }
        // The other handle of it stays with the state.
        let _ = control.shutdown(Shutdown::Both);
    }

    fn answer(&self, control: &UnixStream) -> Result<(), String> {
        let never = Interrupt::new().map_err(|error| error.to_string())?;
        let mut buffer = FrameBuffer::default();
        let mut bytes = vec![0; READ_BYTES];
        loop {
            while let Some(frame) = buffer.poll_frame().map_err(|error| error.to_string())? {
                if !self.take(frame, control) {
                    return Ok(());
                }
            }
            match never.wait(control.as_fd(), PollFlags::IN, Some(self.keepalive)) {
                Ok(Waited::TimedOut) => self.say(&TargetFrame::Keepalive),
                Ok(Waited::Ready) => match (&*control).read(&mut bytes) {
                    Ok(0) => return Ok(()),
                    Ok(count) => buffer.push(&bytes[..count]),
                    Err(error) => return Err(error.to_string()),
                },
                Err(error) => return Err(error.to_string()),
            }
        }
    }

    /// Takes a frame of the source; false when nothing more is expected on this connection.
    fn take(&self, frame: SourceFrame, control: &UnixStream) -> bool {
        let mut state = self.lock();
        match frame {
            SourceFrame::Hello(hello) => {
                state.hello = Some(hello);
                let reply = TargetFrame::HelloReply(HelloReply {
                    version: VersionRange::OURS.max,
                    software: self.software.clone(),
                });
                // Under the lock, so that the answer comes before whatever the thread that writes says. It fails only if the source has
                // closed the link, which this thread sees next.
                let _ = (&*control).write_all(&reply.encode());
                self.changed.notify_all();
            }
            SourceFrame::Switchover(_) | SourceFrame::Section(_) => state.switchover.push(frame),
            SourceFrame::StateEnd(end) => {
                state.end = Some(end);
                self.changed.notify_all();
            }
            SourceFrame::Commit => {
                if state.decision == Decision::Open {
                    state.decision = Decision::Committed;
                }
                self.changed.notify_all();
            }
            SourceFrame::Resolve(_) => {
                state.asked = true;
                drop(state);
                match self.wait_outcome(control) {
                    Some(resolution) => self.say(&TargetFrame::Resolved(resolution)),
                    // It asks again on another connection.
                    None => return false,
                }
            }
            SourceFrame::Finish => {
                state.complete = None;
                return false;
            }
            SourceFrame::Abort(_) => return false,
            SourceFrame::Keepalive | SourceFrame::DataHello(_) => {}
        }
        true
    }

    /// Who asks has lost the link: what is not committed by now never will be. `None` if nobody waits for the answer any more.
    fn wait_outcome(&self, asker: &UnixStream) -> Option<Resolution> {
        if self.lock().decision == Decision::Open {
            self.give_up();
        }
        let mut state = self.lock();
        loop {
            match &state.outcome {
                Some(Ok(())) => return Some(Resolution::Committed),
                Some(Err(_)) => return Some(Resolution::NotCommitted),
                None if is_closed(asker) => return None,
                None => {}
            }
            let waited = self.changed.wait_timeout(state, self.keepalive);
            (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed
            .wait(state)
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Body of the thread that writes if no data connection will come.
    fn save_in_place(&self) {
        let mut state = self.lock();
        let in_place = loop {
            match &state.hello {
                _ if state.decision == Decision::GivenUp => return,
                Some(hello) => break hello.is_in_place(),
                None => state = self.wait(state),
            }
        };
        drop(state);
        if in_place {
            self.save(None);
        }
    }

    /// Body of the thread that writes.
    fn save(&self, data: Option<UnixStream>) {
        let outlet = self
            .outlet
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let Some(outlet) = outlet else {
            // A second data connection, which the hello does not announce.
            return;
        };
        let mut job = Save {
            shared: self,
            outlet,
            encoder: ArchiveEncoder::default(),
            data,
            blocks: Vec::new(),
            began: Instant::now(),
        };
        let done = job.run();
        let Save { outlet, data, .. } = job;
        let mut outlet = Some(outlet);
        let (word, asked) = match done.and_then(|()| self.succeed(&mut outlet)) {
            Ok(asked) => (TargetFrame::Running { resume_us: 0 }, asked),
            Err(fault) => self.fail(&fault, outlet),
        };
        self.changed.notify_all();
        // Whoever asked gets an answer, and does not expect this.
        if !asked {
            self.say(&word);
        }
        if let Some(data) = data {
            // After the reason, so that the source hears it first. Fails only if it is closed already.
            let _ = data.shutdown(Shutdown::Both);
        }
    }

    /// Everything is written and safe, unless the guest was taken back meanwhile, as a disk may take longer than an operator waits.
    /// Whether the source has asked.
    fn succeed(&self, outlet: &mut Option<Outlet>) -> Result<bool, StreamFault> {
        let mut state = self.lock();
        if state.decision == Decision::GivenUp {
            return Err(StreamFault::GivenUp);
        }
        // The reader of a pipe waits for its end.
        state.complete = outlet.take().filter(Outlet::is_file);
        state.outcome = Some(Ok(()));
        Ok(state.asked)
    }

    /// What is to be said, and whether the source has asked.
    fn fail(&self, fault: &StreamFault, outlet: Option<Outlet>) -> (TargetFrame, bool) {
        // Before anybody learns of it, and has the guest go on.
        if let Some(outlet) = outlet {
            outlet.discard();
        }
        let text = format!("{}: {fault}", self.name);
        tracing::warn!(reason = text, "not saved");
        let mut state = self.lock();
        state.decision = Decision::GivenUp;
        state.outcome = Some(Err(fault.to_string()));
        let abort = Abort::new(AbortCode::Resources, text);
        (TargetFrame::Abort(abort), state.asked)
    }
}

/// The writing thread at work.
struct Save<'a> {
    shared: &'a Shared,
    outlet: Outlet,
    encoder: ArchiveEncoder,
    /// None if memory stays in place.
    data: Option<UnixStream>,
    blocks: Vec<PageCount>,
    began: Instant,
}

impl Save<'_> {
    fn run(&mut self) -> Result<(), StreamFault> {
        if self.data.is_some() {
            self.greet()?;
            while !self.round()? {}
        } else {
            self.greet_in_place()?;
        }
        let end = self.state()?;
        self.shared.say(&TargetFrame::Ready(self.ready(&end)));
        let mut state = self.shared.lock();
        while state.decision == Decision::Open {
            state = self.shared.wait(state);
        }
        if state.decision == Decision::GivenUp {
            return Err(StreamFault::GivenUp);
        }
        drop(state);
        self.outlet.put(&self.encoder.end())?;
        self.outlet.finish()
    }

    fn greet(&mut self) -> Result<(), StreamFault> {
        let (header, frame) =
            self.receive_head(|header| Ok(header.body_bytes.min(CONTROL_BYTES_MAX) as usize))?;
        let mut buffer = FrameBuffer::default();
        buffer.push(&frame);
        let hello = buffer.poll_frame::<SourceFrame>();
        if !matches!(hello, Ok(Some(SourceFrame::DataHello(_)))) {
            return Err(wrong(WireError::Kind {
                kind: header.kind,
                flags: header.flags,
            }));
        }
        let hello = self.hello()?;
        if hello.data_connections != 1 || !hello.checksum {
            let text = "an archive takes one data connection, with checksums";
            return Err(StreamFault::Refused(text.to_owned()));
        }
        self.blocks = hello.blocks.iter().map(|block| block.pages).collect();
        let start = self.encoder.start();
        self.begin(start, hello)
    }

    fn greet_in_place(&mut self) -> Result<(), StreamFault> {
        let hello = self.hello()?;
        let start = self.encoder.start_in_place();
        self.begin(start, hello)
    }

    fn hello(&self) -> Result<Hello, StreamFault> {
        let hello = self.shared.lock().hello.clone();
        hello.ok_or(StreamFault::GivenUp)
    }

    /// Says that everything is ready, and writes what an archive begins with.
    fn begin(&mut self, mut start: Vec<u8>, hello: Hello) -> Result<(), StreamFault> {
        self.shared.say(&TargetFrame::DataReady);
        if hello.switchover_ack {
            self.shared.say(&TargetFrame::SwitchoverAck);
        }
        let hello = SourceFrame::Hello(hello).encode();
        self.encoder.frame(&hello, 0);
        start.extend_from_slice(&hello);
        self.outlet.put(&start)
    }

    /// Writes one round; whether it was the last.
    fn round(&mut self) -> Result<bool, StreamFault> {
        loop {
            let (header, mut bytes) = self.receive_head(ram::body_bytes)?;
            let (head, body) = (bytes.len(), &bytes[HEADER_BYTES..]);
            let payload_bytes = match header.kind {
                RAM_RUNS => {
                    let frame = RamRuns::decode(&header, body, &self.blocks).map_err(wrong)?;
                    Some(frame.payload_bytes())
                }
                DEVICE_DATA => {
                    let piece = DeviceData::decode(&header, body).map_err(wrong)?;
                    Some(piece.payload_bytes.into())
                }
                _ => None,
            };
            if let Some(payload_bytes) = payload_bytes {
                let payload = usize::try_from(payload_bytes).unwrap_or(usize::MAX);
                bytes.resize(head + payload, 0);
                self.read(&mut bytes[head..])?;
                self.encoder.frame(&bytes[..head], payload_bytes);
                self.outlet.put(&bytes)?;
                continue;
            }
            let end = RoundEnd::decode(&header, body).map_err(wrong)?;
            self.encoder.frame(&bytes, 0);
            self.outlet.put(&bytes)?;
            self.shared.say(&TargetFrame::RoundPlaced(end.round));
            if end.last {
                return Ok(true);
            }
        }
    }

    /// Receives header and body of a frame.
    fn receive_head(
        &mut self,
        body_bytes: impl FnOnce(&FrameHeader) -> Result<usize, WireError>,
    ) -> Result<(FrameHeader, Vec<u8>), StreamFault> {
        let mut head = [0; HEADER_BYTES];
        self.read(&mut head)?;
        let header = FrameHeader::decode(&head).map_err(wrong)?;
        let mut bytes = head.to_vec();
        bytes.resize(HEADER_BYTES + body_bytes(&header).map_err(wrong)?, 0);
        self.read(&mut bytes[HEADER_BYTES..])?;
        Ok((header, bytes))
    }

    /// Receives from the source.
    fn read(&mut self, bytes: &mut [u8]) -> Result<(), StreamFault> {
        let data = self.data.as_mut().ok_or(StreamFault::GivenUp)?;
        data.read_exact(bytes).map_err(lost)
    }

    /// Writes the state of the devices when all of it is here.
    fn state(&mut self) -> Result<StateEnd, StreamFault> {
        let mut state = self.shared.lock();
        let end = loop {
            if state.decision == Decision::GivenUp {
                return Err(StreamFault::GivenUp);
            }
            if let Some(end) = state.end {
                break end;
            }
            state = self.shared.wait(state);
        };
        let mut frames = std::mem::take(&mut state.switchover);
        drop(state);
        frames.push(SourceFrame::StateEnd(end));
        self.began = Instant::now();
        for frame in frames {
            let frame = frame.encode();
            self.encoder.frame(&frame, 0);
            self.outlet.put(&frame)?;
        }
        self.outlet.sync()?;
        Ok(end)
    }

    /// A hash that was asked for is in the archive and is looked at when it is loaded.
    fn ready(&self, end: &StateEnd) -> Ready {
        Ready {
            load_us: u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX),
            populated_bytes: 0,
            verification: end.ram_hash.map(|ram_hash| Verification {
                ram_hash,
                ..Verification::default()
            }),
        }
    }
}

/// Whether the other end is closed, and has nothing more to say.
fn is_closed(socket: &UnixStream) -> bool {
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    matches!(
        rustix::net::recv(socket, &mut [0_u8; 1][..], flags),
        Ok((_, 0))
    )
}

/// The source of this process sent what it never sends.
fn wrong(error: WireError) -> StreamFault {
    StreamFault::Refused(error.to_string())
}

/// The source has closed the data connection.
fn lost(_: io::Error) -> StreamFault {
    StreamFault::GivenUp
}
