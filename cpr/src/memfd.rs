//! Guest RAM as a sealed memfd: made once, mapped by whoever runs the VM, and handed from process to process by descriptor.
//!
//! The seals are what lets the next process trust a descriptor: a file that can neither shrink nor grow cannot take pages away
//! under a mapping, so no later access ends in SIGBUS. Write seals are never set: RAM is for writing.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use memfd::{FileSeal, HugetlbSize, Memfd, MemfdOptions};
use rustix::fs::{FileType, OFlags, SealFlags};
use rustix::io::FdFlags;

use crate::CprError;

/// Longest name of a RAM block, in bytes. The kernel allows 249 for the whole memfd name; this leaves room for the prefix.
pub const RAM_NAME_BYTES_MAX: usize = 200;

/// Smallest unit of RAM in bytes: the page of the wire and the dirty logs.
const PAGE_BYTES: u64 = 4096;

/// Size of the huge pages behind guest RAM. They come from the host's hugetlb pool, which the operator sets up.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum HugePages {
    /// 2 MiB each.
    Size2M,
    /// 1 GiB each.
    Size1G,
}

impl HugePages {
    /// Size of one page in bytes.
    pub fn bytes(self) -> u64 {
        match self {
            Self::Size2M => 2 << 20,
            Self::Size1G => 1 << 30,
        }
    }
}

/// Makes `bytes` of RAM in pages of the usual size: a memfd named `vmferry-<name>`, close-on-exec, all holes, sealed against any
/// change of its size. `bytes` must be a positive multiple of 4096.
///
/// # Errors
/// [`CprError::Request`] for a name or size that makes no RAM, [`CprError::Host`] when the kernel refuses.
pub fn create_ram(name: &str, bytes: u64) -> Result<File, CprError> {
    create(name, bytes, None)
}

/// Like [`create_ram`], in huge pages. `bytes` must be a multiple of their size. Pages are taken from the pool when the file is
/// mapped, so a pool that is too small shows up there.
///
/// # Errors
/// As [`create_ram`].
pub fn create_ram_huge(name: &str, bytes: u64, pages: HugePages) -> Result<File, CprError> {
    create(name, bytes, Some(pages))
}

fn create(name: &str, bytes: u64, huge: Option<HugePages>) -> Result<File, CprError> {
    if name.is_empty() || name.len() > RAM_NAME_BYTES_MAX || name.contains('\0') {
        return Err(CprError::Request(format!(
            "RAM name {name:?} must have 1 to {RAM_NAME_BYTES_MAX} bytes and no NUL"
        )));
    }
    let unit = huge.map_or(PAGE_BYTES, HugePages::bytes);
    // The kernel's file offsets are signed.
    if bytes == 0 || !bytes.is_multiple_of(unit) || i64::try_from(bytes).is_err() {
        return Err(CprError::Request(format!(
            "RAM {name:?} of {bytes} bytes: the size must be a positive multiple of {unit}"
        )));
    }
    let ram = MemfdOptions::new()
        .close_on_exec(true)
        .allow_sealing(true)
        .hugetlb(huge.map(|pages| match pages {
            HugePages::Size2M => HugetlbSize::Huge2MB,
            HugePages::Size1G => HugetlbSize::Huge1GB,
        }))
        .create(format!("vmferry-{name}"))
        .map_err(|error| of_memfd(name, error))?;
    ram.as_file()
        .set_len(bytes)
        .map_err(|error| CprError::host(format!("sizing RAM {name:?} to {bytes} bytes"), error))?;
    ram.add_seals(&[FileSeal::SealShrink, FileSeal::SealGrow, FileSeal::SealSeal])
        .map_err(|error| of_memfd(name, error))?;
    Ok(ram.into_file())
}

