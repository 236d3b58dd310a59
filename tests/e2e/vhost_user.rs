//! Back ends in other processes: a driver works on a disk of QEMU's storage daemon, moves to another daemon on the same image, has
//! its writes logged, and survives the daemon's death.

use std::fs::File;
use std::os::unix::fs::FileExt;

use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};
use vmferry_devices::Device;
use vmferry_devices::vhost::user::{Lost, Requests, UserDevice};
use vmferry_devices::vhost::{Logs, Queue, VhostLog, VhostMemory};
use vmferry_tests::virtqueue::{Driver, copy, events, marked, ram};
use vmferry_transport::memory::DirtyLog;
use vmferry_transport::units::PAGE_SIZE;
use vmm_sys_util::eventfd::EventFd;

use std::sync::{Arc, Mutex};

use crate::harness::until;
use crate::storage::Daemon;

const PAGES: u64 = 256;
/// Requests of a slot have a page each for header, data and status, from here on.
const REQUESTS: u64 = 16 * PAGE_SIZE;
const SECTOR: u64 = 512;
const READ: u32 = 0;
const WRITE: u32 = 1;
const VERSION_1: u64 = 1 << 32;
const SIZE: u16 = 64;

fn image() -> TempDir {
    let dir = TempDir::new().unwrap();
    let image = File::create(dir.path().join("image")).unwrap();
    image.set_len(4 << 20).unwrap();
    dir
}

/// A disk with its driver.
struct Disk {
    device: Arc<Mutex<UserDevice>>,
    driver: Driver,
    kick: EventFd,
    _call: EventFd,
}

impl Disk {
    fn connect(daemon: &Daemon, memory: &VhostMemory, driver: Driver) -> Self {
        let (kick, call) = events();
        let queue = Queue::new(kick.try_clone().unwrap(), call.try_clone().unwrap());
        let device = UserDevice::connect(
            "blk/0",
            daemon.socket(),
            memory.clone(),
            vec![queue],
            Requests::Answered,
        );
        Self {
            device: Arc::new(Mutex::new(device.unwrap())),
            driver,
            kick,
            _call: call,
        }
    }

    fn start_anew(&self) {
        let mut device = self.device.lock().unwrap();
        device.set_features(VERSION_1).unwrap();
        device.set_rings(&[Some(self.driver.ring())]).unwrap();
        device.start().unwrap();
    }

    fn data(slot: u16) -> u64 {
        REQUESTS + u64::from(slot) * 3 * PAGE_SIZE + PAGE_SIZE
    }

    fn ask(&mut self, slot: u16, what: u32, sector: u64) {
        let header = REQUESTS + u64::from(slot) * 3 * PAGE_SIZE;
        let status = header + 2 * PAGE_SIZE;
        let memory = self.driver.memory().memory();
        memory.write_obj(what, GuestAddress(header)).unwrap();
        memory.write_obj(0_u32, GuestAddress(header + 4)).unwrap();
        memory.write_obj(sector, GuestAddress(header + 8)).unwrap();
        memory.write_obj(0xff_u8, GuestAddress(status)).unwrap();
        let bytes = u32::try_from(PAGE_SIZE).unwrap();
        let parts = [
            (header, 16, false),
            (Self::data(slot), bytes, what == READ),
            (status, 1, true),
        ];
        self.driver.post(slot, &parts);
        self.kick.write(1).unwrap();
    }

    /// Takes the next answer, which is success.
    fn answer(&mut self) -> u16 {
        let (slot, _) = until("an answer of the disk", || self.driver.answer());
        let status = REQUESTS + u64::from(slot) * 3 * PAGE_SIZE + 2 * PAGE_SIZE;
        let status: u8 = self
            .driver
            .memory()
            .memory()
            .read_obj(GuestAddress(status))
            .unwrap();
        assert_eq!(status, 0, "slot {slot}");
        slot
    }

    fn write(&mut self, block: u64, value: u64) {
        let memory = self.driver.memory().memory();
        memory
            .write_obj(value, GuestAddress(Self::data(0)))
            .unwrap();
        self.ask(0, WRITE, block * PAGE_SIZE / SECTOR);
        assert_eq!(self.answer(), 0);
    }

