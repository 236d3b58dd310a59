//! How an engine comes to be: a new VM, one that arrives, one that is taken over in place, and that of the program before.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::sync::{broadcast, mpsc};
use vmferry_cpr::letter::Letter;
use vmferry_transport::control::{Address, Listener, runtime};
use vmferry_transport::data::BandwidthLimit;
use vmferry_transport::wire::hello::Hello;

use super::announcing::Announcing;
use super::clock::Clock;
use super::dirty_rate::DirtyRate;
use super::event::{Event, Events};
use super::guest::{Guest, StoppedGuest};
use super::incoming::Incoming;
use super::inherit::{Left, Legacy};
use super::jobs::JobThread;
use super::keep::NamedMemory;
use super::settle::House;
use super::{Engine, listeners, passthrough, rehearsal};
use crate::config::{Incoming as IncomingConfig, RunConfig};
use crate::fds::FdStore;
use crate::machine::disk::Disks;
use crate::machine::{self, Machine};
use crate::migration::blockers::Blockers;
use crate::migration::params::{MigrationCapabilities, MigrationMode, MigrationParameters};
use crate::observe::{ObserveConfig, Observer, logging};
use crate::qmp::schema::RunState;
use crate::qmp::{EngineHandle, QmpEvent};
use crate::succession::Inheritance;
use crate::succession::account::now_us;
use crate::succession::told;

/// How long after its deadline, in microseconds, a program serves clients that has come by an exec, has no guest yet and has not been
/// able to go back.
const MUTE_MAX_US: u64 = 1_000_000;

/// Runs a VM until it ends: the whole life of a `vmferry run`.
///
/// # Errors
/// When the VM cannot be built or its sockets cannot be opened. What happens later goes to QMP and the log.
pub fn run(config: RunConfig) -> anyhow::Result<ExitCode> {
    runtime::run(run_engine(config, None)).context("cannot start the control thread")?
}

/// The same for a program that goes on with the VM of the program before. If it is late, the process becomes that one again.
///
/// # Errors
/// As [`run`]; the way back is still there, unless the guest may have run.
pub fn run_after_exec(config: RunConfig, inheritance: Inheritance) -> anyhow::Result<ExitCode> {
    let within = Duration::from_micros(config.deadlines.ready_us);
    let watched = inheritance.way_back.watch(within);
    watched.context("no thread to watch the time with")?;
    let engine = run_engine(config, Some(inheritance));
    runtime::run(engine).context("cannot start the control thread")?
}

/// Whether this program, started so, would go on with the VM of a program that asks. The machine is built, as far as nobody else can
/// have what it uses, and thrown away.
///
/// # Errors
/// Why not.
pub fn would_go_on(config: &RunConfig, letter: &Letter, hello: &Hello) -> anyhow::Result<()> {
    rehearsal::would_go_on(config, letter, hello)
}

async fn run_engine(config: RunConfig, left: Option<Inheritance>) -> anyhow::Result<ExitCode> {
    let (events, queue) = mpsc::unbounded_channel();
    let mut legacy = match (left, &config.incoming_cpr) {
        (Some(inheritance), _) => Some(Legacy::of_letter(inheritance, &config.machine)?),
        (None, Some(origin)) => Some(Legacy::receive(origin, &config.machine)?),
        (None, None) => None,
    };
    let set_up = Engine::set_up(&config, &mut legacy, events).await;
    let mut engine = set_up.inspect_err(|error| {
        if let Some(legacy) = legacy.take() {
            legacy.refuse(&format!("{error:#}"));
        }
    })?;
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
    let noted = told::note_signals().context("cannot watch for signals")?;
    for kind in noted {
        let mut signals = tokio::signal::unix::signal(kind).context("cannot watch for signals")?;
        let events = events.clone();
        runtime::spawn(async move {
            while signals.recv().await.is_some() {
                // The engine ends only with the process.
                let _ = events.send(Event::Terminate);
            }
        });
    }
    // A signal that came between its two handlers will not be an event.
    told::ensure_not()
}

impl Engine {
    /// Builds the machine and begins what the process was started for. What is left of `legacy` afterwards has not been told that all is
    /// well.
    async fn set_up(
        config: &RunConfig,
        legacy: &mut Option<Legacy>,
        events: Events,
    ) -> anyhow::Result<Self> {
        let machine_events = events.clone();
        let tell = Arc::new(move |event| {
            // The engine ends only with the process.
            let _ = machine_events.send(Event::Machine(event));
        });
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
        let mut engine = Self::new(config, machine, disks, observer, events, inbox.events)?;
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
        engine.begin(config, legacy).await?;
        Ok(engine)
    }

    pub(super) fn new(
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
        let of_machine = machine.blocker().into_iter();
        for reason in of_machine.chain(passthrough::blockers(machine.as_ref())) {
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
            jobs: JobThread::start(events.clone()).context("cannot start the job thread")?,
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
            start_lost: false,
        })
    }

    async fn begin(
        &mut self,
        config: &RunConfig,
        legacy: &mut Option<Legacy>,
    ) -> anyhow::Result<()> {
        match &config.incoming {
            None if config.paused => {}
            None => self.resume_guest(),
            Some(IncomingConfig::Defer) => {}
            Some(IncomingConfig::Exec) => {
                let left = legacy.take().and_then(Legacy::left);
                let left = left.context("no program was here before")?;
                let Left {
                    id,
                    inherited,
                    archive,
                    mut succession,
                } = left;
                succession.times.built_us = now_us();
                let patience_us = self.deadlines.ready_us.saturating_add(MUTE_MAX_US);
                succession.due = Some(self.clock.now().plus_micros(patience_us));
                self.house.inherit(inherited);
                self.house.succession = Some(succession);
                return self.load_archive(archive, id);
            }
            Some(IncomingConfig::Listen(address)) => {
                let origin = self
                    .listen(address, legacy.as_ref().map(Legacy::id))
                    .await?;
                if let Some(legacy) = legacy.take() {
                    // The old process is waiting for this, and nobody else.
                    return legacy.prepared(self.machine.ram(), origin, self.events.clone());
                }
                let local = self.incoming.as_ref().map_or(address, Incoming::address);
                logging::announce(format_args!("waiting for an incoming migration at {local}"));
            }
        }
        Ok(())
    }
}
