//! The host that the guest comes to: a driver of the target core, with a listener, data threads that keep rounds apart, memory and vCPUs.

use std::collections::{BTreeMap, VecDeque};

use vmferry_transport::limits::{HELLO_DEADLINE_US, LINGER_US};
use vmferry_transport::proto::{
    Connection, Loaded, Target, TargetAction, TargetError, TargetJob, TargetStatus,
};
use vmferry_transport::units::RoundId;
use vmferry_transport::wire::Section;
use vmferry_transport::wire::frame::{
    AbortCode, FrameBuffer, Resolution, SourceFrame, TargetFrame, Verification,
};

use super::guest::Memory;
use super::net::{Content, Item, LinkId};
use super::notifiers::Audience;
use super::run_control::{Disks, Operation};
use super::{Event, JobId, Side, World};

/// Who owns the vCPUs of the target.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Vcpus {
    /// They have never run.
    Fresh,
    /// They are being started and may run at any moment.
    Starting,
    Running,
    /// The guest is here, and paused as it was.
    Paused,
}

/// What a target does after a failure.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum AfterFailure {
    ListenAgain,
    Exit,
}

#[derive(Debug)]
enum Role {
    /// No first frame yet.
    New,
    Control,
    /// Waits to be adopted, or carries pages.
    Data,
}

#[derive(Debug)]
struct TargetLink {
    role: Role,
    buffer: FrameBuffer,
}

/// The data threads: a round is applied when the one before has ended on all connections.
#[derive(Debug, Default)]
struct Receiver {
    links: Vec<Option<LinkId>>,
    prepared: bool,
    round: u32,
    queues: Vec<VecDeque<Item>>,
    ended: Vec<bool>,
    /// Rounds reported before they were placed.
    reported: Option<u32>,
    finished: bool,
}

#[derive(Debug)]
pub(super) struct TargetHost {
    pub(super) core: Target,
    pub(super) alive: bool,
    pub(super) listens: bool,
    pub(super) vcpus: Vcpus,
    /// A guest that ran is to run here.
    pub(super) autostart: bool,
    /// What was last promised to whoever had the say.
    pub(super) should_run: bool,
    pub(super) operation: Option<(JobId, Operation)>,
    pub(super) disks: Disks,
    pub(super) notifiers: Audience,
    /// The process ends when what it has begun is cleaned up.
    pub(super) quits: bool,
    pub(super) memory: Memory,
    pub(super) vcpu_state: Option<u64>,
    pub(super) after_failure: AfterFailure,
    /// Rounds but the last are reported as placed when they arrive, so that rounds overlap and the barrier has work to do.
    pub(super) eager: bool,
    links: BTreeMap<LinkId, TargetLink>,
    receiver: Receiver,
    pub(super) jobs: Vec<(JobId, TargetJob)>,
    loading: Option<(Vec<Section>, bool)>,
    starting: bool,
    pub(super) status: TargetStatus,
    /// COMMIT has arrived on the control connection of the attempt.
    committed: bool,
    /// Failed, and not yet listening again.
    pub(super) failed: bool,
    pub(super) settled: bool,
    generation: u64,
}

impl TargetHost {
    pub(super) fn new(core: Target, blocks: &[u64]) -> Self {
        Self {
            core,
            alive: true,
            listens: true,
            vcpus: Vcpus::Fresh,
            autostart: true,
            should_run: false,
            operation: None,
            disks: Disks::default(),
            notifiers: Audience::new(0),
            quits: false,
            memory: Memory::zeroed(blocks),
            vcpu_state: None,
            after_failure: AfterFailure::ListenAgain,
            eager: false,
            links: BTreeMap::new(),
            receiver: Receiver::default(),
            jobs: Vec::new(),
            loading: None,
            starting: false,
            status: TargetStatus::None,
            committed: false,
            failed: false,
            settled: false,
            generation: 0,
        }
    }

    /// The guest belongs to this side.
    pub(super) fn owns_guest(&self) -> bool {
        self.alive && self.vcpus != Vcpus::Fresh
    }

    /// vCPUs run, or may at any moment.
    pub(super) fn may_run(&self) -> bool {
        let starts = matches!(self.operation, Some((_, Operation::Cont(_))));
        self.alive && (matches!(self.vcpus, Vcpus::Starting | Vcpus::Running) || starts)
    }

