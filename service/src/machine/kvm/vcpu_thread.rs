//! A vCPU's thread: enters the guest, serves its exits, and parks when told to.
//!
//! A parked vCPU is out of KVM_RUN and owes nothing: the last port or memory access that it left the guest for has been completed by
//! entering KVM_RUN once more with `immediate_exit` set, as KVM's documentation asks for before state is read.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kvm_ioctls::{VcpuExit, VcpuFd};
use vmferry_devices::kvm::{Kicker, KvmVcpu};

use super::control::{Control, Woken};
use crate::machine::MachineEvent;
use crate::machine::serial::SerialPort;
use crate::machine::throttle::{self, SLICE};
use crate::machine::vfio::VfioDevices;
use crate::machine::virtio::Bus;
use crate::machine::workload::layout::port;

/// Wakes late by no more than about this, in nanoseconds, so that a rate-limited guest keeps its schedule.
const TIMER_SLACK_NS: u64 = 1_000;
/// Port of the keyboard's controller, and the command by which it resets the machine: how Linux does it.
const RESET_PORT: u16 = 0x64;
const RESET_CPU: u8 = 0xfe;
/// What nobody answers reads as.
const UNASSIGNED: u8 = 0xff;

/// Where events of the machine go.
pub(super) type EventSink = Arc<dyn Fn(MachineEvent) + Send + Sync>;

/// What all vCPU threads of a machine share.
pub(super) struct Board {
    pub(super) control: Control,
    pub(super) vcpus: Vec<Vcpu>,
    pub(super) serial: Mutex<SerialPort>,
    pub(super) vfio: VfioDevices,
    pub(super) bus: Bus,
    pub(super) events: EventSink,
    /// The threads, to be kicked and, at the end, joined. Filled while all of them are still parked.
    pub(super) threads: Mutex<Vec<std::thread::JoinHandle<()>>>,
}

/// One vCPU. Its thread holds the mutex while it may be in the guest; others take it only while the thread is parked.
pub(super) struct Vcpu {
    pub(super) kvm: Mutex<KvmVcpu>,
    pub(super) kicker: Kicker,
    /// Its slice is over: it rests before it enters the guest again.
    pub(super) rest_due: AtomicBool,
}

impl Vcpu {
    /// Waits for a vCPU that may be in the guest to park.
    pub(super) fn lock(&self) -> MutexGuard<'_, KvmVcpu> {
        self.kvm.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Board {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Board")
            .field("vcpus", &self.vcpus.len())
            .finish_non_exhaustive()
    }
}

impl Board {
    /// Takes every vCPU out of the guest. They enter it again only when their threads have been parked and let go.
    pub(super) fn kick_all(&self) {
        let threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        for (vcpu, thread) in self.vcpus.iter().zip(threads.iter()) {
            if let Err(error) = vcpu.kicker.kick(thread) {
                // Its flag is set, so it stops at its next exit; the caller waits with a deadline.
                tracing::warn!(error = &error as &dyn std::error::Error, "vCPU not kicked");
            }
        }
    }
}

/// Body of the thread that sends vCPUs to rest while the guest is throttled. Ends with the machine.
pub(super) fn run_throttle(board: &Board) {
    let mut percent = 0;
    loop {
        match board.control.wait_throttle(percent, SLICE) {
            None => return,
            Some(now) if now != percent || now == 0 => {
                percent = now;
                continue;
            }
            Some(_) => {}
        }
        for vcpu in &board.vcpus {
            vcpu.rest_due.store(true, Ordering::SeqCst);
        }
        board.kick_all();
        if board
            .control
            .wait_throttle(percent, throttle::rest(percent))
            .is_none()
        {
            return;
        }
    }
}

/// Body of the thread of vCPU `number`.
pub(super) fn run_vcpu(board: &Board, number: usize) {
    // Without it the schedule is kept less well, no more.
    if let Err(error) =
        rustix::thread::set_current_timer_slack(std::num::NonZeroU64::new(TIMER_SLACK_NS))
    {
        tracing::debug!(
            error = &error as &dyn std::error::Error,
            "timer slack unchanged"
        );
    }
    let vcpu = &board.vcpus[number];
    board.control.born();
    while board.control.park(|| vcpu.kicker.clear()) == Woken::Run {
        let left = {
            let mut kvm = vcpu.lock();
            run_until_stopped(board, vcpu, kvm.fd_mut(), number)
        };
        if let Left::Ended(event) = left {
            let first = board.control.end(&event);
            if first {
                board.kick_all();
            }
            board
                .control
                .park_ended(first.then_some(|| (board.events)(event)));
            return;
        }
    }
}

/// Why a vCPU left the guest for longer.
enum Left {
    /// It was told to.
    Stopped,
    /// It cannot go on.
    Ended(MachineEvent),
}

/// What to do after an exit.
enum After {
    /// Enter the guest again.
    Continue,
    /// Something took it out of the guest.
    Kicked,
    /// Sleep for so long, then enter the guest again.
    Sleep(Duration),
    /// The guest ends.
    End(MachineEvent),
}

