//! One VFIO device that migrates: which request comes when, and the way back when one fails.
//!
//! A request that fails leaves a debt: the device may be in any state on the way. Nothing here pays it at once, because the guest may
//! still run or not run any more; [`back`](VfioDevice::back) does, for whatever state it finds.

use std::fs::File;
use std::io;
use std::sync::Arc;

use vmferry_transport::data::{DeviceSink, DeviceSource};
use vmferry_transport::wire::DeviceSchema;

use super::face::VfioFace;
use super::states::{self, DeviceState, Support};
use super::stream::{Session, Sink, Source};
use crate::DeviceError;

/// Schema of the stream, in the hello.
pub const SCHEMA: &str = "vfio-v2";
/// Version of the schema: the kernel's stream, byte by byte.
pub const SCHEMA_VERSION: u32 = 1;

/// A VFIO device of a VM.
pub struct VfioDevice {
    name: String,
    face: Arc<dyn VfioFace>,
    support: io::Result<Option<Support>>,
    /// The last state that is known.
    state: DeviceState,
    saving: Option<Saving>,
    loading: Option<Arc<Session>>,
    /// It worked, and was stopped to change its process.
    held: bool,
}

/// A migration away from here.
struct Saving {
    session: Arc<Session>,
    /// Where the device was before.
    before: DeviceState,
}

/// How much a device has to give, in bytes.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct DeviceSizes {
    /// Of what it has to give once, before it is stopped. While this is not 0 a switchover should wait; `switchover-ack` is about it.
    pub initial_bytes: u64,
    /// Of what has changed since it was given; more may come.
    pub dirty_bytes: u64,
    /// Of what there were to send with the device stopped, if it were stopped now. `None` if it cannot tell, which means: a lot.
    pub stop_copy_bytes: Option<u64>,
    /// The device has begun anew with its initial bytes since this was last asked, so that a `switchover-ack` is due again. After the
    /// device was made quiet it means that its blackout would be long.
    pub reinit: bool,
}

/// Where a device ended up after the way back, or the way to work at the target.
#[derive(Debug)]
pub enum Standing {
    /// In the state in which it belongs, with its own state unharmed.
    Sound,
    /// It had to be reset: it is as if just switched on, and the guest's driver has to set it up again.
    Reset(DeviceError),
    /// It failed, and could not be reset. It does not work any more.
    Lost {
        /// What failed first.
        error: DeviceError,
        /// What the reset said.
        reset: io::Error,
    },
}

impl VfioDevice {
    /// A device called `name`, which is unique within the VM and the same on both sides, such as `vfio/0`. Asks the kernel how it
    /// migrates; that it does not is no error, but a [`blocker`](Self::blocker).
    pub fn new(name: impl Into<String>, face: impl VfioFace + 'static) -> Self {
        Self {
            name: name.into(),
            support: face.support(),
            face: Arc::new(face),
            state: DeviceState::Running,
            saving: None,
            loading: None,
            held: false,
        }
    }

    /// The name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How the device migrates. Nothing is supported by one that does not.
    pub fn support(&self) -> Support {
        self.support
            .as_ref()
            .ok()
            .copied()
            .flatten()
            .unwrap_or_default()
    }

    /// Requests to the device.
    pub fn face(&self) -> &Arc<dyn VfioFace> {
        &self.face
    }

    /// What both sides compare before a migration.
    pub fn schema(&self) -> DeviceSchema {
        DeviceSchema {
            name: self.name.clone(),
            schema: SCHEMA.to_owned(),
            version_min: SCHEMA_VERSION,
            version_max: SCHEMA_VERSION,
        }
    }

    /// Why the device cannot migrate, alone or `with_others`; `None` if it can.
    pub fn blocker(&self, with_others: bool) -> Option<String> {
        match &self.support {
            Err(error) => Some(format!(
                "the kernel does not say whether it can migrate: {error}"
            )),
            Ok(Some(support)) if support.stop_copy && with_others && !support.p2p => Some(
                "its driver cannot hold back access to other devices (VFIO_MIGRATION_P2P), which all need where there are several"
                    .to_owned(),
            ),
            Ok(Some(support)) if support.stop_copy => None,
            Ok(_) => Some(
                "its driver cannot move its state (VFIO_MIGRATION_STOP_COPY); unplug it first".to_owned(),
            ),
        }
    }

