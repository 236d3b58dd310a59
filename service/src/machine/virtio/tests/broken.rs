//! A back end with a bug costs its own device, and not the others or the guest.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use vmferry_devices::announce::Announce;
use vmferry_devices::{DeviceError, Notifier};
use vmferry_transport::wire::{DeviceSchema, Section};

use super::gate::with_disks;
use super::*;
use crate::machine::heirloom::DeviceFd;

/// What a back end was told, and what it panics at.
#[derive(Clone, Debug, Default)]
pub(crate) struct Bug(Arc<Mutex<(Vec<&'static str>, Option<&'static str>)>>);

impl Bug {
    /// From now on `call` panics, each time.
    pub(crate) fn set(&self, call: Option<&'static str>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).1 = call;
    }

    /// How often it was told `call`.
    pub(crate) fn heard(&self, call: &str) -> usize {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.0.iter().filter(|heard| **heard == call).count()
    }

    fn hears(&self, call: &'static str) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.0.push(call);
        assert_ne!(known.1, Some(call), "on purpose");
    }
}

/// A back end that has a bug at times.
#[derive(Debug)]
pub(crate) struct Buggy(pub(crate) Bug, pub(crate) Box<dyn Backend>);

impl Backend for Buggy {
    fn name(&self) -> &str {
        self.1.name()
    }

    fn device_type(&self) -> u32 {
        self.1.device_type()
    }

    fn queue_sizes(&self) -> Vec<u16> {
        self.1.queue_sizes()
    }

    fn features(&self) -> u64 {
        self.1.features()
    }

    fn config(&self) -> Vec<u8> {
        self.1.config()
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.1.write_config(offset, data)
    }

    fn accept_config(&mut self, saved: &[u8]) -> Result<(), String> {
        self.1.accept_config(saved)
    }

    fn prepare(&mut self, start: Start) -> io::Result<()> {
        self.0.hears("prepare");
        self.1.prepare(start)
    }

    fn open(&mut self) -> io::Result<()> {
        self.0.hears("open");
        self.1.open()
    }

    fn stop(&mut self) -> io::Result<Vec<QueueBase>> {
        self.0.hears("stop");
        self.1.stop()
    }

    fn reset(&mut self) {
        self.1.reset()
    }

    fn schemas(&self) -> Vec<DeviceSchema> {
        self.1.schemas()
    }

    fn save(&mut self) -> Result<Vec<Section>, DeviceError> {
        self.1.save()
    }

    fn load(&mut self, sections: &[&Section]) -> Result<(), DeviceError> {
        self.1.load(sections)
    }

    fn undelivered(&self) -> Option<Vec<u8>> {
        self.1.undelivered()
    }

    fn set_undelivered(&mut self, packet: Option<Vec<u8>>) -> Result<(), String> {
        self.1.set_undelivered(packet)
    }

    fn dirty_log(&self) -> io::Result<Option<Box<dyn DirtyLog>>> {
        self.1.dirty_log()
    }

    fn notifier(&self) -> Option<Box<dyn Notifier>> {
        self.1.notifier()
    }

    fn announcer(&self) -> Option<Arc<dyn Announce>> {
        self.1.announcer()
    }

    fn heirlooms(&self) -> io::Result<Vec<DeviceFd>> {
        self.1.heirlooms()
    }

    fn take_over(&mut self, fds: &mut Vec<DeviceFd>) -> Result<(), DeviceError> {
        self.1.take_over(fds)
    }
}

/// Three disks. The second has the first bug, the third the second.
fn three_disks() -> (Rig, Bug, Bug) {
    let (bug, last) = (Bug::default(), Bug::default());
    let bugs = [Bug::default(), bug.clone(), last.clone()];
    let rig = with_disks(bugs.len(), |disks| {
        let buggy = |(bug, disk)| Box::new(Buggy(bug, disk)) as Box<dyn Backend>;
        bugs.into_iter().zip(disks).map(buggy).collect()
    });
    (rig, bug, last)
}

impl Rig {
    fn second_needs_reset(&self) -> bool {
        let mut status = [0; 4];
        assert!(
            self.bus
                .read(WINDOWS_GPA + WINDOW_BYTES + 0x70, &mut status)
        );
        u32::from_le_bytes(status) & 64 != 0
    }

    fn first_serves(&self) -> bool {
        self.request(0, 0, 512) == 0
    }
}

#[test]
fn a_device_that_panics_when_it_is_stopped_leaves_the_others_to_work_again() {
    let (rig, bug, last) = three_disks();
    rig.bus.start().unwrap();
    bug.set(Some("stop"));
    for turn in 1..3 {
        let error = rig.bus.stop().unwrap_err();
        let MachineError::Host { op, source } = &error else {
            panic!("{error}");
        };
        assert!(op.starts_with("stop virtio-blk/"), "{error}");
        assert!(source.to_string().contains("on purpose"), "{source}");
        assert_eq!((bug.heard("stop"), last.heard("stop")), (turn, 0));
        rig.bus.work_again();
        assert!(rig.first_serves() && !rig.second_needs_reset());
    }
    bug.set(None);
    rig.bus.stop().unwrap();
}

#[test]
fn a_device_that_panics_when_it_is_let_serve_has_to_be_reset_and_the_next_ones_serve() {
    let (rig, bug, last) = three_disks();
    bug.set(Some("open"));
    rig.bus.start().unwrap();
    assert!(rig.first_serves());
    assert!(rig.second_needs_reset());
    assert_eq!(last.heard("open"), 1);
}

#[test]
fn a_device_that_panics_when_it_is_prepared_leaves_the_others_not_ready() {
    let (rig, bug, last) = three_disks();
    bug.set(Some("prepare"));
    assert!(rig.bus.prepare().is_err());
    rig.bus.open();
    assert_eq!((bug.heard("open"), last.heard("open")), (0, 0));
    // The guest runs here all the same.
    rig.bus.work_again();
    assert!(rig.first_serves());
    assert!(rig.second_needs_reset());
    assert_eq!(last.heard("open"), 1);
}
