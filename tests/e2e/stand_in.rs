//! Programs that a VM is told to become: the words for them, scripts, and one that asks the test what to do
//! ([`vmferry_tests::stand_in`]).

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::fs::symlink;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tempfile::TempDir;
use vmferry_tests::stand_in::{ARCHIVE_COPY, Arrival, Deed, SOCKET};

use crate::harness::{Vm, program, until};

/// The program under test.
pub(crate) fn program_path() -> PathBuf {
    program().get_program().into()
}

/// The words that a VM was started with, without its name.
pub(crate) fn words_of(vm: &Vm) -> Vec<String> {
    let cmdline = std::fs::read(format!("/proc/{}/cmdline", vm.pid())).unwrap();
    let words = cmdline.strip_suffix(b"\0").unwrap();
    let words = words.split(|byte| *byte == 0).skip(1);
    words
        .map(|word| String::from_utf8(word.to_vec()).unwrap())
        .collect()
}

/// The command line of the VM, with another program.
pub(crate) fn command(vm: &Vm, program: &Path) -> Vec<String> {
    let mut words = words_of(vm);
    words.insert(0, program.display().to_string());
    words
}

/// A program that is a shell script. Another process writes it: nobody who is forked meanwhile may have it open for writing.
pub(crate) fn script(path: &Path, text: &str) {
    let write = format!("cat > '{0}' && chmod 700 '{0}'", path.display());
    let mut writer = Command::new("sh")
        .args(["-c", &write])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = writer.stdin.take().unwrap();
    stdin.write_all(text.as_bytes()).unwrap();
    drop(stdin);
    assert!(writer.wait().unwrap().success());
}

/// Says yes when it is asked, and does something else then.
pub(crate) fn liar(folder: &Path, then: &str) -> PathBuf {
    liar_of(folder, "/bin/sh", then)
}

/// The same, as a script of this shell.
pub(crate) fn liar_of(folder: &Path, shell: &str, then: &str) -> PathBuf {
    let (path, ours) = (folder.join("liar"), program_path());
    let text = format!(
        "#!{shell}\ncase \"$*\" in *--x-cpr-exec-asked*) exec {} \"$@\";; esac\n{then}\n",
        ours.display()
    );
    script(&path, &text);
    path
}

/// Processes that were started with this word.
pub(crate) fn processes_with(word: &Path) -> Vec<u32> {
    let word = word.to_str().unwrap().as_bytes();
    let all = std::fs::read_dir("/proc").unwrap().filter_map(Result::ok);
    let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid: &u32| {
        let cmdline = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        cmdline.split(|byte| *byte == 0).any(|found| found == word)
    })
    .collect()
}

/// A place with a stand-in, which asks here what to do.
pub(crate) struct StandIn {
    folder: TempDir,
    listener: UnixListener,
}

impl StandIn {
    pub(crate) fn new() -> Self {
        let folder = TempDir::with_prefix("vmferry-stand-in-").unwrap();
        let listener = UnixListener::bind(folder.path().join(SOCKET)).unwrap();
        listener.set_nonblocking(true).unwrap();
        let this = Self { folder, listener };
        symlink(env!("CARGO_BIN_EXE_vmferry-stand-in"), this.path()).unwrap();
        this
    }

    /// Where it is.
    pub(crate) fn path(&self) -> PathBuf {
        self.beside("new")
    }

    /// Where else there is room.
    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// A path in the same folder.
    pub(crate) fn beside(&self, name: &str) -> PathBuf {
        self.folder().join(name)
    }

    /// Waits until it asks what to do.
    pub(crate) fn arrives(&self) -> Arrived {
        let stream = until("the stand-in asks", || match self.listener.accept() {
            Ok((stream, _)) => Some(stream),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                None
            }
        });
        stream.set_nonblocking(false).unwrap();
        let mut line = String::new();
        BufReader::new(&stream).read_line(&mut line).unwrap();
        Arrived {
            arrival: serde_json::from_str(&line).unwrap(),
            stream,
        }
    }

    /// The archive that it has put aside.
    pub(crate) fn archive(&self) -> Vec<u8> {
        let path = self.beside(ARCHIVE_COPY);
        until("the archive is there", || std::fs::read(&path).ok())
    }
}

/// A stand-in that waits to be told.
pub(crate) struct Arrived {
    pub(crate) arrival: Arrival,
    stream: UnixStream,
}

impl Arrived {
    pub(crate) fn go(mut self, deed: &Deed) {
        let line = serde_json::to_string(deed).unwrap();
        // It may have been killed.
        let _ = writeln!(self.stream, "{line}");
    }
}
