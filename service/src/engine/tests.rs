//! The engine with a machine of software: arriving, ending, and jobs that fail.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::mpsc;
use vmferry_devices::vfio::face::{Iova, PrecopyInfo};
use vmferry_devices::vfio::{DeviceState, Support, VfioDevice, VfioFace, VfioSet};
use vmferry_transport::control::runtime::run;

use super::event::{SourceEvent, TargetEvent};
use super::incoming::IncomingAction;
use super::inherit::Inherited;
use super::jobs::PANICKED;
use super::settle::Succession;
use super::*;
use crate::config::Incoming as IncomingConfig;
use crate::engine::rehearsal::tests::config;
use crate::machine::disk::Disks;
use crate::machine::virtio::Backend;
use crate::machine::{self, Given};
use crate::observe::Observer;
use crate::qmp::EngineHandle;
use crate::succession::account::Times;
use crate::succession::{Account, WayBack, WayBackKeeper};

mod bugs;
mod ending;

/// The state of a device that does as it is told, or has a bug.
struct Tame(Arc<Mutex<DeviceState>>, Arc<AtomicBool>);

impl VfioFace for Tame {
    fn support(&self) -> io::Result<Option<Support>> {
        Ok(Some(Support::from_flags(u64::MAX)))
    }

    fn state(&self) -> io::Result<DeviceState> {
        Ok(*self.0.lock().unwrap())
    }

    fn set_state(&self, state: DeviceState) -> io::Result<Option<File>> {
        assert!(!self.1.load(Ordering::SeqCst), "on purpose");
        *self.0.lock().unwrap() = state;
        Ok(None)
    }

    fn stop_copy_bytes(&self) -> io::Result<Option<u64>> {
        unreachable!("nothing moves")
    }

    fn enable_reinit(&self) -> io::Result<bool> {
        unreachable!("nothing moves")
    }

    fn precopy_info(&self, _: &File) -> io::Result<PrecopyInfo> {
        unreachable!("nothing moves")
    }

    fn reset(&self) -> io::Result<()> {
        unreachable!("nothing fails")
    }

    fn logs_dma(&self) -> io::Result<bool> {
        unreachable!("nothing moves")
    }

    fn start_dma_logging(&self, _: u64, _: &[Iova]) -> io::Result<u64> {
        unreachable!("nothing moves")
    }

    fn stop_dma_logging(&self) -> io::Result<()> {
        unreachable!("nothing moves")
    }

    fn report_dma(&self, _: Iova, _: u64, _: &mut [u64]) -> io::Result<()> {
        unreachable!("nothing moves")
    }
}

/// An engine with one VFIO device.
struct Bench {
    engine: Engine,
    queue: mpsc::UnboundedReceiver<Event>,
    state: Arc<Mutex<DeviceState>>,
    /// Has whatever the device is told panic.
    broken: Arc<AtomicBool>,
}

impl Bench {
    fn new(incoming: Option<IncomingConfig>) -> Self {
        let config = crate::config::RunConfig {
            incoming,
            paused: true,
            ..config(&[])
        };
        Self::with(&config, Vec::new())
    }

    fn with(config: &crate::config::RunConfig, backends: Vec<Box<dyn Backend>>) -> Self {
        let machine = machine::build(
            &config.machine,
            None::<Given>,
            backends,
            config.accel,
            Arc::new(|_| {}),
        )
        .unwrap();
        let state = Arc::new(Mutex::new(DeviceState::Running));
        let broken = Arc::new(AtomicBool::new(false));
        let device = VfioDevice::new("vfio/0", Tame(Arc::clone(&state), Arc::clone(&broken)));
        *machine.vfio().lock().unwrap() = VfioSet::new(vec![device]);
        let observer = Observer::start(&config.observe, &machine).unwrap();
        let disks = Arc::new(Disks::open(&[]).unwrap());
        let (events, queue) = mpsc::unbounded_channel();
        let (handle, inbox) = EngineHandle::channel();
        let mut engine =
            Engine::new(config, machine, disks, observer, events, inbox.events).unwrap();
        engine.house.open(None, handle);
        Self {
            engine,
            queue,
            state,
            broken,
        }
    }

    /// One that has come by an exec.
    fn after_exec() -> Self {
        let mut bench = Self::new(Some(IncomingConfig::Exec));
        bench.engine.house.succession = Some(Succession {
            account: Account::default(),
            times: Times::default(),
            id: MigrationId::default(),
            returned: None,
            way_back: WayBackKeeper::new(Some(WayBack::nowhere())),
            due: Some(bench.engine.clock.now()),
            held: None,
            told: false,
            tells: false,
        });
        bench.engine.house.inherit(Inherited {
            qmp: Some(listening()),
            ..Inherited::default()
        });
        bench
    }

    fn succession(&mut self) -> &mut Succession {
        self.engine.house.succession.as_mut().unwrap()
    }

    /// What a job has said that panicked: that first, then that it did.
    async fn told_by_a_job_that_panicked(&mut self) -> Event {
        let event = self.queue.recv().await.unwrap();
        let panicked = self.queue.recv().await.unwrap();
        assert!(matches!(panicked, Event::JobPanicked), "{panicked:?}");
        event
    }
}

