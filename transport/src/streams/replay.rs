//! The source's half of the protocol for a target in the same program, from an archive that is small and already here: an upgrade by
//! exec leaves one, while its guest stands. No thread, no socket: what the target says goes in, what the source says comes out.

use super::StreamFault;
use super::loader::{check, unexpected};
use crate::limits::{SECTION_BYTES_MAX, SECTIONS_BYTES_MAX};
use crate::wire::archive::{ArchiveItem, ArchiveReader};
use crate::wire::frame::{SourceFrame, StateEnd, TargetFrame};
use crate::wire::hello::Hello;

/// Plays the source. The archive was read to its end, and found good, before the first word.
#[derive(Debug)]
pub struct Replay {
    awaits: Awaits,
    hello: Hello,
    /// Everything between the hello and COMMIT.
    state: Vec<SourceFrame>,
    end: Option<StateEnd>,
}

/// What the target is to say next.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Awaits {
    HelloReply,
    DataReady,
    Ready,
    Running,
    Nothing,
}

impl Replay {
    /// Reads a whole archive of a guest whose memory stays in place.
    ///
    /// # Errors
    /// It is none, or has memory in it. The host is at fault, or whoever wrote it.
    pub fn new(mut archive: &[u8]) -> Result<Self, StreamFault> {
        let mut reader = ArchiveReader::default();
        let (mut hello, mut state, mut end) = (None, Vec::new(), None);
        while reader.wants() > 0 {
            let Some((piece, rest)) = archive.split_at_checked(reader.wants()) else {
                return Err(reader.ends_early(archive.len() as u64).into());
            };
            archive = rest;
            match reader.feed(piece)? {
                None | Some(ArchiveItem::End) => {}
                Some(ArchiveItem::Hello(first)) => hello = Some(*first),
                Some(ArchiveItem::Control(frame)) => {
                    if let SourceFrame::StateEnd(last) = &frame {
                        end = Some(*last);
                    }
                    state.push(frame);
                }
                Some(ArchiveItem::Ram { .. } | ArchiveItem::RoundEnd(_)) => {
                    return Err(WITH_MEMORY);
                }
            }
        }
        if !archive.is_empty() {
            return Err(reader.goes_on().into());
        }
        let Some(hello) = hello.filter(Hello::is_in_place) else {
            return Err(WITH_MEMORY);
        };
        Ok(Self {
            awaits: Awaits::HelloReply,
            hello,
            state,
            end,
        })
    }

    /// What the source says first.
    pub fn first(&self) -> SourceFrame {
        SourceFrame::Hello(self.hello.clone())
    }

    /// What the source says to what the target says.
    ///
    /// # Errors
    /// The target gives up, and why; or it is ready with something else than what was saved. COMMIT was not said then.
    pub fn answer(&mut self, frame: &TargetFrame) -> Result<Vec<SourceFrame>, StreamFault> {
        let (awaits, said) = match (self.awaits, frame) {
            (_, TargetFrame::Abort(abort)) => {
                return Err(StreamFault::Refused(abort.reason.clone()));
            }
            // Whoever looks whether the source lives hears that it does.
            (_, TargetFrame::Keepalive) => return Ok(vec![SourceFrame::Keepalive]),
            (_, TargetFrame::SwitchoverAck) => return Ok(Vec::new()),
            (Awaits::HelloReply, TargetFrame::HelloReply(_)) => (Awaits::DataReady, Vec::new()),
            (Awaits::DataReady, TargetFrame::DataReady) => {
                (Awaits::Ready, std::mem::take(&mut self.state))
            }
            (Awaits::Ready, TargetFrame::Ready(ready)) => {
                if self.hello.verify {
                    check(ready, self.end.as_ref())?;
                }
                (Awaits::Running, vec![SourceFrame::Commit])
            }
            (Awaits::Running, TargetFrame::Running { .. }) => {
                (Awaits::Nothing, vec![SourceFrame::Finish])
            }
            (_, other) => return Err(unexpected(other)),
        };
        self.awaits = awaits;
        Ok(said)
    }
}

/// Most bytes of an archive without memory: a state, and some more for what frames it.
pub const REPLAY_BYTES_MAX: u64 = SECTIONS_BYTES_MAX + SECTION_BYTES_MAX as u64;

