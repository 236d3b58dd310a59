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
mod yank;

use std::panic::AssertUnwindSafe;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio::time::Instant as TokioInstant;
use tracing::Instrument;
use vmferry_cpr::letter::Letter;
use vmferry_devices::notifier::Notifiers;
use vmferry_transport::control::{Address, Listener, runtime};
use vmferry_transport::data::BandwidthLimit;
use vmferry_transport::limits::Deadlines;
use vmferry_transport::units::{MigrationId, PAGE_SIZE, Uuid};
use vmferry_transport::wire::hello::{BlockInfo, Hello};

use crate::config::{Incoming as IncomingConfig, RunConfig};
use crate::fds::FdStore;
use crate::machine::disk::Disks;
use crate::machine::failover::Primaries;
use crate::machine::{self, Machine, MachineEvent};
use crate::migration::blockers::Blockers;
use crate::migration::params::{MigrationCapabilities, MigrationMode, MigrationParameters};
use crate::observe::record::Side;
use crate::observe::{ObserveConfig, Observer, logging};
use crate::qmp::schema::RunState;
use crate::qmp::{EngineHandle, QmpError, QmpEvent, ShutdownReason};
use crate::succession::Inheritance;
use crate::succession::account::now_us;
use announcing::Announcing;
use clock::Clock;
use dirty_rate::DirtyRate;
use event::{Event, Events};
use guest::{Guest, StoppedGuest};
use incoming::Incoming;
use info::Record;
use inherit::{Left, Legacy};
use jobs::JobThread;
use keep::NamedMemory;
use outgoing::Outgoing;
use settle::{House, WayBackKeeper};
use vmferry_transport::wire::DeviceSchema;

/// How often the data threads' progress is looked at while a migration runs.
const TICK: Duration = Duration::from_millis(100);

type Reply = oneshot::Sender<Result<serde_json::Value, QmpError>>;

/// Name and version of this software, as the other side and operators see it.
pub(crate) fn software() -> String {
    format!("vmferry {}", env!("CARGO_PKG_VERSION"))
}

/// Runs a VM until it ends: the whole life of a `vmferry run`.
///
/// # Errors
/// When the VM cannot be built or its sockets cannot be opened. What happens later goes to QMP and the log.
pub fn run(config: RunConfig) -> anyhow::Result<ExitCode> {
    runtime::run(run_engine(config, None)).context("cannot start the control thread")?
}

/// The same for a program that goes on with the VM of the program before. If it cannot, the process becomes that one again.
///
/// # Errors
/// As [`run`], and there was no way back.
pub fn run_after_exec(config: RunConfig, mut inheritance: Inheritance) -> anyhow::Result<ExitCode> {
    let way_back = WayBackKeeper::new(inheritance.way_back.take());
    let keeper = way_back.clone();
    let run = || {
        let engine = run_engine(config, Some((inheritance, keeper)));
        runtime::run(engine).context("cannot start the control thread")?
    };
    // A mistake of the new program must not cost the guest.
    let ended = std::panic::catch_unwind(AssertUnwindSafe(run));
    let ended = ended.unwrap_or_else(|_| Err(anyhow::anyhow!("the new program panicked")));
    match (ended, way_back.take()) {
        (Err(error), Some(way_back)) => Err(way_back.go(&format!("{error:#}"))),
        (ended, _) => ended,
    }
}

/// Whether this program, started so, would go on with the VM of a program that asks. The machine is built, as far as nobody else can
/// have what it uses, and thrown away.
///
/// # Errors
/// Why not.
pub fn would_go_on(config: &RunConfig, letter: &Letter, hello: &Hello) -> anyhow::Result<()> {
    rehearsal::would_go_on(config, letter, hello)
}

