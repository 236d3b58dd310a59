//! Devices that produce their state as a stream, carried beside the pages: a VFIO device's migration data, for one.
//!
//! In each round one connection takes a device, reads what it has, and sends it; several devices travel on several connections at the
//! same time. The bytes never pass through a core. In the last round, with the guest and the device stopped, the stream is read to its
//! end.

use std::fmt;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::DataError;
use crate::wire::WireError;
use crate::wire::device_data::DeviceData;

/// Where the state of a device comes from.
pub trait DeviceSource: Send {
    /// Reads the next bytes of the stream; 0 if there is nothing more in this round. With `last` the device is stopped and 0 is the end
    /// of the stream. Must return 0 within a round sooner or later, however fast the device makes new state. May block for as long as
    /// the device takes.
    ///
    /// # Errors
    /// The device's answer; the migration fails, and the guest stays.
    fn read(&mut self, last: bool, buffer: &mut [u8]) -> io::Result<usize>;
}

/// Where the state of a device goes to.
pub trait DeviceSink: Send {
    /// Takes the next bytes of the stream. May block for as long as the device takes.
    ///
    /// # Errors
    /// The device's answer; the migration fails before the guest could start here.
    fn write(&mut self, bytes: &[u8]) -> io::Result<()>;
}

/// A device with a stream, on either side.
pub struct StreamedDevice<S: ?Sized> {
    /// Its position in the hello's list of devices.
    pub index: u16,
    /// Its name, for errors.
    pub name: String,
    /// The stream.
    pub stream: Box<S>,
}

impl<S: ?Sized> fmt::Debug for StreamedDevice<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "StreamedDevice({}: {})", self.index, self.name)
    }
}

/// A stream under way, owned by one data thread at a time.
#[derive(Debug)]
pub(super) struct Stream<S: ?Sized> {
    device: StreamedDevice<S>,
    /// Bytes so far.
    offset: u64,
    ended: bool,
}

/// All streams of one side.
#[derive(Debug)]
pub(super) struct Streams<S: ?Sized>(Vec<(u16, Mutex<Stream<S>>)>);

impl<S: ?Sized> Streams<S> {
    pub(super) fn new(devices: Vec<StreamedDevice<S>>) -> Self {
        let stream = |device: StreamedDevice<S>| {
            let stream = Stream {
                offset: 0,
                ended: false,
                device,
            };
            // The index outside of the lock: looking for one device must not wait for another.
            (stream.device.index, Mutex::new(stream))
        };
        Self(devices.into_iter().map(stream).collect())
    }

    /// The stream at a position of this list, which is not that of the hello.
    pub(super) fn get(&self, at: usize) -> Option<MutexGuard<'_, Stream<S>>> {
        self.0.get(at).map(|(_, stream)| lock(stream))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Every stream must have come to its end by now.
    ///
    /// # Errors
    /// The first that has not.
    pub(super) fn check_ended(&self) -> Result<(), WireError> {
        let mut streams = self.0.iter().map(|(_, stream)| lock(stream));
        match streams.find(|stream| !stream.ended) {
            Some(stream) => Err(WireError::DeviceUnfinished {
                device: stream.device.name.clone(),
            }),
            None => Ok(()),
        }
    }
}

impl Stream<dyn DeviceSource> {
    /// Reads the next piece into `buffer` and describes it; `None` when this round has no more of this device.
    ///
    /// # Errors
    /// [`DataError::Device`].
    pub(super) fn next_piece(
        &mut self,
        round: crate::units::RoundId,
        last: bool,
        buffer: &mut [u8],
    ) -> Result<Option<DeviceData>, DataError> {
        if self.ended {
            return Ok(None);
        }
        let StreamedDevice {
            index,
            name,
            stream,
        } = &mut self.device;
        let read = stream
            .read(last, buffer)
            .map_err(|source| DataError::Device {
                device: name.clone(),
                op: "reading its migration data",
                source,
            })?;
        if read == 0 && !last {
            return Ok(None);
        }
        self.ended = read == 0;
        let piece = DeviceData {
            round,
            device: *index,
            offset: self.offset,
            payload_bytes: u32::try_from(read).expect("a piece fits into the buffer"),
            payload_crc: crc32c::crc32c(&buffer[..read]),
            end: self.ended,
        };
        self.offset += read as u64;
        Ok(Some(piece))
    }
}

impl Streams<dyn DeviceSink> {
    /// Gives a piece to its device.
    ///
    /// # Errors
    /// When it does not follow on what came before, is damaged, or is refused by the device.
    pub(super) fn take(&self, piece: &DeviceData, payload: &[u8]) -> Result<(), DataError> {
        let known = self.0.iter().find(|(index, _)| *index == piece.device);
        let Some((_, stream)) = known else {
            return Err(DataError::Peer(WireError::Value {
                field: "device of a stream",
                value: piece.device.into(),
            }));
        };
        let mut stream = lock(stream);
        let Stream {
            device,
            offset,
            ended,
        } = &mut *stream;
        if *ended || piece.offset != *offset {
            return Err(DataError::Peer(WireError::DeviceOffset {
                device: device.name.clone(),
                expected: *offset,
                found: piece.offset,
            }));
        }
        if crc32c::crc32c(payload) != piece.payload_crc {
            return Err(DataError::Peer(WireError::PayloadChecksum));
        }
        if !payload.is_empty() {
            device
                .stream
                .write(payload)
                .map_err(|source| DataError::Device {
                    device: device.name.clone(),
                    op: "writing its migration data",
                    source,
                })?;
        }
        *offset += payload.len() as u64;
        *ended = piece.end;
        Ok(())
    }
}

/// A thread that panicked ends the whole transfer, so what it left behind does not matter.
fn lock<S: ?Sized>(stream: &Mutex<Stream<S>>) -> MutexGuard<'_, Stream<S>> {
    stream.lock().unwrap_or_else(PoisonError::into_inner)
}
