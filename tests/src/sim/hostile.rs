//! Each core against a peer that does not play by the rules, while its own jobs end in any order, well or not.
//!
//! The driver keeps to its contract; the peer does not. Checked: no panic, no guest that runs against I1, no proof lost, an end.

use bytes::Bytes;
use vmferry_transport::proto::{
    Connection, FirstRound, Loaded, Outcome, RoundSent, SavedState, Source, SourceAction,
    SourceConfig, SourceJob, Target, TargetAction, TargetConfig, TargetError, TargetJob,
    TargetStatus,
};
use vmferry_transport::units::{MigrationId, Moment, PageCount, RoundId};
use vmferry_transport::wire::Section;
use vmferry_transport::wire::frame::{
    AbortCode, FrameBuffer, Ready, Resolution, SourceFrame, StateEnd, TargetFrame, Verification,
};
use vmferry_transport::wire::hello::{DataHello, HelloReply};

use super::frames::{self, Knowledge};
use super::guest::{ProofCount, SimProof};
use super::rng::Rng;
use super::{block_infos, device, tuning};

/// Events of one fuzzed run.
const STEPS: u64 = 150;
/// Events until a run must have ended once the peer is silent and nothing fails any more.
const STEPS_TO_END: u64 = 2_000;

fn knowledge(rng: &mut Rng) -> Knowledge {
    Knowledge {
        id: frames::random_id(rng),
        round: 0,
        connections: rng.within(1..=3) as u16,
        blocks: block_infos(&[16, 4]),
        devices: (0..rng.within(1..=2)).map(device).collect(),
    }
}

/// How deep a fuzzed run got, so that a test can tell that it was not all about the first frame.
#[derive(Clone, Copy, Debug, Default)]
pub struct Depth {
    /// COMMIT was sent or received.
    pub committed: bool,
    /// The guest moved.
    pub completed: bool,
    /// The operator was told that the outcome is unknown.
    pub unresolved: bool,
}

#[derive(Debug)]
struct SourceUnderFire {
    rng: Rng,
    core: Source<SimProof>,
    knows: Knowledge,
    now: u64,
    jobs: Vec<SourceJob>,
    connected: bool,
    buffer: FrameBuffer,
    /// What an honest target would say next.
    expected: Option<TargetFrame>,
    proofs: ProofCount,
    /// Given back for good.
    kept: Option<SimProof>,
    resuming: Option<SimProof>,
    running: bool,
    commit_sent: bool,
    /// Somebody who may say so said that the guest stays here.
    denied: bool,
    finished: bool,
    depth: Depth,
}

/// Runs the source core against a hostile target.
pub fn fuzz_source(seed: u64) -> Depth {
    let mut rng = Rng::new(seed);
    let knows = knowledge(&mut rng);
    let config = SourceConfig {
        migration_id: knows.id,
        data_connections: knows.connections,
        checksum: false,
        verify: rng.chance(300),
        software: "victim".to_owned(),
        blocks: knows.blocks.clone(),
        devices: knows.devices.clone(),
        guest_runs: true,
    };
    let mut run = SourceUnderFire {
        core: Source::new(config, tuning(1_000_000_000_000)),
        rng,
        knows,
        now: 1,
        jobs: Vec::new(),
        connected: false,
        buffer: FrameBuffer::default(),
        expected: None,
        proofs: ProofCount::default(),
        kept: None,
        resuming: None,
        running: true,
        commit_sent: false,
        denied: false,
        finished: false,
        depth: Depth::default(),
    };
    run.core.start(Moment(1));
    run.drive();
    for _ in 0..STEPS {
        run.step();
    }
    run.end();
    run.depth
}

