//! The target core, step by step: violations of the protocol, who may speak, what a failed attempt may never do.

mod state;

use super::*;

const CONTROL: Connection = Connection(1);
const ASKER: Connection = Connection(9);

fn hello() -> Hello {
    Hello {
        versions: VersionRange::OURS,
        migration_id: ID,
        data_connections: 2,
        checksum: false,
        verify: false,
        software: "s".to_owned(),
        blocks: blocks(),
        devices: devices(),
        uuid: None,
        switchover_ack: false,
    }
}

fn data_hello(index: u16) -> DataHello {
    DataHello {
        version: 1,
        migration_id: ID,
        index,
        count: 2,
    }
}

fn listening() -> Target {
    listening_for_streams(&[])
}

fn listening_for_streams(streamed: &[&str]) -> Target {
    Target::new(TargetConfig {
        blocks: blocks(),
        devices: devices(),
        streamed: streamed.iter().map(|name| (*name).to_owned()).collect(),
        software: "t".to_owned(),
        uuid: None,
        in_place: None,
        deadlines: Deadlines::default(),
    })
}

fn actions(target: &mut Target) -> Vec<String> {
    std::iter::from_fn(|| target.poll_action())
        .map(|action| format!("{action:?}"))
        .collect()
}

/// The notifiers are told of a failure; whoever must not hear of it before them has heard nothing.
fn publish(target: &mut Target) -> TargetStatus {
    let before = actions(target);
    assert!(before.contains(&"NotifyFailed".to_owned()), "{before:?}");
    assert!(
        !before
            .iter()
            .any(|action| action.contains("Abort") || action.contains("NotCommitted")),
        "{before:?}"
    );
    assert_ne!(target.status(), TargetStatus::Failing);
    target.handle_notified(NOW);
    target.status()
}

fn awaiting_data() -> Target {
    after_hello(listening())
}

fn after_hello(mut target: Target) -> Target {
    target.handle_first_frame(NOW, CONTROL, SourceFrame::Hello(hello()));
    actions(&mut target);
    target
}

fn preparing() -> Target {
    after_data_hellos(awaiting_data())
}

fn after_data_hellos(mut target: Target) -> Target {
    for index in 0..2 {
        let connection = Connection(2 + u64::from(index));
        target.handle_first_frame(NOW, connection, SourceFrame::DataHello(data_hello(index)));
    }
    assert!(actions(&mut target).contains(&"Prepare".to_owned()));
    target
}

fn receiving() -> Target {
    let mut target = preparing();
    target.handle_prepared(NOW);
    actions(&mut target);
    target
}

fn state_end() -> StateEnd {
    StateEnd {
        sections: 2,
        last_round: RoundId(3),
        guest_runs: true,
        ram_hash: None,
    }
}

fn loading() -> Target {
    let mut target = receiving();
    for frame in [
        SourceFrame::Switchover(RoundId(3)),
        SourceFrame::Section(section("vcpu/0")),
        SourceFrame::Section(section("serial/0")),
        SourceFrame::StateEnd(state_end()),
    ] {
        target.handle_frame(NOW, CONTROL, frame);
    }
    target.handle_round_placed(NOW, RoundId(3), true);
    assert!(
        actions(&mut target)
            .iter()
            .any(|action| action.starts_with("Load"))
    );
    target
}

fn is_ready() -> Target {
    let mut target = loading();
    let loaded = Loaded {
        load_us: 1,
        populated_bytes: 0,
        verification: None,
    };
    target.handle_loaded(NOW, loaded);
    actions(&mut target);
    target
}

fn starting() -> Target {
    let mut target = is_ready();
    target.handle_frame(NOW, CONTROL, SourceFrame::Commit);
    assert_eq!(actions(&mut target), ["StartGuest { run: true }"]);
    target
}

fn running() -> Target {
    let mut target = starting();
    target.handle_guest_started(NOW, 5);
    actions(&mut target);
    target
}

