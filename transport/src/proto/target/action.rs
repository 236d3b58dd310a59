//! What goes into the target core and what comes out of it: configuration, actions, jobs, errors.

use crate::limits::Deadlines;
use crate::units::{MigrationId, Uuid};
use crate::wire::frame::{Abort, AbortCode, TargetFrame, Verification};
use crate::wire::hello::BlockInfo;
use crate::wire::{DeviceSchema, Section};

/// A connection, as the driver numbers them. A number is never used twice.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Connection(pub u64);

/// What this side is made of.
#[derive(Clone, Debug)]
pub struct TargetConfig {
    /// RAM blocks.
    pub blocks: Vec<BlockInfo>,
    /// Devices and the versions they load.
    pub devices: Vec<DeviceSchema>,
    /// Names of those devices whose state comes as a stream on the data connections, and not as a section.
    pub streamed: Vec<String>,
    /// Name and version of this software.
    pub software: String,
    /// The VM's UUID, if a source that sends one is to have the same.
    pub uuid: Option<Uuid>,
    /// Guest RAM is that of the source of this attempt, from a hand-over of descriptors: nobody else may come, and no page.
    pub in_place: Option<MigrationId>,
    /// How long to wait for what.
    pub deadlines: Deadlines,
}

/// Status of an incoming migration; the names are QEMU's.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum TargetStatus {
    /// Nothing has arrived.
    #[default]
    None,
    /// A hello was accepted.
    Setup,
    /// Pages arrive.
    Active,
    /// The guest belongs to this side.
    Completed,
    /// Something went wrong, cleanup is under way.
    Failing,
    /// The guest will never run here.
    Failed,
}

impl TargetStatus {
    /// The name in QMP.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Setup => "setup",
            Self::Active => "active",
            Self::Completed => "completed",
            Self::Failing => "failing",
            Self::Failed => "failed",
        }
    }
}

/// Something that takes time and reports back exactly once.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum TargetJob {
    /// Preparing memory and starting the data threads.
    Prepare,
    /// Loading device state.
    Load,
    /// Letting the guest run.
    StartGuest,
    /// Telling the notifiers INCOMING_FAILED.
    NotifyFailed,
    /// Closing all links of the attempt and ending the data threads.
    CloseLinks,
}

/// What the driver is to do.
#[derive(Debug)]
pub enum TargetAction {
    /// Tell everybody: the status is now this.
    StatusChanged(TargetStatus),
    /// Send on a control connection.
    Send(Connection, TargetFrame),
    /// Close a control connection when everything given to `Send` has left.
    Close(Connection),
    /// This connection carries pages from now on; it is number `index` of them.
    AdoptData {
        /// The connection.
        connection: Connection,
        /// Its number.
        index: u16,
    },
    /// Job [`TargetJob::Prepare`]: start receiving on all adopted connections. Reports [`Target::handle_prepared`](super::Target::handle_prepared).
    Prepare,
    /// Job [`TargetJob::Load`]: load all device state. Reports [`Target::handle_loaded`](super::Target::handle_loaded).
    Load {
        /// One section per device.
        sections: Vec<Section>,
        /// Hash all RAM and read the state back.
        verify: bool,
    },
    /// Job [`TargetJob::StartGuest`]: the guest belongs to this side. Reports [`Target::handle_guest_started`](super::Target::handle_guest_started).
    StartGuest {
        /// It ran at the source and is to run here.
        run: bool,
    },
    /// Job [`TargetJob::NotifyFailed`]: tell the notifiers INCOMING_FAILED, so that they give back what they have taken over before the
    /// source hears of the failure. Reports [`Target::handle_notified`](super::Target::handle_notified).
    NotifyFailed,
    /// Job [`TargetJob::CloseLinks`]: end the data threads, close the data connections and the control connection of the attempt,
    /// [`Target::control`](super::Target::control), and no other: somebody may be asking on another. Reports [`Target::handle_links_closed`](super::Target::handle_links_closed).
    CloseLinks,
    /// The attempt has failed and everything is cleaned up.
    Failed {
        /// Why.
        error: TargetError,
        /// READY was sent, so the source may be in doubt: stay reachable for a while.
        linger: bool,
    },
    /// The source knows that the guest is here: nobody will ask any more.
    Settled,
}

/// Why an attempt failed at this side.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum TargetError {
    /// The source gave up and said why.
    #[error("the source gave up: {}", .0.reason)]
    Source(Abort),
    /// The link failed.
    #[error("migration link: {0}")]
    Link(String),
    /// The source broke the protocol.
    #[error("the source broke the protocol: {0}")]
    Protocol(String),
    /// Something failed on this host. The code is what the source is told.
    #[error("{1}")]
    Local(AbortCode, String),
}

impl TargetError {
    pub(super) fn to_abort(&self) -> Abort {
        let code = match self {
            Self::Source(abort) => abort.code,
            Self::Link(_) => AbortCode::Resources,
            Self::Protocol(_) => AbortCode::Protocol,
            Self::Local(code, _) => *code,
        };
        Abort::new(code, self.to_string())
    }
}

/// What loading has found.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// How long it took, in microseconds, without verification.
    pub load_us: u64,
    /// Bytes of RAM that are populated.
    pub populated_bytes: u64,
    /// Present if it was asked for.
    pub verification: Option<Verification>,
}
