//! How the program ends: the exit statuses that `--help` lists.

use std::process::ExitCode;

use crate::migration::status::MigrationStatus;

/// Why this process ends. The numbers are for scripts and do not change.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Exit {
    /// What was asked for has happened.
    Done,
    /// It has not; standard error says why.
    Failed,
    /// The migration was cancelled; the guest is where it was.
    Cancelled,
    /// The VM stopped answering while it was followed: how the migration ended is not known.
    Lost,
    /// Following was given up for a signal (its number); the migration goes on.
    Detached(u8),
}

impl Exit {
    /// After a migration that ended like this.
    pub(super) fn of(status: MigrationStatus) -> Self {
        match status {
            MigrationStatus::Completed => Self::Done,
            MigrationStatus::Cancelled => Self::Cancelled,
            _ => Self::Failed,
        }
    }

    /// As the process says it.
    pub(super) fn code(self) -> ExitCode {
        ExitCode::from(match self {
            Self::Done => 0,
            Self::Failed => 1,
            // 2 is clap's, for a wrong command line.
            Self::Cancelled => 3,
            Self::Lost => 4,
            Self::Detached(signal) => 128_u8.saturating_add(signal),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_guest_that_has_moved_is_a_success() {
        for status in MigrationStatus::ALL {
            let done = Exit::of(status) == Exit::Done;
            assert_eq!(done, status == MigrationStatus::Completed, "{status}");
        }
        assert_eq!(Exit::of(MigrationStatus::Cancelled), Exit::Cancelled);
    }
}