    /// Nothing is under way that must come to an end by itself.
    pub(super) fn is_at_rest(&self) -> bool {
        let at_rest = match self.status {
            TargetStatus::None => true,
            TargetStatus::Completed => !self.starting,
            TargetStatus::Failed => !self.failed,
            TargetStatus::Setup | TargetStatus::Active | TargetStatus::Failing => false,
        };
        !self.alive || (at_rest && self.jobs.is_empty() && self.operation.is_none())
    }
}

impl World {
    pub(super) fn drive_target(&mut self) {
        while self.target.alive
            && let Some(action) = self.target.core.poll_action()
        {
            self.note(|| format!("target: {action:?}"));
            self.target_acts(action);
        }
    }

    fn target_acts(&mut self, action: TargetAction) {
        let now = self.moment();
        match action {
            TargetAction::StatusChanged(status) => self.target_status(status),
            TargetAction::Send(connection, frame) => {
                let is_ready = matches!(frame, TargetFrame::Ready(_));
                let denies = match frame {
                    TargetFrame::Resolved(Resolution::NotCommitted) => !self.target.failed,
                    TargetFrame::Abort(_) => self.target.core.control() == Some(connection),
                    _ => false,
                };
                if denies {
                    self.check_nothing_is_kept();
                }
                let link = LinkId(connection.0);
                self.say(link, Side::Target, frame.encode(), is_ready);
            }
            TargetAction::Close(connection) => {
                self.close_link(LinkId(connection.0), Side::Target, true)
            }
            TargetAction::AdoptData { connection, index } => {
                let index = usize::from(index);
                if self.target.receiver.links.len() <= index {
                    self.target.receiver.links.resize(index + 1, None);
                }
                assert!(self.target.receiver.links[index].is_none(), "adopted twice");
                self.target.receiver.links[index] = Some(LinkId(connection.0));
            }
            TargetAction::Prepare => {
                let count = self.target.receiver.links.len();
                assert!(self.target.receiver.links.iter().all(Option::is_some));
                self.target
                    .receiver
                    .queues
                    .resize_with(count, VecDeque::new);
                self.target.receiver.ended = vec![false; count];
                if self.rng.chance(500) {
                    self.target.receiver.prepared = true;
                    self.target.core.handle_prepared(now);
                } else {
                    self.start_target_job(TargetJob::Prepare);
                }
            }
            TargetAction::Load { sections, verify } => {
                assert!(
                    self.in_place || self.target.receiver.finished,
                    "loads before all pages are placed"
                );
                self.target.loading = Some((sections, verify));
                if self.in_place {
                    // The same memory, seen from here.
                    self.target.memory = self.source_memory.clone();
                }
                if self.faults.corrupt_memory && verify {
                    self.target.memory.0[0][0] ^= 1 << 40;
                }
                self.start_target_job(TargetJob::Load);
            }
            TargetAction::StartGuest { run } => self.start_guest(run),
            TargetAction::NotifyFailed => self.start_target_job(TargetJob::NotifyFailed),
            TargetAction::CloseLinks => {
                let control = self.target.core.control().map(|control| LinkId(control.0));
                let data = self.target.receiver.links.iter().copied().flatten();
                let links: Vec<_> = data.chain(control).collect();
                for link in links {
                    self.begin_closing(link, Side::Target, Some(link) == control);
                }
                self.start_target_job(TargetJob::CloseLinks);
            }
            TargetAction::Failed { linger, .. } => {
                assert_eq!(self.target.vcpus, Vcpus::Fresh, "I1: failed with a guest");
                self.check_nothing_is_kept();
                assert!(self.target.jobs.is_empty());
                self.target.failed = true;
                let (wait, event) = match self.target.after_failure {
                    AfterFailure::ListenAgain => (self.rng.below(2_000_000), Event::ListenAgain),
                    AfterFailure::Exit if linger => (LINGER_US, Event::Exit),
                    AfterFailure::Exit => (0, Event::Exit),
                };
                self.schedule(wait, event);
                if self.target.quits {
                    self.end_target();
                }
            }
            TargetAction::Settled => {
                assert!(
                    !std::mem::replace(&mut self.target.settled, true),
                    "settled twice"
                );
                assert!(self.target.owns_guest());
                self.target.listens = false;
            }
        }
    }

