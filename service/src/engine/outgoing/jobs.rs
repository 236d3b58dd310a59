//! What blocks at the source, on the job thread: telling notifiers, the dirty log, saving state. What each finds goes to
//! [`Outgoing::handle`](super::Outgoing::handle).

use std::sync::Arc;
use std::time::Instant;

use vmferry_transport::memory::{DirtyMap, hash};
use vmferry_transport::proto::{SavedState, SourceJob};

use super::{Outgoing, chain};
use crate::engine::armed_log::{arm, fetch};
use crate::engine::clock::micros;
use crate::engine::event::SourceEvent;
use crate::engine::jobs::{JobThread, PANICKED};
use crate::engine::notify::SetupTold;
use crate::engine::successor::InPlace;

impl Outgoing {
    /// What to say of a job that has panicked.
    pub(super) fn lost(&self, job: SourceJob) -> impl FnOnce() + Send + 'static {
        let report = self.reporter();
        move || report(SourceEvent::JobFailed(job, PANICKED.to_owned()))
    }

    pub(super) fn notify(&mut self, jobs: &JobThread, job: SourceJob, tell: fn(SetupTold)) {
        self.unplugging = false;
        let (report, told) = (self.reporter(), self.told.take());
        let instead = self.reporter();
        let instead = move || instead(SourceEvent::Notified(job));
        jobs.run_owing(instead, move || {
            if let Some(told) = told {
                tell(told);
            }
            report(SourceEvent::Notified(job));
        });
    }

    pub(super) fn start_log(&self, jobs: &JobThread) {
        let (report, machine) = (self.reporter(), Arc::clone(&self.machine));
        jobs.run_owing(self.lost(SourceJob::StartLog), move || {
            report(match arm(machine.as_ref()) {
                Ok((log, work, found, devices)) => {
                    SourceEvent::LogStarted(log, work, found, devices)
                }
                Err(error) => SourceEvent::JobFailed(SourceJob::StartLog, error),
            });
        });
    }

    pub(super) fn sync(&mut self, jobs: &JobThread) {
        let report = self.reporter();
        let empty = DirtyMap::default();
        let (log, dirty) = (self.log.take(), std::mem::replace(&mut self.dirty, empty));
        let machine = Arc::clone(&self.machine);
        // A device that is stopped has nothing left to be predicted.
        let stopped = self.lent.is_some();
        jobs.run_owing(self.lost(SourceJob::Sync), move || {
            let fetched = match log {
                Some(armed) => fetch(armed, dirty, machine.as_ref(), stopped),
                None => Err("the dirty log is not running".to_owned()),
            };
            report(match fetched {
                Ok((armed, dirty, took_us, sizes)) => {
                    SourceEvent::Synced(armed, dirty, took_us, sizes)
                }
                Err(error) => SourceEvent::JobFailed(SourceJob::Sync, error),
            });
        });
    }

    pub(super) fn save(&mut self, jobs: &JobThread, hash_ram: bool) {
        let (report, machine) = (self.reporter(), Arc::clone(&self.machine));
        let (lent, disks) = (self.lent.take(), Arc::clone(&self.disks));
        let stays = matches!(self.in_place, Some(InPlace::Program(_)));
        jobs.run_owing(self.lost(SourceJob::SaveState), move || {
            let Some(proof) = lent else {
                return report(SourceEvent::JobFailed(
                    SourceJob::SaveState,
                    "the guest is not stopped".into(),
                ));
            };
            // The target may activate them once it has the state.
            let given_back = match stays {
                true => disks.pass_on(),
                false => disks.inactivate(),
            };
            if let Err(error) = given_back {
                drop(proof);
                return report(SourceEvent::JobFailed(SourceJob::SaveState, chain(&error)));
            }
            let saved = machine.save(&proof);
            drop(proof);
            let began = Instant::now();
            let ram_hash = hash_ram.then(|| hash::ram_hash(machine.ram()));
            let hash_us = if hash_ram { micros(began.elapsed()) } else { 0 };
            report(match (saved, ram_hash.transpose()) {
                (Ok(sections), Ok(hash)) => SourceEvent::Saved(SavedState {
                    sections,
                    ram_hash: hash.map(|hash| hash.hash),
                    hash_us,
                }),
                (Err(error), _) => SourceEvent::JobFailed(SourceJob::SaveState, chain(&error)),
                (_, Err(error)) => SourceEvent::JobFailed(SourceJob::SaveState, chain(&error)),
            });
        });
    }

    pub(super) fn stop_log(&mut self, jobs: &JobThread) {
        let (report, log) = (self.reporter(), self.log.take());
        let instead = self.reporter();
        let instead = move || instead(SourceEvent::LogStopped);
        jobs.run_owing(instead, move || {
            if let Some(log) = log {
                log.stop();
            }
            report(SourceEvent::LogStopped);
        });
    }
}
