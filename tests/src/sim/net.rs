//! The network: ordered connections whose bytes take time, stall, break and get lost.
//!
//! A side writes items into its pipe's outbox (what the driver holds); they move into flight (what the kernels hold) in pieces, and
//! arrive in order. Data connections carry batches of pages instead of bytes: what matters is when a page was read and in which order
//! batches of different connections arrive.

use std::collections::VecDeque;

use super::faults::Notice;
use super::guest::Page;
use super::{Event, Side, World};

/// A connection; never used twice.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) struct LinkId(pub(super) u64);

/// What a page of a batch holds.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Content {
    Data(u64),
    Zero,
    Hole,
}

/// What travels.
#[derive(Clone, Debug)]
pub(super) enum Item {
    Bytes(Vec<u8>),
    Pages {
        round: u32,
        pages: Vec<(Page, Content)>,
    },
    RoundEnd {
        round: u32,
        last: bool,
    },
    /// The other side closed.
    Eof,
    /// The connection broke.
    Reset,
}

/// Who uses a connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Use {
    /// Number of the control connection within the run.
    Control(u64),
    Data(u16),
    /// Somebody else at the source's end.
    Stranger,
}

#[derive(Debug, Default)]
pub(super) struct Pipe {
    outbox: VecDeque<Item>,
    flight: VecDeque<Item>,
    last_arrival: u64,
    stalled_until: u64,
    flushing: bool,
    /// Nothing gets into flight any more.
    dead: bool,
    /// Bytes of a control connection, items of a data connection.
    carried: u64,
}

#[derive(Debug)]
pub(super) struct Link {
    pub(super) used: Use,
    pipes: [Pipe; 2],
    /// The side has not closed its end.
    pub(super) open: [bool; 2],
    /// The side still takes what arrives: a driver that is closing a connection may.
    pub(super) reads: [bool; 2],
}

/// Items under way on a connection before its sender has to wait.
const FLIGHT_MAX: usize = 6;

impl World {
    pub(super) fn open_link(&mut self, used: Use) -> LinkId {
        self.links.push(Link {
            used,
            pipes: Default::default(),
            open: [true; 2],
            reads: [true; 2],
        });
        LinkId(self.links.len() as u64 - 1)
    }

    pub(super) fn link(&mut self, id: LinkId) -> &mut Link {
        &mut self.links[id.0 as usize]
    }

    fn pipe(&mut self, id: LinkId, from: Side) -> &mut Pipe {
        &mut self.link(id).pipes[from as usize]
    }

    /// Whether the sender would have to wait for the link.
    pub(super) fn is_full(&mut self, id: LinkId, from: Side) -> bool {
        let pipe = self.pipe(id, from);
        pipe.flight.len() + pipe.outbox.len() >= FLIGHT_MAX
    }

    pub(super) fn write(&mut self, id: LinkId, from: Side, item: Item) {
        if !self.link(id).open[from as usize] || self.pipe(id, from).dead {
            return;
        }
        self.pipe(id, from).outbox.push_back(item);
        self.flush_soon(id, from);
    }

    fn flush_soon(&mut self, id: LinkId, from: Side) {
        let pipe = self.pipe(id, from);
        if !pipe.flushing && !pipe.outbox.is_empty() && pipe.flight.len() < FLIGHT_MAX {
            pipe.flushing = true;
            let delay = self.rng.below(30);
            self.schedule(delay, Event::Flush(id, from));
        }
    }

    pub(super) fn flush(&mut self, id: LinkId, from: Side) {
        let short_write = self.chance(|faults| faults.short_write);
        let at = self.rng.bits();
        let pipe = self.pipe(id, from);
        pipe.flushing = false;
        if pipe.dead {
            pipe.outbox.clear();
            return;
        }
        let Some(mut item) = pipe.outbox.pop_front() else {
            return;
        };
        if let Item::Bytes(bytes) = &mut item
            && short_write
            && bytes.len() > 1
        {
            let rest = bytes.split_off(1 + at as usize % (bytes.len() - 1));
            pipe.outbox.push_front(Item::Bytes(rest));
        }
        self.launch(id, from, item);
        self.flush_soon(id, from);
    }

    /// Puts an item into flight, unless the link is to be cut within it.
    fn launch(&mut self, id: LinkId, from: Side, mut item: Item) {
        let (used, carried) = (self.link(id).used, self.pipe(id, from).carried);
        let mut cut = None;
        let size = match (&mut item, used) {
            (Item::Bytes(bytes), Use::Control(number)) => {
                let cuts = [self.faults.cut_control, self.faults.cut_control_again];
                let found = cuts
                    .into_iter()
                    .flatten()
                    .find(|cut| cut.connection == number && cut.from == from);
                if let Some(found) = found.filter(|cut| cut.bytes < carried + bytes.len() as u64) {
                    bytes.truncate(found.bytes.saturating_sub(carried) as usize);
                    cut = Some(found.notice);
                }
                bytes.len() as u64
            }
            (Item::Pages { .. } | Item::RoundEnd { .. }, Use::Data(index)) => {
                let found = self.faults.cut_data.filter(|cut| cut.index == index);
                if let Some(found) = found.filter(|cut| cut.items <= carried) {
                    cut = Some(found.notice);
                }
                1
            }
            _ => 0,
        };
        let pipe = self.pipe(id, from);
        pipe.carried += size;
        pipe.dead |= matches!(item, Item::Eof);
        if cut.is_none() || matches!(&item, Item::Bytes(bytes) if !bytes.is_empty()) {
            self.put_into_flight(id, from, item);
        }
        if let Some(notice) = cut {
            self.note(|| format!("{id:?} is cut, told: {notice:?}"));
            self.break_link(id, from, notice);
        }
    }