impl SourceUnderFire {
    fn step(&mut self) {
        self.now += self.rng.pick(&[0, 1, 50, 1_000, 2_000_000]);
        let now = Moment(self.now);
        match self.rng.below(40) {
            0..15 if self.connected => self.peer_sends(),
            15..32 => self.end_a_job(30),
            32 if self.connected && self.rng.chance(300) => {
                let protocol = self.rng.chance(300);
                self.core.handle_link_lost(now, "gone", protocol);
            }
            33 if self.rng.chance(100) && self.core.handle_cancel(now).is_err() => {
                assert!(self.commit_sent);
            }
            34 => {
                let resolution = self
                    .rng
                    .pick(&[Resolution::Committed, Resolution::NotCommitted]);
                if self.core.handle_operator_resolution(now, resolution) {
                    self.denied |= resolution == Resolution::NotCommitted;
                }
            }
            35 => self.core.handle_progress(now, self.now),
            36 | 37 => self.wait(),
            _ => {}
        }
        self.drive();
        self.check();
    }

    fn wait(&mut self) {
        if let Some(at) = self.core.poll_timeout() {
            self.now = self.now.max(at.0);
            self.core.handle_timeout(Moment(self.now));
            assert!(
                self.core
                    .poll_timeout()
                    .is_none_or(|next| next.0 > self.now),
                "I6: the timer fires in a circle"
            );
        }
    }

    fn check(&self) {
        assert_eq!(
            self.proofs.get(),
            u32::from(!self.running),
            "proofs that the guest is stopped"
        );
    }

    /// The peer is silent from now on, and nothing fails.
    fn end(&mut self) {
        for _ in 0..STEPS_TO_END {
            if self.finished {
                break;
            }
            if self.jobs.is_empty() || self.rng.chance(200) {
                self.wait();
            } else {
                self.end_a_job(0);
            }
            if self.core.is_unresolved() {
                self.denied = true;
                assert!(
                    self.core
                        .handle_operator_resolution(Moment(self.now), Resolution::NotCommitted)
                );
            }
            self.drive();
            self.check();
        }
        assert!(self.finished, "I6: the attempt never ends: {:?}", self.core);
        assert_eq!(self.core.poll_timeout(), None);
    }

    fn peer_sends(&mut self) {
        // Mostly what helps, or runs would end before they have begun.
        let frame = match self.expected.take() {
            _ if self.rng.chance(40) => frames::target_frame(&mut self.rng, &self.knows),
            Some(frame) => frame,
            None => TargetFrame::Keepalive,
        };
        let mut bytes = frame.encode();
        if self.rng.chance(15) {
            frames::mutate(&mut self.rng, &mut bytes);
        }
        self.buffer.push(&bytes);
        loop {
            let now = Moment(self.now);
            match self.buffer.poll_frame::<TargetFrame>() {
                Ok(Some(frame)) => {
                    self.denied |= matches!(
                        frame,
                        TargetFrame::Abort(_) | TargetFrame::Resolved(Resolution::NotCommitted)
                    );
                    self.core.handle_frame(now, frame);
                }
                Ok(None) => return,
                Err(error) => {
                    self.buffer = FrameBuffer::default();
                    self.core.handle_link_lost(now, &error.to_string(), true);
                    return;
                }
            }
            self.drive();
        }
    }

