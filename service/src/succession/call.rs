//! What an exec asks of the kernel and of the C library, for which there is no safe face: becoming another program, taking descriptors
//! by their numbers, removing a variable, leaving signals to the kernel, and having somebody else clear up.

#![expect(
    unsafe_code,
    reason = "execve, descriptors by number and the environment belong to the whole process"
)]

use std::ffi::{CStr, CString, OsString};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};

/// Becomes the program at `path`. Returns only if that fails.
pub(super) fn execute(path: &CStr, words: &[CString], environment: &[CString]) -> io::Error {
    let (words, environment) = (pointers(words), pointers(environment));
    // SAFETY: `path` and what both arrays point to are C strings that live until the call returns, and each array ends with NULL.
    unsafe { libc::execve(path.as_ptr(), words.as_ptr(), environment.as_ptr()) };
    io::Error::last_os_error()
}

/// Becomes a program that was opened before. Returns only if that fails.
pub(super) fn execute_open(
    program: BorrowedFd<'_>,
    words: &[CString],
    environment: &[CString],
) -> io::Error {
    let (words, environment) = (pointers(words), pointers(environment));
    // SAFETY: the empty path and what both arrays point to are C strings that live until the call returns, and each array ends with
    // NULL; the kernel checks the descriptor.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            program.as_raw_fd(),
            c"".as_ptr(),
            words.as_ptr(),
            environment.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    io::Error::last_os_error()
}

/// What becomes of a signal. There is none here but the default and what the kernel says has been there.
struct Action(libc::sigaction);

impl Action {
    /// The default, without flags.
    fn of_kernel() -> Self {
        // SAFETY: an action is plain data, and zeros are SIG_DFL with no flags and an empty mask.
        Self(unsafe { std::mem::zeroed() })
    }

