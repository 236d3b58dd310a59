//! VFIO devices that migrate: mtty, whose state is what is queued in its serial ports. Everything here is asked of the real kernel; what
//! fails is either made to fail by it, or by a face between it and the code under test.

mod dma_logs;
mod faults;

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use vmferry_devices::DeviceError;
use vmferry_devices::notifier::{Mode, Notifiers, Priority, Setup};
use vmferry_devices::vfio::{
    DeviceState, FdFace, Standing, Support, VfioDevice, VfioFace, VfioNotifier, VfioSet, states,
};
use vmferry_transport::units::MigrationId;

use crate::mdev::Mdev;
use crate::vfio::{self, Opened};

/// Bytes of the stream of a device with two ports, by its driver's code.
const STREAM_BYTES: usize = 96;
/// Of it, what comes in PRE_COPY.
const HEADER_BYTES: usize = 24;

/// A VM's devices. Their order is that in which they are closed.
struct Vm {
    set: VfioSet,
    opened: Vec<Opened>,
    _mdevs: Vec<Mdev>,
}

impl Vm {
    /// With `count` devices called `vfio/0` and so on.
    fn new(count: usize) -> Self {
        Self::with_face(count, |face| face)
    }

    fn with_face<F: VfioFace + 'static>(
        count: usize,
        mut face: impl FnMut(FdFace<OwnedFd>) -> F,
    ) -> Self {
        let mdevs: Vec<_> = (0..count).map(|_| Mdev::mtty()).collect();
        let opened: Vec<_> = mdevs.iter().map(Opened::new).collect();
        let devices = opened.iter().enumerate().map(|(number, opened)| {
            VfioDevice::new(format!("vfio/{number}"), face(FdFace::new(opened.device())))
        });
        Self {
            set: VfioSet::new(devices.collect()),
            opened,
            _mdevs: mdevs,
        }
    }

    /// As the guest: queues something else in each port of each device.
    fn fill(&self) {
        for (device, opened) in self.opened.iter().enumerate() {
            for port in 0..2 {
                opened.send(port, text(device, port).as_bytes());
            }
        }
    }

    /// As the guest: takes what [`fill`](Self::fill) has queued.
    #[track_caller]
    fn assert_filled(&self) {
        for (device, opened) in self.opened.iter().enumerate() {
            for port in 0..2 {
                let found = String::from_utf8(opened.receive(port)).unwrap();
                assert_eq!(found, text(device, port), "vfio/{device}, port {port}");
            }
        }
    }

    #[track_caller]
    fn assert_all_in(&self, state: DeviceState) {
        for (device, opened) in self.opened.iter().enumerate() {
            assert_eq!(opened.state(), state.number(), "vfio/{device}");
        }
    }
}

fn text(device: usize, port: u32) -> String {
    format!("hello {device}.{port}")
}

fn said(error: &DeviceError) -> String {
    let source = std::error::Error::source(error).map(ToString::to_string);
    format!("{error}: {}", source.unwrap_or_default())
}

/// The part of the source, up to the last byte of each stream.
fn away(set: &mut VfioSet) -> Result<Vec<Vec<u8>>, String> {
    let said = |error: DeviceError| said(&error);
    set.begin().map_err(said)?;
    let sources = set.sources(&set.schemas()).map_err(said)?;
    let mut sources: Vec<_> = sources.into_iter().map(|source| source.stream).collect();
    let mut streams = vec![Vec::new(); sources.len()];
    let mut round = |last: bool| {
        for (source, stream) in sources.iter_mut().zip(&mut streams) {
            let mut buffer = [0; 17];
            loop {
                let read = source.read(last, &mut buffer).map_err(|e| e.to_string())?;
                if read == 0 {
                    break;
                }
                stream.extend_from_slice(&buffer[..read]);
            }
        }
        Ok::<_, String>(())
    };
    round(false)?;
    round(false)?;
    set.sizes().map_err(said)?;
    set.quiesce().map_err(said)?;
    set.stop().map_err(said)?;
    round(true)?;
    Ok(streams)
}

/// The part of the target, up to READY.
fn here(set: &mut VfioSet, streams: &[Vec<u8>]) -> Result<(), String> {
    let said = |error: DeviceError| said(&error);
    set.begin_load().map_err(said)?;
    let sinks = set.sinks(&set.schemas()).map_err(said)?;
    for (mut sink, stream) in sinks.into_iter().zip(streams) {
        for piece in stream.chunks(50) {
            let name = &sink.name;
            let written = sink.stream.write(piece);
            written.map_err(|error| format!("{name}: {error}"))?;
        }
    }
    set.finish_load().map_err(said)
}

fn all_sound(stands: &[vmferry_devices::vfio::Stands]) -> bool {
    let mut stands = stands.iter();
    stands.all(|stands| matches!(stands.standing, Standing::Sound))
}

