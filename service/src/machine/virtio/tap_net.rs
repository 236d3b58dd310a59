//! virtio-net on a tap, whose packets this process moves: `--net tap=NAME,vhost=off`, and without that word where there is no vhost-net.
//!
//! To the driver and in saved state it is the device of `vhost_net`: a guest may move from one to the other.

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex};

use vmferry_cpr::manifest::FdKind;
use vmferry_devices::announce::Announce;
use vmferry_devices::vhost::open_tap;
use vmferry_devices::{DeviceError, Notifier};
use vmferry_transport::memory::DirtyLog;
use vmferry_transport::wire::{DeviceSchema, Section};

use super::backend::{Backend, QueueBase, Start};
use super::net::{
    Card, F_INDIRECT, F_MRG_RXBUF, F_OF_VMM, QUEUE_SIZE, QUEUES, TAP, TYPE_NET, check_packet,
};
use super::outside::{NetConfig, host};
use super::packets::{Mover, Packets, lock};
use super::ring::F_EVENT_IDX;
use super::worker::Worker;
use crate::machine::MachineError;
use crate::machine::heirloom::{DeviceFd, claim};

/// A network interface.
#[derive(Debug)]
pub struct TapNet {
    card: Card,
    /// Empty until the tap of another process was taken over.
    wire: Option<Wire>,
    worker: Option<Worker>,
}

/// The tap, and what is on its way.
#[derive(Debug)]
struct Wire {
    tap: Arc<File>,
    packets: Arc<Mutex<Packets>>,
}

impl TapNet {
    /// Opens the tap.
    ///
    /// # Errors
    /// When there is none that this process may have, or somebody else has it.
    pub fn open(config: &NetConfig) -> Result<Self, MachineError> {
        let mut this = Self::waiting(config);
        let failed = |source| {
            let op = format!("open tap {} for {}", config.tap, this.card.name());
            host(op, source)
        };
        let tap = open_tap(&config.tap).map_err(failed)?;
        this.adopt(tap, true);
        Ok(this)
    }

    /// Waits for the tap of another process.
    pub fn waiting(config: &NetConfig) -> Self {
        Self {
            card: Card::new(config),
            wire: None,
            worker: None,
        }
    }

    /// What the tap has so far is `stale` if the guest was not behind it.
    fn adopt(&mut self, tap: File, stale: bool) {
        let tap = Arc::new(tap);
        let packets = Arc::new(Mutex::new(Packets::new(Arc::clone(&tap), stale)));
        self.card.attach(Arc::clone(&tap));
        self.wire = Some(Wire { tap, packets });
    }

    fn wire(&self) -> io::Result<&Wire> {
        let missing = || io::Error::other("its tap has not come");
        self.wire.as_ref().ok_or_else(missing)
    }
}

impl Backend for TapNet {
    fn name(&self) -> &str {
        self.card.name()
    }

    fn device_type(&self) -> u32 {
        TYPE_NET
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; QUEUES]
    }

    fn features(&self) -> u64 {
        // What the kernel has always offered as well.
        F_MRG_RXBUF | F_INDIRECT | F_EVENT_IDX | F_OF_VMM
    }

    fn config(&self) -> Vec<u8> {
        self.card.config()
    }

    fn write_config(&mut self, _: u64, _: &[u8]) {}

    fn accept_config(&mut self, saved: &[u8]) -> Result<(), String> {
        self.card.accept_config(saved)
    }

    fn prepare(&mut self, start: Start) -> io::Result<()> {
        let mover = Mover::new(&self.wire()?.packets, start.features);
        self.worker = Some(Worker::prepare(self.name(), start, mover)?);
        Ok(())
    }

    fn open(&mut self) -> io::Result<()> {
        if let Some(worker) = &self.worker {
            worker.open();
        }
        Ok(())
    }

    fn stop(&mut self) -> io::Result<Vec<QueueBase>> {
        let Some(worker) = &mut self.worker else {
            return Ok(Vec::new());
        };
        let bases = worker.stop()?;
        self.worker = None;
        Ok(bases)
    }

    fn reset(&mut self) {
        if let Some(wire) = &self.wire {
            lock(&wire.packets).forget();
        }
    }

    fn schemas(&self) -> Vec<DeviceSchema> {
        Vec::new()
    }

    fn save(&mut self) -> Result<Vec<Section>, DeviceError> {
        Ok(Vec::new())
    }

    fn load(&mut self, _: &[&Section]) -> Result<(), DeviceError> {
        Ok(())
    }

    fn undelivered(&self) -> Option<Vec<u8>> {
        self.wire
            .as_ref()
            .and_then(|wire| lock(&wire.packets).kept())
    }

    fn set_undelivered(&mut self, packet: Option<Vec<u8>>) -> Result<(), String> {
        packet.as_deref().map_or(Ok(()), check_packet)?;
        match &self.wire {
            Some(wire) => lock(&wire.packets).keep(packet.as_deref()),
            None if packet.is_none() => {}
            None => return Err("a packet, and its tap has not come".to_owned()),
        }
        Ok(())
    }

    fn dirty_log(&self) -> io::Result<Option<Box<dyn DirtyLog>>> {
        Ok(None)
    }

    fn notifier(&self) -> Option<Box<dyn Notifier>> {
        None
    }

    fn announcer(&self) -> Option<Arc<dyn Announce>> {
        Some(self.card.announcer())
    }

    fn heirlooms(&self) -> io::Result<Vec<DeviceFd>> {
        let tap = &*self.wire()?.tap;
        Ok(vec![self.card.heirloom(TAP, FdKind::Tap, 0, tap)?])
    }

    fn take_over(&mut self, fds: &mut Vec<DeviceFd>) -> Result<(), DeviceError> {
        if self.wire.is_some() {
            return Ok(());
        }
        let tap = File::from(claim(fds, self.name(), TAP, FdKind::Tap)?);
        self.adopt(tap, false);
        Ok(())
    }
}