    fn end_a_job(&mut self, fail: u32) {
        if self.jobs.is_empty() {
            return;
        }
        let at = self.rng.index(self.jobs.len());
        let job = self.jobs.remove(at);
        let now = Moment(self.now);
        let fails = self.rng.chance(fail);
        let pages = PageCount(self.rng.pick(&[0, 1, 20]));
        match job {
            SourceJob::CloseLinks => {
                self.connected = false;
                self.jobs.retain(|job| {
                    !matches!(
                        job,
                        SourceJob::ConnectControl | SourceJob::ConnectData | SourceJob::Round
                    )
                });
                self.core.handle_links_closed(now);
            }
            SourceJob::StopLog => self.core.handle_log_stopped(now),
            SourceJob::ResumeGuest => {
                let proof = self.resuming.take();
                match proof {
                    Some(proof) if fails => self.core.handle_resume_failed(now, proof, "no"),
                    _ => {
                        self.running = true;
                        drop(proof);
                        self.core.handle_guest_resumed(now);
                    }
                }
            }
            job if fails => self.core.handle_job_failed(now, job, "no"),
            SourceJob::ConnectControl => {
                self.connected = true;
                self.buffer = FrameBuffer::default();
                self.core.handle_control_connected(now);
            }
            SourceJob::ConnectData => self.core.handle_data_connected(now),
            SourceJob::StartLog => self.core.handle_log_started(
                now,
                FirstRound {
                    present: pages,
                    holes: PageCount(0),
                },
            ),
            SourceJob::Round => self.core.handle_round_sent(
                now,
                RoundSent {
                    data: pages,
                    ..RoundSent::default()
                },
            ),
            SourceJob::Sync => self.core.handle_synced(now, pages, 10),
            SourceJob::StopGuest => {
                self.running = false;
                self.core.handle_guest_stopped(now, self.proofs.make());
            }
            SourceJob::SaveState => {
                let devices = self.knows.devices.clone();
                let sections = devices
                    .iter()
                    .map(|_| frames::section(&mut self.rng, &self.knows));
                let state = SavedState {
                    sections: sections.collect(),
                    ram_hash: Some(9),
                    hash_us: 1,
                };
                self.core.handle_state_saved(now, state);
            }
        }
    }

    fn drive(&mut self) {
        while let Some(action) = self.core.poll_action() {
            assert!(!self.finished, "an action after the end: {action:?}");
            match action {
                SourceAction::SendControl(frame) => self.sent(&frame),
                SourceAction::ConnectControl => self.jobs.push(SourceJob::ConnectControl),
                SourceAction::ConnectData(_) => {
                    self.expected = Some(TargetFrame::DataReady);
                    self.jobs.push(SourceJob::ConnectData);
                }
                SourceAction::StartLog => self.jobs.push(SourceJob::StartLog),
                SourceAction::SendRound { round, .. } => {
                    self.knows.round = round.0;
                    self.expected = Some(TargetFrame::RoundPlaced(round));
                    self.jobs.push(SourceJob::Round);
                }
                SourceAction::Sync => self.jobs.push(SourceJob::Sync),
                SourceAction::StopGuest => self.jobs.push(SourceJob::StopGuest),
                SourceAction::SaveState { .. } => self.jobs.push(SourceJob::SaveState),
                SourceAction::CloseLinks => self.jobs.push(SourceJob::CloseLinks),
                SourceAction::StopLog => self.jobs.push(SourceJob::StopLog),
                SourceAction::ResumeGuest(proof) => {
                    assert!(
                        !self.commit_sent || self.denied,
                        "I1: resumed after COMMIT by guessing"
                    );
                    assert!(
                        self.jobs.is_empty() && !self.connected,
                        "resumed before all debts are paid"
                    );
                    self.resuming = Some(proof);
                    self.jobs.push(SourceJob::ResumeGuest);
                }
                SourceAction::Finished(outcome) => {
                    self.finished = true;
                    assert!(self.jobs.is_empty() && !self.connected);
                    match outcome {
                        Outcome::Completed(proof) => {
                            assert!(self.commit_sent);
                            self.depth.completed = true;
                            self.kept = Some(proof);
                        }
                        Outcome::Failed { stopped, .. } => self.kept = stopped,
                    }
                }
                SourceAction::Unresolved => {
                    assert!(self.commit_sent);
                    self.depth.unresolved = true;
                }
                SourceAction::StatusChanged(_) | SourceAction::PassStarted(_) => {}
            }
        }
    }

