//! Status of a migration, named as QEMU names it, and which changes are legal.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Status of a migration. The names are QEMU's, so that existing tools know them.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, Hash, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationStatus {
    /// No migration since the process started.
    #[default]
    None,
    /// Connecting, negotiating, arming the dirty log.
    Setup,
    /// Waiting for the guest to unplug a device.
    WaitUnplug,
    /// Pages move while the guest runs.
    Active,
    /// The guest is stopped; the operator decides when to go on.
    PreSwitchover,
    /// The guest is stopped; last round, device state, commit.
    Device,
    /// Post-copy: device state is on its way, the target has not started.
    PostcopyDevice,
    /// Post-copy: the guest runs at the target and pulls pages.
    PostcopyActive,
    /// Post-copy: the link is gone, both sides keep what they have.
    PostcopyPaused,
    /// Post-copy: connecting again.
    PostcopyRecoverSetup,
    /// Post-copy: finding out which pages are missing.
    PostcopyRecover,
    /// The guest belongs to the target.
    Completed,
    /// Something went wrong, cleanup is under way.
    Failing,
    /// Cleanup after an error is done; the guest is where it was.
    Failed,
    /// The operator cancelled, cleanup is under way.
    Cancelling,
    /// Cleanup after a cancel is done; the guest is where it was.
    Cancelled,
    /// Reserved; never entered.
    Colo,
}

impl MigrationStatus {
    /// Every status there is.
    pub const ALL: [Self; 17] = [
        Self::None,
        Self::Setup,
        Self::WaitUnplug,
        Self::Active,
        Self::PreSwitchover,
        Self::Device,
        Self::PostcopyDevice,
        Self::PostcopyActive,
        Self::PostcopyPaused,
        Self::PostcopyRecoverSetup,
        Self::PostcopyRecover,
        Self::Completed,
        Self::Failing,
        Self::Failed,
        Self::Cancelling,
        Self::Cancelled,
        Self::Colo,
    ];

    /// The name in QMP.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Setup => "setup",
            Self::WaitUnplug => "wait-unplug",
            Self::Active => "active",
            Self::PreSwitchover => "pre-switchover",
            Self::Device => "device",
            Self::PostcopyDevice => "postcopy-device",
            Self::PostcopyActive => "postcopy-active",
            Self::PostcopyPaused => "postcopy-paused",
            Self::PostcopyRecoverSetup => "postcopy-recover-setup",
            Self::PostcopyRecover => "postcopy-recover",
            Self::Completed => "completed",
            Self::Failing => "failing",
            Self::Failed => "failed",
            Self::Cancelling => "cancelling",
            Self::Cancelled => "cancelled",
            Self::Colo => "colo",
        }
    }

    /// Nothing is under way: a new migration may start, parameters may change.
    pub fn is_idle(self) -> bool {
        matches!(
            self,
            Self::None | Self::Completed | Self::Failed | Self::Cancelled
        )
    }

    /// The attempt has ended, in whatever way.
    pub fn is_end(self) -> bool {
        self.is_idle() && self != Self::None
    }

    /// Whether the status may change from `self` to `to`. The one table of legal changes.
    pub fn may_become(self, to: Self) -> bool {
        use MigrationStatus as S;
        let next: &[S] = match self {
            S::None | S::Completed | S::Failed | S::Cancelled => &[S::Setup],
            S::Setup => &[S::WaitUnplug, S::Active, S::Failing, S::Cancelling],
            S::WaitUnplug => &[S::Active, S::Failing, S::Cancelling],
            S::Active => &[S::PreSwitchover, S::Device, S::Failing, S::Cancelling],
            S::PreSwitchover => &[S::Device, S::Failing, S::Cancelling],
            S::Device => &[S::Completed, S::PostcopyDevice, S::Failing, S::Cancelling],
            S::PostcopyDevice => &[S::PostcopyActive, S::Completed, S::Failing],
            S::PostcopyActive => &[S::PostcopyPaused, S::Completed],
            S::PostcopyPaused => &[S::PostcopyRecoverSetup],
            S::PostcopyRecoverSetup => &[S::PostcopyRecover, S::PostcopyPaused],
            S::PostcopyRecover => &[S::PostcopyActive, S::PostcopyPaused],
            S::Failing => &[S::Failed],
            S::Cancelling => &[S::Cancelled],
            S::Colo => &[],
        };
        next.contains(&to)
    }
}

