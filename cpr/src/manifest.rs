//! The list of file descriptors that change process: what each is called, what it is for, what kind it is, and when it may leave.
//!
//! A manifest goes to the other process before any descriptor does, so that it can refuse what it does not know while the guest still
//! runs. Each entry has a *name* (the RAM block, the device) and a *role* (which of the device's descriptors), and both together are
//! unique. Descriptors follow in the order of the entries, so an entry is also known by its position.
//!
//! # Encoding
//!
//! Little-endian; a text is 2 bytes of length and UTF-8.
//!
//! | field | bytes |
//! |---|---|
//! | number of entries | 4 |
//! | per entry: stage | 1 (0 prepare, 1 hand over) |
//! | kind | 1, see [`FdKind`] |
//! | value | 8, meaning depends on the kind, else 0 |
//! | device and inode number of the file | 8 + 8, 0 and 0 if unknown |
//! | name, role | texts of 1 to 128 and 1 to 64 bytes |
//!
//! Rules for a later version: kinds are added, never renumbered; a kind that the receiver does not know is refused before the guest is
//! stopped. Entries of stage 0 come before those of stage 1.

use std::collections::BTreeMap;

use vmferry_transport::wire::WireError;
use vmferry_transport::wire::header::{Reader, put_text};

/// Most descriptors of one hand-over. QEMU users have been seen with 7,530; the kernel's usual limit per process is 2^20.
pub const FDS_MAX: usize = 16 << 10;
/// Longest name, in bytes.
pub const NAME_BYTES_MAX: usize = 128;
/// Longest role, in bytes.
pub const ROLE_BYTES_MAX: usize = 64;

/// Fields of an entry without the texts' bytes.
const ENTRY_BYTES_MIN: usize = 1 + 1 + 8 + 8 + 8 + 2 + 2;

/// What a descriptor is. The receiver checks that it is so, as far as the kernel tells.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[repr(u8)]
#[non_exhaustive]
pub enum FdKind {
    /// Guest RAM in a sealed memfd. Value: its size in bytes.
    RamMemfd = 1,
    /// Guest RAM in a file that other processes may see, such as one on a hugetlbfs or tmpfs. Value: bytes that the guest uses.
    RamFile = 2,
    /// A kernel vhost device: /dev/vhost-net, /dev/vhost-vsock, a vDPA device. It has one owner, so it leaves in the second stage.
    Vhost = 3,
    /// A tap interface.
    Tap = 4,
    /// A connected socket to a vhost-user back end.
    VhostUser = 5,
    /// A VFIO group. Value: its number.
    VfioGroup = 6,
    /// A VFIO container. Value: the number of the first group in it.
    VfioContainer = 7,
    /// A VFIO device.
    VfioDevice = 8,
    /// An iommufd.
    Iommufd = 9,
    /// An eventfd that devices signal to each other.
    EventFd = 10,
    /// An eventfd that raises an interrupt. Value: the vector.
    IrqFd = 11,
    /// An eventfd that a write of the guest signals. Value: what the VMM makes of it.
    IoEventFd = 12,
    /// A listening socket.
    Listener = 13,
    /// A file that is written on, such as a log or the output of a serial port.
    Log = 14,
    /// The listening socket of QMP.
    Qmp = 15,
    /// Anything else; only the receiver of this name and role knows what to expect.
    Other = 16,
}

impl FdKind {
    /// Every kind there is.
    pub const ALL: [Self; 16] = [
        Self::RamMemfd,
        Self::RamFile,
        Self::Vhost,
        Self::Tap,
        Self::VhostUser,
        Self::VfioGroup,
        Self::VfioContainer,
        Self::VfioDevice,
        Self::Iommufd,
        Self::EventFd,
        Self::IrqFd,
        Self::IoEventFd,
        Self::Listener,
        Self::Log,
        Self::Qmp,
        Self::Other,
    ];

