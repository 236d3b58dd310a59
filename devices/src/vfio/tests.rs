//! Whole migrations of devices in memory: in lockstep, with every request failing in turn, with guests that are paused.

use vmferry_transport::data::DeviceSource;
use vmferry_transport::units::MigrationId;

use super::model::{Fault, SharedWorld, lock, refusal, vm};
use super::*;
use crate::DeviceError;
use crate::notifier::{Mode, Notifiers, Priority, Setup};
use std::sync::{Arc, Mutex};

const FULL: Support = Support {
    stop_copy: true,
    p2p: true,
    pre_copy: true,
};
const NO_PRE_COPY: Support = Support {
    pre_copy: false,
    ..FULL
};
const STOP_COPY_ONLY: Support = Support {
    p2p: false,
    ..NO_PRE_COPY
};

/// VMs whose devices can migrate.
fn movable() -> Vec<Vec<Support>> {
    let no_p2p = Support { p2p: false, ..FULL };
    vec![
        vec![FULL],
        vec![no_p2p],
        vec![NO_PRE_COPY],
        vec![STOP_COPY_ONLY],
        vec![FULL, FULL],
        vec![FULL, NO_PRE_COPY, FULL],
    ]
}

type Streams = Vec<Vec<u8>>;

/// The streams of all devices, and who reads them.
struct Reading {
    sources: Vec<Box<dyn DeviceSource>>,
    streams: Streams,
}

impl Reading {
    fn round(&mut self, last: bool) -> Result<(), String> {
        for (source, stream) in self.sources.iter_mut().zip(&mut self.streams) {
            let mut buffer = [0; 40];
            // Long enough for what there is; a round that does not end is a failure.
            for turn in 0.. {
                assert!(turn < 1000, "the round does not end");
                let read = source.read(last, &mut buffer).map_err(|e| e.to_string())?;
                if read == 0 {
                    break;
                }
                stream.extend_from_slice(&buffer[..read]);
            }
        }
        Ok(())
    }
}

fn text(error: &DeviceError) -> String {
    let source = std::error::Error::source(error).map(ToString::to_string);
    format!("{error}: {}", source.unwrap_or_default())
}

/// The part of the source, up to the last byte.
fn away(set: &mut VfioSet) -> Result<Streams, String> {
    let text = |error: DeviceError| text(&error);
    set.begin().map_err(text)?;
    let sources = set.sources(&set.schemas()).map_err(text)?;
    let mut reading = Reading {
        streams: vec![Vec::new(); sources.len()],
        sources: sources.into_iter().map(|source| source.stream).collect(),
    };
    for _ in 0..3 {
        reading.round(false)?;
        set.sizes().map_err(text)?;
    }
    set.quiesce().map_err(text)?;
    set.sizes().map_err(text)?;
    set.stop().map_err(text)?;
    reading.round(true)?;
    Ok(reading.streams)
}

/// The part of the target, up to READY.
fn here(set: &mut VfioSet, streams: &Streams) -> Result<(), String> {
    let text = |error: DeviceError| text(&error);
    set.begin_load().map_err(text)?;
    let sinks = set.sinks(&set.schemas()).map_err(text)?;
    for (mut sink, stream) in sinks.into_iter().zip(streams) {
        for piece in stream.chunks(100) {
            sink.stream.write(piece).map_err(|e| e.to_string())?;
        }
    }
    set.finish_load().map_err(text)
}

fn contents(world: &SharedWorld) -> Vec<Vec<u8>> {
    let world = lock(world);
    world
        .devices
        .iter()
        .map(|device| device.content.clone())
        .collect()
}

/// What of a device's content is at the end of its stream.
fn arrived(world: &SharedWorld, expected: &[Vec<u8>]) -> bool {
    let found = contents(world);
    found.len() == expected.len()
        && found
            .iter()
            .zip(expected)
            .all(|(found, expected)| found.ends_with(expected) && !expected.is_empty())
}

