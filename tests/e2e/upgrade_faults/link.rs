//! The two sockets of an upgrade in place with somebody in between: every frame passes by itself, with the descriptors that belong to it,
//! and one of them is held while something happens to it.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde_json::Value;
use tempfile::TempDir;
use vmferry_cpr::message::{BATCH_MAX, GiverMessage, TakerMessage};
use vmferry_transport::wire::frame::{ControlFrame, FrameBuffer, SourceFrame, TargetFrame};

use crate::successor::channels;

use super::step::Step;

const CONTROL_BYTES: usize = rustix::cmsg_space!(ScmRights(BATCH_MAX));

/// What becomes of the frame that is held.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Deed {
    Pass,
    /// It does not pass, and its connection ends.
    Cut,
    /// Its first half passes, and its connection ends.
    Halve,
    /// A bit of it is turned.
    Change,
    /// It never passes, and its connection stays open.
    Keep,
    /// It passes without its descriptors.
    WithoutFds,
    /// Its last descriptor is missing.
    OneFdLess,
    /// Its first descriptor and its last have changed places.
    SwapFds,
    /// Its first descriptor is another file.
    ForeignFd,
}

struct Shared {
    held: Mutex<Option<Hold>>,
    /// The old process has asked what became of the guest.
    asked: AtomicBool,
    over: AtomicBool,
    /// Every connection, both ends of it.
    open: Mutex<Vec<UnixStream>>,
}

/// Until the step comes.
struct Hold {
    step: Step,
    tell: Sender<()>,
    deed: Receiver<Deed>,
}

/// A running link. Dropping it ends all connections.
pub(super) struct Link {
    folder: TempDir,
    shared: Arc<Shared>,
    arrived: Receiver<()>,
    deed: Sender<Deed>,
}

impl Link {
    /// In front of the process that listens in `target`; holds the frame that `step` is.
    pub(super) fn new(target: &Path, step: Step) -> Self {
        let (tell, arrived) = channel();
        let (deed, what) = channel();
        let hold = Hold {
            step,
            tell,
            deed: what,
        };
        let shared = Arc::new(Shared {
            held: Mutex::new(Some(hold)),
            asked: AtomicBool::new(false),
            over: AtomicBool::new(false),
            open: Mutex::default(),
        });
        let folder = TempDir::with_prefix("vmferry-link-").unwrap();
        for name in ["main", "cpr"] {
            let listener = UnixListener::bind(folder.path().join(name)).unwrap();
            let (shared, target) = (Arc::clone(&shared), target.join(name));
            thread::spawn(move || shared.accept(&listener, &target));
        }
        Self {
            folder,
            shared,
            arrived,
            deed,
        }
    }

    /// Where the old process is to hand over to.
    pub(super) fn channels(&self) -> Value {
        channels(self.folder.path())
    }

    /// Waits until the frame has come that is held.
    pub(super) fn wait(&self, patience: Duration) -> bool {
        self.arrived.recv_timeout(patience).is_ok()
    }

    /// Lets it go its way.
    pub(super) fn go(&self, deed: Deed) {
        self.deed.send(deed).unwrap();
    }

    pub(super) fn asked(&self) -> bool {
        self.shared.asked.load(Ordering::SeqCst)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::SeqCst);
        for socket in self.shared.open().drain(..) {
            let _ = socket.shutdown(Shutdown::Both);
        }
        // Ends the waits for a connection.
        for name in ["main", "cpr"] {
            let _ = UnixStream::connect(self.folder.path().join(name));
        }
    }
}