async fn run_engine(
    config: RunConfig,
    left: Option<(Inheritance, WayBackKeeper)>,
) -> anyhow::Result<ExitCode> {
    let (events, queue) = mpsc::unbounded_channel();
    let machine_events = events.clone();
    let tell = Arc::new(move |event| {
        // The engine ends only with the process.
        let _ = machine_events.send(Event::Machine(event));
    });
    let mut legacy = match (left, &config.incoming_cpr) {
        (Some((inheritance, way_back)), _) => {
            Some(Legacy::of_letter(inheritance, way_back, &config.machine)?)
        }
        (None, Some(origin)) => Some(Legacy::receive(origin, &config.machine)?),
        (None, None) => None,
    };
    let given = legacy.as_mut().map(Legacy::take_given);
    let disks = Disks::open(&config.disks).context("cannot open the disks")?;
    let devices = machine::virtio::backends(&disks);
    let machine = machine::build(&config.machine, given, devices, config.accel, tell)
        .context("cannot build the machine")?;
    if config.incoming.is_none() {
        // An incoming guest's disks belong to the source until the guest starts here.
        disks.activate().context("cannot use the disks")?;
    }
    let qmp_address = Address::unix(&config.qmp)?;
    // A guest that is taken over in place brings the sockets of its old process along.
    let listener = match legacy {
        None => Some(Listener::bind(&qmp_address).await?),
        Some(_) => None,
    };
    let (handle, inbox) = EngineHandle::channel();
    forward_requests(inbox.requests, events.clone());
    watch_signals(events.clone())?;

    let observe = ObserveConfig {
        metrics: config.observe.metrics.clone().filter(|_| legacy.is_none()),
        ..config.observe.clone()
    };
    let observer = Observer::start(&observe, &machine)?;
    if let Some(address) = observer.metrics_address() {
        logging::announce(format_args!("metrics at {address}"));
    }
    let disks = Arc::new(disks);
    let mut engine = Engine::new(&config, machine, disks, observer, events, inbox.events)?;
    if let (Some(memory), None) = (&engine.memory, &legacy) {
        engine.kept = memory.saved_guest()?;
    }
    engine.house.open(listener, handle);
    if legacy.is_none() {
        logging::announce(format_args!(
            "accelerator {}, QMP at {}",
            engine.machine.accel(),
            config.qmp.display()
        ));
    }
    engine.begin(&config, legacy).await?;
    let code = engine.serve(queue).await;
    if let Some(server) = engine.house.server.take() {
        server.finish().await;
    }
    engine.observer.finish(engine.clock.now());
    Ok(code)
}

fn forward_requests(mut requests: mpsc::Receiver<crate::qmp::EngineRequest>, events: Events) {
    runtime::spawn(async move {
        while let Some(request) = requests.recv().await {
            if events.send(Event::Request(request)).is_err() {
                return;
            }
        }
    });
}

fn watch_signals(events: Events) -> anyhow::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    for kind in [
        SignalKind::terminate(),
        SignalKind::interrupt(),
        SignalKind::hangup(),
    ] {
        let mut signals = signal(kind).context("cannot watch for signals")?;
        let events = events.clone();
        runtime::spawn(async move {
            while signals.recv().await.is_some() {
                // The engine ends only with the process.
                let _ = events.send(Event::Terminate);
            }
        });
    }
    Ok(())
}

/// How the process is to end.
#[derive(Clone, Copy, Debug)]
struct Ending {
    code: u8,
    /// Not before; a failed target stays reachable for a source in doubt.
    at: Option<Instant>,
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
}

impl Engine {
    fn new(
        config: &RunConfig,
        machine: Arc<dyn Machine>,
        disks: Arc<Disks>,
        observer: Observer,
        events: Events,
        clients: broadcast::Sender<QmpEvent>,
    ) -> anyhow::Result<Self> {
        let parameters = MigrationParameters::default();
        // The machine is built stopped; this takes the proof of it.
        let proof = machine
            .pause()
            .context("cannot take the proof that the guest is stopped")?;
        let (notifiers, primaries) = listeners::register(config, machine.as_ref(), &events)
            .context("cannot tell others of migrations")?;
        let mut blockers = Blockers::default();
        for reason in passthrough::blockers(machine.as_ref()) {
            blockers.add(reason, vec![MigrationMode::Normal])?;
        }
        if !config.machine.vfio.is_empty() {
            blockers.add(
                vmferry_devices::vfio::NOT_SUSPENDED.to_owned(),
                vec![MigrationMode::CprReboot],
            )?;
        }
        Ok(Self {
            name: config.name.clone(),
            schemas: passthrough::schemas(machine.as_ref()),
            streamed: passthrough::streamed(machine.as_ref()),
            machine,
            disks,
            guest: Guest::Stopped(StoppedGuest::new(proof)),
            runstate: if config.incoming.is_some() {
                RunState::Inmigrate
            } else {
                RunState::Prelaunch
            },
            autostart: !config.paused,
            bandwidth: Arc::new(BandwidthLimit::new(parameters.max_bandwidth_bytes_per_sec)),
            parameters,
            capabilities: MigrationCapabilities::default(),
            notifiers,
            primaries,
            uuid: config.uuid,
            deadlines: config.deadlines,
            clock: Clock::new(),
            jobs: JobThread::start().context("cannot start the job thread")?,
            events,
            fds: FdStore::default(),
            clients,
            observer,
            attempts: 0,
            outgoing: None,
            record: None,
            incoming: None,
            exit_on_error: true,
            listened: 0,
            blockers,
            announcing: Announcing::default(),
            dirty_rate: DirtyRate::default(),
            waiting: Vec::new(),
            hashes_wanted: Vec::new(),
            switchover_waits: false,
            house: House::new(config),
            memory: NamedMemory::of(&config.machine),
            kept: None,
            unmarked: None,
            ending: None,
        })
    }