const WITH_MEMORY: StreamFault =
    StreamFault::Kind("there is memory in it, which has stayed in place");

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::units::{MigrationId, RoundId};
    use crate::wire::Section;
    use crate::wire::archive::ArchiveEncoder;
    use crate::wire::frame::{Abort, AbortCode, Ready, Verification};
    use crate::wire::hello::{HelloReply, VersionRange};

    const HASH: u128 = 5;

    fn archive(verify: bool) -> Vec<u8> {
        let hello = Hello {
            versions: VersionRange::OURS,
            migration_id: MigrationId([1; 16]),
            data_connections: 0,
            checksum: false,
            verify,
            software: "old".into(),
            blocks: Vec::new(),
            devices: Vec::new(),
            uuid: None,
            switchover_ack: true,
        };
        let section = Section {
            name: "vcpu/0".into(),
            schema: "x".into(),
            version: 1,
            bytes: Bytes::from_static(b"state"),
        };
        let end = StateEnd {
            sections: 1,
            last_round: RoundId(0),
            guest_runs: true,
            ram_hash: verify.then_some(HASH),
        };
        let mut encoder = ArchiveEncoder::default();
        let mut bytes = encoder.start_in_place();
        for frame in [
            SourceFrame::Hello(hello),
            SourceFrame::Switchover(RoundId(0)),
            SourceFrame::Section(section),
            SourceFrame::StateEnd(end),
        ] {
            let frame = frame.encode();
            encoder.frame(&frame, 0);
            bytes.extend_from_slice(&frame);
        }
        bytes.extend_from_slice(&encoder.end());
        bytes
    }

    fn ready(ram_hash: u128) -> TargetFrame {
        let verification = Some(Verification {
            ram_hash,
            ..Verification::default()
        });
        TargetFrame::Ready(Ready {
            load_us: 0,
            populated_bytes: 0,
            verification,
        })
    }

    fn until_ready(verify: bool) -> Replay {
        let mut replay = Replay::new(&archive(verify)).unwrap();
        assert!(matches!(replay.first(), SourceFrame::Hello(_)));
        let reply = TargetFrame::HelloReply(HelloReply {
            version: VersionRange::OURS.max,
            software: "new".into(),
        });
        assert!(replay.answer(&reply).unwrap().is_empty());
        let state = replay.answer(&TargetFrame::DataReady).unwrap();
        assert!(
            matches!(
                &state[..],
                [
                    SourceFrame::Switchover(_),
                    SourceFrame::Section(_),
                    SourceFrame::StateEnd(_)
                ]
            ),
            "{state:?}"
        );
        replay
    }

    #[test]
    fn it_says_what_a_source_says_and_commits_when_the_target_is_ready() {
        for verify in [false, true] {
            let mut replay = until_ready(verify);
            assert!(
                replay
                    .answer(&TargetFrame::SwitchoverAck)
                    .unwrap()
                    .is_empty()
            );
            let alive = replay.answer(&TargetFrame::Keepalive).unwrap();
            assert_eq!(alive, [SourceFrame::Keepalive]);
            assert_eq!(replay.answer(&ready(HASH)).unwrap(), [SourceFrame::Commit]);
            let running = TargetFrame::Running { resume_us: 1 };
            assert_eq!(replay.answer(&running).unwrap(), [SourceFrame::Finish]);
        }
    }

    #[test]
    fn it_never_commits_to_other_memory_nor_out_of_turn() {
        let error = until_ready(true).answer(&ready(HASH + 1)).unwrap_err();
        assert!(error.to_string().contains("RAM hash"), "{error}");
        let mut early = Replay::new(&archive(false)).unwrap();
        assert!(early.answer(&ready(HASH)).is_err());
        let abort = Abort::new(AbortCode::Device, "no such device".to_owned());
        let error = until_ready(false).answer(&TargetFrame::Abort(abort));
        assert_eq!(error.unwrap_err().to_string(), "no such device");
    }

    #[test]
    fn what_is_cut_changed_or_goes_on_is_never_replayed() {
        let archive = archive(true);
        for cut in 0..archive.len() {
            assert!(Replay::new(&archive[..cut]).is_err(), "{cut} bytes");
            let mut changed = archive.clone();
            changed[cut] ^= 0x10;
            assert!(Replay::new(&changed).is_err(), "byte {cut}");
        }
        let longer = [&archive[..], &[0]].concat();
        assert!(Replay::new(&longer).is_err());
    }

    #[test]
    fn an_archive_with_memory_is_refused() {
        let mut bytes = ArchiveEncoder::default().start();
        bytes.extend_from_slice(&archive(false)[bytes.len()..]);
        assert!(Replay::new(&bytes).is_err());
    }
}
