//! A program that a VM is told to become, and that is not what it should be. It asks its test what to do: both when it is asked whether
//! it would go on with the VM and when it has become the process of the VM. Then it does that, and becomes another program or ends.
//!
//! Its test listens on a socket called [`SOCKET`] beside the name that it was started by. One line goes each way: [`Arrival`], [`Deed`].

use std::env;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::IntoRawFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::Context;
use rustix::io::{FdFlags, fcntl_setfd};
use serde::{Deserialize, Serialize};
use vmferry::succession::ask::OPTION;
use vmferry::succession::{ARCHIVE, PROCESS, VARIABLE};
use vmferry_cpr::envelope;
use vmferry_cpr::letter::{HEAD_BYTES, Leg, Letter};
use vmferry_cpr::manifest::{FdKind, FileId, Manifest};

/// Name of the socket of the test.
pub const SOCKET: &str = "stand-in";
/// Where a copy of the archive is put, in the same folder, whole from the first moment.
pub const ARCHIVE_COPY: &str = "archive";
/// A descriptor that no process has.
const NOBODYS: u32 = 1_000_000;

/// What the stand-in tells first.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub struct Arrival {
    /// It is a copy that is asked a question. Else it has become the VM's process.
    pub asked: bool,
    /// Its process.
    pub pid: u32,
}

/// What it is to do.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Deed {
    /// What to do with that which the program before has left.
    pub tamper: Tamper,
    /// What to say on the standard output.
    pub said: String,
    /// What to become; nothing ends it.
    pub program: Option<PathBuf>,
    /// The words for that program, without its name; its own if there are none.
    pub words: Option<Vec<String>>,
    /// How to end.
    pub code: u8,
}

/// What becomes of that which the program before has left.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub enum Tamper {
    /// All is as it was.
    #[default]
    Nothing,
    /// The variable that names the letter is removed.
    WithoutVariable,
    /// A bit of the letter is turned.
    LetterChanged,
    /// The second half of the letter is missing.
    LetterCut,
    /// It is a good letter for the process before this one.
    LetterOfAnother,
    /// It is the question that was put before.
    LetterAsked,
    /// Guest memory is not there.
    RamMissing,
    /// Guest memory is another file.
    RamForeign,
    /// Guest memory and the QMP socket have changed places.
    Swapped,
    /// A bit of the guest's state is turned.
    ArchiveChanged,
    /// The second half of the guest's state is missing.
    ArchiveCut,
    /// The guest's state comes through this pipe. A copy of it is in [`ARCHIVE_COPY`].
    ArchivePiped(PathBuf),
}

/// The whole program.
pub fn main() -> ExitCode {
    match stand_in() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("the stand-in: {error:#}");
            ExitCode::from(101)
        }
    }
}

fn stand_in() -> anyhow::Result<ExitCode> {
    let mut words = env::args_os();
    let name = PathBuf::from(words.next().context("no name")?);
    let own: Vec<_> = words.collect();
    let arrival = Arrival {
        asked: own.iter().any(|word| word == OPTION),
        pid: std::process::id(),
    };
    let deed = ask(&name, arrival)?;
    let variable = tamper(&deed.tamper, &name)?;
    let mut out = std::io::stdout();
    out.write_all(deed.said.as_bytes())?;
    out.flush()?;
    let Some(program) = deed.program else {
        return Ok(ExitCode::from(deed.code));
    };
    let mut command = Command::new(&program);
    match deed.words {
        Some(words) => command.args(words),
        None => command.args(own),
    };
    match variable {
        Variable::AsItIs => &mut command,
        Variable::Removed => command.env_remove(VARIABLE),
        Variable::Names(number) => command.env(VARIABLE, number.to_string()),
    };
    let error = command.exec();
    Err(error).with_context(|| program.display().to_string())
}

/// What the next program finds in its environment.
enum Variable {
    AsItIs,
    Removed,
    Names(u32),
}

