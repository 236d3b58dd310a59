//! The network interface whose packets the VMM moves, with a driver that has no guest, on a pair of sockets that keep packets apart as a tap
//! does: what is not delivered waits, nothing is lost, doubled or out of order, and whatever the driver does is survived.

use std::collections::BTreeSet;
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};
use vmferry::machine::heirloom::DeviceFd;
use vmferry::machine::ram::MachineRam;
use vmferry::machine::virtio::saved::TransportV1;
use vmferry::machine::virtio::{Bus, OutsideConfig, QUEUE_NOTIFY, WINDOWS_GPA};
use vmferry_cpr::manifest::{FdEntry, FdKind, FileId, Stage};
use vmferry_devices::Before;
use vmferry_devices::saved::{decode, encode};
use vmferry_devices::vhost::VhostMemory;
use vmferry_devices::vmm_writes::VmmWriteLog;
use vmferry_tests::virtqueue::{Driver, marked};
use vmferry_transport::memory::DirtyLog;
use vmferry_transport::units::PAGE_SIZE;

const MEM: u64 = 8 << 20;
const PATIENCE: Duration = Duration::from_secs(60);
const SIZE: u16 = 64;
const HEADER: usize = 12;
const F_MAC: u32 = 1 << 5;
const F_MRG_RXBUF: u32 = 1 << 15;
const F_EVENT_IDX: u32 = 1 << 29;
const STATUS: u64 = 0x70;
const NEEDS_RESET: u32 = 64;

fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(seen) = look() {
            return seen;
        }
        assert!(start.elapsed() < PATIENCE, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The other end of what the device takes for its tap.
struct Network(UnixDatagram);

impl Network {
    fn new() -> (Self, DeviceFd) {
        let (ours, tap) = UnixDatagram::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        tap.set_nonblocking(true).unwrap();
        let tap = DeviceFd {
            device: "virtio-net/0".to_owned(),
            role: "tap".to_owned(),
            kind: FdKind::Tap,
            value: 0,
            fd: tap.into(),
        };
        (Self(ours), tap)
    }

    /// Sends a packet with a header as the kernel leaves it.
    fn send(&self, number: u32, bytes: usize) {
        assert!(self.try_send(number, bytes));
    }

    /// The same, if there is room.
    fn try_send(&self, number: u32, bytes: usize) -> bool {
        let mut packet = vec![0xee; HEADER];
        packet[..10].fill(0);
        packet.extend(frame(number, bytes));
        self.0.send(&packet).is_ok_and(|sent| sent == packet.len())
    }

    /// What the guest has sent, with its header.
    fn heard(&self) -> Option<Vec<u8>> {
        let mut packet = vec![0; 1 << 17];
        let bytes = self.0.recv(&mut packet).ok()?;
        packet.truncate(bytes);
        Some(packet)
    }
}

/// A frame that starts with its number.
fn frame(number: u32, bytes: usize) -> Vec<u8> {
    let mut frame = number.to_le_bytes().to_vec();
    frame.extend((4..bytes).map(|at| at as u8));
    frame
}

/// A machine's memory and its only device.
struct Side {
    ram: MachineRam,
    bus: Bus,
}

impl Side {
    fn new(ram: MachineRam, tap: DeviceFd) -> Self {
        let promised = FdEntry {
            name: tap.device.clone(),
            role: tap.role.clone(),
            kind: tap.kind,
            stage: Stage::HandOver,
            value: tap.value,
            file: FileId::default(),
        };
        let mut outside = OutsideConfig {
            nets: vec!["tap=none,mac=52:54:00:00:00:02".parse().unwrap()],
            ..OutsideConfig::default()
        };
        outside.name().unwrap();
        assert!(outside.expects(&promised));
        let given = Some((Before::Process, &[promised][..]));
        let bus = Bus::new(outside.backends(&ram, given).unwrap(), &ram).unwrap();
        let mut fds = vec![tap];
        bus.take_over(&mut fds).unwrap();
        assert!(fds.is_empty());
        Self { ram, bus }
    }

    fn fresh() -> (Self, Network) {
        let (network, tap) = Network::new();
        let ram = MachineRam::create(MEM).unwrap();
        (Self::new(ram, tap), network)
    }

    fn set(&self, register: u64, value: u32) {
        assert!(self.bus.write(WINDOWS_GPA + register, &value.to_le_bytes()));
    }

    fn get(&self, register: u64) -> u32 {
        let mut value = [0; 4];
        assert!(self.bus.read(WINDOWS_GPA + register, &mut value));
        u32::from_le_bytes(value)
    }

    fn poke<T: vm_memory::ByteValued>(&self, gpa: u64, value: T) {
        let memory = self.ram.memory();
        memory.write_obj(value, GuestAddress(gpa)).unwrap();
    }

    fn peek<T: vm_memory::ByteValued>(&self, gpa: u64) -> T {
        self.ram.memory().read_obj(GuestAddress(gpa)).unwrap()
    }

    /// What a driver does first.
    fn set_up(&self, guest: &Guest, features: u32) {
        for status in [0, 1, 3] {
            self.set(STATUS, status);
        }
        for (half, features) in [(0, features), (1, 1)] {
            self.set(0x24, half);
            self.set(0x20, features);
        }
        self.set(STATUS, 11);
        assert_eq!(self.get(STATUS), 11, "features are agreed on");
        for (queue, ring) in [(0, guest.to.ring()), (1, guest.from.ring())] {
            self.set(0x30, queue);
            self.set(0x38, ring.size.into());
            for (register, gpa) in [(0x80, ring.desc), (0x90, ring.avail), (0xa0, ring.used)] {
                self.set(register, u32::try_from(gpa).unwrap());
                self.set(register + 4, 0);
            }
            self.set(0x44, 1);
        }
        self.set(STATUS, 15);
    }

    fn kick(&self) {
        self.set(QUEUE_NOTIFY, 0);
        self.set(QUEUE_NOTIFY, 1);
    }

    /// Goes on with the same memory behind another bus, as in an upgrade in place.
    fn moved(self) -> Self {
        self.bus.stop().unwrap();
        let sections = self.bus.save().unwrap();
        let tap = self.bus.heirlooms().unwrap().pop().unwrap();
        let next = Self::new(self.ram, tap);
        next.bus.load(&sections.iter().collect::<Vec<_>>()).unwrap();
        next.bus.start().unwrap();
        next
    }

    fn waits(&self) {
        until("the device waits", || {
            let threads = std::fs::read_dir("/proc/self/task").unwrap().flatten();
            let mut states = threads.filter_map(|thread| {
                let stat = std::fs::read_to_string(thread.path().join("stat")).ok()?;
                let (name, rest) = stat.rsplit_once(") ")?;
                name.contains("virtio-net").then(|| rest.starts_with('S'))
            });
            states.all(|sleeps| sleeps).then_some(())
        });
    }
}

/// Two rings, to the guest and from it.
struct Guest {
    to: Driver,
    from: Driver,
}

/// Where the buffer of a slot is: pages that the rings do not use.
fn buffer(slot: u16, from: bool) -> u64 {
    (16 + u64::from(slot) * 2 + if from { 256 } else { 0 }) * PAGE_SIZE
}

impl Guest {
    fn new(side: &Side) -> Self {
        let memory = VhostMemory::new(side.ram.regions().to_vec()).unwrap();
        Self {
            to: Driver::new(&memory, 0, SIZE),
            from: Driver::new(&memory, 4 * PAGE_SIZE, SIZE),
        }
    }

    fn offer(&mut self, slot: u16, bytes: u32) {
        self.to.post(slot, &[(buffer(slot, false), bytes, true)]);
    }

    /// The next chain that came back: slot, and what was written to it.
    fn take(&mut self, side: &Side) -> Option<(u16, Vec<u8>)> {
        let (slot, bytes) = self.to.answer()?;
        let mut data = vec![0; bytes as usize];
        let at = GuestAddress(buffer(slot, false));
        side.ram.memory().read_slice(&mut data, at).unwrap();
        Some((slot, data))
    }

    fn send(&mut self, side: &Side, slot: u16, number: u32) {
        let mut packet = vec![0xff; HEADER];
        packet.extend(frame(number, 100));
        let at = buffer(slot, true);
        let memory = side.ram.memory();
        memory.write_slice(&packet, GuestAddress(at)).unwrap();
        // In two buffers, cut in the header.
        self.from
            .post(slot, &[(at, 5, false), (at + 5, 107, false)]);
    }
}

#[test]
fn packets_go_both_ways_once_and_in_order_though_the_device_changes_hands() {
    let (mut side, network) = Side::fresh();
    let mut guest = Guest::new(&side);
    for slot in 0..8 {
        guest.offer(slot, 2048);
    }
    side.set_up(&guest, F_MAC);
    assert_eq!(side.get(0x100), u32::from_le_bytes([0x52, 0x54, 0, 0]));
    let (mut sent, mut expected, mut heard) = (0, 0, 0);
    for turn in 0..30 {
        for slot in 0..10 {
            network.send(turn * 10 + u32::from(slot), 60 + 14 * usize::from(slot));
            guest.send(&side, slot, sent);
            sent += 1;
        }
        side.kick();
        // Wherever they are.
        side = side.moved();
        until("packets to the guest", || {
            while let Some((slot, packet)) = guest.take(&side) {
                let bytes = 60 + 14 * (expected as usize % 10);
                assert_eq!(packet[..10], [0; 10]);
                assert_eq!(packet[10..12], [1, 0], "in one chain");
                assert_eq!(packet[12..], frame(expected, bytes));
                expected += 1;
                guest.offer(slot, 2048);
                side.kick();
            }
            (expected == (turn + 1) * 10).then_some(())
        });
        until("packets from the guest", || {
            while let Some(packet) = network.heard() {
                assert_eq!(packet[..HEADER], [0; HEADER], "no offload");
                assert_eq!(packet[HEADER..], frame(heard, 100));
                heard += 1;
            }
            while guest.from.answer().is_some() {}
            (heard == sent && guest.from.open() == 0).then_some(())
        });
    }
}

#[test]
fn what_nobody_has_room_for_waits_in_the_tap_and_the_device_sleeps() {
    for features in [0, F_MRG_RXBUF, F_EVENT_IDX, F_MRG_RXBUF | F_EVENT_IDX] {
        let (side, network) = Side::fresh();
        let mut guest = Guest::new(&side);
        side.set_up(&guest, features);
        for number in 0..3 {
            network.send(number, 100);
        }
        side.waits();
        // Too little for what might come, and enough for it.
        guest.offer(0, 200);
        side.kick();
        side.waits();
        if features & F_MRG_RXBUF != 0 {
            assert_eq!(guest.take(&side), None);
            guest.offer(1, 4096);
            side.kick();
        }
        until("the packet", || guest.take(&side));
        side.waits();
        side.bus.stop().unwrap();
        let tap = side.bus.heirlooms().unwrap().pop().unwrap();
        let tap = UnixDatagram::from(tap.fd);
        let mut packet = [0; 2048];
        let left: Vec<u8> = std::iter::from_fn(|| {
            let bytes = tap.recv(&mut packet).ok()?;
            (bytes == 112).then_some(packet[HEADER])
        })
        .collect();
        assert_eq!(*left.last().unwrap(), 2, "{features:#x}");
        // Small ones may go together into what is larger.
        assert_eq!(left.len() as u32, 2 - u32::from(left[0] == 2));
    }
}

#[test]
fn no_packet_is_taken_off_the_tap_or_sent_before_the_guest_runs() {
    let (side, network) = Side::fresh();
    let mut guest = Guest::new(&side);
    side.set_up(&guest, 0);
    side.bus.stop().unwrap();
    guest.offer(0, 2048);
    network.send(7, 100);
    guest.send(&side, 0, 8);
    for _ in 0..20 {
        side.bus.prepare().unwrap();
        side.kick();
        std::thread::sleep(Duration::from_millis(1));
        assert_eq!((guest.take(&side), network.heard()), (None, None));
        side.bus.stand_down();
    }
    assert_eq!((guest.take(&side), network.heard()), (None, None));
    side.bus.start().unwrap();
    let (_, packet) = until("the packet to the guest", || guest.take(&side));
    assert_eq!(packet[HEADER..], frame(7, 100));
    let packet = until("the packet from the guest", || network.heard());
    assert_eq!(packet[HEADER..], frame(8, 100));
}

#[test]
fn a_packet_fills_as_many_chains_as_it_needs_and_waits_for_them_across_a_stop() {
    let (side, network) = Side::fresh();
    let mut guest = Guest::new(&side);
    side.set_up(&guest, F_MRG_RXBUF);
    network.send(7, 9000);
    guest.offer(0, 2048);
    guest.offer(1, 2048);
    side.kick();
    side.waits();
    assert_eq!(guest.take(&side), None, "there is not room enough");
    side.bus.stop().unwrap();
    side.bus.start().unwrap();
    for slot in 2..6 {
        guest.offer(slot, 2048);
    }
    side.kick();
    let mut packet = Vec::new();
    for slot in 0..5 {
        let (of, part) = until("a part", || guest.take(&side));
        assert_eq!((of, part.len()), (slot, if slot < 4 { 2048 } else { 820 }));
        packet.extend(part);
    }
    assert_eq!(packet[10..12], [5, 0], "in five chains");
    assert_eq!(packet[12..], frame(7, 9000));
    // The sixth is enough for a small one: a driver that gives buffers back in batches may wait for it.
    network.send(8, 100);
    let (slot, packet) = until("the next", || guest.take(&side));
    assert_eq!((slot, &packet[10..12]), (5, &[1, 0][..]));
    assert_eq!(packet[12..], frame(8, 100));
}

#[test]
fn a_packet_that_was_longer_than_the_room_goes_with_the_guest_to_another_process() {
    let (side, network) = Side::fresh();
    let mut guest = Guest::new(&side);
    side.set_up(&guest, F_MRG_RXBUF);
    for number in 0..3 {
        network.send(number, 9000);
    }
    guest.offer(0, 2048);
    side.kick();
    until("a packet is kept", || {
        side.bus.stop().unwrap();
        let saved = side.bus.save().unwrap();
        let state: TransportV1 = decode(&saved[0]).unwrap();
        side.bus.start().unwrap();
        state.undelivered
    });
    // Twice: the second process only passes it on.
    let side = side.moved().moved();
    for number in 0..3 {
        for slot in 0..5 {
            if (number, slot) != (0, 0) {
                guest.offer(slot, 2048);
            }
        }
        side.kick();
        let mut packet = Vec::new();
        for _ in 0..5 {
            packet.extend(until("a part", || guest.take(&side)).1);
        }
        assert_eq!(packet[..HEADER], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5, 0]);
        assert_eq!(packet[HEADER..], frame(number, 9000));
    }
}

