//! Follows a migration to its end, and lets the operator decide on Ctrl-C.
//!
//! The state is asked for again and again, which needs nothing of the VM but `query-migrate` and finds the way back after a break.
//! Nothing here waits longer than [`TICK`] without looking for signals: a VM that is slow to answer must not hold its operator.

mod interrupt;
mod screen;
mod summary;
mod view;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::{Value, json};

use super::client::{ClientError, QmpClient};
use super::record::Record;
use super::signals::{Signal, Signals};
use super::status::About;
use interrupt::{Decision, Interrupts};
use screen::{Display, JsonLines, Quiet};
use view::View;

pub(super) use interrupt::OnInterrupt;
pub(super) use screen::text_columns;
pub(super) use summary::summary;

/// First pause between two looks: small migrations take a tenth of a second.
const PAUSE_MIN: Duration = Duration::from_millis(10);
/// Longest pause.
const PAUSE_MAX: Duration = Duration::from_millis(100);
/// Longest wait without a look at signals and the keyboard.
const TICK: Duration = Duration::from_millis(50);
/// Longest silence of a VM before it counts as lost. Longer than the VM's own work ever takes.
const SILENCE_MAX: Duration = Duration::from_secs(120);
/// Time between two looks at the guest.
const ABOUT_EVERY: Duration = Duration::from_millis(500);
/// Connections in a row that may end without an answer.
const RECONNECTS_MAX: u32 = 3;

/// How to follow.
#[derive(Debug)]
pub(super) struct Options {
    /// Socket of the VM, for coming back after a break.
    pub(super) qmp: PathBuf,
    /// What to show.
    pub(super) show: Show,
    /// What Ctrl-C does.
    pub(super) on_interrupt: OnInterrupt,
    /// Tell about the guest too, and wait for a migration if there was none so far.
    pub(super) look_around: bool,
}

/// What to show while it lasts.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Show {
    /// Nothing.
    Nothing,
    /// Progress, on standard error.
    Progress,
    /// A JSON object per line, on standard output.
    Json,
}

/// Why following ended.
#[derive(Debug)]
pub(super) enum Outcome {
    /// The migration is over.
    Ended(Record),
    /// This signal, or an answer that stands for it.
    Detached(u8),
    /// The VM cannot be asked any more, so that the outcome is not known; what it said last.
    Lost(ClientError, Record),
}

/// Follows the migration of the VM behind `client` until one of the outcomes.
pub(super) fn follow(client: &mut QmpClient, signals: &Signals, options: &Options) -> Outcome {
    let mut follower = Follower {
        client,
        signals,
        options,
        display: match options.show {
            Show::Nothing => Box::new(Quiet),
            Show::Progress => screen::display(false),
            Show::Json => Box::new(JsonLines::default()),
        },
        interrupts: Interrupts::new(options.on_interrupt),
        view: View::new(&options.qmp),
        orders: Vec::new(),
        about: About::default(),
        about_due: Instant::now(),
    };
    let outcome = follower.run();
    if follower.interrupts.is_asking() {
        follower.display.asked(false);
    }
    follower.display.finish();
    match outcome {
        Ok(record) => Outcome::Ended(record),
        Err(Stop::Detached(signal)) => Outcome::Detached(signal),
        Err(Stop::Lost(error)) => Outcome::Lost(error, follower.view.record().clone()),
    }
}

/// Why there is nothing more to follow.
enum Stop {
    Detached(u8),
    Lost(ClientError),
}

impl From<ClientError> for Stop {
    fn from(error: ClientError) -> Self {
        Self::Lost(error)
    }
}

struct Follower<'a> {
    client: &'a mut QmpClient,
    signals: &'a Signals,
    options: &'a Options,
    display: Box<dyn Display>,
    interrupts: Interrupts,
    view: View,
    /// What the operator told the VM, until it has answered.
    orders: Vec<u64>,
    about: About,
    about_due: Instant,
}

