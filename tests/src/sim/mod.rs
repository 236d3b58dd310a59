//! Two hosts, a network and a clock in one thread, all from one seed.
//!
//! The real protocol cores and the real frame codec run here; links, dirty log, memory, vCPUs, data threads and jobs are models with the
//! same contracts as the real ones. Time is a number. Every event is a step; after each step the invariants are checked:
//!
//! - **I1** at most one side may run vCPUs; after COMMIT the source resumes only on the target's or the operator's word;
//! - **I2** when the target starts the guest, its memory and vCPU state equal the source's at the pause;
//! - **I3** an attempt that fails before the commit leaves the guest as it was, its debts paid in order, and a second attempt succeeds;
//! - **I6** every run settles within a bounded number of steps and a bounded time, and no timer fires in a circle;
//! - **I7** notifiers hear SETUP and then one end, FAILED before the guest runs again, INCOMING_FAILED before the source can know;
//! - the disks are active on one side at most, and a guest runs only on the side whose disks are.
//!
//! Operators may say anything at any step (`commands`); what the engine makes of it before a core hears of it is modelled as well.
//!
//! `faults` says what can go wrong. [`check_seed`] runs a seed, and when it fails runs it again with a trace.

pub mod commands;
mod events;
pub mod faults;
mod frames;
mod guest;
pub mod hostile;
mod mishaps;
mod net;
mod notifiers;
pub mod rng;
mod rounds;
mod run_control;
mod setup;
mod source_host;
mod source_links;
mod target_host;

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap, VecDeque};

use vmferry_transport::proto::{Source, SourceTuning, Target};
use vmferry_transport::units::Moment;
use vmferry_transport::wire::DeviceSchema;

use commands::Command;
use events::{Event, Scheduled};
use faults::Faults;
use guest::{Dirtier, Memory, ProofCount, Snapshot};
use net::{Item, LinkId, Use};
use rng::Rng;
use setup::{device, no_config, target_config, tuning};
pub use source_host::Ending;
use source_host::SourceHost;
use target_host::{TargetHost, Vcpus};

/// A run that takes more steps than this is going in a circle.
const STEPS_MAX: u64 = 100_000;
/// A run that takes longer, in microseconds of its own time, is stuck: all deadlines together are far shorter.
const TIME_US_MAX: u64 = 3_600_000_000;
/// How long it may take, in microseconds, until a side whose peer is gone has noticed and cleaned up: silence, slow jobs, lingering.
const DUST_US: u64 = 400_000_000;
/// Passes after which the operator loses patience with a migration that does not converge and raises its downtime limit.
const PASSES_MAX: u64 = 100;
/// Events shown when a run fails.
const TRACE_MAX: usize = 40;

/// One of the two sides.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Side {
    /// Where the guest comes from.
    Source,
    /// Where it goes.
    Target,
}

impl Side {
    fn other(self) -> Self {
        match self {
            Self::Source => Self::Target,
            Self::Target => Self::Source,
        }
    }
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct JobId(u64);

/// What a run was like; for tests that repeat it with a fault at every place of it.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// How the attempt ended at the source; `None` if the source died.
    pub ending: Option<Ending>,
    /// The guest is at the target.
    pub arrived: bool,
    /// The outcome could not be learnt, and the operator decided.
    pub operator_decided: bool,
    /// The operator raised the downtime limit because the migration did not converge.
    pub limit_raised: bool,
    /// The target process was ended, by an operator or a fault.
    pub target_died: bool,
    /// Steps taken.
    pub steps: u64,
    /// The guest was stopped for the switchover at this step.
    pub stopped_at_step: Option<u64>,
    /// Bytes that the first control connection carried, from the source and from the target.
    pub control_bytes: [u64; 2],
    /// How many bytes the source has sent when the last one of COMMIT leaves.
    pub commit_ends_at: u64,
    /// How many bytes the target has sent when the last one of READY leaves.
    pub ready_ends_at: u64,
    /// The same for the second one, if there was one: it asks for the outcome.
    pub asking_bytes: [u64; 2],
    /// Batches and ends of rounds that the first data connections carried, most of all.
    pub data_items_max: u64,
    /// Data connections.
    pub data_connections: u16,
    /// What happened at least once, so that a test can tell that its runs are not all about the same.
    pub seen: BTreeSet<&'static str>,
}

