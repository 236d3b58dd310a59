//! The source's half of the protocol, for a target whose guest comes from an archive.
//!
//! One thread reads the archive and speaks; a second listens to the target, and shows that this side lives while the first waits for
//! bytes. The end of device state, with which the target begins to load it into its machine, is said when the archive has been read to its
//! end mark and was found good from first to last byte: until then another one can be tried. COMMIT follows when the target is ready.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::event::PollFlags;

use super::inlet::Inlet;
use super::interrupt::{Interrupt, Waited};
use super::{StreamError, StreamFault, socket_pair};
use crate::limits::Deadlines;
use crate::wire::archive::{ArchiveItem, ArchiveReader};
use crate::wire::frame::{FrameBuffer, Ready, SourceFrame, StateEnd, TargetFrame};
use crate::wire::hello::{DataHello, Hello};

/// Bytes asked for in one read of the control connection.
const READ_BYTES: usize = 64 << 10;

/// Takes the target's end of a connection. Called on a thread of the loader.
pub(super) type Connect = Box<dyn Fn(OwnedFd) + Send>;
/// Learns that there is nothing to load, and why. Called at most once, on a thread of the loader.
pub(super) type Failed = Box<dyn FnOnce(StreamError) + Send>;

/// Loads one VM. Dropping it gives up, unless the guest was handed over; see [`give_up`](Self::give_up).
#[derive(Debug)]
pub struct ArchiveLoader {
    interrupt: Interrupt,
    thread: Option<JoinHandle<()>>,
}

impl ArchiveLoader {
    /// Begins to read. Gives connections to the target as a source opens them: first a control connection, later a data connection.
    ///
    /// # Errors
    /// When the process is out of threads.
    pub fn start(
        inlet: Inlet,
        deadlines: &Deadlines,
        connect: Connect,
        failed: Failed,
    ) -> Result<Self, StreamError> {
        let keepalive = Duration::from_micros(deadlines.keepalive_us);
        let name = inlet.name().to_owned();
        let interrupt = inlet.interrupt();
        let thread = thread::Builder::new()
            .name("load".to_owned())
            .spawn(move || run(inlet, keepalive, &connect, failed))
            .map_err(|error| StreamFault::Open(error).of(&name))?;
        Ok(Self {
            interrupt,
            thread: Some(thread),
        })
    }

    /// Gives up, and waits until the file or command is left alone. Blocks, as long as a file system may.
    pub fn give_up(self) {
        drop(self);
    }

    fn end(&mut self) {
        self.interrupt.raise();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that loads has panicked");
        }
    }
}

impl Drop for ArchiveLoader {
    fn drop(&mut self) {
        self.end();
    }
}

/// Body of the thread.
fn run(inlet: Inlet, keepalive: Duration, connect: &Connect, failed: Failed) {
    let name = inlet.name().to_owned();
    let mut job = Load {
        inlet,
        keepalive,
        reader: ArchiveReader::default(),
        bytes: Vec::new(),
        end: None,
    };
    let mut links = Links::default();
    if let Err(fault) = job.run(connect, &mut links) {
        // Before the links are closed, so that the engine hears the reason and not that they are gone.
        failed(fault.of(&name));
    }
}

/// Our ends of the connections.
#[derive(Default)]
struct Links {
    target: Option<Peer>,
    data: Option<UnixStream>,
}

/// The reading thread at work.
struct Load {
    inlet: Inlet,
    /// How often the target hears that this side lives.
    keepalive: Duration,
    reader: ArchiveReader,
    /// What was read last.
    bytes: Vec<u8>,
    end: Option<StateEnd>,
}

impl Load {
    fn run(&mut self, connect: &Connect, links: &mut Links) -> Result<(), StreamFault> {
        let hello = loop {
            if let Some(ArchiveItem::Hello(hello)) = self.next()? {
                break *hello;
            }
        };
        let verify = hello.verify;
        let (control, theirs) = socket_pair().map_err(StreamFault::Open)?;
        let target = links.target.insert(Peer::start(
            control,
            self.keepalive,
            self.inlet.interrupt(),
        )?);
        connect(theirs);
        let data = match open(target, hello, connect)? {
            Some(data) => Some(links.data.insert(data)),
            None => None,
        };
        self.replay(target, data)?;
        match target.hear()? {
            TargetFrame::Ready(ready) => {
                if verify {
                    check(&ready, self.end.as_ref())?;
                }
            }
            other => return Err(unexpected(&other)),
        }
        target.say(&SourceFrame::Commit)?;
        match target.hear()? {
            TargetFrame::Running { .. } => target.say(&SourceFrame::Finish),
            other => Err(unexpected(&other)),
        }
    }