#[test]
fn a_packet_of_saved_state_that_is_none_is_refused() {
    let (side, _network) = Side::fresh();
    let guest = Guest::new(&side);
    side.set_up(&guest, F_MRG_RXBUF);
    side.bus.stop().unwrap();
    let saved = side.bus.save().unwrap();
    let mut state: TransportV1 = decode(&saved[0]).unwrap();
    assert_eq!(state.undelivered, None);
    for bytes in [0, 25, 12 + 65535 + 65, 1 << 20] {
        state.undelivered = Some(vec![0; bytes]);
        let section = encode("virtio-net/0", &state).unwrap();
        let error = side.bus.load(&[&section]).unwrap_err().to_string();
        let said = format!("a packet of {bytes} bytes");
        assert!(error.contains(&said), "{error}");
    }
}

/// Goal: a driver that kicks only when it is asked to is heard, though the flag that says so was left by another back end, such as the
/// kernel's, which had it set when it was stopped.
#[test]
fn a_driver_that_the_last_back_end_told_not_to_kick_is_asked_to_do_so() {
    let (side, network) = Side::fresh();
    let mut guest = Guest::new(&side);
    side.set_up(&guest, F_MAC);
    side.bus.stop().unwrap();
    let used = [guest.to.ring().used, guest.from.ring().used];
    for used in used {
        side.poke(used, 1_u16);
    }
    side.bus.start().unwrap();
    let kick_if_asked = |queue: u32| {
        if side.peek::<u16>(used[queue as usize]) & 1 == 0 {
            side.set(QUEUE_NOTIFY, queue);
        }
    };
    network.send(1, 100);
    side.waits();
    guest.offer(0, 2048);
    kick_if_asked(0);
    until("a packet to the guest", || guest.take(&side));
    guest.send(&side, 0, 2);
    kick_if_asked(1);
    until("a packet from the guest", || network.heard());
}

