//! virtio-blk on a raw image: `--disk`.
//!
//! The image is touched only while the disk is active, which the disk itself sees to. It is between resume and pause, so a driver meets
//! an inactive disk never; if it did, the request would fail and nothing be lost.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use vm_memory::{Address, Bytes, GuestAddress};
use vmferry_devices::announce::Announce;
use vmferry_devices::{DeviceError, Notifier};
use vmferry_transport::memory::DirtyLog;
use vmferry_transport::wire::{DeviceSchema, Section};

use super::backend::{Backend, QueueBase, Start};
use super::ring::{Broken, Chain, Ring};
use super::worker::{Serve, Step, Worker};
use crate::machine::disk::{Disk, DiskError};
use crate::machine::ram::RamMemory;

/// Device type of disks.
pub const TYPE_BLOCK: u32 = 2;
/// Bytes per sector, whatever the block size.
pub const SECTOR_BYTES: u64 = 512;
/// The disk is read-only.
pub const F_READ_ONLY: u64 = 1 << 5;

const F_SIZE_MAX: u64 = 1 << 1;
const F_SEG_MAX: u64 = 1 << 2;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const QUEUE_SIZE: u16 = 128;
/// Most buffers of a request, and the size of each, as the driver is told.
const SEGMENTS_MAX: u32 = 126;
const SEGMENT_BYTES_MAX: u32 = 64 << 10;
/// Most data of a request: what a driver that keeps to the two can ask for.
const REQUEST_BYTES_MAX: u64 = SEGMENTS_MAX as u64 * SEGMENT_BYTES_MAX as u64;
/// Data passes through a buffer of this size.
const BOUNCE_BYTES: usize = SEGMENT_BYTES_MAX as usize;
const HEADER_BYTES: u32 = 16;
const ID_BYTES: usize = 20;

const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

/// Failures of the host that are logged; the guest hears of all.
const LOGGED_MAX: u32 = 10;

/// What migrations call the disk `id`, whoever serves it.
pub(super) fn blk_name(id: &str) -> String {
    format!("virtio-blk/{id}")
}

/// A disk.
#[derive(Debug)]
pub struct Blk {
    name: String,
    disk: Arc<Disk>,
    worker: Option<Worker>,
}

impl Blk {
    /// A device on `disk`.
    pub fn new(disk: Arc<Disk>) -> Self {
        Self {
            name: blk_name(&disk.config().id),
            disk,
            worker: None,
        }
    }
}

impl Backend for Blk {
    fn name(&self) -> &str {
        &self.name
    }

    fn device_type(&self) -> u32 {
        TYPE_BLOCK
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        let read_only = if self.disk.config().read_only {
            F_READ_ONLY
        } else {
            0
        };
        F_SIZE_MAX | F_SEG_MAX | F_BLK_SIZE | F_FLUSH | read_only
    }

    fn config(&self) -> Vec<u8> {
        let sectors = self.disk.info().size_bytes / SECTOR_BYTES;
        let mut config = Vec::new();
        config.extend_from_slice(&sectors.to_le_bytes());
        config.extend_from_slice(&SEGMENT_BYTES_MAX.to_le_bytes());
        config.extend_from_slice(&SEGMENTS_MAX.to_le_bytes());
        // No geometry.
        config.extend_from_slice(&[0; 4]);
        config.extend_from_slice(&(SECTOR_BYTES as u32).to_le_bytes());
        config
    }

    fn write_config(&mut self, _: u64, _: &[u8]) {}

    fn accept_config(&mut self, saved: &[u8]) -> Result<(), String> {
        let ours = self.config();
        if saved == ours {
            return Ok(());
        }
        let sectors = |config: &[u8]| {
            config
                .first_chunk()
                .map_or(0, |bytes| u64::from_le_bytes(*bytes))
        };
        Err(format!(
            "the guest knows a disk of {} sectors with limits of its own, this one has {} sectors",
            sectors(saved),
            sectors(&ours)
        ))
    }