impl Shared {
    fn open(&self) -> std::sync::MutexGuard<'_, Vec<UnixStream>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn accept(self: &Arc<Self>, listener: &UnixListener, target: &PathBuf) {
        let is_cpr = target.ends_with("cpr");
        while let Ok((old, _)) = listener.accept() {
            if self.over.load(Ordering::SeqCst) {
                return;
            }
            // Nobody there: the old process learns it by the end of its connection.
            let Ok(new) = UnixStream::connect(target) else {
                continue;
            };
            let two =
                |socket: &UnixStream| (socket.try_clone().unwrap(), socket.try_clone().unwrap());
            let ((old_in, old_out), (new_in, new_out)) = (two(&old), two(&new));
            self.open().extend([old, new]);
            let (there, back) = (Arc::clone(self), Arc::clone(self));
            thread::spawn(move || match is_cpr {
                true => there.pass::<GiverMessage>(&old_in, &new_out),
                false => there.pass::<SourceFrame>(&old_in, &new_out),
            });
            thread::spawn(move || match is_cpr {
                true => back.pass::<TakerMessage>(&new_in, &old_out),
                false => back.pass::<TargetFrame>(&new_in, &old_out),
            });
        }
    }

    /// Passes frames on until one side ends.
    fn pass<M: Frame>(&self, from: &UnixStream, to: &UnixStream) {
        let mut buffer = FrameBuffer::default();
        let mut fds = VecDeque::new();
        'link: while receive(from, &mut buffer, &mut fds) {
            while let Ok(Some(frame)) = buffer.poll_frame::<M>() {
                if frame.asks() {
                    self.asked.store(true, Ordering::SeqCst);
                }
                let with: Vec<OwnedFd> = fds.drain(..frame.fds().min(fds.len())).collect();
                if !self.deal(&frame, with, to) {
                    break 'link;
                }
            }
        }
        for socket in [from, to] {
            // It may be closed already.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }

    /// False if the connection ends here.
    fn deal(&self, frame: &impl Frame, mut fds: Vec<OwnedFd>, to: &UnixStream) -> bool {
        let hold = {
            let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
            held.take_if(|hold| frame.step() == Some(hold.step))
        };
        // Whoever waited may have given up; then the frame passes.
        let deed = hold.map_or(Deed::Pass, |hold| {
            let _ = hold.tell.send(());
            hold.deed.recv().unwrap_or(Deed::Pass)
        });
        let mut bytes = frame.bytes();
        match deed {
            Deed::Pass => {}
            Deed::Cut => return false,
            Deed::Keep => {
                while !self.over.load(Ordering::SeqCst) {
                    thread::sleep(Duration::from_millis(10));
                }
                return false;
            }
            Deed::Halve => {
                bytes.truncate(bytes.len() / 2);
                send(to, &bytes, &fds);
                return false;
            }
            // In the checksum.
            Deed::Change => bytes[12] ^= 1,
            Deed::WithoutFds => fds.clear(),
            Deed::OneFdLess => drop(fds.pop()),
            Deed::SwapFds => {
                assert!(fds.len() > 1, "nothing to change places with");
                let last = fds.len() - 1;
                fds.swap(0, last);
            }
            Deed::ForeignFd => fds[0] = File::open("/dev/null").unwrap().into(),
        }
        send(to, &bytes, &fds)
    }
}

fn receive(from: &UnixStream, buffer: &mut FrameBuffer, fds: &mut VecDeque<OwnedFd>) -> bool {
    let mut space = [MaybeUninit::uninit(); CONTROL_BYTES];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = [0; 16 << 10];
    let mut into = [IoSliceMut::new(&mut bytes)];
    let Ok(received) = recvmsg(from, &mut into, &mut control, RecvFlags::CMSG_CLOEXEC) else {
        return false;
    };
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(some) = message {
            fds.extend(some);
        }
    }
    buffer.push(&bytes[..received.bytes]);
    received.bytes > 0
}

/// False if nobody is there any more.
fn send(to: &UnixStream, bytes: &[u8], fds: &[OwnedFd]) -> bool {
    let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); CONTROL_BYTES];
    let mut rest = bytes;
    let mut with = &fds[..];
    while !rest.is_empty() {
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(with.is_empty() || control.push(SendAncillaryMessage::ScmRights(with)));
        match sendmsg(to, &[IoSlice::new(rest)], &mut control, SendFlags::NOSIGNAL) {
            Ok(sent) => rest = &rest[sent..],
            Err(_) => return false,
        }
        with = &[];
    }
    true
}

/// What passes on one of the four ways.
trait Frame: ControlFrame {
    fn bytes(&self) -> Vec<u8>;
    fn step(&self) -> Option<Step>;

    /// How many descriptors belong to it.
    fn fds(&self) -> usize {
        0
    }

    /// Whether it asks what became of the guest.
    fn asks(&self) -> bool {
        false
    }
}

impl Frame for GiverMessage {
    fn bytes(&self) -> Vec<u8> {
        self.encode()
    }

    fn step(&self) -> Option<Step> {
        Step::ALL.into_iter().find(|step| step.is_given(self))
    }

    fn fds(&self) -> usize {
        match self {
            Self::Fds { count, .. } => usize::try_from(*count).unwrap(),
            _ => 0,
        }
    }
}

impl Frame for TakerMessage {
    fn bytes(&self) -> Vec<u8> {
        self.encode()
    }

    fn step(&self) -> Option<Step> {
        Step::ALL.into_iter().find(|step| step.is_taken(self))
    }
}

impl Frame for SourceFrame {
    fn bytes(&self) -> Vec<u8> {
        self.encode()
    }

    fn step(&self) -> Option<Step> {
        Step::ALL.into_iter().find(|step| step.is_sent(self))
    }

    fn asks(&self) -> bool {
        matches!(self, Self::Resolve(_))
    }
}

impl Frame for TargetFrame {
    fn bytes(&self) -> Vec<u8> {
        self.encode()
    }

    fn step(&self) -> Option<Step> {
        Step::ALL.into_iter().find(|step| step.is_answered(self))
    }
}
