//! The KVM calls that kvm-ioctls lacks, or offers only in a form that allocates or cannot check lengths.
//!
//! - the dirty log by reference to a caller's buffer, and its clearing
//! - XSAVE in a buffer whose length was checked against the VM's
//! - the TSC offset attribute of a vCPU
//! - memory slots that keep their mapping alive

#![expect(
    unsafe_code,
    reason = "passes buffers and mappings to KVM by address; each wrapper checks or owns what the kernel reaches"
)]

use std::io;
use std::os::fd::AsRawFd;

use kvm_bindings::{
    KVM_CAP_XSAVE2, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_clear_dirty_log,
    kvm_clear_dirty_log__bindgen_ty_1, kvm_device_attr, kvm_dirty_log, kvm_dirty_log__bindgen_ty_1,
    kvm_userspace_memory_region, kvm_xsave,
};
use kvm_ioctls::{VcpuFd, VmFd};
use vmferry_transport::memory::RamBlock;
use vmm_sys_util::ioctl::{ioctl_with_mut_ptr, ioctl_with_ptr, ioctl_with_ref};
use vmm_sys_util::{ioctl_ior_nr, ioctl_iow_nr, ioctl_iowr_nr};

ioctl_iow_nr!(KVM_GET_DIRTY_LOG, KVMIO, 0x42, kvm_dirty_log);
ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
ioctl_ior_nr!(KVM_GET_XSAVE, KVMIO, 0xa4, kvm_xsave);
ioctl_iow_nr!(KVM_SET_XSAVE, KVMIO, 0xa5, kvm_xsave);
ioctl_ior_nr!(KVM_GET_XSAVE2, KVMIO, 0xcf, kvm_xsave);
ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);
ioctl_iow_nr!(KVM_HAS_DEVICE_ATTR, KVMIO, 0xe3, kvm_device_attr);

/// Bytes of the XSAVE area that every KVM has.
pub(super) const XSAVE_BYTES_MIN: usize = size_of::<kvm_xsave>();

/// Places `block` at `gpa` as memory slot `slot`, with `flags`; `None` takes the slot away.
///
/// The caller keeps the block's mapping alive until the slot is taken away or the VM is gone: see `MemorySlots`, the one caller.
pub(super) fn set_memory_slot(
    vm: &VmFd,
    slot: u32,
    gpa: u64,
    block: Option<&RamBlock>,
    flags: u32,
) -> io::Result<()> {
    let region = kvm_userspace_memory_region {
        slot,
        flags,
        guest_phys_addr: gpa,
        memory_size: block.map_or(0, |block| block.pages().to_bytes()),
        userspace_addr: block.map_or(0, |block| block.mapping().host_address() as u64),
    };
    // SAFETY: the guest will write `memory_size` bytes at `userspace_addr`, which are exactly the block's mapping: shared memory that
    // nobody in this process holds a reference into. `MemorySlots` owns the block for as long as the slot exists.
    unsafe { vm.set_user_memory_region(region) }.map_err(to_io)
}

/// Copies the dirty bitmap of `slot`, which has `pages` pages, into `words`. Without manual protection this clears the log as well.
pub(super) fn get_dirty_log(vm: &VmFd, slot: u32, pages: u64, words: &mut [u64]) -> io::Result<()> {
    check_words(pages, words.len())?;
    let log = kvm_dirty_log {
        slot,
        padding1: 0,
        __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 {
            dirty_bitmap: words.as_mut_ptr().cast(),
        },
    };
    // SAFETY: the kernel writes one bit per page of the slot, rounded up to whole words, at `dirty_bitmap`. `words` is at least that
    // long, checked above against the page count that `MemorySlots` gave the slot.
    let result = unsafe { ioctl_with_ref(vm, KVM_GET_DIRTY_LOG(), &log) };
    done(result)
}

