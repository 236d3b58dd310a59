//! What a guest says on its serial port that counts its passes there (`--workload-serial`): each digit follows the one before it, whoever
//! writes them, or somebody has lost or doubled one.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags};

use crate::harness::until;

const GREETING: &[u8] = b"vmferry workload started\r\n";
const DIGITS: u8 = 64;
/// Not a digit.
const FILLER: u8 = b'\n';
/// The smallest that a pipe can be.
const PIPE_BYTES: usize = 4096;

/// A pipe with a name that a VM writes what its guest says to.
pub(crate) struct Line {
    path: PathBuf,
    pipe: File,
    heard: u64,
    greeting: usize,
}

impl Line {
    /// One in `folder`.
    pub(crate) fn new(folder: &Path) -> Self {
        let path = folder.join("line");
        rustix::fs::mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        // To write too, so that it never ends.
        let pipe = rustix::fs::open(
            &path,
            OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC,
            Mode::empty(),
        );
        let pipe = File::from(pipe.unwrap());
        rustix::pipe::fcntl_setpipe_size(&pipe, PIPE_BYTES).unwrap();
        Self {
            path,
            pipe,
            heard: 0,
            greeting: 0,
        }
    }

    pub(crate) fn path(&self) -> &str {
        self.path.to_str().unwrap()
    }

    /// Nobody can open it any more.
    pub(crate) fn remove(&self) {
        std::fs::remove_file(&self.path).unwrap();
    }

    /// Leaves no room in the pipe, so that what the guest says from now on waits.
    pub(crate) fn fill(&self) {
        let full = std::iter::repeat_with(|| (&self.pipe).write_all(&[FILLER]));
        let full = full.take(16 * PIPE_BYTES).find_map(Result::err);
        assert_eq!(full.map(|error| error.kind()), Some(ErrorKind::WouldBlock));
    }

    /// Reads what is there, and checks it; how many digits there have been so far.
    pub(crate) fn heard(&mut self) -> u64 {
        let mut bytes = [0; PIPE_BYTES];
        loop {
            let count = match (&self.pipe).read(&mut bytes) {
                Ok(count) => count,
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::WouldBlock);
                    return self.heard;
                }
            };
            for byte in &bytes[..count] {
                self.hear(*byte);
            }
        }
    }

    fn hear(&mut self, byte: u8) {
        if self.greeting < GREETING.len() {
            assert_eq!(byte, GREETING[self.greeting]);
            self.greeting += 1;
        } else if byte != FILLER {
            self.heard += 1;
            let digit = b'0' + u8::try_from(self.heard % u64::from(DIGITS)).unwrap();
            let heard = self.heard;
            assert_eq!(
                char::from(byte),
                char::from(digit),
                "digit number {heard}: lost or doubled"
            );
        }
    }

    /// Waits for so many more digits.
    pub(crate) fn hear_more(&mut self, more: u64) {
        let wanted = self.heard() + more;
        until(format_args!("{wanted} digits"), || {
            (self.heard() >= wanted).then_some(())
        });
    }
}
