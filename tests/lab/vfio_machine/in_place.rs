//! VMs with VFIO devices that change their process: the same devices, with what is in them.

use std::fs;
use std::path::Path;

use super::{
    TALKED, assert_talks_at, machine, opened_by, start_source, states, states_of, talk, two, with,
};
use crate::harness::{Launch, Machine, Vm};
use crate::mdev::Mdev;
use crate::new_process::Moved;
use crate::proc::Holdings;
use crate::successor::Waiting;
use vmferry_devices::vfio::DeviceState;

/// Nobody can open a VFIO device while this lives.
struct Hidden;

const NODES: &str = "/dev/vfio";
const ELSEWHERE: &str = "/dev/vfio-hidden";

impl Hidden {
    fn new() -> Self {
        fs::rename(NODES, ELSEWHERE).unwrap();
        Self
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        let back = fs::rename(ELSEWHERE, NODES);
        // One panic is enough.
        if !std::thread::panicking() {
            back.unwrap();
        }
    }
}

#[test]
fn a_guest_that_talks_to_two_mtty_is_upgraded_in_place_and_loses_no_byte() {
    let machine = machine();
    let devices = two();
    let mut vm = start_source(&machine, &devices);
    // The guest uses KVM and its devices only: the new processes open none.
    let hidden = Hidden::new();
    assert!(!Path::new(NODES).exists());
    let mut moved = Moved::from(vm.qmp_path());
    assert_eq!(vm.wait_exit().code(), Some(0), "{}", vm.said());
    for again in [true, true, false] {
        assert_eq!(opened_by(moved.pid).len(), 2);
        assert_eq!(states_of(moved.pid), [DeviceState::Running; 2]);
        moved.assert_passes(TALKED);
        if again {
            moved = moved.again();
        }
    }
    drop(hidden);
}

#[test]
fn whatever_becomes_of_the_new_process_the_devices_work_at_the_old_one() {
    let machine = machine();
    let devices = two();
    let mut vm = start_source(&machine, &devices);
    let held = Holdings::settled(vm.pid());
    let options = with(&devices);
    let refuses = |launch: Launch, part: &str, vm: &mut Vm| {
        Waiting::on(&vm.qmp_path(), &machine, &launch.words()).assert_refuses(vm, part);
    };
    // A machine without the second device.
    refuses(with(&devices[..1]), "vfio/1", &mut vm);
    assert_eq!(states(&vm), [DeviceState::Running; 2]);
    talk(&mut vm);
    for _ in 0..2 {
        let mut waiting = Waiting::on(&vm.qmp_path(), &machine, &options.words());
        waiting.dies_when_ready(&mut vm, |new| {
            assert_eq!(opened_by(new).len(), 2);
            assert_eq!(
                states_of(new),
                [DeviceState::Stop; 2],
                "without memory they stop"
            );
        });
        assert_talks_at(&mut vm);
        vm.assert_guest_works();
    }
    held.await_like(vm.pid(), |held| held.fds.clone());
    let moved = Moved::from(vm.qmp_path());
    moved.assert_passes(TALKED);
}

#[test]
fn a_paused_guest_changes_its_process_with_devices_that_stay_stopped() {
    let machine = machine();
    let devices = two();
    let mut vm = start_source(&machine, &devices);
    vm.query("stop");
    let moved = Moved::from(vm.qmp_path());
    assert_eq!(states_of(moved.pid), [DeviceState::Stop; 2]);
    moved.query("cont");
    assert_eq!(states_of(moved.pid), [DeviceState::Running; 2]);
    moved.assert_passes(TALKED);
}

#[test]
fn a_mediated_device_that_cannot_be_stopped_refuses_an_upgrade_before_the_guest_stops() {
    let machine = Machine {
        accel: crate::harness::Accel::Soft,
        ..machine()
    };
    let display = [Mdev::mdpy()];
    let path = display[0].sysfs();
    let launch = Launch::default().with(&["--vfio", path.to_str().unwrap()]);
    let mut vm = machine.start_source(launch.clone());
    vm.warm_up();
    vm.qmp.events.clear();
    Waiting::on(&vm.qmp_path(), &machine, &launch.words())
        .assert_refused(&mut vm, "VFIO_UPDATE_VADDR");
    vm.assert_guest_works();
    let stops = vm
        .qmp
        .events
        .iter()
        .filter(|event| event["event"] == "STOP");
    assert_eq!(stops.count(), 0);
}

#[test]
fn a_guest_that_talks_to_two_mtty_goes_on_in_another_program_of_its_process() {
    let machine = machine();
    let devices = two();
    let mut vm = start_source(&machine, &devices);
    let hidden = Hidden::new();
    for _ in 0..2 {
        let program = Moved::by("exec", vm.qmp_path());
        assert_eq!(program.pid, vm.pid());
        assert_eq!(states_of(program.pid), [DeviceState::Running; 2]);
        program.assert_passes(TALKED);
        // It is our child.
        std::mem::forget(program);
    }
    drop(hidden);
    vm.kill();
}