#[track_caller]
fn assert_all_in(world: &SharedWorld, state: DeviceState) {
    let states = lock(world).states();
    assert!(states.iter().all(|found| *found == state), "{states:?}");
}

fn all_sound(stands: &[Stands]) -> bool {
    stands
        .iter()
        .all(|stands| matches!(stands.standing, Standing::Sound))
}

#[test]
fn devices_move_together_with_their_state_and_work_at_the_target_only_after_the_commit() {
    for supports in movable() {
        let (source, mut leaving) = vm(&supports);
        let (target, mut coming) = vm(&supports);
        let expected = contents(&source);
        let streams = away(&mut leaving).unwrap();
        lock(&target)
            .devices
            .iter_mut()
            .for_each(|device| device.content.clear());
        here(&mut coming, &streams).unwrap();
        assert_all_in(&source, DeviceState::StopCopy);
        assert_all_in(&target, DeviceState::Stop);
        assert!(arrived(&target, &expected), "{supports:?}");

        assert!(all_sound(&coming.run().unwrap()));
        assert_all_in(&target, DeviceState::Running);
        assert!(leaving.end().is_empty());
        assert_all_in(&source, DeviceState::Stop);
        assert!(leaving.roll_back().is_empty(), "the guest has left");
        assert!(coming.abandon_load().is_empty(), "the guest is here");
        assert_all_in(&target, DeviceState::Running);
    }
}

/// Runs `attempt` on a fresh VM with each request failing in turn, in each way, until one comes through without.
fn with_each_request_failing(
    supports: &[Support],
    mut attempt: impl FnMut(&SharedWorld, &mut VfioSet, Fault) -> Result<(), String>,
) {
    for fault in Fault::ALL {
        for at in 1.. {
            let (world, mut set) = vm(supports);
            lock(&world).fault = Some((at, fault));
            let outcome = attempt(&world, &mut set, fault);
            let failed = lock(&world).failed.clone();
            let Some(failed) = failed else {
                assert!(at > supports.len(), "too few requests to mean anything");
                outcome.unwrap();
                break;
            };
            // These are asked in passing, and the migration can do without the answer.
            if outcome.is_ok() {
                let optional = ["stop_copy_bytes", "enable_reinit", "state"];
                let optional = optional.iter().any(|name| failed.starts_with(name));
                assert!(optional, "{failed} failed, and nobody noticed");
            }
        }
    }
}

#[test]
fn whatever_request_fails_at_the_source_every_device_works_again_or_was_reset() {
    for supports in movable() {
        with_each_request_failing(&supports, |world, set, fault| {
            let expected = contents(world);
            let outcome = away(set).map(drop);
            lock(world).fault = None;
            let failed = lock(world).failed.clone();
            if let (Err(error), Some(failed)) = (&outcome, &failed) {
                let reading = failed.starts_with("read") || failed.starts_with("precopy_info");
                let device = failed.rsplit(' ').next().unwrap();
                assert!(reading || error.contains(device), "{failed}: {error}");
                assert!(error.contains(&refusal().to_string()), "{error}");
            }
            let stands = set.roll_back();
            assert_all_in(world, DeviceState::Running);
            for (stands, device) in stands.iter().zip(&lock(world).devices) {
                let reset = matches!(stands.standing, Standing::Reset(_));
                assert_eq!(reset, device.resets == 1, "{failed:?}: {stands:?}");
                assert!(!matches!(stands.standing, Standing::Lost { .. }));
                assert!(!reset || fault == Fault::Broken, "{failed:?}: {stands:?}");
            }
            // What was not reset has lost nothing, and the next attempt comes through.
            if outcome.is_ok()
                || stands
                    .iter()
                    .all(|stands| !matches!(stands.standing, Standing::Reset(_)))
            {
                assert_eq!(contents(world), expected);
            }
            away(set).unwrap();
            assert!(all_sound(&set.roll_back()));
            assert_all_in(world, DeviceState::Running);
            outcome
        });
    }
}

