//! The host that the guest leaves: a driver of the source core, with a dirty log and vCPUs of its own.

use bytes::Bytes;
use vmferry_transport::proto::{
    MigrationStatus, Outcome, SavedState, Source, SourceAction, SourceJob, Target, TargetConfig,
    TargetStatus,
};
use vmferry_transport::units::Moment;
use vmferry_transport::wire::Section;
use vmferry_transport::wire::frame::{FrameBuffer, Resolution, SourceFrame};
use vmferry_transport::wire::hello::DataHello;

use super::commands::Command;
use super::guest::{Page, PageSet, SimProof, Snapshot};
use super::net::LinkId;
use super::notifiers::Audience;
use super::rounds::Round;
use super::run_control::{Disks, Guest, Operation};
use super::setup::target_config;
use super::{Event, JobId, PASSES_MAX, Side, World};

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
    pub(super) guest: Guest,
    /// What the operator has asked for and a job is doing.
    pub(super) operation: Option<(JobId, Operation)>,
    /// The migration wants the guest stopped when that job is done.
    pub(super) switchover_waits: bool,
    pub(super) disks: Disks,
    /// The process ends when the attempt is over.
    pub(super) quits: bool,
    /// The operator is about to try again.
    pub(super) tries_again: bool,
    pub(super) ending: Option<Ending>,
    pub(super) status: MigrationStatus,
    pub(super) closing: bool,
    pub(super) unsent: PageSet,
    pub(super) holes: Vec<Page>,
    pub(super) control: Option<LinkId>,
    pub(super) data: Vec<LinkId>,
    pub(super) hellos: Vec<DataHello>,
    pub(super) buffer: FrameBuffer,
    pub(super) round: Option<Round>,
    pub(super) progress_bytes: u64,
    saving_hash: bool,
    resuming: Option<SimProof>,
    pub(super) stop_asked: Moment,
    pub(super) commit_sent: bool,
    /// The target's word that it will never run this guest has arrived.
    pub(super) denied: bool,
    /// The target's word that the guest is its own has arrived.
    pub(super) confirmed: bool,
    pub(super) operator: Option<Resolution>,
    pub(super) cancelled: bool,
    pub(super) notifiers: Audience,
    /// Somebody looks whether the guest has let go of its devices.
    watch: Option<JobId>,
    pub(super) throttle: u8,
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
            guest: Guest::Running,
            operation: None,
            switchover_waits: false,
            disks: Disks::default(),
            quits: false,
            tries_again: false,
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
            notifiers: Audience::new(0),
            watch: None,
            throttle: 0,
        }
    }

    pub(super) fn has_job(&self, job: SourceJob) -> bool {
        self.jobs.iter().any(|(_, running)| *running == job)
    }

    /// vCPUs run, or may at any moment.
    pub(super) fn may_run(&self) -> bool {
        let starts = matches!(self.operation, Some((_, Operation::Cont(_))));
        self.alive && (self.running || self.resuming.is_some() || starts)
    }

    pub(super) fn has_links(&self) -> bool {
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
        self.notifiers.begin_again();
        self.watch = None;
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
                    let never = self.chance(|faults| faults.never_continue);
                    let command = if never {
                        Command::Cancel
                    } else {
                        Command::Continue
                    };
                    let delay = self.rng.below(60_000_000);
                    self.schedule(delay, Event::Order(command));
                }
                let from = std::mem::replace(&mut self.source.status, to);
                assert!(from.may_become(to), "status {from} became {to}");
            }
            SourceAction::PassStarted(pass) => {
                if pass.is_multiple_of(PASSES_MAX) {
                    self.limit_raised = true;
                    self.execute(Command::SetDowntimeLimit(u64::MAX));
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
                let watch = self.new_job();
                self.source.watch = Some(watch);
                let refuses = self.chance(|faults| faults.unplug_never);
                // In time, too late, or never.
                let delay = match self.rng.below(3) {
                    _ if !refuses => Some(self.rng.below(25_000_000)),
                    0 => Some(self.rng.below(60_000_000)),
                    1 => Some(35_000_000),
                    _ => None,
                };
                if let Some(delay) = delay {
                    let done = !refuses || delay == 35_000_000;
                    self.schedule(delay, Event::Unplug { watch, done });
                }
            }
            SourceAction::NotifyFailed => {
                let cleaned_up = !self.source.has_links() && !self.source.log_on;
                assert!(cleaned_up, "I7: FAILED before everything else is undone");
                self.source.watch = None;
                self.start_source_job(SourceJob::NotifyFailed);
            }
            SourceAction::NotifyDone => {
                self.source.watch = None;
                self.start_source_job(SourceJob::NotifyDone);
            }
            SourceAction::Throttle(percent) => {
                assert!(percent <= 99, "a throttled guest still runs");
                self.see(if percent == 0 {
                    "the guest runs freely again"
                } else {
                    "the guest is slowed down"
                });
                self.source.throttle = percent;
            }
            SourceAction::OfferFds => _ = self.start_source_job(SourceJob::OfferFds),
            SourceAction::HandOverFds => {
                assert!(!self.source.running, "descriptors of a running guest leave");
                let told = self.source.notifiers.waits_for_the_end();
                assert!(told, "descriptors leave before everybody has let go");
                self.start_source_job(SourceJob::HandOverFds);
            }
            SourceAction::StartLog => {
                assert!(!self.in_place, "a dirty log although no page moves");
                let told = self.source.notifiers.waits_for_the_end();
                assert!(told, "I7: SETUP comes first");
                assert_eq!(self.source.watch, None, "the guest was waited for");
                self.start_source_job(SourceJob::StartLog);
            }
            SourceAction::SendRound { round, last } => self.send_round(round, last),
            SourceAction::Sync => _ = self.start_source_job(SourceJob::Sync),
            SourceAction::StopGuest => {
                self.source.stop_asked = self.moment();
                self.stop_guest();
            }
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
                let delay = self.rng.below(300_000_000);
                self.schedule(delay, Event::Operator);
            }
            SourceAction::Finished(outcome) => self.source_finished(outcome),
        }
    }

    pub(super) fn start_source_job(&mut self, job: SourceJob) -> JobId {
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

    /// The guest may have been stopped by the operator meanwhile; then its proof is here already.
    pub(super) fn stop_guest(&mut self) {
        let now = self.moment();
        self.stopped_at_step.get_or_insert(self.step);
        match std::mem::replace(&mut self.source.guest, Guest::Away) {
            Guest::Stopped(proof) => self.source.core.handle_guest_stopped(now, proof),
            Guest::Running => _ = self.start_source_job(SourceJob::StopGuest),
            Guest::Away => {
                let waits = std::mem::replace(&mut self.source.switchover_waits, true);
                assert!(!waits && self.source.operation.is_some(), "who has it?");
            }
        }
    }

    /// I3: every debt is paid before the guest runs again. I1: after COMMIT only on somebody's word.
    fn resume_guest(&mut self, proof: SimProof) {
        assert!(
            !self.source.has_links(),
            "resumed before the links are closed"
        );
        assert!(!self.source.log_on, "resumed before the dirty log is off");
        let told = self.source.notifiers.waits_for_the_end();
        assert!(!told, "I7: resumed before FAILED");
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
        self.begin_taking_disks(Side::Source);
    }

    fn source_finished(&mut self, outcome: Outcome<SimProof>) {
        let source = &mut self.source;
        assert!(source.jobs.is_empty() && !source.has_links() && !source.log_on);
        assert!(!source.switchover_waits, "over, and it wants the guest");
        assert_eq!(source.throttle, 0, "over, and the guest is still throttled");
        let ending = match source.status {
            MigrationStatus::Completed => Ending::Completed,
            MigrationStatus::Failed => Ending::Failed,
            MigrationStatus::Cancelled => Ending::Cancelled,
            status => panic!("finished while {status}"),
        };
        source.ending = Some(ending);
        source.notifiers.check_end(ending == Ending::Completed);
        match outcome {
            Outcome::Completed(proof) => {
                assert_eq!(ending, Ending::Completed);
                assert!(!source.disks.active, "handed over without the disks");
                source.guest = Guest::Stopped(proof);
            }
            Outcome::Failed { stopped, .. } => {
                assert_ne!(ending, Ending::Completed);
                if let Some(proof) = stopped {
                    assert!(matches!(source.guest, Guest::Away), "two proofs");
                    source.guest = Guest::Stopped(proof);
                    // Jobs are done in their order, so this comes before any that another attempt gives.
                    self.begin_taking_disks(Side::Source);
                    self.take_disks(Side::Source);
                }
                self.try_again_soon();
            }
        }
        if self.source.quits {
            self.end_source();
        }
    }

    pub(super) fn unplug(&mut self, watch: JobId, done: bool) {
        if self
            .source
            .watch
            .take_if(|watched| *watched == watch)
            .is_none()
        {
            return;
        }
        let now = self.moment();
        self.see(if done {
            "the guest lets go of its devices"
        } else {
            "the guest will not let go of its devices"
        });
        if done {
            self.source.core.handle_unplugged(now);
        } else {
            let error = "the guest will not let go of net0";
            self.source.core.handle_unplug_failed(now, error);
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
            SourceJob::NotifyFailed => {
                self.source.notifiers.failed();
                self.source.core.handle_notified(now, job);
            }
            SourceJob::NotifyDone => {
                self.source.notifiers.done();
                self.source.core.handle_notified(now, job);
            }
            SourceJob::NotifySetup => {
                let count = self.source.notifiers.count();
                let vetoes = (fails && count > 0).then(|| self.rng.index(count));
                let id = self.source.core.migration_id();
                if !self.source.notifiers.set_up(id, vetoes) {
                    self.see("a notifier vetoes");
                    self.source
                        .core
                        .handle_job_failed(now, job, "a notifier vetoes");
                } else {
                    let waits = self.rng.chance(self.faults.unplug_wait);
                    let device = waits.then(|| "net0".to_owned());
                    self.source.core.handle_setup_told(now, device);
                }
            }
            SourceJob::StopGuest if fails && self.rng.chance(500) => {
                self.see("a device does not stop");
                let proof = self.pause_guest();
                self.source
                    .core
                    .handle_devices_not_stopped(now, proof, "the device writes on");
            }
            job if fails => {
                if job == SourceJob::StopGuest {
                    self.source.guest = Guest::Running;
                }
                // Either the disks could not be inactivated, or the state could not be saved.
                if job == SourceJob::SaveState {
                    self.source.disks.active &= self.rng.chance(500);
                }
                self.source
                    .core
                    .handle_job_failed(now, job, "the disk is on fire");
            }
            SourceJob::ConnectControl => self.source_connected(now),
            SourceJob::ConnectData => self.source.core.handle_data_connected(now),
            SourceJob::StartLog => self.log_started(now),
            SourceJob::OfferFds => self.fds_offered(now),
            SourceJob::HandOverFds if self.target.alive => {
                self.source.core.handle_fds_handed_over(now);
            }
            SourceJob::HandOverFds => {
                self.source
                    .core
                    .handle_job_failed(now, job, "the new process has gone");
            }
            SourceJob::Round => unreachable!("rounds end when all is sent"),
            SourceJob::Sync => {
                let log = self.source.log.clone();
                self.source.unsent.unite(&log);
                self.source.log.clear();
                let dirty = self.source.unsent.count();
                let took_us = self.rng.below(300);
                // A device with a little to give; now and then it begins anew.
                let initial = self.rng.below(5).saturating_sub(3);
                let stop_copy = self.rng.below(4096);
                self.source.core.handle_device_sizes(stop_copy, initial);
                self.source.core.handle_synced(now, dirty, took_us);
            }
            SourceJob::StopGuest => {
                let proof = self.pause_guest();
                self.source.core.handle_guest_stopped(now, proof);
            }
            SourceJob::SaveState => {
                self.source.disks.active = false;
                self.state_saved(now);
            }
        }
    }

    /// A process that has not been anything yet builds its machine around the source's RAM.
    fn fds_offered(&mut self, now: Moment) {
        if !self.target.alive {
            let text = "no process was started";
            self.source
                .core
                .handle_job_failed(now, SourceJob::OfferFds, text);
            return;
        }
        if self.target.status != TargetStatus::None {
            self.end_target();
            self.target = self.new_target();
        }
        let config = TargetConfig {
            in_place: Some(self.source.core.migration_id()),
            ..target_config(&self.blocks, &self.devices)
        };
        self.target.core = Target::new(config);
        self.see("RAM stays in place");
        self.source.core.handle_fds_offered(now);
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
        if !self.take_disks(Side::Source) || fails {
            self.guest_should_run = false;
            self.owes_cont = true;
            self.source
                .core
                .handle_resume_failed(now, proof, "no such vCPU");
            return;
        }
        self.run_source(proof);
        self.source.core.handle_guest_resumed(now);
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

    /// What must hold of a source that has finished.
    pub(super) fn check_source_ending(&self, ending: Ending) {
        let source = &self.source;
        assert!(source.jobs.is_empty() && !source.has_links() && !source.log_on);
        if source.operation.is_some() {
            // The guest is about to be stopped or started.
            return;
        }
        match (&source.guest, source.running) {
            (Guest::Running, true) | (Guest::Stopped(_), false) => {}
            (guest, running) => panic!("it runs: {running}, and the engine has {guest:?}"),
        }
        match ending {
            Ending::Completed => {
                assert!(!source.running && source.commit_sent && !source.cancelled);
                let known = source.confirmed || source.operator == Some(Resolution::Committed);
                assert!(known, "completed by guessing");
            }
            Ending::Failed | Ending::Cancelled => {
                let runs = self.guest_should_run;
                assert_eq!(source.running, runs, "I3: the guest goes on as before");
                assert!(!source.cancelled || ending == Ending::Cancelled);
            }
        }
    }
}
