//! Frames that a hostile peer might send: any frame with any plausible content, and bytes that are nearly frames.

use bytes::Bytes;
use vmferry_transport::units::{MigrationId, PageCount, RoundId};
use vmferry_transport::wire::frame::{
    Abort, AbortCode, Ready, Resolution, SourceFrame, StateEnd, TargetFrame, Verification,
};
use vmferry_transport::wire::hello::{BlockInfo, DataHello, Hello, HelloReply, VersionRange};
use vmferry_transport::wire::{DeviceSchema, Section};

use super::rng::Rng;

/// What a hostile peer knows of the attempt.
#[derive(Clone, Debug)]
pub(super) struct Knowledge {
    pub(super) id: MigrationId,
    pub(super) round: u32,
    pub(super) connections: u16,
    pub(super) blocks: Vec<BlockInfo>,
    pub(super) devices: Vec<DeviceSchema>,
}

pub(super) fn random_id(rng: &mut Rng) -> MigrationId {
    MigrationId([rng.bits() as u8; 16])
}

fn resolution(rng: &mut Rng) -> Resolution {
    rng.pick(&[Resolution::Committed, Resolution::NotCommitted])
}

fn abort(rng: &mut Rng) -> Abort {
    let code = rng.pick(&[
        AbortCode::Cancelled,
        AbortCode::Incompatible,
        AbortCode::Protocol,
        AbortCode::Resources,
        AbortCode::Device,
        AbortCode::Busy,
        AbortCode::Internal,
    ]);
    let length = rng.pick(&[0, 1, 5_000]);
    Abort::new(code, "ä".repeat(length))
}

fn round(rng: &mut Rng, knows: &Knowledge) -> RoundId {
    RoundId(rng.pick(&[
        knows.round,
        knows.round,
        knows.round.wrapping_add(1),
        knows.round.wrapping_sub(1),
        0,
        u32::MAX,
    ]))
}

/// Any frame that a target can send.
pub(super) fn target_frame(rng: &mut Rng, knows: &Knowledge) -> TargetFrame {
    let number = rng.pick(&[0, 1, 1_000, u64::MAX]);
    match rng.below(11) {
        0 => TargetFrame::HelloReply(HelloReply {
            version: rng.pick(&[1, 1, 0, 2, u16::MAX]),
            software: "evil".to_owned(),
        }),
        1 => TargetFrame::DataReady,
        2 | 3 => TargetFrame::RoundPlaced(round(rng, knows)),
        4 | 5 => TargetFrame::Ready(Ready {
            load_us: number,
            populated_bytes: number,
            verification: rng.chance(500).then(|| Verification {
                ram_hash: u128::from(number),
                state_differences: rng.pick(&["", "rip"]).to_owned(),
                took_us: number,
            }),
        }),
        6 => TargetFrame::Running { resume_us: number },
        7 => TargetFrame::Resolved(resolution(rng)),
        8 => TargetFrame::Keepalive,
        9 => TargetFrame::SwitchoverAck,
        _ => TargetFrame::Abort(abort(rng)),
    }
}

pub(super) fn good_hello(knows: &Knowledge) -> Hello {
    Hello {
        versions: VersionRange::OURS,
        migration_id: knows.id,
        data_connections: knows.connections,
        checksum: false,
        verify: true,
        software: "evil".to_owned(),
        blocks: knows.blocks.clone(),
        devices: knows.devices.clone(),
        uuid: None,
        switchover_ack: true,
    }
}

fn hello(rng: &mut Rng, knows: &Knowledge) -> Hello {
    let mut hello = good_hello(knows);
    match rng.below(7) {
        0 => hello.migration_id = random_id(rng),
        1 => hello.data_connections = rng.within(1..=255) as u16,
        2 => hello.blocks.push(BlockInfo {
            name: "ram9".to_owned(),
            pages: PageCount(1),
            page_bytes: 4096,
        }),
        3 => hello.blocks.reverse(),
        4 => _ = hello.devices.pop(),
        5 => hello.blocks[0].pages.0 += 1,
        _ => {}
    }
    hello
}

pub(super) fn section(rng: &mut Rng, knows: &Knowledge) -> Section {
    let device = rng.pick(&knows.devices);
    let mut section = Section {
        name: device.name,
        schema: device.schema,
        version: device.version_max,
        bytes: Bytes::from(vec![7; rng.pick(&[0, 8, 100])]),
    };
    match rng.below(8) {
        0 => section.name = "nobody".to_owned(),
        1 => section.schema = "other".to_owned(),
        2 => section.version = u32::MAX,
        _ => {}
    }
    section
}

/// Any frame that a source can send.
pub(super) fn source_frame(rng: &mut Rng, knows: &Knowledge) -> SourceFrame {
    match rng.below(13) {
        0 => SourceFrame::Hello(hello(rng, knows)),
        1 => SourceFrame::DataHello(DataHello {
            version: rng.pick(&[1, 1, 2]),
            migration_id: if rng.chance(800) {
                knows.id
            } else {
                random_id(rng)
            },
            index: rng.below(u64::from(knows.connections)) as u16,
            count: knows.connections,
        }),
        2 | 3 => SourceFrame::Switchover(round(rng, knows)),
        4 | 5 => SourceFrame::Section(section(rng, knows)),
        6 | 7 => SourceFrame::StateEnd(StateEnd {
            sections: rng.pick(&[knows.devices.len() as u16, 0, u16::MAX]),
            last_round: round(rng, knows),
            guest_runs: rng.chance(500),
            ram_hash: rng.chance(500).then_some(5),
        }),
        8 => SourceFrame::Commit,
        9 => SourceFrame::Resolve(if rng.chance(700) {
            knows.id
        } else {
            random_id(rng)
        }),
        10 => SourceFrame::Finish,
        11 => SourceFrame::Keepalive,
        _ => SourceFrame::Abort(abort(rng)),
    }
}

/// Changes bytes of encoded frames, as broken hardware or a clumsy attacker would.
pub(super) fn mutate(rng: &mut Rng, bytes: &mut Vec<u8>) {
    if bytes.is_empty() {
        return;
    }
    let at = rng.index(bytes.len());
    match rng.below(4) {
        0 => bytes[at] ^= 1 << rng.below(8),
        1 => bytes.truncate(at),
        2 => bytes.insert(at, rng.bits() as u8),
        _ => _ = bytes.remove(at),
    }
}

/// What somebody who is no source of ours sends to a listening target.
pub(super) fn stranger_bytes(rng: &mut Rng, knows: &Knowledge) -> Vec<u8> {
    let mut id = [0xee; 16];
    id[0] = rng.bits() as u8;
    let stranger = Knowledge {
        id: MigrationId(id),
        ..knows.clone()
    };
    match rng.below(5) {
        0 => Vec::new(),
        1 => b"GET / HTTP/1.1\r\nHost: target\r\n\r\n".to_vec(),
        2 => (0..rng.below(100)).map(|_| rng.bits() as u8).collect(),
        // A hello that fits would be a source of its own.
        3 => {
            let mut hello = good_hello(&stranger);
            hello.blocks[0].pages.0 += 1;
            SourceFrame::Hello(hello).encode()
        }
        _ => {
            let frames = (0..rng.within(1..=3)).map(|_| source_frame(rng, &stranger));
            let frames: Vec<_> = frames
                .filter(|frame| !matches!(frame, SourceFrame::Hello(_)))
                .collect();
            frames.iter().flat_map(SourceFrame::encode).collect()
        }
    }
}