    fn sent(&mut self, frame: &SourceFrame) {
        assert!(self.connected, "{frame:?} is sent without a connection");
        let ready = Ready {
            load_us: 1,
            populated_bytes: 0,
            verification: Some(Verification {
                ram_hash: 9,
                ..Verification::default()
            }),
        };
        match frame {
            SourceFrame::Hello(_) => {
                self.expected = Some(TargetFrame::HelloReply(HelloReply {
                    version: 1,
                    software: String::new(),
                }));
            }
            SourceFrame::StateEnd(_) => self.expected = Some(TargetFrame::Ready(ready)),
            SourceFrame::Commit => {
                assert!(!self.running);
                self.commit_sent = true;
                self.depth.committed = true;
                // What was denied before says nothing about COMMIT.
                self.denied = false;
                self.expected = self
                    .rng
                    .chance(500)
                    .then_some(TargetFrame::Running { resume_us: 1 });
            }
            SourceFrame::Resolve(_) => {
                let resolution = self
                    .rng
                    .pick(&[Resolution::Committed, Resolution::NotCommitted]);
                self.expected = self
                    .rng
                    .chance(300)
                    .then_some(TargetFrame::Resolved(resolution));
            }
            _ => {}
        }
    }
}

#[derive(Debug)]
struct TargetUnderFire {
    rng: Rng,
    core: Target,
    knows: Knowledge,
    now: u64,
    jobs: Vec<TargetJob>,
    /// Open connections, and whether their first frame has come.
    open: Vec<(Connection, bool)>,
    connections: u64,
    receiving: bool,
    /// How many of the frames of the switchover were sent.
    said: usize,
    status: TargetStatus,
    /// COMMIT came on the control connection of the attempt, after READY.
    committed: bool,
    ready_sent: bool,
    started: bool,
    failed: bool,
    settled: bool,
    depth: Depth,
}

/// Runs the target core against hostile sources.
pub fn fuzz_target(seed: u64) -> Depth {
    let mut rng = Rng::new(seed);
    let knows = knowledge(&mut rng);
    let config = TargetConfig {
        blocks: knows.blocks.clone(),
        devices: knows.devices.clone(),
        software: "victim".to_owned(),
    };
    let mut run = TargetUnderFire {
        core: Target::new(config),
        rng,
        knows,
        now: 1,
        jobs: Vec::new(),
        open: Vec::new(),
        connections: 0,
        receiving: false,
        said: 0,
        status: TargetStatus::None,
        committed: false,
        ready_sent: false,
        started: false,
        failed: false,
        settled: false,
        depth: Depth::default(),
    };
    for _ in 0..STEPS {
        run.step();
    }
    run.end();
    run.depth
}

impl TargetUnderFire {
    fn step(&mut self) {
        self.now += self.rng.pick(&[0, 1, 50, 1_000, 300_000]);
        let now = Moment(self.now);
        match self.rng.below(40) {
            0..6 => self.somebody_connects(),
            6..20 => self.somebody_sends(),
            20..30 => self.end_a_job(20),
            30..34 if self.receiving => {
                let last = self.said > 0 || self.rng.chance(50);
                let round = self.knows.round;
                self.core.handle_round_placed(now, RoundId(round), last);
                self.knows.round = round.wrapping_add(u32::from(!last));
            }
            34 if self.receiving && self.rng.chance(100) => {
                self.core
                    .handle_data_failed(now, TargetError::Link("gone".to_owned()));
            }
            35 if !self.open.is_empty() && self.rng.chance(300) => {
                let at = self.rng.index(self.open.len());
                let (connection, _) = self.open.remove(at);
                let protocol = self.rng.chance(300);
                self.core
                    .handle_connection_lost(now, connection, "gone", protocol);
            }
            36 if self.rng.chance(100) => self.core.handle_cancel(now),
            37 if self.rng.chance(200) => self.wait(),
            38 if self.failed => self.listen_again(),
            _ => {}
        }
        self.drive();
    }

    fn listen_again(&mut self) {
        self.failed = false;
        self.knows.id = frames::random_id(&mut self.rng);
        self.knows.round = 0;
        self.core.listen_again(Moment(self.now));
    }

    fn wait(&mut self) {
        if let Some(at) = self.core.poll_timeout() {
            self.now = self.now.max(at.0);
            self.core.handle_timeout(Moment(self.now));
            assert!(
                self.core
                    .poll_timeout()
                    .is_none_or(|next| next.0 > self.now),
                "I6: the timer fires in a circle"
            );
        }
    }

