//! `vmferry run`: becomes a VM process.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, ValueEnum};
use vmferry_cpr::letter::Leg;
use vmferry_cpr::memfd::HugePages;
use vmferry_transport::control::{Address, AddressError};
use vmferry_transport::limits::Deadlines;

use super::size::{DirtyRate, Size};
use vmferry_transport::units::Uuid;

use crate::config::{AccelChoice, CprOrigin, Incoming, ObserveConfig, RunConfig};
use crate::machine::disk::{DiskConfig, name_disks};
use crate::machine::linux::LinuxConfig;
use crate::machine::notify::NotifyConfig;
use crate::machine::ram::RamBacking;
use crate::machine::vfio::{VfioConfig, name_vfio};
use crate::machine::virtio::{BlkConfig, NetConfig, OutsideConfig};
use crate::machine::workload::WorkloadConfig;
use crate::machine::{MachineConfig, SerialSink};
use crate::observe::metrics;
use crate::succession::{Inheritance, ask};

/// Working set unless another one is asked for; a quarter of small memories.
const WORKING_SET_DEFAULT: u64 = 64 << 20;

#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  \
    vmferry run --mem 1G --qmp /tmp/source.qmp\n  \
    vmferry run --mem 4G --vcpus 2 --qmp /tmp/a.qmp --fill 2G --dirty-rate max\n  \
    vmferry run --mem 1G --qmp /tmp/target.qmp --incoming tcp:0.0.0.0:4444\n\n\
    The machine runs a small program that keeps writing its working set and\n\
    checks every page it wrote, so that a page lost on the way is noticed. The\n\
    process ends with `quit` over QMP, with SIGTERM, or with Ctrl-C; the first\n\
    time when whoever takes part in a migration knows how it has ended, a second\n\
    time, more than a second later, at once.")]
pub(super) struct RunArgs {
    #[command(flatten)]
    machine: MachineArgs,
    #[command(flatten)]
    memory: MemoryArgs,
    #[command(flatten)]
    guest: GuestArgs,
    #[command(flatten)]
    linux: LinuxArgs,
    /// Where to make the QMP socket (mode 0600)
    #[arg(long, value_name = "PATH")]
    qmp: PathBuf,
    /// Where the guest's serial port goes: stdio, null, or a file to append to
    #[arg(long, value_name = "stdio|null|FILE", default_value = "null", value_parser = parse_serial)]
    serial: SerialSink,
    /// A raw image for the guest, locked while the guest is here; more than once for several. `ro`: read only
    #[arg(long = "disk", value_name = "PATH[,id=NAME][,ro]")]
    disks: Vec<DiskConfig>,
    /// A disk of another process for the guest, by the socket of its vhost-user back end. More than once for several
    #[arg(long = "blk", value_name = "vhost-user:PATH[,id=NAME]")]
    blks: Vec<BlkConfig>,
    /// A network interface for the guest, on a tap that this process may open; the kernel moves its packets where it has vhost-net, or this
    /// process. More than once for several
    #[arg(
        long = "net",
        value_name = "tap=NAME[,vhost=on|off][,mac=MAC][,id=NAME]"
    )]
    nets: Vec<NetConfig>,
    /// A VFIO device of the host for the guest, by its folder in sysfs, such as /sys/bus/mdev/devices/UUID. More than once for several
    #[arg(long, value_name = "PATH[,id=NAME]")]
    vfio: Vec<VfioConfig>,
    /// Let the program overwrite its first disk, over and over, and check what it reads back: all that is there is lost
    #[arg(long)]
    workload_disk: bool,
    /// Let the program send UDP packets back (IPv4) that come to its first network interface
    #[arg(long)]
    workload_net: bool,
    /// Let the program count its passes over memory on the serial port, one character each
    #[arg(long)]
    workload_serial: bool,
    /// Tell a server on this socket how migrations go, in lines of JSON; it may veto. It has 2 seconds for every answer, or SECONDS (1 to
    /// 60): the guest may be stopped meanwhile. More than once for several
    #[arg(long, value_name = "unix:PATH[,id=NAME][,timeout=SECONDS]")]
    notify: Vec<NotifyConfig>,
    /// A stand-in for a passed-through network card, which must be unplugged before a migration
    #[arg(long = "x-failover-primary", value_name = "ID", hide = true)]
    failover_primaries: Vec<String>,
    /// Do not start the guest; `cont` over QMP does
    #[arg(long)]
    paused: bool,
    /// Name of the VM, for people
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// UUID of the VM; with the capability validate-uuid it must be the same at the target
    #[arg(long, value_name = "UUID")]
    uuid: Option<Uuid>,
    /// Start no guest but wait for one: listen at ADDR, or where migrate-incoming will say
    #[arg(long, value_name = "ADDR|defer", value_parser = parse_incoming)]
    incoming: Option<Incoming>,
    /// Take over the guest of a process on this host, in place: its memory comes from PATH, where that process connects, or over the
    /// socket in the place of the standard input (`inherited`). Needs --incoming unix:PATH
    #[arg(long, value_name = "unix:PATH|inherited", requires = "incoming", value_parser = parse_cpr)]
    incoming_cpr: Option<CprOrigin>,
    #[command(flatten)]
    observe: ObserveArgs,
    /// Say whether this program would go on with the VM that the standard input describes, and end
    #[arg(long = "x-cpr-exec-asked", hide = true)]
    asked: bool,
    /// End when the process with this number, which must be the parent, ends
    #[arg(long, value_name = "PID", hide = true)]
    end_with_parent: Option<u32>,
    /// Multiply every deadline of a migration, in percent; the same on both sides. For tests, and for links that need more time
    #[arg(long = "x-deadline-scale", value_name = "PERCENT", default_value_t = 100, hide = true,
          value_parser = clap::value_parser!(u32).range(1..=10_000))]
    deadline_scale: u32,
}

