//! Tells the network that the guest is here: when it has moved here, and when an operator asks for it.
//!
//! The schedule is a core (`migration/announce.rs`); this calls the network interfaces of the machine when it says so.

use std::collections::BTreeMap;

use serde_json::json;
use vmferry_transport::units::Moment;

use super::Engine;
use super::commands::Answer;
use crate::migration::announce::{AnnounceTiming, Announcer};
use crate::migration::params::{MigrationParameters, ParameterPatch};
use crate::qmp::{AnnounceSelf, QmpError};

/// Runs of announcements at one time, by their ids.
const RUNS_MAX: usize = 16;
/// Longest id of a run, in bytes.
const ID_BYTES_MAX: usize = 255;

/// The runs under way.
#[derive(Debug, Default)]
pub(super) struct Announcing(BTreeMap<String, Run>);

#[derive(Debug)]
struct Run {
    announcer: Announcer,
    /// Only these interfaces; all if left out.
    interfaces: Option<Vec<String>>,
}

impl Announcing {
    pub(super) fn poll_timeout(&self) -> Option<Moment> {
        let runs = self.0.values();
        runs.filter_map(|run| run.announcer.poll_timeout()).min()
    }
}

impl Engine {
    /// The guest runs here now, and did not before.
    pub(super) fn announce_arrival(&mut self) {
        let timing = timing(&self.parameters);
        self.begin_announcing(String::new(), timing, None);
    }

    /// `announce-self`.
    pub(super) fn announce_self(&mut self, arguments: AnnounceSelf) -> Answer {
        let AnnounceSelf {
            initial,
            max,
            rounds,
            step,
            interfaces,
            id,
        } = arguments;
        // The ranges are those of the parameters of the same names.
        let given = [
            ("announce-initial", initial),
            ("announce-max", max),
            ("announce-rounds", rounds),
            ("announce-step", step),
        ];
        let given = given
            .into_iter()
            .filter_map(|(name, value)| Some((name.to_owned(), json!(value?))))
            .collect();
        let parameters = self
            .parameters
            .clone()
            .with(&ParameterPatch::parse(&given)?)?;
        if id.len() > ID_BYTES_MAX {
            return Err(QmpError::generic(format!(
                "argument `id` may have at most {ID_BYTES_MAX} bytes"
            )));
        }
        if self.announcing.0.len() == RUNS_MAX && !self.announcing.0.contains_key(&id) {
            return Err(QmpError::generic(format!(
                "{RUNS_MAX} announcements are under way already"
            )));
        }
        self.begin_announcing(id, timing(&parameters), interfaces);
        Ok(json!({}))
    }

    fn begin_announcing(
        &mut self,
        id: String,
        timing: AnnounceTiming,
        interfaces: Option<Vec<String>>,
    ) {
        let announcer = Announcer::new(self.clock.now(), timing);
        let run = Run {
            announcer,
            interfaces,
        };
        self.announcing.0.insert(id, run);
        self.announce_what_is_due();
    }

    /// Makes the announcements whose time has come.
    pub(super) fn announce_what_is_due(&mut self) {
        let now = self.clock.now();
        let machine = &self.machine;
        self.announcing.0.retain(|_, run| {
            if run.announcer.poll(now) {
                for interface in machine.announcers() {
                    let chosen = run.interfaces.as_ref();
                    if chosen.is_none_or(|names| names.iter().any(|name| name == interface.name()))
                    {
                        interface.announce();
                    }
                }
            }
            run.announcer.poll_timeout().is_some()
        });
    }
}

fn timing(parameters: &MigrationParameters) -> AnnounceTiming {
    AnnounceTiming {
        initial_ms: parameters.announce_initial_ms,
        max_ms: parameters.announce_max_ms,
        rounds: parameters.announce_rounds,
        step_ms: parameters.announce_step_ms,
    }
}
