//! VM processes with VFIO devices: the guest talks to mtty while it runs, moves, and stays. What it sends comes back eight passes
//! later, so at any time some of it is in the devices, and a byte that is lost or doubled is an error that the guest reports.

mod damaged;
mod in_place;

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use serde_json::json;
use vmferry_devices::vfio::{DeviceState, FdFace, VfioFace};

use crate::harness::{Accel, Launch, Machine, Vm, until};
use crate::mdev::Mdev;
use crate::modules::load_kvm;

/// Passes after which all that the guest reads is checked: more than the workload keeps in a device.
const TALKED: u64 = 12;
/// Of the stream of an mtty, what comes in PRE_COPY.
const HEADER_BYTES: u64 = 24;
/// All of it.
const STREAM_BYTES: u64 = 96;

/// Small and slow, as every guest on KVM here. It makes about ten passes per second.
fn machine() -> Machine {
    load_kvm();
    Machine::tiny(Accel::Kvm)
}

/// Options for a VM with these devices, which its guest uses as serial ports that echo.
fn with(devices: &[Mdev]) -> Launch {
    devices.iter().fold(Launch::default(), |launch, device| {
        launch.with(&["--vfio", &format!("{},x-echo", device.sysfs().display())])
    })
}

fn two() -> [Mdev; 2] {
    [Mdev::mtty(), Mdev::mtty()]
}

/// The guest sends and reads for so long that whatever was in its devices has come back.
fn talk(vm: &mut Vm) {
    let before = vm.passes();
    until("the guest reads what it has sent", || {
        (vm.passes() > before + TALKED).then_some(())
    });
}

fn start_source(machine: &Machine, devices: &[Mdev]) -> Vm {
    let mut vm = machine.start_source(with(devices).with(&["--log", "debug"]));
    vm.warm_up();
    talk(&mut vm);
    vm
}

fn start_target(machine: &Machine, devices: &[Mdev]) -> Vm {
    machine.start_target("tcp:127.0.0.1:0", with(devices))
}

/// The states of a VM's devices.
fn states(vm: &Vm) -> Vec<DeviceState> {
    states_of(vm.pid())
}

/// The states of the devices of a process.
fn states_of(process: u32) -> Vec<DeviceState> {
    let state = |device| FdFace::new(device).state().unwrap();
    opened_by(process).into_iter().map(state).collect()
}

/// A VM's devices.
fn opened(vm: &Vm) -> Vec<OwnedFd> {
    opened_by(vm.pid())
}

/// The VFIO devices of a process, by copies of its own descriptors: nobody else can open them. In the order of the descriptors.
pub(crate) fn opened_by(process: u32) -> Vec<OwnedFd> {
    let folder = format!("/proc/{process}/fd");
    let process = Pid::from_raw(process.try_into().unwrap()).unwrap();
    let process = pidfd_open(process, PidfdFlags::empty()).unwrap();
    let mut opened = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        let link = fs::read_link(entry.path()).unwrap_or_default();
        if link.to_string_lossy() != "anon_inode:[vfio-device]" {
            continue;
        }
        let number = entry.file_name().into_string().unwrap().parse().unwrap();
        let device = pidfd_getfd(&process, number, PidfdGetfdFlags::empty()).unwrap();
        opened.insert(number, device);
    }
    opened.into_values().collect()
}

/// The guest arrived with what was in its devices, and sends and reads on.
#[track_caller]
fn assert_talks_at(target: &mut Vm) {
    assert_eq!(states(target), [DeviceState::Running; 2]);
    talk(target);
}

