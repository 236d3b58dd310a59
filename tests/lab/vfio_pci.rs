//! A PCI device behind an IOMMU, as hardware is: QEMU's `edu`, which copies between guest memory and a buffer of its own. It reaches the
//! guest's memory at the guest's addresses, its driver cannot migrate, and what it writes is not missed. It goes on with its DMA while the
//! VM changes its process.

use std::ffi::CString;
use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::{FileOffset, GuestAddress, GuestRegionMmap, MmapRegion};
use vmferry::machine::ram::RamBacking;
use vmferry::machine::soft::SoftMachine;
use vmferry::machine::vfio::VfioConfig;
use vmferry::machine::virtio::OutsideConfig;
use vmferry::machine::workload::WorkloadConfig;
use vmferry::machine::{Machine as _, MachineConfig, SerialSink};
use vmferry_devices::vfio::reach::Way;
use vmferry_devices::vfio::{Reach, Reached, join, open_container, open_device};
use vmferry_transport::memory::DirtyMap;
use vmferry_transport::units::{BlockId, PageCount, PageIndex};

use crate::harness::{Accel, Launch, Machine, until};
use crate::modules::load;
use crate::new_process::Moved;
use crate::successor::Waiting;
use crate::vfio_machine::opened_by;

/// Where the regions of a PCI device lie in its file.
const BAR0: u64 = 0;
const CONFIG: u64 = 7 << 40;
/// In its configuration space; memory accesses, and DMA.
const COMMAND: u64 = CONFIG + 4;
const ENABLED: u16 = 6;
/// In the first region of edu.
const DMA_FROM: u64 = BAR0 + 0x80;
const DMA_TO: u64 = BAR0 + 0x88;
const DMA_BYTES: u64 = BAR0 + 0x90;
const DMA_COMMAND: u64 = BAR0 + 0x98;
/// Where DMA finds the device's own buffer.
const BUFFER: u64 = 0x4_0000;
const START: u64 = 1;
const TO_MEMORY: u64 = 2;

const PAGE: u64 = 4096;
const MEM: u64 = 16 << 20;
/// Of the workload: begins with what is surely not zero.
const PARAMETERS: u64 = 0x1_0000;

/// Gives the device to vfio-pci; its folder.
fn edu() -> PathBuf {
    load("vfio_iommu_type1");
    load("vfio_pci");
    let read = |device: &Path, name: &str| fs::read_to_string(device.join(name)).unwrap();
    let devices = fs::read_dir("/sys/bus/pci/devices").unwrap();
    let device = devices
        .map(|entry| entry.unwrap().path())
        .find(|device| {
            read(device, "vendor").trim() == "0x1234" && read(device, "device").trim() == "0x11e8"
        })
        .unwrap();
    fs::write(device.join("driver_override"), "vfio-pci").unwrap();
    if !device.join("driver").exists() {
        let name = device.file_name().unwrap().to_str().unwrap();
        fs::write("/sys/bus/pci/drivers_probe", name).unwrap();
    }
    device
}

/// The device, as a driver in the guest sees it.
struct Edu(File);

impl Edu {
    fn new(device: OwnedFd) -> Self {
        let device = File::from(device);
        device
            .write_all_at(&ENABLED.to_le_bytes(), COMMAND)
            .unwrap();
        Self(device)
    }

    fn set(&self, register: u64, value: u64) {
        self.0.write_all_at(&value.to_le_bytes(), register).unwrap();
    }

    fn dma(&self, from: u64, to: u64, direction: u64) {
        self.set(DMA_FROM, from);
        self.set(DMA_TO, to);
        self.set(DMA_BYTES, PAGE);
        self.set(DMA_COMMAND, START | direction);
        until("the DMA is done", || {
            let mut command = [0; 8];
            self.0.read_exact_at(&mut command, DMA_COMMAND).unwrap();
            (u64::from_le_bytes(command) & START == 0).then_some(())
        });
    }

    /// Copies a page of guest memory.
    fn copy(&self, from: u64, to: u64) {
        self.dma(from, BUFFER, 0);
        self.dma(BUFFER, to, TO_MEMORY);
    }
}

