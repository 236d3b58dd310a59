//! The registers of one device, as its driver sees them, and when its back end works.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use virtio_queue::{Queue, QueueState, QueueT};
use vmferry_devices::saved::{decode, encode, schema_of};
use vmferry_devices::{Device, DeviceError};
use vmferry_transport::wire::{DeviceSchema, Section};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::backend::{Backend, Interrupt, QueueStart, REASON_CONFIG, REASON_QUEUE, Start};
use super::saved::{QueueV1, TransportV1};
use super::{F_VERSION_1, QUEUES_MAX};
use crate::machine::ram::MachineRam;

/// "virt".
const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
/// "vmfy": nobody looks at it.
const VENDOR: u32 = u32::from_le_bytes(*b"vmfy");

const STATUS_DRIVER_OK: u32 = 4;
const STATUS_FEATURES_OK: u32 = 8;
const STATUS_NEEDS_RESET: u32 = 64;
/// What a driver may write.
const STATUS_OF_DRIVER: u32 = 1 | 2 | STATUS_DRIVER_OK | STATUS_FEATURES_OK | 128;

/// Offsets of the registers.
mod register {
    pub(super) const MAGIC: u64 = 0x00;
    pub(super) const VERSION: u64 = 0x04;
    pub(super) const DEVICE_TYPE: u64 = 0x08;
    pub(super) const VENDOR: u64 = 0x0c;
    pub(super) const DEVICE_FEATURES: u64 = 0x10;
    pub(super) const DEVICE_FEATURES_SEL: u64 = 0x14;
    pub(super) const DRIVER_FEATURES: u64 = 0x20;
    pub(super) const DRIVER_FEATURES_SEL: u64 = 0x24;
    pub(super) const QUEUE_SEL: u64 = 0x30;
    pub(super) const QUEUE_SIZE_MAX: u64 = 0x34;
    pub(super) const QUEUE_SIZE: u64 = 0x38;
    pub(super) const QUEUE_READY: u64 = 0x44;
    pub(super) const INTERRUPT_STATUS: u64 = 0x60;
    pub(super) const INTERRUPT_ACK: u64 = 0x64;
    pub(super) const STATUS: u64 = 0x70;
    pub(super) const DESC_LOW: u64 = 0x80;
    pub(super) const DESC_HIGH: u64 = 0x84;
    pub(super) const AVAIL_LOW: u64 = 0x90;
    pub(super) const AVAIL_HIGH: u64 = 0x94;
    pub(super) const USED_LOW: u64 = 0xa0;
    pub(super) const USED_HIGH: u64 = 0xa4;
    /// Length of a shared memory region: all ones, there is none.
    pub(super) const SHM_LEN_LOW: u64 = 0xb0;
    pub(super) const SHM_BASE_HIGH: u64 = 0xbc;
    pub(super) const CONFIG_GENERATION: u64 = 0xfc;
    pub(super) const CONFIG: u64 = 0x100;
}

/// One device.
#[derive(Debug)]
pub struct Transport {
    slot: u32,
    ram: MachineRam,
    backend: Box<dyn Backend>,
    interrupt: Interrupt,
    kicks: Vec<Arc<EventFd>>,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    status: u32,
    config_generation: u32,
    queues: Vec<QueueState>,
    serving: Option<Serving>,
}

/// The back end serves, or waits to be let serve.
#[derive(Debug)]
struct Serving {
    /// Numbers of its queues.
    queues: Vec<u16>,
    /// It waits.
    shut: bool,
}

