//! The giving half of a hand-over: the process that runs the guest.
//!
//! ```text
//!  Offered --ACCEPT--> Preparing --TAKEN(prepare)--> Prepared --hand_over()--> HandingOver --TAKEN(hand over)--> Done
//!     |                    |                            |                          |
//!     +--------------------+----------------------------+--------------------------+---> Failed
//! ```
//!
//! A core without I/O: it numbers descriptors and never holds one, so it cannot lose one. What it gives away stays open here; whether
//! this process goes on using it is decided by the commit of the migration, not by the hand-over. Descriptors of the second stage leave
//! only after [`hand_over`](Giver::hand_over), which the owner calls once the guest is stopped and everybody has let go. A failure at
//! any moment leaves this process with all it had.

use std::collections::VecDeque;

use vmferry_transport::units::{MigrationId, Moment};

use crate::manifest::{Manifest, Stage};
use crate::message::{BATCH_MAX, GiverMessage, HandOverError, Offer, TakerMessage, VERSIONS};

/// How long the giver waits for what, in microseconds.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct GiverDeadlines {
    /// From OFFER to ACCEPT: the new process has just been started.
    pub accept_us: u64,
    /// From the last descriptor of the first stage to TAKEN: the new process maps memory and builds its machine. The guest runs.
    pub prepare_us: u64,
    /// The same for the second stage. The guest is stopped.
    pub take_us: u64,
}

impl Default for GiverDeadlines {
    fn default() -> Self {
        Self {
            accept_us: 10_000_000,
            prepare_us: 60_000_000,
            take_us: 10_000_000,
        }
    }
}

/// What the driver is to do.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum GiverAction {
    /// Send the message; with FDS, the descriptors at the named positions of the manifest and no others.
    Send(GiverMessage),
    /// The new process uses the descriptors of the first stage and waits for the second.
    Prepared,
    /// The new process has everything. The last action.
    Done,
    /// Close the socket. The last action.
    Failed(HandOverError),
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum State {
    Offered,
    Preparing,
    Prepared,
    HandingOver,
    Done,
    Failed,
}

/// The giving half. See the [module documentation](self).
#[derive(Debug)]
pub struct Giver {
    manifest: Manifest,
    deadlines: GiverDeadlines,
    state: State,
    since: Moment,
    peer: String,
    actions: VecDeque<GiverAction>,
}

impl Giver {
    /// Offers what is in the manifest, for the migration `id`.
    pub fn start(
        now: Moment,
        id: MigrationId,
        software: String,
        manifest: Manifest,
        deadlines: GiverDeadlines,
    ) -> Self {
        let offer = Offer {
            versions: VERSIONS,
            id,
            software,
            manifest: Ok(manifest.clone()),
        };
        Self {
            manifest,
            deadlines,
            state: State::Offered,
            since: now,
            peer: String::new(),
            actions: [GiverAction::Send(GiverMessage::Offer(offer))].into(),
        }
    }

    /// What to do next; call until `None`.
    #[must_use]
    pub fn poll_action(&mut self) -> Option<GiverAction> {
        self.actions.pop_front()
    }

    /// When [`handle_timeout`](Self::handle_timeout) must be called at the latest.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Moment> {
        self.waits_for()
            .map(|(micros, _)| self.since.plus_micros(micros))
    }

    /// The software of the new process, once it has accepted.
    pub fn peer_software(&self) -> &str {
        &self.peer
    }

    /// The new process is prepared, and nothing with an owner has left.
    pub fn is_prepared(&self) -> bool {
        self.state == State::Prepared
    }

    /// It has ended, well or not.
    pub fn is_over(&self) -> bool {
        matches!(self.state, State::Done | State::Failed)
    }

    /// Lets the second stage leave. The guest is stopped, and nobody in this process uses the descriptors any more.
    ///
    /// # Errors
    /// Why nothing may leave: the new process is not prepared, or has given up meanwhile.
    pub fn hand_over(&mut self, now: Moment) -> Result<(), HandOverError> {
        if self.state != State::Prepared {
            let text = "the new process is not prepared for the hand-over";
            return Err(HandOverError::Protocol(text.to_owned()));
        }
        self.enter(now, State::HandingOver);
        self.send_stage(Stage::HandOver);
        Ok(())
    }

    /// The owner gives up. Harmless when it is over.
    pub fn give_up(&mut self, reason: &str) {
        self.fail(HandOverError::GivenUp(reason.to_owned()));
    }

    /// The new process said something.
    pub fn handle_message(&mut self, now: Moment, message: TakerMessage) {
        match (self.state, message) {
            (State::Done | State::Failed, _) => {}
            (_, TakerMessage::Refuse(reason)) => self.fail(HandOverError::Peer(reason)),
            (State::Offered, TakerMessage::Accept { version, software }) => {
                if !(VERSIONS.min..=VERSIONS.max).contains(&version) {
                    let text = format!("it chose version {version}, offered was {VERSIONS}");
                    return self.fail(HandOverError::Protocol(text));
                }
                self.peer = software;
                self.enter(now, State::Preparing);
                self.send_stage(Stage::Prepare);
            }
            (State::Preparing, TakerMessage::Taken(Stage::Prepare)) => {
                self.enter(now, State::Prepared);
                self.actions.push_back(GiverAction::Prepared);
            }
            (State::HandingOver, TakerMessage::Taken(Stage::HandOver)) => {
                self.enter(now, State::Done);
                self.actions.push_back(GiverAction::Done);
            }
            (state, message) => {
                let text = format!("unexpected {message:?} in state {state:?}");
                self.fail(HandOverError::Protocol(text));
            }
        }
    }

    /// The socket carries no conversation: what came cannot be read.
    pub fn handle_garbage(&mut self, error: &str) {
        self.fail(HandOverError::Protocol(error.to_owned()));
    }

    /// The socket has ended. After the last TAKEN nothing depends on it any more.
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
            State::Offered => Some((self.deadlines.accept_us, "answer the offer")),
            State::Preparing => Some((self.deadlines.prepare_us, "prepare itself")),
            State::HandingOver => Some((self.deadlines.take_us, "take the descriptors")),
            // Until the guest is stopped, which has no deadline of ours.
            State::Prepared | State::Done | State::Failed => None,
        }
    }

    fn send_stage(&mut self, stage: Stage) {
        let range = self.manifest.range(stage);
        let mut first = range.start;
        while first < range.end {
            let count = (range.end - first).min(BATCH_MAX);
            self.actions.push_back(GiverAction::Send(GiverMessage::Fds {
                first: number(first),
                count: number(count),
            }));
            first += count;
        }
        self.actions
            .push_back(GiverAction::Send(GiverMessage::Stage(stage)));
    }

    fn fail(&mut self, error: HandOverError) {
        if self.is_over() {
            return;
        }
        self.state = State::Failed;
        // Descriptors that were not sent yet stay here.
        self.actions.clear();
        if !matches!(error, HandOverError::Link(_) | HandOverError::Peer(_)) {
            let reason = match &error {
                HandOverError::GivenUp(reason) => reason.clone(),
                other => other.to_string(),
            };
            self.actions
                .push_back(GiverAction::Send(GiverMessage::GiveUp(reason)));
        }
        self.actions.push_back(GiverAction::Failed(error));
    }

    fn enter(&mut self, now: Moment, state: State) {
        self.state = state;
        self.since = now;
    }
}

/// A manifest has far fewer entries than a u32 can count.
fn number(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}
