//! A machine without devices: the VM, RAM in its slots, and vCPUs as they come up. KVM takes long to make them, and has to be told
//! little: after an exec they are made beside everything else that the new program has to do, while the guest stands ([`HeadStart`]).

use std::fs::File;
use std::io;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, mpsc};
use std::thread::{self, JoinHandle};

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Kvm, VmFd};
use serde::{Deserialize, Serialize};
use vm_memory::GuestMemoryRegion;
use vmferry_devices::kvm::{DirtyLogMode, Kicker, KvmVcpu, MemorySlots, VcpuProfile};

use super::vcpu_thread::Vcpu;
use super::{host, wires};
use crate::machine::ram::MachineRam;
use crate::machine::workload::layout::VCPUS_MAX;
use crate::machine::{MachineConfig, MachineError};

/// How often KVM is asked for a VM while something comes in between.
const CREATE_TRIES: u32 = 100;

/// All that KVM must know of a machine, beside its RAM.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Shape {
    /// RAM, in bytes.
    pub mem_bytes: u64,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Whether it has interrupt controllers in the kernel.
    pub irqchip: bool,
}

impl Shape {
    /// Of a machine that is built from `config`.
    pub fn of(config: &MachineConfig) -> Self {
        Self {
            mem_bytes: config.mem_bytes,
            vcpus: config.vcpus,
            irqchip: config.linux.is_some(),
        }
    }
}

/// The machine without devices.
pub(super) struct Bare {
    pub(super) ram: MachineRam,
    pub(super) slots: MemorySlots,
    pub(super) vm: Arc<VmFd>,
    pub(super) vcpus: Vec<Vcpu>,
    pub(super) profile: VcpuProfile,
}

impl Bare {
    /// Makes one: its memory on this thread, its processors on another.
    ///
    /// # Errors
    /// What the host refused, by name; or there are no vCPUs.
    pub(super) fn make(
        shape: Shape,
        ram: MachineRam,
        dirty_log: Option<DirtyLogMode>,
    ) -> Result<Self, MachineError> {
        thread::scope(|scope| {
            let (give, given) = mpsc::channel();
            let processors = thread::Builder::new()
                .name("vm-build".into())
                .spawn_scoped(scope, move || Processors::make(shape, &given))
                .map_err(host("start a thread"))?;
            let (vm, slots) = make_memory(shape, &ram, dirty_log, &give)?;
            // Whoever waits for the VM waits no more.
            drop(give);
            let Processors { vcpus, profile } = joined(processors.join())?;
            Ok(Self {
                ram,
                slots,
                vm,
                vcpus,
                profile,
            })
        })
    }
}

/// Makes the VM, which goes to `give` as soon as it may have vCPUs, and gives it its memory. KVM has tables for each page where it
/// translates addresses itself, and clears them here.
fn make_memory(
    shape: Shape,
    ram: &MachineRam,
    dirty_log: Option<DirtyLogMode>,
    give: &mpsc::Sender<Arc<VmFd>>,
) -> Result<(Arc<VmFd>, MemorySlots), MachineError> {
    let kvm = Kvm::new().map_err(host("open /dev/kvm"))?;
    let vm = Arc::new(create_vm(&kvm).map_err(host("KVM_CREATE_VM"))?);
    if shape.irqchip {
        wires::make_platform(&vm)?;
    }
    // Fails if the other thread has failed, which is found out when it is joined.
    let _ = give.send(vm.clone());
    let regions = ram.regions().iter();
    let gpas: Vec<u64> = regions.map(|region| region.start_addr().0).collect();
    let slots = MemorySlots::new(vm.clone(), ram.blocks(), &gpas, dirty_log)
        .map_err(host("give RAM to KVM"))?;
    Ok((vm, slots))
}

/// The vCPUs, and what there is to know of them.
struct Processors {
    vcpus: Vec<Vcpu>,
    profile: VcpuProfile,
}

