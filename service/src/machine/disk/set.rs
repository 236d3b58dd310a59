//! All disks of a VM, which become active together.

use std::sync::Arc;

use super::{Disk, DiskConfig, DiskError, DiskInfo, Identity, config};

/// All disks of a VM.
#[derive(Debug, Default)]
pub struct Disks(Vec<Arc<Disk>>);

impl Disks {
    /// The disks that `configs` describe, all inactive.
    ///
    /// # Errors
    /// As [`Disk::open`]; also when two disks have the same id, or one image is used twice.
    pub fn open(configs: &[DiskConfig]) -> Result<Self, DiskError> {
        config::check_names(configs)?;
        let mut disks: Vec<Arc<Disk>> = Vec::new();
        for config in configs {
            let disk = Disk::open(config.clone())?;
            let alike = |other: &&Arc<Disk>| {
                same_file(&other.first_seen, &disk.first_seen)
                    && !(other.config.read_only && disk.config.read_only)
            };
            if let Some(other) = disks.iter().find(alike) {
                return Err(DiskError::Config {
                    disk: config.id.clone(),
                    reason: format!(
                        "{} is the image of disk {} already",
                        config.path.display(),
                        other.config.id
                    ),
                });
            }
            disks.push(Arc::new(disk));
        }
        Ok(Self(disks))
    }

    /// Whether every disk is active, so that the guest may run. True without disks.
    pub fn are_active(&self) -> bool {
        self.0.iter().all(|disk| disk.is_active())
    }

    /// Activates all disks or none: where one cannot be, those that this call activated are inactivated again. Those that were active
    /// before stay so.
    ///
    /// # Errors
    /// As [`Disk::activate`]. The guest must not run; trying again is harmless.
    pub fn activate(&self) -> Result<(), DiskError> {
        let mut taken = Vec::new();
        for disk in &self.0 {
            match disk.activate() {
                Ok(true) => taken.push(disk),
                Ok(false) => {}
                Err(error) => {
                    for disk in taken {
                        // Nothing has been written through it, so nothing can be lost. Its lock stays here, where it does no harm.
                        if let Err(error) = disk.inactivate() {
                            let error = &error as &dyn std::error::Error;
                            tracing::error!(error, "the disk's lock was not given back");
                        }
                    }
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Inactivates all disks, as far as possible.
    ///
    /// # Errors
    /// As [`Disk::inactivate`], for the first that could not be. It and those after it are still active; the guest may run again only
    /// after [`activate`](Self::activate).
    pub fn inactivate(&self) -> Result<(), DiskError> {
        self.0
            .iter()
            .try_for_each(|disk| disk.inactivate().map(|_| ()))
    }

    /// Passes all disks on, as far as possible.
    ///
    /// # Errors
    /// As [`Disk::pass_on`], and as in [`inactivate`](Self::inactivate).
    pub fn pass_on(&self) -> Result<(), DiskError> {
        self.0
            .iter()
            .try_for_each(|disk| disk.pass_on().map(|_| ()))
    }

    /// The disks, in the order of their configuration.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Disk>> {
        self.0.iter()
    }

    /// The disk with this id.
    pub fn get(&self, id: &str) -> Option<&Arc<Disk>> {
        self.0.iter().find(|disk| disk.config.id == id)
    }

    /// What the disks are like now, in the order of their configuration.
    pub fn infos(&self) -> Vec<DiskInfo> {
        self.0.iter().map(|disk| disk.info()).collect()
    }
}

fn same_file(left: &Identity, right: &Identity) -> bool {
    (left.device, left.inode) == (right.device, right.inode)
}
