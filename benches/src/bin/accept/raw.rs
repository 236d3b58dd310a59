//! The raw copy that a full VM is compared with: memory of this process to memory of another, both populated.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use rustix::fs::{FallocateFlags, MemfdFlags};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress,
};
use vmferry_benches::raw_copy::{self, Way};

/// The other process, with its memory.
pub(crate) struct RawPeer {
    mib: u64,
    region: Arc<GuestRegionMmap>,
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl RawPeer {
    /// Starts it; both sides have `mib` MiB.
    pub(crate) fn start(mib: u64) -> Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["--raw-target", &mib.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let input = child.stdin.take().context("piped")?;
        let output = BufReader::new(child.stdout.take().context("piped")?);
        let region = region(mib)?;
        Ok(Self {
            mib,
            region,
            child,
            input,
            output,
        })
    }

    /// Copies all of it once; GiB per second, until the other side has everything. `fresh`: its memory does not exist before.
    pub(crate) fn copy(&mut self, connections: u8, fresh: bool) -> Result<f64> {
        writeln!(self.input, "{connections} {fresh}")?;
        let address = self.hear()?;
        let sockets = (0..connections)
            .map(|_| {
                let socket = TcpStream::connect(&address)?;
                socket.set_nodelay(true)?;
                Ok(socket.into())
            })
            .collect::<Result<Vec<OwnedFd>>>()?;
        ensure!(self.hear()? == "ready", "the other side is not ready");
        let began = Instant::now();
        raw_copy::copy(&self.region, &sockets, Way::Send)?;
        ensure!(self.hear()? == "done", "the other side has not got all");
        #[expect(clippy::cast_precision_loss, reason = "a few thousand")]
        let gib = self.mib as f64 / 1024.0;
        Ok(gib / began.elapsed().as_secs_f64())
    }

    fn hear(&mut self) -> Result<String> {
        let mut line = String::new();
        ensure!(
            self.output.read_line(&mut line)? > 0,
            "the other side of the raw copy has ended"
        );
        Ok(line.trim().to_owned())
    }
}

impl Drop for RawPeer {
    fn drop(&mut self) {
        // Fail only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Memory full of incompressible bytes.
fn region(mib: u64) -> Result<Arc<GuestRegionMmap>> {
    let file = File::from(rustix::fs::memfd_create("raw", MemfdFlags::CLOEXEC)?);
    file.set_len(mib << 20)?;
    let offset = FileOffset::new(file, 0);
    let bytes = usize::try_from(mib << 20)?;
    let region = GuestRegionMmap::from_range(GuestAddress(0), bytes, Some(offset))?;
    let mut random = File::open("/dev/urandom")?;
    let mut chunk = vec![0; 1 << 20];
    for number in 0..mib {
        random.read_exact(&mut chunk)?;
        region.write_slice(&chunk, MemoryRegionAddress(number << 20))?;
    }
    Ok(Arc::new(region))
}

/// Gives all memory back to the kernel.
fn empty(region: &GuestRegionMmap) -> Result<()> {
    let file = region.file_offset().context("a memfd")?.file();
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(file, flags, 0, region.len())?;
    Ok(())
}

/// The other process: takes a number of connections per line, and whether to begin empty, and what comes over them.
pub(crate) fn target(mib: u64) -> Result<()> {
    let region = region(mib)?;
    for line in std::io::stdin().lines() {
        let line = line?;
        let (connections, fresh) = line.split_once(' ').context("two words")?;
        let connections: usize = connections.parse()?;
        if fresh.parse()? {
            empty(&region)?;
        }
        let listener = TcpListener::bind("127.0.0.1:0")?;
        println!("{}", listener.local_addr()?);
        let sockets = (0..connections)
            .map(|_| Ok(listener.accept()?.0.into()))
            .collect::<Result<Vec<OwnedFd>>>()?;
        println!("ready");
        raw_copy::copy(&region, &sockets, Way::Receive)?;
        println!("done");
    }
    Ok(())
}
