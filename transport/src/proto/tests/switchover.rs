//! The source core where others have a say: notifiers, the guest that must let go of a device, the operator before the switchover,
//! the target's devices, auto-converge.

use super::source::{At, actions, asks_for, clean_up, config, source_at};
use super::*;

/// An attempt that waits for a device that the guest has to let go of; everything else is prepared.
fn waiting_for_unplug() -> Source<Proof> {
    let mut source = source_at(config(), At::Preparing);
    source.handle_data_connected(NOW);
    source.handle_frame(NOW, TargetFrame::DataReady);
    source.handle_setup_told(NOW, Some("net0".to_owned()));
    assert_eq!(source.status(), MigrationStatus::WaitUnplug);
    let asked = actions(&mut source);
    assert!(asks_for(&asked, "WatchUnplug") && !asks_for(&asked, "StartLog"));
    source
}

#[test]
fn the_log_starts_when_the_guest_has_let_go_of_its_devices() {
    let mut source = waiting_for_unplug();
    source.handle_unplugged(NOW);
    assert!(asks_for(&actions(&mut source), "StartLog"));
    source.handle_unplugged(NOW);
    assert!(actions(&mut source).is_empty());
    source.handle_log_started(NOW, FirstRound::default());
    assert_eq!(source.status(), MigrationStatus::Active);
}

#[test]
fn a_guest_that_does_not_let_go_ends_the_attempt_and_names_the_device() {
    let mut source = waiting_for_unplug();
    for _ in 0..100 {
        let Some(at) = source.poll_timeout() else {
            break;
        };
        source.handle_frame(at, TargetFrame::Keepalive);
        source.handle_timeout(at);
    }
    assert_eq!(source.status(), MigrationStatus::Failing);
    let (resumed, end) = clean_up(&mut source);
    assert!(!resumed && end.contains("net0"), "{end}");
    let mut source = waiting_for_unplug();
    source.handle_cancel(NOW).unwrap();
    source.handle_unplugged(NOW);
    assert!(!asks_for(&actions(&mut source), "StartLog"));
}

#[test]
fn a_veto_fails_the_attempt_and_those_that_were_told_setup_are_told_failed() {
    let mut source = source_at(config(), At::Preparing);
    source.handle_job_failed(NOW, SourceJob::NotifySetup, "not now");
    assert_eq!(source.status(), MigrationStatus::Failing);
    source.handle_links_closed(NOW);
    assert!(asks_for(&actions(&mut source), "NotifyFailed"));
    source.handle_notified(NOW, SourceJob::NotifyFailed);
    let (_, end) = clean_up(&mut source);
    assert!(end.contains("not now"), "{end}");
}

#[test]
fn a_setup_that_is_under_way_is_waited_for_before_failed_is_told() {
    let mut source = source_at(config(), At::Preparing);
    source.handle_cancel(NOW).unwrap();
    source.handle_links_closed(NOW);
    assert!(!asks_for(&actions(&mut source), "NotifyFailed"));
    source.handle_setup_told(NOW, Some("net0".to_owned()));
    let asked = actions(&mut source);
    assert!(asks_for(&asked, "NotifyFailed") && !asks_for(&asked, "WatchUnplug"));
}

#[test]
fn failed_is_told_after_the_log_is_off_and_before_the_guest_runs() {
    let mut source = source_at(config(), At::Ready);
    source.handle_link_lost(NOW, "gone", false);
    source.handle_links_closed(NOW);
    let asked = actions(&mut source);
    assert!(asks_for(&asked, "StopLog") && !asks_for(&asked, "NotifyFailed"));
    source.handle_log_stopped(NOW);
    let asked = actions(&mut source);
    assert!(asks_for(&asked, "NotifyFailed") && !asks_for(&asked, "ResumeGuest"));
    source.handle_notified(NOW, SourceJob::NotifyFailed);
    assert!(asks_for(&actions(&mut source), "ResumeGuest"));
}

#[test]
fn an_attempt_that_failed_before_setup_tells_nobody() {
    let mut source = source_at(config(), At::Reply);
    source.handle_link_lost(NOW, "gone", false);
    source.handle_links_closed(NOW);
    assert!(!asks_for(&actions(&mut source), "NotifyFailed"));
    assert_eq!(source.status(), MigrationStatus::Failed);
}