/// Two hosts and what lies between them.
#[derive(Debug)]
pub struct World {
    name: String,
    rng: Rng,
    /// What goes wrong. Set before [`run`](Self::run).
    pub faults: Faults,
    /// Whether attempts wait in pre-switchover; `None` leaves it to the seed.
    pub pause_before_switchover: Option<bool>,
    /// RAM stays in place, and every attempt goes to a new process on the same host.
    pub in_place: bool,
    now: u64,
    step: u64,
    events: BinaryHeap<Reverse<Scheduled>>,
    scheduled: u64,
    jobs: u64,
    delay_us_max: u64,
    job_us_max: u64,
    links: Vec<net::Link>,
    control_connections: u64,
    /// The connection on which the source asked last for the outcome.
    asking: Option<LinkId>,
    blocks: Vec<u64>,
    devices: Vec<DeviceSchema>,
    data_connections: u16,
    verify: bool,
    source: SourceHost,
    source_memory: Memory,
    source_vcpus: u64,
    target: TargetHost,
    dirtier: Dirtier,
    dirtied_at: u64,
    pause: Option<Snapshot>,
    proofs: ProofCount,
    /// As the last one who had the say wanted it, and could have it.
    guest_should_run: bool,
    /// The guest ran and could not be resumed: somebody has to say `cont`.
    owes_cont: bool,
    tuning: SourceTuning,
    frozen_until: [u64; 2],
    limit_raised: bool,
    /// Bytes given to the first control connection by each side, and what they were at COMMIT and at READY.
    said: [u64; 2],
    milestones: [u64; 2],
    stopped_at_step: Option<u64>,
    committed_at_step: Option<u64>,
    seen: BTreeSet<&'static str>,
    trace: Option<VecDeque<String>>,
}

