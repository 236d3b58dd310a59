//! What goes into the source core and what comes out of it: configuration, actions, jobs, outcomes.

use crate::limits::Deadlines;
use crate::proto::status::MigrationStatus;
use crate::proto::throttle::ThrottleTuning;
use crate::units::{MigrationId, PageCount, RoundId, Uuid};
use crate::wire::frame::{Abort, AbortCode, SourceFrame};
use crate::wire::hello::{BlockInfo, DataHello};
use crate::wire::{DeviceSchema, Section};

/// What an attempt needs to know before it starts.
#[derive(Clone, Debug)]
pub struct SourceConfig {
    /// Names this attempt; random.
    pub migration_id: MigrationId,
    /// Number of data connections, 1 to 255. 0: RAM stays in place. Then there are no rounds; the descriptors of RAM are offered to the
    /// target first, and those with one owner follow when the guest is stopped and the notifiers have agreed.
    pub data_connections: u16,
    /// Checksums over page data.
    pub checksum: bool,
    /// Compare RAM and vCPU state of both sides before READY counts.
    pub verify: bool,
    /// Name and version of this software.
    pub software: String,
    /// RAM blocks.
    pub blocks: Vec<BlockInfo>,
    /// Devices.
    pub devices: Vec<DeviceSchema>,
    /// Whether the guest runs now. A guest that was paused is handed over paused, and left paused on failure.
    pub guest_runs: bool,
    /// The VM's UUID, if the target is to compare it with its own.
    pub uuid: Option<Uuid>,
    /// Do not switch over before the target's devices have said that they are ready for it.
    pub switchover_ack: bool,
    /// Wait for the operator once the guest is stopped, before anything of it is handed over.
    pub pause_before_switchover: bool,
    /// How long to wait for what.
    pub deadlines: Deadlines,
}

/// What the operator may change while the migration runs.
#[derive(Clone, Copy, Debug)]
pub struct SourceTuning {
    /// Longest blackout that is accepted, in microseconds, compared with the prediction.
    pub downtime_limit_us: u64,
    /// The bandwidth that the switchover will have, in bytes per second, as the operator says; `None`: what the rounds measure.
    pub switchover_bytes_per_sec: Option<u64>,
    /// Slow the guest down when rounds do not converge.
    pub auto_converge: Option<ThrottleTuning>,
}

/// Something that takes time and reports back exactly once.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum SourceJob {
    /// Connecting the control connection.
    ConnectControl,
    /// Connecting all data connections.
    ConnectData,
    /// Telling the notifiers SETUP.
    NotifySetup,
    /// Starting the dirty log and finding the pages that exist.
    StartLog,
    /// Sending a round.
    Round,
    /// Fetching the dirty log.
    Sync,
    /// Stopping the guest.
    StopGuest,
    /// Saving device state.
    SaveState,
    /// Closing all connections and ending the data threads.
    CloseLinks,
    /// Stopping the dirty log.
    StopLog,
    /// Telling the notifiers FAILED.
    NotifyFailed,
    /// Telling the notifiers DONE.
    NotifyDone,
    /// Resuming the guest.
    ResumeGuest,
    /// Offering the descriptors, and waiting for the target to build its machine around those of RAM.
    OfferFds,
    /// Handing the other descriptors over.
    HandOverFds,
}

