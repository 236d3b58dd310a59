//! Starting the new binary with one inherited socket and nothing else.

use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Stdio};

use rustix::net::sockopt::socket_type;

use crate::CprError;
use crate::socket::CprSocket;

/// Starts `command` with the other end of the `cpr` socket as its standard input, and nothing else of this process but what the command
/// says: every other descriptor of a careful process is close-on-exec.
///
/// The standard input is the one descriptor that a child can be given without a moment in which another thread's child inherits it too.
/// The new process takes it with [`inherited_socket`].
///
/// # Errors
/// [`CprError::Host`] if there is no such program or the kernel refuses. No process is left behind.
pub fn spawn(command: &mut Command) -> Result<(Child, CprSocket), CprError> {
    let (ours, theirs) = CprSocket::pair()?;
    let program = command.get_program().to_owned();
    let child = command
        .stdin(Stdio::from(theirs))
        .spawn()
        .map_err(|error| CprError::host(format!("starting {}", program.display()), error))?;
    Ok((child, ours))
}

/// Takes the socket that the starter has put into the place of the standard input, and puts /dev/null there.
///
/// # Errors
/// [`CprError::Descriptor`] if the standard input is no socket, [`CprError::Host`] if the kernel refuses.
pub fn inherited_socket() -> Result<OwnedFd, CprError> {
    let stdin = std::io::stdin();
    if socket_type(stdin.as_fd()).is_err() {
        return Err(CprError::Descriptor {
            name: "standard input".to_owned(),
            reason: "it is not the socket of a process that hands its VM over".to_owned(),
        });
    }
    let socket = stdin
        .as_fd()
        .try_clone_to_owned()
        .map_err(|error| CprError::host("duplicating the standard input", error))?;
    let null = std::fs::File::open("/dev/null")
        .map_err(|error| CprError::host("opening /dev/null", error))?;
    rustix::stdio::dup2_stdin(&null)
        .map_err(|error| CprError::host("replacing the standard input", error))?;
    Ok(socket)
}
