//! What the kernel says of a process: descriptors, threads, memory.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

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
                *threads.entry(name.trim().to_owned()).or_default() += 1;
            }
        }
        Self {
            fds,
            threads,
            anon_bytes: status_kib(pid, "RssAnon:") << 10,
            populated_bytes: memfds.values().sum(),
        }
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