    fn of_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u8 == number)
    }

    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Self::RamMemfd => "RAM memfd",
            Self::RamFile => "RAM file",
            Self::Vhost => "vhost device",
            Self::Tap => "tap interface",
            Self::VhostUser => "vhost-user socket",
            Self::VfioGroup => "VFIO group",
            Self::VfioContainer => "VFIO container",
            Self::VfioDevice => "VFIO device",
            Self::Iommufd => "iommufd",
            Self::EventFd => "eventfd",
            Self::IrqFd => "irqfd",
            Self::IoEventFd => "ioeventfd",
            Self::Listener => "listening socket",
            Self::Log => "log file",
            Self::Qmp => "QMP socket",
            Self::Other => "descriptor",
        }
    }

    /// Whether two processes must never use it at the same time, so that it must not leave while the guest runs.
    pub fn has_one_owner(self) -> bool {
        matches!(
            self,
            Self::Vhost | Self::VhostUser | Self::VfioContainer | Self::Iommufd
        )
    }
}

/// When a descriptor leaves.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Stage {
    /// While the guest runs: RAM, and what nobody owns alone.
    Prepare = 0,
    /// After the guest was stopped and everybody has let go of what they own.
    HandOver = 1,
}

/// Which file a descriptor is of, so that two that were swapped on the way are told apart.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct FileId {
    /// Device number of the file system.
    pub dev: u64,
    /// Inode number. With a device number of 0 as well: not known.
    pub ino: u64,
}

/// One descriptor.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct FdEntry {
    /// Whose it is: the RAM block, the device.
    pub name: String,
    /// Which one of theirs.
    pub role: String,
    /// What it is.
    pub kind: FdKind,
    /// When it leaves.
    pub stage: Stage,
    /// Meaning depends on the kind.
    pub value: u64,
    /// Which file.
    pub file: FileId,
}

/// Why something is no manifest.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ManifestError {
    /// Two entries of the same name and role.
    #[error("descriptor {name:?} {role:?} is in the manifest twice")]
    Doubled {
        /// Name.
        name: String,
        /// Role.
        role: String,
    },
    /// A name or a role that is empty or too long.
    #[error(
        "name {name:?} and role {role:?} must have 1 to {NAME_BYTES_MAX} and {ROLE_BYTES_MAX} bytes"
    )]
    Name {
        /// Name.
        name: String,
        /// Role.
        role: String,
    },
    /// Something with one owner is to leave while the guest runs.
    #[error("descriptor {name:?} {role:?}: a {} has one owner and must not leave while the guest runs", .kind.name())]
    TooEarly {
        /// Name.
        name: String,
        /// Role.
        role: String,
        /// Kind.
        kind: FdKind,
    },
    /// More than [`FDS_MAX`] entries.
    #[error("{0} descriptors, at most {FDS_MAX} can be handed over")]
    TooMany(usize),
    /// Entries of the first stage behind those of the second.
    #[error("the manifest is not in the order of the stages")]
    Order,
    /// A kind that this build does not know.
    #[error("descriptor {name:?} {role:?} is of kind {number}, which this build does not know")]
    UnknownKind {
        /// Name.
        name: String,
        /// Role.
        role: String,
        /// Kind.
        number: u8,
    },
    /// The bytes are no manifest.
    #[error(transparent)]
    Wire(#[from] WireError),
}

/// A list of descriptors that obeys the rules of the [module](self).
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Manifest {
    entries: Vec<FdEntry>,
    prepare: usize,
}

impl Manifest {
    /// Makes a manifest of entries, sorted by stage; within a stage they keep their order.
    ///
    /// # Errors
    /// [`ManifestError`], naming the entry.
    pub fn new(mut entries: Vec<FdEntry>) -> Result<Self, ManifestError> {
        entries.sort_by_key(|entry| entry.stage);
        Self::sorted(entries)
    }

