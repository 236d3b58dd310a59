//! Both cores with RAM that stays in place, joined by a link without delay: the order of steps, and every job failing.

use super::source::config;
use super::*;

const CONTROL: Connection = Connection(1);

/// What goes wrong.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Mishap {
    None,
    SourceJob(SourceJob),
    TargetJob(TargetJob),
    /// The link ends when this source job is asked for.
    Cut(SourceJob),
    /// The operator cancels when this source job is asked for.
    Cancel(SourceJob),
    /// A notifier wants to wait for the guest, which stands still.
    Waits,
}

struct Pair {
    source: Source<Proof>,
    target: Target,
    mishap: Mishap,
    log: Vec<String>,
    /// Links closed: nothing goes from one to the other any more.
    cut: bool,
}

fn target_config(in_place: Option<MigrationId>) -> TargetConfig {
    TargetConfig {
        blocks: blocks(),
        devices: devices(),
        software: "t".to_owned(),
        uuid: None,
        in_place,
        streamed: Vec::new(),
        deadlines: Deadlines::default(),
    }
}

fn source_config() -> SourceConfig {
    SourceConfig {
        data_connections: 0,
        ..config()
    }
}

impl Pair {
    fn run(config: SourceConfig, in_place: Option<MigrationId>, mishap: Mishap) -> Self {
        let tuning = SourceTuning {
            downtime_limit_us: 0,
            switchover_bytes_per_sec: None,
            auto_converge: None,
        };
        let mut pair = Self {
            source: Source::new(config, tuning),
            target: Target::new(target_config(in_place)),
            mishap,
            log: Vec::new(),
            cut: false,
        };
        pair.source.start(NOW);
        loop {
            if let Some(action) = pair.source.poll_action() {
                pair.source_acts(action);
            } else if let Some(action) = pair.target.poll_action() {
                pair.target_acts(action);
            } else if pair.source.status() == MigrationStatus::PreSwitchover {
                pair.source.handle_continue(NOW).unwrap();
            } else {
                return pair;
            }
        }
    }

    fn source_acts(&mut self, action: SourceAction<Proof>) {
        let text = format!("{action:?}");
        self.log
            .push(text.split(['(', ' ']).next().unwrap().to_owned());
        let job = match &action {
            SourceAction::OfferFds => SourceJob::OfferFds,
            SourceAction::ConnectControl => SourceJob::ConnectControl,
            SourceAction::StopGuest => SourceJob::StopGuest,
            SourceAction::NotifySetup => SourceJob::NotifySetup,
            SourceAction::HandOverFds => SourceJob::HandOverFds,
            SourceAction::SaveState { .. } => SourceJob::SaveState,
            SourceAction::SendControl(frame) => {
                self.log.pop();
                self.log.push(
                    text.replace("SendControl(", "")
                        .split(['(', ')'])
                        .next()
                        .unwrap()
                        .to_owned(),
                );
                if !self.cut {
                    match frame {
                        SourceFrame::Hello(_) => {
                            self.target.handle_first_frame(NOW, CONTROL, frame.clone())
                        }
                        frame => self.target.handle_frame(NOW, CONTROL, frame.clone()),
                    }
                }
                return;
            }
            SourceAction::CloseLinks => {
                self.cut = true;
                self.target
                    .handle_connection_lost(NOW, CONTROL, "closed", false);
                return self.source.handle_links_closed(NOW);
            }
            SourceAction::NotifyFailed => {
                return self.source.handle_notified(NOW, SourceJob::NotifyFailed);
            }
            SourceAction::NotifyDone => {
                return self.source.handle_notified(NOW, SourceJob::NotifyDone);
            }
            SourceAction::ResumeGuest(_) => return self.source.handle_guest_resumed(NOW),
            _ => return,
        };
        if self.mishap == Mishap::Cancel(job) {
            self.source.handle_cancel(NOW).unwrap();
        }
        if self.mishap == Mishap::Cut(job) {
            self.cut = true;
            self.source.handle_link_lost(NOW, "cut", false);
            self.target
                .handle_connection_lost(NOW, CONTROL, "cut", false);
        }
        if self.mishap == Mishap::SourceJob(job) {
            return self.source.handle_job_failed(NOW, job, "it cannot be");
        }
        match job {
            SourceJob::OfferFds => self.source.handle_fds_offered(NOW),
            SourceJob::ConnectControl => self.source.handle_control_connected(NOW),
            SourceJob::StopGuest => self.source.handle_guest_stopped(NOW, Proof),
            SourceJob::NotifySetup => {
                let device = (self.mishap == Mishap::Waits).then(|| "net0".to_owned());
                self.source.handle_setup_told(NOW, device);
            }
            SourceJob::HandOverFds => self.source.handle_fds_handed_over(NOW),
            SourceJob::SaveState => {
                let state = SavedState {
                    sections: vec![section("vcpu/0"), section("serial/0")],
                    ..SavedState::default()
                };
                self.source.handle_state_saved(NOW, state);
            }
            _ => unreachable!(),
        }
    }

