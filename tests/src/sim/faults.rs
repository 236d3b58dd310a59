//! What can go wrong in a simulated migration.
//!
//! # Fault model
//!
//! Survived, which means that the migration completes or fails cleanly with every invariant upheld: links that are slow, accept few
//! bytes at a time, stall for a while or for ever, break at any byte (with the bytes under way lost or delivered, and with both, one or
//! neither side being told), or flip a bit; connects that are refused or hang; a process that dies or is frozen for any time at any
//! step; any job failing or taking long; disks that cannot be had or given back; operators of either side saying anything at any step;
//! strangers that talk to the target's listener.
//!
//! Any number of these may happen in one run. Not covered: a process that goes on wrongly (memory errors), a listener's address taken
//! over by a stranger who knows the migration id, and an operator who gives a false answer about who runs the guest.

use std::ops::RangeInclusive;

use vmferry_transport::proto::{SourceJob, TargetJob};

use super::Side;
use super::commands::{Again, Command, Order};
use super::rng::Rng;

/// Who learns that a link broke.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Notice {
    /// Both sides, soon.
    #[default]
    Both,
    /// Only the side that was to receive.
    Receiver,
    /// Only the side that was sending.
    Sender,
    /// Nobody: a cable was pulled.
    Nobody,
}

impl Notice {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Both, Self::Receiver, Self::Sender, Self::Nobody];
}

/// Cuts a control connection after exactly this many bytes of one direction.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ControlCut {
    /// Which of the control connections of the run, in the order of their making; 0 is the one of the hello.
    pub connection: u64,
    /// Whose bytes are counted.
    pub from: Side,
    /// How many still get through.
    pub bytes: u64,
    /// Who is told.
    pub notice: Notice,
}

/// Cuts a data connection after exactly this many of its batches and ends of rounds.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct DataCut {
    /// Which connection.
    pub index: u16,
    /// How many still get through.
    pub items: u64,
    /// Who is told.
    pub notice: Notice,
}

/// From when on steps are counted and faults happen.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Since {
    /// The beginning.
    #[default]
    Start,
    /// The order to stop the guest.
    Stop,
    /// COMMIT, the most delicate moment.
    Commit,
}

/// A process dies at a step.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Kill {
    /// When.
    pub step: u64,
    /// The whole host goes: its kernel closes nothing.
    pub silent: bool,
}

/// A process stands still from a step on.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Freeze {
    /// When it begins.
    pub step: u64,
    /// How long it takes, in microseconds.
    pub micros: u64,
}

/// Everything that goes wrong in one run. Chances are per mille. All defaults are "never".
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// When everything begins that is a matter of chance or of a step.
    pub since: Since,
    /// Chance per write that the link takes only a part of it.
    pub short_write: u32,
    /// Chance per delivery that the link breaks.
    pub reset: u32,
    /// Bytes that are under way when a link breaks are lost.
    pub lose_tail: bool,
    /// Chance per delivery that the direction stalls.
    pub stall: u32,
    /// For how long, in microseconds; `None` is for ever.
    pub stall_us: Option<RangeInclusive<u64>>,
    /// Chance per delivery of control bytes or pages that a bit flips.
    pub corrupt: u32,
    /// Chance per connect that it is refused.
    pub refuse_connect: u32,
    /// Chance per connect that it hangs.
    pub hang_connect: u32,
    /// Chance per job that it fails.
    pub fail_job: u32,
    /// This job of the source fails the first time.
    pub fail_source_job: Option<SourceJob>,
    /// This job of the target fails the first time.
    pub fail_target_job: Option<TargetJob>,
    /// Chance that the guest has to let go of a device first; it may take its time, or never do it.
    pub unplug_wait: u32,
    /// Chance that such a guest refuses, answers too late or never.
    pub unplug_never: u32,
    /// Chance that disks cannot be activated, or given back after a start that failed.
    pub fail_disks: u32,
    /// Chance per job that it takes up to 40 s.
    pub slow_job: u32,
    /// Cut of a control connection.
    pub cut_control: Option<ControlCut>,
    /// Another cut of a control connection.
    pub cut_control_again: Option<ControlCut>,
    /// Cut of a data connection.
    pub cut_data: Option<DataCut>,
    /// The source dies.
    pub kill_source: Option<Kill>,
    /// The target dies.
    pub kill_target: Option<Kill>,
    /// After its death another target process listens at the same address, so many microseconds later.
    pub restart_target_after_us: Option<u64>,
    /// The source is frozen.
    pub freeze_source: Option<Freeze>,
    /// The target is frozen.
    pub freeze_target: Option<Freeze>,
    /// What operators say, and at which steps.
    pub orders: Vec<Order>,
    /// The operator tries again.
    pub again: Option<Again>,
    /// Chance that a migration that waits in pre-switchover is never let go on; it is cancelled in the end.
    pub never_continue: u32,
    /// How many strangers connect to the target.
    pub strangers: u64,
    /// A page of the target's memory changes before it is loaded, in runs that verify.
    pub corrupt_memory: bool,
    /// After this time nothing happens by chance any more, in microseconds; `None` is at the end of the run.
    pub quiet_after_us: Option<u64>,
}