    fn sorted(entries: Vec<FdEntry>) -> Result<Self, ManifestError> {
        if entries.len() > FDS_MAX {
            return Err(ManifestError::TooMany(entries.len()));
        }
        if !entries.is_sorted_by_key(|entry| entry.stage) {
            return Err(ManifestError::Order);
        }
        let mut seen = BTreeMap::new();
        for entry in &entries {
            let (name, role) = (entry.name.clone(), entry.role.clone());
            if !(1..=NAME_BYTES_MAX).contains(&name.len())
                || !(1..=ROLE_BYTES_MAX).contains(&role.len())
            {
                return Err(ManifestError::Name { name, role });
            }
            if entry.kind.has_one_owner() && entry.stage == Stage::Prepare {
                let kind = entry.kind;
                return Err(ManifestError::TooEarly { name, role, kind });
            }
            if seen.insert((&entry.name, &entry.role), ()).is_some() {
                return Err(ManifestError::Doubled { name, role });
            }
        }
        let prepare = entries.partition_point(|entry| entry.stage == Stage::Prepare);
        Ok(Self { entries, prepare })
    }

    /// All entries, in the order in which the descriptors leave.
    pub fn entries(&self) -> &[FdEntry] {
        &self.entries
    }

    /// Positions of the entries of a stage.
    pub fn range(&self, stage: Stage) -> std::ops::Range<usize> {
        match stage {
            Stage::Prepare => 0..self.prepare,
            Stage::HandOver => self.prepare..self.entries.len(),
        }
    }

    /// Entries of a kind.
    pub fn of_kind(&self, kind: FdKind) -> impl Iterator<Item = &FdEntry> {
        self.entries.iter().filter(move |entry| entry.kind == kind)
    }

    /// Appends the encoding.
    pub fn encode(&self, body: &mut Vec<u8>) {
        let count =
            u32::try_from(self.entries.len()).expect("a manifest has at most FDS_MAX entries");
        body.extend_from_slice(&count.to_le_bytes());
        for entry in &self.entries {
            body.extend_from_slice(&[entry.stage as u8, entry.kind as u8]);
            body.extend_from_slice(&entry.value.to_le_bytes());
            body.extend_from_slice(&entry.file.dev.to_le_bytes());
            body.extend_from_slice(&entry.file.ino.to_le_bytes());
            put_text(body, &entry.name, NAME_BYTES_MAX);
            put_text(body, &entry.role, ROLE_BYTES_MAX);
        }
    }

