//! A thread for what blocks: stopping vCPUs, dirty logs, saving and loading state, hashing. Jobs run one after the other, in the order
//! they were given; each tells the engine its result as an event.

use std::io;
use std::sync::mpsc;
use std::thread;

type Job = Box<dyn FnOnce() + Send>;

/// The thread. Ends when the handle is dropped and the last job is done.
#[derive(Debug)]
pub(super) struct JobThread {
    jobs: mpsc::Sender<Job>,
}

impl JobThread {
    pub(super) fn start() -> io::Result<Self> {
        let (jobs, todo) = mpsc::channel::<Job>();
        thread::Builder::new()
            .name("vm-jobs".into())
            .spawn(move || todo.into_iter().for_each(|job| job()))?;
        Ok(Self { jobs })
    }

    /// Queues a job.
    ///
    /// # Panics
    /// If the thread has died, which only a panicking job can cause; the panic was printed.
    pub(super) fn run(&self, job: impl FnOnce() + Send + 'static) {
        self.jobs.send(Box::new(job)).expect("a job has panicked");
    }
}
