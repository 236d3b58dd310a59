//! Becoming the old program again: kept from the first moment of the new one until the guest runs here.

use std::ffi::OsString;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;

use anyhow::Context;
use vmferry_cpr::envelope::{Envelope, Open};
use vmferry_cpr::letter::{Leg, Letter, REASON_BYTES_MAX};
use vmferry_cpr::manifest::FdKind;
use vmferry_cpr::table::FdTable;

use super::told::Unhandled;
use super::{PROCESS, PROGRAM, c_strings, call, environment};

/// The old program, and a copy of everything that it left. Dropping it gives the way back up.
#[derive(Debug)]
pub struct WayBack {
    letter: Letter,
    /// In the order of the manifest.
    fds: Vec<OwnedFd>,
    program: OwnedFd,
    words: Vec<OsString>,
    /// For its letter: who goes back may do so because there are no descriptors left.
    envelope: Envelope,
}

impl WayBack {
    /// Copies every descriptor before anybody uses them.
    pub(super) fn of(letter: &Letter, table: &mut FdTable<OwnedFd>) -> anyhow::Result<Self> {
        let mut fds = Vec::with_capacity(letter.numbers.len());
        for entry in letter.manifest.entries() {
            let (_, fd) = table
                .peek(&entry.name, &entry.role)
                .context("a descriptor is gone")?;
            fds.push(fd.try_clone()?);
        }
        let program = table.claim(PROCESS, PROGRAM, FdKind::Other)?;
        let words = letter.words.iter().cloned().map(OsString::from_vec);
        Ok(Self {
            letter: letter.clone(),
            fds,
            program,
            words: words.collect(),
            envelope: Envelope::new()?,
        })
    }

    /// One that was never left.
    #[cfg(test)]
    pub(crate) fn nowhere() -> Self {
        let program = std::fs::File::open("/dev/null").unwrap().into();
        Self {
            letter: Letter {
                leg: Leg::There,
                pid: 0,
                id: vmferry_transport::units::MigrationId::default(),
                software: String::new(),
                manifest: vmferry_cpr::manifest::Manifest::new(Vec::new()).unwrap(),
                numbers: Vec::new(),
                words: Vec::new(),
                reason: String::new(),
                account: Vec::new(),
            },
            fds: Vec::new(),
            program,
            words: Vec::new(),
            envelope: Envelope::new().unwrap(),
        }
    }

    /// Becomes the old program, which runs the guest as it was when it stopped it and says why, unless the process was told
    /// to end. Returns only if that fails.
    pub fn go(self, why: &str) -> anyhow::Error {
        let because = anyhow::Error::msg(why.to_owned());
        match self.become_it(why) {
            Err(error) => because.context(format!(
                "the old program cannot go on either, and nobody runs the guest: {error:#}"
            )),
            Ok(never) => match never {},
        }
    }

    fn become_it(self, why: &str) -> anyhow::Result<std::convert::Infallible> {
        let Self {
            letter,
            fds,
            program,
            words,
            envelope,
        } = self;
        let signals = Unhandled::new()?;
        let numbers = fds.iter().map(|fd| fd.as_raw_fd().cast_unsigned());
        let letter = Letter {
            leg: Leg::Back,
            numbers: numbers.collect(),
            reason: cut(why, REASON_BYTES_MAX),
            ..letter
        };
        let memfd = envelope.seal(&letter)?;
        let number = memfd.as_raw_fd().cast_unsigned();
        let environment = environment(number)?;
        let words = c_strings(&words)?;
        let all = fds.iter().map(AsFd::as_fd).chain([memfd.as_fd()]);
        let _open = Open::through_exec(all)?;
        signals.ensure_not_told()?;
        Err(call::execute_open(program.as_fd(), &words, &environment).into())
    }
}

/// At most so many bytes, whole characters.
fn cut(text: &str, max: usize) -> String {
    let mut end = text.len().min(max);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_reason_is_cut_between_characters() {
        assert_eq!(cut("aä", 2), "a");
        assert_eq!(cut("aä", 3), "aä");
        assert_eq!(cut("", 3), "");
    }
}
