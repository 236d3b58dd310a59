//! Who owns a back end: one process at a time, and whoever asks to own it meanwhile is told EBUSY.
//!
//! The kernel remembers an owner that has died for as long as anybody has the descriptor, and lets nobody but it give the back end up. So
//! [`take_back`](VhostDevice::take_back) leaves such a descriptor to itself and goes on with a new one.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

use vhost::VhostBackend;

use super::{Kind, VhostDevice, refused, to_io};
use crate::DeviceError;

/// What a kernel that does not know VHOST_RESET_OWNER for a kind of back end takes it for: a request about a ring, whose argument
/// cannot be read.
const UNKNOWN_REQUEST: [i32; 3] = [libc::EFAULT, libc::ENOTTY, libc::EINVAL];
const CANNOT_BE_GIVEN: &str = "this kernel cannot give such a back end to another process";

impl VhostDevice {
    /// Makes this process the owner of the back end. Harmless if it is by our doing.
    ///
    /// # Errors
    /// The kernel's answer; EBUSY if somebody else is.
    pub fn own(&mut self) -> Result<(), DeviceError> {
        if !self.owned {
            let answer = self.requests.set_owner();
            self.asked("VHOST_SET_OWNER", answer)?;
            self.owned = true;
        }
        Ok(())
    }

    /// Gives the back end away: the kernel forgets all that it was told, and the next to ask owns it. Harmless if nobody does.
    ///
    /// # Errors
    /// The kernel's answer, or that the device still works.
    pub fn release(&mut self) -> Result<(), DeviceError> {
        if self.running {
            return Err(DeviceError::Vetoed {
                device: self.name.clone(),
                reason: "it still works; stop it before it is given away".to_owned(),
            });
        }
        if self.owned {
            let answer = self.requests.reset_owner().map_err(to_io);
            let answer = answer.map_err(|error| match (&self.kind, error.raw_os_error()) {
                (Kind::Vsock { .. } | Kind::Vdpa { .. }, Some(code))
                    if UNKNOWN_REQUEST.contains(&code) =>
                {
                    io::Error::new(io::ErrorKind::Unsupported, CANNOT_BE_GIVEN)
                }
                _ => error,
            });
            self.answered("VHOST_RESET_OWNER", answer)?;
            (self.owned, self.prepared) = (false, false);
        }
        Ok(())
    }

    /// Makes this process the owner again after the attempt to give the back end away has failed. Whoever it was given to does not work with
    /// it: they have handed it back, have refused it, or are dead. In the last case a network device gets a new descriptor.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn take_back(&mut self) -> Result<(), DeviceError> {
        let busy = match self.own() {
            Err(error) if is_busy(&error) && matches!(self.kind, Kind::Net { .. }) => error,
            answer => return answer,
        };
        tracing::warn!(
            error = &busy as &dyn std::error::Error,
            "who had it has died with it; going on with a new descriptor"
        );
        let another = another_of(&self.requests.fd)
            .map_err(|source| refused(&self.name, "opening it again", source))?;
        self.requests.fd = another;
        self.prepared = false;
        self.own()
    }

    /// Why the guest cannot move to another process on this host, however it stands; `None` if it can, as far as the kernel has told. To be
    /// asked before the guest is stopped for that.
    pub fn blocker_in_place(&self) -> Option<String> {
        self.stays
            .then(|| format!("{CANNOT_BE_GIVEN} (VHOST_RESET_OWNER)"))
    }

    /// Finds out whether the kernel could take the back end from this process, while that changes nothing: nobody owns it yet. If it can,
    /// nobody does afterwards either; if not, this process does.
    pub(super) fn try_to_give(&mut self) {
        // Somebody else's: they know.
        if self.own().is_ok() {
            self.stays = self.release().is_err();
        }
    }

    /// The descriptor of the back end, for another process to use on.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.requests.fd.as_fd()
    }

    /// The tap behind a network device, likewise.
    pub fn tap(&self) -> Option<BorrowedFd<'_>> {
        match &self.kind {
            Kind::Net { tap } => Some(tap.as_fd()),
            Kind::Vsock { .. } | Kind::Vdpa { .. } => None,
        }
    }
}

/// Whether the error says that somebody else owns the back end.
pub(super) fn is_busy(error: &DeviceError) -> bool {
    matches!(error, DeviceError::Kernel { source, .. } if source.raw_os_error() == Some(libc::EBUSY))
}

/// The device behind `file` once more, with nothing known to it.
fn another_of(file: &File) -> io::Result<File> {
    File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}
