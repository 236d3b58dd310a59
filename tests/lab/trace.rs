//! What the kernel saw: requests to vhost devices, in their order, by the process that made them.

use std::fmt;
use std::fs;
use std::path::PathBuf;

use crate::command::{attempt, run};

const FOLDER: &str = "/sys/kernel/tracing";
const EVENT: &str = "events/syscalls/sys_enter_ioctl";

/// A request to a vhost device.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Request {
    SetOwner,
    ResetOwner,
    /// Of a network device: for each ring, the tap that it works on, or that it works no more.
    SetBackend,
}

impl Request {
    const ALL: [Self; 3] = [Self::SetOwner, Self::ResetOwner, Self::SetBackend];

    fn number(self) -> u32 {
        match self {
            Self::SetOwner => 0xaf01,
            Self::ResetOwner => 0xaf02,
            Self::SetBackend => 0x4008_af30,
        }
    }
}

/// One request, as it was traced.
#[derive(Clone, Debug)]
pub(crate) struct Traced {
    pub(crate) process: u32,
    pub(crate) request: Request,
    line: String,
}

impl fmt::Display for Traced {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            process,
            request,
            line,
        } = self;
        write!(f, "{request:?} by process {process}: {line}")
    }
}

/// The kernel's trace of requests to vhost devices. Ends on drop.
pub(crate) struct Trace;

fn file(name: &str) -> PathBuf {
    [FOLDER, name].iter().collect()
}

fn write(name: &str, text: &str) {
    if let Err(error) = fs::write(file(name), text) {
        panic!("{name}: {error}");
    }
}

impl Trace {
    pub(crate) fn start() -> Self {
        if !file("events").exists() {
            run("mount", &["-t", "tracefs", "tracefs", FOLDER]);
        }
        let any = Request::ALL.map(|request| format!("cmd == {:#x}", request.number()));
        write(&format!("{EVENT}/filter"), &any.join(" || "));
        // The process, beside the thread.
        write("options/record-tgid", "1");
        write("trace", "");
        write(&format!("{EVENT}/enable"), "1");
        Self
    }

    /// What was asked so far.
    pub(crate) fn so_far(&self) -> Vec<Traced> {
        let text = fs::read_to_string(file("trace")).unwrap();
        text.lines().filter_map(traced).collect()
    }

    /// What was asked so far, and not before the last time that this was called.
    pub(crate) fn take(&self) -> Vec<Traced> {
        let seen = self.so_far();
        write("trace", "");
        seen
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        let _ = fs::write(file(EVENT).join("enable"), "0");
        let _ = attempt("umount", &[FOLDER]);
    }
}

/// A line such as `vm-jobs-1234 [001] ..... 56.789: sys_ioctl(fd: 8, cmd: af02, arg: 0)`. The thread's number is made the process's.
fn traced(line: &str) -> Option<Traced> {
    let line = line.trim();
    let (who, asked) = line.split_once(": sys_ioctl(")?;
    let cmd = asked.split_once("cmd: ")?.1;
    let digits = cmd
        .split([',', ')'])
        .next()?
        .trim()
        .trim_start_matches("0x");
    let number = u32::from_str_radix(digits, 16).ok()?;
    let request = Request::ALL
        .into_iter()
        .find(|request| request.number() == number)?;
    // The name may hold blanks and dashes, so from behind: the time, flags, the processor, and before it the thread.
    let thread = who.split(" [").next()?.trim_end();
    let thread = match thread.rsplit_once('(') {
        // With the process behind it in parentheses.
        Some((_, process)) => process.trim_end_matches(')').trim(),
        None => thread.rsplit_once('-')?.1,
    };
    Some(Traced {
        process: thread.parse().ok()?,
        request,
        line: line.to_owned(),
    })
}