#[test]
fn the_kernel_goes_every_way_between_states_as_we_expect_it_to() {
    let mut source = Vm::new(1);
    let stream = away(&mut source.set).unwrap().remove(0);
    let vm = Vm::new(1);
    let face = FdFace::new(vm.opened[0].device());
    let support = face.support().unwrap().unwrap();
    assert_eq!(support, Support::from_flags(7));
    let mut ways = 0;
    for from in DeviceState::ALL {
        for to in DeviceState::ALL {
            // What does not exist is not asked for, here and in the code under test: Linux 6.12 looks for it without end.
            if states::path(support, from, to).is_none() {
                continue;
            }
            let first = face.set_state(from).unwrap();
            assert_eq!(
                first.is_some(),
                states::opens_stream(DeviceState::Running, from)
            );
            if let (DeviceState::Resuming, Some(first)) = (from, &first) {
                assert_eq!(face.write_stream(first, &stream).unwrap(), STREAM_BYTES);
            }
            let second = face.set_state(to).unwrap();
            assert_eq!(
                second.is_some(),
                states::opens_stream(from, to),
                "{from} -> {to}"
            );
            assert_eq!(face.state().unwrap(), to, "{from} -> {to}");
            face.reset().unwrap();
            assert_eq!(face.state().unwrap(), DeviceState::Running);
            ways += 1;
        }
    }
    assert_eq!(
        ways, 47,
        "all but those of ERROR, and from STOP_COPY to PRE_COPY"
    );
}

#[test]
fn mtty_moves_with_the_data_that_is_queued_in_it_alone_and_with_another_through_p2p() {
    for count in [1, 2] {
        let (mut source, mut target) = (Vm::new(count), Vm::new(count));
        assert_eq!(source.set.blockers(), []);
        source.fill();
        let streams = away(&mut source.set).unwrap();
        for stream in &streams {
            assert_eq!(stream.len(), STREAM_BYTES);
        }
        source.assert_all_in(DeviceState::StopCopy);
        here(&mut target.set, &streams).unwrap();
        target.assert_all_in(DeviceState::Stop);
        assert!(all_sound(&target.set.run().unwrap()));
        target.assert_all_in(DeviceState::Running);
        target.assert_filled();
        assert!(source.set.end().is_empty());
        source.assert_all_in(DeviceState::Stop);
    }
}

#[test]
fn what_is_left_of_mtty_is_its_header_in_pre_copy_and_then_the_rest() {
    let mut vm = Vm::new(2);
    vm.set.begin().unwrap();
    vm.assert_all_in(DeviceState::PreCopy);
    for (device, sizes) in vm.set.sizes().unwrap() {
        assert_eq!(sizes.initial_bytes, HEADER_BYTES as u64, "{device}");
        assert_eq!(sizes.stop_copy_bytes, Some(STREAM_BYTES as u64));
        assert!(!sizes.reinit);
    }
    let mut sources = vm.set.sources(&vm.set.schemas()).unwrap();
    let mut buffer = [0; 1000];
    for source in &mut sources {
        assert_eq!(
            source.stream.read(false, &mut buffer).unwrap(),
            HEADER_BYTES
        );
        assert_eq!(source.stream.read(false, &mut buffer).unwrap(), 0);
    }
    vm.set.quiesce().unwrap();
    vm.assert_all_in(DeviceState::PreCopyP2p);
    assert_eq!(vm.set.sizes().unwrap()[0].1.initial_bytes, 0);
    vm.set.stop().unwrap();
    vm.assert_all_in(DeviceState::StopCopy);
    for source in &mut sources {
        let read = source.stream.read(true, &mut buffer).unwrap();
        assert_eq!(read, STREAM_BYTES - HEADER_BYTES);
    }
    drop(sources);
    assert!(all_sound(&vm.set.roll_back()));
    vm.assert_all_in(DeviceState::Running);
}

