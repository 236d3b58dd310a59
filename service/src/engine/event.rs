//! Everything that can happen to the engine, in one queue: the engine is the only one who changes anything, from these.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use tokio::sync::mpsc;
use vmferry_devices::DeviceError;
use vmferry_transport::control::Stream;
use vmferry_transport::data::{DataSender, ReceiverEvent, RoundWork, SenderEvent};
use vmferry_transport::memory::DirtyMap;
use vmferry_transport::proto::{
    Connection, FirstRound, Loaded, SavedState, SourceJob, TargetError,
};
use vmferry_transport::units::MigrationId;
use vmferry_transport::wire::frame::{FrameBuffer, SourceFrame, TargetFrame};

use super::armed_log::ArmedLog;
use super::dirty_rate::Measured;
use super::guest::StoppedGuest;
use super::inherit::Inherited;
use super::link::LinkEvent;
use super::notify::SetupTold;
use super::ownership::StopError;
use super::passthrough::{Sinks, Sizes, Sources};
use crate::machine::{MachineEvent, ResumeError};
use crate::qmp::EngineRequest;

/// The engine's queue.
pub(super) type Events = mpsc::UnboundedSender<Event>;

/// New connections on their way to the engine. A stream belongs to the control thread while events come from every thread, so the event
/// carries a number and the stream waits here.
#[derive(Clone, Debug, Default)]
pub(super) struct Arrivals(Rc<RefCell<HashMap<u64, (Stream, FrameBuffer)>>>);

impl Arrivals {
    /// Leaves a stream, with what was read from it already.
    pub(super) fn leave(&self, number: u64, stream: Stream, buffer: FrameBuffer) {
        self.0.borrow_mut().insert(number, (stream, buffer));
    }

    /// Takes the stream of an event.
    pub(super) fn take(&self, number: u64) -> Option<(Stream, FrameBuffer)> {
        self.0.borrow_mut().remove(&number)
    }
}

/// Something that happened.
#[derive(Debug)]
pub(super) enum Event {
    /// A command of an operator.
    Request(EngineRequest),
    /// The machine did something unasked.
    Machine(MachineEvent),
    /// Of the outgoing attempt with this number; news of earlier attempts are dropped.
    Source(u64, SourceEvent),
    /// Of the incoming migration.
    Target(TargetEvent),
    /// The guest was asked to let go of the failover primary with this id.
    Unplugging(String),
    /// A stop that an operator asked for is done.
    Stopped(Result<StoppedGuest, StopError>),
    /// A resume that an operator asked for is done.
    Resumed(Result<(), ResumeError>),
    /// A measurement of the dirty rate has got on.
    Measured(Measured),
    /// Those outside know how an exec has ended.
    ToldAfterExec,
    /// A job has panicked. Whoever waits for what it owed has been told.
    JobPanicked,
    /// The process was asked to end by a signal.
    Terminate,
}

/// Something that happened to the outgoing attempt.
#[derive(Debug)]
pub(super) enum SourceEvent {
    /// The stream waits among the attempt's arrivals under this number.
    Connected(u64),
    /// The connect with this number failed.
    ConnectFailed(u64, String),
    DataConnected(DataSender),
    Link(LinkEvent<TargetFrame>),
    Data(SenderEvent),
    /// A data connection has failed, and the target had time to say why.
    DataLost(String),
    /// Notifiers were told SETUP; if none vetoed, what is still waited for.
    SetupTold(SetupTold, Result<Option<String>, String>),
    /// Notifiers were told FAILED or DONE.
    Notified(SourceJob),
    /// The dirty log runs, and devices have begun to give their state.
    LogStarted(ArmedLog, RoundWork, FirstRound, Sources),
    Synced(ArmedLog, DirtyMap, u64, Sizes),
    /// The vCPUs are stopped, and the devices, if none refused.
    Stopped(StoppedGuest, Result<(), String>),
    Saved(SavedState),
    /// What was given away was left as it is, or not.
    LinksClosed {
        left: bool,
    },
    /// In place: the new process has built its machine around our RAM.
    FdsOffered,
    /// In place: the new process has every descriptor.
    FdsHandedOver,
    LogStopped,
    Resumed(Result<(), ResumeError>),
    JobFailed(SourceJob, String),
}

/// Which of the places, one after the other, that an incoming migration could come from: the number of its first connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct OriginId(pub(super) u64);

/// Something that happened to the incoming migration.
#[derive(Debug)]
pub(super) enum TargetEvent {
    /// A connection said its first frame; the stream waits among the arrivals under the connection's number.
    First(Connection, SourceFrame),
    Link(Connection, LinkEvent<SourceFrame>),
    Data(ReceiverEvent),
    /// A data connection of the attempt with this control connection has failed, and the source had time to say why.
    DataLost(Option<Connection>, TargetError),
    /// The archive that plays the source cannot be loaded.
    SourceFailed(OriginId, String),
    /// The one socket to the source has ended.
    SocketEnded(OriginId, String),
    /// The same, and what came before has been seen.
    SocketGone(OriginId, String),
    /// Devices wait for their streams.
    LoadBegun(Result<Sinks, DeviceError>),
    /// What belongs to the process has come from the old one.
    Inherited(Inherited),
    /// Guest memory belongs to no saved guest any more, unless it failed; whether the guest is to run.
    Unmarked(bool, MigrationId, Result<(), String>),
    /// What a failed attempt had put into guest memory is gone.
    Emptied(std::io::Result<()>),
    /// The job is over; the engine takes the proof back before the core learns the result.
    Loaded(StoppedGuest, Result<Loaded, DeviceError>),
    LoadedInto(Result<Loaded, DeviceError>),
    /// The same for starting the guest; the time is in microseconds.
    Started(Result<u64, ResumeError>),
    StartedWith(Result<u64, String>),
    /// The job that was to start the guest has panicked. Nobody knows whether it did.
    StartLost,
    /// Notifiers were told INCOMING_FAILED.
    Notified,
    LinksClosed,
}
