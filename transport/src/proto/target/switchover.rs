//! The last round, device state and COMMIT as the target sees them.

use super::Target;
use super::action::{TargetAction, TargetError, TargetJob};
use super::state::Phase;
use crate::limits::SECTIONS_BYTES_MAX;
use crate::units::{Moment, RoundId};
use crate::wire::frame::StateEnd;
use crate::wire::{DeviceSchema, Section};

impl Target {
    pub(super) fn announce(&mut self, now: Moment, round: RoundId) {
        match &mut self.attempt {
            Some(attempt) if attempt.announced.is_none() => {
                attempt.announced = Some(round);
                if attempt.joined.is_empty() {
                    // In place there are no pages to wait for.
                    attempt.last_placed = Some(round);
                }
            }
            _ => self.fail(
                now,
                TargetError::Protocol("the switchover is announced twice".to_owned()),
            ),
        }
    }

    pub(super) fn collect(&mut self, now: Moment, section: Section) {
        let Some(attempt) = &mut self.attempt else {
            return;
        };
        let name = &section.name;
        let fault = if attempt.announced.is_none() || attempt.end.is_some() {
            Some(format!(
                "state of device {name:?} comes outside of the switchover"
            ))
        } else if attempt.sections.iter().any(|other| other.name == *name) {
            Some(format!("state of device {name:?} comes twice"))
        } else if self.config.streamed.contains(name) {
            Some(format!(
                "device {name:?} has a stream, and its state comes as a section"
            ))
        } else if let Err(fault) = fits(&section, &self.config.devices) {
            Some(fault)
        } else if attempt.section_bytes + section.bytes.len() as u64 > SECTIONS_BYTES_MAX {
            Some(format!(
                "device state is over {SECTIONS_BYTES_MAX} bytes in all"
            ))
        } else {
            None
        };
        match fault {
            Some(fault) => self.fail(now, TargetError::Protocol(fault)),
            None => {
                attempt.section_bytes += section.bytes.len() as u64;
                attempt.sections.push(section);
            }
        }
    }

    pub(super) fn end_state(&mut self, now: Moment, end: StateEnd) {
        let Some(attempt) = &mut self.attempt else {
            return;
        };
        let streamed = &self.config.streamed;
        let missing = self.config.devices.iter().find(|device| {
            let named = |name: &String| *name == device.name;
            let mut sections = attempt.sections.iter();
            !streamed.iter().any(named) && !sections.any(|section| named(&section.name))
        });
        let fault = if attempt.announced != Some(end.last_round) || attempt.end.is_some() {
            Some("the end of the device state contradicts the switchover".to_owned())
        } else if usize::from(end.sections) != attempt.sections.len() {
            Some(format!(
                "{} device states were announced, {} came",
                end.sections,
                attempt.sections.len()
            ))
        } else {
            missing.map(|device| format!("no state came for device {:?}", device.name))
        };
        match fault {
            Some(fault) => self.fail(now, TargetError::Protocol(fault)),
            None => {
                attempt.end = Some(end);
                self.load_when_complete(now);
            }
        }
    }

    pub(super) fn load_when_complete(&mut self, now: Moment) {
        let Some(attempt) = &mut self.attempt else {
            return;
        };
        let (Some(end), Some(placed)) = (attempt.end, attempt.last_placed) else {
            return;
        };
        if placed != end.last_round {
            let text = format!(
                "the last round was announced as {}, but is {placed}",
                end.last_round
            );
            self.fail(now, TargetError::Protocol(text));
            return;
        }
        attempt.guest_runs = end.guest_runs;
        let (sections, verify) = (std::mem::take(&mut attempt.sections), attempt.verify);
        self.enter(now, Phase::Loading);
        self.start_job(TargetJob::Load, TargetAction::Load { sections, verify });
    }

    pub(super) fn commit(&mut self, now: Moment) {
        let run = self
            .attempt
            .as_ref()
            .is_some_and(|attempt| attempt.guest_runs);
        self.enter(now, Phase::Starting);
        self.start_job(TargetJob::StartGuest, TargetAction::StartGuest { run });
    }
}

/// Whether a device of ours loads the section.
fn fits(section: &Section, devices: &[DeviceSchema]) -> Result<(), String> {
    let Section {
        name,
        schema,
        version,
        bytes: _,
    } = section;
    let Some(device) = devices.iter().find(|device| device.name == *name) else {
        return Err(format!(
            "state of device {name:?} comes, which does not exist here"
        ));
    };
    if device.schema != *schema || !(device.version_min..=device.version_max).contains(version) {
        return Err(format!(
            "state of device {name:?} is {schema:?} version {version}, its hello allows {:?} versions {} to {}",
            device.schema, device.version_min, device.version_max
        ));
    }
    Ok(())
}
