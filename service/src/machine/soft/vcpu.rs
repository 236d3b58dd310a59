//! One soft vCPU: the workload as the guest program has it, one page per step.
//!
//! Everything that makes it go on is in [`Registers`]. The mailbox in guest memory is where it says how it is doing, and the number
//! of page writes there must be the one in the registers: a mailbox that is older than the registers is a lost page, and counts as
//! an error like any other.

use std::ops::Range;
use std::time::{Duration, Instant};

use rustix::time::ClockId;

use super::disk::DiskWork;
use super::gate::Gate;
use super::memory::{PAGE_WORDS, Page, VcpuMemory};
use super::net::NetWork;
use crate::machine::throttle::SLICE;
use crate::machine::virtio::Bus;
use crate::machine::workload::layout::{
    self, PAGE_BYTES, PARAMS_GPA, mailbox, mailbox_gpa, params,
};
use crate::machine::workload::pattern::{
    FILL_WORDS_PER_PAGE, STAMP_STRIDE_BYTES, STAMPS_PER_PAGE, fill_word, stamp,
};

/// "TSC" ticks per millisecond: the clock of a soft vCPU counts nanoseconds.
pub(super) const TSC_KHZ: u32 = 1_000_000;
/// What the guest says when it starts, as the guest program does.
pub(super) const GREETING: &str = "vmferry workload started\r\n";

/// Waits shorter than this are spun, not slept.
const SLEEP_MIN_NS: u64 = 20_000;
/// A clock that is off by more than so many batches has jumped, or the host was away: no waiting for it and no catching up.
const EARLY_BATCHES_MAX: u64 = 2;
const LATE_BATCHES_MAX: u64 = 16;
/// All words of every so-many-th page of the fill are checked, of the others every [`FILL_CHECK_STRIDE`]-th word.
const FILL_CHECK_FULL_EVERY: u64 = 16;
const FILL_CHECK_STRIDE: u64 = 64;

/// What a soft vCPU holds outside guest memory. The default is a vCPU after reset. Field by field as in `SoftVcpuV1`.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(super) struct Registers {
    pub(super) phase: u64,
    pub(super) pass: u64,
    pub(super) next_page: u64,
    pub(super) pages_written: u64,
    pub(super) filled_pages: u64,
    pub(super) fill_check_next: u64,
    pub(super) fill_check_in: u64,
    pub(super) fill_checked: u64,
    pub(super) errors: u64,
    pub(super) longest_gap_ns: u64,
    pub(super) reset_done: u64,
    /// `None` if the last write was on another clock: the next gap cannot be told.
    pub(super) heartbeat_ns: Option<u64>,
    pub(super) batch_left: u64,
    pub(super) batch_due_ns: u64,
    pub(super) batch_waiting: bool,
}

/// Why a vCPU does not go on.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Stopped {
    /// It wrote the exit port.
    Exit(u8),
    /// It cannot: what it found in memory makes no sense.
    Failed(String),
}

/// What the parameters and the loader's part of the mailbox say.
#[derive(Debug)]
struct Plan {
    working_set: Range<u64>,
    fill: Range<u64>,
    batch_pages: u64,
    batch_ns: u64,
    fill_check_every: u64,
    exit_after_passes: u64,
    disk_window: u64,
    net_window: u64,
    serial: bool,
}

impl Plan {
    /// Reads guest memory, which nobody vouches for.
    fn read(memory: &VcpuMemory, mem_bytes: u64, vcpu: u32) -> Result<Self, Stopped> {
        let failed = |what: &str| Stopped::Failed(format!("vCPU {vcpu}: {what}"));
        let params = memory
            .page(PARAMS_GPA)
            .ok_or_else(|| failed("no RAM at the parameters"))?;
        let mailbox = memory
            .page(mailbox_gpa(vcpu))
            .ok_or_else(|| failed("no RAM at the mailbox"))?;
        if load(&params, params::MAGIC_AT) != params::MAGIC {
            return Err(failed("no workload is loaded in memory"));
        }
        let plan = Self {
            working_set: load(&mailbox, mailbox::SLICE_FIRST)..load(&mailbox, mailbox::SLICE_END),
            fill: load(&mailbox, mailbox::FILL_FIRST)..load(&mailbox, mailbox::FILL_END),
            batch_pages: load(&params, params::BATCH_PAGES),
            batch_ns: load(&params, params::BATCH_TICKS),
            fill_check_every: load(&params, params::FILL_CHECK_EVERY).max(1),
            exit_after_passes: load(&params, params::EXIT_AFTER_PASSES),
            disk_window: load(&params, params::DISK_WINDOW),
            net_window: load(&params, params::NET_WINDOW),
            serial: load(&params, params::SERIAL_PASSES) != 0,
        };
        if load(&params, params::TSC_KHZ) != u64::from(TSC_KHZ) {
            return Err(failed("the workload was loaded for another clock"));
        }
        let end = layout::data_pages(mem_bytes);
        let inside = |pages: &Range<u64>| pages.start <= pages.end && pages.end <= end;
        if plan.working_set.is_empty() || !inside(&plan.working_set) || !inside(&plan.fill) {
            return Err(failed("its pages do not lie in RAM"));
        }
        Ok(plan)
    }
}

