//! What the lab promises to everything else here.

use std::fs;

use crate::modules::load_for;

#[test]
fn the_kernel_is_recent() {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split('.').map(|part| part.parse::<u32>().unwrap());
    let version = (numbers.next().unwrap(), numbers.next().unwrap());
    assert!(version >= (6, 12), "{release}");
}

#[test]
fn kvm_vfio_vhost_vdpa_and_tun_have_their_device_nodes() {
    for (device, module) in [
        ("/dev/kvm", "kvm_amd"),
        ("/dev/vfio/vfio", "vfio_iommu_type1"),
        ("/dev/vhost-net", "vhost_net"),
        ("/dev/vhost-vsock", "vhost_vsock"),
        ("/dev/vduse/control", "vduse"),
        ("/dev/net/tun", "tun"),
    ] {
        load_for(device, module);
    }
}