    /// Passes on everything up to the end mark, and looks that nothing follows it. The last word is kept until then.
    fn replay(
        &mut self,
        target: &Peer,
        mut data: Option<&mut UnixStream>,
    ) -> Result<(), StreamFault> {
        loop {
            match self.next()? {
                None => {}
                Some(ArchiveItem::End) => break,
                Some(ArchiveItem::Ram { payload_bytes }) => {
                    self.pass(target, data.as_deref_mut(), payload_bytes)?;
                }
                Some(ArchiveItem::RoundEnd(_)) => self.pass(target, data.as_deref_mut(), 0)?,
                Some(ArchiveItem::Control(SourceFrame::StateEnd(end))) => self.end = Some(end),
                Some(ArchiveItem::Control(frame)) => target.say(&frame)?,
                Some(ArchiveItem::Hello(_)) => unreachable!("the reader takes one hello"),
            }
        }
        let mut more = [0];
        match self.inlet.read(&mut more) {
            Ok(0) => {}
            Ok(_) => return Err(self.reader.goes_on().into()),
            Err(error) => return Err(StreamFault::Read(error)),
        }
        self.inlet.finish()?;
        let end = self.end.expect("the reader takes no end without it");
        target.say(&SourceFrame::StateEnd(end))
    }

    /// Reads the next piece; an item if it completes one.
    fn next(&mut self) -> Result<Option<ArchiveItem>, StreamFault> {
        let wanted = self.reader.wants();
        self.bytes.clear();
        let part = (&mut self.inlet).take(wanted as u64);
        let read = { part }.read_to_end(&mut self.bytes);
        read.map_err(StreamFault::Read)?;
        if self.bytes.len() < wanted {
            if let Some(failure) = self.inlet.failure() {
                return Err(failure);
            }
            return Err(self.reader.ends_early(self.bytes.len() as u64).into());
        }
        Ok(self.reader.feed(&self.bytes)?)
    }

    /// Passes the present frame on, and its payload, which was read last.
    fn pass(
        &self,
        target: &Peer,
        data: Option<&mut UnixStream>,
        payload_bytes: usize,
    ) -> Result<(), StreamFault> {
        let data = data.expect("the reader takes no pages where memory stays in place");
        let payload = &self.bytes[..payload_bytes];
        let written = data
            .write_all(self.reader.frame())
            .and_then(|()| data.write_all(payload));
        // A target that gives up closes the connection, and says why on the other.
        written.map_err(|_| target.last_word())
    }
}

/// What a source compares before it gives its guest away, if that was asked for.
pub(super) fn check(ready: &Ready, end: Option<&StateEnd>) -> Result<(), StreamFault> {
    let wrong = |text: String| Err(StreamFault::Refused(text));
    let Some(found) = &ready.verification else {
        return wrong("it was not verified although that was asked for when it was saved".into());
    };
    let saved = end.and_then(|end| end.ram_hash);
    if saved != Some(found.ram_hash) {
        let saved = saved.unwrap_or(0);
        let text = format!(
            "RAM hash is {saved:032x} in the archive and {:032x} after loading",
            found.ram_hash
        );
        return wrong(text);
    }
    if !found.state_differences.is_empty() {
        let text = format!(
            "device state reads back differently: {}",
            found.state_differences
        );
        return wrong(text);
    }
    Ok(())
}

/// Introduces the archive to the target; the data connection unless memory stays in place.
fn open(target: &Peer, hello: Hello, connect: &Connect) -> Result<Option<UnixStream>, StreamFault> {
    let (migration_id, in_place) = (hello.migration_id, hello.is_in_place());
    target.say(&SourceFrame::Hello(hello))?;
    let version = match target.hear()? {
        TargetFrame::HelloReply(reply) => reply.version,
        other => return Err(unexpected(&other)),
    };
    if in_place {
        return match target.hear()? {
            TargetFrame::DataReady => Ok(None),
            other => Err(unexpected(&other)),
        };
    }
    let (mut data, theirs) = socket_pair().map_err(StreamFault::Open)?;
    let first = SourceFrame::DataHello(DataHello {
        version,
        migration_id,
        index: 0,
        count: 1,
    });
    // A new socket pair takes a few bytes at once.
    data.write_all(&first.encode()).map_err(StreamFault::Open)?;
    connect(theirs);
    match target.hear()? {
        TargetFrame::DataReady => Ok(Some(data)),
        other => Err(unexpected(&other)),
    }
}

