//! Tests of the data path over real sockets and real guest RAM, with both drivers.

use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use super::*;
use crate::memory::GuestRam;
use crate::memory::extents::Extents;
use crate::memory::hash::{RamHash, ram_hash};
use crate::memory::zero::{GuestPage, PAGE_BYTES};
use crate::units::{BlockId, PageIndex, RoundId};
use crate::wire::ram::RoundCounts;

mod devices;
mod ending;
mod exact;
mod hostile;

/// How long a test waits for something that must come. Generous: the machine may be busy; nothing depends on its length.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Transport {
    Unix,
    Tcp,
}

/// Every combination that the data path must behave alike in.
const EVERYWHERE: [(Transport, Backend); 4] = [
    (Transport::Unix, Backend::Uring),
    (Transport::Unix, Backend::Plain),
    (Transport::Tcp, Backend::Uring),
    (Transport::Tcp, Backend::Plain),
];

/// Connected pairs of sockets: those of the source and those of the target.
fn socket_pairs(transport: Transport, count: usize) -> (Vec<OwnedFd>, Vec<OwnedFd>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    (0..count)
        .map(|_| match transport {
            Transport::Unix => {
                let (source, target) = UnixStream::pair().unwrap();
                (OwnedFd::from(source), OwnedFd::from(target))
            }
            Transport::Tcp => {
                let source = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
                let (target, _) = listener.accept().unwrap();
                (OwnedFd::from(source), OwnedFd::from(target))
            }
        })
        .unzip()
}

fn sender_config(backend: Backend) -> SenderConfig {
    SenderConfig {
        backend,
        checksum: false,
        bandwidth: Arc::new(BandwidthLimit::new(0)),
        zero_copy: ZeroCopy::Auto,
    }
}

type Sources = Vec<StreamedDevice<dyn DeviceSource>>;
type Sinks = Vec<StreamedDevice<dyn DeviceSink>>;

/// A sender with its events in a queue.
fn start_sender(
    sockets: Vec<OwnedFd>,
    ram: &GuestRam,
    devices: Vec<StreamedDevice<dyn DeviceSource>>,
    config: SenderConfig,
) -> (DataSender, mpsc::Receiver<SenderEvent>) {
    let (events, queue) = mpsc::channel();
    let events = Arc::new(move |event| drop(events.send(event)));
    let sender = DataSender::start(sockets, ram.clone(), config, events).unwrap();
    sender.set_devices(devices);
    (sender, queue)
}

/// A receiver with its events in a queue.
fn start_receiver(
    sockets: Vec<OwnedFd>,
    ram: &GuestRam,
    backend: Backend,
) -> (DataReceiver, mpsc::Receiver<ReceiverEvent>) {
    start_receiver_with(sockets, ram, Vec::new(), backend)
}

fn start_receiver_with(
    sockets: Vec<OwnedFd>,
    ram: &GuestRam,
    devices: Vec<StreamedDevice<dyn DeviceSink>>,
    backend: Backend,
) -> (DataReceiver, mpsc::Receiver<ReceiverEvent>) {
    let (events, queue) = mpsc::channel();
    let events = Arc::new(move |event| drop(events.send(event)));
    let config = ReceiverConfig { backend };
    let receiver = DataReceiver::start(sockets, ram.clone(), devices, config, events).unwrap();
    (receiver, queue)
}

/// A migration's data path from one RAM to another in this process.
struct Ferry {
    source: GuestRam,
    target: GuestRam,
    sender: DataSender,
    sent: mpsc::Receiver<SenderEvent>,
    receiver: DataReceiver,
    received: mpsc::Receiver<ReceiverEvent>,
    next: RoundId,
}

impl Ferry {
    fn new(
        transport: Transport,
        connections: usize,
        config: SenderConfig,
        source: GuestRam,
        target: GuestRam,
    ) -> Self {
        let (ours, theirs) = socket_pairs(transport, connections);
        Self::over(ours, theirs, config, source, target)
    }

    fn over(
        ours: Vec<OwnedFd>,
        theirs: Vec<OwnedFd>,
        config: SenderConfig,
        source: GuestRam,
        target: GuestRam,
    ) -> Self {
        Self::with_devices(
            (ours, theirs),
            config,
            (source, target),
            (Vec::new(), Vec::new()),
        )
    }

    fn with_devices(
        (ours, theirs): (Vec<OwnedFd>, Vec<OwnedFd>),
        config: SenderConfig,
        (source, target): (GuestRam, GuestRam),
        (sources, sinks): (Sources, Sinks),
    ) -> Self {
        let backend = config.backend;
        let (sender, sent) = start_sender(ours, &source, sources, config);
        let (receiver, received) = start_receiver_with(theirs, &target, sinks, backend);
        Self {
            source,
            target,
            sender,
            sent,
            receiver,
            received,
            next: RoundId(0),
        }
    }

    /// Sends a round and waits until both sides say that it is done.
    fn round(&mut self, work: RoundWork, last: bool) -> RoundStats {
        self.queue(work, last);
        self.settle()
    }

    fn queue(&mut self, work: RoundWork, last: bool) {
        self.sender.send_round(self.next, work, last);
        self.next = self.next.next();
    }

    /// Waits for both events of one round.
    fn settle(&self) -> RoundStats {
        let stats = self.settle_source();
        assert_eq!(self.settle_target(), stats.counts);
        stats
    }

    fn settle_source(&self) -> RoundStats {
        match self.sent.recv_timeout(PATIENCE).unwrap() {
            SenderEvent::RoundSent { stats, .. } => stats,
            SenderEvent::Failed { error, .. } => panic!("sender: {error:?}"),
        }
    }

    fn settle_target(&self) -> RoundCounts {
        match self.received.recv_timeout(PATIENCE).unwrap() {
            ReceiverEvent::RoundReceived { counts, .. } => counts,
            ReceiverEvent::Failed { error, .. } => panic!("receiver: {error:?}"),
        }
    }

    fn first_round(&mut self, last: bool) -> RoundStats {
        let work = RoundWork::all(Extents::of(&self.source).unwrap());
        self.round(work, last)
    }

    /// After the last round: joins both sides and compares what they counted and hold.
    fn finish(self) -> (RamHash, RamHash) {
        let sent = self.sender.join();
        let received = self.receiver.join();
        assert_eq!(sent.counts, received.counts);
        assert_eq!(sent.wire_bytes, received.wire_bytes);
        (
            ram_hash(&self.source).unwrap(),
            ram_hash(&self.target).unwrap(),
        )
    }
}

fn page(ram: &GuestRam, block: u16, index: u64) -> GuestPage<'_> {
    GuestPage::of(ram.block(BlockId(block)).unwrap(), PageIndex(index)).unwrap()
}

/// Writes a content that no other `seed` has, whatever the page.
fn write_page(ram: &GuestRam, block: u16, index: u64, seed: u64) {
    let mut random = Random(seed | 1 << 63);
    let mut content = [0; PAGE_BYTES];
    for word in content.as_chunks_mut::<8>().0 {
        *word = random.next().to_le_bytes();
    }
    page(ram, block, index).copy_from(&content);
}

/// A small repeatable source of variety (xorshift).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}
