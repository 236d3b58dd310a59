//! Both protocol cores in a simulated world, with faults by chance and with one fault at every place of a run. What is checked after
//! each step is in `vmferry_tests::sim`; the tests here choose the runs and say how they may end.

use std::collections::BTreeSet;
use std::env;
use std::str::FromStr;

use vmferry_tests::sim::commands::{Command, Order};
use vmferry_tests::sim::faults::{ControlCut, DataCut, Faults, Freeze, Kill, Notice};
use vmferry_tests::sim::hostile::{Depth, fuzz_source, fuzz_target};
use vmferry_tests::sim::{Ending, Report, Side, World, check, check_seed};
use vmferry_transport::proto::{SourceJob, TargetJob};

/// Worlds that the exhaustive tests go through: one to eight data connections, two or more rounds, with and without verification.
const WORLDS: [u64; 4] = [0, 12, 26, 28];

fn number<T: FromStr>(variable: &str, default: T) -> T {
    match env::var(variable) {
        Ok(text) => text
            .parse()
            .ok()
            .unwrap_or_else(|| panic!("{variable} is not a number: {text}")),
        Err(_) => default,
    }
}

/// Runs a world of the list with these faults, under a name that says how to repeat it.
fn run(seed: u64, test: &str, faults: &Faults) -> Report {
    check(|| {
        let mut world = World::new(seed);
        world.faults = faults.clone();
        world.set_name(format!(
            "cargo test -p vmferry-tests --release simulation::{test}"
        ));
        world
    })
}

fn run_without_faults(seed: u64) -> Report {
    let report = run(seed, "without_faults_the_guest_arrives", &Faults::default());
    assert_eq!(report.ending, Some(Ending::Completed));
    assert!(report.arrived);
    report
}

#[test]
fn random_faults_break_no_invariant() {
    let seeds = number("VMFERRY_SIM_SEEDS", 10_000);
    let mut steps = 0;
    let mut seen = BTreeSet::new();
    for seed in 0..seeds {
        let report = check_seed(seed);
        steps += report.steps;
        let Report {
            ending,
            arrived,
            operator_decided,
            asking_bytes,
            seen: saw,
            ..
        } = report;
        seen.extend(saw.into_iter().map(str::to_owned));
        seen.insert(format!("{ending:?}, arrived: {arrived}"));
        seen.insert(format!("{ending:?}, operator: {operator_decided}"));
        seen.insert(format!("{ending:?}, asked: {}", asking_bytes[0] > 0));
    }
    println!("{seeds} seeds, {steps} steps");
    if seeds >= 10_000 {
        // Runs that all end alike would prove little.
        for kind in [
            "None, arrived: true",
            "None, arrived: false",
            "Some(Completed), arrived: true",
            "Some(Completed), operator: true",
            "Some(Completed), asked: true",
            "Some(Cancelled), arrived: false",
            "Some(Failed), arrived: false",
            "Some(Failed), operator: true",
            "Some(Failed), asked: true",
            "a notifier vetoes",
            "cancel is refused",
            "cont is refused at the source",
            "cont is refused at the target",
            "cont is refused: the guest was handed over",
            "cont is refused: the guest will never run here",
            "continue is refused",
            "migrate is refused",
            "parameters are refused",
            "stop is refused at the source",
            "stop is refused at the target",
            "the guest is slowed down",
            "the guest is started at the target",
            "the guest is started by the operator",
            "the guest is stopped at the target",
            "the guest is stopped by the operator",
            "the guest lets go of its devices",
            "the guest runs freely again",
            "the guest will not let go of its devices",
            "the lock keeps the source out",
            "the migration is cancelled",
            "the operator lets the migration go on",
            "the operator tries again",
            "the source cannot have its disks",
            "the switchover waited for the operator's job",
            "the target cannot have the disks",
            "the target gives the disks back",
            "x-resolve before the operator was to look",
        ] {
            assert!(seen.contains(kind), "no run saw: {kind}; seen: {seen:#?}");
        }
    }
}

