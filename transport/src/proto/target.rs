//! The target's half of a migration, from the first connection until the guest runs here or never will.
//!
//! ```text
//!  Listening -> AwaitData -> Preparing -> Receiving -> Loading -> Ready -> Starting -> Running
//!      ^            |            |            |           |         |         |
//!      |            v            v            v           v         v         v (start failed)
//!   (hello does not fit)         +------------+-- Failing --+-------+---------+
//!                                                   |
//!                                                 Failed
//! ```
//!
//! - **Listening**: a hello that does not fit is refused and changes nothing; the next one is welcome.
//! - **Receiving**: pages go from the data connections into memory; sections are collected. Loading begins when the last round is in
//!   its place and every section is here.
//! - **Ready**: everything is loaded. The guest still belongs to the source: if the link dies here, the attempt has failed, for good.
//! - **Starting**: COMMIT was read. From here on the guest belongs to the target.
//! - **Failed**: the target never starts this guest. That promise is what an answer to RESOLVE rests on, so a COMMIT that arrives
//!   later is ignored (I1).

use std::collections::VecDeque;

use crate::limits::{CONNECT_DEADLINE_US, KEEPALIVE_US, SECTIONS_BYTES_MAX, STALL_US};
use crate::units::{MigrationId, Moment, RoundId};
use crate::wire::frame::{
    Abort, AbortCode, Ready, Resolution, SourceFrame, StateEnd, TargetFrame, Verification,
};
use crate::wire::hello::{BlockInfo, DataHello, Hello, HelloReply, VersionRange, compare};
use crate::wire::{DeviceSchema, Section};

/// Attempts that failed and may still be asked about. A source asks within a minute; the list is short because attempts are not.
const REMEMBERED_MAX: usize = 64;

/// Connections that may ask for the outcome of one attempt at the same time. A source uses one; the others are leftovers of its
/// earlier tries.
const ASKERS_MAX: usize = 16;

/// A connection, as the driver numbers them. A number is never used twice.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Connection(pub u64);

/// What this side is made of.
#[derive(Clone, Debug)]
pub struct TargetConfig {
    /// RAM blocks.
    pub blocks: Vec<BlockInfo>,
    /// Devices and the versions they load.
    pub devices: Vec<DeviceSchema>,
    /// Name and version of this software.
    pub software: String,
}

/// Status of an incoming migration; the names are QEMU's.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum TargetStatus {
    /// Nothing has arrived.
    #[default]
    None,
    /// A hello was accepted.
    Setup,
    /// Pages arrive.
    Active,
    /// The guest belongs to this side.
    Completed,
    /// Something went wrong, cleanup is under way.
    Failing,
    /// The guest will never run here.
    Failed,
}

impl TargetStatus {
    /// The name in QMP.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Setup => "setup",
            Self::Active => "active",
            Self::Completed => "completed",
            Self::Failing => "failing",
            Self::Failed => "failed",
        }
    }
}

/// Something that takes time and reports back exactly once.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum TargetJob {
    /// Preparing memory and starting the data threads.
    Prepare,
    /// Loading device state.
    Load,
    /// Letting the guest run.
    StartGuest,
    /// Closing all links of the attempt and ending the data threads.
    CloseLinks,
}

/// What the driver is to do.
#[derive(Debug)]
pub enum TargetAction {
    /// Tell everybody: the status is now this.
    StatusChanged(TargetStatus),
    /// Send on a control connection.
    Send(Connection, TargetFrame),
    /// Close a control connection when everything given to `Send` has left.
    Close(Connection),
    /// This connection carries pages from now on; it is number `index` of them.
    AdoptData {
        /// The connection.
        connection: Connection,
        /// Its number.
        index: u16,
    },
    /// Job [`TargetJob::Prepare`]: start receiving on all adopted connections. Reports [`Target::handle_prepared`].
    Prepare,
    /// Job [`TargetJob::Load`]: load all device state. Reports [`Target::handle_loaded`].
    Load {
        /// One section per device.
        sections: Vec<Section>,
        /// Hash all RAM and read the state back.
        verify: bool,
    },
    /// Job [`TargetJob::StartGuest`]: the guest belongs to this side. Reports [`Target::handle_guest_started`].
    StartGuest {
        /// It ran at the source and is to run here.
        run: bool,
    },
    /// Job [`TargetJob::CloseLinks`]: end the data threads, close the data connections and the control connection of the attempt,
    /// [`Target::control`], and no other: somebody may be asking on another. Reports [`Target::handle_links_closed`].
    CloseLinks,
    /// The attempt has failed and everything is cleaned up.
    Failed {
        /// Why.
        error: TargetError,
        /// READY was sent, so the source may be in doubt: stay reachable for a while.
        linger: bool,
    },
    /// The source knows that the guest is here: nobody will ask any more.
    Settled,
}

