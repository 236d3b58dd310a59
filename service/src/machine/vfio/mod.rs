//! VFIO devices of the built-in machine: hardware and mediated devices of the host that the guest uses directly.
//!
//! Opened once, when the machine is built: the group of each device joins one container of type 1, all RAM is mapped there at the
//! addresses that the guest sees, and each device is reset. How they migrate is in `vmferry_devices::vfio`; a device that cannot is no
//! error here but stands in the way of `migrate`. The guest reaches their regions through windows, see [`window`].
//!
//! A device belongs to one process at a time, so source and target on one host need two. In an upgrade in place it is the same device: the
//! new process gets its descriptor and that of its group before it builds the machine, and opens nothing; the container comes when the
//! guest is stopped.

mod config;
mod opened;
pub mod window;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use kvm_ioctls::DeviceFd as KvmDevice;
use vm_memory::GuestMemoryRegion;
use vmferry_cpr::manifest::{FdEntry, FdKind};
use vmferry_devices::Before;
use vmferry_devices::vfio::in_place::{self, SharedReach};
use vmferry_devices::vfio::{
    ContainerFace, FdContainer, FdFace, Mapped, Reach, Reached, Region, VfioDevice, VfioInPlace,
    VfioSet, dirty_logs, regions,
};
use vmferry_devices::{DeviceError, Notifier};
use vmferry_transport::memory::DirtyLog;
use vmferry_transport::units::{BlockId, PageIndex};

use super::MachineError;
use super::heirloom::{DeviceFd, claim, promised};
use super::ram::MachineRam;
use opened::Opened;
use window::{Place, REGION_BYTES};

pub use config::{VfioConfig, name_vfio};

/// What descriptors are called that belong to all devices together.
const ALL: &str = "vfio";
/// Roles of the descriptors.
const CONTAINER: &str = "container";
const GROUP: &str = "group";
const DEVICE: &str = "device";

/// Where a machine's devices come from.
#[derive(Debug)]
pub enum Passed {
    /// They are opened.
    FromHost,
    /// From whoever takes care of the guest now, or did before. Their container comes later.
    From(Before, Vec<DeviceFd>),
}

/// The VFIO devices of a machine.
#[derive(Debug, Default)]
pub struct VfioDevices {
    reach: SharedReach,
    /// RAM as devices reach it, by our own addresses.
    memory: Vec<Reached>,
    mapped: Vec<Mapped>,
    /// Who had them, if somebody had.
    before: Option<Before>,
    /// Comes later in a process that takes over from another.
    container: OnceLock<Container>,
    set: Arc<Mutex<VfioSet>>,
    doors: Vec<Door>,
    /// Which devices the workload uses as serial ports that echo.
    echoes: u16,
    /// KVM's own view of VFIO: it knows the groups for as long as this is open.
    kvm: Option<KvmDevice>,
}

#[derive(Debug)]
struct Container {
    fd: Arc<OwnedFd>,
    /// Why devices cannot stay while the process changes.
    blocker: Option<String>,
}

/// What the guest sees of a device.
#[derive(Debug)]
struct Door {
    name: String,
    device: Arc<OwnedFd>,
    group: Arc<OwnedFd>,
    regions: Vec<Region>,
}

/// Whether a machine with these devices waits for this descriptor of another process.
pub(super) fn expects(configs: &[VfioConfig], entry: &FdEntry) -> bool {
    let what = (entry.role.as_str(), entry.kind);
    let mut devices = configs.iter();
    match what {
        (CONTAINER, FdKind::VfioContainer) => entry.name == ALL && !configs.is_empty(),
        (GROUP, FdKind::VfioGroup) | (DEVICE, FdKind::VfioDevice) => {
            devices.any(|device| device.device_name() == entry.name)
        }
        _ => false,
    }
}

