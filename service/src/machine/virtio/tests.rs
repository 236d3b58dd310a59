//! Transport, worker and disk with a driver of our own, without a guest. Whatever that driver does must be survived (I5).

pub(crate) mod broken;
mod gate;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};
use vmferry_devices::saved::{decode, encode};
use vmferry_devices::vmm_writes::VmmWriteLog;
use vmferry_transport::memory::DirtyLog;

use super::*;
use crate::machine::MachineError;
use crate::machine::disk::DiskConfig;
use crate::machine::ram::MachineRam;
use crate::machine::virtio::saved::TransportV1;

const RAM_BYTES: u64 = 8 << 20;
const IMAGE_BYTES: u64 = 1 << 20;
const DESC: u64 = 0x10_0000;
const AVAIL: u64 = 0x10_1000;
const USED: u64 = 0x10_2000;
const HEADER: u64 = 0x10_3000;
const STATUS: u64 = 0x10_4000;
const DATA: u64 = 0x11_0000;
const PATIENCE: Duration = Duration::from_secs(60);

const WRITE_ONLY: u16 = 2;
const NEXT: u16 = 1;

/// A machine's devices and RAM, and the image behind the only disk.
struct Rig {
    folder: TempDir,
    ram: MachineRam,
    disks: Disks,
    bus: Bus,
}

impl Rig {
    fn new() -> Self {
        let folder = TempDir::with_prefix("vmferry-virtio-").unwrap();
        let image = File::create(folder.path().join("image")).unwrap();
        image.set_len(IMAGE_BYTES).unwrap();
        Self::on(folder, MachineRam::create(RAM_BYTES).unwrap(), "")
    }

    fn on(folder: TempDir, ram: MachineRam, options: &str) -> Self {
        let path = folder.path().join("image");
        let mut configs: Vec<DiskConfig> =
            vec![format!("{}{options}", path.display()).parse().unwrap()];
        crate::machine::disk::name_disks(&mut configs).unwrap();
        let disks = Disks::open(&configs).unwrap();
        let bus = Bus::new(backends(&disks), &ram).unwrap();
        Self {
            folder,
            ram,
            disks,
            bus,
        }
    }

    fn read(&self, register: u64) -> u32 {
        let mut word = [0; 4];
        assert!(self.bus.read(WINDOWS_GPA + register, &mut word));
        u32::from_le_bytes(word)
    }

    fn write(&self, register: u64, value: u32) {
        assert!(self.bus.write(WINDOWS_GPA + register, &value.to_le_bytes()));
    }

    fn poke<T: vm_memory::ByteValued>(&self, gpa: u64, value: T) {
        self.ram
            .memory()
            .write_obj(value, GuestAddress(gpa))
            .unwrap();
    }

    fn peek<T: vm_memory::ByteValued>(&self, gpa: u64) -> T {
        self.ram.memory().read_obj(GuestAddress(gpa)).unwrap()
    }

    /// As a driver does it, with a queue of 8.
    fn set_up(&self) {
        assert_eq!(self.read(0), u32::from_le_bytes(*b"virt"));
        assert_eq!((self.read(4), self.read(8)), (2, 2));
        self.write(0x70, 0);
        self.write(0x70, 3);
        self.write(0x14, 1);
        assert_eq!(self.read(0x10) & 1, 1, "VERSION_1");
        self.write(0x24, 1);
        self.write(0x20, 1);
        self.write(0x24, 0);
        self.write(0x20, 1 << 9);
        self.write(0x70, 11);
        assert_eq!(self.read(0x70), 11);
        self.write(0x30, 0);
        assert_eq!(self.read(0x34), 128);
        self.write(0x38, 8);
        for (register, gpa) in [(0x80, DESC), (0x90, AVAIL), (0xa0, USED)] {
            self.write(register, u32::try_from(gpa).unwrap());
            self.write(register + 4, 0);
        }
        self.write(0x44, 1);
        self.write(0x70, 15);
        assert_eq!(self.read(0x70), 15);
    }

    fn describe(&self, index: u64, gpa: u64, len: u32, flags: u16) {
        let at = DESC + index * 16;
        self.poke(at, gpa);
        self.poke(at + 8, len);
        self.poke(at + 12, flags);
        self.poke(at + 14, u16::try_from(index + 1).unwrap());
    }

