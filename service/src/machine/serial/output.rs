//! Where the serial port's output goes, and how it goes on in another process.
//!
//! A thread of its own writes it, so that a terminal that does not read cannot keep a vCPU from pausing. What waits to be written belongs to
//! the port and not to the thread: it waits until the descriptor has room for it, so that the thread is never in the middle of bytes for
//! long.
//!
//! In an upgrade in place the bytes that wait go along. When the guest is stopped the old process stops writing (`SerialNotifier`, SETUP)
//! and puts what waits into a memfd, which leaves with the other descriptors; the new one begins to write when the guest runs there. So
//! every byte is written once, in order, whoever reads how slowly.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use vmferry_cpr::manifest::{FdEntry, FdKind};
use vmferry_cpr::memfd;
use vmferry_devices::DeviceError;
use vmferry_devices::notifier::{Mode, Notifier, Setup};
use vmferry_transport::units::MigrationId;

use crate::machine::heirloom::{DeviceFd, claim};
use crate::machine::{MachineError, SerialSink};

/// Most bytes of output that wait for the sink. What comes while they wait is lost, as on a line without flow control.
const QUEUED_BYTES_MAX: usize = 64 << 10;
/// Most bytes that are written at a time: not more than every pipe and terminal with room takes at once.
const CHUNK_BYTES: usize = 256;
/// How long a chunk may take whose descriptor had room for it.
const HOLD_DEADLINE: Duration = Duration::from_secs(2);
/// Role of the file that is written.
const OUTPUT: &str = "output";
/// Role of the memfd with the bytes that wait: their number, eight bytes, and themselves.
const WAITING: &str = "waiting";
const WAITING_AT: u64 = 8;
/// Bytes of that memfd, whole pages.
const WAITING_BYTES: u64 = (QUEUED_BYTES_MAX as u64) + 4096;

/// Whether a port called `device` that writes to `sink` expects this descriptor of another process.
pub fn expects(device: &str, sink: &SerialSink, entry: &FdEntry) -> bool {
    entry.name == device
        && match (entry.kind, entry.role.as_str()) {
            (FdKind::Log, OUTPUT) => matches!(sink, SerialSink::File(_)),
            (FdKind::Other, WAITING) => *sink != SerialSink::Null,
            _ => false,
        }
}

/// The sink of a port called `device` in a process that was promised `entries` by another one: a file is not opened again.
pub fn inherited(device: &str, sink: &SerialSink, entries: &[FdEntry]) -> SerialSink {
    let comes = entries
        .iter()
        .any(|entry| entry.name == device && entry.role == OUTPUT);
    match sink {
        SerialSink::File(_) if comes => SerialSink::Inherited,
        sink => sink.clone(),
    }
}

/// What bytes are written to.
#[derive(Clone, Debug)]
enum Sink {
    /// Whatever standard output is at the time.
    Stdout,
    File(Arc<File>),
    /// The file of another process, which has not come yet.
    Coming,
    /// It cannot be written to any more.
    Broken,
}

impl Sink {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Stdout => Some(rustix::stdio::stdout()),
            Self::File(file) => Some(file.as_fd()),
            Self::Coming | Self::Broken => None,
        }
    }
}

#[derive(Debug)]
struct State {
    queue: VecDeque<u8>,
    sink: Sink,
    /// Nothing is written before the guest has run here, and while it is handed over.
    held: bool,
    /// The thread has taken bytes out and writes them.
    writing: bool,
    /// The port is gone.
    closed: bool,
    /// Where bytes that wait are left for another process.
    heir: Option<File>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for bytes that may be written; `None` when there will be none.
    fn next(&self) -> Option<Sink> {
        let waits = |state: &mut State| {
            !state.closed && (state.held || state.queue.is_empty() || state.sink.fd().is_none())
        };
        let state = self.changed.wait_while(self.lock(), waits);
        let state = state.unwrap_or_else(PoisonError::into_inner);
        let more = !state.held && !state.queue.is_empty() && state.sink.fd().is_some();
        more.then(|| state.sink.clone())
    }

