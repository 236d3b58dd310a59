//! The built-in machine: memfd RAM, vCPU threads, a serial port, an exit port, and the `workload` guest.
//!
//! Two kinds behind one trait: a real KVM guest ([`Accel::Kvm`]), and the same workload on host threads where /dev/kvm is missing
//! ([`Accel::Soft`]). The engine sees [`Machine`] only.

pub mod disk;
pub mod failover;
pub mod heirloom;
pub mod kvm;
pub mod linux;
pub mod notify;
pub mod ram;
pub mod read_back;
pub mod serial;
pub mod soft;
mod throttle;
pub mod vfio;
pub mod virtio;
pub mod workload;

use std::fmt;
use std::fs::File;
use std::sync::{Arc, Mutex};

use vmferry_cpr::manifest::FdEntry;
use vmferry_devices::Before;
use vmferry_devices::announce::Announce;
use vmferry_devices::vfio::VfioSet;
use vmferry_devices::{DeviceError, Notifier};
use vmferry_transport::memory::{DirtyLog, GuestRam};
use vmferry_transport::wire::{DeviceSchema, Section};

use heirloom::DeviceFd;
use kvm::{HeadStart, KvmMachine, KvmOptions, Shape};
use ram::MachineRam;
use serial::SERIAL;
use vfio::Passed;
use virtio::Backend;
use workload::WorkloadStats;

/// What runs the guest.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Accel {
    /// A KVM virtual machine.
    Kvm,
    /// The workload on host threads; no KVM needed.
    Soft,
}

impl fmt::Display for Accel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "kvm",
            Self::Soft => "soft",
        })
    }
}

/// Which kind of machine the operator wants.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum AccelChoice {
    /// KVM where /dev/kvm can be opened, else host threads.
    #[default]
    Auto,
    /// KVM or nothing.
    Kvm,
    /// Host threads, even where there is KVM.
    Soft,
}

/// Takes what happens in a machine without being asked for. Called from vCPU threads: it must not block.
pub type EventSink = Arc<dyn Fn(MachineEvent) + Send + Sync>;

/// How to build a machine. Sizes in bytes.
#[derive(Clone, Debug)]
pub struct MachineConfig {
    /// RAM size, a multiple of 4 KiB, at least [`workload::layout::RAM_MIN`].
    pub mem_bytes: u64,
    /// What RAM is made of.
    pub backing: ram::RamBacking,
    /// Number of vCPUs, 1 to [`workload::layout::VCPUS_MAX`].
    pub vcpus: u32,
    /// What the guest does.
    pub workload: workload::WorkloadConfig,
    /// Where the serial port's output goes.
    pub serial: SerialSink,
    /// VFIO devices of the host, all with names of their own.
    pub vfio: Vec<vfio::VfioConfig>,
    /// A Linux kernel to run instead of the workload. A machine for an incoming one is built alike, and the files are not read.
    pub linux: Option<linux::LinuxConfig>,
    /// The workload overwrites its first disk, over and over, and checks what it reads back.
    pub workload_disk: bool,
    /// The workload sends UDP packets back that come to its first network interface.
    pub workload_net: bool,
    /// The workload writes the last digit of the number of each pass to the serial port.
    pub workload_serial: bool,
    /// Virtio devices with a back end or a tap outside of this process, all with names of their own.
    pub outside: virtio::OutsideConfig,
    /// Build an empty machine that waits for an incoming migration: RAM stays untouched, the workload is not loaded.
    pub incoming: bool,
}

/// What a machine is built from that comes from another process on this host.
#[derive(Debug, Default)]
pub struct Given {
    /// The files of guest memory, in the order of the blocks.
    pub ram: Vec<File>,
    /// Who had them before.
    pub before: Before,
    /// Descriptors of its devices that came with them.
    pub early: Vec<DeviceFd>,
    /// What is said of the descriptors of its devices, which come later.
    pub devices: Vec<FdEntry>,
    /// Of a machine on KVM around this memory, if it was begun.
    pub head_start: Option<HeadStart>,
}

impl MachineConfig {
    /// Whether a machine built from this waits for this descriptor of another process.
    pub fn expects(&self, entry: &FdEntry) -> bool {
        serial::output::expects(SERIAL, &self.serial, entry)
            || self.outside.expects(entry)
            || vfio::expects(&self.vfio, entry)
    }
}

/// Where the serial port's output goes.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub enum SerialSink {
    /// Nowhere.
    #[default]
    Null,
    /// This process's standard output.
    Stdio,
    /// Appended to a file.
    File(std::path::PathBuf),
    /// The file that the process writes which hands the guest over; it comes with the guest.
    Inherited,
}

/// Of a machine that waits for a guest.
const NO_GUEST: &str = "no guest has been loaded yet";

/// Proof that every vCPU thread has left the guest and will not enter it again.
///
/// Made only by [`Machine::pause`]; not `Clone`. Ends in [`Machine::prepare`], or is dropped: a dropped proof leaves the guest stopped
/// for good, it never resumes anything.
#[derive(Debug)]
#[must_use = "resume the vCPUs with it; a dropped proof leaves the guest stopped"]
pub struct VcpusStopped(());

