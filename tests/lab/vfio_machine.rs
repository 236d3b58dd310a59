//! VM processes with VFIO devices: the guest talks to mtty while it runs, moves, and stays. What it sends comes back eight passes
//! later, so at any time some of it is in the devices, and a byte that is lost or doubled is an error that the guest reports.

use std::fs;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use rustix::process::{
    Pid, PidfdFlags, PidfdGetfdFlags, Signal, kill_process, pidfd_getfd, pidfd_open,
};
use serde_json::{Value, json};
use vmferry_devices::vfio::{DeviceState, FdFace, VfioFace};
use vmferry_transport::wire::device_data::{DEVICE_DATA, DeviceData};
use vmferry_transport::wire::frame::SourceFrame;
use vmferry_transport::wire::ram::RoundEnd;

use crate::harness::{Accel, Launch, Machine, Vm, until};
use crate::mdev::Mdev;
use crate::modules::load_for;
use crate::proxy::{Passing, Proxy, Verdict};

/// Passes after which all that the guest reads is checked: more than the workload keeps in a device.
const TALKED: u64 = 12;
/// Of the stream of an mtty, what comes in PRE_COPY.
const HEADER_BYTES: u64 = 24;
/// All of it.
const STREAM_BYTES: u64 = 96;

/// Small and slow, as every guest on KVM here. It makes about ten passes per second.
fn machine() -> Machine {
    load_for("/dev/kvm", "kvm_amd");
    Machine {
        mem: "16M",
        working_set: "256K",
        dirty_rate: "640",
        fill: "512K",
        ..Machine::small(Accel::Kvm)
    }
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

/// The states of a VM's devices, asked over its own descriptors.
fn states(vm: &Vm) -> Vec<DeviceState> {
    let pid = Pid::from_raw(vm.pid().try_into().unwrap()).unwrap();
    let process = pidfd_open(pid, PidfdFlags::empty()).unwrap();
    let mut states = Vec::new();
    for entry in fs::read_dir(format!("/proc/{}/fd", vm.pid())).unwrap() {
        let entry = entry.unwrap();
        let link = fs::read_link(entry.path()).unwrap_or_default();
        if link.to_string_lossy() != "anon_inode:[vfio-device]" {
            continue;
        }
        let number = entry.file_name().into_string().unwrap().parse().unwrap();
        let device: OwnedFd = pidfd_getfd(&process, number, PidfdGetfdFlags::empty()).unwrap();
        states.push(FdFace::new(device).state().unwrap());
    }
    states
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

/// What becomes of the stream of `vfio/1` on its way. Checksums are right again afterwards: only the device can notice.
#[derive(Clone, Copy, Debug)]
enum Damage {
    /// It ends after so many bytes.
    Cut(u64),
    /// This byte is another.
    Change(u64),
}

impl Damage {
    /// What passes instead of a piece of the stream.
    fn apply(self, piece: DeviceData, payload: &[u8]) -> Verdict {
        let mut payload = payload.to_vec();
        let end = piece.offset + u64::from(piece.payload_bytes);
        match self {
            Self::Change(at) if (piece.offset..end).contains(&at) => {
                payload[usize::try_from(at - piece.offset).unwrap()] ^= 1;
            }
            Self::Cut(length) if end > length || piece.end => {
                let left = length.saturating_sub(piece.offset);
                payload.truncate(usize::try_from(left).unwrap());
                if payload.is_empty() && !piece.end {
                    return Verdict::Drop;
                }
            }
            _ => return Verdict::Pass,
        }
        let offset = match self {
            Self::Cut(length) => piece.offset.min(length),
            Self::Change(_) => piece.offset,
        };
        let changed = DeviceData {
            offset,
            payload_bytes: payload.len().try_into().unwrap(),
            payload_crc: crc32c::crc32c(&payload),
            ..piece
        };
        let mut bytes = changed.encode();
        bytes.extend_from_slice(&payload);
        Verdict::Replace(bytes)
    }
}

/// A link to `target`, for one data connection, that has every piece of the stream of `vfio/1` judged.
fn link(
    target: &mut Vm,
    mut judge: impl FnMut(DeviceData, &[u8]) -> Verdict + Send + 'static,
) -> Proxy {
    let mut place = None;
    // Bytes that were left out of the round: the source's count of them is made right.
    let mut missing = 0;
    Proxy::new(&target.address(), move |frame| match frame {
        Passing::Source(SourceFrame::Hello(hello)) => {
            let mut devices = hello.devices.iter();
            let at = devices.position(|device| device.name == "vfio/1").unwrap();
            place = Some(u16::try_from(at).unwrap());
            Verdict::Pass
        }
        Passing::Data(frame) if frame.ends_round() => {
            let mut end = RoundEnd::decode(&frame.header, frame.body).unwrap();
            end.counts.device_bytes -= std::mem::take(&mut missing);
            Verdict::Replace(end.encode())
        }
        Passing::Data(frame) if frame.header.kind == DEVICE_DATA => {
            let piece = DeviceData::decode(&frame.header, frame.body).unwrap();
            if Some(piece.device) == place {
                let verdict = judge(piece, frame.payload);
                missing += match &verdict {
                    Verdict::Replace(bytes) => frame.bytes.len() - bytes.len(),
                    Verdict::Drop => frame.payload.len(),
                    _ => 0,
                } as u64;
                verdict
            } else {
                Verdict::Pass
            }
        }
        _ => Verdict::Pass,
    })
}

/// In the log of a source whose migration failed, the devices work again before any vCPU.
#[track_caller]
fn assert_devices_first(said: &str) {
    let lines: Vec<_> = said.lines().collect();
    let last = |part: &str| lines.iter().rposition(|line| line.contains(part));
    let (devices, vcpus) = (last("a migration that failed"), last("vCPUs are let go"));
    assert!(devices.is_some() && devices < vcpus, "{said}");
}

/// The migration failed with a word from or about `vfio/1`, and everything is at the source as it was.
#[track_caller]
fn assert_stayed(source: &mut Vm, info: &Value, part: &str, paused: bool) {
    let error = info["error-desc"].as_str().unwrap_or_default();
    assert_eq!(info["status"], "failed", "{info}\n{}", source.said());
    assert!(error.contains(part), "{error}");
    if paused {
        assert_eq!(source.runstate(), "paused");
        assert_eq!(states(source), [DeviceState::Stop; 2]);
    } else {
        assert_eq!(states(source), [DeviceState::Running; 2]);
        // Unless it failed while the guest ran.
        if source.statuses().contains(&"device".to_owned()) {
            assert_devices_first(&source.said());
        }
        source.assert_guest_works();
        talk(source);
    }
}

fn a_damaged_stream_leaves_the_guest_where_it_is(paused: bool) {
    let machine = machine();
    let devices = [two(), two()];
    let mut source = start_source(&machine, &devices[0]);
    if paused {
        source.query("stop");
    }
    for (damage, part) in [
        (Damage::Cut(0), "RESUMING -> STOP"),
        (Damage::Cut(HEADER_BYTES), "RESUMING -> STOP"),
        (Damage::Cut(STREAM_BYTES - 1), "RESUMING -> STOP"),
        (Damage::Change(0), "vfio/1"),
    ] {
        let mut target = start_target(&machine, &devices[1]);
        let link = link(&mut target, move |piece, payload| {
            damage.apply(piece, payload)
        });
        source.set(json!({ "multifd-channels": 1 }));
        source.migrate(&link.address());
        let info = source.wait_migration();
        assert_stayed(&mut source, &info, part, paused);
        let error = info["error-desc"].as_str().unwrap();
        assert!(error.contains("vfio/1"), "{damage:?}: {error}");
        target.assert_gave_up("vfio/1");
    }
    let mut target = start_target(&machine, &devices[1]);
    if paused {
        source.migrate(&target.address());
        let info = source.wait_migration();
        assert_eq!(info["status"], "completed", "{info}\n{}", source.said());
        assert_eq!(target.runstate(), "paused");
        assert_eq!(states(&target), [DeviceState::Stop; 2]);
        target.query("cont");
        target.assert_guest_works();
    } else {
        source.move_to(&mut target);
    }
    assert_talks_at(&mut target);
}

#[test]
fn a_stream_that_was_damaged_on_the_way_is_refused_by_its_device_and_the_guest_stays() {
    a_damaged_stream_leaves_the_guest_where_it_is(false);
}

#[test]
fn a_stream_that_was_damaged_on_the_way_is_refused_also_if_the_guest_is_paused() {
    a_damaged_stream_leaves_the_guest_where_it_is(true);
}

#[test]
fn a_target_killed_while_the_devices_are_stopped_leaves_them_and_the_guest_at_the_source() {
    let machine = machine();
    let devices = [two(), two()];
    let mut source = start_source(&machine, &devices[0]);
    for before_the_end in [true, false] {
        let mut target = start_target(&machine, &devices[1]);
        let pid = Pid::from_raw(target.pid().try_into().unwrap()).unwrap();
        let stopped = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&stopped);
        let kill = move || {
            kill_process(pid, Signal::KILL).unwrap();
        };
        // The last bytes exist only when the device is in STOP_COPY; READY comes after them.
        let link = link(&mut target, move |piece, _| {
            if piece.offset < HEADER_BYTES {
                return Verdict::Pass;
            }
            if piece.end || before_the_end {
                seen.lock().unwrap().push(piece.offset);
                kill();
            }
            match before_the_end {
                true => Verdict::Drop,
                false => Verdict::Pass,
            }
        });
        source.set(json!({ "multifd-channels": 1 }));
        source.migrate(&link.address());
        let info = source.wait_migration();
        assert!(!stopped.lock().unwrap().is_empty());
        assert_stayed(&mut source, &info, "", false);
        target.kill();
    }
    let mut target = start_target(&machine, &devices[1]);
    source.move_to(&mut target);
    assert_talks_at(&mut target);
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
