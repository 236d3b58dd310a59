//! The network interface of the built-in machine, with a driver that has no guest: it sets the device up through its registers, moves to
//! another machine on another tap, and is found there.

use vm_memory::{Bytes, GuestAddress};
use vmferry::machine::ram::MachineRam;
use vmferry::machine::virtio::saved::TransportV1;
use vmferry::machine::virtio::{Bus, OutsideConfig, QUEUE_NOTIFY, WINDOWS_GPA};
use vmferry_devices::saved::{decode, encode};
use vmferry_devices::vhost::{Ring, VhostMemory};
use vmferry_tests::virtqueue::copy;
use vmferry_transport::memory::{DirtyLog, UnitedLog};
use vmferry_transport::units::{BlockId, PAGE_SIZE, PageIndex};

use crate::harness::until;
use crate::modules::load_for;
use crate::vhost::{GUEST_MAC, Guest, Net, number_in, received};

const MEM: u64 = 8 << 20;
const DRIVER_FEATURES: u64 = 0x20;
const DRIVER_FEATURES_SEL: u64 = 0x24;
const QUEUE_SEL: u64 = 0x30;
const QUEUE_SIZE: u64 = 0x38;
const QUEUE_READY: u64 = 0x44;
const INTERRUPT_STATUS: u64 = 0x60;
const STATUS: u64 = 0x70;
const RING_REGISTERS: u64 = 0x80;
const CONFIG: u64 = 0x100;
const NEEDS_RESET: u32 = 64;
/// Flag of a used ring.
const NO_NOTIFY: u16 = 1;

/// A machine's memory and its only device.
struct Side {
    ram: MachineRam,
    memory: VhostMemory,
    bus: Bus,
}

impl Side {
    fn new(net: &Net, words: &str) -> Self {
        let config = format!("tap={}{words}", net.tap().name());
        let mut outside = OutsideConfig {
            nets: vec![config.parse().unwrap()],
            ..OutsideConfig::default()
        };
        outside.name().unwrap();
        let ram = MachineRam::create(MEM).unwrap();
        let bus = Bus::new(outside.backends(&ram, None).unwrap(), &ram).unwrap();
        Self {
            memory: VhostMemory::new(ram.regions().to_vec()).unwrap(),
            ram,
            bus,
        }
    }

    fn set(&self, register: u64, value: u32) {
        assert!(self.bus.write(WINDOWS_GPA + register, &value.to_le_bytes()));
    }

    fn get(&self, register: u64) -> u32 {
        let mut value = [0; 4];
        assert!(self.bus.read(WINDOWS_GPA + register, &mut value));
        u32::from_le_bytes(value)
    }

    fn mac(&self) -> [u8; 6] {
        let mut mac = [0; 6];
        assert!(self.bus.read(WINDOWS_GPA + CONFIG, &mut mac));
        mac
    }

    /// What a driver does first.
    fn set_up(&self, guest: &Guest) {
        for status in [0, 1, 3] {
            self.set(STATUS, status);
        }
        // VERSION_1; the address, and packets that may fill several chains.
        for (half, features) in [(0, 1 << 5 | 1 << 15), (1, 1)] {
            self.set(DRIVER_FEATURES_SEL, half);
            self.set(DRIVER_FEATURES, features);
        }
        self.set(STATUS, 11);
        assert_eq!(self.get(STATUS), 11, "features are agreed on");
        for (queue, ring) in [(0, guest.to.ring()), (1, guest.from.ring())] {
            let Ring {
                size,
                desc,
                avail,
                used,
                base: _,
            } = ring;
            self.set(QUEUE_SEL, queue);
            self.set(QUEUE_SIZE, size.into());
            for (number, address) in (0..).zip([desc, avail, used]) {
                // All of them are low.
                let address = u32::try_from(address).unwrap();
                self.set(RING_REGISTERS + number * 0x10, address);
            }
            self.set(QUEUE_READY, 1);
        }
        self.set(STATUS, 15);
        assert_eq!(self.get(STATUS) & NEEDS_RESET, 0, "it works");
    }

    /// As Linux does: not if a back end has said that it looks by itself, which the kernel's may leave behind.
    fn kick(&self, guest: &Guest) {
        for (queue, ring) in [(0, guest.to.ring()), (1, guest.from.ring())] {
            let flags = GuestAddress(ring.used);
            let flags: u16 = self.memory.memory().read_obj(flags).unwrap();
            if flags & NO_NOTIFY == 0 {
                self.set(QUEUE_NOTIFY, queue);
            }
        }
    }

    /// Both directions work.
    fn talk(&self, guest: &mut Guest, net: &Net, subnet: u8, number: u32) {
        net.host_sends(number);
        let slot = until("a packet to the guest", || {
            let (slot, packet) = guest.take()?;
            if number_in(&packet) == Some(number) {
                return Some(slot);
            }
            guest.offer(slot);
            None
        });
        guest.offer(slot);
        guest.send(0, &net.packet(subnet, number));
        self.kick(guest);
        until("a packet from the guest", || {
            net.host_hears().map(|heard| assert_eq!(heard, number))
        });
        until("its answer", || guest.from.answer());
        assert_eq!(self.get(INTERRUPT_STATUS), 1);
    }
}