    /// Whether there is a state that it can be told to be in. Hardware whose driver cannot migrate works from its reset on, and the kernel
    /// does not even say so.
    pub(super) fn has_states(&self) -> bool {
        self.support().stop_copy
    }

    /// Whether a migration away from here is under way.
    pub(super) fn is_saving(&self) -> bool {
        self.saving.is_some()
    }

    /// Whether this device takes part in a migration to here.
    pub(super) fn is_loading(&self) -> bool {
        self.loading.is_some()
    }

    /// The last known state.
    pub(super) fn state(&self) -> DeviceState {
        self.state
    }

    /// Source: begins. From here on the way back is owed, whatever this returns.
    pub(super) fn begin(&mut self) -> Result<(), DeviceError> {
        self.look()?;
        if !matches!(self.state, DeviceState::Running | DeviceState::Stop) {
            return Err(DeviceError::Vetoed {
                device: self.name.clone(),
                reason: format!(
                    "it is in {}, and a migration begins in RUNNING or STOP; reset it first",
                    self.state
                ),
            });
        }
        self.loading = None;
        let session = Session::new(Arc::clone(&self.face));
        self.saving = Some(Saving {
            session: Arc::clone(&session),
            before: self.state,
        });
        // A device that is stopped would have to run for PRE_COPY, and has nothing to gain from it.
        if self.state == DeviceState::Running && self.support().has(DeviceState::PreCopy) {
            // Without it the device can still migrate.
            if self.face.enable_reinit().unwrap_or(false) {
                session.tells_reinit();
            }
            let stream = self.set(DeviceState::PreCopy)?;
            session.open(stream, false);
        }
        Ok(())
    }

    /// Source: the device's stream, for the data threads.
    pub(super) fn source(&self) -> Option<Box<dyn DeviceSource>> {
        let saving = self.saving.as_ref()?;
        Some(Box::new(Source::new(Arc::clone(&saving.session))))
    }

    /// Source: what there is to send.
    pub(super) fn sizes(&self) -> Result<DeviceSizes, DeviceError> {
        let session = self.saving.as_ref().map(|saving| &saving.session);
        let info = session
            .map_or(Ok(None), |session| session.precopy_info())
            .map_err(|source| self.kernel("VFIO_MIG_GET_PRECOPY_INFO".to_owned(), source))?;
        let info = info.unwrap_or_default();
        Ok(DeviceSizes {
            initial_bytes: info.initial_bytes,
            dirty_bytes: info.dirty_bytes,
            // An estimate is no reason to fail; without one the device counts as large.
            stop_copy_bytes: self.face.stop_copy_bytes().unwrap_or(None),
            reinit: info.reinit,
        })
    }

    /// No more access to other devices, where the device can be told so.
    pub(super) fn quiesce(&mut self) -> Result<(), DeviceError> {
        match self.state.quieter(self.support()) {
            Some(state) => self.set(state).map(drop),
            None => Ok(()),
        }
    }

    /// The state in which the device works: in which a stream that is being read goes on.
    pub(super) fn working(&self) -> DeviceState {
        match self.state {
            DeviceState::PreCopy | DeviceState::PreCopyP2p if self.is_saving() => {
                DeviceState::PreCopy
            }
            _ => DeviceState::Running,
        }
    }

    /// In place: about to be stopped if it works. From here on the way back is owed.
    pub(super) fn begin_hold(&mut self) -> Result<(), DeviceError> {
        self.look()?;
        match self.state {
            DeviceState::Running => self.held = true,
            DeviceState::Stop => {}
            state => {
                return Err(DeviceError::Vetoed {
                    device: self.name.clone(),
                    reason: format!("it is in {state}, and changes its process in RUNNING or STOP"),
                });
            }
        }
        Ok(())
    }

