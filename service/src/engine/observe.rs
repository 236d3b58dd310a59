//! What the engine tells its observer: one place that looks at the migrations and one call wherever one begins, changes or ends.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value};
use vmferry_transport::memory::populate;
use vmferry_transport::proto::{MigrationStatus, TargetStatus};
use vmferry_transport::units::PAGE_SIZE;

use super::arrival::qmp_status;
use super::event::Event;
use super::incoming::Incoming;
use super::info::blackout;
use super::outgoing::Outgoing;
use super::settle::Succession;
use super::{Engine, software};
use crate::observe::record::{BlackoutPart, Side};
use crate::observe::{Beginning, Ending, Glance};
use crate::qmp::schema::BlackoutInfo;

impl Engine {
    /// Lets the observer see how everything is. Called after every event, and when a sample is due.
    pub(super) fn observe(&mut self) {
        self.observer.runstate(self.runstate);
        match &self.outgoing {
            Some(outgoing) => {
                let glance = self.outgoing_glance(outgoing);
                self.observer.look(Side::Source, &glance);
            }
            None => self.observer.abandon(Side::Source, self.clock.now()),
        }
        match &self.incoming {
            Some(incoming) if !qmp_status(incoming.core().status()).is_idle() => {
                let glance = self.incoming_glance(incoming);
                self.observer.look(Side::Target, &glance);
            }
            _ => self.observer.abandon(Side::Target, self.clock.now()),
        }
    }

    /// The span that an event belongs to.
    pub(super) fn span_of(&self, event: &Event) -> tracing::Span {
        match event {
            Event::Source(..) => self.observer.span(Side::Source),
            Event::Target(_) => self.observer.span(Side::Target),
            _ => tracing::Span::none(),
        }
    }

    /// The status of the outgoing migration has changed: logged here, and nowhere else.
    pub(super) fn observe_outgoing(&mut self, status: MigrationStatus) {
        let now = self.clock.now();
        if let (MigrationStatus::Setup, Some(outgoing)) = (status, &self.outgoing) {
            let beginning = Beginning {
                migration_id: outgoing.core().migration_id().to_string(),
                address: outgoing.route().address().to_string(),
                backend: outgoing.backend().backend.name().to_owned(),
                ..self.beginning(Side::Source)
            };
            self.observer.begin(beginning);
        }
        self.observer.status(Side::Source, now, status);
        let span = self.observer.span(Side::Source);
        span.in_scope(|| tracing::info!(%status, "outgoing migration"));
    }

    /// The outgoing migration is over, and why if not as wanted.
    pub(super) fn observe_outgoing_end(&mut self, outgoing: &Outgoing, error: Option<&str>) {
        let stats = outgoing.core().stats();
        let ending = Ending {
            error: error.map(str::to_owned),
            blackout: stats
                .blackout
                .map_or_else(Vec::new, |parts| blackout_parts(&blackout(parts))),
            populated_bytes: populate::populated_bytes(self.machine.ram()).ok(),
            populated_target_bytes: stats.ready.as_ref().map(|ready| ready.populated_bytes),
        };
        let glance = self.outgoing_glance(outgoing);
        self.observer.end(Side::Source, &glance, ending);
    }

    /// The same for the incoming migration.
    pub(super) fn observe_incoming(&mut self, status: MigrationStatus) {
        let now = self.clock.now();
        let Some(incoming) = &self.incoming else {
            return;
        };
        if status == MigrationStatus::Setup {
            let id = incoming.core().migration_id();
            let beginning = Beginning {
                migration_id: id.unwrap_or_default().to_string(),
                address: incoming.address().to_string(),
                backend: incoming.backend().backend.name().to_owned(),
                ..self.beginning(Side::Target)
            };
            self.observer.begin(beginning);
        }
        self.observer.status(Side::Target, now, status);
        let span = self.observer.span(Side::Target);
        span.in_scope(|| tracing::info!(%status, "incoming migration"));
        if status.is_end() {
            let error = incoming.core().error().map(ToString::to_string);
            let succession = self.house.succession.as_ref();
            let ending = Ending {
                error: error.or_else(|| succession?.returned.clone()),
                blackout: succession
                    .and_then(Succession::blackout)
                    .map_or_else(Vec::new, |whole| blackout_parts(&whole)),
                populated_bytes: populate::populated_bytes(self.machine.ram()).ok(),
                ..Ending::default()
            };
            let glance = self.incoming_glance(incoming);
            self.observer.end(Side::Target, &glance, ending);
        }
    }

