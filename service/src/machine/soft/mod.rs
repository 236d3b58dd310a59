//! The built-in machine without KVM: host threads as vCPUs, running the workload on the same layout as the real guest.
//!
//! Memory, dirty logs, saved state, pause and resume are real; only the instructions are ours. So everything about a migration can
//! be shown and tested where /dev/kvm is missing, and the guest's own verification holds here as there.
//!
//! - `disk` is the disk that the first of them writes and checks, `net` the network interface that it answers on, both over `driver`
//! - `gate` stops and starts the threads, `vcpu` is what they run, `memory` how they see RAM, `saved` their state
//! - The clock of the guest is CLOCK_MONOTONIC in nanoseconds. It means nothing on another host or after a boot: a machine that
//!   loads such state goes on without a gap measured across the move. On the same host the gap is measured right through it.
//!
//! The dirty log is united of the page tables of the vCPUs' mapping and of the bitmap of the VMM's mapping.

mod disk;
mod driver;
mod gate;
mod memory;
mod net;
mod saved;
mod vcpu;

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread::JoinHandle;

use vm_memory::{Bytes, GuestAddress};
use vmferry_devices::announce::Announce;
use vmferry_devices::saved::{decode, encode, schema_of};
use vmferry_devices::soft::PagemapLog;
use vmferry_devices::vfio::VfioSet;
use vmferry_devices::vmm_writes::VmmWriteLog;
use vmferry_devices::{Device, DeviceError, Notifier};
use vmferry_transport::memory::{DirtyLog, DirtyLogError, GuestRam, UnitedLog};
use vmferry_transport::wire::{DeviceSchema, Section};

use super::heirloom::{DeviceFd, all_claimed};
use super::ram::{MachineRam, RamBacking, RamMemory};
use super::serial::{SERIAL, SerialPort};
use super::vfio::{Passed, VfioDevices};
use super::virtio::{Backend, Bus};
use super::workload::loader::{self, LoadOptions};
use super::workload::{WorkloadStats, stats};
use super::{
    Accel, EventSink, Machine, MachineConfig, MachineError, MachineEvent, NO_GUEST, Prepared,
    ResumeError, VcpusStopped,
};
use gate::{Ended, Gate, Leave, PARK_MAX};
use memory::VcpuMemory;
use saved::{SoftMachineV1, SoftVcpuV1, load_registers, save_registers};
use vcpu::{Registers, Stopped, Vcpu};

/// Name of the section about the machine as a whole.
const MACHINE: &str = "machine";

/// A machine whose vCPUs are host threads.
pub struct SoftMachine {
    config: MachineConfig,
    ram: MachineRam,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// Identity of this boot of this host; empty if the host does not tell.
    boot_id: String,
    /// Whether there is a guest whose memory may be looked at. Before, looking would only allocate memory.
    guest_loaded: AtomicBool,
}

/// What the vCPU threads and the machine share.
struct Shared {
    gate: Gate,
    memory: VcpuMemory,
    mem_bytes: u64,
    /// Registers of each vCPU. A thread holds its own while it is in the guest, everybody else may while it is parked.
    registers: Vec<Mutex<Registers>>,
    serial: Mutex<SerialPort>,
    vfio: VfioDevices,
    bus: Bus,
    events: EventSink,
}

impl SoftMachine {
    /// Builds a machine with parked vCPUs and, unless it waits for an incoming migration, the workload in memory. What happens in
    /// it goes to `events`.
    ///
    /// # Errors
    /// [`MachineError::Config`] for a configuration that makes no machine, [`MachineError::Host`] when the host refuses.
    pub fn new(config: MachineConfig, events: EventSink) -> Result<Self, MachineError> {
        config.workload.check(config.mem_bytes, config.vcpus)?;
        let ram = MachineRam::with_backing(config.mem_bytes, &config.backing, config.incoming)?;
        Self::with_ram(config, ram, events)
    }

