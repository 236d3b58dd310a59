//! Gets a vCPU thread out of KVM_RUN, without the race between its last look at a flag and the entry into the guest.
//!
//! Two steps: set `immediate_exit` in the vCPU's shared page, so that an entry that is about to happen returns at once; then send a
//! signal, so that a vCPU that is inside already comes out. The handler does nothing.

use std::ffi::c_void;
use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::JoinHandle;

use kvm_ioctls::{VcpuFd, VmFd};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::ioctl::{RunPage, map_run_page};

/// The real-time signal that takes vCPUs out of the guest.
fn kick_signal() -> i32 {
    SIGRTMIN()
}

extern "C" fn ignore(_signal: i32, _info: *mut libc::siginfo_t, _context: *mut c_void) {}

/// Installs the handler, once per process. Without it the signal would end the process.
///
/// # Errors
/// The kernel's answer, the same on every call.
pub fn install_kick_handler() -> io::Result<()> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    INSTALLED
        .get_or_init(|| {
            register_signal_handler(kick_signal(), ignore).map_err(|error| error.errno())
        })
        .map_err(io::Error::from_raw_os_error)
}

/// Interrupts the KVM_RUN of one vCPU. Made beside the vCPU; usable from any thread.
#[derive(Debug)]
pub struct Kicker {
    run: RunPage,
}

impl Kicker {
    /// A kicker for `vcpu` of `vm`.
    ///
    /// # Errors
    /// When the shared page cannot be mapped.
    pub fn new(vm: &VmFd, vcpu: &VcpuFd) -> io::Result<Self> {
        Ok(Self {
            run: map_run_page(vcpu, vm.run_size())?,
        })
    }

    /// Makes the next KVM_RUN, or the one under way once it is interrupted, return with EINTR.
    pub fn set(&self) {
        self.flag().store(1, Ordering::SeqCst);
    }

    /// Lets KVM_RUN enter the guest again. For the vCPU's own thread.
    pub fn clear(&self) {
        self.flag().store(0, Ordering::SeqCst);
    }

    /// [`set`](Self::set), and interrupts `thread` in case it is in the guest.
    ///
    /// # Errors
    /// When the signal cannot be sent; the vCPU may then stay in the guest for long.
    pub fn kick<T>(&self, thread: &JoinHandle<T>) -> io::Result<()> {
        self.set();
        thread
            .kill(kick_signal())
            .map_err(|error| io::Error::from_raw_os_error(error.errno()))
    }

    fn flag(&self) -> &AtomicU8 {
        self.run.immediate_exit()
    }
}
