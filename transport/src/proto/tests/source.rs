//! The source core, step by step: violations of the protocol, failures in every state, the question for the outcome.

use super::*;

pub(super) fn reply() -> TargetFrame {
    TargetFrame::HelloReply(HelloReply {
        version: 1,
        software: "t".to_owned(),
    })
}

pub(super) fn config() -> SourceConfig {
    SourceConfig {
        migration_id: ID,
        data_connections: 2,
        checksum: false,
        verify: false,
        software: "s".to_owned(),
        blocks: blocks(),
        devices: devices(),
        guest_runs: true,
        uuid: None,
        switchover_ack: false,
        pause_before_switchover: false,
        deadlines: Deadlines::default(),
    }
}

fn new_source(config: SourceConfig) -> Source<Proof> {
    Source::new(
        config,
        SourceTuning {
            downtime_limit_us: u64::MAX,
            switchover_bytes_per_sec: None,
            auto_converge: None,
        },
    )
}

/// Debug text of all actions: enough to see what is asked for, and short to compare.
pub(super) fn actions(source: &mut Source<Proof>) -> Vec<String> {
    std::iter::from_fn(|| source.poll_action())
        .map(|action| format!("{action:?}"))
        .collect()
}

pub(super) fn asks_for(actions: &[String], what: &str) -> bool {
    actions.iter().any(|action| action.starts_with(what))
}

/// How far an attempt has come.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) enum At {
    Reply,
    Preparing,
    Sending,
    Syncing,
    Stopping,
    LastRound,
    Ready,
    Committed,
    Resolving,
}

