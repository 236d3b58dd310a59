//! Where the descriptors of VFIO devices come from: the host's files, or another process.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kvm_bindings::{KVM_DEV_VFIO_FILE, KVM_DEV_VFIO_FILE_ADD, kvm_device_attr};
use kvm_ioctls::DeviceFd as KvmDevice;
use vmferry_cpr::manifest::FdKind;
use vmferry_devices::vfio::{FdFace, VfioFace, can_reset, join, open_container, open_device};

use super::{DEVICE, GROUP, VfioConfig};
use crate::machine::MachineError;
use crate::machine::heirloom::{DeviceFd, claim};

/// A device, and the group that it is in.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) group: Arc<OwnedFd>,
    pub(super) device: Arc<OwnedFd>,
}

/// Opens all devices, in one container, and resets them.
///
/// # Errors
/// [`MachineError::Config`] for what is no VFIO device, [`MachineError::Host`] for one that cannot be had.
pub(super) fn open(
    configs: &[VfioConfig],
    kvm: Option<&KvmDevice>,
) -> Result<(Vec<Opened>, Arc<OwnedFd>), MachineError> {
    // What the kernel would say of these says little.
    configs.iter().try_for_each(check)?;
    let container = open_container().map_err(|error| host("open /dev/vfio/vfio", error))?;
    let mut groups = BTreeMap::new();
    let mut all = Vec::new();
    for config in configs {
        let path = group_of(config).unwrap_or_default();
        let opened = open_one(config, &path, &container, &mut groups, kvm).map_err(|error| {
            let (device, group) = (config.path.display(), path.display());
            host(
                &format!(
                    "open VFIO device {device} in {group}, which one process can have at a time,"
                ),
                error,
            )
        })?;
        all.push(opened);
    }
    Ok((all, Arc::new(container)))
}

/// Takes the devices out of what another process has passed.
///
/// # Errors
/// [`MachineError::Config`] for one that was not.
pub(super) fn passed(
    configs: &[VfioConfig],
    mut fds: Vec<DeviceFd>,
    kvm: Option<&KvmDevice>,
) -> Result<Vec<Opened>, MachineError> {
    let opened = configs.iter().map(|config| {
        let name = config.device_name();
        let mut take = |role, kind| {
            let fd = claim(&mut fds, &name, role, kind);
            fd.map(Arc::new).map_err(|_| {
                config.wrong(&format!(
                    "{name} was not passed by the old process ({role})"
                ))
            })
        };
        let opened = Opened {
            group: take(GROUP, FdKind::VfioGroup)?,
            device: take(DEVICE, FdKind::VfioDevice)?,
        };
        tell_kvm(kvm, &opened.group);
        Ok(opened)
    });
    opened.collect()
}

fn open_one(
    config: &VfioConfig,
    path: &Path,
    container: &OwnedFd,
    groups: &mut BTreeMap<PathBuf, Arc<OwnedFd>>,
    kvm: Option<&KvmDevice>,
) -> io::Result<Opened> {
    let group = match groups.get(path) {
        Some(group) => Arc::clone(group),
        None => {
            let group: OwnedFd = File::options().read(true).write(true).open(path)?.into();
            join(container.as_fd(), group.as_fd(), groups.is_empty())?;
            let group = Arc::new(group);
            // Drivers ask for it when their device is opened.
            tell_kvm(kvm, &group);
            groups.insert(path.to_owned(), Arc::clone(&group));
            group
        }
    };
    let name = config.path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let name = CString::new(name.as_bytes()).map_err(io::Error::other)?;
    let device = Arc::new(open_device(group.as_fd(), &name)?);
    if can_reset(device.as_fd())? {
        FdFace::new(Arc::clone(&device)).reset()?;
    }
    Ok(Opened { group, device })
}

/// KVM is told of a group: it keeps caches coherent with devices that bypass them, and some drivers must know their VM.
fn tell_kvm(kvm: Option<&KvmDevice>, group: &OwnedFd) {
    let Some(kvm) = kvm else {
        return;
    };
    let number = group.as_raw_fd();
    let add = kvm_device_attr {
        group: KVM_DEV_VFIO_FILE,
        attr: KVM_DEV_VFIO_FILE_ADD.into(),
        addr: std::ptr::from_ref(&number).expose_provenance() as u64,
        flags: 0,
    };
    match kvm.set_device_attr(&add) {
        Err(error) if error.errno() != libc::EEXIST => {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, "KVM does not know of a VFIO group");
        }
        // It knows a group once, however many of its devices there are.
        _ => {}
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

fn host(op: &str, source: io::Error) -> MachineError {
    MachineError::Host {
        op: op.to_owned(),
        source,
    }
}