/// What a target answers to damaged streams of the second of two devices, and that the source's devices are as before afterwards.
fn a_damaged_stream_fails_the_migration_and_a_second_succeeds(paused: bool) {
    let (mut source, mut target) = (Vm::new(2), Vm::new(2));
    source.fill();
    let before = match paused {
        true => DeviceState::Stop,
        false => DeviceState::Running,
    };
    if paused {
        source.set.pause().unwrap();
    }
    source.assert_all_in(before);
    let cut = |length: usize| move |stream: &mut Vec<u8>| stream.truncate(length);
    type Damage = Box<dyn Fn(&mut Vec<u8>)>;
    let damages: [(Damage, &str); 6] = [
        (Box::new(cut(0)), "Invalid argument"),
        (Box::new(cut(HEADER_BYTES)), "Invalid argument"),
        (Box::new(cut(STREAM_BYTES / 2)), "Invalid argument"),
        (Box::new(cut(STREAM_BYTES - 1)), "Invalid argument"),
        // The driver looks at the header as soon as it has it.
        (Box::new(|stream| stream[0] ^= 1), "Bad address"),
        (Box::new(|stream| stream.push(0)), "Cannot allocate memory"),
    ];
    for (damage, answer) in damages {
        let mut streams = away(&mut source.set).unwrap();
        damage(&mut streams[1]);
        let error = here(&mut target.set, &streams).unwrap_err();
        assert!(
            error.contains("vfio/1") && error.contains(answer),
            "{error}"
        );
        assert_eq!(
            error.contains("RESUMING -> STOP"),
            answer == "Invalid argument",
            "{error}"
        );
        // The driver itself may have forgotten what it refused.
        target.set.finish_load().unwrap_err();
        assert!(all_sound(&target.set.abandon_load()));
        target.assert_all_in(DeviceState::Running);
        assert!(all_sound(&source.set.roll_back()));
        source.assert_all_in(before);
    }
    let streams = away(&mut source.set).unwrap();
    here(&mut target.set, &streams).unwrap();
    target.assert_all_in(DeviceState::Stop);
    assert!(all_sound(&target.set.run().unwrap()));
    target.assert_filled();
    // And had it not come: the guest would have found everything here.
    assert!(all_sound(&source.set.roll_back()));
    assert!(all_sound(&source.set.run().unwrap()));
    source.assert_filled();
}

#[test]
fn a_damaged_stream_of_mtty_is_refused_by_name_and_the_source_goes_on() {
    a_damaged_stream_fails_the_migration_and_a_second_succeeds(false);
}

#[test]
fn a_damaged_stream_of_mtty_is_refused_by_name_also_if_the_guest_is_paused() {
    a_damaged_stream_fails_the_migration_and_a_second_succeeds(true);
}

#[test]
fn a_device_with_another_number_of_ports_refuses_the_state_of_mtty() {
    let mut source = Vm::new(1);
    let streams = away(&mut source.set).unwrap();
    let mut other = streams[0].clone();
    // Behind the magic number and the version.
    other[16] = 1;
    let mut target = Vm::new(1);
    let error = here(&mut target.set, &[other]).unwrap_err();
    assert!(error.contains("vfio/0"), "{error}");
    assert!(all_sound(&target.set.abandon_load()));
    target.assert_all_in(DeviceState::Running);
}

#[test]
fn a_vfio_device_without_migration_blocks_it_with_a_reason() {
    let (mdpy, mtty) = (Mdev::mdpy(), Mdev::mtty());
    let opened = [Opened::new(&mdpy), Opened::new(&mtty)];
    let device = |number: usize| {
        VfioDevice::new(
            format!("vfio/{number}"),
            FdFace::new(opened[number].device()),
        )
    };
    let set = VfioSet::new(vec![device(1), device(0)]);
    let blockers = set.blockers();
    assert_eq!(blockers.len(), 1);
    assert_eq!(blockers[0].device, "vfio/0");
    assert!(blockers[0].reason.contains("unplug"), "{blockers:?}");

    let notifiers = Notifiers::new();
    let notifier = VfioNotifier::new(Arc::new(Mutex::new(set)));
    notifiers.register(Mode::Normal, Priority::DEVICE, Box::new(notifier));
    let vetoed = notifiers.setup(&Setup {
        mode: Mode::Normal,
        migration: MigrationId([7; 16]),
    });
    let vetoed = vetoed.unwrap_err();
    assert!(vetoed.error.to_string().contains("vfio/0"));
    notifiers.failed(vetoed.told);
}

#[test]
fn the_notifier_of_a_failed_migration_has_mtty_run_before_it_returns() {
    let vm = Vm::new(2);
    vm.fill();
    // The last is closed first.
    let Vm {
        _mdevs,
        opened,
        set,
    } = vm;
    let set = Arc::new(Mutex::new(set));
    let notifiers = Notifiers::new();
    let notifier = VfioNotifier::new(Arc::clone(&set));
    notifiers.register(Mode::Normal, Priority::DEVICE, Box::new(notifier));
    let setup = Setup {
        mode: Mode::Normal,
        migration: MigrationId([8; 16]),
    };
    let told = notifiers.setup(&setup).unwrap();
    away(&mut set.lock().unwrap()).unwrap();
    notifiers.failed(told);
    for device in &opened {
        assert_eq!(device.state(), vfio::RUNNING);
    }
    let told = notifiers.setup(&setup).unwrap();
    away(&mut set.lock().unwrap()).unwrap();
    notifiers.done(told);
    for device in &opened {
        assert_eq!(device.state(), DeviceState::Stop.number());
    }
}
