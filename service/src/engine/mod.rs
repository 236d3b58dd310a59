//! The engine: one task that owns the guest, the settings, and the migration in either direction.
//!
//! ```text
//!   QMP clients --requests--+                       +--> Outgoing (source core, links, data threads, dirty log)
//!   vCPU threads --events---+--> queue --> Engine --+
//!   jobs, links, timers ----+                       +--> Incoming (target core, listener, links, data threads)
//! ```
//!
//! Everything that can happen is an `Event` in one queue, so nothing changes while something else decides. What blocks runs on the job
//! thread or on data threads and comes back as an event.

mod acceptor;
mod announcing;
mod armed_log;
mod arrival;
mod beginning;
mod clock;
mod commands;
mod data_links;
mod departure;
mod dirty_rate;
mod event;
mod guest;
mod hand_over;
mod incoming;
mod info;
mod inherit;
mod jobs;
mod keep;
mod link;
mod listeners;
mod notify;
mod observe;
mod origin;
mod outgoing;
mod ownership;
mod passthrough;
mod rehearsal;
mod route;
mod run_control;
mod settings;
mod settle;
mod successor;
#[cfg(test)]
mod tests;
mod yank;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{broadcast, mpsc, oneshot};
use tokio::time::Instant as TokioInstant;
use tracing::Instrument;
use vmferry_devices::notifier::Notifiers;
use vmferry_transport::data::BandwidthLimit;
use vmferry_transport::limits::Deadlines;
use vmferry_transport::proto::Target;
use vmferry_transport::units::{MigrationId, PAGE_SIZE, Uuid};
use vmferry_transport::wire::DeviceSchema;
use vmferry_transport::wire::hello::BlockInfo;

use crate::fds::FdStore;
use crate::machine::disk::Disks;
use crate::machine::failover::Primaries;
use crate::machine::{Machine, MachineEvent};
use crate::migration::blockers::Blockers;
use crate::migration::params::{MigrationCapabilities, MigrationParameters};
use crate::observe::Observer;
use crate::observe::record::Side;
use crate::qmp::schema::RunState;
use crate::qmp::{QmpError, QmpEvent, ShutdownReason};
use announcing::Announcing;
pub use beginning::{run, run_after_exec, would_go_on};
use clock::Clock;
use dirty_rate::DirtyRate;
use event::{Event, Events};
use guest::Guest;
use incoming::Incoming;
use info::Record;
pub use inherit::begin_machine;
use jobs::{JobThread, PANICKED};
use keep::NamedMemory;
use outgoing::Outgoing;
use settle::House;

/// How often the data threads' progress is looked at while a migration runs.
const TICK: Duration = Duration::from_millis(100);
/// A process that wakes so late has stood still, with its host or alone.
const STOOD_STILL: Duration = Duration::from_millis(500);
/// What has come in meanwhile gets so long to be read.
const CATCH_UP: Duration = Duration::from_millis(50);
/// Who tells a process to end so soon after somebody else is in no hurry: an upgrade and whoever waits for its end do, and some service
/// managers send two signals at once.
const SAME_WISH: Duration = Duration::from_secs(1);

type Reply = oneshot::Sender<Result<serde_json::Value, QmpError>>;

/// Name and version of this software, as the other side and operators see it.
pub(crate) fn software() -> String {
    format!("vmferry {}", env!("CARGO_PKG_VERSION"))
}

/// How the process is to end.
#[derive(Clone, Copy, Debug)]
struct Ending {
    code: u8,
    /// Not before; a failed target stays reachable for a source in doubt.
    at: Option<Instant>,
    /// When somebody has said so.
    told: Option<Instant>,
}