#[test]
fn a_packet_too_long_for_its_chain_is_dropped_and_the_next_one_delivered() {
    let (side, network) = Side::fresh();
    let mut guest = Guest::new(&side);
    guest.offer(0, 1526);
    side.set_up(&guest, F_MAC);
    network.send(1, 9000);
    network.send(2, 1514);
    side.kick();
    let (slot, packet) = until("the second", || guest.take(&side));
    assert_eq!((slot, packet.len()), (0, 1526));
    assert_eq!(packet[HEADER..], frame(2, 1514));
}

#[test]
fn what_the_device_writes_is_in_the_dirty_log_and_nothing_else() {
    let (side, network) = Side::fresh();
    let mut guest = Guest::new(&side);
    guest.offer(3, 6000);
    guest.offer(4, 6000);
    // The device asks to be kicked when it first finds a ring empty.
    let flags = guest.from.ring().used;
    side.poke(flags, 1_u16);
    side.set_up(&guest, F_MAC);
    until("the first look", || {
        (side.peek::<u16>(flags) == 0).then_some(())
    });
    side.waits();
    let mut log = VmmWriteLog::new(side.ram.regions().to_vec()).unwrap();
    log.start().unwrap();
    network.send(1, 5000);
    until("the packet", || guest.take(&side));
    side.bus.stop().unwrap();
    let mut map = side.ram.blocks().empty_map();
    log.fetch(&mut map).unwrap();
    let pages: BTreeSet<u64> = marked(&map, MEM / PAGE_SIZE).into_iter().collect();
    let at = buffer(3, false) / PAGE_SIZE;
    assert_eq!(pages, BTreeSet::from([guest.to.used_page(), at, at + 1]));
}