impl fmt::Display for MigrationStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::MigrationStatus as S;

    #[test]
    fn an_error_never_leads_straight_to_failed() {
        for from in S::ALL {
            assert_eq!(from.may_become(S::Failed), from == S::Failing, "{from}");
            assert_eq!(
                from.may_become(S::Cancelled),
                from == S::Cancelling,
                "{from}"
            );
            assert!(!from.may_become(S::Colo), "{from}");
            assert!(!from.may_become(S::None), "{from}");
        }
    }

    /// The table once more, as the reference on QEMU tells it, by the other end: what each status may come from. `failing` and `cancelling`
    /// are left out of post-copy once the target runs; `wait-unplug` has no way back.
    fn may_come_from(to: S) -> &'static [S] {
        match to {
            S::None | S::Colo => &[],
            S::Setup => &[S::None, S::Completed, S::Failed, S::Cancelled],
            S::WaitUnplug => &[S::Setup],
            S::Active => &[S::Setup, S::WaitUnplug],
            S::PreSwitchover => &[S::Active],
            S::Device => &[S::Active, S::PreSwitchover],
            S::PostcopyDevice => &[S::Device],
            S::PostcopyActive => &[S::PostcopyDevice, S::PostcopyRecover],
            S::PostcopyPaused => &[
                S::PostcopyActive,
                S::PostcopyRecoverSetup,
                S::PostcopyRecover,
            ],
            S::PostcopyRecoverSetup => &[S::PostcopyPaused],
            S::PostcopyRecover => &[S::PostcopyRecoverSetup],
            S::Completed => &[S::Device, S::PostcopyDevice, S::PostcopyActive],
            S::Failing => &[
                S::Setup,
                S::WaitUnplug,
                S::Active,
                S::PreSwitchover,
                S::Device,
                S::PostcopyDevice,
            ],
            S::Failed => &[S::Failing],
            S::Cancelling => &[
                S::Setup,
                S::WaitUnplug,
                S::Active,
                S::PreSwitchover,
                S::Device,
            ],
            S::Cancelled => &[S::Cancelling],
        }
    }

    #[test]
    fn every_pair_of_statuses_is_legal_or_impossible_as_the_reference_says() {
        for from in S::ALL {
            for to in S::ALL {
                let legal = may_come_from(to).contains(&from);
                assert_eq!(from.may_become(to), legal, "{from} to {to}");
            }
        }
    }

    #[test]
    fn every_status_but_the_reserved_one_is_reached_and_has_a_name_of_its_own() {
        let names: std::collections::BTreeSet<_> = S::ALL.into_iter().map(S::name).collect();
        assert_eq!(names.len(), S::ALL.len());
        for to in S::ALL {
            let reached = S::ALL.into_iter().any(|from| from.may_become(to));
            assert_eq!(reached, !matches!(to, S::None | S::Colo), "{to}");
        }
    }

    #[test]
    fn every_status_that_is_not_idle_can_end() {
        for from in S::ALL
            .into_iter()
            .filter(|status| !status.is_idle() && *status != S::Colo)
        {
            let mut reached = vec![from];
            let mut index = 0;
            while let Some(&status) = reached.get(index) {
                reached.extend(
                    S::ALL
                        .into_iter()
                        .filter(|to| status.may_become(*to) && !reached.contains(to))
                        .collect::<Vec<_>>(),
                );
                index += 1;
            }
            assert!(reached.iter().any(|status| status.is_idle()), "{from}");
        }
    }
}