/// The owner of everything. See the module documentation.
struct Engine {
    name: Option<String>,
    machine: Arc<dyn Machine>,
    /// What the hello lists, and the names of those that have a stream. Asked once: a device that is busy must not hold up the loop.
    schemas: Vec<DeviceSchema>,
    streamed: Vec<String>,
    disks: Arc<Disks>,
    guest: Guest,
    runstate: RunState,
    /// Let an incoming guest run if it ran at the source; `stop` and `cont` change it while waiting.
    autostart: bool,
    parameters: MigrationParameters,
    capabilities: MigrationCapabilities,
    bandwidth: Arc<BandwidthLimit>,
    notifiers: Notifiers,
    primaries: Primaries,
    uuid: Option<Uuid>,
    deadlines: Deadlines,
    clock: Clock,
    jobs: JobThread,
    events: Events,
    /// Descriptors that operators have passed in.
    fds: FdStore,
    clients: broadcast::Sender<QmpEvent>,
    observer: Observer,
    attempts: u64,
    outgoing: Option<Outgoing>,
    /// The last outgoing attempt that has ended.
    record: Option<Record>,
    incoming: Option<Incoming>,
    /// End the process when the incoming migration fails.
    exit_on_error: bool,
    /// How often this process has begun to listen.
    listened: u64,
    blockers: Blockers,
    announcing: Announcing,
    dirty_rate: DirtyRate,
    /// `stop` and `cont` that wait for the job that does it.
    waiting: Vec<Reply>,
    /// `x-ram-hash` that wait until a completed migration is cleaned up.
    hashes_wanted: Vec<Reply>,
    /// A switchover began while such a job was under way.
    switchover_waits: bool,
    house: House,
    /// Guest memory, if it is in files with a name.
    memory: Option<NamedMemory>,
    /// The saved guest that the memory is of, until it runs.
    kept: Option<MigrationId>,
    /// The same, when it is about to run.
    unmarked: Option<MigrationId>,
    ending: Option<Ending>,
    /// Nobody will ever know whether the guest that was to be started runs.
    start_lost: bool,
}

impl Engine {
    /// Handles events until the process is to end; returns its exit code.
    async fn serve(&mut self, mut queue: mpsc::UnboundedReceiver<Event>) -> ExitCode {
        // A deadline has passed, and so many events came before that was seen: an answer that is here is not late.
        let mut earlier = None;
        loop {
            self.perform();
            self.observe();
            let now = Instant::now();
            if let Some(ending) = self.ending
                && ending.at.is_none_or(|at| now >= at)
                && !self.owes_news()
            {
                if let Some(incoming) = &mut self.incoming {
                    incoming.say_the_rest().await;
                }
                return ExitCode::from(ending.code);
            }
            if earlier == Some(0) {
                earlier = None;
                self.time_has_passed();
                continue;
            }
            let wake = self.next_wake(now);
            let event = tokio::select! {
                event = queue.recv() => event,
                () = tokio::time::sleep_until(TokioInstant::from_std(wake)), if earlier.is_none() => {
                    if wake.elapsed() > STOOD_STILL {
                        tokio::time::sleep(CATCH_UP).await;
                    }
                    earlier = Some(queue.len());
                    continue;
                }
            };
            let Some(event) = event else {
                return ExitCode::FAILURE;
            };
            earlier = earlier.map(|count: usize| count.saturating_sub(1));
            let span = self.span_of(&event);
            self.handle(event).instrument(span).await;
        }
    }

    fn time_has_passed(&mut self) {
        if let Some(outgoing) = &mut self.outgoing {
            outgoing.tick();
        }
        if let Some(incoming) = &mut self.incoming {
            incoming.tick();
        }
        self.answer_when_late();
        self.announce_what_is_due();
        self.measure_what_is_due();
    }

    fn next_wake(&self, now: Instant) -> Instant {
        let tick = self.outgoing.as_ref().map(|_| now + TICK);
        let outgoing = self.outgoing.as_ref().and_then(Outgoing::poll_timeout);
        let incoming = self.incoming.as_ref().and_then(Incoming::poll_timeout);
        let announcing = self.announcing.poll_timeout();
        let measuring = self.dirty_rate.poll_timeout();
        let succession = self.house.succession.as_ref();
        let deadlines = [
            outgoing,
            incoming,
            announcing,
            measuring,
            self.observer.due(),
            succession.and_then(|succession| succession.due),
        ]
        .into_iter()
        .flatten()
        .map(|moment| self.clock.instant(moment));
        // Once it is due the next event decides.
        let ending = self
            .ending
            .and_then(|ending| ending.at)
            .filter(|at| *at > now);
        deadlines
            .chain(tick)
            .chain(ending)
            .min()
            .unwrap_or(now + Duration::from_secs(3600))
    }

    async fn handle(&mut self, event: Event) {
        match event {
            Event::Request(request) => self.execute(request).await,
            Event::Machine(event) => self.machine_event(event),
            Event::Source(attempt, event) => self.source_event(attempt, event),
            Event::Target(event) => self.target_event(event),
            Event::Unplugging(id) => self.emit(QmpEvent::now(
                "UNPLUG_PRIMARY",
                serde_json::json!({ "device-id": id }),
            )),
            Event::Stopped(result) => self.stopped(result),
            Event::Resumed(result) => self.resumed(result),
            Event::Measured(news) => self.measured(news),
            Event::ToldAfterExec => self.house.told(),
            // Whoever waits for it has been told.
            Event::JobPanicked => tracing::error!("a job has failed: {PANICKED}"),
            Event::Terminate => self.end(0, ShutdownReason::HostSignal),
        }
    }

