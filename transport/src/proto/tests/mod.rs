//! Both cores, step by step: every violation of the protocol, and the moments at which events cross.

use bytes::Bytes;

mod in_place;
mod source;
mod switchover;
mod target;

use super::*;
use crate::limits::*;
use crate::units::{MigrationId, Moment, PageCount, RoundId, Uuid};
use crate::wire::frame::{
    Abort, AbortCode, Ready, Resolution, SourceFrame, StateEnd, TargetFrame, Verification,
};
use crate::wire::hello::{BlockInfo, DataHello, Hello, HelloReply, VersionRange};
use crate::wire::{DeviceSchema, Section};

const ID: MigrationId = MigrationId([7; 16]);
const NOW: Moment = Moment(1_000);

/// Stands for the stopped guest.
#[derive(Debug)]
struct Proof;

fn blocks() -> Vec<BlockInfo> {
    vec![BlockInfo {
        name: "ram0".to_owned(),
        pages: PageCount(16),
        page_bytes: 4096,
    }]
}

fn devices() -> Vec<DeviceSchema> {
    ["vcpu/0", "serial/0"]
        .map(|name| DeviceSchema {
            name: name.to_owned(),
            schema: "s".to_owned(),
            version_min: 1,
            version_max: 2,
        })
        .to_vec()
}

fn section(name: &str) -> Section {
    Section {
        name: name.to_owned(),
        schema: "s".to_owned(),
        version: 2,
        bytes: Bytes::from_static(b"state"),
    }
}

fn ready() -> TargetFrame {
    TargetFrame::Ready(Ready {
        load_us: 1,
        populated_bytes: 4096,
        verification: None,
    })
}

fn abort() -> Abort {
    Abort::new(AbortCode::Device, "no such device")
}