/// What others may see of the migrations.
#[derive(Args, Clone, Debug)]
struct ObserveArgs {
    /// Serve metrics for Prometheus at tcp:127.0.0.1:PORT or unix:PATH (mode 0600)
    #[arg(long, value_name = "ADDR")]
    metrics: Option<Address>,
    /// Let --metrics listen where other hosts can read it
    #[arg(long, requires = "metrics")]
    metrics_public: bool,
    /// Write a record of every migration into DIR, to make reports from
    #[arg(long, value_name = "DIR")]
    record: Option<PathBuf>,
}

/// The machine; shared with `demo`.
#[derive(Args, Clone, Debug)]
pub(super) struct MachineArgs {
    /// RAM, 8M to 256G; it exists only once touched
    #[arg(long, value_name = "SIZE", default_value = "1G")]
    pub(super) mem: Size,
    /// Virtual CPUs, 1 to 64
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(super) vcpus: u32,
    /// What runs the guest: kvm, soft (the same program on host threads), or what works here
    #[arg(long, value_enum, default_value_t = Accel::Auto)]
    pub(super) accel: Accel,
}

/// What RAM is made of.
#[derive(Args, Clone, Debug)]
struct MemoryArgs {
    /// Keep RAM in this file, best on a tmpfs, hugetlbfs or DAX file system: with mode cpr-reboot it stays there while the VM is saved and
    /// loaded
    #[arg(long, value_name = "PATH", value_parser = parse_path)]
    mem_path: Option<PathBuf>,
    /// Huge pages of the host's pool for RAM
    #[arg(long, value_enum, value_name = "SIZE", conflicts_with = "mem_path")]
    huge_pages: Option<PageSize>,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum PageSize {
    #[value(name = "2M")]
    TwoMiB,
    #[value(name = "1G")]
    OneGiB,
}

impl MemoryArgs {
    fn backing(self) -> RamBacking {
        match (self.mem_path, self.huge_pages) {
            (Some(path), _) => RamBacking::File(path),
            (None, Some(PageSize::TwoMiB)) => RamBacking::Huge(HugePages::Size2M),
            (None, Some(PageSize::OneGiB)) => RamBacking::Huge(HugePages::Size1G),
            (None, None) => RamBacking::Memfd,
        }
    }
}

/// What the guest does.
#[derive(Args, Clone, Debug)]
pub(super) struct GuestArgs {
    /// Memory that the guest keeps writing [default: 64M, at most a quarter of RAM]
    #[arg(long, value_name = "SIZE")]
    working_set: Option<Size>,
    /// Pages that the guest writes per second, or as fast as it can
    #[arg(long, value_name = "PAGES_PER_SEC|max", default_value = "1000")]
    dirty_rate: DirtyRate,
    /// Memory that the guest fills once, at start, with incompressible data
    #[arg(long, value_name = "SIZE", default_value = "0")]
    fill: Size,
}

/// A Linux guest instead of the program.
#[derive(Args, Clone, Debug)]
struct LinuxArgs {
    /// Run a Linux kernel (bzImage or vmlinux) instead of the program; a target is given it too. Needs KVM with hardware for it
    #[arg(long, value_name = "FILE", conflicts_with_all = ["workload_disk", "workload_net", "workload_serial"])]
    kernel: Option<PathBuf>,
    /// Initial RAM disk of the kernel
    #[arg(long, value_name = "FILE", requires = "kernel")]
    initrd: Option<PathBuf>,
    /// Command line of the kernel
    #[arg(
        long,
        value_name = "TEXT",
        requires = "kernel",
        default_value = "console=ttyS0",
        allow_hyphen_values = true
    )]
    cmdline: String,
}

