//! Names, meanings and values of the metrics. The README has the same table for operators; a test compares them.
//!
//! Counters go on from one migration to the next. Gauges show the migration under way, and afterwards the last one; what is not known
//! is left out rather than shown as 0.

use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;
use vmferry_transport::memory::populate;
use vmferry_transport::units::PAGE_SIZE;

use crate::machine::Machine;
use crate::machine::workload::WorkloadStats;
use crate::migration::status::MigrationStatus;
use crate::observe::figures::{Board, Figures, SideFigures};
use crate::observe::record::Side;
use crate::qmp::schema::RunState;

/// A metric as operators know it. The encoder appends `_total` to the names of counters.
#[derive(Debug)]
struct Metric {
    name: &'static str,
    kind: Kind,
    help: &'static str,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Kind {
    Gauge,
    Counter,
}

macro_rules! metrics {
    ($($ident:ident = $kind:ident $name:literal, $help:literal;)*) => {
        $(const $ident: Metric = Metric { name: $name, kind: Kind::$kind, help: $help };)*
        /// Every metric, in the order in which they are shown.
        #[cfg(test)]
        const ALL: &[Metric] = &[$($ident),*];
    };
}

metrics! {
    BUILD = Gauge "vmferry_build_info", "Always 1; the label has the version";
    STATE = Gauge "vmferry_vm_state", "1 for the state that the VM is in, 0 for the others";
    RAM = Gauge "vmferry_ram_bytes", "Size of guest memory";
    POPULATED = Gauge "vmferry_ram_populated_bytes", "Guest memory that exists on this host";
    GAP = Gauge "vmferry_guest_longest_gap_seconds", "Longest time between two writes of the built-in guest, as it saw it itself";
    GUEST_ERRORS = Gauge "vmferry_guest_errors", "Pages that the built-in guest found with wrong content; anything but 0 is corruption";
    STATUS = Gauge "vmferry_migration_status", "1 for the status of the migration, 0 for the others";
    MIGRATIONS = Counter "vmferry_migrations", "Migrations that have ended";
    SENT_BYTES = Counter "vmferry_sent_bytes", "Bytes sent on data connections, while the guest ran or during the blackout";
    RECEIVED_BYTES = Counter "vmferry_received_bytes", "Bytes received on data connections";
    SENT_PAGES = Counter "vmferry_sent_pages", "Pages sent, with content or as zero";
    RECEIVED_PAGES = Counter "vmferry_received_pages", "Pages received, with content, as zero or as holes";
    ROUNDS = Counter "vmferry_migration_rounds", "Rounds of copying";
    ROUND = Gauge "vmferry_migration_round", "Round under way, the first is 1";
    ZERO_COPY = Counter "vmferry_zero_copy_sends", "Sends for which the kernel was asked not to copy";
    FALLBACKS = Counter "vmferry_zero_copy_fallbacks", "Those of them that it did by copying all the same";
    RATE = Gauge "vmferry_migration_bytes_per_second", "Bytes sent or received per second, mean of the last second; 0 when nothing is under way";
    DIRTY_RATE = Gauge "vmferry_migration_dirty_bytes_per_second", "Memory that the guest writes per second, as the last fetch of the dirty log showed";
    REMAINING = Gauge "vmferry_migration_remaining_bytes", "Memory that the round under way has still to send";
    CONNECTION = Gauge "vmferry_migration_connection_bytes", "Bytes of this migration on each data connection";
    DURATION = Gauge "vmferry_migration_duration_seconds", "Time since the begin of the migration, or from begin to end";
    PREDICTED = Gauge "vmferry_migration_predicted_blackout_seconds", "How long the guest would stand still if the switchover came now";
    THROTTLE = Gauge "vmferry_migration_throttle_percent", "Share of the time that vCPUs are kept from running so that the migration converges";
    BLACKOUT = Gauge "vmferry_blackout_seconds", "Parts of the blackout of the last completed migration; they add up to the downtime";
    DOWNTIME = Gauge "vmferry_downtime_seconds", "How long the guest stood still in the last completed migration";
}