#[test]
fn whatever_request_fails_on_the_way_back_every_device_works_again_or_was_reset() {
    for supports in movable() {
        for states_are_told in [true, false] {
            with_each_request_failing(&supports, |world, set, _| {
                let fault = lock(world).fault.take();
                away(set).unwrap();
                let (at, fault) = fault.unwrap();
                {
                    let mut world = lock(world);
                    world.mute = !states_are_told;
                    world.fault = Some((world.requests + at, fault));
                }
                let stands = set.roll_back();
                assert_eq!(stands.len(), supports.len());
                assert_all_in(world, DeviceState::Running);
                for (stands, device) in stands.iter().zip(&lock(world).devices) {
                    let reset = matches!(stands.standing, Standing::Reset(_));
                    assert_eq!(reset, device.resets > 0, "{stands:?}");
                }
                lock(world).failed.clone().map_or(Ok(()), Err)
            });
        }
    }
}

#[test]
fn a_device_that_not_even_a_reset_helps_is_named_and_the_others_work() {
    let (world, mut set) = vm(&[FULL, FULL]);
    away(&mut set).unwrap();
    {
        let mut world = lock(&world);
        world.devices[1].state = DeviceState::Error;
        world.resets_fail = true;
        world.failed = Some("vfio/1, by the test".to_owned());
    }
    let stands = set.roll_back();
    assert!(matches!(stands[0].standing, Standing::Sound), "{stands:?}");
    assert!(
        matches!(&stands[1], Stands { device, standing: Standing::Lost { .. } } if device == "vfio/1")
    );
    assert_eq!(
        lock(&world).states(),
        [DeviceState::Running, DeviceState::Error]
    );

    // The next migration says what is wrong, and gives the others back.
    let error = text(&set.begin().unwrap_err());
    assert!(
        error.contains("vfio/1") && error.contains("ERROR"),
        "{error}"
    );
    set.roll_back();
    assert_eq!(
        lock(&world).states(),
        [DeviceState::Running, DeviceState::Error]
    );
}

#[test]
fn whatever_request_fails_at_the_target_its_devices_are_empty_afterwards_and_take_the_next_guest() {
    for supports in movable() {
        let (source, mut leaving) = vm(&supports);
        let expected = contents(&source);
        let streams = away(&mut leaving).unwrap();
        with_each_request_failing(&supports, |world, set, _| {
            let outcome = here(set, &streams);
            lock(world).fault = None;
            let failed = lock(world).failed.clone();
            if let (Err(error), Some(failed)) = (&outcome, &failed) {
                let device = failed.rsplit(' ').next().unwrap();
                assert!(
                    failed.starts_with("write") || error.contains(device),
                    "{failed}: {error}"
                );
            }
            set.abandon_load();
            assert_all_in(world, DeviceState::Running);
            assert!(contents(world).iter().all(Vec::is_empty), "{failed:?}");
            here(set, &streams).unwrap();
            assert!(all_sound(&set.run().unwrap()));
            assert!(arrived(world, &expected));
            outcome
        });
    }
}

#[test]
fn a_stream_that_is_cut_or_changed_is_refused_before_the_guest_could_run_here() {
    let (_, mut leaving) = vm(&[FULL, FULL]);
    let streams = away(&mut leaving).unwrap();
    let mut cut = streams.clone();
    cut[1].pop();
    let mut changed = streams.clone();
    changed[1][7] ^= 4;
    let mut empty = streams.clone();
    empty[1].clear();
    for bad in [cut, changed, empty] {
        let (world, mut set) = vm(&[FULL, FULL]);
        let error = here(&mut set, &bad).unwrap_err();
        for expected in ["vfio/1", "RESUMING -> STOP", "Invalid argument"] {
            assert!(error.contains(expected), "{error}");
        }
        assert_eq!(
            lock(&world).states(),
            [DeviceState::Stop, DeviceState::Resuming]
        );
        assert!(all_sound(&set.abandon_load()));
        here(&mut set, &streams).unwrap();
    }
}