/// What the driver is to do.
#[derive(Debug)]
pub enum SourceAction<P> {
    /// Tell everybody: the status is now this.
    StatusChanged(MigrationStatus),
    /// Tell everybody: this pass over memory begins; QEMU's MIGRATION_PASS.
    PassStarted(u64),
    /// Job [`SourceJob::OfferFds`], in place only: reports [`Source::handle_fds_offered`](super::Source::handle_fds_offered). Nothing that
    /// has one owner may leave.
    OfferFds,
    /// Job [`SourceJob::HandOverFds`], in place only: the guest is stopped and everybody has let go. Reports
    /// [`Source::handle_fds_handed_over`](super::Source::handle_fds_handed_over).
    HandOverFds,
    /// Job [`SourceJob::ConnectControl`]: reports [`Source::handle_control_connected`](super::Source::handle_control_connected).
    ConnectControl,
    /// Send on the control connection.
    SendControl(SourceFrame),
    /// Job [`SourceJob::ConnectData`]: open one connection per hello and send the hello on it.
    ConnectData(Vec<DataHello>),
    /// Job [`SourceJob::NotifySetup`]: tell every notifier SETUP. Reports [`Source::handle_setup_told`](super::Source::handle_setup_told);
    /// a veto is a failed job.
    NotifySetup,
    /// Watch until the guest has let go of its devices, then report [`Source::handle_unplugged`](super::Source::handle_unplugged). Stop
    /// watching when the notifiers are told anything else.
    WatchUnplug,
    /// Job [`SourceJob::StartLog`]: reports [`Source::handle_log_started`](super::Source::handle_log_started).
    StartLog,
    /// Job [`SourceJob::Round`]: send everything found by the last fetch. Reports [`Source::handle_round_sent`](super::Source::handle_round_sent).
    SendRound {
        /// Number of the round.
        round: RoundId,
        /// The guest is stopped: no round follows.
        last: bool,
    },
    /// Job [`SourceJob::Sync`]: add the dirty logs to what the next round sends. Reports [`Source::handle_synced`](super::Source::handle_synced).
    Sync,
    /// Job [`SourceJob::StopGuest`]: the vCPUs, then the devices that write memory by themselves. Reports
    /// [`Source::handle_guest_stopped`](super::Source::handle_guest_stopped), or
    /// [`Source::handle_devices_not_stopped`](super::Source::handle_devices_not_stopped). If it fails, the guest runs on as if nothing had
    /// been asked.
    StopGuest,
    /// Keep the vCPUs from running for this share of the time, in percent; 0 lets them run freely.
    Throttle(u8),
    /// Job [`SourceJob::SaveState`]: make the disks inactive and save the state of every device. Reports [`Source::handle_state_saved`](super::Source::handle_state_saved).
    SaveState {
        /// Hash all RAM too.
        hash_ram: bool,
    },
    /// Job [`SourceJob::CloseLinks`]: end connects, rounds and data threads that are under way, close all connections, after what was
    /// given to `SendControl` has left if the link takes it. Reports [`Source::handle_links_closed`](super::Source::handle_links_closed); nothing of the links may be
    /// reported after that.
    CloseLinks,
    /// Job [`SourceJob::StopLog`]: reports [`Source::handle_log_stopped`](super::Source::handle_log_stopped), also when the log could not be stopped.
    StopLog,
    /// Job [`SourceJob::NotifyFailed`]: tell FAILED to those notifiers that were told SETUP. Reports
    /// [`Source::handle_notified`](super::Source::handle_notified).
    NotifyFailed,
    /// Job [`SourceJob::NotifyDone`]: tell DONE to those notifiers that were told SETUP. Reports
    /// [`Source::handle_notified`](super::Source::handle_notified).
    NotifyDone,
    /// Job [`SourceJob::ResumeGuest`]: make the disks active, and only then let the guest run. The only way to let it run again.
    ResumeGuest(P),
    /// Tell the operator: the outcome cannot be learnt. The guest is stopped here and may run at the target.
    Unresolved,
    /// The attempt is over. The last action.
    Finished(Outcome<P>),
}

/// How an attempt ended.
#[derive(Debug)]
pub enum Outcome<P> {
    /// The guest belongs to the target. The proof keeps it stopped here.
    Completed(P),
    /// The guest is where it was.
    Failed {
        /// Why.
        reason: Reason,
        /// Present if the guest is stopped: it was before, or it could not be resumed.
        stopped: Option<P>,
    },
}

/// Why an attempt failed, sorted by whose fault it is.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Reason {
    /// The operator cancelled.
    #[error("cancelled by the operator")]
    Cancelled,
    /// The target gave up and said why.
    #[error("the target refused: {}", .0.reason)]
    Target(Abort),
    /// The peer broke the protocol.
    #[error("the target broke the protocol: {0}")]
    Protocol(String),
    /// The link failed.
    #[error("migration link: {0}")]
    Link(String),
    /// The peer did not do something in time.
    #[error("the target did not {what} within {after_s} s")]
    Deadline {
        /// What was waited for.
        what: &'static str,
        /// For how long, in seconds.
        after_s: u64,
    },
    /// Something failed on this host.
    #[error("{0}")]
    Local(String),
    /// The target found other memory or device state than was sent.
    #[error("verification failed: {0}")]
    Verification(String),
}

impl Reason {
    /// What the target is told. The text never holds more than the operator of the source would see.
    pub(super) fn to_abort(&self) -> Abort {
        let code = match self {
            Self::Cancelled => AbortCode::Cancelled,
            Self::Target(_) | Self::Local(_) | Self::Verification(_) => AbortCode::Internal,
            Self::Protocol(_) => AbortCode::Protocol,
            Self::Link(_) | Self::Deadline { .. } => AbortCode::Resources,
        };
        Abort::new(code, self.to_string())
    }
}

/// What the first round will send.
#[derive(Clone, Copy, Debug, Default)]
pub struct FirstRound {
    /// Pages that exist.
    pub present: PageCount,
    /// Pages that do not, and are sent as holes.
    pub holes: PageCount,
}

/// What a round has sent.
#[derive(Clone, Copy, Debug, Default)]
pub struct RoundSent {
    /// Pages sent with content.
    pub data: PageCount,
    /// Pages sent as zero.
    pub zero: PageCount,
    /// Bytes on the data connections, headers included.
    pub wire_bytes: u64,
}

/// Saved device state.
#[derive(Clone, Debug, Default)]
pub struct SavedState {
    /// One section per device.
    pub sections: Vec<Section>,
    /// Hash of all RAM, if it was asked for.
    pub ram_hash: Option<u128>,
    /// How long hashing took, in microseconds.
    pub hash_us: u64,
}

/// There is nothing to continue.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("the migration does not wait for the operator (status {0})")]
pub struct ContinueError(pub MigrationStatus);

/// It is too late to cancel.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum CancelError {
    /// COMMIT was sent: the target owns the guest, or nobody knows.
    #[error(
        "the guest has been handed over to the target already; the migration cannot be cancelled any more"
    )]
    Committed,
}
