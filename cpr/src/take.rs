//! The taking half of a hand-over: the process that is to run the guest next.
//!
//! ```text
//!  Waiting --OFFER--> Judging --accept()--> Receiving --taken()--> Prepared --FDS--> Receiving --taken()--> Done
//!     |                  |                     |  ^  STAGE            |                 |
//!     +------------------+---------------------+--+-------------------+-----------------+----> Failed (all closed)
//! ```
//!
//! A core without I/O. Everything that arrives is compared with the manifest of the offer; one descriptor too few, too many or out of
//! order ends the hand-over, closes everything that nobody has claimed, and tells the giver why. The owner claims descriptors from the
//! [table](FdTable) when a stage is complete and then says so with [`taken`](Taker::taken).

use std::collections::VecDeque;
use std::fmt;

use vmferry_transport::units::{MigrationId, Moment};

use crate::manifest::{Manifest, Stage};
use crate::message::{GiverMessage, HandOverError, Offer, TakerMessage, VERSIONS};
use crate::table::{Accounts, FdTable};

/// How long the taker waits for what, in microseconds.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct TakerDeadlines {
    /// From the connection to OFFER.
    pub offer_us: u64,
    /// Between two batches of descriptors of one stage.
    pub fds_us: u64,
}

impl Default for TakerDeadlines {
    fn default() -> Self {
        Self {
            offer_us: 10_000_000,
            fds_us: 10_000_000,
        }
    }
}

/// What the driver is to do.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum TakerAction {
    /// Send the message.
    Send(TakerMessage),
    /// Judge the manifest and answer with [`Taker::accept`] or [`Taker::refuse`].
    Judge,
    /// Every descriptor of the stage is in the table. Claim them, use them, and answer with [`Taker::taken`] or [`Taker::refuse`].
    Arrived(Stage),
    /// Close the socket; nothing has stayed open. The last action.
    Failed(HandOverError),
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum State {
    Waiting,
    Judging,
    Receiving(Stage),
    Using(Stage),
    Prepared,
    Done,
    Failed,
}

/// The taking half. See the [module documentation](self).
pub struct Taker<F> {
    software: String,
    deadlines: TakerDeadlines,
    state: State,
    since: Moment,
    id: MigrationId,
    peer: String,
    version: u16,
    table: FdTable<F>,
    /// Position of the next descriptor.
    next: usize,
    actions: VecDeque<TakerAction>,
}

impl<F> Taker<F> {
    /// Waits for an offer on a new connection.
    pub fn start(now: Moment, software: String, deadlines: TakerDeadlines) -> Self {
        Self {
            software,
            deadlines,
            state: State::Waiting,
            since: now,
            id: MigrationId::default(),
            peer: String::new(),
            version: VERSIONS.max,
            table: FdTable::new(Manifest::default()),
            next: 0,
            actions: VecDeque::new(),
        }
    }

    /// What to do next; call until `None`.
    #[must_use]
    pub fn poll_action(&mut self) -> Option<TakerAction> {
        self.actions.pop_front()
    }

