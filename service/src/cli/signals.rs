//! Signals as values, so that every way out of a command goes through its clean-up.

use std::cell::Cell;
use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

use tokio::signal::unix::{Signal as Stream, SignalKind, signal};

/// A signal that somebody sent us.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Signal {
    /// SIGINT: Ctrl-C, or another program that wants us to end.
    Interrupt,
    /// SIGTERM.
    Terminate,
    /// SIGHUP: the terminal is gone.
    HangUp,
    /// SIGCONT: we were stopped, and others have written to the terminal meanwhile.
    Continue,
}

impl Signal {
    const ALL: [Self; 4] = [
        Self::Interrupt,
        Self::Terminate,
        Self::HangUp,
        Self::Continue,
    ];

    /// Its number on Linux.
    pub(super) fn number(self) -> u8 {
        match self {
            Self::Interrupt => 2,
            Self::Terminate => 15,
            Self::HangUp => 1,
            Self::Continue => 18,
        }
    }

    fn stream(self) -> io::Result<Stream> {
        signal(SignalKind::from_raw(i32::from(self.number())))
    }
}

/// The signals of this process from now on, which then do no longer end it.
#[derive(Debug)]
pub(super) struct Signals {
    arrived: Receiver<Signal>,
    asked_to_end: Cell<bool>,
}

impl Signals {
    /// Takes them over.
    ///
    /// # Errors
    /// No thread, or the kernel refuses.
    pub(super) fn take() -> io::Result<Self> {
        let (tell, arrived) = channel();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let streams = {
            let _entered = runtime.enter();
            Signal::ALL
                .into_iter()
                .map(|signal| Ok((signal, signal.stream()?)))
                .collect::<io::Result<Vec<_>>>()?
        };
        thread::Builder::new()
            .name("signals".to_owned())
            .spawn(move || {
                let tasks = streams
                    .into_iter()
                    .map(|(signal, stream)| pass_on(signal, stream, tell.clone()));
                runtime.block_on(async {
                    let mut all = tokio::task::JoinSet::new();
                    for task in tasks {
                        all.spawn(task);
                    }
                    all.join_all().await;
                });
            })?;
        Ok(Self {
            arrived,
            asked_to_end: Cell::new(false),
        })
    }

    /// The next signal, if one comes within `patience`.
    pub(super) fn next(&self, patience: Duration) -> Option<Signal> {
        let next = match self.arrived.recv_timeout(patience) {
            Ok(signal) => Some(signal),
            Err(RecvTimeoutError::Timeout) => None,
            // Without its thread there are no signals, but the time passes all the same.
            Err(RecvTimeoutError::Disconnected) => {
                thread::sleep(patience);
                None
            }
        };
        if next.is_some_and(|signal| signal != Signal::Continue) {
            self.asked_to_end.set(true);
        }
        next
    }

    /// Whether any signal so far asked us to end.
    pub(super) fn asked_to_end(&self) -> bool {
        while self.next(Duration::ZERO).is_some() {}
        self.asked_to_end.get()
    }
}

async fn pass_on(signal: Signal, mut stream: Stream, tell: Sender<Signal>) {
    while stream.recv().await.is_some() && tell.send(signal).is_ok() {}
}