/// The target at the other end of the control connection.
struct Peer {
    control: UnixStream,
    frames: mpsc::Receiver<TargetFrame>,
    listener: Option<JoinHandle<()>>,
}

impl Peer {
    fn start(
        control: UnixStream,
        keepalive: Duration,
        interrupt: Interrupt,
    ) -> Result<Self, StreamFault> {
        let (heard, frames) = mpsc::channel();
        let copy = control.try_clone().map_err(StreamFault::Open)?;
        let listener = thread::Builder::new()
            .name("load-control".to_owned())
            .spawn(move || listen(&copy, keepalive, &interrupt, &heard))
            .map_err(StreamFault::Open)?;
        Ok(Self {
            control,
            frames,
            listener: Some(listener),
        })
    }

    fn say(&self, frame: &SourceFrame) -> Result<(), StreamFault> {
        let said = (&self.control).write_all(&frame.encode());
        said.map_err(|_| self.last_word())
    }

    /// The next frame that is not just a sign of life.
    fn hear(&self) -> Result<TargetFrame, StreamFault> {
        loop {
            match self.frames.recv() {
                Ok(TargetFrame::RoundPlaced(_) | TargetFrame::SwitchoverAck) => {}
                Ok(TargetFrame::Abort(abort)) => return Err(StreamFault::Refused(abort.reason)),
                Ok(frame) => return Ok(frame),
                Err(_) => return Err(StreamFault::GivenUp),
            }
        }
    }

    /// Why the target has closed its connections.
    fn last_word(&self) -> StreamFault {
        loop {
            match self.hear() {
                Ok(_) => {}
                Err(fault) => return fault,
            }
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Ends the thread that listens. Fails only if it is closed already.
        let _ = self.control.shutdown(Shutdown::Both);
        if let Some(listener) = self.listener.take()
            && listener.join().is_err()
        {
            tracing::error!("the thread that listens to a load has panicked");
        }
    }
}

/// Body of the thread that listens, until the connection ends, nobody wants to hear, or the loader gives up: it may be waiting for a
/// word of a target that is waiting for its end.
fn listen(
    control: &UnixStream,
    keepalive: Duration,
    interrupt: &Interrupt,
    heard: &mpsc::Sender<TargetFrame>,
) {
    let mut buffer = FrameBuffer::default();
    let mut bytes = vec![0; READ_BYTES];
    loop {
        while let Ok(Some(frame)) = buffer.poll_frame::<TargetFrame>() {
            if frame != TargetFrame::Keepalive && heard.send(frame).is_err() {
                return;
            }
        }
        match interrupt.wait(control.as_fd(), PollFlags::IN, Some(keepalive)) {
            Ok(Waited::TimedOut) => {
                let sign = SourceFrame::Keepalive.encode();
                if (&*control).write_all(&sign).is_err() {
                    return;
                }
            }
            Ok(Waited::Ready) => match (&*control).read(&mut bytes) {
                Ok(0) | Err(_) => return,
                Ok(count) => buffer.push(&bytes[..count]),
            },
            Err(_) => return,
        }
    }
}

pub(super) fn unexpected(frame: &TargetFrame) -> StreamFault {
    StreamFault::Refused(format!("unexpected answer of the target: {frame:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_thread_that_listens_to_a_target_is_gone_with_the_connection() {
        let (control, target) = socket_pair().unwrap();
        let full = control.try_clone().unwrap();
        let interrupt = Interrupt::new().unwrap();
        // Nobody reads its signs of life, so that it is in the middle of one.
        let keepalive = Duration::from_micros(1);
        let peer = Peer::start(control, keepalive, interrupt.clone()).unwrap();
        let never = Interrupt::new().unwrap();
        let moment = Some(Duration::from_millis(1));
        while never.wait(full.as_fd(), PollFlags::OUT, moment).unwrap() == Waited::Ready {}
        drop(peer);
        assert_eq!(interrupt.holders(), 1);
        drop(target);
    }
}
