//! The target's part in an upgrade in place: takes RAM over before the machine is built, and the rest when the guest of the old process
//! is stopped.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use rustix::net::sockopt::socket_acceptconn;
use vmferry_cpr::letter::Leg;
use vmferry_cpr::manifest::{FdEntry, FdKind, FileId, Manifest, Stage};
use vmferry_cpr::message::HandOverError;
use vmferry_cpr::socket::CprSocket;
use vmferry_cpr::table::FdTable;
use vmferry_cpr::take::TakerDeadlines;
use vmferry_cpr::takeover::{Arrived, Offered, Ready};
use vmferry_cpr::{CprError, memfd, shared, spawn};
use vmferry_devices::Before;
use vmferry_transport::memory::GuestRam;
use vmferry_transport::memory::populate::map_existing;
use vmferry_transport::units::MigrationId;

use super::event::{Event, Events, OriginId, TargetEvent};
use super::hand_over::{METRICS, PROCESS, QMP, RAM, STDERR, STDOUT};
use super::settle::Succession;
use super::software;
use crate::config::CprOrigin;
use crate::machine::heirloom::DeviceFd;
use crate::machine::kvm::HeadStart;
use crate::machine::{Given, MachineConfig, vfio};
use crate::succession::account::Times;
use crate::succession::{ARCHIVE, Inheritance, PROGRAM};

/// The first stage has arrived: the guest's memory, while the guest runs on it in another process.
#[derive(Debug)]
pub(super) struct Legacy {
    given: Given,
    id: MigrationId,
    rest: Rest,
}

/// How the rest of it comes.
#[derive(Debug)]
enum Rest {
    /// From the old process, when its guest is stopped.
    Process(Box<Arrived>),
    /// It is here, with the state of the guest, left by the program that this process was before.
    Program(Box<Left>),
}

/// What the program before has left beside memory.
#[derive(Debug)]
pub(super) struct Left {
    pub(super) id: MigrationId,
    pub(super) inherited: Inherited,
    pub(super) archive: OwnedFd,
    pub(super) succession: Succession,
}

/// What came with the guest and belongs to the process. Used when the guest is ours.
#[derive(Debug, Default)]
pub(super) struct Inherited {
    pub(super) qmp: Option<OwnedFd>,
    pub(super) metrics: Option<OwnedFd>,
    pub(super) stdout: Option<OwnedFd>,
    pub(super) stderr: Option<OwnedFd>,
    /// What is of devices.
    pub(super) devices: Vec<DeviceFd>,
}

impl Legacy {
    /// Waits for the old process, for ever, and takes RAM from it.
    ///
    /// # Errors
    /// Nobody can connect, somebody else did, or what is offered is not a VM like `machine`.
    pub(super) fn receive(origin: &CprOrigin, machine: &MachineConfig) -> anyhow::Result<Self> {
        let socket = CprSocket::new(connect(origin)?).context("the socket of the old process")?;
        let offered = Offered::receive(socket, &software(), TakerDeadlines::default())
            .context("no VM was offered by the old process")?;
        let judged = judge(offered.manifest(), machine);
        let (blocks, devices) = match judged {
            Ok(judged) => judged,
            Err(text) => {
                offered.refuse(&text);
                bail!(text);
            }
        };
        let id = offered.id();
        let mut arrived = offered.accept().context("taking guest memory over")?;
        let claimed = claim_ram(blocks, arrived.table())
            .and_then(|ram| Ok((ram, claim_devices(arrived.table(), Stage::Prepare)?)));
        let (ram, early) = match claimed {
            Ok(claimed) => claimed,
            Err(error) => {
                arrived.refuse(&format!("{error:#}"));
                return Err(error);
            }
        };
        Ok(Self {
            given: Given {
                ram,
                before: Before::Process,
                early,
                devices,
                head_start: None,
            },
            id,
            rest: Rest::Process(Box::new(arrived)),
        })
    }