    /// Like [`new`](Self::new) around RAM that is there already. The workload is not loaded if `config.incoming`.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_ram(
        config: MachineConfig,
        ram: MachineRam,
        events: EventSink,
    ) -> Result<Self, MachineError> {
        Self::with_devices(config, ram, Vec::new(), Passed::FromHost, events)
    }

    /// Like [`with_ram`](Self::with_ram), with a virtio device for each of `backends` and VFIO devices from there.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_devices(
        config: MachineConfig,
        ram: MachineRam,
        backends: Vec<Box<dyn Backend>>,
        passed: Passed,
        events: EventSink,
    ) -> Result<Self, MachineError> {
        if config.linux.is_some() {
            return Err(MachineError::Config(
                "a kernel needs KVM: here the guest's program is our own, on host threads"
                    .to_owned(),
            ));
        }
        config.workload.check(config.mem_bytes, config.vcpus)?;
        let incoming = config.incoming;
        if ram.blocks().pages().to_bytes() != config.mem_bytes {
            return Err(MachineError::Config(format!(
                "RAM has {} bytes, the machine {}",
                ram.blocks().pages().to_bytes(),
                config.mem_bytes
            )));
        }
        let bus = Bus::new(backends, &ram)?;
        if !incoming {
            load_workload(&config, &ram, &bus)?;
        }
        let vfio = VfioDevices::open(&config.vfio, passed, &ram, None)?;
        if vfio.echoes() != 0 {
            let text = "x-echo of a VFIO device needs KVM: vCPUs that are host threads do no I/O";
            return Err(MachineError::Config(text.to_owned()));
        }
        let shared = Arc::new(Shared {
            gate: Gate::new(config.vcpus),
            memory: VcpuMemory::new(&ram)?,
            mem_bytes: config.mem_bytes,
            registers: (0..config.vcpus).map(|_| Mutex::default()).collect(),
            serial: Mutex::new(SerialPort::new(SERIAL, &config.serial, None)?),
            vfio,
            bus,
            events,
        });
        let mut machine = Self {
            config,
            ram,
            shared,
            threads: Vec::new(),
            boot_id: boot_id(),
            guest_loaded: AtomicBool::new(!incoming),
        };
        for vcpu in 0..machine.config.vcpus {
            let shared = machine.shared.clone();
            let thread = std::thread::Builder::new()
                .name(vcpu_name(vcpu))
                .spawn(move || shared.vcpu_thread(vcpu))
                .map_err(|source| host_error(format!("start the thread of vCPU {vcpu}"), source))?;
            machine.threads.push(thread);
        }
        Ok(machine)
    }

    /// Guest memory, once there is a guest in it.
    fn guest_memory(&self) -> Option<&RamMemory> {
        self.guest_loaded
            .load(Ordering::Acquire)
            .then(|| self.ram.memory())
    }

    /// A pause has failed half-way.
    fn run_again(&self) {
        self.shared.bus.work_again();
        // A guest that has ended stays where it is.
        let _ = self.shared.gate.resume();
    }

    fn save_machine(&self) -> SoftMachineV1 {
        SoftMachineV1 {
            mem_bytes: self.config.mem_bytes,
            vcpus: self.config.vcpus,
            boot_id: self.boot_id.clone(),
        }
    }

    /// Checks that `saved` is of a machine like this one. Returns whether its times mean something here.
    fn check_machine(&self, saved: &SoftMachineV1) -> Result<bool, DeviceError> {
        let SoftMachineV1 {
            mem_bytes,
            vcpus,
            boot_id,
        } = saved;
        if (*mem_bytes, *vcpus) != (self.config.mem_bytes, self.config.vcpus) {
            return Err(bad_state(
                MACHINE,
                format!(
                    "it is of a machine with {mem_bytes} bytes of RAM and {vcpus} vCPUs, this one has {} and {}",
                    self.config.mem_bytes, self.config.vcpus
                ),
            ));
        }
        Ok(!boot_id.is_empty() && *boot_id == self.boot_id)
    }
}

