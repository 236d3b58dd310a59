//! The way of an attempt to success: preparing, rounds, switchover, COMMIT.

use std::fmt;

use super::Source;
use super::action::{Reason, RoundSent, SavedState, SourceAction, SourceConfig, SourceJob};
use super::state::{Setup, State};
use crate::proto::status::MigrationStatus;
use crate::proto::throttle::Throttle;
use crate::units::{Moment, PageCount, RoundId};
use crate::wire::frame::{Ready, SourceFrame, StateEnd};
use crate::wire::hello::{DataHello, Hello, HelloReply, VersionRange};

/// No connection ends a round with more than this.
const ROUND_END_BYTES_MAX: u64 = 128;

impl<P: fmt::Debug> Source<P> {
    /// What this attempt begins with, for whoever wants to judge it before.
    pub fn hello(&self) -> Hello {
        let SourceConfig {
            migration_id,
            data_connections,
            checksum,
            verify,
            software,
            blocks,
            devices,
            guest_runs: _,
            uuid,
            switchover_ack,
            pause_before_switchover: _,
            deadlines: _,
        } = self.config.clone();
        Hello {
            versions: VersionRange::OURS,
            migration_id,
            data_connections,
            checksum,
            verify,
            software,
            blocks,
            devices,
            uuid,
            switchover_ack,
        }
    }

    pub(super) fn prepare(&mut self, now: Moment, reply: HelloReply) {
        let HelloReply { version, software } = reply;
        if !(VersionRange::OURS.min..=VersionRange::OURS.max).contains(&version) {
            let ours = VersionRange::OURS;
            self.fail(
                now,
                Reason::Protocol(format!(
                    "it chose protocol version {version}, offered was {ours}"
                )),
            );
            return;
        }
        self.stats.target_software = software;
        self.estimate
            .note_round_trip(now.micros_since(self.moved_at));
        if self.config.data_connections == 0 {
            return self.prepare_in_place(now);
        }
        self.enter(
            now,
            State::Preparing {
                data_ready: false,
                setup: Setup::Telling,
                first: None,
            },
        );
        let (migration_id, count) = (self.config.migration_id, self.config.data_connections);
        let hellos = (0..count)
            .map(|index| DataHello {
                version,
                migration_id,
                index,
                count,
            })
            .collect();
        self.run(SourceJob::ConnectData, SourceAction::ConnectData(hellos));
        self.notified = true;
        self.run(SourceJob::NotifySetup, SourceAction::NotifySetup);
    }

    /// Everybody has prepared. A log that runs slows the guest down, so it starts only now.
    pub(super) fn start_log_when_set_up(&mut self, now: Moment, waiting_for: Option<String>) {
        let State::Preparing { setup, .. } = &mut self.state else {
            return;
        };
        match waiting_for {
            Some(device) => {
                *setup = Setup::Waiting { device, since: now };
                self.set_status(MigrationStatus::WaitUnplug);
                self.actions.push_back(SourceAction::WatchUnplug);
            }
            None => {
                *setup = Setup::Done;
                self.run(SourceJob::StartLog, SourceAction::StartLog);
            }
        }
    }

    pub(super) fn begin_when_prepared(&mut self, now: Moment) {
        let State::Preparing {
            data_ready: true,
            setup: Setup::Done,
            first: Some(first),
        } = self.state
        else {
            return;
        };
        if self.jobs.has(SourceJob::ConnectData) {
            // The target has them all, so our own word is only a moment away.
            return;
        }
        self.set_status(MigrationStatus::Active);
        if self.config.data_connections == 0 {
            return self.stop_guest(now);
        }
        self.throttle = Throttle::new(now);
        self.stats.first_round = Some(now);
        self.stats.sync_count = 1;
        self.stats.round_pages = first.present;
        self.enter(
            now,
            State::Sending {
                sent: false,
                placed: false,
            },
        );
        self.round_began = now;
        self.run(
            SourceJob::Round,
            SourceAction::SendRound {
                round: RoundId(0),
                last: false,
            },
        );
    }

    pub(super) fn send_round(&mut self, now: Moment) {
        let round = self.stats.round.next();
        self.stats.round = round;
        self.enter(
            now,
            State::Sending {
                sent: false,
                placed: false,
            },
        );
        self.round_began = now;
        self.run(
            SourceJob::Round,
            SourceAction::SendRound { round, last: false },
        );
    }

    /// The last round had nothing to carry, of devices neither.
    pub(super) fn round_was_empty(&self) -> bool {
        let RoundSent {
            data,
            zero,
            wire_bytes,
        } = self.round_sent;
        let ends = u64::from(self.config.data_connections) * ROUND_END_BYTES_MAX;
        data.0 == 0 && zero.0 == 0 && wire_bytes <= ends
    }

