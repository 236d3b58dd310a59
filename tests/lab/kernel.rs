//! What the lab promises to everything else here: interfaces of the kernel are there and do what cases rely on.

use std::fs;
use std::path::Path;

use crate::command::run;
use crate::mdev::Mdev;
use crate::modules::{load, load_for};
use crate::net::{Hosts, Tap};
use crate::vfio::{self, Opened};

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

#[test]
fn a_sample_vfio_device_migrates_with_pre_copy_and_p2p() {
    let (one, other) = (Mdev::mtty(), Mdev::mtty());
    assert_ne!(one.group(), other.group());
    for mdev in [&one, &other] {
        let device = Opened::new(mdev);
        assert_eq!(
            device.migration_flags().unwrap(),
            vfio::STOP_COPY | vfio::P2P | vfio::PRE_COPY
        );
        assert_eq!(device.state(), vfio::RUNNING);
    }
}

#[test]
fn another_sample_vfio_device_does_not_migrate() {
    let mdev = Mdev::mdpy();
    let refusal = Opened::new(&mdev).migration_flags().unwrap_err();
    assert_eq!(refusal.raw_os_error(), Some(libc::ENOTTY), "{refusal}");
}

#[test]
fn a_vdpa_device_in_software_is_there_for_vhost() {
    load("vhost_vdpa");
    load("vdpa_sim_net");
    run(
        "vdpa",
        &["dev", "add", "name", "sim", "mgmtdev", "vdpasim_net"],
    );
    let node = Path::new("/dev/vhost-vdpa-0");
    assert!(node.exists(), "{}", run("ls", &["/dev"]));
    run("vdpa", &["dev", "del", "sim"]);
    assert!(!node.exists());
}

#[test]
fn a_cable_between_two_hosts_loses_what_it_is_told_to() {
    let hosts = Hosts::new();
    let ping = |wait: &str| {
        let there = hosts.address(1);
        hosts.run_at(0, &format!("ping -c 1 -W {wait} {there}"))
    };
    ping("20").unwrap();
    hosts.disturb(1, "loss 100%");
    ping("1").unwrap_err();
    hosts.disturb(1, "delay 1ms");
    ping("20").unwrap();
    hosts.plug(false);
    ping("1").unwrap_err();
    hosts.plug(true);
    ping("20").unwrap();
}

#[test]
fn a_tap_device_has_an_address() {
    let tap = Tap::new("10.98.0.1/24");
    let shown = run("ip", &["addr", "show", "dev", tap.name()]);
    assert!(shown.contains("10.98.0.1/24"), "{shown}");
}

#[test]
fn tls_of_the_kernel_can_be_loaded() {
    load("tls");
    let protocols = fs::read_to_string("/proc/sys/net/ipv4/tcp_available_ulp").unwrap();
    assert!(protocols.contains("tls"), "{protocols}");
}