#[test]
fn a_driver_with_event_indices_is_told_and_tells_only_what_it_asked_for() {
    let (side, network) = Side::fresh();
    let mut guest = Guest::new(&side);
    let ring = guest.to.ring();
    let used_event = ring.avail + 4 + 2 * u64::from(SIZE);
    let avail_event = ring.used + 4 + 8 * u64::from(SIZE);
    for slot in 0..3 {
        guest.offer(slot, 2048);
    }
    // Of the second, and of no other.
    side.poke(used_event, 1_u16);
    side.set_up(&guest, F_EVENT_IDX);
    side.waits();
    let interrupt = side.bus.windows()[0].interrupt.clone();
    let raised = || interrupt.eventfd().read().is_ok();
    raised();
    network.send(1, 60);
    until("the first", || guest.take(&side));
    side.waits();
    assert!(!raised());
    network.send(2, 60);
    until("the second", || guest.take(&side));
    until("its interrupt", || raised().then_some(()));
    network.send(3, 60);
    until("the third", || guest.take(&side));
    network.send(4, 60);
    // It wants to hear of the fourth chain, which is not there yet.
    until("a wish", || {
        (side.peek::<u16>(avail_event) == 3).then_some(())
    });
    assert!(!raised());
    guest.offer(0, 2048);
    side.kick();
    until("the fourth", || guest.take(&side));
}

#[test]
fn a_state_with_a_feature_that_this_device_lacks_is_refused() {
    let (side, _network) = Side::fresh();
    let guest = Guest::new(&side);
    side.set_up(&guest, F_MRG_RXBUF | F_EVENT_IDX | F_MAC);
    side.bus.stop().unwrap();
    let saved = side.bus.save().unwrap();
    let mut state: TransportV1 = decode(&saved[0]).unwrap();
    side.bus.load(&[&saved[0]]).unwrap();
    // Checksums are for the device to finish: VIRTIO_NET_F_CSUM.
    state.driver_features |= 1;
    let section = encode("virtio-net/0", &state).unwrap();
    let error = side.bus.load(&[&section]).unwrap_err().to_string();
    assert!(
        error.contains("features 0x1 that this one lacks"),
        "{error}"
    );
}