/// A descriptor that a machine with these devices needs of another process and that is not among those of its VM: device and role.
pub fn missing(configs: &[VfioConfig], entries: &[FdEntry]) -> Option<(String, &'static str)> {
    let all = configs.first().map(|_| (ALL.to_owned(), CONTAINER));
    let each = configs.iter().flat_map(|config| {
        let name = config.device_name();
        [(name.clone(), GROUP), (name, DEVICE)]
    });
    let mut needed = each.chain(all);
    needed.find(|(device, role)| promised(entries, device, role).is_none())
}

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl VfioDevices {
    /// Opens the devices and lets them reach `ram`, or makes them of what another process has passed. `kvm` is KVM's own view of VFIO,
    /// for drivers that want to know of it.
    ///
    /// # Errors
    /// [`MachineError::Config`] for what is no VFIO device or was not passed, [`MachineError::Host`] for one that cannot be had.
    pub fn open(
        configs: &[VfioConfig],
        passed: Passed,
        ram: &MachineRam,
        kvm: Option<KvmDevice>,
    ) -> Result<Self, MachineError> {
        if configs.is_empty() {
            return Ok(Self::default());
        }
        let before = match &passed {
            Passed::FromHost => None,
            Passed::From(before, _) => Some(*before),
        };
        let (opened, container) = match passed {
            Passed::FromHost => {
                let (opened, container) = opened::open(configs, kvm.as_ref())?;
                (opened, Some(container))
            }
            Passed::From(_, fds) => (opened::passed(configs, fds, kvm.as_ref())?, None),
        };
        let mut found = Self::default();
        (found.memory, found.mapped) = (reached(ram), mapped(ram));
        (found.kvm, found.before) = (kvm, before);
        let mut devices = Vec::new();
        for (number, (config, Opened { group, device })) in configs.iter().zip(opened).enumerate() {
            let name = config.device_name();
            let face = FdFace::new(Arc::clone(&device));
            devices.push(VfioDevice::new(name.clone(), face));
            let regions = regions(device.as_fd(), window::REGIONS_MAX);
            found.doors.push(Door {
                regions: regions.map_err(|source| MachineError::Host {
                    op: format!("ask {name} for its regions"),
                    source,
                })?,
                name,
                device,
                group,
            });
            found.echoes |= u16::from(config.echo) << number;
        }
        found.set = Arc::new(Mutex::new(VfioSet::new(devices)));
        if let Some(container) = container {
            let reach = Reach::map(Arc::clone(&container), found.memory.clone());
            let reach = reach.map_err(|source| MachineError::Host {
                op: "map guest memory for VFIO devices (a limit of locked memory may be too low: ulimit -l)"
                    .to_owned(),
                source,
            })?;
            found.have(container, reach);
        }
        Ok(found)
    }

    /// The container is here.
    fn have(&self, fd: Arc<OwnedFd>, reach: Reach) {
        let blocker = in_place::blocker(&lock(&self.set), &reach);
        // It comes once.
        let _ = self.container.set(Container { fd, blocker });
        *lock(&self.reach) = Some(reach);
    }

    /// The devices, for whoever leads migrations.
    pub fn set(&self) -> Arc<Mutex<VfioSet>> {
        Arc::clone(&self.set)
    }

    /// What must hear of upgrades in place.
    pub fn notifiers(&self) -> Vec<Box<dyn Notifier>> {
        if self.doors.is_empty() {
            return Vec::new();
        }
        let notifier = VfioInPlace::new(self.set(), Arc::clone(&self.reach));
        vec![Box::new(notifier)]
    }

    /// Copies of all descriptors, for a process that takes the guest over.
    ///
    /// # Errors
    /// The devices cannot stay while the process changes, or no descriptor is left.
    pub fn heirlooms(&self) -> io::Result<Vec<DeviceFd>> {
        if self.doors.is_empty() {
            return Ok(Vec::new());
        }
        let container = self.container()?;
        if let Some(reason) = &container.blocker {
            return Err(io::Error::new(io::ErrorKind::Unsupported, reason.clone()));
        }
        let copy = |device: &str, role: &str, kind, fd: &OwnedFd| {
            io::Result::Ok(DeviceFd {
                device: device.to_owned(),
                role: role.to_owned(),
                kind,
                value: 0,
                fd: fd.try_clone()?,
            })
        };
        let mut copies = vec![copy(ALL, CONTAINER, FdKind::VfioContainer, &container.fd)?];
        for door in &self.doors {
            copies.push(copy(&door.name, GROUP, FdKind::VfioGroup, &door.group)?);
            copies.push(copy(&door.name, DEVICE, FdKind::VfioDevice, &door.device)?);
        }
        Ok(copies)
    }

    /// The other process has let go, and its container has come.
    ///
    /// # Errors
    /// It has not come, or the kernel does not give us what the other process had.
    pub fn take_over(&self, fds: &mut Vec<DeviceFd>) -> Result<(), DeviceError> {
        if self.doors.is_empty() || self.container.get().is_some() {
            return Ok(());
        }
        let fd = Arc::new(claim(fds, ALL, CONTAINER, FdKind::VfioContainer)?);
        let reach = Reach::of_another(Arc::clone(&fd), self.memory.clone());
        let mut reach = reach.map_err(|source| DeviceError::Kernel {
            device: ALL.to_owned(),
            op: "VFIO_CHECK_EXTENSION".to_owned(),
            source,
        })?;
        in_place::take_over(
            &lock(&self.set),
            &mut reach,
            self.before.unwrap_or_default(),
        )?;
        self.have(fd, reach);
        Ok(())
    }

    fn container(&self) -> io::Result<&Container> {
        let none = "the container of the VFIO devices has not come from the old process";
        self.container.get().ok_or_else(|| io::Error::other(none))
    }

    /// Dirty logs of what the devices write, to be united with those of the machine; fresh and not started.
    ///
    /// # Errors
    /// [`MachineError::Host`] when a device does not say what it can do.
    pub fn dirty_logs(&self) -> Result<Vec<Box<dyn DirtyLog>>, MachineError> {
        if self.doors.is_empty() {
            return Ok(Vec::new());
        }
        let host = |source| MachineError::Host {
            op: "ask VFIO devices for their dirty logs".to_owned(),
            source,
        };
        let container = self.container().map_err(host)?;
        let face = FdContainer::new(Arc::clone(&container.fd));
        let face: Arc<dyn ContainerFace> = Arc::new(face);
        dirty_logs(&lock(&self.set), Some(face), &self.mapped).map_err(host)
    }

    /// Which devices the workload uses as serial ports that echo, one bit each.
    pub fn echoes(&self) -> u16 {
        self.echoes
    }

    /// The guest reads at `gpa`. Returns whether that is one of the windows; `data` is then filled, with ones where there is nothing.
    pub fn read(&self, gpa: u64, data: &mut [u8]) -> bool {
        let Some(place) = window::place(gpa) else {
            return false;
        };
        data.fill(u8::MAX);
        if let Some((door, at)) = self.find(place, data.len()) {
            let read = rustix::io::pread(door.device.as_fd(), &mut *data, at);
            if !matches!(read, Ok(read) if read == data.len()) {
                tracing::debug!(device = door.name, ?place, ?read, "read refused");
                data.fill(u8::MAX);
            }
        }
        true
    }

    /// The guest writes at `gpa`. Returns whether that is one of the windows.
    pub fn write(&self, gpa: u64, data: &[u8]) -> bool {
        let Some(place) = window::place(gpa) else {
            return false;
        };
        if let Some((door, at)) = self.find(place, data.len()) {
            let written = rustix::io::pwrite(door.device.as_fd(), data, at);
            if !matches!(written, Ok(written) if written == data.len()) {
                tracing::debug!(device = door.name, ?place, ?written, "write refused");
            }
        }
        true
    }

    /// The device behind a place, and where in its file an access of `bytes` bytes goes; `None` where there is nothing.
    fn find(&self, place: Place, bytes: usize) -> Option<(&Door, u64)> {
        let door = self.doors.get(place.device)?;
        let region = door.regions.get(usize::try_from(place.region).ok()?)?;
        let end = place.offset.checked_add(u64::try_from(bytes).ok()?)?;
        (end <= region.bytes.min(REGION_BYTES)).then_some((door, region.file_offset + place.offset))
    }
}

