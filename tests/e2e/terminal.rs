//! A program at a terminal of its own: a pseudo terminal whose screen is kept as a person would see it.
//!
//! Only what our program writes is understood; anything else on the screen fails the test, and so does a line that wraps.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Child, Command};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use rustix::fs::OFlags;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::harness::{program, until};

const ROWS: usize = 24;

/// What stands on the screen.
#[derive(Clone, Debug, Default)]
pub(crate) struct Screen {
    columns: usize,
    rows: Vec<Vec<char>>,
    row: usize,
    column: usize,
    /// Bytes of a character or command that is not complete.
    open: Vec<u8>,
    /// Everything that was written.
    pub(crate) raw: Vec<u8>,
    /// What was not understood, or wrapped.
    pub(crate) faults: Vec<String>,
}

impl Screen {
    /// Lines without the blank ones at the end.
    pub(crate) fn lines(&self) -> Vec<String> {
        let text = |row: &Vec<char>| row.iter().collect::<String>().trim_end().to_owned();
        let mut lines: Vec<_> = self.rows.iter().map(text).collect();
        while lines.last().is_some_and(String::is_empty) {
            lines.pop();
        }
        lines
    }

    pub(crate) fn shows(&self, part: &str) -> bool {
        self.lines().iter().any(|line| line.contains(part))
    }

    /// Where the next character goes.
    pub(crate) fn cursor(&self) -> (usize, usize) {
        (self.row, self.column)
    }

    fn take(&mut self, bytes: &[u8]) {
        self.raw.extend_from_slice(bytes);
        for byte in bytes {
            self.open.push(*byte);
            if self.open[0] == 0x1b {
                let complete = self.open.len() > 2 && byte.is_ascii_alphabetic();
                if complete {
                    let command = std::mem::take(&mut self.open);
                    self.obey(&String::from_utf8_lossy(&command[1..]));
                }
            } else if let Ok(text) = std::str::from_utf8(&self.open) {
                let char = text.chars().next().unwrap();
                self.open.clear();
                self.put(char);
            }
        }
    }

    fn put(&mut self, char: char) {
        match char {
            '\r' => self.column = 0,
            '\n' => self.row += 1,
            _ if char.is_control() => self.faults.push(format!("control character {char:?}")),
            _ => {
                if self.column >= self.columns {
                    self.faults.push(format!("wraps: {:?}", self.lines()));
                    (self.row, self.column) = (self.row + 1, 0);
                }
                let row = self.row_at(self.row);
                row.push(char);
            }
        }
    }

    /// The row, filled up to the cursor, which moves on by one; what stood behind it stays.
    fn row_at(&mut self, at: usize) -> RowEnd<'_> {
        while self.rows.len() <= at {
            self.rows.push(Vec::new());
        }
        let row = &mut self.rows[at];
        while row.len() <= self.column {
            row.push(' ');
        }
        self.column += 1;
        RowEnd(row, self.column - 1)
    }

    fn obey(&mut self, command: &str) {
        let count = |text: &str| text.parse::<usize>().unwrap_or(1);
        let Some(body) = command.strip_prefix('[') else {
            self.faults.push(format!("command {command:?}"));
            return;
        };
        let (arguments, verb) = body.split_at(body.len() - 1);
        match verb {
            "A" => self.row = self.row.saturating_sub(count(arguments)),
            "K" if arguments.is_empty() => {
                if let Some(row) = self.rows.get_mut(self.row) {
                    row.truncate(self.column);
                }
            }
            "J" if arguments.is_empty() => {
                self.rows.truncate(self.row + 1);
                if let Some(row) = self.rows.get_mut(self.row) {
                    row.truncate(self.column);
                }
            }
            "m" => {}
            _ => self.faults.push(format!("command {command:?}")),
        }
    }
}

/// A cell to write to.
struct RowEnd<'a>(&'a mut Vec<char>, usize);

impl RowEnd<'_> {
    fn push(self, char: char) {
        self.0[self.1] = char;
    }
}

/// The program at a terminal. Dropping it ends it.
pub(crate) struct Terminal {
    child: Child,
    master: File,
    screen: Arc<Mutex<Screen>>,
    reader: Option<JoinHandle<()>>,
}

impl Terminal {
    /// Starts our program with these arguments.
    pub(crate) fn start(columns: u16, arguments: &[&str], environment: &[(&str, &str)]) -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap().into_string().unwrap();
        set_columns(&master, columns);
        let slave = File::options()
            .read(true)
            .write(true)
            .custom_flags(OFlags::NOCTTY.bits().cast_signed())
            .open(name)
            .unwrap();
        // It becomes the terminal of a session of its own, so that a Ctrl-C that is typed reaches nobody else.
        let child = Command::new("setsid")
            .arg("--ctty")
            .arg(program().get_program())
            .args(arguments)
            .env("TERM", "xterm-256color")
            .env_remove("NO_COLOR")
            .envs(environment.iter().copied())
            .stdin(slave.try_clone().unwrap())
            .stdout(slave.try_clone().unwrap())
            .stderr(slave)
            .spawn()
            .unwrap();
        let screen = Arc::new(Mutex::new(Screen {
            columns: usize::from(columns),
            ..Screen::default()
        }));
        let mut master = File::from(master);
        let (shown, mut from) = (Arc::clone(&screen), master.try_clone().unwrap());
        let reader = thread::spawn(move || {
            let mut bytes = [0; 4096];
            // The kernel says EIO when the program has gone.
            while let Ok(count @ 1..) = from.read(&mut bytes) {
                shown.lock().unwrap().take(&bytes[..count]);
            }
        });
        master.flush().unwrap();
        Self {
            child,
            master,
            screen,
            reader: Some(reader),
        }
    }

    /// What stands there now.
    pub(crate) fn screen(&self) -> Screen {
        self.screen.lock().unwrap().clone()
    }

    /// Waits until it shows `part`.
    pub(crate) fn wait_for(&mut self, part: &str) -> Screen {
        until(format_args!("{part:?} on the screen"), || {
            let screen = self.screen();
            if screen.shows(part) {
                return Some(screen);
            }
            let ended = self.child.try_wait().unwrap();
            assert!(
                ended.is_none(),
                "{ended:?} without {part:?}: {:#?}",
                screen.lines()
            );
            None
        })
    }

    /// Types.
    pub(crate) fn type_in(&mut self, keys: &str) {
        self.master.write_all(keys.as_bytes()).unwrap();
    }

    /// Makes it wider or narrower. What stands there is not reflowed.
    pub(crate) fn resize(&mut self, columns: u16) {
        self.screen.lock().unwrap().columns = usize::from(columns);
        set_columns(&self.master, columns);
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for its end: the exit status and what stands there then.
    pub(crate) fn wait_end(&mut self) -> (i32, Screen) {
        let status = until("the program ends", || self.child.try_wait().unwrap());
        if let Some(reader) = self.reader.take() {
            reader.join().unwrap();
        }
        (status.code().unwrap_or(-1), self.screen())
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // Both fail only if it has gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn set_columns(terminal: impl std::os::fd::AsFd, columns: u16) {
    let size = Winsize {
        ws_row: u16::try_from(ROWS).unwrap(),
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(terminal, size).unwrap();
}