    fn prepare(&mut self, start: Start) -> io::Result<()> {
        let requests = Requests {
            disk: self.disk.clone(),
            bounce: vec![0; BOUNCE_BYTES],
            logged: 0,
        };
        self.worker = Some(Worker::prepare(&self.name, start, requests)?);
        Ok(())
    }

    fn open(&mut self) -> io::Result<()> {
        if let Some(worker) = &self.worker {
            worker.open();
        }
        Ok(())
    }

    fn stop(&mut self) -> io::Result<Vec<QueueBase>> {
        let Some(worker) = &mut self.worker else {
            return Ok(Vec::new());
        };
        let bases = worker.stop()?;
        self.worker = None;
        Ok(bases)
    }

    fn reset(&mut self) {}

    fn schemas(&self) -> Vec<DeviceSchema> {
        Vec::new()
    }

    fn save(&mut self) -> Result<Vec<Section>, DeviceError> {
        Ok(Vec::new())
    }

    fn load(&mut self, _: &[&Section]) -> Result<(), DeviceError> {
        Ok(())
    }

    fn undelivered(&self) -> Option<Vec<u8>> {
        None
    }

    fn set_undelivered(&mut self, packet: Option<Vec<u8>>) -> Result<(), String> {
        packet.map_or(Ok(()), |_| Err("a packet for a disk".to_owned()))
    }

    fn dirty_log(&self) -> io::Result<Option<Box<dyn DirtyLog>>> {
        Ok(None)
    }

    fn notifier(&self) -> Option<Box<dyn Notifier>> {
        None
    }

    fn announcer(&self) -> Option<Arc<dyn Announce>> {
        None
    }
}

/// Serves requests.
struct Requests {
    disk: Arc<Disk>,
    bounce: Vec<u8>,
    logged: u32,
}

/// A request, taken apart: what is asked for, the data buffers, and where the status goes.
struct Parsed {
    kind: u32,
    sector: u64,
    /// Address and length.
    data: Vec<(GuestAddress, u32)>,
    status: GuestAddress,
}

/// What became of a request: the status, and how many bytes of data were written to guest memory.
struct Outcome {
    status: u8,
    written: u32,
}

impl Serve for Requests {
    fn source(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn opened(&mut self) {}

    fn source_is_ready(&mut self) {}

    fn serve(&mut self, ring: &mut Ring, memory: &RamMemory) -> Result<Step, Broken> {
        let Some(chain) = ring.take(memory)? else {
            return Ok(Step::Empty);
        };
        let head = chain.head_index();
        let written = self.answer(chain, memory);
        ring.give_back(memory, &[(head, written)])?;
        Ok(Step::Done)
    }
}

impl Requests {
    /// Does what is asked for, and says how many bytes were written.
    fn answer(&mut self, chain: Chain<'_>, memory: &RamMemory) -> u32 {
        let Some(request) = Parsed::new(chain, memory) else {
            // Nowhere to put a status, or nothing that could be called a request.
            return 0;
        };
        let Outcome { status, written } = self.carry_out(&request, memory);
        match memory.write_obj(status, request.status) {
            Ok(()) => written.saturating_add(1),
            Err(_) => 0,
        }
    }
}

impl Parsed {
    /// The header is the first buffer, the status the last byte of the last; between them lies data in one direction.
    fn new(chain: Chain<'_>, memory: &RamMemory) -> Option<Self> {
        // One more than a driver may use, so that too many are seen as such.
        let mut buffers: Vec<_> = chain.take(SEGMENTS_MAX as usize + 3).collect();
        if buffers.len() > SEGMENTS_MAX as usize + 2 {
            return None;
        }
        let status = buffers.pop()?;
        let header = buffers.first()?;
        if !status.is_write_only() || status.len() < 1 {
            return None;
        }
        if header.is_write_only() || header.len() != HEADER_BYTES {
            return None;
        }
        let word = |at: u64| {
            let address = header.addr().checked_add(at)?;
            memory.read_obj::<u32>(address).ok().map(u32::from_le)
        };
        let kind = word(0)?;
        let sector = u64::from(word(8)?) | u64::from(word(12)?) << 32;
        let to_guest = kind == READ || kind == GET_ID;
        let data = buffers[1..]
            .iter()
            .map(|buffer| {
                (buffer.is_write_only() == to_guest).then(|| (buffer.addr(), buffer.len()))
            })
            .collect::<Option<Vec<_>>>()?;
        Some(Self {
            kind,
            sector,
            data,
            status: status.addr().checked_add(u64::from(status.len()) - 1)?,
        })
    }

