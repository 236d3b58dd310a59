//! The host that the guest leaves: a driver of the source core, with a dirty log, links and vCPUs of its own.

use bytes::Bytes;
use vmferry_transport::proto::{
    MigrationStatus, Outcome, SavedState, Source, SourceAction, SourceJob,
};
use vmferry_transport::units::Moment;
use vmferry_transport::wire::Section;
use vmferry_transport::wire::frame::{FrameBuffer, Resolution, SourceFrame, TargetFrame};
use vmferry_transport::wire::hello::DataHello;

use super::guest::{Page, PageSet, SimProof, Snapshot};
use super::net::{Item, LinkId, Use};
use super::rounds::Round;
use super::{Event, JobId, PASSES_MAX, Side, World, tuning};

/// How an attempt ended at the source.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Ending {
    /// The guest is at the target.
    Completed,
    /// The guest is where it was.
    Failed,
    /// The same, because the operator said so.
    Cancelled,
}

#[derive(Debug)]
pub(super) struct SourceHost {
    pub(super) core: Source<SimProof>,
    pub(super) alive: bool,
    /// vCPUs run, or might.
    pub(super) running: bool,
    pub(super) present: PageSet,
    pub(super) log_on: bool,
    pub(super) log: PageSet,
    pub(super) jobs: Vec<(JobId, SourceJob)>,
    /// The proof, while the driver and not the core has it.
    pub(super) proof: Option<SimProof>,
    pub(super) ending: Option<Ending>,
    pub(super) status: MigrationStatus,
    pub(super) closing: bool,
    pub(super) unsent: PageSet,
    pub(super) holes: Vec<Page>,
    control: Option<LinkId>,
    pub(super) data: Vec<LinkId>,
    hellos: Vec<DataHello>,
    buffer: FrameBuffer,
    pub(super) round: Option<Round>,
    pub(super) progress_bytes: u64,
    saving_hash: bool,
    resuming: Option<SimProof>,
    stop_asked: Moment,
    pub(super) commit_sent: bool,
    /// The target's word that it will never run this guest has arrived.
    denied: bool,
    /// The target's word that the guest is its own has arrived.
    confirmed: bool,
    pub(super) operator: Option<Resolution>,
    pub(super) cancelled: bool,
    /// What the notifiers have heard of this attempt.
    pub(super) told: Told,
    pub(super) throttle: u8,
}

/// What a notifier has heard of an attempt.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Told {
    Nothing,
    Setup,
    End,
}

impl SourceHost {
    pub(super) fn new(core: Source<SimProof>, blocks: &[u64]) -> Self {
        Self {
            core,
            alive: true,
            running: false,
            present: PageSet::empty(blocks),
            log_on: false,
            log: PageSet::empty(blocks),
            jobs: Vec::new(),
            proof: None,
            ending: None,
            status: MigrationStatus::None,
            closing: false,
            unsent: PageSet::empty(blocks),
            holes: Vec::new(),
            control: None,
            data: Vec::new(),
            hellos: Vec::new(),
            buffer: FrameBuffer::default(),
            round: None,
            progress_bytes: 0,
            saving_hash: false,
            resuming: None,
            stop_asked: Moment::default(),
            commit_sent: false,
            denied: false,
            confirmed: false,
            operator: None,
            cancelled: false,
            told: Told::Nothing,
            throttle: 0,
        }
    }

    pub(super) fn has_job(&self, job: SourceJob) -> bool {
        self.jobs.iter().any(|(_, running)| *running == job)
    }

    /// vCPUs run, or may at any moment.
    pub(super) fn may_run(&self) -> bool {
        self.alive && (self.running || self.resuming.is_some())
    }

    fn has_links(&self) -> bool {
        self.control.is_some() || !self.data.is_empty()
    }

    /// A new attempt on the same guest.
    pub(super) fn begin_again(&mut self, core: Source<SimProof>) {
        assert!(self.jobs.is_empty() && !self.has_links() && !self.log_on);
        self.core = core;
        self.ending = None;
        self.status = MigrationStatus::None;
        self.round = None;
        self.progress_bytes = 0;
        self.commit_sent = false;
        self.denied = false;
        self.confirmed = false;
        self.operator = None;
        self.cancelled = false;
        self.told = Told::Nothing;
    }
}

