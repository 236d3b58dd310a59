//! VFIO devices of the built-in machine: hardware and mediated devices of the host that the guest uses directly.
//!
//! Opened once, when the machine is built: the group of each device joins one container of type 1, all RAM is mapped there at the
//! addresses that the guest sees, and each device is reset. How they migrate is in `vmferry_devices::vfio`; a device that cannot is no
//! error here but stands in the way of `migrate`. The guest reaches their regions through windows, see [`window`].
//!
//! A device belongs to one process at a time, so source and target on one host need two.

mod config;
pub mod window;

use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use vfio_ioctls::{VfioContainer, VfioDeviceFd, VfioError, VfioOps};
use vm_memory::GuestMemoryRegion;
use vmferry_devices::vfio::{
    ContainerFace, DmaMapping, FdContainer, FdFace, Mapped, OfVfioIoctls, VfioDevice, VfioSet,
    dirty_logs,
};
use vmferry_transport::memory::DirtyLog;
use vmferry_transport::units::{BlockId, PageIndex};

use super::MachineError;
use super::ram::MachineRam;
use window::{Place, REGION_BYTES};

pub use config::{VfioConfig, name_vfio};

type OpenDevice = OfVfioIoctls<vfio_ioctls::VfioDevice>;

/// The VFIO devices of a machine.
#[derive(Debug, Default)]
pub struct VfioDevices {
    // Goes before the devices: with the last of them the kernel has forgotten all mappings.
    reach: Option<Reach>,
    set: Arc<Mutex<VfioSet>>,
    doors: Vec<Door>,
    /// Which devices the workload uses as serial ports that echo.
    echoes: u16,
}

/// What the guest sees of a device.
#[derive(Debug)]
struct Door {
    name: String,
    device: OpenDevice,
    regions: Vec<Region>,
}

/// Where a region lies in the file of its device.
#[derive(Clone, Copy, Debug)]
struct Region {
    file_offset: u64,
    bytes: u64,
}

/// The memory that devices reach.
#[derive(Debug)]
struct Reach {
    container: OfVfioIoctls<VfioContainer>,
    mapped: Vec<Mapped>,
    _mappings: Vec<DmaMapping>,
}

impl VfioDevices {
    /// Opens the devices and lets them reach `ram`. `kvm` is KVM's own view of VFIO, for drivers that want to know of it.
    ///
    /// # Errors
    /// [`MachineError::Config`] for what is no VFIO device, [`MachineError::Host`] for one that cannot be had.
    pub fn open(
        configs: &[VfioConfig],
        ram: &MachineRam,
        kvm: Option<VfioDeviceFd>,
    ) -> Result<Self, MachineError> {
        if configs.is_empty() {
            return Ok(Self::default());
        }
        // What the kernel would say of these says little.
        configs.iter().try_for_each(check)?;
        let container = VfioContainer::new(kvm.map(Arc::new));
        let container = Arc::new(container.map_err(|error| host("open /dev/vfio/vfio", error))?);
        let mut found = Self::default();
        let mut devices = Vec::new();
        for (number, config) in configs.iter().enumerate() {
            let opened = Arc::new(open_device(config, &container)?);
            opened.reset();
            let device = OfVfioIoctls::new(Arc::clone(&opened));
            let name = config.device_name();
            devices.push(VfioDevice::new(name.clone(), FdFace::new(device.clone())));
            // Those that the kernel does not describe are left out there, which none but the legacy VGA region is.
            let regions = (0..window::REGIONS_MAX).map(|index| Region {
                file_offset: opened.get_region_offset(index),
                bytes: region_bytes(&opened, index),
            });
            found.doors.push(Door {
                name,
                device,
                regions: regions.collect(),
            });
            found.echoes |= u16::from(config.echo) << number;
        }
        found.set = Arc::new(Mutex::new(VfioSet::new(devices)));
        found.reach = Some(Reach::new(container, ram)?);
        Ok(found)
    }

    /// The devices, for whoever leads migrations.
    pub fn set(&self) -> Arc<Mutex<VfioSet>> {
        Arc::clone(&self.set)
    }