/// A word that is not what it should be.
#[derive(Debug)]
pub(super) struct Wrong {
    pub(super) gpa: u64,
    pub(super) expected: u64,
    pub(super) found: u64,
}

/// A vCPU in the guest: registers, and a view of memory.
#[derive(Debug)]
pub(super) struct Vcpu<'a> {
    registers: &'a mut Registers,
    memory: &'a VcpuMemory,
    mailbox: Page<'a>,
    mailbox_gpa: u64,
    mem_bytes: u64,
    first: bool,
    /// The disk, for the first vCPU.
    disk: Option<DiskWork<'a>>,
    /// The network interface, likewise.
    net: Option<NetWork<'a>>,
    plan: Plan,
}

impl<'a> Vcpu<'a> {
    /// Enters the guest with `registers`.
    pub(super) fn enter(
        registers: &'a mut Registers,
        memory: &'a VcpuMemory,
        bus: &'a Bus,
        mem_bytes: u64,
        vcpu: u32,
    ) -> Result<Self, Stopped> {
        let plan = Plan::read(memory, mem_bytes, vcpu)?;
        let mailbox_gpa = mailbox_gpa(vcpu);
        let mailbox = memory
            .page(mailbox_gpa)
            .ok_or_else(|| Stopped::Failed(format!("vCPU {vcpu}: no RAM at the mailbox")))?;
        let disk = DiskWork::new(memory, bus, plan.disk_window, mailbox_gpa);
        let net = NetWork::new(memory, bus, plan.net_window);
        Ok(Self {
            registers,
            memory,
            disk: disk.filter(|_| vcpu == 0),
            net: net.filter(|_| vcpu == 0),
            mailbox,
            mailbox_gpa,
            mem_bytes,
            first: vcpu == 0,
            plan,
        })
    }

    /// Runs until the gate says to leave, or the guest ends. `say` takes what goes to the serial port.
    pub(super) fn run(&mut self, gate: &Gate, say: impl Fn(&[u8])) -> Result<(), Stopped> {
        let mut slice = None;
        while !gate.must_leave_guest() {
            if gate.is_throttled() {
                let began = *slice.get_or_insert_with(Instant::now);
                if began.elapsed() >= SLICE {
                    gate.rest();
                    slice = None;
                    continue;
                }
            }
            match self.registers.phase {
                mailbox::PHASE_IDLE => {
                    if self.first {
                        say(GREETING.as_bytes());
                    }
                    if let Some(disk) = &self.disk {
                        disk.set_up();
                    }
                    if let Some(net) = &self.net {
                        net.set_up();
                    }
                    self.enter_phase(mailbox::PHASE_FILL);
                }
                mailbox::PHASE_FILL => self.fill_step()?,
                _ => {
                    let pass = self.registers.pass;
                    self.working_set_step(gate)?;
                    if self.first && self.plan.serial && self.registers.pass != pass {
                        let digit = params::SERIAL_DIGIT_0 + pass % params::SERIAL_DIGITS;
                        say(&digit.to_le_bytes()[..1]);
                    }
                }
            }
        }
        Ok(())
    }

    fn enter_phase(&mut self, phase: u64) {
        self.registers.phase = phase;
        store(&self.mailbox, mailbox::PHASE, phase);
    }

