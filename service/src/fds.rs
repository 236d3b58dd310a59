//! File descriptors that operators have passed to this process: by name (`getfd`) and in sets (`add-fd`).
//!
//! A named descriptor is taken by the one command that uses it. Those of a set stay until they are removed; who opens
//! `/dev/fdset/N` gets a copy of one that is open for what is wanted.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use rustix::fs::{OFlags, fcntl_getfl};
use rustix::io::fcntl_dupfd_cloexec;
use serde::{Deserialize, Serialize};

/// Longest name of a descriptor, in bytes.
pub const NAME_BYTES_MAX: usize = 255;
/// Longest free text beside a descriptor of a set, in bytes.
pub const OPAQUE_BYTES_MAX: usize = 4096;
/// Most descriptors held, named and in sets together. A process has 1024 unless told otherwise, and needs most for itself.
pub const FDS_MAX: usize = 256;

/// A descriptor was refused or is not there. The operator is at fault, except for [`Copy`](Self::Copy).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FdError {
    /// A name that could be taken for a number, or is empty or too long.
    #[error(
        "a file descriptor's name must have 1 to {NAME_BYTES_MAX} bytes and not begin with a digit"
    )]
    Name,
    /// Too much text.
    #[error("the text beside a file descriptor may have at most {OPAQUE_BYTES_MAX} bytes")]
    Opaque,
    /// Too many.
    #[error("{FDS_MAX} file descriptors are held already; close some (closefd, remove-fd) first")]
    TooMany,
    /// No such name.
    #[error("there is no file descriptor named `{0}`; pass it with getfd")]
    NoName(String),
    /// No such set.
    #[error("there is no fdset {0}; make it with add-fd")]
    NoSet(i64),
    /// No such descriptor in the set.
    #[error("fdset {set} has no file descriptor {fd}")]
    NoFd {
        /// The set.
        set: u32,
        /// The descriptor.
        fd: i64,
    },
    /// The set's descriptors are open for something else.
    #[error("fdset {set} has no file descriptor that is open for {access}")]
    Access {
        /// The set.
        set: u32,
        /// What is wanted.
        access: Access,
    },
    /// The kernel makes no more.
    #[error("a file descriptor of fdset {set} cannot be copied")]
    Copy {
        /// The set.
        set: u32,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
}

/// What a file is opened for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Access {
    /// Reading only.
    Read,
    /// Writing only.
    Write,
    /// Both.
    ReadWrite,
}

impl Access {
    fn of(fd: &OwnedFd) -> Option<Self> {
        let mode = fcntl_getfl(fd).ok()? & OFlags::ACCMODE;
        match mode {
            mode if mode == OFlags::RDONLY => Some(Self::Read),
            mode if mode == OFlags::WRONLY => Some(Self::Write),
            mode if mode == OFlags::RDWR => Some(Self::ReadWrite),
            _ => None,
        }
    }
}

impl std::fmt::Display for Access {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Read => "reading",
            Self::Write => "writing",
            Self::ReadWrite => "reading and writing",
        })
    }
}

/// The answer to `add-fd`.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct AddedFd {
    /// The set.
    pub fdset_id: u32,
    /// The descriptor's number in this process.
    pub fd: RawFd,
}

/// One set of `query-fdsets`.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct FdSetInfo {
    /// The set.
    pub fdset_id: u32,
    /// What is in it, never empty.
    pub fds: Vec<FdSetMember>,
}

/// One descriptor of a set.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct FdSetMember {
    /// The number in this process.
    pub fd: RawFd,
    /// What the operator said of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub opaque: Option<String>,
}

/// The descriptors. All are close-on-exec, and closed with the store.
#[derive(Debug, Default)]
pub struct FdStore {
    named: BTreeMap<String, OwnedFd>,
    sets: BTreeMap<u32, Vec<Member>>,
}

#[derive(Debug)]
struct Member {
    fd: OwnedFd,
    opaque: Option<String>,
}

impl FdStore {
    /// Keeps `fd` as `name`. A descriptor that had the name before is closed.
    ///
    /// # Errors
    /// A bad name, or too many descriptors. `fd` is closed then.
    pub fn put(&mut self, name: &str, fd: OwnedFd) -> Result<(), FdError> {
        let digit = name.bytes().next().is_none_or(|byte| byte.is_ascii_digit());
        if digit || name.len() > NAME_BYTES_MAX {
            return Err(FdError::Name);
        }
        if !self.named.contains_key(name) {
            self.check_room()?;
        }
        self.named.insert(name.to_owned(), fd);
        Ok(())
    }