#[test]
fn who_moves_packets_follows_what_is_handed_over_and_words_against_it_are_refused() {
    let ram = MachineRam::create(MEM).unwrap();
    let promised = |roles: &[(&str, FdKind)]| {
        let entry = |(role, kind): &(&str, FdKind)| FdEntry {
            name: "virtio-net/0".to_owned(),
            role: (*role).to_owned(),
            kind: *kind,
            stage: Stage::HandOver,
            value: 0,
            file: FileId::default(),
        };
        roles.iter().map(entry).collect::<Vec<_>>()
    };
    let build = |words: &str, given: Option<&[FdEntry]>| {
        let mut outside = OutsideConfig {
            nets: vec![words.parse().unwrap()],
            ..OutsideConfig::default()
        };
        outside.name().unwrap();
        let given = given.map(|given| (Before::Process, given));
        let built = outside.backends(&ram, given);
        built.map(drop).map_err(|error| {
            let source = std::error::Error::source(&error).map(ToString::to_string);
            format!("{error}: {}", source.unwrap_or_default())
        })
    };
    let both = promised(&[("tap", FdKind::Tap), ("vhost", FdKind::Vhost)]);
    let tap = promised(&[("tap", FdKind::Tap)]);
    for (words, given, part) in [
        ("tap=a", &both, None),
        ("tap=a", &tap, None),
        ("tap=a,vhost=on", &both, None),
        ("tap=a,vhost=off", &tap, None),
        ("tap=a,vhost=off", &both, Some("vhost=off, and the kernel")),
        ("tap=a,vhost=on", &tap, Some("moves its packets itself")),
        ("tap=a,id=b", &both, Some("does not have it")),
    ] {
        let refused = build(words, Some(given)).err();
        let as_expected = match (&refused, part) {
            (Some(reason), Some(part)) => reason.contains(part),
            (None, None) => true,
            _ => false,
        };
        assert!(as_expected, "{words} {given:?}: {refused:?}");
    }
    if !std::path::Path::new("/dev/vhost-net").exists() {
        let refused = build("tap=a,vhost=on", None).unwrap_err();
        assert!(refused.contains("/dev/vhost-net"), "{refused}");
    }
}

/// Goal: whatever a guest puts into rings, descriptors and registers, the device can be stopped, touches nothing outside of RAM, and works
/// again after a reset. Method: random words, many of them plausible, while packets come.
#[test]
fn random_rings_of_a_network_interface_are_survived() {
    let (side, network) = Side::fresh();
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = move |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below
    };
    for round in 0..400 {
        let mut guest = Guest::new(&side);
        for ring in [guest.to.ring(), guest.from.ring()] {
            for at in 0..u64::from(SIZE) {
                let gpa = match random(4) {
                    0 => random(u64::MAX),
                    1 => ring.desc + random(64) * 16,
                    _ => random(MEM),
                };
                let len = match random(4) {
                    0 => random(1 << 32),
                    1 => random(40) * 16,
                    _ => random(4096),
                } as u32;
                let desc = ring.desc + at * 16;
                side.poke(desc, gpa);
                side.poke(desc + 8, len);
                // Mostly of the right direction, so that not all ends at once.
                let write = if ring == guest.to.ring() { 2 } else { 0 };
                let flags = if random(8) == 0 {
                    random(8)
                } else {
                    random(2) | write
                };
                side.poke(desc + 12, flags as u16);
                side.poke(desc + 14, random(u64::from(SIZE) + 2) as u16);
                side.poke(ring.avail + 4 + at * 2, random(u64::from(SIZE) + 2) as u16);
            }
            side.poke(ring.used, 0_u32);
            side.poke(ring.avail, (random(u64::from(SIZE) + 2) as u32) << 16);
        }
        let all = [0, F_MRG_RXBUF, F_EVENT_IDX, 1 << 28];
        let features = all.into_iter().filter(|_| random(2) == 0).sum();
        side.set_up(&guest, features);
        for number in 0..random(4) as u32 {
            // Where nobody takes them, there is no room for all.
            network.try_send(number, 60 + random(3000) as usize);
        }
        side.kick();
        while network.heard().is_some() {}
        if round % 3 == 0 {
            side.bus.stop().unwrap();
            let sections = side.bus.save().unwrap();
            // What a guest has made of its device may be refused; it must not do harm.
            let _ = side.bus.load(&sections.iter().collect::<Vec<_>>());
            side.bus.start().unwrap();
        }
        // Works again, and has nothing of before but what waited in the tap.
        if round % 50 == 49 {
            side.set(STATUS, 0);
            for at in 0..8 * PAGE_SIZE / 8 {
                side.poke(at * 8, 0_u64);
            }
            guest = Guest::new(&side);
            guest.offer(0, 4096);
            side.set_up(&guest, 0);
            assert_eq!(side.get(STATUS) & NEEDS_RESET, 0);
            side.kick();
            until("a packet of now", || {
                network.try_send(0x7777_7777, 60);
                let (slot, packet) = guest.take(&side)?;
                guest.offer(slot, 4096);
                side.kick();
                (packet[HEADER..] == frame(0x7777_7777, 60)).then_some(())
            });
        }
    }
}