    fn bytes(&self) -> u64 {
        self.data.iter().map(|(_, len)| u64::from(*len)).sum()
    }
}

impl Requests {
    fn carry_out(&mut self, request: &Parsed, memory: &RamMemory) -> Outcome {
        let whole_sectors = request.bytes().is_multiple_of(SECTOR_BYTES);
        let result = match request.kind {
            READ | WRITE if request.bytes() > REQUEST_BYTES_MAX || !whole_sectors => {
                return Outcome::failed();
            }
            READ | WRITE => self.transfer(request, memory),
            FLUSH => self.disk.flush().map_err(Failure::Disk).map(|()| 0),
            GET_ID => self.identify(request, memory),
            _ => {
                return Outcome {
                    status: UNSUPPORTED,
                    written: 0,
                };
            }
        };
        match result {
            Ok(written) => Outcome {
                status: OK,
                written,
            },
            Err(failure) => {
                self.log(&failure);
                Outcome::failed()
            }
        }
    }

    /// Reads or writes all data, through the bounce buffer: guest memory is never a slice.
    fn transfer(&mut self, request: &Parsed, memory: &RamMemory) -> Result<u32, Failure> {
        let mut at = request
            .sector
            .checked_mul(SECTOR_BYTES)
            .ok_or(Failure::Guest)?;
        let mut written = 0_u32;
        for (start, len) in &request.data {
            let mut done = 0_u32;
            while done < *len {
                let step = (*len - done).min(SEGMENT_BYTES_MAX);
                let address = start.checked_add(done.into()).ok_or(Failure::Guest)?;
                let bounce = &mut self.bounce[..step as usize];
                if request.kind == READ {
                    self.disk.read_at(bounce, at).map_err(Failure::Disk)?;
                    memory
                        .write_slice(bounce, address)
                        .map_err(|_| Failure::Guest)?;
                    written += step;
                } else {
                    memory
                        .read_slice(bounce, address)
                        .map_err(|_| Failure::Guest)?;
                    self.disk.write_at(bounce, at).map_err(Failure::Disk)?;
                }
                at += u64::from(step);
                done += step;
            }
        }
        Ok(written)
    }

    fn identify(&self, request: &Parsed, memory: &RamMemory) -> Result<u32, Failure> {
        let mut id = [0; ID_BYTES];
        let name = self.disk.config().id.as_bytes();
        let len = name.len().min(ID_BYTES);
        id[..len].copy_from_slice(&name[..len]);
        let (address, room) = request.data.first().ok_or(Failure::Guest)?;
        let len = ID_BYTES.min(*room as usize);
        memory
            .write_slice(&id[..len], *address)
            .map_err(|_| Failure::Guest)?;
        u32::try_from(len).map_err(|_| Failure::Guest)
    }

    fn log(&mut self, failure: &Failure) {
        let Failure::Disk(error) = failure else {
            return;
        };
        if matches!(error, DiskError::Beyond { .. } | DiskError::ReadOnly { .. }) {
            return;
        }
        self.logged = self.logged.saturating_add(1);
        if self.logged <= LOGGED_MAX {
            let error = error as &dyn std::error::Error;
            tracing::warn!(error, "a request of the guest has failed");
        }
    }
}

impl Outcome {
    fn failed() -> Self {
        Self {
            status: IO_ERROR,
            written: 0,
        }
    }
}

/// Why a request failed.
enum Failure {
    /// It reaches beyond memory or makes no sense.
    Guest,
    /// The disk did not do it.
    Disk(DiskError),
}