#[test]
fn a_guest_talks_to_its_vfio_devices() {
    let machine = machine();
    let devices = two();
    let mut vm = start_source(&machine, &devices);
    vm.assert_guest_works();
    assert_eq!(states(&vm), [DeviceState::Running; 2]);
    for (command, state, runstate) in [
        ("stop", DeviceState::Stop, "paused"),
        ("cont", DeviceState::Running, "running"),
    ] {
        vm.query(command);
        assert_eq!(vm.runstate(), runstate);
        assert_eq!(states(&vm), [state; 2]);
    }
    talk(&mut vm);
    vm.kill();

    // A device that keeps the last byte and nothing else: the guest would notice.
    let display = [Mdev::mdpy()];
    let mut vm = machine.start_source(with(&display));
    until("the guest reads what it has not sent", || {
        let workload = vm.query("x-query-workload");
        (workload["errors"].as_u64() > Some(0)).then_some(())
    });
    vm.kill();
}

#[test]
fn a_vfio_device_that_is_none_or_in_use_is_refused_at_the_start() {
    let machine = machine();
    let device = [Mdev::mtty()];
    let refused = |spec: &str| {
        let launch = Launch::default().with(&["--accel", "soft", "--mem", "16M", "--vfio", spec]);
        Vm::try_start("source", &launch).err().unwrap()
    };
    let said = refused("/sys/bus/mdev/devices/none");
    assert!(said.contains("no such folder"), "{said}");
    let said = refused("/sys/class/mem/null");
    assert!(said.contains("no iommu_group"), "{said}");
    let path = device[0].sysfs().display().to_string();
    let said = refused(&format!("{path},x-echo"));
    assert!(said.contains("needs KVM"), "{said}");

    let mut vm = machine.start_source(with(&device));
    let said = refused(&path);
    assert!(said.contains("one process can have at a time"), "{said}");
    vm.kill();
}

#[test]
fn a_guest_moves_with_two_mtty_and_moves_on() {
    let machine = machine();
    let devices = [two(), two(), two()];
    let mut source = start_source(&machine, &devices[0]);
    for (connections, devices) in [(1, &devices[1]), (4, &devices[2])] {
        let mut target = start_target(&machine, devices);
        source.set(json!({ "multifd-channels": connections }));
        let info = source.move_to(&mut target);
        assert_eq!(info["vfio"]["transferred"], 2 * STREAM_BYTES, "{info}");
        assert_talks_at(&mut target);
        assert_eq!(states(&source), [DeviceState::Stop; 2]);
        source = target;
    }
}

#[test]
fn a_guest_with_two_mtty_goes_into_a_file_and_comes_back() {
    let machine = machine();
    let devices = [two(), two()];
    let mut source = start_source(&machine, &devices[0]);
    let file = format!("file:{}", source.dir().join("vm").display());
    source.migrate(&file);
    let info = source.wait_migration();
    assert_eq!(info["status"], "completed", "{info}\n{}", source.said());
    let mut target = machine.start_target("defer", with(&devices[1]));
    target.execute("migrate-incoming", json!({ "uri": file }));
    target.wait_runstate("running");
    target.assert_guest_works();
    assert_talks_at(&mut target);
}

#[test]
fn a_guest_without_kvm_moves_with_what_is_queued_in_its_device() {
    let machine = Machine {
        accel: Accel::Soft,
        ..machine()
    };
    let devices = [Mdev::mtty(), Mdev::mtty()];
    let plain = |device: &Mdev| {
        let path = device.sysfs();
        Launch::default().with(&["--vfio", path.to_str().unwrap()])
    };
    let mut source = machine.start_source(plain(&devices[0]));
    source.warm_up();
    let mut target = machine.start_target("tcp:127.0.0.1:0", plain(&devices[1]));
    // Both ports, in region 0 and 1: the driver finds regions by the upper bits of the offset.
    let port = |number: u64| number << 40;
    let device = fs::File::from(opened(&source).remove(0));
    for byte in b"hello" {
        device.write_all_at(&[*byte], port(0)).unwrap();
        device.write_all_at(&[byte + 1], port(1)).unwrap();
    }
    drop(device);
    source.move_to(&mut target);
    let device = fs::File::from(opened(&target).remove(0));
    for byte in b"hello" {
        let mut found = [0; 2];
        let [first, second] = &mut found;
        for (number, at) in (0..).zip([first, second]) {
            device
                .read_exact_at(std::slice::from_mut(at), port(number))
                .unwrap();
        }
        assert_eq!(found, [*byte, byte + 1]);
    }
}

