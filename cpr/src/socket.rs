//! The `cpr` socket: messages and file descriptors between two processes of one host, with deadlines.
//!
//! Descriptors are close-on-exec from the moment they exist here. If the kernel had to leave any out, or cut a message, everything that
//! came is closed and the conversation is over: nobody can say which ones are missing.

use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::{socket_domain, socket_peercred, socket_type};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown, SocketType, recvmsg, sendmsg,
    shutdown,
};
use rustix::process::{Uid, geteuid};
use vmferry_transport::wire::frame::{ControlFrame, FrameBuffer};

use crate::CprError;
use crate::message::{BATCH_MAX, GiverMessage};

/// Bytes asked for in one read. An offer of a few descriptors fits.
const READ_BYTES: usize = 16 << 10;
/// Room for the descriptors of one message.
const CONTROL_BYTES: usize = rustix::cmsg_space!(ScmRights(BATCH_MAX));

/// Why nothing came.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RecvError {
    /// The socket ended or failed.
    #[error("{0}")]
    Lost(String),
    /// What came cannot be read, or was cut. Everything that came with it is closed.
    #[error("{0}")]
    Garbage(String),
    /// Nothing came in time.
    #[error("nothing came in time")]
    TimedOut,
}

/// A connected unix stream socket to the other process of a hand-over.
#[derive(Debug)]
pub struct CprSocket {
    fd: Arc<OwnedFd>,
    buffer: FrameBuffer,
    /// Descriptors whose message is not complete yet.
    arrived: VecDeque<OwnedFd>,
}

/// Ends the conversation on a socket from another thread.
#[derive(Clone, Debug)]
pub struct Interrupter(Arc<OwnedFd>);

impl Interrupter {
    /// Shuts the socket down in both directions. Whoever waits on it wakes up and fails.
    pub fn interrupt(&self) {
        // Fails if the other side was faster, which is the same.
        let _ = shutdown(&self.0, Shutdown::Both);
    }
}

impl CprSocket {
    /// Takes a connected unix stream socket over, after checking who is at its other end: a process of the same user, or one of root's.
    ///
    /// For a pair of sockets, the other end is whoever made the pair.
    ///
    /// # Errors
    /// [`CprError::Descriptor`] if it is no such socket or the peer is somebody else, [`CprError::Host`] if the kernel refuses.
    pub fn new(socket: impl Into<OwnedFd>) -> Result<Self, CprError> {
        Self::checked(socket.into(), geteuid())
    }

