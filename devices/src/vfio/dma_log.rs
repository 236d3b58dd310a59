//! Dirty logs of what devices write to guest memory past KVM and past the VMM's mappings.
//!
//! | Log | Who notes writes | Exact |
//! | --- | --- | --- |
//! | [`DeviceDmaLog`] | the device (`VFIO_DEVICE_FEATURE_DMA_LOGGING_*`) | yes, by pages of 4 KiB or more |
//! | [`ContainerLog`] | the container of type 1: pages that drivers have pinned, or all that is mapped | rarely |
//! | [`MappedLog`] | nobody: all that is mapped counts as written, every time | no |
//!
//! [`dirty_logs`] picks. With the last, pre-copy sends everything mapped in each round, and the blackout holds all of it: such a VM
//! migrates only with a downtime limit that allows for it.
//!
//! The last fetch comes after the devices were stopped: only then is the log complete.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use vmferry_transport::memory::extents::Extents;
use vmferry_transport::memory::{DirtyLog, DirtyLogError, DirtyMap, PageBitmap, WriteProtector};
use vmferry_transport::units::{BlockId, PAGE_SIZE, PageCount, PageIndex};

use super::face::{ContainerFace, Iova, Tracking, VfioFace};
use super::set::VfioSet;

const DEVICE_LOG: &str = "vfio-dma";
const CONTAINER_LOG: &str = "vfio-container";
const MAPPED_LOG: &str = "vfio-mapped";

/// Bytes that a device is asked about in one call: 1 GiB, a bitmap of 32 KiB. Calls meet at multiples of it, so that no page of a
/// device, however large, is split between two.
const BYTES_PER_REPORT: u64 = 1 << 30;
/// Ranges that every kernel takes at least: what fits into a page of it.
const RANGES_MAX: usize = 256;

/// Guest memory that is mapped for devices: one mapping.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Mapped {
    /// First address as devices see it; a multiple of 4 KiB.
    pub iova: u64,
    /// The RAM block behind it.
    pub block: BlockId,
    /// First page of the block that is mapped.
    pub start: PageIndex,
    /// Number of pages.
    pub count: PageCount,
}

impl Mapped {
    /// The addresses of the mapping.
    fn range(&self) -> Iova {
        Iova {
            start: self.iova,
            bytes: self.count.to_bytes(),
        }
    }

    /// Where this mapping and `range` overlap: the first address and the one after the last.
    fn overlap(&self, range: Iova) -> Option<(u64, u64)> {
        let start = self.iova.max(range.start);
        let end = (self.iova + self.count.to_bytes()).min(range.start + range.bytes);
        (start < end).then_some((start, end))
    }

    /// Marks the pages whose bits are set in `words`, which tells of `range`: bit 0 is for its first `page_bytes`.
    fn mark(&self, range: Iova, page_bytes: u64, words: &[u64], into: &mut DirtyMap) {
        let Some((start, end)) = self.overlap(range) else {
            return;
        };
        let into = into.block_mut(self.block);
        let page_of = |iova: u64| self.start.0 + (iova - self.iova) / PAGE_SIZE;
        let first_bit = (start - range.start) / page_bytes;
        let bits_end = (end - range.start).div_ceil(page_bytes);
        if page_bytes == PAGE_SIZE && (first_bit | page_of(start)).is_multiple_of(64) {
            mark_words(words, first_bit..bits_end, page_of(start), into);
            return;
        }
        for bit in (first_bit..bits_end).filter(|bit| words[word_of(*bit)] >> (bit % 64) & 1 == 1) {
            let at = range.start + bit * page_bytes;
            let pages = page_of(at.max(start))..page_of((at + page_bytes).min(end));
            into.set_range(PageIndex(pages.start), PageCount(pages.end - pages.start));
        }
    }
}