/// Clears the pages whose bits are set in `words`, which starts at page `first` (a multiple of 64) and covers `pages` pages (a
/// multiple of 64, or up to the end of the slot), and write-protects them again.
pub(super) fn clear_dirty_log(
    vm: &VmFd,
    slot: u32,
    first: u64,
    pages: u32,
    words: &[u64],
) -> io::Result<()> {
    check_words(pages.into(), words.len())?;
    let log = kvm_clear_dirty_log {
        slot,
        num_pages: pages,
        first_page: first,
        __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
            dirty_bitmap: words.as_ptr().cast_mut().cast(),
        },
    };
    // SAFETY: the kernel only reads `dirty_bitmap`, one bit for each of `pages` pages; `words` is at least that long, checked above.
    let result = unsafe { ioctl_with_ref(vm, KVM_CLEAR_DIRTY_LOG(), &log) };
    done(result)
}

fn check_words(pages: u64, words: usize) -> io::Result<()> {
    if (words as u64) < pages.div_ceil(64) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("a bitmap of {words} words for {pages} pages"),
        ));
    }
    Ok(())
}

/// Length in bytes of the XSAVE area of this VM's vCPUs: what KVM reads and writes. At least [`XSAVE_BYTES_MIN`].
pub(super) fn xsave_bytes(vm: &VmFd) -> usize {
    let bytes = vm.check_extension_raw(KVM_CAP_XSAVE2.into());
    usize::try_from(bytes).unwrap_or(0).max(XSAVE_BYTES_MIN)
}

/// An XSAVE area as large as the VM needs, aligned for the kernel's copy.
#[derive(Debug)]
pub(super) struct XsaveArea {
    words: Vec<u64>,
    bytes: usize,
}

impl XsaveArea {
    /// A zeroed area of `bytes`, which must come from [`xsave_bytes`].
    pub(super) fn new(bytes: usize) -> Self {
        let bytes = bytes.max(XSAVE_BYTES_MIN);
        Self {
            words: vec![0; bytes.div_ceil(8)],
            bytes,
        }
    }

    /// The area's bytes.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes: Vec<u8> = self
            .words
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect();
        bytes.truncate(self.bytes);
        bytes
    }

    /// Replaces the beginning of the area by `from` and zeroes the rest; what does not fit is an error of the caller and ignored.
    pub(super) fn fill(&mut self, from: &[u8]) {
        self.words.fill(0);
        for (word, chunk) in self.words.iter_mut().zip(from.chunks(8)) {
            let mut bytes = [0; 8];
            bytes[..chunk.len()].copy_from_slice(chunk);
            *word = u64::from_le_bytes(bytes);
        }
    }

    /// Reads the vCPU's area. `self` was made for the vCPU's VM.
    pub(super) fn get(&mut self, vcpu: &VcpuFd) -> io::Result<()> {
        let pointer: *mut kvm_xsave = self.words.as_mut_ptr().cast();
        let request = if self.bytes > XSAVE_BYTES_MIN {
            KVM_GET_XSAVE2()
        } else {
            KVM_GET_XSAVE()
        };
        // SAFETY: KVM_GET_XSAVE writes 4096 bytes, KVM_GET_XSAVE2 as many as KVM_CAP_XSAVE2 said when the area was made; the area has
        // at least that many in either case. The size cannot grow later: it does so only by arch_prctl, which we never call.
        let result = unsafe { ioctl_with_mut_ptr(vcpu, request, pointer) };
        done(result)
    }

    /// Loads the area into the vCPU. `self` was made for the vCPU's VM.
    pub(super) fn set(&self, vcpu: &VcpuFd) -> io::Result<()> {
        let pointer: *const kvm_xsave = self.words.as_ptr().cast();
        // SAFETY: KVM_SET_XSAVE reads as many bytes as KVM_CAP_XSAVE2 said when the area was made, or 4096; the area has that many.
        let result = unsafe { ioctl_with_ptr(vcpu, KVM_SET_XSAVE(), pointer) };
        done(result)
    }
}