    /// Writes the next bytes to `sink`, which has room for some, if they still may be written.
    fn write_some(&self, sink: &Sink) {
        let mut chunk = [0; CHUNK_BYTES];
        let mut state = self.lock();
        if state.held {
            return;
        }
        let count = state.queue.len().min(chunk.len());
        for (to, from) in chunk.iter_mut().zip(state.queue.drain(..count)) {
            *to = from;
        }
        state.writing = true;
        drop(state);
        let written = match sink.fd() {
            Some(fd) => rustix::io::write(fd, &chunk[..count]),
            None => Ok(0),
        };
        let mut state = self.lock();
        state.writing = false;
        let done = match written {
            Ok(done) => done,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => 0,
            Err(error) => {
                tracing::warn!(%error, "serial output lost");
                state.sink = Sink::Broken;
                state.queue.clear();
                count
            }
        };
        for byte in chunk[done..count].iter().rev() {
            state.queue.push_front(*byte);
        }
        self.changed.notify_all();
    }

    fn write_out(&self) {
        while let Some(sink) = self.next() {
            let Some(fd) = sink.fd() else { return };
            // For as long as nobody reads. What is not there for polling can be written to.
            let _ready = poll(&mut [PollFd::new(&fd, PollFlags::OUT)], None);
            self.write_some(&sink);
        }
    }

    /// Stops writing; what waits then stays.
    fn hold(&self) -> io::Result<MutexGuard<'_, State>> {
        let mut state = self.lock();
        state.held = true;
        let waited = self
            .changed
            .wait_timeout_while(state, HOLD_DEADLINE, |state| state.writing);
        let (mut state, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        if timeout.timed_out() {
            state.held = false;
            self.changed.notify_all();
            let reason = "it is in the middle of bytes that nobody reads";
            return Err(io::Error::new(io::ErrorKind::TimedOut, reason));
        }
        Ok(state)
    }

    fn go_on(&self) {
        let mut state = self.lock();
        state.held = false;
        state.heir = None;
        self.changed.notify_all();
    }
}

/// The port's end of the output. Nothing is written before [`go_on`](Self::go_on). The thread ends after the last of them, when what waited is
/// written.
#[derive(Debug)]
pub(super) struct SerialOutput(Option<Arc<Shared>>);

impl SerialOutput {
    /// # Errors
    /// The file cannot be opened.
    pub(super) fn open(sink: &SerialSink) -> Result<Self, MachineError> {
        let sink = match sink {
            SerialSink::Null => return Ok(Self(None)),
            SerialSink::Stdio => Sink::Stdout,
            SerialSink::Inherited => Sink::Coming,
            SerialSink::File(path) => {
                let file = OpenOptions::new().create(true).append(true).open(path);
                Sink::File(Arc::new(file.map_err(|source| MachineError::Host {
                    op: format!("open {} for the serial port", path.display()),
                    source,
                })?))
            }
        };
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                queue: VecDeque::new(),
                sink,
                held: true,
                writing: false,
                closed: false,
                heir: None,
            }),
            changed: Condvar::new(),
        });
        let writes = Arc::clone(&shared);
        thread::Builder::new()
            .name("serial".to_owned())
            .spawn(move || writes.write_out())
            .map_err(|source| MachineError::Host {
                op: "start the serial port's thread".to_owned(),
                source,
            })?;
        Ok(Self(Some(shared)))
    }

    /// Another end of the same output, for registers, which are replaced when state is loaded.
    pub(super) fn writer(&self) -> SerialWriter {
        SerialWriter(self.0.clone())
    }

    /// The guest runs here, or is about to.
    pub(super) fn go_on(&self) {
        if let Some(shared) = &self.0 {
            shared.go_on();
        }
    }

    /// What a process that takes the guest over in place must have of the output of `device`.
    ///
    /// # Errors
    /// No descriptor is left.
    pub(super) fn heirlooms(&self, device: &str) -> io::Result<Vec<DeviceFd>> {
        let Some(shared) = &self.0 else {
            return Ok(Vec::new());
        };
        let heirloom = |role: &str, kind, file: &File| {
            Ok::<_, io::Error>(DeviceFd {
                device: device.to_owned(),
                role: role.to_owned(),
                kind,
                value: 0,
                fd: file.as_fd().try_clone_to_owned()?,
            })
        };
        let heir = memfd::create_ram("serial", WAITING_BYTES).map_err(io::Error::other)?;
        let mut all = vec![heirloom(WAITING, FdKind::Other, &heir)?];
        let mut state = shared.lock();
        if let Sink::File(file) = &state.sink {
            all.push(heirloom(OUTPUT, FdKind::Log, file)?);
        }
        state.heir = Some(heir);
        Ok(all)
    }

    /// Takes over what another process has written to, and what it had left to write.
    ///
    /// # Errors
    /// The file is missing, or what is left makes no sense.
    pub(super) fn take_over(
        &self,
        device: &str,
        fds: &mut Vec<DeviceFd>,
    ) -> Result<(), DeviceError> {
        let Some(shared) = &self.0 else {
            return Ok(());
        };
        let mut state = shared.lock();
        if matches!(state.sink, Sink::Coming) {
            let file = claim(fds, device, OUTPUT, FdKind::Log)?;
            state.sink = Sink::File(Arc::new(file.into()));
        }
        if fds
            .iter()
            .any(|fd| fd.device == device && fd.role == WAITING)
        {
            let left = claim(fds, device, WAITING, FdKind::Other)?;
            let left = read_left(&left.into()).map_err(|error| DeviceError::BadState {
                device: device.to_owned(),
                reason: format!("its bytes that wait: {error}"),
            })?;
            state.queue.extend(left);
        }
        Ok(())
    }

    /// What holds the output of `device` while the guest is handed over.
    pub(super) fn notifier(&self, device: &str) -> Option<Box<dyn Notifier>> {
        let shared = Arc::clone(self.0.as_ref()?);
        Some(Box::new(SerialNotifier {
            name: device.to_owned(),
            shared,
            held: false,
        }))
    }
}

