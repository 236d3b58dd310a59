//! VM processes with VFIO devices: the guest talks to mtty while it runs, moves, and stays.

use crate::harness::{Accel, Launch, Machine, Vm, until};
use crate::mdev::Mdev;
use crate::modules::load_for;

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
fn with(devices: &[&Mdev]) -> Launch {
    devices.iter().fold(Launch::default(), |launch, device| {
        launch.with(&["--vfio", &format!("{},x-echo", device.sysfs().display())])
    })
}

/// Waits until the guest has sent more than mtty ever holds. Then all that it reads is checked.
fn warm_up(vm: &mut Vm) {
    vm.warm_up();
    until("the guest reads what it has sent", || {
        (vm.passes() > 12).then_some(())
    });
}

#[test]
fn a_guest_talks_to_its_vfio_devices() {
    let machine = machine();
    let devices = [Mdev::mtty(), Mdev::mtty()];
    let mut vm = machine.start_source(with(&[&devices[0], &devices[1]]));
    warm_up(&mut vm);
    vm.assert_guest_works();
    vm.kill();

    // A device that keeps the last byte and nothing else: the guest would notice.
    let display = Mdev::mdpy();
    let mut vm = machine.start_source(with(&[&display]));
    until("the guest reads what it has not sent", || {
        let workload = vm.query("x-query-workload");
        (workload["errors"].as_u64() > Some(0)).then_some(())
    });
    vm.kill();
}

#[test]
fn a_vfio_device_that_is_none_or_in_use_is_refused_at_the_start() {
    let machine = machine();
    let device = Mdev::mtty();
    let refused = |spec: &str| {
        let launch = Launch::default().with(&["--accel", "soft", "--mem", "16M", "--vfio", spec]);
        Vm::try_start("source", &launch).err().unwrap()
    };
    let said = refused("/sys/bus/mdev/devices/none");
    assert!(said.contains("no such folder"), "{said}");
    let said = refused("/sys/class/mem/null");
    assert!(said.contains("no iommu_group"), "{said}");
    let said = refused(&format!("{},x-echo", device.sysfs().display()));
    assert!(said.contains("needs KVM"), "{said}");

    let mut vm = machine.start_source(with(&[&device]));
    let said = refused(device.sysfs().to_str().unwrap());
    assert!(said.contains("one process can have at a time"), "{said}");
    warm_up(&mut vm);
    vm.kill();
}