    fn read(&mut self, block: u64) -> u64 {
        self.ask(1, READ, block * PAGE_SIZE / SECTOR);
        assert_eq!(self.answer(), 1);
        let memory = self.driver.memory().memory();
        memory.read_obj(GuestAddress(Self::data(1))).unwrap()
    }
}

#[test]
fn a_disk_moves_to_another_back_end_with_requests_under_way_and_each_is_answered_once() {
    let dir = image();
    let Some(first) = Daemon::start(dir.path(), "first") else {
        return;
    };
    let second = Daemon::start(dir.path(), "second").unwrap();
    let (memory, _ram) = ram(PAGES);
    let driver = Driver::new(&memory, 0, SIZE);
    let mut disk = Disk::connect(&first, &memory, driver);
    assert_eq!(
        disk.device.lock().unwrap().config(0, 8).unwrap(),
        (4_u64 << 20 >> 9).to_le_bytes(),
        "sectors"
    );
    disk.start_anew();
    for turn in 0..50_u64 {
        disk.write(turn % 7, turn);
        assert_eq!(disk.read(turn % 7), turn);
        for slot in 0..15 {
            let memory = disk.driver.memory().memory();
            let value = turn * 100 + u64::from(slot);
            memory
                .write_obj(value, GuestAddress(Disk::data(slot)))
                .unwrap();
            disk.ask(slot, WRITE, (8 + u64::from(slot)) * PAGE_SIZE / SECTOR);
        }
        // Wherever the back end is with them.
        let saved = {
            let mut device = disk.device.lock().unwrap();
            device.stop().unwrap();
            device.save().unwrap()
        };
        let (to, _ram) = ram(PAGES);
        copy(disk.driver.memory(), &to);
        let daemon = if turn % 2 == 0 { &second } else { &first };
        // One connection at a time is all that a daemon takes.
        let driver = disk.driver.moved(&to);
        disk = Disk::connect(daemon, &to, driver);
        {
            let mut device = disk.device.lock().unwrap();
            device.restore(&saved).unwrap();
            device.start().unwrap();
        }
        let mut answered: Vec<_> = (0..15).map(|_| disk.answer()).collect();
        answered.sort_unstable();
        assert_eq!(answered, (0..15).collect::<Vec<_>>());
        assert_eq!(disk.driver.answer(), None);
        for slot in 0..15 {
            assert_eq!(disk.read(8 + slot), turn * 100 + slot, "turn {turn}");
        }
    }
    let image = File::open(dir.path().join("image")).unwrap();
    let mut block = [0; 8];
    image.read_exact_at(&mut block, 8 * PAGE_SIZE).unwrap();
    assert_eq!(u64::from_le_bytes(block), 4900);
}

#[test]
fn the_log_of_a_disk_has_the_buffers_and_the_used_ring_and_nothing_else() {
    let dir = image();
    let Some(daemon) = Daemon::start(dir.path(), "socket") else {
        return;
    };
    let (memory, ram) = ram(PAGES);
    let mut disk = Disk::connect(&daemon, &memory, Driver::new(&memory, 0, SIZE));
    disk.start_anew();
    assert_eq!(disk.read(0), 0, "before the log");
    let mut log = VhostLog::new(memory, vec![disk.device.clone()]);
    log.start().unwrap();
    let fetch = |log: &mut VhostLog| {
        let mut map = ram.empty_map();
        log.fetch(&mut map).unwrap();
        marked(&map, PAGES)
    };
    assert!(fetch(&mut log).is_empty());
    for slot in [3_u16, 5] {
        disk.ask(slot, READ, 0);
        assert_eq!(disk.answer(), slot);
        let data = Disk::data(slot) / PAGE_SIZE;
        let mut written = vec![disk.driver.used_page(), data, data + 1];
        written.sort_unstable();
        // The mark follows the write.
        let mut seen = Vec::new();
        until("all marks", || {
            seen.extend(fetch(&mut log));
            seen.sort_unstable();
            (seen.len() >= written.len()).then_some(())
        });
        assert_eq!(seen, written);
        disk.ask(slot, WRITE, 0);
        assert_eq!(disk.answer(), slot);
        disk.device.lock().unwrap().stop().unwrap();
        assert_eq!(fetch(&mut log), [disk.driver.used_page(), data + 1]);
        disk.device.lock().unwrap().start().unwrap();
    }
    log.stop().unwrap();
    assert_eq!(disk.read(0), 0, "after the log");
    // Nothing is left that a second log would find.
    log.start().unwrap();
    assert!(fetch(&mut log).is_empty());
    log.stop().unwrap();
}