    /// Takes what the program has left that this process was before.
    ///
    /// # Errors
    /// It is not a VM like `machine`, or something is missing. The way back is still there.
    pub(super) fn of_letter(
        inheritance: Inheritance,
        machine: &MachineConfig,
    ) -> anyhow::Result<Self> {
        let Inheritance {
            letter,
            account,
            mut table,
            began_us,
            way_back,
            head_start,
        } = inheritance;
        let head_start = head_start.unwrap_or_else(|error| {
            let error = format!("{error:#}");
            tracing::debug!(error, "nothing of the machine was begun early");
            None
        });
        let (blocks, devices) = judge(&letter.manifest, machine).map_err(anyhow::Error::msg)?;
        let ram = claim_ram(blocks, &mut table)?;
        let early = claim_devices(&mut table, Stage::Prepare)?;
        let archive = table.claim(PROCESS, ARCHIVE, FdKind::Other)?;
        let inherited = Inherited::claim(&mut table)?;
        let accounts = table.close();
        tracing::debug!(?accounts, "the old program has left everything");
        let succession = Succession {
            account,
            times: Times {
                began_us,
                ..Times::default()
            },
            id: letter.id,
            returned: (letter.leg == Leg::Back).then_some(letter.reason),
            way_back,
            due: None,
            held: None,
            told: false,
            tells: false,
        };
        Ok(Self {
            given: Given {
                ram,
                before: Before::Program,
                early,
                devices,
                head_start,
            },
            id: letter.id,
            rest: Rest::Program(Box::new(Left {
                id: letter.id,
                inherited,
                archive,
                succession,
            })),
        })
    }

    /// This process cannot go on: the old one hears why. A program that this process was before hears it on the way back.
    pub(super) fn refuse(self, why: &str) {
        if let Rest::Process(arrived) = self.rest {
            arrived.refuse(why);
        }
    }

    /// What the program before has left beside memory, if it was one.
    pub(super) fn left(self) -> Option<Left> {
        match self.rest {
            Rest::Program(left) => Some(*left),
            Rest::Process(_) => None,
        }
    }

    /// What the machine is built from. Once.
    pub(super) fn take_given(&mut self) -> Given {
        std::mem::take(&mut self.given)
    }

    /// Which migration it belongs to.
    pub(super) fn id(&self) -> MigrationId {
        self.id
    }

    /// The machine is built and the control connection is listened for: says so, and waits for the rest on a thread. What comes is
    /// reported as [`TargetEvent::Inherited`], a failure as one of `origin`.
    ///
    /// # Errors
    /// The old process has gone or given up.
    pub(super) fn prepared(
        self,
        ram: &GuestRam,
        origin: OriginId,
        events: Events,
    ) -> anyhow::Result<()> {
        let Rest::Process(arrived) = self.rest else {
            bail!("nothing more comes from a program that is gone");
        };
        // While the guest runs elsewhere: later it would wait for each page.
        match map_existing(ram) {
            Ok(pages) => tracing::debug!(pages = pages.0, "guest memory is mapped"),
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::info!(error, "guest memory is mapped when the guest uses it");
            }
        }
        let ready = arrived.taken().context("the old process")?;
        let wait = move || {
            let report = |event| {
                // The engine ends only with the process.
                let _ = events.send(Event::Target(event));
            };
            if let Err(error) = take_rest(ready, report) {
                report(TargetEvent::SourceFailed(origin, format!("{error:#}")));
            }
        };
        std::thread::Builder::new()
            .name("vm-cpr".into())
            .spawn(wait)
            .context("no thread for the hand-over")?;
        Ok(())
    }
}

/// RAM blocks of a VM that is offered, and what will come of its devices.
type Judged = (Vec<FdEntry>, Vec<FdEntry>);