    fn target_status(&mut self, to: TargetStatus) {
        use TargetStatus as S;
        let from = std::mem::replace(&mut self.target.status, to);
        let legal = matches!(
            (from, to),
            (S::None | S::Failed, S::Setup)
                | (S::Setup, S::Active)
                | (S::Active, S::Completed)
                | (S::Setup | S::Active, S::Failing)
                | (S::Failing, S::Failed)
        );
        assert!(legal, "the target's status {from:?} became {to:?}");
        if to == S::Setup {
            self.target.committed = false;
            self.target.receiver = Receiver::default();
            self.target.generation = self.new_job().0;
        }
    }

    /// I1 and I2 at the instant that matters.
    fn start_guest(&mut self, run: bool) {
        assert!(self.target.committed, "I1: started without COMMIT");
        assert_eq!(self.target.vcpus, Vcpus::Fresh, "started twice");
        assert!(!self.target.failed, "I1: started after a failure");
        let paused = self.pause.as_ref().expect("the source was paused");
        assert!(
            paused.memory == self.target.memory,
            "I2: the target's memory is not the source's"
        );
        assert_eq!(
            Some(paused.vcpus),
            self.target.vcpu_state,
            "I2: device state differs"
        );
        assert_eq!(
            run, self.guest_should_run,
            "the guest is to go on as it was"
        );
        self.target.should_run = run && self.target.autostart;
        if self.target.should_run {
            self.target.vcpus = Vcpus::Starting;
            self.target.starting = true;
            self.begin_taking_disks(Side::Target);
            self.start_target_job(TargetJob::StartGuest);
        } else {
            self.target.vcpus = Vcpus::Paused;
            let now = self.moment();
            self.target.core.handle_guest_started(now, 0);
        }
    }

    /// Before anybody hears that the guest is not here, the disks and whatever notifiers have taken over are given back.
    fn check_nothing_is_kept(&self) {
        let target = &self.target;
        let disks = &target.disks;
        assert!(
            (!disks.active || disks.stuck) && !disks.taking,
            "the failure is published while the disks are here"
        );
        if let Some(migration) = target.core.migration_id() {
            target.notifiers.check_incoming_failed(migration);
        }
    }

    /// The guest that has arrived runs, or does not, as its operators wanted.
    pub(super) fn check_target_at_rest(&self) {
        let target = &self.target;
        if target.owns_guest() && !target.starting && target.operation.is_none() {
            let runs = target.vcpus == Vcpus::Running;
            assert_eq!(runs, target.should_run, "the target does as it was told");
        }
    }

    fn start_target_job(&mut self, job: TargetJob) {
        assert!(
            self.target.jobs.iter().all(|(_, running)| *running != job),
            "job {job:?} is started twice"
        );
        let id = self.new_job();
        self.target.jobs.push((id, job));
        let delay = self.job_delay();
        self.schedule(delay, Event::TargetJob(id));
    }

    pub(super) fn target_job(&mut self, id: JobId) {
        let Some(at) = self.target.jobs.iter().position(|(job, _)| *job == id) else {
            return;
        };
        let (_, job) = self.target.jobs.remove(at);
        let fails =
            self.faults.fail_target_job == Some(job) || self.chance(|faults| faults.fail_job);
        if self.faults.fail_target_job == Some(job) {
            self.faults.fail_target_job = None;
        }
        self.note(|| format!("target job {job:?}{}", if fails { " fails" } else { "" }));
        let now = self.moment();
        match job {
            TargetJob::CloseLinks => {
                let control = self.target.core.control().map(|control| LinkId(control.0));
                let data = self.target.receiver.links.iter().copied().flatten();
                let links: Vec<_> = data.chain(control).collect();
                for link in links {
                    self.close_link(link, Side::Target, true);
                }
                self.target.receiver = Receiver::default();
                self.target.generation = self.new_job().0;
                self.target.core.handle_links_closed(now);
            }
            TargetJob::NotifyFailed => {
                let migration = self.target.core.migration_id().unwrap_or_default();
                self.target.notifiers.incoming_failed(migration);
                self.target.core.handle_notified(now);
            }
            TargetJob::StartGuest => self.guest_starts(fails),
            job if fails => {
                let code = AbortCode::Resources;
                self.target
                    .core
                    .handle_job_failed(now, job, code, "no memory left");
            }
            TargetJob::Prepare => {
                self.target.receiver.prepared = true;
                self.target.core.handle_prepared(now);
                self.place_pages();
            }
            TargetJob::Load => self.load(),
        }
    }