    pub(super) fn end_round_when_placed(&mut self, now: Moment) {
        let State::Sending {
            sent: true,
            placed: true,
        } = self.state
        else {
            return;
        };
        let RoundSent { data, zero, .. } = self.round_sent;
        let took_us = now.micros_since(self.round_began);
        self.estimate.note_round(data, zero, took_us);
        // A round is an exchange too, and a small one takes hardly longer.
        self.estimate.note_round_trip(took_us);
        self.enter(now, State::Syncing);
        self.run(SourceJob::Sync, SourceAction::Sync);
    }

    pub(super) fn stop_guest(&mut self, now: Moment) {
        if !self.config.pause_before_switchover {
            self.set_status(MigrationStatus::Device);
        }
        self.blackout.asked = now;
        self.enter(now, State::Stopping);
        self.run(SourceJob::StopGuest, SourceAction::StopGuest);
    }

    pub(super) fn switch_over(&mut self, now: Moment, stopped: P) {
        self.blackout.continued = now;
        if self.config.data_connections == 0 {
            return self.release(now, stopped);
        }
        self.enter(now, State::LastSync { stopped });
        self.run(SourceJob::Sync, SourceAction::Sync);
    }

    pub(super) fn hand_over_when_sent(&mut self, now: Moment) {
        let State::LastRound {
            sent: true,
            saved: true,
            ..
        } = self.state
        else {
            return;
        };
        let State::LastRound { stopped, .. } = std::mem::replace(&mut self.state, State::Ended)
        else {
            return;
        };
        let SavedState {
            sections, ram_hash, ..
        } = &mut self.saved;
        let sections = std::mem::take(sections);
        let ram_hash = *ram_hash;
        let count = u16::try_from(sections.len()).expect("the hello bounds the number of devices");
        for section in sections {
            self.send(now, SourceFrame::Section(section));
        }
        self.stats.ram_hash = ram_hash;
        self.send(
            now,
            SourceFrame::StateEnd(StateEnd {
                sections: count,
                last_round: self.stats.round,
                guest_runs: self.config.guest_runs,
                ram_hash,
            }),
        );
        self.enter(now, State::AwaitReady { stopped });
    }

    /// Looks whether the guest must be slowed down for the rounds to converge.
    pub(super) fn throttle(&mut self, now: Moment, dirty: PageCount) {
        let Some(tuning) = self.tuning.auto_converge else {
            return self.let_run_freely();
        };
        let sent = self.round_sent.wire_bytes;
        if let Some(percent) = self.throttle.note(now, dirty.to_bytes(), sent, tuning) {
            tracing::info!(
                percent,
                "slowing the guest down: its rounds do not converge"
            );
            self.actions.push_back(SourceAction::Throttle(percent));
        }
    }

    pub(super) fn let_run_freely(&mut self) {
        if self.throttle.percent() > 0 {
            self.throttle = Throttle::default();
            self.actions.push_back(SourceAction::Throttle(0));
        }
    }

    /// The target holds everything. From the moment the frame is handed to the driver the source never resumes by itself.
    pub(super) fn commit(&mut self, now: Moment, ready: Ready) {
        if let Err(difference) = self.check_verification(&ready) {
            self.fail(now, Reason::Verification(difference));
            return;
        }
        self.stats.ready = Some(ready);
        self.blackout.ready = now;
        let State::AwaitReady { stopped } = std::mem::replace(&mut self.state, State::Ended) else {
            unreachable!("commit is called in AwaitReady");
        };
        self.enter(now, State::AwaitRunning { stopped });
        self.send(now, SourceFrame::Commit);
    }

    pub(super) fn check_verification(&self, ready: &Ready) -> Result<(), String> {
        if !self.config.verify {
            return Ok(());
        }
        let Some(found) = &ready.verification else {
            return Err("the target did not verify although it was asked to".to_owned());
        };
        if Some(found.ram_hash) != self.stats.ram_hash {
            let ours = self.stats.ram_hash.unwrap_or(0);
            return Err(format!(
                "RAM hash is {ours:032x} at the source and {:032x} at the target",
                found.ram_hash
            ));
        }
        if !found.state_differences.is_empty() {
            return Err(format!(
                "device state reads back differently at the target: {}",
                found.state_differences
            ));
        }
        Ok(())
    }

    pub(super) fn complete(&mut self, now: Moment, resume_us: Option<u64>) {
        let stopped = match std::mem::replace(&mut self.state, State::Ended) {
            State::AwaitRunning { stopped } | State::Resolving { stopped, .. } => stopped,
            other => unreachable!("completed while {}", other.name()),
        };
        self.stats.blackout = resume_us.map(|resume_us| self.blackout_parts(now, resume_us));
        self.stats.ended = Some(now);
        self.enter(now, State::Finishing { stopped });
        if self.control_open {
            self.send(now, SourceFrame::Finish);
        }
        self.set_status(MigrationStatus::Completed);
        self.let_run_freely();
        self.close_links();
    }
}
