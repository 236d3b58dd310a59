//! Upgrades in place against a container in memory that follows the kernel's rules: whole, with every request failing in turn, with a new
//! process that dies with everything in its hands.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};

use kvm_ioctls::Kvm;
use vm_memory::{FileOffset, GuestAddress, GuestRegionMmap, MmapRegion};
use vmferry_transport::memory::ram::HostMapping;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK};

use super::*;
use crate::notifier::{Mode, Notifiers, Priority};
use crate::vfio::face::Iova;
use crate::vfio::model::{SharedWorld, vm};
use crate::vfio::reach::{DmaFace, Reached};
use crate::vfio::states::{DeviceState, Support};

const FULL: Support = Support {
    stop_copy: true,
    p2p: true,
    pre_copy: true,
};
const NONE: Support = Support {
    stop_copy: false,
    p2p: false,
    pre_copy: false,
};
const SETUP: Setup = Setup {
    migration: MigrationId([7; 16]),
    mode: Mode::CprTransfer,
};

/// A container.
#[derive(Default)]
struct Kernel {
    /// VFIO_UPDATE_VADDR.
    updates: bool,
    /// Length of each mapping and the address behind it.
    mappings: Mutex<BTreeMap<u64, (u64, Option<usize>)>>,
    requests: AtomicUsize,
    /// Number of the request that is refused, from 1 on.
    fault: AtomicUsize,
}

impl Kernel {
    fn request<T>(
        &self,
        range: Iova,
        what: impl FnOnce(&mut BTreeMap<u64, (u64, Option<usize>)>) -> Result<T, i32>,
    ) -> io::Result<T> {
        let number = self.requests.fetch_add(1, Ordering::Relaxed) + 1;
        if number == self.fault.load(Ordering::Relaxed) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let mut mappings = lock(&self.mappings);
        if let Some((bytes, _)) = mappings.get(&range.start) {
            assert_eq!(*bytes, range.bytes, "a mapping is one piece");
        }
        what(&mut mappings).map_err(io::Error::from_raw_os_error)
    }

    fn fail_at(&self, number: usize) {
        self.requests.store(0, Ordering::Relaxed);
        self.fault.store(number, Ordering::Relaxed);
    }

    /// Whether the fault has come.
    fn has_failed(&self) -> bool {
        let fault = self.fault.load(Ordering::Relaxed);
        fault != 0 && self.requests.load(Ordering::Relaxed) >= fault
    }

    fn addresses(&self) -> Vec<Option<usize>> {
        lock(&self.mappings).values().map(|(_, at)| *at).collect()
    }
}

fn address(memory: &dyn HostMapping) -> Option<usize> {
    Some(memory.host_address().addr())
}

impl DmaFace for Kernel {
    fn can_change_addresses(&self) -> io::Result<bool> {
        Ok(self.updates)
    }

    fn map(&self, range: Iova, memory: &dyn HostMapping) -> io::Result<()> {
        self.request(range, |mappings| match mappings.get(&range.start) {
            Some(_) => Err(libc::EEXIST),
            None => {
                mappings.insert(range.start, (range.bytes, address(memory)));
                Ok(())
            }
        })
    }

    fn unmap(&self, range: Iova) -> io::Result<()> {
        self.request(range, |mappings| {
            let gone = mappings.remove(&range.start);
            gone.map(drop).ok_or(libc::ENOENT)
        })
    }

    fn forget_address(&self, range: Iova) -> io::Result<()> {
        assert!(self.updates);
        self.request(range, |mappings| match mappings.get_mut(&range.start) {
            Some((_, at @ Some(_))) => {
                *at = None;
                Ok(())
            }
            _ => Err(libc::EINVAL),
        })
    }

    fn tell_address(&self, range: Iova, memory: &dyn HostMapping) -> io::Result<()> {
        assert!(self.updates);
        self.request(range, |mappings| match mappings.get_mut(&range.start) {
            None => Err(libc::ENOENT),
            Some((_, Some(_))) => Err(libc::EINVAL),
            Some((_, at)) => {
                *at = address(memory);
                Ok(())
            }
        })
    }
}

