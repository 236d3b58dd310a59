//! The source's data threads: what they claim, when they read it, and the end of a round.

use vmferry_transport::proto::{FirstRound, RoundSent, SourceJob};
use vmferry_transport::units::{Moment, PageCount, PageIndex, RoundId};

use super::guest::Page;
use super::net::{Content, Item, LinkId};
use super::{Event, Side, World};

/// A round that is being sent.
#[derive(Debug)]
pub(super) struct Round {
    number: RoundId,
    last: bool,
    /// Pages that no connection has claimed.
    unclaimed: Vec<(Page, bool)>,
    ended: Vec<LinkId>,
    sent: RoundSent,
}

impl World {
    pub(super) fn log_started(&mut self, now: Moment) {
        let source = &mut self.source;
        source.log_on = true;
        source.log.clear();
        source.unsent = source.present.clone();
        let all = self.blocks.iter().sum::<u64>();
        source.holes = Vec::new();
        for (block, pages) in self.blocks.iter().enumerate() {
            for index in (0..*pages).map(PageIndex) {
                let page = Page { block, index };
                if !source.present.contains(page) {
                    source.holes.push(page);
                }
            }
        }
        let present = source.present.count();
        let holes = PageCount(all - present.0);
        self.source
            .core
            .handle_log_started(now, FirstRound { present, holes });
    }

    pub(super) fn send_round(&mut self, number: RoundId, last: bool) {
        assert!(
            !last || !self.source.running,
            "the last round of a running guest"
        );
        let id = self.new_job();
        self.source.jobs.push((id, SourceJob::Round));
        let mut unclaimed: Vec<_> = self
            .source
            .unsent
            .pages()
            .into_iter()
            .map(|page| (page, true))
            .collect();
        unclaimed.extend(self.source.holes.drain(..).map(|page| (page, false)));
        self.source.unsent.clear();
        self.source.round = Some(Round {
            number,
            last,
            unclaimed,
            ended: Vec::new(),
            sent: RoundSent::default(),
        });
        for link in self.source.data.clone() {
            self.pump_soon(link);
        }
    }

    /// The data thread of a connection goes on when it can.
    pub(super) fn pump_soon(&mut self, link: LinkId) {
        if self.source.round.is_some() && self.source.data.contains(&link) {
            let delay = self.rng.below(60);
            self.schedule(delay, Event::Pump(link));
        }
    }

    /// One data thread claims some pages, reads them and sends them.
    pub(super) fn pump(&mut self, link: LinkId) {
        if !self.source.has_job(SourceJob::Round)
            || !self.source.data.contains(&link)
            || self.source.closing
            || self.is_full(link, Side::Source)
        {
            return;
        }
        let count = self.rng.within(1..=16) as usize;
        let Some(round) = &mut self.source.round else {
            return;
        };
        if round.ended.contains(&link) {
            return;
        }
        let number = round.number.0;
        let from = round.unclaimed.len().saturating_sub(count);
        let claimed = round.unclaimed.split_off(from);
        if claimed.is_empty() {
            round.ended.push(link);
            let last = round.last;
            self.write(
                link,
                Side::Source,
                Item::RoundEnd {
                    round: number,
                    last,
                },
            );
            self.end_round_when_sent();
            return;
        }
        let pages: Vec<_> = claimed
            .into_iter()
            .map(|(page, present)| {
                let content = match self.source_memory.get(page) {
                    _ if !present => Content::Hole,
                    0 => Content::Zero,
                    content => Content::Data(content),
                };
                (page, content)
            })
            .collect();
        for (_, content) in &pages {
            match content {
                Content::Data(_) => round.sent.data.0 += 1,
                Content::Zero => round.sent.zero.0 += 1,
                Content::Hole => {}
            }
        }
        self.write(
            link,
            Side::Source,
            Item::Pages {
                round: number,
                pages,
            },
        );
        self.source.progress_bytes += 4096;
        let (now, bytes) = (self.moment(), self.source.progress_bytes);
        self.source.core.handle_progress(now, bytes);
        self.pump_soon(link);
    }

    pub(super) fn end_round_when_sent(&mut self) {
        let source = &mut self.source;
        if source
            .round
            .as_ref()
            .is_none_or(|round| round.ended.len() < source.data.len())
        {
            return;
        }
        let Some(round) = source.round.take() else {
            return;
        };
        self.end_source_job(SourceJob::Round);
        let now = self.moment();
        if self.chance(|faults| faults.fail_job) {
            self.source
                .core
                .handle_job_failed(now, SourceJob::Round, "broken pipe");
        } else {
            self.source.core.handle_round_sent(now, round.sent);
        }
    }
}
