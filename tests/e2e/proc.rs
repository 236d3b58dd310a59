//! What the kernel says of a process: descriptors, threads, memory.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::harness::{PATIENCE, until};

/// A process in which nothing has come or gone for so long has nothing left to do,
const SETTLED_AFTER: Duration = Duration::from_millis(200);
/// if so many looks have shown it: a host that stands still for so long shows nothing.
const SETTLED_LOOKS: u32 = 50;
/// Begins the names of threads that end with a migration.
const OF_A_MIGRATION: [&str; 12] = [
    "send-", "receive-", "vm-join", "vm-reap", "vm-cpr", "connect", "resolve", "load", "mux-",
    "close", "open", "undo",
];

/// What a process holds. Sizes in bytes.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Holdings {
    /// Open descriptors by kind: `socket`, `anon_inode:[io_uring]`, `file` and so on.
    pub(crate) fds: BTreeMap<String, usize>,
    /// Threads by name.
    pub(crate) threads: BTreeMap<String, usize>,
    /// Private memory that is resident: the heap, stacks. Guest memory is shared and not counted.
    pub(crate) anon_bytes: u64,
    /// Guest memory that exists.
    pub(crate) populated_bytes: u64,
}

impl Holdings {
    /// Of a process that lives.
    pub(crate) fn of(pid: u32) -> Self {
        let mut fds = BTreeMap::new();
        let mut memfds = BTreeMap::new();
        for fd in entries(pid, "fd") {
            // Gone again since the directory was read.
            let Ok(link) = fs::read_link(&fd) else {
                continue;
            };
            let link = link.to_string_lossy().into_owned();
            if link.starts_with("/memfd:")
                && let Ok(meta) = fs::metadata(&fd)
            {
                memfds.insert(meta.ino(), meta.blocks() * 512);
            }
            *fds.entry(kind(&link).to_owned()).or_default() += 1;
        }
        let mut threads = BTreeMap::new();
        for thread in entries(pid, "task") {
            if let Ok(name) = fs::read_to_string(thread.join("comm")) {
                *threads
                    .entry(thread_kind(name.trim()).to_owned())
                    .or_default() += 1;
            }
        }
        Self {
            fds,
            threads,
            anon_bytes: status_kib(pid, "RssAnon:") << 10,
            populated_bytes: memfds.values().sum(),
        }
    }

    /// Of a process that lives, when the last threads and sockets of a migration or of a client are gone.
    pub(crate) fn settled(pid: u32) -> Self {
        let mut seen = Self::of(pid);
        let (mut since, mut looks) = (Instant::now(), 0);
        until("the process settles", || {
            let now = Self::of(pid);
            looks += 1;
            let mut threads = now.threads.keys();
            let busy = threads.any(|name| OF_A_MIGRATION.iter().any(|of| name.starts_with(of)));
            if busy || now.counted() != seen.counted() {
                (since, looks) = (Instant::now(), 0);
            }
            seen = now;
            (looks >= SETTLED_LOOKS && since.elapsed() > SETTLED_AFTER).then(|| seen.clone())
        })
    }

    /// Waits until a process holds the same, memory apart, and gives what it holds then.
    #[track_caller]
    pub(crate) fn await_at(&self, pid: u32) -> Self {
        self.await_like(pid, Self::counted)
    }

    /// Waits until a process holds the same as far as `part` of it goes: what has settled may only have been kept from going on.
    #[track_caller]
    pub(crate) fn await_like<T: Debug + PartialEq>(
        &self,
        pid: u32,
        part: impl Fn(&Self) -> T,
    ) -> Self {
        let began = Instant::now();
        loop {
            let now = Self::settled(pid);
            let (left, right) = (part(&now), part(self));
            if left == right {
                return now;
            }
            let waited = began.elapsed() >= PATIENCE;
            assert!(!waited, "now {left:?}\nbefore {right:?}");
        }
    }

    /// The same as the first time, which is remembered.
    #[track_caller]
    pub(crate) fn await_at_first(first: &mut Option<Self>, pid: u32) -> Self {
        match first {
            Some(first) => first.await_at(pid),
            None => first.insert(Self::settled(pid)).clone(),
        }
    }

    /// Whether there is no more of anything than in `other`, memory apart.
    pub(crate) fn is_within(&self, other: &Self) -> bool {
        let within = |ours: &BTreeMap<String, usize>, theirs: &BTreeMap<String, usize>| {
            let of_theirs = |kind| theirs.get(kind).copied().unwrap_or(0);
            ours.iter().all(|(kind, count)| *count <= of_theirs(kind))
        };
        within(&self.fds, &other.fds) && within(&self.threads, &other.threads)
    }

    /// Without memory, and without so many of its sockets, which the test knows of.
    pub(crate) fn without_sockets(&self, known: usize) -> Self {
        let mut counted = self.counted();
        if let Some(sockets) = counted.fds.get_mut("socket") {
            *sockets = sockets.saturating_sub(known);
        }
        counted
    }

    /// Without memory, for comparing with `==`.
    pub(crate) fn counted(&self) -> Self {
        Self {
            anon_bytes: 0,
            populated_bytes: 0,
            ..self.clone()
        }
    }
}

/// What a thread is, by its name: the kernel's own have the number of the process behind it.
fn thread_kind(name: &str) -> &str {
    match name.strip_prefix("vhost-") {
        Some(number) if number.bytes().all(|byte| byte.is_ascii_digit()) => "vhost",
        _ => name,
    }
}

/// Processor time that threads whose names begin so have had, in hundredths of a second (`USER_HZ`, see proc_pid_stat(5)).
pub(crate) fn processor_time(pid: u32, threads: &str) -> u64 {
    let stats = entries(pid, "task")
        .into_iter()
        .filter_map(|thread| fs::read_to_string(thread.join("stat")).ok());
    let of_thread = |stat: String| {
        // The name is in brackets, and may hold any of them.
        let (head, fields) = stat.rsplit_once(") ")?;
        let (_, name) = head.split_once('(')?;
        let fields: Vec<_> = fields.split(' ').collect();
        let time = |at: usize| fields[at].parse::<u64>().unwrap();
        name.starts_with(threads).then(|| time(11) + time(12))
    };
    stats.filter_map(of_thread).sum()
}

/// What a descriptor is, by what its link says.
fn kind(link: &str) -> &str {
    if link.starts_with("anon_inode:") || link.starts_with("/memfd:") {
        link
    } else if link.starts_with('/') {
        "file"
    } else {
        // Such as `socket:[NUMBER]`.
        link.split(':').next().unwrap_or_default()
    }
}

fn entries(pid: u32, folder: &str) -> Vec<PathBuf> {
    fs::read_dir(format!("/proc/{pid}/{folder}"))
        .unwrap()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect()
}

fn status_kib(pid: u32, field: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(field))
        .unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}
