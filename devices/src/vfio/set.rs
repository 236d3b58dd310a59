//! All VFIO devices of a VM, moved through a migration together: no device is stopped while another might still write to it.

use std::sync::{Mutex, PoisonError};

use vmferry_transport::data::{DeviceSink, DeviceSource, StreamedDevice};
use vmferry_transport::wire::DeviceSchema;

use super::device::{DeviceSizes, Standing, VfioDevice};
use super::states::DeviceState;
use crate::DeviceError;

/// The VFIO devices of a VM.
///
/// The module's documentation shows the order of the calls. All of them may block for as long as a device takes, which is up to
/// seconds for [`stop`](Self::stop) and [`finish_load`](Self::finish_load); several devices are waited for at the same time.
#[derive(Debug, Default)]
pub struct VfioSet {
    devices: Vec<VfioDevice>,
}

/// What stands in the way of a migration.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Blocker {
    /// The device.
    pub device: String,
    /// Why it cannot migrate, and what to do.
    pub reason: String,
}

/// A device and where it ended up.
#[derive(Debug)]
pub struct Stands {
    /// The device.
    pub device: String,
    /// Where it ended up.
    pub standing: Standing,
}

impl VfioSet {
    /// The devices of a VM, all of them: one that is left out may still write to the memory of another.
    pub fn new(devices: Vec<VfioDevice>) -> Self {
        Self { devices }
    }

    /// The devices.
    pub fn devices(&self) -> &[VfioDevice] {
        &self.devices
    }

    /// Entries for the hello.
    pub fn schemas(&self) -> Vec<DeviceSchema> {
        self.devices.iter().map(VfioDevice::schema).collect()
    }

    /// Which devices stand in the way of a migration, in their order.
    pub fn blockers(&self) -> Vec<Blocker> {
        let with_others = self.devices.len() > 1;
        let blockers = self.devices.iter().filter_map(|device| {
            let reason = device.blocker(with_others)?;
            Some(Blocker {
                device: device.name().to_owned(),
                reason,
            })
        });
        blockers.collect()
    }

    /// The guest was stopped, by an operator for one: devices stop too. Not for a switchover, which has [`quiesce`](Self::quiesce) and
    /// [`stop`](Self::stop). During a migration the devices are only made quiet, so that they can be continued.
    ///
    /// A device that cannot migrate cannot be stopped either and works on: it may still write to the memory of the stopped guest, and
    /// finds its driver as it was when the guest goes on.
    ///
    /// # Errors
    /// The first device that cannot be stopped; all devices work on then.
    pub fn pause(&mut self) -> Result<(), DeviceError> {
        // Those that have just come from another process may be stopped already: to be made quiet they would have to work.
        let looked = self.all(|device| match device.has_states() {
            true => device.look(),
            false => Ok(()),
        });
        let quiet = looked.and_then(|()| self.all(VfioDevice::quiesce));
        let paused = quiet.and_then(|()| {
            self.all(|device| match device.is_saving() {
                true => Ok(()),
                false if device.has_states() => device.halt(),
                false => {
                    tracing::info!(
                        device = device.name(),
                        "device works on while the guest is stopped: its driver has no migration states"
                    );
                    Ok(())
                }
            })
        });
        match &paused {
            Ok(()) => self
                .devices
                .iter_mut()
                .for_each(|device| device.returns_to(DeviceState::Stop)),
            Err(_) => {
                for stands in self.settle(&self.goals_of_work()) {
                    stands.log("a pause that failed");
                }
            }
        }
        paused
    }

    /// Lets the devices work, before any vCPU runs: at the target after the commit, and after [`pause`](Self::pause). Whatever happens,
    /// the guest is here, so this cannot fail: it says what became of each device. One that cannot migrate works anyway and is left alone.
    ///
    /// # Errors
    /// A migration away from here is reading what the stopped devices hold: end it or roll it back first. Nothing has changed.
    pub fn run(&mut self) -> Result<Vec<Stands>, DeviceError> {
        let read =
            |device: &&VfioDevice| device.is_saving() && device.state() == DeviceState::StopCopy;
        if let Some(device) = self.devices.iter().find(read) {
            return Err(DeviceError::Stuck {
                device: device.name().to_owned(),
                reason: "its state is being read by a migration".to_owned(),
            });
        }
        for device in &mut self.devices {
            device.adopt();
            device.returns_to(DeviceState::Running);
        }
        Ok(self.settle(&self.goals_of_work()))
    }

    /// Source: the devices begin to give their state, while they work. Comes after the dirty logs were started.
    ///
    /// # Errors
    /// The first device that cannot. [`roll_back`](Self::roll_back) is owed from here on, also after an error.
    pub fn begin(&mut self) -> Result<(), DeviceError> {
        self.all(VfioDevice::begin)
    }

