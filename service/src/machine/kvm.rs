//! The built-in machine on KVM.
//!
//! ```text
//! KvmMachine --- slots: RAM as KVM sees it --- ram: the same mappings for device models and migration
//!      |
//!    board --- control: who may run          (one mutex)
//!          --- vcpus:   fd and kicker each   (thread holds the fd while in the guest)
//!          --- serial, event sink, threads
//! ```
//!
//! Building makes everything there is, with the vCPUs parked. A machine for an incoming migration is the same without the guest: its
//! RAM is not touched until pages arrive, and loading its state needs no allocation in KVM.

mod bare;
mod boot;
mod control;
mod state;
mod vcpu_thread;
mod wires;

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use kvm_bindings::{kvm_create_device, kvm_device_type_KVM_DEV_TYPE_VFIO};
use kvm_ioctls::{DeviceFd as KvmDevice, VmFd};
use vm_memory::{Bytes, GuestAddress};
use vmferry_devices::announce::Announce;
use vmferry_devices::kvm::saved::VcpuV2;
use vmferry_devices::kvm::{
    ClockMove, DirtyLogMode, KvmDirtyLog, KvmNotifier, MemorySlots, VcpuProfile,
    install_kick_handler, restore_clock, restore_irqchip, save_clock, save_irqchip, tell_paused,
    vcpu_name,
};
use vmferry_devices::saved::{decode, encode};
use vmferry_devices::vfio::VfioSet;
use vmferry_devices::vmm_writes::VmmWriteLog;
use vmferry_devices::{Device, DeviceError, Notifier};
use vmferry_transport::memory::{DirtyLog, GuestRam, UnitedLog};
use vmferry_transport::wire::{DeviceSchema, Section};

use super::heirloom::{DeviceFd, all_claimed};
use super::linux::{self, LinuxConfig};
use super::ram::MachineRam;
use super::serial::{SERIAL, SerialPort};
use super::vfio::{Passed, VfioConfig, VfioDevices};
use super::virtio::{Backend, Bus};
use super::workload::loader::{self, LoadOptions};
use super::workload::{WorkloadConfig, WorkloadStats, stats};
use super::{
    Accel, Machine, MachineConfig, MachineError, MachineEvent, NO_GUEST, Prepared, ResumeError,
    VcpusStopped,
};
use bare::Bare;
use control::Control;
use vcpu_thread::{Board, Vcpu, run_throttle, run_vcpu};

pub use bare::{Begun, HeadStart, Shape};
pub use state::{MachineV1, WorkloadV1};

/// Longest time to wait for the vCPUs to leave the guest. They need tens of microseconds; a host that takes longer is not scheduling.
const PAUSE_MAX: Duration = Duration::from_secs(10);

/// Fewer vCPUs are loaded sooner than a thread begins.
const VCPUS_PER_LOADER: usize = 2;

/// There where KVM is kvm-pvm, which runs the user mode of guests and emulates the rest.
const EMULATES_KERNELS: &str = "/sys/module/kvm_pvm";

/// What a caller may choose besides [`MachineConfig`].
#[derive(Clone, Debug, Default)]
pub struct KvmOptions {
    /// How the dirty log is driven; `None` for the best that KVM offers.
    pub dirty_log: Option<DirtyLogMode>,
    /// Passes after which the workload writes the exit port; `None` for never.
    pub exit_after_passes: Option<u64>,
}

/// A virtual machine on KVM.
#[derive(Debug)]
pub struct KvmMachine {
    config: MachineConfig,
    ram: MachineRam,
    // The threads go first, then the vCPUs with the board, then the slots, then the VM.
    board: Arc<Board>,
    slots: Arc<MemorySlots>,
    vm: Arc<VmFd>,
    profile: VcpuProfile,
    /// What the guest does, once there is one.
    workload: Mutex<Option<WorkloadConfig>>,
    /// Whether there is a guest to run. Before, its memory is not even read for statistics, because reading allocates.
    guest_loaded: AtomicBool,
}