impl Transport {
    /// `backend` behind window `slot`, reset and not serving.
    ///
    /// # Errors
    /// When the back end has queues that cannot be, or the host no more descriptors.
    pub fn new(slot: u32, backend: Box<dyn Backend>, ram: &MachineRam) -> io::Result<Self> {
        let queues = backend
            .queue_sizes()
            .into_iter()
            .map(|size| Queue::new(size).map(|queue| queue.state()))
            .collect::<Result<Vec<_>, _>>()
            .map_err(io::Error::other)?;
        if queues.len() > QUEUES_MAX {
            return Err(io::Error::other(format!(
                "{} has {} queues, {QUEUES_MAX} are possible",
                backend.name(),
                queues.len()
            )));
        }
        let kicks = queues
            .iter()
            .map(|_| EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map(Arc::new))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            slot,
            ram: ram.clone(),
            backend,
            interrupt: Interrupt::new()?,
            kicks,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
            status: 0,
            config_generation: 0,
            queues,
            serving: None,
        })
    }

    /// The device model.
    pub fn backend(&self) -> &dyn Backend {
        &*self.backend
    }

    /// The same, to be changed.
    pub fn backend_mut(&mut self) -> &mut dyn Backend {
        &mut *self.backend
    }

    /// The interrupt line.
    pub fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    /// What the driver kicks, one for each queue.
    pub fn kicks(&self) -> &[Arc<EventFd>] {
        &self.kicks
    }

    /// Whether the driver has finished its setup and may expect the device to work.
    pub fn is_set_up(&self) -> bool {
        self.status & STATUS_DRIVER_OK != 0
    }

    /// A driver reads `data` from `offset` of the window.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some(at) = offset.checked_sub(register::CONFIG) {
            read_config(&self.backend.config(), at, data);
            return;
        }
        data.fill(0);
        if let Ok(word) = <&mut [u8; 4]>::try_from(data)
            && offset.is_multiple_of(4)
        {
            *word = self.read_register(offset).to_le_bytes();
        }
    }

    /// A driver writes `data` to `offset` of the window.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(at) = offset.checked_sub(register::CONFIG) {
            self.backend.write_config(at, data);
            return;
        }
        if let Ok(word) = <[u8; 4]>::try_from(data)
            && offset.is_multiple_of(4)
        {
            self.write_register(offset, u32::from_le_bytes(word));
        }
    }

    fn read_register(&self, offset: u64) -> u32 {
        let queue = self.selected();
        match offset {
            register::MAGIC => MAGIC,
            register::VERSION => VERSION,
            register::DEVICE_TYPE => self.backend.device_type(),
            register::VENDOR => VENDOR,
            register::DEVICE_FEATURES => match self.device_features_sel {
                0 => low(self.offered()),
                1 => high(self.offered()),
                _ => 0,
            },
            register::QUEUE_SIZE_MAX => queue.map_or(0, |queue| queue.max_size.into()),
            register::QUEUE_READY => queue.map_or(0, |queue| queue.ready.into()),
            register::INTERRUPT_STATUS if self.serving.is_some() => {
                self.interrupt.reasons() | REASON_QUEUE
            }
            register::INTERRUPT_STATUS => self.interrupt.reasons(),
            register::STATUS if self.interrupt.needs_reset() => self.status | STATUS_NEEDS_RESET,
            register::STATUS => self.status,
            register::SHM_LEN_LOW..=register::SHM_BASE_HIGH => u32::MAX,
            register::CONFIG_GENERATION => self.config_generation,
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            register::DEVICE_FEATURES_SEL => self.device_features_sel = value,
            register::DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            register::DRIVER_FEATURES if self.status & STATUS_FEATURES_OK == 0 => {
                match self.driver_features_sel {
                    0 => set_low(&mut self.driver_features, value),
                    1 => set_high(&mut self.driver_features, value),
                    _ => {}
                }
            }
            register::QUEUE_SEL => self.queue_sel = value,
            super::QUEUE_NOTIFY => self.kick(value),
            register::INTERRUPT_ACK => self.interrupt.acknowledge(value & REASON_CONFIG),
            register::STATUS => self.write_status(value),
            _ if !self.is_set_up() => self.write_queue_register(offset, value),
            _ => {}
        }
    }

    /// Only until the driver is ready: a queue does not change while it is served.
    fn write_queue_register(&mut self, offset: u64, value: u32) {
        let Some(queue) = usize::try_from(self.queue_sel)
            .ok()
            .and_then(|selected| self.queues.get_mut(selected))
        else {
            return;
        };
        match offset {
            register::QUEUE_SIZE => match u16::try_from(value) {
                Ok(size) if size.is_power_of_two() && size <= queue.max_size => queue.size = size,
                _ => {}
            },
            register::QUEUE_READY => queue.ready = value & 1 != 0,
            register::DESC_LOW => set_low(&mut queue.desc_table, value),
            register::DESC_HIGH => set_high(&mut queue.desc_table, value),
            register::AVAIL_LOW => set_low(&mut queue.avail_ring, value),
            register::AVAIL_HIGH => set_high(&mut queue.avail_ring, value),
            register::USED_LOW => set_low(&mut queue.used_ring, value),
            register::USED_HIGH => set_high(&mut queue.used_ring, value),
            _ => {}
        }
    }

    fn write_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        let mut new = value & STATUS_OF_DRIVER;
        // Nothing is taken back but by a reset.
        new |= self.status;
        let wanted = self.driver_features;
        if wanted & !self.offered() != 0 || wanted & F_VERSION_1 == 0 {
            new &= !STATUS_FEATURES_OK;
        }
        let becomes_ready = new & !self.status & STATUS_DRIVER_OK != 0;
        if becomes_ready && new & STATUS_FEATURES_OK == 0 {
            tracing::debug!(device = self.backend.name(), "a driver without features");
            self.interrupt.break_device();
            return;
        }
        self.status = new;
        if becomes_ready && let Err(error) = self.start() {
            self.cannot_work(&error);
        }
    }

    fn reset(&mut self) {
        if let Err(error) = self.stop() {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, device = self.backend.name(), "cannot be reset");
            self.interrupt.break_device();
            return;
        }
        self.backend.reset();
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.driver_features = 0;
        self.queue_sel = 0;
        self.status = 0;
        self.interrupt.set_reasons(0);
        self.interrupt.set_needs_reset(false);
        for queue in &mut self.queues {
            *queue = QueueState {
                max_size: queue.max_size,
                size: queue.max_size,
                ..QueueState::default()
            };
        }
    }

    fn kick(&self, queue: u32) {
        let kick = usize::try_from(queue)
            .ok()
            .and_then(|queue| self.kicks.get(queue));
        if let Some(kick) = kick {
            // It fails only if the device has not looked for 2^64 kicks.
            let _ = kick.write(1);
        }
    }

    /// Prepares the back end and lets it serve, if the driver is ready and nothing is served yet.
    ///
    /// # Errors
    /// As [`prepare`](Self::prepare).
    fn start(&mut self) -> io::Result<()> {
        self.prepare()?;
        self.open();
        Ok(())
    }

    /// Makes everything ready to serve that can fail, if the driver is ready and nothing is served yet. Nothing is touched that the guest
    /// or anybody else can see.
    ///
    /// # Errors
    /// When the driver's queues make no sense, or the back end cannot be had.
    pub fn prepare(&mut self) -> io::Result<()> {
        if self.serving.is_some() || !self.is_set_up() || self.interrupt.needs_reset() {
            return Ok(());
        }
        let mut queues = Vec::new();
        for (index, (state, kick)) in (0..).zip(self.queues.iter().zip(&self.kicks)) {
            if !state.ready {
                continue;
            }
            self.check_queue(index, state)?;
            queues.push(QueueStart {
                index,
                state: *state,
                kick: kick.clone(),
            });
        }
        let numbers = queues.iter().map(|queue| queue.index).collect();
        let start = Start {
            ram: self.ram.clone(),
            features: self.driver_features,
            queues,
            interrupt: self.interrupt.clone(),
        };
        self.ask("its preparation", |backend| backend.prepare(start))?;
        self.serving = Some(Serving {
            queues: numbers,
            shut: true,
        });
        Ok(())
    }

    /// Lets the back end serve what it was prepared for; the guest runs here. If it cannot, that is between the device and its driver.
    /// Does nothing to one that serves, or was not prepared.
    pub fn open(&mut self) {
        let Some(serving) = self.serving.as_mut().filter(|serving| serving.shut) else {
            return;
        };
        serving.shut = false;
        let queues = serving.queues.clone();
        if let Err(error) = self.ask("its start", |backend| backend.open()) {
            self.cannot_work(&error);
            return;
        }
        for index in queues {
            self.kick(index.into());
        }
        self.interrupt.raise();
    }

    /// Whether the back end was prepared and not let serve.
    pub fn is_shut(&self) -> bool {
        self.serving.as_ref().is_some_and(|serving| serving.shut)
    }

    /// The guest runs, and this device does not serve it: its driver has to reset it.
    pub fn cannot_work(&self, error: &io::Error) {
        let error = error as &dyn std::error::Error;
        tracing::warn!(error, device = self.backend.name(), "does not start");
        self.interrupt.break_device();
    }

    /// Ends both: on return the device writes neither guest memory nor storage.
    ///
    /// # Errors
    /// It could not be stopped, and serves as before, or as far as a bug has left it; the next stop tries again.
    pub fn stop(&mut self) -> io::Result<()> {
        if self.serving.is_none() {
            return Ok(());
        }
        let bases = self.ask("its stop", |backend| backend.stop())?;
        let queues = self.serving.iter().flat_map(|serving| &serving.queues);
        for index in queues {
            let base = bases.iter().find(|base| base.index == *index);
            let queue = self.queues.get_mut(usize::from(*index));
            let (Some(base), Some(queue)) = (base, queue) else {
                return Err(io::Error::other(format!(
                    "it does not know how far queue {index} has come"
                )));
            };
            queue.next_avail = base.next_avail;
            queue.next_used = base.next_used;
        }
        self.serving = None;
        Ok(())
    }

    /// A back end that panics costs its device. The other ones, and the thread that asks, have to go on: they have a guest.
    fn ask<T>(
        &mut self,
        what: &str,
        question: impl FnOnce(&mut dyn Backend) -> io::Result<T>,
    ) -> io::Result<T> {
        let backend = &mut *self.backend;
        let answer = catch_unwind(AssertUnwindSafe(|| question(backend)));
        answer.unwrap_or_else(|panic| {
            let name = self.backend.name();
            Err(io::Error::other(DeviceError::panicked(name, what, &*panic)))
        })
    }

    /// Whether the rings lie in RAM and are aligned as they have to be.
    fn check_queue(&self, index: u16, state: &QueueState) -> io::Result<()> {
        let valid = Queue::try_from(*state).is_ok_and(|queue| queue.is_valid(self.ram.memory()));
        if valid {
            return Ok(());
        }
        Err(io::Error::other(format!(
            "queue {index} does not lie in RAM as it has to"
        )))
    }

    fn offered(&self) -> u64 {
        self.backend.features() | F_VERSION_1
    }

    fn selected(&self) -> Option<&QueueState> {
        self.queues.get(usize::try_from(self.queue_sel).ok()?)
    }

    /// What the transport and the back end save and load.
    pub fn schemas(&self) -> Vec<DeviceSchema> {
        let mut schemas = vec![self.schema()];
        schemas.extend(self.backend.schemas());
        schemas
    }

    /// All sections of the device, in the order of [`schemas`](Self::schemas).
    ///
    /// # Errors
    /// When the back end refuses.
    pub fn save_all(&mut self) -> Result<Vec<Section>, DeviceError> {
        let mut sections = vec![self.save()?];
        sections.extend(self.backend.save()?);
        Ok(sections)
    }

    /// Loads what [`save_all`](Self::save_all) gave.
    ///
    /// # Errors
    /// When a section is refused, or the guest cannot go on with this device. The device must not run then.
    pub fn load_all(&mut self, sections: &[&Section]) -> Result<(), DeviceError> {
        let Some((own, rest)) = sections.split_first() else {
            return Err(DeviceError::Missing {
                device: self.backend.name().to_owned(),
            });
        };
        self.backend.load(rest)?;
        self.restore(own)
    }

    /// Whether the guest that `saved` belongs to can go on with this device; what does not fit otherwise.
    fn check(&mut self, saved: &TransportV1) -> Result<(), String> {
        let ours = (self.slot, self.backend.device_type());
        if (saved.slot, saved.device_type) != ours {
            return Err(format!(
                "it is of type {} behind window {}, this one of type {} behind window {}",
                saved.device_type, saved.slot, ours.1, ours.0
            ));
        }
        let missing = saved.driver_features & !self.offered();
        if missing != 0 {
            return Err(format!(
                "its driver uses features {missing:#x} that this one lacks"
            ));
        }
        if saved.status & !(STATUS_OF_DRIVER | STATUS_NEEDS_RESET) != 0 {
            return Err(format!("a status of {:#x}", saved.status));
        }
        if saved.interrupt_reasons & !REASON_CONFIG != 0 {
            return Err(format!("interrupt reasons {:#x}", saved.interrupt_reasons));
        }
        if saved.status & STATUS_DRIVER_OK != 0
            && (saved.status & STATUS_FEATURES_OK == 0 || saved.driver_features & F_VERSION_1 == 0)
        {
            return Err("a driver that is ready without features".to_owned());
        }
        if saved.queues.len() != self.queues.len() {
            return Err(format!(
                "it has {} queues, this one {}",
                saved.queues.len(),
                self.queues.len()
            ));
        }
        self.backend.accept_config(&saved.config)
    }

    fn loaded_queue(
        &self,
        index: u16,
        saved: &QueueV1,
        in_use: bool,
    ) -> Result<QueueState, String> {
        let max_size = self
            .queues
            .get(usize::from(index))
            .map_or(0, |queue| queue.max_size);
        let QueueV1 {
            size,
            ready,
            desc_gpa,
            avail_gpa,
            used_gpa,
            next_avail,
            next_used,
        } = saved;
        if !size.is_power_of_two() || *size > max_size {
            return Err(format!(
                "queue {index} of {size} entries, this one has at most {max_size}"
            ));
        }
        let state = QueueState {
            max_size,
            next_avail: *next_avail,
            next_used: *next_used,
            event_idx_enabled: false,
            size: *size,
            ready: *ready,
            desc_table: *desc_gpa,
            avail_ring: *avail_gpa,
            used_ring: *used_gpa,
        };
        if in_use && *ready {
            self.check_queue(index, &state)
                .map_err(|error| error.to_string())?;
        }
        Ok(state)
    }
}

