//! Back ends in the kernel: packets and sockets go on where they were after a move, nothing is lost or doubled, the log has what was
//! written and nothing else, and one process owns a back end.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Write};
use std::net::UdpSocket;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use socket2::{Domain, SockAddr, Socket, Type};
use vm_memory::{Bytes, GuestAddress};
use vmferry_devices::notifier::{Mode, Notifier, Setup};
use vmferry_devices::vhost::{
    NET_HEADER_BYTES, Queue, VhostDevice, VhostLog, VhostMemory, VhostNotifier, dirty_logs,
    open_tap,
};
use vmferry_devices::{Device, DeviceError};
use vmferry_tests::virtqueue::{Driver, copy, events, marked, ram};
use vmferry_transport::memory::{DirtyLog, UnitedLog};
use vmferry_transport::units::{MigrationId, PAGE_SIZE};
use vmm_sys_util::eventfd::EventFd;

use crate::command::run;
use crate::harness::{Accel, Launch, Machine, until};
use crate::modules::{load, load_for};
use crate::net::Tap;

pub(crate) const PAGES: u64 = 512;
const SIZE: u16 = 128;
/// Requests that each ring may have.
const SLOTS: u16 = 32;
pub(crate) const VERSION_1: u64 = 1 << 32;
const HEADER: usize = NET_HEADER_BYTES as usize;
pub(crate) const GUEST_MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 2];
const PORT: u16 = 7000;

/// Two rings, to the guest and from it, with a page for each request.
#[derive(Clone)]
pub(crate) struct Guest {
    pub(crate) to: Driver,
    pub(crate) from: Driver,
}

impl Guest {
    pub(crate) fn new(memory: &VhostMemory) -> Self {
        let mut guest = Self {
            to: Driver::new(memory, 0, SIZE),
            from: Driver::new(memory, 4 * PAGE_SIZE, SIZE),
        };
        for slot in 0..SLOTS {
            guest.offer(slot);
        }
        guest
    }

    pub(crate) fn moved(&self, memory: &VhostMemory) -> Self {
        Self {
            to: self.to.moved(memory),
            from: self.from.moved(memory),
        }
    }

    pub(crate) fn page(slot: u16, from: bool) -> u64 {
        16 + u64::from(slot) + if from { u64::from(SLOTS) } else { 0 }
    }

    /// Offers a page for what is to come.
    pub(crate) fn offer(&mut self, slot: u16) {
        self.to
            .post(slot, &[(Self::page(slot, false) * PAGE_SIZE, 4096, true)]);
    }

    /// What has come, if anything has: the slot and the bytes. The page is not offered again.
    pub(crate) fn take(&mut self) -> Option<(u16, Vec<u8>)> {
        let (slot, bytes) = self.to.answer()?;
        let mut data = vec![0; bytes as usize];
        let address = GuestAddress(Self::page(slot, false) * PAGE_SIZE);
        self.to
            .memory()
            .memory()
            .read_slice(&mut data, address)
            .unwrap();
        Some((slot, data))
    }

    pub(crate) fn send(&mut self, slot: u16, data: &[u8]) {
        let address = Self::page(slot, true) * PAGE_SIZE;
        let memory = self.from.memory().memory();
        memory.write_slice(data, GuestAddress(address)).unwrap();
        let bytes = u32::try_from(data.len()).unwrap();
        self.from.post(slot, &[(address, bytes, false)]);
    }

    pub(crate) fn rings(&self) -> [Option<vmferry_devices::vhost::Ring>; 2] {
        [Some(self.to.ring()), Some(self.from.ring())]
    }
}

/// A device with its events.
pub(crate) struct Host {
    pub(crate) device: Arc<Mutex<VhostDevice>>,
    kicks: [EventFd; 2],
}

impl Host {
    fn new(make: impl FnOnce([Queue; 2]) -> Result<VhostDevice, DeviceError>) -> Self {
        let pairs = [events(), events()];
        let kicks = [0, 1].map(|queue: usize| pairs[queue].0.try_clone().unwrap());
        let device = make(pairs.map(|(kick, call)| Queue::new(kick, call))).unwrap();
        Self {
            device: Arc::new(Mutex::new(device)),
            kicks,
        }
    }

