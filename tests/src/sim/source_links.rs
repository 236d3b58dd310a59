//! The source's connections: how they are made, what arrives on them, how they end.

use vmferry_transport::proto::SourceJob;
use vmferry_transport::units::Moment;
use vmferry_transport::wire::frame::{FrameBuffer, Resolution, SourceFrame, TargetFrame};

use super::net::{Item, LinkId, Use};
use super::{Event, JobId, Side, World};

impl World {
    pub(super) fn source_closes_links(&mut self) {
        self.source.closing = true;
        if self.rng.chance(700) {
            // Connects and rounds are ended at once; otherwise they may still report while the links are being closed.
            self.end_link_jobs();
        }
        if let Some(control) = self.source.control {
            let flush = !self.rng.chance(100);
            self.begin_closing(control, Side::Source, flush);
        }
        for link in self.source.data.clone() {
            self.begin_closing(link, Side::Source, false);
        }
        self.start_source_job(SourceJob::CloseLinks);
    }

    fn end_link_jobs(&mut self) {
        for job in [
            SourceJob::ConnectControl,
            SourceJob::ConnectData,
            SourceJob::Round,
            SourceJob::OfferFds,
            SourceJob::HandOverFds,
        ] {
            self.end_source_job(job);
        }
    }

    pub(super) fn source_connected(&mut self, now: Moment) {
        if !self.target.alive || !self.target.listens || self.chance(|faults| faults.refuse_connect)
        {
            let job = SourceJob::ConnectControl;
            self.source
                .core
                .handle_job_failed(now, job, "connection refused");
            return;
        }
        let link = self.open_link(Use::Control(self.control_connections));
        self.control_connections += 1;
        self.target_accepts(link);
        if self.source.closing {
            self.close_link(link, Side::Source, false);
            if self.rng.chance(500) {
                self.source.core.handle_control_connected(now);
            }
            return;
        }
        self.source.buffer = FrameBuffer::default();
        self.source.control = Some(link);
        if self.source.commit_sent {
            self.asking = Some(link);
        }
        self.source.core.handle_control_connected(now);
    }

    /// Connects are made; their hellos race with each other.
    pub(super) fn dial(&mut self, id: JobId) {
        let Some(at) = self.source.jobs.iter().position(|(job, _)| *job == id) else {
            return;
        };
        let refused = !self.target.alive || self.chance(|faults| faults.refuse_connect);
        if refused || self.source.closing {
            self.source.jobs.remove(at);
            let job = SourceJob::ConnectData;
            let now = self.moment();
            self.source
                .core
                .handle_job_failed(now, job, "connection refused");
            return;
        }
        for hello in std::mem::take(&mut self.source.hellos) {
            let link = self.open_link(Use::Data(hello.index));
            self.source.data.push(link);
            self.target_accepts(link);
            let frame = SourceFrame::DataHello(hello);
            self.write(link, Side::Source, Item::Bytes(frame.encode()));
        }
        // The target may well have answered before this side knows that it is connected.
        let delay = self.job_delay();
        self.schedule(delay, Event::SourceJob(id));
    }

    pub(super) fn source_links_closed(&mut self, now: Moment) {
        self.end_link_jobs();
        self.source.closing = false;
        for link in self
            .source
            .data
            .clone()
            .into_iter()
            .chain(self.source.control)
        {
            self.close_link(link, Side::Source, false);
        }
        self.source.control = None;
        self.source.data.clear();
        self.source.round = None;
        self.source.core.handle_links_closed(now);
    }

    pub(super) fn source_receives(&mut self, link: LinkId, item: Item) {
        let now = self.moment();
        if self.source.data.contains(&link) {
            // Data connections carry nothing towards the source, so this is the end of one.
            self.close_link(link, Side::Source, false);
            self.note(|| format!("source: {link:?} is gone"));
            self.source
                .core
                .handle_link_lost(now, "a data connection broke", false);
            return;
        }
        if self.source.control != Some(link) {
            return;
        }
        let Item::Bytes(bytes) = item else {
            self.close_link(link, Side::Source, false);
            self.note(|| format!("source: {link:?} is gone"));
            self.source
                .core
                .handle_link_lost(now, "the control connection broke", false);
            return;
        };
        let cut = self.rng.index(bytes.len() + 1);
        for part in [&bytes[..cut], &bytes[cut..]] {
            self.source.buffer.push(part);
            loop {
                match self.source.buffer.poll_frame::<TargetFrame>() {
                    Ok(Some(frame)) => self.source_hears(now, link, frame),
                    Ok(None) => break,
                    Err(error) => {
                        self.close_link(link, Side::Source, false);
                        self.note(|| format!("source: {error}"));
                        self.source
                            .core
                            .handle_link_lost(now, &error.to_string(), true);
                        return;
                    }
                }
            }
        }
    }

    fn source_hears(&mut self, now: Moment, link: LinkId, frame: TargetFrame) {
        self.note(|| format!("source hears {frame:?}"));
        // On a connection that asks, an ABORT only means that whoever answers does not know.
        let asks = self.asking == Some(link);
        let source = &mut self.source;
        source.denied |= match frame {
            TargetFrame::Abort(_) => !asks,
            TargetFrame::Resolved(Resolution::NotCommitted) => asks,
            _ => false,
        };
        let confirms = match frame {
            TargetFrame::Running { .. } => !asks,
            TargetFrame::Resolved(Resolution::Committed) => asks,
            _ => false,
        };
        source.confirmed |= confirms;
        source.core.handle_frame(now, frame);
        if confirms && let Some(blackout) = source.core.stats().blackout {
            let lasted = now.micros_since(source.stop_asked);
            assert_eq!(
                blackout.total_us(),
                lasted,
                "the parts of the blackout add up"
            );
        }
        self.drive_source();
    }
}