#[test]
fn an_interface_moves_to_another_machine_with_its_rings_and_its_address() {
    load_for("/dev/vhost-net", "vhost_net");
    let nets = [7, 8].map(Net::new);
    let source = Side::new(&nets[0], ",mac=52:54:00:00:00:02");
    let mut guest = Guest::new(&source.memory);
    source.set_up(&guest);
    source.talk(&mut guest, &nets[0], 7, 1);
    source.bus.stop().unwrap();
    source.bus.start().unwrap();
    source.talk(&mut guest, &nets[0], 7, 2);

    let mut log = UnitedLog::new(source.bus.dirty_logs().unwrap());
    log.start().unwrap();
    source.talk(&mut guest, &nets[0], 7, 3);
    source.bus.stop().unwrap();
    let mut map = source.ram.blocks().empty_map();
    log.fetch(&mut map).unwrap();
    let written = map.block(BlockId(0));
    for page in [guest.to.used_page(), guest.from.used_page()] {
        assert!(written.contains(PageIndex(page)));
    }
    // Where the packets were; nothing else but the rings.
    let buffers = map.count().0 - 2;
    assert!((1..=2).contains(&buffers), "{map:?}");
    log.stop().unwrap();

    let sections = source.bus.save().unwrap();
    let target = Side::new(&nets[1], "");
    assert_ne!(target.mac(), GUEST_MAC);
    copy(&source.memory, &target.memory);
    target
        .bus
        .load(&sections.iter().collect::<Vec<_>>())
        .unwrap();
    assert_eq!(target.mac(), GUEST_MAC, "the guest keeps its address");
    drop(source);
    let mut guest = guest.moved(&target.memory);
    target.bus.start().unwrap();
    target.talk(&mut guest, &nets[1], 8, 4);
    let before = received(nets[1].tap());
    let announcers = target.bus.announcers();
    assert_eq!(announcers.len(), 1);
    announcers[0].announce();
    until("the announcement", || {
        (received(nets[1].tap()) > before).then_some(())
    });

    // A machine without the device, or with a broken ring, says so before anything works.
    target.bus.stop().unwrap();
    target.set(STATUS, 0);
    for (queue, at) in [(0, MEM - PAGE_SIZE), (1, MEM)] {
        target.set(QUEUE_SEL, queue);
        target.set(RING_REGISTERS, u32::try_from(at).unwrap());
        target.set(QUEUE_READY, 1);
    }
    for (half, features) in [(0, 0), (1, 1)] {
        target.set(DRIVER_FEATURES_SEL, half);
        target.set(DRIVER_FEATURES, features);
    }
    target.set(STATUS, 15);
    assert_ne!(target.get(STATUS) & NEEDS_RESET, 0);
}

#[test]
fn an_interface_moves_from_the_kernel_to_the_vmm_and_back_and_goes_on_where_it_was() {
    load_for("/dev/vhost-net", "vhost_net");
    let subnets = [14, 15, 16];
    let nets = subnets.map(Net::new);
    let mut side = Side::new(&nets[0], ",vhost=on,mac=52:54:00:00:00:02");
    let mut guest = Guest::new(&side.memory);
    side.set_up(&guest);
    side.talk(&mut guest, &nets[0], subnets[0], 1);
    for (place, words) in [(1, ",vhost=off"), (2, ",vhost=on")] {
        let (net, subnet) = (&nets[place], subnets[place]);
        side.bus.stop().unwrap();
        // It is sent after the move, once.
        guest.send(1, &net.packet(subnet, 7));
        let sections = side.bus.save().unwrap();
        let next = Side::new(net, words);
        copy(&side.memory, &next.memory);
        next.bus.load(&sections.iter().collect::<Vec<_>>()).unwrap();
        guest = guest.moved(&next.memory);
        side = next;
        side.bus.start().unwrap();
        until("what waited", || {
            net.host_hears().map(|heard| assert_eq!(heard, 7))
        });
        until("its answer", || guest.from.answer());
        for number in 2..20 {
            side.talk(&mut guest, net, subnet, number);
        }
    }
}

#[test]
fn a_packet_that_came_with_the_guest_is_part_of_it_until_the_kernels_interface_has_worked() {
    load_for("/dev/vhost-net", "vhost_net");
    let net = Net::new(17);
    let side = Side::new(&net, ",vhost=on,mac=52:54:00:00:00:02");
    let guest = Guest::new(&side.memory);
    side.set_up(&guest);
    side.bus.stop().unwrap();
    let saved = || {
        let sections = side.bus.save().unwrap();
        (
            decode::<TransportV1>(&sections[0]).unwrap(),
            sections[0].name.clone(),
        )
    };
    let (mut state, name) = saved();
    state.undelivered = Some(net.packet(17, 1));
    side.bus.load(&[&encode(&name, &state).unwrap()]).unwrap();
    // The source has the guest after all, and whoever is next may have packets of its own.
    for _ in 0..2 {
        side.bus.prepare().unwrap();
        side.bus.stand_down();
        assert_eq!(saved().0.undelivered, state.undelivered);
    }
    side.bus.start().unwrap();
    side.bus.stop().unwrap();
    assert_eq!(saved().0.undelivered, None);
}