    pub(crate) fn net(vhost: File, tap: &File, memory: &VhostMemory) -> Self {
        let tap = tap.try_clone().unwrap();
        Self::new(|queues| VhostDevice::net("net/0", vhost, tap, memory.clone(), queues))
    }

    pub(crate) fn start_anew(&self, guest: &Guest) {
        let mut device = self.device.lock().unwrap();
        device.set_features(VERSION_1).unwrap();
        device.set_rings(&guest.rings()).unwrap();
        device.start().unwrap();
    }

    pub(crate) fn kick(&self) {
        self.kicks.iter().for_each(|kick| kick.write(1).unwrap());
    }
}

/// A network of the host and the guest, and how the host speaks in it.
pub(crate) struct Net {
    tap: Tap,
    host: UdpSocket,
    host_mac: [u8; 6],
}

pub(crate) fn open_vhost(kind: &str) -> File {
    let path = format!("/dev/vhost-{kind}");
    load_for(&path, &format!("vhost_{kind}"));
    File::options().read(true).write(true).open(path).unwrap()
}

impl Net {
    pub(crate) fn new(number: u8) -> Self {
        let tap = Tap::new(&format!("10.98.{number}.1/24"));
        let name = tap.name();
        // Nobody but us shall speak there.
        let quiet = format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6");
        if std::path::Path::new(&quiet).exists() {
            std::fs::write(quiet, "1").unwrap();
        }
        let neighbour =
            format!("neigh replace 10.98.{number}.2 lladdr 52:54:00:00:00:02 dev {name}");
        run("ip", &neighbour.split(' ').collect::<Vec<_>>());
        let mac = std::fs::read_to_string(format!("/sys/class/net/{name}/address")).unwrap();
        let mut host_mac = [0; 6];
        for (byte, digits) in host_mac.iter_mut().zip(mac.trim().split(':')) {
            *byte = u8::from_str_radix(digits, 16).unwrap();
        }
        let host = UdpSocket::bind((format!("10.98.{number}.1"), PORT)).unwrap();
        host.connect((format!("10.98.{number}.2"), PORT)).unwrap();
        host.set_nonblocking(true).unwrap();
        Self {
            tap,
            host,
            host_mac,
        }
    }

    /// The tap, for one user at a time.
    pub(crate) fn open(&self) -> File {
        open_tap(self.tap.name()).unwrap()
    }

    pub(crate) fn tap(&self) -> &Tap {
        &self.tap
    }

    pub(crate) fn host_sends(&self, number: u32) {
        assert_eq!(self.host.send(&number.to_le_bytes()).unwrap(), 4);
    }

    pub(crate) fn host_hears(&self) -> Option<u32> {
        let mut number = [0; 4];
        match self.host.recv(&mut number) {
            Ok(bytes) => {
                assert_eq!(bytes, 4);
                Some(u32::from_le_bytes(number))
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => None,
            Err(error) => panic!("{error}"),
        }
    }

    /// A packet from the guest, header and all.
    pub(crate) fn packet(&self, subnet: u8, number: u32) -> Vec<u8> {
        let mut packet = vec![0; HEADER];
        packet.extend_from_slice(&self.host_mac);
        packet.extend_from_slice(&GUEST_MAC);
        packet.extend_from_slice(&[8, 0]);
        let mut ip = vec![0x45, 0, 0, 32, 0, 0, 0x40, 0, 64, 17, 0, 0];
        ip.extend_from_slice(&[10, 98, subnet, 2, 10, 98, subnet, 1]);
        let sum: u32 = ip
            .chunks(2)
            .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]))
            .sum();
        let sum = !u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
        packet.extend_from_slice(&ip);
        for field in [PORT, PORT, 12, 0] {
            packet.extend_from_slice(&field.to_be_bytes());
        }
        packet.extend_from_slice(&number.to_le_bytes());
        packet
    }
}