#[test]
fn a_device_that_forgets_what_it_refused_is_refused_all_the_same() {
    let (_, mut leaving) = vm(&[FULL]);
    let streams = away(&mut leaving).unwrap();
    let (world, mut set) = vm(&[FULL]);
    set.begin_load().unwrap();
    let mut sink = set.sinks(&set.schemas()).unwrap().remove(0).stream;
    let next = lock(&world).requests + 1;
    lock(&world).fault = Some((next, Fault::Refused));
    sink.write(b"what is this").unwrap_err();
    sink.write(&streams[0]).unwrap();
    let error = text(&set.finish_load().unwrap_err());
    assert!(
        error.contains("vfio/0") && error.contains("refused"),
        "{error}"
    );
    assert_all_in(&world, DeviceState::Resuming);

    // A device that cannot be emptied does not count as empty.
    lock(&world).resets_fail = true;
    let stands = set.abandon_load();
    assert!(
        matches!(stands[0].standing, Standing::Lost { .. }),
        "{stands:?}"
    );
}

#[test]
fn a_stream_before_the_device_is_stopped_has_no_end_and_one_after_it_has_no_rounds() {
    let (_, mut set) = vm(&[FULL]);
    set.begin().unwrap();
    let mut source = set.sources(&set.schemas()).unwrap().remove(0).stream;
    let mut buffer = [0; 10];
    source.read(true, &mut buffer).unwrap_err();
    set.quiesce().unwrap();
    source.read(true, &mut buffer).unwrap_err();
    set.stop().unwrap();
    source.read(false, &mut buffer).unwrap_err();
    assert!(source.read(true, &mut buffer).unwrap() > 0);
    set.roll_back();
    source.read(true, &mut buffer).unwrap_err();
}

#[test]
fn a_round_ends_although_the_device_changes_faster_than_it_is_read() {
    let (world, mut set) = vm(&[FULL]);
    lock(&world).devices[0].dirties = 2;
    let streams = away(&mut set).unwrap();
    // 50 bytes at first, and each round what the one before has caused.
    assert!(streams[0].starts_with(&contents(&world)[0][..50]));
    assert!(
        streams[0].len() > 50 + 100 + 200 + 200,
        "{}",
        streams[0].len()
    );
}

#[test]
fn sizes_are_what_is_left_and_a_new_beginning_is_told_once_whoever_heard_of_it() {
    let (world, mut set) = vm(&[FULL, NO_PRE_COPY]);
    set.begin().unwrap();
    let sizes = set.sizes().unwrap();
    let expected = DeviceSizes {
        initial_bytes: 50,
        dirty_bytes: 0,
        stop_copy_bytes: Some(200),
        reinit: false,
    };
    assert_eq!(sizes[0], ("vfio/0".to_owned(), expected));
    assert_eq!(sizes[1].1.initial_bytes, 0);
    assert_eq!(sizes[1].1.stop_copy_bytes, Some(201));

    lock(&world).devices[0].reinit = true;
    // The data thread asks first.
    let mut source = set.sources(&set.schemas()).unwrap().remove(0).stream;
    while source.read(false, &mut [0; 64]).unwrap() > 0 {}
    let sizes = set.sizes().unwrap()[0].1;
    assert!(sizes.reinit && sizes.initial_bytes == 0, "{sizes:?}");
    assert!(!set.sizes().unwrap()[0].1.reinit);
    set.roll_back();
}

