//! All virtio devices of a machine.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmferry_devices::announce::Announce;
use vmferry_devices::{DeviceError, Notifier};
use vmferry_transport::memory::DirtyLog;
use vmferry_transport::wire::{DeviceSchema, Section};
use vmm_sys_util::eventfd::EventFd;

use super::blk::{F_READ_ONLY, TYPE_BLOCK};
use super::net::TYPE_NET;
use super::transport::Transport;
use super::{Backend, DEVICES_MAX, GSI_FIRST, Interrupt, WINDOW_BYTES, WINDOWS_GPA};
use crate::machine::heirloom::DeviceFd;
use crate::machine::ram::MachineRam;
use crate::machine::{MachineConfig, MachineError};

/// All virtio devices of a machine, each behind its window. The default has none.
#[derive(Debug, Default)]
pub struct Bus {
    devices: Vec<Mutex<Transport>>,
}

/// Where a device is, and how it is told and tells.
#[derive(Clone, Debug)]
pub struct Window {
    /// Guest-physical address of its first register.
    pub gpa: u64,
    /// Its interrupt line.
    pub gsi: u32,
    /// Device type.
    pub device_type: u32,
    /// What is offered to the driver.
    pub features: u64,
    /// Kicks, by queue.
    pub kicks: Vec<Arc<EventFd>>,
    /// The eventfd behind the line.
    pub interrupt: Interrupt,
}

