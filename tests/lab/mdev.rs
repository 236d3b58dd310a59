//! VFIO devices without hardware: the kernel's samples of mediated devices. One that migrates (mtty, two serial ports), and one that
//! does not (mdpy, a display).

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::modules::load;

/// A mediated device. Dropping it removes it; it must not be open then.
#[derive(Debug)]
pub(crate) struct Mdev {
    uuid: String,
}

impl Mdev {
    /// One that migrates: two serial ports. What the guest writes to a port it reads again from there, and what it has not yet read
    /// migrates.
    pub(crate) fn mtty() -> Self {
        Self::create("mtty", "mtty-2")
    }

    /// One that does not migrate: a small display.
    pub(crate) fn mdpy() -> Self {
        Self::create("mdpy", "mdpy-vga")
    }

    fn create(module: &str, kind: &str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(1);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let uuid = format!("00000000-0000-4000-8000-{number:012x}");
        load("vfio_iommu_type1");
        load(module);
        let create = format!("/sys/class/mdev_bus/{module}/mdev_supported_types/{kind}/create");
        fs::write(&create, &uuid).unwrap_or_else(|error| panic!("{create}: {error}"));
        Self { uuid }
    }

    /// Its name, which its VFIO group knows it by.
    pub(crate) fn uuid(&self) -> &str {
        &self.uuid
    }

    /// Its folder in sysfs: what VMMs are given as the name of a device.
    pub(crate) fn sysfs(&self) -> PathBuf {
        Path::new("/sys/bus/mdev/devices").join(&self.uuid)
    }

    /// Its VFIO group, such as `/dev/vfio/3`.
    pub(crate) fn group(&self) -> PathBuf {
        let link = fs::read_link(self.sysfs().join("iommu_group")).unwrap();
        Path::new("/dev/vfio").join(link.file_name().unwrap())
    }
}

impl Drop for Mdev {
    fn drop(&mut self) {
        let removed = fs::write(self.sysfs().join("remove"), "1");
        // One panic is enough.
        if !std::thread::panicking() {
            removed.unwrap_or_else(|error| panic!("{} stays: {error}", self.uuid));
        }
    }
}