    fn fill_step(&mut self) -> Result<(), Stopped> {
        let index = self
            .plan
            .fill
            .start
            .saturating_add(self.registers.filled_pages);
        if index >= self.plan.fill.end {
            let now = now_ns();
            self.registers.pass = 1;
            self.registers.next_page = 0;
            self.registers.fill_check_in = self.plan.fill_check_every;
            self.registers.heartbeat_ns = Some(now);
            self.registers.batch_left = self.plan.batch_pages;
            self.registers.batch_due_ns = now.saturating_add(self.plan.batch_ns);
            self.enter_phase(mailbox::PHASE_FIRST_PASS);
            return Ok(());
        }
        let (gpa, page) = self.data_page(index)?;
        for word in 0..FILL_WORDS_PER_PAGE {
            store(&page, word * 8, fill_word(gpa / PAGE_BYTES, word));
        }
        self.registers.filled_pages += 1;
        store(
            &self.mailbox,
            mailbox::FILLED_PAGES,
            self.registers.filled_pages,
        );
        Ok(())
    }

    /// Writes one page of the working set, or waits for the rate limit, or ends a pass.
    fn working_set_step(&mut self, gate: &Gate) -> Result<(), Stopped> {
        let index = self
            .plan
            .working_set
            .start
            .saturating_add(self.registers.next_page);
        if index >= self.plan.working_set.end {
            return self.end_pass();
        }
        if self.plan.batch_pages > 0 && self.registers.batch_left == 0 && !self.next_batch(gate) {
            return Ok(());
        }
        if let Some(wrong) = self.stamp_page(index)? {
            self.count_error(&wrong);
        }
        self.heartbeat();
        self.registers.next_page += 1;
        self.registers.batch_left = self.registers.batch_left.saturating_sub(1);
        self.registers.fill_check_in = self.registers.fill_check_in.saturating_sub(1);
        if self.registers.fill_check_in == 0 {
            self.registers.fill_check_in = self.plan.fill_check_every;
            if let Some(wrong) = self.check_fill_page()? {
                self.count_error(&wrong);
            }
        }
        if let Some(wrong) = self.disk.as_ref().and_then(DiskWork::step) {
            self.count_error(&wrong);
        }
        if let Some(wrong) = self.net.as_ref().and_then(NetWork::step) {
            self.count_error(&wrong);
        }
        Ok(())
    }

    fn end_pass(&mut self) -> Result<(), Stopped> {
        let done = self.registers.pass;
        store(&self.mailbox, mailbox::PASSES, done);
        self.registers.pass = done.wrapping_add(1);
        self.registers.next_page = 0;
        self.enter_phase(mailbox::PHASE_STEADY);
        if self.first && done >= self.plan.exit_after_passes && self.plan.exit_after_passes > 0 {
            return Err(Stopped::Exit(0));
        }
        Ok(())
    }

    /// Checks the last pass's stamps, if there was one, and writes this pass's. Returns the first wrong word.
    fn stamp_page(&self, index: u64) -> Result<Option<Wrong>, Stopped> {
        let (gpa, page) = self.data_page(index)?;
        let number = gpa / PAGE_BYTES;
        let pass = self.registers.pass;
        let mut wrong = None;
        if pass > 1 {
            for word in 0..STAMPS_PER_PAGE {
                let at = word * STAMP_STRIDE_BYTES;
                let (expected, found) = (stamp(number, pass - 1, word), load(&page, at));
                if found != expected {
                    wrong = Some(Wrong {
                        gpa: gpa + at,
                        expected,
                        found,
                    });
                    break;
                }
            }
        }
        for word in 0..STAMPS_PER_PAGE {
            store(&page, word * STAMP_STRIDE_BYTES, stamp(number, pass, word));
        }
        Ok(wrong)
    }

    /// Checks the next page of the fill. Returns the first wrong word.
    fn check_fill_page(&mut self) -> Result<Option<Wrong>, Stopped> {
        let pages = self.plan.fill.end - self.plan.fill.start;
        if pages == 0 {
            return Ok(None);
        }
        let next = self.registers.fill_check_next % pages;
        let (gpa, page) = self.data_page(self.plan.fill.start + next)?;
        let stride = if self
            .registers
            .fill_checked
            .is_multiple_of(FILL_CHECK_FULL_EVERY)
        {
            1
        } else {
            FILL_CHECK_STRIDE
        };
        self.registers.fill_check_next = (next + 1) % pages;
        self.registers.fill_checked = self.registers.fill_checked.wrapping_add(1);
        store(
            &self.mailbox,
            mailbox::FILL_CHECKED,
            self.registers.fill_checked,
        );
        let mut at_word = 0;
        while at_word < FILL_WORDS_PER_PAGE {
            let expected = fill_word(gpa / PAGE_BYTES, at_word);
            let found = load(&page, at_word * 8);
            if found != expected {
                return Ok(Some(Wrong {
                    gpa: gpa + at_word * 8,
                    expected,
                    found,
                }));
            }
            at_word += stride;
        }
        Ok(None)
    }

