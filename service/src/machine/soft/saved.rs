//! Saved state of the soft machine.

use serde::{Deserialize, Serialize};
use vmferry_devices::DeviceError;
use vmferry_devices::saved::{SavedState, decode};
use vmferry_transport::wire::Section;

use super::vcpu::Registers;
use crate::machine::workload::layout::mailbox;

/// What the machine as a whole was, to compare with the machine that loads. A machine of another kind has another schema, so that
/// neither loads the other's.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub(super) struct SoftMachineV1 {
    /// RAM size.
    pub(super) mem_bytes: u64,
    /// Number of vCPUs.
    pub(super) vcpus: u32,
    /// Which boot of which host the times of the vCPUs belong to; empty if unknown. Under another boot id they mean nothing.
    pub(super) boot_id: String,
}

impl SavedState for SoftMachineV1 {
    const SCHEMA: &'static str = "machine-soft";
    const VERSION: u32 = 1;
}

/// Registers of one soft vCPU. Counters start at 0 when the workload starts; times are CLOCK_MONOTONIC of the boot that the machine
/// section names.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub(super) struct SoftVcpuV1 {
    /// A `PHASE_` value of the mailbox.
    pub(super) phase: u64,
    /// Pass that is under way, from 1; 0 before the first.
    pub(super) pass: u64,
    /// Next page of the slice in this pass, counted from the slice's start.
    pub(super) next_page: u64,
    /// Page writes, fill not included.
    pub(super) pages_written: u64,
    /// Pages of the fill written.
    pub(super) filled_pages: u64,
    /// Page of the fill to check next, counted from the start of the fill.
    pub(super) fill_check_next: u64,
    /// Page writes until that check.
    pub(super) fill_check_in: u64,
    /// Pages of the fill checked.
    pub(super) fill_checked: u64,
    /// Pages found wrong.
    pub(super) errors: u64,
    /// Longest gap between two page writes.
    pub(super) longest_gap_ns: u64,
    /// Last request to forget the gap that was obeyed.
    pub(super) reset_done: u64,
    /// When the last page was written; `None` before the first, and when the clock has changed since.
    pub(super) heartbeat_ns: Option<u64>,
    /// Page writes left in the current batch of the rate limit.
    pub(super) batch_left: u64,
    /// When the next batch may begin.
    pub(super) batch_due_ns: u64,
    /// Whether the vCPU is waiting for that.
    pub(super) batch_waiting: bool,
}

impl SavedState for SoftVcpuV1 {
    const SCHEMA: &'static str = "soft-vcpu";
    const VERSION: u32 = 1;
}

/// Registers as a section holds them.
pub(super) fn save_registers(registers: Registers) -> SoftVcpuV1 {
    let Registers {
        phase,
        pass,
        next_page,
        pages_written,
        filled_pages,
        fill_check_next,
        fill_check_in,
        fill_checked,
        errors,
        longest_gap_ns,
        reset_done,
        heartbeat_ns,
        batch_left,
        batch_due_ns,
        batch_waiting,
    } = registers;
    SoftVcpuV1 {
        phase,
        pass,
        next_page,
        pages_written,
        filled_pages,
        fill_check_next,
        fill_check_in,
        fill_checked,
        errors,
        longest_gap_ns,
        reset_done,
        heartbeat_ns,
        batch_left,
        batch_due_ns,
        batch_waiting,
    }
}

/// Registers from a section. Counters may hold anything: the vCPU counts without trusting them, and page numbers are checked
/// against the slice at every step. Times of another clock are forgotten.
pub(super) fn load_registers(
    section: &Section,
    same_clock: bool,
) -> Result<Registers, DeviceError> {
    let SoftVcpuV1 {
        phase,
        pass,
        next_page,
        pages_written,
        filled_pages,
        fill_check_next,
        fill_check_in,
        fill_checked,
        errors,
        longest_gap_ns,
        reset_done,
        heartbeat_ns,
        batch_left,
        batch_due_ns,
        batch_waiting,
    } = decode(section)?;
    let bad = |reason| DeviceError::BadState {
        device: section.name.clone(),
        reason,
    };
    if phase > mailbox::PHASE_STEADY {
        return Err(bad(format!("no such phase: {phase}")));
    }
    // A pass begins with the first page of the working set, and never ends before it.
    if (phase >= mailbox::PHASE_FIRST_PASS) != (pass > 0) {
        return Err(bad(format!("pass {pass} in phase {phase}")));
    }
    Ok(Registers {
        phase,
        pass,
        next_page,
        pages_written,
        filled_pages,
        fill_check_next,
        fill_check_in,
        fill_checked,
        errors,
        longest_gap_ns,
        reset_done,
        heartbeat_ns: heartbeat_ns.filter(|_| same_clock),
        batch_left,
        batch_due_ns: if same_clock { batch_due_ns } else { 0 },
        batch_waiting: batch_waiting && same_clock,
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use vmferry_devices::saved::fixtures;

    use super::*;

    #[test]
    fn state_of_the_soft_machine_keeps_its_bytes() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/state");
        let machine = SoftMachineV1 {
            mem_bytes: 64 << 20,
            vcpus: 2,
            boot_id: "01234567-89ab-cdef-0123-456789abcdef".to_owned(),
        };
        fixtures::check(&folder, &[machine]).unwrap();
        let vcpu = SoftVcpuV1 {
            phase: mailbox::PHASE_STEADY,
            pass: 1,
            next_page: 2,
            pages_written: 3,
            filled_pages: 4,
            fill_check_next: 5,
            fill_check_in: 6,
            fill_checked: 7,
            errors: 8,
            longest_gap_ns: 9,
            reset_done: 10,
            heartbeat_ns: Some(11),
            batch_left: 12,
            batch_due_ns: 13,
            batch_waiting: true,
        };
        fixtures::check(&folder, &[vcpu]).unwrap();
    }
}