/// Why an attempt failed at this side.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum TargetError {
    /// The source gave up and said why.
    #[error("the source gave up: {}", .0.reason)]
    Source(Abort),
    /// The link failed.
    #[error("migration link: {0}")]
    Link(String),
    /// The source broke the protocol.
    #[error("the source broke the protocol: {0}")]
    Protocol(String),
    /// Something failed on this host. The code is what the source is told.
    #[error("{1}")]
    Local(AbortCode, String),
}

impl TargetError {
    fn to_abort(&self) -> Abort {
        let code = match self {
            Self::Source(abort) => abort.code,
            Self::Link(_) => AbortCode::Resources,
            Self::Protocol(_) => AbortCode::Protocol,
            Self::Local(code, _) => *code,
        };
        Abort::new(code, self.to_string())
    }
}

/// What loading has found.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// How long it took, in microseconds, without verification.
    pub load_us: u64,
    /// Bytes of RAM that are populated.
    pub populated_bytes: u64,
    /// Present if it was asked for.
    pub verification: Option<Verification>,
}

/// An attempt that was accepted.
#[derive(Debug)]
struct Attempt {
    id: MigrationId,
    control: Connection,
    version: u16,
    verify: bool,
    joined: Vec<bool>,
    sections: Vec<Section>,
    section_bytes: u64,
    announced: Option<RoundId>,
    last_placed: Option<RoundId>,
    end: Option<StateEnd>,
    guest_runs: bool,
    /// Connections that asked for the outcome after COMMIT. Those that came while the guest was starting still wait for the answer.
    askers: VecDeque<Connection>,
    /// The source has said that it knows the outcome.
    settled: bool,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Phase {
    Listening,
    AwaitData,
    Preparing,
    Receiving,
    Loading,
    Ready,
    Starting,
    Running,
    Failing { linger: bool },
    Failed,
}

impl Phase {
    fn name(self) -> &'static str {
        match self {
            Self::Listening => "listening",
            Self::AwaitData => "waiting for data connections",
            Self::Preparing => "preparing",
            Self::Receiving => "receiving",
            Self::Loading => "loading",
            Self::Ready => "waiting for COMMIT",
            Self::Starting => "starting the guest",
            Self::Running => "running the guest",
            Self::Failing { .. } => "failing",
            Self::Failed => "failed",
        }
    }

    fn before_commit(self) -> bool {
        matches!(
            self,
            Self::AwaitData | Self::Preparing | Self::Receiving | Self::Loading | Self::Ready
        )
    }
}

/// The target's half of a migration. See the module documentation.
#[derive(Debug)]
pub struct Target {
    config: TargetConfig,
    status: TargetStatus,
    phase: Phase,
    attempt: Option<Attempt>,
    error: Option<TargetError>,
    jobs: Vec<TargetJob>,
    actions: VecDeque<TargetAction>,
    /// Attempts that failed here: each is answered with "not committed".
    refused: VecDeque<MigrationId>,
    entered_at: Moment,
    heard_at: Moment,
    said_at: Moment,
    control_open: bool,
}

impl Target {
    /// A target that waits for its first connection.
    pub fn new(config: TargetConfig) -> Self {
        Self {
            config,
            status: TargetStatus::None,
            phase: Phase::Listening,
            attempt: None,
            error: None,
            jobs: Vec::new(),
            actions: VecDeque::new(),
            refused: VecDeque::new(),
            entered_at: Moment::default(),
            heard_at: Moment::default(),
            said_at: Moment::default(),
            control_open: false,
        }
    }

    /// The status.
    pub fn status(&self) -> TargetStatus {
        self.status
    }

