//! What a device model has to offer to stand behind a virtio-mmio window.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use virtio_queue::QueueState;
use vmferry_devices::announce::Announce;
use vmferry_devices::{DeviceError, Notifier};
use vmferry_transport::memory::DirtyLog;
use vmferry_transport::wire::{DeviceSchema, Section};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::machine::heirloom::DeviceFd;
use crate::machine::ram::MachineRam;

/// Interrupt reason: used buffers.
pub(super) const REASON_QUEUE: u32 = 1;
/// Interrupt reason: the configuration, or the device's own status, has changed.
pub(super) const REASON_CONFIG: u32 = 2;

/// A device model, in this process or driven by it. The transport calls it from the thread of a vCPU or of the engine's jobs, one at a
/// time.
///
/// There are no default implementations: a back end that forgot one would migrate silently without its state.
pub trait Backend: fmt::Debug + Send {
    /// Name of the device in sections, hello and log; unique within the VM and the same on both sides, such as `virtio-blk/disk0`.
    fn name(&self) -> &str;

    /// Device type, from the specification: 1 network, 2 disk, 19 vsock.
    fn device_type(&self) -> u32;

    /// Largest size of each queue: powers of 2, at most [`QUEUES_MAX`](super::QUEUES_MAX) of them.
    fn queue_sizes(&self) -> Vec<u16>;

    /// What is offered to the driver, without [`F_VERSION_1`](super::F_VERSION_1), which always is. Must not change.
    fn features(&self) -> u64;

    /// The configuration space as the driver reads it.
    fn config(&self) -> Vec<u8>;

    /// The driver writes the configuration space. What cannot be written stays as it is.
    fn write_config(&mut self, offset: u64, data: &[u8]);

    /// Whether a guest that was shown `saved` as configuration space at the source may go on with this device, which may already have
    /// loaded its sections. The error says what differs.
    ///
    /// # Errors
    /// Why not, for people.
    fn accept_config(&mut self, saved: &[u8]) -> Result<(), String>;

    /// Makes all ready that it takes to serve the queues from where `start` says, and serves nothing: rings, buffers, storage and network
    /// are untouched, because the guest may yet go on elsewhere from the state that was loaded here. Everything that can fail is done here.
    ///
    /// # Errors
    /// The device holds nothing of `start` then.
    fn prepare(&mut self, start: Start) -> io::Result<()>;

    /// Begins to serve what it was prepared for; the guest runs here. It may have been told of nothing meanwhile: the transport kicks every
    /// queue and raises the interrupt once afterwards. Must be quick.
    ///
    /// # Errors
    /// It cannot serve this driver, which is told to reset it. Only a back end that is not ours can still refuse.
    fn open(&mut self) -> io::Result<()>;

    /// Ends both: on return nothing writes guest memory or storage any more, every request that was taken from a ring is in the used
    /// ring or will be taken again by whoever starts from the bases returned, one for each queue that was started. They are those of the
    /// start for a device that was only prepared. Does nothing harmful if it was not even that.
    ///
    /// # Errors
    /// It could not be stopped in bounded time, and serves as before.
    fn stop(&mut self) -> io::Result<Vec<QueueBase>>;

    /// The driver resets the device, which is stopped: forget everything of this driver.
    fn reset(&mut self);

    /// Sections that this back end saves and loads besides the transport's own, whose name is [`name`](Self::name).
    fn schemas(&self) -> Vec<DeviceSchema>;

    /// Its sections, in the order of [`schemas`](Self::schemas). Only while stopped; changes nothing.
    ///
    /// # Errors
    /// When the state cannot be had.
    fn save(&mut self) -> Result<Vec<Section>, DeviceError>;

    /// Loads its sections, which are those of [`schemas`](Self::schemas) in that order. Only while stopped.
    ///
    /// # Errors
    /// When the state is refused.
    fn load(&mut self, sections: &[&Section]) -> Result<(), DeviceError>;

    /// A packet for the guest, with its header, that was taken from the network and not delivered yet. Only while stopped; changes nothing.
    fn undelivered(&self) -> Option<Vec<u8>>;

    /// Takes what [`undelivered`](Self::undelivered) gave at the source instead of its own. Only while stopped.
    ///
    /// # Errors
    /// Why that cannot be, for people.
    fn set_undelivered(&mut self, packet: Option<Vec<u8>>) -> Result<(), String>;