impl Drop for SerialOutput {
    fn drop(&mut self) {
        if let Some(shared) = &self.0 {
            shared.lock().closed = true;
            shared.changed.notify_all();
        }
    }
}

/// Takes the guest's bytes. What there is no room for is lost.
#[derive(Debug)]
pub(super) struct SerialWriter(Option<Arc<Shared>>);

impl Write for SerialWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(shared) = &self.0 {
            let mut state = shared.lock();
            if !matches!(state.sink, Sink::Broken) {
                let room = QUEUED_BYTES_MAX.saturating_sub(state.queue.len());
                state.queue.extend(&bytes[..bytes.len().min(room)]);
                shared.changed.notify_all();
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn leave(heir: &File, queue: &VecDeque<u8>) -> io::Result<()> {
    let (one, other) = queue.as_slices();
    heir.write_all_at(one, WAITING_AT)?;
    heir.write_all_at(other, WAITING_AT + one.len() as u64)?;
    heir.write_all_at(&(queue.len() as u64).to_le_bytes(), 0)
}

fn read_left(heir: &File) -> io::Result<Vec<u8>> {
    let mut count = [0; 8];
    heir.read_exact_at(&mut count, 0)?;
    let count = usize::try_from(u64::from_le_bytes(count)).unwrap_or(usize::MAX);
    // A chunk that was given back may have come on top.
    if count > QUEUED_BYTES_MAX + CHUNK_BYTES {
        return Err(io::Error::other(format!("{count} of them")));
    }
    let mut left = vec![0; count];
    heir.read_exact_at(&mut left, WAITING_AT)?;
    Ok(left)
}

/// Holds the output while the guest is handed over in place.
struct SerialNotifier {
    name: String,
    shared: Arc<Shared>,
    held: bool,
}

impl Notifier for SerialNotifier {
    fn name(&self) -> &str {
        &self.name
    }

    fn setup(&mut self, setup: &Setup) -> Result<(), DeviceError> {
        if !matches!(setup.mode, Mode::CprTransfer | Mode::CprExec) {
            return Ok(());
        }
        let failed = |op: &str| {
            let (device, op) = (self.name.clone(), op.to_owned());
            move |source| DeviceError::Kernel { device, op, source }
        };
        let state = self
            .shared
            .hold()
            .map_err(failed("holding its output back"))?;
        self.held = true;
        match &state.heir {
            Some(heir) => leave(heir, &state.queue).map_err(failed("leaving its output behind")),
            None => Ok(()),
        }
    }

    fn done(&mut self) {
        self.held = false;
    }

    fn failed(&mut self) {
        if std::mem::take(&mut self.held) {
            self.shared.go_on();
        }
    }

    fn incoming_failed(&mut self, _: MigrationId) {}
}

#[cfg(test)]
mod tests;