#[test]
fn devices_of_a_paused_guest_stay_stopped_whatever_becomes_of_the_migration() {
    for supports in movable() {
        let (world, mut set) = vm(&supports);
        set.pause().unwrap();
        assert_all_in(&world, DeviceState::Stop);
        let was_active = |world: &SharedWorld| {
            let mut world = lock(world);
            let devices = world.devices.iter_mut();
            let active =
                devices.filter_map(|device| std::mem::take(&mut device.was_active).then_some(()));
            active.count() > 0
        };
        was_active(&world);
        let expected = contents(&world);
        let streams = away(&mut set).unwrap();
        assert!(all_sound(&set.roll_back()));
        assert_all_in(&world, DeviceState::Stop);
        assert!(!was_active(&world), "{supports:?}");

        let (target, mut coming) = vm(&supports);
        here(&mut coming, &streams).unwrap();
        assert_all_in(&target, DeviceState::Stop);
        assert!(arrived(&target, &expected));

        assert!(all_sound(&set.run().unwrap()));
        assert_all_in(&world, DeviceState::Running);
    }
}

#[test]
fn a_device_that_cannot_migrate_works_on_unharmed_however_often_its_guest_is_stopped() {
    for supports in [vec![Support::default()], vec![FULL, Support::default()]] {
        let (world, mut set) = vm(&supports);
        let expected = contents(&world);
        for _ in 0..2 {
            set.pause().unwrap();
            let last = lock(&world).states().pop();
            assert_eq!(last, Some(DeviceState::Running));
            assert!(all_sound(&set.run().unwrap()));
            assert_all_in(&world, DeviceState::Running);
        }
        assert_eq!(contents(&world), expected);
        assert!(lock(&world).devices.iter().all(|device| device.resets == 0));
    }
}

#[test]
fn devices_that_have_come_from_another_process_are_stopped_or_stay_so() {
    for supports in movable() {
        for stopped_before in [true, false] {
            let (world, mut set) = vm(&supports);
            for device in &mut lock(&world).devices {
                if stopped_before {
                    device.state = DeviceState::Stop;
                }
                device.was_active = false;
            }
            set.pause().unwrap();
            assert_all_in(&world, DeviceState::Stop);
            let was_active = lock(&world).devices.iter().any(|device| device.was_active);
            assert!(!(stopped_before && was_active), "{supports:?}");
        }
    }
}

#[test]
fn a_guest_can_be_paused_and_continued_during_a_migration() {
    let (world, mut set) = vm(&[FULL, FULL]);
    set.begin().unwrap();
    set.pause().unwrap();
    assert_all_in(&world, DeviceState::PreCopyP2p);
    set.run().unwrap();
    assert_all_in(&world, DeviceState::PreCopy);
    set.pause().unwrap();
    assert!(all_sound(&set.roll_back()));
    assert_all_in(&world, DeviceState::Stop);

    // Continued meanwhile: it goes back to work.
    set.begin().unwrap();
    set.run().unwrap();
    set.stop().unwrap();
    assert!(set.run().is_err(), "its state is being read");
    assert_all_in(&world, DeviceState::StopCopy);
    assert!(all_sound(&set.roll_back()));
    assert_all_in(&world, DeviceState::Running);
}

#[test]
fn a_device_of_which_nobody_knows_where_it_is_is_not_asked_for_what_may_not_exist() {
    let (world, mut set) = vm(&[FULL]);
    set.begin().unwrap();
    set.quiesce().unwrap();
    {
        let mut world = lock(&world);
        world.mute = true;
        world.fault = Some((world.requests + 1, Fault::After));
    }
    set.stop().unwrap_err();
    assert_all_in(&world, DeviceState::StopCopy);
    assert!(all_sound(&set.run().unwrap()));
    assert_all_in(&world, DeviceState::Running);
    set.roll_back();
    assert_all_in(&world, DeviceState::Running);
}

#[test]
fn whatever_request_of_a_pause_fails_all_devices_work_on() {
    for supports in movable() {
        with_each_request_failing(&supports, |world, set, _| {
            let paused = set.pause();
            let expected = match &paused {
                Ok(()) => DeviceState::Stop,
                Err(_) => DeviceState::Running,
            };
            assert_all_in(world, expected);
            paused.map_err(|error| text(&error))
        });
    }
}