impl LinuxArgs {
    fn config(self) -> Option<LinuxConfig> {
        let Self {
            kernel,
            initrd,
            cmdline,
        } = self;
        kernel.map(|kernel| LinuxConfig {
            kernel,
            initrd,
            cmdline,
        })
    }
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(super) enum Accel {
    Auto,
    Kvm,
    Soft,
}

impl Accel {
    /// As written on the command line.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Kvm => "kvm",
            Self::Soft => "soft",
        }
    }
}

impl ObserveArgs {
    fn config(self) -> anyhow::Result<ObserveConfig> {
        if let Some(address) = &self.metrics {
            metrics::check_address(address, self.metrics_public)?;
        }
        Ok(ObserveConfig {
            metrics: self.metrics,
            records: self.record,
        })
    }
}

impl GuestArgs {
    pub(super) fn workload(&self, mem: Size) -> WorkloadConfig {
        let working_set = self.working_set.unwrap_or_else(|| working_set_default(mem));
        WorkloadConfig {
            working_set_bytes: working_set.0,
            dirty_pages_per_sec: self.dirty_rate.0,
            fill_bytes: self.fill.0,
        }
    }
}

/// [`WORKING_SET_DEFAULT`] or a quarter of RAM, whole pages.
pub(super) fn working_set_default(mem: Size) -> Size {
    Size((mem.0 / 4).min(WORKING_SET_DEFAULT) & !4095)
}

impl RunArgs {
    /// Becomes a VM process: a new VM, one that arrives, or that of the program that this process was before.
    pub(super) fn execute(self, inheritance: Option<Inheritance>) -> anyhow::Result<ExitCode> {
        if self.asked {
            let config = self.config_after_exec(Leg::Asked)?;
            ask::answer(|letter, hello| crate::engine::would_go_on(&config, letter, hello))?;
            return Ok(ExitCode::SUCCESS);
        }
        let parent = self.end_with_parent;
        let tie = || parent.map_or(Ok(()), end_with_parent);
        let Some(inheritance) = inheritance else {
            tie()?;
            return crate::engine::run(self.config()?);
        };
        let leg = inheritance.letter.leg;
        tie()?;
        crate::engine::run_after_exec(self.config_after_exec(leg)?, inheritance)
    }

    /// For a guest that is here already: that the program before has left, or would leave.
    fn config_after_exec(mut self, leg: Leg) -> anyhow::Result<RunConfig> {
        if leg == Leg::Back {
            // The command line of this program's first start. How its guest came then is over, and how it stood is in the archive.
            (self.incoming, self.incoming_cpr, self.paused) = (None, None, false);
        }
        anyhow::ensure!(
            self.incoming.is_none() && self.incoming_cpr.is_none(),
            "the guest is here: the command has --incoming"
        );
        let mut config = self.config()?;
        config.incoming = Some(Incoming::Exec);
        config.machine.incoming = true;
        Ok(config)
    }

    fn config(mut self) -> anyhow::Result<RunConfig> {
        name_disks(&mut self.disks)?;
        name_vfio(&mut self.vfio)?;
        let mut outside = OutsideConfig {
            blks: self.blks,
            nets: self.nets,
        };
        outside.name()?;
        let machine = MachineConfig {
            mem_bytes: self.machine.mem.0,
            backing: self.memory.backing(),
            vcpus: self.machine.vcpus,
            workload: self.guest.workload(self.machine.mem),
            serial: self.serial,
            vfio: self.vfio,
            linux: self.linux.config(),
            workload_disk: self.workload_disk,
            workload_net: self.workload_net,
            workload_serial: self.workload_serial,
            outside,
            incoming: self.incoming.is_some(),
        };
        let accel = match self.machine.accel {
            Accel::Auto => AccelChoice::Auto,
            Accel::Kvm => AccelChoice::Kvm,
            Accel::Soft => AccelChoice::Soft,
        };
        let config = RunConfig {
            name: self.name,
            uuid: self.uuid,
            accel,
            machine,
            disks: self.disks,
            notify: self.notify,
            failover_primaries: self.failover_primaries,
            qmp: self.qmp,
            paused: self.paused,
            incoming: self.incoming,
            incoming_cpr: self.incoming_cpr,
            deadlines: Deadlines::scaled(self.deadline_scale),
            observe: self.observe.config()?,
        };
        config.check().context("the machine cannot be built so")?;
        Ok(config)
    }
}

