//! Drives the source core: does what its actions say with real sockets, rings, logs and vCPUs, and tells it what happened.

use std::error::Error;
use std::fmt;
use std::sync::Arc;

use vmferry_devices::notifier::{Mode, Notifiers};
use vmferry_transport::control::{Stream, runtime};
use vmferry_transport::data::{
    Backend, BackendChoice, BandwidthLimit, DataError, DataSender, RoundWork, SenderConfig,
    SenderEvent, SenderProgress, ZeroCopy,
};
use vmferry_transport::memory::DirtyMap;
use vmferry_transport::proto::{
    MigrationStatus, Outcome, RoundSent, Source, SourceAction, SourceConfig, SourceJob,
    SourceTuning,
};
use vmferry_transport::units::{Moment, PageCount};
use vmferry_transport::wire::frame::{FrameBuffer, TargetFrame};
use vmferry_transport::wire::hello::DataHello;

mod in_place;
mod jobs;

use super::armed_log::ArmedLog;
use super::clock::Clock;
use super::data_links::{dial, end_sender};
use super::event::{Arrivals, Event, Events, SourceEvent};
use super::guest::StoppedGuest;
use super::jobs::{JobThread, off_thread};
use super::keep::Keep;
use super::link::{ControlLink, LAST_WORD, LinkEvent};
use super::notify::SetupTold;
use super::passthrough::Sources;
use super::route::Route;
use super::successor::InPlace;
use crate::machine::Machine;
use crate::machine::disk::Disks;

/// What the engine must do for the attempt, because it concerns more than the attempt.
#[derive(Debug)]
pub(super) enum OutgoingAction {
    StatusChanged(MigrationStatus),
    PassStarted(u64),
    /// Stop the guest, or hand over the proof if it is stopped.
    StopGuest,
    ResumeGuest(StoppedGuest),
    Unresolved,
    /// Become the new program; returns only if that fails, and tells the core: [`Outgoing::exec`].
    Exec,
    Finished(Outcome<StoppedGuest>),
}

/// An attempt to move the guest away.
pub(super) struct Outgoing {
    attempt: u64,
    core: Source<StoppedGuest>,
    route: Route,
    machine: Arc<dyn Machine>,
    clock: Clock,
    events: Events,
    arrivals: Arrivals,
    /// Control connects so far; news of earlier ones than the last are dropped.
    connects: u64,
    control: Option<ControlLink>,
    sender: Option<DataSender>,
    /// Kept after the threads have ended, for the final record.
    progress: SenderProgress,
    backend: BackendChoice,
    bandwidth: Arc<BandwidthLimit>,
    checksum: bool,
    disks: Arc<Disks>,
    notifiers: Notifiers,
    told: Option<SetupTold>,
    /// The guest has to let go of a device; the notifiers know when it has.
    unplugging: bool,
    log: Option<ArmedLog>,
    work: RoundWork,
    /// Streams that the data threads have not been given yet.
    devices: Option<Sources>,
    dirty: DirtyMap,
    detect_zero_pages: bool,
    /// It ran when the attempt began.
    guest_ran: bool,
    /// Longest time in which the guest could not write before it was stopped, as it says itself.
    guest_stall_us: Option<u64>,
    /// Proof lent to the job that saves the state.
    lent: Option<Arc<crate::machine::VcpusStopped>>,
    /// Connections that were under way when the links were closed end as soon as they notice.
    closing: bool,
    mode: Mode,
    in_place: Option<InPlace>,
    /// Memory stays in a file.
    keep: Option<Keep>,
}

impl fmt::Debug for Outgoing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outgoing")
            .field("attempt", &self.attempt)
            .field("route", &self.route)
            .finish_non_exhaustive()
    }
}

/// What an attempt is started with.
#[derive(Debug)]
pub(super) struct OutgoingStart {
    pub(super) attempt: u64,
    pub(super) route: Route,
    pub(super) config: SourceConfig,
    pub(super) tuning: SourceTuning,
    pub(super) bandwidth: Arc<BandwidthLimit>,
    pub(super) notifiers: Notifiers,
    pub(super) disks: Arc<Disks>,
    pub(super) detect_zero_pages: bool,
    pub(super) mode: Mode,
    /// How it reaches its target, if another program gets the same RAM.
    pub(super) in_place: Option<InPlace>,
    /// Mode cpr-reboot only.
    pub(super) keep: Option<Keep>,
}