impl VcpusStopped {
    /// For implementations of [`Machine`] in this module, once their last vCPU thread has parked.
    pub(in crate::machine) fn assert_all_parked() -> Self {
        Self(())
    }
}

/// A stopped guest whose devices are ready for it to run. Made only by [`Machine::prepare`]. Dropping it leaves the guest stopped for good
/// and the devices waiting.
#[derive(Debug)]
#[must_use = "let the guest go with it, or stand down"]
pub struct Prepared(VcpusStopped);

/// Something that happened in the machine without being asked for.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum MachineEvent {
    /// The guest wrote the exit port; all vCPUs are parked. The value is what it wrote.
    GuestExit(u8),
    /// A vCPU cannot go on: triple fault, internal error. All vCPUs are parked. The text says which and why.
    VcpuFailed(String),
}

/// Why the machine could not be built, stopped or started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MachineError {
    /// The configuration makes no machine. The caller is at fault.
    #[error("{0}")]
    Config(String),
    /// The host refused. The text says what was asked.
    #[error("{op} failed")]
    Host {
        /// What was asked of the host.
        op: String,
        /// Its answer.
        #[source]
        source: std::io::Error,
    },
    /// A device failed.
    #[error("machine state")]
    Device(#[from] DeviceError),
    /// A disk is not ours to use. The guest stays stopped.
    #[error(transparent)]
    Disk(#[from] disk::DiskError),
    /// The guest ended by itself (exit port or a fatal vCPU error) and cannot be started again.
    #[error("the guest has ended: {0}")]
    Ended(String),
}

/// A machine could not resume. The proof comes back, so that the caller may try again.
#[derive(Debug, thiserror::Error)]
#[error("the vCPUs could not be resumed")]
pub struct ResumeError {
    /// The guest is still stopped.
    pub proof: VcpusStopped,
    /// Why.
    #[source]
    pub source: MachineError,
}

/// Builds the kind of machine that `choice` asks for, with a virtio device for each of `backends` and of those outside; for [`AccelChoice::Auto`], KVM
/// wherever this process may open /dev/kvm.
///
/// # Errors
/// When the configuration makes no machine, or the host lacks what was asked for.
pub fn build(
    config: &MachineConfig,
    given: Option<Given>,
    mut backends: Vec<Box<dyn Backend>>,
    choice: AccelChoice,
    events: EventSink,
) -> Result<Arc<dyn Machine>, MachineError> {
    let soft = match choice {
        AccelChoice::Kvm => false,
        AccelChoice::Soft => true,
        AccelChoice::Auto if config.linux.is_some() => false,
        AccelChoice::Auto => match kvm_ioctls::Kvm::new() {
            Ok(_) => false,
            Err(error) => {
                tracing::info!(%error, "/dev/kvm cannot be used, the workload runs on host threads");
                true
            }
        },
    };
    let mut begun = None;
    let (ram, promised, passed) = match given {
        Some(given) => {
            let fits = |begun: &HeadStart| !soft && begun.fits(Shape::of(config));
            begun = given
                .head_start
                .filter(fits)
                .map(HeadStart::finish)
                .transpose()?;
            let ram = match &begun {
                Some(begun) => begun.ram().clone(),
                None => MachineRam::from_files(config.mem_bytes, given.ram)?,
            };
            let passed = Passed::From(given.before, given.early);
            (ram, Some((given.before, given.devices)), passed)
        }
        None => {
            let (bytes, backing) = (config.mem_bytes, &config.backing);
            let ram = MachineRam::with_backing(bytes, backing, config.incoming)?;
            (ram, None, Passed::FromHost)
        }
    };
    let of_devices = promised
        .as_ref()
        .map(|(before, devices)| (*before, devices.as_slice()));
    backends.extend(config.outside.backends(&ram, of_devices)?);
    let mut config = config.clone();
    if let Some((_, promised)) = &promised {
        config.serial = serial::output::inherited(SERIAL, &config.serial, promised);
    }
    if soft {
        let machine = soft::SoftMachine::with_devices(config, ram, backends, passed, events)?;
        return Ok(Arc::new(machine));
    }
    Ok(Arc::new(match begun {
        Some(begun) => KvmMachine::with_head_start(&config, begun, backends, passed, events)?,
        None => {
            let options = KvmOptions::default();
            KvmMachine::with_devices(&config, ram, &options, backends, passed, events)?
        }
    }))
}

/// What the engine needs of a VM. All calls may block for milliseconds and come from one thread at a time, except
/// [`workload_stats`](Self::workload_stats), which may come at any time from any thread.
///
/// A machine is built with its vCPUs parked; the first proof comes from [`pause`](Self::pause) like any other.
pub trait Machine: Send + Sync {
    /// What runs the guest.
    fn accel(&self) -> Accel;

    /// All RAM.
    fn ram(&self) -> &GuestRam;

    /// What this machine saves and loads, in the order it does so.
    fn schemas(&self) -> Vec<DeviceSchema>;

    /// Dirty logs that together see every write to RAM by anybody. Each call makes a fresh, unstarted one; only one may be
    /// started at a time.
    ///
    /// # Errors
    /// When the host lacks the interface.
    fn dirty_log(&self) -> Result<Box<dyn DirtyLog>, MachineError>;

    /// Takes every vCPU out of the guest and keeps it out. On return no vCPU writes memory any more, and what the machine's own
    /// devices write is done too. Calling it while paused gives a second proof and is a bug of the caller, but harmless.
    ///
    /// # Errors
    /// [`MachineError::Host`]; the vCPUs then run as before.
    fn pause(&self) -> Result<VcpusStopped, MachineError>;

    /// Makes everything ready that can fail for the guest to run. Nothing is touched by it that belongs to the guest: whoever is told that it
    /// did not start here may go on with the same memory from the state that was loaded here.
    ///
    /// # Errors
    /// The proof comes back with the reason: the guest has ended, or the host refused.
    fn prepare(&self, proof: VcpusStopped) -> Result<Prepared, ResumeError>;

    /// Lets the vCPUs run and the devices work. From here on the guest runs here and nowhere else, so this cannot fail. A device that does
    /// not work all the same is broken as its driver sees it.
    fn go(&self, prepared: Prepared);

    /// The guest does not run after all: undoes [`prepare`](Self::prepare).
    fn stand_down(&self, prepared: Prepared) -> VcpusStopped;

    /// [`prepare`](Self::prepare) and [`go`](Self::go), for a guest without VFIO devices, or whose work already.
    ///
    /// # Errors
    /// As [`prepare`](Self::prepare).
    fn resume(&self, proof: VcpusStopped) -> Result<(), ResumeError> {
        self.go(self.prepare(proof)?);
        Ok(())
    }

    /// Keeps every vCPU from running for `percent` of the time, at most 99; 0 lets them run freely. Counts at once, also for a guest that
    /// is stopped and started later; never blocks, and never delays a [`pause`](Self::pause).
    fn throttle(&self, percent: u8);

    /// State of every device, vCPUs included. Changes nothing.
    ///
    /// # Errors
    /// The device that cannot be saved, by name.
    fn save(&self, stopped: &VcpusStopped) -> Result<Vec<Section>, DeviceError>;

    /// Loads the state of every device. Unknown, missing and doubled sections are errors that name the device.
    ///
    /// # Errors
    /// The machine is then half-loaded and must not run; loading again may repair it.
    fn load(&self, stopped: &VcpusStopped, sections: &[Section]) -> Result<(), DeviceError>;

    /// Why the guest cannot move to other memory for as long as this machine lives, and what to do; `None` if it can.
    fn blocker(&self) -> Option<String> {
        None
    }

    /// What of this machine itself must hear of migrations, if anything must.
    fn notifier(&self) -> Option<Box<dyn Notifier>>;

    /// What of its virtio devices must hear of migrations.
    fn device_notifiers(&self) -> Vec<Box<dyn Notifier>>;

    /// The VFIO devices, shared with whoever leads migrations: it stops them after the vCPUs, streams their state beside RAM, and lets
    /// them work before the vCPUs run. [`pause`](Self::pause), [`resume`](Self::resume), [`save`](Self::save) and [`load`](Self::load)
    /// leave them alone.
    fn vfio(&self) -> Arc<Mutex<VfioSet>> {
        Arc::default()
    }

    /// What must hear of upgrades in place, and of nothing else.
    fn in_place_notifiers(&self) -> Vec<Box<dyn Notifier>> {
        Vec::new()
    }

    /// The network interfaces, which announce the guest after it has moved here. A machine without any has nothing to announce.
    fn announcers(&self) -> Vec<Arc<dyn Announce>> {
        Vec::new()
    }

    /// Of a machine on KVM, what of one like it can be begun before all is known.
    fn shape(&self) -> Option<Shape> {
        None
    }

    /// Copies of what a process that takes the guest over in place must have of the devices.
    ///
    /// # Errors
    /// A device has something that cannot be passed on.
    fn heirlooms(&self) -> std::io::Result<Vec<DeviceFd>>;

    /// Takes over what has come from another process, whose devices have let go; before [`load`](Self::load). An ordinary machine gets
    /// nothing, and waits for nothing.
    ///
    /// # Errors
    /// A device misses something or cannot use it, or there is no such device.
    fn take_over(&self, stopped: &VcpusStopped, fds: Vec<DeviceFd>) -> Result<(), DeviceError>;

    /// What the workload says of itself, read from guest memory; `None` if another guest runs, or none is loaded yet.
    fn workload_stats(&self) -> Option<WorkloadStats>;

    /// Asks the workload to forget the longest gap seen so far. This is a write of the VMM into guest memory, and is logged as such.
    fn reset_workload_gap(&self);
}
