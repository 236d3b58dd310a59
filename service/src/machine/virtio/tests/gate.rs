//! As long as it is not certain that the guest runs here, no device touches anything of it; what it is given meanwhile is not lost.

use super::*;
use crate::machine::virtio::saved::QueueV1;
use crate::machine::virtio::tap_net::TapNet;

/// Enough for a thread that would serve.
const A_WHILE: Duration = Duration::from_millis(20);

impl Rig {
    fn used(&self) -> u16 {
        self.peek(USED + 2)
    }

    fn saved(&self) -> Vec<TransportV1> {
        let sections = self.bus.save().unwrap();
        sections
            .iter()
            .map(|section| decode(section).unwrap())
            .collect()
    }
}

/// A disk that was asked to write, while it stood.
fn asked_to_write() -> Rig {
    let rig = Rig::new();
    rig.disks.activate().unwrap();
    rig.set_up();
    for _ in 0..5 {
        assert_eq!(rig.request(0, 0, 512), 0);
    }
    rig.bus.stop().unwrap();
    rig.poke(DATA, *b"vmferry!");
    rig.submit(1, 7, 512);
    rig
}

#[test]
fn a_device_that_was_not_let_serve_has_touched_nothing_and_is_where_it_was() {
    let rig = asked_to_write();
    let before = rig.saved();
    for _ in 0..20 {
        rig.bus.prepare().unwrap();
        rig.write(QUEUE_NOTIFY, 0);
        std::thread::sleep(Duration::from_millis(1));
        rig.bus.stand_down();
        assert_eq!((rig.used(), rig.saved()), (5, before.clone()));
    }
    assert_eq!(rig.on_image(7 * 512), [0; 8]);
    // A pause does the same.
    rig.bus.prepare().unwrap();
    rig.bus.stop().unwrap();
    assert_eq!((rig.used(), rig.saved()), (5, before));
    rig.bus.start().unwrap();
    assert_eq!(rig.wait(), 0);
    assert_eq!((rig.used(), rig.on_image(7 * 512)), (6, *b"vmferry!"));
}

#[test]
fn what_comes_while_the_gate_is_shut_is_served_when_it_opens() {
    let rig = asked_to_write();
    rig.bus.prepare().unwrap();
    rig.write(QUEUE_NOTIFY, 0);
    std::thread::sleep(A_WHILE);
    assert_eq!((rig.used(), rig.on_image(7 * 512)), (5, [0; 8]));
    rig.bus.open();
    assert_eq!(rig.wait(), 0);
    assert_eq!((rig.used(), rig.on_image(7 * 512)), (6, *b"vmferry!"));
    // Once is enough.
    rig.bus.open();
    assert_eq!(rig.request(0, 7, 512), 0);
}

#[test]
fn a_driver_that_is_sooner_than_the_gate_has_its_device_as_ever() {
    let rig = asked_to_write();
    rig.bus.prepare().unwrap();
    assert_eq!(rig.read(0x60) & 1, 1, "it looks as if it worked");
    rig.write(0x70, 0);
    rig.poke(AVAIL, 0_u64);
    rig.poke(USED, 0_u64);
    rig.set_up();
    assert_eq!(rig.request(0, 7, 512), 0);
    assert_eq!(rig.on_image(7 * 512), [0; 8], "what was asked before it");
    rig.bus.open();
    assert_eq!(rig.request(0, 7, 512), 0);
    assert_eq!(rig.used(), 2);
}

/// Disks, of which the first is the one that is driven, and a network interface without a tap. All their drivers are ready.
fn with_others() -> Rig {
    with_disks(DEVICES_MAX - 1, |mut devices| {
        let net: NetConfig = "tap=none,vhost=off,id=0".parse().unwrap();
        devices.push(Box::new(TapNet::waiting(&net)));
        devices
    })
}

/// What `devices` makes of so many disks, of which the first is the one that is driven. All their drivers are ready, and none is served.
pub(super) fn with_disks(
    count: usize,
    devices: impl FnOnce(Vec<Box<dyn Backend>>) -> Vec<Box<dyn Backend>>,
) -> Rig {
    let folder = TempDir::with_prefix("vmferry-virtio-").unwrap();
    let mut configs = Vec::new();
    for number in 0..count {
        let path = folder.path().join(match number {
            0 => "image".to_owned(),
            _ => number.to_string(),
        });
        File::create(&path).unwrap().set_len(IMAGE_BYTES).unwrap();
        configs.push(path.to_str().unwrap().parse().unwrap());
    }
    crate::machine::disk::name_disks(&mut configs).unwrap();
    let (disks, ram) = (
        Disks::open(&configs).unwrap(),
        MachineRam::create(RAM_BYTES).unwrap(),
    );
    let bus = Bus::new(devices(backends(&disks)), &ram).unwrap();
    let rig = Rig {
        folder,
        ram,
        disks,
        bus,
    };
    rig.disks.activate().unwrap();
    rig.set_up();
    rig.bus.stop().unwrap();
    let mut sections = rig.bus.save().unwrap();
    let mut rings = (0x20_0000..).step_by(0x1_0000);
    for section in &mut sections[1..] {
        let mut saved: TransportV1 = decode(section).unwrap();
        (saved.status, saved.driver_features) = (15, F_VERSION_1);
        for (queue, at) in saved.queues.iter_mut().zip(&mut rings) {
            *queue = QueueV1 {
                ready: true,
                desc_gpa: at,
                avail_gpa: at + 0x4000,
                used_gpa: at + 0x8000,
                ..queue.clone()
            };
        }
        *section = encode(&section.name, &saved).unwrap();
    }
    rig.bus.load(&sections.iter().collect::<Vec<_>>()).unwrap();
    rig
}

#[test]
fn no_device_serves_if_another_one_cannot() {
    let rig = with_others();
    rig.poke(DATA, *b"vmferry!");
    rig.submit(1, 7, 512);
    let before = rig.saved();
    for _ in 0..100 {
        let error = rig.bus.prepare().unwrap_err();
        let MachineError::Host { op, .. } = &error else {
            panic!("{error}");
        };
        assert!(op.contains("virtio-net/0"), "{error}");
        assert_eq!((rig.used(), rig.saved()), (0, before.clone()));
    }
    assert_eq!(rig.on_image(7 * 512), [0; 8]);
    // The guest runs here all the same: it has its disk, and is told of the other one.
    rig.bus.work_again();
    assert_eq!(rig.wait(), 0);
    let mut status = [0; 4];
    let window = WINDOWS_GPA + WINDOW_BYTES * (DEVICES_MAX as u64 - 1);
    assert!(rig.bus.read(window + 0x70, &mut status));
    assert_eq!(u32::from_le_bytes(status) & 64, 64, "to be reset");
}