/// Jobs of the source that can fail.
const SOURCE_JOBS: [SourceJob; 8] = [
    SourceJob::ConnectControl,
    SourceJob::ConnectData,
    SourceJob::NotifySetup,
    SourceJob::StartLog,
    SourceJob::Sync,
    SourceJob::StopGuest,
    SourceJob::SaveState,
    SourceJob::ResumeGuest,
];

impl Faults {
    /// Draws faults. Each kind is left out of most runs, so that runs differ in what they are about and not all die at the same
    /// early step (swarm testing).
    pub fn random(rng: &mut Rng) -> Self {
        let since = rng.pick(&[Since::Start, Since::Start, Since::Stop, Since::Commit]);
        let steps = match since {
            Since::Start => rng.pick(&[60, 200, 600]),
            Since::Stop => 80,
            Since::Commit => 20,
        };
        let mut faults = Self {
            since,
            quiet_after_us: Some(rng.within(10_000..=60_000_000)),
            lose_tail: rng.chance(500),
            ..Self::default()
        };
        let f = &mut faults;
        let rare = |rng: &mut Rng| match since {
            Since::Start => rng.pick(&[2, 10, 50]),
            Since::Stop | Since::Commit => rng.pick(&[20, 100, 300]),
        };
        if rng.chance(500) {
            f.short_write = 300;
        }
        if rng.chance(200) {
            f.reset = rare(rng);
        }
        if rng.chance(200) {
            f.stall = rare(rng);
            f.stall_us = rng.chance(700).then_some(1..=40_000_000);
        }
        if rng.chance(80) {
            f.corrupt = rare(rng);
        }
        if rng.chance(200) {
            f.refuse_connect = 300;
        }
        if rng.chance(100) {
            f.hang_connect = 300;
        }
        if rng.chance(150) {
            f.fail_job = rng.pick(&[20, 100]);
        }
        if rng.chance(50) {
            f.fail_source_job = Some(rng.pick(&SOURCE_JOBS));
        }
        if rng.chance(100) {
            f.fail_target_job = Some(rng.pick(&[
                TargetJob::Prepare,
                TargetJob::Load,
                TargetJob::StartGuest,
                TargetJob::StartGuest,
            ]));
        }
        if rng.chance(150) {
            f.unplug_wait = 500;
        }
        if rng.chance(150) {
            f.slow_job = rng.pick(&[20, 200]);
        }
        if rng.chance(250) {
            f.cut_control = Some(random_cut(rng, 0));
        }
        if rng.chance(150) {
            f.cut_control_again = Some(random_cut(rng, 1));
        }
        if rng.chance(100) {
            f.cut_data = Some(DataCut {
                index: rng.below(8) as u16,
                items: rng.below(60),
                notice: rng.pick(&Notice::ALL),
            });
        }
        let kill = |rng: &mut Rng| Kill {
            step: rng.below(steps),
            silent: rng.chance(300),
        };
        if rng.chance(120) {
            f.kill_source = Some(kill(rng));
        }
        if rng.chance(150) {
            f.kill_target = Some(kill(rng));
            f.restart_target_after_us =
                rng.chance(500).then(|| rng.pick(&[10, 10_000, 20_000_000]));
        }
        let freeze = |rng: &mut Rng| Freeze {
            step: rng.below(steps),
            micros: rng.pick(&[1_000_000, 9_000_000, 35_000_000, 100_000_000]),
        };
        if rng.chance(150) {
            f.freeze_source = Some(freeze(rng));
        }
        if rng.chance(150) {
            f.freeze_target = Some(freeze(rng));
        }
        if rng.chance(150) {
            f.orders.push(Order {
                step: rng.below(steps),
                command: Command::Cancel,
            });
        }
        if rng.chance(350) {
            f.orders.extend(random_orders(rng, steps));
        }
        if rng.chance(150) {
            f.again = Some(Again {
                times: rng.within(1..=3) as u32,
                fresh: rng.chance(500),
            });
        }
        if rng.chance(150) {
            f.fail_disks = rng.pick(&[100, 500]);
        }
        f.never_continue = rng.pick(&[0, 100, 1000]);
        f.unplug_never = rng.pick(&[0, 0, 300]);
        if rng.chance(100) {
            f.strangers = rng.below(8);
        }
        f.corrupt_memory = rng.chance(10);
        faults
    }
}

/// Several commands, close to each other or not.
fn random_orders(rng: &mut Rng, steps: u64) -> Vec<Order> {
    let mut step = rng.below(steps);
    let spread = rng.pick(&[1, 3, 30, steps]);
    (0..rng.within(1..=6))
        .map(|_| {
            let command = Command::random(rng);
            let order = Order { step, command };
            step += rng.below(spread);
            order
        })
        .collect()
}

/// The exchange is about 600 bytes from the source and 200 from the target; on a connection that asks it is 50 and 20.
fn random_cut(rng: &mut Rng, connection: u64) -> ControlCut {
    let from = rng.pick(&[Side::Source, Side::Target]);
    let max = match (connection, from) {
        (0, Side::Source) => 700,
        (0, Side::Target) => 260,
        _ => 60,
    };
    ControlCut {
        connection,
        from,
        bytes: rng.below(max),
        notice: rng.pick(&Notice::ALL),
    }
}