    /// Dirty logs of what the devices write, to be united with those of the machine; fresh and not started.
    ///
    /// # Errors
    /// [`MachineError::Host`] when a device does not say what it can do.
    pub fn dirty_logs(&self) -> Result<Vec<Box<dyn DirtyLog>>, MachineError> {
        let Some(reach) = &self.reach else {
            return Ok(Vec::new());
        };
        let container = FdContainer::new(reach.container.clone());
        let container: Arc<dyn ContainerFace> = Arc::new(container);
        let set = self.set.lock().unwrap_or_else(PoisonError::into_inner);
        dirty_logs(&set, Some(container), &reach.mapped).map_err(|source| MachineError::Host {
            op: "ask VFIO devices for their dirty logs".to_owned(),
            source,
        })
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

impl Reach {
    fn new(container: Arc<VfioContainer>, ram: &MachineRam) -> Result<Self, MachineError> {
        let mut mapped = Vec::new();
        let mut mappings = Vec::new();
        for ((block, region), number) in ram.blocks().blocks().iter().zip(ram.regions()).zip(0..) {
            let iova = region.start_addr().0;
            let mapping =
                DmaMapping::new(Arc::clone(&container), iova, Arc::clone(block.mapping()));
            mappings.push(mapping.map_err(|source| MachineError::Host {
                op: format!(
                    "map {} for VFIO devices (a limit of locked memory may be too low: ulimit -l)",
                    block.name()
                ),
                source,
            })?);
            mapped.push(Mapped {
                iova,
                block: BlockId(number),
                start: PageIndex(0),
                count: block.pages(),
            });
        }
        Ok(Self {
            container: OfVfioIoctls::new(container),
            mapped,
            _mappings: mappings,
        })
    }
}

/// Whether this can be a device that VFIO has; says what to do if not.
fn check(config: &VfioConfig) -> Result<(), MachineError> {
    if !config.path.exists() {
        return Err(config.wrong("there is no such folder"));
    }
    let group = group_of(config).ok_or_else(|| {
        config.wrong("it has no iommu_group: it is no device, or behind no IOMMU")
    })?;
    if group.exists() {
        return Ok(());
    }
    Err(config.wrong(&format!(
        "its group has no {}: bind it, and all else in the group, to a VFIO driver first",
        group.display()
    )))
}

/// The file of the device's group.
fn group_of(config: &VfioConfig) -> Option<PathBuf> {
    let link = std::fs::read_link(config.path.join("iommu_group")).ok()?;
    Some(Path::new("/dev/vfio").join(link.file_name()?))
}

fn open_device(
    config: &VfioConfig,
    container: &Arc<VfioContainer>,
) -> Result<vfio_ioctls::VfioDevice, MachineError> {
    let container: Arc<dyn VfioOps> = Arc::clone(container) as _;
    vfio_ioctls::VfioDevice::new(&config.path, container, false).map_err(|error| {
        let group = group_of(config).unwrap_or_default();
        let (path, group) = (config.path.display(), group.display());
        host(
            &format!("open VFIO device {path} in {group}, which one process can have at a time,"),
            error,
        )
    })
}

/// Length of a region; 0 for one that does not exist.
fn region_bytes(device: &vfio_ioctls::VfioDevice, index: u32) -> u64 {
    match device.get_region_flags(index) {
        // Neither readable nor writable.
        flags if flags & 3 == 0 => 0,
        _ => device.get_region_size(index),
    }
}

fn host(op: &str, error: VfioError) -> MachineError {
    MachineError::Host {
        op: op.to_owned(),
        source: io::Error::other(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(path: &Path) -> String {
        let ram = MachineRam::create(8 << 20).unwrap();
        let config: VfioConfig = path.to_str().unwrap().parse().unwrap();
        VfioDevices::open(&[config], &ram, None)
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn a_machine_without_vfio_devices_needs_no_vfio_and_has_no_windows() {
        let ram = MachineRam::create(8 << 20).unwrap();
        let none = VfioDevices::open(&[], &ram, None).unwrap();
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
}
