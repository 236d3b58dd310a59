//! Who was told to end by a signal becomes no other program: an exec takes along whatever waits in the engine's queue, and with it the wish
//! that the process ends. So the handler itself notes that a signal has come, and nothing is asked of a thread that may be busy or hang.
//!
//! ```text
//!  signals are handled           [`Unhandled`]: they end the process at once                the next program handles them
//!  ----------------------------> has one come already? give up --> execve ----------------> --------------------------->
//!        noted, Event::Terminate                                          exec keeps the default action
//! ```

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, ensure};
use signal_hook::flag;
use tokio::signal::unix::SignalKind;

use super::call::{self, DefaultAction};

/// A signal to end has come. Signals are the process's, and so is this; it is never taken back.
static TOLD: AtomicBool = AtomicBool::new(false);

/// The signals that tell a VM's process to end.
fn signals_to_end() -> [SignalKind; 3] {
    [
        SignalKind::terminate(),
        SignalKind::interrupt(),
        SignalKind::hangup(),
    ]
}

/// From now on no signal that tells the process to end ends it, but is noted. Those whose handlers the engine is to add; a signal that the
/// process was started to ignore, as `nohup` does, is none of them and stays ignored.
///
/// # Errors
/// The kernel refuses.
pub(crate) fn note_signals() -> io::Result<Vec<SignalKind>> {
    let mut noted = Vec::new();
    for kind in signals_to_end() {
        if !call::is_ignored(kind.as_raw_value())? {
            flag::register(kind.as_raw_value(), &TOLD)?;
            noted.push(kind);
        }
    }
    Ok(noted)
}

/// Whether this process was told to end since its signals are noted.
pub(crate) fn was_told() -> bool {
    TOLD.load(Ordering::SeqCst)
}

/// It was not told to end.
///
/// # Errors
/// It was.
pub(crate) fn ensure_not() -> anyhow::Result<()> {
    ensure!(!was_told(), "the process was told to end");
    Ok(())
}

/// While this lives, a signal that tells the process to end does so at once, as the next program would find it. Made well before the exec:
/// a handler that has just begun on another thread has the time between to note its signal.
pub(super) struct Unhandled {
    /// Put back when dropped.
    _actions: Vec<DefaultAction>,
}

impl Unhandled {
    /// # Errors
    /// The kernel refuses.
    pub(super) fn new() -> anyhow::Result<Self> {
        let signals = signals_to_end().map(|kind| kind.as_raw_value());
        let actions = signals
            .into_iter()
            .filter_map(|signal| DefaultAction::of(signal).transpose());
        let actions: io::Result<_> = actions.collect();
        Ok(Self {
            _actions: actions.context("signals could not be left to the kernel")?,
        })
    }

    /// The last look before the exec.
    ///
    /// # Errors
    /// The process was told to end before this was made.
    pub(super) fn ensure_not_told(&self) -> anyhow::Result<()> {
        ensure_not()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, Output};
    use std::thread;
    use std::time::{Duration, Instant};

    use rustix::process::{Signal, getpid, kill_process};

    use super::super::{Program, WayBack};
    use super::*;

    /// Signals concern the whole process, so another one has them: the test itself, run again with this set.
    const CHILD: &str = "VMFERRY_TEST_TOLD";

    /// Runs the test of this name again; `None` in the one that was. SIGHUP is ignored there, as under `nohup`.
    pub(in super::super) fn again(name: &str) -> Option<Output> {
        if std::env::var_os(CHILD).is_some() {
            return None;
        }
        let mut command = Command::new("sh");
        command
            .args(["-c", "trap '' HUP; exec \"$@\"", "sh"])
            .arg(std::env::current_exe().unwrap())
            .args([name, "--exact", "--nocapture", "--test-threads=1"])
            .env(CHILD, "1");
        Some(command.output().unwrap())
    }

    /// In the child: tells it to end, and returns when that is noted.
    pub(in super::super) fn tell() {
        kill_process(getpid(), Signal::TERM).unwrap();
        let began = Instant::now();
        while !was_told() {
            assert!(began.elapsed() < Duration::from_secs(60), "nobody noted");
            thread::yield_now();
        }
    }

    /// Signals of this process that are ignored and that have handlers, as the kernel says.
    fn sets() -> [u64; 2] {
        let status = fs::read_to_string("/proc/self/status").unwrap();
        ["SigIgn:", "SigCgt:"].map(|name| {
            let mut lines = status.lines();
            let set = lines.find_map(|line| line.strip_prefix(name)).unwrap();
            u64::from_str_radix(set.trim(), 16).unwrap()
        })
    }

    fn has(set: u64, signal: Signal) -> bool {
        set >> (signal.as_raw() - 1) & 1 == 1
    }

    #[test]
    fn who_was_told_to_end_becomes_no_other_program_and_handles_signals_as_before() {
        let name = "succession::told::tests::who_was_told_to_end_becomes_no_other_program_and_handles_signals_as_before";
        if let Some(output) = again(name) {
            assert!(output.status.success(), "{output:?}");
            let text = String::from_utf8_lossy(&output.stdout);
            assert!(text.contains("1 passed"), "the child ran no test: {text}");
            return;
        }
        let noted = note_signals().unwrap();
        assert_eq!(noted, [SignalKind::terminate(), SignalKind::interrupt()]);
        let before = sets();
        let [ignored, handled] = before;
        assert!(has(ignored, Signal::HUP) && !has(handled, Signal::HUP));
        assert!(has(handled, Signal::TERM) && has(handled, Signal::INT));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new");
        fs::write(&path, "#!/nowhere/interpreter\n").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).unwrap();
        let program = Program::find(path.as_os_str()).unwrap();
        let there = || format!("{:#}", program.become_it(&["new".into()], 3));
        let back = || format!("{:#}", WayBack::nowhere().go("no such option"));

        assert!(there().contains("No such file"), "{}", there());
        assert!(back().contains("Permission denied"), "{}", back());
        assert_eq!(sets(), before);
        tell();
        for said in [there(), back()] {
            assert!(said.contains("told to end"), "{said}");
        }
        assert_eq!(sets(), before);
    }

    #[test]
    fn a_signal_that_comes_when_the_exec_is_near_ends_the_process_by_itself() {
        let name = "succession::told::tests::a_signal_that_comes_when_the_exec_is_near_ends_the_process_by_itself";
        if let Some(output) = again(name) {
            let signal = output.status.signal();
            assert_eq!(signal, Some(Signal::TERM.as_raw()), "{output:?}");
            return;
        }
        note_signals().unwrap();
        let unhandled = Unhandled::new().unwrap();
        unhandled.ensure_not_told().unwrap();
        // Whoever ignores a signal goes on doing so.
        kill_process(getpid(), Signal::HUP).unwrap();
        assert!(has(sets()[0], Signal::HUP));
        tell();
    }
}
