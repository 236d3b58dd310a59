//! A process that is told to end, or whose guest ends, while a guest arrives.

use vmferry_transport::proto::Connection;
use vmferry_transport::proto::TargetStatus;
use vmferry_transport::units::{Moment, RoundId};
use vmferry_transport::wire::frame::{SourceFrame, StateEnd};
use vmferry_transport::wire::hello::Hello;
use vmferry_transport::wire::hello::VersionRange;

use super::*;
use crate::machine::ram::RamBacking;

/// The source.
const CONTROL: Connection = Connection(1);
const ROUND: RoundId = RoundId(1);
const ID: MigrationId = MigrationId([7; 16]);

impl Bench {
    /// One to which a guest without devices of its own comes in place.
    async fn arriving() -> Self {
        let mut bench = Self::new(Some(IncomingConfig::Defer));
        let engine = &mut bench.engine;
        *engine.machine.vfio().lock().unwrap() = VfioSet::default();
        engine.schemas = passthrough::schemas(engine.machine.as_ref());
        engine.streamed = Vec::new();
        engine.kept = Some(ID);
        engine.autostart = true;
        let address = "tcp:127.0.0.1:0".parse().unwrap();
        engine.listen(&address, None).await.unwrap();
        bench
    }

    fn say(&mut self, frame: SourceFrame) {
        let incoming = self.engine.incoming.as_mut().unwrap();
        incoming
            .core_mut()
            .handle_frame(Moment::default(), CONTROL, frame);
    }

    /// Does what is to be done until `arrived` likes where the guest is.
    async fn until(&mut self, arrived: fn(&Target) -> bool) {
        loop {
            self.engine.perform();
            if arrived(self.engine.incoming.as_ref().unwrap().core()) {
                return;
            }
            let event = self.queue.recv().await.unwrap();
            self.engine.handle(event).await;
        }
    }

    /// The source says everything up to COMMIT, which has been read and nothing more.
    async fn commit(&mut self) {
        let engine = &mut self.engine;
        let Guest::Stopped(stopped) = &engine.guest else {
            panic!("it runs");
        };
        let sections = engine.machine.save(&stopped.lend()).unwrap();
        let hello = Hello {
            versions: VersionRange::OURS,
            migration_id: ID,
            data_connections: 0,
            checksum: false,
            verify: false,
            software: software(),
            blocks: block_infos(engine.machine.as_ref()),
            devices: engine.schemas.clone(),
            uuid: None,
            switchover_ack: false,
        };
        let incoming = engine.incoming.as_mut().unwrap();
        let first = SourceFrame::Hello(hello);
        incoming
            .core_mut()
            .handle_first_frame(Moment::default(), CONTROL, first);
        self.until(|core| core.status() == TargetStatus::Active)
            .await;
        self.say(SourceFrame::Switchover(ROUND));
        let end = StateEnd {
            sections: u16::try_from(sections.len()).unwrap(),
            last_round: ROUND,
            guest_runs: true,
            ram_hash: None,
        };
        for section in sections {
            self.say(SourceFrame::Section(section));
        }
        self.say(SourceFrame::StateEnd(end));
        self.until(Target::is_ready).await;
        self.say(SourceFrame::Commit);
    }

    /// What the guest's start has come to.
    async fn started(&mut self) -> Event {
        loop {
            let event = self.queue.recv().await.unwrap();
            if matches!(event, Event::Target(TargetEvent::Started(_))) {
                return event;
            }
        }
    }
}

impl Engine {
    fn told_some_time_ago(&mut self) {
        let told = &mut self.ending.as_mut().unwrap().told;
        *told = told.unwrap().checked_sub(SAME_WISH);
    }
}

#[test]
fn who_tells_a_process_to_end_just_after_somebody_else_is_in_no_hurry() {
    run(async {
        let mut bench = Bench::arriving().await;
        bench.engine.end(0, ShutdownReason::HostQmpQuit);
        // As if the second came at the same time, however slow the host is.
        bench.engine.ending.as_mut().unwrap().told = Some(Instant::now() + SAME_WISH);
        bench.engine.end(0, ShutdownReason::HostSignal);
        assert!(bench.engine.incoming.is_some());
    })
    .unwrap();
}

#[test]
fn a_process_that_is_to_end_while_its_guest_is_started_says_first_what_came_of_it() {
    for reason in [ShutdownReason::HostSignal, ShutdownReason::GuestShutdown] {
        run(async {
            let mut bench = Bench::arriving().await;
            bench.commit().await;
            bench.engine.perform();
            bench.engine.end(0, reason);
            let started = bench.started().await;
            assert!(bench.engine.owes_news(), "the source would be in doubt");
            bench.engine.handle(started).await;
            let core = bench.engine.incoming.as_ref().unwrap().core();
            assert_eq!(core.status(), TargetStatus::Completed);
            assert!(!bench.engine.owes_news());
        })
        .unwrap();
    }
}

#[test]
fn a_process_that_is_told_to_end_before_its_guest_is_started_gives_it_back() {
    run(async {
        let folder = tempfile::tempdir().unwrap();
        let mut machine = config(&[]).machine;
        machine.backing = RamBacking::File(folder.path().join("ram"));
        let memory = NamedMemory::of(&machine).unwrap();
        memory.remember(ID).unwrap();
        let mut bench = Bench::arriving().await;
        bench.engine.memory = Some(memory.clone());
        bench.commit().await;
        bench.engine.perform();
        bench.engine.end(0, ShutdownReason::HostQmpQuit);
        assert!(bench.engine.owes_news());
        bench
            .until(|core| core.status() == TargetStatus::Failed)
            .await;
        assert!(matches!(bench.engine.guest, Guest::Stopped(_)));
        assert!(!bench.engine.owes_news());
        assert_eq!(
            memory.saved_guest().unwrap(),
            Some(ID),
            "nobody can load it"
        );
    })
    .unwrap();
}

#[test]
fn a_guest_that_is_stopped_before_it_is_started_stays_stopped() {
    run(async {
        let mut bench = Bench::arriving().await;
        bench.commit().await;
        let (reply, mut answer) = oneshot::channel();
        bench.engine.stop(reply);
        assert!(answer.try_recv().unwrap().is_ok());
        bench.engine.perform();
        assert_eq!(bench.engine.runstate, RunState::Paused);
        assert!(matches!(bench.engine.guest, Guest::Stopped(_)));
    })
    .unwrap();
}

#[test]
fn a_failed_target_that_waits_for_its_source_ends_when_it_is_told_to_for_the_first_time() {
    run(async {
        let mut bench = Bench::arriving().await;
        bench.engine.ending = Some(Ending {
            code: 1,
            at: Some(Instant::now() + Duration::from_secs(3600)),
            told: None,
        });
        bench.engine.end(0, ShutdownReason::HostSignal);
        let ending = bench.engine.ending.unwrap();
        assert_eq!((ending.code, ending.at), (1, None));
        // Nobody is in a hurry yet.
        assert!(bench.engine.incoming.is_some());
        bench.engine.told_some_time_ago();
        bench.engine.end(0, ShutdownReason::HostSignal);
        assert!(bench.engine.incoming.is_none());
    })
    .unwrap();
}
