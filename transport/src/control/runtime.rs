//! The control thread: tokio-uring where io_uring works, plain tokio where it is refused.
//!
//! Both give timers, local tasks and readiness of any fd; they differ in how a [`Stream`](super::Stream) reads and writes.

use std::cell::Cell;
use std::fmt;
use std::future::Future;
use std::io;

use tokio::task::{JoinHandle, LocalSet};

/// Setting this environment variable to anything but the empty string or `0` forces [`RuntimeKind::Plain`].
pub const NO_URING_VARIABLE: &str = "VMFERRY_NO_URING";

/// Submission queue entries of the control ring. Control messages are few; more than this many at once only cost a flush.
const RING_ENTRIES: u32 = 256;

thread_local! {
    static KIND: Cell<Option<RuntimeKind>> = const { Cell::new(None) };
}

/// What carries control messages.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum RuntimeKind {
    /// tokio-uring.
    Uring,
    /// tokio on epoll.
    Plain,
}

impl fmt::Display for RuntimeKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Uring => "io_uring",
            Self::Plain => "epoll",
        })
    }
}

/// Runs `future` to its end on this thread, on io_uring if the kernel allows it. Tasks it has spawned and left behind are dropped.
///
/// # Errors
/// When not even a plain runtime can be made (out of file descriptors or memory).
///
/// # Panics
/// When called on a thread that already runs a runtime.
pub fn run<F: Future>(future: F) -> io::Result<F::Output> {
    run_on(choose(), future)
}

/// Like [`run`], with the kind given. [`RuntimeKind::Uring`] still falls back, with a warning, if the ring cannot be made.
///
/// # Errors
/// As [`run`].
///
/// # Panics
/// As [`run`].
pub fn run_on<F: Future>(kind: RuntimeKind, future: F) -> io::Result<F::Output> {
    if kind == RuntimeKind::Uring {
        let mut builder = tokio_uring::builder();
        match tokio_uring::Runtime::new(builder.entries(RING_ENTRIES)) {
            Ok(runtime) => {
                let _entered = Entered::new(RuntimeKind::Uring);
                return Ok(runtime.block_on(future));
            }
            Err(error) => tracing::warn!(
                error = &error as &dyn std::error::Error,
                "no io_uring for the control thread, using epoll"
            ),
        }
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    // Declared after the runtime, so that tasks are dropped while their sockets can still be deregistered.
    let local = LocalSet::new();
    let _entered = Entered::new(RuntimeKind::Plain);
    Ok(runtime.block_on(local.run_until(future)))
}

/// What [`run`] uses here: io_uring unless it is refused or switched off by [`NO_URING_VARIABLE`].
pub fn choose() -> RuntimeKind {
    let switched_off =
        std::env::var_os(NO_URING_VARIABLE).is_some_and(|value| !value.is_empty() && value != "0");
    if switched_off {
        return RuntimeKind::Plain;
    }
    match probe() {
        Ok(()) => RuntimeKind::Uring,
        Err(reason) => {
            tracing::info!(reason, "io_uring is not available, control runs on epoll");
            RuntimeKind::Plain
        }
    }
}

/// The runtime of this thread, `None` outside of [`run`].
pub fn kind() -> Option<RuntimeKind> {
    KIND.get()
}

/// Starts a task on this control thread. It need not be `Send`.
///
/// # Panics
/// When called outside of [`run`].
pub fn spawn<F>(task: F) -> JoinHandle<F::Output>
where
    F: Future + 'static,
{
    tokio::task::spawn_local(task)
}

/// Whether a ring can be made and knows the operations we use. The kernel may lack io_uring (older than 5.1), a sysctl or a
/// seccomp filter may refuse it, or it may be too old for plain read and write (5.6).
fn probe() -> Result<(), String> {
    let ring = io_uring::IoUring::new(2).map_err(|error| format!("io_uring_setup: {error}"))?;
    let mut probe = io_uring::Probe::new();
    ring.submitter()
        .register_probe(&mut probe)
        .map_err(|error| format!("io_uring_register: {error}"))?;
    let needed = [
        ("read", io_uring::opcode::Read::CODE),
        ("write", io_uring::opcode::Write::CODE),
        ("cancel", io_uring::opcode::AsyncCancel::CODE),
    ];
    match needed.iter().find(|(_, code)| !probe.is_supported(*code)) {
        Some((name, _)) => Err(format!("the kernel's io_uring has no `{name}`")),
        None => Ok(()),
    }
}

/// Marks the thread for as long as its runtime lives.
struct Entered;

impl Entered {
    fn new(kind: RuntimeKind) -> Self {
        KIND.set(Some(kind));
        Self
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        KIND.set(None);
    }
}