/// Asks the kernel to kill this process when its parent ends, so that `demo` leaves nothing behind however it ends.
fn end_with_parent(parent: u32) -> anyhow::Result<()> {
    use rustix::process::{Signal, getppid, set_parent_process_death_signal};

    set_parent_process_death_signal(Some(Signal::KILL))
        .context("cannot tie this process to its parent")?;
    // The parent may have ended before the request.
    let still = getppid().is_some_and(|pid| pid.as_raw_nonzero().get().unsigned_abs() == parent);
    anyhow::ensure!(
        still,
        "process {parent} is not the parent of this one any more"
    );
    Ok(())
}

fn parse_serial(text: &str) -> Result<SerialSink, String> {
    match text {
        "" => Err("name a file, or write stdio or null".to_owned()),
        "null" => Ok(SerialSink::Null),
        "stdio" => Ok(SerialSink::Stdio),
        file => Ok(SerialSink::File(file.into())),
    }
}

fn parse_path(text: &str) -> Result<PathBuf, String> {
    match Path::new(text).file_name() {
        Some(_) => Ok(text.into()),
        None => Err("name a file".to_owned()),
    }
}

fn parse_cpr(text: &str) -> Result<CprOrigin, String> {
    match text.parse() {
        _ if text == "inherited" => Ok(CprOrigin::Inherited),
        Ok(Address::Unix { path }) => Ok(CprOrigin::Listen(path)),
        _ => Err("write unix:PATH or inherited".to_owned()),
    }
}

