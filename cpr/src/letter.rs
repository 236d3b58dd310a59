//! What a program leaves for the program that its process becomes: a letter in a sealed memfd, across `execve`.
//!
//! The other way to hand a VM over, in [`handout`](crate::handout) and [`takeover`](crate::takeover), needs two processes that talk.
//! An exec has one process and nobody to ask, so all is written down before: which descriptors stay open and under which numbers, how
//! the old program is started again if the new one cannot go on, and what the VMM itself wants to know.
//!
//! The same bytes, without numbers, are the question that is put to the new program before anything is risked ([`Leg::Asked`]).
//!
//! # Encoding
//!
//! Little-endian; a text is 2 bytes of length and UTF-8, bytes are 4 bytes of length and the bytes.
//!
//! | field | bytes |
//! |---|---|
//! | magic `VMFYEXEC` | 8 |
//! | version, 1 | 2 |
//! | leg, see [`Leg`] | 1 |
//! | reserved, zero | 1 |
//! | length of what follows the head | 4 |
//! | CRC32C of what follows the head | 4 |
//! | CRC32C of the 20 bytes before | 4 |
//! | process id | 4 |
//! | migration id | 16 |
//! | software of the writer | text, up to 256 |
//! | manifest | as in [`manifest`](crate::manifest) |
//! | number of each descriptor, in the order of the manifest; none if asked | 4 each |
//! | command line of the program to go back to: number of words | 4 |
//! | per word | bytes |
//! | why this is the way back; empty on the way there | text, up to 4096 |
//! | what the VMM wants to know | bytes |
//!
//! Rules for a later version: the head keeps its form, so that every version can say which version it met.

use std::collections::BTreeSet;

use vmferry_transport::units::MigrationId;
use vmferry_transport::wire::WireError;
use vmferry_transport::wire::header::{Reader, put_text};

use crate::manifest::{Manifest, ManifestError};

/// First bytes of a letter.
pub const MAGIC: [u8; 8] = *b"VMFYEXEC";
/// Version that is written and read.
pub const VERSION: u16 = 1;
/// Longest letter in bytes: a full manifest and the longest command line.
pub const LETTER_BYTES_MAX: usize = 16 << 20;
/// Longest command line in bytes, and longest account of the VMM.
pub const TEXT_BYTES_MAX: usize = 4 << 20;
/// Most words of a command line.
pub const WORDS_MAX: usize = 64 << 10;
/// Longest reason in bytes.
pub const REASON_BYTES_MAX: usize = 4096;
/// Numbers below this one are the standard streams, which stay what they are.
pub const NUMBER_MIN: u32 = 3;

/// Bytes of the head.
pub const HEAD_BYTES: usize = 24;
const SOFTWARE_BYTES_MAX: usize = 256;

/// Which way the letter goes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub enum Leg {
    /// To a copy of the new program that only says whether it would go on with the VM. No descriptor comes along.
    Asked = 0,
    /// From the old program to the new one.
    There = 1,
    /// From the new program, which could not go on, to the old one. There is no second way there.
    Back = 2,
}

/// What one program leaves for the next. See the [module documentation](self).
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Letter {
    /// Which way it goes.
    pub leg: Leg,
    /// The process that both programs are.
    pub pid: u32,
    /// Which migration it belongs to.
    pub id: MigrationId,
    /// Name and version of the writer.
    pub software: String,
    /// What stays open.
    pub manifest: Manifest,
    /// Under which numbers, in the order of the manifest; empty if asked.
    pub numbers: Vec<u32>,
    /// The command line of the program to go back to, its name first.
    pub words: Vec<Vec<u8>>,
    /// Why this is the way back.
    pub reason: String,
    /// What the VMM wants to know; nothing to this crate.
    pub account: Vec<u8>,
}