/// RAM at the addresses that the guest sees.
fn reached(ram: &MachineRam) -> Vec<Reached> {
    let blocks = ram.blocks().blocks().iter().zip(ram.regions());
    let reached = blocks.map(|(block, region)| Reached {
        iova: region.start_addr().0,
        memory: Arc::clone(block.mapping()),
    });
    reached.collect()
}

/// Where the pages of each block are for the devices.
fn mapped(ram: &MachineRam) -> Vec<Mapped> {
    let blocks = ram.blocks().blocks().iter().zip(ram.regions()).zip(0..);
    let mapped = blocks.map(|((block, region), number)| Mapped {
        iova: region.start_addr().0,
        block: BlockId(number),
        start: PageIndex(0),
        count: block.pages(),
    });
    mapped.collect()
}

impl Drop for VfioDevices {
    fn drop(&mut self) {
        // Before the devices: with the last of them the kernel has forgotten all mappings.
        drop(lock(&self.reach).take());
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use vmferry_cpr::manifest::FileId;

    use super::*;

    fn refusal(path: &Path) -> String {
        let ram = MachineRam::create(8 << 20).unwrap();
        let config: VfioConfig = path.to_str().unwrap().parse().unwrap();
        VfioDevices::open(&[config], Passed::FromHost, &ram, None)
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn a_machine_without_vfio_devices_needs_no_vfio_and_has_no_windows() {
        let ram = MachineRam::create(8 << 20).unwrap();
        let none = VfioDevices::open(&[], Passed::FromHost, &ram, None).unwrap();
        assert!(none.dirty_logs().unwrap().is_empty());
        assert!(none.set().lock().unwrap().devices().is_empty());
        let mut data = [7; 4];
        assert!(!none.read(0xd000_0000, &mut data) && !none.write(0xd000_0000, &data));
        assert_eq!(data, [7; 4]);
        assert!(
            none.read(window::WINDOWS_GPA, &mut data) && none.write(window::WINDOWS_GPA, &data)
        );
        assert_eq!(data, [0xff; 4]);
    }

    #[test]
    fn what_is_no_vfio_device_is_refused_with_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path();
        assert!(refusal(&path.join("none")).contains("no such folder"));
        assert!(refusal(path).contains("no iommu_group"));
        let group = "/sys/kernel/iommu_groups/4294967295";
        std::os::unix::fs::symlink(group, path.join("iommu_group")).unwrap();
        assert!(refusal(path).contains("bind it"));
    }

    #[test]
    fn a_machine_waits_for_the_descriptors_of_its_own_devices_and_no_others() {
        let configs = ["/a,id=net".parse::<VfioConfig>().unwrap()];
        let entry = |name: &str, role: &str, kind| FdEntry {
            name: name.to_owned(),
            role: role.to_owned(),
            kind,
            stage: crate::machine::heirloom::stage(kind),
            value: 0,
            file: FileId::default(),
        };
        let expected = [
            entry("vfio", "container", FdKind::VfioContainer),
            entry("vfio/net", "group", FdKind::VfioGroup),
            entry("vfio/net", "device", FdKind::VfioDevice),
        ];
        for entry in &expected {
            assert!(
                expects(&configs, entry) && !expects(&[], entry),
                "{entry:?}"
            );
        }
        for foreign in [
            entry("vfio/net", "container", FdKind::VfioContainer),
            entry("vfio/0", "device", FdKind::VfioDevice),
            entry("vfio/net", "device", FdKind::VfioGroup),
        ] {
            assert!(!expects(&configs, &foreign), "{foreign:?}");
        }
    }

    #[test]
    fn a_device_that_was_not_passed_or_is_none_is_named() {
        let ram = MachineRam::create(8 << 20).unwrap();
        let configs = ["/a,id=net".parse::<VfioConfig>().unwrap()];
        let refusal = |passed| {
            let passed = Passed::From(Before::Process, passed);
            let error = VfioDevices::open(&configs, passed, &ram, None).unwrap_err();
            error.to_string()
        };
        let none = refusal(Vec::new());
        assert!(
            none.contains("vfio/net") && none.contains("not passed"),
            "{none}"
        );
        let null = |role: &str, kind| DeviceFd {
            device: "vfio/net".to_owned(),
            role: role.to_owned(),
            kind,
            value: 0,
            fd: std::fs::File::open("/dev/null").unwrap().into(),
        };
        let group = || null("group", FdKind::VfioGroup);
        let half = refusal(vec![group()]);
        assert!(half.contains("not passed"), "{half}");
        let other = refusal(vec![group(), null("device", FdKind::VfioDevice)]);
        assert!(other.contains("regions"), "{other}");
    }
}