    fn put_into_flight(&mut self, id: LinkId, from: Side, item: Item) {
        let delay = self.link_delay();
        let now = self.now;
        let pipe = self.pipe(id, from);
        let arrival = (now + delay).max(pipe.last_arrival).max(pipe.stalled_until);
        pipe.last_arrival = arrival;
        pipe.flight.push_back(item);
        self.schedule_at(arrival, Event::Deliver(id, from));
    }

    /// What `from` sent arrives. Every item has an event; whichever comes first takes the first item, so that order holds whatever
    /// happens to the events.
    pub(super) fn deliver(&mut self, id: LinkId, from: Side) {
        let Some(item) = self.pipe(id, from).flight.pop_front() else {
            return;
        };
        let to = from.other();
        self.flush_soon(id, from);
        if from == Side::Source && matches!(self.link(id).used, Use::Data(_)) {
            self.pump_soon(id);
        }
        let item = match item {
            item @ (Item::Eof | Item::Reset) => item,
            item => match self.meet_faults(id, from, item) {
                Some(item) => item,
                None => return,
            },
        };
        let is_listened_to = match (self.link(id).used, to) {
            (Use::Stranger, Side::Source) => return,
            (_, Side::Source) => self.source.alive,
            (_, Side::Target) => self.target.alive,
        } && self.link(id).reads[to as usize];
        if !is_listened_to {
            if !matches!(item, Item::Eof | Item::Reset) {
                self.tell_reset(id, from);
            }
            return;
        }
        match to {
            Side::Source => self.source_receives(id, item),
            Side::Target => self.target_receives(id, item),
        }
    }

    /// What the link does to something that is about to arrive.
    fn meet_faults(&mut self, id: LinkId, from: Side, mut item: Item) -> Option<Item> {
        if self.chance(|faults| faults.reset) {
            self.note(|| format!("{id:?} is reset"));
            // The item is lost, so what came behind it is.
            self.pipe(id, from).flight.clear();
            self.break_link(id, from, Notice::Both);
            return None;
        }
        if self.chance(|faults| faults.stall) {
            match self.faults.stall_us.clone() {
                Some(range) => {
                    let until = self.now + self.rng.within(range);
                    self.note(|| format!("{id:?} from {from:?} stalls until {until}"));
                    self.pipe(id, from).stalled_until = until;
                }
                None => {
                    self.note(|| format!("{id:?} from {from:?} stalls for ever"));
                    self.break_link(id, from, Notice::Nobody);
                }
            }
        }
        if self.chance(|faults| faults.corrupt) {
            if let Item::Bytes(bytes) = &mut item {
                let at = self.rng.index(bytes.len());
                bytes[at] ^= 1 << self.rng.below(8);
                self.note(|| format!("a bit flips on {id:?}"));
            } else {
                // Data connections have their own checksums, which the model does not show: the receiver gives up.
                self.note(|| format!("a page is corrupted on {id:?}"));
                self.pipe(id, from).flight.clear();
                self.tell_reset(id, from.other());
                return None;
            }
        }
        Some(item)
    }

    /// The connection carries nothing any more.
    pub(super) fn break_link(&mut self, id: LinkId, from: Side, notice: Notice) {
        let lose_tail = self.faults.lose_tail;
        for pipe in &mut self.link(id).pipes {
            pipe.dead = true;
            pipe.outbox.clear();
            if lose_tail {
                pipe.flight.clear();
            }
        }
        if matches!(notice, Notice::Both | Notice::Sender) {
            self.tell_reset(id, from);
        }
        if matches!(notice, Notice::Both | Notice::Receiver) {
            self.tell_reset(id, from.other());
        }
    }

    fn tell_reset(&mut self, id: LinkId, side: Side) {
        self.pipe(id, side.other()).dead = true;
        self.put_into_flight(id, side.other(), Item::Reset);
    }

    /// A side closes its end. What it has written still leaves, or not.
    pub(super) fn close_link(&mut self, id: LinkId, side: Side, flush: bool) {
        self.link(id).reads[side as usize] = false;
        if !std::mem::take(&mut self.link(id).open[side as usize]) {
            return;
        }
        let pipe = self.pipe(id, side);
        if pipe.dead {
            return;
        }
        if !flush {
            pipe.outbox.clear();
        }
        pipe.outbox.push_back(Item::Eof);
        self.flush_soon(id, side);
    }

    /// A side begins to close its end. What still arrives may be reported until [`close_link`](Self::close_link).
    pub(super) fn begin_closing(&mut self, id: LinkId, side: Side, flush: bool) {
        let reads = self.link(id).reads[side as usize] && self.rng.chance(500);
        self.close_link(id, side, flush);
        self.link(id).reads[side as usize] = reads;
    }

    /// A process died: the kernel closes its connections, or the whole host is gone.
    pub(super) fn close_all(&mut self, side: Side, silent: bool) {
        for id in (0..self.links.len() as u64).map(LinkId) {
            let link = self.link(id);
            if !link.open[side as usize] || (side == Side::Source && link.used == Use::Stranger) {
                continue;
            }
            if silent {
                self.break_link(id, side, Notice::Nobody);
                let link = self.link(id);
                link.open[side as usize] = false;
                link.reads[side as usize] = false;
            } else {
                self.close_link(id, side, false);
            }
        }
    }

    /// How much a pipe has carried, for tests that cut it everywhere.
    pub(super) fn carried(&self, used: Use, from: Side) -> Option<u64> {
        let link = self.links.iter().find(|link| link.used == used)?;
        Some(link.pipes[from as usize].carried)
    }
}