/// Takes over RAM that another process made with [`create_ram`] and handed to this one, after checking that it is what it should
/// be: a memfd of `expected_bytes`, open for reading and writing, sealed against shrinking and growing, not sealed against
/// writing. The descriptor is close-on-exec afterwards, even if it was inherited through an exec.
///
/// On error the descriptor is closed.
///
/// # Errors
/// [`CprError::Descriptor`] when it is something else, [`CprError::Host`] when the kernel refuses to tell.
pub fn reattach(name: &str, fd: OwnedFd, expected_bytes: u64) -> Result<File, CprError> {
    let refuse = |reason: String| CprError::Descriptor {
        name: name.to_owned(),
        reason,
    };
    let ask = |what: &str, error: rustix::io::Errno| {
        CprError::host(format!("{what} of descriptor {name:?}"), error)
    };
    let mut flags =
        rustix::io::fcntl_getfd(&fd).map_err(|error| ask("reading the flags", error))?;
    flags |= FdFlags::CLOEXEC;
    rustix::io::fcntl_setfd(&fd, flags).map_err(|error| ask("setting close-on-exec", error))?;

    let kind = rustix::fs::fstat(&fd).map_err(|error| ask("reading the type", error))?;
    if FileType::from_raw_mode(kind.st_mode) != FileType::RegularFile {
        return Err(refuse("it is not a file".to_owned()));
    }
    let mode = rustix::fs::fcntl_getfl(&fd).map_err(|error| ask("reading the mode", error))?;
    if mode & OFlags::ACCMODE != OFlags::RDWR || mode.contains(OFlags::PATH) {
        return Err(refuse("it is not open for reading and writing".to_owned()));
    }
    // Only files that live in memory know seals; every other one is refused here.
    let Ok(seals) = rustix::fs::fcntl_get_seals(&fd) else {
        return Err(refuse("it is not a memfd".to_owned()));
    };
    if !seals.contains(SealFlags::SHRINK | SealFlags::GROW) {
        return Err(refuse(
            "its size is not sealed, so pages could vanish under the guest".to_owned(),
        ));
    }
    if seals.intersects(SealFlags::WRITE | SealFlags::FUTURE_WRITE) {
        return Err(refuse("it is sealed against writing".to_owned()));
    }
    // Asked after the seals were seen, so that the size that is checked is the size for good.
    let size = rustix::fs::fstat(&fd)
        .map_err(|error| ask("reading the size", error))?
        .st_size;
    if u64::try_from(size) != Ok(expected_bytes) {
        return Err(refuse(format!(
            "it has {size} bytes, expected {expected_bytes}"
        )));
    }
    match Memfd::try_from_fd(fd) {
        Ok(ram) => Ok(ram.into_file()),
        Err(_not_a_memfd) => Err(refuse("it is not a memfd".to_owned())),
    }
}