/// Repeats one seed with a trace of its last events: VMFERRY_SIM_SEED=... as a failed run says.
#[test]
fn upgrades_in_place_with_random_faults_break_no_invariant() {
    let seeds = number("VMFERRY_SIM_SEEDS", 5_000);
    let mut endings = [0_u64; 3];
    for seed in 0..seeds {
        let report = check(|| {
            let mut world = World::with_random_faults(seed);
            world.in_place = true;
            world.set_name(format!(
                "simulation::upgrades_in_place_with_random_faults_break_no_invariant, seed {seed}"
            ));
            world
        });
        endings[match report.ending {
            Some(Ending::Completed) => 0,
            Some(_) => 1,
            None => 2,
        }] += 1;
        assert_eq!(report.data_items_max, 0, "a page moved");
    }
    assert!(
        endings.iter().all(|count| *count > seeds / 100),
        "{endings:?}"
    );
}

#[test]
fn an_upgrade_in_place_that_is_killed_at_any_step_never_leaves_two_guests() {
    let world = |seed, faults: &Faults| {
        check(|| {
            let mut world = World::new(seed);
            world.in_place = true;
            world.faults = faults.clone();
            world.set_name(format!("in place, seed {seed}, {faults:?}"));
            world
        })
    };
    for seed in WORLDS {
        let whole = world(seed, &Faults::default());
        assert_eq!(whole.ending, Some(Ending::Completed));
        for step in 1..=whole.steps {
            let kill = Some(Kill {
                step,
                silent: false,
            });
            let target = Faults {
                kill_target: kill,
                ..Faults::default()
            };
            assert!(!world(seed, &target).arrived, "it was killed");
            let source = Faults {
                kill_source: kill,
                ..Faults::default()
            };
            world(seed, &source);
        }
    }
}

#[test]
fn replay() {
    let seed = number("VMFERRY_SIM_SEED", 0);
    println!("{:#?}", check_seed(seed));
}

#[test]
fn without_faults_the_guest_arrives() {
    for seed in 0..1_000 {
        run_without_faults(seed);
    }
}

#[test]
fn the_guest_moves_when_the_last_byte_of_commit_arrives_and_not_before() {
    for seed in WORLDS {
        let whole = run_without_faults(seed);
        for notice in Notice::ALL {
            for bytes in 0..whole.control_bytes[0] {
                let cut = ControlCut {
                    connection: 0,
                    from: Side::Source,
                    bytes,
                    notice,
                };
                let faults = Faults {
                    cut_control: Some(cut),
                    ..Faults::default()
                };
                let test = "the_guest_moves_when_the_last_byte_of_commit_arrives_and_not_before";
                let report = run(seed, test, &faults);
                let moves = bytes >= whole.commit_ends_at;
                assert_eq!(report.arrived, moves, "world {seed}, {cut:?}");
                let ending = if moves {
                    Ending::Completed
                } else {
                    Ending::Failed
                };
                assert_eq!(report.ending, Some(ending), "world {seed}, {cut:?}");
                assert!(!report.operator_decided, "world {seed}, {cut:?}");
            }
        }
    }
}

#[test]
fn the_source_learns_the_outcome_wherever_the_targets_words_are_cut() {
    for seed in WORLDS {
        let whole = run_without_faults(seed);
        for notice in Notice::ALL {
            for bytes in 0..whole.control_bytes[1] {
                let cut = ControlCut {
                    connection: 0,
                    from: Side::Target,
                    bytes,
                    notice,
                };
                let faults = Faults {
                    cut_control: Some(cut),
                    ..Faults::default()
                };
                let test = "the_source_learns_the_outcome_wherever_the_targets_words_are_cut";
                let report = run(seed, test, &faults);
                if bytes < whole.ready_ends_at {
                    assert_eq!(report.ending, Some(Ending::Failed), "world {seed}, {cut:?}");
                    assert!(!report.arrived, "world {seed}, {cut:?}");
                }
                let at_target = report.ending == Some(Ending::Completed);
                assert_eq!(report.arrived, at_target, "world {seed}, {cut:?}");
                assert!(!report.operator_decided, "world {seed}, {cut:?}");
            }
        }
    }
}

