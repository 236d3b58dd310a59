//! Operators in the simulated world: each command at every step of a run, two at once, and migrations that are tried again. What must
//! hold after each step is in `vmferry_tests::sim`; the tests here say how the runs may end.

use vmferry_tests::sim::commands::{Again, Command, Order};
use vmferry_tests::sim::faults::Faults;
use vmferry_tests::sim::{Ending, Report, Side, World, check};
use vmferry_transport::proto::SourceJob;

/// A migration of this world waits for everything that it can wait for: the guest's devices, and the operator.
#[derive(Clone, Copy, Debug)]
struct Plan {
    seed: u64,
    pauses_before_switchover: bool,
    waits_for_unplug: bool,
}

const PLANS: [Plan; 3] = [
    Plan {
        seed: 0,
        pauses_before_switchover: false,
        waits_for_unplug: false,
    },
    Plan {
        seed: 28,
        pauses_before_switchover: true,
        waits_for_unplug: false,
    },
    Plan {
        seed: 12,
        pauses_before_switchover: true,
        waits_for_unplug: true,
    },
];

fn run(plan: Plan, test: &str, faults: &Faults) -> Report {
    check(|| {
        let mut world = World::new(plan.seed);
        world.pause_before_switchover = Some(plan.pauses_before_switchover);
        world.faults = Faults {
            unplug_wait: if plan.waits_for_unplug { 1000 } else { 0 },
            ..faults.clone()
        };
        world.set_name(format!(
            "cargo test -p vmferry-tests --release operators::{test}"
        ));
        world
    })
}

fn orders(orders: &[(u64, Command)]) -> Vec<Order> {
    let order = |(step, command): &(u64, Command)| Order {
        step: *step,
        command: *command,
    };
    orders.iter().map(order).collect()
}

/// Runs every plan once for every step of it, with what `faults` makes of the step.
fn at_every_step(test: &str, faults: impl Fn(u64) -> Faults, judge: impl Fn(&Report)) {
    for plan in PLANS {
        let whole = run(plan, test, &Faults::default());
        assert_eq!(whole.ending, Some(Ending::Completed), "{plan:?}");
        for step in 1..=whole.steps {
            judge(&run(plan, test, &faults(step)));
        }
    }
}

/// How a run may end in which this command was given once.
fn judge(command: Command, report: &Report) {
    let Report {
        ending, arrived, ..
    } = *report;
    let says = format!("{command:?}: {report:?}");
    match command {
        Command::Cancel => {
            let expected = if arrived {
                Ending::Completed
            } else {
                Ending::Cancelled
            };
            assert_eq!(ending, Some(expected), "{says}");
        }
        // The connection that breaks may be the one that asks for the outcome, but another one gets through.
        Command::CancelIncoming | Command::Yank(_) => {
            let expected = if arrived {
                Ending::Completed
            } else {
                Ending::Failed
            };
            assert_eq!(ending, Some(expected), "{says}");
            assert!(!report.operator_decided, "{says}");
        }
        Command::Quit(Side::Source) => assert_eq!(ending, None, "{says}"),
        Command::Quit(Side::Target) => {
            assert!(!arrived, "{says}");
            assert!(
                matches!(ending, Some(Ending::Completed | Ending::Failed)),
                "{says}"
            );
        }
        // Refused, or nothing that decides where the guest is.
        Command::Migrate
        | Command::Continue
        | Command::Stop(_)
        | Command::Cont(_)
        | Command::SetDowntimeLimit(_)
        | Command::SetSwitchoverBandwidth(_)
        | Command::SetAutoConverge(_)
        | Command::Resolve => {
            assert_eq!(ending, Some(Ending::Completed), "{says}");
            assert!(arrived, "{says}");
        }
    }
}

#[test]
fn every_command_may_come_at_every_step() {
    for command in Command::ALL {
        at_every_step(
            "every_command_may_come_at_every_step",
            |step| Faults {
                orders: orders(&[(step, command)]),
                ..Faults::default()
            },
            |report| judge(command, report),
        );
    }
}