    /// Makes a request available and kicks.
    fn submit(&self, kind: u32, sector: u64, bytes: u32) {
        self.poke(HEADER, kind);
        self.poke(HEADER + 8, sector);
        self.poke(STATUS, 0xff_u8);
        let to_guest = if kind == 0 { WRITE_ONLY } else { 0 };
        self.describe(0, HEADER, 16, NEXT);
        self.describe(1, DATA, bytes, NEXT | to_guest);
        self.describe(2, STATUS, 1, WRITE_ONLY);
        let next: u16 = self.peek(AVAIL + 2);
        self.poke(AVAIL + 4 + u64::from(next % 8) * 2, 0_u16);
        self.poke(AVAIL + 2, next.wrapping_add(1));
        self.write(QUEUE_NOTIFY, 0);
    }

    /// Waits until everything that was submitted is used; returns the last status.
    fn wait(&self) -> u8 {
        let start = Instant::now();
        while self.peek::<u16>(USED + 2) != self.peek::<u16>(AVAIL + 2) {
            assert!(start.elapsed() < PATIENCE, "the request does not end");
            std::thread::yield_now();
        }
        self.peek(STATUS)
    }

    fn request(&self, kind: u32, sector: u64, bytes: u32) -> u8 {
        self.submit(kind, sector, bytes);
        self.wait()
    }

    fn on_image<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        let image = File::open(self.folder.path().join("image")).unwrap();
        image.read_exact_at(&mut bytes, at).unwrap();
        bytes
    }
}

#[test]
fn a_driver_reads_and_writes_the_image_and_only_its_sectors() {
    let rig = Rig::new();
    rig.disks.activate().unwrap();
    rig.set_up();
    assert_eq!(rig.read(0x100), u32::try_from(IMAGE_BYTES / 512).unwrap());
    rig.poke(DATA, *b"vmferry!");
    assert_eq!(rig.request(1, 7, 4096), 0);
    assert_eq!(rig.on_image(7 * 512), *b"vmferry!");
    rig.poke(DATA, 0_u64);
    assert_eq!(rig.request(0, 7, 512), 0);
    assert_eq!(rig.peek::<[u8; 8]>(DATA), *b"vmferry!");
    assert_eq!(rig.peek::<u32>(USED + 4 + 8 + 4), 513, "bytes written");
    assert_eq!(rig.request(4, 0, 0), 0, "flush");

    assert_eq!(rig.request(1, IMAGE_BYTES / 512, 512), 1, "beyond the end");
    assert_eq!(rig.request(1, u64::MAX, 512), 1);
    assert_eq!(rig.request(1, 0, 100), 1, "no whole sector");
    assert_eq!(rig.request(99, 0, 512), 2, "unknown");
    assert_eq!(
        std::fs::metadata(rig.folder.path().join("image"))
            .unwrap()
            .len(),
        IMAGE_BYTES
    );
}

#[test]
fn what_a_device_writes_is_in_the_dirty_log() {
    let rig = Rig::new();
    rig.disks.activate().unwrap();
    rig.set_up();
    rig.poke(DATA, *b"vmferry!");
    assert_eq!(rig.request(1, 0, 4096), 0);
    let mut log = VmmWriteLog::new(rig.ram.regions().to_vec()).unwrap();
    log.start().unwrap();
    let mut map = rig.ram.blocks().empty_map();
    log.fetch(&mut map).unwrap();
    // Everything submitted beforehand, so that the device's writes are the only ones afterwards.
    rig.bus.stop().unwrap();
    rig.submit(0, 0, 8192);
    log.fetch(&mut map).unwrap();
    rig.bus.start().unwrap();
    assert_eq!(rig.wait(), 0);
    rig.bus.stop().unwrap();
    let mut map = rig.ram.blocks().empty_map();
    log.fetch(&mut map).unwrap();
    let pages: Vec<u64> = map
        .runs()
        .flat_map(|run| run.start.0..run.start.0 + run.count.0)
        .collect();
    assert_eq!(
        pages,
        [USED, STATUS, DATA, DATA + 4096].map(|gpa| gpa / 4096)
    );
}