    /// The disks become active and the guest runs; or it does not, and the disks are given back as far as they can be.
    fn guest_starts(&mut self, fails: bool) {
        let now = self.moment();
        self.target.starting = false;
        if self.take_disks(Side::Target) && !fails {
            self.target.vcpus = Vcpus::Running;
            self.target.core.handle_guest_started(now, 7);
            return;
        }
        self.target.vcpus = Vcpus::Fresh;
        if self.target.disks.active {
            let stuck = self.chance(|faults| faults.fail_disks);
            self.target.disks.active = stuck;
            self.target.disks.stuck = stuck;
            self.see("the target gives the disks back");
        }
        let (job, code) = (TargetJob::StartGuest, AbortCode::Resources);
        self.target
            .core
            .handle_job_failed(now, job, code, "no such vCPU");
    }

    fn load(&mut self) {
        let Some((sections, verify)) = self.target.loading.take() else {
            unreachable!("only Load starts this job");
        };
        assert_eq!(sections.len(), self.devices.len());
        let state = sections
            .first()
            .and_then(|section| section.bytes.first_chunk());
        self.target.vcpu_state = state.map(|bytes| u64::from_le_bytes(*bytes));
        let verification = verify.then(|| Verification {
            ram_hash: self.target.memory.hash(),
            state_differences: String::new(),
            took_us: 3,
        });
        let now = self.moment();
        self.target.core.handle_loaded(
            now,
            Loaded {
                load_us: 20,
                populated_bytes: 4096,
                verification,
            },
        );
    }

    pub(super) fn listen_again(&mut self) {
        if self.target.alive && std::mem::take(&mut self.target.failed) {
            let now = self.moment();
            self.target.memory = Memory::zeroed(&self.blocks);
            self.target.vcpu_state = None;
            self.target.core.listen_again(now);
        }
    }

    pub(super) fn exit_target(&mut self) {
        if self.target.alive && self.target.failed {
            self.note(|| "the target exits".to_owned());
            self.target.alive = false;
            self.close_all(Side::Target, false);
        }
    }

    /// A connection is made: the kernel takes it, whatever the process is doing.
    pub(super) fn target_accepts(&mut self, link: LinkId) {
        let role = Role::New;
        let buffer = FrameBuffer::default();
        self.target.links.insert(link, TargetLink { role, buffer });
        self.schedule(HELLO_DEADLINE_US, Event::HelloDeadline(link));
    }

    pub(super) fn hello_deadline(&mut self, link: LinkId) {
        if self
            .target
            .links
            .get(&link)
            .is_some_and(|link| matches!(link.role, Role::New))
        {
            self.close_link(link, Side::Target, true);
        }
    }

    pub(super) fn target_receives(&mut self, link: LinkId, item: Item) {
        let Some(known) = self.target.links.get_mut(&link) else {
            // A connection to a process that was here before.
            return;
        };
        match (&known.role, item) {
            (Role::New | Role::Control, Item::Bytes(bytes)) => self.target_reads(link, &bytes),
            (Role::New, _) => self.close_link(link, Side::Target, false),
            (Role::Control, _) => {
                self.close_link(link, Side::Target, false);
                self.note(|| format!("target: {link:?} is gone"));
                let (now, connection) = (self.moment(), Connection(link.0));
                let error = "the control connection broke";
                self.target
                    .core
                    .handle_connection_lost(now, connection, error, false);
            }
            (Role::Data, item) => self.data_arrives(link, item),
        }
    }