impl Processors {
    /// Asks what the host has, which is slow where a hypervisor answers, and makes vCPUs when the VM is there.
    fn make(shape: Shape, vm: &mpsc::Receiver<Arc<VmFd>>) -> Result<Self, MachineError> {
        let kvm = Kvm::new().map_err(host("open /dev/kvm"))?;
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(host("KVM_GET_SUPPORTED_CPUID"))?;
        let gone = |_| host("make a vCPU")(io::Error::other("there is no VM"));
        let vm = vm.recv().map_err(gone)?;
        let vcpus = make_vcpus(&vm, shape.vcpus, &supported)?;
        let profile = match vcpus.first() {
            Some(first) => VcpuProfile::probe(&kvm, &vm, &first.lock(), shape.irqchip)
                .map_err(host("look at a vCPU's state"))?,
            None => return Err(MachineError::Config("a machine without vCPUs".to_owned())),
        };
        Ok(Self { vcpus, profile })
    }
}

/// Makes a VM. KVM gives up where it meets a signal, or work that io_uring has for this thread, and wants to be asked again.
fn create_vm(kvm: &Kvm) -> Result<VmFd, kvm_ioctls::Error> {
    for _ in 0..CREATE_TRIES {
        match kvm.create_vm() {
            Err(error) if error.errno() == libc::EINTR => {}
            answer => return answer,
        }
    }
    kvm.create_vm()
}

fn make_vcpus(vm: &VmFd, count: u32, supported: &CpuId) -> Result<Vec<Vcpu>, MachineError> {
    (0..count)
        .map(|number| {
            let kvm = KvmVcpu::new(vm, number, supported).map_err(host("make a vCPU"))?;
            let kicker = Kicker::new(vm, kvm.fd()).map_err(host("map a vCPU's shared page"))?;
            Ok(Vcpu {
                kvm: Mutex::new(kvm),
                kicker,
                rest_due: AtomicBool::new(false),
            })
        })
        .collect()
}

/// A machine without devices that is being made beside everything else. Nobody has to want it: dropped, it is thrown away when it is
/// done.
#[derive(Debug)]
pub struct HeadStart {
    shape: Shape,
    thread: JoinHandle<Result<Bare, MachineError>>,
}

impl HeadStart {
    /// Begins one around the memory in `ram`, the files of the blocks in their order.
    ///
    /// # Errors
    /// `InvalidInput` for a shape that no machine has; or the process is out of threads.
    pub fn begin(shape: Shape, ram: Vec<File>) -> io::Result<Self> {
        if !(1..=VCPUS_MAX).contains(&shape.vcpus) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let thread = thread::Builder::new()
            .name("vm-early".into())
            .spawn(move || make_early(shape, ram))?;
        Ok(Self { shape, thread })
    }

    /// Whether it is the beginning of such a machine.
    pub fn fits(&self, shape: Shape) -> bool {
        self.shape == shape
    }

    /// Waits until it is done.
    ///
    /// # Errors
    /// What the host refused, by name.
    pub fn finish(self) -> Result<Begun, MachineError> {
        joined(self.thread.join()).map(Begun)
    }
}

/// A machine without devices, made ahead.
#[derive(Debug)]
pub struct Begun(pub(super) Bare);

impl Begun {
    /// Its RAM.
    pub fn ram(&self) -> &MachineRam {
        &self.0.ram
    }
}

fn make_early(shape: Shape, ram: Vec<File>) -> Result<Bare, MachineError> {
    let ram = MachineRam::from_files(shape.mem_bytes, ram)?;
    Bare::make(shape, ram, None)
}

fn joined<T>(ended: thread::Result<Result<T, MachineError>>) -> Result<T, MachineError> {
    let died = |_| host("make a machine")(io::Error::other("its thread has panicked"));
    ended.map_err(died)?
}

impl std::fmt::Debug for Bare {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bare").finish_non_exhaustive()
    }
}