    /// Reads a manifest.
    ///
    /// # Errors
    /// [`ManifestError`], naming the entry if there is one.
    pub fn decode(reader: &mut Reader<'_>, bytes_left: usize) -> Result<Self, ManifestError> {
        let count = reader.u32()? as usize;
        if count > FDS_MAX {
            return Err(ManifestError::TooMany(count));
        }
        // A count that the bytes cannot hold reserves nothing.
        let mut entries = Vec::with_capacity(count.min(bytes_left / ENTRY_BYTES_MIN));
        for _ in 0..count {
            let stage = if reader.bool("stage")? {
                Stage::HandOver
            } else {
                Stage::Prepare
            };
            let number = reader.u8()?;
            let value = reader.u64()?;
            let file = FileId {
                dev: reader.u64()?,
                ino: reader.u64()?,
            };
            let name = reader.text("name", NAME_BYTES_MAX)?;
            let role = reader.text("role", ROLE_BYTES_MAX)?;
            let Some(kind) = FdKind::of_number(number) else {
                return Err(ManifestError::UnknownKind { name, role, number });
            };
            entries.push(FdEntry {
                name,
                role,
                kind,
                stage,
                value,
                file,
            });
        }
        Self::sorted(entries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str, role: &str, kind: FdKind, stage: Stage) -> FdEntry {
        FdEntry {
            name: name.to_owned(),
            role: role.to_owned(),
            kind,
            stage,
            value: 7,
            file: FileId { dev: 1, ino: 2 },
        }
    }

    fn decode(bytes: &[u8]) -> Result<Manifest, ManifestError> {
        let mut reader = Reader::new(bytes);
        let manifest = Manifest::decode(&mut reader, bytes.len())?;
        reader.finish()?;
        Ok(manifest)
    }

    #[test]
    fn a_manifest_survives_its_encoding_and_puts_ram_first() {
        let manifest = Manifest::new(vec![
            entry("net0", "vhost", FdKind::Vhost, Stage::HandOver),
            entry("ram0", "ram", FdKind::RamMemfd, Stage::Prepare),
            entry("net0", "tap", FdKind::Tap, Stage::HandOver),
        ])
        .unwrap();
        let roles: Vec<_> = manifest.entries().iter().map(|entry| &entry.role).collect();
        assert_eq!(roles, ["ram", "vhost", "tap"]);
        assert_eq!(manifest.range(Stage::Prepare), 0..1);
        assert_eq!(manifest.range(Stage::HandOver), 1..3);
        let mut bytes = Vec::new();
        manifest.encode(&mut bytes);
        assert_eq!(decode(&bytes).unwrap(), manifest);
    }

    #[test]
    fn every_kind_has_a_number_and_a_name_of_its_own() {
        for kind in FdKind::ALL {
            assert_eq!(FdKind::of_number(kind as u8), Some(kind));
            let same = FdKind::ALL
                .into_iter()
                .filter(|other| other.name() == kind.name());
            assert_eq!(same.count(), 1, "{kind:?}");
        }
        assert_eq!(FdKind::of_number(0), None);
        assert_eq!(FdKind::of_number(17), None);
    }

    #[test]
    fn what_has_one_owner_cannot_leave_while_the_guest_runs() {
        for kind in FdKind::ALL {
            let made = Manifest::new(vec![entry("a", "b", kind, Stage::Prepare)]);
            assert_eq!(
                matches!(made, Err(ManifestError::TooEarly { .. })),
                kind.has_one_owner(),
                "{kind:?}"
            );
            Manifest::new(vec![entry("a", "b", kind, Stage::HandOver)]).unwrap();
        }
    }

    #[test]
    fn names_are_bounded_and_unique() {
        let long = "x".repeat(NAME_BYTES_MAX + 1);
        for (name, role) in [
            ("", "r"),
            ("n", ""),
            (long.as_str(), "r"),
            ("n", long.as_str()),
        ] {
            let made = Manifest::new(vec![entry(name, role, FdKind::Log, Stage::Prepare)]);
            assert!(
                matches!(made, Err(ManifestError::Name { .. })),
                "{name} {role}"
            );
        }
        let twice = vec![
            entry("n", "r", FdKind::Log, Stage::Prepare),
            entry("n", "r", FdKind::Tap, Stage::HandOver),
        ];
        assert!(matches!(
            Manifest::new(twice),
            Err(ManifestError::Doubled { .. })
        ));
        let many = (0..=FDS_MAX)
            .map(|number| entry(&number.to_string(), "r", FdKind::EventFd, Stage::Prepare))
            .collect();
        assert!(matches!(
            Manifest::new(many),
            Err(ManifestError::TooMany(_))
        ));
    }

    #[test]
    fn an_encoding_that_breaks_a_rule_is_refused_with_the_rule() {
        let entries = [
            entry("a", "x", FdKind::Log, Stage::HandOver),
            entry("b", "x", FdKind::Log, Stage::Prepare),
        ];
        let disordered = Manifest {
            entries: entries.to_vec(),
            prepare: 0,
        };
        let mut bytes = Vec::new();
        disordered.encode(&mut bytes);
        assert_eq!(decode(&bytes), Err(ManifestError::Order));
        bytes[5] = 99;
        assert!(matches!(
            decode(&bytes),
            Err(ManifestError::UnknownKind { number: 99, .. })
        ));
        bytes[4] = 2;
        assert!(matches!(
            decode(&bytes),
            Err(ManifestError::Wire(WireError::Value { .. }))
        ));
        assert_eq!(
            decode(&u32::MAX.to_le_bytes()),
            Err(ManifestError::TooMany(u32::MAX as usize))
        );
        assert_eq!(
            decode(&[1, 0]),
            Err(ManifestError::Wire(WireError::Truncated))
        );
    }
}