#[test]
fn a_migration_can_be_cancelled_and_its_guest_stopped_and_continued_while_devices_give_their_state()
{
    let machine = machine();
    let devices = [two(), two()];
    let mut source = start_source(&machine, &devices[0]);
    let capability = json!([{ "capability": "pause-before-switchover", "state": true }]);
    source.execute(
        "migrate-set-capabilities",
        json!({ "capabilities": capability }),
    );
    for (status, slow, expected) in [
        ("active", 100 << 10, DeviceState::PreCopy),
        ("pre-switchover", 0, DeviceState::StopCopy),
    ] {
        let mut target = start_target(&machine, &devices[1]);
        source.set(json!({ "max-bandwidth": slow }));
        source.migrate(&target.address());
        source.wait_status(status);
        until("the devices give their state", || {
            (states(&source) == [expected; 2]).then_some(())
        });
        if status == "active" {
            source.query("stop");
            assert_eq!(states(&source), [DeviceState::PreCopyP2p; 2]);
            source.query("cont");
            assert_eq!(states(&source), [DeviceState::PreCopy; 2]);
            talk(&mut source);
            assert_eq!(source.status(), "active");
        }
        source.query("migrate_cancel");
        assert_eq!(source.wait_migration()["status"], "cancelled");
        assert_eq!(states(&source), [DeviceState::Running; 2]);
        talk(&mut source);
        target.wait_exit();
    }
    let mut target = start_target(&machine, &devices[1]);
    source.migrate(&target.address());
    source.wait_status("pre-switchover");
    source.execute("migrate-continue", json!({ "state": "pre-switchover" }));
    let info = source.wait_migration();
    assert_eq!(info["status"], "completed", "{info}\n{}", source.said());
    target.wait_runstate("running");
    assert_talks_at(&mut target);
}

#[test]
fn a_target_with_other_vfio_devices_is_refused_before_anything_happens() {
    let machine = machine();
    let devices = [two(), two()];
    let mut source = start_source(&machine, &devices[0]);
    let named = |device: &Mdev, id: &str| format!("{},id={id}", device.sysfs().display());
    let [first, second] = &devices[1];
    for (specs, part) in [
        (vec![named(first, "0")], "vfio/1"),
        (vec![named(first, "0"), named(second, "tty")], "vfio/1"),
    ] {
        let launch = specs.iter().fold(Launch::default(), |launch, spec| {
            launch.with(&["--vfio", spec])
        });
        let mut target = machine.start_target("tcp:127.0.0.1:0", launch);
        source.assert_migration_fails(&target.address(), part);
        assert_eq!(states(&source), [DeviceState::Running; 2]);
        target.kill();
    }
    talk(&mut source);
}

#[test]
fn a_vfio_device_without_migration_blocks_migrate_with_a_reason() {
    let machine = machine();
    let devices = [Mdev::mtty(), Mdev::mdpy()];
    let plain = |launch: Launch, device: &Mdev, id: &str| {
        let spec = format!("{},id={id}", device.sysfs().display());
        launch.with(&["--vfio", &spec])
    };
    let launch = plain(Launch::default(), &devices[0], "tty");
    let mut vm = machine.start_source(plain(launch, &devices[1], "display"));
    vm.warm_up();
    let info = vm.query("query-migrate");
    let reasons = info["blocked-reasons"].as_array().unwrap();
    assert_eq!(reasons.len(), 1, "{info}");
    let reason = reasons[0].as_str().unwrap();
    assert!(
        reason.contains("vfio/display") && reason.contains("unplug"),
        "{reason}"
    );
    let refusal = vm.refusal("migrate", json!({ "uri": "tcp:127.0.0.1:9" }));
    assert!(refusal.contains(reason), "{refusal}");
    vm.assert_guest_works();
}