/// Two blocks of memory, as one process has mapped them.
fn memory() -> Vec<Reached> {
    let block = |iova| {
        let file = rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, 8192).unwrap();
        let file = FileOffset::new(file.into(), 0);
        let region = MmapRegion::<()>::from_file(file, 8192).unwrap();
        let region = GuestRegionMmap::new(region, GuestAddress(iova)).unwrap();
        Reached {
            iova,
            memory: Arc::new(region),
        }
    };
    vec![block(0), block(4 << 30)]
}

/// One process's part.
struct Process {
    set: Arc<Mutex<VfioSet>>,
    reach: SharedReach,
    notifiers: Notifiers,
    expected: Vec<Option<usize>>,
}

impl Process {
    fn new(set: &Arc<Mutex<VfioSet>>, kernel: &Arc<Kernel>, first: bool) -> Self {
        let (memory, face) = (memory(), Arc::clone(kernel) as Arc<dyn DmaFace>);
        let expected = memory.iter().map(|one| address(one.memory.as_ref()));
        let expected = expected.collect();
        let reach = match first {
            true => Reach::map_with(face, memory).unwrap(),
            false => Reach::apart(face, memory).unwrap(),
        };
        let reach = Arc::new(Mutex::new(Some(reach)));
        let notifiers = Notifiers::new();
        let notifier = VfioInPlace::new(Arc::clone(set), Arc::clone(&reach));
        notifiers.register(
            Mode::CprTransfer | Mode::CprExec,
            Priority::DEVICE,
            Box::new(notifier),
        );
        Self {
            set: Arc::clone(set),
            reach,
            notifiers,
            expected,
        }
    }

    fn take_over(&self) -> Result<(), DeviceError> {
        let (set, mut reach) = (lock(&self.set), lock(&self.reach));
        take_over(&set, reach.as_mut().unwrap(), Before::Process)
    }

    fn run(&self) {
        for stands in lock(&self.set).run().unwrap() {
            assert!(matches!(stands.standing, crate::vfio::Standing::Sound));
        }
    }
}

struct Bench {
    world: SharedWorld,
    set: Arc<Mutex<VfioSet>>,
    kernel: Arc<Kernel>,
    contents: Vec<Vec<u8>>,
}

/// A VM with two devices, and whether its container can change addresses.
fn bench(updates: bool, supports: &[Support]) -> Bench {
    let (world, set) = vm(supports);
    let contents = {
        let world = crate::vfio::model::lock(&world);
        let contents = world.devices.iter().map(|device| device.content.clone());
        contents.collect()
    };
    let kernel = Kernel {
        updates,
        ..Kernel::default()
    };
    Bench {
        set: Arc::new(Mutex::new(set)),
        world,
        kernel: Arc::new(kernel),
        contents,
    }
}

impl Bench {
    #[track_caller]
    fn assert_at(&self, process: &Process, state: DeviceState) {
        assert_eq!(self.kernel.addresses(), process.expected);
        let world = crate::vfio::model::lock(&self.world);
        assert!(world.states().iter().all(|now| *now == state));
        for (device, content) in world.devices.iter().zip(&self.contents) {
            assert_eq!(device.resets, 0);
            assert_eq!(&device.content, content);
        }
    }
}

#[test]
fn devices_stay_while_the_process_changes_again_and_again() {
    for updates in [true, false] {
        let bench = bench(updates, &[FULL, FULL]);
        drop(Process::new(&bench.set, &bench.kernel, true));
        assert!(bench.kernel.addresses().is_empty(), "unmapped again");
        let mut old = Process::new(&bench.set, &bench.kernel, true);
        for _ in 0..3 {
            bench.assert_at(&old, DeviceState::Running);
            let told = old.notifiers.setup(&SETUP).unwrap();
            let held = crate::vfio::model::lock(&bench.world).states();
            match updates {
                // The IOMMU goes on by itself.
                true => {
                    assert_eq!(bench.kernel.addresses(), [None, None]);
                    assert_eq!(held, [DeviceState::Running; 2]);
                }
                false => {
                    assert!(bench.kernel.addresses().is_empty());
                    assert_eq!(held, [DeviceState::Stop; 2]);
                }
            }
            let new = Process::new(&bench.set, &bench.kernel, false);
            new.take_over().unwrap();
            old.notifiers.done(told);
            // What the old process does at its end is nothing to the devices.
            drop(old);
            new.run();
            bench.assert_at(&new, DeviceState::Running);
            old = new;
        }
        let expected = old.expected.clone();
        drop(old);
        // The end of the process ends them.
        assert_eq!(bench.kernel.addresses(), expected);
    }
}

