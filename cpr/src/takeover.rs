//! The taking process's side: judges an offer, receives the descriptors and says when it uses them, step by step.
//!
//! ```text
//! Offered --accept--> Arrived (first stage) --taken--> Ready --wait--> Arrived (second stage) --taken--> all is here
//! ```
//!
//! Each step consumes the one before it. All calls that wait block, until the other process has said something, has died, or a
//! deadline has passed. Whatever fails, descriptors that nobody has claimed are closed.

use std::os::fd::OwnedFd;
use std::time::Duration;

use vmferry_transport::units::MigrationId;

use crate::check::check;
use crate::handout::Clock;
use crate::manifest::{FdKind, Manifest};
use crate::message::{GiverMessage, HandOverError, TakerMessage};
use crate::socket::{CprSocket, RecvError};
use crate::table::{Accounts, FdTable};
use crate::take::{Taker, TakerAction, TakerDeadlines};

/// How long a message may wait for room in the socket.
const SEND_DEADLINE: Duration = Duration::from_secs(10);

#[derive(Debug)]
struct Conversation {
    core: Taker<OwnedFd>,
    socket: CprSocket,
    clock: Clock,
}

/// An offer was made and is to be judged.
#[derive(Debug)]
#[must_use = "accept or refuse it"]
pub struct Offered(Conversation);

/// The descriptors of a stage are here.
#[derive(Debug)]
#[must_use = "claim the descriptors and say that they are taken, or refuse"]
pub struct Arrived(Conversation);

/// The first stage is in use; the second comes when the guest was stopped.
#[derive(Debug)]
#[must_use = "wait for the second stage, or refuse"]
pub struct Ready(Conversation);

impl Offered {
    /// Waits for an offer on a new connection.
    ///
    /// # Errors
    /// [`HandOverError`]: nobody made an offer, or none that this build understands.
    pub fn receive(
        socket: CprSocket,
        software: &str,
        deadlines: TakerDeadlines,
    ) -> Result<Self, HandOverError> {
        let clock = Clock::new();
        let core = Taker::start(clock.now(), software.to_owned(), deadlines);
        let mut conversation = Conversation {
            core,
            socket,
            clock,
        };
        conversation.run()?;
        Ok(Self(conversation))
    }

    /// What is offered.
    pub fn manifest(&self) -> &Manifest {
        self.0.core.manifest()
    }

    /// Which migration it belongs to.
    pub fn id(&self) -> MigrationId {
        self.0.core.id()
    }

    /// The software of the other process.
    pub fn peer_software(&self) -> &str {
        self.0.core.peer_software()
    }

    /// It fits: receives the first stage.
    ///
    /// # Errors
    /// [`HandOverError`]; everything that came is closed.
    pub fn accept(self) -> Result<Arrived, HandOverError> {
        let Self(mut conversation) = self;
        let now = conversation.clock.now();
        conversation.core.accept(now);
        conversation.run()?;
        Ok(Arrived(conversation))
    }

    /// It does not fit.
    pub fn refuse(self, reason: &str) {
        self.0.refuse(reason);
    }
}

impl Arrived {
    /// Takes a descriptor.
    ///
    /// # Errors
    /// As [`FdTable::claim`].
    pub fn claim(
        &mut self,
        name: &str,
        role: &str,
        kind: FdKind,
    ) -> Result<OwnedFd, HandOverError> {
        self.table().claim(name, role, kind)
    }

    /// All descriptors, for looking at them and claiming them.
    pub fn table(&mut self) -> &mut FdTable<OwnedFd> {
        self.0.core.table()
    }

    /// The descriptors of the stage are in use. After the first stage the second is to be waited for; after the second, all is here and
    /// the socket is closed.
    ///
    /// # Errors
    /// [`HandOverError::Descriptor`] if one was not claimed; or the giver has given up meanwhile.
    pub fn taken(self) -> Result<Ready, HandOverError> {
        let Self(mut conversation) = self;
        let now = conversation.clock.now();
        let taken = conversation.core.taken(now);
        if taken.is_err() {
            // The giver is to hear of it.
            let _ = conversation.act();
        }
        taken?;
        conversation.act()?;
        Ok(Ready(conversation))
    }

    /// They cannot be used.
    pub fn refuse(self, reason: &str) {
        self.0.refuse(reason);
    }
}

impl Ready {
    /// Waits for the second stage: until the guest at the other process was stopped, so without a deadline. Ends when the giver gives up or
    /// dies, or the socket's [`Interrupter`](crate::socket::Interrupter) is used.
    ///
    /// # Errors
    /// [`HandOverError`]; everything that came is closed.
    pub fn wait(self) -> Result<Arrived, HandOverError> {
        let Self(mut conversation) = self;
        conversation.run()?;
        Ok(Arrived(conversation))
    }

    /// Whether the second stage is in use as well, so that nothing more comes.
    pub fn is_done(&self) -> bool {
        self.0.core.is_done()
    }

    /// What became of the descriptors.
    pub fn accounts(&self) -> Accounts {
        self.0.core.accounts()
    }

    /// This process cannot go on.
    pub fn refuse(self, reason: &str) {
        self.0.refuse(reason);
    }
}

impl Conversation {
    fn refuse(mut self, reason: &str) {
        self.core.refuse(reason);
        // The core has been told to fail.
        let _ = self.act();
    }

    /// Until there is something for the owner to do.
    fn run(&mut self) -> Result<(), HandOverError> {
        loop {
            if self.act()? {
                return Ok(());
            }
            if self.core.is_over() {
                let text = "nothing more comes in this hand-over";
                return Err(HandOverError::Protocol(text.to_owned()));
            }
            let within = self.clock.until(self.core.poll_timeout());
            match self.socket.recv::<GiverMessage>(within) {
                Ok((message, fds)) => self.received(message, fds),
                Err(error) => self.failed(&error),
            }
        }
    }

    /// Carries out what the core asks for; whether the owner has something to do.
    fn act(&mut self) -> Result<bool, HandOverError> {
        while let Some(action) = self.core.poll_action() {
            match action {
                TakerAction::Judge | TakerAction::Arrived(_) => return Ok(true),
                TakerAction::Failed(error) => return Err(error),
                TakerAction::Send(message) => self.send(&message),
            }
        }
        Ok(false)
    }

    fn received(&mut self, message: GiverMessage, fds: Vec<OwnedFd>) {
        if let GiverMessage::Fds { first, .. } = message {
            let entries = self.core.manifest().entries();
            let announced = entries.get(first as usize..).unwrap_or_default();
            let mut pairs = (first as usize..).zip(announced.iter().zip(&fds));
            let bad = pairs.find_map(|(at, (entry, fd))| Some((at, check(entry, fd).err()?)));
            if let Some((at, reason)) = bad {
                return self.core.handle_bad_descriptor(at, &reason);
            }
        }
        self.core.handle_message(self.clock.now(), message, fds);
    }

    fn send(&mut self, message: &TakerMessage) {
        if let Err(error) = self.socket.send(&message.encode(), &[], SEND_DEADLINE) {
            self.failed(&error);
        }
    }

    fn failed(&mut self, error: &RecvError) {
        match error {
            RecvError::Lost(text) => self.core.handle_lost(text),
            RecvError::Garbage(text) => self.core.handle_garbage(text),
            RecvError::TimedOut => self.core.handle_timeout(self.clock.now()),
        }
    }
}
