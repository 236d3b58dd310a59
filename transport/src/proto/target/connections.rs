//! Who may speak on which connection: hellos, data connections, questions for the outcome.

use std::collections::VecDeque;

use super::Target;
use super::action::{Connection, TargetAction, TargetError, TargetJob, TargetStatus};
use super::state::{Attempt, Phase};
use crate::units::{MigrationId, Moment};
use crate::wire::frame::{Abort, AbortCode, Resolution, TargetFrame};
use crate::wire::hello::{DataHello, Hello, HelloReply, VersionRange, compare};

/// Connections that may ask for the outcome of one attempt at the same time. A source uses one; the others are leftovers of its
/// earlier tries.
const ASKERS_MAX: usize = 16;

impl Target {
    pub(super) fn welcome(&mut self, now: Moment, connection: Connection, hello: Hello) {
        if self.phase != Phase::Listening {
            self.refuse(
                connection,
                AbortCode::Busy,
                "the target is busy with another migration, or has had one",
            );
            return;
        }
        let Some(version) = VersionRange::OURS.common(hello.versions) else {
            let text = format!(
                "no common protocol version: the target speaks {}, the source {}",
                VersionRange::OURS,
                hello.versions
            );
            self.refuse(connection, AbortCode::Incompatible, &text);
            return;
        };
        if self.refused.contains(&hello.migration_id) {
            // Its RESOLVE is answered with "not committed" for good, so it can never be committed.
            let text = "an attempt of this migration id has failed here; ids are never used again";
            self.refuse(connection, AbortCode::Protocol, text);
            return;
        }
        if let Err(difference) = compare(
            &hello,
            &self.config.blocks,
            &self.config.devices,
            self.config.uuid,
        ) {
            self.refuse(connection, AbortCode::Incompatible, &difference);
            return;
        }
        if let Err(text) = self.check_place(&hello) {
            self.refuse(connection, AbortCode::Incompatible, text);
            return;
        }
        let Hello {
            migration_id,
            data_connections,
            verify,
            switchover_ack,
            ..
        } = hello;
        self.attempt = Some(Attempt {
            id: migration_id,
            control: connection,
            version,
            verify,
            switchover_ack,
            joined: vec![false; usize::from(data_connections)],
            sections: Vec::new(),
            section_bytes: 0,
            announced: None,
            last_placed: None,
            end: None,
            guest_runs: false,
            askers: VecDeque::new(),
            settled: false,
        });
        self.error = None;
        self.heard_at = now;
        self.control_open = true;
        self.enter(now, Phase::AwaitData);
        self.set_status(TargetStatus::Setup);
        let software = self.config.software.clone();
        self.send_control(
            now,
            TargetFrame::HelloReply(HelloReply { version, software }),
        );
        if data_connections == 0 {
            // Nothing to wait for: RAM is here already.
            self.enter(now, Phase::Preparing);
            self.start_job(TargetJob::Prepare, TargetAction::Prepare);
        }
    }

