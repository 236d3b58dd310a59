//! What the drivers of the workload share: the registers of their device, and their words in guest memory.

use super::memory::VcpuMemory;
use crate::machine::virtio::Bus;
use crate::machine::workload::layout::PAGE_BYTES;

/// A device behind a window, whose driver has its words from an address on.
#[derive(Debug)]
pub(super) struct Driver<'a> {
    memory: &'a VcpuMemory,
    bus: &'a Bus,
    window: u64,
    base: u64,
}

impl<'a> Driver<'a> {
    /// `None` for no window.
    pub(super) fn new(
        memory: &'a VcpuMemory,
        bus: &'a Bus,
        window: u64,
        base: u64,
    ) -> Option<Self> {
        (window != 0).then_some(Self {
            memory,
            bus,
            window,
            base,
        })
    }

    /// Agrees on VERSION_1 and nothing else.
    pub(super) fn begin(&self) {
        for (register, value) in [
            (0x70, 0),
            (0x70, 3),
            (0x24, 1),
            (0x20, 1),
            (0x24, 0),
            (0x20, 0),
            (0x70, 11),
        ] {
            self.write_register(register, value);
        }
    }

    /// Sets up queue `number` of `size` entries. Descriptors, available and used ring are words of the driver.
    pub(super) fn set_up_queue(&self, number: u64, size: u64, [desc, avail, used]: [u64; 3]) {
        for (register, value) in [
            (0x30, number),
            (0x38, size),
            (0x80, self.base + desc),
            (0x84, 0),
            (0x90, self.base + avail),
            (0x94, 0),
            (0xa0, self.base + used),
            (0xa4, 0),
            (0x44, 1),
        ] {
            self.write_register(register, value);
        }
    }

    /// Lets the device work.
    pub(super) fn finish(&self) {
        self.write_register(0x70, 15);
    }

    /// The word `at` bytes from the driver's first.
    pub(super) fn load(&self, at: u64) -> u64 {
        let gpa = self.base + at;
        self.memory.page(gpa & !(PAGE_BYTES - 1)).map_or(0, |page| {
            u64::from_le(page.load((gpa % PAGE_BYTES / 8) as usize))
        })
    }

    pub(super) fn store(&self, at: u64, value: u64) {
        let gpa = self.base + at;
        if let Some(page) = self.memory.page(gpa & !(PAGE_BYTES - 1)) {
            page.store((gpa % PAGE_BYTES / 8) as usize, value.to_le());
        }
    }

    pub(super) fn read_register(&self, register: u64) -> u64 {
        let mut word = [0; 4];
        self.bus.read(self.window + register, &mut word);
        u32::from_le_bytes(word).into()
    }

    pub(super) fn write_register(&self, register: u64, value: u64) {
        let word = (value as u32).to_le_bytes();
        self.bus.write(self.window + register, &word);
    }
}
