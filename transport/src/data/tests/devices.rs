//! Streams of devices beside the pages: order, completeness, failures on either side.

use std::io;
use std::sync::Mutex;

use super::*;
use crate::memory::extents::tests::memfd_ram;
use crate::wire::WireError;

/// Makes numbered bytes: some in each round, the rest in the last.
struct Counting {
    made: u64,
    per_round: usize,
    left_in_round: usize,
    at_end: usize,
    fails_at: Option<u64>,
}

impl Counting {
    fn new(per_round: usize, at_end: usize) -> Self {
        Self {
            made: 0,
            per_round,
            left_in_round: per_round,
            at_end,
            fails_at: None,
        }
    }
}

fn byte(at: u64) -> u8 {
    (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

impl DeviceSource for Counting {
    fn read(&mut self, last: bool, buffer: &mut [u8]) -> io::Result<usize> {
        if self.fails_at.is_some_and(|at| self.made >= at) {
            return Err(io::Error::other("the device is on fire"));
        }
        let left = if last {
            &mut self.at_end
        } else {
            &mut self.left_in_round
        };
        // Devices like to give odd numbers of bytes.
        let count = buffer.len().min(*left).min(100_003);
        *left -= count;
        for (at, place) in (self.made..).zip(&mut buffer[..count]) {
            *place = byte(at);
        }
        self.made += count as u64;
        if count == 0 {
            self.left_in_round = self.per_round;
        }
        Ok(count)
    }
}

#[derive(Default)]
struct Collecting {
    bytes: Arc<Mutex<Vec<u8>>>,
    refuses_at: Option<usize>,
}

impl DeviceSink for Collecting {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut all = self.bytes.lock().unwrap();
        if self.refuses_at.is_some_and(|at| all.len() >= at) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        all.extend_from_slice(bytes);
        Ok(())
    }
}

fn device<S: ?Sized>(index: u16, stream: Box<S>) -> StreamedDevice<S> {
    StreamedDevice {
        index,
        name: format!("vfio/{index}"),
        stream,
    }
}

fn ferry(
    connections: usize,
    config: SenderConfig,
    sources: Vec<Counting>,
    sinks: Vec<Collecting>,
) -> Ferry {
    let sources = (3..).zip(sources);
    let sources =
        sources.map(|(index, stream)| device(index, Box::new(stream) as Box<dyn DeviceSource>));
    let sinks = (3..).zip(sinks);
    let sinks = sinks.map(|(index, stream)| device(index, Box::new(stream) as Box<dyn DeviceSink>));
    Ferry::with_devices(
        socket_pairs(Transport::Unix, connections),
        config,
        (memfd_ram(&[64]), memfd_ram(&[64])),
        (sources.collect(), sinks.collect()),
    )
}

#[test]
fn streams_arrive_whole_and_in_order_whichever_connection_takes_them() {
    for backend in [Backend::Uring, Backend::Plain] {
        for (connections, checksum) in [(1, false), (3, false), (2, true)] {
            let config = SenderConfig {
                checksum,
                ..sender_config(backend)
            };
            let shapes = [(0, 1_000_000), (700_000, 300_001), (1, 0), (0, 0)];
            let sinks: Vec<_> = shapes.iter().map(|_| Collecting::default()).collect();
            let found: Vec<_> = sinks.iter().map(|sink| Arc::clone(&sink.bytes)).collect();
            let sources = shapes.map(|(per_round, at_end)| Counting::new(per_round, at_end));
            let mut ferry = ferry(connections, config, sources.into(), sinks);
            write_page(&ferry.source, 0, 7, 1);
            ferry.first_round(false);
            ferry.round(RoundWork::default(), false);
            let stats = ferry.round(RoundWork::default(), true);
            assert_eq!(stats.counts.device_bytes, 1_300_001);
            let (source, target) = ferry.finish();
            assert_eq!(source, target);
            for ((per_round, at_end), found) in shapes.into_iter().zip(found) {
                let found = found.lock().unwrap();
                assert_eq!(found.len(), 2 * per_round + at_end);
                assert!((0..).zip(&*found).all(|(at, found)| *found == byte(at)));
            }
        }
    }
}

#[test]
fn a_device_that_cannot_give_its_state_is_named() {
    let source = Counting {
        fails_at: Some(200_000),
        ..Counting::new(0, 1_000_000)
    };
    let config = sender_config(Backend::Uring);
    let mut ferry = ferry(2, config, vec![source], vec![Collecting::default()]);
    ferry.first_round(false);
    ferry.queue(RoundWork::default(), true);
    match ferry.sent.recv_timeout(PATIENCE).unwrap() {
        SenderEvent::Failed {
            error: DataError::Device { device, .. },
            ..
        } => {
            assert_eq!(device, "vfio/3");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_device_that_refuses_its_state_is_named() {
    let sink = Collecting {
        refuses_at: Some(300_000),
        ..Collecting::default()
    };
    let config = sender_config(Backend::Uring);
    let mut ferry = ferry(2, config, vec![Counting::new(0, 1_000_000)], vec![sink]);
    ferry.first_round(false);
    ferry.queue(RoundWork::default(), true);
    match ferry.received.recv_timeout(PATIENCE).unwrap() {
        ReceiverEvent::Failed {
            error: DataError::Device { device, .. },
            ..
        } => {
            assert_eq!(device, "vfio/3");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_device_whose_stream_does_not_come_fails_the_last_round() {
    let config = sender_config(Backend::Plain);
    let mut ferry = ferry(1, config, Vec::new(), vec![Collecting::default()]);
    ferry.first_round(false);
    ferry.queue(RoundWork::default(), true);
    match ferry.received.recv_timeout(PATIENCE).unwrap() {
        ReceiverEvent::Failed {
            error: DataError::Peer(WireError::DeviceUnfinished { device }),
            ..
        } => assert_eq!(device, "vfio/3"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn data_of_a_device_that_does_not_exist_is_refused() {
    let config = sender_config(Backend::Uring);
    let mut ferry = ferry(1, config, vec![Counting::new(5, 5)], Vec::new());
    ferry.queue(RoundWork::all(Extents::of(&ferry.source).unwrap()), false);
    match ferry.received.recv_timeout(PATIENCE).unwrap() {
        ReceiverEvent::Failed {
            error: DataError::Peer(_),
            ..
        } => {}
        other => panic!("{other:?}"),
    }
}