impl World {
    pub(super) fn drive_source(&mut self) {
        while self.source.alive
            && let Some(action) = self.source.core.poll_action()
        {
            assert!(
                self.source.ending.is_none(),
                "an action after the end: {action:?}"
            );
            self.note(|| format!("source: {action:?}"));
            self.source_acts(action);
        }
    }

    fn source_acts(&mut self, action: SourceAction<SimProof>) {
        match action {
            SourceAction::StatusChanged(to) => {
                if to == MigrationStatus::PreSwitchover {
                    let delay = self.rng.below(60_000_000);
                    self.schedule(delay, Event::GoOn);
                }
                let from = std::mem::replace(&mut self.source.status, to);
                assert!(from.may_become(to), "status {from} became {to}");
            }
            SourceAction::PassStarted(pass) => {
                if pass == PASSES_MAX {
                    self.limit_raised = true;
                    self.source.core.set_tuning(tuning(u64::MAX));
                }
            }
            SourceAction::ConnectControl => {
                assert!(
                    !self.source.has_links(),
                    "connects before the old links are closed"
                );
                self.start_source_job(SourceJob::ConnectControl);
            }
            SourceAction::SendControl(frame) => self.source_sends(&frame),
            SourceAction::ConnectData(hellos) => {
                self.source.hellos = hellos;
                let id = self.new_job();
                self.source.jobs.push((id, SourceJob::ConnectData));
                let delay = self.job_delay();
                self.schedule(delay, Event::Dial(id));
            }
            SourceAction::NotifySetup => _ = self.start_source_job(SourceJob::NotifySetup),
            SourceAction::WatchUnplug => {
                let delay = self.rng.below(40_000_000);
                self.schedule(delay, Event::Unplugged);
            }
            SourceAction::NotifyFailed => _ = self.start_source_job(SourceJob::NotifyFailed),
            SourceAction::NotifyDone => _ = self.start_source_job(SourceJob::NotifyDone),
            SourceAction::Throttle(percent) => {
                assert!(percent <= 99, "a throttled guest still runs");
                self.source.throttle = percent;
            }
            SourceAction::StartLog => {
                assert_eq!(self.source.told, Told::Setup, "I7: SETUP comes first");
                self.start_source_job(SourceJob::StartLog);
            }
            SourceAction::SendRound { round, last } => self.send_round(round, last),
            SourceAction::Sync => _ = self.start_source_job(SourceJob::Sync),
            SourceAction::StopGuest => self.stop_guest(),
            SourceAction::SaveState { hash_ram } => {
                assert!(
                    !self.source.running,
                    "the state of a running guest is saved"
                );
                self.source.saving_hash = hash_ram;
                self.start_source_job(SourceJob::SaveState);
            }
            SourceAction::CloseLinks => self.source_closes_links(),
            SourceAction::StopLog => {
                assert!(!self.source.has_links(), "links are closed first");
                assert!(self.source.log_on, "a log that does not run is stopped");
                self.start_source_job(SourceJob::StopLog);
            }
            SourceAction::ResumeGuest(proof) => self.resume_guest(proof),
            SourceAction::Unresolved => {
                let delay = self.rng.below(100_000_000);
                self.schedule(delay, Event::Operator);
            }
            SourceAction::Finished(outcome) => self.source_finished(outcome),
        }
    }

    fn start_source_job(&mut self, job: SourceJob) -> JobId {
        assert!(!self.source.has_job(job), "job {job:?} is started twice");
        let id = self.new_job();
        self.source.jobs.push((id, job));
        let delay = self.job_delay();
        self.schedule(delay, Event::SourceJob(id));
        id
    }

    pub(super) fn end_source_job(&mut self, job: SourceJob) {
        self.source.jobs.retain(|(_, running)| *running != job);
    }

    fn source_sends(&mut self, frame: &SourceFrame) {
        assert!(!self.source.closing, "{frame:?} is sent on closed links");
        if *frame == SourceFrame::Commit {
            assert!(!self.source.running, "COMMIT while the guest runs");
            self.source.commit_sent = true;
            self.committed_at_step.get_or_insert(self.step);
        }
        if let Some(control) = self.source.control {
            let is_commit = *frame == SourceFrame::Commit;
            self.say(control, Side::Source, frame.encode(), is_commit);
        }
    }