/// Where figures come from.
pub(super) struct Source {
    pub(super) board: Arc<Board>,
    pub(super) machine: Arc<dyn Machine>,
}

impl Source {
    /// The whole text as of now.
    pub(super) fn render(&self) -> String {
        let ram = self.machine.ram();
        render(&Seen {
            figures: self.board.figures(),
            ram_bytes: ram.pages().to_bytes(),
            // Left out where the files behind the memory cannot be asked.
            populated_bytes: populate::populated_bytes(ram).ok(),
            workload: self.machine.workload_stats(),
        })
    }
}

/// Everything that is shown.
#[derive(Debug)]
struct Seen {
    figures: Arc<Figures>,
    ram_bytes: u64,
    populated_bytes: Option<u64>,
    workload: Option<WorkloadStats>,
}

fn render(seen: &Seen) -> String {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Families::of(seen)));
    let mut page = String::with_capacity(16 << 10);
    // Writing into a string does not fail.
    let _ = text::encode(&mut page, &registry);
    page
}

#[derive(Clone, Copy, Debug)]
enum Value {
    Whole(u64),
    Real(f64),
}

type Labels = Vec<(&'static str, String)>;

/// Metrics with their values.
#[derive(Debug, Default)]
struct Families(Vec<(Metric, Vec<(Labels, Value)>)>);

impl Families {
    fn of(seen: &Seen) -> Self {
        let mut families = Self::default();
        families.vm(seen);
        families.migrations(&seen.figures);
        families.source(&seen.figures.outgoing);
        families.last_blackout(&seen.figures.outgoing);
        families
    }

    fn add(&mut self, metric: Metric, values: impl IntoIterator<Item = (Labels, Value)>) {
        let values: Vec<_> = values.into_iter().collect();
        if !values.is_empty() {
            self.0.push((metric, values));
        }
    }

    fn vm(&mut self, seen: &Seen) {
        let version = env!("CARGO_PKG_VERSION").to_owned();
        self.add(BUILD, [(vec![("version", version)], Value::Whole(1))]);
        if let Some(now) = seen.figures.runstate {
            let states = RunState::ALL.into_iter();
            self.add(
                STATE,
                states.map(|state| (vec![("state", state.name().to_owned())], is(state == now))),
            );
        }
        self.add(RAM, plain(Some(Value::Whole(seen.ram_bytes))));
        self.add(POPULATED, plain(seen.populated_bytes.map(Value::Whole)));
        let workload = seen.workload.as_ref();
        self.add(
            GAP,
            plain(workload.map(|stats| seconds(stats.longest_gap_us))),
        );
        self.add(
            GUEST_ERRORS,
            plain(workload.map(|stats| Value::Whole(stats.errors))),
        );
    }

    /// What both directions have.
    fn migrations(&mut self, figures: &Figures) {
        let sides = [
            (Side::Source.direction(), &figures.outgoing),
            (Side::Target.direction(), &figures.incoming),
        ];
        let each = |value: fn(&SideFigures) -> Value| {
            sides.map(|(direction, side)| (vec![("direction", direction.to_owned())], value(side)))
        };
        let statuses = sides.into_iter().flat_map(|(direction, side)| {
            let all = MigrationStatus::ALL.into_iter();
            all.map(move |status| {
                let labels = vec![
                    ("direction", direction.to_owned()),
                    ("status", status.name().to_owned()),
                ];
                (labels, is(side.status == status))
            })
        });
        self.add(STATUS, statuses);
        let outcomes = sides.into_iter().flat_map(|(direction, side)| {
            [
                ("completed", side.completed),
                ("failed", side.failed),
                ("cancelled", side.cancelled),
            ]
            .map(|(outcome, count)| {
                let labels = vec![
                    ("direction", direction.to_owned()),
                    ("outcome", outcome.to_owned()),
                ];
                (labels, Value::Whole(count))
            })
        });
        self.add(MIGRATIONS, outcomes);
        let (sent, received) = (figures.outgoing.sums(), figures.incoming.sums());
        let running = sent.bytes.saturating_sub(sent.blackout_bytes);
        let by = labelled;
        self.add(
            SENT_BYTES,
            by(
                "phase",
                &[("precopy", running), ("blackout", sent.blackout_bytes)],
            ),
        );
        self.add(RECEIVED_BYTES, plain(Some(Value::Whole(received.bytes))));
        self.add(
            SENT_PAGES,
            by(
                "kind",
                &[("data", sent.data_pages), ("zero", sent.zero_pages)],
            ),
        );
        let kinds = [
            ("data", received.data_pages),
            ("zero", received.zero_pages),
            ("hole", received.hole_pages),
        ];
        self.add(RECEIVED_PAGES, by("kind", &kinds));
        self.add(ROUNDS, each(|side| Value::Whole(side.sums().rounds)));
        self.add(ROUND, each(|side| Value::Whole(side.live.glance.round)));
        self.add(RATE, each(|side| Value::Whole(side.live.bytes_per_sec)));
        self.add(DURATION, each(|side| seconds(side.live.duration_us)));
        let connections = sides.into_iter().flat_map(|(direction, side)| {
            let bytes = side.live.glance.connection_bytes.iter().enumerate();
            bytes.map(move |(number, bytes)| {
                let labels = vec![
                    ("direction", direction.to_owned()),
                    ("connection", number.to_string()),
                ];
                (labels, Value::Whole(*bytes))
            })
        });
        self.add(CONNECTION, connections);
        self.add(ZERO_COPY, plain(Some(Value::Whole(sent.zero_copy_sends))));
        self.add(
            FALLBACKS,
            plain(Some(Value::Whole(sent.zero_copy_fallbacks))),
        );
    }

    /// What only the source knows.
    fn source(&mut self, side: &SideFigures) {
        let glance = &side.live.glance;
        let dirty = glance
            .dirty_pages_per_sec
            .map(|pages| Value::Whole(pages.saturating_mul(PAGE_SIZE)));
        self.add(DIRTY_RATE, plain(dirty));
        self.add(REMAINING, plain(glance.remaining_bytes.map(Value::Whole)));
        self.add(PREDICTED, plain(glance.predicted_blackout_us.map(seconds)));
        let throttle = Value::Whole(u64::from(glance.throttle_percent));
        self.add(THROTTLE, plain(Some(throttle)));
    }

    fn last_blackout(&mut self, side: &SideFigures) {
        let parts = side.blackout.iter();
        self.add(
            BLACKOUT,
            parts.map(|part| {
                (
                    vec![("part", part.part.replace(' ', "_"))],
                    seconds(part.duration_us),
                )
            }),
        );
        let total: u64 = side.blackout.iter().map(|part| part.duration_us).sum();
        self.add(
            DOWNTIME,
            plain((!side.blackout.is_empty()).then(|| seconds(total))),
        );
    }
}

impl Collector for Families {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        for (metric, values) in &self.0 {
            let kind = match metric.kind {
                Kind::Gauge => MetricType::Gauge,
                Kind::Counter => MetricType::Counter,
            };
            let mut family = encoder.encode_descriptor(metric.name, metric.help, None, kind)?;
            for (labels, value) in values {
                if labels.is_empty() {
                    value.encode(metric.kind, &mut family)?;
                } else {
                    value.encode(metric.kind, &mut family.encode_family(labels)?)?;
                }
            }
        }
        Ok(())
    }
}