fn ask(name: &Path, arrival: Arrival) -> anyhow::Result<Deed> {
    let mut test = UnixStream::connect(name.with_file_name(SOCKET)).context("no test")?;
    writeln!(test, "{}", serde_json::to_string(&arrival)?)?;
    let mut deed = String::new();
    BufReader::new(test).read_line(&mut deed)?;
    serde_json::from_str(&deed).context("the test is over")
}

/// Does this to what was left. What it leaves instead stays open for the next program.
fn tamper(how: &Tamper, name: &Path) -> anyhow::Result<Variable> {
    match how {
        Tamper::Nothing => return Ok(Variable::AsItIs),
        Tamper::WithoutVariable => return Ok(Variable::Removed),
        _ => {}
    }
    let number: u32 = env::var(VARIABLE).context("no letter")?.parse()?;
    let mut bytes = fs::read(by_number(number))?;
    match how {
        Tamper::LetterChanged => {
            let at = usize::midpoint(HEAD_BYTES, bytes.len());
            bytes[at] ^= 1;
        }
        Tamper::LetterCut => bytes.truncate(bytes.len() / 2),
        other => {
            let mut letter = Letter::decode(&bytes)?;
            change(other, name, &mut letter)?;
            bytes = letter.encode()?;
        }
    }
    let letter = envelope::seal("vmferry-letter", &bytes)?;
    Ok(Variable::Names(stays_open(letter)?))
}

fn change(how: &Tamper, name: &Path, letter: &mut Letter) -> anyhow::Result<()> {
    let find = |wanted: &dyn Fn(&vmferry_cpr::manifest::FdEntry) -> bool| {
        let mut entries = letter.manifest.entries().iter();
        entries.position(wanted).context("no such descriptor")
    };
    let ram = find(&|entry| matches!(entry.kind, FdKind::RamMemfd | FdKind::RamFile))?;
    let qmp = find(&|entry| entry.kind == FdKind::Qmp)?;
    let archive = find(&|entry| entry.name == PROCESS && entry.role == ARCHIVE)?;
    let state = || fs::read(by_number(letter.numbers[archive]));
    match how {
        Tamper::LetterOfAnother => letter.pid += 1,
        Tamper::LetterAsked => {
            letter.leg = Leg::Asked;
            letter.numbers.clear();
        }
        Tamper::RamMissing => letter.numbers[ram] = NOBODYS,
        Tamper::RamForeign => letter.numbers[ram] = stays_open(File::open("/dev/null")?)?,
        Tamper::Swapped => letter.numbers.swap(ram, qmp),
        Tamper::ArchiveChanged | Tamper::ArchiveCut => {
            let mut bytes = state()?;
            let half = bytes.len() / 2;
            match how {
                Tamper::ArchiveCut => bytes.truncate(half),
                _ => bytes[half] ^= 1,
            }
            replace(letter, archive, envelope::seal("vmferry-state", &bytes)?)?;
        }
        Tamper::ArchivePiped(pipe) => {
            let copy = name.with_file_name(ARCHIVE_COPY);
            let early = copy.with_extension("early");
            fs::write(&early, state()?)?;
            fs::rename(early, copy)?;
            replace(letter, archive, File::open(pipe)?)?;
        }
        _ => {}
    }
    Ok(())
}

/// Another file in the place of one, with nothing to tell it by.
fn replace(letter: &mut Letter, at: usize, file: File) -> anyhow::Result<()> {
    letter.numbers[at] = stays_open(file)?;
    let mut entries = letter.manifest.entries().to_vec();
    entries[at].file = FileId::default();
    letter.manifest = Manifest::new(entries)?;
    Ok(())
}

/// The number of a file that the next program finds open.
fn stays_open(file: File) -> anyhow::Result<u32> {
    fcntl_setfd(&file, FdFlags::empty())?;
    Ok(file.into_raw_fd().cast_unsigned())
}

fn by_number(number: u32) -> String {
    format!("/proc/self/fd/{number}")
}
