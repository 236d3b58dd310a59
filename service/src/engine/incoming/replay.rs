//! A source that is no process: what the program before has left in an archive. Nobody connects; the archive answers by itself.

use std::sync::Arc;

use vmferry_transport::control::Address;
use vmferry_transport::proto::{Connection, TargetConfig, TargetError};
use vmferry_transport::streams::{Replay, StreamFault};
use vmferry_transport::wire::frame::{AbortCode, SourceFrame};

use super::{Incoming, Peer};
use crate::engine::clock::Clock;
use crate::engine::event::{Events, OriginId};
use crate::machine::Machine;

impl Incoming {
    /// Begins to load what is in this process already.
    pub(in super::super) fn replay(
        address: Address,
        replay: Replay,
        first: OriginId,
        config: TargetConfig,
        machine: Arc<dyn Machine>,
        clock: Clock,
        events: Events,
    ) -> Self {
        let mut this = Self::new(address, first, config, machine, clock, events);
        this.from_archive = true;
        let (connection, hello) = (Connection(first.0), replay.first());
        let peer = Peer::Replay(Box::new(replay));
        this.links.insert(connection, peer);
        this.core.handle_first_frame(clock.now(), connection, hello);
        this
    }

    /// What an archive has said to the core.
    pub(super) fn replayed(
        &mut self,
        connection: Connection,
        said: Result<Vec<SourceFrame>, StreamFault>,
    ) {
        let now = self.clock.now();
        match said {
            Ok(frames) => {
                for frame in frames {
                    self.core.handle_frame(now, connection, frame);
                }
            }
            // Or the core itself has said why; then it knows.
            Err(error) => {
                let text = format!("cannot load what the old program has left: {error}");
                let error = TargetError::Local(AbortCode::Resources, text);
                self.core.handle_origin_failed(now, error);
            }
        }
    }
}
