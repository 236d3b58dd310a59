//! The source's part in an upgrade by exec: this process becomes the new program.
//!
//! ```text
//!  core (as for any target)         Successor
//!  OfferFds ----------------------> asks a copy of the new program, on a thread          the guest runs
//!  ConnectControl, hello ---------> answers itself: there is nobody to connect to
//!  ... guest stopped, SETUP ...
//!  state -------------------------> an archive in memory; READY                          the guest is stopped
//!  COMMIT ------------------------> archive and letter sealed, execve: the commit point
//!                                   it failed: ABORT, as from a target that could not start the guest
//! ```
//!
//! So an exec that fails is for the core a target that took COMMIT back, with everything that follows: FAILED, then the guest.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context;
use vmferry_cpr::envelope::{self, Open};
use vmferry_cpr::letter::{Leg, Letter};
use vmferry_cpr::manifest::{FdKind, Stage};
use vmferry_transport::limits::Deadlines;
use vmferry_transport::proto::SourceJob;
use vmferry_transport::units::MigrationId;
use vmferry_transport::wire::archive::ArchiveEncoder;
use vmferry_transport::wire::frame::{
    Abort, AbortCode, Ready, SourceFrame, TargetFrame, Verification,
};
use vmferry_transport::wire::hello::{Hello, HelloReply, VersionRange};

use super::event::SourceEvent;
use super::hand_over::{HandOver, Heirlooms};
use super::software;
use crate::succession::{self, ARCHIVE, Account, ClearsUp, PROCESS, PROGRAM, Program, ask};

/// How an attempt in place reaches its target.
#[derive(Debug)]
pub(super) enum InPlace {
    /// It is a process that waits for descriptors.
    Process(HandOver),
    /// It is the program that this process becomes.
    Program(Box<Successor>),
}

impl InPlace {
    /// Nothing more is to be said.
    pub(super) fn close(&mut self) {
        match self {
            Self::Process(hand_over) => hand_over.close(),
            Self::Program(successor) => successor.close(),
        }
    }
}

/// The program that this process is to become.
pub(super) struct Successor {
    words: Vec<OsString>,
    program: Program,
    heirlooms: Heirlooms,
    patience: Duration,
    /// The thread that asks goes on as long as this says so.
    wanted: Arc<AtomicBool>,
    id: MigrationId,
    archive: Archive,
}

/// What is to be done about a frame of the core.
#[derive(Debug)]
pub(super) enum Answer {
    /// The target would say this.
    Frames(Vec<TargetFrame>),
    /// The guest is given away: become the new program.
    Exec,
}

impl Successor {
    /// The first of `command` is the program, found as a shell would.
    ///
    /// # Errors
    /// For the operator: there is no such program.
    pub(super) fn new(
        command: &[String],
        heirlooms: Heirlooms,
        deadlines: &Deadlines,
    ) -> Result<Self, String> {
        let Some(name) = command.first() else {
            return Err("mode cpr-exec needs the parameter `cpr-exec-command`".to_owned());
        };
        let program = Program::find(OsStr::new(name)).map_err(|error| format!("{error:#}"))?;
        Ok(Self {
            words: command.iter().map(OsString::from).collect(),
            program,
            heirlooms,
            patience: Duration::from_micros(deadlines.ready_us),
            wanted: Arc::new(AtomicBool::new(true)),
            id: MigrationId::default(),
            archive: Archive::default(),
        })
    }