    fn stop_guest(&mut self) {
        self.source.stop_asked = self.moment();
        self.stopped_at_step.get_or_insert(self.step);
        if let Some(proof) = self.source.proof.take() {
            // The operator was faster.
            let now = self.moment();
            self.source.core.handle_guest_stopped(now, proof);
        } else {
            self.start_source_job(SourceJob::StopGuest);
        }
    }

    /// I3: every debt is paid before the guest runs again. I1: after COMMIT only on somebody's word.
    fn resume_guest(&mut self, proof: SimProof) {
        assert!(
            !self.source.has_links(),
            "resumed before the links are closed"
        );
        assert!(!self.source.log_on, "resumed before the dirty log is off");
        assert_ne!(self.source.told, Told::Setup, "I7: resumed before FAILED");
        assert_eq!(self.source.throttle, 0, "resumed with a throttle");
        assert!(
            self.source.jobs.is_empty(),
            "resumed during {:?}",
            self.source.jobs
        );
        if self.source.commit_sent {
            let allowed =
                self.source.denied || self.source.operator == Some(Resolution::NotCommitted);
            assert!(allowed, "I1: resumed after COMMIT by guessing");
        }
        self.start_source_job(SourceJob::ResumeGuest);
        self.source.resuming = Some(proof);
    }

    fn source_finished(&mut self, outcome: Outcome<SimProof>) {
        let source = &mut self.source;
        assert!(source.jobs.is_empty() && !source.has_links() && !source.log_on);
        assert_ne!(source.told, Told::Setup, "I7: over without DONE or FAILED");
        assert_eq!(source.throttle, 0, "over, and the guest is still throttled");
        let ending = match source.status {
            MigrationStatus::Completed => Ending::Completed,
            MigrationStatus::Failed => Ending::Failed,
            MigrationStatus::Cancelled => Ending::Cancelled,
            status => panic!("finished while {status}"),
        };
        source.ending = Some(ending);
        match outcome {
            Outcome::Completed(proof) => {
                assert_eq!(ending, Ending::Completed);
                source.proof = Some(proof);
            }
            Outcome::Failed { stopped, .. } => {
                assert_ne!(ending, Ending::Completed);
                if let Some(proof) = stopped {
                    assert!(source.proof.is_none(), "two proofs");
                    source.proof = Some(proof);
                }
            }
        }
    }

    fn source_closes_links(&mut self) {
        self.source.closing = true;
        if self.rng.chance(700) {
            // Connects and rounds are ended at once; otherwise they may still report while the links are being closed.
            self.end_link_jobs();
        }
        if let Some(control) = self.source.control {
            let flush = !self.rng.chance(100);
            self.begin_closing(control, Side::Source, flush);
        }
        for link in self.source.data.clone() {
            self.begin_closing(link, Side::Source, false);
        }
        self.start_source_job(SourceJob::CloseLinks);
    }

    fn end_link_jobs(&mut self) {
        for job in [
            SourceJob::ConnectControl,
            SourceJob::ConnectData,
            SourceJob::Round,
        ] {
            self.end_source_job(job);
        }
    }