    fn checked(fd: OwnedFd, us: Uid) -> Result<Self, CprError> {
        let refuse = |reason: String| CprError::Descriptor {
            name: "cpr socket".to_owned(),
            reason,
        };
        let unix = socket_domain(&fd).is_ok_and(|domain| domain == AddressFamily::UNIX);
        let stream = socket_type(&fd).is_ok_and(|kind| kind == SocketType::STREAM);
        if !unix || !stream {
            return Err(refuse("it is not a unix stream socket".to_owned()));
        }
        let peer = match socket_peercred(&fd) {
            Ok(peer) => peer,
            Err(Errno::NOTCONN) => return Err(refuse("it is not connected".to_owned())),
            Err(error) => return Err(CprError::host("asking who the peer is", error)),
        };
        if peer.uid != us && !peer.uid.is_root() {
            return Err(refuse(format!(
                "the peer runs as user {}, expected was {} or root",
                peer.uid.as_raw(),
                us.as_raw()
            )));
        }
        rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC)
            .map_err(|error| CprError::host("setting close-on-exec", error))?;
        // One mode for every way in which the socket came: waiting is done by poll, which knows deadlines.
        rustix::io::ioctl_fionbio(&fd, true)
            .map_err(|error| CprError::host("making the socket non-blocking", error))?;
        Ok(Self {
            fd: Arc::new(fd),
            buffer: FrameBuffer::default(),
            arrived: VecDeque::new(),
        })
    }

    /// Two sockets that are connected to each other.
    ///
    /// # Errors
    /// [`CprError::Host`] if the kernel refuses.
    pub fn pair() -> Result<(Self, OwnedFd), CprError> {
        let (ours, theirs) = UnixStream::pair()
            .map_err(|error| CprError::host("making a pair of sockets", error))?;
        Ok((Self::new(ours)?, theirs.into()))
    }

    /// What ends the conversation from another thread.
    pub fn interrupter(&self) -> Interrupter {
        Interrupter(Arc::clone(&self.fd))
    }

    /// Sends bytes, and the descriptors with the first of them. `within` bounds each wait for room.
    pub(crate) fn send(
        &mut self,
        bytes: &[u8],
        fds: &[BorrowedFd<'_>],
        within: Duration,
    ) -> Result<(), RecvError> {
        let mut space = [MaybeUninit::uninit(); CONTROL_BYTES];
        let mut rest = bytes;
        let mut with = fds;
        while !rest.is_empty() {
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !with.is_empty() && !control.push(SendAncillaryMessage::ScmRights(with)) {
                let text = format!("{} descriptors do not fit into a message", with.len());
                return Err(RecvError::Garbage(text));
            }
            match sendmsg(
                &*self.fd,
                &[IoSlice::new(rest)],
                &mut control,
                SendFlags::NOSIGNAL,
            ) {
                Ok(sent) => {
                    rest = &rest[sent..];
                    with = &[];
                }
                Err(Errno::AGAIN) => self.wait(PollFlags::OUT, Some(within))?,
                Err(Errno::INTR) => {}
                Err(error) => return Err(RecvError::Lost(format!("sending: {error}"))),
            }
        }
        Ok(())
    }

    /// The next message, with the descriptors that belong to it. `within` of `None` waits for ever.
    pub(crate) fn recv<M: Carries>(
        &mut self,
        within: Option<Duration>,
    ) -> Result<(M, Vec<OwnedFd>), RecvError> {
        loop {
            match self.buffer.poll_frame::<M>() {
                Ok(Some(message)) => return self.with_fds(message),
                Ok(None) => {}
                Err(error) => return Err(RecvError::Garbage(error.to_string())),
            }
            if self.buffer.pending() == 0 && !self.arrived.is_empty() {
                return Err(RecvError::Garbage(
                    "descriptors came without a message".to_owned(),
                ));
            }
            self.read(within)?;
        }
    }

    fn with_fds<M: Carries>(&mut self, message: M) -> Result<(M, Vec<OwnedFd>), RecvError> {
        let count = message.descriptors();
        if count > self.arrived.len() {
            let came = self.arrived.len();
            return Err(RecvError::Garbage(format!(
                "{count} descriptors were announced, {came} came"
            )));
        }
        let fds = self.arrived.drain(..count).collect();
        Ok((message, fds))
    }

    fn read(&mut self, within: Option<Duration>) -> Result<(), RecvError> {
        let mut space = [MaybeUninit::uninit(); CONTROL_BYTES];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut bytes = [0; READ_BYTES];
        let received = loop {
            let mut into = [IoSliceMut::new(&mut bytes)];
            match recvmsg(&*self.fd, &mut into, &mut control, RecvFlags::CMSG_CLOEXEC) {
                Ok(received) => break received,
                Err(Errno::AGAIN) => self.wait(PollFlags::IN, within)?,
                Err(Errno::INTR) => {}
                Err(error) => return Err(RecvError::Lost(format!("receiving: {error}"))),
            }
        };
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(some) = message {
                fds.extend(some);
            }
        }
        if received
            .flags
            .intersects(ReturnFlags::CTRUNC | ReturnFlags::TRUNC)
        {
            let count = fds.len();
            drop(fds);
            self.arrived.clear();
            return Err(RecvError::Garbage(format!(
                "the kernel could not pass every descriptor ({count} came and are closed); is the limit of open files too low?"
            )));
        }
        if received.bytes == 0 {
            return Err(RecvError::Lost(match self.buffer.pending() {
                0 => "the other process closed it".to_owned(),
                _ => "the other process closed it in the middle of a message".to_owned(),
            }));
        }
        self.buffer.push(&bytes[..received.bytes]);
        self.arrived.extend(fds);
        if self.arrived.len() > 2 * BATCH_MAX {
            self.arrived.clear();
            return Err(RecvError::Garbage(
                "descriptors come without messages".to_owned(),
            ));
        }
        Ok(())
    }

    fn wait(&self, what: PollFlags, within: Option<Duration>) -> Result<(), RecvError> {
        let timeout = within.map(|within| Timespec {
            tv_sec: i64::try_from(within.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(within.subsec_nanos()),
        });
        match poll(&mut [PollFd::new(&*self.fd, what)], timeout.as_ref()) {
            Ok(0) => Err(RecvError::TimedOut),
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(RecvError::Lost(format!("waiting: {error}"))),
        }
    }
}