/// The number in a packet to the guest, if it is one of ours.
pub(crate) fn number_in(packet: &[u8]) -> Option<u32> {
    let udp = packet.get(HEADER + 34..)?;
    let ours = packet[HEADER + 23] == 17 && udp.get(2..4)? == PORT.to_be_bytes();
    ours.then(|| u32::from_le_bytes(udp[8..12].try_into().unwrap()))
}

#[test]
fn packets_go_on_where_they_were_after_a_move_to_another_owner() {
    let net = Net::new(1);
    let tap = net.open();
    let (memory, _ram) = ram(PAGES);
    let mut guest = Guest::new(&memory);
    let mut host = Host::net(open_vhost("net"), &tap, &memory);
    host.start_anew(&guest);
    let (mut to_guest, mut heard, mut sent) = (0, 0, 0);
    for turn in 0..10 {
        for _ in 0..10 {
            net.host_sends(to_guest);
            to_guest += 1;
        }
        // Wherever they are: on the way to the guest, and on the way from it.
        for slot in 0..10 {
            guest.send(slot, &net.packet(1, sent));
            sent += 1;
        }
        host.kick();
        let saved = {
            let mut device = host.device.lock().unwrap();
            device.stop().unwrap();
            device.save().unwrap()
        };
        for _ in 0..5 {
            net.host_sends(to_guest);
            to_guest += 1;
        }
        let (to, _ram) = ram(PAGES);
        copy(guest.to.memory(), &to);
        guest = guest.moved(&to);
        host = Host::net(open_vhost("net"), &tap, &to);
        {
            let mut device = host.device.lock().unwrap();
            device.restore(&saved).unwrap();
            device.start().unwrap();
        }
        let mut expected = to_guest - 15;
        until(format_args!("packets of turn {turn}"), || {
            while let Some((slot, packet)) = guest.take() {
                if let Some(number) = number_in(&packet) {
                    assert_eq!(number, expected, "each once, in order");
                    expected += 1;
                }
                guest.offer(slot);
                host.kick();
            }
            (expected == to_guest).then_some(())
        });
        until(format_args!("answers of turn {turn}"), || {
            while let Some(number) = net.host_hears() {
                assert_eq!(number, heard, "each once, in order");
                heard += 1;
            }
            while guest.from.answer().is_some() {}
            (heard == sent && guest.from.open() == 0).then_some(())
        });
    }
    assert_eq!((to_guest, sent, net.host_hears()), (150, 100, None));
}

fn busy(error: &DeviceError) -> bool {
    matches!(error, DeviceError::Kernel { op, source, .. }
        if op == "VHOST_SET_OWNER" && source.raw_os_error() == Some(libc::EBUSY))
}

#[test]
fn a_back_end_has_one_owner_who_gives_it_away_and_takes_it_back() {
    let net = Net::new(3);
    let tap = net.open();
    let (memory, _ram) = ram(PAGES);
    let mut guest = Guest::new(&memory);
    let vhost = open_vhost("net");
    let old = Host::net(vhost.try_clone().unwrap(), &tap, &memory);
    let new = Host::net(vhost, &tap, &memory);
    old.start_anew(&guest);
    let error = new.device.lock().unwrap().own().unwrap_err();
    assert!(busy(&error), "{error:?}");

    let mut notifier = VhostNotifier::new(old.device.clone());
    let setup = |mode| Setup {
        mode,
        migration: MigrationId::default(),
    };
    notifier.setup(&setup(Mode::Normal)).unwrap();
    notifier.failed();
    assert!(
        old.device.lock().unwrap().is_running(),
        "nothing in mode normal"
    );
    let error = notifier.setup(&setup(Mode::CprTransfer)).unwrap_err();
    assert!(error.to_string().contains("still works"), "{error}");
    notifier.failed();

    old.device.lock().unwrap().stop().unwrap();
    let saved = old.device.lock().unwrap().save().unwrap();
    notifier.setup(&setup(Mode::CprTransfer)).unwrap();
    {
        let mut device = new.device.lock().unwrap();
        device.restore(&saved).unwrap();
        device.start().unwrap();
    }
    let error = old.device.lock().unwrap().own().unwrap_err();
    assert!(busy(&error), "{error:?}");
    net.host_sends(1);
    let (slot, packet) = until("a packet from the new owner", || guest.take());
    assert_eq!(number_in(&packet), Some(1));
    guest.offer(slot);

    // The new one fails: it hands back first, then the old one hears of it. What the new one did is in the rings, and in what it saved.
    new.device.lock().unwrap().stop().unwrap();
    let saved = new.device.lock().unwrap().save().unwrap();
    VhostNotifier::new(new.device.clone()).incoming_failed(MigrationId::default());
    notifier.failed();
    {
        let mut device = old.device.lock().unwrap();
        device.restore(&saved).unwrap();
        device.start().unwrap();
    }
    net.host_sends(2);
    let (_, packet) = until("a packet from the old owner", || guest.take());
    assert_eq!(number_in(&packet), Some(2));
    assert!(busy(&new.device.lock().unwrap().own().unwrap_err()));
}