    /// When [`handle_timeout`](Self::handle_timeout) must be called at the latest.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Moment> {
        self.waits_for()
            .map(|(micros, _)| self.since.plus_micros(micros))
    }

    /// What is offered. Empty before the offer.
    pub fn manifest(&self) -> &Manifest {
        self.table.manifest()
    }

    /// Which hand-over this is, once it was offered.
    pub fn id(&self) -> MigrationId {
        self.id
    }

    /// The software of the other process, once it has made its offer.
    pub fn peer_software(&self) -> &str {
        &self.peer
    }

    /// The descriptors that have arrived.
    pub fn table(&mut self) -> &mut FdTable<F> {
        &mut self.table
    }

    /// What became of the descriptors so far.
    pub fn accounts(&self) -> Accounts {
        self.table.accounts()
    }

    /// All is taken. The socket is not needed any more.
    pub fn is_done(&self) -> bool {
        self.state == State::Done
    }

    /// It has ended, well or not.
    pub fn is_over(&self) -> bool {
        matches!(self.state, State::Done | State::Failed)
    }

    /// The offer fits. Harmless when the giver has given up meanwhile.
    pub fn accept(&mut self, now: Moment) {
        if self.state == State::Judging {
            self.enter(now, State::Receiving(Stage::Prepare));
            let (version, software) = (self.version, self.software.clone());
            self.say(TakerMessage::Accept { version, software });
        }
    }

    /// The owner cannot go on. Everything that nobody has claimed is closed.
    pub fn refuse(&mut self, reason: &str) {
        self.fail(HandOverError::GivenUp(reason.to_owned()));
    }

    /// The owner uses the descriptors of the stage that has arrived. One that nobody wants is a mistake of somebody's: it is closed, and
    /// the hand-over fails.
    ///
    /// # Errors
    /// [`HandOverError::Descriptor`], naming the first that was not claimed; or that there is nothing to take any more.
    pub fn taken(&mut self, now: Moment) -> Result<(), HandOverError> {
        let State::Using(stage) = self.state else {
            let text = "there is nothing to take";
            return Err(HandOverError::Protocol(text.to_owned()));
        };
        let left = self.table.unclaimed(stage).next().cloned();
        if let Some(left) = left {
            let error = HandOverError::Descriptor {
                name: left.name,
                role: left.role,
                reason: "nobody in this process wants it".to_owned(),
            };
            self.fail(error.clone());
            return Err(error);
        }
        self.say(TakerMessage::Taken(stage));
        match stage {
            Stage::Prepare => self.enter(now, State::Prepared),
            Stage::HandOver => self.enter(now, State::Done),
        }
        Ok(())
    }

    /// The giver said something; `fds` came with it.
    pub fn handle_message(&mut self, now: Moment, message: GiverMessage, fds: Vec<F>) {
        if self.is_over() {
            return;
        }
        if !fds.is_empty() && !matches!(message, GiverMessage::Fds { .. }) {
            let text = format!("{} descriptors came with another message", fds.len());
            return self.fail(HandOverError::Protocol(text));
        }
        match (self.state, message) {
            (_, GiverMessage::GiveUp(reason)) => self.fail(HandOverError::Peer(reason)),
            (State::Waiting, GiverMessage::Offer(offer)) => self.offered(now, offer),
            (State::Prepared, message @ (GiverMessage::Fds { .. } | GiverMessage::Stage(_))) => {
                self.enter(now, State::Receiving(Stage::HandOver));
                self.handle_message(now, message, fds);
            }
            (State::Receiving(stage), GiverMessage::Fds { first, count }) => {
                self.receive(now, stage, first as usize, count as usize, fds);
            }
            (State::Receiving(stage), GiverMessage::Stage(sent)) => {
                let (end, next) = (self.manifest().range(stage).end, self.next);
                if sent != stage || next != end {
                    let text = format!(
                        "{sent:?} was said to be complete after {next} descriptors, expected was {stage:?} after {end}"
                    );
                    return self.fail(HandOverError::Protocol(text));
                }
                self.enter(now, State::Using(stage));
                self.actions.push_back(TakerAction::Arrived(stage));
            }
            (state, message) => {
                let name = match message {
                    GiverMessage::Offer(_) => "an offer",
                    GiverMessage::Fds { .. } => "descriptors",
                    GiverMessage::Stage(_) => "the end of a stage",
                    GiverMessage::GiveUp(_) => "an end",
                };
                let text = format!("{name} came in state {state:?}");
                self.fail(HandOverError::Protocol(text));
            }
        }
    }

    /// The driver looked at a descriptor and found that it is not what was announced.
    pub fn handle_bad_descriptor(&mut self, at: usize, reason: &str) {
        let entry = self.manifest().entries().get(at);
        let error = HandOverError::Descriptor {
            name: entry.map_or_else(String::new, |entry| entry.name.clone()),
            role: entry.map_or_else(String::new, |entry| entry.role.clone()),
            reason: reason.to_owned(),
        };
        self.fail(error);
    }

    /// The socket carries no conversation: what came cannot be read, or was cut by the kernel.
    pub fn handle_garbage(&mut self, error: &str) {
        self.fail(HandOverError::Protocol(error.to_owned()));
    }

    /// The socket has ended. After the last TAKEN that is as it should be.
    pub fn handle_lost(&mut self, error: &str) {
        self.fail(HandOverError::Link(error.to_owned()));
    }

    /// Time has passed. Call at [`poll_timeout`](Self::poll_timeout) or later.
    pub fn handle_timeout(&mut self, now: Moment) {
        if let Some((micros, what)) = self.waits_for()
            && now.micros_since(self.since) >= micros
        {
            let after_ms = micros / 1000;
            self.fail(HandOverError::Deadline { what, after_ms });
        }
    }

    fn waits_for(&self) -> Option<(u64, &'static str)> {
        match self.state {
            State::Waiting => Some((self.deadlines.offer_us, "make an offer")),
            State::Receiving(_) => Some((self.deadlines.fds_us, "send a descriptor")),
            // Here this side is at work, or the guest has not been stopped yet.
            State::Judging | State::Using(_) | State::Prepared | State::Done | State::Failed => {
                None
            }
        }
    }

    fn offered(&mut self, now: Moment, offer: Offer) {
        let Offer {
            versions,
            id,
            software,
            manifest,
        } = offer;
        self.peer = software;
        self.id = id;
        let Some(version) = VERSIONS.common(versions) else {
            let text = format!(
                "no common version of the hand-over: this side speaks {VERSIONS}, the giver {versions}"
            );
            return self.fail(HandOverError::GivenUp(text));
        };
        match manifest {
            Ok(manifest) => {
                self.version = version;
                self.table = FdTable::new(manifest);
                self.enter(now, State::Judging);
                self.actions.push_back(TakerAction::Judge);
            }
            Err(error) => self.fail(HandOverError::Protocol(error.to_string())),
        }
    }

    fn receive(&mut self, now: Moment, stage: Stage, first: usize, count: usize, fds: Vec<F>) {
        let end = self.manifest().range(stage).end;
        let fault = if fds.len() != count {
            Some(format!(
                "{count} descriptors were announced, {} came",
                fds.len()
            ))
        } else if first != self.next {
            Some(format!(
                "descriptor {first} came, expected was {}",
                self.next
            ))
        } else if count > end - first {
            Some(format!(
                "{count} descriptors came, {} are left in the stage",
                end - first
            ))
        } else {
            None
        };
        if let Some(fault) = fault {
            return self.fail(HandOverError::Protocol(fault));
        }
        for (at, fd) in (first..).zip(fds) {
            self.table.put(at, fd);
        }
        self.next += count;
        self.since = now;
    }

    fn say(&mut self, message: TakerMessage) {
        self.actions.push_back(TakerAction::Send(message));
    }

    fn fail(&mut self, error: HandOverError) {
        if self.is_over() {
            return;
        }
        self.state = State::Failed;
        self.actions.clear();
        self.table.close();
        if !matches!(error, HandOverError::Link(_) | HandOverError::Peer(_)) {
            let reason = match &error {
                HandOverError::GivenUp(reason) => reason.clone(),
                other => other.to_string(),
            };
            self.say(TakerMessage::Refuse(reason));
        }
        self.actions.push_back(TakerAction::Failed(error));
    }

    fn enter(&mut self, now: Moment, state: State) {
        self.state = state;
        self.since = now;
    }
}

impl<F> fmt::Debug for Taker<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Taker")
            .field("state", &self.state)
            .field("table", &self.table)
            .finish_non_exhaustive()
    }
}