    /// Why the attempt failed, once it has.
    pub fn error(&self) -> Option<&TargetError> {
        self.error.as_ref()
    }

    /// The control connection of the attempt that was accepted last.
    pub fn control(&self) -> Option<Connection> {
        self.attempt.as_ref().map(|attempt| attempt.control)
    }

    /// What to do next; call until `None`.
    #[must_use]
    pub fn poll_action(&mut self) -> Option<TargetAction> {
        self.actions.pop_front()
    }

    /// When [`handle_timeout`](Self::handle_timeout) must be called at the latest.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Moment> {
        let joining = (self.phase == Phase::AwaitData)
            .then(|| self.entered_at.plus_micros(CONNECT_DEADLINE_US));
        let silence = self
            .phase
            .before_commit()
            .then(|| self.heard_at.plus_micros(STALL_US));
        let keepalive = self
            .keeps_alive()
            .then(|| self.said_at.plus_micros(KEEPALIVE_US));
        [joining, silence, keepalive].into_iter().flatten().min()
    }

    /// The first frame of a new connection. Whatever it is, the connection is answered, adopted or closed.
    pub fn handle_first_frame(&mut self, now: Moment, connection: Connection, frame: SourceFrame) {
        match frame {
            SourceFrame::Hello(hello) => self.welcome(now, connection, hello),
            SourceFrame::DataHello(hello) => self.join(now, connection, hello),
            SourceFrame::Resolve(id) => self.answer(now, connection, id),
            _ => self.refuse(
                connection,
                AbortCode::Protocol,
                "a connection must begin with a hello",
            ),
        }
    }

    /// A later frame of a control connection.
    pub fn handle_frame(&mut self, now: Moment, connection: Connection, frame: SourceFrame) {
        if self
            .attempt
            .as_ref()
            .is_none_or(|attempt| attempt.control != connection)
        {
            // A connection that asked for an outcome says FINISH when it has the answer; nothing else is of interest.
            if frame == SourceFrame::Finish && self.asks(connection) {
                self.settle();
            }
            return;
        }
        self.heard_at = now;
        match (self.phase, frame) {
            (Phase::Failing { .. } | Phase::Failed | Phase::Listening, _)
            | (_, SourceFrame::Keepalive) => {}
            (Phase::Running, SourceFrame::Finish) => self.settle(),
            (Phase::Starting | Phase::Running, _) => {}
            (_, SourceFrame::Abort(abort)) => self.fail(now, TargetError::Source(abort)),
            (Phase::Receiving, SourceFrame::Switchover(round)) => self.announce(now, round),
            (Phase::Receiving, SourceFrame::Section(section)) => self.collect(now, section),
            (Phase::Receiving, SourceFrame::StateEnd(end)) => self.end_state(now, end),
            (Phase::Ready, SourceFrame::Commit) => self.commit(now),
            (phase, frame) => {
                let text = format!("unexpected {} while {}", frame_name(&frame), phase.name());
                self.fail(now, TargetError::Protocol(text));
            }
        }
    }

    /// A control connection broke, or carried bytes that are no frame (`protocol`).
    pub fn handle_connection_lost(
        &mut self,
        now: Moment,
        connection: Connection,
        error: &str,
        protocol: bool,
    ) {
        let Some(attempt) = &mut self.attempt else {
            return;
        };
        attempt.askers.retain(|asker| *asker != connection);
        if attempt.control != connection {
            return;
        }
        self.control_open = false;
        if self.phase.before_commit() {
            let text = error.to_owned();
            self.fail(
                now,
                if protocol {
                    TargetError::Protocol(text)
                } else {
                    TargetError::Link(text)
                },
            );
        }
    }

    /// A data connection failed.
    pub fn handle_data_failed(&mut self, now: Moment, error: TargetError) {
        if self.phase.before_commit() {
            self.fail(now, error);
        }
    }

    /// Memory is prepared and the data threads run.
    pub fn handle_prepared(&mut self, now: Moment) {
        self.end_job(TargetJob::Prepare);
        if self.phase == Phase::Preparing {
            self.enter(now, Phase::Receiving);
            self.set_status(TargetStatus::Active);
            self.send_control(now, TargetFrame::DataReady);
        }
        self.pay_debts();
    }

    /// Every page of a round is in its place, on all connections.
    pub fn handle_round_placed(&mut self, now: Moment, round: RoundId, last: bool) {
        if self.phase != Phase::Receiving {
            return;
        }
        if last && let Some(attempt) = &mut self.attempt {
            attempt.last_placed = Some(round);
        }
        self.send_control(now, TargetFrame::RoundPlaced(round));
        self.load_when_complete(now);
    }

    /// All device state is loaded.
    pub fn handle_loaded(&mut self, now: Moment, loaded: Loaded) {
        self.end_job(TargetJob::Load);
        if self.phase == Phase::Loading {
            let Loaded {
                load_us,
                populated_bytes,
                verification,
            } = loaded;
            self.enter(now, Phase::Ready);
            self.send_control(
                now,
                TargetFrame::Ready(Ready {
                    load_us,
                    populated_bytes,
                    verification,
                }),
            );
        }
        self.pay_debts();
    }

    /// The guest runs, or is kept paused as it was; `resume_us` is how long it took.
    pub fn handle_guest_started(&mut self, now: Moment, resume_us: u64) {
        self.end_job(TargetJob::StartGuest);
        assert_eq!(self.phase, Phase::Starting, "a guest that nobody started");
        self.enter(now, Phase::Running);
        self.send_control(now, TargetFrame::Running { resume_us });
        self.set_status(TargetStatus::Completed);
        self.reply_to_askers(Resolution::Committed);
    }

    /// A job failed. A guest that could not be started has not run a single instruction.
    pub fn handle_job_failed(&mut self, now: Moment, job: TargetJob, code: AbortCode, error: &str) {
        self.end_job(job);
        let error = TargetError::Local(code, error.to_owned());
        if self.phase == Phase::Starting {
            self.begin_failing(now, error);
            self.reply_to_askers(Resolution::NotCommitted);
        } else if self.phase.before_commit() {
            self.fail(now, error);
        }
        self.pay_debts();
    }

    /// All links of the attempt are closed and the data threads have ended.
    pub fn handle_links_closed(&mut self, _now: Moment) {
        self.end_job(TargetJob::CloseLinks);
        self.control_open = false;
        self.pay_debts();
    }

    /// The operator (or the end of the process) gives up on the attempt. Harmless when there is none, or when the guest is here.
    pub fn handle_cancel(&mut self, now: Moment) {
        if self.phase.before_commit() {
            self.fail(
                now,
                TargetError::Local(AbortCode::Cancelled, "cancelled at the target".to_owned()),
            );
        }
    }

    /// Memory is empty again after a failure: the next hello is welcome.
    ///
    /// # Panics
    /// If the last attempt is not over.
    pub fn listen_again(&mut self, now: Moment) {
        assert_eq!(
            self.phase,
            Phase::Failed,
            "only a failed target can start over"
        );
        self.attempt = None;
        self.enter(now, Phase::Listening);
    }

    /// Time has passed.
    pub fn handle_timeout(&mut self, now: Moment) {
        if self.phase == Phase::AwaitData && now >= self.entered_at.plus_micros(CONNECT_DEADLINE_US)
        {
            let joined = self
                .attempt
                .as_ref()
                .map_or(&[][..], |attempt| &attempt.joined);
            let (came, all) = (
                joined.iter().filter(|joined| **joined).count(),
                joined.len(),
            );
            let after_s = CONNECT_DEADLINE_US / 1_000_000;
            let text = format!("only {came} of {all} data connections arrived within {after_s} s");
            self.fail(now, TargetError::Protocol(text));
        }
        if self.phase.before_commit() && now >= self.heard_at.plus_micros(STALL_US) {
            let text = format!(
                "the source gave no sign of life for {} s",
                STALL_US / 1_000_000
            );
            self.fail(now, TargetError::Link(text));
        }
        if self.keeps_alive() && now >= self.said_at.plus_micros(KEEPALIVE_US) {
            self.send_control(now, TargetFrame::Keepalive);
        }
    }

    fn keeps_alive(&self) -> bool {
        self.control_open && (self.phase.before_commit() || self.phase == Phase::Starting)
    }

    fn welcome(&mut self, now: Moment, connection: Connection, hello: Hello) {
        if self.phase != Phase::Listening {
            self.refuse(
                connection,
                AbortCode::Busy,
                "the target is busy with another migration, or has had one",
            );
            return;
        }
        let Some(version) = VersionRange::OURS.common(hello.versions) else {
            let text = format!(
                "no common protocol version: the target speaks {}, the source {}",
                VersionRange::OURS,
                hello.versions
            );
            self.refuse(connection, AbortCode::Incompatible, &text);
            return;
        };
        if self.refused.contains(&hello.migration_id) {
            // Its RESOLVE is answered with "not committed" for good, so it can never be committed.
            let text = "an attempt of this migration id has failed here; ids are never used again";
            self.refuse(connection, AbortCode::Protocol, text);
            return;
        }
        if let Err(difference) = compare(&hello, &self.config.blocks, &self.config.devices) {
            self.refuse(connection, AbortCode::Incompatible, &difference);
            return;
        }
        let Hello {
            migration_id,
            data_connections,
            verify,
            ..
        } = hello;
        self.attempt = Some(Attempt {
            id: migration_id,
            control: connection,
            version,
            verify,
            joined: vec![false; usize::from(data_connections)],
            sections: Vec::new(),
            section_bytes: 0,
            announced: None,
            last_placed: None,
            end: None,
            guest_runs: false,
            askers: VecDeque::new(),
            settled: false,
        });
        self.error = None;
        self.heard_at = now;
        self.control_open = true;
        self.enter(now, Phase::AwaitData);
        self.set_status(TargetStatus::Setup);
        let software = self.config.software.clone();
        self.send_control(
            now,
            TargetFrame::HelloReply(HelloReply { version, software }),
        );
    }

    /// A stranger's data connection is refused without harm to the attempt: it proves nothing about the source.
    fn join(&mut self, now: Moment, connection: Connection, hello: DataHello) {
        let DataHello {
            version,
            migration_id,
            index,
            count,
        } = hello;
        let fits = self
            .attempt
            .as_mut()
            .filter(|attempt| self.phase == Phase::AwaitData && attempt.id == migration_id);
        let Some(attempt) = fits else {
            let text = format!("no data connection of migration {migration_id} is expected here");
            self.refuse(connection, AbortCode::Protocol, &text);
            return;
        };
        if version != attempt.version || usize::from(count) != attempt.joined.len() {
            self.refuse(
                connection,
                AbortCode::Protocol,
                "a data connection contradicts the hello of its migration",
            );
            return;
        }
        match attempt.joined.get_mut(usize::from(index)) {
            Some(joined) if !*joined => *joined = true,
            _ => {
                let text =
                    format!("data connection {index} of migration {migration_id} exists already");
                self.refuse(connection, AbortCode::Protocol, &text);
                return;
            }
        }
        let all = attempt.joined.iter().all(|joined| *joined);
        self.actions
            .push_back(TargetAction::AdoptData { connection, index });
        if all {
            self.enter(now, Phase::Preparing);
            self.start_job(TargetJob::Prepare, TargetAction::Prepare);
        }
    }

    /// Somebody who knows the id asks what became of the attempt. Whoever asks has given up the old link, so an attempt that is not
    /// committed by now never will be.
    fn answer(&mut self, now: Moment, connection: Connection, id: MigrationId) {
        if self
            .attempt
            .as_ref()
            .is_some_and(|attempt| attempt.id == id)
        {
            match self.phase {
                Phase::Running => {
                    self.note_asker(connection);
                    self.reply(connection, Resolution::Committed);
                }
                Phase::Starting => self.note_asker(connection),
                phase => {
                    if phase.before_commit() {
                        self.fail(
                            now,
                            TargetError::Link(
                                "the source lost the link and asks for the outcome".to_owned(),
                            ),
                        );
                    }
                    self.reply(connection, Resolution::NotCommitted);
                }
            }
        } else if self.refused.contains(&id) {
            self.reply(connection, Resolution::NotCommitted);
        } else {
            let text = format!("migration {id} is not known here");
            self.refuse(connection, AbortCode::Internal, &text);
        }
    }

    fn note_asker(&mut self, connection: Connection) {
        let Some(attempt) = &mut self.attempt else {
            return;
        };
        if attempt.askers.len() == ASKERS_MAX
            && let Some(oldest) = attempt.askers.pop_front()
        {
            self.actions.push_back(TargetAction::Close(oldest));
        }
        attempt.askers.push_back(connection);
    }

    fn asks(&self, connection: Connection) -> bool {
        self.phase == Phase::Running
            && self
                .attempt
                .as_ref()
                .is_some_and(|attempt| attempt.askers.contains(&connection))
    }

    fn reply_to_askers(&mut self, resolution: Resolution) {
        let askers: Vec<_> = self
            .attempt
            .iter()
            .flat_map(|attempt| attempt.askers.iter().copied())
            .collect();
        for connection in askers {
            self.reply(connection, resolution);
        }
    }

    /// Nobody will ask any more. Said once, however often the source says that it knows.
    fn settle(&mut self) {
        let Some(attempt) = self.attempt.as_mut().filter(|attempt| !attempt.settled) else {
            return;
        };
        attempt.settled = true;
        self.control_open = false;
        self.actions.push_back(TargetAction::Settled);
        self.start_job(TargetJob::CloseLinks, TargetAction::CloseLinks);
    }

    fn announce(&mut self, now: Moment, round: RoundId) {
        match &mut self.attempt {
            Some(attempt) if attempt.announced.is_none() => attempt.announced = Some(round),
            _ => self.fail(
                now,
                TargetError::Protocol("the switchover is announced twice".to_owned()),
            ),
        }
    }

    fn collect(&mut self, now: Moment, section: Section) {
        let Some(attempt) = &mut self.attempt else {
            return;
        };
        let name = &section.name;
        let fault = if attempt.announced.is_none() || attempt.end.is_some() {
            Some(format!(
                "state of device {name:?} comes outside of the switchover"
            ))
        } else if attempt.sections.iter().any(|other| other.name == *name) {
            Some(format!("state of device {name:?} comes twice"))
        } else if let Err(fault) = fits(&section, &self.config.devices) {
            Some(fault)
        } else if attempt.section_bytes + section.bytes.len() as u64 > SECTIONS_BYTES_MAX {
            Some(format!(
                "device state is over {SECTIONS_BYTES_MAX} bytes in all"
            ))
        } else {
            None
        };
        match fault {
            Some(fault) => self.fail(now, TargetError::Protocol(fault)),
            None => {
                attempt.section_bytes += section.bytes.len() as u64;
                attempt.sections.push(section);
            }
        }
    }

    fn end_state(&mut self, now: Moment, end: StateEnd) {
        let Some(attempt) = &mut self.attempt else {
            return;
        };
        let missing = self.config.devices.iter().find(|device| {
            !attempt
                .sections
                .iter()
                .any(|section| section.name == device.name)
        });
        let fault = if attempt.announced != Some(end.last_round) || attempt.end.is_some() {
            Some("the end of the device state contradicts the switchover".to_owned())
        } else if usize::from(end.sections) != attempt.sections.len() {
            Some(format!(
                "{} device states were announced, {} came",
                end.sections,
                attempt.sections.len()
            ))
        } else {
            missing.map(|device| format!("no state came for device {:?}", device.name))
        };
        match fault {
            Some(fault) => self.fail(now, TargetError::Protocol(fault)),
            None => {
                attempt.end = Some(end);
                self.load_when_complete(now);
            }
        }
    }

    fn load_when_complete(&mut self, now: Moment) {
        let Some(attempt) = &mut self.attempt else {
            return;
        };
        let (Some(end), Some(placed)) = (attempt.end, attempt.last_placed) else {
            return;
        };
        if placed != end.last_round {
            let text = format!(
                "the last round was announced as {}, but is {placed}",
                end.last_round
            );
            self.fail(now, TargetError::Protocol(text));
            return;
        }
        attempt.guest_runs = end.guest_runs;
        let (sections, verify) = (std::mem::take(&mut attempt.sections), attempt.verify);
        self.enter(now, Phase::Loading);
        self.start_job(TargetJob::Load, TargetAction::Load { sections, verify });
    }

    fn commit(&mut self, now: Moment) {
        let run = self
            .attempt
            .as_ref()
            .is_some_and(|attempt| attempt.guest_runs);
        self.enter(now, Phase::Starting);
        self.start_job(TargetJob::StartGuest, TargetAction::StartGuest { run });
    }

    fn fail(&mut self, now: Moment, error: TargetError) {
        assert!(
            self.phase.before_commit(),
            "an attempt fails before COMMIT only, not while {}",
            self.phase.name()
        );
        self.begin_failing(now, error);
    }

    fn begin_failing(&mut self, now: Moment, error: TargetError) {
        let linger = matches!(self.phase, Phase::Ready | Phase::Starting);
        if let Some(attempt) = &self.attempt {
            if self.refused.len() == REMEMBERED_MAX {
                self.refused.pop_front();
            }
            self.refused.push_back(attempt.id);
        }
        self.set_status(TargetStatus::Failing);
        if self.control_open {
            self.send_control(now, TargetFrame::Abort(error.to_abort()));
        }
        self.error = Some(error);
        self.enter(now, Phase::Failing { linger });
        self.start_job(TargetJob::CloseLinks, TargetAction::CloseLinks);
    }

    fn pay_debts(&mut self) {
        let Phase::Failing { linger } = self.phase else {
            return;
        };
        if self.jobs.is_empty() {
            self.phase = Phase::Failed;
            self.set_status(TargetStatus::Failed);
            let error = self
                .error
                .clone()
                .unwrap_or_else(|| TargetError::Link("unknown".to_owned()));
            self.actions
                .push_back(TargetAction::Failed { error, linger });
        }
    }

    fn reply(&mut self, connection: Connection, resolution: Resolution) {
        self.actions.push_back(TargetAction::Send(
            connection,
            TargetFrame::Resolved(resolution),
        ));
    }

    fn refuse(&mut self, connection: Connection, code: AbortCode, reason: &str) {
        self.actions.push_back(TargetAction::Send(
            connection,
            TargetFrame::Abort(Abort::new(code, reason)),
        ));
        self.actions.push_back(TargetAction::Close(connection));
    }

    fn send_control(&mut self, now: Moment, frame: TargetFrame) {
        if let Some(attempt) = &self.attempt
            && self.control_open
        {
            self.said_at = now;
            self.actions
                .push_back(TargetAction::Send(attempt.control, frame));
        }
    }

    fn start_job(&mut self, job: TargetJob, action: TargetAction) {
        assert!(!self.jobs.contains(&job), "job {job:?} started twice");
        self.jobs.push(job);
        self.actions.push_back(action);
    }

    fn end_job(&mut self, job: TargetJob) {
        self.jobs.retain(|running| *running != job);
    }

    fn enter(&mut self, now: Moment, phase: Phase) {
        tracing::debug!(phase = phase.name(), "target");
        self.phase = phase;
        self.entered_at = now;
    }

    /// The one place where the status changes.
    fn set_status(&mut self, to: TargetStatus) {
        if self.status != to {
            self.status = to;
            self.actions.push_back(TargetAction::StatusChanged(to));
        }
    }
}