impl AsFd for CprSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A message that may come with descriptors.
pub(crate) trait Carries: ControlFrame {
    /// How many.
    fn descriptors(&self) -> usize;
}

impl Carries for GiverMessage {
    fn descriptors(&self) -> usize {
        match self {
            Self::Fds { count, .. } => *count as usize,
            _ => 0,
        }
    }
}

impl Carries for crate::message::TakerMessage {
    fn descriptors(&self) -> usize {
        0
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;
    use std::net::TcpListener;

    use super::*;
    use crate::manifest::Stage;

    const SOON: Duration = Duration::from_secs(5);

    fn pair() -> (CprSocket, CprSocket) {
        let (one, other) = CprSocket::pair().unwrap();
        (one, CprSocket::new(other).unwrap())
    }

    fn open_fds() -> usize {
        std::fs::read_dir("/proc/self/fd").unwrap().count()
    }

    fn send(socket: &mut CprSocket, message: &GiverMessage, files: &[File]) {
        let fds: Vec<_> = files.iter().map(File::as_fd).collect();
        socket.send(&message.encode(), &fds, SOON).unwrap();
    }

    #[test]
    fn descriptors_arrive_with_their_message_and_are_close_on_exec() {
        let (mut giver, mut taker) = pair();
        let files: Vec<_> = (0..BATCH_MAX)
            .map(|_| tempfile::tempfile().unwrap())
            .collect();
        send(&mut giver, &GiverMessage::Stage(Stage::Prepare), &[]);
        for first in [0, 253] {
            send(&mut giver, &GiverMessage::Fds { first, count: 253 }, &files);
        }
        send(
            &mut giver,
            &GiverMessage::Fds {
                first: 506,
                count: 1,
            },
            &files[..1],
        );
        let (message, fds) = taker.recv::<GiverMessage>(Some(SOON)).unwrap();
        assert_eq!(
            (message, fds.len()),
            (GiverMessage::Stage(Stage::Prepare), 0)
        );
        for expected in [253, 253, 1] {
            let (_, fds) = taker.recv::<GiverMessage>(Some(SOON)).unwrap();
            assert_eq!(fds.len(), expected);
            for (fd, file) in fds.iter().zip(&files) {
                let flags = rustix::io::fcntl_getfd(fd).unwrap();
                assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
                let ino = rustix::fs::fstat(fd).unwrap().st_ino;
                assert_eq!(ino, rustix::fs::fstat(file).unwrap().st_ino);
            }
        }
    }

    #[test]
    fn fewer_or_more_descriptors_than_announced_end_the_conversation() {
        let files: Vec<_> = (0..3).map(|_| tempfile::tempfile().unwrap()).collect();
        for sent in [0, 2, 3] {
            let (mut giver, mut taker) = pair();
            send(
                &mut giver,
                &GiverMessage::Fds { first: 0, count: 2 },
                &files[..1],
            );
            if sent > 0 {
                send(
                    &mut giver,
                    &GiverMessage::Fds { first: 0, count: 1 },
                    &files[..sent],
                );
            }
            drop(giver);
            let error = taker.recv::<GiverMessage>(Some(SOON)).unwrap_err();
            assert!(matches!(error, RecvError::Garbage(_)), "{error}");
        }
        let (mut giver, mut taker) = pair();
        send(&mut giver, &GiverMessage::Stage(Stage::Prepare), &files);
        taker.recv::<GiverMessage>(Some(SOON)).unwrap();
        let error = taker.recv::<GiverMessage>(Some(SOON)).unwrap_err();
        assert!(error.to_string().contains("without a message"), "{error}");
    }

    #[test]
    fn what_the_kernel_could_not_pass_closes_what_it_could() {
        // A message with more descriptors than the receiver may still open. Lowering the limit concerns the whole process, so another
        // one does it: this test itself, run again with the variable set.
        const CHILD: &str = "VMFERRY_TEST_LOW_LIMIT";
        if std::env::var_os(CHILD).is_none() {
            let name = "socket::tests::what_the_kernel_could_not_pass_closes_what_it_could";
            let output = std::process::Command::new(std::env::current_exe().unwrap())
                .args([name, "--exact", "--nocapture", "--test-threads=1"])
                .env(CHILD, "1")
                .output()
                .unwrap();
            assert!(output.status.success(), "{output:?}");
            let text = String::from_utf8_lossy(&output.stdout);
            assert!(text.contains("1 passed"), "the child ran no test: {text}");
            return;
        }
        let (mut giver, mut taker) = pair();
        let files: Vec<_> = (0..20).map(|_| tempfile::tempfile().unwrap()).collect();
        send(
            &mut giver,
            &GiverMessage::Fds {
                first: 0,
                count: 20,
            },
            &files,
        );
        let before = open_fds();
        let mut limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        // The highest number in use counts, and reading the directory needs one more.
        limit.current = Some(before as u64 + 5);
        rustix::process::setrlimit(rustix::process::Resource::Nofile, limit).unwrap();
        let error = taker.recv::<GiverMessage>(Some(SOON)).unwrap_err();
        assert!(error.to_string().contains("limit of open files"), "{error}");
        assert_eq!(open_fds(), before);
    }

    #[test]
    fn a_peer_of_another_user_is_refused_and_root_is_not() {
        let (one, other) = UnixStream::pair().unwrap();
        let us = geteuid();
        let strangers = CprSocket::checked(one.into(), Uid::from_raw(us.as_raw() + 1));
        if us.is_root() {
            strangers.unwrap();
        } else {
            let error = strangers.unwrap_err().to_string();
            assert!(error.contains("runs as user"), "{error}");
        }
        CprSocket::checked(other.into(), us).unwrap();
    }

    #[test]
    fn what_is_no_unix_stream_socket_is_refused() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let folder = tempfile::tempdir().unwrap();
        let unix = std::os::unix::net::UnixListener::bind(folder.path().join("s")).unwrap();
        let file = tempfile::tempfile().unwrap();
        for fd in [OwnedFd::from(listener), file.into()] {
            let error = CprSocket::new(fd).unwrap_err().to_string();
            assert!(error.contains("not a unix stream socket"), "{error}");
        }
        // A listening socket has credentials of its own: the conversation fails at the first word instead.
        if let Ok(mut socket) = CprSocket::new(unix) {
            assert!(socket.recv::<GiverMessage>(Some(SOON)).is_err());
        }
    }

    #[test]
    fn a_silent_a_lost_and_a_foreign_peer_are_told_apart() {
        let (giver, mut taker) = pair();
        let error = taker
            .recv::<GiverMessage>(Some(Duration::from_millis(1)))
            .unwrap_err();
        assert!(matches!(error, RecvError::TimedOut), "{error}");
        drop(giver);
        let error = taker.recv::<GiverMessage>(Some(SOON)).unwrap_err();
        assert!(matches!(error, RecvError::Lost(_)), "{error}");
        let (mut stranger, ours) = UnixStream::pair().unwrap();
        stranger.write_all(b"QCPR\0\0\0\x01").unwrap();
        let mut taker = CprSocket::new(ours).unwrap();
        let error = taker.recv::<GiverMessage>(Some(SOON)).unwrap_err();
        assert!(matches!(error, RecvError::Garbage(_)), "{error}");
    }

    #[test]
    fn an_interrupt_wakes_whoever_waits() {
        let (_giver, mut taker) = pair();
        let interrupter = taker.interrupter();
        let waiting = std::thread::spawn(move || taker.recv::<GiverMessage>(None).unwrap_err());
        interrupter.interrupt();
        assert!(matches!(waiting.join().unwrap(), RecvError::Lost(_)));
    }
}