/// Why a migration fails whose connections were yanked.
pub(super) const YANKED: &str = "the operator has yanked the connections";

impl Outgoing {
    pub(super) fn start(
        start: OutgoingStart,
        machine: Arc<dyn Machine>,
        clock: Clock,
        events: Events,
    ) -> Self {
        let OutgoingStart {
            attempt,
            route,
            config,
            tuning,
            bandwidth,
            notifiers,
            disks,
            detect_zero_pages,
            mode,
            in_place,
            keep,
        } = start;
        let (checksum, guest_ran) = (config.checksum, config.guest_runs);
        let dirty = machine.ram().empty_map();
        let mut core = Source::new(config, tuning);
        core.start(clock.now());
        Self {
            attempt,
            core,
            route,
            machine,
            clock,
            events,
            arrivals: Arrivals::default(),
            connects: 0,
            control: None,
            sender: None,
            progress: SenderProgress::default(),
            backend: Backend::detect(),
            bandwidth,
            checksum,
            disks,
            notifiers,
            told: None,
            unplugging: false,
            log: None,
            work: RoundWork::default(),
            devices: None,
            dirty,
            detect_zero_pages,
            guest_ran,
            guest_stall_us: None,
            lent: None,
            closing: false,
            mode,
            in_place,
            keep,
        }
    }

    pub(super) fn attempt(&self) -> u64 {
        self.attempt
    }

    pub(super) fn core(&self) -> &Source<StoppedGuest> {
        &self.core
    }

    pub(super) fn core_mut(&mut self) -> &mut Source<StoppedGuest> {
        &mut self.core
    }

    /// Where the guest is to go.
    pub(super) fn route(&self) -> &Route {
        &self.route
    }

    /// Another process has the same RAM.
    pub(super) fn is_in_place(&self) -> bool {
        self.in_place.is_some()
    }

    pub(super) fn backend(&self) -> &BackendChoice {
        &self.backend
    }

    pub(super) fn progress(&self) -> SenderProgress {
        self.sender
            .as_ref()
            .map_or_else(|| self.progress.clone(), DataSender::progress)
    }

    /// Asks the guest for the longest time in which it could not write since the attempt began. Meaningful until it is stopped.
    pub(super) fn note_guest_stall(&mut self) {
        let stats = self.machine.workload_stats().filter(|_| self.guest_ran);
        self.guest_stall_us = stats.map(|stats| stats.longest_gap_us);
    }

    pub(super) fn guest_stall_us(&self) -> Option<u64> {
        self.guest_stall_us
    }

    /// Lets the core know how far the data threads are, and that time has passed.
    pub(super) fn tick(&mut self) {
        let now = self.clock.now();
        if self.core.status() == MigrationStatus::Active {
            self.note_guest_stall();
        }
        if let Some(sender) = &self.sender {
            self.core
                .handle_progress(now, sender.progress().wire_bytes());
        }
        if self.unplugging {
            self.look_whether_unplugged(now);
        }
        if matches!(self.in_place, Some(InPlace::Program(_))) {
            // The one who is waited for is this process.
            self.core.handle_frame(now, TargetFrame::Keepalive);
        }
        self.core.handle_timeout(now);
    }

    fn look_whether_unplugged(&mut self, now: Moment) {
        let Some(told) = &self.told else {
            return;
        };
        match told.pending() {
            Ok(Some(_)) => {}
            Ok(None) => {
                self.unplugging = false;
                self.core.handle_unplugged(now);
            }
            Err(error) => {
                self.unplugging = false;
                self.core.handle_unplug_failed(now, &chain(&error));
            }
        }
    }

    pub(super) fn poll_timeout(&self) -> Option<Moment> {
        self.core.poll_timeout()
    }

