//! Reasons why a migration is refused for now: a device that cannot be moved, a backup under way, an operator who says so.

use std::collections::BTreeMap;

use super::params::MigrationMode;

/// Most blockers at one time.
pub(crate) const BLOCKERS_MAX: usize = 256;
/// Longest reason, in bytes.
pub(crate) const REASON_BYTES_MAX: usize = 1024;

/// A blocker was refused. Who wanted it is at fault.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub(crate) enum BlockerError {
    /// Empty or too long.
    #[error("a blocker's reason must have 1 to {REASON_BYTES_MAX} bytes")]
    Reason,
    /// It would block nothing.
    #[error("a blocker must be for at least one mode")]
    Modes,
    /// Too many.
    #[error("there are {BLOCKERS_MAX} blockers already")]
    TooMany,
}

/// The blockers, each for some kinds of migration.
#[derive(Debug, Default)]
pub(crate) struct Blockers {
    last: u64,
    list: BTreeMap<u64, Blocker>,
}

#[derive(Debug)]
struct Blocker {
    reason: String,
    modes: Vec<MigrationMode>,
}

impl Blockers {
    /// Adds one; returns the number to remove it with.
    ///
    /// # Errors
    /// [`BlockerError`].
    pub(crate) fn add(
        &mut self,
        reason: String,
        modes: Vec<MigrationMode>,
    ) -> Result<u64, BlockerError> {
        if reason.is_empty() || reason.len() > REASON_BYTES_MAX {
            return Err(BlockerError::Reason);
        }
        if modes.is_empty() {
            return Err(BlockerError::Modes);
        }
        if self.list.len() == BLOCKERS_MAX {
            return Err(BlockerError::TooMany);
        }
        self.last += 1;
        self.list.insert(self.last, Blocker { reason, modes });
        Ok(self.last)
    }

    /// Removes one; says whether there was such a one.
    pub(crate) fn remove(&mut self, id: u64) -> bool {
        self.list.remove(&id).is_some()
    }

    /// Why a migration of this kind is refused, the oldest reason first; empty if it is not.
    pub(crate) fn reasons(&self, mode: MigrationMode) -> Vec<String> {
        let blockers = self.list.values();
        blockers
            .filter(|blocker| blocker.modes.contains(&mode))
            .map(|blocker| blocker.reason.clone())
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blocker_counts_for_its_modes_until_it_is_removed() {
        let mut blockers = Blockers::default();
        let all = MigrationMode::ALL.to_vec();
        let disk = blockers.add("disk".into(), all).unwrap();
        let tap = blockers.add("tap".into(), vec![MigrationMode::CprExec]);
        assert_eq!(blockers.reasons(MigrationMode::Normal), ["disk"]);
        assert_eq!(blockers.reasons(MigrationMode::CprExec), ["disk", "tap"]);
        assert!(blockers.remove(disk));
        assert!(!blockers.remove(disk));
        assert!(blockers.reasons(MigrationMode::Normal).is_empty());
        assert_ne!(tap, Ok(disk));
    }

    #[test]
    fn reasons_and_numbers_are_bounded() {
        let mut blockers = Blockers::default();
        let modes = || vec![MigrationMode::Normal];
        for reason in [String::new(), "x".repeat(REASON_BYTES_MAX + 1)] {
            assert_eq!(blockers.add(reason, modes()), Err(BlockerError::Reason));
        }
        assert_eq!(blockers.add("x".into(), vec![]), Err(BlockerError::Modes));
        for _ in 0..BLOCKERS_MAX {
            blockers.add("x".into(), modes()).unwrap();
        }
        assert_eq!(
            blockers.add("x".into(), modes()),
            Err(BlockerError::TooMany)
        );
    }
}