#[test]
fn whatever_request_fails_after_the_commit_the_devices_work_or_were_reset() {
    for supports in movable() {
        let (_, mut leaving) = vm(&supports);
        let streams = away(&mut leaving).unwrap();
        for fault in Fault::ALL {
            for at in 1.. {
                let (world, mut set) = vm(&supports);
                here(&mut set, &streams).unwrap();
                {
                    let mut world = lock(&world);
                    world.fault = Some((world.requests + at, fault));
                }
                let stands = set.run().unwrap();
                assert_all_in(&world, DeviceState::Running);
                for (stands, device) in stands.iter().zip(&lock(&world).devices) {
                    let reset = matches!(stands.standing, Standing::Reset(_));
                    assert_eq!(reset, device.resets > 0, "{stands:?}");
                }
                if lock(&world).failed.is_none() {
                    assert!(all_sound(&stands));
                    break;
                }
            }
        }
    }
}

#[test]
fn a_device_that_cannot_migrate_or_not_beside_others_is_named_with_what_to_do() {
    let blockers = |supports: &[Support]| vm(supports).1.blockers();
    for supports in movable() {
        assert_eq!(blockers(&supports), []);
    }
    let found = blockers(&[FULL, Support::default()]);
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].device, "vfio/1");
    assert!(found[0].reason.contains("unplug"), "{found:?}");
    let found = blockers(&[STOP_COPY_ONLY, FULL]);
    assert_eq!(found.len(), 1);
    assert!(
        found[0].device == "vfio/0" && found[0].reason.contains("P2P"),
        "{found:?}"
    );
    assert_eq!(blockers(&[]), []);
}

#[test]
fn the_notifier_vetoes_gives_back_what_failed_and_ends_what_is_done() {
    let register = |supports: &[Support]| {
        let (world, set) = vm(supports);
        let set = Arc::new(Mutex::new(set));
        let notifiers = Notifiers::new();
        let notifier = Box::new(VfioNotifier::new(Arc::clone(&set)));
        notifiers.register(Mode::Normal, Priority::DEVICE, notifier);
        (world, set, notifiers)
    };
    let setup = Setup {
        mode: Mode::Normal,
        migration: MigrationId([4; 16]),
    };
    let (_, _, notifiers) = register(&[FULL, STOP_COPY_ONLY]);
    let vetoed = notifiers.setup(&setup).unwrap_err();
    let veto = vetoed.error.to_string();
    assert!(veto.contains("vfio/1") && veto.contains("P2P"), "{veto}");
    notifiers.failed(vetoed.told);

    let (world, set, notifiers) = register(&[FULL, FULL]);
    let told = notifiers.setup(&setup).unwrap();
    away(&mut set.lock().unwrap()).unwrap();
    notifiers.failed(told);
    assert_all_in(&world, DeviceState::Running);

    let told = notifiers.setup(&setup).unwrap();
    away(&mut set.lock().unwrap()).unwrap();
    notifiers.done(told);
    assert_all_in(&world, DeviceState::Stop);

    let (world, set, notifiers) = register(&[FULL, FULL]);
    set.lock().unwrap().begin_load().unwrap();
    notifiers.incoming_failed(Mode::Normal, MigrationId([5; 16]));
    assert_all_in(&world, DeviceState::Running);
    assert!(lock(&world).devices.iter().all(|device| device.resets == 1));
}

#[test]
fn a_device_that_the_other_side_does_not_know_of_has_no_stream() {
    let (_, mut set) = vm(&[FULL, FULL]);
    set.begin().unwrap();
    let mut hello = set.schemas();
    hello.reverse();
    let indices: Vec<_> = set
        .sources(&hello)
        .unwrap()
        .iter()
        .map(|stream| (stream.index, stream.name.clone()))
        .collect();
    assert_eq!(
        indices,
        [(1, "vfio/0".to_owned()), (0, "vfio/1".to_owned())]
    );
    hello.remove(0);
    let error = set.sources(&hello).unwrap_err().to_string();
    assert!(error.contains("vfio/1"), "{error}");
    set.roll_back();
}