/// A socket as QMP clients find it.
fn listening() -> OwnedFd {
    let folder = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(folder.path().join("qmp")).unwrap();
    listener.into()
}

/// The state of the device of a guest that arrives to stay stopped.
async fn state_after_arrival(incoming: IncomingConfig) -> DeviceState {
    let mut bench = Bench::new(Some(incoming));
    bench.engine.arrived_stopped();
    // Jobs are done one after the other.
    let (done, is_done) = std::sync::mpsc::channel();
    bench.engine.jobs.run(move || done.send(()).unwrap());
    is_done.recv().unwrap();
    *bench.state.lock().unwrap()
}

#[test]
fn devices_of_a_guest_that_arrives_stopped_in_place_stop_too() {
    let state = run(state_after_arrival(IncomingConfig::Exec)).unwrap();
    assert_eq!(state, DeviceState::Stop);
    // Elsewhere they were never let work, and are left as they are.
    let state = run(state_after_arrival(IncomingConfig::Defer)).unwrap();
    assert_eq!(state, DeviceState::Running);
}

#[test]
fn who_was_told_to_end_does_not_go_back() {
    run(async {
        let mut bench = Bench::after_exec();
        bench.engine.end(0, ShutdownReason::HostSignal);
        assert!(bench.succession().way_back.take().is_none());

        let mut bench = Bench::after_exec();
        bench.engine.begin_succession();
        assert!(bench.succession().held.is_some());
        bench.engine.end(0, ShutdownReason::HostSignal);
        assert!(bench.succession().held.is_none());
    })
    .unwrap();
}

#[test]
fn clients_are_served_by_a_program_that_has_no_guest_when_it_should() {
    run(async {
        let mut bench = Bench::after_exec();
        bench.engine.answer_when_late();
        assert!(bench.engine.house.server.is_some());
        assert_eq!(bench.engine.runstate, RunState::Inmigrate);
        // Once.
        assert_eq!(bench.succession().due, None);
    })
    .unwrap();
}

#[test]
fn clients_are_served_when_nobody_knows_whether_the_guest_runs() {
    run(async {
        let mut bench = Bench::after_exec();
        bench.engine.begin_succession();
        bench.engine.target_event(TargetEvent::StartLost);
        assert!(bench.engine.house.server.is_some());
        assert_eq!(bench.engine.runstate, RunState::InternalError);
        assert!(bench.succession().held.is_some(), "it went back");
    })
    .unwrap();
}

#[test]
fn an_operators_stop_that_panics_is_answered_and_the_next_works() {
    run(async {
        let mut bench = Bench::new(None);
        for broken in [true, false] {
            bench.broken.store(broken, Ordering::SeqCst);
            bench.engine.guest = Guest::Running;
            let (reply, mut answer) = oneshot::channel();
            bench.engine.stop(reply);
            let told = match broken {
                true => bench.told_by_a_job_that_panicked().await,
                false => bench.queue.recv().await.unwrap(),
            };
            bench.engine.handle(told).await;
            assert_eq!(answer.try_recv().unwrap().is_err(), broken);
            let guest = &bench.engine.guest;
            assert!(matches!(guest, Guest::Stopped(_)), "{guest:?}");
        }
    })
    .unwrap();
}

#[test]
fn a_switchover_that_panics_fails_with_the_guest_in_hand() {
    run(async {
        let mut bench = Bench::new(None);
        bench.broken.store(true, Ordering::SeqCst);
        bench.engine.guest = Guest::Running;
        bench.engine.stop_for_switchover();
        let told = bench.told_by_a_job_that_panicked().await;
        let Event::Source(_, SourceEvent::Stopped(_, Err(error))) = told else {
            panic!("{told:?}");
        };
        assert_eq!(error, PANICKED);
    })
    .unwrap();
}

#[test]
fn an_arrival_whose_job_panics_fails() {
    run(async {
        let mut bench = Bench::new(Some(IncomingConfig::Defer));
        let address = "tcp:127.0.0.1:0".parse().unwrap();
        bench.engine.listen(&address, None).await.unwrap();
        bench.broken.store(true, Ordering::SeqCst);
        bench.engine.incoming_action(IncomingAction::Prepare);
        let told = bench.told_by_a_job_that_panicked().await;
        let Event::Target(TargetEvent::LoadBegun(Err(error))) = told else {
            panic!("{told:?}");
        };
        assert!(error.to_string().contains(PANICKED), "{error}");
    })
    .unwrap();
}

#[test]
fn a_start_that_panics_is_neither_taken_for_done_nor_for_failed() {
    run(async {
        let mut bench = Bench::new(Some(IncomingConfig::Defer));
        let address = "tcp:127.0.0.1:0".parse().unwrap();
        bench.engine.listen(&address, None).await.unwrap();
        let Guest::Stopped(stopped) = std::mem::replace(&mut bench.engine.guest, Guest::Away)
        else {
            panic!("it runs");
        };
        // As if another job looked at it.
        let _held = stopped.lend();
        let incoming = bench.engine.incoming.as_mut().unwrap();
        incoming.start_guest(&bench.engine.jobs, Arc::clone(&bench.engine.disks), stopped);
        let told = bench.told_by_a_job_that_panicked().await;
        let Event::Target(TargetEvent::StartLost) = told else {
            panic!("{told:?}");
        };
    })
    .unwrap();
}
