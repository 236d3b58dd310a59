//! The stream of a device's state: read at the source, written at the target, by a data thread, while whoever leads the migration
//! moves the device from state to state.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmferry_transport::data::{DeviceSink, DeviceSource};

use super::face::{PrecopyInfo, VfioFace};

/// The stream of one migration of a device. It may come only with STOP_COPY.
pub(super) struct Session {
    face: Arc<dyn VfioFace>,
    stream: Mutex<Option<Arc<File>>>,
    /// The device is in STOP_COPY: the stream has an end.
    stopped: AtomicBool,
    /// The kernel was asked to say when a device begins anew.
    tells_reinit: AtomicBool,
    /// A device has begun anew, and nobody has been told yet.
    reinit: AtomicBool,
    /// A part of the stream was refused; what was loaded is worth nothing.
    refused: AtomicBool,
}

impl Session {
    pub(super) fn new(face: Arc<dyn VfioFace>) -> Arc<Self> {
        Arc::new(Self {
            face,
            stream: Mutex::new(None),
            stopped: AtomicBool::new(false),
            tells_reinit: AtomicBool::new(false),
            reinit: AtomicBool::new(false),
            refused: AtomicBool::new(false),
        })
    }

    pub(super) fn tells_reinit(&self) {
        self.tells_reinit.store(true, Ordering::Relaxed);
    }

    /// The stream is there. With `stopped` the device is in STOP_COPY.
    pub(super) fn open(&self, stream: Option<File>, stopped: bool) {
        if let Some(stream) = stream {
            *self.lock() = Some(Arc::new(stream));
        }
        self.stopped.store(stopped, Ordering::Release);
    }

    /// Nothing is read or written any more; a read that is under way ends by itself.
    pub(super) fn close(&self) {
        *self.lock() = None;
    }

    /// Whether part of what was written was refused.
    pub(super) fn was_refused(&self) -> bool {
        self.refused.load(Ordering::Acquire)
    }

    /// What is left, for a device whose state is being read while it changes; `None` in other states. `reinit` is told once.
    pub(super) fn precopy_info(&self) -> io::Result<Option<PrecopyInfo>> {
        if self.stopped.load(Ordering::Acquire) {
            return Ok(None);
        }
        let Some(stream) = self.stream() else {
            return Ok(None);
        };
        let mut info = self.ask(&stream)?;
        info.reinit = self.reinit.swap(false, Ordering::Relaxed);
        Ok(Some(info))
    }

    /// Keeps what the kernel says of a new beginning for [`precopy_info`](Self::precopy_info): it may say so only once.
    fn ask(&self, stream: &File) -> io::Result<PrecopyInfo> {
        let info = self.face.precopy_info(stream)?;
        if info.reinit && self.tells_reinit.load(Ordering::Relaxed) {
            self.reinit.store(true, Ordering::Relaxed);
        }
        Ok(info)
    }

    fn stream(&self) -> Option<Arc<File>> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<File>>> {
        self.stream.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads a device's stream.
pub(super) struct Source {
    session: Arc<Session>,
    /// Bytes that this round may still read; `None` between rounds.
    left: Option<u64>,
}

impl Source {
    pub(super) fn new(session: Arc<Session>) -> Self {
        Self {
            session,
            left: None,
        }
    }

    /// Reads what the device had when the round began. What it makes meanwhile is for the next one, or a round might never end.
    fn read_in_round(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        // A device without PRE_COPY gives everything in the end.
        let Some(stream) = self.session.stream() else {
            return Ok(0);
        };
        let left = match self.left {
            Some(left) => left,
            None => {
                let info = self.session.ask(&stream)?;
                info.initial_bytes.saturating_add(info.dirty_bytes)
            }
        };
        let most = usize::try_from(left)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let read = match most {
            0 => 0,
            // The estimate was too high: drivers say so in either way.
            _ => match self.read_some(&stream, &mut buffer[..most]) {
                Err(error) if error.raw_os_error() == Some(libc::ENOMSG) => 0,
                answer => answer?,
            },
        };
        self.left = (read > 0).then(|| left - read as u64);
        Ok(read)
    }

    fn read_some(&self, stream: &File, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.session.face.read_stream(stream, buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                answer => return answer,
            }
        }
    }
}

impl DeviceSource for Source {
    fn read(&mut self, last: bool, buffer: &mut [u8]) -> io::Result<usize> {
        let stopped = self.session.stopped.load(Ordering::Acquire);
        // A device that is not in STOP_COPY may read as 0 although there is more to come: taken for the end, state would be lost.
        if stopped != last {
            let state = if stopped { "is" } else { "is not" };
            return Err(io::Error::other(format!(
                "the device {state} in STOP_COPY, which is for the last round and nothing else"
            )));
        }
        if !last {
            return self.read_in_round(buffer);
        }
        match self.session.stream() {
            Some(stream) => self.read_some(&stream, buffer),
            None => Err(io::Error::other("the device's stream is closed")),
        }
    }
}

/// Writes a device's stream.
pub(super) struct Sink {
    session: Arc<Session>,
}

impl Sink {
    pub(super) fn new(session: Arc<Session>) -> Self {
        Self { session }
    }

    fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        let Some(stream) = self.session.stream() else {
            return Err(io::Error::other("the device's stream is closed"));
        };
        while !bytes.is_empty() {
            match self.session.face.write_stream(&stream, bytes) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => bytes = bytes.get(written..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl DeviceSink for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let written = self.write_all(bytes);
        if written.is_err() {
            // The kernel need not remember that it refused a part.
            self.session.refused.store(true, Ordering::Release);
        }
        written
    }
}