    /// Sets the action of a signal, or leaves it; what there was.
    fn exchange(signal: i32, new: Option<&Self>) -> io::Result<Self> {
        let mut before = Self::of_kernel();
        let new = new.map_or(std::ptr::null(), |new| &raw const new.0);
        // SAFETY: both are actions of ours, or NULL. The new one is the default, or one that this process has had for this signal.
        match unsafe { libc::sigaction(signal, new, &raw mut before.0) } {
            0 => Ok(before),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn is_handler(&self) -> bool {
        !self.is_ignore() && self.0.sa_sigaction != libc::SIG_DFL
    }

    fn is_ignore(&self) -> bool {
        self.0.sa_sigaction == libc::SIG_IGN
    }
}

/// Whether this process ignores a signal.
///
/// # Errors
/// There is no such signal.
pub(super) fn is_ignored(signal: i32) -> io::Result<bool> {
    Ok(Action::exchange(signal, None)?.is_ignore())
}

/// A signal whose handler is set aside, so that its default action takes place. Dropping this puts the handler back.
pub(super) struct DefaultAction {
    signal: i32,
    handler: Action,
}

impl DefaultAction {
    /// `None` if there is no handler: a signal that is ignored stays so.
    ///
    /// # Errors
    /// There is no such signal.
    pub(super) fn of(signal: i32) -> io::Result<Option<Self>> {
        if !Action::exchange(signal, None)?.is_handler() {
            return Ok(None);
        }
        let handler = Action::exchange(signal, Some(&Action::of_kernel()))?;
        Ok(Some(Self { signal, handler }))
    }
}

impl Drop for DefaultAction {
    fn drop(&mut self) {
        // It has worked once.
        let _ = Action::exchange(self.signal, Some(&self.handler));
    }
}

/// Takes over a descriptor that was left open through an exec.
///
/// # Errors
/// There is none with this number, or it is one that this program has opened itself.
pub(super) fn adopt(number: u32) -> io::Result<OwnedFd> {
    let number = i32::try_from(number).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: F_GETFD takes any number and touches no memory.
    let flags = unsafe { libc::fcntl(number, libc::F_GETFD) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    if flags & libc::FD_CLOEXEC != 0 {
        return Err(io::Error::other("it was not left open through the exec"));
    }
    // SAFETY: it is open, and whatever this program opens is close-on-exec from birth, so it was inherited and nobody here owns it.
    // A letter has each number once, and is read once.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Takes a variable out of the environment.
pub(super) fn take_variable(name: &str) -> Option<OsString> {
    let value = std::env::var_os(name)?;
    // SAFETY: `succession::take` is called before this process has a second thread, so nobody reads the environment meanwhile.
    unsafe { std::env::remove_var(name) };
    Some(value)
}

/// Bytes of the stack of [`Holder`]'s child, which makes a handful of system calls.
const STACK_BYTES: usize = 64 << 10;

/// How long [`Holder`]'s child waits for the word of the next program that its guest runs, in nanoseconds: far longer than an upgrade
/// takes. It is short all the same, because the child has copies of this program's connections, whose other ends wait for the end.
const WORD_MAX_NS: i64 = 200_000_000;

/// A child that shares this program's memory until the guest runs in the next one, and clears it away then. Without it the exec itself
/// would: it takes 75 ms per GiB that the guest has touched to unmap memory, and the guest is stopped meanwhile. Dropping it ends the
/// child.
#[derive(Debug)]
pub(super) struct Holder {
    pid: Pid,
    /// The child waits for its end, which comes with the exec, or with the end of this process.
    line: Option<OwnedFd>,
    /// Of the child, which runs on it.
    _stack: Box<[MaybeUninit<u8>]>,
}

impl Holder {
    /// Makes the child.
    ///
    /// # Errors
    /// What the kernel says.
    pub(super) fn start() -> io::Result<Self> {
        let (theirs, ours) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        // Not even touched here.
        let mut stack = Box::new_uninit_slice(STACK_BYTES);
        let ends = pack(theirs.as_raw_fd(), ours.as_raw_fd());
        // SAFETY: a set of signals is plain data, written before it is read.
        let (mut all, mut before): (libc::sigset_t, libc::sigset_t) = unsafe { std::mem::zeroed() };
        // SAFETY: the set is ours.
        unsafe { libc::sigfillset(&raw mut all) };
        // SAFETY: both sets are ours. The child must run no handler of this program, so it is born with every signal blocked.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before) };
        let top = stack.as_mut_ptr_range().end.map_addr(|end| end & !15);
        let flags = libc::CLONE_VM | libc::SIGCHLD;
        // SAFETY: `hold` runs on a stack of its own, which lives until the child has ended (`drop` waits for it) or, after an exec, as
        // long as this memory. It gets two numbers, allocates nothing and leaves what belongs to threads alone.
        let pid = unsafe { libc::clone(hold, top.cast(), flags, ends) };
        let failed = io::Error::last_os_error();
        // SAFETY: the set is the one that was there before.
        unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut())
        };
        let pid = Pid::from_raw(pid).filter(|_| pid > 0).ok_or(failed)?;
        Ok(Self {
            pid,
            line: Some(ours),
            _stack: stack,
        })
    }

    /// The child's number, for the program that has to wait for it.
    pub(super) fn pid(&self) -> Pid {
        self.pid
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        self.line = None;
        // The number is free only after the wait. Both fail only if there is no such child, and then there is nothing to end.
        let _ = kill_process(self.pid, Signal::KILL);
        let _ = waitpid(Some(self.pid), WaitOptions::empty());
    }
}

/// Both ends of the line, in the one word that a child is given.
fn pack(theirs: RawFd, ours: RawFd) -> *mut libc::c_void {
    let word = u64::from(theirs.cast_unsigned()) << 32 | u64::from(ours.cast_unsigned());
    std::ptr::without_provenance_mut(usize::try_from(word).unwrap_or(0))
}

/// The child. What it has to do is long, and is done when nobody else wants the processor: the guest is about to run again.
extern "C" fn hold(ends: *mut libc::c_void) -> libc::c_int {
    let ends = ends.addr();
    let (theirs, ours) = (ends >> 32, ends & 0xffff_ffff);
    let mut byte = 0_u8;
    // SAFETY: takes a number. It is this child's own copy: the table of descriptors is not shared.
    unsafe { libc::syscall(libc::SYS_close, ours) };
    // SAFETY: writes one byte on this stack. All signals are blocked, so it ends when the last copy of the other end is closed.
    unsafe { libc::syscall(libc::SYS_read, theirs, &raw mut byte, 1_usize) };
    await_word();
    // SAFETY: takes numbers.
    unsafe { libc::syscall(libc::SYS_setpriority, libc::PRIO_PROCESS, 0, 19) };
    // SAFETY: takes numbers.
    unsafe { libc::syscall(libc::SYS_close_range, 0_u32, u32::MAX, 0_u32) };
    // SAFETY: takes a number, and ends this child only.
    unsafe { libc::syscall(libc::SYS_exit_group, 0) };
    0
}

/// The word that the guest runs. It is a signal, because all of them are blocked here since birth: one that comes early waits.
pub(super) const GUEST_RUNS: Signal = Signal::USR1;

/// In the child: waits for [`GUEST_RUNS`]. What it has to do would keep the next program from a processor, for a millisecond each time.
fn await_word() {
    let word: u64 = 1 << (GUEST_RUNS.as_raw() - 1);
    let most = libc::timespec {
        tv_sec: 0,
        tv_nsec: WORD_MAX_NS,
    };
    // SAFETY: reads a set of eight bytes and a time on this stack, and writes nothing.
    unsafe {
        libc::syscall(
            libc::SYS_rt_sigtimedwait,
            &raw const word,
            std::ptr::null_mut::<libc::siginfo_t>(),
            &raw const most,
            size_of::<u64>(),
        )
    };
}

fn pointers(strings: &[CString]) -> Vec<*const libc::c_char> {
    let pointers = strings.iter().map(|string| string.as_ptr());
    pointers.chain([std::ptr::null()]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_has_left_is_not_taken() {
        let own = std::fs::File::open("/dev/null").unwrap();
        let error = adopt(own.as_raw_fd().cast_unsigned()).unwrap_err();
        assert!(error.to_string().contains("not left open"), "{error}");
        assert!(adopt(900_000).is_err());
        assert!(adopt(u32::MAX).is_err());
    }

    #[test]
    fn who_holds_the_memory_ends_when_it_is_told_to_and_when_the_line_does() {
        let holder = Holder::start().unwrap();
        let pid = holder.pid();
        assert!(rustix::process::test_kill_process(pid).is_ok());
        drop(holder);
        assert!(
            waitpid(Some(pid), WaitOptions::empty()).is_err(),
            "it was waited for"
        );
        let mut holder = Holder::start().unwrap();
        // As an exec does, and the program after it.
        holder.line = None;
        kill_process(holder.pid(), GUEST_RUNS).unwrap();
        let (_, status) = waitpid(Some(holder.pid()), WaitOptions::empty())
            .unwrap()
            .unwrap();
        assert_eq!(status.exit_status(), Some(0));
    }

    #[test]
    fn an_exec_that_fails_says_why_and_changes_nothing() {
        let none = execute(c"/nowhere", &[c"x".to_owned()], &[]);
        assert_eq!(none.kind(), io::ErrorKind::NotFound);
        let text = std::fs::File::open("/proc/self/status").unwrap();
        let none = execute_open(std::os::fd::AsFd::as_fd(&text), &[c"x".to_owned()], &[]);
        assert_eq!(none.kind(), io::ErrorKind::PermissionDenied);
    }
}