/// What to do about a guest whose writes to huge pages cannot be followed.
fn stays_in_huge_pages(backing: &RamBacking) -> String {
    let advice = match backing {
        RamBacking::File(_) => "save it in mode cpr-reboot, which leaves its memory in its file",
        RamBacking::Memfd | RamBacking::Huge(_) => {
            "it stays here until it ends; one that is to move is started on KVM, or without huge pages"
        }
    };
    format!("a guest on host threads cannot move out of huge pages: {advice}")
}

impl Machine for SoftMachine {
    fn accel(&self) -> Accel {
        Accel::Soft
    }

    fn ram(&self) -> &GuestRam {
        self.ram.blocks()
    }

    fn schemas(&self) -> Vec<DeviceSchema> {
        let serial = lock(&self.shared.serial).schema();
        let mut schemas = vec![schema_of::<SoftMachineV1>(MACHINE), serial];
        schemas
            .extend((0..self.config.vcpus).map(|vcpu| schema_of::<SoftVcpuV1>(&vcpu_name(vcpu))));
        schemas.extend(self.shared.bus.schemas());
        schemas
    }

    fn blocker(&self) -> Option<String> {
        // The kernel protects such a page as a whole or not at all, and pages are protected one by one as their turn comes.
        let huge = self.ram.is_huge();
        huge.then(|| stays_in_huge_pages(&self.config.backing))
    }

    fn dirty_log(&self) -> Result<Box<dyn DirtyLog>, MachineError> {
        if let Some(reason) = self.blocker() {
            return Err(MachineError::Config(reason));
        }
        let by_vcpus = PagemapLog::new(self.shared.memory.blocks().clone()).map_err(no_log)?;
        let by_vmm = VmmWriteLog::new(self.ram.regions().to_vec()).map_err(no_log)?;
        let mut logs: Vec<Box<dyn DirtyLog>> = vec![Box::new(by_vcpus), Box::new(by_vmm)];
        logs.extend(self.shared.vfio.dirty_logs()?);
        logs.extend(self.shared.bus.dirty_logs()?);
        Ok(Box::new(UnitedLog::new(logs)))
    }

    fn pause(&self) -> Result<VcpusStopped, MachineError> {
        self.shared.gate.stop(PARK_MAX).map_err(|timeout| {
            host_error(
                format!("pause {} of the vCPUs", timeout.running),
                io::ErrorKind::TimedOut.into(),
            )
        })?;
        if let Err(error) = self.shared.bus.stop() {
            self.run_again();
            return Err(error);
        }
        Ok(VcpusStopped::assert_all_parked())
    }

    fn prepare(&self, proof: VcpusStopped) -> Result<Prepared, ResumeError> {
        let may_run = || self.shared.gate.may_run();
        let ready = match self.guest_memory() {
            Some(_) => may_run().map_err(|ended| MachineError::Ended(ended.0)),
            None => Err(MachineError::Config(NO_GUEST.to_owned())),
        };
        match ready.and_then(|()| self.shared.bus.prepare()) {
            Ok(()) => Ok(Prepared(proof)),
            Err(source) => Err(ResumeError { proof, source }),
        }
    }

    fn go(&self, _prepared: Prepared) {
        lock(&self.shared.serial).go_on();
        match self.shared.gate.resume() {
            Ok(()) => self.shared.bus.open(),
            // Only a vCPU that runs could have ended it since it was asked. The devices wait, and a pause finds them so.
            Err(Ended(why)) => tracing::error!(why, "the guest has ended"),
        }
    }

    fn stand_down(&self, prepared: Prepared) -> VcpusStopped {
        self.shared.bus.stand_down();
        prepared.0
    }

    fn throttle(&self, percent: u8) {
        self.shared.gate.set_throttle(percent);
    }

    fn save(&self, _stopped: &VcpusStopped) -> Result<Vec<Section>, DeviceError> {
        let serial = lock(&self.shared.serial).save()?;
        let mut sections = vec![encode(MACHINE, &self.save_machine())?, serial];
        for (vcpu, registers) in (0..).zip(&self.shared.registers) {
            let name = vcpu_name(vcpu);
            let saved = save_registers(parked(&name, registers)?.clone());
            sections.push(encode(&name, &saved)?);
        }
        sections.extend(self.shared.bus.save()?);
        Ok(sections)
    }

