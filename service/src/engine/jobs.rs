//! A thread for what blocks: stopping vCPUs, dirty logs, saving and loading state, hashing. Jobs run one after the other, in the order
//! they were given; each tells the engine its result as an event. One that panics costs what it was about, and not the guest: the next
//! ones are done, and what it owed the engine is paid by whoever was named for that.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::mpsc;
use std::thread;

use super::event::{Event, Events};
use crate::machine::MachineError;

type Job = Box<dyn FnOnce() + Send>;

/// Why a job has failed that panicked.
pub(super) const PANICKED: &str =
    "a part of this program panicked, and has said more on standard error";

/// The same, as an error of the machine.
pub(super) fn panicked() -> MachineError {
    MachineError::Config(PANICKED.to_owned())
}

/// Runs blocking `work` on a thread of its own: for what may take long or for ever, and would hold up other jobs.
///
/// # Errors
/// A text, when there is no thread for it or it panicked.
pub(super) async fn off_thread<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, String> {
    let (done, result) = tokio::sync::oneshot::channel();
    thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            // Nobody waiting any more is fine: the result is dropped here.
            let _ = done.send(work());
        })
        .map_err(|error| format!("no thread: {error}"))?;
    result
        .await
        .map_err(|_| "the helper thread panicked".to_owned())
}

/// The thread. Ends when the handle is dropped and the last job is done.
#[derive(Debug)]
pub(super) struct JobThread {
    jobs: mpsc::Sender<Job>,
}

impl JobThread {
    /// Jobs that panic tell `events` so.
    pub(super) fn start(events: Events) -> io::Result<Self> {
        let (jobs, todo) = mpsc::channel::<Job>();
        let work = move || {
            for job in todo {
                if catch_unwind(AssertUnwindSafe(job)).is_err() {
                    // The engine ends only with the process.
                    let _ = events.send(Event::JobPanicked);
                }
            }
        };
        thread::Builder::new().name("vm-jobs".into()).spawn(work)?;
        Ok(Self { jobs })
    }

    /// Queues a job that nobody waits for.
    pub(super) fn run(&self, job: impl FnOnce() + Send + 'static) {
        // What a job logs belongs to the migration that it is done for.
        let span = tracing::Span::current();
        // The thread ends after this handle.
        let _ = self.jobs.send(Box::new(move || span.in_scope(job)));
    }

    /// Queues a job that somebody waits for. If it panics, `instead` is done: it tells those what they wait for, and must not do again what has
    /// panicked.
    pub(super) fn run_owing(
        &self,
        instead: impl FnOnce() + Send + 'static,
        job: impl FnOnce() + Send + 'static,
    ) {
        self.run(move || {
            if let Err(panic) = catch_unwind(AssertUnwindSafe(job)) {
                if catch_unwind(AssertUnwindSafe(instead)).is_err() {
                    tracing::error!(
                        "what a job owed that has panicked is not paid; somebody waits in vain"
                    );
                }
                resume_unwind(panic);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_a_job_that_has_panicked_the_engine_hears_of_it_and_the_next_is_done() {
        let (events, mut queue) = tokio::sync::mpsc::unbounded_channel();
        let jobs = JobThread::start(events.clone()).unwrap();
        jobs.run(|| panic!("on purpose"));
        jobs.run(move || events.send(Event::Terminate).unwrap());
        assert!(matches!(queue.blocking_recv(), Some(Event::JobPanicked)));
        assert!(matches!(queue.blocking_recv(), Some(Event::Terminate)));
    }

    #[test]
    fn what_a_job_that_panicked_owes_is_paid_once_and_a_good_one_pays_itself() {
        let (events, mut queue) = tokio::sync::mpsc::unbounded_channel();
        let jobs = JobThread::start(events.clone()).unwrap();
        let pay = |id: &str| {
            let (events, id) = (events.clone(), id.to_owned());
            move || events.send(Event::Unplugging(id)).unwrap()
        };
        jobs.run_owing(pay("instead"), || panic!("on purpose"));
        jobs.run_owing(pay("twice"), pay("itself"));
        jobs.run(pay("end"));
        let mut heard = Vec::new();
        while heard.last().is_none_or(|last| last != "end") {
            match queue.blocking_recv() {
                Some(Event::Unplugging(id)) => heard.push(id),
                Some(Event::JobPanicked) => heard.push("panicked".to_owned()),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(heard, ["instead", "panicked", "itself", "end"]);
    }
}
