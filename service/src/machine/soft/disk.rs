//! The workload's disk, as the guest program has it: one polled request at a time, a step for each page that vCPU 0 writes. All its
//! state is guest memory, and what lies where is told in `workload::layout::disk`.

use std::sync::atomic::{Ordering, fence};

use super::driver::Driver;
use super::memory::VcpuMemory;
use super::vcpu::Wrong;
use crate::machine::virtio::{Bus, QUEUE_NOTIFY};
use crate::machine::workload::layout::{DISK_GPA, NO_INTERRUPT, disk, mailbox};
use crate::machine::workload::pattern::stamp;

/// The disk behind a window.
#[derive(Debug)]
pub(super) struct DiskWork<'a> {
    driver: Driver<'a>,
    memory: &'a VcpuMemory,
    mailbox_gpa: u64,
}

impl<'a> DiskWork<'a> {
    /// The disk behind `window`, for the vCPU with this mailbox. `None` for no window.
    pub(super) fn new(
        memory: &'a VcpuMemory,
        bus: &'a Bus,
        window: u64,
        mailbox_gpa: u64,
    ) -> Option<Self> {
        Some(Self {
            driver: Driver::new(memory, bus, window, DISK_GPA)?,
            memory,
            mailbox_gpa,
        })
    }

    /// Sets the device up as a driver does.
    pub(super) fn set_up(&self) {
        self.driver.begin();
        let queue = [disk::DESC, disk::AVAIL, disk::USED];
        self.driver.set_up_queue(0, disk::QUEUE_SIZE, queue);
        self.driver.finish();
        self.store(disk::DESC, DISK_GPA + disk::HEADER);
        self.store(disk::DESC + 8, disk::DESC_HEADER);
        self.store(disk::DESC + 16, DISK_GPA + disk::DATA);
        self.store(disk::DESC + 32, DISK_GPA + disk::STATUS);
        self.store(disk::DESC + 40, disk::DESC_STATUS);
        let sectors = self.driver.read_register(0x100) | self.driver.read_register(0x104) << 32;
        let blocks = (sectors / disk::BLOCK_SECTORS).min(disk::BLOCKS_MAX);
        self.store(disk::BLOCKS, blocks);
    }

    /// A step of work, without waiting. Returns what was found wrong.
    pub(super) fn step(&self) -> Option<Wrong> {
        if self.load(disk::BLOCKS) == 0 {
            return None;
        }
        let step = self.load(disk::STEP);
        if step == disk::STEP_IDLE {
            self.read_block(self.load(disk::BLOCK));
            return None;
        }
        let used = self.load(disk::USED) >> 16;
        if (used ^ self.load(disk::SUBMITTED)) & 0xffff != 0 {
            return None;
        }
        // Only now what the device has written before.
        fence(Ordering::SeqCst);
        // Guest memory is not believed, not even by the guest: a place beyond the end would be none.
        let block = self.load(disk::BLOCK).min(disk::BLOCKS_MAX - 1);
        let generation_at = disk::GENERATIONS + block * 8;
        let status = self.load(disk::STATUS) & 0xff;
        if status != 0 {
            self.count(mailbox::DISK_ERRORS);
            self.store(generation_at, 0);
            self.read_next(block);
            return Some(Wrong {
                gpa: DISK_GPA + disk::STATUS,
                expected: 0,
                found: status,
            });
        }
        let generation = self.load(generation_at);
        if step == disk::STEP_WRITE {
            self.store(generation_at, generation.wrapping_add(1));
            self.count(mailbox::DISK_WRITTEN);
            self.read_next(block);
            return None;
        }
        let wrong = self.compare(block, generation);
        for word in 0..disk::BLOCK_BYTES / 8 {
            let value = stamp(block, generation.wrapping_add(1), word);
            self.store(disk::DATA + word * 8, value);
        }
        self.store(disk::STEP, disk::STEP_WRITE);
        self.submit(block, disk::REQUEST_WRITE, 0);
        wrong
    }

    /// Compares a block that was read with what was written there last, if that is known.
    fn compare(&self, block: u64, generation: u64) -> Option<Wrong> {
        if generation == 0 {
            return None;
        }
        self.count(mailbox::DISK_CHECKED);
        for word in 0..disk::BLOCK_BYTES / 8 {
            let at = disk::DATA + word * 8;
            let (expected, found) = (stamp(block, generation, word), self.load(at));
            if found != expected {
                self.count(mailbox::DISK_ERRORS);
                return Some(Wrong {
                    gpa: DISK_GPA + at,
                    expected,
                    found,
                });
            }
        }
        None
    }

    fn read_next(&self, block: u64) {
        let next = if block + 1 < self.load(disk::BLOCKS) {
            block + 1
        } else {
            0
        };
        self.store(disk::BLOCK, next);
        self.read_block(next);
    }

    fn read_block(&self, block: u64) {
        self.store(disk::STEP, disk::STEP_READ);
        self.submit(block, disk::REQUEST_READ, disk::DESC_WRITE);
    }

    fn submit(&self, block: u64, request: u64, direction: u64) {
        self.store(disk::DESC + 24, disk::DESC_DATA | direction);
        self.store(disk::HEADER, request);
        self.store(disk::HEADER + 8, block.wrapping_mul(disk::BLOCK_SECTORS));
        self.store(disk::STATUS, 0xff);
        let submitted = self.load(disk::SUBMITTED).wrapping_add(1);
        self.store(disk::SUBMITTED, submitted);
        fence(Ordering::SeqCst);
        self.store(disk::AVAIL, (submitted & 0xffff) << 16 | NO_INTERRUPT);
        self.driver.write_register(QUEUE_NOTIFY, 0);
    }

    /// Counts one more in the mailbox.
    fn count(&self, at: u64) {
        if let Some(page) = self.memory.page(self.mailbox_gpa) {
            let index = (at / 8) as usize;
            page.store(
                index,
                u64::from_le(page.load(index)).wrapping_add(1).to_le(),
            );
        }
    }

    fn load(&self, at: u64) -> u64 {
        self.driver.load(at)
    }

    fn store(&self, at: u64, value: u64) {
        self.driver.store(at, value);
    }
}