impl KvmMachine {
    fn serial(&self) -> MutexGuard<'_, SerialPort> {
        let serial = self.board.serial.lock();
        serial.unwrap_or_else(PoisonError::into_inner)
    }

    /// Builds the machine on new RAM, with its vCPUs parked; the workload is loaded unless `config.incoming`. `events` is called on a
    /// vCPU's thread, with all vCPUs parked.
    ///
    /// # Errors
    /// [`MachineError::Config`] for a configuration that makes no machine, [`MachineError::Host`] when the host refuses.
    pub fn new(
        config: &MachineConfig,
        events: Arc<dyn Fn(MachineEvent) + Send + Sync>,
    ) -> Result<Self, MachineError> {
        let ram = MachineRam::with_backing(config.mem_bytes, &config.backing, config.incoming)?;
        Self::with_ram(config, ram, &KvmOptions::default(), events)
    }

    /// Builds the machine on `ram`, which has the size that `config` says.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_ram(
        config: &MachineConfig,
        ram: MachineRam,
        options: &KvmOptions,
        events: Arc<dyn Fn(MachineEvent) + Send + Sync>,
    ) -> Result<Self, MachineError> {
        Self::with_devices(config, ram, options, Vec::new(), Passed::FromHost, events)
    }

    /// Like [`with_ram`](Self::with_ram), with a virtio device for each of `backends` and VFIO devices from there.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_devices(
        config: &MachineConfig,
        ram: MachineRam,
        options: &KvmOptions,
        backends: Vec<Box<dyn Backend>>,
        passed: Passed,
        events: Arc<dyn Fn(MachineEvent) + Send + Sync>,
    ) -> Result<Self, MachineError> {
        config.workload.check(config.mem_bytes, config.vcpus)?;
        if ram.blocks().pages().to_bytes() != config.mem_bytes {
            return Err(MachineError::Config(format!(
                "RAM has {} bytes, the machine {}",
                ram.blocks().pages().to_bytes(),
                config.mem_bytes
            )));
        }
        let bare = Bare::make(Shape::of(config), ram, options.dirty_log)?;
        Self::around(config, bare, options, backends, passed, events)
    }

    /// Like [`with_devices`](Self::with_devices), around what was begun before for a machine of this shape.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_head_start(
        config: &MachineConfig,
        begun: Begun,
        backends: Vec<Box<dyn Backend>>,
        passed: Passed,
        events: Arc<dyn Fn(MachineEvent) + Send + Sync>,
    ) -> Result<Self, MachineError> {
        config.workload.check(config.mem_bytes, config.vcpus)?;
        let options = KvmOptions::default();
        Self::around(config, begun.0, &options, backends, passed, events)
    }

    fn around(
        config: &MachineConfig,
        bare: Bare,
        options: &KvmOptions,
        backends: Vec<Box<dyn Backend>>,
        passed: Passed,
        events: Arc<dyn Fn(MachineEvent) + Send + Sync>,
    ) -> Result<Self, MachineError> {
        install_kick_handler().map_err(host("install the signal handler"))?;
        let Bare {
            ram,
            slots,
            vm,
            vcpus,
            profile,
        } = bare;
        let has_irqchip = config.linux.is_some();
        let vfio = VfioDevices::open(&config.vfio, passed, &ram, kvm_vfio(&vm, &config.vfio))?;
        let board = Arc::new(Board {
            control: Control::new(config.vcpus),
            vcpus,
            serial: Mutex::new(SerialPort::new(
                SERIAL,
                &config.serial,
                wires::serial_line(&vm, has_irqchip)?,
            )?),
            vfio,
            bus: wires::connect(Bus::new(backends, &ram)?, &vm, has_irqchip)?,
            events,
            threads: Mutex::new(Vec::new()),
        });
        let machine = Self {
            config: config.clone(),
            ram,
            board,
            slots: Arc::new(slots),
            vm,
            profile,
            workload: Mutex::new(None),
            guest_loaded: AtomicBool::new(false),
        };
        if !config.incoming {
            match &config.linux {
                Some(linux) => machine.load_linux(linux)?,
                None => machine.load_workload(options)?,
            }
        }
        machine.start_threads()?;
        Ok(machine)
    }

    /// The machine's RAM.
    pub fn machine_ram(&self) -> &MachineRam {
        &self.ram
    }

    /// What the guest does; `None` until one is loaded.
    pub fn workload(&self) -> Option<WorkloadConfig> {
        *self.workload.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How the dirty log is driven.
    pub fn dirty_log_mode(&self) -> DirtyLogMode {
        self.slots.mode()
    }

    fn load_workload(&self, options: &KvmOptions) -> Result<(), MachineError> {
        let tsc_khz = match self.board.vcpus.first() {
            Some(vcpu) => vcpu
                .lock()
                .fd()
                .get_tsc_khz()
                .map_err(host("KVM_GET_TSC_KHZ"))?,
            None => 0,
        };
        let pieces = loader::pieces(
            &self.config.workload,
            LoadOptions {
                mem_bytes: self.config.mem_bytes,
                vcpus: self.config.vcpus,
                tsc_khz,
                exit_after_passes: options.exit_after_passes,
                echoes: self.board.vfio.echoes(),
                serial: self.config.workload_serial,
                disk_window: self.board.bus.workload_disk(&self.config)?,
                net_window: self.board.bus.workload_net(&self.config)?,
            },
        )?;
        for piece in pieces {
            self.ram
                .memory()
                .write_slice(&piece.bytes, GuestAddress(piece.gpa))
                .map_err(|error| host("load the workload")(io::Error::other(error)))?;
        }
        for (number, vcpu) in (0..).zip(&self.board.vcpus) {
            boot::enter_workload(vcpu.lock().fd(), number).map_err(host("set up a vCPU"))?;
        }
        self.guest_is(Some(self.config.workload));
        Ok(())
    }

    fn load_linux(&self, linux: &LinuxConfig) -> Result<(), MachineError> {
        let MachineConfig {
            mem_bytes, vcpus, ..
        } = self.config;
        if Path::new(EMULATES_KERNELS).exists() {
            tracing::warn!(
                "KVM emulates the kernel mode of guests here: Linux will hardly come up"
            );
        }
        let windows = self.board.bus.windows();
        let entry = linux::load(linux, self.ram.memory(), mem_bytes, vcpus, &windows)?;
        if let Some(first) = self.board.vcpus.first() {
            boot::enter_linux(first.lock().fd(), entry).map_err(host("set up a vCPU"))?;
        }
        self.guest_is(None);
        Ok(())
    }

    /// Whether the VM has interrupt controllers in the kernel. The workload polls and needs none.
    fn has_irqchip(&self) -> bool {
        self.config.linux.is_some()
    }

    /// There is a guest now, and this is what it does, if it is the workload.
    fn guest_is(&self, workload: Option<WorkloadConfig>) {
        *self.workload.lock().unwrap_or_else(PoisonError::into_inner) = workload;
        self.guest_loaded.store(true, Ordering::SeqCst);
    }

    fn start_threads(&self) -> Result<(), MachineError> {
        let mut threads = self
            .board
            .threads
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        for (number, index) in (0..).zip(0..self.board.vcpus.len()) {
            let board = self.board.clone();
            let thread = thread::Builder::new()
                .name(vcpu_name(number))
                .spawn(move || run_vcpu(&board, index))
                .map_err(host("start a vCPU's thread"))?;
            threads.push(thread);
        }
        let board = self.board.clone();
        let thread = thread::Builder::new()
            .name("vm-throttle".into())
            .spawn(move || run_throttle(&board))
            .map_err(host("start the thread that throttles"))?;
        // Behind those of the vCPUs: kicks go by position.
        threads.push(thread);
        Ok(())
    }

    /// Loads the vCPUs: each takes a fraction of a millisecond, so many of them are shared out to as many threads as there are processors.
    fn load_vcpus(&self, sections: &[&Section], clock: &ClockMove) -> Result<(), DeviceError> {
        let processors = thread::available_parallelism().map_or(1, usize::from);
        let share = sections.len().div_ceil(processors).max(VCPUS_PER_LOADER);
        let (ours, theirs) = sections.split_at(share.min(sections.len()));
        let (our_vcpus, their_vcpus) = self.board.vcpus.split_at(ours.len());
        let load = |vcpus: &[Vcpu], sections: &[&Section]| {
            let mut both = vcpus.iter().zip(sections);
            both.try_for_each(|(vcpu, section)| self.load_vcpu(vcpu, section, clock))
        };
        let failed = |source| DeviceError::Kernel {
            device: "vcpu".to_owned(),
            op: "loading on another thread".to_owned(),
            source,
        };
        thread::scope(|scope| {
            let work = their_vcpus.chunks(share).zip(theirs.chunks(share));
            let spawn = |(vcpus, sections)| {
                thread::Builder::new()
                    .name("vm-load".into())
                    .spawn_scoped(scope, move || load(vcpus, sections))
                    .map_err(failed)
            };
            let others = work.map(spawn).collect::<Result<Vec<_>, _>>()?;
            let loaded = load(our_vcpus, ours);
            let panicked = |_| failed(io::Error::other("the thread has panicked"));
            let mut ended = others.into_iter().map(|it| it.join().map_err(panicked)?);
            let others_loaded = ended.by_ref().fold(Ok(()), Result::and);
            loaded.and(others_loaded)
        })
    }

    /// Loads one vCPU and reads it back: what the kernel dropped or changed is found here, before the source lets go of the guest.
    fn load_vcpu(
        &self,
        vcpu: &Vcpu,
        section: &Section,
        clock: &ClockMove,
    ) -> Result<(), DeviceError> {
        let saved: VcpuV2 = decode(section)?;
        let mut kvm = vcpu.lock();
        kvm.restore(&self.profile, &saved, Some(clock))?;
        let differences = saved.differences(&kvm.save(&self.profile)?);
        if differences.is_empty() {
            return Ok(());
        }
        Err(DeviceError::BadState {
            device: section.name.clone(),
            reason: format!("this host's KVM changed it: {}", differences.join("; ")),
        })
    }
}