impl Device for Transport {
    fn name(&self) -> &str {
        self.backend.name()
    }

    fn schema(&self) -> DeviceSchema {
        schema_of::<TransportV1>(self.backend.name())
    }

    fn save(&mut self) -> Result<Section, DeviceError> {
        let needs_reset = if self.interrupt.needs_reset() {
            STATUS_NEEDS_RESET
        } else {
            0
        };
        let queues = self.queues.iter().map(save_queue).collect();
        encode(
            self.backend.name(),
            &TransportV1 {
                slot: self.slot,
                device_type: self.backend.device_type(),
                device_features_sel: self.device_features_sel,
                driver_features_sel: self.driver_features_sel,
                driver_features: self.driver_features,
                queue_sel: self.queue_sel,
                status: self.status | needs_reset,
                interrupt_reasons: self.interrupt.reasons(),
                config_generation: self.config_generation,
                config: self.backend.config(),
                queues,
                undelivered: self.backend.undelivered(),
            },
        )
    }

    fn restore(&mut self, section: &Section) -> Result<(), DeviceError> {
        let saved: TransportV1 = decode(section)?;
        let bad = |reason: String| DeviceError::BadState {
            device: section.name.clone(),
            reason,
        };
        self.check(&saved).map_err(bad)?;
        let TransportV1 {
            slot: _,
            device_type: _,
            device_features_sel,
            driver_features_sel,
            driver_features,
            queue_sel,
            status,
            interrupt_reasons,
            config_generation,
            config: _,
            queues,
            undelivered,
        } = saved;
        let in_use = status & (STATUS_DRIVER_OK | STATUS_NEEDS_RESET) == STATUS_DRIVER_OK;
        let queues = (0..)
            .zip(&queues)
            .map(|(index, queue)| self.loaded_queue(index, queue, in_use))
            .collect::<Result<Vec<_>, _>>()
            .map_err(bad)?;
        self.backend.set_undelivered(undelivered).map_err(bad)?;
        self.queues = queues;
        self.device_features_sel = device_features_sel;
        self.driver_features_sel = driver_features_sel;
        self.driver_features = driver_features;
        self.queue_sel = queue_sel;
        self.status = status & STATUS_OF_DRIVER;
        self.config_generation = config_generation;
        self.interrupt.set_reasons(interrupt_reasons);
        self.interrupt
            .set_needs_reset(status & STATUS_NEEDS_RESET != 0);
        Ok(())
    }
}

fn save_queue(state: &QueueState) -> QueueV1 {
    let QueueState {
        max_size: _,
        next_avail,
        next_used,
        event_idx_enabled: _,
        size,
        ready,
        desc_table,
        avail_ring,
        used_ring,
    } = *state;
    QueueV1 {
        size,
        ready,
        desc_gpa: desc_table,
        avail_gpa: avail_ring,
        used_gpa: used_ring,
        next_avail,
        next_used,
    }
}

/// What lies beyond the end reads as zeros.
fn read_config(config: &[u8], at: u64, data: &mut [u8]) {
    let from = usize::try_from(at).unwrap_or(usize::MAX);
    let there = config.get(from..).unwrap_or_default();
    for (index, byte) in data.iter_mut().enumerate() {
        *byte = there.get(index).copied().unwrap_or(0);
    }
}

fn low(value: u64) -> u32 {
    (value & u64::from(u32::MAX)) as u32
}

fn high(value: u64) -> u32 {
    (value >> 32) as u32
}

fn set_low(field: &mut u64, value: u32) {
    *field = *field & !u64::from(u32::MAX) | u64::from(value);
}

fn set_high(field: &mut u64, value: u32) {
    *field = *field & u64::from(u32::MAX) | u64::from(value) << 32;
}
