//! The target core against hostile sources.

use bytes::Bytes;
use vmferry_transport::limits::Deadlines;
use vmferry_transport::proto::{
    Connection, Loaded, Target, TargetAction, TargetConfig, TargetError, TargetJob, TargetStatus,
};
use vmferry_transport::units::{Moment, RoundId};
use vmferry_transport::wire::Section;
use vmferry_transport::wire::frame::{
    AbortCode, FrameBuffer, Resolution, SourceFrame, StateEnd, TargetFrame,
};
use vmferry_transport::wire::hello::DataHello;

use super::{Depth, STEPS, STEPS_TO_END, knowledge};
use crate::sim::frames::{self, Knowledge};
use crate::sim::rng::Rng;

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
        streamed: Vec::new(),
        software: "victim".to_owned(),
        uuid: None,
        in_place: None,
        deadlines: Deadlines::default(),
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
            TargetJob::NotifyFailed => self.core.handle_notified(now),
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
                TargetAction::NotifyFailed => self.start(TargetJob::NotifyFailed),
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