impl Value {
    fn encode(self, kind: Kind, encoder: &mut MetricEncoder<'_>) -> fmt::Result {
        match (kind, self) {
            (Kind::Gauge, Self::Whole(value)) => encoder.encode_gauge(&value),
            (Kind::Gauge, Self::Real(value)) => encoder.encode_gauge(&value),
            (Kind::Counter, Self::Whole(value)) => {
                encoder.encode_counter::<NoLabelSet, _, u64>(&value, None)
            }
            (Kind::Counter, Self::Real(value)) => {
                encoder.encode_counter::<NoLabelSet, _, u64>(&value, None)
            }
        }
    }
}

fn plain(value: Option<Value>) -> Option<(Labels, Value)> {
    value.map(|value| (Vec::new(), value))
}

fn labelled(label: &'static str, values: &[(&str, u64)]) -> Vec<(Labels, Value)> {
    let values = values.iter();
    values
        .map(|(name, value)| (vec![(label, (*name).to_owned())], Value::Whole(*value)))
        .collect()
}

fn is(yes: bool) -> Value {
    Value::Whole(u64::from(yes))
}

fn seconds(micros: u64) -> Value {
    #[expect(
        clippy::cast_precision_loss,
        reason = "53 bits of microseconds are 285 years"
    )]
    Value::Real(micros as f64 / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::record::read::parse;
    use crate::observe::watch::{Glance, Live};

    fn seen() -> Seen {
        let mut figures = Figures {
            runstate: Some(RunState::Running),
            ..Figures::default()
        };
        let record = parse(include_bytes!(
            "../../../../tests/fixtures/record/v1/good/source.json"
        ));
        let live = Live {
            glance: Glance {
                connection_bytes: vec![30, 12],
                remaining_bytes: Some(8192),
                dirty_pages_per_sec: Some(2),
                predicted_blackout_us: Some(1500),
                round: 3,
                ..Glance::default()
            },
            blackout_bytes: 2,
            bytes_per_sec: 77,
            duration_us: 2_500_000,
        };
        figures.outgoing.begin();
        figures.outgoing.end(live, &record.unwrap());
        figures.outgoing.status = MigrationStatus::Completed;
        Seen {
            figures: Arc::new(figures),
            ram_bytes: 1 << 30,
            populated_bytes: Some(5),
            workload: Some(WorkloadStats {
                longest_gap_us: 4_000,
                ..WorkloadStats::default()
            }),
        }
    }

    #[test]
    fn every_metric_is_shown_once_with_its_meaning_and_is_in_the_readme() {
        let page = render(&seen());
        let readme = include_str!("../../../../README.md");
        for metric in ALL {
            let name = metric.name;
            let line = |what: &str| page.lines().filter(|l| l.starts_with(what)).count();
            assert_eq!(line(&format!("# HELP {name} ")), 1, "{name}\n{page}");
            let shown = match metric.kind {
                Kind::Gauge => name.to_owned(),
                Kind::Counter => format!("{name}_total"),
            };
            let values = line(&format!("{shown} ")) + line(&format!("{shown}{{"));
            assert!(values > 0, "{name}");
            assert!(readme.contains(&format!("`{shown}`")), "README: {shown}");
        }
        assert!(page.ends_with("# EOF\n"), "{page}");
    }

    #[test]
    fn values_have_the_unit_of_their_name() {
        let page = render(&seen());
        for line in [
            "vmferry_vm_state{state=\"running\"} 1",
            "vmferry_vm_state{state=\"paused\"} 0",
            "vmferry_migration_status{direction=\"outgoing\",status=\"completed\"} 1",
            "vmferry_migration_status{direction=\"incoming\",status=\"none\"} 1",
            "vmferry_migrations_total{direction=\"outgoing\",outcome=\"completed\"} 1",
            "vmferry_sent_bytes_total{phase=\"precopy\"} 40",
            "vmferry_sent_bytes_total{phase=\"blackout\"} 2",
            "vmferry_migration_dirty_bytes_per_second 8192",
            "vmferry_migration_predicted_blackout_seconds 0.0015",
            "vmferry_migration_connection_bytes{direction=\"outgoing\",connection=\"1\"} 12",
            "vmferry_guest_longest_gap_seconds 0.004",
        ] {
            assert!(page.lines().any(|shown| shown == line), "{line}\n{page}");
        }
    }

    #[test]
    fn what_is_not_known_is_left_out() {
        let page = render(&Seen {
            figures: Arc::default(),
            ram_bytes: 1,
            populated_bytes: None,
            workload: None,
        });
        for name in [
            POPULATED.name,
            GAP.name,
            PREDICTED.name,
            BLACKOUT.name,
            STATE.name,
        ] {
            assert!(!page.contains(name), "{name}\n{page}");
        }
    }
}
