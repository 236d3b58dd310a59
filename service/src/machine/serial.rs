//! The 16550 serial port: vm-superio's registers, an [output] that never holds a vCPU up, and saved state.

pub mod output;

use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial, Trigger};
use vmferry_devices::saved::{SavedState, decode, encode, schema_of};
use vmferry_devices::{Device, DeviceError, Notifier};
use vmferry_transport::wire::{DeviceSchema, Section};
use vmm_sys_util::eventfd::EventFd;

use self::output::{SerialOutput, SerialWriter};
use super::heirloom::DeviceFd;
use super::{MachineError, SerialSink};

/// Name of the machine's only port.
pub const SERIAL: &str = "serial/0";

/// The machine's serial port.
#[derive(Debug)]
pub struct SerialPort {
    name: String,
    registers: Serial<Line, NoEvents, SerialWriter>,
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
            registers: Serial::new(line.clone(), output.writer()),
            line,
            output,
        })
    }

    /// The guest is about to run: what it writes is written out, beginning with what another process has left.
    pub fn go_on(&self) {
        self.output.go_on();
    }

    /// What a process that takes the guest over in place must have of the output.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn heirlooms(&self) -> io::Result<Vec<DeviceFd>> {
        self.output.heirlooms(&self.name)
    }

    /// Takes what is of the output out of what has come from another process.
    ///
    /// # Errors
    /// Something is missing, or of no use.
    pub fn take_over(&self, fds: &mut Vec<DeviceFd>) -> Result<(), DeviceError> {
        self.output.take_over(&self.name, fds)
    }

    /// What must hear of upgrades in place, if there is an output.
    pub fn notifier(&self) -> Option<Box<dyn Notifier>> {
        self.output.notifier(&self.name)
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
            Serial::from_state(&state, self.line.clone(), NoEvents, self.output.writer()).map_err(
                |error| DeviceError::BadState {
                    device: section.name.clone(),
                    reason: error.to_string(),
                },
            )?;
        Ok(())
    }
}

/// Registers of the serial port, schema `serial-16550`, version 1, frozen.
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

    #[test]
    fn state_of_the_serial_port_keeps_its_bytes() {
        let folder =
            std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/state");
        let serial = SerialV1 {
            baud_divisor_low: 1,
            baud_divisor_high: 2,
            interrupt_enable: 3,
            interrupt_identification: 4,
            line_control: 5,
            line_status: 6,
            modem_control: 7,
            modem_status: 8,
            scratch: 9,
            in_buffer: b"typed ahead".to_vec(),
        };
        vmferry_devices::saved::fixtures::check(&folder, &[serial]).unwrap();
    }
}