fn of_memfd(name: &str, error: memfd::Error) -> CprError {
    let (op, source): (_, io::Error) = match error {
        memfd::Error::Create(source) => ("creating", source),
        memfd::Error::AddSeals(source) => ("sealing", source),
        memfd::Error::GetSeals(source) => ("reading the seals of", source),
    };
    CprError::host(format!("{op} RAM {name:?}"), source)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileExt, MetadataExt};
    use std::os::unix::net::UnixStream;

    const BYTES: u64 = 1 << 20;

    fn refusal(fd: impl Into<OwnedFd>, bytes: u64) -> String {
        match reattach("ram0", fd.into(), bytes) {
            Err(CprError::Descriptor { name, reason }) => {
                assert_eq!(name, "ram0");
                reason
            }
            other => panic!("expected a refusal, got {other:?}"),
        }
    }

    #[test]
    fn new_ram_has_its_size_its_name_and_no_pages() {
        let ram = create_ram("test-name", BYTES).unwrap();
        let stat = ram.metadata().unwrap();
        assert_eq!((stat.len(), stat.blocks()), (BYTES, 0));
        let link = std::fs::read_link(format!(
            "/proc/self/fd/{}",
            std::os::fd::AsRawFd::as_raw_fd(&ram)
        ))
        .unwrap();
        assert!(
            link.to_string_lossy()
                .starts_with("/memfd:vmferry-test-name"),
            "{link:?}"
        );
    }

    #[test]
    fn new_ram_can_be_written_but_not_resized_nor_sealed_further() {
        let ram = create_ram("ram0", BYTES).unwrap();
        ram.write_all_at(b"guest", BYTES - 5).unwrap();
        assert!(ram.set_len(BYTES - 4096).is_err());
        assert!(ram.set_len(BYTES + 4096).is_err());
        assert!(rustix::fs::fcntl_add_seals(&ram, SealFlags::WRITE).is_err());
        assert_eq!(ram.metadata().unwrap().len(), BYTES);
    }

    #[test]
    fn new_ram_is_close_on_exec() {
        let ram = create_ram("ram0", BYTES).unwrap();
        assert!(
            rustix::io::fcntl_getfd(&ram)
                .unwrap()
                .contains(FdFlags::CLOEXEC)
        );
    }

    #[test]
    fn sizes_and_names_that_make_no_ram_are_refused() {
        for bytes in [0, 1, 4095, 4097, u64::MAX, 1 << 63] {
            assert!(
                matches!(create_ram("ram0", bytes), Err(CprError::Request(_))),
                "{bytes}"
            );
        }
        assert!(matches!(
            create_ram_huge("ram0", 4096, HugePages::Size2M),
            Err(CprError::Request(_))
        ));
        for name in ["", "a\0b", &"x".repeat(RAM_NAME_BYTES_MAX + 1)] {
            assert!(
                matches!(create_ram(name, BYTES), Err(CprError::Request(_))),
                "{name:?}"
            );
        }
        create_ram(&"x".repeat(RAM_NAME_BYTES_MAX), BYTES).unwrap();
    }

    #[test]
    fn huge_ram_has_huge_blocks_and_the_same_seals() {
        let ram = create_ram_huge("ram0", 2 << 20, HugePages::Size2M).unwrap();
        assert_eq!(ram.metadata().unwrap().blksize(), 2 << 20);
        let again = reattach("ram0", ram.into(), 2 << 20).unwrap();
        assert!(again.set_len(4 << 20).is_err());
    }

    #[test]
    fn reattached_ram_is_the_same_memory_and_close_on_exec() {
        let ram = create_ram("ram0", BYTES).unwrap();
        ram.write_all_at(b"guest", 8192).unwrap();
        let handed: OwnedFd = ram.try_clone().unwrap().into();
        rustix::io::fcntl_setfd(&handed, FdFlags::empty()).unwrap();
        let again = reattach("ram0", handed, BYTES).unwrap();
        let mut seen = [0; 5];
        again.read_exact_at(&mut seen, 8192).unwrap();
        assert_eq!(&seen, b"guest");
        assert!(
            rustix::io::fcntl_getfd(&again)
                .unwrap()
                .contains(FdFlags::CLOEXEC)
        );
    }

    #[test]
    fn ram_of_another_size_is_refused_with_both_sizes() {
        let reason = refusal(create_ram("ram0", BYTES).unwrap(), 2 * BYTES);
        assert!(
            reason.contains("1048576") && reason.contains("2097152"),
            "{reason}"
        );
    }

    #[test]
    fn ram_that_could_shrink_is_refused() {
        let open = MemfdOptions::new()
            .allow_sealing(true)
            .create("open")
            .unwrap()
            .into_file();
        open.set_len(BYTES).unwrap();
        assert!(refusal(open, BYTES).contains("not sealed"));
    }

    #[test]
    fn ram_that_cannot_be_written_is_refused() {
        for seal in [SealFlags::WRITE, SealFlags::FUTURE_WRITE] {
            let sealed = MemfdOptions::new()
                .allow_sealing(true)
                .create("sealed")
                .unwrap()
                .into_file();
            sealed.set_len(BYTES).unwrap();
            rustix::fs::fcntl_add_seals(&sealed, SealFlags::SHRINK | SealFlags::GROW | seal)
                .unwrap();
            assert!(refusal(sealed, BYTES).contains("against writing"));
        }
        let ram = create_ram("ram0", BYTES).unwrap();
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&ram));
        assert!(refusal(File::open(path).unwrap(), BYTES).contains("reading and writing"));
    }

    #[test]
    fn what_is_no_memory_file_is_refused() {
        let (socket, _peer) = UnixStream::pair().unwrap();
        assert!(refusal(socket, BYTES).contains("not a file"));
        let on_disk = tempfile::tempfile().unwrap();
        on_disk.set_len(BYTES).unwrap();
        let reason = refusal(on_disk, BYTES);
        // On a tmpfs the file knows seals, but has none.
        assert!(
            reason.contains("not a memfd") || reason.contains("not sealed"),
            "{reason}"
        );
    }
}