    /// Asks a copy of the new program, on a thread. Ends in [`SourceEvent::FdsOffered`] or a failed job.
    pub(super) fn ask(
        &mut self,
        hello: &Hello,
        report: impl Fn(SourceEvent) + Clone + Send + 'static,
    ) {
        self.id = hello.migration_id;
        let failed =
            |text: String| SourceEvent::JobFailed(SourceJob::OfferFds, format!("cpr-exec: {text}"));
        let question = match self.letter(Leg::Asked, hello.encode()) {
            Ok((question, _)) => question,
            Err(error) => return report(failed(format!("{error:#}"))),
        };
        let (program, words) = (self.program.clone(), self.words.clone());
        let (patience, wanted) = (self.patience, Arc::clone(&self.wanted));
        let without_thread = report.clone();
        let ask = move || {
            let asked = ask::ask(&program, &words, &question, patience, &wanted);
            report(match asked {
                Ok(()) => SourceEvent::FdsOffered,
                Err(error) => failed(format!("{error:#}")),
            });
        };
        if let Err(error) = std::thread::Builder::new().name("vm-cpr".into()).spawn(ask) {
            without_thread(failed(format!("no thread to ask with: {error}")));
        }
    }

    /// Takes what the core sends to its target.
    pub(super) fn take(&mut self, frame: &SourceFrame) -> Answer {
        self.archive.take(frame)
    }

    /// Becomes the new program. Returns only if that fails: why, and what the target would say then.
    pub(super) fn become_it(&self, account: &Account) -> TargetFrame {
        let error = self.try_to_become_it(account);
        tracing::error!(error = format!("{error:#}"), "the exec has failed");
        TargetFrame::Abort(Abort::new(
            AbortCode::Resources,
            format!("cpr-exec: {error:#}"),
        ))
    }

    fn try_to_become_it(&self, account: &Account) -> anyhow::Error {
        let run = || -> anyhow::Result<std::convert::Infallible> {
            let clears_up = ClearsUp::start();
            let account = Account {
                clears_up: clears_up.number(),
                ..*account
            };
            let (mut letter, handout) = self.letter(Leg::There, account.encode())?;
            let archive = envelope::seal("vmferry-state", &self.archive.bytes)?;
            let program = File::from(
                succession::own_program().context("the way back: opening the present program")?,
            );
            let mut handout = handout;
            for (role, fd) in [(ARCHIVE, &archive), (PROGRAM, &program)] {
                let names = (PROCESS, role);
                handout.add(names, FdKind::Other, Stage::HandOver, 0, fd)?;
            }
            letter.manifest = handout.manifest()?;
            let fds = handout.fds();
            let numbers = fds.iter().map(|fd| fd.as_raw_fd().cast_unsigned());
            letter.numbers = numbers.collect();
            let memfd = envelope::seal_letter(&letter)?;
            let number = memfd.as_raw_fd().cast_unsigned();
            let _open = Open::through_exec(fds.into_iter().chain([memfd.as_fd()]))?;
            Err(self.program.become_it(&self.words, number))
        };
        match run() {
            Err(error) => error,
            Ok(never) => match never {},
        }
    }

    /// A letter, and what its manifest is of; its numbers are still to be filled in.
    fn letter(
        &self,
        leg: Leg,
        account: Vec<u8>,
    ) -> anyhow::Result<(Letter, vmferry_cpr::handout::Handout<'_>)> {
        let handout = self.heirlooms.handout()?;
        let letter = Letter {
            leg,
            pid: std::process::id(),
            id: self.id,
            software: software(),
            manifest: handout.manifest()?,
            numbers: Vec::new(),
            words: succession::own_words(),
            reason: String::new(),
            account,
        };
        Ok((letter, handout))
    }

    fn close(&self) {
        self.wanted.store(false, Ordering::Release);
    }
}

impl Drop for Successor {
    fn drop(&mut self) {
        self.close();
    }
}

impl fmt::Debug for Successor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Successor")
            .field("program", &self.program)
            .finish_non_exhaustive()
    }
}

/// The guest's state as an archive in memory, and the answers that a target would give. Small: no page is in it.
#[derive(Debug, Default)]
struct Archive {
    encoder: ArchiveEncoder,
    bytes: Vec<u8>,
}

