//! Back ends of disks: QEMU's storage daemon, each with one image.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::harness::until;

/// A storage daemon with one disk. Killed on drop.
pub(crate) struct Daemon {
    child: Child,
    socket: PathBuf,
}

impl Daemon {
    /// One that exports `image` in `dir`, and listens at `name` there. `None` if there is no such program here, which it says.
    pub(crate) fn start(dir: &Path, name: &str) -> Option<Self> {
        let socket = dir.join(name);
        // A dead one leaves it behind.
        let _was_none = std::fs::remove_file(&socket);
        let (image, listener) = (dir.join("image"), socket.display());
        let child = Command::new("qemu-storage-daemon")
            // Both daemons of a move have the image open, so neither may lock it: who runs the guest decides who writes. What one has
            // written the other reads, because on one host they share its page cache; on two hosts it takes cache.direct=on and storage
            // that both see.
            .arg("--blockdev")
            .arg(format!(
                "driver=file,node-name=disk,filename={},locking=off,cache.direct=off",
                image.display()
            ))
            .arg("--export")
            .arg(format!(
                "vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={listener},writable=on"
            ))
            .stdin(Stdio::null())
            .spawn();
        let child = match child {
            Ok(child) => child,
            Err(error) => {
                println!(
                    "SKIPPED: no qemu-storage-daemon here ({error}); .ci/packages installs it"
                );
                return None;
            }
        };
        let daemon = Self { child, socket };
        until("the daemon listens", || {
            listens(&daemon.socket).then_some(())
        });
        Some(daemon)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where it listens.
    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _gone_already = self.child.kill();
        let _status = self.child.wait();
    }
}

/// Whether connections can be made to `socket`. To try one would take the daemon's only place.
fn listens(socket: &Path) -> bool {
    const ACCEPTS: &str = "00010000";
    let sockets = std::fs::read_to_string("/proc/net/unix").unwrap();
    sockets.lines().any(|line| {
        let mut words = line.split_whitespace();
        words.nth(3) == Some(ACCEPTS) && words.last() == socket.to_str()
    })
}