    /// Notes that a page was written, and how long that took since the one before.
    fn heartbeat(&mut self) {
        let now = now_ns();
        let last = self.registers.heartbeat_ns.replace(now);
        let written = load(&self.mailbox, mailbox::PAGES_WRITTEN);
        if written != self.registers.pages_written {
            self.count_error(&Wrong {
                gpa: self.mailbox_gpa + mailbox::PAGES_WRITTEN,
                expected: self.registers.pages_written,
                found: written,
            });
        }
        self.registers.pages_written = self.registers.pages_written.wrapping_add(1);
        store(
            &self.mailbox,
            mailbox::PAGES_WRITTEN,
            self.registers.pages_written,
        );
        store(&self.mailbox, mailbox::HEARTBEAT_TSC, now);
        let requested = load(&self.mailbox, mailbox::RESET_REQUESTED);
        if requested != self.registers.reset_done {
            self.registers.reset_done = requested;
            self.registers.longest_gap_ns = 0;
            store(&self.mailbox, mailbox::LONGEST_GAP_TICKS, 0);
            store(&self.mailbox, mailbox::RESET_DONE, requested);
        } else if self.registers.phase == mailbox::PHASE_STEADY
            && let Some(gap) = last.and_then(|last| now.checked_sub(last))
            && gap > self.registers.longest_gap_ns
        {
            self.registers.longest_gap_ns = gap;
            store(&self.mailbox, mailbox::LONGEST_GAP_TICKS, gap);
        }
    }

    fn count_error(&mut self, wrong: &Wrong) {
        self.registers.errors = self.registers.errors.saturating_add(1);
        store(&self.mailbox, mailbox::ERRORS, self.registers.errors);
        if load(&self.mailbox, mailbox::FIRST_ERROR_GPA) == 0 {
            store(&self.mailbox, mailbox::FIRST_ERROR_GPA, wrong.gpa);
            store(&self.mailbox, mailbox::FIRST_ERROR_EXPECTED, wrong.expected);
            store(&self.mailbox, mailbox::FIRST_ERROR_FOUND, wrong.found);
        }
    }

    /// Begins the next batch of the rate limit if it is due; else waits for that, or until the gate calls, and returns `false`.
    fn next_batch(&mut self, gate: &Gate) -> bool {
        let (now, mut due) = (now_ns(), self.registers.batch_due_ns);
        let slack = |batches: u64| self.plan.batch_ns.saturating_mul(batches);
        let early = due.saturating_sub(now);
        if early > slack(EARLY_BATCHES_MAX) {
            due = now;
        } else if early > 0 {
            self.registers.batch_waiting = true;
            if early >= SLEEP_MIN_NS {
                gate.sleep(Duration::from_nanos(early));
            } else {
                std::hint::spin_loop();
            }
            return false;
        } else if self.registers.batch_waiting {
            // The time asked for is no gap; what came on top of it is one.
            self.registers.heartbeat_ns = self.registers.heartbeat_ns.map(|last| last.max(due));
        }
        if now.saturating_sub(due) > slack(LATE_BATCHES_MAX) {
            due = now;
        }
        self.registers.batch_waiting = false;
        self.registers.batch_due_ns = due.saturating_add(self.plan.batch_ns);
        self.registers.batch_left = self.plan.batch_pages;
        true
    }

    /// Address and content of a data page.
    fn data_page(&self, index: u64) -> Result<(u64, Page<'a>), Stopped> {
        let gpa = layout::data_page_gpa(index, self.mem_bytes);
        match self.memory.page(gpa) {
            Some(page) => Ok((gpa, page)),
            None => Err(Stopped::Failed(format!("no RAM at {gpa:#x}"))),
        }
    }
}

/// The guest's clock.
pub(super) fn now_ns() -> u64 {
    let now = rustix::time::clock_gettime(ClockId::Monotonic);
    // Never negative: it counts from boot.
    now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned()
}

/// The word at byte offset `at` of a page.
fn load(page: &Page<'_>, at: u64) -> u64 {
    debug_assert!(at / 8 < PAGE_WORDS);
    u64::from_le(page.load((at / 8) as usize))
}

fn store(page: &Page<'_>, at: u64, value: u64) {
    debug_assert!(at / 8 < PAGE_WORDS);
    page.store((at / 8) as usize, value.to_le());
}
