//! Asking the new program, before anything is risked: a copy of it is started with the words of the command and a question, looks
//! whether it would go on with the VM, says so and ends. The guest runs meanwhile.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use vmferry_cpr::envelope;
use vmferry_cpr::letter::{LETTER_BYTES_MAX, Leg, Letter};
use vmferry_transport::wire::hello::Hello;

use super::Program;

/// The option that makes a program answer. No other program takes it for something else.
pub const OPTION: &str = "--x-cpr-exec-asked";
/// What a program says that would go on; the migration id follows.
const YES: &str = "vmferry-cpr-exec yes";
/// Most bytes of an answer that are looked at.
const ANSWER_BYTES_MAX: u64 = 8 << 10;
/// How often a question is looked at that nobody may want to know the answer of any more.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Puts the question to `program`, started with `words`. It may take `patience`, or as long as `wanted`.
///
/// # Errors
/// It would not go on with the VM, in its own words; or it is no such program.
pub fn ask(
    program: &Program,
    words: &[OsString],
    question: &Letter,
    patience: Duration,
    wanted: &AtomicBool,
) -> anyhow::Result<()> {
    let path = program.path().display();
    let question_file = envelope::seal_letter(question)?;
    let (answer, theirs) = pipe()?;
    let (excuse, their_excuse) = pipe()?;
    let mut command = Command::new(program.path());
    if let Some((name, rest)) = words.split_first() {
        command.arg0(name).args(rest);
    }
    command
        .arg(OPTION)
        .stdin(Stdio::from(question_file))
        .stdout(Stdio::from(theirs))
        .stderr(Stdio::from(their_excuse))
        .process_group(0);
    let mut child = command
        .spawn()
        .with_context(|| format!("{path} cannot be started"))?;
    // Our copies of the other ends.
    drop(command);
    let waited = wait(&mut child, patience, wanted);
    end(&mut child);
    waited.with_context(|| format!("{path} was asked whether it would go on with the VM"))?;
    let status = child.wait()?;
    let said = read(answer);
    let expected = yes(question);
    if status.success() && said.lines().any(|line| line == expected) {
        return Ok(());
    }
    match reason(&read(excuse)) {
        Some(reason) => bail!("{path} would not go on with the VM: {reason}"),
        None => bail!(
            "{path} is no program that could go on with the VM: it does not answer ({status})"
        ),
    }
}

/// Of what a program has said on its way out, the line that tells why: its last, unless what follows the error is advice.
fn reason(said: &str) -> Option<&str> {
    let mut lines = said.lines().map(str::trim);
    let error = lines.clone().find_map(|line| line.strip_prefix("error: "));
    let last = || lines.rfind(|line| !line.is_empty());
    let line = error.or_else(last)?;
    Some(line.strip_prefix("vmferry: ").unwrap_or(line))
}

fn yes(question: &Letter) -> String {
    format!("{YES} {}", question.id)
}

/// A pipe whose reading end never blocks.
fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let (ours, theirs) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    rustix::io::ioctl_fionbio(&ours, true)?;
    Ok((ours, theirs))
}

/// What has come, as far as it is of interest.
fn read(pipe: OwnedFd) -> String {
    let mut bytes = Vec::new();
    // Ends with an error when no more is there and somebody still has the other end.
    let _ = File::from(pipe)
        .take(ANSWER_BYTES_MAX)
        .read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

fn wait(child: &mut Child, patience: Duration, wanted: &AtomicBool) -> anyhow::Result<()> {
    let pid = Pid::from_child(child);
    let handle = pidfd_open(pid, PidfdFlags::empty())?;
    let deadline = Instant::now() + patience;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        ensure!(
            !left.is_zero(),
            "it took longer than {} s",
            patience.as_secs()
        );
        ensure!(wanted.load(Ordering::Acquire), "the migration is over");
        let step = Timespec::try_from(left.min(LOOK_EVERY))?;
        match poll(&mut [PollFd::new(&handle, PollFlags::IN)], Some(&step)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Nothing of it is to stay: not itself, nor what it may have started. The number is not free before it is waited for.
fn end(child: &mut Child) {
    // Fails if all have ended.
    let _ = kill_process_group(Pid::from_child(child), Signal::KILL);
    let _ = child.kill();
}

/// The side of the new program: reads the question from the standard input, lets `judge` think about it, and answers.
///
/// # Errors
/// Why it would not go on, for the one who asks.
pub fn answer(judge: impl FnOnce(&Letter, &Hello) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let stdin = io::stdin();
    let bytes = envelope::unseal("standard input", stdin.as_fd(), LETTER_BYTES_MAX)
        .context("nobody asks properly")?;
    let letter = Letter::decode(&bytes)?;
    ensure!(letter.leg == Leg::Asked, "the letter is no question");
    let hello = Hello::decode(&letter.account).context("what the old program says of the VM")?;
    judge(&letter, &hello)?;
    let mut out = io::stdout();
    io::Write::write_all(&mut out, format!("{}\n", yes(&letter)).as_bytes())?;
    io::Write::flush(&mut out)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use vmferry_cpr::manifest::Manifest;
    use vmferry_transport::units::MigrationId;

    use super::*;

    fn question() -> Letter {
        Letter {
            leg: Leg::Asked,
            pid: 1,
            id: MigrationId([7; 16]),
            software: "old".to_owned(),
            manifest: Manifest::default(),
            numbers: Vec::new(),
            words: Vec::new(),
            reason: String::new(),
            account: Vec::new(),
        }
    }

    fn shell(script: &str, patience: Duration, wanted: bool) -> anyhow::Result<()> {
        let program = Program::find(OsStr::new("sh")).unwrap();
        let words = ["sh", "-c", script].map(OsString::from);
        let wanted = AtomicBool::new(wanted);
        ask(&program, &words, &question(), patience, &wanted)
    }

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn only_the_right_word_and_a_good_end_are_a_yes() {
        let yes = format!("echo noise; echo {}", yes(&question()));
        shell(&yes, LONG, true).unwrap();
        for (script, part) in [
            ("true".to_owned(), "does not answer (exit status: 0)"),
            (format!("{yes}; exit 3"), "does not answer (exit status: 3)"),
            ("echo vmferry-cpr-exec yes".to_owned(), "does not answer"),
            (
                "echo first >&2; echo 'no vhost here' >&2; exit 1".to_owned(),
                "with the VM: no vhost here",
            ),
            ("kill -9 $$".to_owned(), "signal: 9"),
        ] {
            let error = shell(&script, LONG, true).unwrap_err();
            assert!(format!("{error:#}").contains(part), "{script}: {error:#}");
        }
    }

    #[test]
    fn the_line_that_tells_why_is_found() {
        assert_eq!(reason("noise\nvmferry: no KVM\n\n"), Some("no KVM"));
        assert_eq!(
            reason("error: bad option\n\nUsage: x\n"),
            Some("bad option")
        );
        assert_eq!(reason(" \n"), None);
    }

    #[test]
    fn a_program_that_does_not_end_is_ended() {
        let error = shell("sleep 1000 & sleep 1000", Duration::from_millis(50), true).unwrap_err();
        assert!(format!("{error:#}").contains("longer than"), "{error:#}");
        let error = shell(
            "while :; do echo and; done",
            Duration::from_millis(50),
            true,
        )
        .unwrap_err();
        assert!(format!("{error:#}").contains("longer than"), "{error:#}");
        let error = shell("sleep 1000", LONG, false).unwrap_err();
        assert!(format!("{error:#}").contains("is over"), "{error:#}");
    }
}
