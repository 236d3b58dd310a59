//! The answer of a new program to the question whether it would go on with a VM: everything that an arrival checks, without taking
//! anything.

use std::sync::Arc;

use anyhow::{Context, bail, ensure};
use vmferry_cpr::letter::Letter;
use vmferry_cpr::manifest::FdEntry;
use vmferry_cpr::memfd;
use vmferry_transport::wire::hello::{Hello, VersionRange, compare};

use super::inherit::judge;
use super::{block_infos, passthrough};
use crate::config::RunConfig;
use crate::machine::disk::Disks;
use crate::machine::vfio::VfioConfig;
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
    let (blocks, devices) = match judge(&letter.manifest, &config.machine) {
        Ok(judged) => judged,
        Err(reason) => bail!(reason),
    };
    let machine = build(config, &blocks, devices)?;
    let blocks = block_infos(machine.as_ref());
    let mut hello = hello.clone();
    let absent = in_use(&config.machine);
    hello
        .devices
        .retain(|device| !absent.contains(&device.name));
    let devices = passthrough::schemas(machine.as_ref());
    compare(&hello, &blocks, &devices, config.uuid).map_err(anyhow::Error::msg)
}

/// A machine like the one that would go on, with memory of its own, which nobody touches, and without devices that the VM has to itself.
fn build(
    config: &RunConfig,
    blocks: &[FdEntry],
    devices: Vec<FdEntry>,
) -> anyhow::Result<Arc<dyn Machine>> {
    let ram = blocks
        .iter()
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
    machine.vfio.iter().map(VfioConfig::device_name).collect()
}

#[cfg(test)]
pub(super) mod tests {
    use vmferry_cpr::letter::Leg;
    use vmferry_cpr::manifest::{FdKind, FileId, Manifest};
    use vmferry_transport::limits::Deadlines;
    use vmferry_transport::units::MigrationId;

    use super::*;
    use crate::machine::heirloom::stage;
    use crate::machine::workload::WorkloadConfig;
    use crate::machine::{AccelChoice, SerialSink};
    use crate::observe::ObserveConfig;

    const MEM_BYTES: u64 = 16 << 20;

    /// A small VM on host threads that waits for its guest.
    pub(in crate::engine) fn config(vfio: &[&str]) -> RunConfig {
        let vfio = vfio.iter().map(|text| text.parse().unwrap());
        let machine = MachineConfig {
            mem_bytes: MEM_BYTES,
            backing: machine::ram::RamBacking::default(),
            vcpus: 1,
            workload: WorkloadConfig {
                working_set_bytes: 2 << 20,
                dirty_pages_per_sec: None,
                fill_bytes: 0,
            },
            serial: SerialSink::Null,
            vfio: vfio.collect(),
            linux: None,
            workload_disk: false,
            workload_net: false,
            workload_serial: false,
            outside: machine::virtio::OutsideConfig::default(),
            incoming: true,
        };
        RunConfig {
            name: None,
            uuid: None,
            accel: AccelChoice::Soft,
            machine,
            disks: Vec::new(),
            notify: Vec::new(),
            failover_primaries: Vec::new(),
            qmp: "/nowhere".into(),
            paused: false,
            incoming: None,
            incoming_cpr: None,
            deadlines: Deadlines::default(),
            observe: ObserveConfig::default(),
        }
    }

    fn letter(vfio: &[(&str, &str, FdKind)]) -> Letter {
        let entry = |(name, role, kind): &(&str, &str, FdKind)| FdEntry {
            name: (*name).to_owned(),
            role: (*role).to_owned(),
            kind: *kind,
            stage: stage(*kind),
            value: 0,
            file: FileId::default(),
        };
        let mut entries: Vec<_> = vfio.iter().map(entry).collect();
        entries.push(FdEntry {
            stage: vmferry_cpr::manifest::Stage::Prepare,
            value: MEM_BYTES,
            ..entry(&("ram0", "ram", FdKind::RamMemfd))
        });
        Letter {
            leg: Leg::Asked,
            pid: 1,
            id: MigrationId([1; 16]),
            software: "tests".to_owned(),
            manifest: Manifest::new(entries).unwrap(),
            numbers: Vec::new(),
            words: Vec::new(),
            reason: String::new(),
            account: Vec::new(),
        }
    }

    /// Of a VM without streams of VFIO devices.
    fn hello() -> Hello {
        let (blocks, devices) = judge(&letter(&[]).manifest, &config(&[]).machine).unwrap();
        let machine = build(&config(&[]), &blocks, devices).unwrap();
        Hello {
            versions: VersionRange::OURS,
            migration_id: MigrationId([1; 16]),
            data_connections: 0,
            checksum: false,
            verify: false,
            software: "tests".to_owned(),
            blocks: block_infos(machine.as_ref()),
            devices: passthrough::schemas(machine.as_ref()),
            uuid: None,
            switchover_ack: false,
        }
    }

    #[test]
    fn a_program_that_was_started_for_other_vfio_devices_says_so_before_the_guest_is_stopped() {
        let hello = hello();
        let own = [
            ("vfio", "container", FdKind::VfioContainer),
            ("vfio/net", "group", FdKind::VfioGroup),
            ("vfio/net", "device", FdKind::VfioDevice),
        ];
        let one = config(&["/a,id=net"]);
        would_go_on(&config(&[]), &letter(&[]), &hello).unwrap();
        would_go_on(&one, &letter(&own), &hello).unwrap();
        let refusal = |config: &RunConfig, entries: &[_]| {
            let answer = would_go_on(config, &letter(entries), &hello);
            answer.unwrap_err().to_string()
        };
        let two = config(&["/a,id=net", "/b,id=gpu"]);
        for (config, entries, part) in [
            (&one, &own[..0], "vfio/net"),
            (&two, &own[..], "vfio/gpu"),
            (&one, &own[1..], "container"),
            (&one, &own[..2], "vfio/net"),
            (&config(&[]), &own[..], "not known here"),
        ] {
            let said = refusal(config, entries);
            assert!(said.contains(part), "{said}");
        }
    }
}
