//! What an exec asks of the kernel and of the C library, for which there is no safe face: becoming another program, taking descriptors
//! by their numbers, and removing a variable.

#![expect(
    unsafe_code,
    reason = "execve, descriptors by number and the environment belong to the whole process"
)]

use std::ffi::{CStr, CString, OsString};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

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
    fn an_exec_that_fails_says_why_and_changes_nothing() {
        let none = execute(c"/nowhere", &[c"x".to_owned()], &[]);
        assert_eq!(none.kind(), io::ErrorKind::NotFound);
        let text = std::fs::File::open("/proc/self/status").unwrap();
        let none = execute_open(std::os::fd::AsFd::as_fd(&text), &[c"x".to_owned()], &[]);
        assert_eq!(none.kind(), io::ErrorKind::PermissionDenied);
    }
}