    fn load(&self, _stopped: &VcpusStopped, sections: &[Section]) -> Result<(), DeviceError> {
        // The machine's own section comes first, so that state of another kind of machine is refused as such and not for its details.
        let machine = sections
            .iter()
            .find(|section| section.name == MACHINE)
            .ok_or_else(|| missing(MACHINE))?;
        let same_clock = self.check_machine(&decode(machine)?)?;
        let names: Vec<_> = self
            .schemas()
            .into_iter()
            .map(|schema| schema.name)
            .collect();
        let sections = in_order(&names, sections)?;
        let [_machine, serial, rest @ ..] = &sections[..] else {
            return Err(missing(SERIAL));
        };
        let Some((vcpus, virtio)) = rest.split_at_checked(self.shared.registers.len()) else {
            return Err(missing("vcpu"));
        };
        let registers = vcpus
            .iter()
            .map(|section| load_registers(section, same_clock))
            .collect::<Result<Vec<_>, _>>()?;
        lock(&self.shared.serial).restore(serial)?;
        self.shared.bus.load(virtio)?;
        for ((slot, section), registers) in self.shared.registers.iter().zip(vcpus).zip(registers) {
            *parked(&section.name, slot)? = registers;
        }
        self.guest_loaded.store(true, Ordering::Release);
        Ok(())
    }

    fn device_notifiers(&self) -> Vec<Box<dyn Notifier>> {
        self.shared.bus.notifiers()
    }

    fn notifier(&self) -> Option<Box<dyn Notifier>> {
        None
    }

    fn vfio(&self) -> Arc<Mutex<VfioSet>> {
        self.shared.vfio.set()
    }

    fn in_place_notifiers(&self) -> Vec<Box<dyn Notifier>> {
        let mut notifiers = self.shared.vfio.notifiers();
        notifiers.extend(lock(&self.shared.serial).notifier());
        notifiers
    }

    fn heirlooms(&self) -> io::Result<Vec<DeviceFd>> {
        let mut heirlooms = lock(&self.shared.serial).heirlooms()?;
        heirlooms.extend(self.shared.bus.heirlooms()?);
        heirlooms.extend(self.shared.vfio.heirlooms()?);
        Ok(heirlooms)
    }

    fn take_over(&self, _: &VcpusStopped, mut fds: Vec<DeviceFd>) -> Result<(), DeviceError> {
        lock(&self.shared.serial).take_over(&mut fds)?;
        self.shared.vfio.take_over(&mut fds)?;
        self.shared.bus.take_over(&mut fds)?;
        all_claimed(&fds)
    }

    fn announcers(&self) -> Vec<Arc<dyn Announce>> {
        self.shared.bus.announcers()
    }

    fn workload_stats(&self) -> Option<WorkloadStats> {
        self.guest_memory().and_then(stats::workload_stats)
    }

    fn reset_workload_gap(&self) {
        if let Some(memory) = self.guest_memory() {
            stats::reset_gap(memory);
        }
    }
}

impl Drop for SoftMachine {
    fn drop(&mut self) {
        self.shared.gate.quit();
        for thread in self.threads.drain(..) {
            // A panic in it has been reported where it happened.
            let _panicked = thread.join();
        }
    }
}

impl fmt::Debug for SoftMachine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SoftMachine")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

impl Shared {
    fn vcpu_thread(&self, vcpu: u32) {
        while self.gate.park(|event| (self.events)(event)) == Leave::Run {
            match self.enter_guest(vcpu) {
                Ok(()) => {}
                Err(Stopped::Exit(code)) => {
                    let reason = format!("it wrote {code} to the exit port");
                    self.gate.end(&reason, MachineEvent::GuestExit(code));
                }
                Err(Stopped::Failed(reason)) => {
                    self.gate
                        .end(&reason, MachineEvent::VcpuFailed(reason.clone()));
                }
            }
        }
    }