    fn target_acts(&mut self, action: TargetAction) {
        let job = match action {
            TargetAction::Send(_, frame) => {
                if !self.cut {
                    self.source.handle_frame(NOW, frame);
                }
                return;
            }
            TargetAction::Prepare => TargetJob::Prepare,
            TargetAction::Load { .. } => TargetJob::Load,
            TargetAction::StartGuest { .. } => TargetJob::StartGuest,
            TargetAction::NotifyFailed => return self.target.handle_notified(NOW),
            TargetAction::CloseLinks => return self.target.handle_links_closed(NOW),
            TargetAction::AdoptData { .. } => panic!("there is no data connection"),
            _ => return,
        };
        if self.mishap == Mishap::TargetJob(job) {
            return self
                .target
                .handle_job_failed(NOW, job, AbortCode::Device, "it cannot be");
        }
        let loaded = Loaded {
            load_us: 1,
            populated_bytes: 0,
            verification: None,
        };
        match job {
            TargetJob::Prepare => self.target.handle_prepared(NOW),
            TargetJob::Load => self.target.handle_loaded(NOW, loaded),
            TargetJob::StartGuest => self.target.handle_guest_started(NOW, 1),
            _ => unreachable!(),
        }
    }

    fn at(&self, what: &str) -> Option<usize> {
        self.log.iter().position(|line| line == what)
    }
}

#[test]
fn the_guest_is_stopped_and_everybody_has_let_go_before_anything_with_an_owner_leaves() {
    for pause_before_switchover in [false, true] {
        let config = SourceConfig {
            pause_before_switchover,
            ..source_config()
        };
        let pair = Pair::run(config, Some(ID), Mishap::None);
        let steps: Vec<_> = [
            "OfferFds",
            "ConnectControl",
            "Hello",
            "StopGuest",
            "NotifySetup",
            "HandOverFds",
            "StateEnd",
            "Commit",
            "NotifyDone",
        ]
        .map(|what| {
            pair.at(what)
                .unwrap_or_else(|| panic!("no {what} in {:?}", pair.log))
        })
        .to_vec();
        assert!(steps.is_sorted(), "{:?}", pair.log);
        for what in [
            "ConnectData",
            "StartLog",
            "SendRound",
            "Sync",
            "ResumeGuest",
        ] {
            assert_eq!(pair.at(what), None, "{:?}", pair.log);
        }
        assert_eq!(pair.source.status(), MigrationStatus::Completed);
        assert!(pair.target.has_guest());
    }
}