    /// Gives the descriptor with this name away; the name is free again.
    ///
    /// # Errors
    /// There is none.
    pub fn take(&mut self, name: &str) -> Result<OwnedFd, FdError> {
        self.named.remove(name).ok_or_else(|| {
            const SHOWN: usize = 60;
            FdError::NoName(name.chars().take(SHOWN).collect())
        })
    }

    /// Adds `fd` to a set, which comes into being if need be; without `set` to a new one.
    ///
    /// # Errors
    /// A set number below 0 or above 2^31 - 1, too much text, too many descriptors. `fd` is closed then.
    pub fn add(
        &mut self,
        set: Option<i64>,
        opaque: Option<String>,
        fd: OwnedFd,
    ) -> Result<AddedFd, FdError> {
        self.check_room()?;
        if opaque
            .as_ref()
            .is_some_and(|text| text.len() > OPAQUE_BYTES_MAX)
        {
            return Err(FdError::Opaque);
        }
        let fdset_id = match set {
            Some(set) => set_number(set)?,
            // There are fewer sets than numbers.
            None => (0..)
                .find(|number| !self.sets.contains_key(number))
                .ok_or(FdError::TooMany)?,
        };
        let number = fd.as_raw_fd();
        let member = Member { fd, opaque };
        self.sets.entry(fdset_id).or_default().push(member);
        Ok(AddedFd {
            fdset_id,
            fd: number,
        })
    }

    /// Closes one descriptor of a set, or all of them. Copies that were handed out stay open.
    ///
    /// # Errors
    /// There is no such set or no such descriptor in it.
    pub fn remove(&mut self, set: i64, fd: Option<i64>) -> Result<(), FdError> {
        let number = set_number(set)?;
        let members = self.sets.get_mut(&number).ok_or(FdError::NoSet(set))?;
        match fd {
            None => members.clear(),
            Some(fd) => {
                let at = members
                    .iter()
                    .position(|member| i64::from(member.fd.as_raw_fd()) == fd)
                    .ok_or(FdError::NoFd { set: number, fd })?;
                members.remove(at);
            }
        }
        if members.is_empty() {
            self.sets.remove(&number);
        }
        Ok(())
    }

    /// What the sets hold.
    pub fn sets(&self) -> Vec<FdSetInfo> {
        let describe = |member: &Member| FdSetMember {
            fd: member.fd.as_raw_fd(),
            opaque: member.opaque.clone(),
        };
        self.sets
            .iter()
            .map(|(number, members)| FdSetInfo {
                fdset_id: *number,
                fds: members.iter().map(describe).collect(),
            })
            .collect()
    }

    /// A copy of the first descriptor of a set that is open for exactly `access`, as opening `/dev/fdset/N` gives. The copy shares the
    /// file's position with the original.
    ///
    /// # Errors
    /// No such set, none that fits, or out of descriptors.
    pub fn open(&self, set: u32, access: Access) -> Result<OwnedFd, FdError> {
        let members = self
            .sets
            .get(&set)
            .ok_or_else(|| FdError::NoSet(set.into()))?;
        let member = members
            .iter()
            .find(|member| Access::of(&member.fd) == Some(access))
            .ok_or(FdError::Access { set, access })?;
        fcntl_dupfd_cloexec(&member.fd, 0).map_err(|error| FdError::Copy {
            set,
            source: error.into(),
        })
    }

    fn check_room(&self) -> Result<(), FdError> {
        let held = self.named.len() + self.sets.values().map(Vec::len).sum::<usize>();
        if held >= FDS_MAX {
            return Err(FdError::TooMany);
        }
        Ok(())
    }
}