#[test]
fn a_stopped_device_serves_nothing_and_forgets_nothing() {
    let rig = Rig::new();
    rig.disks.activate().unwrap();
    rig.set_up();
    rig.bus.stop().unwrap();
    rig.poke(DATA, *b"vmferry!");
    rig.submit(1, 0, 512);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(rig.peek::<u16>(USED + 2), 0);
    rig.disks.inactivate().unwrap();
    rig.disks.activate().unwrap();
    rig.bus.start().unwrap();
    assert_eq!(rig.wait(), 0);
    assert_eq!(rig.on_image(0), *b"vmferry!");
}

#[test]
fn a_device_goes_on_behind_another_bus() {
    let source = Rig::new();
    source.disks.activate().unwrap();
    source.set_up();
    for _ in 0..13 {
        assert_eq!(source.request(0, 0, 512), 0);
    }
    source.bus.stop().unwrap();
    source.poke(DATA, *b"moved...");
    source.submit(1, 3, 512);
    let sections = source.bus.save().unwrap();
    source.disks.inactivate().unwrap();
    let Rig { folder, ram, .. } = source;

    let target = Rig::on(folder, ram, "");
    assert_eq!(target.bus.schemas().len(), sections.len());
    target
        .bus
        .load(&sections.iter().collect::<Vec<_>>())
        .unwrap();
    target.disks.activate().unwrap();
    target.bus.start().unwrap();
    assert_eq!(target.wait(), 0);
    assert_eq!(target.on_image(3 * 512), *b"moved...");
    assert_eq!(target.peek::<u16>(USED + 2), 14);
    assert_eq!(target.request(0, 3, 512), 0);
}

#[test]
fn state_that_does_not_fit_is_refused_with_what_differs() {
    let source = Rig::new();
    source.disks.activate().unwrap();
    source.set_up();
    source.bus.stop().unwrap();
    let sections = source.bus.save().unwrap();
    let good: TransportV1 = decode(&sections[0]).unwrap();
    let target = Rig::new();
    type Change = fn(&mut TransportV1);
    let changes: [(Change, &str); 10] = [
        (|saved| saved.slot = 1, "window 1"),
        (|saved| saved.device_type = 1, "of type 1"),
        (|saved| saved.driver_features |= 1 << 40, "0x10000000000"),
        (|saved| saved.status = 0x1000, "0x1000"),
        (|saved| saved.status = 4, "without features"),
        (|saved| saved.queues.clear(), "0 queues"),
        (|saved| saved.queues[0].size = 3, "3 entries"),
        (|saved| saved.queues[0].size = 256, "at most 128"),
        (|saved| saved.queues[0].desc_gpa = u64::MAX - 15, "RAM"),
        (|saved| saved.config[0] ^= 1, "sectors"),
    ];
    for (change, part) in changes {
        let mut saved = good.clone();
        change(&mut saved);
        let section = encode("virtio-blk/disk0", &saved).unwrap();
        let error = target.bus.load(&[&section]).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains(part) && text.contains("virtio-blk/disk0"),
            "{text}"
        );
    }
    target.bus.load(&[&sections[0]]).unwrap();
}

#[test]
fn a_read_only_or_inactive_disk_is_never_written() {
    let Rig { folder, ram, .. } = Rig::new();
    let rig = Rig::on(folder, ram, ",ro");
    rig.disks.activate().unwrap();
    rig.set_up();
    rig.write(0x14, 0);
    assert_ne!(u64::from(rig.read(0x10)) & blk::F_READ_ONLY, 0);
    rig.poke(DATA, *b"vmferry!");
    assert_eq!(rig.request(1, 0, 512), 1);
    rig.disks.inactivate().unwrap();
    assert_eq!(rig.request(0, 0, 512), 1);
    assert_eq!(rig.on_image(0), [0; 8]);
}