    /// Does what the cores have asked for.
    fn perform(&mut self) {
        while let Some(action) = self
            .outgoing
            .as_mut()
            .and_then(|outgoing| outgoing.poll(&self.jobs))
        {
            let span = self.observer.span(Side::Source);
            span.in_scope(|| self.outgoing_action(action));
        }
        while let Some(action) = self.incoming.as_mut().and_then(Incoming::poll) {
            let span = self.observer.span(Side::Target);
            span.in_scope(|| self.incoming_action(action));
        }
    }

    fn machine_event(&mut self, event: MachineEvent) {
        match event {
            MachineEvent::GuestExit(code) => {
                tracing::info!(code, "the guest has ended");
                self.set_runstate(RunState::Shutdown);
                self.end(code, ShutdownReason::GuestShutdown);
            }
            MachineEvent::VcpuFailed(error) => {
                tracing::error!(error, "the guest cannot go on");
                self.set_runstate(RunState::InternalError);
                self.emit(QmpEvent::stop());
            }
        }
    }

    /// Begins to end the process: what is under way is cancelled, and the loop leaves when that is done.
    fn end(&mut self, code: u8, reason: ShutdownReason) {
        let told = (!matches!(reason, ShutdownReason::GuestShutdown)).then(Instant::now);
        let before = self.ending;
        if let Some(first) = before.and_then(|ending| ending.told) {
            if told.is_some_and(|again| again.duration_since(first) >= SAME_WISH) {
                self.end_in_a_hurry();
            }
            return;
        }
        if before.is_none_or(|ending| ending.at.is_some()) {
            self.emit(QmpEvent::shutdown(reason));
        }
        self.house.stay();
        let code = before.map_or(code, |ending| ending.code);
        let at = None;
        self.ending = Some(Ending { code, at, told });
        let now = self.clock.now();
        // One that is over is waited for: who was told that it began is still to hear how it ended. So is one in doubt, as long as its
        // target may still answer.
        if let Some(outgoing) = &mut self.outgoing
            && outgoing.core_mut().handle_cancel(now).is_err()
            && outgoing.core().is_unresolved()
        {
            self.abandon_outgoing();
        }
        if let Some(incoming) = &mut self.incoming {
            incoming.core_mut().handle_cancel(now);
        }
    }

    /// Somebody has told the process to end twice: a migration or its news do not end.
    fn end_in_a_hurry(&mut self) {
        self.abandon_outgoing();
        self.incoming = None;
        self.house.told();
        if let Some(ending) = &mut self.ending {
            ending.at = None;
        }
    }

    /// The process ends in the middle of an attempt. If that is in doubt this side is stopped, and stays so whether the process lives or
    /// not.
    fn abandon_outgoing(&mut self) {
        let Some(outgoing) = self.outgoing.take() else {
            return;
        };
        if outgoing.is_in_place() && outgoing.core().in_doubt() {
            // Clients may find the new process there.
            self.leave_house();
        }
    }

    /// Whether somebody is still to hear how a migration ends, who might be left in doubt otherwise.
    fn owes_news(&self) -> bool {
        let incoming = self.incoming.as_ref().map(Incoming::core);
        let fails = incoming.is_some_and(Target::is_failing);
        let starts = !self.start_lost && incoming.is_some_and(Target::is_starting);
        self.outgoing.is_some() || fails || starts || self.house.tells()
    }

    fn emit(&self, event: QmpEvent) {
        // Fails without clients, which means nothing.
        let _ = self.clients.send(event);
    }

    fn set_runstate(&mut self, state: RunState) {
        // A guest that has ended stays so, whatever a migration does with its remains.
        if !matches!(self.runstate, RunState::Shutdown | RunState::InternalError) {
            self.runstate = state;
        }
    }
}

/// The machine's RAM, as the hello lists it.
fn block_infos(machine: &dyn Machine) -> Vec<BlockInfo> {
    let page_bytes = u32::try_from(PAGE_SIZE).unwrap_or(u32::MAX);
    let blocks = machine.ram().blocks().iter();
    blocks
        .map(|block| BlockInfo {
            name: block.name().to_owned(),
            pages: block.pages(),
            page_bytes,
        })
        .collect()
}