impl Follower<'_> {
    fn run(&mut self) -> Result<Record, Stop> {
        let mut pause = PAUSE_MIN;
        let mut broken = 0;
        loop {
            match self.look() {
                Ok(()) => broken = 0,
                // The VM may have dropped us and live on: then it says so itself.
                Err(Stop::Lost(error @ ClientError::HungUp { .. })) if broken < RECONNECTS_MAX => {
                    broken += 1;
                    *self.client = QmpClient::connect(&self.options.qmp).map_err(|_| error)?;
                    self.orders.clear();
                    continue;
                }
                Err(stop) => return Err(stop),
            }
            self.show();
            let status = self.view.record().status();
            let over = if self.options.look_around {
                status.is_end()
            } else {
                status.is_idle()
            };
            if over {
                return Ok(self.view.record().clone());
            }
            self.attend(pause)?;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    /// Asks the VM for everything that is due.
    fn look(&mut self) -> Result<(), Stop> {
        if self.options.look_around && Instant::now() >= self.about_due {
            self.look_around()?;
            self.about_due = Instant::now() + ABOUT_EVERY;
        }
        let record = Record::new(self.ask("query-migrate")?);
        self.view.take(record, Instant::now());
        self.hear_about_orders()
    }

    fn look_around(&mut self) -> Result<(), Stop> {
        self.about.status = self.ask("query-status")?;
        if !self.about.no_workload {
            match self.ask("x-query-workload") {
                Ok(workload) => self.about.workload = Some(workload),
                Err(Stop::Lost(error)) if error.is_answer() => {
                    // A target has no workload before it has a guest; other VMMs never have one.
                    self.about.no_workload = matches!(error, ClientError::Missing { .. });
                    self.about.workload = None;
                }
                Err(stop) => return Err(stop),
            }
        }
        self.view.about = self.about.lines(&self.client.name(), &self.options.qmp);
        self.view.guest = self.about.json();
        Ok(())
    }

    /// Asks one thing. Signals and answers of the operator are attended to meanwhile.
    fn ask(&mut self, command: &str) -> Result<Value, Stop> {
        let id = self.client.send(command, json!({}))?;
        let since = Instant::now();
        loop {
            if let Some(answer) = self.client.poll(id, TICK)? {
                return Ok(answer);
            }
            if since.elapsed() > SILENCE_MAX {
                let path = self.options.qmp.clone();
                return Err(ClientError::Silent { path }.into());
            }
            self.view.silent(since.elapsed());
            self.show();
            self.attend(Duration::ZERO)?;
        }
    }

    fn show(&mut self) {
        self.display.update(&self.view);
    }

    /// Does what signals and the keyboard want, for as long as `patience`.
    fn attend(&mut self, patience: Duration) -> Result<(), Stop> {
        let until = Instant::now() + patience;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let decision = match self.signals.next(left.min(TICK)) {
                Some(Signal::Continue) => {
                    self.display.forget();
                    self.interrupts.withdraw();
                    Decision::Watch
                }
                Some(signal) => self.interrupts.signal(signal),
                None => self.keyboard(),
            };
            self.act(decision)?;
            if left.is_zero() {
                return Ok(());
            }
        }
    }

    /// What was typed, if a question is open.
    fn keyboard(&mut self) -> Decision {
        if !self.interrupts.is_asking() {
            return Decision::Watch;
        }
        match typed_line() {
            None => Decision::Watch,
            Some(line) => {
                self.display.asked(line.ends_with('\n'));
                let may_continue = self.may_continue();
                self.interrupts.answer(&line, may_continue)
            }
        }
    }

    fn may_continue(&self) -> bool {
        self.view.record().status().name() == "pre-switchover"
    }

    fn act(&mut self, decision: Decision) -> Result<(), Stop> {
        match decision {
            Decision::Watch | Decision::Withdraw => {}
            Decision::Ask => {
                let question = self.interrupts.question(self.may_continue());
                self.display.ask(question);
            }
            Decision::Cancel => self.order("migrate_cancel", json!({}))?,
            Decision::Continue => {
                self.order("migrate-continue", json!({ "state": "pre-switchover" }))?;
            }
            Decision::Detach(signal) => return Err(Stop::Detached(signal)),
        }
        Ok(())
    }

    fn order(&mut self, command: &str, arguments: Value) -> Result<(), Stop> {
        self.orders.push(self.client.send(command, arguments)?);
        Ok(())
    }

    /// Tells which orders the VM has refused.
    fn hear_about_orders(&mut self) -> Result<(), Stop> {
        let mut open = Vec::new();
        for id in std::mem::take(&mut self.orders) {
            match self.client.poll(id, Duration::ZERO) {
                Ok(None) => open.push(id),
                Ok(Some(_)) => {}
                Err(error) if error.is_answer() => {
                    let said = super::output::chain(&error);
                    self.display.note(&said);
                }
                Err(error) => return Err(error.into()),
            }
        }
        self.orders = open;
        Ok(())
    }
}

/// A line from the keyboard if one is there; the terminal hands them out whole. An end of input is an empty one.
fn typed_line() -> Option<String> {
    let stdin = std::io::stdin();
    let mut wanted = [PollFd::new(&stdin, PollFlags::IN)];
    let ready = poll(&mut wanted, Some(&Timespec::default())).unwrap_or(0);
    if ready == 0 {
        return None;
    }
    let mut line = [0; 256];
    let count = rustix::io::read(&stdin, &mut line).unwrap_or(0);
    Some(String::from_utf8_lossy(&line[..count]).into_owned())
}