    /// Source: the streams of all devices, to be handed to the data path once per migration. `hello` is the list of devices that both
    /// sides know.
    ///
    /// # Errors
    /// A device that is not in the list.
    pub fn sources(
        &self,
        hello: &[DeviceSchema],
    ) -> Result<Vec<StreamedDevice<dyn DeviceSource>>, DeviceError> {
        self.streams(hello, VfioDevice::source)
    }

    /// Source: how much each device has to give, for the estimate of the blackout. Until [`quiesce`](Self::quiesce) this may change at
    /// any time; after it [`DeviceSizes::reinit`] says that a device has just begun anew, which a careful source takes for a failure.
    ///
    /// # Errors
    /// The first device that does not answer: it would not give its state either.
    pub fn sizes(&self) -> Result<Vec<(String, DeviceSizes)>, DeviceError> {
        let sizes = self
            .devices
            .iter()
            .map(|device| Ok((device.name().to_owned(), device.sizes()?)));
        sizes.collect()
    }

    /// Source: the devices begin no more access to each other. Comes after the vCPUs were stopped.
    ///
    /// # Errors
    /// The first device that cannot.
    pub fn quiesce(&mut self) -> Result<(), DeviceError> {
        self.all(VfioDevice::quiesce)
    }

    /// Source: stops the devices, after making those quiet that are not yet. The last fetch from the dirty logs comes after this, and
    /// then the last round, in which the rest of each stream is read.
    ///
    /// # Errors
    /// The first device that cannot.
    pub fn stop(&mut self) -> Result<(), DeviceError> {
        self.quiesce()?;
        self.all(VfioDevice::stop)
    }

    /// Source: the guest has left. The devices stay stopped, whatever they answer; the errors are for the log.
    pub fn end(&mut self) -> Vec<DeviceError> {
        let ended = each(&mut self.devices, |_, device| device.end());
        ended.into_iter().filter_map(Result::err).collect()
    }

    /// Source: the guest stays. Brings all devices to where they were before [`begin`](Self::begin), in whatever state they are; one
    /// that cannot go back is reset. Comes before any vCPU runs, with the data threads gone. Empty without a migration.
    pub fn roll_back(&mut self) -> Vec<Stands> {
        let goals: Vec<_> = self.devices.iter_mut().map(VfioDevice::give_up).collect();
        self.settle(&goals)
    }

    /// In place, where memory is taken from the devices for a moment: stops those that work, and remembers which. The vCPUs are stopped.
    ///
    /// # Errors
    /// The first device that cannot be stopped. [`let_go`](Self::let_go) is owed from here on, also after an error.
    pub fn hold(&mut self) -> Result<(), DeviceError> {
        self.all(VfioDevice::begin_hold)?;
        self.all(|device| match device.is_held() {
            true => device.quiesce(),
            false => Ok(()),
        })?;
        self.all(|device| match device.is_held() {
            true => device.halt(),
            false => Ok(()),
        })
    }

    /// Lets the devices work again that [`hold`](Self::hold) has stopped. Empty without it.
    pub fn let_go(&mut self) -> Vec<Stands> {
        let goals = self.devices.iter_mut().map(|device| {
            let held = device.end_hold();
            held.then_some(DeviceState::Running)
        });
        let goals: Vec<_> = goals.collect();
        self.settle(&goals)
    }

    /// In place: the devices are another process's now, whatever [`hold`](Self::hold) remembered.
    pub fn leave(&mut self) {
        for device in &mut self.devices {
            device.end_hold();
        }
    }

    /// Target: the devices are ready to be given their state. Whatever they did before is over.
    ///
    /// # Errors
    /// The first device that cannot. [`abandon_load`](Self::abandon_load) is owed from here on, also after an error.
    pub fn begin_load(&mut self) -> Result<(), DeviceError> {
        self.all(VfioDevice::prepare_load)?;
        self.all(VfioDevice::begin_load)
    }

    /// Target: where the streams of all devices go, to be handed to the data path.
    ///
    /// # Errors
    /// A device that is not in the list.
    pub fn sinks(
        &self,
        hello: &[DeviceSchema],
    ) -> Result<Vec<StreamedDevice<dyn DeviceSink>>, DeviceError> {
        self.streams(hello, VfioDevice::sink)
    }

    /// Target: every stream has ended. The devices check what they were given; they stay stopped. Comes before READY: a device that
    /// refuses its state fails the migration while the source can still go on.
    ///
    /// # Errors
    /// The first device that refuses.
    pub fn finish_load(&mut self) -> Result<(), DeviceError> {
        self.all(VfioDevice::finish_load)
    }

