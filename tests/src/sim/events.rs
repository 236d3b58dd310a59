//! What is going to happen in a world, in the order of its time and then of its scheduling.

use std::cmp::Reverse;

use super::commands::Command;
use super::net::LinkId;
use super::{JobId, Side, World};

#[derive(Clone, Copy, Debug)]
pub(super) enum Event {
    /// A side's driver or kernel moves on with writing.
    Flush(LinkId, Side),
    /// Something that a side sent arrives.
    Deliver(LinkId, Side),
    /// A data thread of the source goes on.
    Pump(LinkId),
    /// The data connections are made.
    Dial(JobId),
    SourceJob(JobId),
    TargetJob(JobId),
    /// The target's data threads have placed a round.
    Placed {
        generation: u64,
        round: u32,
        last: bool,
    },
    HelloDeadline(LinkId),
    ListenAgain,
    Exit,
    /// The operator looks at the target and says what became of the guest.
    Operator,
    /// Another target process begins to listen at the address of the one that died.
    Restart,
    /// A job is done that an operator asked for.
    Operation(Side, JobId),
    /// An operator says something, or as soon as the process takes commands again.
    Order(Command),
    /// The operator tries again.
    Again,
    /// The guest has let go of its devices, or will not. Of interest as long as somebody watches.
    Unplug {
        watch: JobId,
        done: bool,
    },
    Stranger,
}

#[derive(Debug)]
pub(super) struct Scheduled {
    pub(super) at: u64,
    pub(super) number: u64,
    pub(super) event: Event,
}

impl PartialEq for Scheduled {
    fn eq(&self, other: &Self) -> bool {
        self.number == other.number
    }
}

impl Eq for Scheduled {}

impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Scheduled {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.number).cmp(&(other.at, other.number))
    }
}

impl World {
    pub(super) fn schedule(&mut self, delay_us: u64, event: Event) {
        self.schedule_at(self.now + delay_us, event);
    }

    pub(super) fn schedule_at(&mut self, at: u64, event: Event) {
        self.scheduled += 1;
        let number = self.scheduled;
        self.events.push(Reverse(Scheduled { at, number, event }));
    }
}