    /// The status of the incoming migration for others: a guest that is back in the old program has arrived, and its upgrade has failed.
    pub(super) fn arrival_status(&self, status: TargetStatus) -> MigrationStatus {
        let succession = self.house.succession.as_ref();
        match qmp_status(status) {
            MigrationStatus::Completed if succession.is_some_and(|it| it.returned.is_some()) => {
                MigrationStatus::Failed
            }
            status => status,
        }
    }

    fn beginning(&self, side: Side) -> Beginning {
        let parameters = match serde_json::to_value(&self.parameters) {
            Ok(Value::Object(parameters)) => parameters,
            _ => Map::new(),
        };
        let on = self.capabilities.list().into_iter().filter(|it| it.state);
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH);
        Beginning {
            side,
            now: self.clock.now(),
            unix_us: since_1970.map_or(0, super::clock::micros),
            migration_id: String::new(),
            software: software(),
            host: rustix::system::uname()
                .nodename()
                .to_string_lossy()
                .into_owned(),
            pid: std::process::id(),
            vm_name: self.name.clone(),
            address: String::new(),
            accelerator: self.machine.accel().to_string(),
            backend: String::new(),
            ram_bytes: self.machine.ram().pages().to_bytes(),
            parameters,
            capabilities: on.map(|capability| capability.capability).collect(),
        }
    }

    fn outgoing_glance(&self, outgoing: &Outgoing) -> Glance {
        let (core, progress) = (outgoing.core(), outgoing.progress());
        let (stats, estimate) = (core.stats(), core.estimate());
        let began = stats.first_round.is_some();
        let remaining = if core.status() == MigrationStatus::Completed {
            0
        } else {
            progress.round_pages_remaining() * PAGE_SIZE
        };
        Glance {
            now: self.clock.now(),
            round: if began {
                u64::from(stats.round.0) + 1
            } else {
                0
            },
            round_pages: began.then_some(stats.round_pages.0),
            remaining_bytes: began.then_some(remaining),
            syncs: stats.sync_count,
            // Until the first fetch behind the first round nothing is known.
            dirty_pages_per_sec: (stats.sync_count > 1).then(|| estimate.dirty_pages_per_sec()),
            predicted_blackout_us: stats.predicted_blackout_us,
            data_pages: stats.data.0,
            zero_pages: stats.zero.0,
            hole_pages: None,
            zero_copy_sends: progress.zero_copy.sends,
            zero_copy_fallbacks: progress.zero_copy.fallbacks,
            throttle_percent: core.throttle_percent(),
            peer_software: Some(stats.target_software.clone()),
            connection_bytes: progress.connection_bytes,
        }
    }

    fn incoming_glance(&self, incoming: &Incoming) -> Glance {
        let progress = incoming.progress();
        let over = incoming.core().status() == TargetStatus::Completed;
        let begun = !progress.connection_bytes.is_empty();
        Glance {
            now: self.clock.now(),
            // The round after the complete ones is under way, unless nothing follows.
            round: progress.rounds + u64::from(begun && !over),
            data_pages: progress.counts.data_pages,
            zero_pages: progress.counts.zero_pages,
            hole_pages: Some(progress.counts.hole_pages),
            connection_bytes: progress.connection_bytes,
            ..Glance::default()
        }
    }
}

fn blackout_parts(blackout: &BlackoutInfo) -> Vec<BlackoutPart> {
    let parts = blackout.parts().into_iter();
    parts
        .map(|(part, duration_us)| BlackoutPart {
            part: part.to_owned(),
            duration_us,
        })
        .collect()
}
