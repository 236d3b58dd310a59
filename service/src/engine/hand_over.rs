//! The source's part in an upgrade in place: offers the VM's descriptors to the new process, and hands the rest over when the guest is
//! stopped. A thread of its own holds the conversation, because every word of it may block.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError, mpsc};

use vmferry_cpr::give::GiverDeadlines;
use vmferry_cpr::handout::Handout;
use vmferry_cpr::manifest::FdKind;
use vmferry_cpr::message::HandOverError;
use vmferry_cpr::socket::{CprSocket, Interrupter};
use vmferry_transport::control::Address;
use vmferry_transport::limits::Deadlines;
use vmferry_transport::memory::GuestRam;
use vmferry_transport::proto::SourceJob;
use vmferry_transport::units::MigrationId;

use super::event::SourceEvent;
use super::outgoing::chain;
use super::software;
use crate::machine::heirloom::{DeviceFd, stage};

/// Role of RAM in the manifest; its name is the block's.
pub(super) const RAM: &str = "ram";
/// Name of what belongs to the process and not to a device.
pub(super) const PROCESS: &str = crate::succession::PROCESS;
/// Role of the listening socket of QMP.
pub(super) const QMP: &str = "qmp";
/// Role of the listening socket of the metrics.
pub(super) const METRICS: &str = "metrics";
/// Role of the standard output.
pub(super) const STDOUT: &str = "stdout";
/// Role of the standard error, where the log goes.
pub(super) const STDERR: &str = "stderr";

/// What leaves with the guest: duplicates, so that whoever owns the originals goes on using them until the commit.
#[derive(Debug, Default)]
pub(super) struct Heirlooms {
    ram: Vec<(String, u64, File)>,
    /// What is of devices, and of the process, which is called [`PROCESS`]; most of it leaves when the guest is stopped.
    rest: Vec<DeviceFd>,
}

impl Heirlooms {
    /// RAM.
    ///
    /// # Errors
    /// RAM without a file, or no descriptor is left.
    pub(super) fn of(ram: &GuestRam) -> io::Result<Self> {
        let mut this = Self::default();
        for block in ram.blocks() {
            let (file, offset) = block.file().ok_or(io::ErrorKind::Unsupported)?;
            if offset != 0 {
                return Err(io::ErrorKind::Unsupported.into());
            }
            let bytes = block.pages().to_bytes();
            this.ram
                .push((block.name().to_owned(), bytes, file.try_clone()?));
        }
        Ok(this)
    }

    /// The process's own output.
    ///
    /// # Errors
    /// No descriptor is left.
    pub(super) fn add_outputs(&mut self) -> io::Result<()> {
        self.add_output(STDOUT, io::stdout())?;
        self.add_output(STDERR, io::stderr())
    }

    /// Something else that belongs to the process.
    pub(super) fn add(&mut self, role: &'static str, kind: FdKind, fd: OwnedFd) {
        self.rest.push(DeviceFd {
            device: PROCESS.to_owned(),
            role: role.to_owned(),
            kind,
            value: 0,
            fd,
        });
    }

    /// Something of a device.
    pub(super) fn add_of_device(&mut self, fd: DeviceFd) {
        self.rest.push(fd);
    }

    /// A standard stream may be closed, or be something that cannot be written to.
    fn add_output(&mut self, role: &'static str, stream: impl AsFd) -> io::Result<()> {
        let writable = rustix::fs::fcntl_getfl(&stream).is_ok_and(|flags| {
            let mode = flags & rustix::fs::OFlags::ACCMODE;
            mode != rustix::fs::OFlags::RDONLY
        });
        if writable {
            self.add(role, FdKind::Log, stream.as_fd().try_clone_to_owned()?);
        }
        Ok(())
    }

    /// What the manifest is made of.
    pub(super) fn handout(&self) -> Result<Handout<'_>, vmferry_cpr::CprError> {
        let mut handout = Handout::new();
        for (block, bytes, file) in &self.ram {
            handout.add_ram(block, *bytes, file)?;
        }
        for one in &self.rest {
            let names = (one.device.as_str(), one.role.as_str());
            handout.add(names, one.kind, stage(one.kind), one.value, &one.fd)?;
        }
        Ok(handout)
    }
}

/// How the thread that waits on the socket is reached.
#[derive(Debug, Default)]
struct Line {
    /// Nothing more is to be said.
    closed: bool,
    /// Present while it waits for the new process.
    waiting: Option<Interrupter>,
}

impl Line {
    /// The thread is about to wait; false if it need not.
    fn wait(line: &Mutex<Self>, interrupter: Interrupter) -> bool {
        let mut line = line.lock().unwrap_or_else(PoisonError::into_inner);
        if line.closed {
            return false;
        }
        line.waiting = Some(interrupter);
        true
    }

