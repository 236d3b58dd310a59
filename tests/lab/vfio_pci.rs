//! A PCI device behind an IOMMU, as hardware is: QEMU's `edu`, which copies between guest memory and a buffer of its own. It reaches the
//! guest's memory at the guest's addresses, its driver cannot migrate, and what it writes is not missed.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vmferry::machine::soft::SoftMachine;
use vmferry::machine::vfio::VfioConfig;
use vmferry::machine::virtio::OutsideConfig;
use vmferry::machine::workload::WorkloadConfig;
use vmferry::machine::{Machine as _, MachineConfig, SerialSink};
use vmferry_transport::memory::DirtyMap;
use vmferry_transport::units::{BlockId, PageCount, PageIndex};

use crate::harness::{Accel, Launch, Machine, until};
use crate::modules::load;
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

#[test]
fn a_pci_device_reaches_the_memory_of_its_guest_and_blocks_migrate() {
    let path = edu();
    let machine = Machine {
        mem: "16M",
        working_set: "256K",
        dirty_rate: "640",
        fill: "512K",
        ..Machine::small(Accel::Soft)
    };
    let launch = Launch::default().with(&["--vfio", path.to_str().unwrap()]);
    let mut vm = machine.start_source(launch);
    vm.warm_up();
    let info = vm.query("query-migrate");
    let reason = info["blocked-reasons"][0].as_str().unwrap();
    assert!(reason.contains("vfio/0"), "{reason}");

    let device = Edu::new(opened_by(vm.pid()).remove(0));
    let last = MEM - PAGE;
    device.copy(PARAMETERS, last);
    let memory = fs::read_dir(format!("/proc/{}/fd", vm.pid())).unwrap();
    let memory = memory
        .map(|entry| entry.unwrap().path())
        .find(|fd| fs::read_link(fd).is_ok_and(|to| to.to_string_lossy().starts_with("/memfd:")))
        .unwrap();
    let memory = File::open(memory).unwrap();
    let page = |at| {
        let mut page = vec![0; usize::try_from(PAGE).unwrap()];
        memory.read_exact_at(&mut page, at).unwrap();
        page
    };
    assert_eq!(&page(last)[..8], b"VMFWORK1");
    assert_eq!(page(last), page(PARAMETERS));
    vm.assert_guest_works();
}

#[test]
fn what_a_pci_device_writes_is_in_the_dirty_log() {
    let path = edu();
    let config = MachineConfig {
        mem_bytes: MEM,
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