    /// The guest is stopped; the job that saves its state will look at the proof.
    fn guest_stopped(&mut self, stopped: StoppedGuest, devices: Result<(), String>) {
        let now = self.clock.now();
        match devices {
            Ok(()) => {
                self.lent = Some(stopped.lend());
                self.core.handle_guest_stopped(now, stopped);
            }
            Err(error) => self.core.handle_devices_not_stopped(now, stopped, &error),
        }
    }

    /// The operator shuts all connections down: a failure before COMMIT, after it a question.
    pub(super) fn yank(&mut self) {
        if let Some(control) = &self.control {
            control.shut();
        }
        // Closes whatever else there is.
        self.core.handle_link_lost(self.clock.now(), YANKED, false);
    }

    pub(super) fn handle(&mut self, event: SourceEvent) {
        let now = self.clock.now();
        match event {
            SourceEvent::Connected(number) => {
                let arrived = self.arrivals.take(number);
                match arrived {
                    Some((stream, _)) if number == self.connects => self.connected(now, stream),
                    // Of a connect that was given up.
                    Some((stream, _)) => stream.shutdown(),
                    None => {}
                }
            }
            SourceEvent::ConnectFailed(number, error) => {
                if number == self.connects {
                    self.core
                        .handle_job_failed(now, SourceJob::ConnectControl, &error);
                }
            }
            SourceEvent::DataConnected(sender) => {
                if self.closing {
                    end_sender(sender, None);
                } else {
                    self.sender = Some(sender);
                    self.core.handle_data_connected(now);
                }
            }
            SourceEvent::Link(LinkEvent::Frame(frame)) => self.core.handle_frame(now, frame),
            SourceEvent::Link(LinkEvent::Lost { error, protocol }) => {
                if self.control.is_some() {
                    self.core.handle_link_lost(now, &error, protocol);
                }
            }
            SourceEvent::Data(SenderEvent::RoundSent { stats, .. }) => {
                let sent = RoundSent {
                    data: PageCount(stats.counts.data_pages),
                    zero: PageCount(stats.counts.zero_pages),
                    wire_bytes: stats.wire_bytes,
                };
                self.core.handle_round_sent(now, sent);
            }
            // No link is to blame, and no target has anything to say about it.
            SourceEvent::Data(SenderEvent::Failed {
                error: error @ DataError::Device { .. },
                ..
            }) => self.core.handle_device_failed(now, &chain(&error)),
            SourceEvent::Data(SenderEvent::Failed { connection, error }) => {
                let text = format!("data connection {connection}: {}", chain(&error));
                let report = self.reporter();
                runtime::spawn(async move {
                    // A target that gives up closes everything; its reason may come last.
                    tokio::time::sleep(LAST_WORD).await;
                    report(SourceEvent::DataLost(text));
                });
            }
            SourceEvent::DataLost(text) => {
                // After COMMIT no page is on its way, and the control connection alone decides.
                if !self.core.in_doubt() {
                    self.core.handle_link_lost(now, &text, false);
                }
            }
            // Kinds of a later version of the transport concern somebody else.
            SourceEvent::Data(_) => {}
            SourceEvent::SetupTold(told, outcome) => {
                self.told = Some(told);
                match outcome {
                    Ok(waiting_for) => self.core.handle_setup_told(now, waiting_for),
                    Err(veto) => self
                        .core
                        .handle_job_failed(now, SourceJob::NotifySetup, &veto),
                }
            }
            SourceEvent::Notified(job) => self.core.handle_notified(now, job),
            SourceEvent::LogStarted(log, work, found, devices) => {
                self.log = Some(log);
                self.work = work;
                self.devices = Some(devices);
                self.core.handle_log_started(now, found);
            }
            SourceEvent::Synced(log, dirty, took_us, sizes) => {
                self.log = Some(log);
                let count = dirty.count();
                self.dirty = dirty;
                self.core
                    .handle_device_sizes(sizes.stop_copy, sizes.initial);
                self.core.handle_synced(now, count, took_us);
            }
            SourceEvent::Stopped(stopped, devices) => self.guest_stopped(stopped, devices),
            SourceEvent::Saved(saved) => self.core.handle_state_saved(now, saved),
            // Taken back meanwhile: what was left is to end before the guest goes on.
            SourceEvent::LinksClosed { left: true } if !self.leaves() => self.close_links(),
            SourceEvent::LinksClosed { .. } => {
                self.closing = false;
                self.core.handle_links_closed(now);
            }
            SourceEvent::FdsOffered => self.core.handle_fds_offered(now),
            SourceEvent::FdsHandedOver => self.core.handle_fds_handed_over(now),
            SourceEvent::LogStopped => self.core.handle_log_stopped(now),
            SourceEvent::Resumed(Ok(())) => self.core.handle_guest_resumed(now),
            SourceEvent::Resumed(Err(error)) => {
                let text = chain(&error.source);
                self.core
                    .handle_resume_failed(now, StoppedGuest::new(error.proof), &text);
            }
            SourceEvent::JobFailed(job, error) => self.core.handle_job_failed(now, job, &error),
        }
    }