/// The file of the guest memory of a process.
fn memory_of(process: u32) -> File {
    let memory = fs::read_dir(format!("/proc/{process}/fd")).unwrap();
    let memory = memory
        .map(|entry| entry.unwrap().path())
        .find(|fd| fs::read_link(fd).is_ok_and(|to| to.to_string_lossy().starts_with("/memfd:")))
        .unwrap();
    File::options().read(true).write(true).open(memory).unwrap()
}

fn page(memory: &File, at: u64) -> Vec<u8> {
    let mut page = vec![0; usize::try_from(PAGE).unwrap()];
    memory.read_exact_at(&mut page, at).unwrap();
    page
}

/// The device copies a page of which nobody knows yet to one that nobody else writes, and it is there.
#[track_caller]
fn assert_copies(device: &Edu, memory: &File, iova: u64, byte: u8) {
    let (from, to) = (MEM - 2 * PAGE, MEM - PAGE);
    let fresh = vec![byte; usize::try_from(PAGE).unwrap()];
    memory.write_all_at(&fresh, from).unwrap();
    device.copy(iova + from, iova + to);
    assert!(page(memory, to) == fresh, "copy {byte} did not arrive");
}

/// Guest memory as another process would have it: at an address of its own.
fn mapped(memory: &File, iova: u64) -> Reached {
    let file = FileOffset::new(memory.try_clone().unwrap(), 0);
    let region = MmapRegion::<()>::from_file(file, usize::try_from(MEM).unwrap()).unwrap();
    let region = GuestRegionMmap::new(region, GuestAddress(iova)).unwrap();
    Reached {
        iova,
        memory: Arc::new(region),
    }
}

#[test]
fn dma_lands_in_the_same_memory_while_and_after_the_addresses_behind_it_change() {
    // Within the 28 bits of address that the device has.
    const IOVA: u64 = 1 << 26;
    let path = edu();
    let group = fs::read_link(path.join("iommu_group")).unwrap();
    let group = Path::new("/dev/vfio").join(group.file_name().unwrap());
    let group = File::options().read(true).write(true).open(group).unwrap();
    let container = Arc::new(open_container().unwrap());
    join(container.as_fd(), group.as_fd(), true).unwrap();
    let name = CString::new(path.file_name().unwrap().as_encoded_bytes()).unwrap();
    let device = Edu::new(open_device(group.as_fd(), &name).unwrap());
    let memory = memfd_create("ram", MemfdFlags::CLOEXEC).unwrap();
    let memory = File::from(memory);
    memory.set_len(MEM).unwrap();
    let another = || {
        let reached = vec![mapped(&memory, IOVA)];
        Reach::of_another(Arc::clone(&container), reached).unwrap()
    };

    let reached = vec![mapped(&memory, IOVA)];
    let mut old = Reach::map(Arc::clone(&container), reached).unwrap();
    assert_eq!(old.way(), Way::Addresses);
    assert_copies(&device, &memory, IOVA, 1);
    let mut new = another();
    let refused = new.take().unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EINVAL), "it is not free");
    assert_copies(&device, &memory, IOVA, 2);

    old.release().unwrap();
    assert_copies(&device, &memory, IOVA, 3);
    new.take().unwrap();
    // Its addresses are nothing any more.
    drop(old);
    assert_copies(&device, &memory, IOVA, 4);

    // The next one takes everything and dies.
    let mut next = another();
    new.release().unwrap();
    next.take().unwrap();
    assert_copies(&device, &memory, IOVA, 5);
    new.take_back().unwrap();
    // Or it only comes late.
    next.abandon();
    drop(next);
    assert_copies(&device, &memory, IOVA, 6);
    new.release().unwrap();
    another().take().unwrap();
    assert_copies(&device, &memory, IOVA, 7);
}

/// Sets a flag when it is dropped, however that comes.
struct SetAtTheEnd<'a>(&'a AtomicBool);

