//! Every request to a device that migrates fails once, in every way: afterwards the device works, or was reset.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use vmferry_devices::vfio::face::{Iova, PrecopyInfo};
use vmferry_devices::vfio::{DeviceState, FdFace, Standing, Support, VfioFace, states};

use super::{Vm, all_sound, away, here};
use crate::vfio::{self, Opened};

/// How a request is made to fail.
#[derive(Clone, Copy, Debug)]
enum Fault {
    /// It does not reach the device.
    Before,
    /// It is done, and reported as failed.
    After,
    /// A transition is done but for its last step.
    Halfway,
}

/// Stands before the kernel, and has a request of the VM fail.
struct Failing {
    face: FdFace<OwnedFd>,
    plan: Arc<Plan>,
}

#[derive(Default)]
struct Plan {
    requests: AtomicUsize,
    fault: Mutex<Option<(usize, Fault)>>,
    transitions_fail: AtomicBool,
    resets_fail: AtomicBool,
    failed: Mutex<Option<&'static str>>,
}

impl Plan {
    /// From now on: the request number `at`, from 1, fails.
    fn set(&self, fault: Option<(usize, Fault)>) {
        self.requests.store(0, Ordering::SeqCst);
        *self.failed.lock().unwrap() = None;
        *self.fault.lock().unwrap() = fault;
    }

    fn next(&self, what: &'static str) -> Option<Fault> {
        let number = self.requests.fetch_add(1, Ordering::SeqCst) + 1;
        let fault = *self.fault.lock().unwrap();
        let (_, fault) = fault.filter(|(at, _)| *at == number)?;
        *self.failed.lock().unwrap() = Some(what);
        Some(fault)
    }
}

fn failure<T>() -> io::Result<T> {
    Err(io::Error::from_raw_os_error(libc::EIO))
}

impl Failing {
    fn request<T>(&self, what: &'static str, ask: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        match self.plan.next(what) {
            None => ask(),
            Some(Fault::Before | Fault::Halfway) => failure(),
            Some(Fault::After) => {
                drop(ask());
                failure()
            }
        }
    }
}

impl VfioFace for Failing {
    fn support(&self) -> io::Result<Option<Support>> {
        self.face.support()
    }
    fn state(&self) -> io::Result<DeviceState> {
        self.request("state", || self.face.state())
    }
    fn set_state(&self, to: DeviceState) -> io::Result<Option<File>> {
        if self.plan.transitions_fail.load(Ordering::SeqCst) {
            return failure();
        }
        match self.plan.next("set_state") {
            None => self.face.set_state(to),
            Some(Fault::Before) => failure(),
            Some(Fault::After) => {
                drop(self.face.set_state(to));
                failure()
            }
            Some(Fault::Halfway) => {
                let support = self.face.support()?.unwrap_or_default();
                let path = states::path(support, self.face.state()?, to).unwrap_or_default();
                for state in path.split_last().map_or(&[][..], |(_, passed)| passed) {
                    self.face.set_state(*state)?;
                }
                failure()
            }
        }
    }
    fn stop_copy_bytes(&self) -> io::Result<Option<u64>> {
        self.request("stop_copy_bytes", || self.face.stop_copy_bytes())
    }
    fn enable_reinit(&self) -> io::Result<bool> {
        self.request("enable_reinit", || self.face.enable_reinit())
    }
    fn precopy_info(&self, stream: &File) -> io::Result<PrecopyInfo> {
        self.request("precopy_info", || self.face.precopy_info(stream))
    }
    fn reset(&self) -> io::Result<()> {
        if self.plan.resets_fail.load(Ordering::SeqCst) {
            return failure();
        }
        self.request("reset", || self.face.reset())
    }
    fn logs_dma(&self) -> io::Result<bool> {
        self.face.logs_dma()
    }
    fn start_dma_logging(&self, page_bytes: u64, ranges: &[Iova]) -> io::Result<u64> {
        self.face.start_dma_logging(page_bytes, ranges)
    }
    fn stop_dma_logging(&self) -> io::Result<()> {
        self.face.stop_dma_logging()
    }
    fn report_dma(&self, range: Iova, page_bytes: u64, words: &mut [u64]) -> io::Result<()> {
        self.face.report_dma(range, page_bytes, words)
    }
    fn read_stream(&self, stream: &File, buffer: &mut [u8]) -> io::Result<usize> {
        self.request("read", || self.face.read_stream(stream, buffer))
    }
    fn write_stream(&self, stream: &File, bytes: &[u8]) -> io::Result<usize> {
        self.request("write", || self.face.write_stream(stream, bytes))
    }
}