/// How many packets the host has received over a tap.
pub(crate) fn received(tap: &Tap) -> u64 {
    let path = format!("/sys/class/net/{}/statistics/rx_packets", tap.name());
    std::fs::read_to_string(path)
        .unwrap()
        .trim()
        .parse()
        .unwrap()
}

#[test]
fn a_network_interface_moves_with_its_vm_and_is_announced_where_it_arrives() {
    load_for("/dev/vhost-net", "vhost_net");
    let taps = [4, 5].map(|number| Tap::new(&format!("10.98.{number}.1/24")));
    let on = |tap: &Tap| {
        let net = format!("tap={},mac=52:54:00:12:34:56", tap.name());
        Launch::default().with(&["--net", &net])
    };
    let machine = Machine::emulated(Accel::Soft);
    let mut vm = machine.start_source(on(&taps[0]));
    vm.warm_up();
    let mut target = machine.start_target("tcp:127.0.0.1:0", on(&taps[1]));
    let before = received(&taps[1]);
    vm.move_to(&mut target);
    until("the announcements", || {
        (received(&taps[1]) >= before + 2).then_some(())
    });
}

const CID: u32 = 4242;
const OP_REQUEST: u16 = 1;
const OP_RESPONSE: u16 = 2;
const OP_RW: u16 = 5;

/// A packet of a socket device, from `port` of the guest to port [`PORT`] of the host.
fn vsock_packet(port: u32, op: u16, data: &[u8]) -> Vec<u8> {
    let mut packet = Vec::new();
    packet.extend_from_slice(&u64::from(CID).to_le_bytes());
    packet.extend_from_slice(&2_u64.to_le_bytes());
    packet.extend_from_slice(&port.to_le_bytes());
    packet.extend_from_slice(&u32::from(PORT).to_le_bytes());
    packet.extend_from_slice(&u32::try_from(data.len()).unwrap().to_le_bytes());
    packet.extend_from_slice(&1_u16.to_le_bytes());
    packet.extend_from_slice(&op.to_le_bytes());
    packet.extend_from_slice(&0_u32.to_le_bytes());
    // Room at our side, and how much of it was used and is free again.
    packet.extend_from_slice(&(1_u32 << 20).to_le_bytes());
    packet.extend_from_slice(&0_u32.to_le_bytes());
    packet.extend_from_slice(data);
    packet
}

/// Waits for a packet with `op`; its data, and the page that it came in.
fn vsock_take(guest: &mut Guest, op: u16) -> (u64, Vec<u8>) {
    until(format_args!("a packet {op}"), || {
        let (slot, packet) = guest.take()?;
        let ours = packet[30..32] == op.to_le_bytes();
        ours.then(|| (Guest::page(slot, false), packet[44..].to_vec()))
    })
}

