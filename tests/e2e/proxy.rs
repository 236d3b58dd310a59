//! A link between a source and a target that looks at every frame and may change it, drop it, cut the link or shut the door.
//!
//! The source migrates to the proxy's address; the proxy opens a connection to the target for each of the source's. The hook runs on
//! the threads that pass the frames on, one frame at a time.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use vmferry_transport::wire::frame::{ControlFrame, FrameBuffer, SourceFrame, TargetFrame};
use vmferry_transport::wire::header::{FrameHeader, HEADER_BYTES};
use vmferry_transport::wire::ram::{self, FLAG_PAYLOAD_CHECKSUM};

use crate::peer::socket_address;

/// A frame on its way.
#[derive(Debug)]
pub(crate) enum Passing<'a> {
    /// On a control connection, from the source.
    Source(&'a SourceFrame),
    /// On a control connection, from the target.
    Target(&'a TargetFrame),
    /// On a data connection, from the source.
    Data(DataFrame<'a>),
}

/// A frame of a data connection: where it is changed, the length and the checksum of the header are made right again by the hook
/// itself, if it wants that.
#[derive(Debug)]
pub(crate) struct DataFrame<'a> {
    pub(crate) header: FrameHeader,
    pub(crate) body: &'a [u8],
    pub(crate) payload: &'a [u8],
    /// All of it as it goes over the wire.
    pub(crate) bytes: &'a [u8],
}

impl DataFrame<'_> {
    /// Whether it carries pages with content.
    pub(crate) fn has_pages(&self) -> bool {
        !self.payload.is_empty()
    }

    /// Whether it carries nothing else: no zeros, no holes.
    pub(crate) fn has_only_pages(&self) -> bool {
        let (runs, _) = self.body[ram::RUNS_FIXED_BYTES..].as_chunks::<{ ram::RUN_BYTES }>();
        self.has_pages() && runs.iter().all(|run| run[14] == 0)
    }

    pub(crate) fn ends_round(&self) -> bool {
        self.header.kind == ram::ROUND_END
    }
}

/// What becomes of a frame.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Verdict {
    Pass,
    Drop,
    /// These bytes go instead.
    Replace(Vec<u8>),
    /// The frame does not go, and all connections are cut. New ones are passed on.
    Cut,
    /// The frame goes, and then all connections are cut.
    PassAndCut,
    /// As `Cut`, and nobody comes through any more until [`Proxy::open_door`].
    CutAndShut,
    /// As `PassAndCut`, and nobody comes through any more.
    PassCutAndShut,
}