/// An attempt that has come so far, and that has been told so.
pub(super) fn source_at(config: SourceConfig, at: At) -> Source<Proof> {
    type Step = (&'static str, fn(&mut Source<Proof>));
    let steps: [Step; 9] = [
        ("SendControl(Hello", |source| {
            source.start(NOW);
            source.handle_control_connected(NOW);
        }),
        ("ConnectData", |source| source.handle_frame(NOW, reply())),
        ("SendRound", |source| {
            source.handle_setup_told(NOW, None);
            source.handle_log_started(NOW, FirstRound::default());
            source.handle_data_connected(NOW);
            source.handle_frame(NOW, TargetFrame::DataReady);
        }),
        ("Sync", |source| {
            source.handle_round_sent(NOW, RoundSent::default());
            source.handle_frame(NOW, TargetFrame::RoundPlaced(RoundId(0)));
        }),
        ("StopGuest", |source| {
            source.handle_synced(NOW, PageCount(0), 1)
        }),
        ("SaveState", |source| {
            source.handle_guest_stopped(NOW, Proof);
            source.handle_synced(NOW, PageCount(0), 1);
        }),
        ("SendControl(StateEnd", |source| {
            source.handle_round_sent(NOW, RoundSent::default());
            let state = SavedState {
                sections: vec![section("vcpu/0"), section("serial/0")],
                ram_hash: Some(2),
                hash_us: 0,
            };
            source.handle_state_saved(NOW, state);
        }),
        ("SendControl(Commit)", |source| {
            source.handle_frame(NOW, ready())
        }),
        ("CloseLinks", |source| {
            source.handle_link_lost(NOW, "gone", false)
        }),
    ];
    let mut source = new_source(config);
    for (asked_for, step) in steps.into_iter().take(at as usize + 1) {
        step(&mut source);
        assert!(
            asks_for(&actions(&mut source), asked_for),
            "{asked_for} on the way to {at:?}"
        );
    }
    source
}

/// Every state before COMMIT.
fn before_commit() -> [(At, Source<Proof>); 7] {
    [
        At::Reply,
        At::Preparing,
        At::Sending,
        At::Syncing,
        At::Stopping,
        At::LastRound,
        At::Ready,
    ]
    .map(|at| (at, source_at(config(), at)))
}

/// Ends what is under way and pays all debts; says whether the guest was resumed, and what the end was.
pub(super) fn clean_up(source: &mut Source<Proof>) -> (bool, String) {
    let mut resumed = false;
    for _ in 0..10 {
        while let Some(action) = source.poll_action() {
            match action {
                SourceAction::CloseLinks => source.handle_links_closed(NOW),
                SourceAction::StopLog => source.handle_log_stopped(NOW),
                SourceAction::NotifyFailed => {
                    assert!(!resumed, "I7: FAILED comes before the guest runs");
                    source.handle_notified(NOW, SourceJob::NotifyFailed);
                }
                SourceAction::NotifyDone => source.handle_notified(NOW, SourceJob::NotifyDone),
                SourceAction::ResumeGuest(Proof) => {
                    resumed = true;
                    source.handle_guest_resumed(NOW);
                }
                SourceAction::Finished(outcome) => return (resumed, format!("{outcome:?}")),
                _ => {}
            }
        }
        source.handle_setup_told(NOW, None);
        source.handle_log_started(NOW, FirstRound::default());
        source.handle_synced(NOW, PageCount(0), 1);
        source.handle_state_saved(NOW, SavedState::default());
    }
    panic!("no end: {source:?}");
}

#[test]
fn frames_that_do_not_belong_to_a_state_end_the_attempt() {
    let frames = [
        reply(),
        TargetFrame::DataReady,
        TargetFrame::RoundPlaced(RoundId(9)),
        ready(),
        TargetFrame::Running { resume_us: 1 },
        TargetFrame::Resolved(Resolution::Committed),
        TargetFrame::Resolved(Resolution::NotCommitted),
        TargetFrame::SwitchoverAck,
    ];
    for (number, frame) in frames.iter().enumerate() {
        for (state, mut source) in before_commit() {
            let welcome = [(At::Reply, 0), (At::Preparing, 1), (At::Ready, 3)];
            if welcome.contains(&(state, number)) {
                continue;
            }
            source.handle_frame(NOW, frame.clone());
            let status = source.status();
            assert_eq!(
                status,
                MigrationStatus::Failing,
                "{frame:?} while {state:?}"
            );
            let told = asks_for(&actions(&mut source), "SendControl(Abort");
            assert!(told, "the target is told about {frame:?} while {state:?}");
        }
    }
}

#[test]
fn data_ready_and_round_placed_count_once() {
    let mut source = source_at(config(), At::Preparing);
    source.handle_frame(NOW, TargetFrame::DataReady);
    source.handle_frame(NOW, TargetFrame::DataReady);
    assert_eq!(source.status(), MigrationStatus::Failing);
    let mut source = source_at(config(), At::Sending);
    source.handle_frame(NOW, TargetFrame::RoundPlaced(RoundId(0)));
    source.handle_frame(NOW, TargetFrame::RoundPlaced(RoundId(0)));
    assert_eq!(source.status(), MigrationStatus::Failing);
}

#[test]
fn a_version_that_was_not_offered_is_refused() {
    let mut source = source_at(config(), At::Reply);
    let reply = HelloReply {
        version: VERSION_MAX + 1,
        software: String::new(),
    };
    source.handle_frame(NOW, TargetFrame::HelloReply(reply));
    assert_eq!(source.status(), MigrationStatus::Failing);
}

#[test]
fn rounds_begin_whichever_of_the_three_preparations_ends_last() {
    type Report = fn(&mut Source<Proof>);
    let reports: [Report; 3] = [
        |source| source.handle_log_started(NOW, FirstRound::default()),
        |source| source.handle_data_connected(NOW),
        |source| source.handle_frame(NOW, TargetFrame::DataReady),
    ];
    for order in [
        [0, 1, 2],
        [0, 2, 1],
        [1, 0, 2],
        [1, 2, 0],
        [2, 0, 1],
        [2, 1, 0],
    ] {
        let mut source = source_at(config(), At::Preparing);
        source.handle_setup_told(NOW, None);
        for (count, at) in order.into_iter().enumerate() {
            assert_eq!(
                source.status(),
                MigrationStatus::Setup,
                "after {count} of {order:?}"
            );
            reports[at](&mut source);
        }
        assert_eq!(source.status(), MigrationStatus::Active, "{order:?}");
    }
}

#[test]
fn data_connects_that_hang_have_a_deadline_even_when_the_target_claims_to_have_them() {
    let mut source = source_at(config(), At::Preparing);
    source.handle_setup_told(NOW, None);
    source.handle_log_started(NOW, FirstRound::default());
    source.handle_frame(NOW, TargetFrame::DataReady);
    for _ in 0..10 {
        let Some(at) = source.poll_timeout() else {
            break;
        };
        source.handle_frame(at, TargetFrame::Keepalive);
        source.handle_timeout(at);
    }
    assert_eq!(source.status(), MigrationStatus::Failing);
}

#[test]
fn whatever_goes_wrong_before_commit_gives_the_guest_back() {
    type Fault = fn(&mut Source<Proof>);
    let faults: [Fault; 4] = [
        |source| source.handle_link_lost(NOW, "gone", false),
        |source| source.handle_link_lost(NOW, "garbage", true),
        |source| source.handle_frame(NOW, TargetFrame::Abort(abort())),
        |source| source.handle_cancel(NOW).unwrap(),
    ];
    for fault in faults {
        for (state, mut source) in before_commit() {
            fault(&mut source);
            if state == At::Stopping {
                // The stop is still under way and must not overtake the resume.
                source.handle_links_closed(NOW);
                assert!(!asks_for(&actions(&mut source), "ResumeGuest"));
                source.handle_guest_stopped(NOW, Proof);
            }
            let was_stopped = state >= At::Stopping;
            let (resumed, end) = clean_up(&mut source);
            assert_eq!(resumed, was_stopped, "{state:?}");
            assert!(end.contains("stopped: None"), "{state:?}: {end}");
        }
    }
}

#[test]
fn a_paused_guest_is_given_back_paused() {
    let mut source = source_at(config(), At::Ready);
    source.set_guest_runs(false);
    source.handle_link_lost(NOW, "gone", false);
    let (resumed, end) = clean_up(&mut source);
    assert!(!resumed && end.contains("stopped: Some"), "{end}");
}

#[test]
fn a_cancelled_attempt_that_cannot_resume_the_guest_is_still_cancelled() {
    let mut source = source_at(config(), At::Ready);
    source.handle_cancel(NOW).unwrap();
    source.handle_links_closed(NOW);
    source.handle_log_stopped(NOW);
    source.handle_notified(NOW, SourceJob::NotifyFailed);
    actions(&mut source);
    source.handle_resume_failed(NOW, Proof, "no");
    assert_eq!(source.status(), MigrationStatus::Cancelled);
    let end = actions(&mut source).pop().unwrap();
    assert!(
        end.contains("stopped: Some(Proof)") && end.contains("could not be resumed"),
        "{end}"
    );
}

#[test]
fn cancelling_after_commit_is_refused() {
    for mut source in [
        source_at(config(), At::Committed),
        source_at(config(), At::Resolving),
    ] {
        assert_eq!(source.handle_cancel(NOW), Err(CancelError::Committed));
        assert_eq!(source.status(), MigrationStatus::Device);
    }
}

#[test]
fn after_commit_only_the_targets_word_ends_the_doubt() {
    let bad = [
        reply(),
        TargetFrame::DataReady,
        ready(),
        TargetFrame::Resolved(Resolution::NotCommitted),
    ];
    for frame in bad {
        let mut source = source_at(config(), At::Committed);
        source.handle_frame(NOW, frame.clone());
        assert!(source.in_doubt(), "{frame:?}");
        assert_eq!(actions(&mut source), ["CloseLinks"], "{frame:?}");
    }
    let mut source = source_at(config(), At::Committed);
    source.handle_frame(NOW, TargetFrame::Abort(abort()));
    assert!(!source.in_doubt());
    assert!(
        clean_up(&mut source).0,
        "the target said that it does not run the guest"
    );
    let mut source = source_at(config(), At::Committed);
    source.handle_frame(NOW, TargetFrame::Running { resume_us: 1 });
    assert_eq!(source.status(), MigrationStatus::Completed);
    assert!(!clean_up(&mut source).0);
}

/// Connects again and asks.
fn asking() -> Source<Proof> {
    let mut source = source_at(config(), At::Resolving);
    source.handle_links_closed(NOW);
    assert_eq!(
        actions(&mut source),
        ["ConnectControl"],
        "the first question is asked at once"
    );
    source.handle_control_connected(NOW);
    assert!(asks_for(&actions(&mut source), "SendControl(Resolve"));
    source
}

#[test]
fn the_answer_decides_and_nothing_else_does() {
    let mut source = asking();
    source.handle_frame(NOW, TargetFrame::Resolved(Resolution::Committed));
    assert_eq!(source.status(), MigrationStatus::Completed);
    assert_eq!(actions(&mut source)[0], "SendControl(Finish)");
    let mut source = asking();
    source.handle_frame(NOW, TargetFrame::Resolved(Resolution::NotCommitted));
    assert!(clean_up(&mut source).0);
    for frame in [
        TargetFrame::Abort(abort()),
        TargetFrame::Running { resume_us: 0 },
        ready(),
    ] {
        let mut source = asking();
        source.handle_frame(NOW, frame.clone());
        assert!(source.in_doubt(), "{frame:?}");
    }
}

#[test]
fn an_outcome_that_cannot_be_learnt_is_left_to_the_operator() {
    let mut source = source_at(config(), At::Resolving);
    assert!(
        !source.handle_operator_resolution(NOW, Resolution::NotCommitted),
        "not asked yet"
    );
    source.handle_links_closed(NOW);
    let mut now = NOW;
    for _ in 0..100 {
        for action in actions(&mut source) {
            match action.as_str() {
                "CloseLinks" => source.handle_links_closed(now),
                "ConnectControl" => {
                    source.handle_job_failed(now, SourceJob::ConnectControl, "refused")
                }
                _ => {}
            }
        }
        if source.is_unresolved() {
            break;
        }
        if let Some(at) = source.poll_timeout() {
            now = at;
            source.handle_timeout(now);
        }
    }
    assert!(source.is_unresolved());
    let since = now.micros_since(NOW);
    assert!(
        (RESOLVE_DEADLINE_US..2 * RESOLVE_DEADLINE_US).contains(&since),
        "after {since} us"
    );
    assert!(source.handle_operator_resolution(now, Resolution::NotCommitted));
    assert!(clean_up(&mut source).0);
}

#[test]
fn deadlines_are_those_of_the_configuration() {
    let config = SourceConfig {
        deadlines: Deadlines::scaled(10),
        ..config()
    };
    let mut source = source_at(config, At::Reply);
    source.handle_timeout(NOW.plus_micros(HELLO_DEADLINE_US / 10 - 1));
    assert_eq!(source.status(), MigrationStatus::Setup);
    source.handle_timeout(NOW.plus_micros(HELLO_DEADLINE_US / 10));
    assert_eq!(source.status(), MigrationStatus::Failing);
}

#[test]
fn silence_is_noticed_while_this_side_is_busy() {
    // A dirty fetch that takes long is a job of ours and has no deadline, but the link can die meanwhile.
    let mut source = source_at(config(), At::Syncing);
    source.handle_timeout(NOW.plus_micros(STALL_US - 1));
    assert_eq!(source.status(), MigrationStatus::Active);
    source.handle_timeout(NOW.plus_micros(STALL_US));
    assert_eq!(source.status(), MigrationStatus::Failing);
}

#[test]
fn nothing_is_said_and_no_timer_runs_while_links_close() {
    for mut source in [source_at(config(), At::Resolving), {
        let mut source = source_at(config(), At::Sending);
        source.handle_cancel(NOW).unwrap();
        source
    }] {
        actions(&mut source);
        assert_eq!(source.poll_timeout(), None);
        source.handle_timeout(NOW.plus_micros(10 * STALL_US));
        assert_eq!(actions(&mut source), [""; 0]);
    }
}

#[test]
fn ready_without_the_verification_asked_for_is_refused() {
    for verification in [
        None,
        Some(Verification {
            ram_hash: 1,
            ..Verification::default()
        }),
        Some(Verification {
            ram_hash: 2,
            state_differences: "rip".to_owned(),
            took_us: 1,
        }),
    ] {
        let mut source = source_at(
            SourceConfig {
                verify: true,
                ..config()
            },
            At::Ready,
        );
        let ready = Ready {
            load_us: 1,
            populated_bytes: 0,
            verification,
        };
        source.handle_frame(NOW, TargetFrame::Ready(ready.clone()));
        assert_eq!(source.status(), MigrationStatus::Failing, "{ready:?}");
    }
}

#[test]
fn reports_of_jobs_that_links_closing_has_ended_are_dropped() {
    let mut source = source_at(config(), At::Sending);
    source.handle_link_lost(NOW, "gone", false);
    source.handle_links_closed(NOW);
    actions(&mut source);
    source.handle_round_sent(NOW, RoundSent::default());
    source.handle_data_connected(NOW);
    source.handle_control_connected(NOW);
    source.handle_job_failed(NOW, SourceJob::Round, "late");
    assert_eq!(source.status(), MigrationStatus::Failing);
    assert_eq!(actions(&mut source), [""; 0]);
}
