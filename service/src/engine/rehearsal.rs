//! The answer of a new program to the question whether it would go on with a VM: everything that an arrival checks, without taking
//! anything.

use std::sync::Arc;

use anyhow::{Context, bail, ensure};
use vmferry_cpr::letter::Letter;
use vmferry_cpr::memfd;
use vmferry_transport::units::PAGE_SIZE;
use vmferry_transport::wire::hello::{BlockInfo, Hello, VersionRange, compare};

use super::inherit::{is_ram, judge};
use super::passthrough;
use crate::config::RunConfig;
use crate::machine::disk::Disks;
use crate::machine::{self, Given, Machine, MachineConfig};

/// See [`super::would_go_on`].
pub(super) fn would_go_on(
    config: &RunConfig,
    letter: &Letter,
    hello: &Hello,
) -> anyhow::Result<()> {
    ensure!(
        VersionRange::OURS.common(hello.versions).is_some(),
        "no common protocol version: it has {}, this program {}",
        hello.versions,
        VersionRange::OURS
    );
    if let Err(reason) = judge(&letter.manifest, &config.machine) {
        bail!(reason);
    }
    let machine = build(config, letter)?;
    let page_bytes = u32::try_from(PAGE_SIZE).unwrap_or(u32::MAX);
    let blocks = machine.ram().blocks().iter().map(|block| BlockInfo {
        name: block.name().to_owned(),
        pages: block.pages(),
        page_bytes,
    });
    let blocks: Vec<_> = blocks.collect();
    let mut hello = hello.clone();
    let absent = in_use(&config.machine);
    hello
        .devices
        .retain(|device| !absent.contains(&device.name));
    let devices = passthrough::schemas(machine.as_ref());
    compare(&hello, &blocks, &devices, config.uuid).map_err(anyhow::Error::msg)
}

/// A machine like the one that would go on, with memory of its own, which nobody touches, and without devices that the VM has to itself.
fn build(config: &RunConfig, letter: &Letter) -> anyhow::Result<Arc<dyn Machine>> {
    let absent = in_use(&config.machine);
    let devices = letter.manifest.entries().iter();
    let devices = devices
        .filter(|entry| config.machine.expects(entry) && !absent.contains(&entry.name))
        .cloned()
        .collect();
    let blocks = letter.manifest.entries().iter();
    let mut blocks: Vec<_> = blocks.filter(|entry| is_ram(entry)).collect();
    blocks.sort_by_key(|entry| &entry.name);
    let ram = blocks
        .into_iter()
        .map(|entry| memfd::create_ram(&entry.name, entry.value))
        .collect::<Result<_, _>>()?;
    let machine = MachineConfig {
        vfio: Vec::new(),
        incoming: true,
        ..config.machine.clone()
    };
    let disks = Disks::open(&config.disks).context("cannot open the disks")?;
    let backends = machine::virtio::backends(&disks);
    let tell = Arc::new(|_| {});
    let given = Some(Given {
        ram,
        devices,
        ..Given::default()
    });
    machine::build(&machine, given, backends, config.accel, tell)
        .context("cannot build the machine")
}

/// Devices that the running VM has to itself, by name.
fn in_use(machine: &MachineConfig) -> Vec<String> {
    let vfio = machine.vfio.iter();
    vfio.map(|device| format!("vfio/{}", device.id)).collect()
}