type Hook = Box<dyn FnMut(&Passing<'_>) -> Verdict + Send>;

struct Shared {
    target: SocketAddr,
    over: AtomicBool,
    door_shut: AtomicBool,
    sockets: Mutex<Vec<TcpStream>>,
    hook: Mutex<Hook>,
}

/// A running proxy. Dropping it cuts everything.
pub(crate) struct Proxy {
    shared: Arc<Shared>,
    address: SocketAddr,
    acceptor: Option<JoinHandle<()>>,
}

impl Proxy {
    /// In front of `target`, an address of the form `tcp:IP:PORT`.
    pub(crate) fn new(
        target: &str,
        hook: impl FnMut(&Passing<'_>) -> Verdict + Send + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        listener.set_nonblocking(true).unwrap();
        let shared = Arc::new(Shared {
            target: socket_address(target),
            over: AtomicBool::new(false),
            door_shut: AtomicBool::new(false),
            sockets: Mutex::default(),
            hook: Mutex::new(Box::new(hook)),
        });
        let accepting = Arc::clone(&shared);
        let acceptor = thread::spawn(move || accept(&accepting, &listener));
        Self {
            shared,
            address,
            acceptor: Some(acceptor),
        }
    }

    /// Where the source is to migrate to.
    pub(crate) fn address(&self) -> String {
        format!("tcp:{}", self.address)
    }

    /// Lets connections through again.
    pub(crate) fn open_door(&self) {
        self.shared.door_shut.store(false, Ordering::SeqCst);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::SeqCst);
        self.shared.cut();
        if let Some(acceptor) = self.acceptor.take() {
            acceptor.join().unwrap();
        }
    }
}

impl Shared {
    fn cut(&self) {
        let mut sockets = self.sockets.lock().unwrap();
        for socket in sockets.drain(..) {
            // It may be closed already.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }

    fn adopt(&self, socket: &TcpStream) {
        let copy = socket.try_clone().unwrap();
        self.sockets.lock().unwrap().push(copy);
    }

    /// Asks the hook and does what it says. False when there is no link any more.
    fn pass(&self, to: &mut TcpStream, frame: &Passing<'_>, bytes: &[u8]) -> bool {
        let verdict = {
            // A hook that failed its test has not spoilt the lock.
            let mut hook = self.hook.lock().unwrap_or_else(PoisonError::into_inner);
            hook(frame)
        };
        let shut = matches!(verdict, Verdict::CutAndShut | Verdict::PassCutAndShut);
        if shut {
            self.door_shut.store(true, Ordering::SeqCst);
        }
        match verdict {
            Verdict::Drop => true,
            Verdict::Pass => to.write_all(bytes).is_ok(),
            Verdict::Replace(bytes) => to.write_all(&bytes).is_ok(),
            Verdict::Cut | Verdict::CutAndShut => {
                self.cut();
                false
            }
            Verdict::PassAndCut | Verdict::PassCutAndShut => {
                // Fails only if the link is gone already.
                let _ = to.write_all(bytes);
                self.cut();
                false
            }
        }
    }
}

fn accept(shared: &Arc<Shared>, listener: &TcpListener) {
    while !shared.over.load(Ordering::SeqCst) {
        let Ok((source, _)) = listener.accept() else {
            thread::sleep(Duration::from_millis(1));
            continue;
        };
        if shared.door_shut.load(Ordering::SeqCst) {
            continue;
        }
        // Refused by the target: the source learns it by the end of its connection.
        let Ok(target) = TcpStream::connect(shared.target) else {
            continue;
        };
        for socket in [&source, &target] {
            socket.set_nonblocking(false).unwrap();
            socket.set_nodelay(true).unwrap();
            shared.adopt(socket);
        }
        let shared = Arc::clone(shared);
        thread::spawn(move || link(&shared, source, target));
    }
}

/// One connection of the source and its partner.
fn link(shared: &Arc<Shared>, mut source: TcpStream, mut target: TcpStream) {
    let back = {
        let (shared, from, to) = (
            Arc::clone(shared),
            target.try_clone().unwrap(),
            source.try_clone().unwrap(),
        );
        thread::spawn(move || {
            let frame = |frame: &TargetFrame, to: &mut TcpStream| {
                shared.pass(to, &Passing::Target(frame), &frame.encode())
            };
            control(from, to, frame);
        })
    };
    let mut buffer = FrameBuffer::default();
    if let Some(first) = next_frame::<SourceFrame>(&mut source, &mut buffer) {
        let data = matches!(first, SourceFrame::DataHello(_));
        if shared.pass(&mut target, &Passing::Source(&first), &first.encode()) {
            if data {
                pages(shared, &mut source, &mut target);
            } else {
                let frame = |frame: &SourceFrame, to: &mut TcpStream| {
                    shared.pass(to, &Passing::Source(frame), &frame.encode())
                };
                frames(&mut source, &mut buffer, &mut target, frame);
            }
        }
    }
    // What is still under way to the other side arrives; it notices the end.
    let _ = target.shutdown(Shutdown::Write);
    let _ = back.join();
}

fn control<F: ControlFrame>(
    mut from: TcpStream,
    mut to: TcpStream,
    pass: impl FnMut(&F, &mut TcpStream) -> bool,
) {
    frames(&mut from, &mut FrameBuffer::default(), &mut to, pass);
    // It may be closed already.
    let _ = to.shutdown(Shutdown::Write);
}

fn frames<F: ControlFrame>(
    from: &mut TcpStream,
    buffer: &mut FrameBuffer,
    to: &mut TcpStream,
    mut pass: impl FnMut(&F, &mut TcpStream) -> bool,
) {
    while let Some(frame) = next_frame(from, buffer) {
        if !pass(&frame, to) {
            return;
        }
    }
}

fn next_frame<F: ControlFrame>(from: &mut TcpStream, buffer: &mut FrameBuffer) -> Option<F> {
    loop {
        if let Some(frame) = buffer.poll_frame().unwrap() {
            return Some(frame);
        }
        // May read beyond the frame, except on a data connection: no page follows its hello before the target has said DATA_READY.
        let mut bytes = [0; 4096];
        match from.read(&mut bytes) {
            Ok(0) | Err(_) => return None,
            Ok(count) => buffer.push(&bytes[..count]),
        }
    }
}

/// Passes the frames of a data connection.
fn pages(shared: &Shared, from: &mut TcpStream, to: &mut TcpStream) {
    let mut head = [0; HEADER_BYTES];
    while from.read_exact(&mut head).is_ok() {
        let header = FrameHeader::decode(&head).unwrap();
        let mut bytes = head.to_vec();
        let body_end = HEADER_BYTES + ram::body_bytes(&header).unwrap();
        bytes.resize(body_end, 0);
        if from.read_exact(&mut bytes[HEADER_BYTES..]).is_err() {
            return;
        }
        if header.kind == ram::RAM_RUNS {
            let payload = bytes[HEADER_BYTES + 4..HEADER_BYTES + 8]
                .try_into()
                .unwrap();
            let payload_bytes = usize::try_from(u32::from_le_bytes(payload)).unwrap();
            bytes.resize(body_end + payload_bytes, 0);
            if from.read_exact(&mut bytes[body_end..]).is_err() {
                return;
            }
            assert_eq!(header.flags & !FLAG_PAYLOAD_CHECKSUM, 0);
        }
        let frame = Passing::Data(DataFrame {
            header,
            body: &bytes[HEADER_BYTES..body_end],
            payload: &bytes[body_end..],
            bytes: &bytes,
        });
        if !shared.pass(to, &frame, &bytes) {
            return;
        }
    }
}
