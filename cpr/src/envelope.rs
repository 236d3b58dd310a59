//! A [`Letter`] on its way through `execve`: the sealed memfd that it is in, and the descriptors that stay open.
//!
//! Close-on-exec is what keeps descriptors from going astray, so it is taken away for the exec only, and given back at once if there
//! is none ([`Open`]); the next program sets it before it does anything else ([`adopt`]).

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use memfd::{FileSeal, Memfd, MemfdOptions};
use rustix::fs::SealFlags;
use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};

use crate::CprError;
use crate::check::check;
use crate::letter::{LETTER_BYTES_MAX, Letter};
use crate::table::FdTable;

/// Name of a letter's memfd, for people who look at the process, and for a program that was not told its number.
pub const NAME: &str = "vmferry-letter";

/// Puts bytes that nobody is to change any more into a memfd, close-on-exec.
///
/// # Errors
/// [`CprError::Host`] when the kernel refuses.
pub fn seal(name: &str, bytes: &[u8]) -> Result<File, CprError> {
    fill(empty(name)?, name, bytes)
}

fn making(name: &str) -> impl Fn(memfd::Error) -> CprError {
    move |error| CprError::Host {
        op: format!("making memfd {name:?}"),
        source: std::io::Error::other(error),
    }
}

fn empty(name: &str) -> Result<Memfd, CprError> {
    let options = MemfdOptions::new().close_on_exec(true).allow_sealing(true);
    options.create(name).map_err(making(name))
}

fn fill(memfd: Memfd, name: &str, bytes: &[u8]) -> Result<File, CprError> {
    std::io::Write::write_all(&mut memfd.as_file(), bytes)
        .map_err(|error| CprError::host(format!("filling memfd {name:?}"), error))?;
    let seals = [
        FileSeal::SealShrink,
        FileSeal::SealGrow,
        FileSeal::SealWrite,
        FileSeal::SealSeal,
    ];
    memfd.add_seals(&seals).map_err(making(name))?;
    // Whoever reads it begins at the beginning.
    let file = memfd.into_file();
    std::io::Seek::rewind(&mut &file)
        .map_err(|error| CprError::host(format!("rewinding memfd {name:?}"), error))?;
    Ok(file)
}

/// What a letter will be put into, for who must not find later that there is no descriptor to be had.
#[derive(Debug)]
pub struct Envelope(Memfd);

impl Envelope {
    /// An empty one, close-on-exec.
    ///
    /// # Errors
    /// [`CprError::Host`] when the kernel refuses.
    pub fn new() -> Result<Self, CprError> {
        empty(NAME).map(Self)
    }

    /// Puts a letter in and seals it.
    ///
    /// # Errors
    /// [`CprError::Request`] for a letter that breaks a rule, [`CprError::Host`] when the kernel refuses.
    pub fn seal(self, letter: &Letter) -> Result<File, CprError> {
        let bytes = letter
            .encode()
            .map_err(|error| CprError::Request(error.to_string()))?;
        fill(self.0, NAME, &bytes)
    }
}

/// Seals a letter.
///
/// # Errors
/// As [`Envelope::new`] and [`Envelope::seal`].
pub fn seal_letter(letter: &Letter) -> Result<File, CprError> {
    Envelope::new()?.seal(letter)
}

/// Reads what is in a sealed memfd of at most `max` bytes.
///
/// # Errors
/// [`CprError::Descriptor`] for what is no sealed memfd or too long, [`CprError::Host`] when the kernel refuses.
pub fn unseal(name: &str, file: impl AsFd, max: usize) -> Result<Vec<u8>, CprError> {
    let refuse = |reason: String| CprError::Descriptor {
        name: name.to_owned(),
        reason,
    };
    let whole = SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
    match rustix::fs::fcntl_get_seals(&file) {
        Ok(seals) if seals.contains(whole) => {}
        Ok(_) => return Err(refuse("it is not sealed".to_owned())),
        Err(_) => return Err(refuse("it is not a memfd".to_owned())),
    }
    let copy = file
        .as_fd()
        .try_clone_to_owned()
        .map_err(|error| CprError::host(format!("duplicating {name:?}"), error))?;
    let mut copy = File::from(copy);
    let length = copy.metadata().map_or(0, |file| file.len());
    // All in one read.
    let length = usize::try_from(length).unwrap_or(max).min(max);
    let mut bytes = Vec::with_capacity(length + 1);
    std::io::Seek::rewind(&mut copy)
        .and_then(|()| { &mut copy }.take(max as u64 + 1).read_to_end(&mut bytes))
        .map_err(|error| CprError::host(format!("reading {name:?}"), error))?;
    if bytes.len() > max {
        return Err(refuse(format!("it is longer than {max} bytes")));
    }
    Ok(bytes)
}