/// RUNNING is lost, or COMMIT; then the connection that asks is cut at every byte, too.
#[test]
fn the_source_learns_the_outcome_wherever_its_question_is_cut() {
    for seed in WORLDS {
        let whole = run_without_faults(seed);
        let running = (Side::Target, whole.ready_ends_at);
        let commit = (Side::Source, whole.commit_ends_at - 1);
        for (from, bytes) in [running, commit] {
            for notice in Notice::ALL {
                let first = ControlCut {
                    connection: 0,
                    from,
                    bytes,
                    notice,
                };
                let faults = Faults {
                    cut_control: Some(first),
                    ..Faults::default()
                };
                let test = "the_source_learns_the_outcome_wherever_its_question_is_cut";
                let asked = run(seed, test, &faults);
                for (side, carried) in [Side::Source, Side::Target]
                    .into_iter()
                    .zip(asked.asking_bytes)
                {
                    for bytes in 0..carried {
                        let second = ControlCut {
                            connection: 1,
                            from: side,
                            bytes,
                            notice,
                        };
                        let faults = Faults {
                            cut_control_again: Some(second),
                            ..faults.clone()
                        };
                        let report = run(seed, test, &faults);
                        assert_eq!(
                            report.arrived, asked.arrived,
                            "world {seed}, {first:?}, {second:?}"
                        );
                        assert_eq!(
                            report.ending, asked.ending,
                            "world {seed}, {first:?}, {second:?}"
                        );
                        assert!(
                            !report.operator_decided,
                            "world {seed}, {first:?}, {second:?}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn a_data_connection_that_breaks_anywhere_leaves_the_guest_at_the_source() {
    for seed in WORLDS {
        let whole = run_without_faults(seed);
        for index in 0..whole.data_connections {
            for items in 0..whole.data_items_max {
                for notice in Notice::ALL {
                    let cut = DataCut {
                        index,
                        items,
                        notice,
                    };
                    let faults = Faults {
                        cut_data: Some(cut),
                        ..Faults::default()
                    };
                    let test =
                        "a_data_connection_that_breaks_anywhere_leaves_the_guest_at_the_source";
                    let report = run(seed, test, &faults);
                    // A connection that carries less than the busiest one may never reach the cut.
                    let at_target = report.ending == Some(Ending::Completed);
                    assert_eq!(report.arrived, at_target, "world {seed}, {cut:?}");
                    assert!(items > 0 || !at_target, "world {seed}, {cut:?}");
                }
            }
        }
    }
}

/// Runs a world once for every step of it, with what `faults` makes of the step.
fn at_every_step(test: &str, faults: impl Fn(u64) -> Faults, judge: impl Fn(&Report)) {
    for seed in WORLDS {
        let whole = run_without_faults(seed);
        for step in 1..=whole.steps {
            let faults = faults(step);
            let report = run(seed, test, &faults);
            judge(&report);
        }
    }
}

#[test]
fn a_target_killed_at_any_step_never_leaves_two_guests() {
    for silent in [false, true] {
        at_every_step(
            "a_target_killed_at_any_step_never_leaves_two_guests",
            |step| Faults {
                kill_target: Some(Kill { step, silent }),
                ..Faults::default()
            },
            |report| {
                assert!(report.ending.is_some());
                assert!(!report.arrived, "it was killed");
            },
        );
    }
}

#[test]
fn a_source_killed_at_any_step_never_leaves_two_guests() {
    for silent in [false, true] {
        at_every_step(
            "a_source_killed_at_any_step_never_leaves_two_guests",
            |step| Faults {
                kill_source: Some(Kill { step, silent }),
                ..Faults::default()
            },
            |report| assert_eq!(report.ending, None),
        );
    }
}

#[test]
fn cancelling_at_any_step_is_refused_or_ends_in_cancelled() {
    at_every_step(
        "cancelling_at_any_step_is_refused_or_ends_in_cancelled",
        |step| Faults {
            orders: vec![Order {
                step,
                command: Command::Cancel,
            }],
            ..Faults::default()
        },
        |report| {
            let expected = if report.arrived {
                Ending::Completed
            } else {
                Ending::Cancelled
            };
            assert_eq!(report.ending, Some(expected));
        },
    );
}

#[test]
fn cancelling_at_the_target_leaves_the_guest_at_the_source() {
    at_every_step(
        "cancelling_at_the_target_leaves_the_guest_at_the_source",
        |step| Faults {
            orders: vec![Order {
                step,
                command: Command::CancelIncoming,
            }],
            ..Faults::default()
        },
        |report| {
            let expected = if report.arrived {
                Ending::Completed
            } else {
                Ending::Failed
            };
            assert_eq!(report.ending, Some(expected));
        },
    );
}

#[test]
fn a_process_frozen_at_any_step_for_any_time_never_leaves_two_guests() {
    for micros in [100_000, 12_000_000, 45_000_000, 200_000_000] {
        for side in [Side::Source, Side::Target] {
            at_every_step(
                "a_process_frozen_at_any_step_for_any_time_never_leaves_two_guests",
                |step| {
                    let freeze = Some(Freeze { step, micros });
                    match side {
                        Side::Source => Faults {
                            freeze_source: freeze,
                            ..Faults::default()
                        },
                        Side::Target => Faults {
                            freeze_target: freeze,
                            ..Faults::default()
                        },
                    }
                },
                |report| assert!(report.ending.is_some()),
            );
        }
    }
}

#[test]
fn pausing_the_guest_at_any_step_moves_it_as_it_is_in_the_end() {
    at_every_step(
        "pausing_the_guest_at_any_step_moves_it_as_it_is_in_the_end",
        |step| Faults {
            orders: vec![
                Order {
                    step,
                    command: Command::Stop(Side::Source),
                },
                Order {
                    step: step + 30,
                    command: Command::Cont(Side::Source),
                },
            ],
            ..Faults::default()
        },
        |report| assert_eq!(report.ending, Some(Ending::Completed)),
    );
}

#[test]
fn whichever_job_fails_the_guest_stays_at_the_source() {
    let source = [
        SourceJob::ConnectControl,
        SourceJob::ConnectData,
        SourceJob::NotifySetup,
        SourceJob::StartLog,
        SourceJob::Sync,
        SourceJob::StopGuest,
        SourceJob::SaveState,
    ];
    let target = [TargetJob::Prepare, TargetJob::Load, TargetJob::StartGuest];
    let source = source.map(|job| Faults {
        fail_source_job: Some(job),
        ..Faults::default()
    });
    let target = target.map(|job| Faults {
        fail_target_job: Some(job),
        ..Faults::default()
    });
    for seed in 0..50 {
        for faults in source.iter().chain(&target) {
            let report = run(
                seed,
                "whichever_job_fails_the_guest_stays_at_the_source",
                faults,
            );
            // Preparing may be done at once and a paused guest needs neither stop nor start: then there is no job that could fail.
            let may_complete = matches!(
                faults.fail_target_job,
                Some(TargetJob::Prepare | TargetJob::StartGuest)
            ) || matches!(
                faults.fail_source_job,
                Some(SourceJob::StopGuest | SourceJob::NotifySetup)
            );
            if !may_complete || report.ending != Some(Ending::Completed) {
                assert_eq!(
                    report.ending,
                    Some(Ending::Failed),
                    "world {seed}, {faults:?}"
                );
                assert!(!report.arrived, "world {seed}, {faults:?}");
            }
        }
    }
}

fn fuzz(seeds: u64, run: impl Fn(u64) -> Depth) -> [u64; 3] {
    let mut deep = [0; 3];
    for seed in 0..seeds {
        let run = std::panic::AssertUnwindSafe(|| run(seed));
        let depth = std::panic::catch_unwind(run)
            .unwrap_or_else(|_| panic!("seed {seed} broke an invariant"));
        let Depth {
            committed,
            completed,
            unresolved,
        } = depth;
        for (count, reached) in deep.iter_mut().zip([committed, completed, unresolved]) {
            *count += u64::from(reached);
        }
    }
    deep
}

#[test]
fn a_hostile_target_cannot_make_the_source_panic_or_guess() {
    let seeds = 5_000;
    let deep = fuzz(seeds, fuzz_source);
    assert!(
        deep.iter().all(|count| *count > seeds / 50),
        "the fuzzer stays at the surface: {deep:?}"
    );
}

#[test]
fn a_hostile_source_cannot_make_the_target_panic_or_start_the_guest_early() {
    let seeds = 5_000;
    let [committed, completed, _] = fuzz(seeds, fuzz_target);
    assert!(
        committed > seeds / 50 && completed > seeds / 50,
        "the fuzzer stays at the surface"
    );
}
