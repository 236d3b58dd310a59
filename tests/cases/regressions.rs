//! Runs that once broke an invariant. A seed means a run only as long as the simulation draws its numbers in the same order, so a run
//! worth keeping is written out as a world and its faults.

use vmferry_tests::sim::faults::{Faults, Freeze, Kill, Since};
use vmferry_tests::sim::{Ending, Report, World, check};

fn run(seed: u64, faults: &Faults) -> Report {
    check(|| {
        let mut world = World::new(seed);
        world.faults = faults.clone();
        world.set_name("cargo test -p vmferry-tests --release regressions");
        world
    })
}

/// Worlds whose migration needs a handful of rounds, far from what its links can just so carry.
fn worlds_that_converge() -> impl Iterator<Item = u64> {
    (0..200).filter(|seed| run(*seed, &Faults::default()).control_bytes[1] < 200)
}

/// The source is frozen while the answer to its hello waits to be read: a round trip of a second, which says nothing about the next.
#[test]
fn a_slow_answer_to_the_hello_does_not_keep_a_migration_from_converging() {
    for seed in worlds_that_converge() {
        for step in 3..7 {
            let freeze_source = Some(Freeze {
                step,
                micros: 1_000_000,
            });
            let report = run(
                seed,
                &Faults {
                    freeze_source,
                    ..Faults::default()
                },
            );
            assert_eq!(report.ending, Some(Ending::Completed));
            assert!(!report.limit_raised, "world {seed}, frozen at step {step}");
        }
    }
}

/// The first round takes seconds because the target is busy with something else: that is not what the link can carry.
#[test]
fn a_stall_in_the_first_round_does_not_keep_a_migration_from_converging() {
    for seed in worlds_that_converge() {
        for step in (10..60).step_by(10) {
            let freeze_target = Some(Freeze {
                step,
                micros: 5_000_000,
            });
            let report = run(
                seed,
                &Faults {
                    freeze_target,
                    ..Faults::default()
                },
            );
            assert_eq!(report.ending, Some(Ending::Completed));
            assert!(!report.limit_raised, "world {seed}, frozen at step {step}");
        }
    }
}

/// Nobody but the operator can know what became of the guest: the target took it and died, or died and never had it.
#[test]
fn a_target_that_dies_right_after_commit_leaves_the_decision_to_the_operator() {
    for seed in 0..200 {
        for step in 0..6 {
            let faults = Faults {
                since: Since::Commit,
                kill_target: Some(Kill {
                    step,
                    silent: false,
                }),
                ..Faults::default()
            };
            let report = run(seed, &faults);
            let knows = report.ending == Some(Ending::Completed);
            assert!(
                knows || report.operator_decided,
                "world {seed}, killed {step} steps after COMMIT: {report:?}"
            );
        }
    }
}