    /// Whether RAM of the source is where its hello says. A mistake here would start a guest on memory that is not its own.
    fn check_place(&self, hello: &Hello) -> Result<(), &'static str> {
        match (self.config.in_place, hello.is_in_place()) {
            (None, false) => Ok(()),
            (Some(id), true) if id == hello.migration_id => Ok(()),
            (Some(_), true) => Err(
                "the RAM at the target belongs to another attempt, or another saved guest, than this one",
            ),
            (Some(_), false) => {
                Err("the target has the RAM of a VM on this host and takes no pages")
            }
            (None, true) => Err("the target was not given the RAM that is to stay in place"),
        }
    }

    /// A stranger's data connection is refused without harm to the attempt: it proves nothing about the source.
    pub(super) fn join(&mut self, now: Moment, connection: Connection, hello: DataHello) {
        let DataHello {
            version,
            migration_id,
            index,
            count,
        } = hello;
        let fits = self
            .attempt
            .as_mut()
            .filter(|attempt| self.phase == Phase::AwaitData && attempt.id == migration_id);
        let Some(attempt) = fits else {
            let text = format!("no data connection of migration {migration_id} is expected here");
            self.refuse(connection, AbortCode::Protocol, &text);
            return;
        };
        if version != attempt.version || usize::from(count) != attempt.joined.len() {
            self.refuse(
                connection,
                AbortCode::Protocol,
                "a data connection contradicts the hello of its migration",
            );
            return;
        }
        match attempt.joined.get_mut(usize::from(index)) {
            Some(joined) if !*joined => *joined = true,
            _ => {
                let text =
                    format!("data connection {index} of migration {migration_id} exists already");
                self.refuse(connection, AbortCode::Protocol, &text);
                return;
            }
        }
        let all = attempt.joined.iter().all(|joined| *joined);
        self.actions
            .push_back(TargetAction::AdoptData { connection, index });
        if all {
            self.enter(now, Phase::Preparing);
            self.start_job(TargetJob::Prepare, TargetAction::Prepare);
        }
    }

    /// Somebody who knows the id asks what became of the attempt. Whoever asks has given up the old link, so an attempt that is not
    /// committed by now never will be.
    pub(super) fn answer(&mut self, now: Moment, connection: Connection, id: MigrationId) {
        if self
            .attempt
            .as_ref()
            .is_some_and(|attempt| attempt.id == id)
        {
            match self.phase {
                Phase::Running => {
                    self.note_asker(connection);
                    self.reply(connection, Resolution::Committed);
                }
                Phase::Starting | Phase::Failing { told: false, .. } => self.note_asker(connection),
                phase if phase.before_commit() => {
                    let text = "the source lost the link and asks for the outcome";
                    self.note_asker(connection);
                    self.fail(now, TargetError::Link(text.to_owned()));
                }
                _ => self.reply(connection, Resolution::NotCommitted),
            }
        } else if self.refused.contains(&id) {
            self.reply(connection, Resolution::NotCommitted);
        } else {
            let text = format!("migration {id} is not known here");
            self.refuse(connection, AbortCode::Internal, &text);
        }
    }

    pub(super) fn note_asker(&mut self, connection: Connection) {
        let Some(attempt) = &mut self.attempt else {
            return;
        };
        if attempt.askers.len() == ASKERS_MAX
            && let Some(oldest) = attempt.askers.pop_front()
        {
            self.actions.push_back(TargetAction::Close(oldest));
        }
        attempt.askers.push_back(connection);
    }

    pub(super) fn asks(&self, connection: Connection) -> bool {
        self.phase == Phase::Running
            && self
                .attempt
                .as_ref()
                .is_some_and(|attempt| attempt.askers.contains(&connection))
    }

    pub(super) fn reply_to_askers(&mut self, resolution: Resolution) {
        let askers: Vec<_> = self
            .attempt
            .iter()
            .flat_map(|attempt| attempt.askers.iter().copied())
            .collect();
        for connection in askers {
            self.reply(connection, resolution);
        }
    }

    /// Nobody will ask any more. Said once, however often the source says that it knows.
    pub(super) fn settle(&mut self) {
        let Some(attempt) = self.attempt.as_mut().filter(|attempt| !attempt.settled) else {
            return;
        };
        attempt.settled = true;
        self.control_open = false;
        self.actions.push_back(TargetAction::Settled);
        self.start_job(TargetJob::CloseLinks, TargetAction::CloseLinks);
    }

    pub(super) fn reply(&mut self, connection: Connection, resolution: Resolution) {
        self.actions.push_back(TargetAction::Send(
            connection,
            TargetFrame::Resolved(resolution),
        ));
    }

    pub(super) fn refuse(&mut self, connection: Connection, code: AbortCode, reason: &str) {
        self.actions.push_back(TargetAction::Send(
            connection,
            TargetFrame::Abort(Abort::new(code, reason)),
        ));
        self.actions.push_back(TargetAction::Close(connection));
    }
}