/// Why something is no letter.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum LetterError {
    /// It begins as no letter does.
    #[error("this is no letter from one program to the next")]
    NoLetter,
    /// Of a version that this build does not read.
    #[error("the letter is of version {found}, this build reads {VERSION}")]
    Version {
        /// Its version.
        found: u16,
    },
    /// A checksum is wrong.
    #[error("the letter was changed: bad checksum of its {0}")]
    Checksum(&'static str),
    /// It is cut, or longer than it says.
    #[error("the letter has {found} bytes, and should have {expected}")]
    Length {
        /// Bytes there are.
        found: usize,
        /// Bytes it says, or may have.
        expected: usize,
    },
    /// A number that cannot be, or the same twice.
    #[error("descriptor number {0} cannot be right")]
    Number(u32),
    /// A word that no command line has.
    #[error("a word of the command line has a NUL")]
    Word,
    /// The manifest is bad.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// A field is bad.
    #[error(transparent)]
    Wire(#[from] WireError),
}

impl Letter {
    /// The whole letter.
    ///
    /// # Errors
    /// [`LetterError`] if it would break a rule of the format, as the reader would say.
    pub fn encode(&self) -> Result<Vec<u8>, LetterError> {
        self.check()?;
        let mut body = Vec::new();
        body.extend_from_slice(&self.pid.to_le_bytes());
        body.extend_from_slice(&self.id.0);
        put_text(&mut body, &self.software, SOFTWARE_BYTES_MAX);
        self.manifest.encode(&mut body);
        for number in &self.numbers {
            body.extend_from_slice(&number.to_le_bytes());
        }
        put_length(&mut body, self.words.len());
        for word in &self.words {
            put_bytes(&mut body, word);
        }
        put_text(&mut body, &self.reason, REASON_BYTES_MAX);
        put_bytes(&mut body, &self.account);
        let mut letter = MAGIC.to_vec();
        letter.extend_from_slice(&VERSION.to_le_bytes());
        letter.extend_from_slice(&[self.leg as u8, 0]);
        put_length(&mut letter, body.len());
        letter.extend_from_slice(&crc32c::crc32c(&body).to_le_bytes());
        letter.extend_from_slice(&crc32c::crc32c(&letter).to_le_bytes());
        letter.extend_from_slice(&body);
        match letter.len() {
            ..=LETTER_BYTES_MAX => Ok(letter),
            found => Err(LetterError::Length {
                found,
                expected: LETTER_BYTES_MAX,
            }),
        }
    }

    /// Reads a letter, all of it.
    ///
    /// # Errors
    /// [`LetterError`]: what is wrong with it.
    pub fn decode(letter: &[u8]) -> Result<Self, LetterError> {
        let Some((head, body)) = letter.split_at_checked(HEAD_BYTES) else {
            return Err(LetterError::Length {
                found: letter.len(),
                expected: HEAD_BYTES,
            });
        };
        let (leg, length, checksum) = decode_head(head)?;
        let expected = HEAD_BYTES + length;
        if letter.len() != expected || expected > LETTER_BYTES_MAX {
            return Err(LetterError::Length {
                found: letter.len(),
                expected: expected.min(LETTER_BYTES_MAX),
            });
        }
        if crc32c::crc32c(body) != checksum {
            return Err(LetterError::Checksum("body"));
        }
        let mut reader = Reader::new(body);
        let pid = reader.u32()?;
        let id = MigrationId(reader.id()?);
        let software = reader.text("software", SOFTWARE_BYTES_MAX)?;
        let manifest = Manifest::decode(&mut reader, body.len())?;
        let count = match leg {
            Leg::Asked => 0,
            Leg::There | Leg::Back => manifest.entries().len(),
        };
        let numbers = (0..count).map(|_| reader.u32());
        let numbers = numbers.collect::<Result<_, _>>()?;
        let words = read_words(&mut reader)?;
        let reason = reader.text("reason", REASON_BYTES_MAX)?;
        let account = read_bytes(&mut reader, "account", TEXT_BYTES_MAX)?.to_vec();
        reader.finish()?;
        let this = Self {
            leg,
            pid,
            id,
            software,
            manifest,
            numbers,
            words,
            reason,
            account,
        };
        this.check()?;
        Ok(this)
    }

    /// What every letter keeps to, whoever wrote it.
    fn check(&self) -> Result<(), LetterError> {
        let wanted = match self.leg {
            Leg::Asked => 0,
            Leg::There | Leg::Back => self.manifest.entries().len(),
        };
        if self.numbers.len() != wanted {
            return Err(LetterError::Length {
                found: self.numbers.len(),
                expected: wanted,
            });
        }
        let mut seen = BTreeSet::new();
        for number in &self.numbers {
            let possible = (NUMBER_MIN..=i32::MAX.cast_unsigned()).contains(number);
            if !possible || !seen.insert(number) {
                return Err(LetterError::Number(*number));
            }
        }
        if self.words.iter().any(|word| word.contains(&0)) {
            return Err(LetterError::Word);
        }
        bounded("words", self.words.len(), WORDS_MAX)?;
        let bytes = self.words.iter().map(|word| word.len() + 1).sum();
        bounded("command line", bytes, TEXT_BYTES_MAX)?;
        bounded("account", self.account.len(), TEXT_BYTES_MAX)
    }
}

fn decode_head(head: &[u8]) -> Result<(Leg, usize, u32), LetterError> {
    let mut reader = Reader::new(head);
    if reader.bytes(MAGIC.len())? != MAGIC {
        return Err(LetterError::NoLetter);
    }
    let version = reader.u16()?;
    let (leg, reserved) = (reader.u8()?, reader.u8()?);
    let length = reader.u32()? as usize;
    let checksum = reader.u32()?;
    if reader.u32()? != crc32c::crc32c(&head[..HEAD_BYTES - 4]) {
        return Err(LetterError::Checksum("head"));
    }
    if version != VERSION {
        return Err(LetterError::Version { found: version });
    }
    let legs = [Leg::Asked, Leg::There, Leg::Back];
    let known = legs.into_iter().find(|known| *known as u8 == leg);
    match (known, reserved) {
        (Some(leg), 0) => Ok((leg, length, checksum)),
        _ => Err(LetterError::Wire(WireError::Value {
            field: "leg",
            value: u64::from(leg),
        })),
    }
}

fn read_words(reader: &mut Reader<'_>) -> Result<Vec<Vec<u8>>, LetterError> {
    let count = reader.u32()? as usize;
    bounded("words", count, WORDS_MAX)?;
    let mut words = Vec::new();
    for _ in 0..count {
        words.push(read_bytes(reader, "word", TEXT_BYTES_MAX)?.to_vec());
    }
    Ok(words)
}

fn read_bytes<'a>(
    reader: &mut Reader<'a>,
    field: &'static str,
    max: usize,
) -> Result<&'a [u8], LetterError> {
    let length = reader.u32()? as usize;
    bounded(field, length, max)?;
    Ok(reader.bytes(length)?)
}

fn bounded(field: &'static str, length: usize, max: usize) -> Result<(), LetterError> {
    if length <= max {
        return Ok(());
    }
    let (len, max) = (length as u64, max as u64);
    Err(WireError::TooLong { field, len, max }.into())
}

fn put_length(bytes: &mut Vec<u8>, length: usize) {
    // Whatever is longer has been refused.
    let length = u32::try_from(length).unwrap_or(u32::MAX);
    bytes.extend_from_slice(&length.to_le_bytes());
}

fn put_bytes(bytes: &mut Vec<u8>, what: &[u8]) {
    put_length(bytes, what.len());
    bytes.extend_from_slice(what);
}

#[cfg(test)]
mod tests;