/// Marks pages from `page` on by whole words, the first of which has bit `bits.start`. Both are multiples of 64.
fn mark_words(words: &[u64], bits: Range<u64>, page: u64, into: &mut PageBitmap) {
    let whole = word_of(bits.start)..word_of(bits.end);
    into.union_words(PageIndex(page), &words[whole.clone()]);
    let left = bits.end % 64;
    if left > 0 {
        // The rest of the last word is somebody else's.
        let last = words[whole.end] & ((1 << left) - 1);
        into.union_words(PageIndex(page + whole.len() as u64 * 64), &[last]);
    }
}

fn word_of(bit: u64) -> usize {
    usize::try_from(bit / 64).unwrap_or(usize::MAX)
}

/// The dirty logs that together see what the devices of `set` write to `mapped`: those of the devices if all have one, else that of
/// the container, else none. The mappings are all there are, each as it was mapped.
///
/// # Errors
/// When a device or the container does not say what it can do.
pub fn dirty_logs(
    set: &VfioSet,
    container: Option<Arc<dyn ContainerFace>>,
    mapped: &[Mapped],
) -> io::Result<Vec<Box<dyn DirtyLog>>> {
    let mut logs: Vec<Box<dyn DirtyLog>> = Vec::new();
    for device in set.devices() {
        let face = Arc::clone(device.face());
        let mut log = DeviceDmaLog::new(device.name(), face, mapped.to_vec());
        if !log.works()? {
            break;
        }
        logs.push(Box::new(log));
    }
    if logs.len() == set.devices().len() {
        return Ok(logs);
    }
    if let Some(container) = container
        && let Some(tracking) = container.tracking()?
        && tracking.page_bytes.is_multiple_of(PAGE_SIZE)
    {
        let log = ContainerLog::new(container, tracking, mapped.to_vec());
        return Ok(vec![Box::new(log)]);
    }
    Ok(vec![Box::new(MappedLog::new(mapped.to_vec()))])
}

/// Dirty log of one device that notes what it writes.
pub struct DeviceDmaLog {
    device: String,
    face: Arc<dyn VfioFace>,
    mapped: Vec<Mapped>,
    words: Vec<u64>,
    started: bool,
}

impl DeviceDmaLog {
    /// For the device called `device`, which can reach `mapped`.
    pub fn new(device: &str, face: Arc<dyn VfioFace>, mapped: Vec<Mapped>) -> Self {
        Self {
            device: device.to_owned(),
            face,
            mapped,
            words: Vec::new(),
            started: false,
        }
    }

    /// Whether the device logs, by trying: a kernel may let a device start that it cannot ask afterwards.
    ///
    /// # Errors
    /// When the kernel does not say whether it can.
    fn works(&mut self) -> io::Result<bool> {
        if !self.face.logs_dma()? {
            return Ok(false);
        }
        let Some(first) = self.mapped.first().map(Mapped::range) else {
            return Ok(true);
        };
        let page = Iova {
            bytes: PAGE_SIZE,
            ..first
        };
        let tried = self.start().and_then(|()| {
            let reported = self.face.report_dma(page, PAGE_SIZE, &mut [0]);
            let reported = reported.map_err(self.failed("reading"));
            self.stop().and(reported)
        });
        if let Err(error) = &tried {
            let error = error as &dyn std::error::Error;
            tracing::info!(
                device = self.device,
                error,
                "device says that it logs its writes, and does not"
            );
        }
        Ok(tried.is_ok())
    }

    fn start_ranges(&self) -> io::Result<u64> {
        let ranges = joined(self.mapped.iter().map(Mapped::range));
        let refused = match ranges.len() {
            0..=RANGES_MAX => match self.face.start_dma_logging(PAGE_SIZE, &ranges) {
                Err(error) if ranges.len() > 1 => error,
                answer => return answer,
            },
            _ => io::Error::from_raw_os_error(libc::E2BIG),
        };
        // A device may have room for few ranges. One over everything is the least that it can be asked for.
        let hull = hull(&ranges).ok_or(refused)?;
        self.face.start_dma_logging(PAGE_SIZE, &[hull])
    }