fn before_commit() -> [(&'static str, Target); 5] {
    [
        ("awaiting data", awaiting_data()),
        ("preparing", preparing()),
        ("receiving", receiving()),
        ("loading", loading()),
        ("ready", is_ready()),
    ]
}

fn answer_to(target: &mut Target, connection: Connection) -> Vec<String> {
    target.handle_first_frame(NOW, connection, SourceFrame::Resolve(ID));
    let prefix = format!("Send({connection:?}, ");
    let sent = actions(target).into_iter();
    sent.filter_map(|action| {
        Some(
            action
                .strip_prefix(&prefix)?
                .trim_end_matches(')')
                .to_owned(),
        )
    })
    .collect()
}

#[test]
fn frames_that_do_not_belong_to_a_phase_end_the_attempt() {
    let frames = [
        SourceFrame::Hello(hello()),
        SourceFrame::DataHello(data_hello(0)),
        SourceFrame::Resolve(ID),
        SourceFrame::Finish,
        SourceFrame::Commit,
        SourceFrame::Switchover(RoundId(1)),
        SourceFrame::Section(section("vcpu/0")),
        SourceFrame::StateEnd(state_end()),
    ];
    for frame in frames {
        for (name, mut target) in before_commit() {
            let welcome = matches!(
                (name, &frame),
                ("ready", SourceFrame::Commit) | ("receiving", SourceFrame::Switchover(_))
            );
            if welcome {
                continue;
            }
            target.handle_frame(NOW, CONTROL, frame.clone());
            assert_eq!(
                publish(&mut target),
                TargetStatus::Failing,
                "{frame:?} while {name}"
            );
            let told = actions(&mut target)
                .iter()
                .any(|action| action.contains("Abort"));
            assert!(told, "the source is told about {frame:?} while {name}");
        }
    }
}

#[test]
fn a_connection_must_begin_with_a_hello_or_a_question() {
    for frame in [
        SourceFrame::Commit,
        SourceFrame::Keepalive,
        SourceFrame::Finish,
        SourceFrame::Section(section("vcpu/0")),
    ] {
        let mut target = is_ready();
        target.handle_first_frame(NOW, ASKER, frame);
        let answer = actions(&mut target);
        assert!(
            answer[0].contains("Abort") && answer[1] == "Close(Connection(9))",
            "{answer:?}"
        );
        assert_eq!(
            target.status(),
            TargetStatus::Active,
            "no harm to the attempt"
        );
    }
}

#[test]
fn a_hello_that_does_not_fit_changes_nothing_and_the_next_is_welcome() {
    let mut target = listening();
    let mut other = hello();
    other.blocks[0].pages = PageCount(17);
    target.handle_first_frame(NOW, ASKER, SourceFrame::Hello(other));
    assert_eq!(target.status(), TargetStatus::None);
    assert_eq!(actions(&mut target)[1], "Close(Connection(9))");
    target.handle_first_frame(NOW, CONTROL, SourceFrame::Hello(hello()));
    assert_eq!(target.status(), TargetStatus::Setup);
    target.handle_first_frame(NOW, ASKER, SourceFrame::Hello(hello()));
    assert!(
        actions(&mut target)
            .iter()
            .any(|action| action.contains("Busy"))
    );
}

#[test]
fn data_connections_that_do_not_belong_are_refused_without_harm() {
    let wrong = [
        DataHello {
            migration_id: MigrationId([8; 16]),
            ..data_hello(0)
        },
        DataHello {
            version: 2,
            ..data_hello(0)
        },
        DataHello {
            count: 3,
            ..data_hello(0)
        },
        DataHello {
            index: 2,
            ..data_hello(0)
        },
    ];
    let mut target = awaiting_data();
    for hello in wrong {
        target.handle_first_frame(NOW, ASKER, SourceFrame::DataHello(hello));
        let answer = actions(&mut target);
        assert!(
            answer[0].contains("Abort") && answer.len() == 2,
            "{hello:?}: {answer:?}"
        );
    }
    target.handle_first_frame(NOW, Connection(2), SourceFrame::DataHello(data_hello(0)));
    assert_eq!(actions(&mut target).len(), 1);
    target.handle_first_frame(NOW, ASKER, SourceFrame::DataHello(data_hello(0)));
    assert!(actions(&mut target)[0].contains("exists already"));
    assert_eq!(target.status(), TargetStatus::Setup);
    let mut target = receiving();
    target.handle_first_frame(NOW, ASKER, SourceFrame::DataHello(data_hello(1)));
    assert!(actions(&mut target)[0].contains("Abort"), "one too many");
    assert_eq!(target.status(), TargetStatus::Active);
}

#[test]
fn a_source_that_says_nonsense_is_told_so_and_one_that_is_gone_is_not() {
    for (name, mut target) in before_commit() {
        target.handle_connection_lost(NOW, CONTROL, "nonsense", true);
        assert!(target.may_explain(CONTROL), "{name}");
        target.handle_notified(NOW);
        let said = actions(&mut target).concat();
        assert!(
            said.contains("Abort") && said.contains("nonsense"),
            "{name}: {said}"
        );
    }
    for (name, mut target) in before_commit() {
        target.handle_connection_lost(NOW, CONTROL, "gone", false);
        target.handle_notified(NOW);
        let said = actions(&mut target).concat();
        assert!(!said.contains("Abort"), "{name}: {said}");
    }
}

#[test]
fn nobody_waits_for_questions_of_a_source_that_gave_up_itself() {
    for (name, mut target) in before_commit() {
        let abort = Abort::new(AbortCode::Cancelled, "no");
        target.handle_frame(NOW, CONTROL, SourceFrame::Abort(abort));
        target.handle_notified(NOW);
        if name == "loading" {
            target.handle_job_failed(NOW, TargetJob::Load, AbortCode::Device, "late");
        }
        target.handle_prepared(NOW);
        target.handle_links_closed(NOW);
        let acts = actions(&mut target);
        assert_eq!(target.status(), TargetStatus::Failed, "{name}");
        assert!(
            acts.last().unwrap().contains("linger: false"),
            "{name}: {acts:?}"
        );
    }
}

#[test]
fn a_failed_attempt_never_starts_the_guest_whatever_comes_later() {
    for (name, mut target) in before_commit() {
        target.handle_connection_lost(NOW, CONTROL, "gone", false);
        assert_eq!(publish(&mut target), TargetStatus::Failing, "{name}");
        target.handle_frame(NOW, CONTROL, SourceFrame::Commit);
        target.handle_prepared(NOW);
        target.handle_round_placed(NOW, RoundId(3), true);
        let loaded = Loaded {
            load_us: 1,
            populated_bytes: 0,
            verification: None,
        };
        target.handle_loaded(NOW, loaded);
        target.handle_frame(NOW, CONTROL, SourceFrame::Commit);
        target.handle_links_closed(NOW);
        assert_eq!(target.status(), TargetStatus::Failed, "{name}");
        let lingers = format!("linger: {}", name == "ready");
        let acts = actions(&mut target);
        assert!(
            !acts
                .iter()
                .any(|action| action.contains("StartGuest") || action.contains("Ready")),
            "{acts:?}"
        );
        assert!(acts.last().unwrap().contains(&lingers), "{name}: {acts:?}");
        target.listen_again(NOW);
        target.handle_frame(NOW, CONTROL, SourceFrame::Commit);
        assert_eq!(actions(&mut target), [""; 0], "{name}");
        assert_eq!(
            answer_to(&mut target, ASKER),
            ["Resolved(NotCommitted"],
            "{name}"
        );
    }
}

#[test]
fn a_question_before_commit_ends_the_attempt() {
    for (name, mut target) in before_commit() {
        target.handle_first_frame(NOW, ASKER, SourceFrame::Resolve(ID));
        assert_eq!(publish(&mut target), TargetStatus::Failing, "{name}");
        let answer = actions(&mut target);
        assert!(
            answer.contains(&"Send(Connection(9), Resolved(NotCommitted))".to_owned()),
            "{name}: {answer:?}"
        );
        target.handle_frame(NOW, CONTROL, SourceFrame::Commit);
        assert_eq!(
            target.status(),
            TargetStatus::Failing,
            "{name}: COMMIT comes too late"
        );
    }
}

#[test]
fn a_question_while_the_guest_starts_is_answered_when_it_is_known() {
    let mut target = starting();
    assert_eq!(answer_to(&mut target, ASKER), [""; 0]);
    target.handle_guest_started(NOW, 1);
    assert!(actions(&mut target).contains(&"Send(Connection(9), Resolved(Committed))".to_owned()));
    let mut target = starting();
    assert_eq!(answer_to(&mut target, ASKER), [""; 0]);
    target.handle_job_failed(NOW, TargetJob::StartGuest, AbortCode::Internal, "no");
    publish(&mut target);
    let acts = actions(&mut target);
    assert!(
        acts.contains(&"Send(Connection(9), Resolved(NotCommitted))".to_owned()),
        "{acts:?}"
    );
    assert!(
        acts.iter()
            .any(|action| action.starts_with("Send(Connection(1), Abort")),
        "{acts:?}"
    );
    let mut target = starting();
    answer_to(&mut target, ASKER);
    target.handle_connection_lost(NOW, ASKER, "gone", false);
    target.handle_guest_started(NOW, 1);
    assert!(
        !actions(&mut target)
            .iter()
            .any(|action| action.contains("Connection(9)"))
    );
}

#[test]
fn questioners_are_bounded() {
    let mut target = starting();
    for number in 100..200 {
        target.handle_first_frame(NOW, Connection(number), SourceFrame::Resolve(ID));
    }
    let closed = actions(&mut target)
        .iter()
        .filter(|action| action.starts_with("Close("))
        .count();
    target.handle_guest_started(NOW, 1);
    let answered = actions(&mut target)
        .iter()
        .filter(|action| action.contains("Resolved"))
        .count();
    assert_eq!(closed + answered, 100);
    assert!(answered < 50);
}

#[test]
fn an_unknown_migration_is_not_denied() {
    for mut target in [listening(), receiving(), running()] {
        let id = MigrationId([9; 16]);
        target.handle_first_frame(NOW, ASKER, SourceFrame::Resolve(id));
        let answer = actions(&mut target);
        assert!(
            answer[0].contains("Abort") && answer[1].starts_with("Close"),
            "{answer:?}"
        );
    }
}

#[test]
fn finish_settles_once_and_only_from_those_who_may_say_it() {
    let settled = |target: &mut Target| {
        actions(target)
            .iter()
            .filter(|action| *action == "Settled")
            .count()
    };
    let mut target = running();
    target.handle_first_frame(
        NOW,
        Connection(8),
        SourceFrame::Resolve(MigrationId([9; 16])),
    );
    target.handle_frame(NOW, Connection(8), SourceFrame::Finish);
    assert_eq!(settled(&mut target), 0, "a stranger");
    assert_eq!(answer_to(&mut target, ASKER), ["Resolved(Committed"]);
    target.handle_frame(NOW, ASKER, SourceFrame::Finish);
    assert_eq!(settled(&mut target), 1);
    target.handle_frame(NOW, CONTROL, SourceFrame::Finish);
    target.handle_frame(NOW, ASKER, SourceFrame::Finish);
    assert_eq!(settled(&mut target), 0);
    let mut target = starting();
    target.handle_frame(NOW, CONTROL, SourceFrame::Finish);
    assert_eq!(settled(&mut target), 0, "too early");
}

#[test]
fn a_guest_that_is_here_cannot_be_taken_back() {
    for mut target in [starting(), running()] {
        let before = target.status();
        target.handle_frame(NOW, CONTROL, SourceFrame::Abort(abort()));
        target.handle_frame(NOW, CONTROL, SourceFrame::Commit);
        target.handle_data_failed(NOW, TargetError::Link("gone".to_owned()));
        target.handle_cancel(NOW);
        target.handle_connection_lost(NOW, CONTROL, "gone", false);
        target.handle_timeout(NOW.plus_micros(100 * STALL_US));
        assert_eq!(target.status(), before);
        assert_eq!(actions(&mut target), [""; 0]);
    }
}

/// An archive that is none, or one socket that ends: nobody else will come.
#[test]
fn a_target_whose_origin_has_nothing_to_give_fails_whatever_it_waits_for() {
    let error = || TargetError::Local(AbortCode::Resources, "no archive".to_owned());
    for mut target in [listening(), receiving()] {
        actions(&mut target);
        target.handle_origin_failed(NOW, error());
        while target.status() != TargetStatus::Failed {
            let todo = actions(&mut target);
            assert!(!todo.is_empty(), "stuck as {:?}", target.status());
            for action in todo {
                match action.as_str() {
                    "CloseLinks" => target.handle_links_closed(NOW),
                    "NotifyFailed" => target.handle_notified(NOW),
                    _ => {}
                }
            }
        }
        assert_eq!(target.error(), Some(&error()));
        assert!(actions(&mut target).last().unwrap().contains("no archive"));
    }
}

#[test]
fn an_id_that_failed_is_not_accepted_again() {
    let mut target = receiving();
    target.handle_cancel(NOW);
    publish(&mut target);
    target.handle_links_closed(NOW);
    target.listen_again(NOW);
    actions(&mut target);
    target.handle_first_frame(NOW, ASKER, SourceFrame::Hello(hello()));
    assert!(actions(&mut target)[0].contains("never used again"));
    let fresh = Hello {
        migration_id: MigrationId([1; 16]),
        ..hello()
    };
    target.handle_first_frame(NOW, ASKER, SourceFrame::Hello(fresh));
    assert_eq!(target.status(), TargetStatus::Setup);
}

#[test]
fn a_source_that_falls_silent_or_brings_too_few_connections_is_given_up() {
    let mut target = awaiting_data();
    for _ in 0..10 {
        let Some(at) = target.poll_timeout() else {
            break;
        };
        target.handle_frame(at, CONTROL, SourceFrame::Keepalive);
        target.handle_timeout(at);
    }
    assert!(
        target
            .error()
            .unwrap()
            .to_string()
            .contains("only 0 of 2 data connections")
    );
    for (name, mut target) in before_commit() {
        target.handle_timeout(NOW.plus_micros(STALL_US));
        assert_eq!(publish(&mut target), TargetStatus::Failing, "{name}");
    }
}

#[test]
fn a_source_that_asks_for_it_is_told_that_the_devices_are_ready_for_a_switchover() {
    for switchover_ack in [false, true] {
        let mut target = listening();
        let hello = Hello {
            switchover_ack,
            ..hello()
        };
        target.handle_first_frame(NOW, CONTROL, SourceFrame::Hello(hello));
        for index in 0..2 {
            let connection = Connection(2 + u64::from(index));
            target.handle_first_frame(NOW, connection, SourceFrame::DataHello(data_hello(index)));
        }
        target.handle_prepared(NOW);
        let said = actions(&mut target).contains(&"Send(Connection(1), SwitchoverAck)".to_owned());
        assert_eq!(said, switchover_ack);
    }
}

#[test]
fn a_source_of_another_vm_is_refused_with_both_uuids() {
    let mut target = Target::new(TargetConfig {
        blocks: blocks(),
        devices: devices(),
        streamed: Vec::new(),
        software: "t".to_owned(),
        uuid: Some(Uuid([1; 16])),
        in_place: None,
        deadlines: Deadlines::default(),
    });
    let other = Hello {
        uuid: Some(Uuid([2; 16])),
        ..hello()
    };
    target.handle_first_frame(NOW, CONTROL, SourceFrame::Hello(other));
    let said = actions(&mut target).concat();
    assert!(said.contains("another VM"), "{said}");
    assert_eq!(target.status(), TargetStatus::None);
    for uuid in [None, Some(Uuid([1; 16]))] {
        let hello = Hello { uuid, ..hello() };
        let mut target = Target::new(TargetConfig {
            blocks: blocks(),
            devices: devices(),
            streamed: Vec::new(),
            software: "t".to_owned(),
            uuid: Some(Uuid([1; 16])),
            in_place: None,
            deadlines: Deadlines::default(),
        });
        target.handle_first_frame(NOW, CONTROL, SourceFrame::Hello(hello));
        assert_eq!(target.status(), TargetStatus::Setup);
    }
}