    pub(super) fn source_job(&mut self, id: JobId) {
        let Some(at) = self.source.jobs.iter().position(|(job, _)| *job == id) else {
            return;
        };
        let job = self.source.jobs[at].1;
        if job == SourceJob::ConnectControl && self.hangs() {
            self.note(|| "the connect hangs".to_owned());
            return;
        }
        self.source.jobs.remove(at);
        let fails =
            self.faults.fail_source_job == Some(job) || self.chance(|faults| faults.fail_job);
        if self.faults.fail_source_job == Some(job) {
            self.faults.fail_source_job = None;
        }
        self.note(|| format!("source job {job:?}{}", if fails { " fails" } else { "" }));
        let now = self.moment();
        match job {
            SourceJob::CloseLinks => self.source_links_closed(now),
            SourceJob::StopLog => {
                self.source.log_on = false;
                self.source.log.clear();
                self.source.core.handle_log_stopped(now);
            }
            SourceJob::ResumeGuest => self.guest_resumes(now, fails),
            SourceJob::NotifyFailed | SourceJob::NotifyDone => {
                // Nobody was told anything when the first one vetoed.
                assert_ne!(self.source.told, Told::End, "I7: told the end twice");
                self.source.told = Told::End;
                self.source.core.handle_notified(now, job);
            }
            SourceJob::NotifySetup => {
                self.source.told = Told::Setup;
                if fails {
                    self.source
                        .core
                        .handle_job_failed(now, job, "a notifier vetoes");
                } else {
                    let waits = self.rng.chance(self.faults.unplug_wait);
                    let device = waits.then(|| "net0".to_owned());
                    self.source.core.handle_setup_told(now, device);
                }
            }
            job if fails => self
                .source
                .core
                .handle_job_failed(now, job, "the disk is on fire"),
            SourceJob::ConnectControl => self.source_connected(now),
            SourceJob::ConnectData => self.source.core.handle_data_connected(now),
            SourceJob::StartLog => self.log_started(now),
            SourceJob::Round => unreachable!("rounds end when all is sent"),
            SourceJob::Sync => {
                let log = self.source.log.clone();
                self.source.unsent.unite(&log);
                self.source.log.clear();
                let dirty = self.source.unsent.count();
                let took_us = self.rng.below(300);
                self.source.core.handle_synced(now, dirty, took_us);
            }
            SourceJob::StopGuest => {
                let proof = self.pause_guest();
                self.source.core.handle_guest_stopped(now, proof);
            }
            SourceJob::SaveState => self.state_saved(now),
        }
    }

    /// The vCPUs stop now.
    pub(super) fn pause_guest(&mut self) -> SimProof {
        assert!(std::mem::take(&mut self.source.running), "paused twice");
        self.pause = Some(Snapshot {
            memory: self.source_memory.clone(),
            vcpus: self.source_vcpus,
        });
        self.proofs.make()
    }

    fn guest_resumes(&mut self, now: Moment, fails: bool) {
        let Some(proof) = self.source.resuming.take() else {
            unreachable!("only ResumeGuest starts this job");
        };
        if fails {
            self.resume_failed = true;
            self.source
                .core
                .handle_resume_failed(now, proof, "no such vCPU");
            return;
        }
        let paused = self.pause.as_ref().expect("it was paused");
        assert!(
            paused.memory == self.source_memory && paused.vcpus == self.source_vcpus,
            "I3: the guest changed while it was stopped"
        );
        drop(proof);
        self.source.running = true;
        self.source.core.handle_guest_resumed(now);
    }

    fn source_connected(&mut self, now: Moment) {
        if !self.target.alive || !self.target.listens || self.chance(|faults| faults.refuse_connect)
        {
            let job = SourceJob::ConnectControl;
            self.source
                .core
                .handle_job_failed(now, job, "connection refused");
            return;
        }
        let link = self.open_link(Use::Control(self.control_connections));
        self.control_connections += 1;
        self.target_accepts(link);
        if self.source.closing {
            self.close_link(link, Side::Source, false);
            if self.rng.chance(500) {
                self.source.core.handle_control_connected(now);
            }
            return;
        }
        self.source.buffer = FrameBuffer::default();
        self.source.control = Some(link);
        if self.source.commit_sent {
            self.asking = Some(link);
        }
        self.source.core.handle_control_connected(now);
    }

    /// Connects are made; their hellos race with each other.
    pub(super) fn dial(&mut self, id: JobId) {
        let Some(at) = self.source.jobs.iter().position(|(job, _)| *job == id) else {
            return;
        };
        let refused = !self.target.alive || self.chance(|faults| faults.refuse_connect);
        if refused || self.source.closing {
            self.source.jobs.remove(at);
            let job = SourceJob::ConnectData;
            let now = self.moment();
            self.source
                .core
                .handle_job_failed(now, job, "connection refused");
            return;
        }
        for hello in std::mem::take(&mut self.source.hellos) {
            let link = self.open_link(Use::Data(hello.index));
            self.source.data.push(link);
            self.target_accepts(link);
            let frame = SourceFrame::DataHello(hello);
            self.write(link, Side::Source, Item::Bytes(frame.encode()));
        }
        // The target may well have answered before this side knows that it is connected.
        let delay = self.job_delay();
        self.schedule(delay, Event::SourceJob(id));
    }