    fn failed(&self, op: &'static str) -> impl Fn(io::Error) -> DirtyLogError + use<> {
        let device = self.device.clone();
        move |source| DirtyLogError {
            log: DEVICE_LOG,
            op,
            source: io::Error::new(source.kind(), format!("device {device}: {source}")),
        }
    }
}

impl DirtyLog for DeviceDmaLog {
    fn name(&self) -> &'static str {
        DEVICE_LOG
    }

    fn start(&mut self) -> Result<(), DirtyLogError> {
        self.stop()?;
        if self.mapped.is_empty() {
            return Ok(());
        }
        self.start_ranges().map_err(self.failed("starting"))?;
        self.started = true;
        Ok(())
    }

    /// # Panics
    /// If `into` has fewer blocks than what is mapped.
    fn fetch(&mut self, into: &mut DirtyMap) -> Result<(), DirtyLogError> {
        if !self.started {
            return Ok(());
        }
        let failed = self.failed("reading");
        // Not mapping by mapping: a device with larger pages might forget one that begins in a mapping and ends in its neighbour.
        for range in joined(self.mapped.iter().map(Mapped::range)) {
            for piece in pieces(range) {
                self.words.clear();
                self.words.resize(words_for(piece, PAGE_SIZE), 0);
                // In our page size, whatever the device logs in: it repeats bits where its own pages are larger.
                self.face
                    .report_dma(piece, PAGE_SIZE, &mut self.words)
                    .map_err(&failed)?;
                for mapped in &self.mapped {
                    mapped.mark(piece, PAGE_SIZE, &self.words, into);
                }
            }
        }
        Ok(())
    }

    fn take_extents(&mut self) -> Option<Extents> {
        None
    }

    fn protector(&self) -> Option<Arc<dyn WriteProtector>> {
        None
    }

    fn stop(&mut self) -> Result<(), DirtyLogError> {
        if !std::mem::take(&mut self.started) {
            return Ok(());
        }
        self.face
            .stop_dma_logging()
            .map_err(self.failed("stopping"))
    }
}

/// Dirty log of a container of type 1.
///
/// It knows which pages drivers of mediated devices have pinned. For a device with an IOMMU of its own it reports everything mapped.
pub struct ContainerLog {
    container: Arc<dyn ContainerFace>,
    tracking: Tracking,
    mapped: Vec<Mapped>,
    words: Vec<u64>,
    started: bool,
}

impl ContainerLog {
    /// For `container`, which has `tracking` and in which `mapped` is mapped: each mapping as it was made, because the container does
    /// not answer for a part of one.
    pub fn new(container: Arc<dyn ContainerFace>, tracking: Tracking, mapped: Vec<Mapped>) -> Self {
        Self {
            container,
            tracking,
            mapped,
            words: Vec::new(),
            started: false,
        }
    }
}

impl DirtyLog for ContainerLog {
    fn name(&self) -> &'static str {
        CONTAINER_LOG
    }

    fn start(&mut self) -> Result<(), DirtyLogError> {
        self.stop()?;
        self.container
            .start_dirty_pages()
            .map_err(container_failed("starting"))?;
        self.started = true;
        Ok(())
    }

    /// # Panics
    /// If `into` has fewer blocks than what is mapped.
    fn fetch(&mut self, into: &mut DirtyMap) -> Result<(), DirtyLogError> {
        let failed = container_failed("reading");
        let page_bytes = self.tracking.page_bytes;
        for mapped in &self.mapped {
            let range = mapped.range();
            let words = words_for(range, page_bytes);
            if words as u64 * 8 > self.tracking.bitmap_bytes_max {
                let bytes = self.tracking.bitmap_bytes_max;
                return Err(failed(io::Error::new(
                    io::ErrorKind::Unsupported,
                    format!(
                        "a mapping of {} bytes, and bitmaps of {bytes} bytes",
                        range.bytes
                    ),
                )));
            }
            self.words.clear();
            self.words.resize(words, 0);
            self.container
                .get_dirty_pages(range, page_bytes, &mut self.words)
                .map_err(&failed)?;
            mapped.mark(range, page_bytes, &self.words, into);
        }
        Ok(())
    }

    fn take_extents(&mut self) -> Option<Extents> {
        None
    }

    fn protector(&self) -> Option<Arc<dyn WriteProtector>> {
        None
    }

    fn stop(&mut self) -> Result<(), DirtyLogError> {
        if !std::mem::take(&mut self.started) {
            return Ok(());
        }
        self.container
            .stop_dirty_pages()
            .map_err(container_failed("stopping"))
    }
}

