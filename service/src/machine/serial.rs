//! The 16550 serial port: vm-superio's registers, an output that never holds a vCPU up, and saved state.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread;

use serde::{Deserialize, Serialize};
use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial, Trigger};
use vmferry_devices::saved::{SavedState, decode, encode, schema_of};
use vmferry_devices::{Device, DeviceError};
use vmferry_transport::wire::{DeviceSchema, Section};
use vmm_sys_util::eventfd::EventFd;

use super::{MachineError, SerialSink};

/// Most bytes of output that wait for the sink. What comes while they wait is lost, as on a line without flow control.
const QUEUED_BYTES_MAX: usize = 64 << 10;

/// The machine's serial port.
#[derive(Debug)]
pub struct SerialPort {
    name: String,
    registers: Serial<Line, NoEvents, SerialOutput>,
    line: Line,
    output: SerialOutput,
}

impl SerialPort {
    /// A port called `name` whose output goes to `sink`. `interrupt` is what its interrupt line is tied to; without, the guest polls.
    ///
    /// # Errors
    /// When the sink cannot be opened.
    pub fn new(
        name: &str,
        sink: &SerialSink,
        interrupt: Option<Arc<EventFd>>,
    ) -> Result<Self, MachineError> {
        let output = SerialOutput::open(sink)?;
        let line = Line(interrupt);
        Ok(Self {
            name: name.to_owned(),
            registers: Serial::new(line.clone(), output.clone()),
            line,
            output,
        })
    }

    /// Raises the interrupt once more than needed, for one that was on its way when the guest was stopped, if the guest wants any.
    pub fn raise(&self) {
        if self.registers.state().interrupt_enable != 0 {
            // Never fails, see there.
            let _ = self.line.trigger();
        }
    }

    /// The guest reads register `offset` (0 to 7).
    pub fn read(&mut self, offset: u8) -> u8 {
        self.registers.read(offset)
    }

    /// The guest writes register `offset` (0 to 7).
    pub fn write(&mut self, offset: u8, value: u8) {
        // Neither output nor interrupt ever fail; a full input queue in loopback mode drops the byte, as a real
        // port does.
        let _ = self.registers.write(offset, value);
    }
}

impl Device for SerialPort {
    fn name(&self) -> &str {
        &self.name
    }

    fn schema(&self) -> DeviceSchema {
        schema_of::<SerialV1>(&self.name)
    }

    fn save(&mut self) -> Result<Section, DeviceError> {
        let SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer,
        } = self.registers.state();
        encode(
            &self.name,
            &SerialV1 {
                baud_divisor_low,
                baud_divisor_high,
                interrupt_enable,
                interrupt_identification,
                line_control,
                line_status,
                modem_control,
                modem_status,
                scratch,
                in_buffer,
            },
        )
    }

    fn restore(&mut self, section: &Section) -> Result<(), DeviceError> {
        let SerialV1 {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer,
        } = decode(section)?;
        let state = SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer,
        };
        self.registers =
            Serial::from_state(&state, self.line.clone(), NoEvents, self.output.clone()).map_err(
                |error| DeviceError::BadState {
                    device: section.name.clone(),
                    reason: error.to_string(),
                },
            )?;
        Ok(())
    }
}

/// Registers of the serial port, schema `serial-16550`, version 1. Not yet released.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct SerialV1 {
    /// Divisor latch, low byte.
    pub baud_divisor_low: u8,
    /// Divisor latch, high byte.
    pub baud_divisor_high: u8,
    /// IER.
    pub interrupt_enable: u8,
    /// IIR.
    pub interrupt_identification: u8,
    /// LCR.
    pub line_control: u8,
    /// LSR.
    pub line_status: u8,
    /// MCR.
    pub modem_control: u8,
    /// MSR.
    pub modem_status: u8,
    /// SCR.
    pub scratch: u8,
    /// Received bytes that the guest has not read, oldest first; at most 64.
    pub in_buffer: Vec<u8>,
}

impl SavedState for SerialV1 {
    const SCHEMA: &'static str = "serial-16550";
    const VERSION: u32 = 1;
}

/// The interrupt line, if the machine has an interrupt controller.
#[derive(Clone, Debug)]
struct Line(Option<Arc<EventFd>>);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> Result<(), io::Error> {
        if let Some(line) = &self.0 {
            // It fails only if 2^64 interrupts wait: the port goes on without.
            let _ = line.write(1);
        }
        Ok(())
    }
}

/// Where written bytes go. A thread of its own writes them, so that a terminal that does not read cannot keep a vCPU from pausing.
#[derive(Clone, Debug)]
struct SerialOutput {
    queue: Option<SyncSender<u8>>,
}

impl SerialOutput {
    fn open(sink: &SerialSink) -> Result<Self, MachineError> {
        let writer: Box<dyn Write + Send> = match sink {
            SerialSink::Null => return Ok(Self { queue: None }),
            SerialSink::Stdio => Box::new(io::stdout()),
            SerialSink::File(path) => Box::new(
                OpenOptions::new()
                    .create(true)
                    .append(true)
                    .open(path)
                    .map_err(|source| MachineError::Host {
                        op: format!("open {} for the serial port", path.display()),
                        source,
                    })?,
            ),
        };
        let (queue, bytes) = sync_channel(QUEUED_BYTES_MAX);
        thread::Builder::new()
            .name("serial".to_owned())
            .spawn(move || write_out(&bytes, writer))
            .map_err(|source| MachineError::Host {
                op: "start the serial port's thread".to_owned(),
                source,
            })?;
        Ok(Self { queue: Some(queue) })
    }
}

impl Write for SerialOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(queue) = &self.queue {
            for byte in bytes {
                if let Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) =
                    queue.try_send(*byte)
                {
                    break;
                }
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Ends when the last port that feeds `bytes` is gone, or the writer fails.
fn write_out(bytes: &Receiver<u8>, mut writer: Box<dyn Write + Send>) {
    while let Ok(first) = bytes.recv() {
        let batch: Vec<u8> = std::iter::once(first).chain(bytes.try_iter()).collect();
        if let Err(error) = writer.write_all(&batch).and_then(|()| writer.flush()) {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "serial output lost"
            );
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_survive_a_round_trip_and_a_long_input_queue_is_refused() {
        let mut source = SerialPort::new("serial/0", &SerialSink::Null, None).unwrap();
        source.write(7, 0x5a);
        source.write(3, 0x83);
        let section = source.save().unwrap();
        let mut target = SerialPort::new("serial/0", &SerialSink::Null, None).unwrap();
        target.restore(&section).unwrap();
        assert_eq!((target.read(7), target.read(3)), (0x5a, 0x83));

        let mut state: SerialV1 = decode(&section).unwrap();
        state.in_buffer = vec![0; 65];
        let error = target
            .restore(&encode("serial/0", &state).unwrap())
            .unwrap_err();
        assert!(error.to_string().contains("serial/0"), "{error}");
    }
}