impl Machine for KvmMachine {
    fn accel(&self) -> Accel {
        Accel::Kvm
    }

    fn ram(&self) -> &GuestRam {
        self.ram.blocks()
    }

    fn schemas(&self) -> Vec<DeviceSchema> {
        let mut schemas = state::schemas(self.config.vcpus, self.has_irqchip());
        schemas.extend(self.board.bus.schemas());
        schemas
    }

    fn dirty_log(&self) -> Result<Box<dyn DirtyLog>, MachineError> {
        let vmm_writes = VmmWriteLog::new(self.ram.regions().to_vec())
            .map_err(|error| host("make a dirty log")(io::Error::other(error)))?;
        let mut logs: Vec<Box<dyn DirtyLog>> = vec![
            Box::new(KvmDirtyLog::new(self.slots.clone())),
            Box::new(vmm_writes),
        ];
        logs.extend(self.board.vfio.dirty_logs()?);
        logs.extend(self.board.bus.dirty_logs()?);
        Ok(Box::new(UnitedLog::new(logs)))
    }

    fn pause(&self) -> Result<VcpusStopped, MachineError> {
        let stopped = self
            .board
            .control
            .stop_all(|| self.board.kick_all(), PAUSE_MAX);
        let error = if stopped {
            // The vCPUs first: they are who gives the devices work.
            let Err(error) = self.board.bus.stop() else {
                return Ok(VcpusStopped::assert_all_parked());
            };
            error
        } else {
            MachineError::Host {
                op: "stop the vCPUs".to_owned(),
                source: io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("not all had left the guest after {PAUSE_MAX:?}"),
                ),
            }
        };
        self.board.bus.work_again();
        // Whoever has parked goes on; a guest that has ended stays where it is.
        let _ = self.board.control.run_all();
        Err(error)
    }

    fn prepare(&self, proof: VcpusStopped) -> Result<Prepared, ResumeError> {
        let ready = match self.guest_loaded.load(Ordering::SeqCst) {
            true => self.board.control.may_run().map_err(MachineError::Ended),
            false => Err(MachineError::Config(NO_GUEST.to_owned())),
        };
        match ready.and_then(|()| self.board.bus.prepare()) {
            Ok(()) => Ok(Prepared(proof)),
            Err(source) => Err(ResumeError { proof, source }),
        }
    }

    fn go(&self, _prepared: Prepared) {
        for vcpu in &self.board.vcpus {
            if let Err(error) = tell_paused(vcpu.lock().fd()) {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(error, "the guest may take the pause for a hang");
            }
        }
        let serial = self.serial();
        serial.raise();
        serial.go_on();
        drop(serial);
        tracing::debug!("vCPUs are let go");
        match self.board.control.run_all() {
            Ok(()) => self.board.bus.open(),
            // Only a vCPU that runs could have ended it since it was asked. The devices wait, and a pause finds them so.
            Err(why) => tracing::error!(why, "the guest has ended"),
        }
    }

    fn stand_down(&self, prepared: Prepared) -> VcpusStopped {
        self.board.bus.stand_down();
        prepared.0
    }

    fn throttle(&self, percent: u8) {
        self.board.control.set_throttle(percent);
    }

    fn save(&self, _stopped: &VcpusStopped) -> Result<Vec<Section>, DeviceError> {
        let mut sections = vec![
            state::save_machine(self.config.mem_bytes, self.config.vcpus, self.workload())?,
            save_clock(&self.vm, state::CLOCK)?,
        ];
        for (number, vcpu) in (0..).zip(&self.board.vcpus) {
            sections.push(encode(
                &vcpu_name(number),
                &vcpu.lock().save(&self.profile)?,
            )?);
        }
        sections.push(
            self.board
                .serial
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .save()?,
        );
        if self.has_irqchip() {
            sections.push(save_irqchip(&self.vm, state::IRQCHIP, false)?);
        }
        sections.extend(self.board.bus.save()?);
        Ok(sections)
    }

    fn load(&self, _stopped: &VcpusStopped, sections: &[Section]) -> Result<(), DeviceError> {
        let schemas = self.schemas();
        let ordered = state::in_order(&schemas, sections)?;
        let missing = || DeviceError::Missing {
            device: state::MACHINE.to_owned(),
        };
        let [machine, clock, rest @ ..] = ordered.as_slice() else {
            return Err(missing());
        };
        let Some((vcpus, [serial, virtio @ ..])) = rest.split_at_checked(self.board.vcpus.len())
        else {
            return Err(missing());
        };
        // A half-loaded guest must not run.
        self.guest_loaded.store(false, Ordering::SeqCst);
        let workload = state::load_machine(machine, self.config.mem_bytes, self.config.vcpus)?;
        let clock = restore_clock(&self.vm, clock)?;
        self.load_vcpus(vcpus, &clock)?;
        self.board
            .serial
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .restore(serial)?;
        let virtio = if self.has_irqchip() {
            let Some((irqchip, virtio)) = virtio.split_first() else {
                return Err(missing());
            };
            // Behind the vCPUs: what waits in it goes to their local APICs.
            restore_irqchip(&self.vm, irqchip, false)?;
            virtio
        } else {
            virtio
        };
        self.board.bus.load(virtio)?;
        self.guest_is(workload);
        Ok(())
    }

    fn notifier(&self) -> Option<Box<dyn Notifier>> {
        let has_irqchip = self.has_irqchip();
        Some(Box::new(KvmNotifier::new(
            self.vm.clone(),
            has_irqchip,
            false,
        )))
    }

    fn device_notifiers(&self) -> Vec<Box<dyn Notifier>> {
        self.board.bus.notifiers()
    }

    fn vfio(&self) -> Arc<Mutex<VfioSet>> {
        self.board.vfio.set()
    }

    fn in_place_notifiers(&self) -> Vec<Box<dyn Notifier>> {
        let mut notifiers = self.board.vfio.notifiers();
        notifiers.extend(self.serial().notifier());
        notifiers
    }

    fn shape(&self) -> Option<Shape> {
        Some(Shape::of(&self.config))
    }

    fn heirlooms(&self) -> io::Result<Vec<DeviceFd>> {
        let mut heirlooms = self.serial().heirlooms()?;
        heirlooms.extend(self.board.bus.heirlooms()?);
        heirlooms.extend(self.board.vfio.heirlooms()?);
        Ok(heirlooms)
    }

    fn take_over(&self, _: &VcpusStopped, mut fds: Vec<DeviceFd>) -> Result<(), DeviceError> {
        self.serial().take_over(&mut fds)?;
        self.board.vfio.take_over(&mut fds)?;
        self.board.bus.take_over(&mut fds)?;
        all_claimed(&fds)
    }

    fn announcers(&self) -> Vec<Arc<dyn Announce>> {
        self.board.bus.announcers()
    }

    fn workload_stats(&self) -> Option<WorkloadStats> {
        if !self.guest_loaded.load(Ordering::SeqCst) || self.has_irqchip() {
            return None;
        }
        stats::workload_stats(self.ram.memory())
    }

    fn reset_workload_gap(&self) {
        if self.guest_loaded.load(Ordering::SeqCst) && !self.has_irqchip() {
            stats::reset_gap(self.ram.memory());
        }
    }
}