fn set_number(set: i64) -> Result<u32, FdError> {
    match u32::try_from(set) {
        Ok(number) if i32::try_from(set).is_ok() => Ok(number),
        _ => Err(FdError::NoSet(set)),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{File, OpenOptions};
    use std::io::Write;

    use rustix::io::{FdFlags, fcntl_getfd};

    use super::*;

    fn null(access: Access) -> OwnedFd {
        OpenOptions::new()
            .read(access != Access::Write)
            .write(access != Access::Read)
            .open("/dev/null")
            .unwrap()
            .into()
    }

    #[test]
    fn a_named_descriptor_is_taken_once() {
        let mut store = FdStore::default();
        store.put("a", null(Access::Read)).unwrap();
        store.put("a", null(Access::Write)).unwrap();
        let fd = store.take("a").unwrap();
        assert_eq!(Access::of(&fd), Some(Access::Write), "the newer one");
        assert!(matches!(store.take("a"), Err(FdError::NoName(name)) if name == "a"));
        for name in ["", "7up", &"x".repeat(NAME_BYTES_MAX + 1)] {
            assert!(matches!(
                store.put(name, null(Access::Read)),
                Err(FdError::Name)
            ));
        }
    }

    #[test]
    fn a_set_gives_copies_of_what_fits() {
        let mut store = FdStore::default();
        let (mut near, far) = std::os::unix::net::UnixStream::pair().unwrap();
        let added = store.add(Some(5), Some("log".into()), far.into()).unwrap();
        assert_eq!(added.fdset_id, 5);
        store.add(Some(5), None, null(Access::Read)).unwrap();
        let copy = store.open(5, Access::ReadWrite).unwrap();
        assert_ne!(copy.as_raw_fd(), added.fd);
        assert!(fcntl_getfd(&copy).unwrap().contains(FdFlags::CLOEXEC));
        assert!(store.open(5, Access::Read).is_ok());
        assert!(matches!(
            store.open(5, Access::Write),
            Err(FdError::Access { set: 5, .. })
        ));
        assert!(matches!(
            store.open(6, Access::Write),
            Err(FdError::NoSet(6))
        ));
        store.remove(5, Some(added.fd.into())).unwrap();
        near.write_all(b"the copy is open").unwrap();
        drop(copy);
        assert!(near.write_all(b"!").is_err());
    }

    #[test]
    fn sets_are_numbered_listed_and_removed() {
        let mut store = FdStore::default();
        for expected in 0..3 {
            let added = store.add(None, None, null(Access::Read)).unwrap();
            assert_eq!(added.fdset_id, expected);
        }
        store.remove(1, None).unwrap();
        let again = store.add(None, None, null(Access::Read)).unwrap();
        assert_eq!(again.fdset_id, 1);
        store
            .add(Some(1), Some("b".into()), null(Access::Read))
            .unwrap();
        let sets = store.sets();
        assert_eq!(
            sets.iter().map(|set| set.fds.len()).collect::<Vec<_>>(),
            [1, 2, 1]
        );
        assert_eq!(sets[1].fds[1].opaque.as_deref(), Some("b"));
        let first = i64::from(sets[0].fds[0].fd);
        store.remove(0, Some(first)).unwrap();
        assert_eq!(store.sets().len(), 2, "an empty set is gone");
        assert!(matches!(store.remove(0, None), Err(FdError::NoSet(0))));
        assert!(matches!(
            store.remove(2, Some(-1)),
            Err(FdError::NoFd { set: 2, fd: -1 })
        ));
        for number in [-1, 1 << 31, i64::MAX] {
            let refused = store.add(Some(number), None, null(Access::Read));
            assert!(matches!(refused, Err(FdError::NoSet(_))));
        }
    }

    #[test]
    fn no_client_fills_the_process_with_descriptors() {
        let mut store = FdStore::default();
        for number in 0..FDS_MAX / 2 {
            store
                .put(&format!("n{number}"), null(Access::Read))
                .unwrap();
            store.add(None, None, null(Access::Read)).unwrap();
        }
        assert!(matches!(
            store.put("more", null(Access::Read)),
            Err(FdError::TooMany)
        ));
        assert!(matches!(
            store.add(Some(1), None, null(Access::Read)),
            Err(FdError::TooMany)
        ));
        assert!(store.put("n0", null(Access::Read)).is_ok(), "replaces one");
        let opaque = Some("x".repeat(OPAQUE_BYTES_MAX + 1));
        store.take("n1").unwrap();
        let file = File::open("/dev/null").unwrap();
        assert!(matches!(
            store.add(None, opaque, file.into()),
            Err(FdError::Opaque)
        ));
    }
}