pub(crate) fn vsock_host(memory: &VhostMemory) -> Host {
    let vhost = open_vhost("vsock");
    let cid = u64::from(CID);
    Host::new(|queues| VhostDevice::vsock("vsock/0", vhost, cid, memory.clone(), queues))
}

fn connect(listener: &Socket, host: &Host, guest: &mut Guest, slot: u16) -> Socket {
    // Of its own for each: the host remembers the others for a while.
    guest.send(slot, &vsock_packet(slot.into(), OP_REQUEST, &[]));
    host.kick();
    let connection = until("a connection", || match listener.accept() {
        Ok((connection, _)) => Some(connection),
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => None,
        Err(error) => panic!("{error}"),
    });
    connection.set_nonblocking(false).unwrap();
    vsock_take(guest, OP_RESPONSE);
    connection
        .set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    connection
}

#[test]
fn sockets_go_on_after_a_stop_and_anew_after_a_move_and_their_buffers_are_in_the_log() {
    load("vhost_vsock");
    let listener = Socket::new(Domain::VSOCK, Type::STREAM, None).unwrap();
    listener.bind(&SockAddr::vsock(2, u32::from(PORT))).unwrap();
    listener.listen(1).unwrap();
    listener.set_nonblocking(true).unwrap();
    let (memory, first_ram) = ram(PAGES);
    let mut guest = Guest::new(&memory);
    let host = vsock_host(&memory);
    host.start_anew(&guest);
    let mut connection = connect(&listener, &host, &mut guest, 0);

    let mut own = VhostLog::new(memory.clone(), vec![host.device.clone()]);
    let all = dirty_logs(std::slice::from_ref(&host.device), memory, &first_ram).unwrap();
    let mut all = UnitedLog::new(all);
    for turn in 0..3_u8 {
        // Once with the back end's own log, then with what makes up for it.
        let log: &mut dyn DirtyLog = if turn == 0 { &mut own } else { &mut all };
        log.start().unwrap();
        let mut map = first_ram.empty_map();
        log.fetch(&mut map).unwrap();
        map.clear();
        host.device.lock().unwrap().stop().unwrap();
        connection.write_all(&[turn; 5]).unwrap();
        assert!(guest.take().is_none(), "stopped");
        host.device.lock().unwrap().start().unwrap();
        let (page, data) = vsock_take(&mut guest, OP_RW);
        assert_eq!(data, [turn; 5]);
        host.device.lock().unwrap().stop().unwrap();
        log.fetch(&mut map).unwrap();
        let seen: BTreeSet<_> = marked(&map, PAGES).into_iter().collect();
        assert!(seen.contains(&guest.to.used_page()), "{seen:?}");
        if turn == 0 {
            assert!(
                !seen.contains(&page),
                "this kernel notes buffers too: logs_all_writes can say so"
            );
        } else {
            let rings = [guest.to.used_page(), guest.from.used_page()];
            let mut expected = BTreeSet::from(rings);
            expected.insert(page);
            assert!(seen.contains(&page), "{seen:?}");
            assert!(seen.is_subset(&expected), "{seen:?}");
        }
        log.stop().unwrap();
        host.device.lock().unwrap().start().unwrap();
    }
    guest.send(1, &vsock_packet(0, OP_RW, b"before"));
    host.kick();
    let mut heard = [0; 6];
    connection.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"before");

    // To another host the rings move, and the connections do not.
    let saved = {
        let mut device = host.device.lock().unwrap();
        device.stop().unwrap();
        device.save().unwrap()
    };
    let (to, _ram) = ram(PAGES);
    copy(guest.to.memory(), &to);
    drop((own, all, host));
    let mut guest = guest.moved(&to);
    let host = vsock_host(&to);
    {
        let mut device = host.device.lock().unwrap();
        device.restore(&saved).unwrap();
        device.start().unwrap();
    }
    let mut connection = connect(&listener, &host, &mut guest, 2);
    guest.send(3, &vsock_packet(2, OP_RW, b"after"));
    host.kick();
    let mut heard = [0; 5];
    connection.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"after");
    connection.write_all(b"back").unwrap();
    assert_eq!(vsock_take(&mut guest, OP_RW).1, b"back");

    // A kernel that can give a socket device away does, another one says so while nothing has happened.
    let mut device = host.device.lock().unwrap();
    device.stop().unwrap();
    if let Err(error) = device.release() {
        assert!(error.to_string().contains("VHOST_RESET_OWNER"), "{error}");
        let reason = std::error::Error::source(&error).unwrap().to_string();
        assert!(reason.contains("this kernel cannot"), "{reason}");
        device.start().unwrap();
        drop(device);
        connection.write_all(b"more").unwrap();
        assert_eq!(vsock_take(&mut guest, OP_RW).1, b"more");
    }
}

