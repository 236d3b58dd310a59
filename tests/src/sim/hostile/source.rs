//! The source core against a hostile target.

use vmferry_transport::limits::Deadlines;
use vmferry_transport::proto::{
    FirstRound, MigrationStatus, Outcome, RoundSent, SavedState, Source, SourceAction,
    SourceConfig, SourceJob, SourceTuning,
};
use vmferry_transport::units::{Moment, PageCount};
use vmferry_transport::wire::frame::{
    FrameBuffer, Ready, Resolution, SourceFrame, TargetFrame, Verification,
};
use vmferry_transport::wire::hello::HelloReply;

use super::{Depth, STEPS, STEPS_TO_END, knowledge};
use crate::sim::frames::{self, Knowledge};
use crate::sim::guest::{ProofCount, SimProof};
use crate::sim::rng::Rng;
use crate::sim::setup::{THROTTLE, tuning};

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
        // Now and then RAM stays in place.
        data_connections: if rng.chance(200) {
            0
        } else {
            knows.connections
        },
        checksum: false,
        verify: rng.chance(300),
        software: "victim".to_owned(),
        blocks: knows.blocks.clone(),
        devices: knows.devices.clone(),
        guest_runs: true,
        uuid: None,
        switchover_ack: rng.chance(300),
        pause_before_switchover: rng.chance(200),
        deadlines: Deadlines::default(),
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
            38 => {
                let waits = self.core.status() == MigrationStatus::PreSwitchover;
                assert_eq!(self.core.handle_continue(now).is_ok(), waits);
            }
            39 if self.rng.chance(100) => self.core.handle_unplug_failed(now, "no"),
            39 => self.core.handle_unplugged(now),
            32 => self.tune(),
            36 | 37 => self.wait(),
            _ => {}
        }
        self.drive();
        self.check();
    }

    fn tune(&mut self) {
        self.core.set_tuning(SourceTuning {
            downtime_limit_us: self.rng.pick(&[0, 300_000, 1_000_000_000_000]),
            switchover_bytes_per_sec: self.rng.pick(&[None, Some(1), Some(u64::MAX)]),
            auto_converge: self.rng.pick(&[None, Some(THROTTLE)]),
        });
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
            if self.core.status() == MigrationStatus::PreSwitchover {
                assert_eq!(self.core.handle_continue(Moment(self.now)), Ok(()));
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
                        SourceJob::ConnectControl
                            | SourceJob::ConnectData
                            | SourceJob::Round
                            | SourceJob::OfferFds
                            | SourceJob::HandOverFds
                    )
                });
                self.core.handle_links_closed(now);
            }
            SourceJob::StopLog => self.core.handle_log_stopped(now),
            SourceJob::NotifySetup if fails => self.core.handle_job_failed(now, job, "veto"),
            SourceJob::NotifySetup => {
                let waits = self.rng.chance(200).then(|| "net0".to_owned());
                self.core.handle_setup_told(now, waits);
            }
            SourceJob::NotifyFailed | SourceJob::NotifyDone => self.core.handle_notified(now, job),
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
            SourceJob::OfferFds => self.core.handle_fds_offered(now),
            SourceJob::HandOverFds => self.core.handle_fds_handed_over(now),
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
                SourceAction::OfferFds => self.jobs.push(SourceJob::OfferFds),
                SourceAction::HandOverFds => self.jobs.push(SourceJob::HandOverFds),
                SourceAction::Sync => self.jobs.push(SourceJob::Sync),
                SourceAction::StopGuest => self.jobs.push(SourceJob::StopGuest),
                SourceAction::SaveState { .. } => self.jobs.push(SourceJob::SaveState),
                SourceAction::CloseLinks => self.jobs.push(SourceJob::CloseLinks),
                SourceAction::StopLog => self.jobs.push(SourceJob::StopLog),
                SourceAction::NotifySetup => self.jobs.push(SourceJob::NotifySetup),
                SourceAction::NotifyFailed => self.jobs.push(SourceJob::NotifyFailed),
                SourceAction::NotifyDone => self.jobs.push(SourceJob::NotifyDone),
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
                SourceAction::StatusChanged(_)
                | SourceAction::PassStarted(_)
                | SourceAction::WatchUnplug
                | SourceAction::Throttle(_) => {}
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