    /// Whether it is to work again.
    pub(super) fn is_held(&self) -> bool {
        self.held
    }

    /// Ends what [`begin_hold`](Self::begin_hold) began; returns whether it is to work again.
    pub(super) fn end_hold(&mut self) -> bool {
        std::mem::take(&mut self.held)
    }

    /// Stops a device that no migration reads.
    pub(super) fn halt(&mut self) -> Result<(), DeviceError> {
        self.set(DeviceState::Stop).map(drop)
    }

    /// Source: stops the device for good; its stream can be read to the end.
    pub(super) fn stop(&mut self) -> Result<(), DeviceError> {
        let stream = self.set(DeviceState::StopCopy)?;
        if let Some(saving) = &self.saving {
            saving.session.open(stream, true);
        }
        Ok(())
    }

    /// Source: the guest has left; the device stays stopped.
    pub(super) fn end(&mut self) -> Result<(), DeviceError> {
        let Some(saving) = self.saving.take() else {
            return Ok(());
        };
        let stopped = self.set(DeviceState::Stop);
        saving.session.close();
        stopped.map(drop)
    }

    /// Target: quiet, and not in the middle of anything. From here on [`abandon`](Self::abandon) is owed, whatever this returns.
    pub(super) fn prepare_load(&mut self) -> Result<(), DeviceError> {
        self.loading = Some(Session::new(Arc::clone(&self.face)));
        self.look()?;
        if !matches!(self.state, DeviceState::Running | DeviceState::Stop) {
            // Left behind by an earlier attempt. Nobody here needs what it has.
            self.face
                .reset()
                .map_err(|source| self.kernel("VFIO_DEVICE_RESET".to_owned(), source))?;
            self.look()?;
        }
        self.quiesce()
    }

    /// Target: ready to be written to.
    pub(super) fn begin_load(&mut self) -> Result<(), DeviceError> {
        let stream = self.set(DeviceState::Resuming)?;
        if let Some(session) = &self.loading {
            session.open(stream, false);
        }
        Ok(())
    }

    /// Target: where the device's stream goes, for the data threads.
    pub(super) fn sink(&self) -> Option<Box<dyn DeviceSink>> {
        let session = self.loading.as_ref()?;
        Some(Box::new(Sink::new(Arc::clone(session))))
    }

    /// Target: the stream is complete. The device checks it, and refuses it if it is not whole or not its own.
    pub(super) fn finish_load(&mut self) -> Result<(), DeviceError> {
        let Some(session) = self.loading.clone() else {
            return Ok(());
        };
        if session.was_refused() {
            return Err(DeviceError::BadState {
                device: self.name.clone(),
                reason: "the device has refused a part of its stream before".to_owned(),
            });
        }
        // Not further than STOP: it runs when the source cannot any more.
        let checked = self.set(DeviceState::Stop);
        session.close();
        checked.map(drop)
    }

    /// Target: what was loaded is the guest's now.
    pub(super) fn adopt(&mut self) {
        self.loading = None;
    }

    /// Source: the operator has stopped or continued the guest meanwhile; the way back leads elsewhere.
    pub(super) fn returns_to(&mut self, state: DeviceState) {
        if let Some(saving) = &mut self.saving {
            saving.before = state;
        }
    }

    /// Target: the guest does not come here. Only a reset makes a device forget what it was given.
    pub(super) fn abandon(&mut self) -> Standing {
        let Some(session) = self.loading.take() else {
            return Standing::Sound;
        };
        session.close();
        match self.face.reset() {
            Ok(()) => {
                self.state = DeviceState::Running;
                Standing::Sound
            }
            Err(reset) => Standing::Lost {
                error: DeviceError::BadState {
                    device: self.name.clone(),
                    reason: "the migration that brought it has failed".to_owned(),
                },
                reset,
            },
        }
    }