impl World {
    /// A world without faults, in every other respect drawn from the seed.
    pub fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let blocks: Vec<u64> = (0..rng.within(1..=3))
            .map(|_| rng.pick(&[16, 40, 120, 300, 512]))
            .collect();
        let devices = (0..rng.within(1..=3)).map(device).collect();
        let dirtier = Dirtier {
            pages_per_sec: rng.pick(&[0, 200, 5_000, 200_000]),
            hot: rng.pick(&[20, 300, 1000]),
            left_over: 0,
            next: 0,
        };
        let mut world = Self {
            name: format!(
                "VMFERRY_SIM_SEED={seed} cargo test -p vmferry-tests --release simulation::replay -- --nocapture"
            ),
            faults: Faults::default(),
            pause_before_switchover: None,
            in_place: false,
            now: 0,
            step: 0,
            events: BinaryHeap::new(),
            scheduled: 0,
            jobs: 0,
            delay_us_max: rng.pick(&[20, 300, 20_000]),
            job_us_max: rng.pick(&[10, 1_000, 300_000]),
            links: Vec::new(),
            control_connections: 0,
            asking: None,
            data_connections: rng.within(1..=8) as u16,
            verify: rng.chance(500),
            source: SourceHost::new(Source::new(no_config(), tuning(0)), &blocks),
            source_memory: Memory::zeroed(&blocks),
            source_vcpus: 0,
            target: TargetHost::new(Target::new(target_config(&blocks, &[])), &blocks),
            dirtier,
            dirtied_at: 0,
            pause: None,
            proofs: ProofCount::default(),
            guest_should_run: true,
            owes_cont: false,
            tuning: tuning(0),
            frozen_until: [0; 2],
            limit_raised: false,
            said: [0; 2],
            milestones: [0; 2],
            stopped_at_step: None,
            committed_at_step: None,
            seen: BTreeSet::new(),
            trace: None,
            blocks,
            devices,
            rng,
        };
        world.boot();
        world
    }

    /// A world and faults, both drawn from the seed.
    pub fn with_random_faults(seed: u64) -> Self {
        let mut world = Self::new(seed);
        world.faults = Faults::random(&mut world.rng);
        world
    }

    /// Says how to repeat the run when it fails.
    pub fn set_name(&mut self, name: impl Into<String>) {
        self.name = name.into();
    }

    /// Keeps the last events and shows them when the run fails.
    pub fn keep_trace(&mut self) {
        self.trace = Some(VecDeque::new());
    }

    /// Runs one migration with the faults; if it fails and the source lives, runs a second one without faults, which must succeed.
    pub fn run(mut self) -> Report {
        for _ in 0..self.faults.strangers {
            let at = self.rng.below(200_000);
            self.schedule(at, Event::Stranger);
        }
        self.start_attempt();
        self.run_until_settled();
        let mut report = self.report();
        self.let_dust_settle();
        self.insist();
        if let Some(ending) = self.source.ending.filter(|_| self.source.alive)
            && ending != Ending::Completed
        {
            self.run_again();
        }
        report.seen = std::mem::take(&mut self.seen);
        report
    }

    /// The guest was handed over: nothing that an operator says to the source now makes two of it.
    fn insist(&mut self) {
        if self.source.ending != Some(Ending::Completed) {
            return;
        }
        for command in [
            Command::Cont(Side::Source),
            Command::Cancel,
            Command::Continue,
            Command::Resolve,
            Command::Stop(Side::Source),
            Command::Migrate,
            Command::Cont(Side::Source),
        ] {
            self.execute(command);
            self.drive_source();
            self.check_invariants();
        }
        self.run_until_settled();
        assert_eq!(self.source.ending, Some(Ending::Completed));
    }

    fn run_again(&mut self) {
        self.note(|| "the last attempt begins".to_owned());
        if !self.target.alive || self.target.disks.stuck || self.target.quits {
            self.end_target();
            self.target = self.new_target();
        }
        if self.owes_cont {
            self.operator_conts(Side::Source);
            self.run_until_settled();
            assert!(self.source.running, "I3: cont lets the guest run");
        }
        self.target.autostart = true;
        self.start_attempt();
        self.run_until_settled();
        assert_eq!(
            self.source.ending,
            Some(Ending::Completed),
            "I3: the last attempt succeeds"
        );
        assert!(self.target.owns_guest(), "I3: the guest has arrived");
        let runs = self.target.vcpus == Vcpus::Running;
        assert_eq!(runs, self.guest_should_run, "I3: the guest is as it was");
    }

    fn report(&self) -> Report {
        let carried =
            |used| [Side::Source, Side::Target].map(|from| self.carried(used, from).unwrap_or(0));
        let items = (0..self.data_connections)
            .filter_map(|index| self.carried(Use::Data(index), Side::Source));
        Report {
            ending: self.source.ending.filter(|_| self.source.alive),
            arrived: self.target.owns_guest(),
            operator_decided: self.source.operator.is_some(),
            limit_raised: self.limit_raised,
            target_died: !self.target.alive,
            steps: self.step,
            stopped_at_step: self.stopped_at_step,
            control_bytes: carried(Use::Control(0)),
            commit_ends_at: self.milestones[0],
            ready_ends_at: self.milestones[1],
            asking_bytes: carried(Use::Control(1)),
            data_items_max: items.max().unwrap_or(0),
            data_connections: self.data_connections,
            seen: BTreeSet::new(),
        }
    }

    fn run_until_settled(&mut self) {
        let last_step = self.step + STEPS_MAX;
        let last_time = self.now + TIME_US_MAX;
        loop {
            self.drive_source();
            self.drive_target();
            self.check_invariants();
            if self.is_settled() {
                break;
            }
            assert!(self.step < last_step, "I6: the run goes in a circle");
            assert!(self.now < last_time, "I6: the run does not settle");
            self.step += 1;
            if !self.meet_step_faults() {
                self.take_step();
            }
        }
        self.check_endings();
    }

    fn check_endings(&self) {
        if let Some(ending) = self.source.ending.filter(|_| self.source.alive) {
            self.check_source_ending(ending);
            if ending != Ending::Completed {
                assert!(!self.target.owns_guest(), "I1: the guest is at both sides");
            }
        }
        self.check_target_at_rest();
    }

    /// What is still on its way arrives, whoever waits for something that will not come gives up, and nothing changes by that.
    fn let_dust_settle(&mut self) {
        self.faults = Faults::default();
        self.frozen_until = [0; 2];
        let (last_step, last_time) = (self.step + STEPS_MAX, self.now + DUST_US);
        while self.next_at().is_some_and(|at| at <= last_time) {
            assert!(self.step < last_step, "I6: it never gets quiet");
            self.step += 1;
            self.take_step();
            self.drive_source();
            self.drive_target();
            self.check_invariants();
        }
        assert!(self.target.is_at_rest(), "I6: the target waits for ever");
        self.check_endings();
    }

    /// When the next step is due.
    fn next_at(&self) -> Option<u64> {
        let event = self.events.peek().map(|Reverse(event)| event.at);
        let timers = [Side::Source, Side::Target].map(|side| self.timer(side));
        timers.into_iter().chain([event]).flatten().min()
    }

    /// Nothing will change any more, except by the operator's will.
    fn is_settled(&self) -> bool {
        let source_rests = !self.source.alive
            || (self.source.ending.is_some()
                && self.source.operation.is_none()
                && !self.source.tries_again);
        source_rests && self.target.is_at_rest()
    }

    fn check_invariants(&self) {
        let both = self.source.may_run() && self.target.may_run();
        assert!(!both, "I1: both sides run");
        self.check_disks();
        if self.source.alive {
            let expected = u32::from(!self.source.running);
            assert_eq!(
                self.proofs.get(),
                expected,
                "proofs that the guest is stopped"
            );
        }
    }

    /// Takes whatever comes first: an event or a timer.
    fn take_step(&mut self) {
        let timer = [Side::Source, Side::Target]
            .into_iter()
            .filter_map(|side| self.timer(side).map(|at| (at, side)))
            .min_by_key(|(at, _)| *at);
        let event = self.events.peek().map(|Reverse(event)| event.at);
        match (timer, event) {
            (Some((at, side)), event) if event.is_none_or(|event| at <= event) => {
                self.pass_time(at);
                self.time_out(side);
            }
            (_, Some(at)) => {
                let Some(Reverse(Scheduled { event, .. })) = self.events.pop() else {
                    return;
                };
                if let Some(thaw) = self.thaw(event).filter(|thaw| *thaw > at) {
                    self.schedule_at(thaw, event);
                    return;
                }
                self.pass_time(at);
                self.handle(event);
            }
            _ => panic!("I6: nothing will ever happen again"),
        }
    }

    fn timer(&self, side: Side) -> Option<u64> {
        let (alive, at) = match side {
            Side::Source => (
                self.source.alive && self.source.ending.is_none(),
                self.source.core.poll_timeout(),
            ),
            Side::Target => (self.target.alive, self.target.core.poll_timeout()),
        };
        let at = at.filter(|_| alive)?;
        Some(at.0.max(self.now).max(self.frozen_until[side as usize]))
    }

    fn time_out(&mut self, side: Side) {
        let now = self.moment();
        self.note(|| format!("the timer of {side:?}"));
        let next = match side {
            Side::Source => {
                self.source.core.handle_timeout(now);
                self.source.core.poll_timeout()
            }
            Side::Target => {
                self.target.core.handle_timeout(now);
                self.target.core.poll_timeout()
            }
        };
        assert!(
            next.is_none_or(|next| next > now),
            "I6: the timer of {side:?} fires in a circle"
        );
    }

    /// When the process that an event belongs to goes on.
    fn thaw(&mut self, event: Event) -> Option<u64> {
        let side = match event {
            Event::Flush(link, side) if self.link(link).used != Use::Stranger => side,
            Event::Deliver(_, from) => from.other(),
            Event::Pump(_) | Event::Dial(_) | Event::SourceJob(_) | Event::Unplug { .. } => {
                Side::Source
            }
            Event::Operation(side, _) => side,
            Event::Order(command) => return Some(self.when_awake(command)),
            Event::TargetJob(_)
            | Event::Placed { .. }
            | Event::HelloDeadline(_)
            | Event::ListenAgain
            | Event::Exit => Side::Target,
            _ => return None,
        };
        Some(self.frozen_until[side as usize])
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Flush(link, side) => self.flush(link, side),
            Event::Deliver(link, from) => self.deliver(link, from),
            Event::Pump(link) if self.source.alive => self.pump(link),
            Event::Dial(job) if self.source.alive => self.dial(job),
            Event::SourceJob(job) if self.source.alive => self.source_job(job),
            Event::TargetJob(job) if self.target.alive => self.target_job(job),
            Event::Placed {
                generation,
                round,
                last,
            } if self.target.alive => self.placed(generation, round, last),
            Event::HelloDeadline(link) if self.target.alive => self.hello_deadline(link),
            Event::ListenAgain => self.listen_again(),
            Event::Exit => self.exit_target(),
            Event::Operator => self.operator_decides(),
            Event::Operation(side, job) if self.is_alive(side) => self.operation(side, job),
            Event::Order(command) => self.execute(command),
            Event::Again => self.tries_again(),
            Event::Unplug { watch, done } if self.source.alive => self.unplug(watch, done),
            Event::Restart if !self.target.alive => self.target = self.new_target(),
            Event::Stranger => self.stranger_connects(),
            _ => {}
        }
    }

    /// Time passes, and the guest writes wherever it runs.
    fn pass_time(&mut self, to: u64) {
        self.now = to;
        let side = if self.source.alive && self.source.running {
            Side::Source
        } else if self.target.alive && self.target.vcpus == Vcpus::Running {
            Side::Target
        } else {
            self.dirtied_at = to;
            return;
        };
        if self.frozen_until[side as usize] > to {
            return;
        }
        let mut elapsed_us = to - std::mem::replace(&mut self.dirtied_at, to);
        if side == Side::Source {
            elapsed_us = elapsed_us * u64::from(100 - self.source.throttle) / 100;
        }
        let written = self.dirtier.write(&mut self.rng, &self.blocks, elapsed_us);
        self.guest_writes(side, written);
    }

    fn guest_writes(&mut self, side: Side, written: Vec<(guest::Page, u64)>) {
        for (page, content) in written {
            match side {
                Side::Source => {
                    self.source_vcpus += 1;
                    self.source_memory.set(page, content);
                    self.source.present.insert(page);
                    if self.source.log_on {
                        self.source.log.insert(page);
                    }
                }
                Side::Target => self.target.memory.set(page, content),
            }
        }
    }

    fn is_alive(&self, side: Side) -> bool {
        match side {
            Side::Source => self.source.alive,
            Side::Target => self.target.alive,
        }
    }

    fn is_awake(&self, side: Side) -> bool {
        self.is_alive(side) && self.frozen_until[side as usize] <= self.now
    }

    fn moment(&self) -> Moment {
        Moment(self.now)
    }

    fn new_job(&mut self) -> JobId {
        self.jobs += 1;
        JobId(self.jobs)
    }

    /// A frame goes to a control connection.
    fn say(&mut self, link: LinkId, from: Side, bytes: Vec<u8>, is_milestone: bool) {
        if self.link(link).used == Use::Control(0) {
            self.said[from as usize] += bytes.len() as u64;
            if is_milestone {
                self.milestones[from as usize] = self.said[from as usize];
            }
        }
        self.write(link, from, Item::Bytes(bytes));
    }

    fn link_delay(&mut self) -> u64 {
        self.rng.below(self.delay_us_max)
    }

    fn job_delay(&mut self) -> u64 {
        if self.chance(|faults| faults.slow_job) {
            return self.rng.below(40_000_000);
        }
        self.rng.below(self.job_us_max)
    }

    /// Something worth counting happened.
    fn see(&mut self, what: &'static str) {
        self.seen.insert(what);
        self.note(|| what.to_owned());
    }

    fn note(&mut self, text: impl FnOnce() -> String) {
        let (now, step) = (self.now, self.step);
        if let Some(trace) = &mut self.trace {
            if trace.len() == TRACE_MAX {
                trace.pop_front();
            }
            trace.push_back(format!("{now:>12} us, step {step:>5}: {}", text()));
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking()
            && let Some(trace) = &self.trace
        {
            eprintln!("\nThe last events of the simulated run:");
            trace.iter().for_each(|line| eprintln!("  {line}"));
            eprintln!("Faults: {:?}", self.faults);
            eprintln!("Repeat it with: {}\n", self.name);
        }
    }
}

/// Runs a world; if that fails, runs the same once more with a trace.
pub fn check(make: impl Fn() -> World) -> Report {
    let quick = std::panic::AssertUnwindSafe(|| make().run());
    std::panic::catch_unwind(quick).unwrap_or_else(|_| {
        let mut world = make();
        world.keep_trace();
        world.run()
    })
}

/// Runs a seed with random faults. Panics with a trace and the command that repeats it if an invariant is broken.
pub fn check_seed(seed: u64) -> Report {
    check(|| World::with_random_faults(seed))
}
