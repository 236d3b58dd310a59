//! The `workload` guest: writes a working set at a set rate with a pattern it can verify, checks its own pages every pass, and
//! knows the longest gap between two of its writes.

//!
//! - [`image`]: the guest program
//! - [`loader`]: what must be in memory before it starts; [`elf`]: the same as a file for other VMMs
//! - [`layout`]: where parameters, program, mailboxes and data lie
//! - [`pattern`]: what is written into the data pages
//! - [`stats`]: reads the mailboxes

mod disk;
pub mod elf;
pub mod image;
pub mod layout;
pub mod loader;
mod net;
pub mod pattern;
pub mod stats;

use super::MachineError;
use layout::{PAGE_BYTES, VCPUS_MAX};

/// What the guest shall do.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct WorkloadConfig {
    /// Bytes that the guest keeps writing, all vCPUs together. A multiple of 4 KiB.
    pub working_set_bytes: u64,
    /// Pages written per second by all vCPUs together; `None` for as fast as they can.
    pub dirty_pages_per_sec: Option<u64>,
    /// Bytes that the guest fills once, at start, with incompressible data; checked slowly ever after. A multiple of 4 KiB.
    pub fill_bytes: u64,
}

impl WorkloadConfig {
    /// Checks that a machine of this size can run the workload.
    ///
    /// # Errors
    /// [`MachineError::Config`] says which value does not fit and what would.
    pub fn check(&self, mem_bytes: u64, vcpus: u32) -> Result<(), MachineError> {
        let refuse = |text: String| Err(MachineError::Config(text));
        if !(1..=VCPUS_MAX).contains(&vcpus) {
            return refuse(format!("{vcpus} vCPUs: must be 1 to {VCPUS_MAX}"));
        }
        for (what, bytes) in [
            ("working set", self.working_set_bytes),
            ("fill", self.fill_bytes),
        ] {
            if !bytes.is_multiple_of(PAGE_BYTES) {
                return refuse(format!(
                    "{what} of {bytes} bytes: must be a multiple of 4096"
                ));
            }
        }
        if self.working_set_bytes < u64::from(vcpus) * PAGE_BYTES {
            return refuse(format!(
                "working set of {} bytes: each of {vcpus} vCPUs needs a page of 4096 bytes",
                self.working_set_bytes
            ));
        }
        let available = layout::data_pages(mem_bytes) * PAGE_BYTES;
        let wanted = self.working_set_bytes.saturating_add(self.fill_bytes);
        if wanted > available {
            return refuse(format!(
                "working set and fill need {wanted} bytes, RAM of {mem_bytes} bytes has room for {available}"
            ));
        }
        if self.dirty_pages_per_sec == Some(0) {
            return refuse("dirty_pages_per_sec of 0: the guest would never write".to_owned());
        }
        Ok(())
    }
}

/// What the guest says of itself, all vCPUs together.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct WorkloadStats {
    /// Complete passes over the working set: the smallest count of any vCPU.
    pub passes: u64,
    /// Pages found with wrong content. Anything but 0 is a lost or torn page.
    pub errors: u64,
    /// Guest-physical address of the first wrong page, if there is one.
    pub first_error_gpa: Option<u64>,
    /// Longest time between two page writes of one vCPU, in microseconds, since the fill ended or since the last reset. Sleeping
    /// for the rate limit does not count as a gap beyond the time asked for.
    pub longest_gap_us: u64,
    /// Pages written since start.
    pub pages_written: u64,
    /// Pages of the fill that have been written so far, and how many there are.
    pub filled_pages: u64,
    /// How many pages the fill has.
    pub fill_pages: u64,
    /// Blocks of 4 KiB written to its disk.
    pub disk_blocks_written: u64,
    /// Blocks read back from its disk and compared with what was written there last.
    pub disk_blocks_checked: u64,
    /// Blocks that were not what was written there last, and requests that failed. They count in [`errors`](Self::errors) too.
    pub disk_errors: u64,
}