/// Looks whether a VM like `machine` is offered, with its VFIO devices, and nothing that this build would not know what to do with.
///
/// # Errors
/// What is wrong, for the old process and people.
pub(super) fn judge(manifest: &Manifest, machine: &MachineConfig) -> Result<Judged, String> {
    let blocks = ram_blocks(manifest);
    let bytes: u64 = blocks
        .iter()
        .fold(0, |sum: u64, block| sum.saturating_add(block.value));
    let mem_bytes = machine.mem_bytes;
    if bytes != mem_bytes {
        return Err(format!(
            "the VM has {bytes} bytes of memory, this process was started for {mem_bytes}"
        ));
    }
    check_backing(&blocks, &machine.backing.paths(mem_bytes))?;
    let is_known = |entry: &FdEntry| {
        if is_of_process(entry) {
            let roles = [QMP, METRICS, STDOUT, STDERR, ARCHIVE, PROGRAM];
            return roles.contains(&entry.role.as_str());
        }
        machine.expects(entry)
    };
    let early = of_devices(manifest, Stage::Prepare);
    let rest = &manifest.entries()[manifest.range(Stage::HandOver)];
    if let Some(foreign) = early.iter().chain(rest).find(|entry| !is_known(entry)) {
        return Err(format!(
            "{:?} {:?} is not known here",
            foreign.name, foreign.role
        ));
    }
    if let Some((device, role)) = vfio::missing(&machine.vfio, manifest.entries()) {
        return Err(format!(
            "this process was started with {device}, and the VM does not have it ({role})"
        ));
    }
    Ok((blocks, of_devices(manifest, Stage::HandOver)))
}

/// Begins to build the machine of a letter before anything else is known of it, as far as that goes. What does not go now is found out when
/// it is built.
pub fn begin_machine(inheritance: &mut Inheritance) {
    let Some(shape) = inheritance.account.machine else {
        return;
    };
    let begin = |inheritance: &Inheritance| -> anyhow::Result<HeadStart> {
        let manifest = &inheritance.letter.manifest;
        let mut ram = Vec::new();
        for block in ram_blocks(manifest) {
            let peeked = inheritance.table.peek(&block.name, RAM);
            let (_, fd) = peeked.context("memory is missing")?;
            ram.push(reattach(&block, fd.try_clone()?)?);
        }
        Ok(HeadStart::begin(shape, ram)?)
    };
    // The log, which is to tell of an error, has not begun.
    inheritance.head_start = begin(inheritance).map(Some);
}

/// What of a stage is neither RAM nor the process's own.
fn of_devices(manifest: &Manifest, stage: Stage) -> Vec<FdEntry> {
    let entries = manifest.entries()[manifest.range(stage)].iter();
    let of_devices = entries.filter(|entry| !is_of_process(entry) && !is_ram(entry));
    of_devices.cloned().collect()
}

/// Whether memory is in the files that this process was started with: what is said of them later must be true.
fn check_backing(blocks: &[FdEntry], paths: &[PathBuf]) -> Result<(), String> {
    let named: Vec<_> = blocks
        .iter()
        .filter(|block| block.kind == FdKind::RamFile)
        .collect();
    match (named.is_empty(), paths) {
        (true, []) => return Ok(()),
        (true, [path, ..]) => {
            return Err(format!(
                "the VM has its memory in no file, this process was started for {}",
                path.display()
            ));
        }
        (false, []) => {
            return Err(
                "the VM has its memory in a file: start the new process with the same --mem-path"
                    .to_owned(),
            );
        }
        (false, _) => {}
    }
    for (at, path) in paths.iter().enumerate() {
        let there = fs::metadata(path).map_err(|error| format!("{}: {error}", path.display()))?;
        let there = FileId {
            dev: there.dev(),
            ino: there.ino(),
        };
        if named.get(at).is_none_or(|block| block.file != there) {
            return Err(format!(
                "the VM has its memory in another file than {}",
                path.display()
            ));
        }
    }
    Ok(())
}

fn is_ram(entry: &FdEntry) -> bool {
    matches!(entry.kind, FdKind::RamMemfd | FdKind::RamFile)
}

fn is_of_process(entry: &FdEntry) -> bool {
    entry.name == PROCESS
}

/// The blocks of RAM, in the order in which the machine numbers them.
fn ram_blocks(manifest: &Manifest) -> Vec<FdEntry> {
    let blocks = manifest.entries().iter().filter(|entry| is_ram(entry));
    let mut blocks: Vec<_> = blocks.cloned().collect();
    blocks.sort_by(|a, b| a.name.cmp(&b.name));
    blocks
}

fn reattach(block: &FdEntry, fd: OwnedFd) -> Result<fs::File, CprError> {
    match block.kind {
        FdKind::RamFile => shared::reattach(&block.name, fd, block.value),
        _ => memfd::reattach(&block.name, fd, block.value),
    }
}