    /// Does what the core asks for, up to the next thing that is the engine's to do.
    pub(super) fn poll(&mut self, jobs: &JobThread) -> Option<OutgoingAction> {
        while let Some(action) = self.core.poll_action() {
            match action {
                SourceAction::StatusChanged(status) => {
                    return Some(OutgoingAction::StatusChanged(status));
                }
                SourceAction::PassStarted(pass) => return Some(OutgoingAction::PassStarted(pass)),
                SourceAction::StopGuest => return Some(OutgoingAction::StopGuest),
                SourceAction::ResumeGuest(stopped) => {
                    self.lent = None;
                    return Some(OutgoingAction::ResumeGuest(stopped));
                }
                SourceAction::Unresolved => return Some(OutgoingAction::Unresolved),
                SourceAction::Finished(outcome) => {
                    self.lent = None;
                    return Some(OutgoingAction::Finished(outcome));
                }
                SourceAction::ConnectControl => self.connect_control(),
                SourceAction::SendControl(frame) => {
                    if self.send_control(&frame) {
                        return Some(OutgoingAction::Exec);
                    }
                }
                SourceAction::ConnectData(hellos) => self.connect_data(hellos),
                SourceAction::NotifySetup => {
                    let (report, notifiers) = (self.reporter(), self.notifiers.clone());
                    let (mode, migration) = (self.mode, self.core.migration_id());
                    jobs.run_owing(self.lost(SourceJob::NotifySetup), move || {
                        let (told, outcome) = SetupTold::tell(notifiers, mode, migration);
                        report(SourceEvent::SetupTold(told, outcome));
                    });
                }
                SourceAction::WatchUnplug => self.unplugging = true,
                SourceAction::NotifyFailed => {
                    self.notify(jobs, SourceJob::NotifyFailed, SetupTold::failed);
                }
                SourceAction::NotifyDone => {
                    self.notify(jobs, SourceJob::NotifyDone, SetupTold::done);
                }
                SourceAction::Throttle(percent) => self.machine.throttle(percent),
                SourceAction::StartLog => self.start_log(jobs),
                SourceAction::SendRound { round, last } => {
                    let mut work = std::mem::take(&mut self.work);
                    work.runs.extend(self.dirty.runs());
                    work.zeros_as_data = !self.detect_zero_pages;
                    self.dirty.clear();
                    match &self.sender {
                        Some(sender) => {
                            if let Some(devices) = self.devices.take() {
                                sender.set_devices(devices);
                            }
                            sender.set_protector(self.log.as_ref().and_then(ArmedLog::protector));
                            sender.send_round(round, work, last);
                        }
                        // The links are being closed, which ends the job.
                        None => tracing::debug!("a round without connections"),
                    }
                }
                SourceAction::Sync => self.sync(jobs),
                SourceAction::SaveState { hash_ram } => self.save(jobs, hash_ram),
                SourceAction::CloseLinks => self.close_links(),
                SourceAction::StopLog => self.stop_log(jobs),
                SourceAction::OfferFds => self.offer_fds(),
                SourceAction::HandOverFds => self.hand_over_fds(),
            }
        }
        None
    }