    fn end(&mut self) {
        for _ in 0..STEPS_TO_END {
            if self.jobs.is_empty() {
                self.wait();
            } else {
                self.end_a_job(0);
            }
            self.drive();
        }
        assert!(self.jobs.is_empty());
        assert_eq!(
            self.core.poll_timeout(),
            None,
            "I6: the target waits for ever: {:?}",
            self.core
        );
    }

    fn somebody_connects(&mut self) {
        let connection = Connection(self.connections);
        self.connections += 1;
        self.open.push((connection, false));
        let frame = match self.rng.below(6) {
            0..4 if self.status != TargetStatus::Setup => {
                SourceFrame::Hello(frames::good_hello(&self.knows))
            }
            0..5 => SourceFrame::DataHello(DataHello {
                version: 1,
                migration_id: self.knows.id,
                index: self.rng.below(u64::from(self.knows.connections)) as u16,
                count: self.knows.connections,
            }),
            _ => frames::source_frame(&mut self.rng, &self.knows),
        };
        // A question ends the attempt, so most runs do without it until there is something to ask for.
        if matches!(frame, SourceFrame::Resolve(_)) && !self.committed && self.rng.chance(800) {
            self.open.pop();
            return;
        }
        self.receive(connection, frame);
    }

    fn somebody_sends(&mut self) {
        let control = self.core.control().filter(|_| self.rng.chance(900));
        let connection = match control {
            Some(control) => control,
            None if self.open.is_empty() => return,
            None => {
                let at = self.rng.index(self.open.len());
                self.open[at].0
            }
        };
        let Some((_, begun)) = self.open.iter().find(|(open, _)| *open == connection) else {
            return;
        };
        let frame = if *begun && self.receiving && self.rng.chance(970) {
            self.next_honest_frame()
        } else if *begun && self.rng.chance(980) {
            SourceFrame::Keepalive
        } else {
            frames::source_frame(&mut self.rng, &self.knows)
        };
        let mut bytes = frame.encode();
        if self.rng.chance(5) {
            frames::mutate(&mut self.rng, &mut bytes);
        }
        let mut buffer = FrameBuffer::default();
        buffer.push(&bytes);
        match buffer.poll_frame::<SourceFrame>() {
            Ok(Some(frame)) => self.receive(connection, frame),
            Ok(None) => {}
            Err(error) => {
                self.open.retain(|(open, _)| *open != connection);
                let (now, error) = (Moment(self.now), error.to_string());
                self.core
                    .handle_connection_lost(now, connection, &error, true);
            }
        }
    }

    /// One of the frames that an honest source sends at the switchover.
    fn next_honest_frame(&mut self) -> SourceFrame {
        if self.started {
            return self.rng.pick(&[
                SourceFrame::Finish,
                SourceFrame::Keepalive,
                SourceFrame::Commit,
            ]);
        }
        if self.ready_sent {
            return SourceFrame::Commit;
        }
        let said = self.said;
        self.said += 1;
        let device = said
            .checked_sub(1)
            .and_then(|at| self.knows.devices.get(at));
        match device {
            _ if said == 0 => SourceFrame::Switchover(RoundId(self.knows.round)),
            Some(device) => SourceFrame::Section(Section {
                name: device.name.clone(),
                schema: device.schema.clone(),
                version: device.version_max,
                bytes: Bytes::new(),
            }),
            None if said == self.knows.devices.len() + 1 => SourceFrame::StateEnd(StateEnd {
                sections: self.knows.devices.len() as u16,
                last_round: RoundId(self.knows.round),
                guest_runs: true,
                ram_hash: None,
            }),
            None => SourceFrame::Keepalive,
        }
    }