/// A VM whose requests can be made to fail.
fn fragile(count: usize) -> (Vm, Arc<Plan>) {
    let plan = Arc::new(Plan::default());
    let vm = Vm::with_face(count, |face| Failing {
        face,
        plan: Arc::clone(&plan),
    });
    (vm, plan)
}

/// Has each request of `attempt` fail in turn, in each way, until it comes through. Says how many there were.
fn with_each_request_failing(
    plan: &Plan,
    mut attempt: impl FnMut() -> Result<(), String>,
) -> usize {
    let mut failures = 0;
    for fault in [Fault::Before, Fault::After, Fault::Halfway] {
        for at in 1.. {
            plan.set(Some((at, fault)));
            let outcome = attempt();
            let Some(failed) = *plan.failed.lock().unwrap() else {
                outcome.unwrap();
                break;
            };
            let needed = !matches!(failed, "state" | "stop_copy_bytes" | "enable_reinit");
            assert!(
                outcome.is_err() || !needed,
                "{failed}, {fault:?}: nobody noticed"
            );
            failures += 1;
        }
    }
    failures
}

#[test]
fn whatever_request_to_mtty_fails_at_the_source_it_runs_again_with_its_data() {
    let (mut vm, plan) = fragile(2);
    vm.fill();
    let failures = with_each_request_failing(&plan, || {
        let outcome = away(&mut vm.set).map(drop);
        *plan.fault.lock().unwrap() = None;
        assert!(all_sound(&vm.set.roll_back()), "{outcome:?}");
        vm.assert_all_in(DeviceState::Running);
        outcome
    });
    // Two devices, three transitions each, and all that is asked between.
    assert!(failures > 60, "{failures}");
    vm.assert_filled();
    vm.fill();
    let mut target = Vm::new(2);
    here(&mut target.set, &away(&mut vm.set).unwrap()).unwrap();
    assert!(all_sound(&target.set.run().unwrap()));
    target.assert_filled();
}

#[test]
fn whatever_request_to_mtty_fails_on_the_way_back_it_runs_again_or_was_reset() {
    let (mut vm, plan) = fragile(2);
    with_each_request_failing(&plan, || {
        let fault = plan.fault.lock().unwrap().take();
        away(&mut vm.set).unwrap();
        plan.set(fault);
        let stands = vm.set.roll_back();
        vm.assert_all_in(DeviceState::Running);
        assert!(all_sound(&stands), "{stands:?}");
        let failed = *plan.failed.lock().unwrap();
        failed.map_or(Ok(()), |failed| Err(failed.to_owned()))
    });

    // Where no transition helps, a reset does; where that does not help either, we learn of it.
    plan.set(None);
    let mut stuck = |resets_fail: bool| {
        away(&mut vm.set).unwrap();
        plan.transitions_fail.store(true, Ordering::SeqCst);
        plan.resets_fail.store(resets_fail, Ordering::SeqCst);
        let stands = vm.set.roll_back();
        plan.transitions_fail.store(false, Ordering::SeqCst);
        plan.resets_fail.store(false, Ordering::SeqCst);
        let states: Vec<_> = vm.opened.iter().map(Opened::state).collect();
        (stands, states)
    };
    let (stands, states) = stuck(false);
    for stands in stands {
        assert!(matches!(stands.standing, Standing::Reset(_)), "{stands:?}");
    }
    assert_eq!(states, [vfio::RUNNING; 2]);
    let (stands, states) = stuck(true);
    for stands in stands {
        assert!(
            matches!(stands.standing, Standing::Lost { .. }),
            "{stands:?}"
        );
    }
    assert_eq!(states, [DeviceState::StopCopy.number(); 2]);
}

#[test]
fn whatever_request_to_mtty_fails_at_the_target_the_next_guest_can_come() {
    let mut source = Vm::new(2);
    source.fill();
    let streams = away(&mut source.set).unwrap();
    let (mut target, plan) = fragile(2);
    let failures = with_each_request_failing(&plan, || {
        let outcome = here(&mut target.set, &streams);
        *plan.fault.lock().unwrap() = None;
        assert!(all_sound(&target.set.abandon_load()), "{outcome:?}");
        target.assert_all_in(DeviceState::Running);
        outcome
    });
    assert!(failures > 20, "{failures}");
    here(&mut target.set, &streams).unwrap();
    assert!(all_sound(&target.set.run().unwrap()));
    target.assert_filled();
}