#[test]
fn done_is_told_once_the_target_runs_the_guest() {
    let mut source = source_at(config(), At::Committed);
    source.handle_frame(NOW, TargetFrame::Running { resume_us: 1 });
    source.handle_links_closed(NOW);
    source.handle_log_stopped(NOW);
    let asked = actions(&mut source);
    assert!(asks_for(&asked, "NotifyDone") && !asks_for(&asked, "Finished"));
    source.handle_notified(NOW, SourceJob::NotifyDone);
    assert!(asks_for(&actions(&mut source), "Finished(Completed"));
}

fn before_switchover() -> Source<Proof> {
    let config = SourceConfig {
        pause_before_switchover: true,
        ..config()
    };
    let mut source = source_at(config, At::Stopping);
    assert_eq!(source.status(), MigrationStatus::Active);
    source.handle_guest_stopped(NOW, Proof);
    assert_eq!(source.status(), MigrationStatus::PreSwitchover);
    source
}

#[test]
fn the_operator_lets_a_stopped_migration_go_on_once() {
    let mut source = before_switchover();
    assert!(!asks_for(&actions(&mut source), "Sync"));
    source.handle_continue(NOW).unwrap();
    assert_eq!(source.status(), MigrationStatus::Device);
    assert!(asks_for(&actions(&mut source), "Sync"));
    let error = source.handle_continue(NOW).unwrap_err();
    assert_eq!(error, ContinueError(MigrationStatus::Device));
}

#[test]
fn waiting_for_the_operator_ends_like_any_other_state() {
    type Fault = fn(&mut Source<Proof>);
    let faults: [Fault; 3] = [
        |source| source.handle_cancel(NOW).unwrap(),
        |source| source.handle_link_lost(NOW, "gone", false),
        |source| source.handle_frame(NOW, TargetFrame::Abort(abort())),
    ];
    for fault in faults {
        let mut source = before_switchover();
        fault(&mut source);
        let (resumed, end) = clean_up(&mut source);
        assert!(resumed && end.contains("stopped: None"), "{end}");
    }
}

#[test]
fn the_guest_is_not_stopped_before_the_targets_devices_are_ready() {
    let config = SourceConfig {
        switchover_ack: true,
        ..config()
    };
    let mut source = source_at(config.clone(), At::Syncing);
    source.handle_synced(NOW, PageCount(0), 1);
    assert!(!asks_for(&actions(&mut source), "StopGuest"));
    source.handle_frame(NOW, TargetFrame::SwitchoverAck);
    assert!(asks_for(&actions(&mut source), "SendRound"), "at once");
    source.handle_round_sent(NOW, RoundSent::default());
    source.handle_frame(NOW, TargetFrame::RoundPlaced(RoundId(1)));
    source.handle_synced(NOW, PageCount(0), 1);
    assert!(asks_for(&actions(&mut source), "StopGuest"));
    let mut source = source_at(config, At::Sending);
    source.handle_frame(NOW, TargetFrame::SwitchoverAck);
    source.handle_frame(NOW, TargetFrame::SwitchoverAck);
    assert_eq!(source.status(), MigrationStatus::Failing, "said twice");
}

#[test]
fn rounds_with_nothing_to_send_leave_time_between_them() {
    let mut source = source_at(config(), At::Syncing);
    let tuning = SourceTuning {
        downtime_limit_us: 0,
        switchover_bytes_per_sec: None,
        auto_converge: None,
    };
    source.set_tuning(tuning);
    source.handle_synced(NOW, PageCount(0), 1);
    assert!(!asks_for(&actions(&mut source), "SendRound"));
    source.handle_timeout(NOW);
    assert!(!asks_for(&actions(&mut source), "SendRound"));
    let soon = source.poll_timeout().unwrap();
    assert!(soon > NOW && soon < NOW.plus_micros(100_000));
    source.handle_timeout(soon);
    assert!(asks_for(&actions(&mut source), "SendRound"));
    // Something to send does not wait, after an empty round neither, nor does a guest that may be stopped.
    let end_round = |source: &mut Source<Proof>, round| {
        source.handle_round_sent(soon, RoundSent::default());
        source.handle_frame(soon, TargetFrame::RoundPlaced(RoundId(round)));
    };
    end_round(&mut source, 1);
    source.handle_synced(soon, PageCount(1), 1);
    assert!(asks_for(&actions(&mut source), "SendRound"));
    source.set_tuning(SourceTuning {
        downtime_limit_us: 1_000_000,
        ..tuning
    });
    end_round(&mut source, 2);
    source.handle_synced(soon, PageCount(0), 1);
    assert!(asks_for(&actions(&mut source), "StopGuest"));
}

