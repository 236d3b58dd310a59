//! Who may become the old program again, and when: whoever finds a fault while it is certain that the guest does not run, only once, and
//! nobody who was told to end. The thread that keeps house may be the one that hangs, so a thread of its own watches the time (I6).

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use super::{WayBack, told};

/// How the process ends that was told to while its main thread hangs.
const ENDED_CODE: i32 = 1;

/// In how many parts the time is watched.
const LOOKS: u32 = 60;

/// The one way back, for whoever finds first that it is needed.
#[derive(Clone, Debug, Default)]
pub struct WayBackKeeper(Arc<Mutex<Kept>>);

#[derive(Debug, Default)]
struct Kept {
    way_back: Option<WayBack>,
    /// Keeps the watchdog waiting.
    watchdog: Option<mpsc::Sender<()>>,
    /// The guest may run, or the process was told to end.
    over: bool,
}

impl WayBackKeeper {
    /// Keeps it; or there is none.
    pub fn new(way_back: Option<WayBack>) -> Self {
        Self(Arc::new(Mutex::new(Kept {
            way_back,
            ..Kept::default()
        })))
    }

    /// Takes it, to go.
    pub fn take(&self) -> Option<WayBack> {
        self.lock().way_back.take()
    }

    /// The guest is about to run, and nobody goes back any more who does not know that it has not. Waits for whoever is just going, which
    /// ends only if that fails.
    pub fn let_go(&self) -> Option<WayBack> {
        let mut kept = self.lock();
        (kept.over, kept.watchdog) = (true, None);
        kept.way_back.take()
    }

    /// Runs the new program: whatever error it ends with before its guest may run, a panic included, leads back to the old one.
    ///
    /// # Errors
    /// The program's, and there is no way back.
    pub fn guard(
        &self,
        program: impl FnOnce() -> anyhow::Result<ExitCode>,
    ) -> anyhow::Result<ExitCode> {
        // A mistake of the new program must not cost the guest.
        let ended = catch_unwind(AssertUnwindSafe(program));
        let ended = ended.unwrap_or_else(|_| Err(anyhow::anyhow!("the new program panicked")));
        match (ended, self.take()) {
            (Err(error), Some(way_back)) => Err(way_back.go(&format!("{error:#}"))),
            (ended, _) => ended,
        }
    }

    /// Has a thread go back that waits for nothing else, if the guest is not about to run `within` this time.
    ///
    /// # Errors
    /// There is no thread for it.
    pub fn watch(&self, within: Duration) -> std::io::Result<()> {
        let (sender, ended) = mpsc::channel();
        self.lock().watchdog = Some(sender);
        let keeper = self.clone();
        let watch = move || {
            // Whoever stood still with the whole process has not been late: that counts as one look.
            let late = |_| ended.recv_timeout(within / LOOKS) == Err(RecvTimeoutError::Timeout);
            if (0..LOOKS).all(late) {
                keeper.late(within);
            }
        };
        thread::Builder::new()
            .name("vm-way-back".into())
            .spawn(watch)?;
        Ok(())
    }

    fn late(&self, within: Duration) {
        // Held while it goes: the guest must not begin to run meanwhile.
        let mut kept = self.lock();
        if kept.over {
            return;
        }
        let why = format!(
            "the state of the guest was not loaded within {} s",
            within.as_secs()
        );
        let Some(way_back) = kept.way_back.take() else {
            tracing::error!("{why}, and there is no way back; it is still waited for");
            return;
        };
        let error = way_back.go(&why);
        tracing::error!(error = format!("{error:#}"), "no way back");
        if told::was_told() {
            // Nobody else may be there to hear it.
            std::process::exit(ENDED_CODE);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::super::told::tests::{again, tell};
    use super::*;

    #[test]
    fn whoever_finds_a_fault_goes_back_and_only_once() {
        let keeper = WayBackKeeper::new(Some(WayBack::nowhere()));
        assert!(keeper.clone().take().is_some());
        assert!(keeper.take().is_none() && keeper.let_go().is_none());
    }

    #[test]
    fn a_program_that_fails_or_panics_goes_back_and_says_why() {
        let (fail, panic): (fn() -> _, fn() -> _) = (
            || Err(anyhow::anyhow!("no such option")),
            || panic!("on purpose"),
        );
        for (program, why) in [
            (fail, "no such option"),
            (panic, "the new program panicked"),
        ] {
            let keeper = WayBackKeeper::new(Some(WayBack::nowhere()));
            let error = format!("{:#}", keeper.guard(program).unwrap_err());
            assert!(error.contains("cannot go on either"), "{error}");
            assert!(error.contains(why), "{error}");
            assert!(keeper.take().is_none());
        }
    }

    #[test]
    fn a_program_that_fails_when_its_guest_may_run_or_was_told_to_end_does_not_go_back() {
        let keeper = WayBackKeeper::new(Some(WayBack::nowhere()));
        let program = || {
            drop(keeper.let_go());
            panic!("on purpose")
        };
        let error = format!("{:#}", keeper.guard(program).unwrap_err());
        assert_eq!(error, "the new program panicked");
    }

    #[test]
    fn who_is_late_goes_back_whatever_its_main_thread_does() {
        let keeper = WayBackKeeper::new(Some(WayBack::nowhere()));
        keeper.watch(Duration::from_millis(1)).unwrap();
        let began = std::time::Instant::now();
        while keeper.lock().way_back.is_some() {
            assert!(began.elapsed() < Duration::from_secs(60), "nobody goes");
            thread::yield_now();
        }
    }

    #[test]
    fn nobody_watches_a_guest_that_may_run() {
        let keeper = WayBackKeeper::new(Some(WayBack::nowhere()));
        keeper.watch(Duration::from_secs(3600)).unwrap();
        let held = keeper.let_go();
        assert!(held.is_some() && keeper.take().is_none());
        let began = std::time::Instant::now();
        // The thread's copy is gone with it.
        while Arc::strong_count(&keeper.0) > 1 {
            assert!(began.elapsed() < Duration::from_secs(60), "it watches on");
            thread::yield_now();
        }
        // One that was about to go when the guest was let go.
        *keeper.lock() = Kept {
            way_back: held,
            over: true,
            watchdog: None,
        };
        keeper.late(Duration::ZERO);
        assert!(keeper.take().is_some());
    }

    #[test]
    fn who_is_late_and_was_told_to_end_ends_though_its_main_thread_hangs() {
        let name = "succession::keeper::tests::who_is_late_and_was_told_to_end_ends_though_its_main_thread_hangs";
        if let Some(output) = again(name) {
            assert_eq!(output.status.code(), Some(ENDED_CODE), "{output:?}");
            return;
        }
        told::note_signals().unwrap();
        tell();
        let keeper = WayBackKeeper::new(Some(WayBack::nowhere()));
        keeper.watch(Duration::from_millis(1)).unwrap();
        thread::sleep(Duration::from_secs(60));
        panic!("nobody has ended this process");
    }
}
