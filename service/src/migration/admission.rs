//! Which command may be given in which status: one table, asked before anything is done.
//!
//! | | |
//! | --- | --- |
//! | Nothing under way | settings change, a migration may begin, a dirty rate may be measured |
//! | Under way | a second `migrate` and changes of what it was begun with are refused; what steers it may change: the downtime limit, the bandwidths, the throttle |
//! | `failing`, `cancelling` | everything that changes something is refused until cleanup is done. A client that reacts to the first sign of trouble by resetting everything gets a clean answer and not half a cleanup |
//!
//! Queries are always answered. Commands that depend on who has the guest (`stop`, `cont`) or on the machine are judged by the engine
//! as well.

use super::status::MigrationStatus;

/// What a command wants, as far as a migration is concerned.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Operation {
    /// `migrate`.
    Migrate,
    /// `migrate` with `resume`.
    Resume,
    /// `migrate-incoming`.
    Incoming,
    /// `migrate_cancel`.
    Cancel,
    /// `migrate-continue` with this state.
    Continue(MigrationStatus),
    /// `migrate-pause`.
    Pause,
    /// `migrate-recover`.
    Recover,
    /// `migrate-start-postcopy`.
    StartPostcopy,
    /// `migrate-set-capabilities`.
    SetCapabilities,
    /// `migrate-set-parameters`, of parameters that the migration was begun with.
    SetParameters,
    /// `migrate-set-parameters`, only of those in [`STEERING`].
    Steer,
    /// `calc-dirty-rate`.
    MeasureDirtyRate,
    /// `x-add-blocker`.
    AddBlocker,
}

/// What becomes of a command.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Admission {
    /// It is carried out.
    Accept,
    /// Nothing is to be done, which is no error.
    Ignore,
    /// It is not carried out, for this reason.
    Refuse(String),
}

/// Parameters that steer a migration under way.
pub(crate) const STEERING: [&str; 8] = [
    "avail-switchover-bandwidth",
    "cpu-throttle-increment",
    "cpu-throttle-initial",
    "cpu-throttle-tailslow",
    "downtime-limit",
    "max-bandwidth",
    "max-cpu-throttle",
    "throttle-trigger-threshold",
];

/// Whether `operation` may be carried out now that the migration is in `status`.
pub(crate) fn admit(operation: Operation, status: MigrationStatus) -> Admission {
    use MigrationStatus as S;
    use Operation as O;
    match operation {
        O::Migrate => when(status.is_idle(), || {
            format!("a migration is under way already (status {status})")
        }),
        O::Resume => when(status == S::PostcopyPaused, || {
            format!("`resume` needs a migration in status postcopy-paused; the status is {status}")
        }),
        O::Incoming => when(status == S::None || status == S::Failed, || {
            format!("this VM has its incoming migration already (status {status})")
        }),
        O::Cancel => match status {
            S::Setup | S::WaitUnplug | S::Active | S::PreSwitchover | S::Device => {
                Admission::Accept
            }
            S::PostcopyDevice
            | S::PostcopyActive
            | S::PostcopyPaused
            | S::PostcopyRecoverSetup
            | S::PostcopyRecover => Admission::Refuse(format!(
                "the guest is on its way to the target and cannot come back (status {status})"
            )),
            S::None
            | S::Completed
            | S::Failing
            | S::Failed
            | S::Cancelling
            | S::Cancelled
            | S::Colo => Admission::Ignore,
        },
        O::Continue(state) if state != status => Admission::Refuse(format!(
            "the migration is not in status {state}; it is in {status}"
        )),
        O::Continue(_) => when(status == S::PreSwitchover, || {
            format!("in status {status} nothing waits to be continued")
        }),
        O::Pause => when(
            matches!(status, S::PostcopyActive | S::PostcopyRecover),
            || {
                format!(
                    "only a post-copy migration can be paused (postcopy-active, postcopy-recover); the status is {status}"
                )
            },
        ),
        O::Recover => when(status == S::PostcopyPaused, || {
            format!(
                "only a post-copy migration in status postcopy-paused can be recovered; the status is {status}"
            )
        }),
        O::StartPostcopy => Admission::Refuse(
            "post-copy needs the capability `postcopy-ram`, which is not enabled".to_owned(),
        ),
        O::SetCapabilities => when(status.is_idle(), || settled("capabilities", status)),
        O::SetParameters => when(status.is_idle(), || {
            format!(
                "{}; those that may are {}",
                settled("these parameters", status),
                STEERING.join(", ")
            )
        }),
        O::Steer => when(!matches!(status, S::Failing | S::Cancelling), || {
            settled("parameters", status)
        }),
        O::MeasureDirtyRate => when(status.is_idle(), || {
            format!("the dirty rate cannot be measured during a migration (status {status})")
        }),
        O::AddBlocker => when(status.is_idle(), || {
            format!(
                "too late: a migration is under way (status {status}); cancel it, or wait for its end"
            )
        }),
    }
}