#[test]
fn an_attempt_that_has_nothing_to_send_can_be_cancelled() {
    let mut source = source_at(config(), At::Syncing);
    source.set_tuning(SourceTuning {
        downtime_limit_us: 0,
        switchover_bytes_per_sec: None,
        auto_converge: None,
    });
    source.handle_synced(NOW, PageCount(0), 1);
    source.handle_cancel(NOW).unwrap();
    let (resumed, end) = clean_up(&mut source);
    assert!(!resumed && end.contains("stopped: None"), "{end}");
}

/// Rounds of one second each in which the guest dirties all that was sent.
fn throttled() -> Source<Proof> {
    let mut source = source_at(config(), At::Sending);
    source.set_tuning(SourceTuning {
        downtime_limit_us: 1,
        switchover_bytes_per_sec: None,
        auto_converge: Some(ThrottleTuning {
            trigger_percent: 50,
            initial_percent: 20,
            increment_percent: 10,
            max_percent: 99,
            tailslow: false,
        }),
    });
    let mut seen = Vec::new();
    for round in 0..4 {
        let now = NOW.plus_micros(u64::from(round) * 1_000_000 + 1_000_000);
        let sent = RoundSent {
            data: PageCount(100),
            zero: PageCount(0),
            wire_bytes: 409_600,
        };
        source.handle_round_sent(now, sent);
        source.handle_frame(now, TargetFrame::RoundPlaced(RoundId(round)));
        source.handle_synced(now, PageCount(100), 1);
        seen.extend(
            actions(&mut source)
                .into_iter()
                .filter(|action| action.starts_with("Throttle")),
        );
    }
    assert_eq!(seen, ["Throttle(20)", "Throttle(30)"]);
    source
}

#[test]
fn a_guest_that_was_slowed_down_runs_freely_after_a_failure() {
    let mut source = throttled();
    assert_eq!(source.throttle_percent(), 30);
    source.handle_cancel(NOW).unwrap();
    assert!(asks_for(&actions(&mut source), "Throttle(0)"));
}

#[test]
fn auto_converge_that_is_switched_off_lets_the_guest_run_freely() {
    let mut source = throttled();
    source.set_tuning(SourceTuning {
        downtime_limit_us: 1,
        switchover_bytes_per_sec: None,
        auto_converge: None,
    });
    let now = NOW.plus_micros(9_000_000);
    source.handle_round_sent(now, RoundSent::default());
    source.handle_frame(now, TargetFrame::RoundPlaced(RoundId(4)));
    source.handle_synced(now, PageCount(100), 1);
    assert!(asks_for(&actions(&mut source), "Throttle(0)"));
}

#[test]
fn the_guest_is_not_stopped_before_its_own_devices_have_given_their_beginning() {
    let config = SourceConfig {
        switchover_ack: true,
        ..config()
    };
    for (ack, stops) in [(true, false), (false, true)] {
        let config = SourceConfig {
            switchover_ack: ack,
            ..config.clone()
        };
        let mut source = source_at(config, At::Syncing);
        if ack {
            source.handle_frame(NOW, TargetFrame::SwitchoverAck);
        }
        source.handle_device_sizes(0, 1);
        source.handle_synced(NOW, PageCount(0), 1);
        assert_eq!(asks_for(&actions(&mut source), "StopGuest"), stops);
        if stops {
            continue;
        }
        source.handle_round_sent(NOW, RoundSent::default());
        source.handle_frame(NOW, TargetFrame::RoundPlaced(RoundId(1)));
        source.handle_device_sizes(0, 0);
        source.handle_synced(NOW, PageCount(0), 1);
        assert!(asks_for(&actions(&mut source), "StopGuest"));
    }
}

#[test]
fn a_device_that_does_not_stop_fails_the_attempt_and_the_guest_is_resumed() {
    for pause_before_switchover in [false, true] {
        let config = SourceConfig {
            pause_before_switchover,
            ..config()
        };
        let mut source = source_at(config, At::Stopping);
        source.handle_devices_not_stopped(NOW, Proof, "vfio/0 writes on");
        assert_eq!(source.status(), MigrationStatus::Failing);
        let (resumed, end) = clean_up(&mut source);
        assert!(resumed && end.contains("vfio/0 writes on"), "{end}");
    }
}

#[test]
fn a_device_that_gives_nothing_is_a_local_failure_until_the_commit() {
    let mut source = source_at(config(), At::Sending);
    source.handle_device_failed(NOW, "vfio/0: reading");
    let reason = Reason::Local("vfio/0: reading".to_owned());
    assert_eq!(source.failure(), Some(&reason));
    let mut source = source_at(config(), At::Committed);
    source.handle_device_failed(NOW, "vfio/0: reading");
    assert!(source.in_doubt());
}