impl Bus {
    /// The devices of `backends` behind the first windows, in their order, which must be the same on both sides of a migration.
    ///
    /// # Errors
    /// [`MachineError::Config`] for too many devices or two of one name, [`MachineError::Host`] when the host refuses.
    pub fn new(backends: Vec<Box<dyn Backend>>, ram: &MachineRam) -> Result<Self, MachineError> {
        if backends.len() > DEVICES_MAX {
            return Err(MachineError::Config(format!(
                "{} virtio devices, disks included: at most {DEVICES_MAX}",
                backends.len()
            )));
        }
        for (number, backend) in backends.iter().enumerate() {
            if backends[..number]
                .iter()
                .any(|other| other.name() == backend.name())
            {
                return Err(MachineError::Config(format!(
                    "two devices are called {}",
                    backend.name()
                )));
            }
        }
        let devices = (0..)
            .zip(backends)
            .map(|(slot, backend)| {
                let op = format!("make {}", backend.name());
                Transport::new(slot, backend, ram)
                    .map(Mutex::new)
                    .map_err(|source| MachineError::Host { op, source })
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { devices })
    }

    /// Every device's place, in order.
    pub fn windows(&self) -> Vec<Window> {
        (0..)
            .zip(&self.devices)
            .map(|(slot, device)| {
                let device = lock(device);
                Window {
                    gpa: WINDOWS_GPA + u64::from(slot) * WINDOW_BYTES,
                    gsi: GSI_FIRST + slot,
                    device_type: device.backend().device_type(),
                    features: device.backend().features(),
                    kicks: device.kicks().to_vec(),
                    interrupt: device.interrupt().clone(),
                }
            })
            .collect()
    }

    /// Window of the disk that the workload of this machine shall write and check; `None` if it shall not.
    ///
    /// # Errors
    /// [`MachineError::Config`] if it shall, and there is no disk that it may write.
    pub fn workload_disk(&self, config: &MachineConfig) -> Result<Option<u64>, MachineError> {
        if !config.workload_disk {
            return Ok(None);
        }
        let is_disk = |window: &Window| {
            window.device_type == TYPE_BLOCK && window.features & F_READ_ONLY == 0
        };
        match self.windows().into_iter().find(is_disk) {
            Some(window) => Ok(Some(window.gpa)),
            None => Err(MachineError::Config(
                "the workload shall write a disk: give it one that is not read-only".to_owned(),
            )),
        }
    }

    /// Window of the network interface that the workload of this machine shall answer on; `None` if it shall not.
    ///
    /// # Errors
    /// [`MachineError::Config`] if it shall, and there is none.
    pub fn workload_net(&self, config: &MachineConfig) -> Result<Option<u64>, MachineError> {
        if !config.workload_net {
            return Ok(None);
        }
        let is_net = |window: &Window| window.device_type == TYPE_NET;
        match self.windows().into_iter().find(is_net) {
            Some(window) => Ok(Some(window.gpa)),
            None => Err(MachineError::Config(
                "the workload shall answer packets: give it a network interface".to_owned(),
            )),
        }
    }

    /// A vCPU reads; false, and nothing done, if no device is there.
    pub fn read(&self, gpa: u64, data: &mut [u8]) -> bool {
        let Some((device, offset)) = self.at(gpa) else {
            return false;
        };
        lock(device).read(offset, data);
        true
    }

    /// A vCPU writes; false, and nothing done, if no device is there.
    pub fn write(&self, gpa: u64, data: &[u8]) -> bool {
        let Some((device, offset)) = self.at(gpa) else {
            return false;
        };
        lock(device).write(offset, data);
        true
    }

    fn at(&self, gpa: u64) -> Option<(&Mutex<Transport>, u64)> {
        let offset = gpa.checked_sub(WINDOWS_GPA)?;
        let slot = usize::try_from(offset / WINDOW_BYTES).ok()?;
        Some((self.devices.get(slot)?, offset % WINDOW_BYTES))
    }

    /// Makes everything ready that can fail for all devices to work whose drivers are ready. None of them touches anything: the answer to
    /// an error may be that the guest goes on elsewhere, from the state that was loaded here. To be called before the vCPUs run, with all
    /// disks active.
    ///
    /// # Errors
    /// The device that cannot work. None is ready then.
    pub fn prepare(&self) -> Result<(), MachineError> {
        for device in &self.devices {
            let mut device = lock(device);
            if let Err(source) = device.prepare() {
                let op = format!("let {} work", device.backend().name());
                drop(device);
                self.stand_down();
                return Err(MachineError::Host { op, source });
            }
        }
        Ok(())
    }

    /// Lets all devices work that are ready. To be called when the vCPUs run: what they have to say meanwhile waits in events. It cannot
    /// fail, because there is nobody left who could have the guest instead; a device that does not work after all is one that its driver
    /// has to reset.
    pub fn open(&self) {
        for device in &self.devices {
            lock(device).open();
        }
    }

    /// [`prepare`](Self::prepare) and [`open`](Self::open), for whoever has no vCPUs to let go in between.
    ///
    /// # Errors
    /// As [`prepare`](Self::prepare).
    pub fn start(&self) -> Result<(), MachineError> {
        self.prepare()?;
        self.open();
        Ok(())
    }

    /// The opposite: those that are ready and do not work are so no more. None has touched anything, and each is where it was.
    pub fn stand_down(&self) {
        for device in &self.devices {
            let mut device = lock(device);
            if device.is_shut()
                && let Err(error) = device.stop()
            {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(error, device = device.backend().name(), "waits on");
            }
        }
    }

    /// A pause has failed half-way, and the guest goes on here with the devices that can.
    pub fn work_again(&self) {
        for device in &self.devices {
            let mut device = lock(device);
            if let Err(error) = device.prepare() {
                device.cannot_work(&error);
            }
            device.open();
        }
    }

    /// Stops all devices. To be called after the vCPUs were stopped; on return no device writes memory or storage.
    ///
    /// # Errors
    /// The device that goes on. Those before it are stopped; [`work_again`](Self::work_again) lets all work again.
    pub fn stop(&self) -> Result<(), MachineError> {
        for device in &self.devices {
            let mut device = lock(device);
            if let Err(source) = device.stop() {
                let op = format!("stop {}", device.backend().name());
                return Err(MachineError::Host { op, source });
            }
        }
        Ok(())
    }

    /// What all devices save and load, in order.
    pub fn schemas(&self) -> Vec<DeviceSchema> {
        let schemas = self.devices.iter().map(|device| lock(device).schemas());
        schemas.flatten().collect()
    }

    /// The state of all devices, in the order of [`schemas`](Self::schemas). Only while stopped.
    ///
    /// # Errors
    /// The device that cannot be saved.
    pub fn save(&self) -> Result<Vec<Section>, DeviceError> {
        let mut sections = Vec::new();
        for device in &self.devices {
            sections.extend(lock(device).save_all()?);
        }
        Ok(sections)
    }

    /// Loads `sections`, which are those of [`schemas`](Self::schemas) in that order. Only while stopped.
    ///
    /// # Errors
    /// The device that refuses. The guest must not run then.
    pub fn load(&self, sections: &[&Section]) -> Result<(), DeviceError> {
        let mut rest = sections;
        for device in &self.devices {
            let mut device = lock(device);
            let count = device.schemas().len();
            let Some((own, others)) = rest.split_at_checked(count) else {
                return Err(DeviceError::Missing {
                    device: device.backend().name().to_owned(),
                });
            };
            device.load_all(own)?;
            rest = others;
        }
        Ok(())
    }

    /// Fresh dirty logs of what back ends write past vm-memory.
    ///
    /// # Errors
    /// The back end whose writes cannot be seen.
    pub fn dirty_logs(&self) -> Result<Vec<Box<dyn DirtyLog>>, MachineError> {
        let mut logs = Vec::new();
        for device in &self.devices {
            let device = lock(device);
            let log = device.backend().dirty_log().map_err(|source: io::Error| {
                let op = format!("make a dirty log of {}", device.backend().name());
                MachineError::Host { op, source }
            })?;
            logs.extend(log);
        }
        Ok(logs)
    }

    /// The network interfaces.
    pub fn announcers(&self) -> Vec<Arc<dyn Announce>> {
        let announcers = self
            .devices
            .iter()
            .map(|device| lock(device).backend().announcer());
        announcers.flatten().collect()
    }

    /// What a process that takes the guest over in place must have of the devices.
    ///
    /// # Errors
    /// A device has something that cannot be passed on.
    pub fn heirlooms(&self) -> io::Result<Vec<DeviceFd>> {
        let mut all = Vec::new();
        for device in &self.devices {
            all.extend(lock(device).backend().heirlooms()?);
        }
        Ok(all)
    }

    /// Lets every device take its own out of what has come from another process. Only while stopped, before anything is loaded.
    ///
    /// # Errors
    /// The device that misses something, or that has no use for it.
    pub fn take_over(&self, fds: &mut Vec<DeviceFd>) -> Result<(), DeviceError> {
        self.devices
            .iter()
            .try_for_each(|device| lock(device).backend_mut().take_over(fds))
    }

    /// What of the devices must hear of migrations.
    pub fn notifiers(&self) -> Vec<Box<dyn Notifier>> {
        let notifiers = self
            .devices
            .iter()
            .map(|device| lock(device).backend().notifier());
        notifiers.flatten().collect()
    }
}

/// A panic in a back end leaves registers behind that the guest may have written itself.
fn lock(device: &Mutex<Transport>) -> MutexGuard<'_, Transport> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}
