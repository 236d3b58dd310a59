//! File descriptors that one client has sent and no command has used yet.
//!
//! They travel beside the bytes: in the same message as the command, or with a blank before it. So a descriptor is on offer to the
//! commands that end in the same read, and to those of the next read in which commands end; then it is closed.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;

use super::QmpError;

/// Descriptors that may be on offer for one client. A command uses one.
const OFFERED_MAX: usize = 16;

/// What is on offer. Reads are numbered; the first is 1.
#[derive(Debug, Default)]
pub(super) struct PassedFds {
    offered: VecDeque<Offer>,
    /// The newest read with a command that was looked at.
    looked_at: u64,
    /// The one before.
    before: u64,
}

#[derive(Debug)]
struct Offer {
    read: u64,
    /// `None` if it could not be taken.
    fd: Option<OwnedFd>,
}

impl PassedFds {
    /// Descriptors came with this read; `lost` says that some could not be received.
    pub(super) fn arrive(&mut self, read: u64, fds: Vec<OwnedFd>, lost: bool) {
        let held = self.offered.iter().filter(|offer| offer.fd.is_some());
        let lost = lost || held.count() + fds.len() > OFFERED_MAX;
        if lost {
            // One note of a loss is enough; those that came with it are closed.
            self.offered.retain(|offer| offer.fd.is_some());
            self.offered.push_back(Offer { read, fd: None });
        } else {
            let offers = fds.into_iter().map(|fd| Offer { read, fd: Some(fd) });
            self.offered.extend(offers);
        }
    }

    /// A command has ended in this read: closes what it comes too late for.
    pub(super) fn command_in(&mut self, read: u64) {
        if read != self.looked_at {
            self.before = self.looked_at;
            self.looked_at = read;
        }
        self.offered.retain(|offer| offer.read >= self.before);
    }

    /// The oldest descriptor on offer, for the command that was named last.
    ///
    /// # Errors
    /// None came, or it was lost on the way.
    pub(super) fn claim(&mut self) -> Result<OwnedFd, QmpError> {
        let offer = match self.offered.front() {
            Some(offer) if offer.read <= self.looked_at => self.offered.pop_front(),
            _ => None,
        };
        let Some(Offer { fd, .. }) = offer else {
            return Err(QmpError::generic(
                "no file descriptor came with the command (SCM_RIGHTS)",
            ));
        };
        fd.ok_or_else(|| {
            QmpError::generic(format!(
                "the file descriptors could not be received: at most {OFFERED_MAX} may come at once, and this process must have \
                 room for them"
            ))
        })
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    fn fds(count: usize) -> Vec<OwnedFd> {
        let open = || std::fs::File::open("/dev/null").unwrap().into();
        (0..count).map(|_| open()).collect()
    }

    fn one() -> (i32, Vec<OwnedFd>) {
        let fds = fds(1);
        (fds[0].as_raw_fd(), fds)
    }

    #[test]
    fn a_descriptor_belongs_to_a_command_of_its_read_or_the_next_one_with_commands() {
        let mut passed = PassedFds::default();
        let (number, fds) = one();
        passed.arrive(3, fds, false);
        // Two commands before it in the same read do not use it.
        passed.command_in(3);
        passed.command_in(3);
        assert_eq!(passed.claim().unwrap().as_raw_fd(), number);
        assert!(passed.claim().is_err());

        // With a blank of its own, the command two reads later.
        let (number, fds) = one();
        passed.arrive(4, fds, false);
        passed.command_in(6);
        passed.command_in(6);
        assert_eq!(passed.claim().unwrap().as_raw_fd(), number);
    }

    #[test]
    fn what_no_command_uses_is_closed() {
        let mut passed = PassedFds::default();
        let (mut near, far) = std::os::unix::net::UnixStream::pair().unwrap();
        passed.arrive(1, vec![far.into()], false);
        passed.command_in(1);
        passed.command_in(2);
        std::io::Write::write_all(&mut near, b"open").unwrap();
        passed.command_in(3);
        assert!(std::io::Write::write_all(&mut near, b"closed").is_err());
        assert!(passed.claim().is_err());
    }

    #[test]
    fn a_command_does_not_get_what_comes_after_it() {
        let mut passed = PassedFds::default();
        let (first, fds) = one();
        passed.arrive(1, fds, false);
        let (second, fds) = one();
        passed.arrive(2, fds, false);
        passed.command_in(1);
        assert_eq!(passed.claim().unwrap().as_raw_fd(), first);
        assert!(passed.claim().is_err());
        passed.command_in(2);
        assert_eq!(passed.claim().unwrap().as_raw_fd(), second);
    }

    #[test]
    fn too_many_are_closed_and_the_command_is_told() {
        let mut passed = PassedFds::default();
        passed.arrive(1, fds(OFFERED_MAX), false);
        for read in 2..1000 {
            passed.arrive(read, fds(1), false);
        }
        assert_eq!(passed.offered.len(), OFFERED_MAX + 1);
        passed.command_in(1000);
        passed.command_in(1001);
        passed.arrive(1001, Vec::new(), true);
        passed.command_in(1002);
        let error = passed.claim().unwrap_err();
        assert!(error.desc.contains("could not be received"));
        assert!(passed.claim().unwrap_err().desc.contains("SCM_RIGHTS"));
    }
}