    async fn begin(&mut self, config: &RunConfig, legacy: Option<Legacy>) -> anyhow::Result<()> {
        match &config.incoming {
            None if config.paused => {}
            None => self.resume_guest(),
            Some(IncomingConfig::Defer) => {}
            Some(IncomingConfig::Exec) => {
                let left = legacy.and_then(Legacy::left);
                let left = left.context("no program was here before")?;
                let Left {
                    id,
                    inherited,
                    archive,
                    mut succession,
                } = left;
                succession.times.built_us = now_us();
                self.house.inherit(inherited);
                self.house.succession = Some(succession);
                return self.load_archive(archive, id);
            }
            Some(IncomingConfig::Listen(address)) => {
                let origin = self
                    .listen(address, legacy.as_ref().map(Legacy::id))
                    .await?;
                if let Some(legacy) = legacy {
                    // The old process is waiting for this, and nobody else.
                    return legacy.prepared(self.machine.ram(), origin, self.events.clone());
                }
                let local = self.incoming.as_ref().map_or(address, Incoming::address);
                logging::announce(format_args!("waiting for an incoming migration at {local}"));
            }
        }
        Ok(())
    }

    /// Handles events until the process is to end; returns its exit code.
    async fn serve(&mut self, mut queue: mpsc::UnboundedReceiver<Event>) -> ExitCode {
        loop {
            self.perform();
            self.observe();
            let now = Instant::now();
            if let Some(ending) = self.ending
                && ending.at.is_none_or(|at| now >= at)
                && self.outgoing.is_none()
                && !self.incoming_fails()
            {
                return ExitCode::from(ending.code);
            }
            let wake = TokioInstant::from_std(self.next_wake(now));
            tokio::select! {
                event = queue.recv() => match event {
                    Some(event) => {
                        let span = self.span_of(&event);
                        self.handle(event).instrument(span).await;
                    }
                    None => return ExitCode::FAILURE,
                },
                () = tokio::time::sleep_until(wake) => {
                    if let Some(outgoing) = &mut self.outgoing {
                        outgoing.tick();
                    }
                    if let Some(incoming) = &mut self.incoming {
                        incoming.tick();
                    }
                    self.announce_what_is_due();
                    self.measure_what_is_due();
                }
            }
        }
    }

    fn next_wake(&self, now: Instant) -> Instant {
        let tick = self.outgoing.as_ref().map(|_| now + TICK);
        let outgoing = self.outgoing.as_ref().and_then(Outgoing::poll_timeout);
        let incoming = self.incoming.as_ref().and_then(Incoming::poll_timeout);
        let announcing = self.announcing.poll_timeout();
        let measuring = self.dirty_rate.poll_timeout();
        let deadlines = [
            outgoing,
            incoming,
            announcing,
            measuring,
            self.observer.due(),
        ]
        .into_iter()
        .flatten()
        .map(|moment| self.clock.instant(moment));
        let ending = self.ending.and_then(|ending| ending.at);
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
        if self.ending.is_some() {
            // Asked twice: somebody is in a hurry, or a migration does not end.
            self.outgoing = None;
            self.incoming = None;
            return;
        }
        self.emit(QmpEvent::shutdown(reason));
        self.ending = Some(Ending { code, at: None });
        let now = self.clock.now();
        if let Some(outgoing) = &mut self.outgoing
            && outgoing.core_mut().handle_cancel(now).is_err()
        {
            // Handed over, or in doubt: this side is stopped, and stays so whether the process lives or not.
            self.outgoing = None;
        }
        if let Some(incoming) = &mut self.incoming {
            incoming.core_mut().handle_cancel(now);
        }
    }

    /// The source is still to hear that it keeps its guest: one that only saw the connection end might be left in doubt.
    fn incoming_fails(&self) -> bool {
        let incoming = self.incoming.as_ref();
        incoming.is_some_and(|incoming| incoming.core().is_failing())
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

    fn block_infos(&self) -> Vec<BlockInfo> {
        let page_bytes = u32::try_from(PAGE_SIZE).unwrap_or(u32::MAX);
        let blocks = self.machine.ram().blocks().iter();
        blocks
            .map(|block| BlockInfo {
                name: block.name().to_owned(),
                pages: block.pages(),
                page_bytes,
            })
            .collect()
    }
}