fn container_failed(op: &'static str) -> impl Fn(io::Error) -> DirtyLogError {
    move |source| DirtyLogError {
        log: CONTAINER_LOG,
        op,
        source,
    }
}

/// Everything mapped counts as written, at every fetch.
#[derive(Debug)]
pub struct MappedLog {
    mapped: Vec<Mapped>,
}

impl MappedLog {
    /// For devices that can write to `mapped`.
    pub fn new(mapped: Vec<Mapped>) -> Self {
        Self { mapped }
    }
}

impl DirtyLog for MappedLog {
    fn name(&self) -> &'static str {
        MAPPED_LOG
    }

    fn start(&mut self) -> Result<(), DirtyLogError> {
        Ok(())
    }

    /// # Panics
    /// If `into` has fewer blocks than what is mapped.
    fn fetch(&mut self, into: &mut DirtyMap) -> Result<(), DirtyLogError> {
        for mapped in &self.mapped {
            into.block_mut(mapped.block)
                .set_range(mapped.start, mapped.count);
        }
        Ok(())
    }

    fn take_extents(&mut self) -> Option<Extents> {
        None
    }

    fn protector(&self) -> Option<Arc<dyn WriteProtector>> {
        None
    }

    fn stop(&mut self) -> Result<(), DirtyLogError> {
        Ok(())
    }
}

/// Words of a bitmap with a bit for each page of `range`.
fn words_for(range: Iova, page_bytes: u64) -> usize {
    let words = range.bytes.div_ceil(page_bytes).div_ceil(64);
    usize::try_from(words).unwrap_or(usize::MAX)
}

/// The ranges in ascending order, neighbours made one.
fn joined(ranges: impl Iterator<Item = Iova>) -> Vec<Iova> {
    let mut ranges: Vec<_> = ranges.filter(|range| range.bytes > 0).collect();
    ranges.sort_unstable();
    let mut joined: Vec<Iova> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match joined.last_mut() {
            Some(last) if last.start + last.bytes >= range.start => {
                let end = (range.start + range.bytes).max(last.start + last.bytes);
                last.bytes = end - last.start;
            }
            _ => joined.push(range),
        }
    }
    joined
}

/// `range` in pieces of at most [`BYTES_PER_REPORT`].
fn pieces(range: Iova) -> impl Iterator<Item = Iova> {
    let end = range.start + range.bytes;
    let mut start = range.start;
    std::iter::from_fn(move || {
        let next = (start / BYTES_PER_REPORT + 1).saturating_mul(BYTES_PER_REPORT);
        let bytes = next
            .min(end)
            .checked_sub(start)
            .filter(|bytes| *bytes > 0)?;
        let piece = Iova { start, bytes };
        start += bytes;
        Some(piece)
    })
}

/// One range over all; `None` without any.
fn hull(ranges: &[Iova]) -> Option<Iova> {
    let (first, last) = (ranges.first()?, ranges.last()?);
    Some(Iova {
        start: first.start,
        bytes: last.start + last.bytes - first.start,
    })
}

impl std::fmt::Debug for DeviceDmaLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DeviceDmaLog")
            .field("device", &self.device)
            .field("mapped", &self.mapped)
            .field("started", &self.started)
            .finish_non_exhaustive()
    }
}

impl std::fmt::Debug for ContainerLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ContainerLog")
            .field("mapped", &self.mapped)
            .field("started", &self.started)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
