//! Descriptors that arrived, by name and role: each is claimed exactly once, or closed and counted.

use std::fmt;

use crate::manifest::{FdEntry, FdKind, Manifest, Stage};
use crate::message::HandOverError;

/// Finds entries by name and role without a walk over thousands of them.
#[expect(
    clippy::disallowed_types,
    reason = "asked by key only, so its order does not matter; names come from a peer, and its hash is keyed at random"
)]
type Index = std::collections::HashMap<(String, String), usize>;

/// What became of the descriptors of a table.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Accounts {
    /// Arrived.
    pub arrived: usize,
    /// Claimed by somebody.
    pub claimed: usize,
    /// Closed because nobody wanted them.
    pub closed: usize,
}

/// Descriptors of one hand-over. `F` owns a descriptor; dropping it closes it.
pub struct FdTable<F> {
    manifest: Manifest,
    index: Index,
    fds: Vec<Option<F>>,
    accounts: Accounts,
}

impl<F> FdTable<F> {
    /// A table for the descriptors of a manifest, none of which has arrived.
    pub fn new(manifest: Manifest) -> Self {
        let entries = manifest.entries().iter().enumerate();
        let index = entries
            .map(|(at, entry)| ((entry.name.clone(), entry.role.clone()), at))
            .collect();
        let fds = manifest.entries().iter().map(|_| None).collect();
        Self {
            manifest,
            index,
            fds,
            accounts: Accounts::default(),
        }
    }

    /// What is in it, or will be.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Puts the descriptor at a position of the manifest.
    ///
    /// # Panics
    /// If there is one already, or no such position: the hand-over core checks both.
    pub(crate) fn put(&mut self, at: usize, fd: F) {
        let place = &mut self.fds[at];
        assert!(place.is_none(), "descriptor {at} arrived twice");
        *place = Some(fd);
        self.accounts.arrived += 1;
    }

    /// Looks at a descriptor that nobody has claimed yet.
    pub fn peek(&self, name: &str, role: &str) -> Option<(&FdEntry, &F)> {
        let at = *self.index.get(&(name.to_owned(), role.to_owned()))?;
        Some((&self.manifest.entries()[at], self.fds[at].as_ref()?))
    }

    /// Takes a descriptor that must be there, of the kind that is expected.
    ///
    /// # Errors
    /// [`HandOverError::Descriptor`] if it is not in the manifest, of another kind, has not arrived yet or was claimed before.
    pub fn claim(&mut self, name: &str, role: &str, kind: FdKind) -> Result<F, HandOverError> {
        let refuse = |reason: String| HandOverError::Descriptor {
            name: name.to_owned(),
            role: role.to_owned(),
            reason,
        };
        let Some(&at) = self.index.get(&(name.to_owned(), role.to_owned())) else {
            return Err(refuse("it is missing in the manifest".to_owned()));
        };
        let entry = &self.manifest.entries()[at];
        if entry.kind != kind {
            let (theirs, ours) = (entry.kind.name(), kind.name());
            return Err(refuse(format!("it is a {theirs}, expected is a {ours}")));
        }
        let Some(fd) = self.fds[at].take() else {
            return Err(refuse(
                "it has not arrived, or was claimed before".to_owned(),
            ));
        };
        self.accounts.claimed += 1;
        Ok(fd)
    }

    /// Entries of a stage whose descriptors nobody has claimed.
    pub fn unclaimed(&self, stage: Stage) -> impl Iterator<Item = &FdEntry> {
        let range = self.manifest.range(stage);
        let fds = &self.fds[range.clone()];
        let entries = &self.manifest.entries()[range];
        entries
            .iter()
            .zip(fds)
            .filter(|(_, fd)| fd.is_some())
            .map(|(entry, _)| entry)
    }

    /// Closes what nobody has claimed.
    pub fn close(&mut self) -> Accounts {
        for fd in &mut self.fds {
            if fd.take().is_some() {
                self.accounts.closed += 1;
            }
        }
        self.accounts
    }

    /// What became of the descriptors so far.
    pub fn accounts(&self) -> Accounts {
        self.accounts
    }
}

impl<F> fmt::Debug for FdTable<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FdTable")
            .field("entries", &self.manifest.entries().len())
            .field("accounts", &self.accounts)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::*;
    use crate::manifest::FileId;

    fn table(count: usize) -> (FdTable<Rc<usize>>, Vec<Rc<usize>>) {
        let entries = (0..count)
            .map(|at| FdEntry {
                name: format!("dev{at}"),
                role: "irq".to_owned(),
                kind: FdKind::IrqFd,
                stage: Stage::Prepare,
                value: at as u64,
                file: FileId::default(),
            })
            .collect();
        let fds: Vec<_> = (0..count).map(Rc::new).collect();
        let mut table = FdTable::new(Manifest::new(entries).unwrap());
        for (at, fd) in fds.iter().enumerate() {
            table.put(at, Rc::clone(fd));
        }
        (table, fds)
    }

    #[test]
    fn each_descriptor_is_claimed_once_and_the_rest_are_closed_and_counted() {
        let (mut table, fds) = table(3);
        assert_eq!(*table.peek("dev1", "irq").unwrap().1, fds[1]);
        assert_eq!(*table.claim("dev1", "irq", FdKind::IrqFd).unwrap(), 1);
        let again = table.claim("dev1", "irq", FdKind::IrqFd).unwrap_err();
        assert!(again.to_string().contains("claimed before"), "{again}");
        assert!(table.peek("dev1", "irq").is_none());
        let unclaimed: Vec<_> = table
            .unclaimed(Stage::Prepare)
            .map(|entry| entry.value)
            .collect();
        assert_eq!(unclaimed, [0, 2]);
        let accounts = table.close();
        assert_eq!(
            (accounts.arrived, accounts.claimed, accounts.closed),
            (3, 1, 2)
        );
        assert!(fds.iter().all(|fd| Rc::strong_count(fd) == 1));
    }

    #[test]
    fn a_claim_of_something_else_names_it_and_takes_nothing() {
        let (mut table, _fds) = table(1);
        let other = table
            .claim("dev0", "irq", FdKind::Tap)
            .unwrap_err()
            .to_string();
        assert!(other.contains("irqfd") && other.contains("tap"), "{other}");
        let missing = table.claim("dev7", "irq", FdKind::IrqFd).unwrap_err();
        assert!(missing.to_string().contains("missing"), "{missing}");
        assert!(table.claim("dev0", "irq", FdKind::IrqFd).is_ok());
    }
}