impl Archive {
    fn take(&mut self, frame: &SourceFrame) -> Answer {
        let frames = match frame {
            SourceFrame::Hello(hello) => {
                self.bytes = self.encoder.start_in_place();
                self.put(frame);
                let version = VersionRange::OURS.max;
                let software = software();
                let mut answers = vec![
                    TargetFrame::HelloReply(HelloReply { version, software }),
                    TargetFrame::DataReady,
                ];
                if hello.switchover_ack {
                    answers.push(TargetFrame::SwitchoverAck);
                }
                answers
            }
            SourceFrame::Switchover(_) | SourceFrame::Section(_) => {
                self.put(frame);
                Vec::new()
            }
            SourceFrame::StateEnd(end) => {
                self.put(frame);
                // A hash that was asked for is looked at when the archive is loaded.
                let verification = end.ram_hash.map(|ram_hash| Verification {
                    ram_hash,
                    ..Verification::default()
                });
                vec![TargetFrame::Ready(Ready {
                    load_us: 0,
                    populated_bytes: 0,
                    verification,
                })]
            }
            SourceFrame::Commit => {
                let end = self.encoder.end();
                self.bytes.extend_from_slice(&end);
                return Answer::Exec;
            }
            // Words of a conversation, and the end of one.
            _ => Vec::new(),
        };
        Answer::Frames(frames)
    }

    fn put(&mut self, frame: &SourceFrame) {
        let bytes = frame.encode();
        self.encoder.frame(&bytes, 0);
        self.bytes.extend_from_slice(&bytes);
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use vmferry_transport::units::RoundId;
    use vmferry_transport::wire::Section;
    use vmferry_transport::wire::archive::{ArchiveItem, ArchiveReader};
    use vmferry_transport::wire::frame::StateEnd;

    use super::*;

    fn hello() -> Hello {
        Hello {
            versions: VersionRange::OURS,
            migration_id: MigrationId([1; 16]),
            data_connections: 0,
            checksum: false,
            verify: true,
            software: software(),
            blocks: Vec::new(),
            devices: Vec::new(),
            uuid: None,
            switchover_ack: true,
        }
    }

    #[test]
    fn what_is_kept_is_an_archive_and_the_answers_are_a_targets() {
        let mut archive = Archive::default();
        let end = StateEnd {
            sections: 1,
            last_round: RoundId(0),
            guest_runs: true,
            ram_hash: Some(5),
        };
        let section = Section {
            name: "vcpu/0".into(),
            schema: "x".into(),
            version: 1,
            bytes: Bytes::from_static(b"state"),
        };
        let mut said = Vec::new();
        for frame in [
            SourceFrame::Hello(hello()),
            SourceFrame::Switchover(RoundId(0)),
            SourceFrame::Section(section),
            SourceFrame::StateEnd(end),
        ] {
            match archive.take(&frame) {
                Answer::Frames(frames) => said.extend(frames),
                Answer::Exec => panic!("exec before the commit"),
            }
        }
        assert!(
            matches!(
                &said[..],
                [
                    TargetFrame::HelloReply(_),
                    TargetFrame::DataReady,
                    TargetFrame::SwitchoverAck,
                    TargetFrame::Ready(Ready { verification: Some(found), .. }),
                ] if found.ram_hash == 5
            ),
            "{said:?}"
        );
        assert!(matches!(archive.take(&SourceFrame::Commit), Answer::Exec));
        let mut reader = ArchiveReader::default();
        let (mut rest, mut items) = (&archive.bytes[..], Vec::new());
        while reader.wants() > 0 {
            let (piece, more) = rest.split_at(reader.wants());
            items.extend(reader.feed(piece).unwrap());
            rest = more;
        }
        assert!(rest.is_empty());
        assert!(matches!(items.last(), Some(ArchiveItem::End)));
        assert_eq!(items.len(), 5);
    }

    #[test]
    fn a_command_without_a_program_is_refused_at_once() {
        let new = |command: &[&str]| {
            let command: Vec<_> = command.iter().map(ToString::to_string).collect();
            let made = Successor::new(&command, Heirlooms::default(), &Deadlines::default());
            made.map(|_| ()).unwrap_err()
        };
        assert!(new(&[]).contains("cpr-exec-command"));
        assert!(new(&["/nowhere/vmferry", "run"]).contains("/nowhere/vmferry"));
    }
}
