//! Reads what the workload says of itself from its mailboxes, and writes the one word that the VMM may write there.

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::layout::{self, PARAMS_GPA, VCPUS_MAX, mailbox, mailbox_gpa, params};
use super::{WorkloadConfig, WorkloadStats};

/// What the workload in `memory` says of itself; `None` if no workload is loaded there. Guest memory is not trusted: a guest that
/// overwrites its own mailboxes gets nonsense statistics and nothing else.
pub fn workload_stats<M: GuestMemoryBackend>(memory: &M) -> Option<WorkloadStats> {
    let vcpus = loaded_vcpus(memory)?;
    let tsc_khz = param(memory, params::TSC_KHZ)?.max(1);
    let mut stats = WorkloadStats {
        passes: u64::MAX,
        fill_pages: param(memory, params::FILL_PAGES)?,
        ..WorkloadStats::default()
    };
    for vcpu in 0..vcpus {
        let field = |at| read(memory, mailbox_gpa(vcpu) + at);
        stats.passes = stats.passes.min(field(mailbox::PASSES)?);
        stats.errors = stats.errors.saturating_add(field(mailbox::ERRORS)?);
        stats.pages_written = stats
            .pages_written
            .saturating_add(field(mailbox::PAGES_WRITTEN)?);
        stats.filled_pages = stats
            .filled_pages
            .saturating_add(field(mailbox::FILLED_PAGES)?);
        for (total, at) in [
            (&mut stats.disk_blocks_written, mailbox::DISK_WRITTEN),
            (&mut stats.disk_blocks_checked, mailbox::DISK_CHECKED),
            (&mut stats.disk_errors, mailbox::DISK_ERRORS),
        ] {
            *total = total.saturating_add(field(at)?);
        }
        let first_error_gpa = field(mailbox::FIRST_ERROR_GPA)?;
        if first_error_gpa != 0 && stats.first_error_gpa.is_none() {
            stats.first_error_gpa = Some(first_error_gpa);
        }
        // A reset that the guest has not seen yet counts as done: what it would report is older than the request.
        if field(mailbox::RESET_REQUESTED)? == field(mailbox::RESET_DONE)? {
            let gap_us = ticks_to_us(field(mailbox::LONGEST_GAP_TICKS)?, tsc_khz);
            stats.longest_gap_us = stats.longest_gap_us.max(gap_us);
        }
    }
    Some(stats)
}

/// Asks every vCPU of the workload in `memory` to forget its longest gap. Does nothing if no workload is loaded.
pub fn reset_gap<M: GuestMemoryBackend>(memory: &M) {
    let Some(vcpus) = loaded_vcpus(memory) else {
        return;
    };
    for vcpu in 0..vcpus {
        let address = mailbox_gpa(vcpu) + mailbox::RESET_REQUESTED;
        let Some(requested) = read(memory, address) else {
            return;
        };
        // `write_obj` and not an atomic store: only this one marks the page in the log of the VMM's own writes. The word is aligned,
        // and vm-memory writes aligned words whole.
        if memory
            .write_obj(requested.wrapping_add(1).to_le(), GuestAddress(address))
            .is_err()
        {
            return;
        }
    }
}

/// What the loaded workload was asked to do, read back from its parameters; `None` if none is loaded.
pub fn loaded_config<M: GuestMemoryBackend>(memory: &M) -> Option<WorkloadConfig> {
    loaded_vcpus(memory)?;
    let pages_per_sec = param(memory, params::PAGES_PER_SEC)?;
    Some(WorkloadConfig {
        working_set_bytes: param(memory, params::WORKING_SET_PAGES)?
            .checked_mul(layout::PAGE_BYTES)?,
        dirty_pages_per_sec: (pages_per_sec != 0).then_some(pages_per_sec),
        fill_bytes: param(memory, params::FILL_PAGES)?.checked_mul(layout::PAGE_BYTES)?,
    })
}

/// Number of vCPUs of the loaded workload; `None` if none is loaded.
fn loaded_vcpus<M: GuestMemoryBackend>(memory: &M) -> Option<u32> {
    if param(memory, params::MAGIC_AT)? != params::MAGIC {
        return None;
    }
    let vcpus = u32::try_from(param(memory, params::VCPUS)?).ok()?;
    (1..=VCPUS_MAX).contains(&vcpus).then_some(vcpus)
}

fn param<M: GuestMemoryBackend>(memory: &M, at: u64) -> Option<u64> {
    read(memory, PARAMS_GPA + at)
}

fn read<M: GuestMemoryBackend>(memory: &M, address: u64) -> Option<u64> {
    memory
        .read_obj(GuestAddress(address))
        .ok()
        .map(u64::from_le)
}

/// Rounded up, so that only no gap at all is 0.
fn ticks_to_us(ticks: u64, tsc_khz: u64) -> u64 {
    let us = (u128::from(ticks) * 1000).div_ceil(u128::from(tsc_khz));
    u64::try_from(us).unwrap_or(u64::MAX)
}