#[test]
fn whichever_request_fails_the_devices_are_the_old_process_s_and_the_next_upgrade_works() {
    for updates in [true, false] {
        for number in 1.. {
            let bench = bench(updates, &[FULL, FULL]);
            let old = Process::new(&bench.set, &bench.kernel, true);
            let new = Process::new(&bench.set, &bench.kernel, false);
            bench.kernel.fail_at(number);
            let failed = match old.notifiers.setup(&SETUP) {
                Ok(told) => {
                    let taken = new.take_over();
                    // A new process that has taken over may fail for another reason.
                    if taken.is_ok() {
                        new.notifiers
                            .incoming_failed(Mode::CprTransfer, MigrationId([7; 16]));
                    }
                    told
                }
                Err(vetoed) => vetoed.told,
            };
            let came = bench.kernel.has_failed();
            bench.kernel.fail_at(0);
            old.notifiers.failed(failed);
            bench.assert_at(&old, DeviceState::Running);
            if !came {
                assert!(number > 4, "nothing was tried");
                break;
            }
            let told = old.notifiers.setup(&SETUP).unwrap();
            let next = Process::new(&bench.set, &bench.kernel, false);
            next.take_over().unwrap();
            old.notifiers.done(told);
            next.run();
            bench.assert_at(&next, DeviceState::Running);
        }
    }
}

#[test]
fn what_a_new_process_had_taken_is_taken_back_whether_it_has_died_or_only_comes_late() {
    for updates in [true, false] {
        for dies in [true, false] {
            let bench = bench(updates, &[FULL]);
            let old = Process::new(&bench.set, &bench.kernel, true);
            let new = Process::new(&bench.set, &bench.kernel, false);
            let told = old.notifiers.setup(&SETUP).unwrap();
            new.take_over().unwrap();
            assert_eq!(bench.kernel.addresses(), new.expected);
            old.notifiers.failed(told);
            bench.assert_at(&old, DeviceState::Running);
            if dies {
                // Nothing of it runs any more.
                std::mem::forget(new);
            } else {
                let migration = MigrationId([7; 16]);
                new.notifiers.incoming_failed(Mode::CprTransfer, migration);
                new.take_over().unwrap_err();
                drop(new);
            }
            bench.assert_at(&old, DeviceState::Running);
        }
    }
}

#[test]
fn a_program_takes_devices_from_the_one_before_it_and_they_go_back_if_it_fails() {
    for updates in [true, false] {
        let bench = bench(updates, &[FULL]);
        let old = Process::new(&bench.set, &bench.kernel, true);
        let told = old.notifiers.setup(&SETUP).unwrap();
        old.notifiers.done(told);
        std::mem::forget(old);
        let take = |program: &Process| {
            let (set, mut reach) = (lock(&program.set), lock(&program.reach));
            take_over(&set, reach.as_mut().unwrap(), Before::Program).unwrap();
        };
        let new = Process::new(&bench.set, &bench.kernel, false);
        take(&new);
        // It cannot use what came with them.
        let again = Process::new(&bench.set, &bench.kernel, false);
        take(&again);
        drop(new);
        again.run();
        bench.assert_at(&again, DeviceState::Running);
    }
}

#[test]
fn nothing_is_taken_from_a_process_that_has_not_let_go() {
    for updates in [true, false] {
        let bench = bench(updates, &[FULL]);
        let old = Process::new(&bench.set, &bench.kernel, true);
        let new = Process::new(&bench.set, &bench.kernel, false);
        let error = new.take_over().unwrap_err().to_string();
        assert!(error.contains("vfio container"), "{error}");
        drop(new);
        bench.assert_at(&old, DeviceState::Running);
    }
}

