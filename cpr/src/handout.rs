//! The giving process's side: puts a manifest together and hands the descriptors over, step by step.
//!
//! Each step consumes the one before it, so the order cannot be wrong: [`Handout::offer`] gives a [`Prepared`], which is all that can
//! let the second stage leave. All calls block until the other process has answered or a deadline has passed; run them on a thread of
//! their own, and end a wait with the [`Interrupter`](crate::socket::Interrupter) of the socket.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use rustix::fs::{SealFlags, fcntl_get_seals};
use vmferry_transport::units::{MigrationId, Moment};

use crate::CprError;
use crate::check::file_id;
use crate::give::{Giver, GiverAction, GiverDeadlines};
use crate::manifest::{FdEntry, FdKind, Manifest, ManifestError, Stage};
use crate::message::{GiverMessage, HandOverError, TakerMessage};
use crate::socket::{CprSocket, RecvError};

/// How long a message may wait for room in the socket.
const SEND_DEADLINE: Duration = Duration::from_secs(10);

/// A driver's clock: microseconds since it was made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock(Instant);

impl Clock {
    #[expect(
        clippy::disallowed_methods,
        reason = "this is the driver whose clock it is"
    )]
    pub(crate) fn new() -> Self {
        Self(Instant::now())
    }

    pub(crate) fn now(self) -> Moment {
        Moment(u64::try_from(self.0.elapsed().as_micros()).unwrap_or(u64::MAX))
    }

    /// From now until a deadline.
    pub(crate) fn until(self, deadline: Option<Moment>) -> Option<Duration> {
        deadline.map(|at| Duration::from_micros(at.micros_since(self.now()).max(1)))
    }
}

/// Descriptors to hand over, with what is said of them. They are borrowed: this process keeps using its own.
#[derive(Debug, Default)]
pub struct Handout<'fd> {
    fds: Vec<(FdEntry, BorrowedFd<'fd>)>,
}

impl<'fd> Handout<'fd> {
    /// An empty one.
    pub fn new() -> Self {
        Self { fds: Vec::new() }
    }

    /// Adds a descriptor; `value` means what [`FdKind`] says, else 0. Names and roles are checked by [`offer`](Self::offer).
    ///
    /// # Errors
    /// [`CprError::Host`] if the kernel does not say which file it is.
    pub fn add(
        &mut self,
        (name, role): (&str, &str),
        kind: FdKind,
        stage: Stage,
        value: u64,
        fd: &'fd impl AsFd,
    ) -> Result<&mut Self, CprError> {
        let fd = fd.as_fd();
        let file = file_id(fd).map_err(|error| {
            CprError::host(format!("asking which file {name:?} {role:?} is"), error)
        })?;
        let entry = FdEntry {
            name: name.to_owned(),
            role: role.to_owned(),
            kind,
            stage,
            value,
            file,
        };
        self.fds.push((entry, fd));
        Ok(self)
    }

    /// Adds guest RAM, which leaves first: a memfd whose size is sealed, or a file in which it is shared.
    ///
    /// # Errors
    /// As [`add`](Self::add).
    pub fn add_ram(
        &mut self,
        block: &str,
        bytes: u64,
        ram: &'fd impl AsFd,
    ) -> Result<&mut Self, CprError> {
        let sealed = SealFlags::SHRINK | SealFlags::GROW;
        let kind = match fcntl_get_seals(ram) {
            Ok(seals) if seals.contains(sealed) => FdKind::RamMemfd,
            // Only files that live in memory know seals.
            _ => FdKind::RamFile,
        };
        self.add((block, "ram"), kind, Stage::Prepare, bytes, ram)
    }

    /// Number of descriptors.
    pub fn len(&self) -> usize {
        self.fds.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.fds.is_empty()
    }

    /// Checks the whole.
    ///
    /// # Errors
    /// [`ManifestError`], naming the entry that breaks a rule.
    pub fn manifest(&self) -> Result<Manifest, ManifestError> {
        Manifest::new(self.fds.iter().map(|(entry, _)| entry.clone()).collect())
    }

