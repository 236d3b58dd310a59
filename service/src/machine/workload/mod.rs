//! The `workload` guest: writes a working set at a set rate with a pattern it can verify, checks its own pages every pass, and
//! knows the longest gap between two of its writes.

pub mod layout;

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
}