fn parse_incoming(text: &str) -> Result<Incoming, String> {
    if text == "defer" {
        return Ok(Incoming::Defer);
    }
    let address: Address = text.parse().map_err(|error: AddressError| error.reason)?;
    Ok(Incoming::Listen(address))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        run: RunArgs,
    }

    fn config(text: &str) -> anyhow::Result<RunConfig> {
        let words = ["run"].into_iter().chain(text.split_whitespace());
        Line::try_parse_from(words)?.run.config()
    }

    #[test]
    fn little_needs_to_be_said() {
        let config = config("--mem 1G --qmp /tmp/q").unwrap();
        assert_eq!(config.machine.mem_bytes, 1 << 30);
        assert_eq!(config.machine.vcpus, 1);
        assert_eq!(config.machine.workload.working_set_bytes, 64 << 20);
        assert_eq!(config.machine.workload.dirty_pages_per_sec, Some(1000));
        assert_eq!(config.machine.workload.fill_bytes, 0);
        assert_eq!(config.accel, AccelChoice::Auto);
        assert_eq!(config.incoming, None);
        assert!(!config.machine.incoming && !config.paused);
        assert_eq!(config.machine.backing, RamBacking::Memfd);
    }

    #[test]
    fn huge_pages_are_of_a_size_that_the_processor_has() {
        let config = config("--mem 1G --qmp q --huge-pages 1G").unwrap();
        let huge = RamBacking::Huge(HugePages::Size1G);
        assert_eq!(config.machine.backing, huge);
    }

    #[test]
    fn everything_can_be_said() {
        let config = config(
            "--mem 2G --vcpus 2 --qmp q --accel soft --working-set 1M --dirty-rate max --fill 8M \
             --serial /tmp/s --paused --name a --incoming unix:/tmp/i --disk a.raw --disk b.raw,id=b,ro \
             --notify unix:/tmp/d,id=display --x-failover-primary net0 \
             --vfio /sys/bus/mdev/devices/a,id=tty --vfio /b \
             --mem-path /tmp/ram --blk vhost-user:/tmp/b --net tap=t0,vhost=on,id=lan \
             --record /tmp/r --metrics tcp:0.0.0.0:9000 --metrics-public",
        )
        .unwrap();
        assert_eq!(config.machine.backing, RamBacking::File("/tmp/ram".into()));
        assert_eq!(config.notify[0].id, "display");
        let outside = &config.machine.outside;
        assert_eq!((&*outside.blks[0].id, &*outside.nets[0].id), ("0", "lan"));
        assert_eq!(config.failover_primaries, ["net0"]);
        let vfio: Vec<_> = config
            .machine
            .vfio
            .iter()
            .map(VfioConfig::device_name)
            .collect();
        assert_eq!(vfio, ["vfio/tty", "vfio/1"]);
        let disks: Vec<_> = config
            .disks
            .iter()
            .map(|disk| (disk.id.as_str(), disk.read_only))
            .collect();
        assert_eq!(disks, [("disk0", false), ("b", true)]);
        assert_eq!(config.observe.records, Some("/tmp/r".into()));
        assert_eq!(
            config.observe.metrics,
            Some("tcp:0.0.0.0:9000".parse().unwrap())
        );
        assert_eq!(config.machine.workload.dirty_pages_per_sec, None);
        assert_eq!(config.machine.serial, SerialSink::File("/tmp/s".into()));
        assert_eq!(
            config.incoming,
            Some(Incoming::Listen("unix:/tmp/i".parse().unwrap()))
        );
        assert!(config.machine.incoming && config.paused);
    }

    #[test]
    fn the_default_working_set_fits_small_memories() {
        for mem in ["8M", "16M", "100M"] {
            assert!(config(&format!("--mem {mem} --qmp q")).is_ok(), "{mem}");
        }
    }

    #[test]
    fn a_guest_that_comes_in_place_comes_by_a_socket_that_is_named_at_once() {
        let with = |incoming: &str| {
            config(&format!(
                "--mem 1G --qmp q --incoming-cpr unix:a {incoming}"
            ))
        };
        assert!(with("--incoming unix:b").is_ok());
        for incoming in [
            "",
            "--incoming defer",
            "--incoming tcp:h:1",
            "--incoming file:b",
        ] {
            let error = format!("{:#}", with(incoming).unwrap_err());
            assert!(error.contains("--incoming"), "{incoming}: {error}");
        }
    }

    #[test]
    fn what_cannot_be_built_is_refused_with_the_value() {
        for (text, part) in [
            ("--mem 1G", "--qmp"),
            ("--mem 4M --qmp q", "must be from 8M"),
            ("--mem 300G --qmp q", "to 256G"),
            ("--mem 8388609 --qmp q", "multiple of 4096"),
            ("--mem 1.5G --qmp q", "like 512M"),
            ("--mem 1G --qmp q --vcpus 65", "1 to 64"),
            ("--mem 64M --qmp q --working-set 64M", "room for"),
            ("--mem 1G --qmp q --incoming here", "tcp:HOST:PORT"),
            ("--mem 1G --qmp q --dirty-rate 0", "at least 1"),
            ("--mem 1G --qmp q --mem-path /", "name a file"),
            ("--mem 1G --qmp q --huge-pages 4K", "2M, 1G"),
            (
                "--mem 1G --qmp q --huge-pages 2M --mem-path a",
                "cannot be used with",
            ),
            ("--mem 1G --qmp q --notify tcp:h:1", "unix:PATH"),
            (
                "--mem 1G --qmp q --x-failover-primary a=b",
                "not usable as an id",
            ),
            ("--mem 1G --qmp q --disk a,rw", "id=NAME or ro"),
            ("--mem 1G --qmp q --vfio a,ro", "only id=NAME"),
            ("--mem 1G --qmp q --blk a.raw", "vhost-user:PATH"),
            (
                "--mem 1G --qmp q --net tap=a,vhost=1",
                "vhost=off this process",
            ),
            ("--mem 1G --qmp q --vfio a --vfio a,id=b", "there twice"),
            ("--mem 1G --qmp q --disk a,id=x --disk b,id=x", "two disks"),
            (
                "--mem 1G --qmp q --metrics tcp:0.0.0.0:1",
                "--metrics-public",
            ),
            ("--mem 1G --qmp q --metrics tcp:[::]:1", "--metrics-public"),
            (
                "--mem 1G --qmp q --metrics tcp:a.example:1",
                "--metrics-public",
            ),
            ("--mem 1G --qmp q --metrics vsock:1:2", "unix:PATH"),
            ("--mem 1G --qmp q --metrics-public", "--metrics"),
        ] {
            let error = format!("{:#}", config(text).unwrap_err());
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