#[test]
fn devices_that_an_operator_has_stopped_stay_stopped() {
    for updates in [true, false] {
        let bench = bench(updates, &[FULL, FULL]);
        let old = Process::new(&bench.set, &bench.kernel, true);
        lock(&bench.set).pause().unwrap();
        let told = old.notifiers.setup(&SETUP).unwrap();
        old.notifiers.failed(told);
        bench.assert_at(&old, DeviceState::Stop);
        let new = Process::new(&bench.set, &bench.kernel, false);
        let told = old.notifiers.setup(&SETUP).unwrap();
        new.take_over().unwrap();
        old.notifiers.done(told);
        bench.assert_at(&new, DeviceState::Stop);
        new.run();
        bench.assert_at(&new, DeviceState::Running);
    }
}

#[test]
fn devices_that_can_neither_go_on_nor_be_stopped_veto_with_their_name() {
    let bench = bench(false, &[FULL, NONE]);
    let old = Process::new(&bench.set, &bench.kernel, true);
    let reason = blocker(&lock(&bench.set), lock(&old.reach).as_ref().unwrap()).unwrap();
    assert!(reason.contains("vfio/1") && reason.contains("VADDR"));
    let vetoed = old.notifiers.setup(&SETUP).unwrap_err();
    assert!(vetoed.error.to_string().contains(&reason));
    old.notifiers.failed(vetoed.told);
    bench.assert_at(&old, DeviceState::Running);

    // With addresses that can be changed no device has to know how to stop.
    let bench = self::bench(true, &[NONE, NONE]);
    let old = Process::new(&bench.set, &bench.kernel, true);
    assert_eq!(
        blocker(&lock(&bench.set), lock(&old.reach).as_ref().unwrap()),
        None
    );
    let told = old.notifiers.setup(&SETUP).unwrap();
    old.notifiers.failed(told);
    old.run();
    bench.assert_at(&old, DeviceState::Running);
    let told = old.notifiers.setup(&SETUP).unwrap();
    let new = Process::new(&bench.set, &bench.kernel, false);
    new.take_over().unwrap();
    old.notifiers.done(told);
    new.run();
    bench.assert_at(&new, DeviceState::Running);
}

#[test]
fn a_process_that_could_not_let_devices_work_again_does_not_take_them() {
    let bench = bench(false, &[FULL]);
    let old = Process::new(&bench.set, &bench.kernel, true);
    let told = old.notifiers.setup(&SETUP).unwrap();
    let blind = Arc::new(Mutex::new(vm(&[NONE]).1));
    let new = Process::new(&blind, &bench.kernel, false);
    let error = new.take_over().unwrap_err().to_string();
    assert!(error.contains("vfio/0"), "{error}");
    assert!(bench.kernel.addresses().is_empty(), "nothing was taken");
    old.notifiers.failed(told);
    bench.assert_at(&old, DeviceState::Running);
}

#[test]
fn an_interrupt_that_comes_while_the_process_changes_reaches_the_new_vm() {
    let Ok(kvm) = Kvm::new() else {
        eprintln!("SKIPPED: /dev/kvm cannot be opened");
        return;
    };
    let vm = || {
        let vm = Arc::new(kvm.create_vm().unwrap());
        vm.create_irq_chip().unwrap();
        vm
    };
    let eventfd = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).unwrap();
    let wires = |vm| IrqFds::new(vm, vec![(eventfd.try_clone().unwrap(), 5)]);
    // KVM has taken it if nothing is left to read.
    let taken = || {
        let until = std::iter::repeat_with(|| {
            std::thread::yield_now();
            let left = eventfd.read();
            left.iter().for_each(|left| eventfd.write(*left).unwrap());
            left.is_err()
        });
        until.take(1_000_000).any(|taken| taken)
    };
    let mut old = wires(vm());
    old.connect().unwrap();
    old.connect().unwrap();
    eventfd.write(1).unwrap();
    assert!(taken());
    old.disconnect().unwrap();
    old.disconnect().unwrap();
    eventfd.write(1).unwrap();
    assert_eq!(eventfd.read().unwrap(), 1, "nobody listens");
    eventfd.write(1).unwrap();
    let mut new = wires(vm());
    new.connect().unwrap();
    assert!(taken());
}
