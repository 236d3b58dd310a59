//! How fast guest RAM moves to another process: vmferry's data path beside a raw copy over the same kind of sockets.
//!
//! Starts itself a second time as the target. Both sides keep their RAM (a memfd of incompressible bytes) for the whole run; the
//! modes take turns, so that whatever disturbs the machine disturbs all of them. Times run from the first byte offered to the
//! target's word that everything is in place. Reports medians, as a table on standard error and as JSON on standard output.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::{Parser, ValueEnum};
use rustix::fs::{FallocateFlags, MemfdFlags};
use rustix::time::ClockId;
use serde_json::{Value, json};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestRegionMmap, MemoryRegionAddress};
use vmferry_benches::raw_copy::{self, Way};
use vmferry_transport::data::{
    Backend, BandwidthLimit, DataReceiver, DataSender, ReceiverConfig, ReceiverEvent, RoundWork,
    SenderConfig, SenderEvent, ZeroCopy,
};
use vmferry_transport::memory::extents::Extents;
use vmferry_transport::memory::hash::ram_hash;
use vmferry_transport::memory::{GuestRam, RamBlock};
use vmferry_transport::units::RoundId;

/// Moves RAM to a second process, by vmferry's data path and by a raw copy, and compares.
#[derive(Clone, Debug, Parser)]
struct Options {
    /// Size of the RAM in MiB.
    #[arg(long, default_value_t = 2048)]
    mib: u64,
    /// Numbers of connections.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 2, 4])]
    connections: Vec<usize>,
    /// Kinds of sockets.
    #[arg(long, value_delimiter = ',', value_enum, default_values_t = [Transport::Tcp, Transport::Unix])]
    transport: Vec<Transport>,
    /// What is compared.
    #[arg(long, value_delimiter = ',', value_enum, default_values_t = [Mode::Raw, Mode::Uring, Mode::Plain])]
    mode: Vec<Mode>,
    /// State of the target's memory.
    #[arg(long, value_delimiter = ',', value_enum, default_values_t = [TargetMemory::Populated])]
    target: Vec<TargetMemory>,
    /// Repetitions of each case.
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// A small run that proves that everything works and measures nothing.
    #[arg(long)]
    smoke: bool,
    /// Be the second process; for the program itself.
    #[arg(long, hide = true)]
    as_target: bool,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum Transport {
    Tcp,
    Unix,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum Mode {
    /// `send` 512 KiB here, `recv` there.
    Raw,
    /// The data path on io_uring.
    Uring,
    /// The data path on plain system calls.
    Plain,
    /// The data path on io_uring with checksums over page data.
    Checksum,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum TargetMemory {
    /// Exists and is mapped.
    Populated,
    /// A hole.
    Fresh,
}

fn main() -> Result<()> {
    let mut options = Options::parse();
    if options.as_target {
        return target(&options);
    }
    if options.smoke {
        options.mib = 32;
        options.runs = 1;
        options.connections = vec![1, 3];
        options.target = vec![TargetMemory::Populated, TargetMemory::Fresh];
        options.mode = Mode::value_variants().to_vec();
    }
    let report = source(&options)?;
    println!("{}", serde_json::to_string_pretty(&report)?);
    Ok(())
}

/// RAM of both sides.
struct Ram {
    region: Arc<GuestRegionMmap>,
    ram: GuestRam,
    file: File,
}

impl Ram {
    fn new(mib: u64) -> Result<Self> {
        let file = File::from(rustix::fs::memfd_create("ram", MemfdFlags::CLOEXEC)?);
        file.set_len(mib << 20)?;
        let offset = FileOffset::new(file.try_clone()?, 0);
        let len = usize::try_from(mib << 20)?;
        let region = Arc::new(GuestRegionMmap::from_range(
            GuestAddress(0),
            len,
            Some(offset),
        )?);
        let block = RamBlock::new("ram", Arc::clone(&region) as _)?;
        Ok(Self {
            region,
            ram: GuestRam::new(vec![block]),
            file,
        })
    }

    fn fill(&self, seed: u64) -> Result<()> {
        let mut state = seed | 1 << 63;
        let mut chunk = vec![0_u8; 1 << 20];
        let len = self.file.metadata()?.len();
        for offset in (0..len).step_by(chunk.len()) {
            for word in chunk.as_chunks_mut::<8>().0 {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                *word = state.to_le_bytes();
            }
            self.region
                .write_slice(&chunk, MemoryRegionAddress(offset))?;
        }
        Ok(())
    }

    fn empty(&self) -> Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&self.file, flags, 0, self.file.metadata()?.len())?;
        Ok(())
    }
}

fn cpu_seconds() -> f64 {
    let time = rustix::time::clock_gettime(ClockId::ProcessCPUTime);
    Duration::try_from(time).unwrap_or_default().as_secs_f64()
}

fn backend(mode: Mode) -> Backend {
    match mode {
        Mode::Plain => Backend::Plain,
        Mode::Raw | Mode::Uring | Mode::Checksum => Backend::Uring,
    }
}

/// One measurement, in seconds.
#[derive(Clone, Copy, Debug)]
struct Sample {
    wall: f64,
    source_cpu: f64,
    target_cpu: f64,
}

/// A case and its samples.
struct Case {
    transport: Transport,
    connections: usize,
    target: TargetMemory,
    mode: Mode,
    samples: Vec<Sample>,
}

fn source(options: &Options) -> Result<Value> {
    let ram = Ram::new(options.mib)?;
    ram.fill(1)?;
    let hash = ram_hash(&ram.ram)?.hash;
    let mut peer = Peer::spawn(options)?;
    let mut cases = Vec::new();
    for &transport in &options.transport {
        for &connections in &options.connections {
            for &target in &options.target {
                let group = cases.len();
                cases.extend(options.mode.iter().map(|&mode| Case {
                    transport,
                    connections,
                    target,
                    mode,
                    samples: Vec::new(),
                }));
                for _ in 0..options.runs {
                    for case in &mut cases[group..] {
                        let sample = peer.measure(case, &ram)?;
                        case.samples.push(sample);
                    }
                }
                let raw = options.mode.iter().position(|&mode| mode == Mode::Raw);
                let raw = raw.map(|at| median(&cases[group + at].samples, |sample| sample.wall));
                for case in &cases[group..] {
                    case.print(options, raw);
                }
            }
        }
    }
    ensure!(
        peer.hash()? == hash,
        "the target's RAM differs from the source's"
    );
    peer.quit()?;
    let cases: Vec<_> = cases.iter().map(|case| case.report(options)).collect();
    Ok(json!({
        "benchmark": "link",
        "mib": options.mib,
        "runs": options.runs,
        "hash": format!("{hash:032x}"),
        "cases": cases,
    }))
}

/// The least disturbed value: on a shared machine it says more about the code than the median does.
fn best(samples: &[Sample], field: impl Fn(&Sample) -> f64) -> f64 {
    samples.iter().map(field).fold(f64::INFINITY, f64::min)
}

fn median(samples: &[Sample], field: impl Fn(&Sample) -> f64) -> f64 {
    let mut values: Vec<f64> = samples.iter().map(field).collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

impl Case {
    fn print(&self, options: &Options, raw_wall: Option<f64>) {
        let gib = options.mib as f64 / 1024.0;
        let wall = median(&self.samples, |sample| sample.wall);
        eprintln!(
            "{:4} x{:<2} {:9} {:8} {:6.3} GiB/s ({:5.2} of raw), best {:6.3}  CPU s/GiB {:.3} + {:.3}, best {:.3} + {:.3}",
            format!("{:?}", self.transport).to_lowercase(),
            self.connections,
            format!("{:?}", self.target).to_lowercase(),
            format!("{:?}", self.mode).to_lowercase(),
            gib / wall,
            raw_wall.map_or(f64::NAN, |raw| raw / wall),
            gib / best(&self.samples, |sample| sample.wall),
            median(&self.samples, |sample| sample.source_cpu) / gib,
            median(&self.samples, |sample| sample.target_cpu) / gib,
            best(&self.samples, |sample| sample.source_cpu) / gib,
            best(&self.samples, |sample| sample.target_cpu) / gib,
        );
    }

    fn report(&self, options: &Options) -> Value {
        let gib = options.mib as f64 / 1024.0;
        let wall = median(&self.samples, |sample| sample.wall);
        json!({
            "transport": format!("{:?}", self.transport).to_lowercase(),
            "connections": self.connections,
            "target_memory": format!("{:?}", self.target).to_lowercase(),
            "mode": format!("{:?}", self.mode).to_lowercase(),
            "wall_s": wall,
            "wall_s_all": self.samples.iter().map(|sample| sample.wall).collect::<Vec<_>>(),
            "gib_per_s": gib / wall,
            "wall_s_best": best(&self.samples, |sample| sample.wall),
            "source_cpu_s": median(&self.samples, |sample| sample.source_cpu),
            "target_cpu_s": median(&self.samples, |sample| sample.target_cpu),
            "source_cpu_s_best": best(&self.samples, |sample| sample.source_cpu),
            "target_cpu_s_best": best(&self.samples, |sample| sample.target_cpu),
        })
    }
}

/// The second process, spoken to in lines.
struct Peer {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Peer {
    fn spawn(options: &Options) -> Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["--as-target", "--mib", &options.mib.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let input = child.stdin.take().context("piped")?;
        let output = BufReader::new(child.stdout.take().context("piped")?);
        Ok(Self {
            child,
            input,
            output,
        })
    }

    fn say(&mut self, line: &str) -> Result<()> {
        Ok(writeln!(self.input, "{line}")?)
    }

    fn hear(&mut self) -> Result<String> {
        let mut line = String::new();
        ensure!(self.output.read_line(&mut line)? > 0, "the target ended");
        Ok(line.trim().to_owned())
    }

    fn measure(&mut self, case: &Case, ram: &Ram) -> Result<Sample> {
        let mode = case.mode.to_possible_value().context("a mode has a name")?;
        self.say(&format!(
            "run {} {:?} {} {:?}",
            mode.get_name(),
            case.transport,
            case.connections,
            case.target
        ))?;
        let address = self.hear()?;
        let sockets = (0..case.connections)
            .map(|_| connect(case.transport, &address))
            .collect::<Result<Vec<_>>>()?;
        ensure!(self.hear()? == "ready");
        let (cpu, began) = (cpu_seconds(), Instant::now());
        match case.mode {
            Mode::Raw => raw_copy::copy(&ram.region, &sockets, Way::Send)?,
            mode => send(sockets, &ram.ram, mode)?,
        }
        let target_cpu = self.hear()?.parse()?;
        Ok(Sample {
            wall: began.elapsed().as_secs_f64(),
            source_cpu: cpu_seconds() - cpu,
            target_cpu,
        })
    }

    fn hash(&mut self) -> Result<u128> {
        self.say("hash")?;
        Ok(self.hear()?.parse()?)
    }

    fn quit(mut self) -> Result<()> {
        self.say("quit")?;
        ensure!(self.child.wait()?.success(), "the target failed");
        Ok(())
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // After an error the other process must not stay behind; after `quit` both calls find nothing to do.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn connect(transport: Transport, address: &str) -> Result<OwnedFd> {
    Ok(match transport {
        Transport::Tcp => TcpStream::connect(address)?.into(),
        Transport::Unix => UnixStream::connect(address)?.into(),
    })
}

fn send(sockets: Vec<OwnedFd>, ram: &GuestRam, mode: Mode) -> Result<()> {
    let config = SenderConfig {
        backend: backend(mode),
        checksum: mode == Mode::Checksum,
        bandwidth: Arc::new(BandwidthLimit::new(0)),
        zero_copy: ZeroCopy::Auto,
    };
    let (events, queue) = mpsc::channel();
    let events = Arc::new(move |event| drop(events.send(event)));
    let sender = DataSender::start(sockets, ram.clone(), config, events)?;
    sender.send_round(RoundId(0), RoundWork::all(Extents::of(ram)?), true);
    match queue.recv()? {
        SenderEvent::RoundSent { .. } => {}
        SenderEvent::Failed { error, .. } => return Err(error.into()),
        other => bail!("unexpected {other:?}"),
    }
    sender.join();
    Ok(())
}

/// The second process: obeys the lines of the first.
fn target(options: &Options) -> Result<()> {
    let ram = Ram::new(options.mib)?;
    let mut populated = false;
    for line in std::io::stdin().lines() {
        let line = line?;
        let words: Vec<_> = line.split(' ').collect();
        match words[..] {
            ["run", mode, transport, connections, memory] => {
                let value = |error: String| anyhow::Error::msg(error);
                let mode = Mode::from_str(mode, true).map_err(value)?;
                let transport = Transport::from_str(transport, true).map_err(value)?;
                match TargetMemory::from_str(memory, true).map_err(value)? {
                    TargetMemory::Populated if !populated => ram.fill(2)?,
                    TargetMemory::Populated => {}
                    TargetMemory::Fresh => ram.empty()?,
                }
                // Whatever is received, afterwards it exists, but perhaps not in this process's page tables.
                populated = memory.eq_ignore_ascii_case("populated");
                let sockets = listen(transport, connections.parse()?)?;
                println!("ready");
                let cpu = cpu_seconds();
                match mode {
                    Mode::Raw => raw_copy::copy(&ram.region, &sockets, Way::Receive)?,
                    mode => receive(sockets, &ram.ram, mode)?,
                }
                println!("{}", cpu_seconds() - cpu);
            }
            ["hash"] => println!("{}", ram_hash(&ram.ram)?.hash),
            ["quit"] => return Ok(()),
            _ => bail!("unknown line {line:?}"),
        }
    }
    Ok(())
}

/// Says an address, then takes connections on it.
fn listen(transport: Transport, connections: usize) -> Result<Vec<OwnedFd>> {
    match transport {
        Transport::Tcp => {
            let listener = TcpListener::bind("127.0.0.1:0")?;
            println!("{}", listener.local_addr()?);
            let accept = |_| Ok(listener.accept()?.0.into());
            (0..connections).map(accept).collect()
        }
        Transport::Unix => {
            let path = std::env::temp_dir().join(format!("link-{}", std::process::id()));
            let listener = UnixListener::bind(&path)?;
            println!("{}", path.display());
            let accept = |_| Ok(listener.accept()?.0.into());
            let sockets = (0..connections).map(accept).collect();
            std::fs::remove_file(path)?;
            sockets
        }
    }
}

fn receive(sockets: Vec<OwnedFd>, ram: &GuestRam, mode: Mode) -> Result<()> {
    let config = ReceiverConfig {
        backend: backend(mode),
    };
    let (events, queue) = mpsc::channel();
    let events = Arc::new(move |event| drop(events.send(event)));
    let receiver = DataReceiver::start(sockets, ram.clone(), Vec::new(), config, events)?;
    match queue.recv()? {
        ReceiverEvent::RoundReceived { last: true, .. } => {}
        ReceiverEvent::Failed { error, .. } => return Err(error.into()),
        other => bail!("unexpected {other:?}"),
    }
    receiver.join();
    Ok(())
}