    fn target_reads(&mut self, link: LinkId, bytes: &[u8]) {
        let cut = self.rng.index(bytes.len() + 1);
        for part in [&bytes[..cut], &bytes[cut..]] {
            let Some(known) = self.target.links.get_mut(&link) else {
                return;
            };
            known.buffer.push(part);
            while self.link(link).reads[Side::Target as usize] {
                let Some(known) = self.target.links.get_mut(&link) else {
                    return;
                };
                match known.buffer.poll_frame::<SourceFrame>() {
                    Ok(Some(frame)) => self.target_hears(link, frame),
                    Ok(None) => break,
                    Err(error) => {
                        let is_control = matches!(known.role, Role::Control);
                        self.close_link(link, Side::Target, false);
                        self.note(|| format!("target: {error}"));
                        if is_control {
                            let (now, connection) = (self.moment(), Connection(link.0));
                            let error = error.to_string();
                            self.target
                                .core
                                .handle_connection_lost(now, connection, &error, true);
                        }
                        return;
                    }
                }
            }
        }
    }

    fn target_hears(&mut self, link: LinkId, frame: SourceFrame) {
        self.note(|| format!("target hears {frame:?} on {link:?}"));
        let (now, connection) = (self.moment(), Connection(link.0));
        let Some(known) = self.target.links.get_mut(&link) else {
            return;
        };
        if matches!(known.role, Role::New) {
            known.role = match frame {
                SourceFrame::DataHello(_) => Role::Data,
                _ => Role::Control,
            };
            self.target.core.handle_first_frame(now, connection, frame);
        } else {
            self.target.committed |=
                frame == SourceFrame::Commit && self.target.core.control() == Some(connection);
            self.target.core.handle_frame(now, connection, frame);
        }
        self.drive_target();
    }

    fn data_arrives(&mut self, link: LinkId, item: Item) {
        let receiver = &mut self.target.receiver;
        let Some(index) = receiver.links.iter().position(|known| *known == Some(link)) else {
            return;
        };
        if matches!(item, Item::Eof | Item::Reset | Item::Bytes(_)) {
            let finished = receiver.finished;
            self.close_link(link, Side::Target, false);
            if !finished {
                let now = self.moment();
                let error = TargetError::Link("a data connection broke".to_owned());
                self.target.core.handle_data_failed(now, error);
            }
            return;
        }
        receiver
            .queues
            .resize_with(receiver.links.len(), VecDeque::new);
        if let Item::RoundEnd { round, last: false } = item
            && self.target.eager
            && receiver.reported.is_none_or(|reported| reported < round)
        {
            receiver.reported = Some(round);
            self.report_placed(round, false);
        }
        self.target.receiver.queues[index].push_back(item);
        self.place_pages();
    }

    /// Applies what may be applied: a queue that is at the end of its round waits for the others.
    fn place_pages(&mut self) {
        let target = &mut self.target;
        let receiver = &mut target.receiver;
        if !receiver.prepared {
            return;
        }
        let mut placed = Vec::new();
        let mut is_last = false;
        loop {
            for (queue, ended) in receiver.queues.iter_mut().zip(&mut receiver.ended) {
                while !*ended && let Some(item) = queue.pop_front() {
                    match item {
                        Item::Pages { round, pages } => {
                            assert_eq!(round, receiver.round, "a page of another round");
                            for (page, content) in pages {
                                match content {
                                    Content::Data(content) => target.memory.set(page, content),
                                    Content::Zero => target.memory.set(page, 0),
                                    Content::Hole => {}
                                }
                            }
                        }
                        Item::RoundEnd { round, last } => {
                            assert_eq!(round, receiver.round, "the end of another round");
                            *ended = true;
                            is_last = last;
                        }
                        Item::Bytes(_) | Item::Eof | Item::Reset => {}
                    }
                }
            }
            if receiver.ended.is_empty() || receiver.ended.iter().any(|ended| !ended) {
                break;
            }
            let round = receiver.round;
            receiver.finished = is_last;
            receiver.ended.fill(false);
            receiver.round += 1;
            if receiver.reported.is_none_or(|reported| reported < round) {
                placed.push((round, is_last));
            }
        }
        for (round, last) in placed {
            self.report_placed(round, last);
        }
    }

    fn report_placed(&mut self, round: u32, last: bool) {
        let delay = self.rng.below(100);
        let generation = self.target.generation;
        self.schedule(
            delay,
            Event::Placed {
                generation,
                round,
                last,
            },
        );
    }

    pub(super) fn placed(&mut self, generation: u64, round: u32, last: bool) {
        if generation == self.target.generation {
            let now = self.moment();
            self.target
                .core
                .handle_round_placed(now, RoundId(round), last);
        }
    }
}