/// Whether the TSC offset of this vCPU can be read and set.
pub(super) fn has_tsc_offset(vcpu: &VcpuFd) -> bool {
    let attribute = tsc_offset_attribute(0);
    // SAFETY: KVM_HAS_DEVICE_ATTR reads the attribute and does not follow its address.
    let result = unsafe { ioctl_with_ref(vcpu, KVM_HAS_DEVICE_ATTR(), &attribute) };
    result == 0
}

/// The vCPU's TSC offset: guest TSC less host TSC, modulo 2^64.
pub(super) fn tsc_offset(vcpu: &VcpuFd) -> io::Result<u64> {
    let mut offset = 0_u64;
    let attribute = tsc_offset_attribute((&raw mut offset) as u64);
    // SAFETY: the kernel writes the eight bytes of `offset`, which outlives the call and to which no reference exists meanwhile.
    let result = unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attribute) };
    done(result).map(|()| offset)
}

/// Sets the vCPU's TSC offset.
pub(super) fn set_tsc_offset(vcpu: &VcpuFd, offset: u64) -> io::Result<()> {
    let attribute = tsc_offset_attribute((&raw const offset) as u64);
    // SAFETY: the kernel reads the eight bytes of `offset`, which outlives the call.
    let result = unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attribute) };
    done(result)
}

fn tsc_offset_attribute(addr: u64) -> kvm_device_attr {
    kvm_device_attr {
        flags: 0,
        group: KVM_VCPU_TSC_CTRL,
        attr: KVM_VCPU_TSC_OFFSET.into(),
        addr,
    }
}

fn done(result: i32) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// The error of kvm-ioctls as one of the standard library.
pub(super) fn to_io(error: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}

/// A second view of a vCPU's shared page, for the one byte that another thread may write: see `kick.rs`.
pub(super) fn map_run_page(vcpu: &VcpuFd, bytes: usize) -> io::Result<RunPage> {
    // SAFETY: a fresh shared mapping at an address of the kernel's choice; it replaces nothing.
    let address = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            vcpu.as_raw_fd(),
            0,
        )
    };
    if address == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(RunPage {
        address: address.cast(),
        bytes,
    })
}

/// Mapping made by [`map_run_page`].
#[derive(Debug)]
pub(super) struct RunPage {
    address: *mut kvm_bindings::kvm_run,
    bytes: usize,
}

// SAFETY: the mapping is shared memory without thread affinity; the only access is atomic.
unsafe impl Send for RunPage {}
// SAFETY: as above; `immediate_exit` hands out nothing but an atomic.
unsafe impl Sync for RunPage {}

impl RunPage {
    /// The byte that makes KVM_RUN return at once when it is not 0.
    pub(super) fn immediate_exit(&self) -> &std::sync::atomic::AtomicU8 {
        // SAFETY: the field lies within the mapping, whose length KVM gave; no reference is made.
        let field = unsafe { &raw mut (*self.address).immediate_exit };
        // SAFETY: the byte lives as long as `self` borrows the mapping. The kernel reads it like an atomic load, and this process
        // writes it through this function only.
        unsafe { std::sync::atomic::AtomicU8::from_ptr(field) }
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: address and length are those of our own mapping, and no borrow of it is left.
        unsafe { libc::munmap(self.address.cast(), self.bytes) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xsave_area_keeps_bytes_and_zeroes_the_rest() {
        let mut area = XsaveArea::new(XSAVE_BYTES_MIN + 3);
        area.fill(&[0xff; XSAVE_BYTES_MIN + 3]);
        area.fill(&[1, 2, 3, 4, 5, 6, 7, 8, 9]);
        let bytes = area.to_bytes();
        assert_eq!(bytes.len(), XSAVE_BYTES_MIN + 3);
        assert_eq!(bytes[..10], [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]);
        assert!(bytes[10..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn bitmaps_shorter_than_the_slot_are_refused() {
        assert!(check_words(65, 1).is_err());
        assert!(check_words(65, 2).is_ok());
    }
}