    fn state_saved(&mut self, now: Moment) {
        let vcpus = self.source_vcpus.to_le_bytes();
        let sections = self.devices.iter().map(|device| Section {
            name: device.name.clone(),
            schema: device.schema.clone(),
            version: device.version_max,
            bytes: Bytes::copy_from_slice(&vcpus),
        });
        let state = SavedState {
            sections: sections.collect(),
            ram_hash: self.source.saving_hash.then(|| self.source_memory.hash()),
            hash_us: if self.source.saving_hash { 50 } else { 0 },
        };
        self.source.core.handle_state_saved(now, state);
    }

    fn source_links_closed(&mut self, now: Moment) {
        self.end_link_jobs();
        self.source.closing = false;
        for link in self
            .source
            .data
            .clone()
            .into_iter()
            .chain(self.source.control)
        {
            self.close_link(link, Side::Source, false);
        }
        self.source.control = None;
        self.source.data.clear();
        self.source.round = None;
        self.source.core.handle_links_closed(now);
    }

    pub(super) fn source_receives(&mut self, link: LinkId, item: Item) {
        let now = self.moment();
        if self.source.data.contains(&link) {
            // Data connections carry nothing towards the source, so this is the end of one.
            self.close_link(link, Side::Source, false);
            self.note(|| format!("source: {link:?} is gone"));
            self.source
                .core
                .handle_link_lost(now, "a data connection broke", false);
            return;
        }
        if self.source.control != Some(link) {
            return;
        }
        let Item::Bytes(bytes) = item else {
            self.close_link(link, Side::Source, false);
            self.note(|| format!("source: {link:?} is gone"));
            self.source
                .core
                .handle_link_lost(now, "the control connection broke", false);
            return;
        };
        let cut = self.rng.index(bytes.len() + 1);
        for part in [&bytes[..cut], &bytes[cut..]] {
            self.source.buffer.push(part);
            loop {
                match self.source.buffer.poll_frame::<TargetFrame>() {
                    Ok(Some(frame)) => self.source_hears(now, link, frame),
                    Ok(None) => break,
                    Err(error) => {
                        self.close_link(link, Side::Source, false);
                        self.note(|| format!("source: {error}"));
                        self.source
                            .core
                            .handle_link_lost(now, &error.to_string(), true);
                        return;
                    }
                }
            }
        }
    }

    fn source_hears(&mut self, now: Moment, link: LinkId, frame: TargetFrame) {
        self.note(|| format!("source hears {frame:?}"));
        // On a connection that asks, an ABORT only means that whoever answers does not know.
        let asks = self.asking == Some(link);
        let source = &mut self.source;
        source.denied |= match frame {
            TargetFrame::Abort(_) => !asks,
            TargetFrame::Resolved(Resolution::NotCommitted) => asks,
            _ => false,
        };
        let confirms = match frame {
            TargetFrame::Running { .. } => !asks,
            TargetFrame::Resolved(Resolution::Committed) => asks,
            _ => false,
        };
        source.confirmed |= confirms;
        source.core.handle_frame(now, frame);
        if confirms && let Some(blackout) = source.core.stats().blackout {
            let lasted = now.micros_since(source.stop_asked);
            assert_eq!(
                blackout.total_us(),
                lasted,
                "the parts of the blackout add up"
            );
        }
        self.drive_source();
    }

    /// What must hold of a source that has finished.
    pub(super) fn check_source_ending(&self, ending: Ending) {
        let source = &self.source;
        assert!(source.jobs.is_empty() && !source.has_links() && !source.log_on);
        assert_eq!(
            source.running,
            source.proof.is_none(),
            "the guest stands still without a proof"
        );
        match ending {
            Ending::Completed => {
                assert!(!source.running && source.commit_sent && !source.cancelled);
                let known = source.confirmed || source.operator == Some(Resolution::Committed);
                assert!(known, "completed by guessing");
            }
            Ending::Failed | Ending::Cancelled => {
                let runs = self.guest_should_run && !self.resume_failed;
                assert_eq!(source.running, runs, "I3: the guest goes on as before");
                assert!(!source.cancelled || ending == Ending::Cancelled);
            }
        }
    }
}
