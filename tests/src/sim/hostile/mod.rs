//! Each core against a peer that does not play by the rules, while its own jobs end in any order, well or not.
//!
//! The driver keeps to its contract; the peer does not. Checked: no panic, no guest that runs against I1, no proof lost, an end.

mod source;
mod target;

use vmferry_transport::units::MigrationId;

pub use self::source::fuzz_source;
pub use self::target::fuzz_target;
use super::frames::{self, Knowledge};
use super::rng::Rng;
use super::setup::{block_infos, device};

/// Events of one fuzzed run.
const STEPS: u64 = 150;
/// Events until a run must have ended once the peer is silent and nothing fails any more.
const STEPS_TO_END: u64 = 2_000;

fn knowledge(rng: &mut Rng) -> Knowledge {
    Knowledge {
        id: frames::random_id(rng),
        round: 0,
        connections: rng.within(1..=3) as u16,
        blocks: block_infos(&[16, 4]),
        devices: (0..rng.within(1..=2)).map(device).collect(),
    }
}

/// How deep a fuzzed run got, so that a test can tell that it was not all about the first frame.
#[derive(Clone, Copy, Debug, Default)]
pub struct Depth {
    /// COMMIT was sent or received.
    pub committed: bool,
    /// The guest moved.
    pub completed: bool,
    /// The operator was told that the outcome is unknown.
    pub unresolved: bool,
}

/// What somebody who is no source of ours sends to a listening target.
pub(super) fn stranger_bytes(rng: &mut Rng, blocks: &[u64]) -> Vec<u8> {
    let knows = Knowledge {
        id: MigrationId::default(),
        round: 0,
        connections: 1,
        blocks: block_infos(blocks),
        devices: vec![device(0)],
    };
    frames::stranger_bytes(rng, &knows)
}