#[test]
fn two_commands_may_come_at_the_same_step() {
    let test = "two_commands_may_come_at_the_same_step";
    let plan = PLANS[2];
    let whole = run(plan, test, &Faults::default());
    for first in [Command::Cancel, Command::Stop(Side::Source)] {
        for second in Command::ALL {
            for step in 1..=whole.steps {
                let faults = Faults {
                    orders: orders(&[(step, first), (step, second)]),
                    ..Faults::default()
                };
                let report = run(plan, test, &faults);
                let quits = second == Command::Quit(Side::Source);
                assert_eq!(report.ending.is_none(), quits, "{first:?}, {second:?}");
            }
        }
    }
}

#[test]
fn a_cancelled_migration_can_begin_again_at_once() {
    for fresh in [false, true] {
        at_every_step(
            "a_cancelled_migration_can_begin_again_at_once",
            |step| Faults {
                orders: orders(&[(step, Command::Cancel)]),
                again: Some(Again { times: 1, fresh }),
                ..Faults::default()
            },
            |report| {
                // The old target may still be cleaning up, and says so.
                let refused = !fresh && report.ending == Some(Ending::Failed);
                assert!(
                    refused || report.ending == Some(Ending::Completed),
                    "{report:?}"
                );
            },
        );
    }
}

#[test]
fn a_guest_that_is_stopped_while_it_arrives_is_stopped_or_the_operator_knows() {
    at_every_step(
        "a_guest_that_is_stopped_while_it_arrives_is_stopped_or_the_operator_knows",
        |step| Faults {
            orders: orders(&[
                (step, Command::Stop(Side::Target)),
                (step + 2, Command::Cont(Side::Target)),
                (step + 4, Command::Stop(Side::Target)),
            ]),
            ..Faults::default()
        },
        |report| assert_eq!(report.ending, Some(Ending::Completed)),
    );
}

#[test]
fn a_migration_that_nobody_lets_go_on_waits_until_it_is_cancelled() {
    for plan in PLANS {
        let test = "a_migration_that_nobody_lets_go_on_waits_until_it_is_cancelled";
        let faults = Faults {
            never_continue: 1000,
            ..Faults::default()
        };
        let report = run(plan, test, &faults);
        let expected = if plan.pauses_before_switchover {
            Ending::Cancelled
        } else {
            Ending::Completed
        };
        assert_eq!(report.ending, Some(expected), "{plan:?}");
    }
}

#[test]
fn a_guest_that_keeps_its_device_stays_at_the_source() {
    let faults = Faults {
        unplug_never: 1000,
        ..Faults::default()
    };
    let report = run(
        PLANS[2],
        "a_guest_that_keeps_its_device_stays_at_the_source",
        &faults,
    );
    assert_eq!(report.ending, Some(Ending::Failed));
    assert_eq!(report.stopped_at_step, None, "the guest was stopped");
}

#[test]
fn a_veto_leaves_the_guest_at_the_source() {
    let mut vetoes = 0;
    for seed in 0..50 {
        let plan = Plan { seed, ..PLANS[0] };
        let faults = Faults {
            fail_source_job: Some(SourceJob::NotifySetup),
            ..Faults::default()
        };
        let report = run(plan, "a_veto_leaves_the_guest_at_the_source", &faults);
        let vetoed = report.seen.contains("a notifier vetoes");
        vetoes += u32::from(vetoed);
        let expected = if vetoed {
            Ending::Failed
        } else {
            Ending::Completed
        };
        assert_eq!(report.ending, Some(expected), "world {seed}");
    }
    assert!(vetoes > 20, "hardly any world has notifiers");
}

/// The target cannot have the disks, so the guest goes back; if the source cannot have them either, `cont` tries again.
#[test]
fn disks_that_cannot_be_had_keep_the_guest_stopped_until_they_can() {
    for seed in 0..200 {
        let plan = Plan { seed, ..PLANS[0] };
        let faults = Faults {
            fail_disks: 1000,
            ..Faults::default()
        };
        let test = "disks_that_cannot_be_had_keep_the_guest_stopped_until_they_can";
        let report = run(plan, test, &faults);
        // A guest that is paused all the time needs no disks.
        if report.ending == Some(Ending::Failed) {
            assert!(report.seen.contains("the target cannot have the disks"));
            assert!(report.seen.contains("the source cannot have its disks"));
        } else {
            assert!(!report.seen.contains("the target cannot have the disks"));
        }
    }
}