#[test]
fn a_back_end_that_dies_is_replaced_and_the_disk_goes_on_where_it_was() {
    let dir = image();
    let Some(mut daemon) = Daemon::start(dir.path(), "socket") else {
        return;
    };
    let (memory, ram) = ram(PAGES);
    let mut disk = Disk::connect(&daemon, &memory, Driver::new(&memory, 0, SIZE));
    disk.start_anew();
    let mut log = VhostLog::new(memory, vec![disk.device.clone()]);
    log.start().unwrap();
    for turn in 0..5 {
        disk.write(turn, turn + 1);
        drop(daemon);
        until("its end is seen", || {
            (!disk.device.lock().unwrap().is_alive()).then_some(())
        });
        let error = disk
            .device
            .lock()
            .unwrap()
            .reconnect(Lost::Refuse)
            .unwrap_err();
        assert!(error.to_string().contains("connecting again"), "{error}");
        // The guest does not notice, and asks.
        disk.ask(1, READ, turn * PAGE_SIZE / SECTOR);
        daemon = Daemon::start(dir.path(), "socket").unwrap();
        {
            let mut device = disk.device.lock().unwrap();
            if turn % 2 == 0 {
                let error = device.reconnect(Lost::Refuse).unwrap_err().to_string();
                assert!(error.contains("which of 1 requests"), "{error}");
                assert!(!device.is_running() && device.is_alive());
                device.start().unwrap();
            } else {
                device.reconnect(Lost::InOrder).unwrap();
            }
        }
        assert_eq!(disk.answer(), 1);
        let memory = disk.driver.memory().memory();
        let value: u64 = memory.read_obj(GuestAddress(Disk::data(1))).unwrap();
        assert_eq!(value, turn + 1);
    }
    disk.device.lock().unwrap().stop().unwrap();
    let mut map = ram.empty_map();
    log.fetch(&mut map).unwrap();
    assert!(
        marked(&map, PAGES).contains(&(Disk::data(1) / PAGE_SIZE)),
        "each next one logs as the last one did"
    );
    log.stop().unwrap();
}

#[test]
fn a_back_end_does_not_notice_that_its_vmm_is_a_new_one() {
    let dir = image();
    let Some(daemon) = Daemon::start(dir.path(), "socket") else {
        return;
    };
    let (memory, _ram) = ram(PAGES);
    let mut disk = Disk::connect(&daemon, &memory, Driver::new(&memory, 0, SIZE));
    disk.start_anew();
    for turn in 0..5 {
        disk.write(turn, turn + 1);
        let (connection, saved) = {
            let mut device = disk.device.lock().unwrap();
            device.stop().unwrap();
            let connection = device.socket().unwrap().try_clone_to_owned().unwrap();
            (connection.into(), device.save().unwrap())
        };
        let (kick, call) = events();
        let queue = Queue::new(kick.try_clone().unwrap(), call.try_clone().unwrap());
        let new = UserDevice::over(
            "blk/0",
            connection,
            daemon.socket(),
            memory.clone(),
            vec![queue],
            Requests::Answered,
        );
        let mut new = new.unwrap();
        new.restore(&saved).unwrap();
        new.start().unwrap();
        disk = Disk {
            device: Arc::new(Mutex::new(new)),
            driver: disk.driver.clone(),
            kick,
            _call: call,
        };
        assert_eq!(disk.read(turn), turn + 1);
    }
}

#[test]
fn a_log_ends_although_its_back_end_has_died() {
    let dir = image();
    let Some(daemon) = Daemon::start(dir.path(), "socket") else {
        return;
    };
    let (memory, _ram) = ram(PAGES);
    let disk = Disk::connect(&daemon, &memory, Driver::new(&memory, 0, SIZE));
    disk.start_anew();
    let mut log = VhostLog::new(memory, vec![disk.device.clone()]);
    log.start().unwrap();
    drop(daemon);
    log.stop().unwrap();
    assert!(
        disk.device.lock().unwrap().stop().is_err(),
        "where it was is not known"
    );
    assert!(disk.device.lock().unwrap().stop_log().is_ok());
}