    /// Whether the way to RUNNING leads over RUNNING_P2P, where several devices wait for each other.
    pub(super) fn passes_p2p(&self) -> bool {
        use DeviceState::{PreCopyP2p, RunningP2p, Stop, StopCopy};
        let state = self.face.state().unwrap_or(self.state);
        matches!(state, Stop | StopCopy | PreCopyP2p) && self.support().has(RunningP2p)
    }

    /// Source: where the device was before the migration; `None` without one. Ends the migration: the stream is closed.
    pub(super) fn give_up(&mut self) -> Option<DeviceState> {
        let saving = self.saving.take()?;
        saving.session.close();
        Some(saving.before)
    }

    /// Brings the device to `goal` from whatever state it is in: by transitions, and where these fail by a reset.
    pub(super) fn back(&mut self, goal: DeviceState) -> Standing {
        let failed = match self.look() {
            Ok(()) if self.state == goal => return Standing::Sound,
            Ok(()) => None,
            Err(error) => Some(error),
        };
        // A state that is not known may be STOP_COPY, from where nobody may ask for PRE_COPY.
        let goal = match (&failed, goal) {
            (Some(_), DeviceState::PreCopy) => DeviceState::Running,
            _ => goal,
        };
        // Twice: the first failure may have left the device half-way, and a reset costs the guest more.
        let mut first = failed;
        for _ in 0..2 {
            // What is being written to a device is not complete, or nobody would call this. To leave RESUMING were to load it.
            if matches!(self.state, DeviceState::Error | DeviceState::Resuming) {
                break;
            }
            match self.set(goal) {
                Ok(_) => return Standing::Sound,
                Err(error) => {
                    first.get_or_insert(error);
                }
            }
        }
        let error = first.unwrap_or_else(|| self.only_reset());
        match self.face.reset() {
            Ok(()) => {
                self.state = DeviceState::Running;
                if goal == DeviceState::Stop {
                    // A device that was just reset does nothing by itself: that it runs does no harm.
                    let _ = self.set(goal);
                }
                Standing::Reset(error)
            }
            Err(reset) => Standing::Lost { error, reset },
        }
    }

    /// Asks the kernel for the state.
    pub(super) fn look(&mut self) -> Result<(), DeviceError> {
        let state = self.face.state();
        self.state =
            state.map_err(|source| self.kernel("asking for its state".to_owned(), source))?;
        Ok(())
    }

    /// Moves the device to `to`; returns the stream if that opens one.
    fn set(&mut self, to: DeviceState) -> Result<Option<File>, DeviceError> {
        let from = self.state;
        // Not left to the kernel: some never come back from looking for a way that does not exist.
        if states::path(self.support(), from, to).is_none() {
            return Err(DeviceError::Stuck {
                device: self.name.clone(),
                reason: format!("there is no way from {from} to {to}"),
            });
        }
        let stream = self.face.set_state(to).map_err(|source| {
            // It may have stopped anywhere on the way. If it does not say where, it is where it was as far as we know.
            self.state = self.face.state().unwrap_or(from);
            let now = match self.state {
                now if now == from => String::new(),
                now => format!(" (it is in {now} now)"),
            };
            let check = match (from, to) {
                (DeviceState::Resuming, DeviceState::Stop) => {
                    ", where the device checks the state it was given,"
                }
                _ => "",
            };
            self.kernel(format!("{from} -> {to}{now}{check}"), source)
        })?;
        self.state = to;
        if stream.is_some() != states::opens_stream(from, to) {
            let what = if stream.is_some() { "a" } else { "no" };
            let source = io::Error::other(format!("the kernel gave {what} stream"));
            return Err(self.kernel(format!("{from} -> {to}"), source));
        }
        Ok(stream)
    }

    fn only_reset(&self) -> DeviceError {
        DeviceError::Stuck {
            device: self.name.clone(),
            reason: format!("it was in {}, which only a reset ends", self.state),
        }
    }

    fn kernel(&self, op: String, source: io::Error) -> DeviceError {
        DeviceError::Kernel {
            device: self.name.clone(),
            op,
            source,
        }
    }
}

impl std::fmt::Debug for VfioDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VfioDevice")
            .field("name", &self.name)
            .field("support", &self.support)
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}
