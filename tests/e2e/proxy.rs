//! A link between a source and a target that looks at every frame and may change it, drop it, cut the link or shut the door. From
//! outside, single connections can be cut, garbled or made to swallow everything without ending.
//!
//! The source migrates to the proxy's address; the proxy opens a connection to the target for each of the source's. The hook runs on
//! the threads that pass the frames on, one frame at a time.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use vmferry_transport::wire::device_data::DEVICE_DATA;
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
        self.header.kind == ram::RAM_RUNS && !self.payload.is_empty()
    }

    /// Whether it carries nothing else: no zeros, no holes.
    pub(crate) fn has_only_pages(&self) -> bool {
        let (runs, _) = self.body[ram::RUNS_FIXED_BYTES..].as_chunks::<{ ram::RUN_BYTES }>();
        self.has_pages() && runs.iter().all(|run| run[14] == 0)
    }

    /// Number of the round that it belongs to.
    pub(crate) fn round(&self) -> u32 {
        u32::from_le_bytes(self.body[..4].try_into().unwrap())
    }

    pub(crate) fn ends_round(&self) -> bool {
        self.header.kind == ram::ROUND_END
    }

    /// Whether no round follows.
    pub(crate) fn ends_last_round(&self) -> bool {
        self.ends_round() && self.body[4] == 1
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

/// Which connections.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Line {
    /// The one that began with a hello.
    Control,
    /// The data connection with this number.
    Data(u16),
    /// All of them, and those that are to come.
    All,
}

/// Where bytes go.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Way {
    ToTarget,
    ToSource,
}

/// A connection of the source and its partner.
struct Wire {
    /// What it said it is; `None` before, or if it is another.
    line: Mutex<Option<Line>>,
    source: TcpStream,
    target: TcpStream,
    /// Nothing is passed on any more, by [`Way`].
    stalled: [AtomicBool; 2],
}

impl Wire {
    fn is(&self, line: Line) -> bool {
        line == Line::All || *self.line.lock().unwrap() == Some(line)
    }