    /// A fresh dirty log of what this back end writes to guest memory other than through vm-memory; `None` if it does not.
    ///
    /// # Errors
    /// When the host lacks the interface.
    fn dirty_log(&self) -> io::Result<Option<Box<dyn DirtyLog>>>;

    /// What of it must hear of migrations, if anything must.
    fn notifier(&self) -> Option<Box<dyn Notifier>>;

    /// The network interface, if it is one: what tells the network where the guest is.
    fn announcer(&self) -> Option<Arc<dyn Announce>>;

    /// Copies of what a process that takes the guest over in place must have of it: connections, descriptors of the kernel.
    ///
    /// # Errors
    /// One cannot be passed on.
    fn heirlooms(&self) -> io::Result<Vec<DeviceFd>> {
        Ok(Vec::new())
    }

    /// Takes its own out of what has come from another process, whose device stands and has let go. Only while stopped, before anything
    /// is loaded. Does nothing for a device that waits for nothing.
    ///
    /// # Errors
    /// Something is missing, or of no use.
    fn take_over(&mut self, _fds: &mut Vec<DeviceFd>) -> Result<(), DeviceError> {
        Ok(())
    }
}

/// What a back end is given to serve a driver.
#[derive(Debug)]
pub struct Start {
    /// Guest RAM: its mappings with their bitmap, and the files behind them.
    pub ram: MachineRam,
    /// What device and driver agreed on, `F_VERSION_1` included.
    pub features: u64,
    /// The queues that the driver made ready.
    pub queues: Vec<QueueStart>,
    /// Raises the device's interrupt.
    pub interrupt: Interrupt,
}

/// A queue to serve. Its rings lie in RAM; what is in them is the guest's.
#[derive(Debug)]
pub struct QueueStart {
    /// Its number.
    pub index: u16,
    /// Size, addresses, and where to go on. Checked.
    pub state: QueueState,
    /// Becomes readable when the driver has something. Non-blocking.
    pub kick: Arc<EventFd>,
}

/// How far a stopped queue has come.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct QueueBase {
    /// Its number.
    pub index: u16,
    /// Next entry of the available ring to take, modulo 2^16. Kernel and vhost-user call it the vring base.
    pub next_avail: u16,
    /// Next entry of the used ring to fill, modulo 2^16.
    pub next_used: u16,
}

/// The interrupt line of a device. Clones are the same line.
#[derive(Clone, Debug)]
pub struct Interrupt(Arc<Line>);

#[derive(Debug)]
struct Line {
    call: EventFd,
    /// Reasons beyond used buffers that the driver has not acknowledged.
    reasons: AtomicU32,
    /// The device cannot go on before the driver resets it.
    needs_reset: AtomicBool,
}

impl Interrupt {
    /// A line that nothing is tied to yet.
    ///
    /// # Errors
    /// When the host has no more file descriptors.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(Line {
            call: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
            reasons: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
        })))
    }

    /// Tells the driver to look at the used rings.
    pub fn raise(&self) {
        // It fails only if nobody has read 2^64 of them: a machine without interrupt controller.
        let _ = self.0.call.write(1);
    }

    /// Tells the driver to look at the configuration again.
    pub fn raise_config(&self) {
        self.0.reasons.fetch_or(REASON_CONFIG, Ordering::SeqCst);
        self.raise();
    }

    /// The device cannot go on, because of what the driver or a back end did: the driver is told to reset it.
    pub fn break_device(&self) {
        self.0.needs_reset.store(true, Ordering::SeqCst);
        self.raise_config();
    }

    /// The eventfd, for back ends that raise it themselves, and for the interrupt controller.
    pub fn eventfd(&self) -> &EventFd {
        &self.0.call
    }

    pub(super) fn reasons(&self) -> u32 {
        self.0.reasons.load(Ordering::SeqCst)
    }

    pub(super) fn set_reasons(&self, reasons: u32) {
        self.0.reasons.store(reasons, Ordering::SeqCst);
    }

    pub(super) fn acknowledge(&self, reasons: u32) {
        self.0.reasons.fetch_and(!reasons, Ordering::SeqCst);
    }

    pub(super) fn needs_reset(&self) -> bool {
        self.0.needs_reset.load(Ordering::SeqCst)
    }

    pub(super) fn set_needs_reset(&self, needs_reset: bool) {
        self.0.needs_reset.store(needs_reset, Ordering::SeqCst);
    }
}