impl Drop for SetAtTheEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_pci_device_goes_on_with_its_dma_while_its_vm_changes_its_process() {
    let path = edu();
    let machine = Machine::emulated(Accel::Soft);
    let launch = Launch::default().with(&["--vfio", path.to_str().unwrap()]);
    let mut vm = machine.start_source(launch.clone());
    vm.warm_up();
    let device = Edu::new(opened_by(vm.pid()).remove(0));
    let memory = memory_of(vm.pid());
    let copied = AtomicU64::new(0);
    let over = AtomicBool::new(false);
    let moved = thread::scope(|scope| {
        // The scope waits for the thread, also if something fails.
        let _over = SetAtTheEnd(&over);
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let count = copied.fetch_add(1, Ordering::Relaxed);
                assert_copies(&device, &memory, 0, u8::try_from(count % 251).unwrap());
            }
        });
        // A new process that takes over and dies, and then one that lives.
        let mut waiting = Waiting::on(&vm.qmp_path(), &machine, &launch.words());
        waiting.dies_when_ready(&mut vm, |_| {
            let before = copied.load(Ordering::Relaxed);
            until(
                "the device copies while the guest is between two processes",
                || (copied.load(Ordering::Relaxed) > before + 2).then_some(()),
            );
        });
        vm.assert_guest_works();
        Moved::from(vm.qmp_path())
    });
    assert_eq!(vm.wait_exit().code(), Some(0), "{}", vm.said());
    assert!(copied.load(Ordering::Relaxed) > 3);
    // With the memory of the process that has it now.
    let memory = memory_of(moved.pid);
    assert_copies(&device, &memory, 0, 252);
    moved.assert_passes(2);
    let moved = moved.again();
    assert_copies(&device, &memory, 0, 253);
    moved.assert_passes(2);
    // Another program in this process.
    let moved = moved.execs();
    assert_copies(&device, &memory, 0, 254);
    moved.assert_passes(2);
    // It cannot be stopped, and nothing is asked of it that would end in a reset.
    for command in ["stop", "cont"] {
        moved.query(command);
        assert_copies(&device, &memory, 0, 255);
    }
    let said = vm.said();
    assert!(
        !said.contains("device is lost") && !said.contains("to be reset"),
        "{said}"
    );
}

#[test]
fn a_pci_device_reaches_the_memory_of_its_guest_and_blocks_migrate() {
    let path = edu();
    let machine = Machine::emulated(Accel::Soft);
    let launch = Launch::default().with(&["--vfio", path.to_str().unwrap()]);
    let mut vm = machine.start_source(launch);
    vm.warm_up();
    let info = vm.query("query-migrate");
    let reason = info["blocked-reasons"][0].as_str().unwrap();
    assert!(reason.contains("vfio/0"), "{reason}");

    let device = Edu::new(opened_by(vm.pid()).remove(0));
    let last = MEM - PAGE;
    device.copy(PARAMETERS, last);
    let memory = memory_of(vm.pid());
    let page = |at| page(&memory, at);
    assert_eq!(&page(last)[..8], b"VMFWORK1");
    assert_eq!(page(last), page(PARAMETERS));
    vm.assert_guest_works();
}

#[test]
fn what_a_pci_device_writes_is_in_the_dirty_log() {
    let path = edu();
    let config = MachineConfig {
        mem_bytes: MEM,
        backing: RamBacking::default(),
        vcpus: 1,
        workload: WorkloadConfig {
            working_set_bytes: 1 << 20,
            dirty_pages_per_sec: Some(1000),
            fill_bytes: 0,
        },
        serial: SerialSink::Null,
        vfio: vec![VfioConfig {
            path,
            id: "0".to_owned(),
            echo: false,
        }],
        linux: None,
        workload_disk: false,
        workload_net: false,
        workload_serial: false,
        outside: OutsideConfig::default(),
        incoming: false,
    };
    let machine = SoftMachine::new(config, Arc::new(|_| {})).unwrap();
    let device = Edu::new(opened_by(std::process::id()).remove(0));
    let mut log = machine.dirty_log().unwrap();
    log.start().unwrap();
    let mut fetch = || {
        let mut map = DirtyMap::new([PageCount(MEM / PAGE)]);
        log.fetch(&mut map).unwrap();
        map
    };
    fetch();
    // Its container says that everything was written: the IOMMU keeps no record. What counts is that nothing is missed.
    let last = PageIndex(MEM / PAGE - 1);
    device.copy(PARAMETERS, last.0 * PAGE);
    assert!(fetch().block(BlockId(0)).contains(last));
    log.stop().unwrap();
}