    fn cut(&self) {
        for socket in [&self.source, &self.target] {
            // It may be closed already.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

type Hook = Box<dyn FnMut(&Passing<'_>) -> Verdict + Send>;

struct Shared {
    target: SocketAddr,
    over: AtomicBool,
    door_shut: AtomicBool,
    all_stalled: AtomicBool,
    wires: Mutex<Vec<Arc<Wire>>>,
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
            all_stalled: AtomicBool::new(false),
            wires: Mutex::default(),
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

    /// Passes everything on again.
    pub(crate) fn repair(&self) {
        self.open_door();
        self.shared.all_stalled.store(false, Ordering::SeqCst);
        for wire in self.shared.wires(Line::All) {
            for stalled in &wire.stalled {
                stalled.store(false, Ordering::SeqCst);
            }
        }
    }

    /// Lets no connection through any more.
    pub(crate) fn shut_door(&self) {
        self.shared.door_shut.store(true, Ordering::SeqCst);
    }

    /// Whether such a connection has said what it is.
    pub(crate) fn knows(&self, line: Line) -> bool {
        !self.shared.wires(line).is_empty()
    }

    /// Cuts connections.
    pub(crate) fn cut(&self, line: Line) {
        for wire in self.shared.wires(line) {
            wire.cut();
        }
    }

    /// From now on passes nothing on, not even the end, and leaves the connections open.
    pub(crate) fn stall(&self, line: Line, ways: &[Way]) {
        if line == Line::All {
            self.shared.all_stalled.store(true, Ordering::SeqCst);
        }
        for wire in self.shared.wires(line) {
            for way in ways {
                wire.stalled[*way as usize].store(true, Ordering::SeqCst);
            }
        }
    }

    /// Says something that does not belong there.
    pub(crate) fn garble(&self, line: Line, way: Way) {
        for wire in self.shared.wires(line) {
            let mut to = match way {
                Way::ToTarget => &wire.target,
                Way::ToSource => &wire.source,
            };
            // The connection may have ended.
            let _ = to.write_all(&[0xa5; 64]);
        }
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
        for wire in self.wires(Line::All) {
            wire.cut();
        }
    }

    fn wires(&self, line: Line) -> Vec<Arc<Wire>> {
        let mut wires = self.wires.lock().unwrap().clone();
        wires.retain(|wire| wire.is(line));
        wires
    }

    /// Returns when the connection does not stall, or never will do anything else. False if the proxy is over.
    fn wait_stall(&self, wire: &Wire, way: Way) -> bool {
        while wire.stalled[way as usize].load(Ordering::SeqCst)
            || self.all_stalled.load(Ordering::SeqCst)
        {
            if self.over.load(Ordering::SeqCst) {
                return false;
            }
            thread::sleep(Duration::from_millis(10));
        }
        true
    }

    /// Asks the hook and does what it says. False when there is no link any more.
    fn pass(&self, wire: &Wire, way: Way, frame: &Passing<'_>, bytes: &[u8]) -> bool {
        let verdict = {
            // A hook that failed its test has not spoilt the lock.
            let mut hook = self.hook.lock().unwrap_or_else(PoisonError::into_inner);
            hook(frame)
        };
        let shut = matches!(verdict, Verdict::CutAndShut | Verdict::PassCutAndShut);
        if shut {
            self.door_shut.store(true, Ordering::SeqCst);
        }
        if !self.wait_stall(wire, way) {
            return false;
        }
        let mut to = match way {
            Way::ToTarget => &wire.target,
            Way::ToSource => &wire.source,
        };
        match verdict {
            Verdict::Drop => true,
            Verdict::Pass => to.write_all(bytes).is_ok(),
            Verdict::Replace(bytes) => to.write_all(&bytes).is_ok(),
            Verdict::Cut | Verdict::CutAndShut => {
                self.cut();
                false
            }
            Verdict::PassAndCut | Verdict::PassCutAndShut => {
                // The sender is cut off first, or a quick answer would still reach it.
                let from = match way {
                    Way::ToTarget => &wire.source,
                    Way::ToSource => &wire.target,
                };
                // Both fail only if the link is gone already.
                let _ = from.shutdown(Shutdown::Both);
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
        }
        let wire = Arc::new(Wire {
            line: Mutex::new(None),
            source,
            target,
            stalled: Default::default(),
        });
        shared.wires.lock().unwrap().push(Arc::clone(&wire));
        let shared = Arc::clone(shared);
        thread::spawn(move || link(&shared, &wire));
    }
}

/// One connection of the source and its partner.
fn link(shared: &Arc<Shared>, wire: &Arc<Wire>) {
    let back = {
        let (shared, wire) = (Arc::clone(shared), Arc::clone(wire));
        thread::spawn(move || {
            let mut buffer = FrameBuffer::default();
            while let Some(frame) = next_frame::<TargetFrame>(&wire.target, &mut buffer) {
                let bytes = frame.encode();
                if !shared.pass(&wire, Way::ToSource, &Passing::Target(&frame), &bytes) {
                    break;
                }
            }
            end(&shared, &wire, Way::ToSource, &wire.source);
        })
    };
    let mut buffer = FrameBuffer::default();
    let mut data = false;
    while let Some(frame) = next_frame::<SourceFrame>(&wire.source, &mut buffer) {
        match &frame {
            SourceFrame::Hello(_) => *wire.line.lock().unwrap() = Some(Line::Control),
            SourceFrame::DataHello(hello) => {
                *wire.line.lock().unwrap() = Some(Line::Data(hello.index));
                data = true;
            }
            _ => {}
        }
        if !shared.pass(
            wire,
            Way::ToTarget,
            &Passing::Source(&frame),
            &frame.encode(),
        ) {
            break;
        }
        if data {
            pages(shared, wire);
            break;
        }
    }
    end(shared, wire, Way::ToTarget, &wire.target);
    let _ = back.join();
    let mut wires = shared.wires.lock().unwrap();
    wires.retain(|other| !Arc::ptr_eq(other, wire));
}

/// What is still under way to the other side arrives; it notices the end.
fn end(shared: &Shared, wire: &Wire, way: Way, to: &TcpStream) {
    shared.wait_stall(wire, way);
    // It may be closed already.
    let _ = to.shutdown(Shutdown::Write);
}

fn next_frame<F: ControlFrame>(mut from: &TcpStream, buffer: &mut FrameBuffer) -> Option<F> {
    loop {
        match buffer.poll_frame() {
            Ok(Some(frame)) => return Some(frame),
            Ok(None) => {}
            // Nobody here says such a thing, unless a test has garbled what it heard.
            Err(_) => return None,
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
fn pages(shared: &Shared, wire: &Wire) {
    let mut from = &wire.source;
    let mut head = [0; HEADER_BYTES];
    while from.read_exact(&mut head).is_ok() {
        let header = FrameHeader::decode(&head).unwrap();
        let mut bytes = head.to_vec();
        let body_end = HEADER_BYTES + ram::body_bytes(&header).unwrap();
        bytes.resize(body_end, 0);
        if from.read_exact(&mut bytes[HEADER_BYTES..]).is_err() {
            return;
        }
        // Where the body says how long the payload is.
        let length_at = match header.kind {
            ram::RAM_RUNS => {
                assert_eq!(header.flags & !FLAG_PAYLOAD_CHECKSUM, 0);
                Some(4)
            }
            DEVICE_DATA => Some(16),
            _ => None,
        };
        if let Some(at) = length_at {
            let at = HEADER_BYTES + at;
            let payload = bytes[at..at + 4].try_into().unwrap();
            let payload_bytes = usize::try_from(u32::from_le_bytes(payload)).unwrap();
            bytes.resize(body_end + payload_bytes, 0);
            if from.read_exact(&mut bytes[body_end..]).is_err() {
                return;
            }
        }
        let frame = Passing::Data(DataFrame {
            header,
            body: &bytes[HEADER_BYTES..body_end],
            payload: &bytes[body_end..],
            bytes: &bytes,
        });
        if !shared.pass(wire, Way::ToTarget, &frame, &bytes) {
            return;
        }
    }
}