/// Reads a letter out of its memfd.
///
/// # Errors
/// As [`unseal`]; what is no letter is a [`CprError::Descriptor`] as well.
pub fn open_letter(file: impl AsFd) -> Result<Letter, CprError> {
    let bytes = unseal(NAME, file, LETTER_BYTES_MAX)?;
    Letter::decode(&bytes).map_err(|error| CprError::Descriptor {
        name: NAME.to_owned(),
        reason: error.to_string(),
    })
}

/// Takes over the descriptors of a letter, each by its number through `take`, and makes them close-on-exec. What is not as announced
/// is an error that closes all of them.
///
/// # Errors
/// [`CprError::Descriptor`] names the one that is not there or is something else.
pub fn adopt(
    letter: &Letter,
    mut take: impl FnMut(u32) -> std::io::Result<OwnedFd>,
) -> Result<FdTable<OwnedFd>, CprError> {
    let mut table = FdTable::new(letter.manifest.clone());
    let mut wrong = None;
    let entries = letter.manifest.entries().iter();
    for (at, (entry, number)) in entries.zip(&letter.numbers).enumerate() {
        let taken = take(*number)
            .and_then(|fd| set_close_on_exec(fd.as_fd(), true).map(|()| fd))
            .map_err(|error| format!("number {number}: {error}"))
            .and_then(|fd| check(entry, &fd).map(|()| fd));
        match taken {
            Ok(fd) => table.put(at, fd),
            // The rest is taken all the same, so that it is closed.
            Err(reason) => wrong = wrong.or(Some((entry, reason))),
        }
    }
    match wrong {
        None => Ok(table),
        Some((entry, reason)) => Err(CprError::Descriptor {
            name: format!("{} {}", entry.name, entry.role),
            reason,
        }),
    }
}

/// Descriptors that stay open through an exec. Dropping it makes them close-on-exec again.
#[derive(Debug)]
pub struct Open<'fd>(Vec<BorrowedFd<'fd>>);

impl<'fd> Open<'fd> {
    /// Lets these stay open.
    ///
    /// # Errors
    /// [`CprError::Host`] when the kernel refuses; then all of them are close-on-exec.
    pub fn through_exec(fds: impl IntoIterator<Item = BorrowedFd<'fd>>) -> Result<Self, CprError> {
        let mut this = Self(Vec::new());
        for fd in fds {
            set_close_on_exec(fd, false).map_err(|error| {
                CprError::host(format!("keeping descriptor {} open", fd.as_raw_fd()), error)
            })?;
            this.0.push(fd);
        }
        Ok(this)
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        for fd in &self.0 {
            // Fails only for what is no descriptor, and these are borrowed.
            let _ = set_close_on_exec(*fd, true);
        }
    }
}