    fn receive(&mut self, connection: Connection, frame: SourceFrame) {
        let now = Moment(self.now);
        let Some(known) = self.open.iter_mut().find(|(open, _)| *open == connection) else {
            return;
        };
        if known.1 {
            let is_control = self.core.control() == Some(connection);
            self.committed |= frame == SourceFrame::Commit && is_control && self.ready_sent;
            self.core.handle_frame(now, connection, frame);
        } else {
            known.1 = true;
            self.core.handle_first_frame(now, connection, frame);
        }
        self.drive();
    }

    fn end_a_job(&mut self, fail: u32) {
        if self.jobs.is_empty() {
            return;
        }
        let at = self.rng.index(self.jobs.len());
        let job = self.jobs.remove(at);
        let now = Moment(self.now);
        if job == TargetJob::CloseLinks {
            self.receiving = false;
            // Until now its driver may have gone on reading.
            if let Some(control) = self.core.control() {
                self.open.retain(|(open, _)| *open != control);
            }
            self.core.handle_links_closed(now);
            return;
        }
        if self.rng.chance(fail) {
            self.started &= job != TargetJob::StartGuest;
            self.core
                .handle_job_failed(now, job, AbortCode::Internal, "no");
            return;
        }
        match job {
            TargetJob::Prepare => {
                self.receiving = true;
                self.core.handle_prepared(now);
            }
            TargetJob::Load => self.core.handle_loaded(
                now,
                Loaded {
                    load_us: 1,
                    populated_bytes: 1,
                    verification: None,
                },
            ),
            TargetJob::StartGuest => {
                self.depth.completed = true;
                self.core.handle_guest_started(now, 1);
            }
            TargetJob::CloseLinks => {}
        }
    }

    fn drive(&mut self) {
        while let Some(action) = self.core.poll_action() {
            match action {
                TargetAction::StatusChanged(status) => {
                    self.status = status;
                    if status == TargetStatus::Setup {
                        assert!(!self.started && !self.failed);
                        self.committed = false;
                        self.ready_sent = false;
                        self.said = 0;
                    }
                }
                TargetAction::Send(_, frame) => {
                    self.ready_sent |= matches!(frame, TargetFrame::Ready(_));
                    if let TargetFrame::Resolved(resolution) = frame {
                        let here = self.started;
                        assert_eq!(resolution == Resolution::Committed, here, "a false answer");
                    }
                }
                TargetAction::Close(connection) => {
                    self.open.retain(|(open, _)| *open != connection)
                }
                TargetAction::AdoptData { connection, .. } => {
                    self.open.retain(|(open, _)| *open != connection)
                }
                TargetAction::Prepare => self.start(TargetJob::Prepare),
                TargetAction::Load { sections, .. } => {
                    assert_eq!(sections.len(), self.knows.devices.len());
                    self.start(TargetJob::Load);
                }
                TargetAction::StartGuest { .. } => {
                    assert!(
                        self.committed && self.ready_sent,
                        "I1: started without COMMIT"
                    );
                    assert!(
                        !self.started && !self.failed,
                        "I1: started after a failure, or twice"
                    );
                    self.started = true;
                    self.depth.committed = true;
                    self.start(TargetJob::StartGuest);
                }
                TargetAction::CloseLinks => self.start(TargetJob::CloseLinks),
                TargetAction::Failed { .. } => {
                    assert!(!self.started && !self.failed && self.jobs.is_empty());
                    self.failed = true;
                }
                TargetAction::Settled => {
                    assert!(self.started && !self.settled);
                    self.settled = true;
                }
            }
        }
    }

    fn start(&mut self, job: TargetJob) {
        assert!(!self.jobs.contains(&job), "job {job:?} is started twice");
        self.jobs.push(job);
    }
}

/// What somebody who is no source of ours sends to a listening target.
pub(super) fn stranger_bytes(rng: &mut Rng, blocks: &[u64]) -> Vec<u8> {
    let knows = Knowledge {
        id: MigrationId::default(),
        round: 0,
        connections: 1,
        blocks: block_infos(blocks),
        devices: vec![device(0)],
    };
    frames::stranger_bytes(rng, &knows)
}
