//! Whether a descriptor is what the manifest says of it, as far as the kernel tells.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat};
use rustix::net::AddressFamily;
use rustix::net::sockopt::{socket_acceptconn, socket_domain};

use crate::manifest::{FdEntry, FdKind, FileId};

/// Which file a descriptor is of.
///
/// # Errors
/// What the kernel says.
pub(crate) fn file_id(fd: BorrowedFd<'_>) -> rustix::io::Result<FileId> {
    let stat = fstat(fd)?;
    Ok(FileId {
        dev: stat.st_dev,
        ino: stat.st_ino,
    })
}

/// Checks a descriptor that has arrived.
///
/// # Errors
/// What is wrong with it, for people.
pub(crate) fn check(entry: &FdEntry, fd: impl AsFd) -> Result<(), String> {
    let fd = fd.as_fd();
    let stat =
        fstat(fd).map_err(|error| format!("the kernel does not tell what it is: {error}"))?;
    let file = FileId {
        dev: stat.st_dev,
        ino: stat.st_ino,
    };
    if entry.file != FileId::default() && entry.file != file {
        return Err(format!(
            "it is file {}:{}, announced was {}:{}",
            file.dev, file.ino, entry.file.dev, entry.file.ino
        ));
    }
    let kind = FileType::from_raw_mode(stat.st_mode);
    let fits = match entry.kind {
        FdKind::RamMemfd | FdKind::RamFile => {
            let size = u64::try_from(stat.st_size).unwrap_or(0);
            if kind == FileType::RegularFile && size < entry.value {
                let value = entry.value;
                return Err(format!("it has {size} bytes, announced were {value}"));
            }
            kind == FileType::RegularFile && writable(fd)
        }
        FdKind::Vhost
        | FdKind::Tap
        | FdKind::VfioGroup
        | FdKind::VfioContainer
        | FdKind::Iommufd => kind == FileType::CharacterDevice,
        // From a group it is an anonymous file, from /dev/vfio/devices a character device.
        FdKind::VfioDevice => kind == FileType::CharacterDevice || anonymous(fd, "vfio-device"),
        FdKind::VhostUser => kind == FileType::Socket && !listens(fd) && unix(fd),
        FdKind::Listener => listens(fd),
        FdKind::Qmp => listens(fd) && unix(fd),
        FdKind::EventFd | FdKind::IrqFd | FdKind::IoEventFd => anonymous(fd, "eventfd"),
        FdKind::Log => writable(fd) && kind != FileType::Directory,
        FdKind::Other => true,
    };
    if fits {
        Ok(())
    } else {
        Err(format!("it is no {}", entry.kind.name()))
    }
}

fn writable(fd: BorrowedFd<'_>) -> bool {
    fcntl_getfl(fd).is_ok_and(|flags| {
        !flags.contains(OFlags::PATH) && (flags & OFlags::ACCMODE) != OFlags::RDONLY
    })
}

fn listens(fd: BorrowedFd<'_>) -> bool {
    socket_acceptconn(fd).unwrap_or(false)
}

fn unix(fd: BorrowedFd<'_>) -> bool {
    socket_domain(fd).is_ok_and(|domain| domain == AddressFamily::UNIX)
}

/// Where /proc is not mounted, nothing can be said, and the receiver of the descriptor will notice.
fn anonymous(fd: BorrowedFd<'_>, name: &str) -> bool {
    match std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())) {
        Ok(link) => link.to_string_lossy().contains(name),
        Err(_) => true,
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;
    use crate::manifest::Stage;

    fn entry(kind: FdKind, value: u64) -> FdEntry {
        FdEntry {
            name: "n".to_owned(),
            role: "r".to_owned(),
            kind,
            stage: Stage::HandOver,
            value,
            file: FileId::default(),
        }
    }

    /// One descriptor of each sort that this host surely has, and the kinds that it passes for.
    fn samples() -> Vec<(OwnedFd, Vec<FdKind>)> {
        use FdKind as K;
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("s")).unwrap();
        let (connected, _) = UnixStream::pair().unwrap();
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let eventfd = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
        let device = std::fs::OpenOptions::new()
            .write(true)
            .open("/dev/null")
            .unwrap();
        let ram = crate::memfd::create_ram("check", 4096).unwrap();
        let readable = std::fs::File::open("/dev/null").unwrap();
        let devices = vec![
            K::Vhost,
            K::Tap,
            K::VfioGroup,
            K::VfioContainer,
            K::VfioDevice,
            K::Iommufd,
        ];
        vec![
            (listener.into(), vec![K::Listener, K::Qmp, K::Log]),
            (tcp.into(), vec![K::Listener, K::Log]),
            (connected.into(), vec![K::VhostUser, K::Log]),
            (eventfd, vec![K::EventFd, K::IrqFd, K::IoEventFd, K::Log]),
            (device.into(), [devices.clone(), vec![K::Log]].concat()),
            (readable.into(), devices),
            (ram.into(), vec![K::RamMemfd, K::RamFile, K::Log]),
        ]
    }

    #[test]
    fn a_descriptor_passes_for_what_it_is_and_for_nothing_else() {
        for (at, (fd, kinds)) in samples().iter().enumerate() {
            for kind in FdKind::ALL
                .into_iter()
                .filter(|kind| *kind != FdKind::Other)
            {
                let passed = check(&entry(kind, 4096), fd).is_ok();
                assert_eq!(passed, kinds.contains(&kind), "sample {at} as {kind:?}");
            }
            check(&entry(FdKind::Other, 0), fd).unwrap();
        }
    }

    #[test]
    fn two_files_that_were_swapped_are_noticed() {
        let [one, other] = [0, 1].map(|_| crate::memfd::create_ram("ram", 4096).unwrap());
        let mut entry = entry(FdKind::RamMemfd, 4096);
        entry.file = file_id(one.as_fd()).unwrap();
        check(&entry, &one).unwrap();
        let error = check(&entry, &other).unwrap_err();
        assert!(error.contains("announced was"), "{error}");
    }

    #[test]
    fn ram_that_is_too_small_is_refused_with_both_sizes() {
        let ram = crate::memfd::create_ram("ram", 4096).unwrap();
        let error = check(&entry(FdKind::RamMemfd, 8192), &ram).unwrap_err();
        assert!(error.contains("4096") && error.contains("8192"), "{error}");
    }
}