fn set_close_on_exec(fd: BorrowedFd<'_>, on: bool) -> std::io::Result<()> {
    let mut flags = fcntl_getfd(fd)?;
    flags.set(FdFlags::CLOEXEC, on);
    Ok(fcntl_setfd(fd, flags)?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use vmferry_transport::units::MigrationId;

    use super::*;
    use crate::handout::Handout;
    use crate::letter::Leg;
    use crate::manifest::{FdKind, Stage};
    use crate::memfd::create_ram;

    const RAM_BYTES: u64 = 1 << 20;

    struct Left {
        ram: File,
        qmp: UnixListener,
        _folder: tempfile::TempDir,
    }

    impl Left {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            Self {
                ram: create_ram("ram0", RAM_BYTES).unwrap(),
                qmp: UnixListener::bind(folder.path().join("qmp")).unwrap(),
                _folder: folder,
            }
        }

        fn letter(&self) -> Letter {
            let mut handout = Handout::new();
            handout.add_ram("ram0", RAM_BYTES, &self.ram).unwrap();
            handout
                .add(
                    ("process", "qmp"),
                    FdKind::Qmp,
                    Stage::HandOver,
                    0,
                    &self.qmp,
                )
                .unwrap();
            Letter {
                leg: Leg::There,
                pid: std::process::id(),
                id: MigrationId([3; 16]),
                software: "old".to_owned(),
                manifest: handout.manifest().unwrap(),
                numbers: [self.ram.as_raw_fd(), self.qmp.as_raw_fd()]
                    .map(i32::cast_unsigned)
                    .to_vec(),
                words: vec![b"vmm".to_vec()],
                reason: String::new(),
                account: Vec::new(),
            }
        }

        /// Stands in for the numbers of a new program: a duplicate that is not close-on-exec.
        fn take(&self, number: u32) -> std::io::Result<OwnedFd> {
            let known = [self.ram.as_fd(), self.qmp.as_fd()];
            let is_it = |fd: &BorrowedFd<'_>| fd.as_raw_fd().cast_unsigned() == number;
            let fd = known.into_iter().find(is_it);
            let fd = fd.ok_or(rustix::io::Errno::BADF)?.try_clone_to_owned()?;
            set_close_on_exec(fd.as_fd(), false)?;
            Ok(fd)
        }
    }

    fn closes(fd: impl AsFd) -> bool {
        fcntl_getfd(fd).unwrap().contains(FdFlags::CLOEXEC)
    }

    #[test]
    fn a_letter_and_its_descriptors_arrive_and_are_close_on_exec_again() {
        let left = Left::new();
        let letter = left.letter();
        let memfd = seal_letter(&letter).unwrap();
        assert!(closes(&memfd));
        let read = open_letter(&memfd).unwrap();
        assert_eq!(read, letter);
        let mut table = adopt(&read, |number| left.take(number)).unwrap();
        let ram = table.claim("ram0", "ram", FdKind::RamMemfd).unwrap();
        assert!(closes(&ram));
        let accounts = table.close();
        assert_eq!((accounts.claimed, accounts.closed), (1, 1));
    }

    #[test]
    fn what_is_missing_or_swapped_is_named_and_nothing_is_taken() {
        let left = Left::new();
        let mut letter = left.letter();
        letter.numbers.swap(0, 1);
        let error = adopt(&letter, |number| left.take(number)).unwrap_err();
        assert!(error.to_string().contains("ram0 ram"), "{error}");
        letter.numbers = vec![left.letter().numbers[0], 1_000_000];
        let error = adopt(&letter, |number| left.take(number)).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("process qmp") && text.contains("1000000"),
            "{text}"
        );
    }

    #[test]
    fn descriptors_stay_open_only_as_long_as_somebody_says_so() {
        let left = Left::new();
        let fds = [left.ram.as_fd(), left.qmp.as_fd()];
        let open = Open::through_exec(fds).unwrap();
        assert!(fds.iter().all(|fd| !closes(fd)));
        drop(open);
        assert!(fds.iter().all(closes));
    }

    #[test]
    fn what_is_no_sealed_letter_is_refused() {
        let refusal = |file: &File| open_letter(file).unwrap_err().to_string();
        let on_disk = tempfile::tempfile().unwrap();
        let reason = refusal(&on_disk);
        // On a tmpfs the file knows seals, but has none.
        assert!(
            reason.contains("not a memfd") || reason.contains("not sealed"),
            "{reason}"
        );
        assert!(refusal(&create_ram("ram0", 4096).unwrap()).contains("not sealed"));
        assert!(refusal(&seal("x", b"VMFYEXE").unwrap()).contains("bytes"));
        assert!(refusal(&seal("x", &[0; 64]).unwrap()).contains("no letter"));
    }
}