fn when(accepted: bool, reason: impl FnOnce() -> String) -> Admission {
    if accepted {
        Admission::Accept
    } else {
        Admission::Refuse(reason())
    }
}

fn settled(what: &str, status: MigrationStatus) -> String {
    let because = match status {
        MigrationStatus::Failing | MigrationStatus::Cancelling => "cleanup",
        _ => "a migration",
    };
    format!("{what} cannot change while {because} is under way (status {status})")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migration::params::PARAMETERS;

    /// A accepted, i ignored, - refused; one letter for each status in the order of `MigrationStatus::ALL`.
    #[rustfmt::skip]
    const TABLE: [(Operation, &str); 12] = [
        // none, setup, wait-unplug, active, pre-switchover, device, | postcopy: device, active, paused, recover-setup, recover, |
        // completed, failing, failed, cancelling, cancelled, colo
        (Operation::Migrate,          "A----- ----- A-A-A-"),
        (Operation::Resume,           "------ --A-- ------"),
        (Operation::Incoming,         "A----- ----- --A---"),
        (Operation::Cancel,           "iAAAAA ----- iiiiii"),
        (Operation::Pause,            "------ -A--A ------"),
        (Operation::Recover,          "------ --A-- ------"),
        (Operation::StartPostcopy,    "------ ----- ------"),
        (Operation::SetCapabilities,  "A----- ----- A-A-A-"),
        (Operation::SetParameters,    "A----- ----- A-A-A-"),
        (Operation::Steer,            "AAAAAA AAAAA A-A-AA"),
        (Operation::MeasureDirtyRate, "A----- ----- A-A-A-"),
        (Operation::AddBlocker,       "A----- ----- A-A-A-"),
    ];

    #[test]
    fn every_command_in_every_status_is_accepted_ignored_or_refused_with_the_reason() {
        for (operation, letters) in TABLE {
            let letters: Vec<char> = letters.chars().filter(|letter| *letter != ' ').collect();
            assert_eq!(letters.len(), MigrationStatus::ALL.len());
            for (status, letter) in MigrationStatus::ALL.into_iter().zip(letters) {
                match admit(operation, status) {
                    Admission::Accept => assert_eq!(letter, 'A', "{operation:?} in {status}"),
                    Admission::Ignore => assert_eq!(letter, 'i', "{operation:?} in {status}"),
                    Admission::Refuse(reason) => {
                        assert_eq!(letter, '-', "{operation:?} in {status}");
                        let names_it = reason.contains(status.name());
                        assert!(
                            names_it || operation == Operation::StartPostcopy,
                            "{reason}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn continue_needs_the_present_status_and_one_that_waits() {
        for status in MigrationStatus::ALL {
            for state in MigrationStatus::ALL {
                let admission = admit(Operation::Continue(state), status);
                let waits = status == MigrationStatus::PreSwitchover;
                match admission {
                    Admission::Accept => assert!(state == status && waits),
                    Admission::Ignore => panic!("{state} in {status}"),
                    Admission::Refuse(reason) => {
                        assert!(state != status || !waits);
                        assert!(reason.contains(status.name()), "{reason}");
                    }
                }
            }
        }
    }

    #[test]
    fn nothing_changes_during_cleanup() {
        for status in [MigrationStatus::Failing, MigrationStatus::Cancelling] {
            for (operation, _) in TABLE {
                assert_ne!(admit(operation, status), Admission::Accept, "{operation:?}");
            }
            for operation in [Operation::SetCapabilities, Operation::Steer] {
                let Admission::Refuse(reason) = admit(operation, status) else {
                    panic!("{operation:?}")
                };
                assert!(reason.contains("cleanup"), "{reason}");
            }
        }
    }

    #[test]
    fn what_steers_exists() {
        for name in STEERING {
            assert!(PARAMETERS.iter().any(|known| known.name == name), "{name}");
        }
    }
}