    fn reporter(&self) -> impl Fn(SourceEvent) + Clone + Send + Sync + 'static {
        let (events, attempt) = (self.events.clone(), self.attempt);
        move |event| {
            // The engine outlives every attempt, except when the process ends.
            let _ = events.send(Event::Source(attempt, event));
        }
    }

    fn connect_control(&mut self) {
        if matches!(self.in_place, Some(InPlace::Program(_))) {
            // There is nobody to connect to.
            return self.core.handle_control_connected(self.clock.now());
        }
        self.connects += 1;
        let number = self.connects;
        let (report, route, arrivals) =
            (self.reporter(), self.route.clone(), self.arrivals.clone());
        runtime::spawn(async move {
            report(match route.control().await {
                Ok(stream) => {
                    arrivals.leave(number, stream, FrameBuffer::default());
                    SourceEvent::Connected(number)
                }
                Err(error) => SourceEvent::ConnectFailed(number, error),
            });
        });
    }

    fn connected(&mut self, now: Moment, stream: Stream) {
        if self.closing {
            stream.shutdown();
            return;
        }
        let report = self.reporter();
        self.control = Some(ControlLink::start(
            stream,
            FrameBuffer::default(),
            move |event| report(SourceEvent::Link(event)),
        ));
        self.core.handle_control_connected(now);
    }

    fn connect_data(&self, hellos: Vec<DataHello>) {
        let (report, route, ram) = (
            self.reporter(),
            self.route.clone(),
            self.machine.ram().clone(),
        );
        let config = SenderConfig {
            backend: self.backend.backend,
            checksum: self.checksum,
            bandwidth: Arc::clone(&self.bandwidth),
            zero_copy: ZeroCopy::Auto,
        };
        runtime::spawn(async move {
            let dials: Vec<_> = hellos
                .into_iter()
                .map(|hello| runtime::spawn(dial(route.clone(), hello)))
                .collect();
            let mut sockets = Vec::with_capacity(dials.len());
            for dial in dials {
                match dial.await {
                    Ok(Ok(socket)) => sockets.push(socket),
                    Ok(Err(error)) => {
                        return report(SourceEvent::JobFailed(SourceJob::ConnectData, error));
                    }
                    Err(error) => {
                        return report(SourceEvent::JobFailed(
                            SourceJob::ConnectData,
                            error.to_string(),
                        ));
                    }
                }
            }
            let tell = report.clone();
            let started = DataSender::start(
                sockets,
                ram,
                config,
                Arc::new(move |event| tell(SourceEvent::Data(event))),
            );
            report(match started {
                Ok(sender) => SourceEvent::DataConnected(sender),
                Err(error) => SourceEvent::JobFailed(SourceJob::ConnectData, chain(&error)),
            });
        });
    }

    /// Data threads are joined on a thread of their own: the control thread never waits for them.
    fn close_links(&mut self) {
        self.closing = true;
        self.in_place.iter_mut().for_each(InPlace::close);
        let report = self.reporter();
        let (control, sender) = (self.control.take(), self.sender.take());
        if let Some(sender) = &sender {
            self.progress = sender.progress();
        }
        let (joined, join) = tokio::sync::oneshot::channel::<()>();
        match sender {
            Some(sender) => end_sender(sender, Some(joined)),
            // Nothing to wait for: the other end learns that this one is gone.
            None => drop(joined),
        }
        let route = self.route.clone();
        let leave = self.leaves();
        let undo = self.keep.as_ref().filter(|_| !leave).map(Keep::undo);
        runtime::spawn(async move {
            if let Some(control) = control {
                control.close().await;
            }
            route.close(leave).await;
            if let Some(undo) = undo
                && let Err(error) = off_thread("undo", undo).await
            {
                tracing::error!(
                    error,
                    "a file of memory may be marked as that of a saved guest"
                );
            }
            // Resolves when the sending end is dropped, which is when the data threads are gone.
            let _ = join.await;
            report(SourceEvent::LinksClosed { left: leave });
        });
    }

    /// What was given away stays there as long as nobody has taken it back.
    fn leaves(&self) -> bool {
        self.core.in_doubt() || self.core.status() == MigrationStatus::Completed
    }
}

/// An error with all its causes in one line.
pub(super) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