    /// It waits no longer.
    fn rest(line: &Mutex<Self>) {
        line.lock().unwrap_or_else(PoisonError::into_inner).waiting = None;
    }
}

/// The conversation with the new process. Dropping or closing it before the hand-over tells that process that nothing will come.
pub(super) struct HandOver {
    address: Address,
    deadlines: GiverDeadlines,
    heirlooms: Option<Heirlooms>,
    go: Option<mpsc::Sender<()>>,
    line: Arc<Mutex<Line>>,
}

impl HandOver {
    /// To the process that listens at `address`, a unix socket.
    pub(super) fn new(address: Address, heirlooms: Heirlooms, deadlines: &Deadlines) -> Self {
        Self {
            address,
            deadlines: GiverDeadlines {
                accept_us: deadlines.hello_us,
                prepare_us: deadlines.ready_us,
                take_us: deadlines.hello_us,
            },
            heirlooms: Some(heirlooms),
            go: None,
            line: Arc::default(),
        }
    }

    /// Begins the conversation. Ends in [`SourceEvent::FdsOffered`] or a failed job.
    pub(super) fn offer(
        &mut self,
        id: MigrationId,
        report: impl Fn(SourceEvent) + Clone + Send + 'static,
    ) {
        let Some(heirlooms) = self.heirlooms.take() else {
            let text = "the descriptors were offered before".to_owned();
            return report(SourceEvent::JobFailed(SourceJob::OfferFds, text));
        };
        let without_thread = report.clone();
        let (go, may_go) = mpsc::channel();
        self.go = Some(go);
        let (address, deadlines) = (self.address.clone(), self.deadlines);
        let line = Arc::clone(&self.line);
        let talk = move || {
            let failed = |job, error: String| report(SourceEvent::JobFailed(job, error));
            let handout = match heirlooms.handout() {
                Ok(handout) => handout,
                Err(error) => return failed(SourceJob::OfferFds, chain(&error)),
            };
            let opened = open(&address).and_then(|socket| {
                let interrupter = socket.interrupter();
                if !Line::wait(&line, interrupter.clone()) {
                    return Err(HandOverError::GivenUp("the migration is over".to_owned()));
                }
                let prepared = handout.offer(socket, id, &software(), deadlines)?;
                Ok((prepared, interrupter))
            });
            Line::rest(&line);
            let (prepared, interrupter) = match opened {
                Ok(opened) => opened,
                Err(error) => {
                    return failed(SourceJob::OfferFds, format!("{address}: {error}"));
                }
            };
            tracing::debug!(
                software = prepared.peer_software(),
                "the new process is prepared"
            );
            report(SourceEvent::FdsOffered);
            // Ends without the word if the migration does.
            if may_go.recv().is_err() || !Line::wait(&line, interrupter) {
                return prepared.give_up("the migration has failed before the hand-over");
            }
            let handed = prepared.hand_over();
            Line::rest(&line);
            match handed {
                Ok(()) => report(SourceEvent::FdsHandedOver),
                Err(error) => failed(SourceJob::HandOverFds, format!("{address}: {error}")),
            }
        };
        if let Err(error) = std::thread::Builder::new()
            .name("vm-cpr".into())
            .spawn(talk)
        {
            let text = format!("no thread for the hand-over: {error}");
            without_thread(SourceEvent::JobFailed(SourceJob::OfferFds, text));
        }
    }

    /// The guest is stopped and everybody has let go: the rest may leave. Ends in [`SourceEvent::FdsHandedOver`] or a failed job.
    pub(super) fn hand_over(&mut self) {
        if let Some(go) = self.go.take() {
            // Fails only if the thread has reported its failure.
            let _ = go.send(());
        }
    }

    /// Nothing more is to be said.
    pub(super) fn close(&mut self) {
        self.go = None;
        let mut line = self.line.lock().unwrap_or_else(PoisonError::into_inner);
        line.closed = true;
        if let Some(interrupter) = line.waiting.take() {
            interrupter.interrupt();
        }
    }
}

impl Drop for HandOver {
    fn drop(&mut self) {
        self.close();
    }
}

impl fmt::Debug for HandOver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HandOver")
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

fn open(address: &Address) -> Result<CprSocket, HandOverError> {
    let Address::Unix { path } = address else {
        let text = "the channel cpr must be a unix socket";
        return Err(HandOverError::GivenUp(text.to_owned()));
    };
    let stream =
        UnixStream::connect(path).map_err(|error| HandOverError::Link(error.to_string()))?;
    CprSocket::new(stream).map_err(|error| HandOverError::GivenUp(chain(&error)))
}
