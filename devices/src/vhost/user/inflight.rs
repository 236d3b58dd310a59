//! What of a back end outlives it: the region in which it notes the requests that it works on, and its own state.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserInflight,
};

use super::session::{ANSWER_DEADLINE, Session};
use crate::saved::STATE_BYTES_MAX;

/// Longest state of a back end, in bytes; with the rest it must fit into a section.
const BACK_END_BYTES_MAX: usize = STATE_BYTES_MAX / 2;

/// The region of requests under way. The back end made it; the VMM keeps it for the one that comes next.
pub(super) struct Inflight {
    region: VhostUserInflight,
    file: File,
}

impl Inflight {
    /// Asks a back end for an empty one.
    ///
    /// # Errors
    /// The back end's answer.
    pub(super) fn ask(session: &Session, queues: u16, queue_size: u16) -> io::Result<Self> {
        let wanted = VhostUserInflight::new(0, 0, queues, queue_size);
        let (region, file) = session.ask(|frontend| frontend.get_inflight_fd(&wanted))?;
        Ok(Self {
            region: VhostUserInflight {
                num_queues: queues,
                queue_size,
                ..region
            },
            file,
        })
    }

    /// Gives it to the back end, which takes up what it finds there when its rings start.
    ///
    /// # Errors
    /// The back end's answer.
    pub(super) fn give(&self, session: &Session) -> io::Result<()> {
        session.ask(|frontend| frontend.set_inflight_fd(&self.region, self.file.as_raw_fd()))
    }
}

/// Reads the state of a back end whose rings stand.
///
/// # Errors
/// The back end's answer, `TimedOut`, or `FileTooLarge`.
pub(super) fn save(session: &Session) -> io::Result<Vec<u8>> {
    let (ours, theirs) = pipe_with(PipeFlags::CLOEXEC)?;
    let mut from = begin(session, VhostTransferStateDirection::SAVE, ours, theirs)?;
    nonblocking(&from)?;
    let mut state = Vec::new();
    let mut piece = vec![0; 64 << 10];
    loop {
        match from.read(&mut piece) {
            Ok(0) => break,
            Ok(bytes) if state.len() + bytes > BACK_END_BYTES_MAX => {
                return Err(io::Error::new(
                    io::ErrorKind::FileTooLarge,
                    format!("the state of the back end has more than {BACK_END_BYTES_MAX} bytes"),
                ));
            }
            Ok(bytes) => state.extend_from_slice(&piece[..bytes]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => wait(&from, PollFlags::IN)?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    session.ask(|frontend| frontend.check_device_state())?;
    Ok(state)
}

/// Gives a back end, whose rings stand, the state of another one. It refuses here what it cannot use.
///
/// # Errors
/// The back end's answer, or `TimedOut`.
pub(super) fn load(session: &Session, state: &[u8]) -> io::Result<()> {
    let (theirs, ours) = pipe_with(PipeFlags::CLOEXEC)?;
    let mut to = begin(session, VhostTransferStateDirection::LOAD, ours, theirs)?;
    nonblocking(&to)?;
    let mut rest = state;
    while !rest.is_empty() {
        match to.write(rest) {
            Ok(bytes) => rest = &rest[bytes..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => wait(&to, PollFlags::OUT)?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // It has read enough to refuse; it says so below.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => break,
            Err(error) => return Err(error),
        }
    }
    // The end of the state.
    drop(to);
    session.ask(|frontend| frontend.check_device_state())
}

/// Begins a transfer; returns our end of its pipe, which the back end may have chosen.
fn begin(
    session: &Session,
    direction: VhostTransferStateDirection,
    ours: OwnedFd,
    theirs: OwnedFd,
) -> io::Result<File> {
    let phase = VhostTransferStatePhase::STOPPED;
    let chosen = session.ask(|frontend| frontend.set_device_state_fd(direction, phase, theirs))?;
    Ok(chosen.unwrap_or_else(|| File::from(ours)))
}

fn nonblocking(file: &File) -> io::Result<()> {
    rustix::io::ioctl_fionbio(file, true).map_err(io::Error::from)
}

fn wait(file: &File, what: PollFlags) -> io::Result<()> {
    let deadline = Instant::now() + ANSWER_DEADLINE;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(io::Error::other)?;
        let fd = file.as_fd();
        match poll(&mut [PollFd::new(&fd, what)], Some(&left)) {
            Ok(0) => {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    "the back end does not go on with its state",
                ));
            }
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