/// A vDPA device in software. Gone on drop.
struct Vdpa;

impl Vdpa {
    fn new() -> Self {
        load("vhost_vdpa");
        load("vdpa_sim_net");
        run(
            "vdpa",
            &["dev", "add", "name", "moves", "mgmtdev", "vdpasim_net"],
        );
        Self
    }

    /// Only one process may have it open.
    fn open(&self, memory: &VhostMemory) -> Host {
        let vhost = File::options()
            .read(true)
            .write(true)
            .open("/dev/vhost-vdpa-0")
            .unwrap();
        Host::new(|[to, from]| {
            let (kick, call) = events();
            // The last one is for control, which this driver has not accepted.
            let queues = vec![to, from, Queue::new(kick, call)];
            VhostDevice::vdpa("vdpa/0", vhost, memory.clone(), queues)
        })
    }
}

impl Drop for Vdpa {
    fn drop(&mut self) {
        let _ = crate::command::attempt("vdpa", &["dev", "del", "moves"]);
    }
}

#[test]
fn a_vdpa_device_goes_on_where_it_was_and_blocks_a_guest_that_runs() {
    let vdpa = Vdpa::new();
    let (memory, _ram) = ram(PAGES);
    let mut guest = Guest::new(&memory);
    let mut host = vdpa.open(&memory);
    {
        let mut device = host.device.lock().unwrap();
        // VERSION_1, and that its addresses are those of a platform.
        let features = device.offered() & (VERSION_1 | 1 << 33);
        device.set_features(features).unwrap();
        let [to, from] = guest.rings();
        device.set_rings(&[to, from, None]).unwrap();
        device.start().unwrap();
    }
    let mut notifier = VhostNotifier::new(host.device.clone());
    let setup = Setup {
        mode: Mode::Normal,
        migration: MigrationId::default(),
    };
    let error = notifier.setup(&setup).unwrap_err().to_string();
    assert!(
        error.contains("vdpa/0") && error.contains("unplug it"),
        "{error}"
    );
    notifier.failed();
    drop(notifier);
    // The device gives back every packet to everybody.
    for turn in 0..5_u8 {
        for slot in 0..3 {
            let mut packet = vec![0; HEADER];
            packet.extend_from_slice(&[0xff; 6]);
            packet.extend_from_slice(&[turn * 3 + u8::try_from(slot).unwrap(); 60]);
            guest.send(slot, &packet);
        }
        host.kick();
        let saved = {
            let mut device = host.device.lock().unwrap();
            device.stop().unwrap();
            device.save().unwrap()
        };
        let (to, _ram) = ram(PAGES);
        copy(guest.to.memory(), &to);
        drop(host);
        guest = guest.moved(&to);
        host = vdpa.open(&to);
        {
            let mut device = host.device.lock().unwrap();
            device.restore(&saved).unwrap();
            device.start().unwrap();
        }
        for number in 0..3 {
            let (slot, packet) = until("a packet", || guest.take());
            assert_eq!(packet[HEADER + 6], turn * 3 + number, "each once, in order");
            guest.offer(slot);
        }
        host.kick();
        until("all sent", || {
            while guest.from.answer().is_some() {}
            (guest.from.open() == 0).then_some(())
        });
        assert!(guest.take().is_none());
    }
}
