//! What a migration looks like from outside: metrics, records, log spans, and the page made from records.
//!
//! ```text
//!   engine --Glance, status, end--> Observer --+--> watch::Watch  -> record::MigrationRecord -> thread -> file -> report
//!                                              +--> figures::Board <- thread <- Prometheus
//! ```
//!
//! The engine tells its `Observer` what happens and never waits for it: files are written and scrapers are answered by threads of
//! their own, which get copies. An observer decides nothing about a migration.

pub(crate) mod figures;
pub mod logging;
pub mod metrics;
pub mod record;
pub mod report;
mod spans;
mod watch;

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use tracing::Span;
use vmferry_transport::control::Address;
use vmferry_transport::units::Moment;

use crate::machine::Machine;
use crate::migration::status::MigrationStatus;
use crate::qmp::schema::RunState;
use figures::Board;
use metrics::MetricsServer;
use record::writer::RecordWriter;
use record::{BlackoutPart, Side};
use spans::Spans;
use watch::Watch;
pub(crate) use watch::{Beginning, Glance};

/// What `vmferry run` is to show of its migrations.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct ObserveConfig {
    /// Where Prometheus may ask.
    pub metrics: Option<Address>,
    /// Folder for records.
    pub records: Option<PathBuf>,
}

/// How a migration ended, as far as the status does not say it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ending {
    /// Why it failed.
    pub(crate) error: Option<String>,
    /// The blackout, if it is known.
    pub(crate) blackout: Vec<BlackoutPart>,
    /// Memory that exists at this side.
    pub(crate) populated_bytes: Option<u64>,
    /// Memory that existed at the target when it was ready.
    pub(crate) populated_target_bytes: Option<u64>,
}

/// Sees everything, owns what has been seen. See the module documentation.
#[derive(Debug)]
pub(crate) struct Observer {
    board: Arc<Board>,
    server: Option<MetricsServer>,
    writer: Option<RecordWriter>,
    outgoing: Watched,
    incoming: Watched,
}

/// The migration in one direction.
#[derive(Debug, Default)]
struct Watched {
    /// While one is under way.
    watch: Option<Watch>,
    /// Kept when it has ended: there may be something left to say.
    spans: Option<Spans>,
}

impl Observer {
    /// Opens what was asked for.
    ///
    /// # Errors
    /// When the address cannot be listened on, or records cannot be written.
    pub(crate) fn start(
        config: &ObserveConfig,
        machine: &Arc<dyn Machine>,
    ) -> anyhow::Result<Self> {
        let board = Arc::new(Board::default());
        let writer = match &config.records {
            Some(folder) => Some(RecordWriter::start(folder)?),
            None => None,
        };
        let server = match &config.metrics {
            Some(address) => Some(MetricsServer::start(
                address,
                None,
                Arc::clone(&board),
                Arc::clone(machine),
            )?),
            None => None,
        };
        Ok(Self {
            board,
            server,
            writer,
            outgoing: Watched::default(),
            incoming: Watched::default(),
        })
    }

    /// Another descriptor of the socket that metrics are served on, if they are.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub(crate) fn metrics_listener(&self) -> std::io::Result<Option<OwnedFd>> {
        let server = self.server.as_ref();
        server.map(MetricsServer::duplicate_listener).transpose()
    }

    /// Another process serves the metrics now.
    pub(crate) fn leave_metrics(&mut self) {
        if let Some(server) = self.server.take() {
            server.leave();
        }
    }

    /// Serves metrics where another process did, or at `address` if that process did not.
    ///
    /// # Errors
    /// When the address cannot be listened on.
    pub(crate) fn serve_metrics(
        &mut self,
        address: &Address,
        inherited: Option<OwnedFd>,
        machine: &Arc<dyn Machine>,
    ) -> anyhow::Result<()> {
        let (board, machine) = (Arc::clone(&self.board), Arc::clone(machine));
        self.server = Some(MetricsServer::start(address, inherited, board, machine)?);
        Ok(())
    }

    /// Where Prometheus may ask, the port resolved.
    pub(crate) fn metrics_address(&self) -> Option<&Address> {
        self.server.as_ref().map(MetricsServer::address)
    }

    /// A migration begins at this side.
    pub(crate) fn begin(&mut self, beginning: Beginning) {
        let spans = Spans::new(beginning.side, &beginning.migration_id);
        let side = beginning.side;
        self.board.change(|figures| figures.side(side).begin());
        *self.slot(side) = Watched {
            watch: Some(Watch::new(beginning)),
            spans: Some(spans),
        };
    }

    /// The status of a migration has changed.
    pub(crate) fn status(&mut self, side: Side, now: Moment, status: MigrationStatus) {
        self.board
            .change(|figures| figures.side(side).status = status);
        let watched = self.slot(side);
        if let Some(spans) = &mut watched.spans {
            spans.phase(status);
        }
        if let Some(watch) = &mut watched.watch {
            watch.status(now, status);
        }
    }

    /// How a migration is doing now. Cheap unless something has changed or a sample is due.
    pub(crate) fn look(&mut self, side: Side, glance: &Glance) {
        let watched = self.slot(side);
        let Some(watch) = &mut watched.watch else {
            return;
        };
        if let Some(spans) = &mut watched.spans {
            spans.round(glance.round);
        }
        if watch.look(glance) {
            let live = watch.live();
            self.board
                .change(|figures| figures.side(side).set_live(live));
        }
    }

    /// A migration has ended; its last status was told before.
    pub(crate) fn end(&mut self, side: Side, glance: &Glance, ending: Ending) {
        let Some(mut watch) = self.slot(side).watch.take() else {
            return;
        };
        watch.look(glance);
        let live = watch.live();
        let record = watch.finish(glance.now, ending);
        self.board
            .change(|figures| figures.side(side).end(live, &record));
        if let Some(writer) = &self.writer {
            writer.submit(record);
        }
    }

    /// There is no migration at this side any more, whatever was under way.
    pub(crate) fn abandon(&mut self, side: Side, now: Moment) {
        let Some(watch) = self.slot(side).watch.take() else {
            return;
        };
        let live = watch.live();
        let record = watch.finish(now, Ending::default());
        self.board
            .change(|figures| figures.side(side).end(live, &record));
        if let Some(writer) = &self.writer {
            writer.submit(record);
        }
    }

    /// The state of the VM.
    pub(crate) fn runstate(&mut self, state: RunState) {
        self.board.change_runstate(state);
    }

    /// When the next sample is due.
    pub(crate) fn due(&self) -> Option<Moment> {
        let watched = [&self.outgoing, &self.incoming];
        let watches = watched.into_iter().filter_map(|it| it.watch.as_ref());
        watches.map(Watch::due).min()
    }

    /// What is logged about the migration of this side belongs in here.
    pub(crate) fn span(&self, side: Side) -> Span {
        let watched = match side {
            Side::Source => &self.outgoing,
            Side::Target => &self.incoming,
        };
        let spans = watched.spans.as_ref();
        spans.map_or_else(Span::none, Spans::innermost)
    }

    /// The process ends: writes what there is, waits for the disk for a few seconds at most.
    pub(crate) fn finish(mut self, now: Moment) {
        for side in [Side::Source, Side::Target] {
            self.abandon(side, now);
        }
        if let Some(writer) = self.writer {
            writer.finish();
        }
    }

    fn slot(&mut self, side: Side) -> &mut Watched {
        match side {
            Side::Source => &mut self.outgoing,
            Side::Target => &mut self.incoming,
        }
    }
}