    /// The descriptors, in the order of the manifest.
    pub fn fds(&self) -> Vec<BorrowedFd<'fd>> {
        let mut fds: Vec<_> = self.fds.iter().collect();
        fds.sort_by_key(|(entry, _)| entry.stage);
        fds.into_iter().map(|(_, fd)| *fd).collect()
    }

    /// Offers everything and sends the first stage. Returns when the other process has built its machine from it. The guest runs all
    /// the while, and nothing with an owner leaves.
    ///
    /// # Errors
    /// [`HandOverError`]; nothing has changed here.
    pub fn offer(
        mut self,
        socket: CprSocket,
        id: MigrationId,
        software: &str,
        deadlines: GiverDeadlines,
    ) -> Result<Prepared<'fd>, HandOverError> {
        let manifest = self
            .manifest()
            .map_err(|error| HandOverError::GivenUp(error.to_string()))?;
        // As the manifest sorts them.
        self.fds.sort_by_key(|(entry, _)| entry.stage);
        let clock = Clock::new();
        let core = Giver::start(clock.now(), id, software.to_owned(), manifest, deadlines);
        let mut prepared = Prepared {
            core,
            socket,
            clock,
            fds: self.fds.into_iter().map(|(_, fd)| fd).collect(),
        };
        prepared.run()?;
        Ok(prepared)
    }
}

/// The other process is prepared; what has one owner is still here.
#[derive(Debug)]
#[must_use = "dropping it tells the other process that nothing will come"]
pub struct Prepared<'fd> {
    core: Giver,
    socket: CprSocket,
    clock: Clock,
    fds: Vec<BorrowedFd<'fd>>,
}

impl Prepared<'_> {
    /// The software of the other process.
    pub fn peer_software(&self) -> &str {
        self.core.peer_software()
    }

    /// Sends the second stage and returns when the other process uses it. Call it when the guest is stopped and every device has let go
    /// of what it owns. Afterwards the commit of the migration decides who goes on.
    ///
    /// # Errors
    /// [`HandOverError`]. The other process has closed its copies, or is about to: what this process has is still good.
    pub fn hand_over(mut self) -> Result<(), HandOverError> {
        self.core.hand_over(self.clock.now())?;
        self.run()
    }

    /// Tells the other process that nothing more will come, and why.
    pub fn give_up(mut self, reason: &str) {
        self.core.give_up(reason);
        // The core has been told to fail.
        let _ = self.run();
    }

    fn run(&mut self) -> Result<(), HandOverError> {
        loop {
            while let Some(action) = self.core.poll_action() {
                match action {
                    GiverAction::Prepared | GiverAction::Done => return Ok(()),
                    GiverAction::Failed(error) => return Err(error),
                    GiverAction::Send(message) => {
                        if let Err(error) = self.send(&message) {
                            self.failed(&error);
                        }
                    }
                }
            }
            let within = self.clock.until(self.core.poll_timeout());
            match self.socket.recv::<TakerMessage>(within) {
                Ok((message, _none)) => self.core.handle_message(self.clock.now(), message),
                Err(error) => self.failed(&error),
            }
        }
    }

    fn send(&mut self, message: &GiverMessage) -> Result<(), RecvError> {
        let fds = match message {
            GiverMessage::Fds { first, count } => {
                let first = *first as usize;
                &self.fds[first..first + *count as usize]
            }
            _ => &[],
        };
        self.socket.send(&message.encode(), fds, SEND_DEADLINE)
    }

    fn failed(&mut self, error: &RecvError) {
        match error {
            RecvError::Lost(text) => self.core.handle_lost(text),
            RecvError::Garbage(text) => self.core.handle_garbage(text),
            RecvError::TimedOut => {
                self.core.handle_timeout(self.clock.now());
                if self.core.poll_timeout().is_none() && !self.core.is_over() {
                    self.core.handle_lost("the other process takes nothing");
                }
            }
        }
    }
}