#[test]
fn whatever_fails_before_the_commit_the_guest_goes_on_at_the_source() {
    let jobs = [
        SourceJob::OfferFds,
        SourceJob::ConnectControl,
        SourceJob::StopGuest,
        SourceJob::NotifySetup,
        SourceJob::HandOverFds,
        SourceJob::SaveState,
    ];
    let mishaps = jobs
        .into_iter()
        .flat_map(|job| {
            [
                Mishap::SourceJob(job),
                Mishap::Cut(job),
                Mishap::Cancel(job),
            ]
        })
        .chain([TargetJob::Prepare, TargetJob::Load].map(Mishap::TargetJob))
        .chain([Mishap::TargetJob(TargetJob::StartGuest), Mishap::Waits]);
    for mishap in mishaps {
        let pair = Pair::run(source_config(), Some(ID), mishap);
        let log = &pair.log;
        assert!(pair.source.status().is_end(), "{mishap:?}: {log:?}");
        assert_ne!(
            pair.source.status(),
            MigrationStatus::Completed,
            "{mishap:?}"
        );
        assert!(!pair.target.has_guest(), "{mishap:?}: {log:?}");
        let stopped =
            pair.at("StopGuest").is_some() && mishap != Mishap::SourceJob(SourceJob::StopGuest);
        assert_eq!(
            pair.at("ResumeGuest").is_some(),
            stopped,
            "{mishap:?}: {log:?}"
        );
        if let (Some(failed), Some(resumed)) = (pair.at("NotifyFailed"), pair.at("ResumeGuest")) {
            assert!(failed < resumed, "{mishap:?}: {log:?}");
        }
        let told = pair.at("NotifySetup").is_some();
        assert_eq!(
            pair.at("NotifyFailed").is_some(),
            told,
            "{mishap:?}: {log:?}"
        );
        if matches!(
            mishap,
            Mishap::SourceJob(SourceJob::NotifySetup) | Mishap::Waits
        ) {
            assert_eq!(pair.at("HandOverFds"), None, "after a veto");
        }
    }
}

#[test]
fn memory_may_take_its_time_to_the_disk_as_long_as_the_target_shows_that_it_lives() {
    let tuning = SourceTuning {
        downtime_limit_us: 0,
        switchover_bytes_per_sec: None,
        auto_converge: None,
    };
    let mut source = Source::new(source_config(), tuning);
    source.start(NOW);
    source.handle_fds_offered(NOW);
    source.handle_control_connected(NOW);
    let reply = HelloReply {
        version: VersionRange::OURS.max,
        software: "t".to_owned(),
    };
    source.handle_frame(NOW, TargetFrame::HelloReply(reply));
    source.handle_frame(NOW, TargetFrame::DataReady);
    source.handle_guest_stopped(NOW, Proof);
    source.handle_setup_told(NOW, None);
    let mut now = NOW;
    for _ in 0..200 {
        now = now.plus_micros(5_000_000);
        source.handle_frame(now, TargetFrame::Keepalive);
        source.handle_timeout(now);
        assert_eq!(source.status(), MigrationStatus::Device);
    }
    source.handle_timeout(now.plus_micros(Deadlines::default().stall_us));
    assert_eq!(
        source.status(),
        MigrationStatus::Failing,
        "silence is another matter"
    );
}

#[test]
fn ram_of_another_attempt_or_none_is_never_started_on() {
    let network = SourceConfig {
        data_connections: 1,
        ..config()
    };
    for (config, in_place, part) in [
        (source_config(), None, "was not given the RAM"),
        (
            source_config(),
            Some(MigrationId([9; 16])),
            "another attempt",
        ),
        (network, Some(ID), "takes no pages"),
    ] {
        let mut target = Target::new(target_config(in_place));
        let hello = Hello {
            versions: VersionRange::OURS,
            migration_id: config.migration_id,
            data_connections: config.data_connections,
            checksum: false,
            verify: false,
            software: String::new(),
            blocks: blocks(),
            devices: devices(),
            uuid: None,
            switchover_ack: false,
        };
        target.handle_first_frame(NOW, CONTROL, SourceFrame::Hello(hello));
        let said = format!("{:?}", target.poll_action());
        assert!(said.contains(part), "{said}");
        assert_eq!(target.status(), TargetStatus::None);
    }
}