/// Takes the files of RAM, in the order of the blocks.
fn claim_ram(blocks: Vec<FdEntry>, table: &mut FdTable<OwnedFd>) -> anyhow::Result<Vec<fs::File>> {
    let mut ram = Vec::new();
    for block in blocks {
        let claimed = table.claim(&block.name, RAM, block.kind)?;
        ram.push(reattach(&block, claimed)?);
    }
    Ok(ram)
}

/// Takes what a stage has of devices.
fn claim_devices(
    table: &mut FdTable<OwnedFd>,
    stage: Stage,
) -> Result<Vec<DeviceFd>, HandOverError> {
    let entries = of_devices(table.manifest(), stage).into_iter();
    let devices = entries.map(|entry| {
        Ok(DeviceFd {
            fd: table.claim(&entry.name, &entry.role, entry.kind)?,
            device: entry.name,
            role: entry.role,
            kind: entry.kind,
            value: entry.value,
        })
    });
    devices.collect()
}

impl Inherited {
    /// Takes everything of the second stage that this build knows.
    ///
    /// # Errors
    /// A descriptor is of another kind than its role says.
    pub(super) fn claim(table: &mut FdTable<OwnedFd>) -> Result<Self, HandOverError> {
        let mut inherited = Self::default();
        for (role, kind, place) in [
            (QMP, FdKind::Qmp, &mut inherited.qmp),
            (METRICS, FdKind::Listener, &mut inherited.metrics),
            (STDOUT, FdKind::Log, &mut inherited.stdout),
            (STDERR, FdKind::Log, &mut inherited.stderr),
        ] {
            if table.peek(PROCESS, role).is_some() {
                *place = Some(table.claim(PROCESS, role, kind)?);
            }
        }
        inherited.devices = claim_devices(table, Stage::HandOver)?;
        Ok(inherited)
    }
}

/// The engine has everything before the old process hears that it was taken.
fn take_rest(ready: Ready, report: impl Fn(TargetEvent)) -> anyhow::Result<()> {
    let mut rest = ready.wait().context("the hand-over")?;
    let inherited = Inherited::claim(rest.table())?;
    report(TargetEvent::Inherited(inherited));
    let accounts = rest.taken().context("the hand-over")?.accounts();
    tracing::debug!(?accounts, "the old process has handed everything over");
    Ok(())
}

fn connect(origin: &CprOrigin) -> anyhow::Result<OwnedFd> {
    let accept = |listener: &UnixListener| -> anyhow::Result<OwnedFd> {
        let (stream, _) = listener.accept().context("nobody connects")?;
        Ok(stream.into())
    };
    match origin {
        CprOrigin::Inherited => {
            let socket = spawn::inherited_socket()?;
            if socket_acceptconn(&socket).unwrap_or(false) {
                accept(&UnixListener::from(socket))
            } else {
                Ok(UnixStream::from(socket).into())
            }
        }
        CprOrigin::Listen(path) => {
            let listener =
                listen(path).with_context(|| format!("cannot listen on {}", path.display()))?;
            let accepted = accept(&listener);
            // Nobody else is to come.
            let _ = fs::remove_file(path);
            accepted
        }
    }
}

/// The path comes into being when somebody listens at it, and not a moment before: whoever waits for it connects at once.
fn listen(path: &Path) -> io::Result<UnixListener> {
    let mut early = path.as_os_str().to_owned();
    early.push("~");
    let listener = UnixListener::bind(&early)?;
    // Unlike a rename this never takes a path away from somebody else.
    let linked = fs::hard_link(&early, path);
    fs::remove_file(&early)?;
    linked.map(|()| listener)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_sees_the_path_can_connect_and_nobody_loses_theirs() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cpr");
        let connected = std::thread::scope(|scope| {
            let client = scope.spawn(|| {
                let looks = std::iter::repeat_with(|| path.exists()).take(10_000_000);
                assert!(looks.into_iter().any(|there| there));
                UnixStream::connect(&path)
            });
            let listener = listen(&path).unwrap();
            let connected = client.join().unwrap();
            assert!(listen(&path).is_err(), "it is somebody else's");
            drop(listener);
            connected
        });
        connected.unwrap();
        let left: Vec<_> = fs::read_dir(dir.path()).unwrap().collect();
        assert_eq!(left.len(), 1, "{left:?}");
    }
}
