//! Control frames over the wire, whole, changed and in pieces.

use super::*;
use crate::units::{PageCount, Uuid};
use crate::wire::DeviceSchema;
use crate::wire::hello::{BlockInfo, VersionRange};

fn source_frames() -> Vec<SourceFrame> {
    let id = MigrationId([3; 16]);
    vec![
        SourceFrame::Hello(Hello {
            versions: VersionRange::OURS,
            migration_id: id,
            data_connections: 4,
            checksum: true,
            verify: false,
            software: "s".into(),
            blocks: vec![BlockInfo {
                name: "ram0".into(),
                pages: PageCount(9),
                page_bytes: 4096,
            }],
            devices: vec![DeviceSchema {
                name: "d".into(),
                schema: "s".into(),
                version_min: 1,
                version_max: 2,
            }],
            uuid: Some(Uuid([9; 16])),
            switchover_ack: true,
        }),
        SourceFrame::DataHello(DataHello {
            version: 1,
            migration_id: id,
            index: 1,
            count: 4,
        }),
        SourceFrame::Switchover(RoundId(8)),
        SourceFrame::Section(Section {
            name: "vcpu/0".into(),
            schema: "kvm-vcpu".into(),
            version: 1,
            bytes: Bytes::from_static(b"state"),
        }),
        SourceFrame::StateEnd(StateEnd {
            sections: 1,
            last_round: RoundId(8),
            guest_runs: true,
            ram_hash: Some(u128::MAX - 5),
        }),
        SourceFrame::Commit,
        SourceFrame::Resolve(id),
        SourceFrame::Finish,
        SourceFrame::Keepalive,
        SourceFrame::Abort(Abort::new(AbortCode::Cancelled, "operator said so")),
    ]
}

fn target_frames() -> Vec<TargetFrame> {
    let ready = |verification| Ready {
        load_us: 5,
        populated_bytes: 4096,
        verification,
    };
    vec![
        TargetFrame::HelloReply(HelloReply {
            version: 1,
            software: "t".into(),
        }),
        TargetFrame::DataReady,
        TargetFrame::SwitchoverAck,
        TargetFrame::RoundPlaced(RoundId(3)),
        TargetFrame::Ready(ready(None)),
        TargetFrame::Ready(ready(Some(Verification {
            ram_hash: 77,
            state_differences: "rip".into(),
            took_us: 9,
        }))),
        TargetFrame::Running { resume_us: 40 },
        TargetFrame::Resolved(Resolution::Committed),
        TargetFrame::Resolved(Resolution::NotCommitted),
        TargetFrame::Keepalive,
        TargetFrame::Abort(Abort::new(AbortCode::Device, "no such device")),
    ]
}

/// Feeds the bytes one at a time, which is the worst that a link may do.
fn read_back<F: ControlFrame>(bytes: &[u8]) -> Result<Vec<F>, WireError> {
    let mut buffer = FrameBuffer::default();
    let mut frames = Vec::new();
    for byte in bytes {
        buffer.push(&[*byte]);
        while let Some(frame) = buffer.poll_frame()? {
            frames.push(frame);
        }
    }
    assert_eq!(buffer.pending(), 0);
    Ok(frames)
}

#[test]
fn every_frame_survives_the_wire() {
    let bytes: Vec<u8> = source_frames()
        .iter()
        .flat_map(SourceFrame::encode)
        .collect();
    assert_eq!(read_back::<SourceFrame>(&bytes).unwrap(), source_frames());
    let bytes: Vec<u8> = target_frames()
        .iter()
        .flat_map(TargetFrame::encode)
        .collect();
    assert_eq!(read_back::<TargetFrame>(&bytes).unwrap(), target_frames());
}

#[test]
fn every_flipped_bit_is_noticed() {
    for frame in source_frames() {
        let good = frame.encode();
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            let mut buffer = FrameBuffer::default();
            buffer.push(&bad);
            // A longer length is noticed as "more bytes needed": the stream then ends in the middle of a frame.
            let read = buffer.poll_frame::<SourceFrame>();
            assert!(!matches!(read, Ok(Some(_))), "bit {bit} of {frame:?}");
        }
    }
}

#[test]
fn another_protocol_is_recognised_by_its_first_four_bytes() {
    let mut buffer = FrameBuffer::default();
    buffer.push(b"HTTP");
    let error = buffer.poll_frame::<TargetFrame>().unwrap_err();
    assert_eq!(
        error.to_string(),
        "the peer does not speak the vmferry protocol (a frame starts with \"HTTP\")"
    );
}

#[test]
fn a_length_over_the_limit_is_refused_before_the_body_comes() {
    let mut bytes = SourceFrame::Commit.encode();
    bytes[8..12].copy_from_slice(&(CONTROL_BYTES_MAX + 1).to_le_bytes());
    let mut buffer = FrameBuffer::default();
    buffer.push(&bytes);
    assert!(matches!(
        buffer.poll_frame::<SourceFrame>(),
        Err(WireError::TooLong { .. })
    ));
}

#[test]
fn frames_of_the_other_direction_are_refused() {
    let mut buffer = FrameBuffer::default();
    buffer.push(&SourceFrame::Commit.encode());
    assert_eq!(
        buffer.poll_frame::<TargetFrame>(),
        Err(WireError::Kind {
            kind: kind::COMMIT,
            flags: 0
        })
    );
}

#[test]
fn a_long_reason_is_cut_at_a_character() {
    let reason = "ä".repeat(TEXT_BYTES_MAX);
    let bytes = SourceFrame::Abort(Abort::new(AbortCode::Internal, reason)).encode();
    let frames = read_back::<SourceFrame>(&bytes).unwrap();
    let SourceFrame::Abort(abort) = &frames[0] else {
        panic!("{frames:?}")
    };
    assert_eq!(abort.reason.len(), TEXT_BYTES_MAX);
}
