//! A thread for what blocks: stopping vCPUs, dirty logs, saving and loading state, hashing. Jobs run one after the other, in the order
//! they were given; each tells the engine its result as an event.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::mpsc;
use std::thread;

use super::event::{Event, Events};

type Job = Box<dyn FnOnce() + Send>;

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
    /// A job that panics ends the thread, and the engine hears of it.
    pub(super) fn start(events: Events) -> io::Result<Self> {
        let (jobs, todo) = mpsc::channel::<Job>();
        let work = move || {
            for job in todo {
                if let Err(panic) = catch_unwind(AssertUnwindSafe(job)) {
                    // The engine ends only with the process.
                    let _ = events.send(Event::JobPanicked);
                    resume_unwind(panic);
                }
            }
        };
        thread::Builder::new().name("vm-jobs".into()).spawn(work)?;
        Ok(Self { jobs })
    }

    /// Queues a job.
    ///
    /// # Panics
    /// If the thread has died, which only a panicking job can cause; the panic was printed.
    pub(super) fn run(&self, job: impl FnOnce() + Send + 'static) {
        // What a job logs belongs to the migration that it is done for.
        let span = tracing::Span::current();
        self.jobs
            .send(Box::new(move || span.in_scope(job)))
            .expect("a job has panicked");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_engine_hears_of_a_job_that_has_panicked() {
        let (events, mut queue) = tokio::sync::mpsc::unbounded_channel();
        let jobs = JobThread::start(events).unwrap();
        jobs.run(|| panic!("on purpose"));
        assert!(matches!(queue.blocking_recv(), Some(Event::JobPanicked)));
        assert!(queue.blocking_recv().is_none(), "the thread works on");
    }
}