    /// Runs a vCPU until it has to park. A panic in it ends the guest, as a fatal error of a real vCPU does.
    fn enter_guest(&self, vcpu: u32) -> Result<(), Stopped> {
        let in_guest = std::panic::AssertUnwindSafe(|| {
            let slot = usize::try_from(vcpu).unwrap_or(usize::MAX);
            let mut registers = lock(&self.registers[slot]);
            Vcpu::enter(
                &mut registers,
                &self.memory,
                &self.bus,
                self.mem_bytes,
                vcpu,
            )?
            .run(&self.gate, |bytes| self.say(bytes))
        });
        std::panic::catch_unwind(in_guest)
            .unwrap_or_else(|_| Err(Stopped::Failed(format!("vCPU {vcpu}: internal error"))))
    }

    /// The guest writes to the serial port.
    fn say(&self, bytes: &[u8]) {
        let mut serial = lock(&self.serial);
        bytes.iter().for_each(|byte| serial.write(0, *byte));
    }
}

/// A panic leaves nothing that matters behind these locks: registers of a vCPU that panicked belong to a guest that has ended.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The registers of a parked vCPU. One that runs holds them itself: then the caller's proof is of an earlier pause.
fn parked<'a>(
    device: &str,
    registers: &'a Mutex<Registers>,
) -> Result<MutexGuard<'a, Registers>, DeviceError> {
    match registers.try_lock() {
        Ok(registers) => Ok(registers),
        Err(TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
        Err(TryLockError::WouldBlock) => Err(bad_state(device, "the vCPU is running".to_owned())),
    }
}

fn vcpu_name(vcpu: u32) -> String {
    format!("vcpu/{vcpu}")
}

fn load_workload(config: &MachineConfig, ram: &MachineRam, bus: &Bus) -> Result<(), MachineError> {
    let options = LoadOptions {
        mem_bytes: config.mem_bytes,
        vcpus: config.vcpus,
        tsc_khz: vcpu::TSC_KHZ,
        exit_after_passes: None,
        echoes: 0,
        serial: config.workload_serial,
        disk_window: bus.workload_disk(config)?,
        net_window: bus.workload_net(config)?,
    };
    for piece in loader::pieces(&config.workload, options)? {
        ram.memory()
            .write_slice(&piece.bytes, GuestAddress(piece.gpa))
            .map_err(|error| host_error("load the workload".to_owned(), io::Error::other(error)))?;
    }
    Ok(())
}

fn boot_id() -> String {
    match std::fs::read_to_string("/proc/sys/kernel/random/boot_id") {
        Ok(id) => id.trim().to_owned(),
        Err(error) => {
            tracing::debug!(%error, "no boot id: gaps are not measured across a migration");
            String::new()
        }
    }
}

/// The sections with these names, in their order: each exactly once, and no others.
fn in_order<'a>(
    names: &[String],
    sections: &'a [Section],
) -> Result<Vec<&'a Section>, DeviceError> {
    for section in sections {
        let device = section.name.clone();
        if !names.contains(&device) {
            return Err(DeviceError::Unknown { device });
        }
    }
    names
        .iter()
        .map(|name| {
            let mut found = sections.iter().filter(|section| section.name == *name);
            match (found.next(), found.next()) {
                (Some(section), None) => Ok(section),
                (Some(_), Some(_)) => Err(bad_state(name, "the stream holds it twice".to_owned())),
                (None, _) => Err(missing(name)),
            }
        })
        .collect()
}

fn missing(device: &str) -> DeviceError {
    DeviceError::Missing {
        device: device.to_owned(),
    }
}

fn bad_state(device: &str, reason: String) -> DeviceError {
    DeviceError::BadState {
        device: device.to_owned(),
        reason,
    }
}

fn host_error(op: String, source: io::Error) -> MachineError {
    MachineError::Host { op, source }
}

fn no_log(error: DirtyLogError) -> MachineError {
    host_error(
        format!("dirty log {}: {}", error.log, error.op),
        error.source,
    )
}

#[cfg(test)]
mod tests;