fn run_until_stopped(board: &Board, vcpu: &Vcpu, fd: &mut VcpuFd, number: usize) -> Left {
    while !board.control.stop_wanted() {
        let after = match fd.run() {
            Ok(exit) => serve(board, exit, number),
            Err(error) => match error.errno() {
                libc::EINTR | libc::EAGAIN => After::Kicked,
                _ => After::End(failed(number, &format!("KVM_RUN: {error}"))),
            },
        };
        let after = match after {
            After::End(MachineEvent::VcpuFailed(text)) => After::End(MachineEvent::VcpuFailed(
                format!("{text}{}", where_it_is(fd)),
            )),
            other => other,
        };
        match after {
            After::Continue => {}
            After::Kicked => {
                let due = vcpu.rest_due.swap(false, Ordering::SeqCst);
                board.control.rest(due, || vcpu.kicker.clear());
            }
            After::Sleep(time) => board.control.sleep(time),
            After::End(event) => {
                complete_exit(vcpu, fd);
                return Left::Ended(event);
            }
        }
    }
    complete_exit(vcpu, fd);
    Left::Stopped
}

/// Lets KVM finish the access that the last exit was for, without entering the guest.
fn complete_exit(vcpu: &Vcpu, fd: &mut VcpuFd) {
    vcpu.kicker.set();
    // Always fails with EINTR: that is what the flag is for.
    let _ = fd.run();
}

fn serve(board: &Board, exit: VcpuExit<'_>, number: usize) -> After {
    match exit {
        VcpuExit::IoOut(at, data) => return write_port(board, at, data),
        VcpuExit::IoIn(at, data) => read_port(board, at, data),
        VcpuExit::MmioRead(at, data) => {
            if !board.bus.read(at, data) && !board.vfio.read(at, data) {
                data.fill(UNASSIGNED);
            }
        }
        VcpuExit::MmioWrite(at, data) => {
            let _somebody_is_there = board.bus.write(at, data) || board.vfio.write(at, data);
        }
        VcpuExit::Intr | VcpuExit::IrqWindowOpen => {}
        // Nothing can wake it: there are no interrupts. It stays until somebody pauses the machine.
        VcpuExit::Hlt => return After::Sleep(Duration::from_secs(3600)),
        VcpuExit::Shutdown => return After::End(failed(number, "triple fault")),
        VcpuExit::InternalError => {
            let what = "KVM internal error, such as an instruction that it cannot emulate";
            return After::End(failed(number, what));
        }
        VcpuExit::FailEntry(reason, cpu) => {
            return After::End(failed(
                number,
                &format!("entry failed on CPU {cpu}: {reason:#x}"),
            ));
        }
        VcpuExit::MemoryFault { flags, gpa, size } => {
            return After::End(failed(
                number,
                &format!("memory fault, flags {flags:#x}, at {gpa:#x} for {size:#x} bytes"),
            ));
        }
        other => return After::End(failed(number, &format!("unexpected exit {other:?}"))),
    }
    After::Continue
}

fn write_port(board: &Board, at: u16, data: &[u8]) -> After {
    match (at, data) {
        (RESET_PORT, [RESET_CPU, ..]) => return After::End(MachineEvent::GuestExit(0)),
        (port::EXIT, [value, ..]) => return After::End(MachineEvent::GuestExit(*value)),
        (port::SLEEP, &[a, b, c, d]) => {
            return After::Sleep(Duration::from_micros(
                u32::from_le_bytes([a, b, c, d]).into(),
            ));
        }
        _ => {
            if let Some(offset) = serial_offset(at) {
                let mut serial = board.serial.lock().unwrap_or_else(PoisonError::into_inner);
                for value in data {
                    serial.write(offset, *value);
                }
            }
        }
    }
    After::Continue
}

fn read_port(board: &Board, at: u16, data: &mut [u8]) {
    data.fill(UNASSIGNED);
    if let Some(offset) = serial_offset(at) {
        let mut serial = board.serial.lock().unwrap_or_else(PoisonError::into_inner);
        data.iter_mut()
            .for_each(|value| *value = serial.read(offset));
    } else if at == port::SLEEP && data.len() == 4 {
        data.copy_from_slice(&port::SLEEP_PRESENT.to_le_bytes());
    }
}

fn serial_offset(at: u16) -> Option<u8> {
    at.checked_sub(port::SERIAL)
        .filter(|offset| *offset < 8)
        .and_then(|offset| u8::try_from(offset).ok())
}

fn failed(number: usize, what: &str) -> MachineEvent {
    MachineEvent::VcpuFailed(format!("vCPU {number}: {what}"))
}

fn where_it_is(fd: &VcpuFd) -> String {
    fd.get_regs()
        .map(|regs| format!(" at {:#x}", regs.rip))
        .unwrap_or_default()
}