impl Drop for KvmMachine {
    fn drop(&mut self) {
        self.board.control.quit();
        self.board.kick_all();
        let threads = std::mem::take(
            &mut *self
                .board
                .threads
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        );
        for thread in threads {
            // A thread that panicked has been reported by its panic; there is nothing left to clean up after it. The machine may be
            // dropped by the event sink, that is on a vCPU's own thread, which cannot wait for itself.
            if thread.thread().id() != thread::current().id() {
                let _ = thread.join();
            }
        }
    }
}

/// KVM's own view of VFIO: some drivers must know which VM uses their device. Most need none.
fn kvm_vfio(vm: &VmFd, devices: &[VfioConfig]) -> Option<KvmDevice> {
    if devices.is_empty() {
        return None;
    }
    let mut request = kvm_create_device {
        type_: kvm_device_type_KVM_DEV_TYPE_VFIO,
        ..Default::default()
    };
    match vm.create_device(&mut request) {
        Ok(device) => Some(device),
        Err(error) => {
            let error = &error as &dyn std::error::Error;
            tracing::info!(error, "KVM is not told of VFIO devices");
            None
        }
    }
}

/// Names what was asked of the host in its error.
fn host<E: Into<io::Error>>(op: &str) -> impl FnOnce(E) -> MachineError {
    let op = op.to_owned();
    move |error| MachineError::Host {
        op,
        source: error.into(),
    }
}

#[cfg(test)]
mod tests;