    /// Target: the guest does not come here. Resets the devices that were being loaded, or were loaded; they are empty afterwards.
    pub fn abandon_load(&mut self) -> Vec<Stands> {
        let stands = each(&mut self.devices, |_, device| {
            device.is_loading().then(|| Stands {
                device: device.name().to_owned(),
                standing: device.abandon(),
            })
        });
        stands.into_iter().flatten().collect()
    }

    /// Brings each device to its goal, those without one not at all. All that are to run are brought to RUNNING_P2P before any goes on
    /// to RUNNING, so that no device writes to one that is still stopped.
    fn settle(&mut self, goals: &[Option<DeviceState>]) -> Vec<Stands> {
        let first = each(&mut self.devices, |index, device| match goals[index] {
            Some(DeviceState::Running) if device.passes_p2p() => {
                device.back(DeviceState::RunningP2p)
            }
            _ => Standing::Sound,
        });
        let second = each(&mut self.devices, |index, device| {
            let goal = goals[index]?;
            // One that was reset in the first step runs, and one that is lost is not asked again.
            let sound = matches!(first[index], Standing::Sound);
            Some(sound.then(|| device.back(goal)))
        });
        let names = self.devices.iter().map(VfioDevice::name);
        let stands = names.zip(first.into_iter().zip(second));
        let stands = stands.filter_map(|(device, (first, second))| {
            Some(Stands {
                device: device.to_owned(),
                standing: second?.unwrap_or(first),
            })
        });
        stands.collect()
    }

    fn goals_of_work(&self) -> Vec<Option<DeviceState>> {
        let goals = self.devices.iter();
        // A way to a state that a device does not have would end in a reset under the guest's driver.
        let goals = goals.map(|device| device.has_states().then(|| device.working()));
        goals.collect()
    }

    /// All devices at once; the first error in the order of the devices.
    fn all(
        &mut self,
        what: impl Fn(&mut VfioDevice) -> Result<(), DeviceError> + Sync,
    ) -> Result<(), DeviceError> {
        each(&mut self.devices, |_, device| what(device))
            .into_iter()
            .collect()
    }

    fn streams<S: ?Sized>(
        &self,
        hello: &[DeviceSchema],
        stream: impl Fn(&VfioDevice) -> Option<Box<S>>,
    ) -> Result<Vec<StreamedDevice<S>>, DeviceError> {
        let mut streams = Vec::new();
        for device in &self.devices {
            let at = hello.iter().position(|entry| entry.name == device.name());
            let index = at.and_then(|at| u16::try_from(at).ok());
            let index = index.ok_or_else(|| DeviceError::Unknown {
                device: device.name().to_owned(),
            })?;
            if let Some(stream) = stream(device) {
                streams.push(StreamedDevice {
                    index,
                    name: device.name().to_owned(),
                    stream,
                });
            }
        }
        Ok(streams)
    }
}

impl Stands {
    /// Writes what is worth knowing to the log; `after` says what the device came through.
    pub fn log(&self, after: &str) {
        let Self { device, standing } = self;
        match standing {
            Standing::Sound => tracing::debug!(device, after, "device works as before"),
            Standing::Reset(error) => tracing::error!(
                device,
                after,
                error = error as &dyn std::error::Error,
                "device had to be reset; the guest's driver must set it up again"
            ),
            Standing::Lost { error, reset } => tracing::error!(
                device,
                after,
                error = error as &dyn std::error::Error,
                reset = reset as &dyn std::error::Error,
                "device is lost: neither a transition nor a reset brings it back"
            ),
        }
    }
}

/// Does `what` for all devices at the same time; the answers come in the order of the devices.
fn each<T: Send>(
    devices: &mut [VfioDevice],
    what: impl Fn(usize, &mut VfioDevice) -> T + Sync,
) -> Vec<T> {
    if let [device] = devices {
        return vec![what(0, device)];
    }
    let mut answers = Vec::new();
    answers.resize_with(devices.len(), || None);
    let threads = devices.len();
    let queue = Mutex::new(devices.iter_mut().zip(&mut answers).enumerate());
    let take = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
    let work = || {
        while let Some((index, (device, answer))) = take() {
            *answer = Some(what(index, device));
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads {
            let thread = std::thread::Builder::new().name("vfio".to_owned());
            // Without it the others have more to do.
            let _ = thread.spawn_scoped(scope, work);
        }
        work();
    });
    answers
        .into_iter()
        .map(|answer| answer.expect("the queue is empty: every device was asked"))
        .collect()
}