/// Whether a device of ours loads the section.
fn fits(section: &Section, devices: &[DeviceSchema]) -> Result<(), String> {
    let Section {
        name,
        schema,
        version,
        bytes: _,
    } = section;
    let Some(device) = devices.iter().find(|device| device.name == *name) else {
        return Err(format!(
            "state of device {name:?} comes, which does not exist here"
        ));
    };
    if device.schema != *schema || !(device.version_min..=device.version_max).contains(version) {
        return Err(format!(
            "state of device {name:?} is {schema:?} version {version}, its hello allows {:?} versions {} to {}",
            device.schema, device.version_min, device.version_max
        ));
    }
    Ok(())
}

fn frame_name(frame: &SourceFrame) -> &'static str {
    match frame {
        SourceFrame::Hello(_) => "hello",
        SourceFrame::DataHello(_) => "data hello",
        SourceFrame::Switchover(_) => "SWITCHOVER",
        SourceFrame::Section(_) => "device state",
        SourceFrame::StateEnd(_) => "end of device state",
        SourceFrame::Commit => "COMMIT",
        SourceFrame::Resolve(_) => "RESOLVE",
        SourceFrame::Finish => "FINISH",
        SourceFrame::Keepalive => "keepalive",
        SourceFrame::Abort(_) => "abort",
    }
}