#[test]
fn a_ring_that_runs_ahead_breaks_the_device_until_it_is_reset() {
    let rig = Rig::new();
    rig.disks.activate().unwrap();
    rig.set_up();
    rig.poke(AVAIL + 2, 500_u16);
    rig.write(QUEUE_NOTIFY, 0);
    // It is broken, and then says that something has changed.
    for (register, bit) in [(0x70, 64), (0x60, 2)] {
        let start = Instant::now();
        while rig.read(register) & bit == 0 {
            assert!(start.elapsed() < PATIENCE);
            std::thread::yield_now();
        }
    }
    rig.write(0x64, 2);
    assert_eq!(rig.read(0x60) & 2, 0);
    rig.bus.stop().unwrap();
    let sections = rig.bus.save().unwrap();
    rig.bus.load(&sections.iter().collect::<Vec<_>>()).unwrap();
    rig.bus.start().unwrap();
    assert_eq!(rig.read(0x70) & 64, 64, "also after a move");

    rig.poke(AVAIL + 2, 0_u16);
    rig.set_up();
    assert_eq!(rig.request(0, 0, 512), 0);
}

#[test]
fn rings_outside_of_ram_break_the_device_and_not_the_machine() {
    let rig = Rig::new();
    rig.disks.activate().unwrap();
    rig.set_up();
    rig.write(0x70, 0);
    rig.write(0x70, 3);
    rig.write(0x24, 1);
    rig.write(0x20, 1);
    rig.write(0x70, 11);
    rig.write(0x38, 8);
    rig.write(0x84, u32::MAX);
    rig.write(0x44, 1);
    rig.write(0x70, 15);
    assert_eq!(rig.read(0x70) & 64, 64);
    rig.bus.stop().unwrap();
    rig.bus.start().unwrap();
}

/// Goal: whatever a guest puts into rings, descriptors and registers, the device ends each request, can be stopped, and touches nothing
/// outside of RAM and image. Method: random words, many of them plausible.
#[test]
fn random_rings_and_registers_are_survived() {
    let rig = Rig::new();
    rig.disks.activate().unwrap();
    let mut state = 0x1234_5678_9abc_def1_u64;
    let mut random = move |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below
    };
    for round in 0..300 {
        rig.poke(USED, 0_u64);
        rig.poke(AVAIL, 0_u64);
        rig.set_up();
        for index in 0..8 {
            let gpa = match random(4) {
                0 => random(u64::MAX),
                1 => DESC + random(64),
                _ => DATA + random(RAM_BYTES - DATA),
            };
            let len = match random(3) {
                0 => 16,
                1 => 512 * random(64) as u32,
                _ => random(1 << 32) as u32,
            };
            rig.describe(index, gpa, len, random(8) as u16);
            rig.poke(DESC + index * 16 + 14, random(10) as u16);
            rig.poke(AVAIL + 4 + index * 2, random(10) as u16);
        }
        rig.poke(HEADER, random(9) as u32);
        rig.poke(HEADER + 8, random(IMAGE_BYTES / 256));
        rig.describe(random(8), HEADER, 16, NEXT);
        rig.poke(AVAIL + 2, random(10) as u16);
        for _ in 0..random(4) {
            rig.write(random(0x140) & !3, random(1 << 32) as u32);
        }
        rig.write(QUEUE_NOTIFY, 0);
        if round % 3 == 0 {
            rig.bus.stop().unwrap();
            let sections = rig.bus.save().unwrap();
            // What a guest has made of its device may be refused; it must not do harm.
            let _ = rig.bus.load(&sections.iter().collect::<Vec<_>>());
        }
    }
    rig.bus.stop().unwrap();
    rig.poke(USED, 0_u64);
    rig.poke(AVAIL, 0_u64);
    rig.set_up();
    assert_eq!(rig.request(0, 0, 512), 0);
}

#[test]
fn too_many_devices_are_refused() {
    let ram = MachineRam::create(RAM_BYTES).unwrap();
    let folder = TempDir::with_prefix("vmferry-virtio-").unwrap();
    let mut configs = Vec::new();
    for number in 0..=DEVICES_MAX {
        let path = folder.path().join(number.to_string());
        File::create(&path).unwrap();
        configs.push(path.to_str().unwrap().parse().unwrap());
    }
    crate::machine::disk::name_disks(&mut configs).unwrap();
    let disks = Disks::open(&configs).unwrap();
    let error = Bus::new(backends(&disks), &ram).unwrap_err();
    assert!(error.to_string().contains("at most 8"), "{error}");
}
